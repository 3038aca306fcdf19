"""``python -m benchmarks.peak_memory NETWORK FORMULATION``: peak memory of training steps, in a process of their own.

Prints, last, the peak resident bytes above those before the network was built, the peak of the bytes that PyTorch
allocated (the same in every run), and the bytes of ``W_r`` or ``E``. Linux only.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import torch
from torch import nn

from benchmarks.formulations import with_two_convolutions
from benchmarks.networks import NETWORKS, training_step
from refconv_kernels import RefConv2d, refocus

STEPS = 3


def _resident(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (peak), in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _build(name: str, formulation: str) -> nn.Module:
    plain = NETWORKS[name][0]()
    if formulation == "plain":
        return plain
    if formulation == "thin":  # without a full form before it
        return refocus(plain, inplace=True, form="thin")
    ours = refocus(plain)
    if formulation == "ours":
        return ours
    return with_two_convolutions(plain, {n for n, m in ours.named_modules() if isinstance(m, RefConv2d)})


def _train(name: str, formulation: str) -> nn.Module:
    _, batch, size = NETWORKS[name]
    model = _build(name, formulation)
    step = training_step(model, torch.randn(batch, 3, size, size), torch.randint(1000, (batch,)))
    for _ in range(STEPS):
        step()
    return model


def _allocated(name: str, formulation: str) -> int:
    """Peak bytes in PyTorch's allocator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        _train(name, formulation)
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in changes))


def main(name: str, formulation: str) -> None:
    warm = nn.Conv2d(8, 8, 3, groups=8)  # so that libraries are loaded and threads exist
    warm(torch.randn(2, 8, 8, 8)).sum().backward()
    before = _resident("VmRSS")
    model = _train(name, formulation)
    resident = _resident("VmHWM") - before
    refocusing = sum(m.transform.weight.nbytes for m in model.modules() if isinstance(m, RefConv2d))
    del model
    print(resident, _allocated(name, formulation), refocusing)


if __name__ == "__main__":
    main(*sys.argv[1:])
