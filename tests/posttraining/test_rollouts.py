"""Roll-outs: what the engine samples, the trainer's view of it, and training on them that can be cut off anywhere."""

import dataclasses
import json

import pytest
import torch

from plinth.config import UserError
from plinth.posttraining.actor_critic import new_actor_critic
from plinth.posttraining.completion_scores import completion_log_probs, joined_tokens, shared_prompts, sharing_pays
from plinth.posttraining.grpo import completion_loss
from plinth.posttraining.lora import LoraConfig, adapted_modules, add_adapters
from plinth.posttraining.policy_config import POLICY_LOSSES
from plinth.posttraining.ppo import ppo_loss
from plinth.posttraining.ppo_config import PpoConfig
from plinth.posttraining.rollout_batches import RolloutBatches, choose_prompts
from plinth.posttraining.rollouts import Rollouts, SampleConfig, Sampler, take_rows
from plinth.training.checkpoint import list_checkpoints
from plinth.training.job import Job, run_job
from plinth.training.loop import TrainConfig
from plinth.training.optim import OptimizerConfig
from plinth.training.precision import MasterWeights
from plinth.training.step import open_workers, share_out, split_gradients
from plinth.training.stopping import Stopped
from sampled import roll_out
from small_models import GROUPED, noisy_decoder

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], list(range(2, 40))]
END = 1


def scores_one_by_one(model, rollouts, temperature=1.0):
    """The slow twin: a forward pass of plain logits for each completion alone."""
    found = []
    with torch.no_grad():
        for i, completion in enumerate(rollouts.completions):
            whole = torch.tensor([rollouts.prompt_of(i) + completion])
            logs = torch.log_softmax(model.logits(model(whole)).float() / temperature, -1)[0]
            start = len(rollouts.prompt_of(i))
            found.append([float(logs[start + k - 1, token]) for k, token in enumerate(completion)])
    return found


GROUPEDS = {
    "plain": GROUPED,
    "learned places": dataclasses.replace(GROUPED, position="learned", norm="layer"),
    "soft cap": dataclasses.replace(GROUPED, logit_softcap=5.0),
    "window": dataclasses.replace(GROUPED, sliding_window=8),
}


@pytest.mark.parametrize("name", GROUPEDS)
def test_log_probabilities_as_sampled_are_the_trainers(name):
    """huggingface/trl#4159: another engine's log-probabilities differ from the trainer's and make the first ratio other than 1."""
    model = noisy_decoder(GROUPEDS[name])
    rollouts = roll_out(model, PROMPTS, [END], SampleConfig(group_size=6, max_tokens=20), seed=3)
    rows = rollouts.rows()
    trained = completion_log_probs(model, rows).log_probs_BT
    assert trained.requires_grad and any(rollouts.finished) and not all(rollouts.finished)
    assert float((trained.detach() - rows["log_probs"]).abs().max()) < 1e-5
    for found, expected in zip(rollouts.log_probs, scores_one_by_one(model, rollouts)):
        assert found == pytest.approx(expected, abs=1e-5)


def test_a_temperature_scales_sampling_and_log_probabilities_alike():
    model = noisy_decoder()
    rollouts = roll_out(model, PROMPTS, [END], SampleConfig(group_size=4, max_tokens=10, temperature=0.5), seed=1)
    for found, expected in zip(rollouts.log_probs, scores_one_by_one(model, rollouts, temperature=0.5)):
        assert found == pytest.approx(expected, abs=1e-5)
    drawn = roll_out(model, [[5, 6, 7]], [], SampleConfig(group_size=2000, max_tokens=1, temperature=0.5), seed=2)
    counts = torch.bincount(torch.tensor(drawn.completions)[:, 0], minlength=41) / 2000
    expected = torch.softmax(model.logits(model(torch.tensor([[5, 6, 7]])))[0, -1].detach() / 0.5, -1)
    assert float((counts - expected).abs().max()) < 0.05


