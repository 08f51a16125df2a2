"""Beams: the page's search is plinth.inference.beam's, step by step, beside other requests, and it leaves nothing behind."""

import asyncio
import json

import httpx
import pytest

from plinth.inference.beam import BeamParams, beam_search


def events(url, **body):
    """Return the events of a beam search."""
    answer = httpx.post(f"{url}/page/beams", json={"model": "tiny", **body}, timeout=120)
    assert answer.status_code == 200, answer.text
    lines = [line[6:] for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 3.0])
def test_the_texts_are_those_of_beam_search(base_url, make_text_engine, length_penalty):
    *steps, last = events(base_url, prompt="def main", num_beams=3, max_tokens=10, length_penalty=length_penalty)
    text_engine = make_text_engine()
    params = BeamParams(num_beams=3, num_return=3, max_tokens=10, length_penalty=length_penalty)
    with text_engine.engine.search() as space:
        (expected,) = beam_search(space, [text_engine.encode("def main")], params, text_engine.engine.eos_ids)
    texts = [text_engine.tokenizer.decode(beam.tokens) for beam in expected]
    assert [found["text"] for found in last["best"]] == texts
    assert [found["score"] for found in last["best"]] == pytest.approx([beam.score for beam in expected])
    for end in last["ends"]:
        while len(steps) <= end["step"]:
            steps.append({"beams": []})
        steps[end["step"]]["beams"].append(end)
    for found, beam in zip(last["best"], expected):
        path, step, at = [], found["step"], found["beam"]
        while step >= 0:
            path.append(steps[step]["beams"][at])
            at, step = path[-1]["parent"], step - 1
        ids = [node["token"]["id"] for node in reversed(path)]
        assert at == -1 and ids[: len(beam.tokens)] == beam.tokens
        assert path[0]["logprob"] == pytest.approx(beam.logprob, abs=1e-3)
        assert all(node["logprob"] <= other["logprob"] + 1e-6 for node, other in zip(path, path[1:]))


def test_searches_and_answers_run_beside_one_another(base_url):
    wide = {"prompt": "class Path", "num_beams": 4, "max_tokens": 8}
    alone = events(base_url, **wide)
    chat = {"model": "tiny", "prompt": "shutil", "max_tokens": 40, "temperature": 0}

    async def both():
        async with httpx.AsyncClient(timeout=120) as client:
            beams = [client.post(f"{base_url}/page/beams", json=wide) for _ in range(3)]
            answers = [client.post(f"{base_url}/v1/completions", json=chat) for _ in range(6)]
            return await asyncio.gather(*beams, *answers)

    *searches, first, second, _, _, _, last = asyncio.run(both())
    for search in searches:
        assert [json.loads(line[6:]) for line in search.text.split("\n\n") if line.startswith("data: {")] == alone
    assert first.json()["choices"][0]["text"] == second.json()["choices"][0]["text"] == last.json()["choices"][0]["text"]


def test_a_client_that_leaves_frees_the_blocks(make_text_engine, start, wait_until):
    text_engine = make_text_engine(max_seq_len=2048, eos=False)
    free = text_engine.engine.pool.num_available
    with start(text_engine) as url:
        for _ in range(6):  # more than may run at once
            with httpx.stream("POST", f"{url}/page/beams", json={"prompt": "a", "max_tokens": 64, "num_beams": 8}, timeout=60) as answer:
                for line in answer.iter_lines():
                    if line:
                        break
            wait_until(lambda: text_engine.engine.pool.num_available == free, "all blocks are free")


def test_what_cannot_be_searched_is_refused(post):
    for body, word in (
        ({"prompt": "a", "num_beams": 1}, "num_beams"),
        ({"prompt": "a", "num_beams": 9}, "num_beams"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "length_penalty": 100}, "length_penalty"),
        ({"prompt": "word " * 200}, "context"),
        ({"prompt": "a", "beams": 3}, "beams"),
        ({"num_beams": 3}, "messages and prompt"),
    ):
        answer = post("/page/beams", **body)
        assert answer.status_code == 400 and word in answer.json()["error"]["message"], body


def test_the_tree_in_the_page(base_url, open_page):
    page = open_page(base_url)
    page.locator("#model", has_text="tiny").wait_for()
    page.click("#tab-beams")
    page.fill("#num_beams", "3")
    page.fill("#beam_tokens", "6")
    page.fill("#prompt", "<b>hello</b>")
    page.press("#prompt", "Enter")
    page.locator("#beam-best li").first.wait_for(timeout=60_000)
    page.locator("#send:visible").wait_for()
    *steps, last = events(base_url, messages=[{"role": "user", "content": "<b>hello</b>"}], num_beams=3, max_tokens=6)
    assert page.locator("#beam-asked").text_content() == "<b>hello</b>" and page.locator("#beams b").count() == 0
    nodes = sum(len(step["beams"]) for step in steps) + len(last["ends"])
    assert page.locator("#beam-tree g.beam").count() == nodes
    assert page.locator("#beam-best li button").all_text_contents() == [found["text"] or "(nothing)" for found in last["best"]]
    length = last["best"][0]["step"] + 1
    assert page.locator("#beam-tree g.best").count() == length and page.locator("#beam-tree path.best").count() == length - 1
    page.locator("#beam-best button").nth(2).focus()
    page.keyboard.press("Enter")
    assert page.locator("#beam-best button").nth(2).get_attribute("aria-pressed") == "true"
    assert page.locator("#beam-tree g.best").count() == last["best"][2]["step"] + 1
    assert "Tree of beams over" in page.locator("#beam-tree svg").get_attribute("aria-label")
    page.locator("#status", has_text="Beam search is complete").wait_for(state="attached")


def test_a_beam_search_that_fails_says_why(make_text_engine, start, browser):
    with start(make_text_engine(max_seq_len=64)) as url:
        page = browser.new_page()
        page.goto(url)
        page.locator("#model", has_text="tiny").wait_for()
        page.click("#tab-beams")
        page.fill("#prompt", "word " * 100)
        page.press("#prompt", "Enter")
        page.get_by_role("alert").filter(has_text="Shorten").wait_for()
        assert page.input_value("#prompt").startswith("word") and page.locator("#beam-result").is_hidden()
        page.close()
