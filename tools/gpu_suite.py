"""GPU checks and benchmarks within a time budget.

    python tools/gpu_suite.py --set quick --out results          correctness, step: 240 seconds
    python tools/gpu_suite.py --set full --out results           also benchmarks: 420 seconds
    python tools/gpu_suite.py --parts loss kernels --data imagenet.beton
    python tools/gpu_suite.py --parts learning --data cifar10.beton

Parts run in order of priority, each in a new process that is killed at its time limit: the time
left minus the expected time of the later parts. Parts that do not start are listed. Writes
suite.json (all results) and performance.md (tables for docs/performance.md) during the run,
suite.log (output of the parts), profile.png, and a JUnit report of each part that runs tests.
Without a GPU the same code runs at toy sizes, which finds errors before a GPU is available; the
fused kernels only with TRITON_INTERPRET=1.

The suite runs from a checkout and requires only the packages that bt-fast imports.
"""

import _checkout  # noqa: F401  # isort: skip

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

STARTED = time.monotonic()
ROOT = Path(__file__).resolve().parents[1]
NEEDED = {"torch", "torchvision", "numpy", "PIL", "simplejpeg", "safetensors", "rich", "tyro"}
NEEDED |= {"typeguard", "docstring_parser"}  # dependencies of tyro
OPTIONAL = ("pytest", "xdist", "matplotlib", "kornia", "nvidia.dali")

# Seconds of each part on an H100 with empty compilation caches.
LIMITS = {
    "correctness": 80,
    "step": 100,
    "kernels": 50,
    "variants": 50,
    "rivals": 25,
    "loader": 15,
    "loss": 15,
    "evaluations": 85,
    "compiled": 150,
    "dali": 60,
    "learning": 400,
}
QUICK = ("correctness", "step", "kernels")
FULL = (*QUICK, "variants", "rivals", "loader", "loss", "evaluations")
SETS = {"quick": (240, QUICK), "full": (420, FULL)}
MIN_PART_SECONDS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """Run the GPU checks and benchmarks."""

    set: Literal["quick", "full"] = "full"
    """Set of parts and its time limit: quick 240 seconds, full 420."""
    parts: tuple[str, ...] = ()
    """Parts to run instead of the set's, in this order, within its time limit."""
    data: Path | None = None
    """Real images, a .beton. Default: synthetic images."""
    out: Path = Path("gpu-suite")
    """Folder for the results."""


def main(arguments: Sequence[str] | None = None) -> int:
    if missing := sorted(name for name in NEEDED if not is_installed(name)):
        print(f"gpu_suite.py: not installed: {', '.join(missing)}", file=sys.stderr)
        return 2
    from pipelines.common.flags import parse_flags
    from pipelines.common.signals import Stopped, signals_raise_stopped
    from pipelines.loading.datasets import open_data

    try:
        options = parse_flags(Suite, "gpu_suite.py", arguments)
        if unknown := sorted(set(options.parts) - LIMITS.keys()):
            raise ValueError(f"--parts {' '.join(unknown)}: choose from {' '.join(LIMITS)}")
        if len(set(options.parts)) < len(options.parts):
            raise ValueError(f"--parts {' '.join(options.parts)}: a part is named twice")
        if options.data is not None:
            open_data(options.data, "--data")  # reports an error before any part runs
        if (options.out / "suite.json").exists():
            raise ValueError(f"--out {options.out} contains results; choose another folder")
        with signals_raise_stopped():
            return run(options)
    except (ValueError, OSError) as error:
        print(f"gpu_suite.py: {error}", file=sys.stderr)
        return 2
    except Stopped as stop:
        print(f"gpu_suite.py: stopped; the results so far are in {options.out}", file=sys.stderr)
        return 128 + int(stop.args[0])


