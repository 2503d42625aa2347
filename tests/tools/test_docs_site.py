"""The site: all pages in its navigation, links, the references, and a build without a warning."""

import re

import pytest
from conftest import ROOT, run_python

import bt_fast
from tools import docs_site

INDEX = (ROOT / "docs" / "index.md").read_text()


def test_the_navigation_has_every_page_once():
    sections = {name: pages for part in docs_site.navigation(INDEX) for name, pages in part.items()}
    pages = [page for linked in sections.values() for page in linked]
    files = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert sorted(pages) == sorted(files | docs_site.ORIGINS.keys() | {"commands.md", "python.md"})


@pytest.mark.parametrize(
    "origin,text,expected",
    [
        ("README.md", "[a](docs/errors.md#x)", "[a](errors.md#x)"),
        ("README.md", "![a](docs/images/a.png)", "![a](images/a.png)"),
        ("README.md", "[a](docs/index.md)", "[a](pages.md)"),
        ("docs/errors.md", "[a](../README.md)", "[a](index.md)"),
        ("docs/errors.md", "[a](first-run.ipynb)", "[a](first-run.md)"),
        ("docs/errors.md", "[a](#x), [b](https://example.org/docs/a.md)", None),
    ],
)
def test_links_lead_to_pages_of_the_site(origin, text, expected):
    assert docs_site.with_site_links(text, origin) == (expected or text)


def test_every_command_has_its_help():
    page = docs_site.commands()
    known = run_python("-m", "bt_fast", "no-command", cwd=ROOT).stderr
    names = known.partition("the commands are ")[2].strip().split(", ")
    names = [f"bt-fast {name}" for name in names]
    assert re.findall("^## (.+)$", page, re.MULTILINE) == ["bt-convert", "bt-fast", *names]
    for flag in ("--skip-broken", "--accumulate", "--collapse", "--json"):
        assert flag in page


def test_the_reference_has_every_exported_name():
    page = docs_site.python_api()
    assert all(f"::: bt_fast.{name}\n" in page for name in bt_fast.__all__ if name[0] != "_")


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("material", reason="the extra docs is not installed")
    pytest.importorskip("mkdocstrings", reason="the extra docs is not installed")
    site = tmp_path / "site"
    done = run_python("-m", "mkdocs", "build", "--strict", "--site-dir", site, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for page in ("index", "python/index", "commands/index", "first-run/index"):
        assert (site / f"{page}.html").stat().st_size > 10_000
