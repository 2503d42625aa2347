"""Report of a profile: tables, advice, figure and JSON."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from bt_fast.build import TrainingSetup
from bt_fast.plan import step_costs
from bt_fast.run.directory import environment
from pipelines.common.cpu import usable_cores
from tools import step_work
from tools.breakdown import Breakdown, advice
from tools.results import write_json
from tools.stages import Together
from tools.timing import Ceilings, Stage

IN_LOADER = ("read", "decode", "crop")
IN_STEP = ("copy", "augment", "forward", "backward", "loss", "optimizer")


@dataclass(kw_only=True, slots=True)
class Report:
    """Measurements so far, per step of one device."""

    setup: TrainingSetup
    data: str
    ceilings: Ceilings | None = None
    prepared: float = 0.0  # seconds to compile and run the first step
    stages: dict[str, Stage] = field(default_factory=dict)
    step: float = 0.0
    step_without_data: float = 0.0
    memory: int = 0
    work: step_work.Work | None = None
    breakdown: Breakdown | None = None
    together: Together | None = None  # all ranks under torchrun or srun
    rivals: dict[str, dict[str, float]] = field(default_factory=dict)
    prediction: step_costs.Prediction | None = None

    @property
    def title(self) -> str:
        config, runtime = self.setup.config, self.setup.runtime
        return (
            f"{config.encoder} + {'-'.join(map(str, config.projector))}, {config.size} px, batch"
            f" {config.batch_size}, {runtime.device.type} {runtime.precision},"
            f" torch.compile {runtime.compile}, {self.setup.num_threads} decoding threads,"
            f" {self.data}"
        )

    def rate(self, seconds: float) -> float:
        """Images per second at these seconds per batch."""
        return self.setup.config.batch_size / seconds if seconds > 0 else float("inf")

    def achieved(self, stage: Stage) -> str:
        """FLOP/s or bytes/s, and the fraction of this machine's measured peak."""
        value, unit = (stage.flop / 1e3, "TFLOP/s") if stage.flop else (stage.bytes, "GB/s")
        if not value or not stage.seconds:
            return ""
        reached = stage.reached(self.ceilings)
        return f"{value / stage.seconds / 1e9:.3g} {unit}" + f" ({reached:.0%})" * (reached > 0)

    def advice(self) -> list[str]:
        """Bottlenecks and the flags that would help; empty until the measurements are complete."""
        found = self.together.breakdown if self.together else self.breakdown
        if found is None or not self.step or "loader" not in self.stages:
            return []
        # On a GPU the loader overlaps with the step; on a CPU both use the same cores.
        on_gpu = self.setup.runtime.device.type == "cuda"
        waiting = self.step - self.step_without_data if on_gpu else self.stages["loader"].seconds
        return advice(
            self.setup.config,
            self.setup.runtime,
            found,
            self.ceilings,
            world_size=self.together.world_size if self.together else 1,
            waiting=waiting / self.step,
            for_loader=_for_loader(self),
        )

    def predict(self, world_size: int, link_gbps: float) -> None:
        stages, setup = self.stages, self.setup
        seconds = {name: stages[name].seconds if name in stages else 0.0 for name in IN_STEP}
        measured = step_costs.StepTimes(
            images=setup.config.batch_size,
            encoder=seconds["forward"] + seconds["backward"],
            backward=seconds["backward"],
            loss=seconds["loss"],
            optimizer=seconds["optimizer"],
            embedding_itemsize=setup.runtime.view_dtype.itemsize,
            gradient_itemsize=2 if setup.config.compress_gradients else 4,
            num_parameters=sum(p.numel() for p in setup.model.parameters()),
            num_projector_parameters=sum(p.numel() for p in setup.model.projector.parameters()),
            num_dimensions=setup.config.projector[-1],
            num_norm_layers=step_costs.num_norm_layers(setup.model),
        )
        self.prediction = step_costs.predict(
            measured,
            world_size,
            link_gbps,
            separate_communicators=setup.config.separate_communicators,
            norm_ranks=setup.config.bn_group,
        )

    def print(self, console: Console) -> None:
        console.print(self._stage_table())
        if self.breakdown is None:
            console.print("no breakdown: the profiler recorded no kernels (is tracing permitted?)")
        else:
            console.print(self._breakdown_table(self.breakdown, 1))
            rows = [
                (k["name"][:70], f"{k['ms']:.3f}", f"{k['launches']:.0f}", f"{k['share']:.1%}")
                for k in self.breakdown.kernels["longest"]
            ]
            console.print(_table("longest kernels", ("name", "ms", "launches", "fraction"), rows))
        if self.together is not None and self.prediction is not None:
            if self.together.breakdown is not None:
                found = self.together.breakdown
                console.print(self._breakdown_table(found, self.together.world_size))
            console.print(self._ranks_table(self.together, self.prediction))
        for name, seconds_of in self.rivals.items():
            console.print(self._rival_table(name, seconds_of))
        if self.prediction is not None:
            console.print(self._prediction_table(self.prediction))
        for index, line in enumerate(self.advice()):
            text = f"{'also' if index else 'verdict'}: {line}"
            console.print(text, style="bold", markup=False, highlight=False)

    def _stage_table(self) -> Table:
        names = [*IN_LOADER, "loader", *(name for name in IN_STEP if name in self.stages)]
        rows = [
            (name, self.stages[name].seconds, self.achieved(self.stages[name])) for name in names
        ]
        rows += [("step, views on device", self.step_without_data, "")]
        rows += [("step, with loader", self.step, f"peak memory {self.memory / 2**30:.2f} GiB")]
        return _table(
            f"one step: {self.title}",
            ("stage", "images/s alone", "ms", "fraction of the step", "achieved"),
            [
                (name, f"{self.rate(s):,.0f}", f"{1e3 * s:.2f}", f"{s / self.step:.1%}", achieved)
                for name, s, achieved in rows
            ],
        )

    def _breakdown_table(self, found: Breakdown, num_ranks: int) -> Table:
        rows = []
        for name, part in found.parts.items():
            figures = f"{1e3 * part.seconds:.2f}", f"{1e3 * part.alone:.2f}"
            fraction, launches = f"{part.seconds / found.step:.1%}", f"{part.launches:.0f}"
            rows.append((name, *figures, fraction, launches, self.achieved(part)))
        title = f"step without loader by class of work: {1e3 * found.step:.2f} ms"
        title += f"; one of {num_ranks} ranks" * (num_ranks > 1)
        return _table(title, ("class", "ms", "ms alone", "fraction", "launches", "achieved"), rows)

    def _ranks_table(self, measured: Together, predicted: step_costs.Prediction) -> Table:
        found = measured.breakdown.parts if measured.breakdown else {}
        exposed = 1e3 * found["communication"].alone if "communication" in found else 0.0
        computing = sum(predicted.seconds[name] for name in ("encoder", "loss", "optimizer"))
        communicating = f"{1e3 * (predicted.step - computing):.2f}"
        assumed = (
            f"{1e6 * step_costs.latency(self.setup.config.bn_group or measured.world_size):.0f}"
        )
        rows = [
            ("step of one rank alone, ms", f"{1e3 * measured.alone:.2f}", ""),
            ("step of all ranks, ms", f"{1e3 * measured.step:.2f}", f"{1e3 * predicted.step:.2f}"),
            ("efficiency", f"{measured.efficiency:.1%}", f"{predicted.efficiency:.1%}"),
            ("exposed communication, ms", f"{exposed:.2f}", communicating),
        ]
        for size, seconds in measured.latency.items():
            rows.append((f"all-reduce of {size}, us", f"{1e6 * seconds:.0f}", assumed))
        title = f"{measured.world_size} ranks, each with this batch, views on device"
        return _table(title, ("", "measured", "predicted"), rows)

    def ours(self, stage: str) -> float:
        """Seconds of a stage, by the names of `rivals`."""
        if stage == "step":
            return self.step_without_data
        if stage == "views":  # on a GPU augmentation overlaps with the loader
            loader, augment = (self.stages[name].seconds for name in ("loader", "augment"))
            on_gpu = self.setup.runtime.device.type == "cuda"
            return max(loader, augment) if on_gpu else loader + augment
        return self.stages[stage].seconds

    def _rival_table(self, name: str, seconds_of: dict[str, float]) -> Table:
        rows = []
        for stage, seconds in seconds_of.items():
            ours = self.ours(stage)
            label = "loader and augmentation" if stage == "views" else stage
            ratio = f"{seconds / ours:.2f} x" if ours > 0 else ""
            rows.append((label, f"{self.rate(seconds):,.1f}", f"{self.rate(ours):,.1f}", ratio))
        columns = ("stage", f"{name}, images/s", "bt-fast, images/s", "ratio")
        return _table(f"comparison with {name} in this process", columns, rows)

    def _prediction_table(self, prediction: step_costs.Prediction) -> Table:
        sent = {
            "gradients, exposed": f"{prediction.gradient_bytes / 1e6:,.0f}",
            "embeddings": f"{prediction.embedding_bytes / 1e6:,.0f}",
        }
        seconds = prediction.seconds | {"step": prediction.step}
        return _table(
            f"predicted: {prediction.world_size} ranks of this batch",
            ("part", "ms", "MB sent per rank"),
            [(part, f"{1e3 * value:.2f}", sent.get(part, "")) for part, value in seconds.items()],
            caption=f"{prediction.images_per_s:,.0f} images/s,"
            f" {100 * prediction.efficiency:.0f} % of {prediction.world_size} single devices with"
            " this batch; assumed, not measured:"
            f" {1e6 * step_costs.LATENCY_INTRA_NODE:.0f} us for a small collective on one machine,"
            f" {1e6 * step_costs.LATENCY_INTER_NODE:.0f} on several;"
            f" {1e3 * prediction.hidden:.1f} ms of communication hidden under the backward pass",
        )

    def save(self, path: Path) -> None:
        """Write the measurements so far as JSON."""
        switches = self.advice()

        def plain(found) -> dict | None:
            return dataclasses.asdict(found) if found else None

        write_json(
            path,
            {
                "title": self.title,
                "config": dataclasses.asdict(self.setup.config),
                "environment": environment(self.setup.runtime),
                "ceilings": plain(self.ceilings),
                "prepare_s": self.prepared,
                "breakdown": plain(self.breakdown),
                "stages": {name: plain(stage) for name, stage in self.stages.items()},
                "step_s": self.step or None,
                "step_without_data_s": self.step_without_data or None,
                "images_per_s": self.rate(self.step) if self.step else None,
                "peak_memory_bytes": self.memory,
                "rivals_s": self.rivals,
                "prediction": plain(self.prediction),
                "ranks": plain(self.together),
                "verdict": switches[0] if switches else None,
                "switches": switches,
            },
        )

    def draw(self, path: Path) -> None:
        from matplotlib.figure import Figure

        found = self.together.breakdown if self.together else self.breakdown
        steps = {"step, views on device": self.step_without_data, "step, with loader": self.step}
        alone = {name: stage.seconds for name, stage in self.stages.items()} | steps
        within = {f"class: {name}": p.seconds for name, p in (found.parts if found else {}).items()}
        values = [1e3 * seconds for seconds in (alone | within).values()]
        figure = Figure(figsize=(9, 0.36 * len(values) + 1.4), layout="constrained")
        axis = figure.subplots()
        bars = axis.barh(
            [*alone, *within], values, color=["C0"] * len(alone) + ["C1"] * len(within)
        )
        axis.bar_label(bars, [f" {value:.3g}" for value in values])
        axis.invert_yaxis()
        axis.set_xlabel("ms per step (blue: stages alone, orange: by class of work)")
        axis.margins(x=0.12)
        axis.set_title(self.title, fontsize=8)
        figure.savefig(path, dpi=110)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], **options) -> Table:
    """A table whose first column and "achieved" are text; the other columns are numbers."""
    table = Table(title=title, title_justify="left", **options)
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 or name == "achieved" else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _for_loader(report: Report) -> str:
    config, stages = report.setup.config, report.stages
    if stages["read"].seconds > stages["decode"].seconds + stages["crop"].seconds:
        return "copy the data to a faster disk, because reading takes longer than decoding"
    if report.setup.num_threads < usable_cores():
        return f"--workers {usable_cores()} uses all cores"
    sizes = report.setup.dataset.sizes
    sample = np.arange(0, len(sizes), max(len(sizes) // 1000, 1))
    total_gb = 3 * sizes[sample].astype(float).prod(axis=1).mean() * len(sizes) / 1e9
    if config.cache_gb < total_gb:
        return (
            f"--cache-gb {math.ceil(total_gb)} keeps all images decoded,"
            " or bt-convert --max-side 400, or more cores"
        )
    return "more cores, or another --loader"
