"""The GPU report: its measurements on tiny problems, on the device at hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import bench_folded_adam, gpu_report
from benchmarks.layers import Layer
from benchmarks.networks import ConvNeXtTiny

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY = [Layer("net", 6, 6, 3, 1, 1, 6, 8, 8, 1), Layer("net", 4, 4, 3, 2, 1, 1, 8, 8, 1)]


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> gpu_report.Timer:
    monkeypatch.setattr(gpu_report, "ROUNDS", 2)
    return gpu_report.Timer(DEVICE)


def test_all_rows_and_their_table(timer: gpu_report.Timer) -> None:
    rows = [*gpu_report.transforms(timer, DEVICE, TINY), *gpu_report.layers(timer, DEVICE, 2, TINY, compiled=0)]
    rows += gpu_report.steps(timer, DEVICE, {"tiny": (_tiny, 2, 8)})
    assert [row["kind"] for row in rows] == 4 * ["transform"] + 16 * ["layer"] + 4 * ["step"]
    for row in rows:
        assert {"ours", "two_convolutions"} <= row["ms"].keys()
        thin = row["kind"] == "step" or (row["kind"] == "layer" and row["shape"].startswith("dw6"))
        assert ("thin" in row["ms"]) is thin  # where the thin form is smaller
        assert all(ms > 0 for ms in row["ms"].values())
    layer = rows[4]
    assert layer["shape"] == "dw6_k3s1_8x8"
    assert layer["bytes"] == 4 * (2 * 2 * 6 * 8 * 8 + 6 * 9)
    printed = gpu_report.table(rows)
    assert (
        "| shape | mode | dtype | layout | ours, ms | clone/ours | plain/ours | thin/ours | two_convolutions/ours |"
        in printed
    )
    assert printed.count("\n| dw6_k3s1_8x8 |") == 8
    assert "| tiny | step | bfloat16 | NHWC |" in printed


def test_rows_of_the_optimizer(timer: gpu_report.Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_folded_adam.MEASURED, "tiny", TINY[:1])
    rows = list(gpu_report.optimizers(timer, DEVICE, ["tiny"]))
    assert [(row["kind"], row["mode"]) for row in rows] == [
        ("optimizer", mode) for mode in ("step, kernels", "step", "W_t+gradient+step")
    ]
    for row in rows:
        assert row["ms"].keys() == {"ours", "adamw"}
        assert all(ms > 0 for ms in row["ms"].values())
        # A step and 54 numbers for each of 6 coordinates' rows, and Q; a step and two moments of W_r.
        assert row["state_bytes"] == {"ours": 4 * (1 + 6 * 54 + 9 * 54), "adamw": 4 * (1 + 2 * 6 * 54)}
    printed = gpu_report.table(rows)
    assert "| shape | mode | dtype | layout | ours, ms | adamw/ours |" in printed
    assert "\n| tiny | step, kernels | float32 | - |" in printed


def test_another_optimizer_is_not_measured(timer: gpu_report.Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_folded_adam.MEASURED, "tiny", TINY[:1])
    folded = bench_folded_adam._folded

    def wrong(layers: list[nn.Module]) -> torch.optim.Optimizer:
        optimizer = folded(layers)
        optimizer.param_groups[0]["betas"] = (0.9, 0.9)
        return optimizer

    monkeypatch.setattr(bench_folded_adam, "_folded", wrong)
    with pytest.raises(AssertionError, match="ours: W_t is .* away from float64"):
        next(gpu_report.optimizers(timer, DEVICE, ["tiny"]))


def _tiny() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 1000))


@pytest.mark.parametrize("name", ["ours", "thin"])
def test_a_wrong_result_is_not_measured(name: str) -> None:
    problem = gpu_report._Problem(TINY[0], 2, torch.float32, torch.contiguous_format, DEVICE)
    problem.check()
    with torch.no_grad():
        problem.modules[name].transform.weight[0, 0] += 1
    with pytest.raises(AssertionError, match=f"{name}: .* away from float64"):
        problem.check()


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_there_is_no_report(capsys: pytest.CaptureFixture) -> None:
    assert gpu_report.main([]) == 2
    assert capsys.readouterr().err == "no GPU: torch.cuda.is_available() is False\n"


def test_convnext_tiny_has_its_size() -> None:
    model = ConvNeXtTiny()
    assert sum(p.numel() for p in model.parameters()) == 28_589_128  # as published: 29 M
    with torch.device("meta"):
        assert ConvNeXtTiny()(torch.empty(2, 3, 64, 64)).shape == (2, 1000)
