"""What must hold of the Dockerfile, which no engine builds here."""

import json
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", (ROOT / "Dockerfile").read_text()))
STEPS = [tuple(line.split(maxsplit=1)) for line in TEXT.splitlines() if line.strip()]


def last(instruction: str) -> str:
    return [text for name, text in STEPS if name == instruction][-1]


def test_the_image_runs_as_an_unprivileged_user():
    user, _, group = last("USER").partition(":")
    assert int(user) > 0 and int(group) > 0  # by number: a cluster can see that it is not root
    names = [name for name, _ in STEPS]
    assert set(names[names.index("USER") :]) <= {"USER", "ENTRYPOINT", "CMD"}


def test_signals_reach_the_program():
    """The exec form: a shell in between would keep SIGTERM to itself."""
    assert json.loads(last("ENTRYPOINT")) == ["bt-fast"]
    assert json.loads(last("CMD")) == ["--help"]


def test_the_build_context_has_everything_copied():
    context = (ROOT / ".dockerignore").read_text().splitlines()
    stages = {text.partition(" AS ")[2] for name, text in STEPS if name == "FROM"}
    for words in (text.split() for name, text in STEPS if name == "COPY"):
        if words[0].startswith("--from="):
            assert words[0].removeprefix("--from=") in stages
            continue
        for source in words[:-1]:
            assert (ROOT / source).exists() and f"!{source}" in context, source


def test_python_packages_are_pinned():
    """Every requirement of the image has its version in constraints.txt."""
    (step,) = (text for name, text in STEPS if name == "RUN" and "--requirement" in text)
    assert "--constraint constraints.txt" in step
    extras = re.search(r"for name in \(([^)]*)\)", step)[1].replace("'", "").split(", ")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for name in extras:
        wanted += project["optional-dependencies"][name]
    assert {"ffcv", "dali"} <= set(extras)
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {line.partition("==")[0] for line in lines if "==" in line}
    assert {re.match(r"[\w.-]+", line)[0] for line in wanted} <= pins
