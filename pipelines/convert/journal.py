"""What a conversion has done so far, so that another process can continue it.

A line of JSON, the settings, which must be the same then; and an entry per image: what became of
it and the CRC-32 of what was stored. An entry counts if its own checksum holds and the bytes it
speaks of are found again, so nothing need be flushed on the way: what a crash lost is done anew.
"""

import json
import struct
import zlib
from collections.abc import Callable, Generator
from pathlib import Path

from pipelines.common.atomic import open_for_recovery
from pipelines.convert.jpeg import Prepared
from pipelines.convert.workers import Outcome

_ENTRY = struct.Struct("<qqIHHH")  # source bytes, JPEG bytes and CRC-32, height, width, text bytes
_CHECK = struct.Struct("<I")  # CRC-32 of the entry, before it


class OtherSettings(ValueError):
    """The journal is of a conversion with other settings; the message names them."""


class Journal:
    """The journal in file `path`, begun or continued. Raises OtherSettings."""

    def __init__(self, path: Path, settings: dict):
        self._file = open_for_recovery(path)
        line = self._file.readline()
        if not line.endswith(b"\n"):  # new, or killed before the first image
            self._file.seek(0)
            self._file.truncate()
            self._file.write(json.dumps(settings).encode() + b"\n")
            return
        try:
            before = dict(json.loads(line))
        except (ValueError, TypeError):
            raise OtherSettings("its journal is damaged") from None
        changed = [
            "other images" if key == "images" else f"{key} was {before.get(key)}"
            for key, value in settings.items()
            if before.get(key) != value
        ]
        if changed:
            raise OtherSettings(", ".join(changed))

    def recover(self, read: Callable[[int], bytes]) -> Generator[Outcome, None, None]:
        """The outcomes up to the first that cannot be relied upon; what follows is cut off.

        `read(size)` gives the stored bytes of the next image. Closing the generator cuts off the
        outcome that it gave last, too. Exhaust or close it before `append`.
        """
        end = self._file.tell()
        try:
            while (entry := self._read_entry()) is not None:
                num_bytes, size, crc, height, width, text = entry
                jpeg = read(size) if size else b""
                if len(jpeg) != size or (size and zlib.crc32(jpeg) != crc):
                    break
                prepared = Prepared(jpeg, height, width, text) if size else None
                yield Outcome(num_bytes, prepared, crc, reason="" if size else text)
                end = self._file.tell()
        finally:
            self._file.seek(end)
            self._file.truncate()

    def append(self, outcome: Outcome) -> None:
        """Note what became of the next image; its bytes have been written already."""
        image = outcome.image
        text = (outcome.reason if image is None else image.action).encode("utf-8", "replace")
        text = text[:1000]
        size, height, width = (len(image.jpeg), image.height, image.width) if image else (0, 0, 0)
        numbers = outcome.num_bytes, size, outcome.checksum, height, width, len(text)
        entry = _ENTRY.pack(*numbers) + text
        self._file.write(_CHECK.pack(zlib.crc32(entry)) + entry)
        self._file.flush()

    def close(self) -> None:
        """Flush what was noted, so that the conversion can be continued."""
        self._file.close()

    def _read_entry(self) -> tuple[int, int, int, int, int, str] | None:
        """Its numbers and its text; None at the end or where an entry is damaged."""
        head = self._file.read(_CHECK.size + _ENTRY.size)
        if len(head) < _CHECK.size + _ENTRY.size:
            return None
        *numbers, text_size = _ENTRY.unpack_from(head, _CHECK.size)
        text = self._file.read(text_size)
        if _CHECK.unpack_from(head)[0] != zlib.crc32(head[_CHECK.size :] + text):
            return None
        num_bytes, size, crc, height, width = numbers
        return num_bytes, size, crc, height, width, text.decode("utf-8", "replace")
