"""GRPO and its kin: rewards, groups without spread, the family's settings, and a small policy that learns, resumes and is published."""

import dataclasses
import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from plinth.cli.main import main
from plinth.config import UserError
from plinth.evaluation.sample_curve import pass_at
from plinth.models.config import DecoderConfig
from plinth.models.hub import load_decoder, save_model
from plinth.models.transformer import Transformer
from plinth.posttraining.examples import Prompt
from plinth.posttraining.formats import read_examples
from plinth.posttraining.grpo import Collector, completion_loss, render_prompts, train_grpo
from plinth.posttraining.grpo_config import FAMILY, GrpoConfig
from plinth.posttraining.lora import LoraConfig
from plinth.posttraining.rewards import RewardConfig, overlong_punishment, score_rollouts
from plinth.posttraining.rollouts import Rollouts, SampleConfig, Sampler, take_rows
from plinth.posttraining.sft import train_sft
from plinth.posttraining.sft_config import SftConfig
from plinth.run import Run
from plinth.tasks.arithmetic import arithmetic_problems, arithmetic_rows
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.train import train_tokenizer
from plinth.training.checkpoint import list_checkpoints
from plinth.training.loop import TrainConfig
from plinth.training.optim import OptimizerConfig

QUESTIONS = [(f"{a}?", str(a % 2)) for a in range(10)]
TRAIN = TrainConfig(
    dtype="float32", num_threads=2, warmup_steps=1, background_saves=False, optimizer=OptimizerConfig(name="adamw", lr=0.01)
)
SMALL = GrpoConfig(train=TRAIN, sample=SampleConfig(group_size=4, max_tokens=3), prompts_per_rollout=6, rollouts=3, minibatches=2, epochs=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model taught to answer 0, 1 or 2, each as often, and a file of problems."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer(["0123456789?"], 262)
    shape = DecoderConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16,
        intermediate_size=64, max_seq_len=32,
    )  # fmt: skip
    save_model(Transformer(shape).init_weights(torch.Generator().manual_seed(0)), tokenizer, folder / "start" / "model")
    lines = [{"prompt": question, "completion": answer} for question, _ in QUESTIONS for answer in "012"]
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train = dataclasses.replace(TRAIN, steps=60)
    run = train_sft(folder / "sft", folder / "start", folder / "answers.jsonl", SftConfig(train=train, conversations_per_step=30))
    shutil.copytree(run.model_dir, folder / "model")
    rows = [{"prompt": question, "answer": answer} for question, answer in QUESTIONS]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def collector(base, config=SMALL, own=None):
    tokenizer = Tokenizer.load(base / "model")
    found = read_examples(base / "problems.jsonl", "verifiable")
    sampler = Sampler(load_decoder(base / "model"), tokenizer.end_ids, config.sample)
    reference = (lambda: load_decoder(base / "model")) if config.kl_coef else None
    return Collector(sampler, found.rows, render_prompts(tokenizer, found, 20), tokenizer, config, reference, own or {})


