"""Which shards folders and kinds of document a loader reads, in which shares, and how often each has been read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from plinth.config import UserError, nearest
from plinth.data.order import permutation
from plinth.data.shards import Split, open_split, read_manifest

QUOTA_ROWS = 1024  # rows over which the shares are exact
MANY_EPOCHS = 4.0  # passes up to which repeated text is nearly as good as fresh: Muennighoff et al. 2023, arXiv:2305.16264


@dataclass(frozen=True)
class Component:
    """A part of the mixture that has epochs of its own."""

    shards: Path
    split: Split
    kind: int | None
    """number of the kind; None for all kinds of the folder together"""
    share: float
    """of the rows"""

    @property
    def kind_name(self) -> str | None:
        return None if self.kind is None else self.split.kind_names[self.kind]

    @property
    def name(self) -> str:
        """What a person calls it."""
        return str(self.shards) if self.kind is None else f"{self.kind_name} of {self.shards}"


@dataclass(frozen=True)
class Account:
    """What a run has read of one component, by tokens as targets."""

    shards: str
    kind: str | None
    """None for all kinds of the folder together"""
    tokens_available: int
    """in one epoch"""
    tokens_unique: int
    """read at least once"""
    tokens_repeated: int
    """read beyond the first time"""
    epochs: float
    """passes over the component"""


def open_components(
    folders: Sequence[Path], split: str, kind_weights: dict[str, float] | None, shard_weights: Sequence[float] | None
) -> list[Component]:
    """Open a split of each folder and share the rows out.

    With `shard_weights` the folders get shares in these proportions, without in proportion to their tokens. With `kind_weights` the
    share of a folder is divided among its kinds in these proportions; each kind of any folder must be named, and 0 leaves it out.
    Raises UserError for folders packed with different tokenizers, for a folder without tokens, and for weights that do not fit.
    """
    if not folders:
        raise UserError("no shards folder is named. Name at least one that `plinth data pack` wrote.")
    packers = {folder: read_manifest(folder).get("tokenizer_sha256") for folder in folders}
    if len(set(packers.values())) > 1:
        known = ", ".join(f"{folder} by {str(sha)[:8]}" for folder, sha in packers.items())
        raise UserError(f"the shards were packed by different tokenizers: {known}. Pack all of them with one.")
    splits = [open_split(folder, split) for folder in folders]
    for folder, opened in zip(folders, splits):
        if opened.num_tokens == 0:
            raise UserError(f"{folder} has no tokens in its {split} split. Curate more text.")
    shares = _folder_shares(folders, splits, shard_weights)
    if kind_weights is None:
        found = [Component(*entry) for entry in zip(folders, splits, [None] * len(folders), shares)]
    else:
        _check_kinds(kind_weights, splits)
        found = [part for entry in zip(folders, splits, shares) for part in _kinds_of(*entry, kind_weights)]
    return [component for component in found if component.share > 0]


def _folder_shares(folders: Sequence[Path], splits: Sequence[Split], weights: Sequence[float] | None) -> list[float]:
    if weights is None:
        weights = [split.num_tokens for split in splits]
    if len(weights) != len(folders):
        raise UserError(f"shard_weights has {len(weights)} numbers for {len(folders)} shards folders. Give each folder one.")
    if any(not 0 <= weight < float("inf") for weight in weights) or not sum(weights) > 0:
        raise UserError(f"shard_weights={list(weights)} must be numbers from 0 up, and one of them above 0.")
    return [weight / sum(weights) for weight in weights]


def _present(split: Split) -> list[str]:
    return sorted(split.kind_names[number] for number in np.flatnonzero(split.kind_tokens.any(axis=0)))


def _check_kinds(weights: dict[str, float], splits: Sequence[Split]) -> None:
    present = sorted({kind for split in splits for kind in _present(split)})
    for kind in weights:
        if kind not in present:
            names = ", ".join(present)
            raise UserError(f"kind_weights names {kind}, but the kinds of these shards are {names}.{nearest(kind, present)}")
    if missing := [kind for kind in present if kind not in weights]:
        raise UserError(f"kind_weights leaves out {', '.join(missing)}. Give each kind a share; 0 leaves its text unread.")
    if any(not 0 <= weight < float("inf") for weight in weights.values()):
        raise UserError(f"kind_weights={weights} must be numbers from 0 up.")


def _kinds_of(folder: Path, split: Split, share: float, weights: dict[str, float]) -> list[Component]:
    kinds = _present(split)
    total = sum(weights[kind] for kind in kinds)
    if not total > 0:
        raise UserError(f"kind_weights={weights} leaves nothing of {folder}: one of its kinds ({', '.join(kinds)}) needs more than 0.")
    return [Component(folder, split, split.kind_names.index(kind), share * weights[kind] / total) for kind in kinds]


class Schedule:
    """Which component each row comes from: of each QUOTA_ROWS rows the same number, in an order of their own."""

    def __init__(self, components: Sequence[Component], seed: int):
        """Raises UserError when there are more components than rows in a quota."""
        if len(components) > QUOTA_ROWS:
            raise UserError(f"the mixture has {len(components)} parts; at most {QUOTA_ROWS} can have exact shares. Merge some.")
        self.quotas, self._seed = quotas(np.array([component.share for component in components])), seed
        self._group = lru_cache(maxsize=2)(self._components_of_group)

    def place(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the component of each row, and the row's number among the component's own."""
        if len(self.quotas) == 1:
            return np.zeros(len(rows), dtype=np.int64), rows
        groups, places = np.divmod(rows, QUOTA_ROWS)
        component, number = np.empty_like(rows), np.empty_like(rows)
        for group in np.unique(groups).tolist():
            here = groups == group
            components, ranks = self._group(group)
            component[here] = components[places[here]]
            number[here] = group * self.quotas[component[here]] + ranks[places[here]]
        return component, number

    def rows_before(self, row: int) -> np.ndarray:
        """Return how many of the rows before `row` each component gives; int64, shape (components,)."""
        if len(self.quotas) == 1:
            return np.array([row])
        group, place = divmod(row, QUOTA_ROWS)
        return group * self.quotas + np.bincount(self._group(group)[0][:place], minlength=len(self.quotas))

    def _components_of_group(self, group: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the component of each row of a group, and which of the component's rows in the group it is."""
        components = np.repeat(np.arange(len(self.quotas)), self.quotas)[permutation(QUOTA_ROWS, self._seed, 4, group)]
        ranks = np.empty(QUOTA_ROWS, dtype=np.int64)
        for component, quota in enumerate(self.quotas):
            ranks[components == component] = np.arange(quota)
        return components, ranks


def quotas(shares: np.ndarray) -> np.ndarray:
    """Return the rows of QUOTA_ROWS for shares of sum 1, by largest remainder, at least one each; int64."""
    exact = shares / shares.sum() * QUOTA_ROWS
    result = np.maximum(1, np.floor(exact).astype(np.int64))
    while result.sum() != QUOTA_ROWS:
        short = result.sum() < QUOTA_ROWS
        result[int(np.argmax((exact - result) if short else np.where(result > 1, result - exact, -np.inf)))] += 1 if short else -1
    return result
