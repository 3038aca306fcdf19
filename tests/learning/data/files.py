"""Tiny image files and archives for the tests."""

from __future__ import annotations

import io
import random
from pathlib import Path

from PIL import Image


def picture(seed: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Image.Image:
    """A random picture, ``size`` wide and high."""
    content = random.Random(seed).randbytes(3 * size[0] * size[1])
    return Image.frombytes("RGB", size, content).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    to = io.BytesIO()
    image.save(to, kind, **options)
    return to.getvalue()


def fill(folder: Path, count: int, size: tuple[int, int] = (8, 8), seed: int = 0) -> None:
    """``count`` PNG files in a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture(1000 * seed + number, size).save(folder / f"{number:02}.png")