def is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def run(options: Suite) -> int:
    seconds, names = SETS[options.set]
    names = options.parts or names
    options.out.mkdir(parents=True, exist_ok=True)
    absent = [name for name in OPTIONAL if not is_installed(name)]
    if absent:
        print(f"optional packages that are not installed: {', '.join(absent)}", flush=True)

    import torch

    from pipelines.common.atomic import atomic_file
    from tools import suite_report, synthetic
    from tools.results import write_json

    if not torch.cuda.is_available():
        print("no usable GPU: toy sizes; the results are not valid for a GPU", flush=True)
    parts = {name: {"status": "not begun", "seconds": 0.0} for name in names}
    results = {"facts": suite_report.facts(ROOT) | {"set": options.set}, "parts": parts}

    def save() -> None:
        write_json(options.out / "suite.json", results)
        with atomic_file(options.out / "performance.md", overwrite=True) as file:
            file.write(suite_report.markdown(results).encode())

    save()
    with (
        tempfile.TemporaryDirectory(prefix="gpu-suite-", ignore_cleanup_errors=True) as scratch,
        open(options.out / "suite.log", "w+") as log,
    ):
        data = (options.data or synthetic.images(Path(scratch), 512)).resolve()
        for index, name in enumerate(names):
            left = seconds - (time.monotonic() - STARTED)
            later = sum(LIMITS[other] for other in names[index + 1 :])
            limit = max(left - later, min(LIMITS[name], left))
            folder = Path(scratch, name)
            folder.mkdir()
            if reason := reason_to_skip(name):
                parts[name]["status"] = f"left out: {reason}"
            elif limit < MIN_PART_SECONDS:
                parts[name]["status"] = "skipped: no time"
            else:
                run_part(parts[name], command_of(name, data, folder), folder, limit, log, save)
                for file in (*folder.glob("*.png"), *folder.glob("junit.xml")):
                    shutil.copy(file, options.out / file.name.replace("junit", name))
            save()
            print("{}: {status} ({seconds:.0f} s)".format(name, **parts[name]), flush=True)
    print((options.out / "performance.md").read_text())
    statuses = [part["status"] for part in parts.values()]
    return int(any(s != "ok" and (not s.startswith("left") or "time" in s) for s in statuses))


def run_part(
    part: dict, command: list[str], folder: Path, limit: float, log, save: Callable[[], None]
) -> None:
    """Run a part and record its status and results in `part`, also if it fails."""
    print(f"\n==== {' '.join(command)}", file=log, flush=True)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    changes = {"PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
    started, begin = time.monotonic(), os.fstat(log.fileno()).st_size
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, process_group=0,
        env={"TRITON_INTERPRET": "0"} | os.environ | changes,
    )  # fmt: skip
    part |= {"status": "interrupted", "limit": limit}
    try:
        while process.poll() is None and part["seconds"] < limit:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(1, max(0, limit - part["seconds"])))
            part["seconds"] = time.monotonic() - started
            if collect(part, folder):
                save()
        part["status"] = {None: f"timed out after {limit:.0f} s", 0: "ok"}.get(
            process.returncode, f"failed with {process.returncode}"
        )
    finally:
        with contextlib.suppress(ProcessLookupError):  # also its child processes
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        collect(part, folder)
        save()
    if part["status"] == "ok" and ("unreadable" in part or "result" not in part):
        part["status"] = f"failed: {part.get('unreadable', 'no result file')}"
    if part["status"] != "ok":
        log.seek(max(begin, os.fstat(log.fileno()).st_size - 4000))
        print(log.read(), flush=True)
        log.seek(0, os.SEEK_END)


def collect(part: dict, folder: Path) -> bool:
    """Read the results of a part if possible; returns whether they changed."""
    before = part.get("result"), part.get("unreadable")
    for file in folder.glob("*.json"):  # result.json, or the profile.json of `step`
        try:
            part["result"] = json.loads(file.read_bytes())
            part.pop("unreadable", None)
        except ValueError as error:
            part["unreadable"] = f"{file.name} cannot be read: {error}"
    return before != (part.get("result"), part.get("unreadable"))


def reason_to_skip(name: str) -> str:
    """Why a part cannot run here; empty if it can."""
    import torch

    if name in ("correctness", "compiled"):
        if not torch.cuda.is_available():
            return "no GPU"
        if not is_installed("pytest"):
            return "pytest is not installed"
    return "DALI is not installed" if name == "dali" and not is_installed("nvidia.dali") else ""


def command_of(name: str, data: Path, folder: Path) -> list[str]:
    """The command of a part, which writes `folder`/result.json."""
    out = str(folder / "result.json")
    return [sys.executable, "tools/suite_parts.py", name, out, str(data)]


if __name__ == "__main__":
    sys.exit(main())
