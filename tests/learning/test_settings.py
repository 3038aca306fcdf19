"""Every setting is a field and a line of TOML; and what is wrong is said by name, value and rule."""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from refconv_kernels.learning.errors import CheckpointError, SettingsError
from refconv_kernels.learning.recipe import Recipe
from refconv_kernels.learning.settings import (
    FREE,
    Comparison,
    Settings,
    add_options,
    check_same,
    flat,
    from_flat,
    from_options,
    from_toml,
    to_toml,
)

#: A value other than the default for every setting, by its flat name.
OTHER: dict[str, Any] = {
    "output": 'a "quoted" \\ folder/ä \U0001f600 \x7f\n#',
    "data": "images.npz",
    "image_size": 48,
    "model": "timm:resnet18",
    "pretrained": "weights.pth",
    "arm": "zero",
    "form": "thin",
    "init": "kaiming",
    "map_size": 5,
    "seed": 7,
    "mean": [0.1, 0.25, 1e-05],
    "std": [1.0, 2.0, 1e16],
    "precision": "bfloat16",
    "channels_last": True,
    "compile": True,
    "device": "cpu",
    "threads": 2,
    "parallel": "fsdp",
    "checkpoint_minutes": math.inf,
    "evaluate_every": 3,
    "recipe.epochs": 12,
    "recipe.warmup_epochs": 0,
    "recipe.batch_size": 32,
    "recipe.lr": 1e-07,
    "recipe.momentum": 0.5,
    "recipe.nesterov": True,
    "recipe.weight_decay": 0.0,
    "recipe.crop_padding": 0,
    "recipe.flip": False,
    "recipe.label_smoothing": 0.1,
    "recipe.clip_norm": 1.5,
    "recipe.accumulation": 4,
    "recipe.ema": 0.999,
    "compare.arms": ["zero", "1b2l-se", "baseline"],
    "compare.seeds": 8,
    "compare.rates": [0.5],
    "compare.held_out": 0.25,
    "compare.jobs": 3,
}
DEFAULTS = flat(Settings())
SECTIONS = {"": "Settings", "recipe": "Recipe", "compare": "Comparison"}


def changed(**values: Any) -> Settings:
    return from_flat({**DEFAULTS, **values})


def one(name: str) -> Settings:
    """The default settings with another value of ``name``."""
    values = {name: OTHER[name]}
    if name in ("mean", "std"):  # they go together
        values = {"mean": OTHER["mean"], "std": OTHER["std"]}
    return changed(**values)


def option(name: str) -> str:
    return "--" + name.rpartition(".")[2].replace("_", "-")


def as_options(name: str, value: Any = None) -> list[str]:
    value = OTHER[name] if value is None else value
    if isinstance(value, bool):
        return [option(name) if value else option(name).replace("--", "--no-", 1)]
    return [option(name), *map(str, value if isinstance(value, list) else [value])]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(allow_abbrev=False)
    add_options(made)
    return made


def parse(*options: str) -> Settings:
    return from_options(parser().parse_args(options))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "settings.toml"


def test_the_table_of_this_file_is_complete() -> None:
    assert list(OTHER) == list(DEFAULTS)
    assert all(OTHER[name] != DEFAULTS[name] for name in OTHER)
    names = [f.name for f in fields(Settings) if f.name not in SECTIONS]
    for section, kind in (("recipe", Recipe), ("compare", Comparison)):
        names += [f"{section}.{f.name}" for f in fields(kind)]
    assert names == list(DEFAULTS)


# --- TOML ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [Settings(), from_flat(OTHER)], ids=["default", "other"])
def test_toml_and_back(settings: Settings, file: Path) -> None:
    file.write_text(to_toml(settings))
    assert from_toml(file) == settings


@pytest.mark.parametrize("name", OTHER)
def test_every_setting_is_a_line_of_toml(name: str, file: Path) -> None:
    settings = one(name)
    assert settings != Settings()
    file.write_text(to_toml(settings))
    assert from_toml(file) == settings
    section, _, key = name.rpartition(".")
    blocks = dict(zip(("", "recipe", "compare"), re.split(r"\n\[\w+\]\n", to_toml(settings)), strict=True))
    assert re.search(rf"^{key} = ", blocks[section], re.MULTILINE)


