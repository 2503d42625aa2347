"""Report of `gpu_suite.py` as Markdown for docs/performance.md."""

import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# By part of the GPU's name: views/s of ResNet-50 in MLPerf Training v4.0, and two targets.
CARDS = {"H200": (7_960, 5_000, 7_200), "H100": (7_160, 4_500, 6_450)}

FUSED_NORM_TESTS = re.compile(r"fused_(norms|step)|\bfused\]")


def facts(root: Path) -> dict[str, str]:
    """Versions, commit and hardware."""
    import torch
    import torchvision

    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True
        ).stdout.strip()
    except OSError:  # a machine without git
        commit = ""
    commit = commit or os.environ.get("BT_FAST_COMMIT", "")  # for a copy without .git
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "-"
    on_gpu = torch.cuda.is_available()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit or "unknown",
        "device": torch.cuda.get_device_name() if on_gpu else "no GPU: toy sizes, no figures",
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "triton": triton,
        "cuDNN": str(torch.backends.cudnn.version()) if on_gpu else "-",
        "python": platform.python_version(),
    }


def markdown(results: dict) -> str:
    """The report; a section that cannot be written contains the error instead."""
    facts = ", ".join(f"{name} {value}" for name, value in results["facts"].items())
    lines = ["# Figures from one run of `python tools/gpu_suite.py`", "", facts, ""]
    for section in (_parts, _targets, _tests, _step, _breakdown, _rivals, _tables):
        try:
            lines += section(results)
        except Exception as error:
            name = section.__name__.strip("_")
            lines += [f"`{name}` cannot be written: {type(error).__name__}: {error}", ""]
    return "\n".join(lines)


def _result(results: dict, part: str) -> dict:
    return results["parts"].get(part, {}).get("result", {})


