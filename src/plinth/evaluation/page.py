"""Pages of the reports: one self-contained HTML file from a template, everything from the data escaped."""

from __future__ import annotations

import json
from typing import Any

import jinja2

from plinth.evaluation import formats
from plinth.evaluation.build_files import NAMES

WORDS = (
    *(formats.share, formats.points, formats.plain, formats.duration, formats.size, formats.joules),
    *(formats.money, formats.quantity, formats.score, formats.interval, formats.count),
)


def render_page(template: str, **values: Any) -> str:
    """Return the HTML of a template in `templates`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("plinth.evaluation", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update({function.__name__: function for function in WORDS}, NAMES=NAMES)
    environment.filters["pretty"] = lambda value: json.dumps(value, indent=2, ensure_ascii=False, default=str)
    return environment.get_template(template).render(**values)