def rollouts_of(tokens, group_size, finished=None):
    count = len(tokens)
    return Rollouts([[1]] * (count // group_size), group_size, tokens, [[-1.0] * len(t) for t in tokens], finished or [True] * count)


def test_rewards_by_verifier_format_length_and_chance():
    problems = [Prompt([], "4", "numeric"), Prompt([], "five")]
    config = RewardConfig(("verifier", "format:^[0-9]$", "length", "random"), verifier="exact")
    rollouts = rollouts_of([[1, 2, 0]] * 4, 2)
    found = score_rollouts(config, problems, rollouts, ["4", "it is 4", "Five.", "5"], seed=[0], max_tokens=4)
    assert found[:3].tolist() == [[1, 1, 1, 0], [1, 0, 0, 1], [0.5] * 4]
    many, chance = rollouts_of([[1]] * 2000, 2), RewardConfig(("random",))
    coins, others = (score_rollouts(chance, problems * 500, many, [""] * 2000, seed=[i], max_tokens=4) for i in range(2))
    assert 0.45 < float(coins.mean()) < 0.55 and set(coins[0].tolist()) == {0.0, 1.0} and (coins != others).any()


def test_a_callers_own_reward_and_mistakes():
    problems = [Prompt([], "4", "numerc")]
    found = score_rollouts(
        RewardConfig(("vowels",)), problems, rollouts_of([[1]], 1), ["aei"], seed=[0], max_tokens=4, own={"vowels": lambda p, t: len(t)}
    )
    assert found.tolist() == [[3.0]]
    with pytest.raises(UserError, match="verifier='numerc' is none of .*numeric"):
        RewardConfig().check_names({}, problems)
    with pytest.raises(UserError, match="reward='lenght' is none of"):
        RewardConfig(("lenght",)).check_names({}, problems)
    with pytest.raises(UserError, match=r"weights=\(1.0,\) are 1 for 2 rewards"):
        RewardConfig(("verifier", "length"), (1.0,))


def test_overlong_punishment_by_hand():
    """DAPO's eq. 13 with max 20 and cache 4."""
    assert overlong_punishment(torch.tensor([10, 16, 17, 18, 20]), 20, 4).tolist() == [0, 0, -0.25, -0.5, -1]


def test_every_member_trains_on_its_own_advantages(base):
    for loss in (*FAMILY, "reinforce++"):
        config = dataclasses.replace(SMALL, loss=loss, kl_coef=0.02, prompts_per_rollout=4)
        gathered = collector(base, config)
        rows, metrics = gathered(0)
        total, count, measured = completion_loss(gathered.sampler.model, rows, config.settings)
        assert torch.isfinite(total) and count > 0 and metrics["kl"] == pytest.approx(0.0, abs=1e-5)
        if config.advantages_kind not in ("global", "greedy"):
            assert float(rows["advantages"].view(-1, 4).sum(1).abs().max()) < 1e-4
        assert measured["clip_fraction"] == 0.0  # the policy is the sampler yet
        assert ("kl_token" in measured) == (config.member.kl_in == "loss")


def test_options_take_the_place_of_a_members_own():
    config = dataclasses.replace(SMALL, loss="dapo", epsilon_high=0.5, kl_coef=0.1, kl_estimator="k2", resample_rounds=1)
    assert (config.settings.epsilon_low, config.settings.epsilon_high, config.settings.kl_estimator) == (0.2, 0.5, "k2")
    assert config.member.resample_rounds == 1 and FAMILY["dapo"].resample_rounds == 3
    assert dataclasses.replace(SMALL, loss="dr_grpo").settings.max_tokens == SMALL.sample.max_tokens
    assert dataclasses.replace(SMALL, loss="reinforce++").member_name == "reinforce_pp"
    with pytest.raises(UserError, match="loss='gpro' is none of .*grpo"):
        GrpoConfig(loss="gpro")
    with pytest.raises(UserError, match="group_size=1 leaves no other completion"):
        GrpoConfig(sample=SampleConfig(group_size=1))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"loss": "cispo", "epsilon_high": 5.0}, "epsilon_high=5.0 is not read by loss=cispo.*one of grpo, dr_grpo"),
        ({"weight_cap": 5.0}, "weight_cap=5.0 is not read by loss=grpo. Leave it out, or use one of cispo"),
        ({"loss": "sapo", "gamma_positive": (2.0, 2.0)}, "gamma_positive=.* is not read by loss=sapo.*one of vespo"),
        ({"mismatch_cap": 2.0}, "mismatch_cap=2.0 bounds the weights of mismatch, which is not given"),
        ({"mismatch": "token_mask", "sample": SampleConfig(temperature=0.7)}, "mismatch=token_mask needs sample.temperature=1, not 0.7"),
        ({"mismatch": "token_mask", "mismatch_floor": 2.0}, "must lie on both sides of 1"),
        ({"kl_weighted": True}, "kl_weighted is for a k3 within the loss; here kl_coef=0.0"),
        ({"loss": "rloo", "kl_coef": 0.1, "kl_weighted": True}, "kl_weighted is for a k3 within the loss; here kl_coef=0.1, kl_in=reward"),
        ({"loss": "remax", "advantages": "leave_one_out", "sample": SampleConfig(group_size=1)}, "use advantages=greedy or global"),
        ({"epsilon_low": float("nan")}, "epsilon_low=nan must be 0 or more"),
        ({"minibatches": 0}, "minibatches=0 must be at least 1"),
        ({"off_policy_threshold": float("inf")}, "off_policy_threshold=inf"),
    ],
)
def test_an_option_that_the_loss_would_not_read_is_a_mistake(options, text):
    with pytest.raises(UserError, match=text):
        GrpoConfig(**options)


