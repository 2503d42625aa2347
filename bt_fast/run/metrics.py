"""Metrics of a run in files of complete records: metrics.jsonl and TensorBoard's.

Records that a full disk refuses are kept in memory and written with a later one, when there is
space again: no record is torn, and only a kill in the meantime loses one.
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
    """A file to which complete records are appended, without flushing the disk."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        self._end = os.lseek(self._descriptor, 0, os.SEEK_END)
        self._pending = b""

    def append(self, record: bytes) -> None:
        """Write all pending records and this one. Raises OSError if they stay pending."""
        self._pending += record
        written = os.pwrite(self._descriptor, self._pending, self._end)
        if written < len(self._pending):  # the disk became full
            os.ftruncate(self._descriptor, self._end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._end += written
        self._pending = b""

    def close(self) -> None:
        """Close the file. Raises OSError if pending records are lost."""
        try:
            if self._pending:
                self.append(b"")
        finally:
            os.close(self._descriptor)


def metrics_line(kind: str, values: dict) -> bytes:
    """One line of metrics.jsonl."""
    # JSON has no NaN or infinity, the values of a skipped step's loss.
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    return json.dumps({"kind": kind, **finite}).encode() + b"\n"


def open_events(folder: Path, first_step: int) -> RecordFile:
    """A new TensorBoard file, which supersedes the events of other files after `first_step`."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    (folder / "tensorboard").mkdir(exist_ok=True)
    started = time.time_ns()  # orders the files
    name = f"events.out.tfevents.{started // 10**9}.{socket.gethostname()}.{os.getpid()}.{started}"
    file = RecordFile(folder / "tensorboard" / name)
    restart = SessionLog(status=SessionLog.START)
    file.append(
        _with_length_and_checksums(Event(file_version="brain.Event:2"))
        + _with_length_and_checksums(Event(step=first_step + 1, session_log=restart))
    )
    return file


def tensorboard_events(kind: str, values: dict) -> bytes:
    """One event with all values except step and epoch."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    scalars = [
        Summary.Value(tag=f"{kind}/{name}", simple_value=value)
        for name, value in values.items()
        if name not in ("step", "epoch")
    ]
    return _with_length_and_checksums(Event(step=values["step"], summary=Summary(value=scalars)))


def _with_length_and_checksums(event) -> bytes:
    """An event in the format of TensorBoard's files."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    event.wall_time = time.time()
    buffer = io.BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()
