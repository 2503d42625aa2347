"""Signals that ask a run to stop, and the exit statuses of one that did not end as planned."""

import signal

EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped by a signal after saving; start again with --resume
EXIT_UNSAVED = 74  # EX_IOERR: the disk did not take the last checkpoint, or the encoder


class StopFlag:
    """Set by SIGTERM, SIGUSR1 or Ctrl-C; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "StopFlag":
        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        self._before = {number: signal.signal(number, self._request) for number in numbers}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, _frame) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
