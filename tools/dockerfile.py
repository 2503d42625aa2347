"""Parsers of Dockerfile and .dockerignore, for the syntax that this project uses."""

import fnmatch
import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

_SKIPPED = {".git", ".venv", "__pycache__"}  # large folders that .dockerignore excludes


@dataclass(kw_only=True, slots=True)
class Stage:
    """A FROM and the instructions that follow it."""

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)  # (instruction, text)

    def last(self, instruction: str) -> str:
        """Text of the last occurrence of an instruction; '' if there is none."""
        return next((text for name, text in reversed(self.steps) if name == instruction), "")


def parse(text: str) -> list[Stage]:
    """The stages of a Dockerfile. Raises ValueError for an unknown instruction."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    stages: list[Stage] = []
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        instruction, _, rest = line.strip().partition(" ")
        if not instruction:
            continue
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            stages.append(Stage(name=name or str(len(stages)), base=base))
        elif instruction in ("RUN", "COPY", "ENV", "WORKDIR", "USER", "ENTRYPOINT", "CMD"):
            stages[-1].steps.append((instruction, rest.strip()))
        else:
            raise ValueError(f"Dockerfile: {instruction} is not supported")
    return stages


def copied(text: str) -> tuple[str | None, list[str], str]:
    """Arguments of COPY: stage of --from or None, sources, destination."""
    words = text.split()
    stage = words.pop(0).removeprefix("--from=") if words[0].startswith("--from=") else None
    return stage, words[:-1], words[-1]


def context(folder: Path) -> list[PurePosixPath]:
    """The files of the build context: all that .dockerignore does not exclude."""
    lines = (folder / ".dockerignore").read_text().splitlines()
    patterns = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIPPED]
        found += [PurePosixPath(os.path.relpath(Path(parent, file), folder)) for file in files]
    return sorted(path for path in found if not ignored(path, patterns))


def ignored(path: PurePosixPath, patterns: list[str]) -> bool:
    """Whether the last pattern that matches a file or one of its folders excludes it (no !)."""
    names = [path, *list(path.parents)[:-1]]
    is_ignored = False
    for pattern in patterns:
        plain = pattern.removeprefix("!").removeprefix("**/")
        anywhere = "**/" in pattern
        if any(fnmatch.fnmatch(name.name if anywhere else str(name), plain) for name in names):
            is_ignored = not pattern.startswith("!")
    return is_ignored