def test_options_reach_the_loss():
    config = GrpoConfig(loss="cispo", weight_cap=3.0, mismatch="sequence_mask", mismatch_cap=2.0, off_policy_threshold=0.5)
    found = config.settings
    assert (found.weight_cap, found.mismatch, found.mismatch_cap, found.off_policy_threshold) == (3.0, "sequence_mask", 2.0, 0.5)
    found = GrpoConfig(loss="vespo", gamma_positive=(2.0, 2.0), kl_coef=0.1, kl_weighted=True).settings
    assert (found.gamma_positive, found.gamma_negative, found.kl_weighted) == ((2.0, 2.0), (3.0, 2.0), True)
    found = GrpoConfig(loss="sapo", temperature_positive=2.0).settings
    assert (found.temperature_positive, found.temperature_negative) == (2.0, 1.05)
    assert GrpoConfig(ratio_cap=2.0, dual_clip=3.0).settings == dataclasses.replace(GrpoConfig().settings, ratio_cap=2.0, dual_clip=3.0)


def greedy_answer(gathered, prompt):
    """The slow twin: the most probable token again and again, from whole forward passes."""
    model, tokens = gathered.sampler.model, []
    with torch.no_grad():
        while len(tokens) < 3 and not (tokens and tokens[-1] in gathered.sampler.end_ids):
            tokens.append(int(model.logits(model(torch.tensor([prompt + tokens])))[0, -1].argmax()))
    return gathered.tokenizer.decode(tokens[:-1] if tokens[-1] in gathered.sampler.end_ids else tokens)


@pytest.mark.parametrize("size", [1, 4])
def test_the_greedy_completion_is_the_baseline(base, size):
    """ReMax; verl's remax: A = r(sampled) − r(greedy). A group all of whose rewards differ from the baseline's teaches, alike or not."""
    config = dataclasses.replace(SMALL, loss="remax", sample=SampleConfig(size, 3), prompts_per_rollout=10, keep_zero_spread=True)
    gathered = collector(base, config)
    rows, metrics = gathered(0)
    asked = [rows["prompts"][i, : rows["prompt_tokens"][i]].tolist() for i in range(0, 10 * size, size)]
    baseline = torch.tensor([float(greedy_answer(gathered, p) == gathered.problems[gathered.prompts.index(p)].answer) for p in asked])
    expected = score_plain(gathered, rows).view(10, size) - baseline[:, None]
    assert torch.equal(rows["advantages"].view(10, size), expected) and metrics["greedy_reward"] == pytest.approx(float(baseline.mean()))
    assert 0 < metrics["zero_spread_groups"] < 1
    rows, metrics = collector(base, dataclasses.replace(config, keep_zero_spread=False))(0)
    assert metrics["groups"] == int(expected.any(1).sum()) and rows["advantages"].view(-1, size).any(1).all()


def test_the_greedy_completion_is_rewarded_as_others_are(base):
    """The punishment of length too, and each reward by its weight; what was cut off is left out of the loss, not of the baseline."""
    options = {
        "loss": "remax",
        "reward": RewardConfig(("length", "same"), (2.0, 1.0)),
        "overlong_margin_tokens": 2,
        "keep_zero_spread": True,
    }
    config = dataclasses.replace(SMALL, sample=SampleConfig(4, 3, 3.0), mask_unfinished=True, **options)
    gathered = collector(base, config, {"same": lambda problem, text: 1.0})
    rows, metrics = gathered(0)

    def reward(lengths, finished):
        return 2 * (lengths - finished) / 3 + ((3 - 2 - lengths) / 2).clamp(-1, 0)

    asked = [rows["prompts"][i, : rows["prompt_tokens"][i]].tolist() for i in range(0, 24, 4)]
    greedy = gathered.sampler.greedy(asked)
    lengths, ended = torch.tensor([len(tokens) for tokens in greedy.completions]), torch.tensor(greedy.finished)
    expected = reward(rows["mask"].sum(1), rows["finished"].int()) - reward(lengths, ended.int()).repeat_interleave(4)
    torch.testing.assert_close(rows["advantages"], torch.where(rows["finished"], expected, 0.0))
    assert torch.equal(rows["trained"], rows["finished"]) and 0 < metrics["finished"] < 1


