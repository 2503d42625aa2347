"""`tools/make_demo_images.py`: what is written, that it repeats, and what it refuses."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TOOL = Path(__file__).parents[2] / "tools" / "make_demo_images.py"


def make(out: Path, *flags: object) -> subprocess.CompletedProcess[str]:
    """Run the tool as a user does."""
    command = [sys.executable, TOOL, out, "--workers", 2, *flags]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True)


def contents(root: Path) -> dict[str, bytes]:
    """Every file under root: relative path -> bytes."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "pictures"
    result = make(out, "--train", 60, "--val", 20)
    assert result.returncode == 0, result.stderr
    assert "80/80 images" in result.stdout
    return out


def test_counts_and_class_folders(pictures: Path) -> None:
    classes = {folder.name for folder in (pictures / "train").iterdir()}
    assert len(classes) == 10
    for split, per_class in ("train", 6), ("val", 2):
        counts = Counter(path.parent.name for path in (pictures / split).rglob("*.jpg"))
        assert counts == dict.fromkeys(classes, per_class)
    assert [path.name for path in pictures.parent.iterdir()] == ["pictures"]  # nothing left over


def test_pictures_decode_and_differ(pictures: Path) -> None:
    sizes, seen = set(), set()
    for path in pictures.rglob("*.jpg"):
        with Image.open(path) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")
            pixels = np.asarray(image)
        assert pixels.std() > 10, f"{path} shows nothing"
        sizes.add(pixels.shape)
        seen.add(pixels.tobytes())
    assert len(seen) == 80
    assert len(sizes) > 40
    assert all(72 <= side <= 160 for height, width, _ in sizes for side in (height, width))


def test_same_seed_same_bytes_whatever_the_counts(pictures: Path, tmp_path: Path) -> None:
    result = make(tmp_path / "fewer", "--train", 33, "--val", 20, "--workers", 1)
    assert result.returncode == 0, result.stderr
    fewer, all_pictures = contents(tmp_path / "fewer"), contents(pictures)
    assert len(fewer) == 53
    assert fewer == {path: all_pictures[path] for path in fewer}


def test_another_seed_other_pictures(pictures: Path, tmp_path: Path) -> None:
    result = make(tmp_path / "other", "--train", 10, "--val", 1, "--seed", 1)
    assert result.returncode == 0, result.stderr
    assert not set(contents(tmp_path / "other").values()) & set(contents(pictures).values())


def test_refuses_existing_out(pictures: Path) -> None:
    before = contents(pictures)
    result = make(pictures, "--train", 10)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert str(pictures) in result.stderr
    assert contents(pictures) == before


@pytest.mark.parametrize("flags", [("--train", -1), ("--seed", -1), ("--workers", 0)])
def test_refuses_impossible_numbers(flags: tuple[str, int], tmp_path: Path) -> None:
    result = make(tmp_path / "out", *flags)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert flags[0] in result.stderr
    assert list(tmp_path.iterdir()) == []
