"""report.html: one file that needs nothing else. No script, no request; readable on a phone and in the dark."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from xar_cli.evaluate.report import Strip

TILE = 96  # pixels of one image in a strip, about
GAP = 2
GAP_GREY = 128
COLUMNS = 8

STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --soft: #57606a; --line: #d0d7de; --back: #fff; --panel: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --soft: #9198a1; --line: #3d444d; --back: #0d1117; --panel: #151b23; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; color: var(--text); background: var(--back);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
p, li, figcaption { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .95rem; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; } td:nth-child(2):last-child { overflow-wrap: anywhere; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
small { display: block; color: var(--soft); }
figure { margin: 0 0 1rem; } img { max-width: 100%; height: auto; display: block; image-rendering: pixelated; }
.panel { background: var(--panel); border: 1px solid var(--line); border-radius: .5rem; padding: .1rem 1rem; }
"""


def page(content: Mapping[str, Any], samples: Sequence[Strip], neighbours: Sequence[Strip]) -> str:
    """The whole page.

    Args:
        content: what report.json holds.
        samples: strips of samples; neighbours: strips of a sample and the real images nearest to it.
    """
    from xar_cli.evaluate import report

    heading = escape(report.title(content))
    body = [f"<h1>{heading}</h1>", _table(report.what_was_measured(content))]
    for name, result in content["protocols"].items():
        body += [f"<h2>{escape(name)}</h2>", f"<p>{escape(result['description'])}.</p>"]
        body.append(_metric_table(report.metric_rows(result, content["published"])))
        if result["per_class"]:
            rows = [
                (label, str(found["count"]), f"{found['accuracy']:.3f}") for label, found in result["per_class"].items()
            ]
            body += ["<h3>By class</h3>", _table(rows, ("class", "images", "accuracy"), number_columns=(1, 2))]
    differences = "".join(f"<li>{escape(text)}</li>" for text in content["differences"])
    body += ["<h2>What differs from published numbers</h2>", f'<div class="panel"><ul>{differences}</ul></div>']
    if content["published"]:
        source = content["published"].get("source", "")
        body.append(f"<p>Published figures: {escape(content['published']['recipe'])}, {escape(source)}.</p>")
    body += ["<h2>Samples</h2>", *map(_figure, samples)]
    if neighbours:
        body += [
            "<h2>Nearest real images</h2>",
            "<p>First a sample, then the real images nearest to it in feature space. Copies would show that the model "
            "memorises.</p>",
            *map(_figure, neighbours),
        ]
    for name, facts in report.fact_tables(content):
        body += [f"<h2>{escape(name)}</h2>", _table(facts)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{heading}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n'
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def png_data_uri(image: np.ndarray) -> str:
    """An (H, W, 3) uint8 image as a PNG inside a data: address."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def sheet(images: Sequence[np.ndarray], columns: int = COLUMNS) -> np.ndarray:
    """Images, of mixed sizes too, on one grey sheet: small ones enlarged by a whole factor, large ones reduced."""
    tiles = [_tile(image) for image in images]
    height, width = (max(tile.shape[side] for tile in tiles) for side in (0, 1))
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    result = np.full((rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, 3), GAP_GREY, np.uint8)
    for index, tile in enumerate(tiles):
        top, left = GAP + index // columns * (height + GAP), GAP + index % columns * (width + GAP)
        result[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return result


def _tile(image: np.ndarray) -> np.ndarray:
    longest = max(image.shape[:2])
    if longest <= TILE // 2:
        factor = TILE // longest
        return image.repeat(factor, axis=0).repeat(factor, axis=1)
    if longest <= TILE:
        return image
    height, width = (max(1, round(side * TILE / longest)) for side in image.shape[:2])
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((width, height), Image.Resampling.LANCZOS))


def _figure(strip: Strip) -> str:
    caption, picture = escape(strip.caption), sheet(strip.images)
    height, width = picture.shape[:2]
    return (
        f'<figure><img src="{png_data_uri(picture)}" width="{width}" height="{height}" alt="{caption}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _metric_table(rows: Iterable[Sequence[str]]) -> str:
    """Metrics with their notes below their names, so that the table fits a phone."""
    rows = list(rows)
    published = any(theirs for _, _, theirs, _ in rows)
    head = "<th>metric</th><th>value</th>" + ("<th>published</th>" if published else "")
    lines = [f"<tr>{head}</tr>"]
    for name, value, theirs, note in rows:
        last = f'<td class="number">{escape(theirs)}</td>' if published else ""
        named = f"<td>{escape(name)}<small>{escape(note)}</small></td>"
        lines.append(f'<tr>{named}<td class="number">{escape(value)}</td>{last}</tr>')
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _table(rows: Iterable[Sequence[str]], header: Sequence[str] = (), number_columns: Sequence[int] = ()) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = [f"<tr>{head}</tr>"] if header else []
    for row in rows:
        cells = (
            f'<td class="number">{escape(cell)}</td>' if column in number_columns else f"<td>{escape(cell)}</td>"
            for column, cell in enumerate(row)
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'
