"""Checkpoints written while training goes on.

Between two steps a copy of what is to be saved is queued; when it has completed, a thread writes
it, checks its sums and flushes the disk, which takes seconds for a model with a wide projector. One
at a time: the next one waits for it, and so does the end of a run, however it comes.
"""

import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from bt_fast.build import TrainingSetup
from bt_fast.deferred import Deferred
from bt_fast.distributed import collectives
from bt_fast.run import checkpoint
from bt_fast.run.console import RunLog, reason
from bt_fast.run.directory import RunDirectory


class Saving:
    """The checkpoints of a run, on all its ranks; the first one's are written.

    Attributes: `saved`, whether the disk has taken the newest one, as far as is known.
    """

    def __init__(
        self, setup: TrainingSetup, run: RunDirectory | None, log: RunLog, deferred: Deferred
    ) -> None:
        self.saved = True
        self._deferred = deferred
        self._job, self._run, self._log = setup, run, log
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._snapshot = checkpoint.Snapshot()
        self._queued = False  # a copy that may not have completed
        self._step = 0
        self._writing: Future | None = None

    def __enter__(self) -> "Saving":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        # What is queued is sound, unless the device or other ranks may not answer any more.
        if kind is None or issubclass(kind, (ValueError, OSError)):
            self._deferred.flush()
        self.look(wait=True)
        self._thread.shutdown()

    def begin(self, step: int) -> None:
        """Save the state after `step`. All ranks call it: where each one's reader stands is in the
        checkpoint, too. With --if-save-fails stop it returns when the disk has it, or has not.

        Nothing is written of weights that differ between ranks; the comparison, like the copy, is
        only queued here.
        """
        setup = self._job
        if self._queued:  # the buffer is reused
            self._deferred.flush()
        check = collectives.compare_weights(setup.model, setup.world.group)
        readers = collectives.of_all(setup.loader.steps.state(step), setup.world.group)
        if self._run is not None:
            self.look(wait=True)
            self._snapshot.take(setup.model, setup.optimizer)
        self._queued = True
        self._deferred.add(step, functools.partial(self._write, step, check, readers))
        if setup.config.if_save_fails == "stop":
            self._deferred.flush()
            self.look(wait=True)

    def _write(self, step: int, check: Callable[[], None], readers: list) -> None:
        """Start writing; the copy has completed."""
        self._queued = False
        check()
        if self._run is None:
            return
        setup = self._job
        self._step = step
        self._writing = self._thread.submit(
            checkpoint.write,
            self._run.path,
            step,
            self._snapshot.tensors,
            {"data": setup.data_facts, "readers": readers},
            keep=setup.config.keep,
        )

    def look(self, *, wait: bool = False) -> None:
        """Note, and say, what has become of the checkpoint that is being written; if nothing yet,
        leave it or wait for it."""
        if self._writing is None or not (wait or self._writing.done()):
            return
        writing, self._writing = self._writing, None
        try:
            writing.result()
            self.saved = True
        except OSError as error:
            self.saved = False
            self._log.warn(
                f"step {self._step} was not saved, and the checkpoints before it stay:"
                f" {reason(error)}"
            )
