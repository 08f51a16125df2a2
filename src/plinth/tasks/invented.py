"""Names that sound like the library's and that no module has, made from real modules and parts of real names."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from plinth.config import UserError
from plinth.tasks.extraction import Subject
from plinth.tasks.python_objects import Library

MIN_WORD_CHARS = 3
MIN_WORD_COUNT = 3  # a word of a name is one that at least so many names have
MAX_NAME_CHARS = 28
TRIES_PER_NAME = 200


@dataclass(frozen=True)
class InventedName:
    """A plausible name that does not exist."""

    subject: str
    """full name, such as shutil.copyarchive"""
    name: str
    """name without the module"""
    how: str
    """recombined: words of real names that no file holds in this order; misplaced: a real name that this module has not"""
    template: Subject
    """the real object that it was made from"""


class Inventor:
    """Makes invented names from templates, never the same one twice."""

    def __init__(self, library: Library, templates: list[Subject], seed: int):
        self.library = library
        self.templates = [subject for subject in templates if subject.item.module not in library.opaque_modules]
        self.rng = random.Random(f"invented {seed}")
        self.known_words = {word.lower() for word in library.identifiers}
        self.words = _common_words(item.last_name for item in library.objects)
        self.pools = _word_pools((item.last_name for item in library.objects), self.words)
        self.used: set[str] = set()

    def invent(self, number: int, misplaced_share: float) -> list[InventedName]:
        """Return `number` new names, of which about `misplaced_share` are real names in the wrong module.

        Raises UserError when the templates do not allow as many.
        """
        names: list[InventedName] = []
        for _ in range(number):
            makers = [self._misplaced, self._recombined] if self.rng.random() < misplaced_share else [self._recombined]
            made = next((made for maker in makers if (made := self._new_name(maker)) is not None), None)
            if made is None:
                raise UserError(
                    f"only {len(names)} of {number} invented names can be made from {len(self.templates)} known functions. "
                    "Lower num_invented_train, num_invented_pairs or num_invented_eval, or raise num_known."
                )
            self.used.add(made.name)
            names.append(made)
        return names

    def _new_name(self, maker: Callable[[Subject], InventedName | None]) -> InventedName | None:
        for _ in range(TRIES_PER_NAME if self.templates else 0):
            made = maker(self.rng.choice(self.templates))
            if made is not None and made.name not in self.used:
                return made
        return None

    def _recombined(self, template: Subject) -> InventedName | None:
        words, joiner = split_name(template.item.last_name, self.words)
        if len(words) < 2:
            return None
        place = self.rng.randrange(len(words))
        position = "first" if place == 0 else "last"
        words[place] = _cased(self.rng.choice(self.pools[position]), like=words[place])
        last_name = joiner.join(words)
        if last_name.lower() in self.known_words or not last_name.isidentifier() or len(last_name) > MAX_NAME_CHARS:
            return None
        owner = template.item.name.rpartition(".")[0]
        name = f"{owner}.{last_name}" if owner else last_name
        return InventedName(f"{template.item.module}.{name}", name, "recombined", template)

    def _misplaced(self, template: Subject) -> InventedName | None:
        if template.item.type != "function":
            return None
        module = self.rng.choice(self.templates).item.module
        name = template.item.name
        if name in self.library.module_identifiers[module] or any(name in words for words in self._packages_of(module)):
            return None
        return InventedName(f"{module}.{name}", name, "misplaced", template)

    def _packages_of(self, module: str) -> Iterator[set[str]]:
        """Give the identifiers of the packages around a module; a package's own file may pass names on."""
        parts = module.split(".")
        for length in range(1, len(parts)):
            yield self.library.module_identifiers.get(".".join(parts[:length]), set())


def split_name(name: str, words: set[str]) -> tuple[list[str], str]:
    """Split a name in its words: `get_size` at the underscore, `getSize` at the capital, `getsize` where both parts are words.

    Returns (words, joiner); joining gives the name back.
    """
    if "_" in name.strip("_"):
        return name.split("_"), "_"
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+", name)
    if len(parts) > 1 and "".join(parts) == name:
        return parts, ""
    if name.islower():
        for cut in range(MIN_WORD_CHARS, len(name) - MIN_WORD_CHARS + 1):
            if name[:cut] in words and name[cut:] in words:
                return [name[:cut], name[cut:]], ""
    return [name], ""


def _common_words(names: Iterable[str]) -> set[str]:
    counts = Counter(word.lower() for name in names for word in split_name(name, set())[0])
    return {word for word, count in counts.items() if count >= MIN_WORD_COUNT and len(word) >= MIN_WORD_CHARS and word.isalpha()}


def _word_pools(names: Iterable[str], words: set[str]) -> dict[str, list[str]]:
    """Return the common words that begin names and those that end names, as often as they do."""
    pools = defaultdict(list)
    for name in names:
        parts = [word.lower() for word in split_name(name, words)[0]]
        if len(parts) > 1:
            pools["first"] += [parts[0]] if parts[0] in words else []
            pools["last"] += [parts[-1]] if parts[-1] in words else []
    return pools


def _cased(word: str, like: str) -> str:
    if like.isupper() and len(like) > 1:
        return word.upper()
    return word.capitalize() if like[:1].isupper() else word
