"""What is compared: the controls and ablations of the paper's Table VI, the transformations of its Table VII."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from refconv_kernels import RefConv2d, refocus, variant
from refconv_kernels.learning.errors import SettingsError
from refconv_kernels.learning.recipe import Recipe

__all__ = ["ARMS", "Arm"]

#: Learning rate of the paper's fine-tuning (section IV-F.2).
_FINE_TUNING = 1e-4


@dataclass(frozen=True)
class Arm:
    """One way to train the network a second time.

    Args:
        text: what it does, for ``--help`` and tables.
        refocused: the network is refocused first.
        options: of :func:`~refconv_kernels.refocus`.
        transform: name of a transformation of Table VII.
        random_basis: the basis is drawn anew, as :class:`torch.nn.Conv2d` draws its weights. All other weights,
            biases too, stay those of the pretrained network.
        lr: learning rate instead of the recipe's; ``"tuned"``: chosen on images held out from the training images.
    """

    text: str
    refocused: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    transform: str | None = None
    random_basis: bool = False
    lr: float | str | None = None

    @property
    def can_be_thin(self) -> bool:
        """The thin form is the same model: linear transformation, frozen basis."""
        return self.refocused and self.transform is None and self.options.get("basis", "frozen") == "frozen"

    def start(self, pretrained: nn.Module, *, form: str = "full", init: str = "xavier", map_size: int = 3) -> nn.Module:
        """The network to train, a changed copy of ``pretrained``; draws from torch's global generator.

        Raises:
            SettingsError: the network has nothing to refocus, or ``form`` is not for this arm.
        """
        if not self.refocused:
            return copy.deepcopy(pretrained)
        options: dict[str, Any] = {"map_size": map_size, "init": init, **self.options}
        if form == "thin" and not self.can_be_thin:
            raise SettingsError(f"form (={form!r}) is another model in this arm ({self.text}): use 'full'")
        source = copy.deepcopy(pretrained)
        if self.transform is not None:
            name, init, size = self.transform, options["init"], options["map_size"]
            options = {
                "transform": lambda conv: variant(name, conv, map_size=size, init=init),
                "where": lambda _, conv: size <= min(conv.kernel_size),  # the layers that "refconv" has
            }
        else:
            options["form"] = form
        try:
            if self.random_basis:
                _draw_bases(source, map_size)
            return refocus(source, **options)
        except ValueError as error:
            raise SettingsError(str(error)) from error

    def recipe(self, recipe: Recipe, tuned: float | None = None) -> Recipe:
        """``recipe`` with this arm's learning rate; ``tuned`` is the one that was chosen."""
        if self.lr == "tuned":
            if tuned is None:
                raise SettingsError(f"this arm ({self.text}) needs its learning rate chosen first: use learn compare")
            return replace(recipe, lr=tuned)
        return recipe if self.lr is None else replace(recipe, lr=float(self.lr))


def _draw_bases(model: nn.Module, map_size: int) -> None:
    for name, layer in refocus(model, map_size=map_size, init="zeros").named_modules():
        if isinstance(layer, RefConv2d):
            weight = model.get_parameter(f"{name}.weight" if name else "weight")
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))


ARMS: dict[str, Arm] = {
    "baseline": Arm("the plain network from random weights", refocused=False),
    "retrain": Arm("the baseline trained as long again", refocused=False),
    "finetune": Arm(f"the baseline trained on with learning rate {_FINE_TUNING:g}", refocused=False, lr=_FINE_TUNING),
    "retrain-tuned": Arm(
        "the baseline trained as long again, its learning rate chosen on held-out images", refocused=False, lr="tuned"
    ),
    "refconv": Arm("RefConv (1B1L)"),
    "refconv-tuned": Arm("RefConv, its learning rate chosen on held-out images", lr="tuned"),
    "zero": Arm("RefConv, W_r zero at first (ZI)", options={"init": "zeros"}),
    "no-identity": Arm("RefConv without the identity (w/o shortcut)", options={"identity": False}),
    "random-basis": Arm("RefConv, basis random and frozen (R)", random_basis=True),
    "trainable-basis": Arm("RefConv, basis trained too (T)", options={"basis": "trainable"}),
    "random-trainable-basis": Arm(
        "RefConv, basis random and trained too (R&T)", options={"basis": "trainable"}, random_basis=True
    ),
    "2b1l": Arm("two branches of one layer", transform="2B1L"),
    "3b1l": Arm("three branches of one layer", transform="3B1L"),
    "1b2l": Arm("one branch of two layers", transform="1B2L"),
    "1b2l-gelu": Arm("one branch of two layers, GELU between", transform="1B2L+GELU"),
    "1b1l-se": Arm("one layer, then squeeze-and-excitation", transform="1B1L+SE"),
    "1b2l-se": Arm("two layers, squeeze-and-excitation between", transform="1B2L+SE"),
}
