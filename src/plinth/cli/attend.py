"""`plinth attend`: what a model looks at in a text, drawn as one page that needs no network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from plinth.cli.options import read_options
from plinth.cli.output import emit
from plinth.evaluation.attention_page import write_attention_page
from plinth.evaluation.attention_view import AttentionView, view_attention

TOP = 3


@dataclass(frozen=True)
class AttendCommand:
    """Draw the attention weights of a model on a text, by layer and head, and what a longer context costs in keys and values."""

    run: Annotated[Path, tyro.conf.Positional]
    """run, build or model folder of a model that attends"""
    text: str
    """the text; of an encoder-decoder the source, of a model with a vision tower a caption, or a question"""
    target: str | None = None
    """of an encoder-decoder what it writes (default: its own greedy translation)"""
    image: Path | None = None
    """of a model with a vision tower the image that --text is about"""
    out: Path = Path("attention.html")
    """page to write, self-contained HTML"""
    max_tokens: int = 96
    """tokens drawn of each side; a longer text is cut, and the page says so"""
    json: bool = False
    """print one JSON object"""


def main(argv: list[str]) -> int:
    """Write the page; exit code 0 on success."""
    command = read_options(AttendCommand, args=argv, prog="plinth attend", description=AttendCommand.__doc__)
    view = view_attention(command.run, command.text, command.target, image=command.image, max_tokens=command.max_tokens)
    page = write_attention_page(command.out, view)
    result = summary(view, page)

    def render(console) -> None:
        for each in result["maps"]:
            console.print(f"{each['name']}: {each['layers']} layers of {each['heads']} heads, {each['rows']} x {each['columns']} tokens")
        console.print(f"{page}: open it in a browser", markup=False)

    emit(result, command.json, render)
    return 0


def summary(view: AttentionView, page: Path) -> dict[str, Any]:
    """Return the page's place, the maps with what each token looks at most (mean of the last layer's heads), and the costs."""
    maps = []
    for each in view.maps:
        layers, heads, rows, columns = each.weights_LHTS.shape
        last_TS = each.weights_LHTS[-1].mean(0)
        most = [
            {"token": label, "looks_at": [[each.columns[i], round(float(row[i]), 4)] for i in (-row).argsort(kind="stable")[:TOP]]}
            for label, row in zip(each.rows, last_TS)
        ]
        maps.append({"name": each.name, "layers": layers, "heads": heads, "rows": rows, "columns": columns, "last_layer": most})
    return {
        "page": str(page), "model": view.model, "model_type": view.model_type, "text": view.text, "target": view.target,
        "num_cut": view.num_cut, "maps": maps, "costs": list(view.costs),
    }  # fmt: skip
