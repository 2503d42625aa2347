"""Hooks of mkdocs: what the site contains beside docs/, its navigation, and its links.

The files of the repository stay what a code-hosting site shows. The site's home is README.md; its
navigation is docs/index.md, section by section; the references of commands and of the Python API
are written from `--help` and from docstrings.
"""

import contextlib
import io
import json
import os
import posixpath
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Pages of the site that are not docs/PAGE: their files in the repository.
ORIGINS = {
    "index.md": "README.md",
    "pages.md": "docs/index.md",
    "first-run.md": "docs/first-run.ipynb",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "reporting.md": "SECURITY.md",  # not beside security.md, which is the same on some disks
}
PAGES = {origin: page for page, origin in ORIGINS.items()}
# Pages of the sections that are not in docs/index.md.
FURTHER = {"Start": ["pages.md"], "Reference": ["commands.md", "python.md"]}
# Modules whose paths others rely on, beside the names that bt_fast exports.
MODULES = {
    "bt_fast.schedule": ("learning_rate",),
    "pipelines.order": ("epoch_order", "view_keys"),
    "pipelines.augment": ("draw", "apply"),
    "pipelines.beton": ("BetonReader",),
}


def page_of(origin: str, target: str) -> str:
    """The page that a link from a file of the repository leads to, relative to the site's pages."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
    return PAGES.get(path, path.removeprefix("docs/"))


def with_site_links(markdown: str, origin: str) -> str:
    """The text of a file, its relative links leading to pages of the site."""
    link = re.compile(r"(?<=\]\()(?!https?:|#)[^)#\s]+")
    return link.sub(lambda match: page_of(origin, match[0]), markdown)


def navigation(index: str) -> list[dict[str, list[str]]]:
    """The sections of docs/index.md and their pages."""
    sections = []
    for section in index.split("\n## ")[1:]:
        name = section.partition("\n")[0]
        linked = re.findall(r"^\| \[.+?\]\((.+?)\) \|", section, re.MULTILINE)
        pages = [page_of("docs/index.md", target) for target in linked]
        sections.append({name: pages + FURTHER.get(name, [])})
    return sections


def output_of(program, arguments: list[str]) -> str:
    """What a command prints, 100 columns wide."""
    os.environ["COLUMNS"] = "100"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        program(arguments)
    text = re.sub(r"\x1b\[[0-9;]*m", "", printed.getvalue())
    return re.sub(r" +$", "", text, flags=re.MULTILINE)


def commands() -> str:
    """The page of all command lines, as `--help` prints them."""
    from bt_fast.cli import main as bt_fast
    from pipelines.convert.command import main as bt_convert

    usage = output_of(bt_fast, ["--help"])
    names = re.findall(r"^  (\w+(?: \w+)?)  ", usage, re.MULTILINE)
    outputs = {"bt-convert": output_of(bt_convert, ["--help"]), "bt-fast": usage}
    outputs |= {f"bt-fast {name}": output_of(bt_fast, [*name.split(), "--help"]) for name in names}
    sections = (f"## {name}\n\n```text\n{text.strip()}\n```\n" for name, text in outputs.items())
    intro = "What `--help` prints. Numbers of workers are those of the machine that built it."
    return "\n".join(["# Command lines\n", intro, "", *sections])


def python_api() -> str:
    """The page of the public API, whose entries mkdocstrings fills from the docstrings."""
    import bt_fast
    from bt_fast.recipes import RECIPES

    exported = [f"bt_fast.{name}" for name in bt_fast.__all__ if name != "__version__"]
    others = [f"{module}.{name}" for module, names in MODULES.items() for name in names]
    recipes = [f"bt_fast.recipes.{recipe.__name__}" for recipe in RECIPES.values()]
    parts = {
        "Exported by bt_fast": exported,
        "Modules whose paths are stable": others,
        "Recipes": recipes,
    }
    sections = (f"## {title}\n\n" + entries(names) for title, names in parts.items())
    return "# Python API\n\n" + "\n".join(sections)


def entries(names: list[str]) -> str:
    return "".join(f"::: {name}\n\n" for name in names)


def notebook_markdown(notebook: str) -> str:
    """A notebook as a page: its text, and its code in fences."""
    texts = []
    for cell in json.loads(notebook)["cells"]:
        source = "".join(cell["source"])
        texts.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
    return "\n\n".join(texts) + "\n"


def page_texts() -> dict[str, str]:
    """Texts of the pages that are not files of docs/."""
    texts = {page: (ROOT / origin).read_text() for page, origin in ORIGINS.items()}
    texts["first-run.md"] = notebook_markdown(texts["first-run.md"])
    return texts | {"commands.md": commands(), "python.md": python_api()}


def on_config(config):
    config.nav = navigation((ROOT / "docs" / "index.md").read_text())
    return config


def on_files(files, config):
    from mkdocs.structure.files import File

    files.remove(files.get_file_from_path("index.md"))
    for page, text in page_texts().items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, page, **_):
    name = page.file.src_uri
    return with_site_links(markdown, ORIGINS.get(name, f"docs/{name}"))
