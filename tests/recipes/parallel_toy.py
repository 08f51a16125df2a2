"""A language whose words are those of another in a row turned round: to translate is to look up and to align."""

import random

SOURCE = "one two three four five six seven eight nine ten".split()
TARGET = "eins zwei drei vier fünf sechs sieben acht neun zehn".split()


def toy_pairs(count: int, seed: int = 0, longest: int = 5) -> list[tuple[str, str]]:
    """Return sentences, in which no word comes twice, and their translations."""
    draw, pairs = random.Random(seed), []
    for _ in range(count):
        words = draw.sample(range(len(SOURCE)), draw.randint(1, longest))
        pairs.append((" ".join(SOURCE[i] for i in words), " ".join(TARGET[i] for i in reversed(words))))
    return pairs


def write_toy(folder, name: str, pairs) -> tuple:
    """Write the two files; returns their paths."""
    paths = tuple(folder / f"{name}.{side}" for side in ("src", "tgt"))
    for i, path in enumerate(paths):
        path.write_text("".join(pair[i] + "\n" for pair in pairs), encoding="utf-8")
    return paths
