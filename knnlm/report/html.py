"""report.html: one file that opens offline, rendered from a view by a template; text is escaped, plotly is inlined."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from knnlm.files import write_text
from knnlm.report.charts import colour, make_charts
from knnlm.report.view import make_view
from knnlm.results import EvalResult

# In a script element `<` could start `</script` or `<!--`; & and > are replaced as jinja2 and django do.
_SCRIPT_SAFE = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"})


def render(result: EvalResult, *, title: str) -> str:
    """Render the page as text."""
    view = make_view(result, title=title)
    return render_template("report.html.j2", view=view, charts=make_charts(view.charts))


def render_template(name: str, **values: object) -> str:
    """Render a template of this package; plotly's script is available as `plotly`."""
    from plotly.offline import get_plotlyjs  # slow to import, and needed only here

    return _environment().get_template(name).render(plotly=Markup(get_plotlyjs()), **values)


def write_report(result: EvalResult, path: str | Path, *, title: str | None = None) -> None:
    """Write the page to a file, whole or not at all.

    :param title: by default made from the model and the text in the result's settings
    :raises OSError: the file cannot be written
    """
    write_text(path, render(result, title=title or default_title(result)))


def default_title(result: EvalResult) -> str:
    """`kNN-LM report`, with the model's name if the settings have one."""
    model = result.settings.get("model")
    return f"kNN-LM report: {model}" if model else "kNN-LM report"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("knnlm.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"script_json": _script_json, "part_colour": colour, "fields": _fields}
    return environment


def _fields(text: str) -> Markup:
    """A message of the library as HTML, with fields in backticks as code."""
    return Markup(re.sub("`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def _script_json(value: Mapping[str, Any]) -> Markup:
    """Strict JSON that is safe inside a script element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.translate(_SCRIPT_SAFE))
