"""`bt-fast eval knn RUN`: the kNN accuracy of a run's encoder over whole files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file

from bt_fast import checkpoint, perf
from bt_fast.config import Config
from bt_fast.evaluate.knn import SETTINGS, choose_data, evaluate_knn
from bt_fast.job import open_data, open_val
from bt_fast.log import summary_table
from bt_fast.model import build_encoder
from bt_fast.perf import Precision
from bt_fast.run_directory import load_config
from pipelines.flags import usable_cores


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalKnn:
    """Weighted kNN accuracy of a run's encoder."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a pretraining run."""
    data: Path | None = None
    """Labelled images that vote. Default: those the run was trained on."""
    val_data: Path | None = None
    """Labelled images to classify. Default: out.val.beton beside out.beton, else a tenth of it."""
    random: bool = False
    """Take the encoder at random initialisation instead, the run's own starting point."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """Of the encoder; auto is bf16 where the hardware has it."""
    workers: int | None = None
    """Decoding threads. Default: all usable cores."""


def run_knn(options: EvalKnn) -> int:
    """Print the accuracies; returns the exit status."""
    settings = load_config(options.run, "RUN")
    if options.workers is not None and options.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {options.workers}")
    performance = perf.choose(options.device, options.precision, compile="off")
    perf.apply()
    data_path = options.data or settings.data
    data = choose_data(
        open_data(data_path, "--data"),
        open_val(data_path, options.val_data or (None if options.data else settings.val_data)),
        settings.seed,
    )
    if data is None:
        raise ValueError(f"--data {data_path} has no two classes to tell apart")
    encoder, source = load_run_encoder(options.run, settings, random=options.random)
    perf.prepare(encoder, performance)
    accuracies = evaluate_knn(
        encoder,
        data,
        performance,
        size=settings.size,
        crop=settings.probe_crop,
        num_threads=options.workers or usable_cores(),
    )
    rows = {
        "encoder": f"{settings.encoder}, {source}",
        "data": f"{data.description} of {data_path}",
        **{
            f"kNN, k = {k}, T = {temperature}": f"{100 * accuracies[f'knn_{k}']:.2f} %"
            for k, temperature in SETTINGS
        },
    }
    Console(soft_wrap=True).print(summary_table("bt-fast eval knn", rows))
    return 0


def load_run_encoder(
    run: Path, settings: Config, *, random: bool = False
) -> tuple[torch.nn.Module, str]:
    """A run's encoder and where it comes from: its export, else its newest valid checkpoint."""
    torch.manual_seed(settings.seed)  # the encoder is built first: this is the run's own start
    encoder = build_encoder(settings.encoder, small_images=settings.small_images)
    if random:
        return encoder, "random initialisation"
    export = run / "encoder.safetensors"
    try:
        if export.exists():
            weights, source = load_file(export), str(export)
        else:
            found, _ = checkpoint.newest(run)
            if found is None:
                raise ValueError(
                    f"{run} has no encoder yet: neither a finished run nor a checkpoint"
                )
            saved = load_file(found.folder / "model.safetensors")
            weights = {
                name.removeprefix("encoder."): value
                for name, value in saved.items()
                if name.startswith("encoder.")
            }
            source = str(found.folder)
        encoder.load_state_dict(weights)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{run} does not hold a {settings.encoder}: {error}") from None
    return encoder, source
