"""Fuzzing: bt-fast reads mutated .beton files, weights and images.

    python tools/fuzz.py --count 10000 --seed 0

Every input is a function of (seed, kind, number). The verdict on it is one of

    refused    a documented error of one line: ValueError or a subclass
    read       as the original; or with other contents, where no check can detect the damage
    SILENT     read with other contents although the damage can be detected
    CRASH      another exception, or a message of several lines

Damage can be detected everywhere in a .beton, by its checksums, but not in a .beton of FFCV (`stock
beton`), which has none. Of a damaged image, the converter must detect that it is truncated or
differs from its own checksums (PNG): any other JPEG that decodes without a warning of libjpeg is
another JPEG. The converter's result must be a plain JPEG of the stated size.

The exit status is 1 after a SILENT or CRASH; such inputs are kept in fuzz-findings/. An input that
ends the process, or takes longer than a minute, is fuzz-findings/KIND.
"""

import _checkout  # noqa: F401  # isort: skip

import io
import signal
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image
from safetensors.torch import save as safetensors_bytes

from bt_fast.cli import run_command
from bt_fast.export.encoder_files import load_encoder
from pipelines.beton import BetonReader
from pipelines.beton.layout import HEADER
from pipelines.beton.writer import BetonWriter
from pipelines.common.flags import parse_flags
from pipelines.convert.jpeg import Prepared, prepare
from pipelines.convert.pixels import PixelFlags
from pipelines.loading.native import RecordDecoder

FINDINGS = Path("fuzz-findings")
MAX_SIDE = 64  # smaller than one of the images, so that it is resized
BOUNDARIES = [0, 1, 2, 7, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1]
BOUNDARIES += [2**62, 2**63 - 1, 2**63, 2**64 - 1, 4096, 2 << 20, 65500]


def image(seed: int, width: int, height: int) -> Image.Image:
    """An image of smooth colours with noise."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    pixels = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float64)
    noisy = np.clip(pixels + generator.normal(0, 5, pixels.shape), 0, 255)
    return Image.fromarray(noisy.astype(np.uint8))


def saved(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


# A kind of input has valid files, `originals`. `read` reads a mutated one, as a user would: it
# raises ValueError to refuse it and returns a description of damage that it does not detect.


class Beton:
    """A .beton, read as in training: every record is checked and decoded."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "data.beton"
        with BetonWriter(
            self.path, num_samples=9, class_names=["a", "b", "ü"], page_size=2 << 20
        ) as writer:
            for index in range(9):
                width, height = 40 + 3 * index, 60 - 2 * index
                jpeg = saved(image(index, width, height), "JPEG")
                writer.add(jpeg, height, width, index % 3, f"{index % 3}/{index}.jpg")
        self.originals = [self.path.read_bytes()]
        self.expected = self.records()

    def records(self) -> list:
        """Pixels, label, size and name of each record."""
        reader = BetonReader(self.path)
        decoder, indices = RecordDecoder(reader), range(len(reader))
        return [
            (decoder.decode(i).tobytes(), reader.label(i), reader.size(i), reader.name(i))
            for i in indices
        ]

    def read(self, original: int, data: bytes) -> str:
        self.path.write_bytes(data)
        return "other contents" if self.records() != self.expected else ""


class StockBeton(Beton):
    """A .beton without checksums, as FFCV writes it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        data, arguments = bytearray(self.originals[0]), HEADER.itemsize + 17
        data[arguments : arguments + 1024] = bytes(1024)
        self.originals = [bytes(data)]

    def read(self, original: int, data: bytes) -> str:
        super().read(original, data)
        return ""


class Weights:
    """Files of weights in the three supported formats, too small for a ResNet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tensors = {"layer.weight": torch.randn(4, 3, 3, 3), "fc.bias": torch.arange(3)}
        zipped, legacy = io.BytesIO(), io.BytesIO()
        torch.save({"model": tensors, "epoch": 3}, zipped)
        torch.save({"model": tensors}, legacy, _use_new_zipfile_serialization=False)
        self.originals = [zipped.getvalue(), legacy.getvalue(), safetensors_bytes(tensors)]

    def read(self, original: int, data: bytes) -> str:
        file = self.folder / ("weights.safetensors" if original == 2 else "weights.pth")
        file.write_bytes(data)
        load_encoder(file)
        return "one layer was read as a ResNet"


