"""The page in a real browser, against a real server: its files, the conversation, the keyboard, a phone, and what goes wrong."""

import httpx
import pytest

from chat_page import answer_of, ask, set_slider, settled
from plinth.serving.keys import ApiKeys
from plinth.serving.page import page_files

PHONE = {"viewport": {"width": 320, "height": 640}, "has_touch": True, "is_mobile": True}


@pytest.fixture
def open_page(open_page):
    """Open the page and wait until it knows its model."""

    def open_chat(url, **options):
        page = open_page(url, **options)
        page.locator("#model", has_text="tiny").wait_for()
        return page

    return open_chat


def test_the_page_loads_only_its_own_files_under_a_strict_policy(base_url):
    answer = httpx.get(base_url)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; style-src 'self'; script-src 'self'") and "unsafe" not in policy
    assert "<style" not in answer.text and " style=" not in answer.text and "onclick" not in answer.text
    texts = [answer.text, *(data.decode() for data, _ in page_files().values())]
    assert len(texts) > 8
    for text in texts:
        assert "https://" not in text and "http://" not in text.replace("http://www.w3.org/2000/svg", "")
        assert "innerHTML" not in text and "eval(" not in text


def test_files_have_their_types_and_no_other_path_is_answered(base_url):
    for name, (data, kind) in page_files().items():
        answer = httpx.get(f"{base_url}/web/{name}")
        assert answer.content == data and answer.headers["content-type"] == kind and answer.headers["x-content-type-options"] == "nosniff"
    for path in ("index.html", "..%2fserving%2fpage.py", "%2e%2e/serving/page.py", "__init__.py", "page.js%00.css", ""):
        answer = httpx.get(f"{base_url}/web/{path}")
        assert answer.status_code == 404 and answer.json()["error"]["type"] == "not_found_error", path


def test_a_conversation_with_probabilities(base_url, open_page, client):
    page = open_page(base_url)
    ask(page, "What is <img src=x onerror=alert(1)>?", temperature=0.8)
    said = page.locator(".user .body").text_content()
    assert said == "What is <img src=x onerror=alert(1)>?" and page.locator("#log img").count() == 0
    messages = [{"role": "user", "content": said}]
    expected = client.chat.completions.create(
        model="tiny", messages=messages, temperature=0.8, seed=3, max_tokens=12, logprobs=True, top_logprobs=8
    ).choices[0]
    assert answer_of(page) == expected.message.content
    assert page.locator(".assistant .note").text_content().startswith("12 tokens")
    page.locator(".token").first.hover()
    detail = page.locator("#detail")
    assert detail.is_visible() and detail.locator("li").count() in (8, 9) and detail.locator("li.chosen").count() == 1
    assert page.locator(".token").first.evaluate("span => span.tokens[0].logprob") == expected.logprobs.content[0].logprob
    page.mouse.move(5, 5)
    detail.wait_for(state="hidden")
    ask(page, "And now?", temperature=0.8)
    messages += [{"role": "assistant", "content": expected.message.content}, {"role": "user", "content": "And now?"}]
    second = client.chat.completions.create(model="tiny", messages=messages, temperature=0.8, seed=3, max_tokens=12)
    assert answer_of(page) == second.choices[0].message.content
    page.click("#clear")
    assert page.locator("article").count() == 0 and page.locator("#welcome").is_visible()


def test_a_pretrained_model_opens_as_continuation(make_text_engine, start, open_page, client):
    with start(make_text_engine(), is_chat=False) as url:
        page = open_page(url)
        assert page.input_value("#mode") == "completion" and page.get_attribute("#prompt", "placeholder") == "Text to continue"
        ask(page, "def main", temperature=0)
        text = client.completions.create(model="tiny", prompt="def main", temperature=0, max_tokens=12).choices[0].text
        assert answer_of(page) == text
        page.close()


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
    page.focus("#tab-chat")
    page.keyboard.press("ArrowRight")
    second = page.locator("[role=tab]:visible").nth(1)
    assert (
        second.evaluate("tab => tab === document.activeElement") and page.locator(f"#{second.get_attribute('aria-controls')}").is_visible()
    )
    page.keyboard.press("End")
    assert page.get_attribute("#tab-run", "aria-selected") == "true" and page.locator("#chat").is_hidden()


