"""A world of drawn shapes, known to the last pixel: images, captions and questions, with combinations that are held out.

One coloured shape on a grey ground: colour × shape × size × place. Nothing is downloaded, and whether a model has learnt to combine
what it saw apart can be told exactly: it is asked for combinations that no training image had.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from plinth.config import UserError

COLOURS = {"red": (215, 40, 40), "green": (40, 165, 60), "blue": (45, 80, 215), "yellow": (225, 205, 40),
           "purple": (150, 50, 180), "white": (245, 245, 245)}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 0.13, "large": 0.22}  # half the extent, as a share of the image's edge
PLACES = {"top left": (0.28, 0.28), "top right": (0.28, 0.72), "bottom left": (0.72, 0.28), "bottom right": (0.72, 0.72)}
TEMPLATES = (
    "a {size} {colour} {shape} at the {place}",
    "{colour} {shape}, {size}, {place}",
    "the {shape} at the {place} is {size} and {colour}",
    "a picture of a {size} {shape} in {colour} at the {place}",
)
QUESTIONS = {
    "colour": ("What colour is the shape?", "Which colour do you see?"),
    "shape": ("What shape is it?", "Which shape do you see?"),
    "size": ("How large is the shape?", "Is the shape small or large?"),
    "place": ("Where is the shape?", "In which corner is the shape?"),
}
SAMPLES = 4  # points an edge of a pixel that are tested for lying inside


@dataclass(frozen=True, order=True)
class Drawing:
    """What an image shows."""

    colour: str
    """a key of COLOURS"""
    shape: str
    """one of SHAPES"""
    size: str
    """a key of SIZES"""
    place: str
    """a key of PLACES"""

    def caption(self, template: str = TEMPLATES[0]) -> str:
        """Return a sentence that says all four."""
        return template.format(colour=self.colour, shape=self.shape, size=self.size, place=self.place)

    def questions(self, phrasing: int = 0) -> list[tuple[str, str]]:
        """Return a question and its answer for each attribute."""
        return [(phrasings[phrasing], getattr(self, name)) for name, phrasings in QUESTIONS.items()]


def all_drawings() -> list[Drawing]:
    """Return every combination, in a fixed order."""
    return [Drawing(*values) for values in itertools.product(COLOURS, SHAPES, SIZES, PLACES)]


def split_drawings(held_out: float = 0.2, seed: int = 0) -> tuple[list[Drawing], list[Drawing]]:
    """Return the combinations to train on and those held out, a share of all, drawn at random.

    Every value of every attribute stays in the first. Raises UserError for a share that leaves none of one.
    """
    drawings = all_drawings()
    order = np.random.Generator(np.random.PCG64([seed, 1])).permutation(len(drawings))
    count = round(held_out * len(drawings))
    kept, out = [sorted(drawings[i] for i in part) for part in (order[count:], order[:count])]
    missing = [value for name in QUESTIONS for value in {getattr(d, name) for d in drawings} - {getattr(d, name) for d in kept}]
    if not 0 <= held_out < 1 or missing:
        raise UserError(f"held_out={held_out} leaves no training image with {missing or 'any combination'}. Use a share of 0.5 or less.")
    return kept, out


def draw(drawing: Drawing, rng: np.random.Generator, edge: int = 32) -> np.ndarray:
    """Return an image, bytes (edge, edge, 3): place, extent, tilt, colour and ground vary a little from draw to draw."""
    row, column = (centre + rng.uniform(-0.06, 0.06) for centre in PLACES[drawing.place])
    inside = _coverage(drawing.shape, row, column, SIZES[drawing.size] * rng.uniform(0.9, 1.1), rng.uniform(-0.25, 0.25), edge)
    ground = rng.uniform(70, 140) + rng.normal(0, 6, (edge, edge, 3))
    colour = np.array(COLOURS[drawing.colour]) + rng.normal(0, 12, 3)
    pixels = ground * (1 - inside) + (colour + rng.normal(0, 6, (edge, edge, 3))) * inside
    return pixels.clip(0, 255).astype(np.uint8)


def _coverage(shape: str, row: float, column: float, extent: float, tilt: float, edge: int) -> np.ndarray:
    """Return which share of each pixel the shape covers, (edge, edge, 1)."""
    points = (np.arange(edge * SAMPLES) + 0.5) / (edge * SAMPLES)
    down, right = np.meshgrid((points - row) / extent, (points - column) / extent, indexing="ij")
    x, y = right * np.cos(tilt) - down * np.sin(tilt), right * np.sin(tilt) + down * np.cos(tilt)
    if shape == "circle":
        inside = x**2 + y**2 <= 1
    elif shape == "square":
        inside = np.maximum(abs(x), abs(y)) <= 0.88
    elif shape == "triangle":
        inside = (y <= 0.75) & (abs(x) <= (y + 1.15) * 0.58)
    else:
        inside = (np.minimum(abs(x), abs(y)) <= 0.3) & (np.maximum(abs(x), abs(y)) <= 1)
    return inside.reshape(edge, SAMPLES, edge, SAMPLES).mean((1, 3))[..., None]
