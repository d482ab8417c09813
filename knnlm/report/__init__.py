"""Reports of a run: report.json and report.html, made from results alone, without a model or an index."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from knnlm.files import all_or_none
from knnlm.results import EvalResult


@dataclass(frozen=True)
class ReportFiles:
    """Where the reports were written."""

    json: Path
    html: Path


def write_reports(result: EvalResult, folder: str | Path, *, title: str | None = None) -> ReportFiles:
    """Write `report.json` and `report.html` into a folder, which is created if missing: both files or neither.

    :raises OSError: a file cannot be written
    """
    from knnlm.documents import to_document, write_document
    from knnlm.report.html import write_report  # imports jinja2, which reading a report.json does not need

    files = ReportFiles(Path(folder) / "report.json", Path(folder) / "report.html")
    with all_or_none(files.json, files.html):
        write_document(to_document(result), files.json)
        write_report(result, files.html, title=title)
    return files
