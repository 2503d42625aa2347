"""The `bt-fast` command line. A user error ends in one line and a non-zero exit status.

Commands are imported when they run: --help, --version and wrong flags need no torch.
"""

import difflib
import importlib
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bt_fast.config import RENAMED, Config, load_config, resumed
from pipelines import __version__

_USAGE = """bt-fast COMMAND [OPTIONS]

Barlow Twins pretraining as fast as the hardware allows.

  pretrain       train an encoder on a .beton
  eval all       compare random initialisation with pretraining in one table
  eval knn       classify by nearest neighbours of the features; --collapse looks for collapse
  eval linear    train a linear classifier on the frozen encoder; --cached is quick
  eval semi      fine-tune on 1 or 10 percent of the labels
  eval transfer  evaluate on Places-205, iNaturalist 2018, VOC07 or any image folder
  embed          write the features of all images of a data set to a file
  curate         find near duplicates and outliers by features, choose a subset of the images
  compare        curves of several runs in one picture, their results in one table
  export         write a trained encoder for torchvision, timm, detectron2 or ONNX
  doctor         check this machine: hardware, packages, rates, and what to fix

bt-fast COMMAND --help lists a command's options. bt-convert makes a .beton from an image folder.
"""

# Every command but pretrain: its flags, and the function that takes them.
_COMMANDS = {
    "eval all": ("evaluate.options.EvalAll", "evaluate.all_protocols.run_all"),
    "eval knn": ("evaluate.options.EvalKnn", "evaluate.knn.run_knn"),
    "eval linear": ("evaluate.options.EvalLinear", "evaluate.linear.run_linear"),
    "eval semi": ("evaluate.options.EvalSemi", "evaluate.semi.run_semi"),
    "eval transfer": ("evaluate.options.EvalTransfer", "evaluate.transfer.run_transfer"),
    "embed": ("evaluate.options.Embed", "evaluate.embed.run_embed"),
    "curate": ("evaluate.options.Curate", "evaluate.curate.command.run_curate"),
    "compare": ("run.compare.Compare", "run.compare.run_compare"),
    "export": ("export.options.Export", "export.export.run_export"),
    "doctor": ("doctor.doctor.Doctor", "doctor.doctor.run_doctor"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status of the process."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[tuple[str, ...], Callable[[list[str]], int]] = {
        ("pretrain",): _pretrain,
        **{tuple(name.split()): partial(_run, name) for name in _COMMANDS},
    }
    for name, command in commands.items():
        if tuple(arguments[: len(name)]) == name:
            run: Callable[[], int] = partial(command, arguments[len(name) :])
            if name != ("export",) and not hasattr(signal, "SIGUSR1"):
                run = _refuse_platform
            return run_command(f"bt-fast {' '.join(name)}", run)
    if arguments == ["--version"]:
        print(__version__)
        return 0
    if not arguments or arguments[-1] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0 if arguments else 2
    known = [" ".join(name) for name in commands]
    near = difflib.get_close_matches(arguments[0], known, n=1)
    advice = f"perhaps you meant {near[0]}; " if near else ""
    print(
        f"bt-fast: there is no command {' '.join(arguments[:2])!r}; {advice}the commands are"
        f" {', '.join(known)}",
        file=sys.stderr,
    )
    return 2


def run_command(program: str, command: Callable[[], int]) -> int:
    """Run a command; a user error becomes one line on stderr and an exit status."""
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


def _refuse_platform() -> int:
    raise ValueError("this command needs Linux; bt-fast export and bt_fast.load_encoder work here")


def _pretrain(arguments: list[str]) -> int:
    from bt_fast.distributed.signals import StopFlag

    with StopFlag() as stop:  # before torch is imported, which takes seconds
        config = parse_pretrain(arguments)
        from bt_fast.pretrain_command import run_pretrain

        return run_pretrain(config, arguments, stop)


def parse_pretrain(arguments: Sequence[str]) -> Config:
    """Flags -> Config, whose defaults are those of recipe and ablation, or of the resumed run."""
    from bt_fast import authors_flags
    from bt_fast.ablations import ablate
    from bt_fast.recipes import RECIPES
    from pipelines.common.flags import last_value, renamed_flags

    arguments = renamed_flags(arguments, RENAMED)
    resume, recipe, ablation = (
        last_value(flag, arguments) for flag in ("--resume", "--recipe", "--ablation")
    )
    saved = load_config(Path(resume), "--resume") if resume is not None else None
    default = saved if saved is not None else RECIPES.get(recipe or "imagenet", Config)()
    if saved is None and ablation is not None:
        default = ablate(default, ablation)
    config = authors_flags.parse(Config, "bt-fast pretrain", arguments, authors_flags.MAIN, default)
    return resumed(config, saved)


def _run(name: str, arguments: list[str]) -> int:
    from bt_fast import authors_flags
    from pipelines.common.flags import parse_flags

    flags, function = _COMMANDS[name]
    if not flags.startswith("evaluate."):
        options = parse_flags(_imported(flags), f"bt-fast {name}", arguments)
        return _imported(function)(options)
    theirs = authors_flags.EVALUATE
    options = authors_flags.parse(_imported(flags), f"bt-fast {name}", arguments, theirs)
    from bt_fast.evaluate.command import run_evaluation

    return run_evaluation(name, options, arguments, _imported(function))


def _imported(path: str) -> Any:
    """The object at MODULE.NAME of bt_fast."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"bt_fast.{module}"), name)


if __name__ == "__main__":
    sys.exit(main())
