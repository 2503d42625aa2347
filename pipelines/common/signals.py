"""Turns stop signals into an exception, so that a command leaves no partial output."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A stop signal was received. Not an Exception: only a `main` function may catch it."""


def signals_raise_stopped() -> contextlib.AbstractContextManager[None]:
    """Raise Stopped on SIGINT and SIGTERM, so that every `with` block cleans up."""

    def stop(number: int, frame: object) -> None:
        for other in STOP_SIGNALS:
            signal.signal(other, signal.SIG_IGN)  # the clean-up is short and must finish
        raise Stopped(number)

    return _stop_signals_handled(stop)


def signals_ignored() -> contextlib.AbstractContextManager[None]:
    """Ignore SIGINT and SIGTERM in a block that is short and must finish."""
    return _stop_signals_handled(signal.SIG_IGN)


@contextlib.contextmanager
def _stop_signals_handled(handler: Any) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only
        return
    previous = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, former in previous.items():
            signal.signal(number, former)
