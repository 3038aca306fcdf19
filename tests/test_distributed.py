"""DistributedDataParallel: two processes train like one, without unused-parameter errors."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.optim import SGD

from refconv_kernels import FusedSGD, refocus


def plain() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)
    return nn.Sequential(*layers).double()


def network(form: str) -> nn.Module:
    """In the form ``"deferred"``, a full one whose optimizer leaves the gradient of the dense layer unread."""
    model = plain()
    return model if form == "plain" else refocus(model, form="full" if form == "deferred" else form)


def images() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, x: torch.Tensor, form: str) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    kind = functools.partial(FusedSGD, trained, model) if form == "deferred" else functools.partial(SGD, trained)
    optimizer = kind(lr=0.05, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def counted(sent, bucket):  # type: ignore[no-untyped-def]  # DDP wants its own annotations or none
    """Averages gradients as DDP does, and counts their bytes."""
    sent.append(bucket.buffer().nbytes)
    return default_hooks.allreduce_hook(None, bucket)


def worker(rank: int, folder: str, form: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/{form}"  # of this group alone: PyTorch removes it at an orderly end only
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(network(form))  # find_unused_parameters is off: all must be used
    sent: list[int] = []
    model.register_comm_hook(sent, counted)
    train(model, images()[2 * rank : 2 * rank + 2], form)
    torch.save((model.module.state_dict(), sum(sent)), f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # Gloo's threads outlive their group, and one that lets go of a Python object while the interpreter
    # ends aborts the process (pytorch/pytorch#179291). All is saved: leave without that end.
    os._exit(0)


def spawn(folder: Path, form: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], int]:
    """State after training of both processes, and bytes of gradients that the first exchanged."""
    torch.multiprocessing.spawn(worker, (str(folder), form), nprocs=2)
    (first, sent), (second, _) = (torch.load(folder / f"{rank}.pt") for rank in (0, 1))
    return first, second, sent


needs_distributed = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="PyTorch was built without distributed"
)


@needs_distributed
@pytest.mark.parametrize("form", ["full", "thin", "deferred"])
def test_ddp(form: str, tmp_path: Path) -> None:
    first, second, sent = spawn(tmp_path, form)
    model = network(form)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    train(model, images(), form)
    for name, value in model.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value)
        assert torch.equal(value, start[name]) == name.endswith(("basis_weight", "factor")), name
    if form == "thin":  # as many bytes of gradients as the plain network
        assert sent == spawn(tmp_path, "plain")[2] == 3 * 8 * sum(p.numel() for p in plain().parameters())