def test_weights_of_the_engines_mismatch_come_from_its_own_log_probabilities(base):
    """huggingface/trl#4159, #7269. In float32 there is none: the weights are 1; in bf16 there is, and it is measured."""
    config = dataclasses.replace(SMALL, mismatch="token_truncate", mismatch_cap=1.001, off_policy_threshold=0.5, keep_zero_spread=True)
    for dtype, close in ((torch.float32, True), (torch.bfloat16, False)):
        gathered = collector(base, config)
        gathered.sampler.compares = True
        gathered.sampler.model.to(dtype)
        rows, metrics = gathered(0)
        gap = (rows["engine"] - rows["log_probs"]).abs()
        assert float(gap.max()) == pytest.approx(metrics["engine_gap"]) and (float(gap.max()) < 1e-5) == close
        total, count, measured = completion_loss(gathered.sampler.model, rows, config.settings)
        weights = torch.exp(rows["log_probs"] - rows["engine"]).clamp(max=1.001)
        expected = ((weights * rows["mask"]).sum(1) / rows["mask"].sum(1)).sum()
        assert (
            measured["mismatch_weight"] == pytest.approx(float(expected), rel=1e-5) and abs(metrics["mismatch_kl"]) <= metrics["engine_gap"]
        )
        assert torch.isfinite(total) and measured["off_policy_dropped"] == 0.0 and count == len(rows["mask"])
    assert "engine" not in collector(base)(0)[0]


def test_groups_without_spread_are_counted_and_left_out(base):
    """Users ask why the reward's deviation is 0: then all advantages are, and the group teaches nothing."""
    own = {"even": lambda problem, text: float(problem.answer == "0" and text.startswith("0"))}
    config = dataclasses.replace(SMALL, reward=RewardConfig(("even",)), prompts_per_rollout=10)
    rows, metrics = collector(base, config, own)(0)
    groups = len(rows["mask"]) // 4
    assert 0.5 <= metrics["zero_spread_groups"] < 1 and groups == metrics["groups"] == round(10 * (1 - metrics["zero_spread_groups"]))
    assert (rows["advantages"].view(-1, 4).abs().amax(1) > 0).all()
    whole, kept = collector(base, dataclasses.replace(config, keep_zero_spread=True), own)(0)
    assert kept["groups"] == 10 and whole["advantages"].view(-1, 4).abs().amax(1).count_nonzero() == groups


def test_dynamic_sampling_draws_again_for_them(base):
    own = {"even": lambda problem, text: float(problem.answer == "0" and text.startswith("0"))}
    config = dataclasses.replace(SMALL, reward=RewardConfig(("even",)), resample_rounds=6)
    rows, metrics = collector(base, config, own)(0)
    assert metrics["groups"] == 6 and metrics["resampled_groups"] >= 3 and (rows["advantages"].view(-1, 4).abs().amax(1) > 0).all()


def test_where_no_group_has_a_spread_nothing_is_changed(base):
    gathered = collector(base, dataclasses.replace(SMALL, reward=RewardConfig(("same",))), {"same": lambda problem, text: 1.0})
    rows, metrics = gathered(0)
    total, count, _ = completion_loss(gathered.sampler.model, rows, SMALL.settings)
    assert metrics["zero_spread_groups"] == 1.0 and metrics["groups"] == SMALL.minibatches
    assert count > 0 and all(not g.any() for g in torch.autograd.grad(total, list(gathered.sampler.model.parameters())))


def test_where_all_are_compared_a_group_of_one_reward_teaches_too(base):
    """REINFORCE++ has no baseline of a group: one completion a prompt will do, and all right ones are better than all wrong ones."""
    own = {"even": lambda problem, text: float(problem.answer == "0")}
    config = dataclasses.replace(
        SMALL, loss="reinforce++", sample=SampleConfig(1, 3), prompts_per_rollout=10, reward=RewardConfig(("even",))
    )
    rows, metrics = collector(base, config, own)(0)
    assert metrics["groups"] == 10 and metrics["zero_spread_groups"] == 0.0 and rows["advantages"].all()
    rows, metrics = collector(base, config, {"even": lambda problem, text: 1.0})(0)
    assert metrics["zero_spread_groups"] == 1.0 and not rows["advantages"].any()


@pytest.mark.parametrize("loss", ["rloo", "reinforce++", "reinforce++_baseline"])
def test_unfinished_completions_can_be_left_out_whatever_the_baseline(base, loss):
    config = dataclasses.replace(SMALL, mask_unfinished=True, loss=loss, keep_zero_spread=True, sample=SampleConfig(8, 3, 1.5))
    gathered = collector(base, config)
    rows, metrics = gathered(0)
    total, _, _ = completion_loss(gathered.sampler.model, rows, config.settings, 1.5)
    assert 0 < metrics["finished"] < 1 and torch.equal(rows["trained"], rows["finished"]) and torch.isfinite(total)
    assert not rows["advantages"][~rows["trained"]].any() and rows["advantages"][rows["trained"]].any()


