"""Console output: printable lines, and progress as a bar on a terminal or as plain lines."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TextIO, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

SECONDS_BETWEEN_LINES = 5
Item = TypeVar("Item")


def replace_closed_streams() -> None:
    """Replace closed standard streams, as after `>&-`, whose numbers other files would receive."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # 0, 1, 2
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  the lowest free number


def print_line(text: str, file: TextIO | None = None) -> None:
    """Print the text as one line, and flush."""
    stream = file or sys.stdout
    print(printable(text, stream.encoding), file=stream, flush=True)


def printable(text: str, encoding: str | None = None) -> str:
    """The text as one line: unprintable characters, which file names may contain, are escaped."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    encoding = encoding or "utf-8"
    return line.encode(encoding, "backslashreplace").decode(encoding)


def plural(number: float, noun: str) -> str:
    """ "1 class", "1,000 classes"."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,.10g} {noun}{ending}"


def count_items(title: str, items: Iterable[Item]) -> Iterator[Item]:
    """Yield the items, whose number is unknown, and print their count every few seconds."""
    last = time.monotonic()
    for count, item in enumerate(items, 1):
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            print_line(f"{title}: {count:,} so far")
        yield item


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[..., None]]:
    """Yield advance(count=1), which updates the progress of `total` images."""
    console = Console()
    if not console.is_terminal:
        yield _line_progress(title, total)
        return
    name = TextColumn("{task.description}", markup=False)
    columns = (name, BarColumn(), MofNCompleteColumn(), _Rate())
    with Progress(*columns, TimeRemainingColumn(), TextColumn("left"), console=console) as bar:
        task = bar.add_task(printable(title, console.encoding), total=total)
        yield lambda count=1: bar.advance(task, count)


def _line_progress(title: str, total: int) -> Callable[..., None]:
    start = last = time.monotonic()
    done = first = 0

    def advance(count: int = 1) -> None:
        nonlocal start, last, done, first
        done += count
        now = time.monotonic()
        if first == 0 and done < total:  # the first images wait for processes that start
            start, last, first = now, now, done
        elif now - last >= SECONDS_BETWEEN_LINES or done == total:
            last = now
            rate = max(done - first, 1) / max(now - start, 1e-9)
            minutes, seconds = divmod(round((total - done) / rate), 60)
            left = f"{minutes}:{seconds:02} left" if done < total else "done"
            print_line(f"{title}: {done:,} of {total:,} images, {rate:,.0f} images/s, {left}")

    return advance


class _Rate(ProgressColumn):
    def render(self, task) -> Text:
        return Text(f"{task.speed or 0:,.0f} images/s")
