"""Targets of `fuzz.py`: valid inputs of each file type and the verdict on a mutated one."""

import hashlib
import io
import json
import struct
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import simplejpeg
import torch
from PIL import Image
from safetensors.torch import save as safetensors_bytes

from bt_fast.export.encoder_files import load_encoder
from bt_fast.lars import LARS
from bt_fast.run import checkpoint
from pipelines.beton import BetonReader
from pipelines.beton.layout import EXTRAS, FIELD, HEADER, metadata_dtype, tables_crc
from pipelines.beton.writer import TYPE_IDS, BetonWriter
from pipelines.convert.jpeg import prepare
from pipelines.loading.native import RecordDecoder

Verdict = Literal["refused", "unharmed", "other", "SILENT", "CRASH"]
Judged = tuple[Verdict, str]

NUM_IMAGES = 9
MAX_SIDE = 64  # smaller than some of the images, so that they are resized


def random_image(seed: int, width: int, height: int) -> Image.Image:
    """An image of smooth colours with noise."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    pixels = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float64)
    return Image.fromarray(
        np.clip(pixels + generator.normal(0, 5, pixels.shape), 0, 255).astype(np.uint8)
    )


def saved(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


class Beton:
    """A .beton, read as in training: every record is checked and decoded."""

    name = "beton"

    def __init__(self, folder: Path) -> None:
        self.path = folder / "data.beton"
        with BetonWriter(
            self.path, num_samples=NUM_IMAGES, class_names=["a", "b", "ü"], page_size=2 << 20
        ) as writer:
            for index in range(NUM_IMAGES):
                width, height = 40 + 3 * index, 60 - 2 * index
                jpeg = saved(random_image(index, width, height), "JPEG")
                writer.add(jpeg, height, width, index % 3, f"{index % 3}/{index}.jpg")
        self.originals = [self.path.read_bytes()]
        self.expected = list(self.records())

    def records(self):
        """Pixels, label, size and name of each record. Raises ValueError."""
        reader = BetonReader(self.path)
        decoder = RecordDecoder(reader)
        for index in range(len(reader)):
            pixels = decoder.decode(index).tobytes()
            yield pixels, reader.label(index), reader.size(index), reader.name(index)

    def judge(self, original: int, data: bytes, is_cut: bool) -> Judged:
        self.path.write_bytes(data)
        return ("unharmed" if list(self.records()) == self.expected else "SILENT"), ""


class ForgedBeton(Beton):
    """A .beton with recomputed checksums, as an attacker would write it."""

    name = "forged beton"

    def judge(self, original: int, data: bytes, is_cut: bool) -> Judged:
        self.path.write_bytes(forged(data))
        return ("unharmed" if list(self.records()) == self.expected else "other"), ""


def forged(data: bytes) -> bytes:
    """The file with recomputed checksums, as far as its structure can be read."""
    changed = bytearray(data)
    arguments = HEADER.itemsize + 17
    try:
        header = np.frombuffer(changed, HEADER, 1)
        extras = np.frombuffer(changed, EXTRAS, 1, arguments)
        _, _, _, count, tables = header.item()
        start, metadata = int(extras["ptr"][0]), HEADER.itemsize + 2 * FIELD.itemsize
        size = metadata_dtype(TYPE_IDS).itemsize
        places = np.frombuffer(changed, "<u8", (len(changed) - tables) // 8, tables).reshape(-1, 3)
        for index, (_, ptr, length) in enumerate(places[:count].tolist()):
            crc = zlib.crc32(changed[ptr : ptr + length])
            struct.pack_into("<I", changed, start + 4 * index, crc)
        length = 4 * count + int(extras["names_size"][0]) + int(extras["class_names_size"][0])
        parts = (metadata, size * count), (start, length), (tables, len(changed) - tables)
        views = [np.frombuffer(changed, np.uint8, n, begin) for begin, n in parts]
        fields = np.frombuffer(changed, FIELD, 2, HEADER.itemsize)
        struct.pack_into("<I", changed, arguments + 8, tables_crc(header, fields, 0, views))
    except (ValueError, OverflowError, struct.error, TypeError, MemoryError):
        return bytes(data)
    return bytes(changed)


class Checkpoints:
    """Two checkpoints of a small model; one file of the newer is damaged."""

    name = "checkpoint"
    files = ("model.safetensors", "optimizer.safetensors", "state.json")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for step in (1, 2):
            tensors = checkpoint.Snapshot().take(*trained(step))
            checkpoint.write(folder, step, tensors, {"data": {"images": 9}}, keep=2)
        self.newest = folder / "checkpoints" / "step-00000002"
        self.originals = [(self.newest / name).read_bytes() for name in self.files]
        self.expected = {step: state(*trained(step)) for step in (1, 2)}

    def write(self, original: int, data: bytes) -> None:
        for name, content in zip(self.files, self.originals, strict=True):
            (self.newest / name).write_bytes(content)
        (self.newest / self.files[original]).write_bytes(data)

    def read(self) -> tuple[int, list, dict]:
        found, _ = checkpoint.newest(self.folder)
        assert found is not None
        model, optimizer = trained(3)
        found.restore(model, optimizer)
        return found.step, state(model, optimizer), found.facts

    def judge(self, original: int, data: bytes, is_cut: bool) -> Judged:
        self.write(original, data)
        step, tensors, facts = self.read()
        if facts != {"data": {"images": 9}} or tensors != self.expected.get(step):
            return "SILENT", f"step {step}, {facts}"
        return ("refused" if step == 1 else "unharmed"), ""


class ForgedCheckpoints(Checkpoints):
    """A checkpoint whose state.json matches a damaged file: reading it may only fail."""

    name = "forged checkpoint"
    files = ("model.safetensors", "optimizer.safetensors")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.state = (self.newest / "state.json").read_text()

    def judge(self, original: int, data: bytes, is_cut: bool) -> Judged:
        self.write(original, data)
        content = json.loads(self.state)
        content.pop("sha256")
        digest = hashlib.sha256(data).hexdigest()
        content["files"][self.files[original]] = {"size": len(data), "sha256": digest}
        text = json.dumps(content, sort_keys=True)
        content["sha256"] = hashlib.sha256(text.encode()).hexdigest()
        (self.newest / "state.json").write_text(json.dumps(content))
        step, tensors, _ = self.read()
        assert step == 2, "the forged checkpoint was not read"
        return ("unharmed" if tensors == self.expected[2] else "other"), ""


def trained(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model and an optimizer after a step."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4))
    optimizer = LARS(model.parameters(), 0.1)
    model(torch.randn(6, 5)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list:
    momenta = [optimizer.state[p]["momentum"] for p in model.parameters()]
    return [tensor.tolist() for tensor in (*model.state_dict().values(), *momenta)]


class Weights:
    """Files of weights in the three supported formats, too small for a ResNet."""

    name = "weights"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tensors = {"layer.weight": torch.randn(4, 3, 3, 3), "fc.bias": torch.arange(3)}
        zipped, legacy = io.BytesIO(), io.BytesIO()
        torch.save({"model": tensors, "epoch": 3}, zipped)
        torch.save({"model": tensors}, legacy, _use_new_zipfile_serialization=False)
        self.originals = [zipped.getvalue(), legacy.getvalue(), safetensors_bytes(tensors)]
        self.suffixes = ("pth", "pth", "safetensors")

    def judge(self, original: int, data: bytes, is_cut: bool) -> Judged:
        file = self.folder / f"weights.{self.suffixes[original]}"
        file.write_bytes(data)
        load_encoder(file)
        return "CRASH", "one layer was read as a ResNet"


class Images:
    """Image files, converted with the full check."""

    name = "image"

    def __init__(self, folder: Path) -> None:
        large, small = random_image(0, 96, 70), random_image(1, 60, 48)
        sixteen = np.linspace(0, 65535, 40 * 40).reshape(40, 40).astype(np.uint16)
        self.originals = [
            saved(large, "JPEG"),
            saved(small, "JPEG"),
            saved(small, "JPEG", progressive=True),
            saved(small.convert("L"), "JPEG", quality=60),
            saved(small, "JPEG", subsampling=0, restart_marker_blocks=3),
            saved(small.convert("CMYK"), "JPEG"),
            saved(small, "PNG"),
            saved(small.convert("P"), "PNG", transparency=bytes(range(256))),
            saved(Image.fromarray(sixteen), "PNG"),
            saved(small, "GIF"),
            saved(small, "BMP"),
            saved(small, "TIFF", compression="tiff_lzw"),
            saved(small, "WEBP"),
            saved(small, "PPM"),
        ]
        self.expected = [prepare(data, MAX_SIDE).jpeg for data in self.originals]

    def judge(self, original: int, data: bytes, is_cut: bool) -> Judged:
        result = prepare(data, MAX_SIDE)
        pixels = simplejpeg.decode_jpeg(result.jpeg, "RGB", strict=False)
        if pixels.shape != (result.height, result.width, 3):
            return "SILENT", f"{pixels.shape} is stated as {result.height} x {result.width}"
        try:
            simplejpeg.decode_jpeg(result.jpeg, "RGB", strict=True)
        except ValueError as error:
            return "SILENT", f"the result is damaged: {error}"
        expected = simplejpeg.decode_jpeg(self.expected[original], "RGB")
        if pixels.shape == expected.shape and (pixels == expected).all():
            return "unharmed", ""
        is_png = data.startswith(b"\x89PNG")
        return ("SILENT" if is_cut or is_png else "other"), result.action


TARGETS = {t.name: t for t in (Beton, ForgedBeton, Checkpoints, ForgedCheckpoints, Weights, Images)}
