"""Damage on purpose: what bt-fast makes of mutated .beton files, checkpoints, weights and images.

    python tools/fuzz.py --count 10000 --seed 0

Every kind gets `count` mutated inputs, each a function of (seed, kind, number): flipped bits,
overwritten bytes, length fields with telling values, cuts, copies of other places, zeros. What
comes of an input is one of

    refused    one of the documented errors, one line: ValueError and its kinds
    unharmed   everything that is read is as in the whole file: the damage hit what nobody reads
    other      read as something else, where nothing can tell (below)
    SILENT     read as something else although something can tell
    CRASH      any other exception, a message of several lines, more than a minute, a dead process

What can tell: a .beton's checksums, everywhere (kind `beton`); a checkpoint's SHA-256, everywhere
(`checkpoint`). Where the input was made to fit its checksums (`forged ...`: a malicious file, not a
damaged one), and in files of weights, which have none, only crashes count. A damaged image at
conversion (`image`) is `other` if it is still a whole picture: bits of a JPEG that decode without
any warning of libjpeg to other pixels are another JPEG. It is SILENT if an image that lacks its end
gives other pixels, if a format with checksums of its own (PNG) does, or if what the converter made
of it is no plain JPEG of the size it says that decodes without a warning.

Exit status 1 if anything was SILENT or a CRASH; such inputs are kept in the folder --keep.
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
from tools.fuzz_kinds import KINDS

SECONDS_BETWEEN_LINES = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Fuzz:
    """Mutate inputs and see what becomes of them."""

    count: int = 10_000
    """Inputs of each kind."""
    seed: int = 0
    """Of everything."""
    kinds: tuple[str, ...] = tuple(KINDS)
    """What to mutate."""
    workers: int = usable_cores()
    """Processes."""
    keep: Path = Path("fuzz-findings")
    """Folder for inputs that were SILENT or a CRASH; made when there is one."""


def serve(name: str, seed: int, first: int, last: int, step: int, connection) -> None:
    """A worker process: number, verdict and message of every `step`-th input, as they come."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(
        dir="/dev/shm" if Path("/dev/shm").is_dir() else None
    ) as folder:
        kind = KINDS[name](Path(folder))
        for number in range(first, last, step):
            connection.send((number, "begun", "", b""))
            verdict, message, data = judge(kind, number, seed)
            bad = verdict in ("SILENT", "CRASH")
            connection.send((number, verdict, message, data if bad else b""))
    connection.send(None)


def run_kind(name: str, options: Fuzz) -> Counter:
    """All inputs of a kind, in worker processes: one that dies is a CRASH, and replaced."""
    context = multiprocessing.get_context("forkserver")
    counts: Counter = Counter()
    started = shown = time.monotonic()

    def start(first: int):
        ours, theirs = context.Pipe()
        arguments = (name, options.seed, first, options.count, options.workers, theirs)
        process = context.Process(target=serve, args=arguments, daemon=True)
        process.start()
        theirs.close()
        return ours, process

    running = dict(start(first) for first in range(min(options.workers, options.count)))
    begun: dict = {}
    while running:
        for connection in multiprocessing.connection.wait(list(running)):
            process = running[connection]
            try:
                message = connection.recv()
            except EOFError:  # without a word
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
    """Say what was found and keep the input."""
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
        unknown = set(options.kinds) - KINDS.keys()
        if unknown or options.count < 1 or options.workers < 1:
            raise ValueError(f"--kinds are {', '.join(KINDS)}; --count and --workers at least 1")
    except ValueError as error:
        print(f"tools/fuzz.py: {error}", file=sys.stderr)
        return 2
    bad = 0
    for name in options.kinds:
        counts = run_kind(name, options)
        bad += counts["SILENT"] + counts["CRASH"]
        shown = ", ".join(
            f"{counts[v]:,} {v}" for v in ("refused", "unharmed", "other", "SILENT", "CRASH")
        )
        print(f"{name}: {counts.total():,} mutated inputs: {shown}", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
