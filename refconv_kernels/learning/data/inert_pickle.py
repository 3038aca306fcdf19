"""Pickles as data. Unpickling calls what the file names; here it only notes the calls, and executes none.

Not even NumPy's own functions: what a forged state does to an array or its dtype is not ours to find out.
"""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path

import torch
from torch import Tensor

from refconv_kernels.learning.errors import DataError

__all__ = ["as_bytes_array", "read_pickle"]

_RECONSTRUCT, _FROM_BUFFER, _DTYPE, _NDARRAY, _ENCODE = "_reconstruct", "_frombuffer", "dtype", "ndarray", "encode"
_PERMITTED = {
    ("numpy.core.multiarray", _RECONSTRUCT),
    ("numpy._core.multiarray", _RECONSTRUCT),
    ("numpy.core.numeric", _FROM_BUFFER),
    ("numpy._core.numeric", _FROM_BUFFER),
    ("numpy", _DTYPE),
    ("numpy", _NDARRAY),
    ("_codecs", _ENCODE),  # bytes, in the protocols that have none
}


class _Call:
    """A call that the pickle asks for, and the state that it sets on the result."""

    def __init__(self, name: str, arguments: tuple[object, ...]) -> None:
        self.name = name
        self.arguments = arguments
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Global:
    """A name of a module, which is not imported."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *arguments: object) -> _Call:
        return _Call(self.name, arguments)


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _PERMITTED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}; NumPy arrays and plain values are permitted")
        return _Global(name)


def read_pickle(file: Path) -> object:
    """What a pickle holds: dictionaries, lists and plain values; bytes in keys and lists are made strings.

    Raises:
        DataError: it is none, or it names anything but NumPy's arrays.
    """
    content = file.read_bytes()
    try:
        # Strings of Python 2 may be bytes or text: bytes, until it is known which.
        return _text(_Reader(io.BytesIO(content), encoding="bytes").load())
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(f"{file} cannot be read as a pickle of CIFAR: {error or type(error).__name__}") from error


def _text(value: object) -> object:
    if isinstance(value, dict):
        return {_text(key): content if isinstance(content, _Call) else _text(content) for key, content in value.items()}
    if isinstance(value, list):
        return [_text(item) for item in value]
    raw = _bytes(value)
    return value if raw is None else raw.decode("utf-8", "replace")


def as_bytes_array(value: object) -> Tensor | None:
    """The array of bytes that ``value``, out of a pickle, describes, as uint8; None if it does not."""
    if not isinstance(value, _Call):
        return None
    if value.name == _FROM_BUFFER and len(value.arguments) == 4:
        content, dtype, shape, order = value.arguments
        fortran = order == "F"
    elif value.name == _RECONSTRUCT and isinstance(value.state, tuple) and len(value.state) == 5:
        _, shape, dtype, fortran, content = value.state
    else:
        return None
    raw = _bytes(content)
    if raw is None or not isinstance(dtype, _Call) or dtype.name != _DTYPE or dtype.arguments[:1] not in _BYTE_DTYPES:
        return None
    if not isinstance(shape, tuple) or any(type(size) is not int or size < 0 for size in shape):
        return None
    if not raw or len(raw) != math.prod(shape):
        return None
    flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    return flat.view(shape[::-1]).permute(*range(len(shape))[::-1]) if fortran else flat.view(shape)


_BYTE_DTYPES = (("u1",), (b"u1",))


def _bytes(value: object) -> bytes | None:
    """``value`` as bytes, also where it is the call that makes them."""
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if isinstance(value, _Call) and value.name == _ENCODE and len(value.arguments) == 2:
        text, encoding = value.arguments
        if isinstance(text, str) and encoding == "latin1":
            return text.encode("latin1")
    return None
