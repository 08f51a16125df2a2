"""The live page: the real server by HTTP, and the page in a real browser while a run is written."""

import json
import shutil

import httpx
import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_the_page_is_one_file_with_a_strict_policy(written, start):
    with start(written().path) as url:
        answer = httpx.get(url)
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert "http://" not in answer.text.replace("http://www.w3.org/2000/svg", "") and "https://" not in answer.text


def test_other_hosts_and_pages_are_refused(written, start):
    with start(written().path) as url:
        assert httpx.get(f"{url}/state", headers={"Host": "evil.example"}).status_code == 403
        assert httpx.get(f"{url}/state", headers={"Origin": "https://example.org"}).status_code == 403
        assert httpx.get(f"{url}/state", headers={"Origin": url}).status_code == 200


def test_curves_are_sent_again_only_when_something_was_appended(written, start):
    run = written()
    run.step(1)
    with start(run.path) as url:
        first = httpx.get(f"{url}/curves")
        tag = {"If-None-Match": first.headers["etag"]}
        assert first.json()["loss_nats"]["raw"] == [[1.0], [13.0]]
        assert httpx.get(f"{url}/curves", headers=tag).status_code == 304
        assert httpx.get(f"{url}/curves?first=1&last=2", headers=tag).status_code == 200
        run.step(2)
        again = httpx.get(f"{url}/curves", headers=tag)
        assert again.status_code == 200 and again.json()["loss_nats"]["raw"] == [[1.0, 2.0], [13.0, 8.0]]


def test_values_that_are_no_numbers_are_valid_json(written, start):
    run = written()
    run.append('{"step": 1, "time_s": 1.0, "loss_nats": NaN, "lr": Infinity, "grad_norm": null, "tokens": 5}\n')
    with start(run.path) as url:
        for address in ("state", "curves"):
            text = httpx.get(f"{url}/{address}").text
            json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_the_page_follows_a_run_from_before_its_beginning_to_its_end(written, start, open_page, tmp_path):
    with start(tmp_path / "run") as url:
        page = open_page(url, viewport={"width": 1280, "height": 800})
        page.locator("#status", has_text="waiting").wait_for()
        run = written(steps=60)
        for step in range(1, 51):
            run.step(step)
        page.locator("#status", has_text="running").wait_for()
        page.locator("#when", has_text="step 50 of 60").wait_for()
        assert page.locator("figure").count() == 5 and page.locator("figure svg polyline.line").count() >= 5
        assert "No predicted curve" in page.locator("figure").first.text_content()
        run.step(51, event="spike", action="skip", skipped=True, reason="loss 9.", documents="train document 17 (<b>code</b>)")
        page.locator("#incidents li", has_text="train document 17 (<b>code</b>)").wait_for()
        (run.path / "DONE").write_text(json.dumps({"time_s": 25.0, "energy_kwh": 0.5, "energy_source": "estimate: 2 cores x 10 W"}))
        page.locator("#status", has_text="done").wait_for()
        assert "500 Wh" in page.locator("#facts").text_content() and "estimate" in page.locator("#facts").text_content()
        page.close()  # before the server goes: the page asks it every second


def test_pointing_zooming_and_logarithms(written, start, open_page):
    run = written(steps=400)
    for step in range(1, 401):
        run.step(step)
    with start(run.path) as url:
        page = open_page(url, viewport={"width": 1280, "height": 800})
        chart = page.locator("figure").first
        chart.locator("svg").wait_for()
        box = chart.locator("svg").bounding_box()
        page.mouse.move(box["x"] + box["width"] * 0.55, box["y"] + 80)
        page.locator("figure .note", has_text="step 2").first.wait_for()
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + 80)
        with page.expect_response(lambda response: "first=" in response.url) as zoomed:
            page.mouse.up()
        steps = zoomed.value.json()["loss_nats"]["raw"][0]
        assert 200 < steps[0] < 230 and 280 < steps[-1] < 320 and len(steps) == steps[-1] - steps[0] + 1
        page.locator("#foot", has_text="zoomed in").wait_for()
        page.mouse.dblclick(box["x"] + box["width"] * 0.5, box["y"] + 80)
        page.locator("#foot", has_text="drag across").wait_for()
        before = chart.locator("polyline").last.get_attribute("points")
        chart.get_by_role("button", name="logarithmic x").click()
        assert chart.locator("polyline").last.get_attribute("points") != before
        page.close()  # before the server goes: the page asks it every second


def test_a_narrow_screen_never_scrolls_sideways(written, start, open_page):
    build = written("a_build_with_a_name_that_does_not_fit_anywhere_at_all", stage="build")
    for name in ("curate", "plan", "tokenizer", "shards", "facts"):
        build.append(json.dumps({"stage": name, "time_s": 100.0, "energy_j": 5.0}) + "\n")
    run = written(f"{build.path.name}/pretrain", steps=100)
    for step in range(1, 30):
        run.step(step, cost=0.01 * step, co2_g=1.5, event="spike", action="warn", reason="r" * 300, documents="x" * 500)
    with start(build.path) as url:
        page = open_page(url, viewport={"width": 320, "height": 640})
        page.locator("#incidents li").first.wait_for()
        page.locator("figure svg").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 320
        page.get_by_role("button", name="pretrain").click()
        page.locator("#when", has_text="pretrain").wait_for()
        page.close()  # before the server goes: the page asks it every second


def test_a_server_that_goes_away_is_said(written, start, browser):
    run = written()
    run.step(1)
    page = browser.new_page()
    with start(run.path) as url:
        page.goto(url)
        page.locator("#status", has_text="running").wait_for()
    page.locator("#status", has_text="lost").wait_for()
    assert "plinth watch --serve again" in page.locator("#message").text_content()
    page.close()
