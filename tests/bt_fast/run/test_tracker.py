"""--tracker wandb: the same records, and errors that do not end a run."""

import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from bt_fast.cli import main
from bt_fast.config import Config
from bt_fast.run.console import RunLog

RECORD = {
    "step": 4, "epoch": 1.0, "loss": 3.0, "on_diagonal": 2.0, "off_diagonal": 1.0,
    "lr_weights": 0.1, "images_per_s": 9.0,
}  # fmt: skip


class Recorder:
    """In place of wandb, which the tests do not need."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.logged, self.started, self.finished = error, [], {}, False
        self.api = SimpleNamespace(api_key=None)

    def init(self, **options):
        self.started = options
        return self

    def log(self, values, step):
        if self.error:
            raise self.error
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


def log_with(recorder, folder, monkeypatch, capsys) -> str:
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with RunLog(Console(), folder, 0, 8, Config(tracker="wandb")) as log:
        log.training(RECORD)
        log.training(RECORD | {"step": 8})
    return capsys.readouterr().out


def test_records_go_to_wandb_offline_without_a_key(tmp_path, monkeypatch, capsys):
    recorder = Recorder()
    log_with(recorder, tmp_path, monkeypatch, capsys)
    assert recorder.started["mode"] == "offline"
    identifier = recorder.started["id"]
    log_with(recorder, tmp_path, monkeypatch, capsys)
    assert recorder.started["id"] == identifier and len(identifier) == 12
    assert recorder.started["config"]["lr_weights"] == 0.2
    assert [step for step, _ in recorder.logged] == [4, 8, 4, 8] and recorder.finished
    assert recorder.logged[0][1]["train/on_diagonal"] == 2.0


def test_its_errors_are_reported_once_and_do_not_end_a_run(tmp_path, monkeypatch, capsys):
    output = log_with(Recorder(RuntimeError("quota exceeded")), tmp_path, monkeypatch, capsys)
    assert output.count("wandb cannot be written: wandb: quota exceeded; the run continues") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_missing_package_is_named_before_the_run(small_beton, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    flags = [f"--data={small_beton}", f"--run-dir={tmp_path / 'r'}", "--tracker=wandb"]
    assert main(["pretrain", "--recipe=demo", "--device=cpu", *flags]) == 2
    assert "pip install 'bt-fast[wandb]'" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_the_real_wandb_records_offline(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with RunLog(Console(), tmp_path, 0, 8, Config(tracker="wandb")) as log:
        log.training(RECORD)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
