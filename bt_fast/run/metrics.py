"""The numbers of a run in files that hold only whole records: metrics.jsonl and TensorBoard's.

What a full disk does not take waits in memory and is written with a later record, when there is
room again: nothing is torn, and nothing but a kill in the meantime loses it.
"""

import errno
import io
import json
import math
import os
import socket
import time
from pathlib import Path


class RecordFile:
    """A file that grows by whole records and never waits for the disk to be flushed."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        self._end = os.lseek(self._descriptor, 0, os.SEEK_END)
        self._waiting = b""

    def append(self, record: bytes) -> None:
        """Write a record and all that wait. Raises OSError if they have to go on waiting."""
        self._waiting += record
        written = os.pwrite(self._descriptor, self._waiting, self._end)
        if written < len(self._waiting):  # the disk filled up in the middle
            os.ftruncate(self._descriptor, self._end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._end += written
        self._waiting = b""

    def close(self) -> None:
        """Raises OSError if records are lost."""
        try:
            if self._waiting:
                self.append(b"")
        finally:
            os.close(self._descriptor)


def open_metrics(folder: Path) -> RecordFile:
    """metrics.jsonl of a run, to be continued."""
    return RecordFile(folder / "metrics.jsonl")


def metrics_line(kind: str, values: dict) -> bytes:
    """One line of metrics.jsonl."""
    # JSON has no nan or infinity, which is what a skipped step's loss is.
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    return json.dumps({"kind": kind, **finite}).encode() + b"\n"


def open_events(folder: Path, first_step: int) -> RecordFile:
    """A new file for TensorBoard, which then forgets what other files say after `first_step`."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    (folder / "tensorboard").mkdir(exist_ok=True)
    started = time.time_ns()  # sorts the files; the process tells those of one moment apart
    name = f"events.out.tfevents.{started // 10**9}.{socket.gethostname()}.{os.getpid()}.{started}"
    file = RecordFile(folder / "tensorboard" / name)
    restart = SessionLog(status=SessionLog.START)
    file.append(
        _framed(Event(file_version="brain.Event:2"))
        + _framed(Event(step=first_step + 1, session_log=restart))
    )
    return file


def tensorboard_events(kind: str, values: dict) -> bytes:
    """One event for each value but the step and the epoch."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    scalars = [
        Summary.Value(tag=f"{kind}/{name}", simple_value=value)
        for name, value in values.items()
        if name not in ("step", "epoch")
    ]
    return _framed(Event(step=values["step"], summary=Summary(value=scalars)))


def _framed(event) -> bytes:
    """An event as TensorBoard's files hold it: with its length and checksums."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    event.wall_time = time.time()
    buffer = io.BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()
