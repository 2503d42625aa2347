"""Signals that request a stop, and the exit statuses of a run that did not complete."""

import signal

EXIT_REFUSED = 2  # a user error, already reported: a restart would repeat it
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped on request after saving; continue with --resume
EXIT_UNSAVED = 74  # EX_IOERR: the last checkpoint, or the encoder, could not be written

# Sent by Slurm, users and closing terminals. NCCL may use SIGUSR1 itself; SIGUSR2 is the safest.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT)


class StopFlag:
    """A stop request by one of STOP_SIGNALS, and by Ctrl-C only once `training`.

    Before that, and the second time, Ctrl-C interrupts immediately.
    """

    def __init__(self) -> None:
        self.requested = False
        self.training = False

    def __enter__(self) -> "StopFlag":
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
        self._previous = {
            number: signal.signal(number, self._request)
            for number in STOP_SIGNALS
            if number not in ignored
        }
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, _frame) -> None:
        if number == signal.SIGINT and (self.requested or not self.training):
            raise KeyboardInterrupt
        self.requested = True
