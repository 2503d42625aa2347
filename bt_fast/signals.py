"""Signals that ask a run to stop, and the exit status that answers them."""

import signal

EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped by a signal after saving; start again with --resume

# What Slurm and people send; NCCL may take USR1 for itself, so that USR2 is the surest.
ASK_TO_STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class StopFlag:
    """Set by SIGTERM, SIGUSR1 or SIGUSR2, and by Ctrl-C once `training`; before that, and the
    second time, Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.requested = False
        self.training = False

    def __enter__(self) -> "StopFlag":
        self._before = {number: signal.signal(number, self._request) for number in ASK_TO_STOP}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, _frame) -> None:
        if number == signal.SIGINT and (self.requested or not self.training):
            raise KeyboardInterrupt
        self.requested = True
