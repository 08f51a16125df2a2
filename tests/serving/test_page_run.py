"""The run beside its model: curves and report, and what is said where there is none."""

import json

import httpx
import pytest

from local_server import serve
from plinth.serving.app import create_app
from plinth.serving.keys import ApiKeys
from plinth.watch.beside import add_run, find_run


@pytest.fixture
def build(tmp_path):
    """A build with a pretraining run that has logged some steps, and a report."""
    build, run = tmp_path / "mine", tmp_path / "mine" / "pretrain"
    (run / "model").mkdir(parents=True)
    (build / "provenance.json").write_text(json.dumps({"stage": "build"}))
    (run / "provenance.json").write_text(json.dumps({"stage": "pretrain"}))
    (run / "config.json").write_text(json.dumps({"train": {"steps": 20}}))
    lines = [{"step": i, "tokens": 100 * i, "time_s": float(i), "loss_nats": 4.0 / i, "grad_norm": 1.0} for i in range(1, 21)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "DONE").write_text("{}")
    (build / "report.html").write_text("<!doctype html><style>h1 { color: green; }</style><h1>My report</h1>")
    return build


@pytest.fixture
def beside(make_text_engine):
    """Serve a model that lies at a path: `with beside(path) as url`."""

    def start(path, **options):
        app = create_app(make_text_engine(), "tiny", **options)
        add_run(app, path, has_keys=bool(options.get("keys")))
        return serve(app)

    return start


def test_the_run_is_found_from_what_is_served(build, tmp_path):
    assert find_run(build) == build.resolve()
    assert find_run(build / "pretrain") == find_run(build / "pretrain" / "model") == (build / "pretrain").resolve()
    (tmp_path / "bare").mkdir()
    assert find_run(tmp_path / "bare") is None


def test_curves_and_report_in_the_page(build, beside, open_page):
    with beside(build) as url:
        page = open_page(url)
        page.click("#tab-run")
        curves = page.frame_locator("#run-curves iframe")
        curves.locator("#name", has_text="mine").wait_for()
        curves.locator("figure polyline").first.wait_for()
        report = page.frame_locator("#run-report iframe")
        assert report.locator("h1").text_content() == "My report"
        assert report.locator("h1").evaluate("node => getComputedStyle(node).color") == "rgb(0, 128, 0)"
        assert page.locator("#run-note").is_hidden() and page.locator("#composer").is_hidden()
        assert page.get_by_role("link", name="Curves").get_attribute("href") == "/run/curves/"
        page.close()


def test_a_report_runs_no_script(build, beside):
    with beside(build / "pretrain") as url:
        answer = httpx.get(f"{url}/run/report")
        assert "My report" in answer.text and "script-src" not in answer.headers["content-security-policy"]
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")
        (build / "report.html").unlink()
        assert httpx.get(f"{url}/run/report").status_code == 404
        assert "no report" in httpx.get(f"{url}/page/run").json()["note"]


def test_a_model_without_a_run_says_so(base_url, open_page):
    page = open_page(base_url)
    page.click("#tab-run")
    page.locator("#run-note", has_text="lies in no run").wait_for()
    assert page.locator("iframe").count() == 0


def test_keys_close_the_run_too(build, beside):
    with beside(build, keys=ApiKeys(["secret"])) as url:
        assert httpx.get(f"{url}/run/report").status_code == httpx.get(f"{url}/page/run").status_code == 401
        headers = {"Authorization": "Bearer secret"}
        told = httpx.get(f"{url}/page/run", headers=headers).json()
        assert "plinth watch" in told["note"] and told.get("curves") is None
        assert httpx.get(f"{url}/run/curves/", headers=headers).status_code == 404
