"""HTML to text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plinth.data.extract import html_to_text


def test_blocks_lists_tables_and_entities():
    page = """<!doctype html><html><head><title>A &amp; B</title><style>p {color: red}</style><script>var x = "<p>no</p>";</script>
    <body><nav><a href=/>Home</a></nav><h1>Head</h1><p>One
    line<br>two</p><ul><li>a<li>b</ul><table><tr><td>1<td>2</tr></table>
    <pre>  keep
    this</pre><footer>imprint</footer></body></html>"""
    assert html_to_text(page) == "A & B\n\nHead\n\nOne line\ntwo\n\n- a\n- b\n\n1\t2\n\n  keep\n    this"


def test_navigation_that_never_closes_does_not_swallow_the_text():
    assert "the story" in html_to_text("<nav><a>menu</a><p>the story")


def test_a_page_without_text_is_empty():
    assert html_to_text("<html><script>x</script></html>") == ""


def test_elements_closed_in_their_own_tag_do_not_swallow_the_text():
    assert html_to_text("<svg width=1/><script src=x /><nav/><p>story</p><svg><g>") == "story"


def test_markup_that_never_ends_is_text():
    assert html_to_text("1 < 2 and <b>bold</b> <a href='x") == "1 < 2 and bold <a href='x"
    assert html_to_text('<a title="a > b">link</a><!-- > -->end<![CDATA[x]]>') == "linkend"


HOSTILE = ["<div>" * 50_000, "<ul><li>" * 20_000, "<p" + " a" * 100_000 + ">", "<" * 100_000, '<a "' * 50_000, "<!--" * 50_000 + ">"]


@pytest.mark.parametrize("page", HOSTILE, ids=lambda page: page[:6])
def test_pages_made_to_be_slow_are_read(page):
    assert html_to_text(page + "deep").endswith("deep")


@given(st.lists(st.sampled_from("< > ![ CDATA[ <!-- --> ]]> p /p a=' \" & &amp &#xd800; </script> <script> <nav> <pre> word".split())))
def test_any_text_is_read_without_an_error(pieces):
    html_to_text("".join(pieces)).encode("utf-8")