@pytest.mark.parametrize("name", GROUPEDS)
def test_a_groups_prompt_is_computed_once_and_nothing_else_changes(name):
    """huggingface/trl#3574: the prompt of a group was computed once a completion, in generation and again in the loss."""
    model = noisy_decoder(GROUPEDS[name])
    prompts = [list(range(2, 38)), list(range(5, 30))]
    rows = roll_out(model, prompts, [END], SampleConfig(group_size=4, max_tokens=9), seed=1).rows()
    assert sharing_pays(rows, 4, 64) and not sharing_pays(rows, 1, 64) and not sharing_pays(take_rows(rows, torch.arange(1, 5)), 4, 64)
    lie, tokens = shared_prompts(rows, 4)
    assert int((lie.homes_BL != lie.width - 1).sum()) == 36 + 25 + int(rows["mask"].sum()) - 8 and tokens[0, :36].tolist() == prompts[0]
    found = []
    for group_size in (4, 1):
        scores = completion_log_probs(model, rows, 0.8, group_size=group_size, entropy=True, hidden=True)
        weights = torch.randn(scores.log_probs_BT.shape, generator=torch.Generator().manual_seed(0))
        grads = torch.autograd.grad((scores.log_probs_BT * weights).sum(), list(model.parameters()))
        found.append((scores.log_probs_BT, scores.entropy_BT, scores.hidden_BTD * rows["mask"][..., None], *grads))
    for shared, plain in zip(*found):
        torch.testing.assert_close(shared, plain, atol=2e-5, rtol=1e-4)


def test_entropy_is_that_of_the_sampled_distribution():
    model = noisy_decoder()
    rows = roll_out(model, PROMPTS, [END], SampleConfig(group_size=2, max_tokens=6), seed=5).rows()
    scores = completion_log_probs(model, rows, 0.7, entropy=True, hidden=True)
    logits = model.logits(scores.hidden_BTD) / 0.7
    expected = torch.distributions.Categorical(logits=logits).entropy() * rows["mask"]
    torch.testing.assert_close(scores.entropy_BT, expected.detach(), atol=1e-5, rtol=0)
    assert not scores.entropy_BT.requires_grad


def test_samples_depend_on_weights_prompt_and_seed_alone():
    model = noisy_decoder()
    config = SampleConfig(group_size=3, max_tokens=12)
    whole = roll_out(model, PROMPTS, [END], config, seed=(3, 1))
    split = roll_out(model, PROMPTS, [END], dataclasses.replace(config, max_batch=2), seed=(3, 1), num_threads=3)
    assert whole == split
    assert whole.completions != roll_out(model, PROMPTS, [END], config, seed=(3, 2)).completions
    assert len({tuple(tokens) for tokens in whole.completions[:3]}) > 1  # a group's completions are drawn apart


def test_a_sampler_reads_the_weights_as_they_are_now():
    model = noisy_decoder()
    sampler = Sampler(model, (END,), SampleConfig(group_size=2, max_tokens=12))
    before = sampler.sample(PROMPTS, [0])
    with torch.no_grad():
        model.embed.weight.mul_(1.3)
    after = sampler.sample(PROMPTS, [0])
    sampler.close()
    assert before != after == roll_out(model, PROMPTS, [END], SampleConfig(group_size=2, max_tokens=12))


def test_adapters_are_sampled_from():
    model = add_adapters(noisy_decoder(), LoraConfig(4))
    before = roll_out(model, PROMPTS, [END], SampleConfig(group_size=2, max_tokens=12))
    with torch.no_grad():
        for _, module in adapted_modules(model):
            module.lora_b.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(1))
    after = roll_out(model, PROMPTS, [END], SampleConfig(group_size=2, max_tokens=12))
    assert before != after
    assert after.log_probs[3] == pytest.approx(scores_one_by_one(model, after)[3], abs=1e-5)


def test_in_bf16_the_trainers_log_probabilities_are_taken_and_the_gap_is_told():
    model = noisy_decoder().bfloat16()
    rollouts = roll_out(model, PROMPTS, [END], SampleConfig(group_size=4, max_tokens=12))
    rows = rollouts.rows()
    trained = completion_log_probs(model, rows).log_probs_BT.detach()
    assert 0 < rollouts.engine_gap < 0.5
    torch.testing.assert_close(trained, rows["log_probs"], atol=0.06, rtol=0)  # other rows beside a row change its last bits


