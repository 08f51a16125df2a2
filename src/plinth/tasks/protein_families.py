"""Invented protein families: sequences that descend from one ancestor each, to try sequence models on without any download.

A stand-in, not biology: there is no structure, no selection between positions, and no family tree. What is real is the alphabet, the
frequencies of amino acids, and that conserved and variable positions differ, by exchanges within groups of like residues.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
# Per cent of residues in UniProtKB/Swiss-Prot, rounded as its release statistics give them.
FREQUENCIES = dict(zip(RESIDUES, (8.3, 1.4, 5.5, 6.7, 3.9, 7.1, 2.3, 5.9, 5.8, 9.7, 2.4, 4.1, 4.7, 3.9, 5.5, 6.6, 5.3, 6.9, 1.1, 2.9)))
GROUPS = ("ILVM", "FYW", "KRH", "DE", "NQ", "STA", "G", "P", "C")  # residues that stand in for each other most easily
WITHIN_GROUP = 0.7  # of the exchanges at a position, those by a residue of its own group


@dataclass(frozen=True)
class FamilyConfig:
    """How many families, how long and how varied."""

    families: int = 32
    """ancestors"""
    members: int = 60
    """sequences a family"""
    shortest: int = 60
    """residues of the shortest ancestor"""
    longest: int = 110
    """residues of the longest ancestor"""
    conserved: float = 0.5
    """share of positions that are conserved"""
    conserved_rate: float = 0.05
    """probability that a member differs at a conserved position"""
    variable_rate: float = 0.5
    """the same at any other position"""
    indel_rate: float = 0.005
    """probability, a position, that it is missing, and that a residue stands before it that the ancestor lacks"""
    seed: int = 0
    """decides everything"""


@dataclass(frozen=True)
class Member:
    """A sequence and what is known of it."""

    name: str
    """family and number"""
    family: int
    """which ancestor it descends from"""
    sequence: str
    """its residues"""
    nats: float
    """the cost of its residues for one who knows the ancestor, the rates and where residues are missing, mean nats a residue"""


def exchange_matrix() -> np.ndarray:
    """Return the probability of each residue in place of each other (20, 20), rows summing to 1, zero on the diagonal."""
    background = np.array([FREQUENCIES[residue] for residue in RESIDUES])
    group = np.array([next(i for i, members in enumerate(GROUPS) if residue in members) for residue in RESIDUES])
    matrix = np.zeros((20, 20))
    for i in range(20):
        others = np.arange(20) != i
        near, far = others & (group == group[i]), others & (group != group[i])
        share = WITHIN_GROUP if near.any() else 0.0
        matrix[i, near] = share * background[near] / max(background[near].sum(), 1e-12)
        matrix[i, far] = (1 - share) * background[far] / background[far].sum()
    return matrix


def invent_families(config: FamilyConfig | None = None) -> list[Member]:
    """Return the members of all families, family by family; a function of the configuration alone."""
    config = config or FamilyConfig()
    rng = np.random.Generator(np.random.PCG64(config.seed))
    background = np.array([FREQUENCIES[residue] for residue in RESIDUES])
    background /= background.sum()
    exchanges = exchange_matrix()
    members = []
    for family in range(config.families):
        ancestor = rng.choice(20, int(rng.integers(config.shortest, config.longest + 1)), p=background)
        rates = np.where(rng.random(len(ancestor)) < config.conserved, config.conserved_rate, config.variable_rate)
        for number in range(config.members):
            sequence, nats = _descend(ancestor, rates, exchanges, background, config.indel_rate, rng)
            members.append(Member(f"f{family}m{number}", family, sequence, nats))
    return members


def _descend(
    ancestor: np.ndarray, rates: np.ndarray, exchanges: np.ndarray, background: np.ndarray, indel_rate: float, rng: np.random.Generator
) -> tuple[str, float]:
    """Return one descendant, and the mean cost of its residues for one who knows the ancestor."""
    differs = rng.random(len(ancestor)) < rates
    drawn = (rng.random(len(ancestor))[:, None] > exchanges[ancestor].cumsum(1)).sum(1).clip(max=19)
    residues = np.where(differs, drawn, ancestor)
    changed = residues != ancestor
    costs = -np.log(np.where(changed, rates * exchanges[ancestor, residues], 1 - rates))
    kept = rng.random(len(ancestor)) >= indel_rate
    kept[0] = True
    places = np.flatnonzero(rng.random(len(ancestor)) < indel_rate)
    inserted = rng.choice(20, len(places), p=background)
    residues, costs, kept = (
        np.insert(values, places, new) for values, new in ((residues, inserted), (costs, -np.log(background[inserted])), (kept, True))
    )
    return "".join(RESIDUES[i] for i in residues[kept]), float(costs[kept].mean())


def to_fasta(members: list[Member], width: int = 60) -> str:
    """Return a FASTA file, wrapped as most are."""
    lines = []
    for member in members:
        lines.append(f">{member.name} family={member.family}")
        lines += [member.sequence[i : i + width] for i in range(0, len(member.sequence), width)]
    return "\n".join(lines) + "\n"
