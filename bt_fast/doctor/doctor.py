"""`bt-fast doctor`: one screen on this machine, and what to fix before a long run.

Works without a GPU, without data and offline, in a few seconds. Nothing is imported above that a
broken installation may lack. Rates are measured, on an image made here and on --data's file.
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

from bt_fast import __version__
from pipelines.common.atomic import atomic_file

if TYPE_CHECKING:
    from bt_fast.config import Config

BATCHES_AHEAD = 4  # of the native loader: one in use, three in the making
MIN_SHARED_MEMORY = 1 << 30  # what NCCL's manual asks containers to be started with


@dataclass(frozen=True, kw_only=True, slots=True)
class Doctor:
    """Look at this machine: what bt-fast finds, how fast it decodes and reads, what to fix."""

    recipe: str = "imagenet"
    """Recipe whose memory and disk space are counted."""
    data: Path = Path("out.beton")
    """File whose disk is measured, if it is there."""
    run_dir: Path = Path("runs")
    """Where runs are to be written."""
    json: Path | None = None
    """Also write everything into this file."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the screen."""

    name: str
    value: str
    problem: str = ""  # empty: all is well
    fix: str = ""  # a command, or what to do
    broken: bool = False  # bt-fast cannot run like this


def run_doctor(options: Doctor) -> int:
    """Print the screen; returns 0, or 1 if something is broken."""
    if options.json is not None and options.json.exists():
        raise ValueError(f"--json {options.json} exists; remove it or choose another name")
    rows = []
    print(f"bt-fast {__version__} doctor\n")
    for row in diagnose(options):
        print(_wrapped(f"  {row.name:<16}{row.value}"), flush=True)
        rows.append(row)
    troubled = [row for row in rows if row.problem]
    broken = any(row.broken for row in rows)
    if troubled:
        print("\nTo fix:")
    for row in troubled:
        print(f"  {row.name}{' (BROKEN)' if row.broken else ''}: {row.problem}\n      {row.fix}")
    print("\n" + ("bt-fast cannot run as it should here" if broken else "bt-fast can run here"))
    if options.json is not None:
        content = {"bt_fast": __version__, "can_run": not broken, "rows": list(map(asdict, rows))}
        with atomic_file(options.json) as file:
            file.write((json.dumps(content, indent=2) + "\n").encode())
    return int(broken)


def _wrapped(line: str) -> str:
    width = max(shutil.get_terminal_size((100, 24)).columns - 1, 60)
    return textwrap.fill(line, width, subsequent_indent=18 * " ", break_on_hyphens=False)


def diagnose(options: Doctor) -> Iterator[Row]:
    """The rows, in the order of the screen; only the packages' where one of these is missing."""
    yield Row("Python", f"{platform.python_version()}, {sys.executable}")
    yield (packages := required_packages())
    yield optional_packages()
    if packages.broken:
        return
    try:
        import torch

        from bt_fast.recipes import RECIPES
        from bt_fast.runtime import choose_runtime
    except (ImportError, OSError) as error:  # installed, but not whole
        problem = f"a package does not load: {error}"
        yield Row("loading", "fails", problem, "pip install --force-reinstall .", broken=True)
        return
    if options.recipe not in RECIPES:
        raise ValueError(f"--recipe {options.recipe} is not one of {', '.join(RECIPES)}")
    config = RECIPES[options.recipe]()
    runtime = choose_runtime("auto", "auto", "auto")
    num_gpus = torch.cuda.device_count()
    yield from gpus()
    if runtime.device.type == "cuda":
        yield compiler()
    yield cores()
    yield decoding()
    yield from data(options.data, config.num_threads())
    yield memory(config)
    yield gpu_memory(config, max(num_gpus, 1))
    yield from limits(num_gpus)
    yield disk_space(options.run_dir, config)
    ranks = max(num_gpus, 1)
    yield Row(
        "pretrain takes",
        f"{ranks} x {runtime.device.type}, {runtime.precision}, torch.compile"
        f" {runtime.compile}, loader {config.loader},"
        f" {config.num_threads(ranks)} decoding threads" + (" each" if ranks > 1 else ""),
    )


