"""Time and peak memory of the loss and its gradient, dense against Gram, in one run.

    python tools/bench_loss.py
    python tools/bench_loss.py --samples 512 --dimensions 16384

Memory is counted in addition to the embeddings. A dense case that does not fit is skipped, and the
memory that it needs is reported.
"""

import _checkout  # noqa: F401  # isort: skip

import functools
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from bt_fast.cli import run_command
from bt_fast.doctor.hardware import free_memory
from bt_fast.loss import barlow_twins_loss
from bt_fast.runtime import apply_switches
from pipelines.common.flags import parse_flags
from tools.results import Results
from tools.timing import peak_memory, seconds_per_call


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """Compare the dense and the Gram form of the loss."""

    samples: int = 2048
    """Batch size N."""
    dimensions: tuple[int, ...] = (8192, 16_384, 65_536)
    """Dimensions D of the embeddings, the last width of the projector."""
    seconds: float = 1.0
    """Time for each measurement, seconds."""
    out: Path | None = None
    """JSON file for the results."""


def measure(n: int, d: int, method: str, budget: float) -> dict[str, float | str]:
    """Measure one case, on the GPU if there is one."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    free = torch.cuda.mem_get_info()[0] if on_gpu else free_memory()
    needed = 4.5 * 4 * d * d if method == "dense" else 0  # C, its square, its gradient, ...
    if needed > free:
        return {"error": f"needs about {needed / 1e9:.0f} GB"}
    apply_switches()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    z = [torch.randn(n, d, device=device, requires_grad=True) for _ in range(2)]
    before = peak_memory(device)

    def step() -> None:
        z[0].grad = z[1].grad = None
        barlow_twins_loss(*z, method=method).backward()

    seconds, _ = seconds_per_call(step, device, budget)
    return {"ms": 1e3 * seconds, "peak GB": (peak_memory(device) - before) / 1e9}


def in_new_process(case: Callable[[], dict]) -> dict:
    """Run a case in a new process, because the peak memory of a process never decreases."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(case).result()


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_flags(Benchmark, "bench_loss.py", arguments)
    results = Results(options.out)
    for d in options.dimensions:
        for method in ("gram", "dense"):
            case = functools.partial(measure, options.samples, d, method, options.seconds)
            results.measure(
                f"The loss and its gradient, N = {options.samples}",
                f"D = {d}, {method}",
                case if torch.cuda.is_available() else functools.partial(in_new_process, case),
            )
    return min(results.num_failed, 1)


if __name__ == "__main__":
    sys.exit(run_command("bench_loss.py", main))
