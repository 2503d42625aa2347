from types import SimpleNamespace

import pytest

from pipelines.common import console
from pipelines.common.console import plural


def test_the_first_images_do_not_count_for_the_rate(monkeypatch, capsys):
    """They wait for processes that start: 8 of 100 images in 20 s, then 8 in every second."""
    clock = iter([0.0, *(20.0 + second for second in range(14))])
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with console.progress("features", 100) as advance:
        for _ in range(12):
            advance(8)
        advance(4)
    assert capsys.readouterr().out.splitlines() == [
        "features: 48 of 100 images, 8 images/s, 0:06 left",
        "features: 88 of 100 images, 8 images/s, 0:02 left",
        "features: 100 of 100 images, 8 images/s, done",
    ]


def test_no_images_for_long_are_no_rate(monkeypatch, capsys):
    clock = iter([0.0, 1.0, 7.0])
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with console.progress("features", 10) as advance:
        advance(3)
        advance(0)
    assert "3 of 10 images" in capsys.readouterr().out


@pytest.mark.parametrize("total", [1, 5])
def test_work_that_ends_at_once_is_reported(capsys, total):
    with console.progress("features", total) as advance:
        advance(total)
    assert f"features: {total} of {total} images" in capsys.readouterr().out


@pytest.mark.parametrize(
    "number,noun,text",
    [
        (1, "class", "1 class"),
        (0, "class", "0 classes"),
        (1000, "epoch", "1,000 epochs"),
        (0.5, "epoch", "0.5 epochs"),
    ],
)
def test_a_noun_agrees_with_its_number(number, noun, text):
    assert plural(number, noun) == text
