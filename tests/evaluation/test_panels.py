"""Pictures over sizes: well-formed, self-contained, and points where their values say."""

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from plinth.evaluation.panels import LEFT, PANEL_HEIGHT, PANEL_WIDTH, TOP, Line, Panel, panels_svg

SVG = "{http://www.w3.org/2000/svg}"
TICKS = [(64, "64"), (128, "128"), (256, "256")]


def draw(*lines, log_y=True, **options):
    return panels_svg(
        [Panel("a <b>", "note & more", lines, good=True), Panel("c", "d", lines, good=False)],
        title='changes "of" size', x_label="width", y_label="|change|", x_ticks=TICKS, log_y=log_y, **options,
    )  # fmt: skip


def points(svg):
    lines = [line for line in ElementTree.fromstring(svg).iter(SVG + "polyline")]
    return [[tuple(map(float, pair.split(","))) for pair in line.get("points").split()] for line in lines]


def test_the_file_is_xml_with_light_and_dark_and_nothing_from_elsewhere():
    svg = draw(Line("x < y", (64, 128, 256), (1.0, 2.0, 4.0), 1))
    root = ElementTree.fromstring(svg)
    texts = [text.text for text in root.iter(SVG + "text")]
    assert {"a <b>", "note & more", "x < y", "64", "256", "width"} <= set(texts)
    assert root.find(SVG + "title").text == 'changes "of" size'
    assert "prefers-color-scheme: dark" in svg
    assert not re.search(r"href|url\(|<script|@import", svg) and svg.count("http") == 1  # the namespace alone


def test_equal_ratios_are_equal_distances_on_logarithmic_axes():
    first, *_ = points(draw(Line("x", (64, 128, 256), (1.0, 2.0, 4.0))))
    (x0, y0), (x1, y1), (x2, y2) = first
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert x0 == pytest.approx(LEFT + 8) and x2 == pytest.approx(LEFT + PANEL_WIDTH - 8)


def test_a_diverged_run_is_drawn_at_the_upper_edge_and_zero_is_left_out_of_a_logarithm():
    (linear, *_) = points(draw(Line("x", (64, 128, 256), (1.0, math.inf, 50.0)), log_y=False, y_top=5.0))
    assert linear[1][1] == linear[2][1] == pytest.approx(TOP, abs=0.1)
    assert linear[0][1] < TOP + PANEL_HEIGHT
    (logarithmic, *_) = points(draw(Line("x", (64, 128, 256), (0.0, 1.0, 2.0))))
    assert len(logarithmic) == 2


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="no finite value"):
        draw(Line("x", (64,), (math.nan,)))
