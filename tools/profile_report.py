"""Report of a profile: tables, advice, figure and JSON."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import rich.table
from rich.console import Console

from bt_fast.build import TrainingSetup
from bt_fast.models.batch_norm import choose_norm
from bt_fast.plan import step_costs
from bt_fast.run.directory import environment
from tools.breakdown import Breakdown, Work
from tools.results import as_text, write_json
from tools.stages import Together
from tools.timing import Ceilings, Stage

Row = tuple[str | float, ...]
Table = tuple[str, Sequence[str], list[Row]]  # title, columns, rows
STAGES = ("read", "decode", "crop", "loader")
STAGES += ("copy", "augment", "forward", "backward", "loss", "optimizer")
REMEDIES = {
    "waiting for data": "--workers, --cache-gb (keeps decoded images), bt-convert --max-side 400,"
    " a faster disk if read takes longer than decode, or more cores",
    "gaps": "--compile reduce-overhead (CUDA graphs), or a larger --batch-size",
    "convolutions": "--precision bf16, --resolution (smaller views first), or more GPUs",
    "norm": "--norm fused",
    "products": "a narrower --projector",
    "optimizer": "a larger --batch-size",
    "other": "--compile default fuses casts, copies and small kernels",
    "communication": "--compress-gradients, a larger --batch-size, on several machines"
    f" --bn-group {step_costs.RANKS_PER_MACHINE}",
}


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
    work: Work | None = None
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
            f" torch.compile {runtime.compile}, {self.setup.num_threads} decoding workers,"
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
        """What takes more than 5 % of the step, the largest first, with the flags that would help;
        empty until the measurements are complete."""
        found = self.together.breakdown if self.together else self.breakdown
        if found is None or not self.step or "loader" not in self.stages:
            return []
        config, device = self.setup.config, self.setup.runtime.device
        # On a GPU the loader overlaps with the step; on a CPU both use the same cores.
        on_gpu, loader = device.type == "cuda", self.stages["loader"].seconds
        waiting = self.step - self.step_without_data if on_gpu else loader
        fractions = {name: part.seconds / found.step for name, part in found.parts.items()}
        if communication := found.parts.get("communication"):
            fractions["communication"] = communication.alone / found.step
        fractions["waiting for data"] = waiting / self.step
        left_out = set() if on_gpu else {"gaps", "norm", "other"}
        if on_gpu and choose_norm(config.norm, device) == "fused":
            left_out.add("norm")
        return [
            f"{name}: {fraction:.0%} of the step: {REMEDIES[name]}"
            for name, fraction in sorted(fractions.items(), key=lambda item: -item[1])
            if fraction > 0.05 and name in REMEDIES.keys() - left_out
        ]

    def predict(self, world_size: int, link_gbps: float) -> None:
        config, model = self.setup.config, self.setup.model
        seconds = {name: stage.seconds for name, stage in self.stages.items()}
        measured = step_costs.StepTimes(
            images=config.batch_size,
            encoder=seconds["forward"] + seconds["backward"],
            backward=seconds["backward"],
            loss=seconds["loss"],
            optimizer=seconds["optimizer"],
            embedding_itemsize=self.setup.runtime.view_dtype.itemsize,
            gradient_itemsize=2 if config.compress_gradients else 4,
            num_parameters=sum(p.numel() for p in model.parameters()),
            num_projector_parameters=sum(p.numel() for p in model.projector.parameters()),
            num_dimensions=config.projector[-1],
            num_norm_layers=step_costs.num_norm_layers(model),
        )
        self.prediction = step_costs.predict(
            measured,
            world_size,
            link_gbps,
            separate_communicators=config.separate_communicators,
            norm_ranks=config.bn_group,
        )

    def tables(self) -> Iterator[Table]:
        """Tables of the measurements so far."""
        stages = [self.stages[name] for name in STAGES if name in self.stages]
        stages += [Stage(name="step, views on device", seconds=self.step_without_data)]
        stages += [Stage(name="step, with loader", seconds=self.step)]
        rows: list[Row] = [
            (s.name, self.rate(s.seconds), 1e3 * s.seconds)
            + (100 * s.seconds / self.step if self.step else "", self.achieved(s))
            for s in stages
            if s.seconds
        ]
        title = f"one step: {self.title}, peak memory {self.memory / 2**30:.2f} GiB"
        yield title, ("stage", "images/s alone", "ms", "% of the step", "achieved"), rows
        if (peak := self.ceilings) is not None:
            rows = [("matrix product, TFLOP/s", peak.flops / 1e12)]
            rows += [("memory, GB/s", peak.memory / 1e9), ("link, GB/s", peak.link / 1e9)]
            yield "peak rates of the device", ("", "measured"), rows
        if self.breakdown:
            yield from self._breakdown_tables(self.breakdown)
        if self.together and self.together.breakdown:
            ranks = f", one of {self.together.world_size} ranks"
            yield from self._breakdown_tables(self.together.breakdown, ranks)
        for name, seconds_of in self.rivals.items():
            rows = [
                (stage.replace("views", "loader and augmentation"), self.rate(seconds))
                + (self.rate(self.ours(stage)), seconds / self.ours(stage))
                for stage, seconds in seconds_of.items()
            ]
            columns = ("stage", f"{name}, images/s", "bt-fast, images/s", "ratio")
            yield f"comparison with {name} in this process", columns, rows
        if self.prediction is not None:
            yield from self._prediction_tables(self.prediction)

    def _breakdown_tables(self, found: Breakdown, ranks: str = "") -> Iterator[Table]:
        rows: list[Row] = [
            (name, 1e3 * p.seconds, 1e3 * p.alone, 100 * p.seconds / found.step)
            + (p.launches, self.achieved(p))
            for name, p in found.parts.items()
        ]
        columns = ("class", "ms", "ms alone", "% of the step", "launches", "achieved")
        title = f"step without loader by class of work: {1e3 * found.step:.2f} ms{ranks}"
        yield title, columns, rows
        rows = [
            (f"`{k['name'][:90]}`", k["ms"], k["launches"], 100 * k["share"])
            for k in found.kernels["longest"]
        ]
        yield f"longest kernels{ranks}", ("name", "ms", "launches", "% of all"), rows

    def _prediction_tables(self, found: step_costs.Prediction) -> Iterator[Table]:
        parts = found.seconds | {"step": found.step, "hidden under backward": found.hidden}
        title = (
            f"predicted: {found.world_size} ranks of this batch: {found.images_per_s:,.0f}"
            f" images/s, {found.efficiency:.0%} of single devices; MB sent per rank: gradients"
            f" {found.gradient_bytes / 1e6:,.0f}, embeddings {found.embedding_bytes / 1e6:,.0f}"
        )
        yield title, ("part", "ms"), [(name, 1e3 * s) for name, s in parts.items()]
        if (measured := self.together) is None:
            return
        communication = measured.breakdown and measured.breakdown.parts.get("communication")
        exposed = communication.alone if communication else 0.0
        computing = sum(found.seconds[name] for name in ("encoder", "loss", "optimizer"))
        rows = [
            ("step, ms", 1e3 * measured.step, 1e3 * found.step),
            ("efficiency, %", 100 * measured.efficiency, 100 * found.efficiency),
            ("exposed communication, ms", 1e3 * exposed, 1e3 * (found.step - computing)),
        ]
        title = (
            f"{measured.world_size} ranks, each with this batch, views on device;"
            f" one rank alone: {1e3 * measured.alone:.2f} ms"
        )
        yield title, ("", "measured", "predicted"), rows

    def print(self, console: Console) -> None:
        for title, columns, rows in self.tables():
            table = rich.table.Table(title=title, title_justify="left")
            for name in columns:
                is_text = name in (columns[0], "achieved")
                table.add_column(name, justify="left" if is_text else "right")
            for row in rows:
                table.add_row(*map(as_text, row))
            console.print(table)
        breakdowns = [self.breakdown] + ([self.together.breakdown] if self.together else [])
        if None in breakdowns:
            console.print("no breakdown: the profiler recorded no kernels (is it permitted?)")
        for index, line in enumerate(self.advice()):
            text = f"{'also' if index else 'verdict'}: {line}"
            console.print(text, style="bold", markup=False, highlight=False)

    def ours(self, stage: str) -> float:
        """Seconds of a stage, by the names of `rivals`."""
        if stage == "step":
            return self.step_without_data
        if stage == "views":  # on a GPU augmentation overlaps with the loader
            both = [self.stages[name].seconds for name in ("loader", "augment")]
            return max(both) if self.setup.runtime.device.type == "cuda" else sum(both)
        return self.stages[stage].seconds

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
                "tables": list(self.tables()),
                "verdict": switches[0] if switches else None,
                "switches": switches,
            },
        )

    def draw(self, path: Path) -> None:
        from matplotlib.figure import Figure

        found = self.together.breakdown if self.together else self.breakdown
        bars = {name: (stage.seconds, "C0") for name, stage in self.stages.items()}
        bars["step, views on device"] = self.step_without_data, "C0"
        bars["step, with loader"] = self.step, "C0"
        for name, part in (found.parts if found else {}).items():
            bars[f"class: {name}"] = part.seconds, "C1"
        figure = Figure(figsize=(9, 0.36 * len(bars) + 1.4), layout="constrained")
        axis = figure.subplots()
        values, colours = [1e3 * s for s, _ in bars.values()], [c for _, c in bars.values()]
        container = axis.barh(list(bars), values, color=colours)
        axis.bar_label(container, [f" {value:.3g}" for value in values])
        axis.invert_yaxis()
        axis.set_xlabel("ms per step (blue: stages alone, orange: by class of work)")
        axis.margins(x=0.12)
        axis.set_title(self.title, fontsize=8)
        figure.savefig(path, dpi=110)
