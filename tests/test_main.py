"""``python -m refconv_kernels info``, and what the command line refuses."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys

import pytest
import torch

import refconv_kernels
from refconv_kernels import ops, use_backend
from refconv_kernels.__main__ import main
from refconv_kernels.autograd import native
from refconv_kernels.backends import cpu, triton
from tests.conftest import needs_native

DEPTHWISE = ["info", "--problem", "grouped_conv2d", "--shape", "2,8,9,9", "--weight", "8,1,3,3"]
REFOCUS = ["info", "--problem", "refocus_weight", "--weight", "8,1,3,3"]


def printed(capsys: pytest.CaptureFixture, arguments: list[str]) -> list[str]:
    assert main(arguments) == 0
    return capsys.readouterr().out.splitlines()


def test_info_names_versions_and_every_backend(capsys: pytest.CaptureFixture) -> None:
    lines = printed(capsys, ["info"])
    versions = (refconv_kernels.__version__, torch.__version__, platform.python_version())
    assert all(version in lines[0] for version in versions)
    assert lines[1] == platform.platform()
    assert "backend asked for: auto" in lines
    for backend, reason in ops.UNAVAILABLE.items():
        (line,) = (line for line in lines if re.match(rf"{backend}\b", line))
        assert line.split(maxsplit=1)[1].startswith("available: " if reason is None else f"off: {reason}")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("", "off (REFCONV_AUTOTUNE=1 turns it on)"),
        ("1", "on, choices kept in kept here"),
        ("yes", "REFCONV_AUTOTUNE (='yes') must be 0 or 1"),
    ],
)
def test_info_tells_about_autotuning(value: str, said: str) -> None:
    env = {**os.environ, "REFCONV_AUTOTUNE": value, "REFCONV_CACHE_DIR": "kept here", "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-m", "refconv_kernels", "info"], capture_output=True, text=True, env=env)
    assert said in (done.stderr if value == "yes" else done.stdout)


@needs_native
def test_info_describes_the_native_library(capsys: pytest.CaptureFixture) -> None:
    assert cpu.native is not None
    lines = printed(capsys, ["info"])
    assert f"  instruction set in use: {cpu.native.instruction_set()}" in lines
    assert f"  instruction sets: {', '.join(cpu.native.instruction_sets())}" in lines
    assert f"  compiler: {cpu.native.build_info()['compiler']}" in lines
    there = "in C++" if native.unavailable is None else f"in Python: {native.unavailable}"
    assert f"  autograd Functions: {there}" in lines


@needs_native
def test_info_tells_why_autograd_functions_are_pythons(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "unavailable", "another release")
    assert "  autograd Functions: in Python: another release" in printed(capsys, ["info"])


def test_info_without_the_native_library(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "native", None)
    monkeypatch.setitem(ops.UNAVAILABLE, "cpu", "no compiler")
    lines = printed(capsys, ["info"])
    assert "cpu        off: no compiler" in lines
    assert "native library" not in lines
    lines = printed(capsys, DEPTHWISE)
    assert "cpu        off: no compiler" in lines


def test_info_shows_the_backend_asked_for(capsys: pytest.CaptureFixture) -> None:
    with use_backend("reference"):
        assert "backend asked for: reference" in printed(capsys, ["info"])
        assert printed(capsys, REFOCUS)[0] == "refocus_weight runs on: reference"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (DEPTHWISE, None),
        ([*DEPTHWISE, "--dtype", "float64", "--groups", "8"], None),
        ([*DEPTHWISE, "--dtype", "bfloat16"], None),
        ([*DEPTHWISE, "--channels-last"], None),
        ([*DEPTHWISE, "--stride", "2"], None),
        ([*DEPTHWISE, "--dtype", "complex64"], "input has dtype torch.complex64, the kernel covers float32, float64"),
        ([*DEPTHWISE[:-1], "16,1,3,3", "--groups", "8", "--channels-last"], None),
        ([*DEPTHWISE[:-1], "8,4,3,3", "--groups", "2"], None),
        ([*DEPTHWISE[:-1], "8,8,3,3"], "groups (=1): the kernel is for grouped and depthwise convolutions"),
        ([*REFOCUS[:-1], "64,64,5,5", "--groups", "1"], "covers it, but auto leaves it: refocus groups of 1 kernels"),
        (REFOCUS, None),
        ([*DEPTHWISE[:2], "refconv2d", *DEPTHWISE[3:]], None),
        ([*DEPTHWISE[:2], "refconv2d", *DEPTHWISE[3:], "--dtype", "bfloat16"], None),
        ([*DEPTHWISE[:2], "thin_refconv2d", *DEPTHWISE[3:], "--dtype", "bfloat16"], None),
        ([*DEPTHWISE[:2], "thin_refconv2d", *DEPTHWISE[3:], "--dtype", "complex64"], "basis has dtype torch.complex64"),
        ([*REFOCUS[:1], "--problem", "thin_refocus_weight", *REFOCUS[3:], "--dtype", "float16"], None),
        ([*REFOCUS[:-1], "16,2,3,3", "--groups", "8"], None),
        ([*REFOCUS[:1], "--problem", "fused_sgd", *REFOCUS[3:-1], "64,64,3,3"], None),
        ([*REFOCUS[:1], "--problem", "fused_sgd", *REFOCUS[3:-1], "64,1,3,3"], None),
        ([*REFOCUS[:1], "--problem", "fused_sgd", *REFOCUS[3:-1], "64,1,5,5"], "W_b (64, 1, 5, 5), W_r (64, 64, 3, 3)"),
        ([*REFOCUS, "--dtype", "complex64"], "basis has dtype torch.complex64"),
        ([*REFOCUS, "--dtype", "float16"], None),  # transformed in float32
    ],
)
@needs_native
def test_a_problem_is_explained(capsys: pytest.CaptureFixture, arguments: list[str], reason: str | None) -> None:
    first, *lines = printed(capsys, arguments)
    other = "two steps (ask about " if arguments[2].endswith("refconv2d") else "reference"
    assert first.startswith(f"{arguments[2]} runs on: {'cpu' if reason is None else other}")
    told = dict(line.split(maxsplit=1) for line in lines)
    assert list(told) == list(ops.UNAVAILABLE)
    assert told["reference"] == "covers it"
    assert told["cpu"].startswith(reason or "covers it")


@pytest.mark.parametrize(
    ("problem", "shape", "weight", "more", "how"),
    [
        ("grouped_conv2d", "2,8,28,28", "8,1,3,3", [], "by 3x3 planes( in columns|, some rows at once) .*"),
        ("grouped_conv2d", "2,8,14,14", "8,1,3,3", ["--stride", "2"], "by 3x3 planes, two to a vector (avx512)"),
        ("grouped_conv2d", "2,8,7,7", "8,1,3,3", ["--dtype", "bfloat16"], "by 3x3 planes, two to a vector (avx512)"),
        ("grouped_conv2d", "2,8,14,14", "8,1,3,3", ["--stride", "3"], "by small planes, channels in the lanes"),
        ("grouped_conv2d", "2,8,7,7", "8,1,3,3", ["--channels-last"], "by channels_last rows, 3x3"),
        ("grouped_conv2d", "16,96,28,28", "96,1,3,3", ["--channels-last"], "by channels_last tiles of 2x2 pixels, 3x3"),
        ("grouped_conv2d", "2,8,7,7", "8,1,5,5", ["--channels-last"], "by channels_last tiles"),
        ("grouped_conv2d", "2,8,7,7", "16,1,3,3", ["--channels-last", "--groups", "8"], "by channels_last tiles"),
        (
            *("grouped_conv2d", "2,8,7,7", "8,1,2,2", ["--channels-last"]),
            r"by channels_last pixels, without a copy \(.*\), backward by channels_last tiles \(.*\)",
        ),
        ("grouped_conv2d", "2,8,7,7", "8,4,3,3", ["--channels-last", "--groups", "2"], "by channels_last tiles"),
        ("grouped_conv2d", "2,8,28,28", "8,2,3,3", ["--groups", "4"], "by padded planes of a group"),
        ("grouped_conv2d", "2,32,7,7", "32,2,3,3", ["--groups", "16"], "by small planes, channels in the lanes"),
        ("refocus_weight", None, "8,1,3,3", [], "as a product with the unfolded basis: rows of 72 entries"),
        ("refocus_weight", None, "8,8,3,3", [], "with as many 3x3 kernels at once as a vector has lanes"),
        ("refocus_weight", None, "4,1,5,5", [], "with scalar code: rows of 36 entries"),
        ("refconv2d", "2,8,30,30", "8,1,5,5", [], "as a product .* convolved by padded planes"),
        ("refconv2d", "2,8,30,30", "8,8,3,3", [], "with as many 3x3 .*; convolved by PyTorch: groups \\(=1\\): the"),
        ("thin_refconv2d", "2,8,30,30", "8,1,5,5", [], "with W_t made in the same call; convolved by padded planes"),
    ],
)
@needs_native
def test_the_kernel_is_named(
    capsys: pytest.CaptureFixture, problem: str, shape: str | None, weight: str, more: list[str], how: str
) -> None:
    if "avx512" in how and "avx512" not in cpu.native.instruction_sets():
        how = "by 3x3 planes( in columns|, some rows at once) .*"  # two planes need vectors of 16 floats
    described = ["--weight", weight, *([] if shape is None else ["--shape", shape]), *more]
    (line,) = (t for t in printed(capsys, ["info", "--problem", problem, *described]) if t.startswith("cpu"))
    pattern = how if ".*" in how else re.escape(how)
    assert re.match(f"cpu        covers it {pattern}", line)


def test_a_problem_on_a_gpu_is_explained_without_one(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "INTERPRETED", False)
    monkeypatch.setitem(ops.UNAVAILABLE, "triton", None)
    both, folded = [*DEPTHWISE[:2], "refconv2d", *DEPTHWISE[3:]], [*REFOCUS[:2], "folded_adam", *REFOCUS[3:]]
    for problem in (DEPTHWISE, REFOCUS, both, folded):
        lines = printed(capsys, [*problem, "--device", "cuda"])
        assert lines[0] == f"{problem[2]} runs on: triton"
        (line,) = (line for line in lines if line.startswith("triton"))
        how = " as separate kernels: 8 channels of 162 pixels in 3x3 kernels; one kernel takes NCHW, 512 channels"
        assert line.startswith(f"triton     covers it{how if problem[2] == 'refconv2d' else ''}")
    small = ["info", "--problem", "refconv2d", "--shape", "128,960,7,7", "--weight", "960,1,3,3", "--device", "cuda"]
    line = "triton     covers it as one kernel each way: 960 channels of 6272 pixels in 3x3 kernels, NCHW"
    assert line in printed(capsys, small)
    lines = printed(capsys, [*DEPTHWISE[:-1], "8,4,3,3", "--groups", "2", "--device", "cuda"])
    assert lines[0] == "grouped_conv2d runs on: reference"
    assert "triton     groups (=2) differs from in_channels (=8), the kernel is depthwise" in lines


def test_a_backend_without_the_operator(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ops.UNAVAILABLE, "cuda", None)
    assert "cuda       no refocus_weight kernel" in printed(capsys, REFOCUS)


@needs_native
def test_the_optimizers_kernel(capsys: pytest.CaptureFixture) -> None:
    problem = ["info", "--problem", "folded_adam", "--weight", "8,1,3,3"]
    assert printed(capsys, [*problem, "--dtype", "bfloat16"])[0] == "folded_adam runs on: cpu"  # in float32
    assert "cpu        first has dtype torch.complex64, the kernel covers float32, float64" in printed(
        capsys, [*problem, "--dtype", "complex64"]
    )


@needs_native
def test_a_backend_asked_for_that_does_not_cover_the_problem(capsys: pytest.CaptureFixture) -> None:
    with use_backend("cpu"):
        assert main([*REFOCUS, "--dtype", "complex64"]) == 1
    assert capsys.readouterr().err.startswith(
        "error: backend 'cpu' does not cover this refocus_weight: basis has dtype"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "arguments are required"),
        (["train"], "invalid choice: 'train'"),
        (["info", "--problem", "conv3d"], "invalid choice: 'conv3d'"),
        (["info", "--weight", "8,1,3,3"], "describe a --problem: name one"),
        (["info", "--stride", "2"], "describe a --problem: name one"),
        (["info", "--device", "cuda"], "describe a --problem: name one"),
        (DEPTHWISE[:3], "--problem grouped_conv2d needs --weight"),
        ([*DEPTHWISE[:3], "--weight", "8,1,3,3"], "--problem grouped_conv2d needs --shape"),
        ([*DEPTHWISE, "--shape", "2,9,6,6"], "--shape has 9 channels, but --weight in 8 groups needs 8"),
        (
            [*DEPTHWISE, "--weight", "9,1,3,3", "--groups", "8"],
            "has 9 output channels, which --groups (=8) must divide",
        ),
        ([*DEPTHWISE, "--shape", "2,8,6"], "'2,8,6' must be four sizes"),
        ([*DEPTHWISE, "--shape", "2,8,6,0"], "'0' must be a whole number of at least 1"),
        ([*DEPTHWISE, "--dtype", "int64"], "--dtype (='int64') must be a floating-point type"),
        ([*DEPTHWISE, "--dtype", "nn"], "--dtype (='nn') must be a floating-point type"),
        ([*REFOCUS, "--shape", "2,8,6,6"], "has no input: leave --shape, --stride and --channels-last out"),
        (
            ["info", "--problem", "folded_adam", "--weight", "8,1,3,3", "--stride", "2"],
            "--problem folded_adam has no input: leave --shape, --stride and --channels-last out",
        ),
        ([*REFOCUS, "--groups", "3"], "--weight has 8 kernels, which --groups (=3) must divide"),
    ],
)
def test_bad_arguments_are_usage_errors(capsys: pytest.CaptureFixture, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("size", [10**12, 10**30])
def test_a_problem_larger_than_memory_is_one_line(capsys: pytest.CaptureFixture, size: int) -> None:
    assert main(["info", "--problem", "refocus_weight", "--weight", f"{size},1,3,3"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


def test_the_module_runs() -> None:
    run = subprocess.run([sys.executable, "-m", "refconv_kernels", "info"], capture_output=True, text=True, check=True)
    assert run.stdout.startswith(f"refconv_kernels {refconv_kernels.__version__}")
