"""Every setting of a training, as a dataclass, as lines of a TOML file and as options of the command line."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import math
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from refconv_kernels.learning.arms import ARMS
from refconv_kernels.learning.distributed import PARALLEL
from refconv_kernels.learning.errors import CheckpointError, SettingsError
from refconv_kernels.learning.recipe import Recipe
from refconv_kernels.transforms import INITS

__all__ = ["Comparison", "Settings", "add_options", "from_options", "from_toml", "to_toml"]

PRECISIONS = ("float32", "bfloat16", "float16")
_CHOICES: dict[str, Sequence[str]] = {
    "arm": tuple(ARMS),
    "form": ("full", "thin"),
    "init": INITS,
    "precision": PRECISIONS,
    "parallel": PARALLEL,
}


@dataclass(frozen=True)
class Comparison:
    """What ``learn compare`` adds to :class:`Settings`.

    Args:
        arms: what to compare (below); the baseline is always trained.
        seeds: repetitions, each from other random weights and with the images in another order.
        rates: learning rates to choose from for the arms whose rate is tuned.
        held_out: share of the training images on which that choice is made.
        jobs: trainings at a time, each a process of its own.
    """

    arms: tuple[str, ...] = ("retrain", "refconv")
    seeds: int = 3
    rates: tuple[float, ...] = (0.1, 0.03, 0.01, 0.003)
    held_out: float = 0.1
    jobs: int = 1

    def __post_init__(self) -> None:
        for arm in self.arms:
            if arm not in ARMS:
                raise SettingsError(f"arms (={arm!r}) must be of {', '.join(ARMS)}")
        for name in ("seeds", "jobs"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} (={getattr(self, name)}) must be at least 1")
        if not 0 < self.held_out < 1:
            raise SettingsError(f"held_out (={self.held_out}) must be between 0 and 1")
        if not self.rates or not all(0 < rate < math.inf for rate in self.rates):
            raise SettingsError(f"rates (={list(self.rates)}) must be positive numbers")


@dataclass(frozen=True)
class Settings:
    """What to train, on what, and how.

    Args:
        output: folder of the run.
        data: ``digits``, or a path: a folder of class folders, a folder of CIFAR-10 or CIFAR-100, or an ``.npz``
            file, as :func:`~refconv_kernels.learning.data.load` says.
        image_size: height and width of a folder's images, in pixels; None is 224, or their own size if all are small.
        model: ``small``, ``separable``, ``mobilenetv1``, ``mobilenetv2`` or ``resnet20``; ``timm:NAME``,
            ``torchvision:NAME``, or ``MODULE:FUNCTION``, which is called with ``num_classes``.
        pretrained: file of weights, or folder of a training, to start from; None trains a baseline first.
        arm: the second training, one of :data:`~refconv_kernels.learning.arms.ARMS` (below).
        form: of the RefConv layers: ``thin`` trains the same with far fewer parameters.
        init: of the refocusing weights, where the arm does not say.
        map_size: ``k`` of the refocusing weights.
        seed: of the weights, the order of the images, and their augmentation.
        mean, std: per channel; the network sees ``(image - mean) / std``. None measures them on the training images.
        precision: of the network's arithmetic: ``float32``, or autocast to one of the others.
        channels_last: memory layout of network and images.
        compile: ``torch.compile`` the network.
        device: as torch names it; None is the GPU if there is one.
        threads: of each process on the CPU; None leaves torch's own number.
        parallel: how the processes of ``torchrun`` share the network.
        checkpoint_minutes: between checkpoints within an epoch; there is one after every epoch too.
        evaluate_every: epochs between evaluations on the test images; the last epoch is always evaluated.
        recipe: how it is trained.
        compare: what ``learn compare`` adds.

    Raises:
        SettingsError: a value is out of range.
    """

    output: str = "run"
    data: str = "digits"
    image_size: int | None = None
    model: str = "small"
    pretrained: str | None = None
    arm: str = "refconv"
    form: str = "full"
    init: str = "xavier"
    map_size: int = 3
    seed: int = 0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    precision: str = "float32"
    channels_last: bool = False
    compile: bool = False
    device: str | None = None
    threads: int | None = None
    parallel: str = "ddp"
    checkpoint_minutes: float = 10.0
    evaluate_every: int = 1
    recipe: Recipe = field(default_factory=Recipe)
    compare: Comparison = field(default_factory=Comparison)

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise SettingsError(f"{name} (={getattr(self, name)!r}) must be one of {', '.join(allowed)}")
        for name in ("image_size", "threads", "evaluate_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"{name} (={value}) must be at least 1")
        if self.map_size < 1 or self.map_size % 2 == 0:
            raise SettingsError(f"map_size (={self.map_size}) must be odd and positive")
        if (self.mean is None) != (self.std is None):
            raise SettingsError("mean and std go together: give both or neither")
        if self.mean is not None and not all(map(math.isfinite, self.mean)):
            raise SettingsError(f"mean (={list(self.mean)}) must be finite")
        if self.std is not None and not all(0 < value < math.inf for value in self.std):
            raise SettingsError(f"std (={list(self.std)}) must be positive")
        if not self.checkpoint_minutes > 0:
            raise SettingsError(f"checkpoint_minutes (={self.checkpoint_minutes}) must be positive")


#: Settings that do not change what a training computes (it knows its own arm), so a run may go on with others.
FREE = ("output", "arm", "device", "threads", "parallel", "checkpoint_minutes", "compare.jobs")

_SECTIONS: dict[str, type] = {"recipe": Recipe, "compare": Comparison}


def flat(settings: Settings) -> dict[str, Any]:
    """All settings by name, those of a section as ``recipe.lr``, as JSON has them."""
    values: dict[str, Any] = {}
    for name, value in asdict(settings).items():
        for inner, inner_value in value.items() if name in _SECTIONS else [(None, value)]:
            plain = list(inner_value) if isinstance(inner_value, tuple) else inner_value
            values[name if inner is None else f"{name}.{inner}"] = plain
    return values


def to_toml(settings: Settings) -> str:
    """``settings`` as a TOML file; what is None is left out."""
    sections: dict[str, list[str]] = {"": [], **{name: [] for name in _SECTIONS}}
    for name, value in flat(settings).items():
        if value is not None:
            section, _, key = name.rpartition(".")
            sections[section].append(f"{key} = {_toml(value)}")
    return (
        "\n".join("\n".join([f"\n[{section}]", *lines] if section else lines) for section, lines in sections.items())
        + "\n"
    )


def _toml(value: Any) -> str:
    """A value as TOML writes it: JSON but for infinity, and for characters beyond 16 bits."""
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        quoted = json.dumps(value, ensure_ascii=False)
        return "".join(c if " " <= c <= "~" else f"\\U{ord(c):08X}" for c in quoted)
    return str(value) if value == math.inf else json.dumps(value)


def from_toml(path: Path) -> Settings:
    """Settings from a TOML file; what it does not name is the default.

    Raises:
        SettingsError: the file is missing or no TOML, a name is unknown, a value has the wrong type or is out of range.
    """
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        content = toml.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from error
    except (toml.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is no TOML file: {error}") from error
    values: dict[str, Any] = {}
    for name, value in content.items():
        if name in _SECTIONS and isinstance(value, dict):
            values.update({f"{name}.{key}": inner for key, inner in value.items()})
        else:
            values[name] = value
    try:
        return _with(Settings(), values)
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error


def from_flat(values: Mapping[str, Any]) -> Settings:
    """The inverse of :func:`flat`."""
    return _with(Settings(), {name: value for name, value in values.items() if value is not None})


def _with(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """``settings`` with some replaced, by their flat names."""
    kinds = _kinds()
    sections: dict[str, dict[str, Any]] = {"": {}, **{name: {} for name in _SECTIONS}}
    for name, value in values.items():
        if name not in kinds:
            raise SettingsError(f"there is no setting {name!r}; there are {', '.join(kinds)}")
        section, _, key = name.rpartition(".")
        sections[section][key] = _checked(name, value, kinds[name])
    try:
        inner = {name: replace(getattr(settings, name), **sections[name]) for name in _SECTIONS}
        return replace(settings, **sections[""], **inner)
    except SettingsError:
        raise
    except ValueError as error:
        raise SettingsError(str(error)) from error


def _kinds() -> dict[str, Any]:
    """The type of each setting by its flat name."""
    kinds: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(Settings).items():
        if name in _SECTIONS:
            hints = typing.get_type_hints(_SECTIONS[name])
            kinds.update({f"{name}.{f.name}": hints[f.name] for f in fields(_SECTIONS[name])})
        else:
            kinds[name] = kind
    return kinds


def _checked(name: str, value: Any, kind: Any) -> Any:
    if isinstance(kind, types.UnionType):
        kinds = [k for k in typing.get_args(kind) if k is not type(None)]
        return None if value is None else _checked(name, value, kinds[0])
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        if not isinstance(value, (list, tuple)):
            raise SettingsError(f"{name} (={value!r}) must be a list")
        return tuple(_checked(name, one, inner) for one in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        raise SettingsError(f"{name} (={value!r}) must be {words[kind]}")
    return value


# --- options ------------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    """One option for each setting, and ``--config``; what is not given stays out of the namespace."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings from a TOML file; options win over it")
    groups = {"": parser.add_argument_group("what to train"), "recipe": parser.add_argument_group("recipe")}
    groups["compare"] = parser.add_argument_group("learn compare")
    defaults = flat(Settings())
    for name, kind in _kinds().items():
        section, _, key = name.rpartition(".")
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": _help(name, defaults[name])}
        inner = [k for k in typing.get_args(kind) if k is not type(None)] if _is_optional(kind) else [kind]
        if inner[0] is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(inner[0]) is tuple:
            options.update(nargs="+", type=typing.get_args(inner[0])[0], metavar=key.rstrip("s").upper())
        else:
            options.update(type=inner[0], metavar=key.upper())
            if key in _CHOICES and len(_CHOICES[key]) < 8:
                options.update(choices=_CHOICES[key], metavar=None)
        groups[section].add_argument("--" + key.replace("_", "-"), **options)


