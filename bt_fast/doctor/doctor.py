"""`bt-fast doctor`: a report on this machine, with a fix for every problem found.

Works without a GPU, without data and offline, in a few seconds. The module imports no package at
its top that a broken installation may lack. Rates are measured on a synthetic image and on --data.
"""

import itertools
import json
import os
import platform
import resource
import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bt_fast.doctor import hardware
from pipelines import __version__
from pipelines.common.atomic import require_place, write_text
from pipelines.common.console import plural
from pipelines.common.cpu import cpu_quota, usable_cores

if TYPE_CHECKING:
    from bt_fast.config import Config

# Batches in the native loader's memory on a GPU machine: one copied, one in use, three ahead.
NUM_BATCHES = 5
MIN_SHARED_MEMORY = 1 << 30  # NCCL's manual recommends it for containers


@dataclass(frozen=True, kw_only=True, slots=True)
class Doctor:
    """Check this machine: installation, hardware, speed of decoding and reading, problems."""

    recipe: str = "imagenet"
    """Recipe whose memory and disk space are estimated."""
    data: Path = Path("out.beton")
    """Training data whose disk is measured, if it exists."""
    run_dir: Path = Path("runs")
    """Folder in which runs will be written."""
    json: Path | None = None
    """File for the same report as JSON."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the report."""

    name: str
    value: str
    problem: str = ""  # empty: none
    fix: str = ""  # a command or an instruction
    broken: bool = False  # bt-fast cannot run with this problem


def run_doctor(options: Doctor) -> int:
    """Print the report; returns 0, or 1 if something is broken."""
    if options.json is not None:
        require_place(options.json, "--json")
        if options.json.exists():
            raise ValueError(f"--json {options.json} exists; remove it or choose another name")
    rows = []
    print(f"bt-fast {__version__} doctor\n")
    for row in diagnose(options):
        print(_wrapped(f"  {row.name:<15} {row.value}"), flush=True)
        rows.append(row)
    problems = [row for row in rows if row.problem]
    broken = any(row.broken for row in rows)
    if problems:
        print("\nTo fix:")
    for row in problems:
        print(f"  {row.name}{' (BROKEN)' if row.broken else ''}: {row.problem}\n      {row.fix}")
    print("\n" + ("bt-fast cannot run here" if broken else "bt-fast can run here"))
    if options.json is not None:
        content = {"bt_fast": __version__, "can_run": not broken, "rows": list(map(asdict, rows))}
        write_text(options.json, json.dumps(content, indent=2) + "\n")
    return int(broken)


def _wrapped(line: str) -> str:
    width = max(shutil.get_terminal_size((100, 24)).columns - 1, 60)
    return textwrap.fill(line, width, subsequent_indent=18 * " ", break_on_hyphens=False)


def diagnose(options: Doctor) -> Iterator[Row]:
    """Rows in the order of the report; after a missing required package there are no more."""
    yield Row("Python", f"{platform.python_version()}, {sys.executable}")
    required, optional = packages()
    yield required
    yield optional
    if required.broken:
        return
    try:
        import torch

        from bt_fast.distributed.collectives import World
        from bt_fast.recipes import RECIPES
        from bt_fast.runtime import choose_runtime
    except (ImportError, OSError) as error:  # a damaged installation
        problem = f"a package does not load: {error}"
        yield Row("loading", "fails", problem, "pip install --force-reinstall .", broken=True)
        return
    if options.recipe not in RECIPES:
        raise ValueError(f"--recipe {options.recipe} is not one of {', '.join(RECIPES)}")
    config = RECIPES[options.recipe]()
    ranks = max(torch.cuda.device_count(), 1)
    world = World(rank=0, size=ranks, local_rank=0, local_size=ranks)
    runtime = choose_runtime("auto", "auto", "auto", world)
    yield from gpus()
    if runtime.device.type == "cuda":
        yield compiler()
    yield cores()
    yield decoding()
    yield from data(options.data, config.num_threads())
    yield memory(config)
    yield from limits(ranks)
    try:
        yield from gpu_memory(config, ranks)
        yield disk_space(options.run_dir, config)
    except ValueError as error:
        yield Row("encoder", config.encoder, str(error), "pip install 'bt-fast[timm]'", broken=True)
    yield Row(
        "pretrain uses",
        f"{ranks} x {runtime.device.type}, {runtime.precision}, torch.compile"
        f" {runtime.compile}, loader {config.loader},"
        f" {plural(config.num_threads(ranks), 'decoding worker')}" + (" each" if ranks > 1 else ""),
    )


