"""`--continue`: the output equals that of an uninterrupted conversion after any interruption."""

from pathlib import Path

import numpy as np
import pytest
from conftest import drawn_picture, files_below, jpeg_bytes
from hostile import make_folder
from test_convert_stops import names_in, start_conversion
from tiny_runs import is_running, wait_until

import pipelines.convert.write_split
from pipelines.beton import BetonReader
from pipelines.convert.command import main

NUM_TRAIN, NUM_VAL = 24, 9
FORMATS = {"beton": [], "webdataset": ["--format", "webdataset", "--shard-size", "1"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images of 100 to 200 kB, enough for several web shards of 1 MB, and a broken one."""
    root = tmp_path_factory.mktemp("images")
    for index in range(NUM_TRAIN + NUM_VAL):
        path = root / ("train" if index < NUM_TRAIN else "val") / "ab"[index % 2] / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = drawn_picture(index, 512, 300 + 5 * index)
        path.write_bytes(jpeg_bytes(picture, quality=98) if index != 7 else b"broken")
    return root


@pytest.fixture(scope="module")
def uninterrupted(folder, tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """The output of uninterrupted conversions, by format."""
    results = {}
    for name, flags in FORMATS.items():
        root = tmp_path_factory.mktemp(name)
        assert run(folder, root, *flags) == 0
        results[name] = files_below(root)
    return results


def run(folder: Path, root: Path, *flags: str) -> int:
    out = root / ("shards" if "webdataset" in flags else "out.beton")
    return main([str(folder), str(out), "--skip-broken", "--workers", "1", *flags])


class Interruption:
    """Simulates a full disk after `limit` intact images were prepared; counts them."""

    def __init__(self, monkeypatch):
        self.count, self.limit = 0, 0
        self._prepare_all = pipelines.convert.write_split.prepare_all
        monkeypatch.setattr(pipelines.convert.write_split, "prepare_all", self)

    def __call__(self, *arguments, **options):
        for pair in self._prepare_all(*arguments, **options):
            if self.count == self.limit:
                raise OSError(28, "No space left on device")
            # Broken images are prepared again in every conversion.
            self.count += pair[1].image is not None
            yield pair


@pytest.fixture
def interruption(monkeypatch) -> Interruption:
    return Interruption(monkeypatch)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("after", [0, 1, 8, 20, NUM_TRAIN, NUM_TRAIN + 4])
def test_continued(folder, uninterrupted, tmp_path, capsys, interruption, format, after):
    """Stopped in train or in val, once or repeatedly: no intact image is prepared twice."""
    flags = [*FORMATS[format], "--continue"]
    for limit in range(after, 99, 9):
        interruption.limit = limit
        if run(folder, tmp_path, *flags) == 0:
            break
        assert "free some space" in (error := capsys.readouterr().err)
        assert error.endswith("partial output is kept for --continue\n")
        assert len(names_in(tmp_path)) == 1  # no file has its final name
    assert files_below(tmp_path) == uninterrupted[format]
    assert interruption.count == NUM_TRAIN + NUM_VAL - 1


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("seed", range(4))
def test_damage_to_partial_output_is_detected(
    folder, uninterrupted, tmp_path, interruption, format, seed
):
    """Images and journal are truncated or overwritten, as after a power failure."""
    generator = np.random.default_rng(seed)
    flags = [*FORMATS[format], "--continue"]
    interruption.limit = 17 + seed
    assert run(folder, tmp_path, *flags) == 1
    files = [path for path in tmp_path.rglob("*") if path.suffix in (".beton", ".tar", ".journal")]
    for path in files:
        data = bytearray(path.read_bytes())
        first = data.find(b"\n") + 1 if path.suffix == ".journal" else 0
        offset = int(generator.integers(first, len(data) + 1))
        if generator.random() < 0.5:
            del data[offset:]
        else:
            data[offset : offset + 9] = generator.bytes(len(data[offset : offset + 9]))
        path.write_bytes(data)
    interruption.limit = 999
    assert run(folder, tmp_path, *flags) == 0
    assert files_below(tmp_path) == uninterrupted[format]


def status(pid: int) -> list[str]:
    """[state, parent, ...] of /proc/pid/stat; empty when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def descendants(pid: int) -> list[int]:
    processes = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    children = [other for other in processes if status(other)[1:2] == [str(pid)]]
    return children + [other for child in children for other in descendants(child)]


@pytest.mark.parametrize("format", FORMATS)
def test_killed(tmp_path, capsys, format):
    """kill -9 of a conversion that was started without --continue: no output, no orphans; the work
    folder is locked meanwhile, and continued afterwards."""
    folder, small = tmp_path / "images", make_folder(tmp_path / "small", {"a": 2})
    (folder / "a").mkdir(parents=True)
    for index in range(4000):
        if index < 5:
            picture = drawn_picture(index, 256, 192 - index)
            (tmp_path / f"{index}.bin").write_bytes(jpeg_bytes(picture, quality=75))
        (folder / "a" / f"{index}.jpg").symlink_to(tmp_path / f"{index % 5}.bin")
    flags = [*FORMATS[format], "--workers", "2"]
    name = "out" if format == "webdataset" else "out.beton"
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert main([str(folder), str(tmp_path / "a" / name), *flags]) == 0
    out = tmp_path / "b" / name
    child = start_conversion(folder, out, *FORMATS[format])
    family = descendants(child.pid)
    assert len(family) >= 3  # the resource tracker and two workers
    assert main([str(small), str(out), *FORMATS[format]]) == 2
    assert "by another bt-convert" in capsys.readouterr().err

    child.kill()
    child.wait()
    assert names_in(tmp_path / "b") == [f"{name}.partial"]
    wait_until(lambda: not any(map(is_running, family)), timeout=120)  # no worker outlives it
    assert main([str(folder), str(out), *flags, "--continue"]) == 0
    assert files_below(tmp_path / "b") == files_below(tmp_path / "a")


def test_other_settings_are_refused(folder, tmp_path, capsys, interruption):
    interruption.limit = 5
    assert run(folder, tmp_path, "--continue") == 1
    before = files_below(tmp_path)
    for flags in (["--max-side", "100"], ["--subset", "9"], ["--shard", "1/2"]):
        capsys.readouterr()
        assert run(folder, tmp_path, "--continue", *flags) == 2
        error = capsys.readouterr().err
        assert "written with other settings" in error and error.count("\n") == 1
    other = make_folder(tmp_path / "other" / "train", {"a": 3}).parent
    assert run(other, tmp_path, "--continue") == 2
    assert "(other images)" in capsys.readouterr().err
    assert {k: v for k, v in files_below(tmp_path).items() if "other" not in k} == before

    interruption.limit = 99
    assert run(other, tmp_path) == 0  # without --continue: started again
    assert "left by a conversion that was killed" in capsys.readouterr().out


@pytest.mark.parametrize("format", FORMATS)
def test_an_image_that_was_repaired_is_stored(tmp_path, format):
    """All images after it move; the output is that of the repaired folder."""
    folder = make_folder(tmp_path / "images", {"a": 12})
    broken = folder / "a" / "004.jpg"
    intact = broken.read_bytes()
    flags = [*FORMATS[format], "--workers", "1"]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert main([str(folder), str(tmp_path / "a" / "out.beton"), *flags]) == 0
    broken.write_bytes(intact[:-40])
    again = [str(folder), str(tmp_path / "b" / "out.beton"), *flags, "--continue"]
    for _ in range(2):
        assert main(again) == 1
    broken.write_bytes(intact)
    assert main(again) == 0
    assert files_below(tmp_path / "b") == files_below(tmp_path / "a")


def test_broken_images_can_be_left_out_afterwards(
    folder, uninterrupted, tmp_path, interruption, capsys
):
    interruption.limit = 99
    out = tmp_path / "out.beton"
    flags = ["--workers", "1", "--continue"]
    assert main([str(folder), str(out), *flags]) == 1
    assert "7.jpg: not an image" in capsys.readouterr().err
    assert main([str(folder), str(out), *flags, "--skip-broken"]) == 0
    assert files_below(tmp_path) == uninterrupted["beton"]
    assert interruption.count == NUM_TRAIN + NUM_VAL - 1


def test_a_folder_of_other_files_is_not_changed(folder, tmp_path, capsys):
    precious = tmp_path / "out.beton.partial" / "thesis.tex"
    precious.parent.mkdir()
    precious.write_text("precious")
    for flags in ([], ["--continue"], ["--overwrite"]):
        assert run(folder, tmp_path, *flags) == 1
        error = capsys.readouterr().err
        assert "Not a folder of unfinished output" in error and error.count("\n") == 1
    assert precious.read_text() == "precious"


def test_out_inside_the_source(tmp_path, interruption):
    """The work folder inside the source is not a class."""
    folder = make_folder(tmp_path, {"a": 3, "b": 2})
    interruption.limit = 2
    out = folder / "out.beton"
    flags = [str(folder), str(out), "--workers", "1", "--continue"]
    assert main(flags) == 1 and out.with_name("out.beton.partial").exists()
    interruption.limit = 99
    assert main(flags) == 0
    assert BetonReader(out).class_names == ["a", "b"]
