"""AdamW on ``W_r`` from the coordinates of the thin form, in Triton (:mod:`refconv_kernels.folded`, docs/numerics.md).

Three launches. The first turns the root, in float64, and lays the root and the first moment out with rows along memory,
as the second reads them. The second goes through the entries of ``W_r``, of which none is stored, and sums up the
direction over a part of the columns; the third, PyTorch's, adds the parts up. Multiply-adds per entry, r the rank:
r(r+1)/2 + 3r, which bound it. Up to rank 9, that of 3x3 kernels, a thread has a row, its root and its sums in registers
(``narrow_direction_kernel``). A larger root is read once for every few rows and tile of columns
(``wide_direction_kernel``). Sums are float32 (float64 for float64) in a fixed order. The square root of a denormal
float32 counts as 0: what is below 1e-19 in ``|U Q_j|``, which matters for ``eps = 0`` only.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from refconv_kernels.backends.triton.launch import accumulator, device_of, options, power_of_2

NOTHING = tl.constexpr(1e-140)  # lengths below it are no rotation: their squares would not be numbers

_MOST_HELD = 9  # rank whose root fits into registers
_PROGRAMS = 1024  # programs of the narrow kernel: several blocks for every multiprocessor
_FEWEST_COLUMNS = 32  # of one of them, which reads a root, a moment and adds a part to the sum
_ROWS = 4  # of a program of the wide kernel, which share what is loaded of a column
_ROOT_TILE = 512  # elements in a tile of the first kernel


# Numbers are float64 arguments: the default, float32, would lose half of the digits of float64 states.
@triton.jit
def root_kernel(
    first, root, gradient, updated, turned, rows, keep: tl.float64, add: tl.float64,
    RANK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The root of ``keep^2 S + add^2 g g^T``; it and the first moment ``turned``, [size of a root + RANK, rows].

    Programs: rows in blocks. A rotation for every row of the root.
    """
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.arange(0, BLOCK_R)
    SIZE: tl.constexpr = RANK * (RANK + 1) // 2
    real = (n < rows)[:, None] & (i < RANK)[None, :]
    to = turned + (n[:, None] + i.to(tl.int64)[None, :] * rows)
    moment = tl.load(first + n[:, None] * RANK + i[None, :], mask=real, other=0)
    rest = tl.load(gradient + n[:, None] * RANK + i[None, :], mask=real, other=0).to(tl.float64) * add
    for k in range(RANK):
        begin = k * RANK - k * (k + 1) // 2  # and entry i of row k at begin + i
        used = real & (i >= k)[None, :]
        at = n[:, None] * SIZE + (begin + i)[None, :]
        row = tl.load(root + at, mask=used, other=0).to(tl.float64) * keep
        here = (i == k)[None, :]
        ours = tl.sum(tl.where(here, row, 0), axis=1)[:, None]
        other = tl.sum(tl.where(here, rest, 0), axis=1)[:, None]
        length = tl.sqrt(ours * ours + other * other)
        nothing = length < NOTHING  # a NaN is none
        length = tl.where(nothing, 1, length)
        cosine = tl.where(nothing, 1, ours / length)
        sine = tl.where(nothing, 0, other / length)
        rotated = (cosine * row + sine * rest).to(updated.dtype.element_ty)
        rest = cosine * rest - sine * row
        tl.store(updated + at, rotated, mask=used)
        tl.store(to, rotated, mask=used)
        to += (RANK - 1 - k) * rows
    tl.store(to + RANK * rows, moment, mask=real)


