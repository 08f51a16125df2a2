"""Attention as one self-contained HTML page: no network, no library, light and dark."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from plinth.config import write_atomic
from plinth.evaluation import formats
from plinth.evaluation.attention_maps import AttentionMap
from plinth.evaluation.attention_view import AttentionView

MAX_WEIGHTS = 12_000_000  # of a map, a byte each: above it a page holds the mean of the heads alone


def write_attention_page(path: Path, view: AttentionView) -> Path:
    """Write the page, by rename, and return its path."""
    write_atomic(Path(path), render_attention_page(view))
    return Path(path)


def render_attention_page(view: AttentionView) -> str:
    """Return the page. Everything from the text is escaped; weights lie in it as bytes, with an error of at most 0.4 percentage points."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("plinth.evaluation", "templates"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.globals.update(plain=formats.plain, size=formats.size, count=formats.count)
    maps, merged = fitting(view.maps)
    data = {"maps": [pack_map(each) for each in maps]}
    largest = max((cost["kv_bytes"] for cost in view.costs), default=0)
    return environment.get_template("attention.html.j2").render(view=view, data=json_in_html(data), largest=largest, merged=merged)


def fitting(maps: tuple[AttentionMap, ...], limit: int = MAX_WEIGHTS) -> tuple[tuple[AttentionMap, ...], list[str]]:
    """Return the maps with the heads of those that are too large for a page averaged, and the names of those."""
    shown, merged = [], []
    for each in maps:
        if each.weights_LHTS.size > limit and each.weights_LHTS.shape[1] > 1:
            merged.append(each.name)
            each = replace(each, weights_LHTS=each.weights_LHTS.mean(1, keepdims=True))
        shown.append(each)
    return tuple(shown), merged


def pack_map(each: AttentionMap) -> dict[str, Any]:
    """Return a map as JSON values; a weight w is the byte 255 sqrt(w), so that small ones are kept finer than large ones."""
    data = np.rint(255 * np.sqrt(np.clip(each.weights_LHTS, 0, 1))).astype(np.uint8)
    layers, heads = data.shape[:2]
    return {
        "name": each.name, "title": each.title, "rows": each.rows, "columns": each.columns, "layers": layers, "heads": heads,
        "weights": base64.b64encode(data.tobytes()).decode("ascii"),
    }  # fmt: skip


def json_in_html(data: Any) -> Markup:
    """Return JSON that a script element may hold whatever the texts in it spell."""
    return Markup(json.dumps(data, ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))
