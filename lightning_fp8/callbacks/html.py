"""Pages of HTML that need nothing else: no network, no scripts, no files; pictures lie in them as data."""

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from io import BytesIO

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.6em } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ccc }
table { border-collapse: collapse } td, th { padding: .15em .8em .15em 0; text-align: left; vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums } tr.bad { color: #b00020; font-weight: 600 }
img { max-width: 100% } pre { background: #f6f6f6; padding: 1em; overflow-x: auto } .note { color: #666 }
"""


def document(title: str, parts: Mapping[str, str]) -> str:
    """A page of sections, heading -> HTML; those that are empty are left out."""
    body = "".join(f"<section><h2>{escape(name)}</h2>{part}</section>" for name, part in parts.items() if part)
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>{body}</body></html>\n"
    )


def picture(draw: Callable[[BytesIO], None], description: str) -> str:
    """An image that `draw` writes, in the page itself; nothing if it writes none."""
    file = BytesIO()
    draw(file)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{escape(description)}" src="data:image/png;base64,{data}">' if data else ""


def tabulate(head: Sequence[str], lines: Sequence[Sequence[str]], bad: Sequence[bool] = ()) -> str:
    """A table; lines that are `bad` are marked."""

    def row(cells: Sequence[str], tag: str, mark: str = "") -> str:
        return f"<tr{mark}>{''.join(_cell(cell, tag) for cell in cells)}</tr>"

    marks = [' class="bad"' if is_bad else "" for is_bad in bad] or [""] * len(lines)
    top = row(head, "th") if head else ""
    return f"<table>{top}{''.join(row(cells, 'td', mark) for cells, mark in zip(lines, marks, strict=True))}</table>"


def _cell(text: str, tag: str) -> str:
    mark = ' class="n"' if _is_number(text) else ""
    return f"<{tag}{mark}>{escape(text)}</{tag}>"


def _is_number(text: str) -> bool:
    try:
        return not math.isnan(float(text.replace(",", "")))
    except ValueError:
        return False
