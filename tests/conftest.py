"""Pictures for the tests: real photographs where the sample is at hand, drawn ones otherwise."""

import contextlib
import copy
import importlib.metadata
import io
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

try:
    from hypothesis import settings
except ModuleNotFoundError:  # where only the tests of GPUs run
    pass
else:  # the same examples everywhere, however slow the machine; nothing is kept on the disk
    settings.register_profile("bt-fast", derandomize=True, deadline=None, max_examples=50)
    settings.load_profile("bt-fast")

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tools"))  # where a tool finds `_checkout`
SHARED_DATA = ROOT.parent / "shared" / "data"
IMAGENET_SAMPLE = SHARED_DATA / "imagenet-sample-500.tar"

# Small models on small machines: a second thread per operation costs more than it gives.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton kernels run without a GPU in its interpreter; read when triton is first imported. The tests
# of CUDA paths want the kernels themselves: TRITON_INTERPRET=0 pytest tests/test_cuda.py
os.environ.setdefault("TRITON_INTERPRET", "1")


def interpreter_failure() -> str | None:
    """Why Triton's interpreter cannot run kernels here; None where it can."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "needs triton"
    if version.startswith("3.6.") and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4):
        return f"the interpreter of triton {version} does not work with numpy {np.__version__}"
    return None


INTERPRETER_FAILS = interpreter_failure()


def require_interpreter() -> None:
    """Skip the test that runs kernels where they cannot run."""
    if INTERPRETER_FAILS:
        pytest.skip(INTERPRETER_FAILS)


def drawn_picture(seed: int, width: int = 200, height: int = 150) -> Image.Image:
    """A colourful picture with smooth and sharp parts, reproducible from its seed."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.array(picture)
    for _ in range(6):
        top, left = generator.integers(0, height - 8), generator.integers(0, width - 8)
        pixels[top : top + height // 4, left : left + width // 5] = generator.integers(0, 256, 3)
    noise = generator.normal(0, 6, pixels.shape)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def jpeg_bytes(picture: Image.Image, quality: int = 92) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def photographs(count: int) -> list[Image.Image]:
    """`count` RGB pictures: ImageNet's where the sample is there, else drawn ones."""
    if not IMAGENET_SAMPLE.exists():
        return [drawn_picture(seed) for seed in range(count)]
    pictures = []
    with tarfile.open(IMAGENET_SAMPLE) as archive:
        for member in archive:
            if member.isfile():
                data = archive.extractfile(member).read()
                pictures.append(Image.open(io.BytesIO(data)).convert("RGB"))
            if len(pictures) == count:
                break
    return pictures


def pytest_runtest_logreport(report) -> None:
    """Name a failed test at once: a run that is killed prints no summary."""
    if report.failed:
        place = getattr(report.longrepr, "reprcrash", None) or report.longreprtext
        print(f"\nfailed: {report.nodeid} ({report.when}): {place}", flush=True)


@pytest.fixture(scope="session")
def photos() -> list[Image.Image]:
    return photographs(16)


def write_beton(path: Path, count: int, num_classes: int = 4, sizes=((40, 56), (64, 48))) -> Path:
    """A small .beton of drawn pictures; the class is the hue of a big square."""
    from pipelines.beton.writer import BetonWriter

    colours = [(220, 40, 40), (40, 200, 60), (50, 70, 220), (210, 200, 50)]
    names = [f"class-{label}" for label in range(num_classes)]
    with BetonWriter(path, num_samples=count, class_names=names) as writer:
        for index in range(count):
            height, width = sizes[index % len(sizes)]
            picture = drawn_picture(index, width, height)
            label = index % num_classes
            square = Image.new("RGB", (width // 2, height // 2), colours[label % 4])
            picture.paste(square, (index % (width // 2), index % (height // 2)))
            data = jpeg_bytes(picture)
            writer.add(data, height, width, label, f"{names[label]}/{index:03d}.jpg")
        writer.finalize()
    return path


def write_photo_beton(path: Path, count: int, side: int = 96) -> Path:
    """A small .beton of `photographs`, at most `side` pixels wide or high, without classes."""
    from pipelines.beton.writer import BetonWriter

    with BetonWriter(path, num_samples=count, class_names=["photograph"]) as writer:
        for index, picture in enumerate(photographs(count)):
            picture.thumbnail((side, side))
            data = jpeg_bytes(picture)
            writer.add(data, picture.height, picture.width, 0, f"{index:03d}.jpg")
        writer.finalize()
    return path


def with_torchs_batch_norm(model):
    """A copy of a model that takes one view a call, as the released code's does."""
    from torch import nn

    from bt_fast.models import batch_norm

    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, batch_norm.BatchNorm1d):
            layer.__class__ = nn.BatchNorm1d
        elif isinstance(layer, batch_norm.BatchNorm2d):
            layer.__class__ = nn.BatchNorm2d
    return model


def run_python(*words: object, **options) -> subprocess.CompletedProcess[str]:
    """Run `python WORDS` to its end; options are those of subprocess.run."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def files_below(root: Path) -> dict[str, bytes]:
    """{relative path: content} of all files below a folder."""
    files = [path for path in root.rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


@contextlib.contextmanager
def mounted(folder: Path, options: str):
    """A file system in memory; skips the test without permission to mount one."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root and the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="session")
def small_beton(tmp_path_factory) -> Path:
    """64 pictures of 4 classes."""
    return write_beton(tmp_path_factory.mktemp("data") / "small.beton", 64)


@pytest.fixture(scope="session")
def small_shards(small_beton, tmp_path_factory) -> Path:
    """The same as web shards."""
    from pipelines.convert.command import main

    folder = tmp_path_factory.mktemp("of-small") / "shards"
    assert main([str(small_beton), str(folder), "--format=webdataset", "--workers=1"]) == 0
    return folder


@pytest.fixture
def reader(small_beton):
    from pipelines.beton import BetonReader

    return BetonReader(small_beton)


@pytest.fixture(scope="session")
def imagenet_folder(tmp_path_factory) -> Path:
    """train/ and val/ with the class and file names of ImageNet."""
    from sample_imagenet import write_folder

    return write_folder(tmp_path_factory.mktemp("imagenet"))


@pytest.fixture(scope="session")
def imagenet_beton(imagenet_folder, tmp_path_factory) -> Path:
    """Its conversion: what comes of any other source of the same images must have these bytes."""
    from sample_imagenet import convert

    out = tmp_path_factory.mktemp("converted") / "out.beton"
    assert convert(imagenet_folder, out) == 0
    return out


@pytest.fixture(autouse=True, scope="session")
def default_precision():
    """BT_FAST_TEST_PRECISION=bf16 or fp32 is what --precision auto chooses in this process,
    whatever the processor has. Processes that tests start and compare state theirs."""
    wanted = os.environ.get("BT_FAST_TEST_PRECISION")
    if wanted is None:
        yield
        return

    assert wanted in ("bf16", "fp32"), f"BT_FAST_TEST_PRECISION={wanted}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bt_fast.runtime.has_bf16", lambda device: wanted == "bf16")
        yield


@pytest.fixture(autouse=True)
def one_compute_thread():
    """As in the processes the tests start; importing ffcv (OpenCV) undoes it in this one."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def refused(capsys):
    """A function that asserts that a command ended with status 2 and one line that has all texts
    -> the line."""

    def check(status: int, *texts: str) -> str:
        error = capsys.readouterr().err
        assert status == 2 and error.count("\n") == 1, error
        for text in texts:
            assert text in error
        return error

    return check


@pytest.fixture
def hang_up():
    """A hang-up does what it does by default, to processes that are started too: nohup, which may
    have started the tests, lets it do nothing."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session")
def labelled_run(tmp_path_factory) -> Path:
    """A run of a few steps on 64 pictures of 4 classes, with 30 held-out ones beside them."""
    from bt_fast.cli import main

    folder = tmp_path_factory.mktemp("labelled")
    data = write_beton(folder / "train.beton", 64)
    write_beton(folder / "train.val.beton", 30)
    flags = [
        "--recipe=cifar10-cpu", "--size=32", "--min-scale=0.25", "--device=cpu", "--batch-size=16",
        "--workers=2", "--epochs=2", "--warmup-epochs=1", "--projector", "48", "32",
        "--precision=fp32",
    ]  # fmt: skip
    run = folder / "run"
    assert main(["pretrain", *flags, "--data", str(data), "--run-dir", str(run)]) == 0
    return run


@pytest.fixture(scope="session")
def finished(small_beton, tmp_path_factory) -> Path:
    """An uninterrupted run of 12 steps: 3 epochs of 4."""
    from tiny_runs import pretrain

    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert pretrain("--data", small_beton, "--run-dir", folder, "--save-every", 1) == 0
    return folder