def test_what_is_none_is_left_out_of_toml() -> None:
    text = to_toml(Settings())
    unset = [name for name, value in DEFAULTS.items() if value is None]
    assert unset  # None is always a default, so that leaving it out means None
    assert not any(re.search(rf"^{name.rpartition('.')[2]} =", text, re.MULTILINE) for name in unset)


def test_a_file_names_what_differs_from_the_defaults(file: Path) -> None:
    file.write_text('seed = 3\ncheckpoint_minutes = 2\n[recipe]\nlr = 1\n[compare]\narms = ["zero"]\n')
    settings = from_toml(file)
    assert settings == Settings(
        seed=3, checkpoint_minutes=2.0, recipe=Recipe(lr=1.0), compare=Comparison(arms=("zero",))
    )
    assert type(settings.recipe.lr) is type(settings.checkpoint_minutes) is float


def test_the_letters_of_a_file_are_utf8(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_bytes('output = "ä"\n'.encode())
    assert from_toml(file).output == "ä"
    file.write_bytes('output = "ä"\n'.encode("latin-1"))
    with pytest.raises(SettingsError, match="settings.toml is no TOML file: 'utf-8' codec"):
        from_toml(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs = 3", r"there is no setting 'epochs'; there are output, data, .*, recipe.epochs, .*, compare.jobs$"),
        ("[recipe]\nlearning_rate = 3", r"there is no setting 'recipe.learning_rate'; there are output"),
        ("[train]\nlr = 3", r"there is no setting 'train'; there are"),
        ("recipe = 3", r"there is no setting 'recipe'; there are"),
        ("[recipe]\nepochs = 'ten'", r"recipe.epochs \(='ten'\) must be a whole number$"),
        ("[recipe]\nepochs = 10.0", r"recipe.epochs \(=10.0\) must be a whole number$"),
        ("[recipe]\nepochs = true", r"recipe.epochs \(=True\) must be a whole number$"),
        ("[recipe]\nlr = true", r"recipe.lr \(=True\) must be a number$"),
        ("[recipe]\nlr = '0.1'", r"recipe.lr \(='0.1'\) must be a number$"),
        ("[recipe]\nnesterov = 1", r"recipe.nesterov \(=1\) must be true or false$"),
        ("[recipe]\nflip = 'no'", r"recipe.flip \(='no'\) must be true or false$"),
        ("output = 3", r"output \(=3\) must be text$"),
        ("device = ['cpu']", r"device \(=\['cpu'\]\) must be text$"),
        ("output = {a = 3}", r"output \(=\{'a': 3\}\) must be text$"),
        ("mean = 0.5", r"mean \(=0.5\) must be a list$"),
        ("mean = ['a']", r"mean \(='a'\) must be a number$"),
        ("[compare]\narms = 'zero'", r"compare.arms \(='zero'\) must be a list$"),
        ("[compare]\narms = [3]", r"compare.arms \(=3\) must be text$"),
        ("[recipe]\nepochs = 0", r"epochs \(=0\) must be at least 1$"),
    ],
)
def test_wrong_names_and_types_in_a_file(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(SettingsError, match=f"^{re.escape(str(file))}: {message}"):
        from_toml(file)


def test_no_file_and_no_toml(file: Path) -> None:
    with pytest.raises(SettingsError, match=rf"^cannot read {re.escape(str(file))}: No such file or directory$"):
        from_toml(file)
    with pytest.raises(SettingsError, match=r"^cannot read .*: Is a directory$"):
        from_toml(file.parent)
    file.write_text("seed = \n")
    with pytest.raises(SettingsError, match=r"settings.toml is no TOML file: .*line 1"):
        from_toml(file)


# --- values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"arm": "refocus"}, r"^arm \(='refocus'\) must be one of baseline, retrain, finetune, .*, 1b2l-se$"),
        ({"form": "wide"}, r"^form \(='wide'\) must be one of full, thin$"),
        ({"init": "ones"}, r"^init \(='ones'\) must be one of xavier, .*, zeros"),
        ({"precision": "float64"}, r"^precision \(='float64'\) must be one of float32, bfloat16, float16$"),
        ({"parallel": "dp"}, r"^parallel \(='dp'\) must be one of ddp, fsdp$"),
        ({"image_size": 0}, r"^image_size \(=0\) must be at least 1$"),
        ({"threads": 0}, r"^threads \(=0\) must be at least 1$"),
        ({"evaluate_every": -1}, r"^evaluate_every \(=-1\) must be at least 1$"),
        ({"map_size": 2}, r"^map_size \(=2\) must be odd and positive$"),
        ({"map_size": -1}, r"^map_size \(=-1\) must be odd and positive$"),
        ({"mean": [0.5]}, r"^mean and std go together: give both or neither$"),
        ({"std": [0.5]}, r"^mean and std go together: give both or neither$"),
        ({"mean": [0.5, 0.5], "std": [1.0, 0.0]}, r"^std \(=\[1.0, 0.0\]\) must be positive$"),
        ({"mean": [0.5], "std": [math.nan]}, r"^std \(=\[nan\]\) must be positive$"),
        ({"mean": [math.nan], "std": [1.0]}, r"^mean \(=\[nan\]\) must be finite$"),
        ({"checkpoint_minutes": 0.0}, r"^checkpoint_minutes \(=0.0\) must be positive$"),
        ({"checkpoint_minutes": math.nan}, r"^checkpoint_minutes \(=nan\) must be positive$"),
        ({"recipe.lr": -1.0}, r"^lr \(=-1.0\) must be positive$"),
        ({"compare.arms": ["zero", "one"]}, r"^arms \(='one'\) must be of baseline, retrain"),
        ({"compare.seeds": 0}, r"^seeds \(=0\) must be at least 1$"),
        ({"compare.jobs": 0}, r"^jobs \(=0\) must be at least 1$"),
        ({"compare.held_out": 0.0}, r"^held_out \(=0.0\) must be between 0 and 1$"),
        ({"compare.held_out": 1.0}, r"^held_out \(=1.0\) must be between 0 and 1$"),
        ({"compare.held_out": math.nan}, r"^held_out \(=nan\) must be between 0 and 1$"),
        ({"compare.rates": []}, r"^rates \(=\[\]\) must be positive numbers$"),
        ({"compare.rates": [0.1, 0.0]}, r"^rates \(=\[0.1, 0.0\]\) must be positive numbers$"),
        ({"compare.rates": [math.inf]}, r"^rates \(=\[inf\]\) must be positive numbers$"),
    ],
)
def test_values_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        changed(**values)


