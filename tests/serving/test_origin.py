"""Which pages may use the server."""

import httpx

BODY = {"model": "tiny", "prompt": "x", "max_tokens": 1}


def test_own_page_and_clients_without_origin_pass(base_url):
    assert httpx.post(f"{base_url}/v1/completions", json=BODY, headers={"Origin": base_url}).status_code == 200
    assert httpx.post(f"{base_url}/v1/completions", json=BODY).status_code == 200


def test_other_pages_are_refused(base_url):
    for origin in ("https://example.org", "null", "http://127.0.0.1:1"):
        answer = httpx.post(f"{base_url}/v1/completions", json=BODY, headers={"Origin": origin})
        assert answer.status_code == 403 and origin in answer.json()["error"]["message"]
        assert "access-control-allow-origin" not in answer.headers
    assert httpx.options(f"{base_url}/v1/models", headers={"Origin": "https://example.org"}).status_code == 403


def test_a_form_of_another_site_cannot_post(base_url):
    answer = httpx.post(f"{base_url}/v1/completions", content='{"model": "tiny"}', headers={"Content-Type": "text/plain"})
    assert answer.status_code == 400 and "application/json" in answer.json()["error"]["message"]


def test_options_is_answered(base_url):
    answer = httpx.options(f"{base_url}/v1/models")
    assert answer.status_code == 204 and "GET" in answer.headers["allow"]


def test_a_rebound_host_name_is_refused(make_text_engine, start):
    with start(make_text_engine(), host_names=frozenset({"127.0.0.1", "localhost", "::1"})) as url:
        assert httpx.get(f"{url}/v1/models").status_code == 200
        for host, status in [("localhost:80", 200), ("[::1]:80", 200), ("evil.example:80", 403), ("", 403)]:
            assert httpx.get(f"{url}/v1/models", headers={"Host": host}).status_code == status, host


def test_an_allowed_origin_may_read(make_text_engine, start):
    with start(make_text_engine(), origins=("https://example.org",)) as url:
        headers = {"Origin": "https://example.org"}
        answer = httpx.get(f"{url}/v1/models", headers=headers)
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://example.org"
        asked = headers | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
        assert httpx.options(f"{url}/v1/completions", headers=asked).status_code == 200
        assert httpx.get(f"{url}/v1/models", headers={"Origin": "https://example.com"}).status_code == 403
