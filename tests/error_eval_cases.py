"""Command lines of `bt-fast eval`, `export` and `doctor`, for each message of docs/errors.md."""

import os

import torch
from error_cluster_cases import one_of_two_ranks
from error_list import Case, Place
from error_pretrain_cases import data_with, jpeg_of, no_gpu, quick_doctor, writes
from error_source_cases import shards

from bt_fast.export.encoder_files import Pretrained
from bt_fast.models.networks import build_encoder

KNN, LINEAR = (f"eval {name} {{run}} --device cpu --workers 1" for name in ("knn", "linear"))
TRANSFER, SEMI = (f"eval {name} {{run}} --device cpu --workers 1" for name in ("transfer", "semi"))


def weights(place: Place, content: object) -> None:
    torch.save(content, place.path / "w.pth")


def odd_projector(place: Place) -> None:
    encoder = build_encoder("resnet18").state_dict()
    names = {f"module.backbone.{name}": value for name, value in encoder.items()}
    weights(place, {"model": names | {"module.projector.0.weight": torch.zeros(3)}})


def one_class(place: Place) -> None:
    place.beton("one.beton", num_classes=1)


def unlabelled(place: Place) -> None:
    """A file as FFCV writes it: no extras, and the first image's label is negative."""
    from test_beton_damage import METADATA

    from pipelines.beton.layout import HEADER

    content = bytearray(place.beton("x.beton").read_bytes())
    start = HEADER.itemsize + 17
    content[start : start + 1024] = bytes(1024)
    content[METADATA + 16 : METADATA + 24] = b"\xff" * 8
    place.write("x.beton", bytes(content))
    place.write("list.txt", "record 0\n")


def voc(place: Place, count: int = 2, **lists: str) -> None:
    """VOC07 of one class and `count` images; `lists` replaces its files."""
    lines = "".join(f"{i} {1 if i % 2 else -1}\n" for i in range(count))
    for name, text in ({"a_trainval": lines, "a_test": lines} | lists).items():
        place.write(f"ImageSets/Main/{name}.txt", text)
    for index in range(count):
        place.write(f"JPEGImages/{index}.jpg", jpeg_of(40 + index, 40))


def damaged_state(place: Place) -> None:
    from bt_fast.cli import main

    run = place.copy_run()
    assert main([*LINEAR.replace("{run}", "run").split(), "--epochs", "1"]) == 0
    (folder,) = (run / "eval").glob("linear-*")
    (folder / "result.json").unlink()
    place.write(str(folder / "state.safetensors"), b"garbage")


def patch_source(place: Place, architecture: str, small_images: bool) -> None:
    pretrained = Pretrained(
        encoder=torch.nn.Identity(),
        architecture=architecture,
        small_images=small_images,
        projector=None,
        source=place.path,
    )
    place.patch("bt_fast.export.export.read_pretrained", lambda path: pretrained)


