"""AI feedback: a judge with a known bias is found out through a real server; soft labels, principles, reasoning, going on."""

import json
import math
import re

import pytest
import torch

from chat_server import chat_server, options_choice
from plinth.cli.feedback import main
from plinth.config import UserError
from plinth.inference.endpoint import Endpoint, EndpointConfig, found_options
from plinth.inference.local_model import LocalModel
from plinth.inference.sampling_params import SamplingParams
from plinth.models.config import DecoderConfig
from plinth.models.hub import save_model
from plinth.models.transformer import Transformer
from plinth.posttraining.feedback import JudgeConfig
from plinth.posttraining.formats import read_examples
from plinth.recipes.feedback import FeedbackConfig, make_feedback, open_model
from plinth.tokenizer.train import train_tokenizer

SHOWN = re.compile(r"--- Answer 1 ---\n(.*?)\n\n--- Answer 2 ---\n(.*?)\n\n--- Question", re.DOTALL)


def endpoint(url, **more):
    return Endpoint(EndpointConfig(url=url, model="judge", first_pause_s=0.01, **more))


def logit(p):
    return math.log(p) - math.log1p(-p)


def pairs_file(path, count):
    """Write pairs whose better answer names the larger number; the row's number stands in the prompt."""
    rows = [{"prompt": f"pair {i}", "chosen": f"{10 + i % 7}", "rejected": f"{i % 5}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def judge(position_share=0.0, position_logit=0.0, wrong_share=0.0):
    """Return a judge that prefers the larger number, but in some pairs what stands first, and in some the smaller number."""

    def reply(body):
        text = body["messages"][0]["content"]
        one, two = (float(answer) for answer in SHOWN.search(text).groups())
        place = int(re.search(r"pair (\d+)", text)[1]) * 37 % 100
        wins = place < round(100 * position_share) or (one > two) != (place >= round(100 - 100 * wrong_share))
        score = (1.0 if wins else -1.0) + position_logit
        return options_choice(t1=-math.log1p(math.exp(-score)), t2=-math.log1p(math.exp(score)))

    return reply


@pytest.mark.parametrize("share", [0.18, 0.56])
def test_a_biased_judge_is_found_out(tmp_path, share):
    with chat_server(judge(position_share=share)) as (url, _):
        report = make_feedback(pairs_file(tmp_path / "pairs.jsonl", 200), endpoint(url), tmp_path / "out", FeedbackConfig())
    assert abs(report["position_bias"]["value"] - share) <= 0.02
    low, high = report["position_bias"]["ci95"]
    assert low < share < high and report["first_position_share"] == 1.0
    assert report["swap_consistency"]["value"] == pytest.approx(1 - report["position_bias"]["value"])
    assert report["unsure"] == round(200 * share) and report["written"] == 200 - report["unsure"]


def test_a_bias_that_only_shifts_the_odds_is_averaged_away(tmp_path):
    bias = logit(0.65)
    with chat_server(judge(position_logit=bias)) as (url, _):
        report = make_feedback(pairs_file(tmp_path / "pairs.jsonl", 40), endpoint(url), tmp_path / "out", FeedbackConfig())
    assert abs(1 / (1 + math.exp(-report["position_logit"])) - 0.65) <= 0.02
    rows = [json.loads(line) for line in (tmp_path / "out/pairs.jsonl").read_text().splitlines()]
    expected = (1 / (1 + math.exp(-1 - bias)) + 1 / (1 + math.exp(-1 + bias))) / 2
    assert all(row["probability"] == pytest.approx(expected) and float(row["chosen"]) >= 10 for row in rows)


def test_agreement_with_people(tmp_path):
    with chat_server(judge(wrong_share=0.25)) as (url, _):
        report = make_feedback(pairs_file(tmp_path / "pairs.jsonl", 200), endpoint(url), tmp_path / "out", FeedbackConfig())
    assert report["agreement"]["value"] == pytest.approx(0.75)
    low, high = report["kappa"]["ci95"]
    assert report["kappa"]["value"] == pytest.approx(0.5, abs=0.03) and low < 0.5 < high
    row = json.loads((tmp_path / "out/pairs.jsonl").read_text().splitlines()[0])
    assert row["feedback"]["human_agrees"] is True and row["feedback"]["judge"] == {"url": endpoint(url).url, "model": "judge"}


def test_pairs_are_read_as_preferences_and_completions_without_ranks_give_all_pairs(tmp_path):
    file = tmp_path / "answers.jsonl"
    rows = [{"prompt": "pair 1", "completions": ["5", "3", "9"]}, {"prompt": "pair 2", "completions": ["4", "4"]}, {"text": "no pair"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = []
    with chat_server(judge()) as (url, server):
        report = make_feedback(file, endpoint(url), tmp_path / "out", FeedbackConfig(), said.append)
    assert report["pairs"] == 3 and report["rejected_rows"] == 2 and len(server.bodies) == 6
    assert "row 2: has not two different answers; row 3" in said[0] and "kappa" not in report
    found = read_examples(tmp_path / "out/pairs.jsonl", "preference")
    assert [(row.chosen[0]["content"], row.rejected[0]["content"]) for row in found.rows] == [("5", "3"), ("9", "5"), ("9", "3")]


def test_an_interrupted_call_goes_on_and_a_busy_server_is_asked_again(tmp_path):
    file, limit = pairs_file(tmp_path / "pairs.jsonl", 60), [100]

    def reply(body):
        limit[0] -= 1
        return 403 if limit[0] < 0 else 503 if limit[0] in (90, 91) else judge()(body)

    with chat_server(reply) as (url, server):
        with pytest.raises(UserError, match="answered 403: .*no, 403.*goes on from there"):
            make_feedback(file, endpoint(url, requests_at_once=1), tmp_path / "out", FeedbackConfig())
        assert not (tmp_path / "out/pairs.jsonl").exists()
        with (tmp_path / "out/asked.jsonl").open("a") as kept:
            kept.write('{"key": "cut o')
        limit[0] = 1000
        report = make_feedback(file, endpoint(url), tmp_path / "out", FeedbackConfig())
        assert report["known"] == 64 and report["asked"] == 56 and report["written"] == 60
        asked = len(server.bodies)
        again = make_feedback(file, endpoint(url), tmp_path / "out", FeedbackConfig())
    assert again["asked"] == 0 and len(server.bodies) == asked and again["position_bias"] == report["position_bias"]


def test_principles_and_reasoning(tmp_path):
    (tmp_path / "principles.txt").write_text("# mine\nPrefer the kinder answer.\n\nPrefer the shorter answer.\n")

    def reply(body):
        return {"message": {"content": "I think so."}} if body["max_tokens"] > 1 else options_choice(**{"t1": -0.01, "t 2": -5.0})

    config = FeedbackConfig(JudgeConfig(reasoning_tokens=50, clamp=0.6), principles=tmp_path / "principles.txt")
    with chat_server(reply) as (url, server):
        make_feedback(pairs_file(tmp_path / "pairs.jsonl", 20), endpoint(url), tmp_path / "out", config)
    last = [body["messages"] for body in server.bodies if body["max_tokens"] == 1]
    assert [message["role"] for message in last[0]] == ["user", "assistant", "user"] and last[0][1]["content"] == "I think so."
    asked = {principle for body in last for principle in ("kinder", "shorter") if principle in body[0]["content"]}
    assert asked == {"kinder", "shorter"} and not any("kinder" in m[0]["content"] and "shorter" in m[0]["content"] for m in last)
    seeds = [body["seed"] for body in server.bodies if body["max_tokens"] > 1]
    assert len(set(seeds)) == len(seeds) == 40
    rows = (tmp_path / "out/asked.jsonl").read_text().splitlines()
    assert len(rows) == 80


def test_the_key_is_sent_and_what_is_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sesame")
    with chat_server(lambda body: {"message": {"content": "1"}}) as (url, server):
        asked = endpoint(url, api_key_env="JUDGE_KEY")
        with pytest.raises(UserError, match="gave no top_logprobs"):
            asked.option_logprobs([[{"role": "user", "content": "x"}]], ("1", "2"))
        assert asked.answers([[{"role": "user", "content": "x"}]], [SamplingParams(seed=3)]) == [("1", True)]
    assert server.headers[0]["Authorization"] == "Bearer sesame" and server.bodies[1]["seed"] == 3
    with pytest.raises(UserError, match="could not be reached"):
        endpoint("http://127.0.0.1:9/v1", tries=2).answers([[]], [SamplingParams()])
    with pytest.raises(UserError, match="name one model to ask"):
        open_model(None, EndpointConfig())
    top = [{"token": " 1", "logprob": -1.0}, {"token": "1", "logprob": -1.0}, {"token": "x", "logprob": -3.0}]
    assert found_options(top, ("1", "2")) == [pytest.approx(-1 + math.log(2)), -3.0]
    assert found_options(top[2:], ("1", "2")) is None


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    tokenizer = train_tokenizer(["Which answer is better? Reply with 1 or 2 alone. Answer 12 21 pair " * 20], 300)
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16, intermediate_size=64,
        max_seq_len=512,
    )  # fmt: skip
    model, generator = Transformer(config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    folder = tmp_path_factory.mktemp("judge") / "model"
    save_model(model, tokenizer, folder)
    return folder


def test_our_own_model_judges_by_the_log_probabilities_of_the_options(tmp_path, model_dir, capsys):
    local = LocalModel.load(model_dir)
    tokens = local.text.render([{"role": "user", "content": "better?"}])
    table = local.text.engine.runner.model.logits(local.text.engine.runner.model(torch.tensor([tokens])))[0, -1].log_softmax(-1)
    expected = [float(table.detach()[local.text.tokenizer.encode(option)[0]]) for option in ("1", "2")]
    found = local.option_logprobs([[{"role": "user", "content": "better?"}]], ("1", "2"))[0]
    assert found == pytest.approx(expected, abs=1e-4)
    file = pairs_file(tmp_path / "pairs.jsonl", 6)
    assert main([str(file), "--judge", str(model_dir), "--out", str(tmp_path / "out"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["pairs"] == 6 and report["written"] == len(read_examples(tmp_path / "out/pairs.jsonl", "preference").rows)
    assert report["judge"]["model_sha256"] and 0 <= report["position_bias"]["value"] <= 1