def test_unfinished_completions_can_be_left_out_of_groups_and_loss(base):
    """huggingface/trl#6369: the denominator must not count tokens that the mask leaves out."""
    config = dataclasses.replace(SMALL, mask_unfinished=True, loss="dapo", keep_zero_spread=True, sample=SampleConfig(4, 3, 3.0))
    gathered = collector(base, config)
    rows, metrics = gathered(0)
    assert 0 < metrics["finished"] < 1 and (rows["trained"] == rows["finished"]).all()
    assert not rows["advantages"][~rows["trained"]].any()
    _, count, _ = completion_loss(gathered.sampler.model, rows, config.settings, 3.0)
    assert count == int(rows["mask"][rows["trained"]].sum())


def test_a_kl_in_the_reward_is_taken_off_it(base):
    config = dataclasses.replace(SMALL, loss="rloo", kl_coef=0.5)
    gathered = collector(base, config)
    with torch.no_grad():
        gathered.sampler.model.embed.weight.mul_(1.5)
    rows, _ = gathered(0)
    rewards = score_plain(gathered, rows)
    kl = ((rows["log_probs"] - rows["reference"]) * rows["mask"]).sum(1)
    total = (rewards - 0.5 * kl).view(-1, 4)
    torch.testing.assert_close(rows["advantages"].view(-1, 4), (total - total.mean(1, keepdim=True)) * 4 / 3)


def score_plain(gathered, rows):
    """The verifier's rewards, found again from the rows."""
    chosen = [gathered.prompts.index(rows["prompts"][i, : rows["prompt_tokens"][i]].tolist()) for i in range(len(rows["mask"]))]
    values = []
    for i, problem in enumerate(chosen):
        tokens = rows["completions"][i][rows["mask"][i]].tolist()
        text = gathered.tokenizer.decode(tokens[:-1] if rows["finished"][i] else tokens)
        values.append(float(text == gathered.problems[problem].answer))
    return torch.tensor(values)


def test_the_step_divides_by_all_tokens_whatever_the_micro_batches(base):
    """huggingface/trl#2175: the mean of means of micro-batches is not the mean."""
    config = dataclasses.replace(SMALL, loss="dapo", keep_zero_spread=True)
    gathered = collector(base, config)
    rows, _ = gathered(0)
    with torch.no_grad():
        whole, count, _ = completion_loss(gathered.sampler.model, rows, config.settings)
        shares = [take_rows(rows, torch.arange(i, i + 4)) for i in range(0, 24, 4)]
        parts = [completion_loss(gathered.sampler.model, share, config.settings) for share in shares]
    assert float(sum(part[0] for part in parts)) == pytest.approx(float(whole), abs=1e-5)
    assert sum(part[1] for part in parts) == count


def test_a_policy_learns_what_is_rewarded_and_not_what_is_not(base, tmp_path):
    """Parity of a digit: a third right at first. The random reward leaves it there."""
    config = dataclasses.replace(SMALL, rollouts=40, minibatches=1, epochs=1, prompts_per_rollout=10, sample=SampleConfig(16, 2))
    found = {}
    for name in ("verifier", "random"):
        run = train_grpo(
            tmp_path / name, base, base / "problems.jsonl", dataclasses.replace(config, reward=RewardConfig((name,)))
        )  # fmt: skip
        checked = collector(base, dataclasses.replace(config, sample=SampleConfig(32, 2), keep_zero_spread=True))
        checked.sampler.model = load_decoder(run.model_dir)
        found[name] = checked(0)[1]["reward"]
    first = collector(base, dataclasses.replace(config, sample=SampleConfig(32, 2), keep_zero_spread=True))(0)[1]["reward"]
    assert first < 0.4 and found["verifier"] > 0.65 and found["random"] < 0.5


RESUMED = {
    "grpo": {"kl_coef": 0.05},
    "adapters": {"kl_coef": 0.05, "adapter": LoraConfig(4)},
    "DeepSeek-V3.2's": {
        "kl_coef": 0.05,
        "kl_weighted": True,
        "off_policy_threshold": 0.01,
        "mismatch": "token_mask",
        "mismatch_floor": 0.5,
    },
    "vespo": {"loss": "vespo", "mismatch": "token_truncate"},
    "gspo_token": {"loss": "gspo_token"},
    "remax": {"loss": "remax", "kl_coef": 0.05},
}


