"""What must hold of the Dockerfile; the tests do not build it, which takes 15 GB."""

import re

from conftest import ROOT

from pipelines import __version__

TEXT = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", (ROOT / "Dockerfile").read_text()))
STEPS = [tuple(line.split(maxsplit=1)) for line in TEXT.splitlines() if line.strip()]


def test_the_build_context_has_everything_copied():
    context = (ROOT / ".dockerignore").read_text().splitlines()
    stages = {text.partition(" AS ")[2] for name, text in STEPS if name == "FROM"}
    for words in (text.split() for name, text in STEPS if name == "COPY"):
        if words[0].startswith("--from="):
            assert words[0].removeprefix("--from=") in stages
            continue
        for source in words[:-1]:
            assert (ROOT / source).exists() and f"!{source}" in context, source


def test_the_image_runs_as_an_unprivileged_user():
    user, _, group = [text for name, text in STEPS if name == "USER"][-1].partition(":")
    assert int(user) > 0 and int(group) > 0  # by number: a cluster can see that it is not root


def test_what_is_downloaded_is_cached():
    for text in (text for name, text in STEPS if name == "RUN"):
        for program, folder in (("apt-get", "/var/cache/apt"), ("pip install", "/var/cache/pip")):
            assert program not in text or f"type=cache,target={folder}" in text, text
        assert "pip install" not in text or "pip install --cache-dir /var/cache/pip " in text, text


def test_the_labels_are_of_this_version():
    (labels,) = [text for name, text in STEPS if name == "LABEL"]
    assert f'image.version="{__version__}"' in labels and 'image.licenses="MIT"' in labels
