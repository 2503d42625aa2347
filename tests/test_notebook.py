"""The notebook runs from the first cell to the last, on drawn pictures and with fewer steps."""

import os
import sys
from pathlib import Path

import pytest
from conftest import ROOT, drawn_picture

FEWER = {"epochs=10": "epochs=1", "batch_size=64": "batch_size=16"}


@pytest.mark.slow
def test_the_first_run(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    import nbformat

    (tmp_path / "photos").mkdir()
    for seed in range(32):
        drawn_picture(seed).save(tmp_path / "photos" / f"{seed:02}.jpg")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    notebook = nbformat.read(ROOT / "docs" / "first-run.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    for cell in notebook.cells:
        for text, fewer in FEWER.items():
            cell.source = cell.source.replace(text, fewer)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute(cwd=tmp_path)
    results = {cell.id: cell.outputs[-1] for cell in notebook.cells if cell.get("outputs")}
    assert "'num_images': 32" in results["report"]["data"]["text/plain"]
    assert "('00.jpg', 1.0)" in results["nearest"]["data"]["text/plain"].partition("\n")[0]
    assert results["views"]["data"]["image/png"] and results["picture"]["data"]["image/png"]
    assert (tmp_path / "first-run" / "encoder.safetensors").exists()
