"""What this process is told by signals: USR1 and TERM are noted, and nothing else happens inside a handler.

A handler runs between any two instructions of Python: a collective there meets another rank's in another place, a lock
may be held by what it interrupted. So the training asks `heard()` where it can act.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

LISTENED = (signal.SIGUSR1, signal.SIGTERM)
_noted: set[signal.Signals] = set()
_listening: list[dict[signal.Signals, Any]] = []


def heard() -> signal.Signals | None:
    """Give the strongest signal that came since `listening` began: TERM before USR1; `None`: none."""
    return next((told for told in reversed(LISTENED) if told in _noted), None)


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Note USR1 and TERM within, instead of dying of them; the handlers that were there come back.

    May be nested: the inner one takes the signals over where somebody has changed the handlers since. Outside the main
    thread, where Python takes no handlers, nothing is done.
    """
    begin()
    try:
        yield
    finally:
        end()


def begin() -> None:
    """Note signals from here on, until `end`."""
    if not _listening:
        _noted.clear()
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {told: signal.signal(told, _note) for told in LISTENED}
    _listening.append(before)


def end() -> None:
    """Put back the handlers that the matching `begin` found."""
    for told, handler in _listening.pop().items():
        signal.signal(told, signal.SIG_DFL if handler is None else handler)
    if not _listening:
        _noted.clear()


def _note(told: int, _: FrameType | None) -> None:
    _noted.add(signal.Signals(told))
