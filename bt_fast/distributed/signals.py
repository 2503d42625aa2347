"""Signals that ask a run to stop, and the exit statuses of one that did not end as planned."""

import signal

EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped by a signal after saving; start again with --resume
EXIT_UNSAVED = 74  # EX_IOERR: the disk did not take the last checkpoint, or the encoder

# What Slurm, people and closed terminals send; NCCL may take USR1 for itself, so that USR2 is the
# surest.
ASK_TO_STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT)


class StopFlag:
    """Set by SIGTERM, SIGUSR1, SIGUSR2 or SIGHUP (unless nohup has it ignored), and by Ctrl-C once
    `training`; before that, and the second time, Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.requested = False
        self.training = False

    def __enter__(self) -> "StopFlag":
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
        self._before = {
            number: signal.signal(number, self._request)
            for number in ASK_TO_STOP
            if number not in ignored
        }
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, _frame) -> None:
        if number == signal.SIGINT and (self.requested or not self.training):
            raise KeyboardInterrupt
        self.requested = True