EVALUATING = [
    Case("… does not exist; give a run's folder", "eval knn nowhere"),
    Case("… is not the folder of a run", "eval knn ."),
    Case(
        "… has neither encoder.safetensors",
        "eval knn new",
        lambda place: place.write("new/config.json", (place.run / "config.json").read_bytes()),
    ),
    Case("… cannot be read as weights", "eval knn w.pth", writes("w.pth", b"garbage" * 99)),
    Case("… holds a …, not a dictionary", "eval knn w.pth", lambda place: weights(place, [1])),
    Case(
        "… holds no ResNet",
        "eval knn w.pth",
        lambda place: weights(place, {"a": torch.zeros(3)}),
    ),
    Case(
        "… holds none of",
        "eval knn w.pth",
        lambda place: weights(place, {"conv1.weight": torch.zeros(3)}),
    ),
    Case("… holds a projector of another", "eval knn w.pth", odd_projector),
    Case("--crop must be in (0, 1]", KNN + " --crop 2"),
    Case("--cache-gb must not be negative", KNN + " --cache-gb=-1"),
    Case("--views must be at least 1", LINEAR + " --cached --views 0"),
    Case("--min-scale must be in (0, 1]", LINEAR + " --min-scale 2"),
    Case("learning rates and weight decay must lie", LINEAR + " --lr=-1"),
    Case("learning rates and weight decay must lie", LINEAR + " --lr=1e300"),
    Case("--percent must be in", SEMI + " --percent 0"),
    Case("--data is required: a file of weights", "eval knn {run}/encoder.safetensors"),
    Case("--data is required: the folder", TRANSFER),
    Case("--data … does not exist", TRANSFER + " --data nowhere"),
    Case("--data … has fewer than", KNN + " --data one.beton", one_class),
    Case(
        "… has fewer than two classes",
        LINEAR + " --data one.beton --val-data one.beton",
        one_class,
    ),
    Case(
        "… has no classes",
        LINEAR + " --data x.beton --val-data x.beton",
        lambda place: data_with(place, jpeg_of(40, 30)),
    ),
    Case("… has other classes than …", LINEAR + " --data {data} --val-data one.beton", one_class),
    Case("… has other classes than …", KNN + " --data {data} --val-data one.beton", one_class),
    Case("… …: evaluations do not read web shards", KNN + " --data shards", shards),
    Case("--batch-size … is less than the number", LINEAR + " --batch-size 1", one_of_two_ranks),
    Case("--gpus …, but this machine has …; choose", "eval linear {run} --gpus 32", no_gpu),
    Case("--val-data is required", LINEAR + " --data {data}"),
    Case("--val-data: … has its own", TRANSFER + " --dataset voc07 --data . --val-data x"),
    Case(
        "--collapse needs the projector",
        KNN.replace("{run}", "{run}/encoder.safetensors") + " --data {data} --collapse",
    ),
    Case("--train-list … cannot be read", SEMI + " --train-list nowhere"),
    Case("--train-list …: … of its names", SEMI + " --train-list x", writes("x", "unknown.jpg")),
    Case(
        "--train-list …: some of its images",
        SEMI + " --data x.beton --val-data x.beton --train-list list.txt",
        unlabelled,
    ),
    Case("--data … does not hold …", TRANSFER + " --dataset places205 --data ."),
    Case(
        "… is not in iNaturalist's format",
        TRANSFER + " --dataset inat18 --data .",
        writes("train2018.json", "{}"),
    ),
    Case(
        "… has no class lists",
        TRANSFER + " --dataset voc07 --data .",
        lambda place: os.makedirs("ImageSets/Main"),
    ),
    Case(
        "…: …_….txt lists other images",
        TRANSFER + " --dataset voc07 --data .",
        lambda place: voc(place, b_trainval="9 1\n", b_test="9 1\n"),
    ),
    Case(
        "…, line …: not a name and a number",
        TRANSFER + " --dataset voc07 --data .",
        lambda place: voc(place, a_trainval="x y\n"),
    ),
    Case(
        "… is empty",
        TRANSFER + " --dataset voc07 --data .",
        lambda place: voc(place, a_trainval=""),
    ),
    Case(
        "cross-validation needs",
        TRANSFER + " --dataset voc07 --data . --out eval",
        voc,
    ),
    Case(
        "VOC07 needs scikit-learn",
        TRANSFER + " --dataset voc07 --data . --out eval",
        lambda place: (voc(place, 6), place.without("sklearn", "sklearn.svm")),
    ),
    Case(
        "the loss of epoch … was not finite",
        LINEAR + " --epochs 1 --batch-size 16 --lr 1e29 --out eval",
    ),
    Case(
        "… is damaged (…); delete it", LINEAR.replace("{run}", "run") + " --epochs 1", damaged_state
    ),
]
EXPORTING = [
    Case("--out … must end in", "export {run} --to torchvision --out x.txt"),
    Case("--out … exists; add --overwrite", "export {run} --to timm --out x.pth", writes("x.pth")),
    Case("--out …: the folder", "export {run} --to timm --out nowhere/x.pth"),
    Case(
        "--to detectron2: its ResNet",
        "export {run} --to detectron2 --out x.pth",
        lambda place: patch_source(place, "resnet18", True),
    ),
    Case(
        "--to detectron2: the paper's",
        "export {run} --to detectron2 --out x.pth",
        lambda place: patch_source(place, "wide_resnet50_2", False),
    ),
    Case(
        "--to onnx needs more packages",
        "export {run} --to onnx --out x.onnx",
        lambda place: place.without("onnxscript", "onnx"),
    ),
    Case("--recipe … is not one of", "doctor --recipe resnet", quick_doctor),
    Case("--json … exists", "doctor --json x.json", writes("x.json")),
]
CASES = [*EVALUATING, *EXPORTING]
