"""The `bt-fast` command line. Whatever a user can do wrong ends in one line and a non-zero exit."""

import dataclasses
import importlib
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial

from bt_fast import __version__

_USAGE = """bt-fast COMMAND [OPTIONS]

Barlow Twins pretraining as fast as the hardware allows.

  pretrain       train an encoder on a .beton
  eval all       random initialisation against pretraining, in one table
  eval knn       nearest neighbours among the features; --collapse looks for collapse
  eval linear    a linear classifier on the frozen encoder; --cached is quick
  eval semi      fine-tuning on 1 or 10 percent of the labels
  eval transfer  other data sets: Places-205, iNaturalist 2018, VOC07, any image folder
  export         write a trained encoder for torchvision, timm, detectron2 or ONNX
  doctor         look at this machine: what is here, how fast it is, what to fix

bt-fast COMMAND --help lists a command's options. bt-convert makes a .beton from an image folder.
"""

# What may differ when a run is continued: where and how it runs, not what is learned.
_MAY_CHANGE = {
    "data",
    "val_data",
    "resume",
    "dry_run",
    "gpus",
    "slurm",
    "gpus_per_node",
    "time_limit",
    "separate_communicators",
    "slurm_args",
    "patience",
    "device",
    "compile",
    "norm",
    "deterministic",
    "loader",
    "workers",
    "cache_gb",
    "max_steps",
    "probe_every",
    "probe_images",
    "log_every",
    "save_every",
    "keep",
    "if_save_fails",
}

# `bt-fast eval NAME`: its room, its options and what runs it; imported when it is asked for.
_EVALUATIONS = {
    "all": ("compare", "EvalAll", "run_all"),
    "knn": ("knn", "EvalKnn", "run_knn"),
    "linear": ("linear", "EvalLinear", "run_linear"),
    "semi": ("semi", "EvalSemi", "run_semi"),
    "transfer": ("transfer", "EvalTransfer", "run_transfer"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the process's exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[tuple[str, ...], Callable[[list[str]], int]] = {
        ("pretrain",): _pretrain,
        **{("eval", name): partial(_eval, name) for name in _EVALUATIONS},
        ("export",): _export,
        ("doctor",): _doctor,
    }
    for name, command in commands.items():
        if tuple(arguments[: len(name)]) == name:
            run = partial(command, arguments[len(name) :])
            return in_one_line(f"bt-fast {' '.join(name)}", run)
    if arguments == ["--version"]:
        print(__version__)
        return 0
    if not arguments or arguments[-1] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0 if arguments else 2
    known = ", ".join(" ".join(name) for name in commands)
    print(
        f"bt-fast: there is no command {' '.join(arguments[:2])!r}; there is {known}",
        file=sys.stderr,
    )
    return 2


def in_one_line(program: str, command: Callable[[], int]) -> int:
    """Run a command; what a user can do wrong becomes one line and an exit status."""
    try:
        return command()
    except (ValueError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        from bt_fast.runtime import OUT_OF_MEMORY, is_out_of_memory

        if not is_out_of_memory(error):
            raise
        print(f"{program}: {OUT_OF_MEMORY}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def _pretrain(arguments: list[str]) -> int:
    from bt_fast.distributed.signals import StopFlag

    with StopFlag() as stop:  # before torch is imported, which takes a while
        from bt_fast.distributed.launcher import launch

        return launch(parse_pretrain(arguments), arguments, stop)


def parse_pretrain(arguments: list[str]):
    """Flags -> Config. The defaults are the recipe's under its ablation, or the resumed run's."""
    from pathlib import Path

    from bt_fast.ablations import ablate
    from bt_fast.config import Config
    from bt_fast.recipes import RECIPES
    from bt_fast.run.directory import load_config
    from pipelines.common.flags import parse_flags, value_of

    resume, recipe, ablation = (
        value_of(flag, arguments) for flag in ("--resume", "--recipe", "--ablation")
    )
    saved = load_config(Path(resume), "--resume") if resume is not None else None
    default = saved if saved is not None else RECIPES.get(recipe or "imagenet", Config)()
    if saved is None and ablation is not None:
        default = ablate(default, ablation)
    config = parse_flags(Config, "bt-fast pretrain", arguments, default=default)
    if saved is not None:
        changed = learns_otherwise(config, saved)
        if "--run-dir" in changed:
            raise ValueError(
                f"--run-dir {config.run_dir}: a resumed run stays where --resume says; leave it out"
            )
        if changed:
            raise ValueError(
                f"{' '.join(changed)} cannot change when a run is resumed, because what it learns"
                " would differ; leave it out or start a new run"
            )
    return config


def learns_otherwise(config, saved) -> list[str]:
    """The flags by which two configurations learn something else."""
    return [
        f"--{field.name.replace('_', '-')}"
        for field in dataclasses.fields(config)
        if field.name not in _MAY_CHANGE
        and getattr(config, field.name) != getattr(saved, field.name)
    ]


def _eval(name: str, arguments: list[str]) -> int:
    from bt_fast.evaluate.command import on_ranks
    from pipelines.common.flags import parse_flags

    room, options, function = _EVALUATIONS[name]
    module = importlib.import_module(f"bt_fast.evaluate.{room}")
    parsed = parse_flags(getattr(module, options), f"bt-fast eval {name}", arguments)
    return on_ranks(name, parsed, arguments, getattr(module, function))


def _export(arguments: list[str]) -> int:
    from bt_fast.export.export import Export, run_export
    from pipelines.common.flags import parse_flags

    return run_export(parse_flags(Export, "bt-fast export", arguments))


def _doctor(arguments: list[str]) -> int:
    from bt_fast.doctor.doctor import Doctor, run_doctor
    from pipelines.common.flags import parse_flags

    return run_doctor(parse_flags(Doctor, "bt-fast doctor", arguments))


if __name__ == "__main__":
    sys.exit(main())
