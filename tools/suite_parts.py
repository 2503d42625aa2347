"""The parts of `gpu_suite.py` that are benchmarks of single rooms: kernels, loss, loader.

python tools/suite_parts.py NAME RESULT.json [DATA.beton]
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.pop(0)  # this folder, in which profile.py would hide the standard library's `profile`
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from bt_fast import perf
from bt_fast.lars import LARS
from bt_fast.loss import barlow_twins_loss
from bt_fast.model import BarlowTwins
from pipelines import augment
from pipelines.beton import BetonReader
from pipelines.crop import RandomResizedCrop
from pipelines.flags import usable_cores
from pipelines.loader import NativeLoader
from pipelines.order import view_keys
from tools import reference, synthetic
from tools.timing import images_per_second, seconds_per_call

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
BUDGET = 0.7 if ON_GPU else 0.05


def attempt(function) -> dict:
    """What a function returns, or the reason why it did not."""
    try:
        return function()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    finally:
        if ON_GPU:
            torch.cuda.empty_cache()


def kernels() -> dict:
    """Augmentation and LARS: every way there is."""
    result = {"augment": attempt(augmentations), "lars": attempt(optimizers)}
    if ON_GPU:
        result["tiles"] = attempt(tiles)
    return result


def batch_of_views() -> tuple[torch.Tensor, augment.Draw, int]:
    n, size = (512, 224) if ON_GPU else (8, 32)
    images = torch.randint(0, 256, (n, size // 8, size // 8, 3), dtype=torch.uint8)
    images = images.repeat_interleave(8, 1).repeat_interleave(8, 2).contiguous()
    keys = view_keys(np.arange(n // 2), seed=0, epoch=0, view=0)
    draws = [augment.draw(branch, keys) for branch in (augment.VIEW_A, augment.VIEW_B)]
    return images.to(DEVICE), augment.join(*draws), n


def augmentations() -> dict:
    """us per view, of half view A and half view B."""
    images, parameters, n = batch_of_views()
    there = parameters.to(DEVICE)
    compiled = torch.compile(augment.apply, dynamic=False)
    dtype = torch.bfloat16
    ways = {
        "definition": lambda: augment.apply(images, parameters, dtype=dtype),
        "definition, compiled": lambda: compiled(images, there, dtype=dtype),
    }
    if ON_GPU:
        from pipelines import augment_triton

        ways["fused"] = lambda: augment_triton.apply(images, parameters, dtype=dtype)
    result = {}
    for name, way in ways.items():
        seconds, host = seconds_per_call(way, DEVICE, BUDGET)
        result[name] = {"us_per_view": 1e6 * seconds / n, "host_us_per_view": 1e6 * host / n}
    return result


def tiles() -> dict:
    """us per view of the fused kernels at other tile sizes and numbers of warps."""
    from pipelines import augment_triton

    images, parameters, n = batch_of_views()
    result = {}
    for tile, warps in ((64, 4), (64, 8), (64, 16), (32, 4), (32, 2), (128, 8), (128, 16)):
        augment_triton.TILE, augment_triton.INNER = tile, tile - 2 * augment_triton.REACH
        augment_triton.NUM_WARPS = warps

        def way() -> dict:
            seconds, _ = seconds_per_call(
                lambda: augment_triton.apply(images, parameters, dtype=torch.bfloat16),
                DEVICE,
                BUDGET / 2,
            )
            return {"us_per_view": 1e6 * seconds / n}

        result[f"tile {tile}, {warps} warps"] = attempt(way)
    return result


def optimizers() -> dict:
    """ms and kernel launches of one LARS step of ResNet-50 and its projector."""
    projector = (8192, 8192, 8192) if ON_GPU else (64, 64, 64)
    model = BarlowTwins("resnet50", projector).to(DEVICE).to(memory_format=torch.channels_last)
    parameters = list(model.parameters())
    for p in parameters:
        p.grad = torch.randn_like(p)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim <= 1]},
    ]
    ways = {
        "plain loop": reference.Lars(groups, 1e-6, weight_decay=1e-6),
        "foreach": LARS(groups, 1e-6, weight_decay=1e-6, fused=False),
    }
    if ON_GPU:
        ways["fused"] = LARS(groups, 1e-6, weight_decay=1e-6, fused=True)
    result = {}
    num_bytes = 28 * sum(p.numel() for p in parameters)
    for name, optimizer in ways.items():
        seconds, host = seconds_per_call(optimizer.step, DEVICE, BUDGET)
        launches = 0
        if ON_GPU:
            activities = [torch.profiler.ProfilerActivity.CUDA]
            with torch.profiler.profile(activities=activities) as profile:
                optimizer.step()
                torch.cuda.synchronize()
            events = [event for event in profile.events() if "Mem" not in event.name]
            launches = sum(event.device_type.name == "CUDA" for event in events)
        result[name] = {
            "ms": 1e3 * seconds,
            "host_ms": 1e3 * host,
            "launches": launches,
            "GB_per_s": num_bytes / seconds / 1e9,
        }
    return result


def loss() -> dict:
    """ms and peak memory of the objective and its gradient at N = 2048, dense and Gram."""
    n = 2048 if ON_GPU else 64
    result = {}
    for d in (8192, 16_384, 65_536) if ON_GPU else (256, 512):
        for method in ("dense", "gram"):

            def way(d=d, method=method) -> dict:
                z = [torch.randn(n, d, device=DEVICE, requires_grad=True) for _ in range(2)]
                if ON_GPU:
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()

                def step() -> None:
                    z[0].grad = z[1].grad = None
                    barlow_twins_loss(*z, method=method).backward()

                seconds, _ = seconds_per_call(step, DEVICE, BUDGET)
                peak = torch.cuda.max_memory_allocated() - before if ON_GPU else 0
                return {"ms": 1e3 * seconds, "peak_GB": peak / 1e9}

            result[f"D = {d}, {method}"] = attempt(way)
    return result


def loader(data: Path | None) -> dict:
    """Images/s of the native loader at 1, 2, 4 ... threads, and how far from linear."""
    cores, result = usable_cores(), {}
    with tempfile.TemporaryDirectory() as scratch:
        path = data or synthetic.images(Path(scratch), 512)
        reader = BetonReader(path)
        n = min(256, len(reader))
        for threads in [t for t in (1, 2, 4, 8, 16, 32) if t <= cores]:
            native = NativeLoader(
                reader, RandomResizedCrop(), batch_size=n, num_threads=threads, pin_memory=ON_GPU
            )
            batches = native.batches(0, 1 << 40)
            cpu = torch.device("cpu")
            rate = images_per_second(batches, n, cpu, 5.0 if ON_GPU else 0.5)
            batches.close()  # type: ignore[attr-defined]
            native.cutter.pool.shutdown(cancel_futures=True)
            first = result.get("1 threads", {"images_per_s": rate})["images_per_s"]
            result[f"{threads} threads"] = {
                "images_per_s": rate,
                "efficiency": rate / (first * threads),
            }
    return result


def main() -> None:
    name, out = sys.argv[1], Path(sys.argv[2])
    data = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    perf.apply()
    parts = {"kernels": kernels, "loss": loss, "loader": lambda: loader(data)}
    result = parts[name]()
    print(json.dumps(result, indent=1))
    out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
