"""The sliders: what the page says that they do to the next token is what sampling does."""

import json
import math

import pytest
import torch

from chat_page import ask, set_slider
from plinth.inference.sampling import target_distribution
from plinth.inference.sampling_params import SamplingParams

SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.0},
    {"temperature": 0.3},
    {"temperature": 1.7, "top_k": 5},
    {"temperature": 0.8, "top_p": 0.6},
    {"temperature": 1.3, "min_p": 0.1},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 2.0, "top_k": 1},
    {"temperature": 1.0, "top_p": 0.05},
]


@pytest.mark.parametrize("sharpness", [0.5, 2.0, 6.0])
def test_the_rule_in_the_browser_is_the_rule_of_sampling(base_url, open_page, sharpness):
    page = open_page(base_url)
    logits_V = (torch.randn(300, generator=torch.Generator().manual_seed(1)) * sharpness).tolist()
    logprobs = torch.tensor(logits_V).log_softmax(-1).sort(descending=True).values.tolist()
    run = """async ([logprobs, settings]) => {
        const { truncated } = await import("/web/distribution.js");
        const all = { temperature: 1, top_k: null, top_p: null, min_p: null, ...settings };
        const made = truncated(Float32Array.from(logprobs), all);
        return { kept: made.kept, shares: logprobs.map((_, i) => made.at(i)), entropy: made.entropy };
    }"""
    for settings in SETTINGS:
        expected = sorted(target_distribution(logits_V, SamplingParams(**settings)), reverse=True)
        found = page.evaluate(run, [logprobs, settings])
        assert found["kept"] == sum(share > 0 for share in expected), settings
        assert found["shares"] == pytest.approx(expected, abs=1e-6), settings
        entropy = -sum(share * math.log(share) for share in expected if share > 0)
        assert found["entropy"] == pytest.approx(entropy, abs=1e-4), settings


def test_the_distribution_is_the_model_s(post, make_text_engine):
    answer = post("/page/next", prompt="def main", tokens=[5, 6], count=7).json()
    text_engine = make_text_engine()
    prompt = [*text_engine.encode("def main"), 5, 6]
    with text_engine.engine.search() as space:
        _, logits_V = space.start(prompt)
        expected = logits_V.log_softmax(-1).sort(descending=True)
    assert [token["id"] for token in answer["tokens"]] == expected.indices[:7].tolist()
    assert [token["logprob"] for token in answer["tokens"]] == pytest.approx(expected.values[:7].tolist())


def test_a_place_that_is_none_is_refused(post):
    for body, word in (
        ({}, "one of messages and prompt"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "one of messages and prompt"),
        ({"prompt": "a", "tokens": [10**6]}, "outside"),
        ({"prompt": "a", "tokens": [1] * 500}, "context"),
        ({"prompt": "a", "count": 0}, "count"),
        ({"prompt": "a", "model": "other"}, "not served"),
    ):
        answer = post("/page/next", **body)
        assert 400 <= answer.status_code < 500 and word in answer.json()["error"]["message"], json.dumps(body)


def test_sliders_move_the_bars(base_url, open_page):
    page = open_page(base_url)
    page.locator("#model", has_text="tiny").wait_for()
    page.click("#reset")
    page.fill("#prompt", "def main")
    page.locator("#bars tbody tr").first.wait_for()
    rows = page.locator("#bars tbody tr")
    assert rows.count() == 13 and "answer to your message" in page.locator("#place").text_content()
    assert all(row.locator("td").nth(1).text_content() == row.locator("td").nth(2).text_content() for row in rows.all())
    set_slider(page, "top_k", 2)  # the third notch: three tokens
    assert rows.locator(".now").all_text_contents().count("cut") == 10 and page.locator("tr.cut").count() == 10
    assert "3 of 400 tokens" in page.locator("#effect").text_content()
    set_slider(page, "temperature", 0)
    assert page.locator("#temperature").get_attribute("aria-valuetext") == "0, greedy"
    assert rows.first.locator(".now").text_content() == "100 %" and "1 of 400 tokens" in page.locator("#effect").text_content()
    page.click("#reset")
    assert "400 of 400 tokens" in page.locator("#effect").text_content() and page.locator("tr.cut").count() == 0


def test_the_keyboard_moves_a_slider_and_its_effect_is_said(base_url, open_page):
    page = open_page(base_url)
    page.locator("#model", has_text="tiny").wait_for()
    page.fill("#prompt", "hello")
    page.locator("#bars tbody tr").first.wait_for()
    page.focus("#temperature")
    before = page.locator("#temperature-value").text_content()
    page.keyboard.press("ArrowRight")
    assert page.locator("#temperature-value").text_content() != before
    page.locator("#status", has_text="tokens can be drawn").wait_for()


def test_the_panel_shows_the_place_of_a_token_that_is_chosen(base_url, open_page, post):
    page = open_page(base_url)
    page.locator("#model", has_text="tiny").wait_for()
    ask(page, "hello")
    page.locator("#place", has_text="first token of the last answer").wait_for()
    page.locator(".token").nth(4).click()
    page.locator("#place", has_text="The token after").wait_for()
    before = page.evaluate("() => [...document.querySelectorAll('.token')].slice(0, 4).flatMap((span) => span.tokens.map((t) => t.id))")
    expected = post("/page/next", messages=[{"role": "user", "content": "hello"}], tokens=before, count=1).json()["tokens"][0]
    shown = page.locator("#bars tbody tr").first.locator("td").nth(1).text_content()
    assert shown == f"{100 * torch.tensor(expected['logprob']).exp().item():.1f} %"
