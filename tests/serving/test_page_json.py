"""The JSON view: an answer follows the schema, and one that is cut off is never called valid."""

import json

import pytest

from chat_page import set_slider

SCHEMA = {"type": "object", "properties": {"verdict": {"enum": ["yes", "no"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}}}
SCHEMA |= {"required": ["verdict", "count"], "additionalProperties": False}


@pytest.fixture
def page(base_url, open_page):
    page = open_page(base_url)
    page.locator("#model", has_text="tiny").wait_for()
    page.click("#tab-json")
    return page


def ask_json(page, schema: str, max_tokens: str = "") -> None:
    """Ask for an answer of a schema, and wait for its end."""
    page.fill("#schema", schema)
    page.fill("#max_tokens", max_tokens)
    page.fill("#prompt", "<i>well</i>?")
    page.press("#prompt", "Enter")


def test_an_answer_follows_the_schema(page):
    ask_json(page, json.dumps(SCHEMA))
    page.locator("#json-state .badge").wait_for(timeout=60_000)
    assert page.locator("#json-state").text_content() == "Valid: it follows the schema"
    answer = json.loads(page.locator("#json-body").text_content())
    assert answer["verdict"] in ("yes", "no") and answer["count"] in range(10)
    assert json.loads(page.locator("#json-pretty").text_content()) == answer
    assert page.locator("#json-asked").text_content() == "<i>well</i>?" and page.locator("#json i:visible").count() == 0
    page.locator("#json-body .token").first.click()
    assert page.locator("#detail li").count() > 1 and page.locator("#detail .branch").count() == 0


def test_an_answer_that_is_cut_off_says_so(page):
    ask_json(page, json.dumps({"type": "string", "minLength": 60}), max_tokens="3")
    page.locator("#json-state .badge").wait_for(timeout=60_000)
    assert page.locator("#json-state").text_content() == "Cut off by the token limit: not valid JSON"
    assert page.locator("#json-pretty").is_hidden()


def test_a_schema_that_is_no_json_is_marked_and_nothing_is_sent(page):
    ask_json(page, '{"type": ')
    assert page.evaluate("document.getElementById('schema').matches(':invalid')")
    assert page.input_value("#prompt") == "<i>well</i>?" and page.locator("#json-result").is_hidden()
    page.select_option("#example", "A list of words")
    assert json.loads(page.input_value("#schema"))["type"] == "array"
    assert page.evaluate("document.getElementById('schema').matches(':valid')")


def test_a_schema_that_cannot_be_had_is_named(base_url, browser):
    page = browser.new_page()
    page.goto(base_url)
    page.locator("#model", has_text="tiny").wait_for()
    page.click("#tab-json")
    ask_json(page, json.dumps({"type": "object", "patternProperties": {"(?=a)": {}}, "unevaluatedProperties": False}))
    page.get_by_role("alert").filter(has_text="schema").wait_for()
    assert page.input_value("#prompt") == "<i>well</i>?" and page.locator("#json-result").is_hidden()
    page.close()


def test_every_example_gives_a_valid_answer(page):
    set_slider(page, "temperature", 0.5)
    for name in page.locator("#example option").all_text_contents():
        page.select_option("#example", name)
        ask_json(page, page.input_value("#schema"))
        page.locator("#json-state .badge").wait_for(timeout=60_000)
        assert page.locator("#json-state").text_content() == "Valid: it follows the schema", name
