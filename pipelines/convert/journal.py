"""The journal of a conversion, with which another process continues it after an interruption.

The file holds a line of JSON, the settings, which must be equal then, and a line per image: the
CRC-32 of the rest of the line, and as JSON its outcome and the CRC-32 of the stored JPEG. An entry
is valid if both checksums match, so nothing is synced: images lost in a crash are converted again.
"""

import dataclasses
import json
import zlib
from collections.abc import Callable, Generator
from pathlib import Path

from pipelines.common.atomic import open_for_recovery
from pipelines.convert.jpeg import Prepared
from pipelines.convert.manifest import SourceError
from pipelines.convert.workers import Outcome


class Journal:
    """The journal in file `path`, new or continued. Raises SourceError for other settings."""

    def __init__(self, path: Path, settings: dict):
        settings = json.loads(json.dumps(settings))  # with lists for tuples
        self._file = open_for_recovery(path)
        line = self._file.readline()
        if not line.endswith(b"\n"):  # new, or killed before the first image
            self._file.seek(0)
            self._file.truncate()
            self._file.write(json.dumps(settings).encode() + b"\n")
            return
        try:
            before = dict(json.loads(line))
            changed = [
                "other images" if key == "images" else f"{key} was {before.get(key)}"
                for key, value in settings.items()
                if before.get(key) != value
            ]
        except (ValueError, TypeError):
            changed = ["its journal is damaged"]
        if changed:
            raise SourceError(
                f"--continue: {path.parent} was written with other settings"
                f" ({', '.join(changed)}); give the same settings, or start again without"
                " --continue"
            )

    def recover(self, read: Callable[[int], bytes]) -> Generator[Outcome, None, None]:
        """Yield the outcomes before the first invalid entry, which is cut off with all after it.

        `read(size)` returns the stored bytes of the next image. Closing the generator also cuts off
        the outcome that it yielded last. Exhaust or close it before `append`.
        """
        end = self._file.tell()
        try:
            while (entry := self._read_entry()) is not None:
                num_bytes, stored, checksum, reason, is_dropped = entry
                image = None
                if stored is not None:
                    size, *facts = stored
                    jpeg = read(size)
                    if len(jpeg) != size or zlib.crc32(jpeg) != checksum:
                        break
                    image = Prepared(jpeg, *facts)
                yield Outcome(num_bytes, image, checksum, reason, is_dropped)
                end = self._file.tell()
        finally:
            self._file.seek(end)
            self._file.truncate()

    def append(self, outcome: Outcome) -> None:
        """Record the outcome of the next image, whose bytes have been written already."""
        stored = None
        if outcome.image is not None:
            jpeg, *facts = dataclasses.astuple(outcome.image)
            stored = [len(jpeg), *facts]
        fields = [outcome.num_bytes, stored, outcome.checksum, outcome.reason, outcome.is_dropped]
        entry = json.dumps(fields)
        self._file.write(f"{zlib.crc32(entry.encode()):08x} {entry}\n".encode())
        self._file.flush()

    def close(self) -> None:
        """Close the file; the conversion can be continued from its entries."""
        self._file.close()

    def _read_entry(self) -> list | None:
        """The next entry's numbers and text; None at the end and for a damaged entry."""
        line = self._file.readline()
        checksum, _, entry = line[:-1].partition(b" ")
        intact = line.endswith(b"\n") and checksum == b"%08x" % zlib.crc32(entry)
        return json.loads(entry) if intact else None
