"""Flags of the authors' main.py and evaluate.py, named where bt-fast's are expected."""

import re
from collections.abc import Mapping, Sequence

from pipelines.common.flags import Options, last_value, parse_flags

# Their flag: ours. The table in docs/coming-from-barlowtwins.md says more.
MAIN = {
    "--learning-rate-weights": "--lr-weights",
    "--learning-rate-biases": "--lr-biases",
    "--learning-rate": "--lr-weights",  # of early versions, like the next two
    "--lr": "--lr-weights",
    "--scale-loss": "--lr-biases, for its effect on biases",
    "--print-freq": "--log-every",
    "--checkpoint-dir": "--run-dir",
}
EVALUATE = {
    "--weights": "bt-fast eval linear (freeze) or semi (finetune)",
    "--train-percent": "--percent of bt-fast eval semi",
    "--lr-backbone": "--lr-encoder of bt-fast eval semi",
    "--lr-classifier": "--lr of bt-fast eval linear, or --lr-head of semi",
    "--checkpoint-dir": "--out",
}


def parse(
    cls: type[Options],
    prog: str,
    arguments: Sequence[str],
    flags: Mapping[str, str],
    default: Options | None = None,
) -> Options:
    """`parse_flags`, whose error names our form of the authors' flags if there are any.

    flags: MAIN or EVALUATE.
    """
    try:
        return parse_flags(cls, prog, arguments, default=default)
    except ValueError as error:
        raise ValueError(_explained(str(error), arguments, flags)) from None


def _explained(error: str, arguments: Sequence[str], flags: Mapping[str, str]) -> str:
    names = [argument.partition("=")[0].replace("_", "-") for argument in arguments]
    found = [f"{name} is {flags[name]}" for name in flags if name in names]
    widths = last_value("--projector", arguments) or ""
    if re.fullmatch(r"\d+([-,x]\d+)+", widths):
        found.append(f"--projector {widths} is --projector {' '.join(re.split('[-,x]', widths))}")
    directory = arguments[0] if flags is MAIN and arguments else "-"
    if not directory.startswith("-"):
        converted = f"out.beton, after bt-convert {directory} out.beton"
        ours = directory if directory.endswith(".beton") else converted
        found.insert(0, f"DIR ({directory}) is --data {ours}")
    if not found:
        return error
    return f"in bt-fast, {'; '.join(found)}; see docs/coming-from-barlowtwins.md"