def test_every_control_has_a_name_and_every_view_a_heading(base_url, open_page):
    page = open_page(base_url)
    nameless = """() => [...document.querySelectorAll('button, input, select, textarea, [role=region], iframe')].filter((node) =>
        !(node.labels?.length || node.getAttribute('aria-label') || node.textContent.trim() || node.title)).map((node) => node.outerHTML)"""
    assert page.evaluate(nameless) == []
    pairs = "() => [...document.querySelectorAll('[role=tab]')].every((tab) => document.getElementById(tab.getAttribute('aria-controls')))"
    assert page.evaluate(pairs)
    assert page.locator("#status[role=status]").count() == 1 and page.locator("#log[role=log]").count() == 1
    assert page.locator(":root").get_attribute("lang") == "en"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(base_url, open_page, scheme):
    page = open_page(base_url, color_scheme=scheme)
    contrast = """() => {
        const style = getComputedStyle(document.documentElement);
        const light = (name) => {
            const parts = style.getPropertyValue(name).trim().match(/[0-9a-f]{2}/gi).map((pair) => parseInt(pair, 16) / 255);
            const [r, g, b] = parts.map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        return [['--text', '--ground'], ['--text', '--surface'], ['--text', '--mine'], ['--text', '--shade'], ['--quiet', '--ground'],
            ['--quiet', '--surface'], ['--accent', '--ground'], ['--accent-text', '--accent'], ['--alarm', '--alarm-ground'],
            ['--good', '--good-ground'], ['--warn', '--warn-ground']].map(([a, b]) => {
            const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
            return [a, b, (x + 0.05) / (y + 0.05)];
        });
    }"""
    assert [pair for pair in page.evaluate(contrast) if pair[2] < 4.5] == []


def test_a_phone(base_url, open_page):
    page = open_page(base_url, **PHONE, color_scheme="dark")
    ask(page, "averylongwordwithoutanyspace" * 2)
    assert page.locator("#panel").is_hidden()
    page.locator(".token").nth(3).tap()
    box = page.locator("#detail").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 320 and box["y"] >= 0 and box["y"] + box["height"] <= 640
    page.locator("#scroll").tap(position={"x": 5, "y": 5})
    assert page.locator("#detail").is_hidden()
    page.click("#panel-toggle")
    assert page.locator("#panel").is_visible() and page.get_attribute("#panel-toggle", "aria-expanded") == "true"
    for tab in page.locator("[role=tab]:visible").all():
        tab.click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 320, tab.text_content()


def test_reduced_motion_stops_what_blinks(base_url, open_page):
    page = open_page(base_url, reduced_motion="reduce")
    page.evaluate("document.getElementById('welcome').classList.add('busy')")
    assert page.evaluate("getComputedStyle(document.getElementById('welcome'), '::after').animationName") == "none"


def test_stop_keeps_what_was_written_and_frees_the_place(make_text_engine, start, open_page, wait_until):
    with start(make_text_engine(max_batch=1, max_seq_len=4096, eos=False)) as url:
        page = open_page(url)
        page.fill("#prompt", "go on")
        page.press("#prompt", "Enter")
        page.locator(".token").nth(5).wait_for()
        page.click("#stop")
        settled(page)
        assert "stopped by you" in page.locator(".note").text_content()
        assert page.locator(".token").count() > 5 and page.locator("#prompt").is_enabled()
        wait_until(lambda: httpx.get(f"{url}/healthz").json()["active"] == 0, "the place is free")
        page.close()


def test_errors_are_shown_and_the_text_is_kept(make_text_engine, start, browser):
    with start(make_text_engine(max_seq_len=64)) as url:
        page = browser.new_page()
        page.goto(url)
        page.locator("#model", has_text="tiny").wait_for()
        page.fill("#prompt", "word " * 200)
        page.press("#prompt", "Enter")
        alert = page.get_by_role("alert").filter(has_text="Shorten")
        alert.wait_for()
        assert page.input_value("#prompt").startswith("word")
        assert page.locator("article").count() == 0
        set_slider(page, "temperature", 1)
        page.click("#panel-toggle", force=True) if page.locator("#panel").is_hidden() else None
        page.fill("#max_tokens", "0")
        page.press("#prompt", "Enter")
        assert page.evaluate("document.querySelector('#max_tokens').matches(':invalid')") and page.locator("article").count() == 0
        page.close()


def test_a_server_with_keys_asks_for_one(make_text_engine, start, browser):
    with start(make_text_engine(), keys=ApiKeys(["letmein"])) as url:
        page = browser.new_page()
        page.goto(url)
        for key in ("wrong", "letmein"):
            page.locator("#key-dialog").wait_for()
            page.fill("#key", key)
            page.press("#key", "Enter")
            page.locator("#key-wrong" if key == "wrong" else "#model:has-text('tiny')").wait_for()
        ask(page, "hello")
        assert len(answer_of(page)) > 0
        page.close()
