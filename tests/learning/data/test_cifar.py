"""CIFAR in its four forms, and pickles that are more than data."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from refconv_kernels.learning.data import load
from refconv_kernels.learning.data.inert_pickle import as_bytes_array, read_pickle
from refconv_kernels.learning.errors import DataError

BATCHES = [f"data_batch_{number}" for number in range(1, 6)]
RNG = np.random.default_rng(0)


def records(count: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    return RNG.integers(0, 256, (count, 3072), dtype=np.uint8), RNG.integers(0, classes, count)


Written = list[tuple[np.ndarray, np.ndarray]]


def ten_binary(folder: Path) -> Written:
    parts = [records(3, 10) for _ in range(6)]
    for name, (pixels, labels) in zip([*BATCHES, "test_batch"], parts, strict=True):
        (folder / f"{name}.bin").write_bytes(np.hstack([labels.astype(np.uint8)[:, None], pixels]).tobytes())
    (folder / "batches.meta.txt").write_text("\n".join("abcdefghij") + "\n\n")
    return parts


def hundred_binary(folder: Path) -> Written:
    parts = [records(4, 100), records(2, 100)]
    for name, (pixels, labels) in zip(("train", "test"), parts, strict=True):
        both = np.stack([labels // 5, labels], 1).astype(np.uint8)  # coarse, fine
        (folder / f"{name}.bin").write_bytes(np.hstack([both, pixels]).tobytes())
    (folder / "fine_label_names.txt").write_text("\n".join(f"class{n}" for n in range(100)) + "\n")
    return parts


def ten_python(folder: Path, protocol: int = 2, key: Callable[[str], object] = str.encode) -> Written:
    parts = [records(3, 10) for _ in range(6)]
    for name, (pixels, labels) in zip([*BATCHES, "test_batch"], parts, strict=True):
        content = {key("data"): pixels, key("labels"): labels.tolist(), key("filenames"): [key("a.png")] * 3}
        (folder / name).write_bytes(pickle.dumps(content, protocol))
    names = [key(name) for name in "abcdefghij"]
    (folder / "batches.meta").write_bytes(pickle.dumps({key("label_names"): names}, protocol))
    return parts


def hundred_python(folder: Path) -> Written:
    parts = [records(4, 100), records(2, 100)]
    for name, (pixels, labels) in zip(("train", "test"), parts, strict=True):
        content = {b"data": np.asfortranarray(pixels), b"fine_labels": labels.tolist(), b"coarse_labels": [0] * 4}
        (folder / name).write_bytes(pickle.dumps(content))
    names = [f"class{n}".encode() for n in range(100)]
    (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": names}))
    return parts


FORMS = [
    (ten_binary, "CIFAR-10", tuple("abcdefghij"), "batches.meta.txt"),
    (hundred_binary, "CIFAR-100", tuple(f"class{n}" for n in range(100)), "fine_label_names.txt"),
    (ten_python, "CIFAR-10", tuple("abcdefghij"), "batches.meta"),
    (hundred_python, "CIFAR-100", tuple(f"class{n}" for n in range(100)), "meta"),
]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(("write", "name", "classes", "meta"), FORMS)
def test_each_form(
    tmp_path: Path, write: Callable[[Path], Written], name: str, classes: tuple[str, ...], meta: str, inside: bool
) -> None:
    folder = tmp_path / "cifar" if inside else tmp_path
    folder.mkdir(exist_ok=True)
    *train, test = write(folder)
    (tmp_path / "readme.html").touch()
    data = load(str(tmp_path), image_size=32)
    assert (data.name, data.train.classes, data.train.shape, data.train.mirrored) == (name, classes, (3, 32, 32), True)
    for part, written in ((data.train, train), (data.test, [test])):
        pixels = torch.from_numpy(np.concatenate([pixels for pixels, _ in written]))
        assert torch.equal(part.take(torch.arange(len(part))), pixels.view(-1, 3, 32, 32) / 255)
        assert part.labels.tolist() == np.concatenate([labels for _, labels in written]).tolist()
    (folder / meta).unlink()
    assert load(str(tmp_path)).test.classes == tuple(map(str, range(len(classes))))


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("key", [str, str.encode])
def test_every_protocol(tmp_path: Path, protocol: int, key: Callable[[str], object]) -> None:
    *_, (pixels, labels) = ten_python(tmp_path, protocol, key)
    data = load(str(tmp_path))
    assert torch.equal(data.test.take(torch.arange(3)).flatten(1), torch.from_numpy(pixels) / 255)
    assert data.test.labels.tolist() == labels.tolist()
    assert data.test.classes == tuple("abcdefghij")


def test_a_pickle_of_python_2(tmp_path: Path) -> None:
    # Protocol 2 as Python 2 wrote it: strings as bytes (U), the array's content among them.
    path = tmp_path / "old"
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02K\x03\x86" + dtype
    path.write_bytes(b"\x80\x02}(U\x04data" + array + b"\x89U\x06\x00\x01\x02\xfd\xfe\xfftbU\x06labels](K\x07K\x08eu.")
    content = read_pickle(path)
    assert isinstance(content, dict)
    assert content["labels"] == [7, 8]
    array_read = as_bytes_array(content["data"])
    assert array_read is not None
    assert array_read.tolist() == [[0, 1, 2], [253, 254, 255]]


class Malicious:
    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def test_a_pickle_that_would_run_something_is_refused(tmp_path: Path) -> None:
    ten_python(tmp_path)
    for trick in (
        Malicious(os.mkdir, str(tmp_path / "done")),
        Malicious(eval, f"__import__('os').mkdir({str(tmp_path / 'done')!r})"),
        Malicious(getattr, "text", "upper"),
    ):
        (tmp_path / "data_batch_2").write_bytes(pickle.dumps({b"data": trick, b"labels": []}))
        with pytest.raises(
            DataError, match=r"data_batch_2 cannot be read as a pickle of CIFAR: it refers to \w+\.\w+; NumPy"
        ):
            load(str(tmp_path))
        assert not (tmp_path / "done").exists()


def test_what_is_permitted_is_not_executed_either(tmp_path: Path) -> None:
    path = tmp_path / "forged"
    path.write_bytes(b"cnumpy\nndarray\n(J\xff\xff\xff\x7ftR.")  # an array of 2 ** 31 numbers
    assert as_bytes_array(read_pickle(path)) is None
    path.write_bytes(b"cnumpy\ndtype\n}U\x08__call__Nsb.")  # attributes of a global
    read_pickle(path)
    assert np.dtype("u1").itemsize == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as a pickle of CIFAR: Ran out of input"),
        (b"no pickle", "cannot be read as a pickle of CIFAR"),
        (pickle.dumps([1]), "must hold a dictionary with data and labels"),
        (pickle.dumps({"data": 1}), "must hold a dictionary with data and labels"),
        (pickle.dumps({"data": [1], "labels": [1]}), r"data is no array of bytes; it is uint8, \[N, 3072\]"),
        (pickle.dumps({"data": np.zeros((1, 3072)), "labels": [1]}), r"data is no array of bytes"),
        (pickle.dumps({"data": np.zeros((1, 99), np.uint8), "labels": [1]}), r"data is \[1, 99\]; it is uint8"),
        (pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [1, 2]}), r"labels must be a list of whole"),
        (pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": ["1"]}), r"one for each of the 1 images"),
        (pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}), r"has the label 10; those of CIFAR-10"),
        (pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [-1]}), r"has the label -1; those of CIFAR-10"),
        (
            pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [10**30]}),
            r"has the label 10{30}; those of CIFAR-10 are 0 to 9",
        ),
    ],
)
def test_python_files_that_cannot_be_used(tmp_path: Path, content: bytes, message: str) -> None:
    ten_python(tmp_path)
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(DataError, match=rf"test_batch:? .*{message}"):
        load(str(tmp_path))


def test_binary_files_that_cannot_be_used(tmp_path: Path) -> None:
    ten_binary(tmp_path)
    file = tmp_path / "data_batch_3.bin"
    for content, message in (
        (file.read_bytes()[:-1], r"has 9218 bytes; an image of CIFAR-10 takes 3073"),
        (b"", r"has 0 bytes"),
        (b"\x0a" * 3073, r"has the label 10; those of CIFAR-10 are 0 to 9"),
    ):
        file.write_bytes(content)
        with pytest.raises(DataError, match=rf"data_batch_3.bin {message}"):
            load(str(tmp_path))
    file.unlink()
    with pytest.raises(DataError, match=r"lacks data_batch_3.bin of CIFAR-10"):
        load(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"a\nb\n"])
def test_names_of_classes_that_cannot_be_used(tmp_path: Path, content: bytes) -> None:
    ten_binary(tmp_path)
    (tmp_path / "batches.meta.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"batches.meta.txt must hold the names of the 10 classes of CIFAR-10"):
        load(str(tmp_path))


def test_several_folders_of_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        ten_binary(tmp_path / name)
    with pytest.raises(DataError, match=r"has several folders of CIFAR files, .*one, .*two: name one of them"):
        load(str(tmp_path))
