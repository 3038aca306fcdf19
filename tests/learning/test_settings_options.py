"""Every setting is an option, and has help."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from refconv_kernels.learning import settings as module
from refconv_kernels.learning.errors import SettingsError
from refconv_kernels.learning.recipe import Recipe
from refconv_kernels.learning.settings import Comparison, Settings, flat, from_flat, to_toml
from tests.learning.test_settings import DEFAULTS, OTHER, SECTIONS, as_options, changed, one, option, parse, parser


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "settings.toml"


# --- options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OTHER)
def test_every_setting_is_an_option(name: str) -> None:
    other = {"mean": "std", "std": "mean"}.get(name)
    assert parse(*as_options(name), *([] if other is None else as_options(other))) == one(name)


def test_all_options_at_once_and_none() -> None:
    assert parse(*(word for name in OTHER for word in as_options(name))) == from_flat(OTHER)
    assert parse() == Settings()


@pytest.mark.parametrize("name", [name for name, value in OTHER.items() if isinstance(value, bool)])
def test_flags_can_be_taken_back(name: str, file: Path) -> None:
    flag = option(name)
    for words, value in ((flag, True), (flag.replace("--", "--no-", 1), False)):
        file.write_text(to_toml(changed(**{name: not value})))
        assert flat(parse("--config", str(file), words))[name] is value


@pytest.mark.parametrize("name", [name for name, default in DEFAULTS.items() if default is not None])
def test_options_go_before_the_file(name: str, file: Path) -> None:
    file.write_text(to_toml(from_flat(OTHER)))
    assert flat(parse("--config", str(file), *as_options(name, DEFAULTS[name]))) == {**OTHER, name: DEFAULTS[name]}


def test_options_keep_the_sections_of_the_file(file: Path) -> None:
    file.write_text("[recipe]\nlr = 0.5\nepochs = 9\n[compare]\nseeds = 4\n")
    settings = parse("--config", str(file), "--epochs", "8", "--jobs", "2")
    assert settings == Settings(recipe=Recipe(lr=0.5, epochs=8), compare=Comparison(seeds=4, jobs=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "ten"], "argument --epochs: invalid int value: 'ten'"),
        (["--lr", "high"], "argument --lr: invalid float value: 'high'"),
        (["--form", "wide"], "argument --form: invalid choice: 'wide'"),
        (["--mean"], "argument --mean: expected at least one argument"),
        (["--see", "3"], "unrecognized arguments: --see 3"),
    ],
)
def test_options_that_do_not_parse(options: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(*options)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], r"^epochs \(=0\) must be at least 1$"),
        (["--arm", "refocus"], r"^arm \(='refocus'\) must be one of"),
        (["--arms", "zero", "one"], r"^arms \(='one'\) must be of"),
        (["--lr", "nan"], r"^lr \(=nan\) must be positive$"),
    ],
)
def test_options_out_of_range(options: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse(*options)


# --- help ---------------------------------------------------------------------------------------------------


def helps() -> dict[str, str]:
    return {a.dest: a.help or "" for a in parser()._actions if a.dest in OTHER}


def test_every_option_has_help_of_its_own() -> None:
    texts = helps()
    assert list(texts) == list(OTHER)
    assert all(len(text) > 10 for text in texts.values()), texts
    alike = {name for name, text in texts.items() if list(texts.values()).count(text) > 1}
    assert alike == {"mean", "std"}  # documented together
    for name, text in texts.items():
        section, _, key = name.rpartition(".")
        documented = inspect.getdoc(getattr(module, SECTIONS[section])) or ""
        (entry,) = re.findall(rf"^    (?:\w+, )?{key}(?:, \w+)?: (.*(?:\n {{8}}.*)*)", documented, re.MULTILINE)
        shown = 0 if DEFAULTS[name] is None else len(DEFAULTS[name]) if isinstance(DEFAULTS[name], list) else 1
        assert len(text.split()) == len(entry.split()) + shown, name  # all of it, and nothing of its neighbours
        assert not re.search(r"[`~]|refconv_kernels\.|:\w+:|Raises|  ", text), text


def test_help_is_the_documentation() -> None:
    texts = helps()
    assert texts["output"] == "folder of the run. (run)"
    assert texts["image_size"].startswith("height and width of a folder's images, in pixels; None is 224")
    assert texts["arm"] == "the second training, one of ARMS (below). (refconv)"
    assert texts["evaluate_every"].endswith("the last epoch is always evaluated. (1)")
    assert texts["recipe.accumulation"].endswith("of the whole batch; BatchNorm sees the parts. (1)")  # two lines
    assert texts["recipe.ema"].endswith("evaluated and folded; None keeps none.")
    assert texts["compare.jobs"] == "trainings at a time, each a process of its own. (1)"


def test_help_shows_defaults() -> None:
    texts = helps()
    for name, default in DEFAULTS.items():
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        assert texts[name].endswith(f"({shown})") == (default is not None), name


def test_help_of_docstrings_without_indentation(monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python 3.13 on the compiler takes the indentation away."""
    before = helps()
    for kind in (Settings, Recipe, Comparison):
        monkeypatch.setattr(kind, "__doc__", inspect.cleandoc(kind.__doc__ or ""))
    assert helps() == before


def test_help_is_printed(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse("--help")
    printed = capsys.readouterr().out
    assert all(f"{option(name)} " in printed or f"{option(name)}," in printed for name in OTHER)
