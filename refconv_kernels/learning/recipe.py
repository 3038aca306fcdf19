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
        batch_size: images per step.
        lr: highest learning rate, reached at the end of the warm-up.
        momentum: of SGD, without Nesterov.
        weight_decay: on every trained parameter; a frozen basis has none.
        crop_padding: random crop as augmentation: pixels of padding on each side before the crop.

    Raises:
        ValueError: a number is out of range.
    """

    epochs: int = 100
    warmup_epochs: int = 5
    batch_size: int = 256
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 4e-5
    crop_padding: int = 4

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("warmup_epochs", 0), ("batch_size", 1), ("crop_padding", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} (={getattr(self, name)}) must be at least {least}")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs (={self.warmup_epochs}) must be less than epochs (={self.epochs})")
        if not self.lr > 0:
            raise ValueError(f"lr (={self.lr}) must be positive")

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
        return torch.optim.SGD(trained, self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
