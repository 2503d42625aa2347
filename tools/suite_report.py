"""The results of `gpu_suite.py` as the Markdown of docs/performance.md."""

import platform
import subprocess
import time
from pathlib import Path

CEILING_VIEWS = 10_000  # views/s at which ResNet-50's bf16 traffic fills an H200's memory bandwidth
MLPERF_VIEWS = 7_960  # views/s per H200 of MLPerf Training v4.0's ResNet-50


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
    on_gpu = torch.cuda.is_available()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit or "unknown",
        "device": torch.cuda.get_device_name() if on_gpu else "no GPU: toy sizes, no figures",
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "triton": _version("triton"),
        "cuDNN": str(torch.backends.cudnn.version()) if on_gpu else "-",
        "python": platform.python_version(),
    }


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "-"


def markdown(results: dict) -> str:
    lines = ["# Figures from one run of `python tools/gpu_suite.py`", ""]
    lines += [", ".join(f"{name} {value}" for name, value in results["facts"].items()), ""]
    parts = results["parts"]
    lines += _table(
        "Parts",
        ["part", "status", "seconds"],
        [[name, part["status"], f"{part['seconds']:.0f}"] for name, part in parts.items()],
    )
    tests = parts.get("correctness", {}).get("tests")
    if tests:
        failed = ", ".join(tests["failed"]) or "none"
        lines += [f"{tests['tests']} tests of CUDA paths, failed: {failed}.", ""]
    if "result" in parts.get("profile", {}):
        lines += _profile(parts["profile"]["result"])
    for name in ("kernels", "loss", "loader", "dali"):
        for title, rows in parts.get(name, {}).get("result", {}).items():
            lines += _rows(title, rows)
    for name in ("reduce-overhead", "deterministic"):
        if "result" in parts.get(name, {}) and "result" in parts.get("profile", {}):
            step, plain = (
                parts[part]["result"]["step_without_data_s"] for part in (name, "profile")
            )
            lines += [
                f"`{name}`: {1e3 * step:.2f} ms a step, {plain / step:.3f} times as fast.",
                "",
            ]
    return "\n".join(lines)


def _table(title: str, columns: list[str], rows: list[list[str]]) -> list[str]:
    lines = [f"## {title}", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _profile(found: dict) -> list[str]:
    step, n = found["step_s"], found["config"]["batch_size"]
    alone = found["step_without_data_s"]
    seconds = {name: stage["seconds"] for name, stage in found["stages"].items()}
    rows = [
        [name, f"{1e3 * value:.3f}", f"{n / value:,.0f}", f"{100 * value / step:.2f} %"]
        for name, value in [*seconds.items(), ("step, views there", alone), ("step", step)]
        if value > 0
    ]
    lines = _table(
        f"The step: {found['title']}", ["stage", "ms", "images/s", "share of the step"], rows
    )
    views, rivals = 2 * n / alone, found["rivals_s"]
    small = sum(seconds[name] for name in ("augment", "loss", "optimizer"))
    aims = [
        ["augmentation, us per view", "1", f"{1e6 * seconds['augment'] / (2 * n):.3f}"],
        ["from JPEGs / on views that are there", "97 %", f"{100 * alone / step:.1f} %"],
        ["augmentation + loss + LARS, share of the step", "5 %", f"{100 * small / alone:.2f} %"],
        ["views/s", "5,000, then 7,200", f"{views:,.0f}"],
        ["share of the bandwidth ceiling", "", f"{100 * views / CEILING_VIEWS:.0f} %"],
        ["share of MLPerf's rate", "", f"{100 * views / MLPERF_VIEWS:.0f} %"],
    ]
    if "reference" in rivals:
        ratio = rivals["reference"]["step"] / alone
        aims.append(["x the released code's step", "2", f"{ratio:.2f}"])
    if "kornia" in rivals:
        ratio = rivals["kornia"]["augment"] / seconds["augment"]
        aims.append(["x kornia's augmentation", "20", f"{ratio:.1f}"])
    else:
        aims.append(["x kornia's augmentation", "20", "kornia is not installed"])
    lines += _table("Aims", ["what", "aim", "found"], aims)
    for rival, theirs in rivals.items():
        rows = [[name, f"{1e3 * value:.3f}"] for name, value in theirs.items()]
        lines += _table(f"{rival}'s way of the same stages", ["stage", "ms"], rows)
    ceilings = found["ceilings"]
    lines += [
        f"Ceilings measured in the same run: {ceilings['flops'] / 1e12:.0f} TFLOP/s,"
        f" {ceilings['memory'] / 1e12:.2f} TB/s, {ceilings['link'] / 1e9:.0f} GB/s from the host."
        f" Peak memory {found['peak_memory_bytes'] / 2**30:.1f} GiB. Verdict: {found['verdict']}",
        "",
    ]
    return lines


def _rows(title: str, found: dict) -> list[str]:
    """One row per entry, one column per figure."""
    columns = list(dict.fromkeys(key for figures in found.values() for key in figures))
    rows = [
        [name, *(_figure(figures.get(column, "")) for column in columns)]
        for name, figures in found.items()
    ]
    return _table(title, ["", *columns], rows)


def _figure(value) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