def packages() -> Iterator[Row]:
    """Versions of the required and the optional packages, and how to install missing ones."""
    from bt_fast.doctor import requirements

    by_extra = requirements.requirements()
    unmet = requirements.unmet()
    value = requirements.installed_versions([package.name for package in by_extra.pop("")])
    problem = f"missing or too old: {', '.join(unmet)}" if unmet else ""
    fix = f"pip install {' '.join(map(repr, unmet))}"
    yield Row("packages", value, problem, fix, broken=bool(unmet))
    others = ("all", "dev", "docs")
    extras = {e: [one.name for one in by_extra[e]] for e in by_extra if e not in others}
    names = [*itertools.chain(*extras.values()), "webdataset"]  # webdataset reads shards
    value = requirements.installed_versions(names)
    missing = [e for e, names in extras.items() if not all(map(requirements.version, names))]
    if missing:
        value += f"; more with pip install 'bt-fast[{','.join(missing)}]'"
    yield Row("optional", value)


def gpus() -> Iterator[Row]:
    """GPUs, driver and NCCL, and whether each GPU computes."""
    import torch

    driver = hardware.nvidia_driver()
    built = f"torch built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch for CPUs"
    value = f"{f'driver {driver}' if driver else 'no NVIDIA driver'}, {built}"
    if not torch.cuda.is_available():
        if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
            yield Row("GPU", f"hidden by CUDA_VISIBLE_DEVICES; {value}")
        elif driver is None:
            yield Row("GPU", f"none; {value}")
        else:
            fix = "install a newer driver, or the torch that fits it: https://pytorch.org"
            yield Row("GPU", value, "torch cannot use a GPU with this driver", fix, broken=True)
        return
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    value = f"{len(devices)} x {devices[0].name}, {devices[0].total_memory / 1e9:.0f} GB; {value}"
    try:
        for index in range(len(devices)):
            torch.ones(8, device=f"cuda:{index}").sum().item()
        yield Row("GPU", value)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        fix = "nvidia-smi shows its processes and errors; CUDA_VISIBLE_DEVICES selects others"
        yield Row("GPU", value, f"it does not compute: {reason}", fix, broken=True)
    if len(devices) > 1:
        has_nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
        value = ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else "missing"
        problem = "" if has_nccl else "training on several GPUs needs it"
        yield Row("NCCL", value, problem, "pip install --force-reinstall torch", not has_nccl)


def compiler() -> Row:
    """C compiler and Python.h, with which Triton and torch.compile build launchers of kernels."""
    path, header = hardware.c_compiler()
    problem = "" if path and header else "kernels cannot be built without it and Python.h"
    fix = "apt install gcc python3-dev"
    return Row("C compiler", path or "none", problem, fix, broken=path is None)


def cores() -> Row:
    """Cores that this process may use, by its affinity and a container's quota of CPU time."""
    value, quota = f"{usable_cores()} usable of {os.cpu_count()}", cpu_quota()
    return Row("CPU cores", value if quota is None else f"{value}, CPU time of {quota:g}")


def decoding() -> Row:
    """Speed of decoding and cropping, as in the loader."""
    rate, num_bytes = hardware.decode_rate()
    sample = f"a JPEG of {num_bytes // 1000} kB, two views"
    return Row("decoding", f"{rate:,.0f} images/s per core ({sample})")


def data(path: Path, num_threads: int) -> Iterator[Row]:
    """Whether the tables of --data are valid, and the speed of its disk."""
    from pipelines.loading.datasets import open_data

    convert = f"bt-convert IMAGE_FOLDER {path}"
    if not path.exists():
        yield Row("data", f"{path} does not exist yet; create it with: {convert}")
        return
    try:
        num_images = len(open_data(path, "--data"))
    except ValueError as error:
        yield Row("data", str(path), str(error), f"{convert} --overwrite", True)
        return
    files = sorted(path.glob("train-*.tar")) if path.is_dir() else [path]
    num_bytes = sum(file.stat().st_size for file in files)
    yield Row("data", f"{path}: {num_images:,} images, {num_bytes / 1e9:.2f} GB")
    rate, from_disk = hardware.read_rate(files[0], num_threads)
    source = "without the page cache" if from_disk else "perhaps from the page cache"
    value = f"{rate / 1e6:,.0f} MB/s, {rate / num_bytes * num_images:,.0f} images/s ({source})"
    yield Row("disk", value if rate else "not measured: the file is too small")


