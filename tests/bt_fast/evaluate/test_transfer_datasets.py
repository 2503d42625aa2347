"""Data sets read without conversion: image files against a .beton, and published layouts."""

import json

import numpy as np
import pytest
import torch
from conftest import drawn_picture
from tiny_runs import evaluate, result

from bt_fast.evaluate.transfer_datasets import inat18, places205
from bt_fast.evaluate.views import Views
from bt_fast.runtime import choose_runtime
from pipelines.beton import BetonReader
from pipelines.convert.command import main as convert
from pipelines.loading.image_files import open_folder

RUNTIME = choose_runtime("cpu", "fp32", compile="off")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """train/ and val/ of two classes: JPEGs, a PNG and a grey picture."""
    root = tmp_path_factory.mktemp("folder")
    for part, count in (("train", 12), ("val", 6)):
        for index in range(count):
            place = root / part / f"class-{index % 2}"
            place.mkdir(parents=True, exist_ok=True)
            picture = drawn_picture(index + 50 * (part == "val"), 50 + index, 40)
            picture.paste((220, 20, 20) if index % 2 else (20, 20, 220), (0, 0, 30, 40))
            if index == 4:
                picture.save(place / f"{index:03d}.png")
            else:
                (picture.convert("L") if index == 5 else picture).save(place / f"{index:03d}.jpg")
    return root


def views_of(source) -> Views:
    return Views(source, RUNTIME, size=24, num_threads=2)


def test_image_files_have_the_views_of_their_beton(folder, tmp_path):
    assert convert([str(folder), str(tmp_path / "x.beton")]) == 0
    reader, files = BetonReader(tmp_path / "x.beton"), open_folder(folder)["train"]
    assert len(files) == len(reader) == 12 and files.class_names == reader.class_names
    assert np.array_equal(files.labels, reader.labels)
    samples = np.array([3, 0, 11, 2, 7])
    assert np.array_equal(files.sizes[samples], reader.sizes[samples])
    random = {"min_scale": 0.2, "seed": 1, "epoch": 2, "batch_size": 2}
    for name, arguments in (("central", {"crop": 0.8}), ("random", random)):
        sources = views_of(files), views_of(reader)
        ours, theirs = (torch.cat(list(getattr(s, name)(samples, **arguments))) for s in sources)
        assert ours.shape == (5, 3, 24, 24) and ours.std() > 0.1
        assert torch.equal(ours, theirs)


def test_random_views_depend_on_the_epoch_and_not_on_the_batch(folder):
    views, samples = views_of(open_folder(folder)["train"]), np.arange(12)

    def random(**options: int) -> torch.Tensor:
        return torch.cat(list(views.random(samples, min_scale=0.2, seed=0, **options)))

    first, again = random(epoch=0, batch_size=12), random(epoch=0, batch_size=5)
    later = random(epoch=1, batch_size=12)
    assert torch.equal(first, again) and not torch.equal(first, later)


def test_a_broken_file_is_named(folder, tmp_path):
    place = tmp_path / "train" / "a"
    place.mkdir(parents=True)
    (place / "x.jpg").write_bytes(b"nothing")
    files = open_folder(tmp_path)["train"]
    with pytest.raises(ValueError, match=r"a/x\.jpg cannot be read"):
        list(views_of(files).central(np.arange(1), 1.0))


def test_transfer_to_a_folder(folder, labelled_run, tmp_path, capsys):
    flags = ["--epochs=3", "--lr=0.3"]
    assert evaluate(labelled_run, tmp_path, "transfer", "--data", folder, *flags) == 0
    found = result(tmp_path)
    assert len(found["history"]) == 3 and 0 <= found["top1"] <= found["top5"] == 1
    assert "12, 2 classes" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["", "data/vision/torralba/deeplearning/images256"])
def test_places_205(place, tmp_path):
    lists = tmp_path / "trainvalsplit_places205"
    lists.mkdir()
    for part, names in (("train", "abc"), ("val", "de")):
        lines = [f"{name}/x y/{name}.jpg {label}" for label, name in enumerate(names)]
        (lists / f"{part}_places205.csv").write_text("\n".join(lines) + "\n")
        for name in names:
            file = tmp_path / place / name / "x y" / f"{name}.jpg"
            file.parent.mkdir(parents=True)
            drawn_picture(ord(name), 40, 30).save(file)
    train, val = places205(tmp_path)
    assert train.labels.tolist() == [0, 1, 2] and val.labels.tolist() == [0, 1]
    assert train.num_classes == val.num_classes == 3
    assert train.size(0) == val.size(1) == (30, 40) and val.name(1) == "e/x y/e.jpg"


def test_inat_18_end_to_end(labelled_run, tmp_path):
    for part, count in (("train", 8), ("val", 4)):
        images, annotations = [], []
        for index in range(count):
            name = f"train_val2018/Aves/{index % 2}/{part}{index}.jpg"
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            drawn_picture(index, 44, 36).save(tmp_path / name)
            images.append({"id": 100 + index, "file_name": name})
            annotations.append({"image_id": 100 + index, "category_id": index % 2 * 3})
        content = {"images": images, "annotations": annotations[::-1]}
        (tmp_path / f"{part}2018.json").write_text(json.dumps(content))
    train, val = inat18(tmp_path)
    assert train.labels.tolist() == [0, 3] * 4 and val.num_classes == 4
    flags = ["--dataset=inat18", "--data", tmp_path, "--epochs=2"]
    assert evaluate(labelled_run, tmp_path / "out", "transfer", *flags) == 0
    assert result(tmp_path / "out")["history"][-1]["epoch"] == 2
