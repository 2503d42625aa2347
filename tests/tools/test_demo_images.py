"""`tools/make_demo_images.py`: the images repeat, and errors write nothing."""

import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import files_below, run_python
from PIL import Image

TOOL = Path(__file__).parents[2] / "tools" / "make_demo_images.py"


def make(out: Path, *flags: object) -> subprocess.CompletedProcess[str]:
    """Run the tool as a user does."""
    return run_python(TOOL, out, "--workers", 2, *flags)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "pictures"
    result = make(out, "--train", 60, "--val", 20)
    assert result.returncode == 0, result.stderr
    return out


def test_images_of_ten_classes_that_differ(pictures: Path) -> None:
    counts = Counter(path.parent.relative_to(pictures) for path in pictures.rglob("*.jpg"))
    per_split = {"train": 6, "val": 2}
    assert len(counts) == 20
    assert all(count == per_split[folder.parts[0]] for folder, count in counts.items())
    assert [path.name for path in pictures.parent.iterdir()] == ["pictures"]  # nothing left over
    seen = set()
    for path in pictures.rglob("*.jpg"):
        with Image.open(path) as image:
            pixels = np.asarray(image)
        assert pixels.std() > 10 and 72 <= min(pixels.shape[:2]) <= max(pixels.shape) <= 160
        seen.add(pixels.tobytes())
    assert len(seen) == 80


def test_an_image_depends_on_seed_and_index_only(pictures: Path, tmp_path: Path) -> None:
    result = make(tmp_path / "fewer", "--train", 33, "--val", 20, "--workers", 1)
    assert result.returncode == 0, result.stderr
    fewer, all_pictures = files_below(tmp_path / "fewer"), files_below(pictures)
    assert len(fewer) == 53
    assert fewer == {path: all_pictures[path] for path in fewer}
    assert make(tmp_path / "other", "--train", 10, "--val", 1, "--seed", 1).returncode == 0
    assert not set(files_below(tmp_path / "other").values()) & set(all_pictures.values())


def test_an_error_is_one_line(pictures: Path, tmp_path: Path) -> None:
    for out, flag in ((pictures, "--train=10"), (tmp_path / "out", "--workers=0")):
        result = make(out, flag)
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert len(files_below(pictures)) == 80 and not list(tmp_path.iterdir())
