"""Reads a Dockerfile and what .dockerignore leaves of a folder: as much of both as ours use."""

import fnmatch
import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

_NOT_LOOKED_AT = {".git", ".venv", "__pycache__"}  # ignored anyway, and large


@dataclass(kw_only=True, slots=True)
class Stage:
    """One FROM and what follows, or an image that a FROM builds upon."""

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)  # (instruction, its text)

    def last(self, instruction: str) -> str:
        """The text of the last such instruction; '' if there is none."""
        return next((text for name, text in reversed(self.steps) if name == instruction), "")


def parse(text: str) -> list[Stage]:
    """The stages of a Dockerfile. Raises ValueError for what this does not know."""
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
            raise ValueError(f"Dockerfile: {instruction} is not known here")
    return stages


def copied(text: str) -> tuple[str | None, list[str], str]:
    """COPY's (stage of --from, sources, destination)."""
    words = text.split()
    stage = words.pop(0).removeprefix("--from=") if words[0].startswith("--from=") else None
    return stage, words[:-1], words[-1]


def context(folder: Path) -> list[PurePosixPath]:
    """The files of the build context: those that .dockerignore leaves."""
    lines = (folder / ".dockerignore").read_text().splitlines()
    patterns = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _NOT_LOOKED_AT]
        found += [PurePosixPath(os.path.relpath(Path(parent, file), folder)) for file in files]
    return sorted(path for path in found if not ignored(path, patterns))


def ignored(path: PurePosixPath, patterns: list[str]) -> bool:
    """The last pattern that matches a file or a folder it is in decides; ! takes it back."""
    names = [path, *list(path.parents)[:-1]]
    verdict = False
    for pattern in patterns:
        plain = pattern.removeprefix("!").removeprefix("**/")
        anywhere = "**/" in pattern
        if any(fnmatch.fnmatch(name.name if anywhere else str(name), plain) for name in names):
            verdict = not pattern.startswith("!")
    return verdict
