"""Rows of a file that a stage did not take as they are: the line that says so, and how its summary counts them."""

from __future__ import annotations

from dataclasses import dataclass, field

SHOWN_REJECTS = 3


@dataclass
class Rejects:
    """Lines that were left out, counted, with the first three shown."""

    count: int = 0
    """Rejected lines."""
    examples: list[tuple[int, str]] = field(default_factory=list)
    """(line number from 1, reason) of the first ones."""

    def add(self, line: int, reason: str) -> None:
        self.count += 1
        if len(self.examples) < SHOWN_REJECTS:
            self.examples.append((line, reason))

    def describe(self) -> str:
        """Return one line, empty when nothing was rejected."""
        shown = "; ".join(f"line {line}: {reason}" for line, reason in self.examples)
        more = f"; and {self.count - len(self.examples)} more" if self.count > len(self.examples) else ""
        return f"{self.count} rejected ({shown}{more})" if self.count else ""


def row_counts(
    rejected: int | None = None, *, too_long: int | None = None, cut: int | None = None, unusable: int | None = None
) -> dict[str, int]:
    """Return what a stage's summary says of the rows of its file, by one name in all stages; None where a stage has no such rows.

    `rejected` could not be read; of those that could, `too_long` were left out for their length, `unusable` since there is nothing in
    them to learn or to ask, and `cut` are used without some of their tokens.
    """
    counts = {"rejected_rows": rejected, "too_long_rows": too_long, "unusable_rows": unusable, "cut_rows": cut}
    return {name: count for name, count in counts.items() if count is not None}
