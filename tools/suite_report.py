"""Report of `gpu_suite.py` as Markdown: targets, outcomes of tests, and the tables of all parts."""

import os
import subprocess
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from bt_fast.run.directory import environment
from bt_fast.runtime import choose_runtime
from tools.results import as_text

# By part of the GPU's name: views/s of ResNet-50 in MLPerf Training v4.0, and two targets.
CARDS = {"H200": (7_960, 5_000, 7_200), "H100": (7_160, 4_500, 6_450)}


def facts(root: Path) -> dict[str, object]:
    """Versions, commit and hardware."""
    found = environment(choose_runtime("auto", "auto", "auto"))
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        found["device"] += " (no GPU: toy sizes, no figures)"
    try:
        command = ["git", "describe", "--always", "--dirty"]
        described = subprocess.run(command, cwd=root, capture_output=True, text=True).stdout
    except OSError:  # a machine without git
        described = ""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "-"
    return found | {
        # The variable is for a copy without .git.
        "commit": described.strip() or os.environ.get("BT_FAST_COMMIT", "unknown"),
        "triton": triton,
        "cuDNN": str(torch.backends.cudnn.version()) if on_gpu else "-",
    }


def markdown(results: dict) -> str:
    """The report; what a part has not measured is left out."""
    found = {name: part.get("result", {}) for name, part in results["parts"].items()}
    lines = ["# Figures from one run of `python tools/gpu_suite.py`", ""]
    lines += [", ".join(f"{name} {value}" for name, value in results["facts"].items()), ""]
    parts = {
        name: {"status": part["status"], "seconds": round(part["seconds"])}
        for name, part in results["parts"].items()
    }
    targets = {
        quantity: {"target": target, "measured": measured}
        for quantity, target, measured in _targets(found, results["facts"]["device"])
    }
    lines += _results("Parts", parts) + _results("Targets", targets)
    for name, result in found.items():
        if name == "step":  # a profile
            lines += [line for table in result.get("tables", ()) for line in _table(*table)]
        else:
            for title, rows in result.items():
                lines += _tests(name, rows) if title == "tests" else _results(title, rows)
    return "\n".join(lines)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence]) -> list[str]:
    lines = [f"| {' | '.join(map(as_text, row))} |" for row in rows]
    head = [f"## {title}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return [*head, *lines, ""] if rows else []


def _results(title: str, rows: dict[str, dict]) -> list[str]:
    """A row per entry, a column per quantity."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    values = [[name, *(row.get(column, "") for column in columns)] for name, row in rows.items()]
    return _table(title, ["", *columns], values)


def _tests(part: str, tests: dict[str, dict]) -> list[str]:
    outcomes = [test["outcome"] for test in tests.values()]
    counts = ", ".join(f"{outcomes.count(o)} {o}" for o in sorted(set(outcomes)))
    failed = [f"- `{name}`: `{test['error']}`" for name, test in tests.items() if "error" in test]
    return [f"Tests, `{part}`: {counts}.", "", *failed, ""]


def _targets(found: dict[str, dict], device: str) -> Iterator[tuple[str, str, str]]:
    """Yields (quantity, target, measured value) of all available results."""
    profile = found.get("step", {})
    alone, step = profile.get("step_without_data_s"), profile.get("step_s")
    if alone:
        rate = 2 * profile["config"]["batch_size"] / alone
        card = next((CARDS[name] for name in CARDS if name in device), None)
        target = "{1:,}, then {2:,}".format(*card) if card else "none for this GPU"
        yield "views/s, views on device", target, f"{rate:,.0f}"
        if card:
            yield "fraction of MLPerf's rate on this GPU", "", f"{rate / card[0]:.0%}"
    if alone and step:
        yield "rate from JPEGs / rate on views on device", ">= 97 %", f"{alone / step:.1%}"
    stages = {name: stage["seconds"] for name, stage in profile.get("stages", {}).items()}
    if alone and {"forward", "backward"} <= stages.keys():
        rest = 1 - (stages["forward"] + stages["backward"]) / alone
        yield "step without encoder and projector", "<= 4 %", f"{rest:.1%}"
    for rows in found.get("kernels", {}).values():
        views = {name: row.get("us per view") for name, row in rows.items()}
        if fused := views.get("fused"):
            yield "augmentation, us per view", "<= 1", f"{fused:.3f}"
            for other in ("kornia", "definition, compiled"):
                if microseconds := views.get(other):
                    yield f"times as fast as {other}", ">= 20", f"{microseconds / fused:.1f}"
    for rows in found.get("rivals", {}).values():
        if alone and "step" in rows:
            ratio = rows["step"]["ms"] / (1e3 * alone)
            yield "times as fast as the released code's step", ">= 2", f"{ratio:.2f}"