@pytest.mark.parametrize("name", RESUMED)
def test_resume_within_a_rollout_gives_the_same_bits(base, tmp_path, name):
    """open-instruct#648, trl#1014: the same seed gives the same run, cut off or not."""
    train = dataclasses.replace(TRAIN, keep_every_steps=1)
    config = dataclasses.replace(SMALL, train=train, micro_batch_size=4, **RESUMED[name])  # three a step for two threads
    whole = train_grpo(tmp_path / "whole", base, base / "problems.jsonl", config)
    cut = Run(Path(shutil.copytree(whole.path, tmp_path / "cut")))
    for path in list_checkpoints(cut):
        if int(path.name.split("_")[-1]) > 6:
            shutil.rmtree(path)
    (cut.path / "DONE").unlink()
    shutil.rmtree(cut.model_dir)
    resumed = train_grpo(tmp_path / "cut", base, base / "problems.jsonl", config, resume=True)
    once, again = (load_decoder(run.model_dir).state_dict() for run in (whole, resumed))
    assert all(torch.equal(once[key], again[key]) for key in once) and whole.metrics()[-1]["loss_nats"] == cut.metrics()[-1]["loss_nats"]
    assert (whole.path / "adapter").exists() == (name == "adapters")
    wanted = {"mismatch": "mismatch_weight", "off_policy_threshold": "off_policy_dropped", "kl_coef": "kl"}
    assert {metric for option, metric in wanted.items() if option in RESUMED[name]} <= whole.metrics()[-1].keys()
    assert ("greedy_reward" in whole.metrics()[-1]) == (name == "remax")


def test_the_command(base, tmp_path, capsys):
    options = (
        "--loss dapo --train.num-threads 1 --train.dtype float32 --sample.group-size 4 --sample.max-tokens 3 --prompts-per-rollout 4 "
        "--mismatch sequence_truncate --mismatch-cap 2 --off-policy-threshold 0.5 --dual-clip 3 --advantages greedy"
    )
    arguments = [
        str(base),
        "--data",
        str(base / "problems.jsonl"),
        "--out",
        str(tmp_path / "run"),
        *options.split(),
        "--rollouts",
        "2",
        "--json",
    ]
    assert main(["grpo", *arguments]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["problems"] == 10 and summary["rejected_rows"] == 0 and summary["rollouts"] == 2 and summary["steps"] == 2
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    wanted = {
        "reward",
        "completion_tokens",
        "entropy",
        "clip_fraction",
        "kl_sampler",
        "zero_spread_groups",
        "engine_gap",
        "finished",
        "mismatch_weight",
        "mismatch_kl",
        "off_policy_dropped",
        "greedy_reward",
    }
    assert wanted <= lines[0].keys() and lines[0]["rollout"] == 0
    assert {name: summary[name] for name in ("reward", "zero_spread_groups")} == {
        name: lines[-1][name] for name in ("reward", "zero_spread_groups")
    }
    assert main(["grpo", *arguments]) == 1
    assert "already" in capsys.readouterr().err
    arguments[4] = str(tmp_path / "never")
    assert main(["grpo", *arguments[:-1], "--reward.rewards", "format:Z{9}"]) == 0  # which no completion of three tokens holds
    said = capsys.readouterr()
    assert "had the same reward (0 on average)" in said.err and "mean reward 0.000 in the last roll-out" in " ".join(said.out.split())


def test_a_prompt_that_is_too_long_is_named(base, tmp_path):
    rows = [{"prompt": "1", "answer": "1"}, {"prompt": "1" * 60, "answer": "1"}]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="row 2 has a prompt of 63 tokens; beside sample.max_tokens the context holds 29"):
        train_grpo(tmp_path / "run", base, tmp_path / "long.jsonl", SMALL)
    assert not (tmp_path / "run").exists()


def test_arithmetic_problems_are_right_and_different():
    problems = arithmetic_problems(500, below=20)
    assert len(set(problems)) == 500 and problems[:100] == arithmetic_problems(100, below=20)
    assert all(eval(question.rstrip("=")) == int(answer) for question, answer in problems)
    assert arithmetic_rows(problems[:1])[0].keys() == {"prompt", "answer", "verifier"}
    with pytest.raises(UserError, match="there are 800"):
        arithmetic_problems(801, below=20)


@pytest.mark.parametrize("right", [[True, False, False, True, False], [False] * 5, [True] * 5])
def test_pass_at_k_equals_enumeration(right):
    for k in range(1, 6):
        subsets = list(itertools.combinations(right, k))
        assert math.isclose(pass_at(right, k), sum(map(any, subsets)) / len(subsets))