@triton.jit(do_not_specialize=["chunk"])
def narrow_direction_kernel(
    turned, rotation, partial, rows, per_group, columns, chunk,
    scale_first: tl.float64, scale_second: tl.float64, eps: tl.float64,
    RANK: tl.constexpr, ACCUMULATOR: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums over chunks of columns, [chunks, RANK, rows]. Programs: (rows in blocks, chunks); lanes: rows."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = n < rows
    begin = tl.program_id(1) * chunk
    group = (tl.minimum(n, rows - 1) // per_group).to(tl.int64)
    column = rotation + group * (RANK * columns) + begin
    from_ = turned + n
    root, moment, sums = (), (), ()
    for _ in tl.static_range(RANK * (RANK + 1) // 2):
        # Scaled once for all columns; so is the moment.
        root = root + (tl.load(from_, mask=real, other=0) * tl.full((), scale_second, ACCUMULATOR),)  # type: ignore[assignment]  # noqa: RUF005
        from_ += rows
    for _ in tl.static_range(RANK):
        moment = moment + (tl.load(from_, mask=real, other=0) * tl.full((), scale_first, ACCUMULATOR),)  # type: ignore[assignment]  # noqa: RUF005
        sums = sums + (tl.zeros((BLOCK_N,), dtype=ACCUMULATOR),)  # type: ignore[assignment]  # noqa: RUF005
        from_ += rows
    for _ in range(begin, tl.minimum(begin + chunk, columns)):
        entry = ()
        for k in tl.static_range(RANK):
            entry = entry + (tl.load(column + k * columns),)  # type: ignore[assignment]  # noqa: RUF005
        second = tl.zeros((BLOCK_N,), dtype=ACCUMULATOR)
        first = tl.zeros((BLOCK_N,), dtype=ACCUMULATOR)
        for k in tl.static_range(RANK):
            seen = tl.zeros((BLOCK_N,), dtype=ACCUMULATOR)
            for i in tl.static_range(k, RANK):
                seen += root[k * RANK - k * (k + 1) // 2 + i] * entry[i]
            second += seen * seen
            first += moment[k] * entry[k]
        below = tl.sqrt(second) + tl.full((), eps, ACCUMULATOR)
        ratio = tl.where(below == 0, 0, first / below)
        added = ()
        for k in tl.static_range(RANK):
            added = added + (sums[k] + ratio * entry[k],)  # type: ignore[assignment]  # noqa: RUF005
        sums = added
        column += 1
    to = partial + tl.program_id(1).to(tl.int64) * RANK * rows + n
    for k in tl.static_range(RANK):
        tl.store(to, sums[k], mask=real)
        to += rows


@triton.jit
def _next(from_, ROWS: tl.constexpr):
    """A few elements, one by one."""
    elements = ()
    for r in tl.static_range(ROWS):
        elements = elements + (tl.load(from_ + r),)  # type: ignore[assignment]  # noqa: RUF005
    return elements


@triton.jit
def wide_direction_kernel(
    turned, rotation, partial, rows, per_group, columns,
    scale_first: tl.float64, scale_second: tl.float64, eps: tl.float64,
    RANK: tl.constexpr, ACCUMULATOR: tl.constexpr, ROWS: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Sums over tiles of columns, [tiles, RANK, rows]. Programs: (a few rows of a group, tiles); lanes: columns.

    A row is a tensor of its own: in a tile of several Triton would move all that is loaded through shared memory.
    What lies beyond the last row of a group, and up to ROWS - 1 elements beyond the end, is read but not used.
    """
    blocks = tl.cdiv(per_group, ROWS)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    member = tl.program_id(0) % blocks * ROWS
    at = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    valid = at < columns
    column = rotation + group * (RANK * columns) + at
    from_ = turned + group * per_group + member
    zero = tl.zeros((BLOCK_J,), dtype=ACCUMULATOR)
    second, first = (), ()
    for _ in tl.static_range(ROWS):
        second, first = second + (zero,), first + (zero,)  # type: ignore[assignment]  # noqa: RUF005
    for k in range(RANK):
        seen = ()
        for _ in tl.static_range(ROWS):
            seen = seen + (zero,)  # type: ignore[assignment]  # noqa: RUF005
        for i in tl.range(k, RANK, loop_unroll_factor=2):
            entry = tl.load(column + i * columns, mask=valid, other=0)
            root = _next(from_, ROWS)
            added = ()
            for r in tl.static_range(ROWS):
                added = added + (seen[r] + root[r] * entry,)  # type: ignore[assignment]  # noqa: RUF005
            seen = added
            from_ += rows
        squares = ()
        for r in tl.static_range(ROWS):
            squares = squares + (second[r] + seen[r] * seen[r],)  # type: ignore[assignment]  # noqa: RUF005
        second = squares
    for k in range(RANK):
        entry = tl.load(column + k * columns, mask=valid, other=0)
        moment = _next(from_, ROWS)
        added = ()
        for r in tl.static_range(ROWS):
            added = added + (first[r] + moment[r] * entry,)  # type: ignore[assignment]  # noqa: RUF005
        first = added
        from_ += rows
    ratio = ()
    for r in tl.static_range(ROWS):
        below = tl.sqrt(second[r]) * tl.full((), scale_second, ACCUMULATOR) + tl.full((), eps, ACCUMULATOR)
        above = first[r] * tl.full((), scale_first, ACCUMULATOR)
        ratio = ratio + (tl.where(below == 0, 0, above / below),)  # type: ignore[assignment]  # noqa: RUF005
    to = partial + tl.program_id(1).to(tl.int64) * RANK * rows + group * per_group
    for k in range(RANK):
        entry = tl.load(column + k * columns, mask=valid, other=0)
        for r in tl.static_range(ROWS):
            tl.store(to + member + r, tl.sum(ratio[r] * entry), mask=member + r < per_group)
        to += rows


# --- launches ------------------------------------------------------------------------------------------------


def folded_adam(
    first: Tensor,
    root: Tensor,
    gradient: Tensor,
    rotation: Tensor,
    keep: float,
    scale_first: float,
    scale_second: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The direction ``[N, r]`` and the updated root; arguments as in the operator ``folded_adam``."""
    first, root, gradient, rotation = (t.contiguous() for t in (first, root, gradient, rotation))
    direction, updated = torch.empty_like(first), torch.empty_like(root)
    if direction.numel() == 0:
        return direction, updated
    rows, rank = first.shape
    turned = root.new_empty((root.shape[1] + rank) * rows + _ROWS - 1)
    block_r = power_of_2(rank)
    block_n = max(1, _ROOT_TILE // block_r)
    with device_of(first):
        root_kernel[(triton.cdiv(rows, block_n),)](
            first, root, gradient, updated, turned, rows, math.sqrt(keep), math.sqrt(1 - keep),
            RANK=rank, BLOCK_N=block_n, BLOCK_R=block_r, **options(first, 168),
        )  # fmt: skip
        partial = _partial_sums(turned, rotation, rows, (scale_first, scale_second, eps))
        torch.sum(partial.transpose(1, 2), 0, out=direction)
    return direction, updated


def _partial_sums(turned: Tensor, rotation: Tensor, rows: int, scales: tuple[float, float, float]) -> Tensor:
    """Directions of parts of the columns, ``[parts, r, N]``."""
    groups, rank, columns = rotation.shape
    per_group = rows // groups
    constants = {"RANK": rank, "ACCUMULATOR": accumulator(turned)}
    if rank <= _MOST_HELD:
        block_n = 64
        blocks = triton.cdiv(rows, block_n)
        chunks = max(1, min(_PROGRAMS // blocks, columns // _FEWEST_COLUMNS))
        chunk = triton.cdiv(columns, chunks)
        partial = turned.new_empty(triton.cdiv(columns, chunk), rank, rows)
        narrow_direction_kernel[(blocks, len(partial))](
            turned, rotation, partial, rows, per_group, columns, chunk, *scales, **constants,
            BLOCK_N=block_n, num_warps=2, **options(turned, 168),
        )  # fmt: skip
        return partial
    block_j = 128 if turned.dtype == torch.float64 else 256
    partial = turned.new_empty(triton.cdiv(columns, block_j), rank, rows)
    # One warp, whose sums over columns need no shared memory.
    wide_direction_kernel[(groups * triton.cdiv(per_group, _ROWS), len(partial))](
        turned, rotation, partial, rows, per_group, columns, *scales, **constants,
        ROWS=_ROWS, BLOCK_J=block_j, num_warps=1, **options(turned, 168),
    )  # fmt: skip
    return partial
