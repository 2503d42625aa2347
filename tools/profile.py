"""Profile of a training step: its stages, the complete step and its bottlenecks.

    python tools/profile.py                            ./out.beton, else synthetic images
    python tools/profile.py --data imagenet.beton --against reference
    python tools/profile.py --gpus 32 --link-gbps 400  predict the step of 32 ranks
    torchrun --nproc-per-node 8 tools/profile.py       one rank alone, then all ranks; or srun

The flags of `bt-fast pretrain` that affect a step apply; --batch-size is the batch of one device,
by default 256 on a GPU and the equivalent of eight 224 px images on a CPU. Writes profile.json
after every measurement and profile.png at the end. Stages are timed alone and overlap in the
complete step, which is therefore shorter than their sum.
"""

import _checkout  # noqa: F401  # isort: skip

import dataclasses
import math
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from bt_fast.cli import run_command
from bt_fast.config import RENAMED, Config
from bt_fast.recipes import RECIPES
from pipelines.common.flags import last_value, parse_flags, renamed_flags


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile(Config):
    """Profile a training step. Every flag of `bt-fast pretrain` applies as well."""

    against: tuple[Literal["reference"], ...] = ()
    """Other implementations to time; reference is the released code."""
    link_gbps: float = 400.0
    """Bandwidth of the network card of one rank for the prediction, 10^9 bits per second."""
    seconds: float = 1.0
    """Time for each measurement, seconds."""
    out: Path | None = None
    """Folder for profile.json and profile.png. Default: profiles/DATE-TIME."""

    def __post_init__(self) -> None:
        Config.__post_init__(self)
        if (
            not 0
            < min(self.link_gbps, self.seconds)
            <= max(self.link_gbps, self.seconds)
            < math.inf
        ):
            raise ValueError("--link-gbps and --seconds must be positive")
        if self.dry_run or self.resume is not None or self.run_dir is not None:
            raise ValueError("--dry-run, --resume and --run-dir apply to runs, not to profiles")
        if self.resolution is not None:
            raise ValueError("--resolution: profile each --size separately")


def parse(arguments: list[str]) -> Profile:
    """Flags override the recipe's values and the default batch of one device."""
    import torch

    arguments = renamed_flags(arguments, RENAMED)
    recipe = RECIPES.get(last_value("--recipe", arguments) or "imagenet", Config)()
    on_gpu = torch.cuda.is_available() and last_value("--device", arguments) != "cpu"
    batch_size = min(recipe.batch_size, 256 if on_gpu else 8 * 224**2 // recipe.size**2)
    default = Profile(**settings(recipe) | {"batch_size": batch_size})
    return parse_flags(Profile, "profile.py", arguments, default=default)


def settings(config: Config) -> dict:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(Config)}


def profile(options: Profile) -> int:
    """Profile in this process, or run as a rank under torchrun or srun."""
    from bt_fast.distributed.collectives import ALONE
    from bt_fast.distributed.ranks import adopt_rank, run_rank

    if not adopt_rank():
        return run(options, ALONE)
    return run_rank(
        "profile.py",
        lambda world: run(options, world),
        device=options.device,
        gpus=options.gpus,
        timeout=options.timeout,
    )


def run(options: Profile, world) -> int:
    """Measure, print and write. Ranks other than the first only join the common measurements."""
    from bt_fast.build import build
    from bt_fast.runtime import choose_runtime
    from tools import profile_report, stages, synthetic

    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 110)
    out = options.out or Path("profiles") / time.strftime("%Y%m%d-%H%M%S")
    with tempfile.TemporaryDirectory() as scratch:
        data, data_name = options.data, options.data.name
        if not data.exists() and data == Config().data:
            data = synthetic.images(Path(scratch), max(options.batch_size * world.size, 64))
            data_name = "synthetic images"
        config = Config(**settings(options) | {"gpus": None, "data": data, "probe_every": 0})
        # The first rank alone compiles as all ranks do.
        runtime = choose_runtime(config.device, config.precision, config.compile, world)
        config = dataclasses.replace(config, compile=runtime.compile)
        if not world.is_first:
            stages.together(config, world, 3 * options.seconds)
            return 0
        if (out / "profile.json").exists():
            raise ValueError(f"--out {out} contains a profile; choose another folder")
        report = profile_report.Report(setup=build(config), data=data_name)
        out.mkdir(parents=True, exist_ok=True)
        console.print(f"profiling {report.title}", markup=False)
        for name in measure(report, options, world):
            print(f"  {name}", flush=True)
            report.save(out / "profile.json")
        report.save(out / "profile.json")
        report.print(console)
        try:
            report.draw(out / "profile.png")
        except ImportError as error:
            console.print(f"no profile.png: {error}", markup=False)
    console.print(f"written: {out}: {', '.join(sorted(os.listdir(out)))}", markup=False)
    return 0


def measure(report, options: Profile, world):
    """Fill the report in order of priority; yields the name of each measurement."""
    from bt_fast.step import measure_step_seconds
    from tools import breakdown, rivals, stages, timing

    setup, runtime, seconds = report.setup, report.setup.runtime, options.seconds
    report.ceilings = timing.measure_ceilings(runtime.device, runtime.view_dtype, seconds)
    yield "peak rates"
    started = time.perf_counter()
    measure_step_seconds(setup)
    report.prepared = time.perf_counter() - started
    yield "first step, compiled"
    report.work = breakdown.count_work(setup.model, stages.views_of(setup), runtime.autocast())
    report.breakdown = stages.trace(setup, report.work)
    yield "trace"
    for stage in stages.device_stages(setup, report.work, seconds):
        report.stages[stage.name] = stage
        yield stage.name
    report.step_without_data = stages.step_alone(setup, 3 * seconds)
    yield "step, views on device"
    report.step = stages.step_from_jpegs(setup, 3 * seconds)
    report.memory = timing.peak_memory(runtime.device)
    yield "step, with loader"
    for stage in stages.loader_stages(setup, seconds):
        report.stages[stage.name] = stage
        yield stage.name
    if world.group is not None or options.gpus is not None:
        report.predict(options.gpus or world.size, options.link_gbps)
    if world.group is not None:
        setup.embed = setup.objective = None  # frees memory of compiled functions
        alone = report.step_without_data, report.work
        report.together = stages.together(setup.config, world, 3 * seconds, alone)
        yield "all ranks"
    for rival in options.against:
        report.rivals[rival] = {}
        for name, value in rivals.reference_stages(setup, seconds):
            report.rivals[rival][name] = value
            yield f"{rival}: {name}"


if __name__ == "__main__":
    sys.exit(run_command("profile.py", lambda: profile(parse(sys.argv[1:]))))
