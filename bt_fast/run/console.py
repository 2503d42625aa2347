"""Output of a run: console, metrics.jsonl and TensorBoard.

A terminal shows a progress bar; elsewhere plain lines are printed, at most one in five seconds.
Every record is written to metrics.jsonl and TensorBoard. A full disk or a closed terminal does not
end a run.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from bt_fast.config import Config
from bt_fast.run.metrics import RecordFile, metrics_line, open_events, tensorboard_events
from bt_fast.run.tracker import WandbFile
from pipelines.common.console import printable

_PLAIN_INTERVAL = 5.0  # seconds between plain lines


class Clock:
    """Training time per log interval, without pauses; on a GPU measured by CUDA events."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started = self._now()
        self._parts: list[tuple[Any, Any]] = []  # start and end

    def _now(self) -> Any:
        """Seconds, or an event on a GPU."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self) -> Callable[[], float]:
        """End an interval -> a function for its seconds, when the device has reached this."""
        now = self._now()
        parts, self._parts, self._started = [*self._parts, (self._started, now)], [], now
        return lambda: sum(_seconds(start, end) for start, end in parts)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self._parts.append((self._started, self._now()))
        yield
        self._started = self._now()


def _seconds(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


class RunLog:
    """Console and record files of one run; a context manager, which restores the terminal."""

    def __init__(
        self,
        console: Console,
        folder: Path | None,
        first_step: int,
        last_step: int,
        config: Config | None = None,
    ) -> None:
        """folder: None on ranks that write nothing. config: of a run with a tracker."""
        self.console, self.folder = console, folder
        self.last_step = last_step
        self._first_line: tuple[int, float] | None = None  # its step and time
        self.skipped_in_a_row = 0  # updates skipped up to the newest log line
        self._failed: set[str] = set()
        self._files: list[tuple[str, Any, Callable[[str, dict], Any]]] = []
        if folder is not None:
            self._files = [
                ("metrics.jsonl", RecordFile(folder / "metrics.jsonl"), metrics_line),
                ("tensorboard", open_events(folder, first_step), tensorboard_events),
            ]
            if config is not None and config.tracker == "wandb":
                with self.optional_output("wandb"):
                    self._files.append(("wandb", WandbFile(folder, config), lambda *r: r))
        self._last_plain = 0.0
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]:.2f}"),
            BarColumn(bar_width=8),
            TaskProgressColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True, ratio=1)),
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(
            "", total=last_step, completed=first_step, epoch=0.0, speed="", text=""
        )

    def __enter__(self) -> "RunLog":
        self._progress.start()
        return self

    def __exit__(self, *exception) -> None:
        with contextlib.suppress(OSError):  # of a closed terminal
            self._progress.stop()
        for name, file, _ in self._files:
            with self.optional_output(f"the end of {name}"):
                file.close()
        try:
            self.console.file.flush()
        except OSError:  # the interpreter would try again at its end, and exit with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.console.file.fileno())

    def info(self, text: str, *, style: str | None = None) -> None:
        # Output may go to a full disk; into a closed pipe, rich would end the program.
        with contextlib.suppress(OSError, SystemExit):
            line = printable(text, self.console.encoding)
            self.console.print(line, style=style, highlight=False, markup=False)

    def warn(self, text: str) -> None:
        self.info(f"warning: {text}", style="yellow")

    @contextlib.contextmanager
    def optional_output(self, name: str) -> Iterator[None]:
        """Output without which the run continues: a failed write is reported the first time."""
        try:
            yield
        except OSError as error:
            if name not in self._failed:
                self._failed.add(name)
                self.warn(f"{name} cannot be written: {reason(error)}; the run continues")

    def training(self, record: dict) -> None:
        """One log line: loss and its terms, learning rates, images/s, as Python numbers."""
        self._record("train", record)
        step = record["step"]
        if self.console.is_terminal:
            self._progress.update(
                self._task,
                completed=step,
                epoch=record["epoch"],
                speed=f"{record['images_per_s']:.0f} images/s",
                text=f"loss {record['loss']:.4g} (on {record['on_diagonal']:.3g},"
                f" off {record['off_diagonal']:.3g}) lr {record['lr_weights']:.3g}",
            )
            return
        now = time.perf_counter()
        if now - self._last_plain < _PLAIN_INTERVAL and step < self.last_step:
            return
        self._last_plain = now
        # Since the first line: before it, a probe and the loader start.
        first_step, started = self._first_line = self._first_line or (step, now)
        left = ""
        if step > first_step:
            seconds = (now - started) / (step - first_step) * (self.last_step - step)
            left = f" | {duration(seconds)} left"
        self.info(
            f"step {step}/{self.last_step} epoch {record['epoch']:.2f}"
            f" | loss {record['loss']:.4g} = on-diagonal {record['on_diagonal']:.4g}"
            f" + lambda * off-diagonal {record['off_diagonal']:.4g}"
            f" | lr {record['lr_weights']:.3g} | {record['images_per_s']:.0f} images/s{left}"
        )

    def probe(self, record: dict) -> None:
        """The readouts at one step."""
        self._record("probe", record)
        parts = [
            f"{name.replace('knn_', 'kNN k=')} {100 * value:.2f} %"
            for name, value in record.items()
            if name.startswith("knn_") or name == "linear"
        ]
        titles = {"rank": "rank", "probe_on_diagonal": "on-diagonal"}
        titles["probe_off_diagonal"] = "off-diagonal"
        parts += [f"{titles[name]} {record[name]:.4g}" for name in titles if name in record]
        when = "before training" if record["step"] == 0 else f"epoch {record['epoch']:.4g}"
        self.info(f"probe, {when}: {', '.join(parts)} ({duration(record['seconds'])})")

    def _record(self, kind: str, record: dict) -> None:
        for name, file, encode in self._files:
            with self.optional_output(name):
                file.append(encode(kind, record))


def reason(error: OSError) -> str:
    """The message of a file system error, without its number."""
    return error.strerror or str(error)


def print_summary(title: str, rows: dict[str, str]) -> None:
    """Print a `summary_table`, long lines of which the terminal wraps."""
    Console(soft_wrap=True).print(summary_table(title, rows))


def summary_table(title: str, rows: dict[str, str]) -> Table:
    """A table with a name and a value in each row."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(printable(value)))  # a path may contain rich's markup
    return table


def duration(seconds: float) -> str:
    """3725 -> "1 h 2 min"."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"
