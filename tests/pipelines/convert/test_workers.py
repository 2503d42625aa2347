"""Worker processes: one that dies costs at most the image that kills it."""

import contextlib
import errno
import os
import signal

import pytest
from conftest import drawn_picture, jpeg_bytes
from hostile import saved

from pipelines.convert import workers
from pipelines.convert.command import main
from pipelines.convert.manifest import SourceImage
from pipelines.convert.workers import WorkerDied, prepare_all

PLAIN = jpeg_bytes(drawn_picture(0, 40, 30))
_prepare, _serve = workers.prepare, workers._serve


def _prepare_or_die(data: bytes, *arguments):
    """Ends this process for some data, as a decoder written in C may."""
    if data.startswith(b"signal"):
        os.kill(os.getpid(), int(data[6:]))
    if data == b"exit":
        os._exit(3)
    if data.startswith(b"once"):  # while the file of this name exists
        with contextlib.suppress(FileNotFoundError):
            os.unlink(data[4:])
            os.kill(os.getpid(), signal.SIGKILL)
        data = PLAIN
    return _prepare(data, *arguments)


def serve_or_die(connection) -> None:
    workers.prepare = _prepare_or_die
    _serve(connection)


def end_at_once(connection) -> None:
    os._exit(7)


def convert(*contents: bytes, serve=serve_or_die) -> list[str]:
    """The reasons why images were rejected, of a conversion with two workers."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(workers, "_serve", serve)
        images = (SourceImage(f"{index}.jpg", 0, data) for index, data in enumerate(contents))
        outcomes = prepare_all(images, workers=2, max_side=0, check="full")
        return [outcome.reason for _, outcome in outcomes]


def test_an_image_that_kills_its_worker_is_rejected_alone(monkeypatch, capsys):
    monkeypatch.setattr(workers, "CHUNK_SIZE", 2)
    crashes = [f"crashed the decoder ({how})" for how in ("signal 11", "status 3")]
    assert convert(PLAIN, b"signal11", b"exit", PLAIN, b"") == ["", *crashes, "", "empty file"]
    assert capsys.readouterr().err.count("A worker process ended with") == 2


def test_a_worker_that_is_killed_once_costs_nothing(tmp_path, capsys):
    flag = tmp_path / "flag"
    flag.touch()
    assert convert(PLAIN, b"once" + bytes(flag), PLAIN) == [""] * 3
    error = capsys.readouterr().err
    assert "A worker process ended with signal 9; 3 images are tried again" in error


def test_a_decoder_prints_nothing(capfd):
    data = bytearray(saved(drawn_picture(0, 40, 30), "TIFF", compression="tiff_lzw"))
    data[100:300] = b"\xff" * 200  # of which libtiff prints "Using code not yet in table"
    assert convert(bytes(data), PLAIN) == ["OSError: decoder error -2", ""]
    assert capfd.readouterr().err == ""


def test_an_image_with_which_memory_runs_out_is_named():
    with pytest.raises(WorkerDied, match=r"1\.jpg: .*signal 9.* memory; try fewer --workers"):
        convert(PLAIN, b"signal9")


def test_closing_starts_no_process(monkeypatch):
    """Ctrl-C on a machine of 64 cores must not start 64 interpreters."""
    started = []
    start = workers._Process.__init__
    monkeypatch.setattr(
        workers._Process, "__init__", lambda self: (started.append(self), start(self))[1]
    )
    images = (SourceImage(f"{index}.jpg", 0, PLAIN) for index in range(1000))
    outcomes = prepare_all(images, workers=2, max_side=0, check="full")
    next(outcomes)
    outcomes.close()
    assert len(started) == 2


def test_workers_that_do_not_start_name_the_cause(monkeypatch):
    with pytest.raises(WorkerDied, match="cannot be started: it ended at once, with status 7"):
        convert(PLAIN, serve=end_at_once)
    for code, error in ((errno.EAGAIN, WorkerDied), (errno.EMFILE, OSError)):

        def fail(_, code=code):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr("multiprocessing.context.SpawnProcess.start", fail)
        with pytest.raises(error, match=os.strerror(code)):
            convert(PLAIN)


def test_a_continued_conversion_tries_a_crash_in_a_process_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workers, "_serve", serve_or_die)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.jpg").write_bytes(b"signal11")
    (tmp_path / "images" / "1.jpg").write_bytes(PLAIN)
    for count in (2, 1):
        arguments = f"{tmp_path}/images {tmp_path}/out.beton --continue --workers {count}"
        assert main(arguments.split()) == 1
        assert "0.jpg: crashed the decoder (signal 11)\n" in capsys.readouterr().err
