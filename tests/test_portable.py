"""What works on every system: imports, load_encoder, conversion (`make test-portable`).

This file uses no other file of the tests. The last test runs on Linux without what Windows lacks:
it shows missing functions, not how Windows treats open files.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import bt_fast

ROOT = Path(__file__).parents[1]
NUMBER = 12


@pytest.fixture
def photos(tmp_path) -> Path:
    random = np.random.default_rng(0)
    for index in range(NUMBER):
        path = tmp_path / "photos" / f"class{index % 2}" / f"{index:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


def test_load_encoder(tmp_path):
    model = torchvision.models.resnet18().eval()
    torch.save(model.state_dict(), tmp_path / "resnet18.pth")
    encoder = bt_fast.load_encoder(tmp_path / "resnet18.pth")
    model.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), model(images))


def bt_convert(*arguments: object, prelude: str = "") -> None:
    program = f"{prelude}\nimport sys\nfrom pipelines.__main__ import main\nsys.exit(main())"
    command = ["-c", program] if prelude else ["-m", "pipelines"]
    words = [sys.executable, *command, *(str(word) for word in arguments)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("out", ["out.beton", "shards"])
def test_conversion(photos, tmp_path, workers, out):
    form = "beton" if out.endswith(".beton") else "webdataset"
    flags = ["--format", form, "--workers", workers]
    bt_convert(photos, tmp_path / out, *flags)
    bt_convert(photos, tmp_path / out, *flags, "--overwrite")
    bt_convert("--verify", tmp_path / out, "--workers", workers)
    dataset = bt_fast.open_data(tmp_path / out)
    assert len(dataset) == NUMBER and list(dataset.class_names) == ["class0", "class1"]


WITHOUT = """
import os, signal, sys
real = os.open
def files_only(path, *arguments, **options):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return real(path, *arguments, **options)
os.open = files_only
for name in ("pread", "O_NONBLOCK", "O_DIRECTORY", "sched_getaffinity", "fork"):
    delattr(os, name)
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGKILL"):
    delattr(signal, name)
sys.modules["resource"] = sys.modules["fcntl"] = None
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the other tests are the real thing")
@pytest.mark.parametrize("flags", [[], ["--continue"], ["--format", "webdataset", "--continue"]])
def test_conversion_without_what_windows_lacks(photos, tmp_path, flags):
    out = tmp_path / ("shards" if "webdataset" in flags else "out.beton")
    bt_convert(photos, out, "--workers", 1, *flags, prelude=WITHOUT)
    bt_convert("--verify", out, "--workers", 1, prelude=WITHOUT)