def memory(config: "Config") -> Row:
    """Free memory and the loader's need of it, which is page-locked on a machine with a GPU."""
    free = hardware.free_memory()
    need = NUM_BATCHES * 2 * config.batch_size * config.size**2 * 3  # uint8, two views
    value = f"{free / 1e9:.1f} GB free; the loader's batches take {need / 1e9:.1f} GB"
    if need < free / 2:
        return Row("memory", value + ", page-locked for GPUs")
    problem = f"batches of {config.batch_size} x 2 views take most of it"
    return Row("memory", value, problem, "bt-fast pretrain --batch-size N, or more machines")


def gpu_memory(config: "Config", num_gpus: int) -> Iterator[Row]:
    """The plan's rows on the recipe's memory and largest batches; a step must fit this GPU."""
    from bt_fast.plan import dry_run, gpus

    costs, gpu = dry_run.count_costs(config), gpus.first_gpu()
    num_gpus = next(n for n in range(num_gpus, 0, -1) if config.batch_size % n == 0)
    images = config.batch_size // num_gpus
    rows = dry_run.memory_and_rate_rows(config, costs, num_gpus, gpu)
    problem = fix = ""
    if gpu is not None:
        num_parts = dry_run.fitting_accumulate(config, costs, gpu, images, num_gpus)
        largest = dry_run.largest_batch(config, costs, gpu, num_gpus)
        problem = "" if num_parts == 1 else "a step does not fit into the memory of a GPU"
        flags = f"--gpus {num_gpus} --batch-size {num_gpus * largest}, or more GPUs"
        if num_parts:  # the same batch, at the cost of one more forward pass
            flags = f"--gpus {num_gpus} --accumulate {num_parts}, or {flags}"
        if not largest:
            flags = "--size 160, or a smaller --encoder or --projector"
        fix = f"bt-fast pretrain --recipe {config.recipe} {flags}"
    memory = f"recipe {config.recipe}, {images} images: {rows.pop('memory per GPU')}"
    yield Row("memory per GPU", memory, problem, fix)
    yield from itertools.starmap(Row, rows.items())


def limits(num_gpus: int) -> Iterator[Row]:
    """Limits of this process: locked memory, shared memory, open files."""
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    unlimited = locked == resource.RLIM_INFINITY
    value = "unlimited" if unlimited else f"{locked / 1e6:.1f} MB"
    value += " (applies to InfiniBand between machines, not to CUDA)"
    limited = num_gpus > 1 and not unlimited
    problem = "NCCL cannot register its buffers with InfiniBand" if limited else ""
    fix = "ulimit -l unlimited; of a container: docker run --ulimit memlock=-1"
    yield Row("locked memory", value, problem, fix)
    shared = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else None
    too_small = num_gpus > 1 and (shared is None or shared.free < MIN_SHARED_MEMORY)
    yield Row(
        "shared memory",
        f"{shared.free / 1e9:.1f} GB free" if shared else "none",
        "NCCL passes data between GPUs through it" if too_small else "",
        "docker run --shm-size 8g; else: mount -o remount,size=8G /dev/shm",
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    too_few = 0 <= soft < 1024
    yield Row(
        "open files",
        "unlimited" if soft < 0 else f"{soft:,}",
        "workers and ranks need more" if too_few else "",
        f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}",
    )


def disk_space(run_dir: Path, config: "Config") -> Row:
    """Disk space for the checkpoints that are kept and the one being written."""
    import torch

    from bt_fast.models.networks import BarlowTwins
    from bt_fast.optimizers import NUM_STATES

    with torch.device("meta"):
        model = BarlowTwins(config)
    num_bytes = 4 * (1 + NUM_STATES[config.optimizer])  # of a parameter and its optimizer states
    need = (config.keep + 1) * num_bytes * sum(p.numel() for p in model.parameters())
    existing = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    value = (
        f"{free / 1e9:.1f} GB free at {run_dir}; recipe {config.recipe} keeps {need / 1e9:.1f} GB"
    )
    if not os.access(existing, os.W_OK):
        problem = f"no permission to write into {existing}"
        return Row("run directory", value, problem, "choose another with --run-dir", True)
    problem = "too little for its checkpoints" if free < need else ""
    fix = "free some space, or choose another --run-dir"
    return Row("run directory", value, problem, fix, broken=free < need)
