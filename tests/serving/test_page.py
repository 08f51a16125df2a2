"""The chat page in a real browser, against a real server."""

import httpx
import pytest

PHONE = {"viewport": {"width": 320, "height": 640}, "has_touch": True, "is_mobile": True}


@pytest.fixture
def open_page(open_page):
    """Open the chat page and wait until it knows its model."""

    def open_chat(url, **options):
        page = open_page(url, **options)
        page.locator("#model", has_text="tiny").wait_for()
        return page

    return open_chat


def ask(page, text, max_tokens="12", **settings):
    """Fill in the settings, send a message, and wait for the end of the answer."""
    page.evaluate("document.getElementById('settings').open = true")
    for name, value in {"max_tokens": max_tokens, "seed": "3", **settings}.items():
        page.fill(f"#{name}", value)
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    page.locator(".assistant .note").last.wait_for(timeout=60_000)


def test_the_page_is_one_file_with_a_strict_policy(base_url):
    answer = httpx.get(base_url)
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert "http://" not in answer.text.replace("http://www.w3.org/2000/svg", "") and "https://" not in answer.text


def test_a_conversation_with_probabilities(base_url, open_page, client):
    page = open_page(base_url)
    ask(page, "What is <img src=x onerror=alert(1)>?", temperature="0.8", top_p="1")
    said = page.locator(".user .body").text_content()
    assert said == "What is <img src=x onerror=alert(1)>?" and page.locator("#log img").count() == 0
    expected = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": said}], temperature=0.8, seed=3, max_tokens=12, logprobs=True, top_logprobs=6
    ).choices[0]
    assert page.locator(".assistant .body").text_content() == expected.message.content
    assert page.locator(".assistant .note").text_content().startswith("12 tokens")
    page.locator(".token").first.hover()
    detail = page.locator("#detail")
    assert detail.is_visible() and detail.locator("tbody tr").count() in (6, 7)
    assert page.locator(".token").first.evaluate("span => span.tokens[0].logprob") == expected.logprobs.content[0].logprob
    page.mouse.move(5, 5)
    assert detail.is_hidden()
    ask(page, "And now?")
    assert page.locator(".assistant .body").count() == 2
    page.click("#clear")
    assert page.locator("article").count() == 0


def test_keyboard_alone(base_url, open_page):
    page = open_page(base_url)
    ask(page, "hello")
    page.evaluate("document.querySelector('.token').focus()")
    assert page.locator("#detail").is_visible()
    shown = page.locator("#detail").text_content()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement === document.querySelectorAll('.token')[1]")
    assert page.locator("#detail").text_content() != shown
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement === [...document.querySelectorAll('.token')].at(-1)")
    page.keyboard.press("Escape")
    assert page.locator("#detail").is_hidden()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "prompt"


def test_a_phone(base_url, open_page):
    page = open_page(base_url, **PHONE, color_scheme="dark")
    ask(page, "averylongwordwithoutanyspace" * 2)
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    page.evaluate("document.getElementById('settings').open = false")
    page.locator(".token").nth(3).tap()
    box = page.locator("#detail").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 320 and box["y"] >= 0 and box["y"] + box["height"] <= 640
    page.locator("#scroll").tap(position={"x": 5, "y": 5})
    assert page.locator("#detail").is_hidden()


def test_stop_keeps_what_was_written_and_frees_the_place(make_text_engine, start, open_page, wait_until):
    with start(make_text_engine(max_batch=1, max_seq_len=4096, eos=False)) as url:
        page = open_page(url)
        page.fill("#prompt", "go on")
        page.press("#prompt", "Enter")
        page.locator(".token").nth(5).wait_for()
        page.click("#stop")
        page.locator(".note").wait_for()
        assert "stopped by you" in page.locator(".note").text_content()
        assert page.locator("#send").is_visible() and page.locator(".token").count() > 5
        wait_until(lambda: httpx.get(f"{url}/healthz").json()["active"] == 0, "the place is free")


def test_errors_are_shown_and_the_text_is_kept(make_text_engine, start, browser):
    with start(make_text_engine(max_seq_len=64)) as url:
        page = browser.new_page()
        page.goto(url)
        page.locator("#model", has_text="tiny").wait_for()
        page.fill("#prompt", "word " * 200)
        page.press("#prompt", "Enter")
        alert = page.get_by_role("alert")
        alert.wait_for()
        assert "Shorten the prompt" in alert.text_content() and page.input_value("#prompt").startswith("word")
        assert page.locator(".assistant").count() == 0
        page.close()


def test_a_pretrained_model_opens_as_continuation(make_text_engine, start, open_page, client):
    with start(make_text_engine(), is_chat=False) as url:
        page = open_page(url)
        assert page.input_value("#mode") == "completion"
        ask(page, "def main", temperature="0")
        text = client.completions.create(model="tiny", prompt="def main", temperature=0, max_tokens=12, seed=3).choices[0].text
        assert page.locator(".assistant .body").text_content() == text
        page.locator(".token").first.hover()
        assert page.locator("#detail tbody tr").count() >= 6
