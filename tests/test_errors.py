"""Every message of docs/errors.md is produced by a command line: one line, status not 0."""

import ast
import re
from pathlib import Path

import error_beton_cases
import error_cluster_cases
import error_convert_cases
import error_eval_cases
import error_image_cases
import error_loader_cases
import error_pretrain_cases
import error_source_cases
import pytest
from error_list import ENTRIES, Place, matches, run_case

ROOT = Path(__file__).parents[1]
MODULES = (
    error_pretrain_cases,
    error_cluster_cases,
    error_loader_cases,
    error_eval_cases,
    error_beton_cases,
    error_convert_cases,
    error_source_cases,
    error_image_cases,
)
CASES = [case for module in MODULES for case in module.CASES]
ERRORS = {
    *("ValueError", "UsageError", "SourceError", "BetonError", "BrokenImages", "DamagedResult"),
    *("WorkerDied", "UnreadableImage"),
}
# Not the last word of a command line: what only a program can do wrong, reasons inside another
# message of the list, and warnings.
INTERNAL = {
    "bt_fast/ablations.py": ["the authors give no learning rate for batch size …"],
    "bt_fast/run/checkpoint.py": [
        "state.json differs from what was saved",
        "… differs from what was saved",
    ],
    "bt_fast/evaluate/voc07.py": ["average precision needs a positive image"],
    "bt_fast/loss.py": [
        "z_a and z_b must be [n, D] of the same shape and dtype, got … … and … …",
        "the loss needs at least two samples: it standardises over the batch",
        "method 'dense' needs a D x D matrix: for one process only",
        "method must be auto, dense, gram or columns, got …",
    ],
    "bt_fast/loss_variants.py": ["unknown objective …"],
    "bt_fast/models/networks.py": ["--encoder … is not one of …"],
    "bt_fast/models/batch_norm.py": [
        "a training batch holds two views of every image, got … rows",
        "batch norm needs more than one value per channel and view",
        "the batch norms of a model need the same momentum",
    ],
    "bt_fast/models/batch_norm_triton.py": [
        "batch norm needs more than one value per channel and view",
        "fused batch norm takes at most … channels, got …",
    ],
    "bt_fast/export/encoder_files.py": ["it is a compressed archive, which torch does not write"],
    "pipelines/augment/__init__.py": [
        "images must be uint8 [n, H, W, 3], got … …",
        "… images but parameters for …",
    ],
    "pipelines/augment/triton.py": ["images must have fewer than 2 ** 29 pixels, got … x …"],
    "pipelines/beton/writer.py": [
        "page_size …: must be a power of two from 2 MiB to 2 GiB",
        "…: more than num_samples=… images",
        "…: no images were added",
        "…: a name cannot contain NUL",
        "…: … bytes cannot be stored",
    ],
    "pipelines/convert/jpeg.py": ["JPEG without a frame header"],
    "pipelines/order.py": ["num_samples must not be negative, got …"],
    "pipelines/webdataset/writer.py": ["…: no images were added"],
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.message[:60])
def test_a_mistake_is_one_line(case, tmp_path, small_beton, labelled_run, monkeypatch, capsys):
    run_case(case, Place(tmp_path, small_beton, labelled_run, monkeypatch), capsys)


def test_every_message_of_the_list_has_a_case():
    assert len(set(ENTRIES)) == len(ENTRIES) > 150
    assert set(ENTRIES) - {case.message for case in CASES} == set()


def templates(source: str) -> list[str]:
    """The messages a file raises, or returns to be raised, with "…" for what is filled in."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise | ast.Return):
            error = node.exc if isinstance(node, ast.Raise) else node.value
            if isinstance(error, ast.Call) and getattr(error.func, "id", None) in ERRORS:
                found += [text for node in error.args[:1] if (text := template(node))]
        elif isinstance(node, ast.Call):
            function = node.func
            name = getattr(function, "id", None) or getattr(function, "attr", "")
            texts = [text for node in node.args if (text := template(node))][-1:]
            if name == "_require" and len(node.args) == 4:  # config's: holds, name, value, what
                found += [f"--… {text}, got …" for text in texts]
            elif name in ("_require", "_require_all"):
                found += [f"…: {text}" for text in texts]
            elif name == "_fail":
                found += texts
    return found


def template(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
    return None


@pytest.mark.parametrize(
    "path",
    sorted([*(ROOT / "bt_fast").rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")]),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_every_message_of_the_source_is_in_the_list(path):
    name = str(path.relative_to(ROOT))
    missing = []
    for text in templates(path.read_text()):
        pattern = ".*".join(re.escape(piece) for piece in text.split("…"))
        if not any(re.search(pattern, entry) or matches(entry, text) for entry in ENTRIES):
            missing.append(text)
    assert sorted(missing) == sorted(INTERNAL.get(name, []))


def test_the_search_finds_messages():
    source = "raise ValueError(f'{a} is not {b!r}')\nself._require(x, f'bad {y}')\n_fail('no', 2)"
    assert templates(source) == ["… is not …", "…: bad …", "no"]
