"""Turns stop signals into an exception, so that a command leaves no partial output."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class Stopped(BaseException):
    """A stop signal was received. Not an Exception: only a `main` function may catch it."""


@contextlib.contextmanager
def signals_raise_stopped() -> Iterator[None]:
    """Raise Stopped on SIGINT and SIGTERM, so that every `with` block cleans up."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only
        return

    def stop(number: int, frame: object) -> None:
        for other in previous:
            signal.signal(other, signal.SIG_IGN)  # the clean-up is short and must finish
        raise Stopped(number)

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def signals_ignored() -> Iterator[None]:
    """Ignore SIGINT and SIGTERM in a block that is short and must finish."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
