"""Being asked to stop."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from refconv_kernels.learning import signals
from refconv_kernels.learning.signals import Stopped, Watch

BOTH = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture
def handled() -> Iterator[list[int]]:
    """Handlers of both signals that note their numbers."""
    seen: list[int] = []
    before = {number: signal.signal(number, lambda n, _: seen.append(n)) for number in BOTH}
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in BOTH]


def test_nothing_happens_by_itself(handled: list[int]) -> None:
    before = handlers()
    with Watch() as watch:
        assert watch.asked is None
        assert all(now is not then for now, then in zip(handlers(), before, strict=True))
    assert handlers() == before


@pytest.mark.parametrize("number", BOTH)
def test_the_first_is_noted_a_late_second_acts_as_before(
    number: signal.Signals, handled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = handlers()
    with Watch() as watch:
        os.kill(os.getpid(), number)
        assert watch.asked == number
        assert handled == []
        monkeypatch.setattr(signals, "PATIENCE", 0.0)
        os.kill(os.getpid(), number)
        assert handled == [number]
        assert watch.asked == number
    assert handlers() == before
    os.kill(os.getpid(), number)
    assert handled == [number, number]


def test_a_second_at_once_is_the_same_wish(handled: list[int]) -> None:
    with Watch() as watch:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            signal.raise_signal(number)
        assert watch.asked == signal.SIGINT
        assert handled == []


def test_a_late_second_ctrl_c_interrupts(handled: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs do not begin with
    with Watch() as watch:
        signal.raise_signal(signal.SIGINT)
        assert watch.asked == signal.SIGINT
        monkeypatch.setattr(signals, "PATIENCE", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_handlers_come_back_after_an_error(handled: list[int]) -> None:
    before = handlers()
    with pytest.raises(ValueError, match="in the middle"), Watch():
        raise ValueError("in the middle")
    assert handlers() == before


def test_one_inside_another(handled: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "PATIENCE", 0.0)
    with Watch() as outer:
        with Watch() as inner:
            signal.raise_signal(signal.SIGINT)
            assert (inner.asked, outer.asked) == (signal.SIGINT, None)
            signal.raise_signal(signal.SIGINT)
            assert outer.asked == signal.SIGINT
        assert handled == []


def test_other_threads_hear_nothing(handled: list[int]) -> None:
    before, found = handlers(), []

    def run() -> None:
        with Watch() as watch:
            found.append((handlers(), watch.asked))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [(before, None)]
    assert handlers() == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped(number: int, code: int) -> None:
    for stopped in (Stopped("all is saved", number), pickle.loads(pickle.dumps(Stopped("all is saved", number)))):
        assert str(stopped) == "all is saved"
        assert stopped.signal_number == number
        assert stopped.exit_code == code
    assert isinstance(stopped, Exception)
