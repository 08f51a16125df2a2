"""The tables and the picture of docs/transfer.md, from their record."""

from __future__ import annotations

import statistics
from typing import Any

from plinth.evaluation.panels import Line, Panel, panels_svg
from plinth.evaluation.statistics import Score, mean_score, paired_difference

FULL, SCRATCH, WORDS = "the whole recipe", "from scratch", "words alone"
LONGER = "from scratch, twice as long"
TWICE = ", both directions"  # of an arm: averaged with the same on texts that are read from their end
PICTURE = "docs/pictures/ulmfit.svg"


def ulmfit_table(record: dict[str, Any]) -> str:
    """Return the low-shot curve, what it says of the labels saved, and what is lost without each ingredient."""
    return "\n".join(
        [
            *_curve(record),
            "",
            *_said(record),
            "",
            "![accuracy against labels](pictures/ulmfit.svg)",
            "",
            *_ablations(record),
            "",
            *_tuning(record),
        ]
    )


def ulmfit_picture(record: dict[str, Any]) -> str:
    """Draw accuracy against the number of labels, a line an arm; returns an SVG file."""
    counts = _counts(record)
    lines = []
    for i, name in enumerate(record["curve"]):
        known = [count for count in counts if _rows(record, name, count)]
        lines.append(Line(name, known, [100 * _score(record, name, count).value for count in known], (0, 4, 3, 2, 5, 1)[i % 6]))
    panel = Panel(f"{len(record['classes'])} {record['task']}", f"chance {100 / len(record['classes']):.1f} %", lines)
    ticks = [(float(count), f"{count:,}") for count in counts]
    return panels_svg([panel], title="Labels against accuracy", x_label="labels", y_label=f"{record['unit']}s told right, %", x_ticks=ticks)


def _rows(record: dict[str, Any], name: str, labels: int) -> list[dict[str, Any]]:
    return [row for row in record["rows"] if row["name"] == name and row["labels"] == labels]


def _counts(record: dict[str, Any]) -> list[int]:
    return sorted({row["labels"] for row in record["rows"] if row["name"] in record["curve"]})


def _right(record: dict[str, Any], name: str, labels: int, seeds: list[int] | None = None) -> list[float]:
    """Return 1.0 for each passage told right, seed after seed."""
    rows = [row for row in _rows(record, name, labels) if seeds is None or row["seed"] in seeds]
    return [float(bit) for row in sorted(rows, key=lambda row: row["seed"]) for bit in f"{int(row['right'], 16):0{record['tested']}b}"]


def _score(record: dict[str, Any], name: str, labels: int) -> Score:
    right = _right(record, name, labels)
    return mean_score(right, [i % record["tested"] for i in range(len(right))])


def _against(record: dict[str, Any], one: tuple[str, int], other: tuple[str, int]) -> Score | None:
    """Return the difference of two arms on the same passages, over the seeds that both have."""
    seeds = sorted({row["seed"] for row in _rows(record, *one)} & {row["seed"] for row in _rows(record, *other)})
    if not seeds:
        return None
    a, b = _right(record, *one, seeds), _right(record, *other, seeds)
    return paired_difference(a, b, [i % record["tested"] for i in range(len(a))])


def _cell(record: dict[str, Any], name: str, labels: int) -> str:
    rows = _rows(record, name, labels)
    if not rows:
        return "not run"
    score, values = _score(record, name, labels), [100 * row["accuracy"] for row in rows]
    return f"{100 * score.value:.1f} % ({100 * score.ci95[0]:.1f}–{100 * score.ci95[1]:.1f}; seeds {min(values):.1f}–{max(values):.1f})"


def _points(score: Score | None) -> str:
    return "" if score is None else f"{100 * score.value:+.1f} ({100 * score.ci95[0]:+.1f} to {100 * score.ci95[1]:+.1f})"


def _curve(record: dict[str, Any]) -> list[str]:
    names = record["curve"]
    lines = [f"| labels | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    lines += [f"| {count:,} | {' | '.join(_cell(record, name, count) for name in names)} |" for count in _counts(record)]
    seeds = len({row["seed"] for row in record["rows"]})
    note = (
        f"Share of {record['tested']} {record['unit']}s told right, {seeds} draws of labels; in brackets the 95 % interval over them, and "
        f"the draws' lowest and highest. {len(record['classes'])} {record['task']} ({', '.join(record['classes'])}), equally often."
    )
    return [*lines, "", note]


def _said(record: dict[str, Any]) -> list[str]:
    """Say how many labels from scratch are worth the fewest with the whole recipe."""
    counts = _counts(record)
    fewest = counts[0]
    if not _rows(record, FULL, fewest):
        return []
    best = _score(record, FULL, fewest).value
    reached = [count for count in counts if _rows(record, SCRATCH, count) and _score(record, SCRATCH, count).value >= best]
    tried = max((count for count in counts if _rows(record, SCRATCH, count)), default=fewest)
    much = f"{reached[0]:,} labels, of the counts run," if reached else f"more than {tried:,} labels, the most tried"
    lines = [f"With {fewest} labels the whole recipe tells {best:.1%} right; from scratch that takes {much}.".replace(",.", ".")]
    for one, other, words in (
        ((FULL, fewest), (SCRATCH, 5 * fewest), "Against five times as many labels from scratch it is {} points, with the 95 % interval."),
        (
            (FULL, fewest),
            (WORDS, fewest),
            f"Against naive Bayes over a {record['unit']}'s words, with as many labels, it is {{}} points.",
        ),
        (
            (FULL + TWICE, fewest),
            (SCRATCH, 5 * fewest),
            "In both directions it is {} points against five times the labels from scratch",
        ),
        ((FULL + TWICE, fewest), (SCRATCH + TWICE, 5 * fewest), "and {} points where what learns from scratch reads both ways too."),
    ):
        if (difference := _against(record, one, other)) is not None:
            lines.append(words.format(_points(difference)))
    if _rows(record, LONGER, 500):
        lines.append(f"From scratch with 500 labels and twice as many passes it is {_score(record, LONGER, 500).value:.1%}.")
    return [" ".join(lines)]


def _tuning(record: dict[str, Any]) -> list[str]:
    """Return what the settings were chosen by."""
    if not record["tuning"]:
        return []
    lines = ["| tried on the tuning set | labels | told right |", "|---|---|---|"]
    lines += [f"| {row['name']} | {row['labels']} | {row['accuracy']:.1%} |" for row in record["tuning"]]
    return [
        *lines,
        "",
        f"One draw of labels that is not among those above, {record['tuned']} {record['unit']}s that no other figure is of.",
    ]


def _ablations(record: dict[str, Any]) -> list[str]:
    counts = sorted({row["labels"] for row in record["rows"] if row["name"] in record["ablations"]})
    if not counts:
        return []
    head = " | ".join(f"{count} labels | against the whole" for count in counts)
    lines = [f"| without | {head} |", "|---|" + "---|---|" * len(counts)]
    whole = " | ".join(f"{100 * statistics.mean(row['accuracy'] for row in _rows(record, FULL, count)):.1f} % | " for count in counts)
    lines.append(f"| (the whole recipe) | {whole} |")
    for name in record["ablations"]:
        cells = []
        for count in counts:
            rows = _rows(record, name, count)
            value = f"{100 * statistics.mean(row['accuracy'] for row in rows):.1f} % ({len(rows)} draws)" if rows else "not run"
            cells.append(f"{value} | {_points(_against(record, (name, count), (FULL, count)))}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    note = "Points of accuracy against the whole recipe on the same examples and draws of labels, with 95 % intervals over examples."
    return [*lines, "", note]
