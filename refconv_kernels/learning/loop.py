"""The training loop: steps, epochs, the state between them, and evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from refconv_kernels.learning.batches import Batches, Presented
from refconv_kernels.learning.checkpoint import Checkpoint
from refconv_kernels.learning.data import ImageSet
from refconv_kernels.learning.distributed import ALONE, Processes, assign, own_part, whole
from refconv_kernels.learning.errors import CheckpointError, Diverged
from refconv_kernels.learning.recipe import Recipe

__all__ = ["Training", "accuracy", "logits", "train", "train_step"]

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_EVALUATED = 512  # images at a time


class Training:
    """One training of one network: call :meth:`step` until :attr:`finished`, :meth:`end_epoch` where an epoch ends.

    The order of the images and their augmentation depend on ``seed``, the epoch and the step alone: not on the
    network, nor on the number of processes, nor on whether the training was interrupted.

    Args:
        model: any classifier, images ``[B, C, H, W]`` to logits ``[B, classes]``; trained in place.
        data: the training images.
        recipe: schedule, optimizer and augmentation.
        seed: of order and augmentation.
        mean, std: per channel; the network sees ``(image - mean) / std``. None shows the images as they are.
        device: where to train.
        precision: ``"float32"``, or autocast to ``"bfloat16"`` or ``"float16"`` (with loss scaling).
        channels_last: memory layout of network and images.
        compiled: call the network through ``torch.compile``.
        processes: who else trains this network; the batch is shared out, BatchNorm's included.

    Raises:
        SettingsError: the last batch of an epoch has fewer images than there are processes.
    """

    def __init__(
        self,
        model: nn.Module,
        data: ImageSet,
        recipe: Recipe,
        *,
        seed: int,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        device: torch.device | str = "cpu",
        precision: str = "float32",
        channels_last: bool = False,
        compiled: bool = False,
        processes: Processes = ALONE,
    ) -> None:
        self.recipe, self.processes = recipe, processes
        self.device, self.dtype = torch.device(device), _DTYPES.get(precision)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self._batches = Batches(data, recipe, seed, Presented(mean, std, self.device, layout), processes)
        self.images, self.steps = len(data), self._batches.steps
        self.model = model.to(self.device, memory_format=layout if channels_last else torch.preserve_format)  # type: ignore[call-overload]
        wrapped = processes.wrap(self.model, self.device)
        self._wrapped, self._network = wrapped, torch.compile(wrapped) if compiled else wrapped
        self.optimizer = recipe.optimizer(self.model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.epoch = self.step_in_epoch = 0
        self.history: list[dict[str, Any]] = []
        self._loss = torch.zeros((), dtype=torch.float64, device=self.device)  # sum over this epoch's images
        self._average: dict[str, Tensor] = {}

    # --- steps ------------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        return self.epoch == self.recipe.epochs

    @property
    def epoch_is_over(self) -> bool:
        return self.step_in_epoch == self.steps

    def step(self) -> None:
        """One step of the optimizer, on the next batch."""
        recipe, size = self.recipe, self.processes.size
        self.model.train()
        images, labels, total = self._batches.get(self.epoch, self.step_in_epoch)
        rate = recipe.learning_rate(self.epoch * self.steps + self.step_in_epoch, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        parts = list(
            zip(images.tensor_split(recipe.accumulation), labels.tensor_split(recipe.accumulation), strict=True)
        )
        for number, (x, y) in enumerate(parts):
            with self.processes.accumulate(self._wrapped, number == len(parts) - 1):
                with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                    answer = self._network(x)
                loss = F.cross_entropy(_widened(answer), y, reduction="sum", label_smoothing=recipe.label_smoothing)
                # Gradients are averaged over the processes, whose parts need not be equal.
                self.scaler.scale(loss * (size / total)).backward()
            self._loss += loss.detach()
        if recipe.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if recipe.ema is not None:
            self._update_average(recipe.ema)
        self.step_in_epoch += 1

    def skip(self) -> None:
        """Leave out all training."""
        self.epoch = self.recipe.epochs

    def end_epoch(self, **figures: Any) -> dict[str, Any]:
        """Note an epoch that is over, with ``figures``, and go on to the next.

        Returns:
            What :attr:`history` now ends with: ``epoch`` (from 1), ``loss`` (mean cross-entropy in nats), ``lr`` (of
            the last step), and ``figures``.

        Raises:
            Diverged: the loss is no longer finite.
        """
        self.check()
        loss = self.processes.total(self._loss.clone()).item() / self.images
        lr = self.optimizer.param_groups[0]["lr"]
        self.history.append({"epoch": self.epoch + 1, "loss": loss, "lr": lr, **figures})
        self.epoch, self.step_in_epoch = self.epoch + 1, 0
        self._loss.zero_()
        if self.finished:
            self._batches.close()
        return self.history[-1]

    def check(self) -> None:
        """Raises :class:`Diverged` where the loss of this epoch is not finite, in any process."""
        loss = self.processes.total(self._loss.clone()).item()
        if not math.isfinite(loss):
            raise Diverged(f"the loss is {loss} in epoch {self.epoch + 1}: lower the learning rate")

    # --- evaluation -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, data: ImageSet) -> tuple[float, float]:
        """Right answers in % and mean cross-entropy on ``data``, with the averaged weights where they are kept."""
        size = self.processes.size
        figures = torch.zeros(2, dtype=torch.float64, device=self.device)
        with self.averaged():
            self.model.eval()
            for rows in torch.arange(len(data)).split(_EVALUATED):
                mine = self.processes.share(rows)
                counted = len(mine)
                mine = mine if counted == len(rows) // size + (len(rows) % size > 0) else torch.cat([mine, rows[:1]])
                with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                    answer = self.model(self._batches.presented(data.take(mine)))
                answer, labels = _widened(answer[:counted]), data.labels[mine[:counted]].to(self.device)
                figures[0] += (answer.argmax(1) == labels).sum()
                figures[1] += F.cross_entropy(answer, labels, reduction="sum")
        right, loss = (self.processes.total(figures) / len(data)).tolist()
        return 100 * right, loss

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The network with its averaged weights, where ``ema`` keeps them."""
        own = {name: t.clone() for name, t in self._floating().items()} if self._average else {}
        self._put(self._average)
        try:
            yield
        finally:
            self._put(own)

    def _put(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self._floating().items():
                if name in values:
                    tensor.copy_(values[name])

    def _floating(self) -> dict[str, Tensor]:
        """What training changes: trained parameters, and buffers that are numbers."""
        state = self.model.state_dict(keep_vars=True)
        frozen = {name for name, p in self.model.named_parameters() if not p.requires_grad}
        return {n: t.detach() for n, t in state.items() if t.is_floating_point() and n not in frozen}

    def _update_average(self, decay: float) -> None:
        now = self._floating()
        if not self._average:
            self._average = {name: t.clone() for name, t in now.items()}
            return
        averages, values = ([own_part(t) for t in tensors.values()] for tensors in (self._average, now))
        get_ema_multi_avg_fn(decay)(averages, values, 0)

    # --- state ------------------------------------------------------------------------------------------------

    def checkpoint(self) -> Checkpoint:
        """All that is needed to go on, whole; with several processes, every one has to ask.

        The tensors are those in use, as in a ``state_dict``: write or copy them before the next step.

        Raises:
            Diverged: the loss is no longer finite, so these weights are not worth keeping.
        """
        self.check()
        tensors = {f"model.{n}": whole(t) for n, t in self.model.state_dict().items() if isinstance(t, Tensor)}
        tensors.update({f"average.{name}": whole(t) for name, t in self._average.items()})
        for name, parameter in self.model.named_parameters():
            momentum = self.optimizer.state.get(parameter, {}).get("momentum_buffer")
            if momentum is not None:
                tensors[f"momentum.{name}"] = whole(momentum)
        tensors["state.loss"] = self.processes.total(self._loss.clone())
        tensors["state.random"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["state.random_cuda"] = torch.cuda.get_rng_state(self.device)
        scaler = self.scaler.state_dict()
        where = {"epoch": self.epoch, "step": self.step_in_epoch, "history": self.history, "scaler": scaler}
        return Checkpoint(tensors, where)

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on where ``checkpoint`` was made.

        Raises:
            CheckpointError: it is of another network or another training; this one may then be changed.
        """
        state, momentum = checkpoint.part("model"), checkpoint.part("momentum")
        own = self.model.state_dict()
        parameters = dict(self.model.named_parameters())
        wrong = sorted(set(own) ^ set(state)) or [n for n, t in own.items() if t.shape != state[n].shape]
        wrong = wrong or [n for n, t in momentum.items() if n not in parameters or t.shape != parameters[n].shape]
        if wrong:
            raise CheckpointError(f"it is of another network: {wrong[0]} differs, and {len(wrong) - 1} others")
        try:
            where = checkpoint.about
            self.epoch, self.step_in_epoch, self.history = where["epoch"], where["step"], list(where["history"])
            self._loss.copy_(checkpoint.tensors["state.loss"] / self.processes.size)
            self.scaler.load_state_dict(where["scaler"])
            torch.set_rng_state(checkpoint.tensors["state.random"])
            if self.device.type == "cuda" and "state.random_cuda" in checkpoint.tensors:
                torch.cuda.set_rng_state(checkpoint.tensors["state.random_cuda"], self.device)
        except (KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"its state cannot be read ({error})") from error
        for name, tensor in own.items():
            assign(tensor, state[name])
        for name, value in momentum.items():
            buffer = torch.zeros_like(parameters[name])
            assign(buffer, value)
            self.optimizer.state[parameters[name]]["momentum_buffer"] = buffer
        floating = self._floating()
        self._average = {}
        for name, value in checkpoint.part("average").items():
            self._average[name] = floating[name].clone()
            assign(self._average[name], value)


def train(
    model: nn.Module,
    data: ImageSet,
    recipe: Recipe,
    *,
    seed: int,
    on_epoch: Callable[[float], None] | None = None,
    **options: Any,
) -> list[float]:
    """Train ``model`` in place by ``recipe``: a :class:`Training` from start to end.

    Args:
        model, data, recipe, seed: as for :class:`Training`. Two networks trained with the same seed see the same
            images in the same order.
        on_epoch: called after each epoch with its mean loss.
        options: the other arguments of :class:`Training`.

    Returns:
        The mean loss of each epoch, cross-entropy in nats.

    Raises:
        Diverged: the loss is no longer finite; a FloatingPointError.
    """
    training = Training(model, data, recipe, seed=seed, **options)
    while not training.finished:
        training.step()
        if training.epoch_is_over:
            loss = training.end_epoch()["loss"]
            if on_epoch is not None:
                on_epoch(loss)
    return [entry["loss"] for entry in training.history]


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> Tensor:
    """One plain step: forward, backward, update. Returns the cross-entropy before the update, a scalar."""
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Logits ``[N, classes]`` of ``images`` in eval mode, in which ``model`` is left."""
    return model.eval()(images)


def accuracy(predictions: Tensor, data: ImageSet) -> float:
    """Share of right answers in %; ``predictions`` are logits ``[N, classes]``."""
    return 100 * (predictions.argmax(1) == data.labels).sum().item() / len(data)


def _widened(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
