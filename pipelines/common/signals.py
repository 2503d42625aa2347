"""Signals that ask a command to stop become an exception, so that it leaves nothing half done."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class Stopped(BaseException):
    """A signal asked us to stop. Not an Exception: nothing but a `main` may swallow it."""


@contextlib.contextmanager
def signals_raise_stopped() -> Iterator[None]:
    """SIGINT and SIGTERM become Stopped, so that every `with` block cleans up after itself."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread, whoever that belongs to
        return

    def stop(number, frame):
        for other in previous:
            signal.signal(other, signal.SIG_IGN)  # the clean-up is short: let it finish
        raise Stopped(number)

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
