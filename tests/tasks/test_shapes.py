"""The shapes world: what is drawn is what is said, and held-out combinations stay out."""

import numpy as np
import pytest

from plinth.config import UserError
from plinth.tasks.shapes import COLOURS, PLACES, QUESTIONS, TEMPLATES, Drawing, all_drawings, draw, split_drawings


def drawn(drawing, seed=0, edge=32):
    return draw(drawing, np.random.Generator(np.random.PCG64(seed)), edge).astype(float)


def coloured(pixels):
    """Where a pixel is no grey of the ground: its channels differ, or it is far brighter."""
    return (np.ptp(pixels, axis=2) > 60) | (pixels.min(2) > 190)


@pytest.mark.parametrize("drawing", all_drawings()[::7], ids=str)
def test_an_image_shows_its_colour_and_place_at_any_draw(drawing):
    for seed in range(3):
        pixels = drawn(drawing, seed)
        mask = coloured(pixels)
        rows, columns = np.nonzero(mask)
        assert ("top" if rows.mean() < 16 else "bottom") + " " + ("left" if columns.mean() < 16 else "right") == drawing.place
        mean = pixels[mask].mean(0)
        assert min(COLOURS, key=lambda name: np.abs(mean - COLOURS[name]).sum()) == drawing.colour


def test_a_large_shape_covers_more_and_each_shape_covers_otherwise():
    for place in PLACES:
        areas = {(shape, size): np.mean([coloured(drawn(Drawing("red", shape, size, place), s)).sum() for s in range(4)])
                 for shape in ("circle", "square", "triangle", "cross") for size in ("small", "large")}  # fmt: skip
        assert all(areas[shape, "large"] > 2 * areas[shape, "small"] for shape, _ in areas)
        assert max(areas["cross", "large"], areas["triangle", "large"]) < areas["circle", "large"]


def test_a_draw_depends_on_its_generator_alone():
    drawing = all_drawings()[3]
    assert np.array_equal(drawn(drawing, 5), drawn(drawing, 5)) and not np.array_equal(drawn(drawing, 5), drawn(drawing, 6))


def test_held_out_combinations_never_meet_the_others():
    kept, out = split_drawings(0.2, seed=3)
    assert len(out) == round(0.2 * len(all_drawings())) and not set(kept) & set(out) and set(kept) | set(out) == set(all_drawings())
    assert split_drawings(0.2, seed=3) == (kept, out) != split_drawings(0.2, seed=4)
    for name in QUESTIONS:
        assert {getattr(d, name) for d in kept} == {getattr(d, name) for d in all_drawings()}
    with pytest.raises(UserError, match="held_out=0.99"):
        split_drawings(0.99)


def test_what_is_said_tells_combinations_apart():
    for template in TEMPLATES:
        assert len({drawing.caption(template) for drawing in all_drawings()}) == len(all_drawings())
    drawing = Drawing("red", "cross", "small", "top left")
    assert [answer for _, answer in drawing.questions(1)] == ["red", "cross", "small", "top left"]
