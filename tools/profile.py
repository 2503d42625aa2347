"""Where the time of a training step goes: every stage alone, the whole, and what limits it.

    python tools/profile.py                            out.beton here, else synthetic images
    python tools/profile.py --data imagenet.beton --against reference
    python tools/profile.py --gpus 32 --link-gbps 400  predict the step of 32 ranks
    torchrun --nproc-per-node 8 tools/profile.py       one rank alone beside all of them; or srun

The flags of `bt-fast pretrain` that shape a step apply; --batch-size is what one device does, by
default 256 on a GPU and the work of eight 224 px images on a CPU. Writes profile.json after every
measurement and profile.png at the end. Stages are timed alone and then together, so their sum is
more than the whole by what overlaps.
"""

import _checkout  # noqa: F401  # isort: skip

import dataclasses
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from bt_fast.cli import in_one_line
from bt_fast.config import Config
from bt_fast.recipes import RECIPES
from pipelines.common.flags import parse_flags, value_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile(Config):
    """Profile a training step. Every flag of `bt-fast pretrain` applies as well."""

    against: tuple[Literal["reference"], ...] = ()
    """Also time the released code's way of each stage."""
    link_gbps: float = 400.0
    """Of the network card of one rank, 10^9 bits per second; for the prediction."""
    seconds: float = 1.0
    """Time for each measurement."""
    out: Path | None = None
    """Folder for profile.json, profile.png and trace.json. Default: profiles/DATE-TIME."""
    trace: bool = False
    """Also keep the Chrome trace of three steps."""

    def __post_init__(self) -> None:
        Config.__post_init__(self)
        for name in ("link_gbps", "seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} must be positive")
        if self.dry_run or self.resume is not None or self.run_dir is not None:
            raise ValueError("--dry-run, --resume and --run-dir are for runs, not for profiles")
        if self.resolution is not None:
            raise ValueError("--resolution: profile one --size after the other")


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    return in_one_line("profile.py", lambda: profile(parse(arguments)))


def parse(arguments: list[str]) -> Profile:
    """Flags over the recipe's values, with a batch that one device takes."""
    import torch

    recipe = RECIPES.get(value_of("--recipe", arguments) or "imagenet", Config)()
    values = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(Config)}
    on_gpu = torch.cuda.is_available() and value_of("--device", arguments) != "cpu"
    values["batch_size"] = min(recipe.batch_size, 256 if on_gpu else 8 * 224**2 // recipe.size**2)
    return parse_flags(Profile, "profile.py", arguments, default=Profile(**values))


def profile(options: Profile) -> int:
    """Profile this process, or be one of the ranks that torchrun or srun started."""
    from bt_fast.distributed import launcher, slurm
    from bt_fast.distributed.collectives import ALONE

    slurm.adopt()
    if "RANK" not in os.environ:
        return run(options, ALONE)
    world = launcher.join(options.device, options.gpus, options.patience)
    try:
        status = run(options, world)
    except (RuntimeError, ValueError, OSError) as error:
        if world.size == 1:
            raise
        launcher.give_up("profile.py", world, error)
    return launcher.end_rank(world, status)


def run(options: Profile, world) -> int:
    """Measure, print and write. All ranks but the first only take part in what all do."""
    from bt_fast.build import build
    from tools import profile_report, stages, synthetic

    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 110)
    out = options.out or Path("profiles") / time.strftime("%Y%m%d-%H%M%S")
    with tempfile.TemporaryDirectory() as scratch:
        data, what = options.data, options.data.name
        if not data.exists() and data == Config().data:
            data = synthetic.images(Path(scratch), max(options.batch_size * world.size, 64))
            what = "synthetic images"
        values = {field.name: getattr(options, field.name) for field in dataclasses.fields(Config)}
        config = Config(**values | {"gpus": None, "data": data, "probe_every": 0})
        if not world.is_first:
            stages.together(config, world, 3 * options.seconds, Path(scratch))
            return 0
        if (out / "profile.json").exists():
            raise ValueError(f"--out {out} holds a profile already; choose another folder")
        setup = build(config)
        out.mkdir(parents=True, exist_ok=True)
        report = profile_report.Report(setup=setup, data=what)
        console.print(f"profiling {report.title}", markup=False)
        for stage in measure(report, options, world, Path(scratch), out):
            if stage is not None:
                text = f"  {stage.name}: {report.rate(stage.seconds):,.0f} images/s"
                console.print(text, highlight=False)
            report.save(out / "profile.json")
        report.print(console)
        try:
            report.draw(out / "profile.png")
        except ImportError as error:
            console.print(f"no profile.png: {error}", markup=False)
    console.print(f"written: {out}: {', '.join(sorted(os.listdir(out)))}", markup=False)
    return 0


def measure(report, options: Profile, world, scratch: Path, out: Path):
    """Fill the report in, what counts most first; yields a stage or None after each measurement."""
    from bt_fast.build import rehearse
    from bt_fast.plan import step_costs
    from tools import rivals, stages, timing

    setup, runtime, seconds = report.setup, report.setup.runtime, options.seconds
    report.ceilings = timing.measure_ceilings(runtime.device, runtime.view_dtype, seconds)
    yield
    if runtime.compile != "off":
        print("compiling ...", flush=True)
    started = time.perf_counter()
    rehearse(setup)
    report.prepared = time.perf_counter() - started
    yield
    report.work = step_costs.count(setup.model, stages.views_of(setup), runtime.autocast())
    path = (out if options.trace else scratch) / "trace.json"
    report.breakdown = stages.trace(setup, report.work, path)
    yield
    for stage in stages.device_stages(setup, report.work, seconds):
        report.stages[stage.name] = stage
        yield stage
    report.step_without_data = stages.step_alone(setup, 3 * seconds)
    yield
    report.step = stages.step_from_jpegs(setup, 3 * seconds)
    report.memory = timing.peak_memory(runtime.device)
    yield
    for stage in stages.loader_stages(setup, seconds):
        report.stages[stage.name] = stage
        yield stage
    if world.group is not None or options.gpus is not None:
        report.predict(options.gpus or world.size, options.link_gbps)
        yield
    if world.group is not None:
        setup.embed = setup.objective = None  # compiled; they make room
        alone = report.step_without_data, report.work
        report.together = stages.together(setup.config, world, 3 * seconds, scratch, alone)
        yield
    for rival in options.against:
        report.rivals[rival] = {}
        for name, value in rivals.reference_stages(setup, seconds):
            report.rivals[rival][name] = value
            yield


if __name__ == "__main__":
    sys.exit(main())
