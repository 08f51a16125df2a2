"""Branches: an answer goes on from another token, and what stood there before can be had again."""

import json

import pytest

from chat_page import answer_of, ask, settled, token_ids

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def page(base_url, open_page):
    page = open_page(base_url)
    page.locator("#model", has_text="tiny").wait_for()
    return page


def branch(page, place: int, row: int) -> int:
    """Take an alternative at a place of the last answer; return its id."""
    article = page.locator(".assistant").last
    article.locator(".token").nth(place).click()
    chosen = page.locator("#detail .branch").nth(row)
    name = chosen.get_attribute("aria-label")
    ids = (
        article.locator(".token")
        .nth(place)
        .evaluate("(span) => span.tokens[0].others.filter((t) => t.id !== span.tokens[0].id).map((t) => t.id)")
    )
    assert name.startswith("Continue with ")
    chosen.click()
    settled(page)
    return ids[row]


def test_an_answer_goes_on_from_an_alternative(page, post):
    ask(page, "hello", temperature=0)
    first, text = token_ids(page), answer_of(page)
    other = branch(page, 3, 0)
    ids = token_ids(page)
    assert ids[:4] == [*first[:3], other] and other != first[3] and len(ids) == 16
    whole = post("/page/generate", messages=HELLO, tokens=[*first[:3], other], temperature=0, max_tokens=12)
    sent = [token["id"] for line in whole.text.split("\n\n") if line.startswith("data: {") for token in json.loads(line[6:])["tokens"]]
    assert ids[4:] == sent
    assert page.locator(".token.branched").count() == 1 and "version 2 of 2" in page.locator(".versions").text_content()
    page.get_by_role("button", name="Earlier version").click()
    assert answer_of(page) == text and token_ids(page) == first
    assert page.get_by_role("button", name="Earlier version").is_disabled()
    page.get_by_role("button", name="Later version").click()
    assert token_ids(page) == ids


def test_a_branch_of_an_earlier_answer_drops_what_came_after(page, client):
    ask(page, "hello", temperature=0)
    ask(page, "and then?", temperature=0)
    assert page.locator("article").count() == 4
    page.locator(".assistant").first.locator(".token").nth(2).click()
    page.locator("#detail .branch").first.click()
    settled(page)
    assert page.locator("article").count() == 2
    text = answer_of(page)
    ask(page, "again", temperature=0)
    messages = [*HELLO, {"role": "assistant", "content": text}, {"role": "user", "content": "again"}]
    expected = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=12)
    assert answer_of(page) == expected.choices[0].message.content


def test_branching_by_keyboard(page):
    ask(page, "hello")
    page.evaluate("document.querySelectorAll('.token')[2].focus()")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.className") == "branch"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Escape")
    assert page.locator("#detail").is_hidden()
    assert page.evaluate("document.activeElement === document.querySelectorAll('.token')[2]")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    page.locator(".versions").wait_for()
    settled(page)
    assert page.locator(".token.branched").count() == 1


def test_a_branch_while_the_answer_is_still_coming(make_text_engine, start, open_page):
    with start(make_text_engine(max_seq_len=2048, eos=False)) as url:
        page = open_page(url)
        page.locator("#model", has_text="tiny").wait_for()
        page.fill("#prompt", "hello")
        page.press("#prompt", "Enter")
        page.locator(".token").nth(8).wait_for()
        page.evaluate("document.getElementById('max_tokens').value = '5'")
        page.locator(".token").nth(2).click()
        page.locator("#detail .branch").first.click()
        page.locator(".versions").wait_for()
        settled(page)
        assert "version 2 of 2" in page.locator(".versions").text_content()
        assert page.locator(".assistant .body").count() == 1 and "cut by the token limit" in page.locator(".note").text_content()
        page.close()


def test_a_token_of_line_breaks_can_be_pointed_at_and_stays_out_of_the_text(page):
    run = """async () => {
        const { Writer } = await import("/web/tokens.js");
        const body = document.getElementById("log").appendChild(document.createElement("div"));
        body.className = "body";
        const writer = new Writer(body);
        for (const text of ["\\n\\n\\n", "a", "\\u0000", "\\t", " "])
            writer.add({ id: 1, bytes: new TextEncoder().encode(text), name: "x", logprob: -1, others: [] });
        return [[...body.children].map((span) => span.getBoundingClientRect().width > 0), body.textContent, writer.text];
    }"""
    seen, content, text = page.evaluate(run)
    assert seen == [True] * 5 and content == text == "\n\n\na\0\t "


def test_hostile_tokens_stay_text(page):
    """A token that spells markup, and names that would be markup, enter the page as text."""
    run = """async () => {
        const { Writer } = await import("/web/tokens.js");
        const { visible } = await import("/web/dom.js");
        const body = document.createElement("div");
        document.body.append(body);
        const writer = new Writer(body), bytes = new TextEncoder().encode("<img src=x onerror=alert(1)><script>alert(2)</script>\\u202e");
        writer.add({ id: 1, bytes, name: "x", logprob: -1, others: [] });
        writer.add({ id: 2, bytes: null, name: "<|<b>|>", logprob: -1, others: [] });
        for (const byte of [0xe2, 0x82, 0xac, 0xff]) writer.add({ id: byte, bytes: Uint8Array.of(byte), logprob: -1, others: [] });
        writer.finish();
        const spans = [...body.children].map((span) => [span.textContent, span.tokens.length, span.first]);
        return [body.querySelectorAll("img, script, b").length, spans, writer.text, visible({ bytes })];
    }"""
    count, spans, text, shown = page.evaluate(run)
    markup = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    assert count == 0 and spans == [[markup + "\u202e", 1, 0], ["<|<b>|>", 1, 1], ["€", 3, 2], ["\ufffd", 1, 5]]
    assert text == markup + "\u202e€\ufffd" and "\u202e" not in shown and "\\u202e" in shown
