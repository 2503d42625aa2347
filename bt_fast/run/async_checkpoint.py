"""Checkpoints written while training continues.

Between two steps a copy of the state is queued; when it has completed, a thread writes it, computes
its checksums and flushes the disk, which takes seconds for a model with a wide projector. One at a
time: the next one waits for it, and so does the end of a run, however it ends.
"""

import functools
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from bt_fast.build import TrainingSetup, average_statistics
from bt_fast.deferred import Deferred
from bt_fast.distributed import collectives
from bt_fast.finite import queue_finite_check
from bt_fast.run import checkpoint
from bt_fast.run.console import RunLog, reason
from bt_fast.run.directory import RunDirectory


class AsyncCheckpoints:
    """The checkpoints of a run, on all its ranks; the first rank's are written.

    Attributes: `saved`, whether the newest checkpoint was written, as far as is known; `writing`,
    the write in progress, whose result `check` reads.
    """

    def __init__(
        self, setup: TrainingSetup, run: RunDirectory | None, log: RunLog, deferred: Deferred
    ) -> None:
        self.saved = True
        self.writing: Future | None = None
        self._deferred = deferred
        self._setup, self._run, self._log = setup, run, log
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._snapshot = checkpoint.Snapshot()
        self._queued = False  # a copy that may not have completed
        self._step = 0

    def __enter__(self) -> "AsyncCheckpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        # After other errors the device or other ranks may not respond.
        if kind is None or issubclass(kind, (ValueError, OSError)):
            self._deferred.flush()
        self.check(wait=True)
        self._thread.shutdown()

    def begin(self, step: int, skipped_in_a_row: torch.Tensor) -> None:
        """Save the state after `step`: all ranks call it.

        Copy, check and comparison of the state are only queued. If it is not finite or weights
        differ between ranks, nothing is written.
        skipped_in_a_row: int scalar on the device, the updates skipped without one between them.
        With --if-save-fails stop it returns when the write has ended.
        """
        setup = self._setup
        if self._queued:  # the buffer is reused
            self._deferred.flush()
        average_statistics(setup)
        weights, momentum = checkpoint.state(setup.model, setup.optimizer)
        checks = (
            collectives.compare_weights(setup.model, setup.world.group),
            queue_finite_check(
                weights | {f"momentum of {name}": value for name, value in momentum.items()},
                f"step {step} was not saved",
                "start again with lower --lr-weights and --lr-biases",
            ),
        )
        count = skipped_in_a_row.clone().to("cpu", non_blocking=True)
        if self._run is not None:
            self.check(wait=True)
            self._snapshot.take(setup.model, setup.optimizer)
        self._queued = True
        self._deferred.add(step, functools.partial(self._write, step, checks, count))
        if setup.config.if_save_fails == "stop":
            self._deferred.flush()
            self.check(wait=True)

    def _write(
        self, step: int, checks: Iterable[Callable[[], None]], skipped_in_a_row: torch.Tensor
    ) -> None:
        """Start writing; the copy has completed."""
        self._queued = False
        for check in checks:
            check()
        if self._run is None:
            return
        setup = self._setup
        self._step = step
        self.writing = self._thread.submit(
            checkpoint.write,
            self._run.path,
            step,
            self._snapshot.tensors,
            {"data": setup.data_identity, "skipped_in_a_row": int(skipped_in_a_row)},
            keep=setup.config.keep,
        )

    def check(self, *, wait: bool = False) -> None:
        """If the write has ended (or wait for it), update `saved`, and warn if it has failed."""
        if self.writing is None or not (wait or self.writing.done()):
            return
        writing, self.writing = self.writing, None
        try:
            writing.result()
            self.saved = True
        except OSError as error:
            self.saved = False
            self._log.warn(
                f"step {self._step} was not saved, and the checkpoints before it stay:"
                f" {reason(error)}"
            )
