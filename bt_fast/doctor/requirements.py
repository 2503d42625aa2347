"""What bt-fast asks for and what is installed: the list itself stands in pyproject.toml."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement


def requirements() -> dict[str, list[Requirement]]:
    """By extra, "" for what is always needed: of the checkout, else as it was installed."""
    file = Path(__file__).parents[2] / "pyproject.toml"
    if file.exists():
        project = tomllib.loads(file.read_text())["project"]
        texts = {"": project["dependencies"], **project["optional-dependencies"]}
        return {extra: [Requirement(text) for text in texts[extra]] for extra in texts}
    found: dict[str, list[Requirement]] = {"": []}
    for text in importlib.metadata.requires("bt-fast") or ():
        extra = re.search(r"""extra == ["']([\w-]+)["']""", text)
        found.setdefault(extra[1] if extra else "", []).append(Requirement(text))
    return found


def version(package: str) -> str | None:
    """Of an installed distribution; None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def described(names: list[str]) -> str:
    """The versions of these, where they are installed: "torch 2.14.1, rich 15.0.0"."""
    return ", ".join(f"{name} {version(name)}" for name in names if version(name)) or "none"


def unmet() -> list[str]:
    """What must be there and is not, or is too old, as pip takes it: "torch>=2.10"."""
    return [
        f"{needed.name}{needed.specifier}"
        for needed in requirements()[""]
        if not needed.specifier.contains(version(needed.name) or "0", prereleases=True)
    ]
