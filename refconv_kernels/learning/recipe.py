"""The training recipe of paper section IV-A.2, the same for pretraining and for Refocusing Learning."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """SGD with momentum, a linear warm-up and a cosine to zero; the defaults are the paper's.

    Args:
        epochs: passes over the data, the warm-up included.
        warmup_epochs: of these, with a learning rate that rises linearly.
        batch_size: images per optimizer step, over all processes.
        lr: highest learning rate, reached at the end of the warm-up.
        momentum: of SGD.
        nesterov: Nesterov's momentum.
        weight_decay: on every trained parameter; a frozen basis has none.
        crop_padding: random crop: pixels of padding on each side before it; None is an eighth of the height.
        flip: mirror half of the images; None does so where a mirrored image keeps its class (not for digits).
        label_smoothing: share of each label spread over all classes, from 0 to 1.
        clip_norm: largest norm of the gradient of all parameters together; None does not clip.
        accumulation: parts into which each batch is split, one after the other, to save memory. The gradient is
            that of the whole batch; BatchNorm sees the parts.
        ema: decay of the exponential moving average of weights and buffers that is then evaluated and folded;
            None keeps none.

    Raises:
        ValueError: a number is out of range.
    """

    epochs: int = 100
    warmup_epochs: int = 5
    batch_size: int = 256
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 4e-5
    crop_padding: int | None = None
    flip: bool | None = None
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    accumulation: int = 1
    ema: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("warmup_epochs", 0), ("batch_size", 1), ("accumulation", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} (={getattr(self, name)}) must be at least {least}")
        if self.crop_padding is not None and self.crop_padding < 0:
            raise ValueError(f"crop_padding (={self.crop_padding}) must be at least 0")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs (={self.warmup_epochs}) must be less than epochs (={self.epochs})")
        for name in ("lr", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} (={value}) must be positive")
        for name in ("momentum", "label_smoothing", "ema"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} (={value}) must be at least 0 and less than 1")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay (={self.weight_decay}) must be at least 0")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov (=True) needs momentum, which is 0")
        if self.accumulation > self.batch_size:
            raise ValueError(f"accumulation (={self.accumulation}) must be at most batch_size (={self.batch_size})")

    def steps_per_epoch(self, images: int) -> int:
        """Optimizer steps in one epoch over ``images`` images; the last batch may be smaller."""
        return math.ceil(images / self.batch_size)

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of optimizer step ``step``, counted from 0.

        ``lr * (step + 1) / warm`` in the warm-up, then ``lr * (1 + cos(pi * (step - warm) / (total - warm))) / 2``,
        with ``warm`` and ``total`` in steps.
        """
        warm, total = self.warmup_epochs * steps_per_epoch, self.epochs * steps_per_epoch
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * (1 + math.cos(math.pi * (step - warm) / (total - warm))) / 2

    def optimizer(self, model: nn.Module) -> torch.optim.SGD:
        """SGD over what ``model`` trains (``requires_grad``), so a frozen basis stays out of it."""
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.SGD(
            trained, self.lr, momentum=self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov
        )
