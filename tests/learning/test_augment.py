"""Crops and mirror images: what is drawn, that only the generator decides, and what is done with it."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from refconv_kernels.learning.augment import apply_views, draw_views

DTYPES = [torch.uint8, torch.float32, torch.float64]


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def naive(images: Tensor, views: Tensor, padding: int) -> Tensor:
    """One image after the other."""
    height, width = images.shape[2:]
    made = torch.empty_like(images)
    for n, (row, column, mirrored) in enumerate(views.tolist()):
        cropped = F.pad(images[n], [padding] * 4)[:, row : row + height, column : column + width]
        made[n] = cropped.flip(2) if mirrored else cropped
    return made


# --- drawing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("mirror", [False, True])
def test_views_take_every_value_about_equally_often(padding: int, mirror: bool) -> None:
    views = draw_views(4000, padding, mirror, generator())
    assert views.shape == (4000, 3)
    assert views.dtype == torch.int64
    places = (2 * padding + 1) ** 2
    crops, counts = views[:, :2].unique(dim=0, return_counts=True)
    assert len(crops) == places
    assert (crops.min(), crops.max()) == (0, 2 * padding)
    assert (counts.double() / 4000 - 1 / places).abs().max() < 0.04
    assert set(views[:, 2].tolist()) == ({0, 1} if mirror else {0})
    assert abs(views[:, 2].double().mean().item() - mirror / 2) < 0.03


def test_the_three_are_drawn_apart() -> None:
    views = draw_views(4000, 2, True, generator()).double()
    assert (torch.corrcoef(views.t()) - torch.eye(3)).abs().max() < 0.05


def test_only_the_generator_decides() -> None:
    first = draw_views(20, 2, True, generator(3))
    torch.rand(7)
    assert torch.equal(first, draw_views(20, 2, True, generator(3)))
    assert not torch.equal(first, draw_views(20, 2, True, generator(4)))
    going_on = generator(3)
    assert torch.equal(first, draw_views(20, 2, True, going_on))
    assert not torch.equal(first, draw_views(20, 2, True, going_on))
    before = torch.get_rng_state()
    draw_views(20, 2, True, generator())
    assert torch.equal(before, torch.get_rng_state())


def test_crops_are_the_same_with_and_without_mirror_images() -> None:
    with_it, without = generator(), generator()
    assert torch.equal(draw_views(20, 2, True, with_it)[:, :2], draw_views(20, 2, False, without)[:, :2])
    assert torch.equal(with_it.get_state(), without.get_state())


# --- applying -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 1, 8, 8), (30, 3, 4, 6), (30, 2, 5, 1), (0, 3, 4, 4)])
@pytest.mark.parametrize("padding", [0, 1, 3])
def test_a_batch_is_one_image_after_the_other(shape: tuple[int, ...], padding: int, dtype: torch.dtype) -> None:
    images = torch.randint(1, 256, shape).to(dtype)
    before = images.clone()
    views = draw_views(shape[0], padding, True, generator())
    for layout in (torch.contiguous_format, torch.channels_last):
        got = apply_views(images.to(memory_format=layout), views, padding)
        assert got.dtype == dtype
        assert torch.equal(got, naive(images, views, padding))
        assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)


def test_where_the_numbers_put_an_image() -> None:
    image = torch.tensor([[1, 2], [3, 4]]).reshape(1, 1, 2, 2)
    for view, expected in (
        ((1, 1, 0), [[1, 2], [3, 4]]),  # row and column of the padding: as it was
        ((1, 1, 1), [[2, 1], [4, 3]]),
        ((0, 1, 0), [[0, 0], [1, 2]]),
        ((2, 0, 0), [[0, 3], [0, 0]]),
        ((2, 0, 1), [[3, 0], [0, 0]]),  # cropped, then mirrored
    ):
        assert apply_views(image, torch.tensor([view]), 1)[0, 0].tolist() == expected


def test_parts_of_a_draw_give_parts_of_the_batch() -> None:
    """As several processes share a batch out."""
    images, views = torch.rand(10, 3, 6, 6), draw_views(10, 2, True, generator())
    whole = apply_views(images, views, 2)
    parts = [apply_views(i, v, 2) for i, v in zip(images.tensor_split(3), views.tensor_split(3), strict=True)]
    assert torch.equal(torch.cat(parts), whole)


def test_no_images() -> None:
    views = draw_views(0, 1, True, generator())
    assert views.shape == (0, 3)
    assert apply_views(torch.zeros(0, 3, 4, 4), views, 1).shape == (0, 3, 4, 4)
