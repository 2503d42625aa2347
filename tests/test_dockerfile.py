"""What must hold of the Dockerfile; `tools/check_dockerfile.py` runs its steps."""

import json
import re
import tomllib
from pathlib import Path, PurePosixPath

import pytest

from tools.dockerfile import context, copied, ignored, parse

ROOT = Path(__file__).parents[1]
STAGES = parse((ROOT / "Dockerfile").read_text())
FINAL = STAGES[-1]


def test_the_image_runs_as_nobody_special():
    user, _, group = FINAL.last("USER").partition(":")
    assert int(user) > 0 and int(group) > 0  # by number: a cluster can see that it is not root
    after = FINAL.steps[[name for name, _ in FINAL.steps].index("USER") :]
    assert {name for name, _ in after} <= {"USER", "ENTRYPOINT", "CMD"}


def test_signals_reach_the_program():
    """The exec form: a shell in between would keep SIGTERM to itself."""
    assert json.loads(FINAL.last("ENTRYPOINT")) == ["bt-fast"]
    assert json.loads(FINAL.last("CMD")) == ["--help"]


def test_everything_copied_is_there_and_nothing_else_is_sent():
    files = context(ROOT)
    stages = {stage.name for stage in STAGES}
    wanted = []
    for stage in STAGES:
        for origin, sources, _ in (copied(text) for name, text in stage.steps if name == "COPY"):
            assert origin is None or origin in stages
            wanted += [PurePosixPath(source) for source in sources if origin is None]
    for source in wanted:
        assert any(source in (file, *file.parents) for file in files), source
    for file in files:
        assert any(source in (file, *file.parents) for source in wanted), file
    assert PurePosixPath("bt_fast/evaluate/detectron2/coco_mask_rcnn_c4_1x.yaml") in files


def test_python_packages_are_pinned():
    """Every requirement of the image has its version in constraints.txt."""
    (step,) = (text for _, text in STAGES[0].steps if "--requirement" in text)
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


def test_layers_stay_small():
    for stage in STAGES:
        for name, text in stage.steps:
            if name == "RUN" and "apt-get install" in text:
                assert "--no-install-recommends" in text and "rm -rf /var/lib/apt/lists" in text
            if name == "RUN" and "/pip " in text:
                assert "--no-cache-dir" in text
    # The code changes often, the environment seldom: it comes later, in a layer of its own.
    copies = [text for name, text in FINAL.steps if name == "COPY"]
    assert [copied(text)[0] for text in copies] == ["environment", "package"]


@pytest.mark.parametrize(
    "path,patterns,expected",
    [
        ("a/b.py", ["*", "!a"], False),
        ("a/__pycache__/b.pyc", ["*", "!a", "**/__pycache__"], True),
        ("c", ["*", "!a"], True),
        ("a/b.py", ["b.py"], False),
        ("a/b.py", ["**/b.py"], True),
        ("a/b.py", ["a", "!a/b.py"], False),
    ],
)
def test_what_dockerignore_means(path, patterns, expected):
    assert ignored(PurePosixPath(path), patterns) == expected


def test_a_dockerfile_in_stages_is_read():
    text = "# c\nFROM a AS one\nRUN x \\\n    && y\nFROM one\nCOPY --from=one /p /q\nUSER 7:7\n"
    one, two = parse(text)
    assert (one.name, one.base, one.steps) == ("one", "a", [("RUN", "x      && y")])
    assert (two.base, two.last("USER"), copied(two.last("COPY"))) == (
        "one",
        "7:7",
        ("one", ["/p"], "/q"),
    )
    with pytest.raises(ValueError, match="ONBUILD is not supported"):
        parse("FROM a\nONBUILD RUN x")
