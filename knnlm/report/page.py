"""A page of charts, tables and lists in the report's style: one file that opens offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knnlm.documents import write_document
from knnlm.files import all_or_none, write_text
from knnlm.report.charts import Chart
from knnlm.report.html import render_template


@dataclass(frozen=True)
class PageTable:
    """A table whose first column names the rows."""

    title: str
    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Lines:
    """A titled list of sentences."""

    title: str
    lines: Sequence[str]


@dataclass(frozen=True)
class Page:
    """The contents of a page, in order."""

    title: str
    headline: str
    lead: Sequence[str] = ()
    notes: Sequence[str] = ()
    """Warnings, in a box."""
    charts: Sequence[Chart] = ()
    tables: Sequence[PageTable] = ()
    lists: Sequence[Lines] = ()


def steps(title: str, sentences: Sequence[str]) -> Lines:
    """The steps of a protocol, with options and fields in Markdown."""
    return Lines(title, [sentence.replace("`", "") for sentence in sentences])


def settings_lines(settings: Mapping[str, Any]) -> Lines:
    """The settings that a command was run with."""
    return Lines("Settings", [f"{name}: {value}" for name, value in settings.items()])


def write_page(name: str, document: Mapping[str, Any], html: str, folder: str | Path) -> Path:
    """Write NAME.json and NAME.html into a folder, created if missing: both or neither. Return the path of the latter.

    :raises OSError: a file cannot be written.
    """
    page = Path(folder) / f"{name}.html"
    with all_or_none(page.with_suffix(".json"), page):
        write_document(document, page.with_suffix(".json"))
        write_text(page, html)
    return page


def render_page(page: Page) -> str:
    """Render the page as text; all text is escaped."""
    return render_template("page.html.j2", page=page)