def required_packages() -> Row:
    """Versions of what must be there."""
    from bt_fast.doctor import requirements

    value = requirements.described([needed.name for needed in requirements.requirements()[""]])
    unmet = requirements.unmet()
    problem = f"missing or too old: {', '.join(unmet)}" if unmet else ""
    fix = f"pip install {' '.join(map(repr, unmet))}"
    return Row("packages", value, problem, fix, broken=bool(unmet))


def optional_packages() -> Row:
    """Versions of what may be there, and how to get the others."""
    from bt_fast.doctor import requirements

    needed = requirements.requirements()
    extras = {extra: [one.name for one in needed[extra]] for extra in needed}
    del extras[""], extras["dev"]
    others = [extra for extra, names in extras.items() if not all(map(requirements.version, names))]
    here = requirements.described(
        [*itertools.chain(*extras.values()), "webdataset"]
    )  # reads shards
    rest = f"; more with pip install 'bt-fast[{','.join(others)}]'" if others else ""
    return Row("optional", here + rest)


def gpus() -> Iterator[Row]:
    """Cards, driver and NCCL, and whether each card answers."""
    import torch

    from bt_fast.doctor import hardware

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
        fix = "nvidia-smi shows who holds it and what ails it; CUDA_VISIBLE_DEVICES picks others"
        yield Row("GPU", value, f"it does not compute: {reason}", fix, broken=True)
    if len(devices) > 1:
        have = torch.distributed.is_available() and torch.distributed.is_nccl_available()
        value = ".".join(map(str, torch.cuda.nccl.version())) if have else "missing"
        problem = "" if have else "without it GPUs cannot work together"
        yield Row("NCCL", value, problem, "pip install --force-reinstall torch", broken=not have)


def compiler() -> Row:
    """Triton and torch.compile build a small C file for what they start on a GPU."""
    from bt_fast.doctor import hardware

    found, header = hardware.c_compiler()
    problem = "" if found and header else "kernels cannot be built without it and Python.h"
    fix = "apt install gcc python3-dev"
    return Row("C compiler", found or "none", problem, fix, broken=found is None)


def cores() -> Row:
    """Cores this process may use, and the quota a container may put on them."""
    from bt_fast.doctor import hardware
    from pipelines.common.cpu import usable_cores

    usable, granted = usable_cores(), hardware.granted_cores()
    value = f"{usable} usable of {os.cpu_count()}"
    if granted is None or granted >= usable:
        return Row("CPU cores", value)
    value += f", with the time of {granted:g}"
    problem = "bt-fast would start more threads than this container may run at once"
    return Row("CPU cores", value, problem, f"bt-fast pretrain --workers {max(int(granted), 1)}")


def decoding() -> Row:
    """As the loader does it."""
    from bt_fast.doctor import hardware

    rate, num_bytes = hardware.decode_rate()
    what = f"a JPEG of {num_bytes // 1000} kB, two views"
    return Row("decoding", f"{rate:,.0f} images/s per core ({what})")


def data(path: Path, num_threads: int) -> Iterator[Row]:
    """Is --data sound as far as its tables tell, and how fast does its disk deliver?"""
    from bt_fast.doctor import hardware
    from pipelines.loading.choose import open_data

    make = f"bt-convert IMAGE_FOLDER {path}"
    if not path.exists():
        yield Row("data", f"{path} does not exist yet; made with: {make}")
        return
    try:
        num_images = len(open_data(path, "--data"))
    except ValueError as error:
        yield Row("data", str(path), str(error), f"{make} --overwrite", True)
        return
    files = sorted(path.glob("train-*.tar")) if path.is_dir() else [path]
    num_bytes = sum(file.stat().st_size for file in files)
    yield Row("data", f"{path}: {num_images:,} images, {num_bytes / 1e9:.2f} GB")
    rate, from_disk = hardware.read_rate(files[0], num_threads)
    where = "past the page cache" if from_disk else "perhaps from memory: no direct reads here"
    value = f"{rate / 1e6:,.0f} MB/s, {rate / num_bytes * num_images:,.0f} images/s ({where})"
    yield Row("disk", value if rate else "not measured: the file is too small")


