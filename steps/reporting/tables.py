"""Tables as Markdown, HTML and LaTeX: a cell's text is shown as it is, whatever characters it has."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from jinja2 import Environment
from tabulate import tabulate

Row = Sequence[Any]
_SCREEN, _ROWS = 160, 100  # columns of text; lines of two screens
#: What GitHub's Markdown takes for markup inside a cell: emphasis, code, html, mathematics, links, a column's end.
_MARKUP = re.compile(r"([\\|`*<$~]|\](?=\()|\b_|_\b|&(?=#?\w+;))")


_PAGE = Environment(autoescape=True).from_string(
    """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{{ title }}</title>
<style>
:root { color-scheme: light dark }
body { font-family: sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { padding: .25rem .7rem; border-bottom: 1px solid #8884; text-align: left; vertical-align: top }
td { font-variant-numeric: tabular-nums } footer { opacity: .7; font-size: .9rem } .table { overflow-x: auto }
</style>
<h1>{{ title }}</h1>
{% for section in sections %}<h2>{{ section.title }}</h2>
{% if section.note %}<p>{{ code(section.note) | safe }}</p>
{% endif %}<div class="table">{{ html(section.headers, section.rows) | safe }}</div>
{% endfor %}<footer>{% for line in footer %}<p>{{ line }}</p>{% endfor %}</footer>
</html>
"""
)


@dataclass(frozen=True)
class Section:
    """A table with what stands above it."""

    title: str
    note: str
    headers: Row
    rows: Sequence[Row]


@dataclass(frozen=True)
class Link:
    """A cell that leads to a file beside the page, or to an address."""

    text: str
    target: str


def page_markdown(title: str, sections: Sequence[Section], footer: Sequence[str]) -> str:
    """A page of tables for GitHub."""
    parts = [f"# {escaped(title)}"]
    for section in sections:
        parts += [f"## {escaped(section.title)}", section.note, markdown(section.headers, section.rows)]
    return "\n\n".join(filter(None, [*parts, *footer])) + "\n"


def page_html(title: str, sections: Sequence[Section], footer: Sequence[str]) -> str:
    """A page of tables that asks no other host for anything, for light and dark screens."""
    return _PAGE.render(title=title, sections=sections, footer=footer, html=html, code=_code) + "\n"


def page_latex(sections: Sequence[Section], footer: Sequence[str]) -> str:
    """Tables to be put into a paper: each is a tabular (package booktabs); notes are comments."""
    parts = []
    for section in sections:
        parts += [f"% {' '.join(line.split())}" for line in (section.title, section.note, *footer)]
        parts += [latex(section.headers, section.rows), ""]
    return "\n".join(parts) or "% no table\n"


def markdown(headers: Row, rows: Sequence[Row]) -> str:
    """A GitHub table. One wider than a screen, or longer than two, has no blanks to align its source: they would be
    half of it."""
    cells = [[escaped(cell) for cell in row] for row in rows]
    table = _table([escaped(header) for header in headers], cells, "github")
    if len(table.partition("\n")[0]) <= _SCREEN and len(rows) <= _ROWS:
        return table
    return re.sub(r"-{4,}", "---", re.sub(r"(?<=\|) {2,}| {2,}(?=\|)", " ", table))


def html(headers: Row, rows: Sequence[Row]) -> str:
    """An HTML table."""
    return _table([_anchor(cell) for cell in headers], [[_anchor(cell) for cell in row] for row in rows], "unsafehtml")


def latex(headers: Row, rows: Sequence[Row]) -> str:
    """A LaTeX tabular with the rules of package booktabs."""
    rows = [[cell.text if isinstance(cell, Link) else cell for cell in row] for row in rows]
    return _table(headers, rows, "latex_booktabs").replace("±", r"$\pm$")


def escaped(cell: Any) -> str:
    """The text of a cell, or of a heading, with a backslash before whatever would be Markdown's markup."""
    if isinstance(cell, Link):
        return f"[{escaped(cell.text)}]({cell.target})"
    return _MARKUP.sub(r"\\\1", " ".join(str(cell).split()))


def _code(note: str) -> str:
    """A note as HTML: what stands between backticks is code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(note))


def _anchor(cell: Any) -> str:
    if isinstance(cell, Link):
        return f'<a href="{escape(cell.target)}">{escape(cell.text)}</a>'
    return escape(str(cell))


def _table(headers: Row, rows: Sequence[Row], form: str) -> str:
    return tabulate([list(row) for row in rows], list(headers), tablefmt=form, disable_numparse=True)
