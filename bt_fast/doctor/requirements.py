"""Requirements of bt-fast, as pyproject.toml lists them, and the installed versions."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement


def requirements() -> dict[str, list[Requirement]]:
    """Requirements by extra, "" for the mandatory ones: of the checkout or the installation."""
    file = Path(__file__).parents[2] / "pyproject.toml"
    if file.exists():
        project = tomllib.loads(file.read_text())["project"]
        texts = {"": project["dependencies"], **project["optional-dependencies"]}
        return {extra: [Requirement(text) for text in texts[extra]] for extra in texts}
    by_extra: dict[str, list[Requirement]] = {"": []}
    for text in importlib.metadata.requires("bt-fast") or ():
        extra = re.search(r"""extra == ["']([\w-]+)["']""", text)
        by_extra.setdefault(extra[1] if extra else "", []).append(Requirement(text))
    return by_extra


def version(package: str) -> str | None:
    """Version of an installed distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_versions(names: list[str]) -> str:
    """The installed ones among these packages: "torch 2.14.1, rich 15.0.0"."""
    return ", ".join(f"{name} {version(name)}" for name in names if version(name)) or "none"


def unmet() -> list[str]:
    """Required packages that are missing or too old, in pip's syntax: "torch>=2.10"."""
    return [
        f"{required.name}{required.specifier}"
        for required in requirements()[""]
        if not required.specifier.contains(version(required.name) or "0", prereleases=True)
    ]