def test_the_token_that_ended_a_completion_is_part_of_it():
    model = noisy_decoder()
    rollouts = roll_out(model, PROMPTS, [END], SampleConfig(group_size=8, max_tokens=20), seed=3)
    for i, tokens in enumerate(rollouts.completions):
        assert (tokens[-1] == END) == rollouts.finished[i] and END not in rollouts.answer_tokens(i)
        assert len(tokens) == len(rollouts.log_probs[i]) <= 20
        assert rollouts.finished[i] or len(tokens) == 20


def test_rows_hold_each_prompt_with_its_completion():
    rollouts = roll_out(noisy_decoder(), PROMPTS, [END], SampleConfig(group_size=2, max_tokens=9), seed=3)
    rows = rollouts.rows(pad_id=40)
    for part in (torch.arange(8), torch.tensor([3, 0, 2])):
        taken = take_rows(rows, part)
        for row, i in zip(joined_tokens(taken).tolist(), part.tolist()):
            whole = rollouts.prompt_of(i) + rollouts.completions[i]
            assert row[: len(whole)] == whole and not any(row[len(whole) :])
        assert taken["mask"].any(0).all()
    some = rollouts.of_groups([3, 1])
    assert some.prompts == [PROMPTS[3], PROMPTS[1]] and some.completions == rollouts.completions[6:] + rollouts.completions[2:4]
    assert some.joined(some).completions == some.completions * 2


def test_mistakes_are_named():
    with pytest.raises(UserError, match="temperature=0 must be positive"):
        SampleConfig(temperature=0)
    with pytest.raises(UserError, match="max_tokens=64 leaves no room"):
        roll_out(noisy_decoder(), PROMPTS, [END], SampleConfig(max_tokens=64))
    with pytest.raises(UserError, match="a prompt has 38 tokens; beside max_tokens=30 there is room for 34"):
        roll_out(noisy_decoder(), PROMPTS, [END], SampleConfig(max_tokens=30))


def test_every_prompt_comes_once_a_pass():
    drawn = [choose_prompts(10, 4, 7, number) for number in range(5)]
    flat = sum(drawn, [])
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]
    assert choose_prompts(10, 4, 7, 3) == drawn[3] != choose_prompts(10, 4, 7, 3, attempt=1)


def test_each_pass_of_a_rollout_deals_every_group_once():
    def collect(number):
        mask = torch.arange(7) < (1 + torch.arange(24) * 5 % 7)[:, None]
        return {"mask": mask, "prompts": torch.zeros(24, 2), "prompt_tokens": torch.full((24,), 2), "id": torch.arange(24)}, {"reward": 0.5}

    batches = RolloutBatches(collect, epochs=2, minibatches=3, micro_batch_size=5, group_size=2)
    orders = []
    for epoch in range(2):
        parts = [batch for step in range(3) for batch in batches.batches_at(3 * epoch + step)]
        ids = torch.cat([part["id"] for part in parts])
        assert sorted(ids.tolist()) == list(range(24)) and all(len(part["id"]) <= 4 for part in parts)
        assert (ids.view(-1, 2) % 2 == torch.tensor([0, 1])).all()  # groups stay together
        orders.append(ids.tolist())
    assert orders[0] != orders[1] and batches.metrics(4) == {"rollout": 0, "reward": 0.5}
    with pytest.raises(ValueError, match="within roll-out 2"):
        batches.batches_at(14)


