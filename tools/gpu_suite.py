"""Everything that only a GPU can tell, in one call of at most nine minutes.

    python tools/gpu_suite.py --out results                      on a GPU
    python tools/gpu_suite.py --out results --data imagenet.beton
    python tools/gpu_suite.py --parts loss kernels               only these

Every part runs in a process of its own with a limit of its own, so that one that fails or hangs
loses nothing of the others. Writes suite.json (everything), performance.md (tables for
docs/performance.md), suite.log (what the parts printed) and profile.png. Without a GPU the same
code runs at toy sizes, to find mistakes before a GPU is at hand.
"""

import _checkout  # noqa: F401  # isort: skip

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from pipelines.flags import parse_flags

ROOT = Path(__file__).resolve().parents[1]

# In the order of their worth, with their limits in seconds.
PARTS = {
    "correctness": 200,
    "profile": 240,
    "kernels": 90,
    "loss": 90,
    "loader": 60,
    "dali": 90,
    "reduce-overhead": 150,
    "deterministic": 120,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """Run all GPU checks and benchmarks."""

    out: Path = Path("gpu-suite")
    """Folder for the results."""
    data: Path | None = None
    """A .beton of real images. Default: synthetic ones."""
    minutes: float = 9.0
    """Time for everything; parts that would not begin in it are left out, and listed."""
    parts: tuple[str, ...] = tuple(PARTS)
    """Which, in this order."""


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options = parse_flags(Suite, "gpu_suite.py", arguments)
        unknown = set(options.parts) - set(PARTS)
        if unknown:
            raise ValueError(f"--parts {' '.join(sorted(unknown))}: there is {' '.join(PARTS)}")
        return run(options)
    except (ValueError, OSError) as error:
        print(f"gpu_suite.py: {error}", file=sys.stderr)
        return 2


def run(options: Suite) -> int:
    from tools import suite_report

    if (options.out / "suite.json").exists():
        raise ValueError(f"--out {options.out} holds results already; choose another folder")
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    results: dict = {"facts": suite_report.facts(ROOT), "parts": {}}
    with open(options.out / "suite.log", "w") as log:
        for name in options.parts:
            left = 60 * options.minutes - (time.monotonic() - started)
            results["parts"][name] = one(name, options, min(PARTS[name], left), log)
            status, seconds = (results["parts"][name][key] for key in ("status", "seconds"))
            print(f"{name}: {status} ({seconds:.0f} s)", flush=True)
            # After every part, so that whatever ends the suite early loses one part at most.
            (options.out / "suite.json").write_text(json.dumps(results, indent=1) + "\n")
            (options.out / "performance.md").write_text(suite_report.markdown(results))
    shutil.rmtree(options.out / "parts", ignore_errors=True)
    print((options.out / "performance.md").read_text())
    good = ("ok", "left out: no GPU", "left out: no DALI")
    return int(any(part["status"] not in good for part in results["parts"].values()))


def one(name: str, options: Suite, limit: float, log) -> dict:
    """Run one part -> {"status", "seconds", "result"}, whatever happens in it."""
    folder = (options.out / "parts" / name).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    command = command_of(name, options, folder)
    if name == "dali" and not has_dali():
        return {"status": "left out: no DALI", "seconds": 0.0}
    if command is None:
        return {"status": "left out: no GPU", "seconds": 0.0}
    if limit < 10:
        return {"status": "left out: no time", "seconds": 0.0}
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    print(f"\n==== {name}: {' '.join(command)}", file=log, flush=True)
    started = time.monotonic()
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT,
        start_new_session=True,
    )  # fmt: skip
    try:
        returned = process.wait(limit)
        status = "ok" if returned == 0 else f"failed with {returned}"
    except subprocess.TimeoutExpired:
        status = f"stopped after {limit:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):  # its own processes too
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    record: dict = {"status": status, "seconds": time.monotonic() - started}
    for result in (folder / "result.json", folder / "profile.json"):
        with contextlib.suppress(OSError, ValueError):
            record["result"] = json.loads(result.read_text())
    with contextlib.suppress(OSError, ValueError, KeyError):
        record["tests"] = counts_of_tests(folder / "junit.xml")
    if name == "profile" and (folder / "profile.png").exists():
        shutil.copy(folder / "profile.png", options.out / "profile.png")
    return record


def counts_of_tests(report: Path) -> dict:
    """Counts of a JUnit report, and the names of what failed."""
    suite = ElementTree.parse(report).getroot()[0]
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = [
        case.get("name")
        for case in suite
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return counts | {"failed": failed}


def command_of(name: str, options: Suite, out: Path) -> list[str] | None:
    """The command of a part, which leaves one JSON file in `out`; None if it needs a GPU."""
    import torch

    python, on_gpu = sys.executable, torch.cuda.is_available()
    if name == "correctness":
        return (
            [python, "-m", "pytest", "-q", "--tb=short", "tests/test_cuda.py"] if on_gpu else None
        )
    if name in ("profile", "reduce-overhead", "deterministic"):
        command = [python, "tools/profile.py", "--out", str(out)]
        if options.data is not None:
            command += ["--data", str(options.data.resolve())]
        if not on_gpu:
            command += ["--recipe=demo", "--batch-size=4", "--size=32", "--seconds=0.05"]
        if name == "profile":
            rivals = ["reference", *(["kornia"] if installed("kornia") else [])]
            command += ["--against", *rivals, "--gpus", "32"]
        elif name == "deterministic":
            command += ["--deterministic"]
        elif on_gpu:
            command += ["--compile", name]
        return command
    if name == "loss":
        toy = (
            [] if on_gpu else ["--samples", "64", "--dimensions", "256", "512", "--seconds", "0.05"]
        )
        return [python, "tools/bench_loss.py", "--out", str(out / "result.json"), *toy]
    command = [python, "tools/suite_parts.py", name, str(out / "result.json")]
    if options.data is not None:
        command.append(str(options.data.resolve()))
    return command


def has_dali() -> bool:
    from pipelines.dali_loader import is_installed

    return is_installed()


def installed(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


if __name__ == "__main__":
    sys.exit(main())
