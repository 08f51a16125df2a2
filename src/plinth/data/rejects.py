"""Lines of a file that were left out, for the line that says so."""

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