@pytest.mark.parametrize("stage", ["grpo", "ppo"])
def test_threads_share_an_updates_completions_by_tokens_and_learn_the_same(stage):
    """Short completions come before long ones in an update: halves of as many rows left one thread waiting for the other."""
    lengths = torch.randint(1, 22, (32,), generator=torch.Generator().manual_seed(0)).sort().values.tolist()
    tokens = [list(range(2, 2 + length)) for length in lengths]
    rows = Rollouts([[5, 6, 7]] * 32, 1, tokens, [[-3.7] * length for length in lengths], [True] * 32).rows()
    noise = torch.randn(32, generator=torch.Generator().manual_seed(1))
    rows |= {"advantages": noise, "trained": torch.ones(32, dtype=torch.bool)}
    model, loss = noisy_decoder(), lambda policy, batch: completion_loss(policy, batch, POLICY_LOSSES["grpo"])
    if stage == "ppo":
        wide = rows["mask"] * noise[:, None]
        rows |= {"advantages": wide, "values": wide + 0.3, "returns": wide.abs(), "reference": rows["log_probs"] - 0.1}
        model = new_actor_critic(model, model, trunk="separate", start=None, head="normal", generator=torch.Generator().manual_seed(0))
        loss = lambda policy, batch: ppo_loss(policy, batch, PpoConfig())  # noqa: E731
    batches = RolloutBatches(lambda number: (rows, {}), micro_batch_size=4).batches_at(0)
    work = [sum(int((batch["prompt_tokens"] + batch["mask"].sum(1)).sum()) for batch in share) for share in share_out(batches, 2)]
    assert max(work) < 1.1 * min(work)
    masters, found = MasterWeights(model, torch.float32), []
    for threads in (1, 2):
        with open_workers(threads) as workers:
            found.append(split_gradients(masters, loss, batches, workers))
    (alone, count, measured, grads), (shared, shared_count, shared_measured, shared_grads) = found
    assert float(shared) == pytest.approx(float(alone), rel=1e-5) and shared_count == count
    assert shared_measured == pytest.approx(measured, rel=1e-4, abs=1e-5)
    for one, other in zip(grads, shared_grads):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


@dataclasses.dataclass(frozen=True)
class Config:
    train: TrainConfig


def train(out, *, stop_at=None, resume=False):
    """Train by REINFORCE to say token 20, a roll-out of two epochs of two updates; `stop_at` cuts off before that roll-out or update."""

    torch.manual_seed(0)  # its state is part of a checkpoint, and other tests draw from it

    def prepare(config):
        model = noisy_decoder()
        sampler = Sampler(model, (END,), SampleConfig(group_size=4, max_tokens=6), num_threads=2)

        def collect(number):
            rows = sampler.sample([PROMPTS[i] for i in choose_prompts(4, 2, 0, number)], [0, number]).rows()
            reward = (rows["completions"] == 20).float().mean(1)
            rows["advantages"] = reward - reward.mean()
            return rows, {"reward": float(reward.mean())}

        batches = RolloutBatches(collect, epochs=2, minibatches=2, micro_batch_size=4, group_size=4)

        def batches_at(step):
            if step == stop_at:
                raise Stopped("cut off")
            return batches.batches_at(step)

        def loss(policy, rows):
            scores = completion_log_probs(policy, rows)
            ratio = (scores.log_probs_BT - rows["log_probs"]).exp()
            return -(ratio * rows["advantages"][:, None] * rows["mask"]).sum(), int(rows["mask"].sum()), {}

        return Job(
            model, loss, batches_at, steps=12, tokenizer=None, description="testing", step_metrics=batches.metrics,
            extra_state={"rollout": batches}, publish=lambda folder: folder.mkdir(),
        )  # fmt: skip

    config = Config(TrainConfig(
        steps=12, dtype="float32", num_threads=2, warmup_steps=1, keep_every_steps=1, keep_final=True, background_saves=False,
        optimizer=OptimizerConfig(name="adamw", lr=0.01),
    ))  # fmt: skip
    return run_job(out, "test", config, prepare, resume=resume)


@pytest.mark.parametrize("stop_at", [2, 4, 7])
def test_a_run_cut_off_within_or_between_rollouts_goes_on_bit_for_bit(tmp_path, stop_at):
    whole = train(tmp_path / "whole")
    with pytest.raises(Stopped):
        train(tmp_path / "cut", stop_at=stop_at)
    resumed = train(tmp_path / "cut", resume=True)
    states = [(list_checkpoints(run)[-1] / "state.safetensors").read_bytes() for run in (whole, resumed)]
    assert states[0] == states[1]
    lines = [[json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()] for run in (whole, resumed)]
    for kept in ("reward", "rollout", "loss_nats"):
        assert [line[kept] for line in lines[0]] == [line[kept] for line in lines[1]]
    assert len({line["reward"] for line in lines[0]}) == 3
