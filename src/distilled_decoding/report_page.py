"""A page in a few forms of Markdown (headings, paragraphs, tables, pictures, code), and the same page as HTML."""

import base64
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; margin: 2.2rem 0 0.8rem; }
h2 { border-bottom: 1px solid #ccc; padding-bottom: 0.3rem; }
p { max-width: 46rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.35rem 0.7rem; text-align: right; border-bottom: 1px solid #ddd; }
th { vertical-align: bottom; border-bottom: 2px solid #888; }
th:first-child, td:first-child { text-align: left; }
td { white-space: nowrap; }
tr:hover td { background: #f4f7fb; }
img { max-width: 100%; height: auto; }
code { background: #f2f2f2; padding: 0 0.2em; }
"""


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first with the titles, as a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def html(markdown: str, folder: Path) -> str:
    """A page of its own from headings, paragraphs, tables and pictures; the pictures, of `folder`, are put inside."""
    blocks = [_html_block(block, folder) for block in markdown.strip().split("\n\n")]
    title = _inline(markdown.split("\n", 1)[0].lstrip("# "))
    head = f'<meta charset="utf-8">\n<title>{title}</title>\n<style>{_STYLE}</style>'
    body = "\n".join(blocks)
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def _html_block(block: str, folder: Path) -> str:
    if heading := re.fullmatch(r"(#+) (.*)", block):
        level = len(heading[1])
        return f"<h{level}>{_inline(heading[2])}</h{level}>"
    if picture := re.fullmatch(r"!\[(.*)\]\((.*)\)", block):
        data = base64.b64encode((folder / picture[2]).read_bytes()).decode()
        return f'<p class="wide"><img alt="{escape(picture[1])}" src="data:image/png;base64,{data}"></p>'
    if block.startswith("|"):
        head, _, *rows = [[_inline(cell.strip()) for cell in line.strip("|").split("|")] for line in block.split("\n")]
        lines = [_row(head, "th"), *(_row(row, "td") for row in rows)]
        return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"
    return f"<p>{_inline(block)}</p>"


def _row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
