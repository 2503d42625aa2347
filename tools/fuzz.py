"""Fuzzing: bt-fast reads mutated .beton files, checkpoints, weights and images.

    python tools/fuzz.py --count 10000 --seed 0

Every target gets `count` mutated inputs, each a function of (seed, target, number): flipped bits,
overwritten bytes, length fields with boundary values, truncation, copied ranges, zeros. The verdict
on an input is one of

    refused    a documented error of one line: ValueError or a subclass
    unharmed   all data are read as from the original file: the damage is in unused bytes
    other      other data are read, and the damage cannot be detected (see below)
    SILENT     other data are read although the damage can be detected
    CRASH      another exception, a message of several lines, over a minute, a dead process

Damage can be detected everywhere in a .beton, by its checksums (target `beton`), and in a
checkpoint, by SHA-256 (`checkpoint`). Only crashes count for inputs with matching checksums
(`forged ...`: a malicious file, not a damaged one) and for files of weights, which have none. A
damaged image at conversion (`image`) is `other` if it is still a complete image: a JPEG that
decodes to other pixels without a warning of libjpeg is another JPEG. It is SILENT if a truncated
image, or a format with checksums (PNG), gives other pixels, or if the converter's result is not a
plain JPEG of the stated size that decodes without a warning.

The exit status is 1 after a SILENT or CRASH; such inputs are kept in the folder --keep.
"""

import _checkout  # noqa: F401  # isort: skip

import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from pipelines.common.cpu import usable_cores
from pipelines.common.flags import parse_flags
from tools.fuzz_judge import judge
from tools.fuzz_targets import TARGETS

SECONDS_BETWEEN_LINES = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Fuzz:
    """Feed mutated files to every reader; count refusals, silent acceptances and crashes."""

    count: int = 10_000
    """Number of inputs per target."""
    seed: int = 0
    """Seed of all mutations."""
    kinds: tuple[str, ...] = tuple(TARGETS)
    """Targets to fuzz."""
    workers: int = usable_cores()
    """Number of worker processes."""
    keep: Path = Path("fuzz-findings")
    """Folder for SILENT and CRASH inputs, created for the first one."""


def serve(name: str, seed: int, first: int, last: int, step: int, connection) -> None:
    """Worker process: sends number, verdict and message of every `step`-th input."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(
        dir="/dev/shm" if Path("/dev/shm").is_dir() else None
    ) as folder:
        target = TARGETS[name](Path(folder))
        for number in range(first, last, step):
            connection.send((number, "begun", "", b""))
            verdict, message, data = judge(target, number, seed)
            is_finding = verdict in ("SILENT", "CRASH")
            connection.send((number, verdict, message, data if is_finding else b""))
    connection.send(None)


def fuzz_target(name: str, options: Fuzz) -> Counter:
    """Verdicts on all inputs of a target. A worker process that dies is a CRASH and is replaced."""
    context = multiprocessing.get_context("forkserver")
    counts: Counter = Counter()
    started = shown = time.monotonic()

    def start(first: int):
        receiver, sender = context.Pipe()
        arguments = (name, options.seed, first, options.count, options.workers, sender)
        process = context.Process(target=serve, args=arguments, daemon=True)
        process.start()
        sender.close()
        return receiver, process

    running = dict(start(first) for first in range(min(options.workers, options.count)))
    begun: dict = {}
    while running:
        for connection in multiprocessing.connection.wait(list(running)):
            process = running[connection]
            try:
                message = connection.recv()
            except EOFError:  # the process died
                process.join()
                number = begun.get(connection, 0)
                report(
                    name, number, "CRASH", f"the process died ({process.exitcode})", b"", options
                )
                counts["CRASH"] += 1
                del running[connection]
                if number + options.workers < options.count:
                    running.update([start(number + options.workers)])
                continue
            if message is None:
                del running[connection]
                process.join()
                continue
            number, verdict, text, data = message
            begun[connection] = number
            if verdict == "begun":
                continue
            counts[verdict] += 1
            if verdict in ("SILENT", "CRASH"):
                report(name, number, verdict, text, data, options)
        if time.monotonic() - shown > SECONDS_BETWEEN_LINES:
            shown = time.monotonic()
            rate = (counts.total() + 1) / (shown - started)
            left = (options.count - counts.total()) / rate
            done = f"{counts.total():,} of {options.count:,}"
            print(f"{name}: {done}, {rate:,.0f}/s, {left:,.0f} s left", flush=True)
    return counts


def report(name: str, number: int, verdict: str, text: str, data: bytes, options: Fuzz) -> None:
    """Print a finding and keep its input."""
    options.keep.mkdir(parents=True, exist_ok=True)
    file = options.keep / f"{name.replace(' ', '-')}-{options.seed}-{number}"
    file.write_bytes(data)
    print(
        f"{verdict}: {name}, seed {options.seed}, number {number}: {text[:300]} ({file})",
        flush=True,
    )


def main(arguments: list[str] | None = None) -> int:
    try:
        options = parse_flags(Fuzz, "tools/fuzz.py", arguments)
        unknown = set(options.kinds) - TARGETS.keys()
        if unknown or options.count < 1 or options.workers < 1:
            raise ValueError(f"--kinds are {', '.join(TARGETS)}; --count and --workers at least 1")
    except ValueError as error:
        print(f"tools/fuzz.py: {error}", file=sys.stderr)
        return 2
    num_findings = 0
    for name in options.kinds:
        counts = fuzz_target(name, options)
        num_findings += counts["SILENT"] + counts["CRASH"]
        shown = ", ".join(
            f"{counts[v]:,} {v}" for v in ("refused", "unharmed", "other", "SILENT", "CRASH")
        )
        print(f"{name}: {counts.total():,} mutated inputs: {shown}", flush=True)
    return int(num_findings > 0)


if __name__ == "__main__":
    sys.exit(main())