def _table(title: str, columns: list[str], rows: list[list[str]]) -> list[str]:
    lines = [f"## {title}", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _parts(results: dict) -> list[str]:
    rows = [
        [name, part["status"], f"{part['seconds']:.0f}", f"{part.get('limit', 0):.0f}"]
        for name, part in results["parts"].items()
    ]
    return _table("Parts", ["part", "status", "seconds", "limit"], rows)


def _targets(results: dict) -> list[str]:
    rows = [list(row) for row in _comparisons(results)]
    return _table("Targets", ["quantity", "target", "measured"], rows) if rows else []


def _comparisons(results: dict) -> Iterator[tuple[str, str, str]]:
    """Yields (quantity, target, measured value) of all available results."""
    device, profile = results["facts"]["device"], _result(results, "step")
    alone, step = profile.get("step_without_data_s"), profile.get("step_s")
    seconds = {name: stage["seconds"] for name, stage in profile.get("stages", {}).items()}
    if alone:
        rate = 2 * profile["config"]["batch_size"] / alone
        card = next((CARDS[name] for name in CARDS if name in device), None)
        target = "{1:,}, then {2:,}".format(*card) if card else "none for this GPU"
        yield "views/s, views on device", target, f"{rate:,.0f}"
        if card:
            yield "fraction of MLPerf's rate on this GPU", "", f"{rate / card[0]:.0%}"
    tables = [t for part in ("norms", "variants") for t in _result(results, part).values()]
    variants = {name: row.get("ms") for table in tables for name, row in table.items()}
    default = variants.pop("--norm=compiled --compile=default", None) or 1e3 * (alone or 0)
    for name, ms in variants.items():
        if default and ms:
            target = ">= 1.3" if "fused --compile=default" in name else ""
            yield f"`{name}`, times as fast as the default", target, f"{default / ms:.2f}"
    if alone and step:
        yield "rate from JPEGs / rate on views on device", ">= 97 %", f"{alone / step:.1%}"
    if step and {"forward", "backward"} <= seconds.keys():
        encoder = seconds["forward"] + seconds["backward"]
        yield "step without encoder and projector", "<= 4 %", f"{1 - encoder / step:.1%}"
    for rows in _result(results, "kernels").values():
        views = {name: row.get("us per view") for name, row in rows.items()}
        if fused := views.get("fused"):
            yield "augmentation, us per view", "<= 1", f"{fused:.3f}"
            for other in ("kornia", "definition, compiled"):
                if microseconds := views.get(other):
                    yield f"times as fast as {other}", ">= 20", f"{microseconds / fused:.1f}"
    for rows in _result(results, "rivals").values():
        if alone and "step" in rows:
            ratio = rows["step"]["ms"] / (1e3 * alone)
            yield "times as fast as the released code's step", ">= 2", f"{ratio:.2f}"


def _tests(results: dict) -> list[str]:
    lines = []
    for part in ("correctness", "compiled"):
        tests = _result(results, part).get("tests", {})
        fused = {name: test for name, test in tests.items() if FUSED_NORM_TESTS.search(name)}
        for subject, group in (("CUDA paths", tests), ("`--norm fused` among them", fused)):
            outcomes = [test["outcome"] for test in group.values()]
            counts = ", ".join(f"{outcomes.count(o)} {o}" for o in sorted(set(outcomes)))
            if group:
                lines += [f"Tests of {subject}, `{part}`: {counts}.", ""]
        failed = {name: test["error"] for name, test in tests.items() if "error" in test}
        lines += [f"- `{name}`: `{error}`" for name, error in failed.items()] + [""] * bool(failed)
    return lines


def _step(results: dict) -> list[str]:
    """The stages, training from JPEGs, and the machine's peak rates."""
    found = _result(results, "step")
    if not found:
        return []
    n, step, alone = found["config"]["batch_size"], found["step_s"], found["step_without_data_s"]
    seconds = {name: stage["seconds"] for name, stage in found["stages"].items()}
    seconds |= {"step, views on device": alone, "step, from JPEGs": step}
    total = alone or step or float("inf")
    rows = [
        [name, f"{1e3 * value:.3f}", f"{n / value:,.0f}", f"{value / total:.2%}"]
        for name, value in seconds.items()
        if value > 0
    ]
    columns = ["stage", "ms", "images/s", "fraction of the step, views on device"]
    lines = _table(f"The step: {found['title']}", columns, rows)
    if alone and step:
        lines += [
            f"Training from JPEGs: {n / step:,.0f} images/s, {alone / step:.1%} of the"
            f" {n / alone:,.0f} on views on the device.",
            "",
        ]
    if ceilings := found["ceilings"]:
        lines += [
            f"Peak rates measured in the same process: {ceilings['flops'] / 1e12:.0f} TFLOP/s,"
            f" {ceilings['memory'] / 1e12:.2f} TB/s, {ceilings['link'] / 1e9:.0f} GB/s from the"
            f" host. Peak memory {found['peak_memory_bytes'] / 2**30:.1f} GiB,"
            f" {found['prepare_s']:.0f} s to compile. Verdict: {found['verdict']}",
            "",
        ]
    return lines


def _breakdown(results: dict) -> list[str]:
    """The step by class of work, the flags that would help, the longest kernels."""
    profile = _result(results, "step")
    if not (found := profile.get("breakdown")):
        return []
    rows, kernels = [], found["kernels"]
    for name, part in found["parts"].items():
        seconds, ceiling = part["seconds"] or 1.0, (profile["ceilings"] or {}).get(part["ceiling"])
        rate = (part["flop"] or part["bytes"]) / seconds
        fraction, reached = f"{part['seconds'] / found['step']:.1%}", rate / (ceiling or math.inf)
        figures = [f"{1e3 * part['seconds']:.3f}", f"{1e3 * part['alone']:.3f}", fraction]
        rows.append([name, *figures, f"{part['launches']:.0f}", f"{rate:.4g}", f"{reached:.0%}"])
    columns = ["class", "ms", "ms alone", "fraction", "launches", "FLOP/s or B/s", "of the peak"]
    lines = _table(f"The step by class of work: {1e3 * found['step']:.2f} ms", columns, rows)
    lines += [*(f"- {switch}" for switch in profile["switches"]), ""]
    rows = [
        [f"`{k['name'][:100]}`", f"{k['ms']:.3f}", f"{k['launches']:.0f}", f"{k['share']:.1%}"]
        for k in kernels["longest"]
    ]
    title = f"The longest of {kernels['launches']:.0f} launches, {kernels['ms']:.1f} ms, per step"
    return lines + _table(title, ["kernel", "ms", "launches", "fraction"], rows)


def _rivals(results: dict) -> list[str]:
    """The released code's stages compared with those of the part `step`."""
    profile, lines = _result(results, "step"), []
    ours = {name: 1e3 * stage["seconds"] for name, stage in profile.get("stages", {}).items()}
    ours["step"] = 1e3 * (profile.get("step_without_data_s") or 0)
    ours["views"] = max(ours.get("loader", 0), ours.get("augment", 0))  # the two overlap
    for title, stages in _result(results, "rivals").items():
        rows = [
            [name, f"{row['ms']:.3f}", f"{ours[name]:.3f}", f"{row['ms'] / ours[name]:.2f}"]
            for name, row in stages.items()
            if ours.get(name)
        ]
        lines += _table(title, ["stage", "ms", "bt-fast, ms", "ratio"], rows)
    return lines


def _tables(results: dict) -> list[str]:
    """Tables of all other parts: a row per entry, a column per quantity."""
    lines: list[str] = []
    for part in ("kernels", "norms", "variants", "loss", "loader", "dali"):
        for title, found in _result(results, part).items():
            columns = list(dict.fromkeys(key for figures in found.values() for key in figures))
            rows = [
                [name, *(_figure(figures.get(column, "")) for column in columns)]
                for name, figures in found.items()
            ]
            lines += _table(title, ["", *columns], rows)
    return lines


def _figure(value) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
