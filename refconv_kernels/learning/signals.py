"""Being asked to stop, by Ctrl-C or by a scheduler: note it, finish the step, save, and leave."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

__all__ = ["PATIENCE", "Stopped", "Watch"]

PATIENCE = 2.0  # seconds


class Stopped(Exception):
    """A training was asked to stop, and has saved where it is.

    Args:
        text: what was saved, and how to go on.
        signal_number: of the signal that asked.
    """

    def __init__(self, text: str, signal_number: int) -> None:
        super().__init__(text, signal_number)  # both, so that it can come from another process
        self.text, self.signal_number = text, signal_number

    def __str__(self) -> str:
        return self.text

    @property
    def exit_code(self) -> int:
        """128 plus the signal, as shells count."""
        return 128 + self.signal_number


class Watch:
    """While it is entered, SIGINT and SIGTERM are noted in :attr:`asked`.

    One that comes :data:`PATIENCE` seconds after the first acts as it did before, in case saving never ends. Sooner it
    is the same wish again: a terminal and ``torchrun`` both pass a Ctrl-C on.
    """

    def __init__(self) -> None:
        self._asked: int | None = None
        self._first = 0.0
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> int | None:
        """The signal that came, or None."""
        return self._asked

    def __enter__(self) -> Watch:
        if threading.current_thread() is threading.main_thread():  # Python gives signals to no other
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._asked is None:
            self._asked, self._first = number, time.monotonic()
        elif time.monotonic() - self._first >= PATIENCE:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
