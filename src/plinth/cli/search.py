"""`plinth search`: what a run's own corpus says, with sources and licences."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from plinth.cli.options import read_options
from plinth.cli.output import emit


@dataclass(frozen=True)
class SearchCommand:
    """Search the documents that a model was trained on, by their words (BM25)."""

    run: tyro.conf.Positional[Path]
    """a build, one of its stages, or a folder that `plinth data curate` wrote"""
    query: tyro.conf.Positional[str]
    """words to search for"""
    top: int = 5
    """documents to show at most"""
    json: bool = False
    """print one JSON object"""


def main(argv: list[str]) -> int:
    """Search and print; exit code 0 also when nothing is found."""
    command = read_options(SearchCommand, args=argv, prog="plinth search", description=SearchCommand.__doc__)
    from plinth.inference.retrieval import SearchIndex

    index = SearchIndex.open(command.run)
    found = index.search(command.query, command.top)
    result = {
        "query": command.query,
        "corpus": str(index.corpus),
        "passages": index.num_passages,
        "results": [asdict(one) for one in found],
    }
    emit(result, command.json, lambda console: _show(console, result))
    return 0


def _show(console, result: dict[str, Any]) -> None:
    from rich.text import Text

    if not result["results"]:
        console.print(Text(f"None of {result['passages']} passages holds a word of the query."))
    for number, found in enumerate(result["results"], 1):
        facts = "  ".join(str(found[name]) for name in ("licence", "url", "id") if found[name])
        console.print(Text(f"{number}. {found['source']}", style="bold"), Text(f"{found['score']:.2f}  {facts}", style="dim"))
        console.print(Text(f"   {found['excerpt']}"), soft_wrap=True)
