"""Command lines of `bt-fast pretrain` that end in each message of docs/errors.md."""

import fcntl
import hashlib
import importlib.util
import json

import torch
from error_list import Case, Place
from safetensors.torch import save

from pipelines.beton.writer import BetonWriter

PRETRAIN = (
    "pretrain --recipe demo --device cpu --size 32 --batch-size 16 --workers 1 --projector 32 16"
    " --data {data} --run-dir new"
)
RESUME = "pretrain --resume run --device cpu"


def no_triton(place):
    place.monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def no_gpu(place: Place) -> None:
    place.patch("torch.cuda.is_available", lambda: False)
    place.patch("torch.cuda.device_count", lambda: 0)


def quick_doctor(place: Place) -> None:
    place.patch("bt_fast.doctor.hardware.SECONDS", 0.01)


def raises(error: BaseException):
    def fail(*_, **__):
        raise error

    return fail


def not_finite(place: Place) -> None:
    place.patch("bt_fast.train.MAX_SKIPPED", 1)
    inject = "bt_fast.distributed.fault_injection.inject"
    place.patch(inject, lambda views, step, world: (view * torch.nan for view in views))


def forged_checkpoint(place: Place, content: bytes) -> None:
    """Another optimizer.safetensors, with hashes that fit."""
    newest = max((place.copy_run() / "checkpoints").iterdir())
    place.write(str(newest / "optimizer.safetensors"), content)
    state = json.loads((newest / "state.json").read_text())
    digest = hashlib.sha256(content).hexdigest()
    state["files"]["optimizer.safetensors"] = {"size": len(content), "sha256": digest}
    del state["sha256"]
    text = json.dumps(state, sort_keys=True).encode()
    state["sha256"] = hashlib.sha256(text).hexdigest()
    place.write(str(newest / "state.json"), json.dumps(state))


def locked_run(place: Place):
    file = open(place.copy_run() / ".lock", "w")  # noqa: SIM115  held until the case is done
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def data_with(place: Place, jpeg: bytes) -> None:
    with BetonWriter(place.path / "x.beton", num_samples=16) as writer:
        for index in range(16):
            writer.add(jpeg, 8, 8, -1, str(index))


