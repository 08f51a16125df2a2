"""Best of n, rejection sampling and revision: what is kept, what it gains, what is written; models answer through a real server."""

import itertools
import json
import math
import re

import numpy as np
import pytest
import torch

from chat_server import chat_server, options_choice
from plinth.cli.best_of import main as best_of_main
from plinth.cli.revise import main as revise_main
from plinth.config import UserError
from plinth.inference.best_of import best_of_kl, best_of_mean
from plinth.inference.endpoint import Endpoint, EndpointConfig
from plinth.models.config import DecoderConfig
from plinth.models.hub import save_model
from plinth.models.reward import RewardModel
from plinth.models.transformer import Transformer
from plinth.posttraining.feedback import JudgeConfig
from plinth.posttraining.formats import read_examples
from plinth.posttraining.revision import RevisionConfig
from plinth.posttraining.reward import load_reward
from plinth.posttraining.selection import SelectionConfig
from plinth.recipes.selecting import select_answers
from plinth.tasks import reviews
from plinth.tokenizer.train import train_tokenizer

REVIEWS = [f"The lamp is {word}." for word in ("awful", "dusty", "green", "sturdy", "lovely")]  # −2 to 2 points


def endpoint(url):
    return Endpoint(EndpointConfig(url=url, model="writer", first_pause_s=0.01))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def reviewer(body):
    """Answer with the review that the seed names; some are cut off."""
    seed = body["seed"]
    return {"message": {"content": REVIEWS[seed % 5]}, "finish_reason": "length" if seed % 40 == 6 else "stop"}


PROMPTS = [{"prompt": prompt} for prompt in reviews.prompts() if "lamp" in prompt]


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_the_kl_of_the_best_of_n(n):
    """Of K equally likely completions with different scores the k-th is the best of n with probability (k/K)ⁿ − ((k−1)/K)ⁿ."""
    values = []
    for count in (10, 1000, 100_000):
        chances = np.diff((np.arange(count + 1) / count) ** n)
        values.append(float((chances * np.log(np.maximum(chances, 1e-300) * count)).sum()))
    assert values[0] <= values[1] <= values[2] <= best_of_kl(n) + 1e-12
    assert values[2] == pytest.approx(best_of_kl(n), abs=1e-3)


def test_the_mean_of_the_best_of_k_is_that_over_all_choices():
    scores = [0.3, -1.0, 2.0, 0.3, 0.7]
    for k in range(1, 6):
        expected = np.mean([max(each) for each in itertools.combinations(scores, k)])
        assert best_of_mean(scores, k) == pytest.approx(expected)
    with pytest.raises(UserError, match="n=6 is not between 1 and 5"):
        best_of_mean(scores, 6)


def test_the_best_by_a_known_rule_is_kept_with_its_score(tmp_path):
    said = []
    config = SelectionConfig(n=8, by="reviews")
    with chat_server(reviewer) as (url, server):
        report = select_answers(endpoint(url), write(tmp_path / "p.jsonl", PROMPTS), tmp_path / "out", config, warn=said.append)
        assert len(server.bodies) == 8 * len(PROMPTS) and len({body["seed"] for body in server.bodies}) == len(server.bodies)
        again = select_answers(endpoint(url), tmp_path / "p.jsonl", tmp_path / "out", config, warn=said.append)
        assert len(server.bodies) == 8 * len(PROMPTS) and again == report
    rows = read(tmp_path / "out/sft.jsonl")
    assert len(rows) == len(PROMPTS) == report["sft_rows"]
    for row in rows:
        answer = row["messages"][-1]["content"]
        assert row["score"] == reviews.reward(row["messages"][0]["content"], answer) == 0.25 and answer == "The lamp is lovely."
        assert row["selection"]["by"] == "reviews" and row["selection"]["answers"] <= 8
    assert report["cut_off"] == sum(body["seed"] % 40 == 6 for body in server.bodies) > 0 and "were cut off" in said[0]
    assert report["best_score"]["value"] == 0.25 and report["gain"]["value"] == pytest.approx(0.25 - report["mean_score"]["value"])
    curve = report["curve"]
    assert [row["n"] for row in curve] == [1, 2, 4, 8] and curve[-1]["kl_nats"] == pytest.approx(math.log(8) - 7 / 8)
    assert all(a["score"] < b["score"] for a, b in zip(curve, curve[1:]))
    pairs = read_examples(tmp_path / "out/pairs.jsonl", "preference").rows
    assert all(row.chosen[0]["content"] == "The lamp is lovely." and row.rejected[0]["content"] == "The lamp is awful." for row in pairs)
    assert len(read_examples(tmp_path / "out/answers.jsonl", "ranking").rows) == len(PROMPTS)


