"""Autotuning of the Triton launches: every configuration is right, and which one is chosen, when, and at what cost."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from refconv_kernels import ops, use_backend
from refconv_kernels.backends import triton
from refconv_kernels.backends.triton import tuning
from refconv_kernels.backends.triton.tuning import Configuration
from tests.cases import Case
from tests.tolerances import assert_close

pytestmark = [
    pytest.mark.skipif(ops.UNAVAILABLE["triton"] is not None, reason=f"triton: {ops.UNAVAILABLE['triton']}"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
DEVICE = torch.device("cpu" if triton.INTERPRETED else "cuda")
LAYOUTS = [torch.contiguous_format, torch.channels_last]
CASE = Case("3x3", 2, 2, (3, 3), 2, batch=1, height=8, width=36)
STRIDE = Case("3x3_stride", 2, 2, (3, 3), 2, stride=(2, 2), batch=1, height=9, width=20)
MULTIPLIER = Case("3x3_multiplier", 1, 2, (3, 3), 1, batch=2, height=7, width=6)  # dx has a kernel of its own


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for choices, none of which is known."""
    monkeypatch.setenv("REFCONV_CACHE_DIR", str(tmp_path / "choices"))
    monkeypatch.setattr(tuning, "_known", {})
    monkeypatch.setattr(tuning, "_warned", False)
    return tmp_path / "choices"


# --- every configuration is right ----------------------------------------------------------------------------


