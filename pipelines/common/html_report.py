"""Parts of a report as HTML: one file without scripts and links, which opens offline.

Every function returns a piece of HTML and escapes the text it is given; `page` joins the pieces.
Equal arguments give equal text.
"""

import base64
import html
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from pipelines.common.console import printable

THUMBNAIL_SIDE = 112  # pixels
_STYLE = """
:root { color-scheme: light dark; }
body { max-width: 1120px; margin: 0 auto; padding: 8px 16px 64px;
  font: 15px/1.5 system-ui, sans-serif; }
h1, th, td, figcaption { overflow-wrap: anywhere; }
h1 { font-size: 24px; } h2 { font-size: 17px; } h3 { font-size: 14px; }
section { border: 1px solid #8886; border-radius: 10px; padding: 0 20px 8px; margin: 16px 0; }
table { border-collapse: collapse; }
th, td { padding: 3px 18px 3px 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid #8886; }
td.number { text-align: right; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, figcaption { color: #888; }
.plots { display: flex; flex-wrap: wrap; gap: 24px; }
figure { margin: 0; } figcaption { font-size: 12px; }
svg { display: block; } svg rect { fill: #5b86dc; } svg text { fill: #888; font-size: 11px; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)); gap: 12px; }
.sheet img { display: block; min-width: 64px; max-width: 100%; border-radius: 4px; }
""".strip()


class Picture(NamedTuple):
    """A JPEG and the text below it."""

    jpeg: bytes
    caption: str


def text(value: object) -> str:
    """The value as text of one line; numbers with separators."""
    shown = f"{value:,}" if isinstance(value, int) else str(value)
    return html.escape(printable(shown))


def page(title: str, sections: Iterable[str]) -> str:
    """The complete file. Its policy lets a browser load nothing but the pictures inside."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{text(title)}</title>\n'
        f"<style>\n{_STYLE}\n</style>\n</head>\n<body>\n<h1>{text(title)}</h1>\n"
        + "".join(sections)
        + "</body>\n</html>\n"
    )


def section(heading: str, *parts: str) -> str:
    """A box with a heading; empty if all parts are."""
    content = "".join(parts)
    return f"<section>\n<h2>{text(heading)}</h2>\n{content}</section>\n" if content else ""


def subheading(value: str) -> str:
    """A heading inside a section."""
    return f"<h3>{text(value)}</h3>\n"


def paragraph(value: str) -> str:
    """A paragraph of text."""
    return f"<p>{text(value)}</p>\n"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; integers are aligned to the right. Empty without rows."""
    lines = []
    for row in rows:
        cells = ""
        for value in row:
            tag = '<td class="number">' if isinstance(value, int) else "<td>"
            cells += f"{tag}{text(value)}</td>"
        lines.append(f"<tr>{cells}</tr>\n")
    titles = "".join(f"<th>{text(title)}</th>" for title in head)
    return f"<table>\n<tr>{titles}</tr>\n{''.join(lines)}</table>\n" if lines else ""


def histogram(title: str, values: np.ndarray, *, log: bool = False) -> str:
    """A histogram of the values, [n], as SVG; log: bins of equal ratio. Empty without values."""
    if not len(values):
        return ""
    low, high = float(values.min()), float(values.max())
    if low == high:
        low, high = (low / 1.1, high * 1.1) if log else (low - 0.5, high + 0.5)
    edges = (np.geomspace if log else np.linspace)(low, high, 33)
    edges[0], edges[-1] = low, high  # not rounded
    counts, _ = np.histogram(values, edges)
    width, height, step = 320, 96, 10
    rects = [
        f'<rect x="{step * i:.1f}" y="{height - h:.1f}" width="{step - 1:.1f}" height="{h:.1f}"/>'
        for i, h in enumerate((height * counts / max(counts.max(), 1)).tolist())
        if h
    ]
    ends = (
        f'<text x="0" y="{height + 14}">{values.min():,.4g}</text>'
        f'<text x="{width}" y="{height + 14}" text-anchor="end">{values.max():,.4g}</text>'
    )
    return (
        f'<figure><svg width="{width}" height="{height + 18}" role="img">{"".join(rects)}{ends}'
        f"</svg><figcaption>{text(title)}</figcaption></figure>\n"
    )


def row(*parts: str) -> str:
    """Parts beside each other, such as histograms."""
    return f'<div class="plots">\n{"".join(parts)}</div>\n'


def sheet(pictures: Iterable[Picture]) -> str:
    """A grid of pictures with their captions. Empty without any."""
    figures = [
        f'<figure><img alt="" src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}">'
        f"<figcaption>{text(caption)}</figcaption></figure>\n"
        for jpeg, caption in pictures
    ]
    return f'<div class="sheet">\n{"".join(figures)}</div>\n' if figures else ""


def thumbnail(jpeg: bytes) -> bytes:
    """A JPEG of at most THUMBNAIL_SIDE pixels. Raises ValueError if the image does not decode."""
    height, width, _, _ = simplejpeg.decode_jpeg_header(jpeg)
    # The lowest resolution of the decoder that is at least three quarters of the side.
    wanted = 3 * THUMBNAIL_SIDE / (4 * max(height, width))
    least = [max(1, min(s, int(wanted * s))) for s in (height, width)]
    pixels = simplejpeg.decode_jpeg(
        jpeg, "RGB", min_height=least[0], min_width=least[1], min_factor=1, strict=False
    )
    small = Image.fromarray(pixels)
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return simplejpeg.encode_jpeg(np.ascontiguousarray(small), quality=80, colorsubsampling="420")