class Images:
    """Image files, converted with the full check."""

    def __init__(self, folder: Path) -> None:
        large, small = image(0, 96, 70), image(1, 60, 48)
        sixteen = np.linspace(0, 65535, 40 * 40).reshape(40, 40).astype(np.uint16)
        self.originals = [saved(large, "JPEG"), saved(small.convert("CMYK"), "JPEG")]
        for options in ({"progressive": True}, {"subsampling": 0, "restart_marker_blocks": 3}):
            self.originals.append(saved(small, "JPEG", **options))
        for changed in small, small.convert("P"), Image.fromarray(sixteen):
            self.originals.append(saved(changed, "PNG"))
        for other in "GIF", "BMP", "TIFF", "WEBP", "PPM", "AVIF", "JPEG2000":
            self.originals.append(saved(small, other))
        for deep in small.convert("RGBA"), Image.fromarray(sixteen):
            self.originals.append(saved(deep, "TIFF", compression="tiff_lzw"))
        self.expected = [self.prepared(data).jpeg for data in self.originals]

    def prepared(self, data: bytes) -> Prepared:
        return prepare(data, MAX_SIDE, flags=PixelFlags(bits=16, bands=(1, 2, 3)))

    def read(self, original: int, data: bytes) -> str:
        result = self.prepared(data)
        pixels = simplejpeg.decode_jpeg(result.jpeg, "RGB", strict=False)
        if pixels.shape != (result.height, result.width, 3):
            return f"{pixels.shape} is stated as {result.height} x {result.width}"
        try:
            simplejpeg.decode_jpeg(result.jpeg, "RGB", strict=True)
        except ValueError as error:
            return f"the result is damaged: {error}"
        expected = simplejpeg.decode_jpeg(self.expected[original], "RGB")
        is_cut = self.originals[original].startswith(data)
        detectable = is_cut or data.startswith(b"\x89PNG")
        return "other pixels" if detectable and not np.array_equal(pixels, expected) else ""


KINDS = {
    "beton": Beton,
    "stock beton": StockBeton,
    "weights": Weights,
    "image": Images,
}


def mutate(data: bytes, generator: np.random.Generator) -> bytes:
    """The bytes after one to three mutations; a truncation is the last one."""
    changed = bytearray(data)
    used = np.flatnonzero(np.frombuffer(data, np.uint8))  # most of a page is padding
    for _ in range(generator.integers(1, 4)):
        anywhere = generator.integers(len(data)) if generator.random() < 0.2 else None
        at = min(int(generator.choice(used) if anywhere is None else anywhere), len(changed) - 1)
        match generator.integers(8):
            case 0 | 1:
                changed[at] ^= 1 << int(generator.integers(8))
            case 2:
                changed[at] = int(generator.integers(256))
            case 3 | 4:  # a length, an offset, a count
                width = int(generator.choice([2, 4, 8]))
                order = "little" if generator.random() < 0.5 else "big"
                value = int(generator.choice(np.array([*BOUNDARIES, len(data)], np.uint64)))
                field = (value % 2 ** (8 * width)).to_bytes(width, order)
                changed[at : at + width] = field[: len(changed) - at]
            case 5:  # a copied range, or zeros
                length = min(int(2 ** (generator.random() * 12)), len(changed) - at)
                source = int(len(changed) * generator.random())
                copied = changed[source : source + length]
                piece = copied if generator.random() < 0.5 else bytes(length)
                changed[at : at + len(piece)] = piece
            case 6:
                return bytes(changed[: max(at, 1)])
            case 7:
                length = 1 + int(generator.integers(16))
                if generator.random() < 0.5:
                    changed[at:at] = generator.bytes(length)
                else:
                    del changed[at : at + min(length, len(changed) - 1)]
    return bytes(changed)


def judge(kind, original: int, data: bytes) -> tuple[str, str]:
    """The verdict on an input and its message."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            damage = kind.read(original, data)
        except ValueError as error:
            return ("refused" if len(str(error).splitlines()) == 1 else "CRASH"), str(error)
        except Exception as error:
            return "CRASH", f"{type(error).__name__}: {error}"
    return ("SILENT" if damage and data != kind.originals[original] else "read"), damage


def fuzz(name: str, count: int, seed: int) -> Counter[str]:
    """Verdicts on the inputs of a kind."""
    torch.set_num_threads(1)
    verdicts: Counter[str] = Counter()
    FINDINGS.mkdir(exist_ok=True)
    current = FINDINGS / name.replace(" ", "-")
    with tempfile.TemporaryDirectory() as folder:
        kind = KINDS[name](Path(folder))
        for number in range(count):
            original = number % len(kind.originals)
            generator = np.random.default_rng([seed, list(KINDS).index(name), number])
            data = mutate(kind.originals[original], generator)
            current.write_bytes(data)
            signal.alarm(60)  # ends the process
            verdict, message = judge(kind, original, data)
            signal.alarm(0)
            verdicts[verdict] += 1
            if verdict in ("SILENT", "CRASH"):
                print(f"{verdict}: {name}, number {number}: {message[:300]}", flush=True)
                current.rename(f"{current}-{seed}-{number}")
    current.unlink(missing_ok=True)
    if not any(FINDINGS.iterdir()):
        FINDINGS.rmdir()
    shown = ", ".join(f"{verdicts[v]:,} {v}" for v in ("refused", "read", "SILENT", "CRASH"))
    print(f"{name}: {shown}", flush=True)
    return verdicts


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Feed mutated files to every reader; count refusals, undetected damage and crashes."""

    count: int = 10_000
    """Number of inputs of each kind."""
    seed: int = 0
    """Seed of all mutations."""


def main() -> int:
    options = parse_flags(Options, "fuzz.py", None)
    verdicts = sum((fuzz(name, options.count, options.seed) for name in KINDS), Counter())
    return int(verdicts["SILENT"] + verdicts["CRASH"] > 0)


if __name__ == "__main__":
    sys.exit(run_command("fuzz.py", main))