def results(case: Case, layout: torch.memory_format, thin: bool, backend: str, dtype: torch.dtype) -> list[Tensor]:
    """y, and dx, dW (or dE) and dbias, by the operators that the layers call."""
    from refconv_kernels import functional

    torch.manual_seed(0)
    x = case.input().to(DEVICE, dtype, memory_format=layout).requires_grad_()
    tensors = case.thin_tensors() if thin else (case.tensors()[0], case.tensors()[2])
    weights = [t.to(DEVICE, dtype) for t in tensors]
    trained = [x, weights[1 if thin else 0].requires_grad_(), weights[-1].requires_grad_()]
    geometry = {"stride": case.stride, "padding": case.padding, "dilation": case.dilation, "groups": case.groups}
    with use_backend(backend):
        y = (functional.thin_refconv2d if thin else functional.conv2d)(x, *weights, **geometry)
        ramp = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=DEVICE).view(y.shape)
        return [y.detach(), *torch.autograd.grad(y, trained, ramp.to(dtype))]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("case", "thin", "numbers"),  # of the alternatives; that is slow in the interpreter
    [
        (CASE, False, range(1, 8)),
        (CASE, True, (1, 5)),
        (STRIDE, False, (1, 6)),
        (STRIDE, True, range(1, 8)),
        (MULTIPLIER, False, (1, 2, 3)),
        (Case("5x5", 2, 2, (5, 5), 2, padding=(2, 2), batch=1, height=9, width=5), False, (1, 6)),
        (Case("7x7", 1, 1, (7, 7), 1, padding=(3, 3), batch=1, height=9, width=5), False, (1, 6)),
    ],
    ids=["3x3", "3x3_thin", "3x3_stride", "3x3_stride_thin", "3x3_multiplier", "5x5", "7x7"],
)
def test_every_configuration_against_float64(
    case: Case, thin: bool, numbers: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from refconv_kernels.backends.triton import depthwise

    monkeypatch.setattr(depthwise, "_PROGRAMS", 4)  # several tiles in a program, where there are several
    monkeypatch.setattr(depthwise, "_FORWARD_PROGRAMS", 2)
    monkeypatch.setattr(tuning, "timer", lambda launch: 0.0)
    tried: set[Configuration] = set()

    def take(number: int) -> Callable[..., Configuration]:
        def choose(_problem: Any, _device: Any, rule: tuning.Rule, _launch: Any) -> Configuration:
            candidates = tuning.alternatives(rule)
            taken = candidates[min(number, len(candidates) - 1)]
            tried.add(taken)
            return taken

        return choose

    for layout in LAYOUTS:
        exact = results(case, layout, thin, "reference", torch.float64)
        for number in numbers:
            monkeypatch.setattr(tuning, "choose", take(number))
            for ours, want in zip(results(case, layout, thin, "triton", torch.float32), exact, strict=True):
                assert_close(ours, want, case.reduction)
    assert len(tried) >= 2 * len(numbers)  # of forward and backward, in two layouts


def test_what_is_tried_is_bounded() -> None:
    default = Configuration(8, 128, 1, 4, 3, 80, 4)
    asked = []

    def rule(**options: Any) -> Configuration:
        asked.append(options)
        return default._replace(warps=options.get("warps", 4))

    assert tuning.alternatives(rule) == [default, default._replace(warps=8), default._replace(warps=2)]
    assert asked[0] == {}
    assert len(asked) == 8


# --- which one is chosen -------------------------------------------------------------------------------------


def rule(other: bool = False, warps: int = 4, spread: float = 1) -> Configuration:
    return Configuration(4 if other else 8, 32 * warps, 1, int(4 / spread), 3, 80, warps)


DEFAULT, LOWER, WIDER = tuning.alternatives(rule)[:3]


class Measured:
    """Launches that are counted, and what a timer says about them; all others take 1 ms."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: dict[Configuration, float], seconds: float = 0) -> None:
        self.launched: list[Configuration] = []
        self.times, self.now, self.seconds = times, 0.0, seconds
        monkeypatch.setattr(tuning, "timer", self.timer)
        monkeypatch.setattr(tuning, "clock", lambda: self.now)

    def timer(self, launch: Callable[[], object]) -> float:
        launch()
        self.now += self.seconds
        return self.times.get(self.launched[-1], 1.0)

    def choose(self, problem: tuple[Any, ...] = ("forward", torch.float32, 7)) -> Configuration:
        return tuning.choose(problem, DEVICE, rule, self.launched.append)


def test_the_fastest_is_chosen_and_known(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Measured(monkeypatch, {LOWER: 0.7, WIDER: 0.6})
    assert measured.choose() == WIDER
    assert measured.launched == tuning.alternatives(rule)
    measured.times = {LOWER: 0.1}
    assert measured.choose() == WIDER
    assert len(measured.launched) == 8
    assert measured.choose(("forward", torch.float32, 14)) == LOWER


@pytest.mark.parametrize(("time", "chosen"), [(0.985, DEFAULT), (0.975, WIDER), (float("nan"), DEFAULT)])
def test_two_percent_are_not_worth_a_change(monkeypatch: pytest.MonkeyPatch, time: float, chosen: object) -> None:
    assert Measured(monkeypatch, {WIDER: time}).choose() == chosen


def test_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Measured(monkeypatch, {WIDER: 0.5}, seconds=0.6 * tuning.SECONDS)
    assert measured.choose() == DEFAULT
    assert measured.launched == [DEFAULT, LOWER]


def test_the_number_of_problems_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "MOST_PROBLEMS", 1)
    measured = Measured(monkeypatch, {WIDER: 0.5})
    assert measured.choose() == WIDER
    assert measured.choose(("another",)) == DEFAULT
    monkeypatch.setattr(tuning, "_read", None)
    assert measured.choose(("another",)) == DEFAULT  # known: no file is read at every call
    assert len(measured.launched) == 8


def test_what_does_not_launch_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Measured(monkeypatch, {WIDER: 0.5})

    def launch(one: Configuration) -> None:
        measured.launched.append(one)
        if one == LOWER:
            raise RuntimeError("out of resource: registers")

    assert tuning.choose(("forward",), DEVICE, rule, launch) == WIDER


def test_nothing_is_measured_while_capturing(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    measured = Measured(monkeypatch, {WIDER: 0.5})
    monkeypatch.setattr(tuning, "capturing", lambda device: True)
    assert measured.choose() == DEFAULT
    assert not measured.launched
    assert not cache.exists()
    monkeypatch.setattr(tuning, "capturing", lambda device: False)
    assert measured.choose() == WIDER  # the default was not remembered
    monkeypatch.setattr(tuning, "capturing", lambda device: True)
    assert measured.choose() == WIDER  # known
    monkeypatch.setattr(tuning, "_known", {})
    assert measured.choose() == WIDER  # in the file
    assert len(measured.launched) == 8


def test_off_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("asked")

    monkeypatch.setattr(tuning, "choose", refuse)
    assert triton.AUTOTUNE is False
    assert tuning.timer is None
    results(STRIDE, LAYOUTS[0], False, "triton", torch.float32)
    monkeypatch.setattr(tuning, "timer", lambda launch: 0.0)
    with pytest.raises(AssertionError, match="asked"):
        results(STRIDE, LAYOUTS[0], False, "triton", torch.float32)


# --- the file ------------------------------------------------------------------------------------------------


def files(cache: Path) -> list[Path]:
    return sorted(cache.iterdir())


def test_choices_outlive_the_process(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    measured = Measured(monkeypatch, {WIDER: 0.5})
    measured.choose()
    (path,) = files(cache)
    assert json.loads(path.read_text()) == {"('forward', torch.float32, 7)": list(WIDER)}
    monkeypatch.setattr(tuning, "_known", {})  # another process
    measured.times = {LOWER: 0.1}
    assert measured.choose() == WIDER
    assert len(measured.launched) == 8


def test_what_others_found_stays_in_the_file(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    measured = Measured(monkeypatch, {})
    for number in range(3):
        monkeypatch.setattr(tuning, "_known", {})  # another process
        measured.choose(("forward", number))
    (path,) = files(cache)
    assert json.loads(path.read_text()).keys() == {f"('forward', {number})" for number in range(3)}


def test_a_choice_is_for_one_device_triton_and_source(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    measured = Measured(monkeypatch, {WIDER: 0.5})
    for name, version in (("NVIDIA H200", "a"), ("AMD Instinct MI300X", "a"), ("NVIDIA H200", "b")):
        monkeypatch.setattr(tuning, "_name", lambda device, name=name: name)
        monkeypatch.setattr(tuning, "_version", lambda version=version: version)
        monkeypatch.setattr(tuning, "_known", {})
        measured.choose()
    assert [path.name for path in files(cache)] == [
        "amd-instinct-mi300x-a.json",
        "nvidia-h200-a.json",
        "nvidia-h200-b.json",
    ]
    assert len(measured.launched) == 24


@pytest.mark.parametrize(
    "content",
    [b"{", b"\xff\xfe", b"[1]", b"[" * 100_000, b'{"(\'forward\', torch.float32, 7)": [3, 1, 1, 1, 1, 1, 1]}', b'{"x": null}'],
    ids=["cut", "binary", "list", "deep", "invalid", "foreign"],
)  # fmt: skip
def test_a_file_that_is_not_ours_is_replaced(monkeypatch: pytest.MonkeyPatch, cache: Path, content: bytes) -> None:
    measured = Measured(monkeypatch, {WIDER: 0.5})
    cache.mkdir()
    path = tuning._path(tuning._name(DEVICE))
    path.write_bytes(content)
    assert measured.choose() == WIDER
    assert json.loads(path.read_text())["('forward', torch.float32, 7)"] == list(WIDER)
    assert files(cache) == [path]


def test_a_folder_that_cannot_be_written_costs_one_warning(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    measured = Measured(monkeypatch, {WIDER: 0.5})
    cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="choices of autotuning last for this process only"):
        assert measured.choose() == WIDER
    assert measured.choose(("another",)) == WIDER  # a second warning would be an error
    assert measured.choose() == WIDER
    assert len(measured.launched) == 16


# --- on a GPU ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
def test_measured_on_a_gpu(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(tuning, "timer", tuning.milliseconds)
    for case in (CASE, STRIDE, MULTIPLIER):
        exact = results(case, LAYOUTS[0], False, "reference", torch.float64)
        for ours, want in zip(results(case, LAYOUTS[0], False, "triton", torch.float32), exact, strict=True):
            assert_close(ours, want, case.reduction)
    (path,) = files(cache)
    assert len(json.loads(path.read_text())) == 7  # the multiplier has a launch more
