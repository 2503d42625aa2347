"""Parses flags into a dataclass with tyro, whose framed error messages become one line."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import tyro

Options = TypeVar("Options")

_FRAME = " \t│╭╮╰╯─|+-"


def parse_flags(
    cls: type[Options],
    prog: str,
    arguments: Sequence[str] | None,
    *,
    default: Options | None = None,
    config: Sequence[Any] = (),
) -> Options:
    """Fill the dataclass `cls` from flags (default: sys.argv); `--help` prints and exits 0.

    Raises ValueError with a one-line message for invalid flags.
    """
    errors = io.StringIO()
    optional: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(errors):
            try:
                return tyro.cli(cls, prog=prog, args=arguments, config=tuple(config), **optional)
            finally:
                sys.stdout.flush()
    except BrokenPipeError:  # as after `bt-convert --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes again at exit
        raise SystemExit(1) from None
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(f"{_one_line(errors.getvalue())}; see {prog} --help") from None


def last_value(flag: str, arguments: Sequence[str]) -> str | None:
    """The last value of a flag, read before parsing because it determines the defaults."""
    found = None
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == flag:
            found = value if equals else next(iter(arguments[index + 1 :]), None)
    return found


def renamed_flags(arguments: Sequence[str], names: Mapping[str, str]) -> list[str]:
    """The arguments with earlier flags replaced; names: earlier field -> present field."""
    flags = {f"--{old}": f"--{new}" for old, new in names.items()}
    split = (argument.partition("=") for argument in arguments)
    return [flags.get(flag, flag) + equals + value for flag, equals, value in split]


def _one_line(framed: str) -> str:
    """The message in tyro's frame and the flag it suggests; rules divide title, message, help."""
    if "Missing from" in framed:  # followed by names, and further right their help
        names = re.findall(r"^. {5}(\S+)", framed.partition("For full help")[0], re.M)
        return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} missing"
    sections: list[list[str]] = [[]]
    for number, line in enumerate(framed.splitlines()):
        text = line.strip(" \t│╭╮╰╯─|+")
        if set(text) <= set(_FRAME) or number == 0:  # a rule, or the line of the title
            sections.append([])
        else:
            sections[-1].append(text)
    parts = [" ".join(section) for section in sections if section]
    if not parts:
        return framed.strip()
    message = parts[0].removeprefix("Error parsing ").rstrip(".")
    message = re.sub(r"^\w+: (?=--)", "", message)  # users do not know the name of the dataclass
    suggested = re.search(r"Perhaps you meant:\s+(--[\w.-]+)", " ".join(parts[1:]))
    return f"{message}; perhaps you meant {suggested[1]}" if suggested else message