def test_flat_and_back() -> None:
    for settings in (Settings(), from_flat(OTHER)):
        assert from_flat(flat(settings)) == settings
        assert from_flat(json.loads(json.dumps(flat(settings)))) == settings
    assert flat(from_flat(OTHER)) == OTHER
    assert from_flat({}) == Settings()
    with pytest.raises(SettingsError, match=r"^there is no setting 'lr'; there are"):
        from_flat({"lr": 0.1})


# --- going on -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in OTHER if n not in FREE and not n.startswith("compare.")])
def test_check_same_names_what_changed(name: str) -> None:
    now = one(name)
    check_same(flat(now), now, Path("run/a.toml"))
    with pytest.raises(CheckpointError) as caught:
        check_same(DEFAULTS, now, Path("run/a.toml"))
    assert str(caught.value).startswith("run/a.toml belongs to a run with other settings: ")
    assert f"{name} was {DEFAULTS[name]!r}, is {OTHER[name]!r}" in str(caught.value)
    assert str(caught.value).count(" was ") == (2 if name in ("mean", "std") else 1)


def test_check_same_lets_go_on_with_what_changes_no_result() -> None:
    free = {name: OTHER[name] for name in OTHER if name in FREE or name.startswith("compare.")}
    assert {"output", "device", "threads", "parallel", "checkpoint_minutes", "compare.jobs"} <= set(free)
    check_same(DEFAULTS, changed(**free), Path("a"))
    with pytest.raises(CheckpointError, match=r"^a belongs .*: seed was 0, is 7; recipe.lr was 0.1, is 1e-07$"):
        check_same(DEFAULTS, changed(**{**free, "seed": 7, "recipe.lr": 1e-07}), Path("a"))
    with pytest.raises(CheckpointError, match=r"seed was None, is 0"):
        check_same({name: value for name, value in DEFAULTS.items() if name != "seed"}, Settings(), Path("a"))
