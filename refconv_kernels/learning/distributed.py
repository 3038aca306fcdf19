"""Several processes that train one network: who I am, what is shared, and what is added up."""

from __future__ import annotations

import inspect
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from refconv_kernels.learning.errors import SettingsError

__all__ = ["ALONE", "Processes", "SyncBatchNorm2d", "assign", "joined", "leave", "own_part", "whole"]

PARALLEL = ("ddp", "fsdp")


@dataclass(frozen=True)
class Processes:
    """The processes of one training, as this one sees them.

    Args:
        rank: number of this process; 0 alone writes.
        size: how many there are.
        parallel: ``"ddp"`` (every process holds the network) or ``"fsdp"`` (each holds a part of it).
    """

    rank: int = 0
    size: int = 1
    parallel: str = "ddp"

    def share(self, rows: Tensor) -> Tensor:
        """This process' part of a batch."""
        return rows.tensor_split(self.size)[self.rank]

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """What to call instead of ``model``, whose parameters become shared; BatchNorm sees the whole batch."""
        if self.size == 1:
            return model
        if device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        else:
            _sync_batch_norm(model)
        if self.parallel == "ddp":
            # Every process has the same buffers by itself. The option has another name since torch 2.13.
            known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
            name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # of 1x1 kernels
            options: dict[str, Any] = {name: False}
            return nn.parallel.DistributedDataParallel(model, **options)
        from torch.distributed.fsdp import fully_shard

        mesh = dist.init_device_mesh(device.type, (self.size,))
        for child in model.children():
            if not isinstance(child, (nn.ModuleList, nn.ModuleDict)) and any(True for _ in child.parameters()):
                fully_shard(child, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    def accumulate(self, wrapped: nn.Module, last: bool) -> Any:
        """A context for a backward; gradients are exchanged in that of the ``last`` part of a batch."""
        if self.size == 1:
            return nullcontext()
        if self.parallel == "fsdp":
            wrapped.set_requires_gradient_sync(last)  # type: ignore[operator]
            return nullcontext()
        return nullcontext() if last else wrapped.no_sync()  # type: ignore[operator]

    def total(self, numbers: Tensor) -> Tensor:
        """The sum of ``numbers`` over all processes."""
        if self.size > 1:
            dist.all_reduce(numbers)
        return numbers

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether ``flag`` is set in any process."""
        return flag if self.size == 1 else bool(self.total(torch.tensor(int(flag), device=device)))

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()


ALONE = Processes()


@contextmanager
def joined(parallel: str, device: torch.device) -> Iterator[Processes]:
    """The processes that ``torchrun`` started, connected; :data:`ALONE` without it.

    Raises:
        SettingsError: ``parallel`` is unknown.
    """
    if parallel not in PARALLEL:
        raise SettingsError(f"parallel (={parallel!r}) must be one of {PARALLEL}")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), parallel)
    finally:
        leave()


def leave() -> None:
    """Part from the other processes."""
    # Gloo's threads let go of the last sum's tensor when they come to it, and need Python's lock for that: one that
    # asks while Python shuts down aborts the process. They cannot be waited for: DDP keeps them beyond the group's end.
    time.sleep(0.1)
    dist.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which every process may hold a part; every process has to ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, not a copy."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def assign(tensor: Tensor, value: Tensor) -> None:
    """Write all of ``value`` into ``tensor``, of which every process may hold a part."""
    with torch.no_grad():
        if hasattr(tensor, "full_tensor"):
            from torch.distributed.tensor import DTensor, distribute_tensor

            assert isinstance(tensor, DTensor)
            value = distribute_tensor(value.to(tensor.device, tensor.dtype), tensor.device_mesh, tensor.placements)
        tensor.copy_(value)


class _Sum(torch.autograd.Function):
    """The sum over all processes, of values and of gradients."""

    @staticmethod
    def forward(ctx: Any, numbers: Tensor) -> Tensor:
        numbers = numbers.clone()
        dist.all_reduce(numbers)
        return numbers

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the batches of all processes, on any device; :class:`torch.nn.SyncBatchNorm` needs a GPU."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        count = x.new_tensor([x.numel() / x.shape[1]])
        total = _Sum.apply(torch.cat([x.sum((0, 2, 3)), count]))
        mean = total[:-1] / total[-1]
        centred = x - mean[:, None, None]
        variance = _Sum.apply(centred.square().sum((0, 2, 3))) / total[-1]
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                assert self.num_batches_tracked is not None
                self.num_batches_tracked.add_(1)
                share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.to(self.running_mean), share)
                unbiased = variance * total[-1] / (total[-1] - 1)
                self.running_var.lerp_(unbiased.to(self.running_var), share)
        y = centred * (variance + self.eps).rsqrt()[:, None, None]
        if self.weight is not None and self.bias is not None:
            y = y * self.weight[:, None, None] + self.bias[:, None, None]
        return y.to(input.dtype)


def _sync_batch_norm(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d  # the same state, another forward