def memory(config: "Config") -> Row:
    """What is free, against what the loader takes; page-locked where there is a GPU."""
    from bt_fast.doctor import hardware

    free = hardware.free_memory()
    need = BATCHES_AHEAD * hardware.bytes_of_batch(config.batch_size, config.size)
    value = f"{free / 1e9:.1f} GB free; batches on their way take {need / 1e9:.1f} GB"
    if need < free / 2:
        return Row("memory", value + ", page-locked for GPUs")
    problem = f"batches of {config.batch_size} x 2 views take most of it"
    return Row("memory", value, problem, "bt-fast pretrain --batch-size N, or more machines")


def gpu_memory(config: "Config", num_gpus: int) -> Row:
    """The largest batch per GPU for the recipe: on the GPUs here, else by their memory."""
    from bt_fast.plan import dry_run, gpus

    counted, card = dry_run.count(config), gpus.present()
    if card is None:
        most = [
            f"{dry_run.largest_batch(config, counted, some[0])} on {title}"
            for title, some in gpus.CLASSES.items()
        ]
        value = f"recipe {config.recipe}: at most {', '.join(most)}, computed"
        return Row("batch per GPU", value)
    share = -(-config.batch_size // num_gpus)
    most_here = dry_run.largest_batch(config, counted, card, num_gpus)
    need = sum(dry_run.memory(config, counted, share, num_gpus).values())
    value = (
        f"recipe {config.recipe}: at most {most_here} images on each {card.name}, computed;"
        f" {config.batch_size} a step need {need / 1e9:.0f} GB"
        + (f" on each of {num_gpus}" if num_gpus > 1 else "")
    )
    if need <= card.memory:
        return Row("batch per GPU", value)
    flags = f"--gpus {num_gpus} --batch-size {num_gpus * most_here}, or more GPUs"
    if not most_here:
        flags = "--size 160, or a smaller --encoder or --projector"
    fix = f"bt-fast pretrain --recipe {config.recipe} {flags}"
    return Row("batch per GPU", value, "a step does not fit into the memory of a GPU", fix)


def limits(num_gpus: int) -> Iterator[Row]:
    """What the system grants this process: locked memory, shared memory, open files."""
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    unlimited = locked == resource.RLIM_INFINITY
    value = "unlimited" if unlimited else f"{locked / 1e6:.1f} MB"
    yield Row(
        "locked memory",
        f"{value} (counts for InfiniBand between machines; CUDA's own is not limited)",
        "NCCL cannot register its buffers with InfiniBand"
        if num_gpus > 1 and not unlimited
        else "",
        "ulimit -l unlimited; of a container: docker run --ulimit memlock=-1",
    )
    shared = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else None
    small = num_gpus > 1 and (shared is None or shared.free < MIN_SHARED_MEMORY)
    yield Row(
        "shared memory",
        f"{shared.free / 1e9:.1f} GB free" if shared else "none",
        "NCCL passes data between GPUs through it" if small else "",
        "docker run --shm-size 8g; else: mount -o remount,size=8G /dev/shm",
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 0 <= soft < 1024
    yield Row(
        "open files",
        "unlimited" if soft < 0 else f"{soft:,}",
        "workers and ranks need more" if few else "",
        f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}",
    )


def disk_space(run_dir: Path, config: "Config") -> Row:
    """Room for the checkpoints that are kept and the one being written."""
    import torch

    from bt_fast.models.networks import BarlowTwins

    with torch.device("meta"):
        model = BarlowTwins(config.encoder, config.projector, small_images=config.small_images)
    need = (config.keep + 1) * 8 * sum(p.numel() for p in model.parameters())
    place = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    value = (
        f"{free / 1e9:.1f} GB free at {run_dir}; recipe {config.recipe} keeps {need / 1e9:.1f} GB"
    )
    if not os.access(place, os.W_OK):
        problem = f"no permission to write into {place}"
        return Row("run directory", value, problem, "choose another with --run-dir", True)
    full = "too little for its checkpoints" if free < need else ""
    return Row("run directory", value, full, "free some space, or --run-dir elsewhere", bool(full))
