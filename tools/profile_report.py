"""What a profile found, for people and programs: the table, the verdict, the picture, the JSON."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from bt_fast import costs
from bt_fast.job import Job
from bt_fast.perf import has_bf16
from bt_fast.run_directory import environment
from pipelines.flags import usable_cores
from tools.results import write_json
from tools.stages import Stage
from tools.timing import Ceilings

IN_LOADER = ("read", "decode", "crop")
IN_STEP = ("copy", "augment", "forward", "backward", "loss", "optimizer")


@dataclass(kw_only=True, slots=True)
class Report:
    """Filled in as the measurements come; everything is per step of one device."""

    job: Job
    data: str
    ceilings: Ceilings | None = None
    prepared: float = 0.0  # seconds until the first step was compiled and done
    stages: dict[str, Stage] = field(default_factory=dict)
    step: float = 0.0
    step_without_data: float = 0.0
    memory: int = 0
    kernels: dict = field(default_factory=dict)  # of `stages.longest_kernels`
    rivals: dict[str, dict[str, float]] = field(default_factory=dict)
    prediction: costs.Prediction | None = None

    @property
    def title(self) -> str:
        config, performance = self.job.config, self.job.performance
        return (
            f"{config.encoder} + {'-'.join(map(str, config.projector))}, {config.size} px, batch"
            f" {config.batch_size}, {performance.device.type} {performance.precision},"
            f" torch.compile {performance.compile}, {self.job.num_threads} decoding threads,"
            f" {self.data}"
        )

    def rate(self, seconds: float) -> float:
        """Images per second of something that takes this long per batch."""
        return self.job.config.batch_size / seconds if seconds > 0 else float("inf")

    def say(self, console: Console, stage: Stage) -> None:
        console.print(f"  {stage.name}: {self.rate(stage.seconds):,.0f} images/s", highlight=False)

    @property
    def overlap(self) -> float:
        """Seconds per step that ran under something else."""
        parts = [self.stages["loader"], *(self.stages[n] for n in IN_STEP if n in self.stages)]
        return max(sum(stage.seconds for stage in parts) - self.step, 0.0)

    def achieved(self, stage: Stage) -> str:
        """FLOP/s or bytes/s, and the share of what this machine reaches at best."""
        assert self.ceilings is not None
        value, unit = (stage.flop, "TFLOP/s") if stage.flop else (stage.bytes, "GB/s")
        if not value or not stage.seconds:
            return ""
        rate = value / stage.seconds
        text = f"{rate / (1e12 if stage.flop else 1e9):.3g} {unit}"
        ceiling = getattr(self.ceilings, stage.ceiling) if stage.ceiling else 0
        return f"{text} ({100 * rate / ceiling:.0f} %)" if ceiling else text

    def predict(self, world_size: int, link_gbps: float) -> None:
        stages, job = self.stages, self.job
        seconds = {name: stages[name].seconds if name in stages else 0.0 for name in IN_STEP}
        measured = costs.Measured(
            images=job.config.batch_size,
            encoder=seconds["forward"] + seconds["backward"],
            backward=seconds["backward"],
            loss=seconds["loss"],
            optimizer=seconds["optimizer"],
            embedding_itemsize=job.performance.view_dtype.itemsize,
            gradient_itemsize=2 if job.config.compress_gradients else 4,
            num_parameters=sum(p.numel() for p in job.model.parameters()),
            num_projector_parameters=sum(p.numel() for p in job.model.projector.parameters()),
            num_dimensions=job.config.projector[-1],
            num_norm_layers=costs.num_norm_layers(job.model),
        )
        self.prediction = costs.predict(
            measured,
            world_size,
            link_gbps,
            separate_communicators=job.config.separate_communicators,
            norm_ranks=job.config.bn_group,
        )

    def print(self, console: Console) -> None:
        console.print(self._table())
        if self.job.performance.device.type == "cuda":
            host = sum(stage.host for stage in self.stages.values())
            console.print(f"host: busy {1e3 * host:.1f} ms per step with the device's stages")
        console.print(self._kernel_table())
        for name, theirs in self.rivals.items():
            console.print(self._rival_table(name, theirs))
        if self.prediction is not None:
            console.print(self._prediction_table(self.prediction))
        console.print(f"verdict: {verdict(self)}", style="bold", markup=False, highlight=False)

    def _table(self) -> Table:
        table = Table(title="one step", title_justify="left", caption=self.title)
        for name in ("stage", "images/s alone", "ms", "share of the step", "achieved"):
            table.add_column(name, justify="left" if name in ("stage", "achieved") else "right")

        def row(name: str, seconds: float, achieved: str = "", style: str = "") -> None:
            share = f"{100 * seconds / self.step:.1f} %"
            rate = f"{self.rate(seconds):,.0f}" if name != "overlapped" else ""
            table.add_row(name, rate, f"{1e3 * seconds:.2f}", share, achieved, style=style)

        for name in IN_LOADER:
            row(f"  {name}", self.stages[name].seconds, self.achieved(self.stages[name]))
        row("loader", self.stages["loader"].seconds)
        for name in IN_STEP:
            if name in self.stages:
                row(name, self.stages[name].seconds, self.achieved(self.stages[name]))
        table.add_row("collectives", "", "", "", "none: one process")
        table.add_section()
        row("step, views there", self.step_without_data)
        row("step, with loader", self.step, f"peak memory {self.memory / 2**30:.2f} GiB", "bold")
        row("overlapped", self.overlap)
        return table

    def ours(self, stage: str) -> float:
        """Seconds of a stage under the names that `rivals` uses."""
        if stage == "step":
            return self.step_without_data
        if stage == "views":  # on a GPU augmentation runs beside the loader, on a CPU after it
            loader, augment = (self.stages[name].seconds for name in ("loader", "augment"))
            on_gpu = self.job.performance.device.type == "cuda"
            return max(loader, augment) if on_gpu else loader + augment
        return self.stages[stage].seconds

    def _kernel_table(self) -> Table:
        on_gpu = self.job.performance.device.type == "cuda"
        table = Table(title=f"longest {'kernels' if on_gpu else 'operations'}, per step")
        for column in ("name", "ms", "launches", "share"):
            table.add_column(column, justify="left" if column == "name" else "right")
        for kernel in self.kernels["longest"]:
            figures = f"{kernel['ms']:.3f}", f"{kernel['launches']:.0f}", f"{kernel['share']:.1%}"
            table.add_row(kernel["name"][:70], *figures)
        return table

    def _rival_table(self, name: str, theirs: dict[str, float]) -> Table:
        table = Table(title=f"against {name}, in this process", title_justify="left")
        for column in ("stage", f"{name}, images/s", "bt-fast, images/s", "ratio"):
            table.add_column(column, justify="left" if column == "stage" else "right")
        for stage, seconds in theirs.items():
            ours = self.ours(stage)
            label = "loader and augmentation" if stage == "views" else stage
            table.add_row(
                label,
                f"{self.rate(seconds):,.1f}",
                f"{self.rate(ours):,.1f}",
                f"{seconds / ours:.2f} x" if ours > 0 else "",
            )
        return table

    def _prediction_table(self, prediction: costs.Prediction) -> Table:
        table = Table(
            title=f"predicted: {prediction.world_size} ranks of this batch",
            title_justify="left",
            caption=f"{prediction.images_per_s:,.0f} images/s,"
            f" {100 * prediction.efficiency:.0f} % of {prediction.world_size} single devices with"
            f" this batch; assumed, not measured: {1e6 * costs.LATENCY_INTRA_NODE:.0f} us for a"
            f" small collective on one machine, {1e6 * costs.LATENCY_INTER_NODE:.0f} on several;"
            f" {1e3 * prediction.hidden:.1f} ms of communication hidden under the backward pass",
        )
        for column in ("part", "ms", "MB sent per rank"):
            table.add_column(column, justify="left" if column == "part" else "right")
        sent = {
            "gradients, exposed": prediction.gradient_bytes,
            "embeddings": prediction.embedding_bytes,
        }
        for part, seconds in prediction.seconds.items():
            megabytes = f"{sent[part] / 1e6:,.0f}" if part in sent else ""
            table.add_row(part, f"{1e3 * seconds:.2f}", megabytes)
        table.add_row("step", f"{1e3 * prediction.step:.2f}", "", style="bold")
        return table

    def save(self, path: Path) -> None:
        """Write what is measured so far as JSON."""
        complete = self.step > 0 and "loader" in self.stages
        write_json(
            path,
            {
                "title": self.title,
                "config": dataclasses.asdict(self.job.config),
                "environment": environment(self.job.performance),
                "ceilings": dataclasses.asdict(self.ceilings) if self.ceilings else None,
                "prepare_s": self.prepared,
                "stages": {name: dataclasses.asdict(stage) for name, stage in self.stages.items()},
                "kernels": self.kernels,
                "step_s": self.step or None,
                "step_without_data_s": self.step_without_data or None,
                "overlapped_s": self.overlap if complete else 0.0,
                "images_per_s": self.rate(self.step) if self.step else None,
                "peak_memory_bytes": self.memory,
                "rivals_s": self.rivals,
                "prediction": dataclasses.asdict(self.prediction) if self.prediction else None,
                "verdict": verdict(self) if complete else None,
            },
        )

    def draw(self, path: Path) -> None:
        from matplotlib.figure import Figure

        names = [*IN_LOADER, "loader", *(name for name in IN_STEP if name in self.stages)]
        values = [1e3 * self.stages[name].seconds for name in names]
        names += ["step, views there", "step, with loader"]
        values += [1e3 * self.step_without_data, 1e3 * self.step]
        colours = ["C0"] * 4 + ["C1"] * (len(names) - 6) + ["C2"] * 2
        figure = Figure(figsize=(9, 0.36 * len(names) + 1.4), layout="constrained")
        axis = figure.subplots()
        bars = axis.barh(names, values, color=colours)
        axis.bar_label(bars, [f" {value:.3g}" for value in values])
        axis.invert_yaxis()
        axis.set_xlabel("ms per step (blue: decoding threads, orange: training device)")
        axis.margins(x=0.12)
        axis.set_title(self.title, fontsize=8)
        figure.savefig(path, dpi=110)


def verdict(report: Report) -> str:
    """One line: what limits the run, and which flag helps."""
    stages, step = report.stages, report.step
    host = sum(stage.host for stage in stages.values())
    parts_alone = max(sum(stages[name].seconds for name in IN_STEP[2:]), host)
    if not 1 / 2 < parts_alone / report.step_without_data < 2:
        return (
            f"none: the parts of the step take {1e3 * parts_alone:.0f} ms alone, and"
            f" {1e3 * report.step_without_data:.0f} ms together, so something else kept this"
            " machine busy; run again"
        )
    loader, compute = stages["loader"].seconds, report.step_without_data
    augment = stages["augment"].seconds + (stages["copy"].seconds if "copy" in stages else 0.0)
    on_gpu = report.job.performance.device.type == "cuda"
    # On a GPU the loader runs beside the step; on a CPU they share the cores.
    feeding = max(loader, augment) if on_gpu else loader + augment
    if feeding > compute:
        share = 100 * min(feeding / step, 1)
        if augment > loader:
            way_out = "a smaller --size" if on_gpu else "more cores, or a GPU"
            return f"augmentation limits: {share:.0f} % of the step: {way_out}"
        return f"the loader limits, at {report.rate(loader):,.0f} images/s: {_for_loader(report)}"
    parts = {
        "the encoder": stages["forward"].seconds + stages["backward"].seconds,
        "the loss": stages["loss"].seconds,
        "the optimizer": stages["optimizer"].seconds,
    }
    name = max(parts, key=lambda part: parts[part])
    if on_gpu and host > sum(parts.values()):
        return (
            f"the host limits: it needs {1e3 * host:.1f} ms to launch what the GPU does in"
            f" {1e3 * sum(parts.values()):.1f} ms: --compile reduce-overhead, or a larger"
            " --batch-size"
        )
    spare = report.rate(feeding) / report.rate(step)
    return (
        f"{name} limits: {100 * min(parts[name] / step, 1):.0f} % of the step; data could come"
        f" {spare:.1f} times as fast: {_for_compute(report, name)}"
    )


def _for_loader(report: Report) -> str:
    config, stages = report.job.config, report.stages
    if stages["read"].seconds > stages["decode"].seconds + stages["crop"].seconds:
        return "the disk is slower than decoding: copy the data to a faster one"
    if report.job.num_threads < usable_cores():
        return f"--workers {usable_cores()} uses all cores"
    sizes = report.job.reader.sizes
    some = np.arange(0, len(sizes), max(len(sizes) // 1000, 1))
    need = 3 * sizes[some].astype(float).prod(axis=1).mean() * len(sizes) / 1e9
    if config.cache_gb < need:
        return (
            f"--cache-gb {need:.0f} keeps all images decoded, or bt-convert --max-side 400, or"
            " more cores"
        )
    return "more cores"


def _for_compute(report: Report, part: str) -> str:
    job, config = report.job, report.job.config
    if part == "the loss":
        return "a narrower --projector"
    if part == "the optimizer":
        return "a larger --batch-size"
    if job.performance.precision == "fp32" and has_bf16(job.performance.device.type):
        return "--precision bf16"
    if job.performance.device.type == "cpu":
        return "a GPU, or a smaller --size or --encoder"
    if job.performance.compile == "off":
        return "--compile default"
    if config.resolution is None and config.size >= 128 and config.size % 32 == 0:
        return f"--resolution {32 * round(config.size * 0.7 / 32)}:{config.size} saves a quarter"
    return "more GPUs"