def test_rejection_sampling_keeps_different_passing_answers(tmp_path):
    rows = [{"question": "3 + 4?", "answer": "7", "verifier": "numeric"}, {"question": "2 + 2?", "answer": "4"}]
    texts = ["7", "It is 7.", "8", "7", "= 7", "4"]

    def reply(body):
        return {"message": {"content": texts[body["seed"] % 6]}}

    config = SelectionConfig(n=6, by="verifier", verifier="exact", keep="passing", most_per_prompt=2)
    with chat_server(reply) as (url, _):
        report = select_answers(endpoint(url), write(tmp_path / "p.jsonl", rows), tmp_path / "out", config)
        kept = [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in read(tmp_path / "out/sft.jsonl")]
        assert kept == [("3 + 4?", "7"), ("3 + 4?", "It is 7."), ("2 + 2?", "4")] and report["prompts_kept"] == 2
        bare = write(tmp_path / "bare.jsonl", [{"prompt": "2 + 2?", "source": "a book"}])
        with pytest.raises(UserError, match="holds what was made of .*p.jsonl, and .*bare.jsonl has other rows"):
            select_answers(endpoint(url), bare, tmp_path / "out", SelectionConfig(n=6, by="first"))
        with pytest.raises(UserError, match=r"compares with an answer \(exact\), and the prompt '2 \+ 2\?' comes with none"):
            select_answers(endpoint(url), bare, tmp_path / "bare", SelectionConfig(n=6, by="verifier"))
        none = SelectionConfig(n=6, by="verifier", verifier="exact", keep="passing", threshold=2.0)
        with pytest.raises(UserError, match="the best score is 1, below threshold=2"):
            select_answers(endpoint(url), tmp_path / "p.jsonl", tmp_path / "out", none)


def test_a_judge_holds_a_tournament(tmp_path):
    def reply(body):
        text = body["messages"][0]["content"]
        if body["max_tokens"] > 1:
            return {"message": {"content": str(body["seed"] % 3)}}
        one, two = (int(found) for found in re.findall(r"--- Answer \d ---\n(\d+)", text))
        return options_choice(t1=0.0, t2=-5.0) if one > two else options_choice(t1=-5.0, t2=0.0)

    with chat_server(reply) as (url, server):
        file, config = write(tmp_path / "p.jsonl", [{"prompt": "pick"}, {"prompt": "choose"}]), SelectionConfig(n=4, by="judge")
        select_answers(endpoint(url), file, tmp_path / "out", config, judge=endpoint(url), judge_config=JudgeConfig())
        assert sum(body["max_tokens"] == 1 for body in server.bodies) == 2 * 2 * 3  # two orders of three pairs, each text once
        with pytest.raises(UserError, match="by=reviews, and a judge is named"):
            select_answers(endpoint(url), file, tmp_path / "out", SelectionConfig(by="reviews"), judge=endpoint(url))
    assert [row["messages"][-1]["content"] for row in read(tmp_path / "out/sft.jsonl")] == ["2", "2"]


