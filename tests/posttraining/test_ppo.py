"""`plinth ppo` from end to end on a tiny model: it learns, resumes bit for bit, mixes pretraining in, and takes learnt rewards."""

import dataclasses
import json

import pytest
import torch

from plinth.cli.main import main
from plinth.config import UserError
from plinth.models.config import DecoderConfig
from plinth.models.hub import load_decoder, save_model
from plinth.models.reward import RewardModel
from plinth.models.transformer import Transformer
from plinth.posttraining.lora import LoraConfig
from plinth.posttraining.ppo import train_ppo
from plinth.posttraining.ppo_config import CriticConfig, KlConfig, PpoConfig, PtxConfig, RewardShape
from plinth.posttraining.pretrain_mix import PretrainMix, read_texts
from plinth.posttraining.prompts import read_prompts
from plinth.posttraining.reward_sources import RULES, open_reward
from plinth.posttraining.rollouts import SampleConfig
from plinth.tasks import reviews
from plinth.tokenizer.train import train_tokenizer
from plinth.training.checkpoint import list_checkpoints
from plinth.training.objectives import causal_lm_loss
from plinth.training.optim import OptimizerConfig
from plinth.training.stopping import Stopped


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a model that knows nothing, a reward model of the same size, prompts and texts."""
    folder = tmp_path_factory.mktemp("world")
    texts = reviews.stories(40)
    tokenizer = train_tokenizer(texts, 300)
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16, intermediate_size=64,
        max_seq_len=64,
    )  # fmt: skip
    model = Transformer(config).init_weights(torch.Generator().manual_seed(0))
    save_model(model, tokenizer, folder / "model")
    save_model(RewardModel.from_decoder(model, torch.Generator().manual_seed(1)), tokenizer, folder / "reward")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in reviews.prompts()[:20]))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def config(rollouts=3, **values):
    train = dataclasses.replace(
        PpoConfig().train, num_threads=2, keep_every_steps=1, keep_final=True, background_saves=False,
        optimizer=OptimizerConfig(name="adamw", lr=0.01, weight_decay=0.0),
    )  # fmt: skip
    given = {"sample": SampleConfig(group_size=1, max_tokens=8), "kl": KlConfig(coef=0.01, target=0.5, horizon=100)} | values
    return PpoConfig(train=train, completions=16 * rollouts, prompts_per_rollout=16, epochs=2, minibatches=2, micro_batch_size=5, **given)


def lines_of(run):
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def test_a_reward_is_learnt(world, tmp_path, monkeypatch):
    """Answers that begin with one of half the vocabulary: a rule that a model learns at once."""
    monkeypatch.setitem(RULES, "early", lambda prompt, answer: float(answer[:1] < "n"))
    settings = dataclasses.replace(
        config(12), prompts_per_rollout=64, completions=64 * 12, sample=SampleConfig(1, 1), kl=KlConfig(coef=0.0), watch="reviews"
    )
    run = train_ppo(tmp_path / "run", world / "model", "early", world / "prompts.jsonl", settings)
    lines = lines_of(run)
    assert lines[0]["reward"] < 0.8 < 0.95 < lines[-1]["reward"] and lines[-1]["kl"] > lines[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert (
        lines[-1]["gold"] < 0
        and run.summary["reward"] == lines[-1]["reward"]
        and run.summary["completions"] == 768
        and run.summary["too_long_rows"] == 0
    )
    told = {
        "kl",
        "kl_coef",
        "objective",
        "value_loss",
        "policy_loss",
        "explained_variance",
        "entropy",
        "clip_fraction",
        "value_clip_fraction",
    }
    assert told | {"completion_tokens", "finished", "score", "value", "kl_sampler"} <= set(lines[-1])


@pytest.mark.parametrize("stop_at", [2, 4])
def test_a_run_cut_off_goes_on_bit_for_bit(world, tmp_path, monkeypatch, stop_at):
    """Within a roll-out, whose rows and adapted coefficient the checkpoint holds, and between two."""
    from plinth.posttraining.ppo import PpoBatches

    settings = config(2, ptx=PtxConfig(world / "texts.jsonl", rows_per_update=4), reward=RewardShape(normalise=True))
    torch.manual_seed(0)  # its state is part of a checkpoint, and other tests draw from it
    whole = train_ppo(tmp_path / "whole", world / "model", "reviews", world / "prompts.jsonl", settings)
    at = PpoBatches.at

    def cut(self, step):
        if step == stop_at:
            raise Stopped("cut off")
        return at(self, step)

    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(PpoBatches, "at", cut)
        with pytest.raises(Stopped):
            train_ppo(tmp_path / "cut", world / "model", "reviews", world / "prompts.jsonl", settings)
    resumed = train_ppo(tmp_path / "cut", world / "model", "reviews", world / "prompts.jsonl", settings, resume=True)
    states = [(list_checkpoints(run)[-1] / "state.safetensors").read_bytes() for run in (whole, resumed)]
    assert states[0] == states[1]
    for kept in ("reward", "kl", "kl_coef", "loss_nats", "ptx_loss"):
        assert [line[kept] for line in lines_of(whole)] == [line[kept] for line in lines_of(resumed)]
    assert len({line["kl_coef"] for line in lines_of(whole)}) == 2
    with pytest.raises(UserError, match="reward"):
        train_ppo(tmp_path / "cut2", world / "model", "reviews", world / "prompts.jsonl", config(1))
        (tmp_path / "cut2" / "DONE").unlink()
        train_ppo(tmp_path / "cut2", world / "model", str(world / "reward"), world / "prompts.jsonl", config(1), resume=True)


def test_a_learnt_reward_scores_and_starts_the_critic(world, tmp_path):
    settings = config(1, critic=CriticConfig(head="reward"), reward=RewardShape(normalise=True, whiten=True), watch="reviews")
    run = train_ppo(tmp_path / "run", world / "model", str(world / "reward"), world / "prompts.jsonl", settings)
    line = lines_of(run)[0]
    assert line["score"] == pytest.approx(0, abs=1e-5) != line["reward"] and "gold" in line
    with pytest.raises(UserError, match="neither a run of a reward model nor a known rule"):
        train_ppo(tmp_path / "other", world / "model", "reveiws", world / "prompts.jsonl", settings)


def test_verifiers_are_rewards(world, tmp_path):
    rows = [{"question": f"Say {word}.", "answer": word, "verifier": "regex"} for word in ("a", "b")]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = read_prompts(tmp_path / "asked.jsonl")
    assert open_reward("verifier").score(asked, ["nab", "dot"]) == [1.0, 0.0]
    assert open_reward("exact").score(asked, ["A.", "dot"]) == [1.0, 0.0]
    run = train_ppo(tmp_path / "run", world / "model", "verifier", tmp_path / "asked.jsonl", config(1, watch="refusal"))
    assert 0 <= run.summary["reward"] <= 1 and run.summary["gold"] == 0
    with pytest.raises(UserError, match="compares with an answer .numeric., and the prompt .* comes with none"):
        train_ppo(tmp_path / "other", world / "model", "numeric", world / "prompts.jsonl", config(1))


def test_adapters_are_trained_in_place_of_the_policy(world, tmp_path):
    settings = config(1, adapter=LoraConfig(rank=2), critic=CriticConfig(trunk="shared"))
    run = train_ppo(tmp_path / "run", world / "model", "reviews", world / "prompts.jsonl", settings)
    assert (run.path / "adapter" / "adapter_config.json").exists()
    merged, base = load_decoder(run.model_dir), load_decoder(world / "model")
    assert torch.equal(merged.embed.weight, base.embed.weight)
    assert run.summary["trained_params"] < sum(p.numel() for p in base.parameters()) / 4


def test_the_pretraining_mix_weighs_its_texts_alike_however_they_are_split(world):
    tokenizer = train_tokenizer(reviews.stories(40), 300)
    rows = read_texts(world / "texts.jsonl", tokenizer, 63)
    assert len(rows) == 40 and all(row[0] == tokenizer.start_id and len(row) <= 64 for row in rows)
    model = load_decoder(world / "model").requires_grad_(False)
    totals = []
    for size in (3, 12):
        mix = PretrainMix(rows, coef=2.0, micro_batch_size=size, seed=1)
        parts = mix.batches(0, 12, completion_tokens=50)
        totals.append(sum(float(part["weight"] * causal_lm_loss(model, (part["inputs"], part["targets"]))[0]) for part in parts))
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)
    text_tokens = sum(int((part["targets"] >= 0).sum()) for part in parts)
    mean = sum(float(causal_lm_loss(model, (part["inputs"], part["targets"]))[0]) for part in parts) / text_tokens
    assert totals[1] == pytest.approx(2.0 * 50 * mean, rel=1e-5)  # divided by the 50 tokens it is coef times the mean
    seen = [tuple(row.tolist()) for step in range(10) for part in mix.batches(step, 4, 50) for row in part["inputs"][:, :9]]
    assert len(set(seen)) == len({tuple(row[:9]) for row in rows})  # ten updates of four are one pass over all


def test_prompts_are_read_from_any_format(tmp_path):
    rows = [
        {"prompt": "one"},
        {"prompt": "two", "chosen": "a", "rejected": "b"},
        {"question": "three", "answer": "4"},
        {"messages": [{"role": "user", "content": "four"}, {"role": "assistant", "content": "x"}]},
        {"prompt": "one"},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_prompts(path)
    assert [prompt.text for prompt in found] == ["one", "two", "three", "four"] and found[2].answer == "4"
    path.write_text('{"text": "plain"}\n')
    with pytest.raises(UserError, match="row 1: is text, which has no prompt"):
        read_prompts(path)


def test_the_command(world, tmp_path, capsys):
    argv = ["ppo", str(world / "model"), "--reward", "reviews", "--data", str(world / "prompts.jsonl"), "--out", str(tmp_path / "run"),
            "--completions", "8", "--prompts-per-rollout", "8", "--epochs", "1", "--sample.max-tokens", "6", "--kl.coef", "0.02",
            "--train.num-threads", "1", "--json"]  # fmt: skip
    assert main(argv) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["completions"] == 8 and answer["kl_coef"] == pytest.approx(0.02)
    assert load_decoder(tmp_path / "run" / "model").config.num_layers == 1