def damaged_data(place: Place) -> None:
    from pipelines.beton import BetonReader

    content = bytearray(place.data.read_bytes())
    start, size, _ = BetonReader(place.data).location(0)
    content[start + size // 2] ^= 1
    place.write("x.beton", bytes(content))


def jpeg_of(width: int, height: int) -> bytes:
    from conftest import drawn_picture, jpeg_bytes

    return jpeg_bytes(drawn_picture(0, width, height))


def writes(name: str, content: bytes | str = b""):
    return lambda place: place.write(name, content)


ANY = [
    Case("there is no command", "train"),
    Case("…; see … --help", "pretrain --epoch 3"),
    Case("…; see … --help", "eval knn"),
    Case("…; see … --help", "export {run} --to pdf --out x"),
    Case("…; see … --help", "doctor --recipe"),
    Case("not enough memory", PRETRAIN + " --size 200000"),
    Case("[Errno …] …", "doctor --json nowhere/x.json", quick_doctor),
    Case(
        "interrupted",
        PRETRAIN,
        lambda place: place.patch(
            "bt_fast.pretrain_command.run_pretrain", raises(KeyboardInterrupt())
        ),
        status=130,
    ),
]
SETTINGS = [
    Case(entry, f"{PRETRAIN} {flags}")
    for entry, flags in (
        ("--… must be at least …, got …", "--epochs 0"),
        ("--… must be at least …, got …", "--batch-size 1"),
        ("--… must be at most 1000000", "--epochs 99999999999999"),
        ("--… must not be negative, got …", "--probe-every=-1"),
        ("--… must be positive, got …", "--lr-weights 0"),
        ("--… must be in (0, 1], got …", "--min-scale 1.5"),
        ("--… must be finite, below", "--cache-gb inf"),
        ("--… must be finite, below", "--lr-weights 1e300"),
        ("--seed must fit", "--seed 99999999999999999999"),
        ("--projector needs", "--projector 64 0"),
        ("--resolution is LOW:HIGH", "--resolution 160"),
        ("--resolution has more", "--resolution 32:320"),
        ("--accumulate must be 1", "--accumulate 4"),
        ("--deterministic excludes", "--deterministic --compile max-autotune"),
        ("view-…: … must be a probability", "--view-a.blur 7"),
        ("view-…: … must not be negative", "--view-a.brightness=-1"),
        ("view-…: hue must lie", "--view-b.hue 0.7"),
        ("view-…: sigma must lie", "--view-a.sigma 0.1 5"),
        ("--data … does not exist; pass its path", "--data nowhere.beton"),
        ("--val-data … does not exist; pass its path", "--val-data nowhere.beton"),
        ("--batch-size … is more than", "--batch-size 65"),
        ("--batch-size … does not divide", "--gpus 3"),
        ("--batch-size … is less than 2", "--gpus 16"),
        ("--bn-group … does not divide", "--gpus 4 --bn-group 3"),
        ("--ablation … is not one of", "--ablation none"),
        ("--resume … is not the folder of a run", "--resume nowhere"),
    )
]
PRETRAINING = [
    Case("--device cuda: no usable GPU", PRETRAIN + " --device cuda", no_gpu),
    Case(
        "--norm fused needs a GPU",
        PRETRAIN + " --norm fused",
        lambda place: place.monkeypatch.delenv("TRITON_INTERPRET"),
    ),
    Case("--norm fused needs triton", PRETRAIN + " --norm fused --dry-run --gpus 2", no_triton),
    Case(
        "… is not a configuration of this version",
        RESUME,
        lambda place: (place.copy_run(), place.write("run/config.json", "{")),
    ),
    Case("… cannot change when a run is resumed", "pretrain --resume {run} --epochs 9"),
    Case(
        "--data … is not what this run was trained on",
        RESUME + " --data x.beton",
        lambda place: (place.beton("x.beton", 64), place.copy_run()),
    ),
    Case(
        "--max-steps …: … is at step",
        RESUME + " --max-steps 1",
        lambda place: place.copy_run(),
    ),
    Case("--run-dir …: a resumed run", "pretrain --resume {run} --run-dir other"),
    *(
        Case(
            "… is damaged: it is not a list",
            RESUME,
            lambda place, text=text: (place.copy_run(), place.write("run/environment.json", text)),
        )
        for text in ("[", "{}", b"\xff")
    ),
    Case(
        "… belongs to another model",
        RESUME,
        lambda place: forged_checkpoint(place, save({"x": torch.zeros(1)})),
    ),
    Case("… cannot be read: …", RESUME, lambda place: forged_checkpoint(place, b"garbage" * 9)),
    Case("--run-dir … is in use", PRETRAIN, writes("new/mine.txt")),
    Case("--run-dir …: … is not", PRETRAIN + "/mine.txt", writes("new")),
    Case(
        "--run-dir …: … is not",
        PRETRAIN,
        lambda place: (place.path / "new").symlink_to("nowhere"),
    ),
    Case(
        "--run-dir …: no permission",
        PRETRAIN,
        lambda place: place.patch("os.access", lambda path, mode: False),
    ),
    Case("… is in use by …", RESUME, locked_run),
    Case("the loss was not finite for", PRETRAIN, not_finite),
    Case("image … is not what was converted", PRETRAIN + " --data x.beton", damaged_data),
    Case(
        "image … does not decode (",
        PRETRAIN + " --data x.beton",
        lambda place: data_with(place, b"no JPEG"),
    ),
    Case(
        "image … is …x… but",
        PRETRAIN + " --data x.beton",
        lambda place: data_with(place, jpeg_of(40, 30)),
    ),
]
CASES = [*ANY, *SETTINGS, *PRETRAINING]