def test_a_learnt_reward_scores(tmp_path):
    tokenizer = train_tokenizer([f"{review} Review it." for review in REVIEWS] * 5, 300)
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16, intermediate_size=64,
        max_seq_len=64,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    model = RewardModel.from_decoder(Transformer(config).init_weights(generator), generator)
    with torch.no_grad():  # else the last token alone decides
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    save_model(model, tokenizer, tmp_path / "reward")
    with chat_server(reviewer) as (url, _):
        file, config = write(tmp_path / "p.jsonl", PROMPTS), SelectionConfig(n=8, by=str(tmp_path / "reward"))
        report = select_answers(endpoint(url), file, tmp_path / "out", config)
    for row in read(tmp_path / "out/answers.jsonl"):
        assert row["scores"] == pytest.approx(
            load_reward(tmp_path / "reward").score([row["prompt"]] * len(row["scores"]), row["completions"]), abs=1e-5
        )
    kept = {row["messages"][0]["content"]: row for row in read(tmp_path / "out/sft.jsonl")}
    for row in read(tmp_path / "out/answers.jsonl"):
        best = max(range(len(row["scores"])), key=lambda i: row["scores"][i])
        assert kept[row["prompt"][0]["content"]]["messages"][-1]["content"] == row["completions"][best]
    assert report["gain"]["value"] > 0


def test_one_answer_a_prompt_is_what_a_teacher_says(tmp_path, capsys):
    write(tmp_path / "p.jsonl", [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "old"}]}])
    with chat_server(lambda body: {"message": {"content": "new"}}) as (url, server):
        flags = ["--endpoint.url", url, "--endpoint.model", "teacher", "--n", "1", "--temperature", "0"]
        assert best_of_main([str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "out"), *flags, "--json"]) == 0
        assert server.bodies[0]["messages"] == [{"role": "user", "content": "hi"}] and server.bodies[0]["temperature"] == 0
    assert json.loads(capsys.readouterr().out)["sft_rows"] == 1 and read(tmp_path / "out/answers.jsonl") == []
    assert read_examples(tmp_path / "out/sft.jsonl", "messages").rows[0].messages[-1]["content"] == "new"
    with pytest.raises(UserError, match="keep=passing needs scores"):
        SelectionConfig(keep="passing")


def test_answers_are_criticised_and_rewritten(tmp_path, capsys):
    write(tmp_path / "p.jsonl", [{"prompt": f"prompt {i}"} for i in range(8)])
    (tmp_path / "principles.txt").write_text("Be kind.\nBe short.\n")

    def reply(body):
        last = body["messages"][-1]["content"]
        if last.startswith("prompt"):
            return {"message": {"content": f"first to {last}"}, "finish_reason": "length" if last.endswith("7") else "stop"}
        if last.startswith("Say where"):
            return {"message": {"content": "It is not kind."}}
        previous = body["messages"][1]["content"]
        return {"message": {"content": previous if previous.endswith("6") else f"better than {previous}"}}

    with chat_server(reply) as (url, server):
        flags = ["--principles", str(tmp_path / "principles.txt"), "--out", str(tmp_path / "out"), "--endpoint.url", url]
        assert revise_main([str(tmp_path / "p.jsonl"), *flags, "--endpoint.model", "m", "--rounds", "2", "--json"]) == 0
        captured = capsys.readouterr()
        report = json.loads(captured.out)
        assert len(server.bodies) == 8 * 5 and "1 of 8 prompts left out" in captured.err
    asked = " ".join(body["messages"][-1]["content"] for body in server.bodies)
    assert "principle: Be kind." in asked and "principle: Be short." in asked
    assert all(len(body["messages"]) in (1, 3, 5) for body in server.bodies)  # earlier rounds are not shown
    assert (report["sft_rows"], report["pairs"], report["unchanged"], report["left_out"]) == (7, 6, 1, 1)
    rows = read_examples(tmp_path / "out/sft.jsonl", "messages").rows
    assert rows[0].messages[-1]["content"] == "better than better than first to prompt 0"
    pair = read_examples(tmp_path / "out/pairs.jsonl", "preference").rows[0]
    assert pair.rejected[0]["content"] == "first to prompt 0" and pair.chosen == rows[0].messages[-1:]
    assert read(tmp_path / "out/pairs.jsonl")[0]["revision"]["principles"]
    with pytest.raises(UserError, match="has no {principle}"):
        RevisionConfig(critique="what is wrong?")
