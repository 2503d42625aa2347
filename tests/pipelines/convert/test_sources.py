"""The images of a folder and their order, and the conversion of an image file."""

import io

import numpy as np
import pytest
from conftest import drawn_picture, jpeg_bytes
from hostile import STORED, make_hostile_folder, saved
from PIL import Image

from pipelines.convert.jpeg import UnreadableImage, prepare
from pipelines.convert.manifest import Manifest
from pipelines.convert.sources import find_splits


def test_order_in_nested_folders_is_torchvisions(tmp_path):
    from torchvision.datasets import ImageFolder

    for name in ("z/1.jpg", "z/a/2.jpg", "z/a-b/3.jpg", "z/a/b/0.PNG", "Y/é/1.jpg", "Y/0.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    images = list(Manifest(find_splits(tmp_path)["train"]))
    assert [(image.data.path, image.label) for image in images] == ImageFolder(tmp_path).samples
    assert [str(tmp_path / image.name) for image in images] == [i.data.path for i in images]


def test_larger_images_are_shrunk_with_antialiasing():
    picture = drawn_picture(3, 900, 600)
    prepared = prepare(jpeg_bytes(picture, quality=95), 300)
    assert (prepared.action, prepared.height, prepared.width) == ("resized", 200, 300)
    expected = np.asarray(picture.resize((300, 200), Image.Resampling.BICUBIC), np.int16)
    stored = np.asarray(Image.open(io.BytesIO(prepared.jpeg)), np.int16)
    assert np.abs(stored - expected).mean() < 3
    aliased = np.asarray(picture.resize((300, 200), Image.Resampling.NEAREST), np.int16)
    assert np.abs(aliased - expected).mean() > 4  # shows that the bound above can fail


@pytest.mark.parametrize("cut", [0.02, 0.3, 0.7, 0.95, 0.999])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}])
def test_a_truncated_jpeg_is_never_kept(cut, options):
    data = saved(drawn_picture(5, 600, 400), "JPEG", **options)
    for max_side in (0, 100):
        with pytest.raises(UnreadableImage):
            prepare(data[: int(len(data) * cut)], max_side)


def test_every_stored_image_is_read_by_torchvisions_decoder(tmp_path):
    torch, io_ = pytest.importorskip("torch"), pytest.importorskip("torchvision.io")
    make_hostile_folder(tmp_path / "images")
    for name in STORED:
        prepared = prepare((tmp_path / "images" / name).read_bytes(), 512)
        encoded = torch.frombuffer(bytearray(prepared.jpeg), dtype=torch.uint8)
        decoded = io_.decode_jpeg(encoded, mode=io_.ImageReadMode.RGB)
        assert decoded.shape == (3, prepared.height, prepared.width)
        pillow = np.asarray(Image.open(io.BytesIO(prepared.jpeg)).convert("RGB"), np.int16)
        assert np.abs(decoded.numpy().transpose(1, 2, 0) - pillow).mean() < 1


def test_the_quick_check_detects_damage_to_the_structure():
    whole = jpeg_bytes(drawn_picture(5, 400, 300))
    assert prepare(whole, 0, "quick").jpeg == prepare(whole, 0, "full").jpeg == whole
    start, end = whole[: len(whole) // 2], whole[len(whole) // 2 :]
    text = b"<html>\xff\xee</html>" * 200
    for damaged in (start, whole[:-2], start + bytes(4096) + end[4096:], start + text + end[-2:]):
        with pytest.raises(UnreadableImage):
            prepare(damaged, 0, "quick")
    with_end_marker = start + b"\xff\xd9"  # only decoding detects it
    assert prepare(with_end_marker, 0, "quick").action == "kept"
    with pytest.raises(UnreadableImage):
        prepare(with_end_marker, 0, "full")


def test_a_subset_is_spread_over_the_classes(tmp_path):
    for label, count in {"a": 5, "b": 2, "c": 9}.items():
        (tmp_path / label).mkdir()
        for index in range(count):
            (tmp_path / label / f"{index}.jpg").touch()

    def kept(count: int) -> list[tuple[str, int]]:
        manifest = Manifest(find_splits(tmp_path)["train"])
        manifest.select_subset(count)
        images = [(image.name, image.label) for image in manifest]
        assert len(manifest) == len(images)
        return images

    all_images = kept(100)
    assert len(all_images) == 16
    for count in range(1, 16):  # each further image is of the smallest class so far
        taken = [label for _, label in kept(count)]
        (added,) = set(kept(count)) - set(kept(count - 1) if count > 1 else [])
        growing = [label for label in range(3) if taken.count(label) < [5, 2, 9][label]]
        assert taken.count(added[1]) - 1 <= min(map(taken.count, growing))
        assert kept(count) == [image for image in all_images if image in kept(count)]


def test_other_folders_beside_train_and_val_are_reported_as_ignored(tmp_path):
    for name in ("train/a", "val/a", "train/.ipynb_checkpoints"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1.jpg").touch()
    (tmp_path / "devkit" / "data").mkdir(parents=True)
    (tmp_path / "devkit" / "data" / "meta.mat").touch()
    (tmp_path / "train" / "loose.jpg").touch()
    splits = find_splits(tmp_path)
    for split in splits.values():
        assert [image.name for image in Manifest(split)] == ["a/1.jpg"]
    assert splits["train"].ignored["beside train/"] == 1
    assert splits["train"].ignored["images beside the class folders"] == 1
    assert splits["train"].ignored["hidden"] == 1
