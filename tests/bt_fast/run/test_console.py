"""Console output and metrics: plain lines, torn lines."""

import json

import pytest
from rich.console import Console

from bt_fast.run.console import RunLog, summary_table
from bt_fast.run.directory import read_metrics

RECORD = {
    "step": 1, "epoch": 0.5, "loss": 3.0, "on_diagonal": 2.5, "off_diagonal": 100.0,
    "lr_weights": 0.1, "lr_biases": 0.01, "images_per_s": 10.0, "skipped": 0,
}  # fmt: skip


@pytest.mark.parametrize("terminal", [False, True])
def test_every_record_is_kept_and_shown(tmp_path, terminal):
    with open(tmp_path / "screen", "w") as screen:
        console = Console(file=screen, force_terminal=terminal, width=200)
        with RunLog(console, tmp_path, 0, 2) as log:
            log.training(RECORD)
            log.training({**RECORD, "step": 2})
            log.probe({"step": 2, "epoch": 1.0, "knn_20": 0.5, "seconds": 1.0})
            log.warn("mind [the] gap")
    kept = [record for _, record in read_metrics(tmp_path / "metrics.jsonl")]
    assert [record["kind"] for record in kept] == ["train", "train", "probe"]
    assert kept[0]["off_diagonal"] == 100.0
    shown = (tmp_path / "screen").read_text()
    assert "loss 3" in shown and "kNN k=20 50.00 %" in shown and "mind [the] gap" in shown
    assert ("\x1b[" in shown) == terminal
    assert any((tmp_path / "tensorboard").iterdir())


def test_tensorboard_reads_what_was_logged(tmp_path):
    """Two starts of a run, the second from step 2: it supersedes later events of the first."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last, loss in ((0, 4, 8.0), (2, 6, 0.5)):
        with RunLog(Console(quiet=True), tmp_path, first, last) as log:
            for step in range(first + 1, last + 1):
                log.training({**RECORD, "step": step, "loss": loss})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    read = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert read == [(1, 8.0), (2, 8.0), (3, 0.5), (4, 0.5), (5, 0.5), (6, 0.5)]


@pytest.mark.parametrize("line", ['{"step": 2, "lo', "5", "{}", "\0" * 40, "\udcff"])
def test_torn_lines_and_lines_that_no_run_wrote_end_the_metrics(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    first = json.dumps({"kind": "train", "step": 1}) + "\n"
    path.write_bytes((first + line).encode("utf-8", "surrogateescape"))
    assert read_metrics(path) == [(first, {"kind": "train", "step": 1})]
    assert read_metrics(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(
    "name", ["old[/b].beton", "[bold].beton", "a\nb.beton", "\udcff.beton", "é.beton"]
)
def test_paths_are_shown_as_they_are(tmp_path, name, capsys):
    console = Console(width=200)
    console.print(summary_table("a run", {"data": name}))
    RunLog(console, tmp_path, 0, 1).info(name)
    shown = name.replace("\n", "\\n").replace("\udcff", "\\udcff")
    assert capsys.readouterr().out.count(shown) == 2


def test_metrics_of_earlier_versions_are_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1, "invariance": 2.5, "redundancy": 100.0}\n')
    [(line, record)] = read_metrics(path)
    assert (record["on_diagonal"], record["off_diagonal"]) == (2.5, 100.0)
    assert line == path.read_text()
