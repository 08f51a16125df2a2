"""API keys: what they open, what stays open without one, and where they may come from."""

import httpx
import pytest

from plinth.config import UserError
from plinth.serving.keys import ApiKeys, read_keys

BODY = {"model": "tiny", "prompt": "x", "max_tokens": 1}


@pytest.fixture(scope="module")
def locked_url(make_text_engine, start):
    with start(make_text_engine(), keys=ApiKeys(["secret one", "zwei"])) as url:
        yield url


@pytest.mark.parametrize(("header", "code"), [
    (None, "missing_api_key"), ("Bearer wrong", "invalid_api_key"), ("Bearer", "invalid_api_key"), ("Basic zwei", "invalid_api_key"),
    ("zwei", "invalid_api_key"), ("Bearer zwe", "invalid_api_key"),
])  # fmt: skip
def test_without_a_known_key_nothing_is_answered(locked_url, header, code):
    headers = {} if header is None else {"Authorization": header}
    for answer in (
        httpx.post(f"{locked_url}/v1/completions", json=BODY, headers=headers),
        *(httpx.get(f"{locked_url}{path}", headers=headers) for path in ("/v1/models", "/metrics", "/openapi.json", "/tokenizer_info")),
    ):
        assert answer.status_code == 401 and answer.json()["error"]["code"] == code
        assert answer.json()["error"]["type"] == "authentication_error"


def test_each_key_opens(locked_url):
    for key in ("secret one", "zwei"):
        answer = httpx.post(f"{locked_url}/v1/completions", json=BODY, headers={"Authorization": f"Bearer {key}"}, timeout=60)
        assert answer.status_code == 200


def test_the_page_and_the_health_check_stay_open(locked_url):
    assert httpx.get(locked_url).status_code == httpx.get(f"{locked_url}/health").status_code == 200


def test_a_key_of_bytes_that_are_no_text_is_wrong(locked_url):
    assert httpx.get(f"{locked_url}/v1/models", headers={"Authorization": b"Bearer \xff\xfe"}).status_code == 401


def test_keys_of_a_file_and_of_the_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# for the web site\nfirst\n\n  second  \n")
    keys = read_keys(file, " third ")
    assert all(keys.find(key) for key in ("first", "second", "third")) and not keys.find("# for the web site")
    assert not read_keys(None, None) and not read_keys(None, "  ")
    file.write_text("# nothing\n")
    with pytest.raises(UserError, match="holds no key"):
        read_keys(file, None)
    with pytest.raises(UserError, match="cannot be read"):
        read_keys(tmp_path / "absent", None)