def from_options(arguments: argparse.Namespace) -> Settings:
    """The settings that parsed options describe, over those of ``--config``.

    Raises:
        SettingsError: as :func:`from_toml`.
    """
    settings = Settings() if arguments.config is None else from_toml(arguments.config)
    return _with(settings, {name: value for name, value in vars(arguments).items() if name in _kinds()})


def check_same(before: Mapping[str, Any], now: Settings, path: Path) -> None:
    """Refuse to go on with a training under other settings.

    Raises:
        CheckpointError: a setting differs that changes what is computed.
    """
    after = flat(now)
    changed = [
        f"{name} was {before.get(name)!r}, is {value!r}"
        for name, value in after.items()
        if not name.startswith("compare.") and name not in FREE and before.get(name) != value
    ]
    if changed:
        raise CheckpointError(f"{path} belongs to a run with other settings: {'; '.join(changed)}")


def _is_optional(kind: Any) -> bool:
    return isinstance(kind, types.UnionType)


def _help(name: str, default: Any) -> str:
    """The first words of the setting's documentation, and its default."""
    section, _, key = name.rpartition(".")
    lines = inspect.cleandoc((_SECTIONS[section] if section else Settings).__doc__ or "").splitlines()
    text, found = "", False
    for line in lines:
        head, colon, rest = line.strip().partition(": ")
        if line.startswith(" " * 4) and not line.startswith(" " * 5) and colon:
            found = key in [word.strip() for word in head.split(",")]
            text = rest if found else text
        elif found and line.startswith(" " * 8):
            text += " " + line.strip()
        elif found:
            break
    text = re.sub(r":\w+:`~?(?:\w+\.)*(\w+)`", r"\1", text).replace("`", "").replace("%", "%%")
    shown = "" if default is None else f" ({' '.join(map(str, default)) if isinstance(default, list) else default})"
    return text + shown
