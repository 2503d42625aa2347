"""The description on the package index: README.md with its links made absolute."""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "pipelines/__init__.py").read_text())[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY = PROJECT["urls"]["Repository"]


def absolute(link: re.Match) -> str:
    """`[text](target` or `![text](target`, the target in the release's tag of the repository."""
    kind = "raw" if link[0].startswith("!") else "blob"
    return f"{link[1]}({REPOSITORY}/{kind}/v{VERSION}/{link[2]}"


README = (ROOT / "README.md").read_text()
README = re.sub(r"(!?\[[^\]]*\])\((?!https?:|#)([^)]+)", absolute, README)
setup(long_description=README, long_description_content_type="text/markdown")
