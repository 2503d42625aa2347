"""Workflows, issue forms and CITATION.cff: their schemas, their make targets, their versions."""

import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from pipelines import __version__

FORMS = ROOT / ".github" / "ISSUE_TEMPLATE"
WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))
SCHEMAS = {
    "vendor.github-workflows": WORKFLOWS,
    "vendor.github-issue-forms": [FORMS / "bug.yml", FORMS / "proposal.yml"],
    "vendor.github-issue-config": [FORMS / "config.yml"],
    "vendor.citation-file-format": [ROOT / "CITATION.cff"],
}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_schemas(schema):
    pytest.importorskip("check_jsonschema", reason="check-jsonschema is not installed")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema]
    done = subprocess.run([*command, *SCHEMAS[schema]], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_actionlint():
    if shutil.which("actionlint") is None:
        pytest.skip("actionlint is not installed")
    done = subprocess.run(["actionlint", *WORKFLOWS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_workflows_call_existing_targets_of_make():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    called = [name for path in WORKFLOWS for name in re.findall(r"make ([\w-]+)", path.read_text())]
    assert {"lint", "test", "test-portable", "test-wheel", "docs"} == set(called) <= set(targets)


def test_the_citation_is_of_this_version():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {__version__}\n" in citation
    date = re.search(r"^date-released: (.+)$", citation, re.MULTILINE)
    assert date and f"## {__version__}, {date[1]}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_forms_ask_for_the_machine():
    assert "bt-fast doctor --json" in (FORMS / "bug.yml").read_text()
