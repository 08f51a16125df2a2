"""Every detail of PPO is a switch: what each one changes, and that it changes that alone. The names are those of docs/ppo.md."""

import dataclasses
import math

import pytest
import torch

from plinth.config import UserError
from plinth.models.reward import RewardModel
from plinth.posttraining.actor_critic import View, new_actor_critic
from plinth.posttraining.examples import Prompt
from plinth.posttraining.policy_losses import PolicyLoss, value_loss
from plinth.posttraining.ppo import ppo_loss
from plinth.posttraining.ppo_config import AdvantageConfig, CriticConfig, EndConfig, KlConfig, PpoConfig, PromptConfig, RewardShape
from plinth.posttraining.ppo_experience import RewardState, advantages, end_completions, joint_advantages, shape_scores
from plinth.posttraining.prompts import matching, prompt_tokens
from plinth.posttraining.rollout_batches import RolloutBatches
from plinth.posttraining.rollouts import Rollouts, SampleConfig, take_rows
from plinth.tokenizer.train import train_tokenizer
from plinth.training.optim import OptimizerConfig, build_optimizer
from plinth.training.precision import MasterWeights
from plinth.training.step import InlineWorker
from sampled import roll_out
from small_models import GROUPED, noisy_decoder

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15]]
END = 1


def both(policy=None, trunk="separate", start=None, head="normal"):
    policy = policy or noisy_decoder()
    return new_actor_critic(policy, policy, trunk=trunk, start=start, head=head, generator=torch.Generator().manual_seed(3))


def rows_of(model, size=2, pad_id=0, **sample):
    return roll_out(model, PROMPTS, [END], SampleConfig(group_size=size, max_tokens=12, **sample), seed=3).rows(pad_id)


def scored(model, config=None, **more):
    """Rows of a roll-out with everything that advantages are taken from."""
    rows, generator = rows_of(model.policy), torch.Generator().manual_seed(5)
    with torch.no_grad():
        rows["values"], rows["end_values"] = model.values(rows, View())
    rows["reference"] = (rows["log_probs"] - 0.3 * torch.rand(rows["log_probs"].shape, generator=generator)) * rows["mask"]
    rows["scores"] = torch.randn(len(rows["mask"]), generator=generator)
    rows["kl_coef"] = torch.full((len(rows["mask"]),), 0.1)
    return rows | advantages(rows, config or PpoConfig()) | more


def changed(section, **values):
    return dataclasses.replace(PpoConfig(), **{section: dataclasses.replace(getattr(PpoConfig(), section), **values)})


def test_item_1_the_critic_reads_the_prompt_unless_told_not_to():
    model = both()
    rows = rows_of(model.policy)
    other = rows | {"prompts": torch.where(rows["prompts"] > 0, (rows["prompts"] + 3) % 41, 0).int()}
    other["prompts"][:, 0] = rows["prompts"][:, 0]
    with torch.no_grad():
        for reads, differs in ((True, True), (False, False)):
            found = [model.values(each, View(reads_prompt=reads))[0][4:] for each in (rows, other)]  # prompts of seven tokens
            assert torch.allclose(*found, atol=1e-6) != differs


def test_item_2_what_fills_up_a_batch_is_never_read():
    """huggingface/trl#1623: with the end token as padding, masks were found by comparing tokens, and ends went unlearnt."""
    model = both()
    with torch.no_grad():
        for pad_id in (END, 40):
            filled, plain = rows_of(model.policy, pad_id=pad_id), rows_of(model.policy)
            found, expected = model.judge(filled, View()), model.judge(plain, View())
            assert torch.equal(found.log_probs_BT, expected.log_probs_BT) and torch.equal(found.values_BT, expected.values_BT)
            assert filled["mask"].sum() == sum(map(len, roll_out(model.policy, PROMPTS, [END], SampleConfig(2, 12), seed=3).completions))


def test_item_2_long_prompts_are_refused_cut_or_left_out():
    tokenizer = train_tokenizer(["Review the lamp."] * 3, 280)
    asked = [Prompt([{"role": "user", "content": text}]) for text in ("Hi", "Review the lamp. " * 9)]
    room = len(prompt_tokens(tokenizer, asked[:1], 99, "error")[1][0]) + 2
    with pytest.raises(UserError, match="more than the .* that the context leaves"):
        prompt_tokens(tokenizer, asked, room, "error")
    kept, tokens, counts = prompt_tokens(tokenizer, asked, room, "truncate")
    assert kept == asked and [len(row) for row in tokens] == [room - 2, room] and counts == {"too_long_rows": 0, "cut_rows": 1}
    assert tokens[1] == prompt_tokens(tokenizer, asked, 999, "error")[1][1][-room:]
    kept, _, counts = prompt_tokens(tokenizer, asked, room, "drop")
    assert kept == asked[:1] and counts == {"too_long_rows": 1, "cut_rows": 0}
    with pytest.raises(UserError, match="all 1 prompts have more than 3 tokens"):
        prompt_tokens(tokenizer, asked[1:], 3, "drop")


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_item_3_padding_on_the_left_with_adjusted_positions_changes_nothing(position):
    model = both(noisy_decoder(dataclasses.replace(GROUPED, position=position)))
    rows = rows_of(model.policy)
    with torch.no_grad():
        right, left, wrong = (model.judge(rows, View(padding=padding)) for padding in ("right", "left", "left_unadjusted"))
    torch.testing.assert_close(left.log_probs_BT, right.log_probs_BT, atol=2e-5, rtol=0)
    torch.testing.assert_close(left.values_BT, right.values_BT, atol=1e-4, rtol=1e-5)
    assert float((wrong.log_probs_BT - right.log_probs_BT).abs().max()) > 0.01


def words(*texts):
    tokenizer = train_tokenizer(["The lamp is neat. It is dull."] * 3, 280)
    tokens = [tokenizer.encode(text) for text in texts]
    return tokenizer, tokens


def test_item_4_completions_of_fixed_length_end_in_the_text_only():
    tokenizer, (first, second) = words("It is neat.", "It is dull")
    end = tokenizer.end_ids[0]
    rollouts = Rollouts(
        [[3], [4]], 1, [[*first, end, *second], second], [[0.0] * (len(first) + 1 + len(second)), [0.0] * len(second)], [False] * 2
    )
    found, texts = end_completions(rollouts, EndConfig(fixed_length=True), tokenizer, [end])
    assert texts == ["It is neat.", "It is dull"] and found.finished == [True, False]
    assert found.completions == rollouts.completions  # all are trained on
    drawn = roll_out(noisy_decoder(), PROMPTS, [], SampleConfig(group_size=8, max_tokens=12))
    assert {len(tokens) for tokens in drawn.completions} == {12} and any(END in tokens for tokens in drawn.completions)


def test_item_5_the_rate_falls_linearly_to_zero():
    train = dataclasses.replace(PpoConfig().train, steps=8)
    assert [train.lr_scale(step) for step in range(8)] == pytest.approx([1 - step / 8 for step in range(8)])
    constant = dataclasses.replace(train, decay_fraction=0.0)
    assert {constant.lr_scale(step) for step in range(8)} == {1.0}


def test_item_7_the_score_stands_at_the_last_token_or_one_behind_as_in_trl():
    """The advantages of TRL 1.12, float64: see test_loss_golden_values for the inputs; huggingface/trl#3750 is about the place."""
    f64 = torch.float64
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    values = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5], [0.5, 0.4, 0.3, 0.2, 0.1]], dtype=f64)
    kl = torch.tensor([[0.1, -0.2, 0.3, 0, 0], [0.05, 0.05, -0.1, 0.2, 0.1]], dtype=f64)
    rows = {
        "mask": mask, "values": values * mask, "end_values": torch.tensor([0.5, 9.0], dtype=f64), "finished": torch.tensor([True, False]),
        "log_probs": kl, "reference": torch.zeros_like(kl), "scores": torch.tensor([1, -1], dtype=f64),
        "kl_coef": torch.full((2,), 0.05, dtype=f64),
    }  # fmt: skip
    second = [-1.27995316, -1.23942438, -1.1967625, -1.15975, -1.105]
    for place, first in (("past_end", [0.76920312, 0.7096875, 0.63125, 0.575]), ("last_token", None)):
        config = dataclasses.replace(
            PpoConfig(), reward=RewardShape(place=place), advantage=AdvantageConfig(whiten=False), kl=KlConfig(coef=0.05)
        )
        found = advantages(rows, config)["advantages"]
        torch.testing.assert_close(found[1], torch.tensor(second, dtype=f64), atol=6e-9, rtol=0)
        if first is not None:
            torch.testing.assert_close(found[0, :4], torch.tensor(first, dtype=f64), atol=6e-9, rtol=0)
        else:  # the last token's advantage is score minus value, undiscounted
            assert float(found[0, 3]) == pytest.approx(1 - 0.4)
    whitened = advantages(rows, dataclasses.replace(PpoConfig(), reward=RewardShape(place="past_end")))["advantages"]
    expected = torch.tensor([1.15057851, 1.09026712, 1.01078086, 0.95377876, 0], dtype=f64)
    torch.testing.assert_close(whitened[0], expected, atol=6e-9, rtol=0)


def test_items_8_and_11_how_the_critics_head_begins():
    assert both(head="zero").critic.score.weight.abs().max() == 0
    drawn = both(head="normal").critic.score.weight
    assert abs(float(drawn.detach().std()) * math.sqrt(33) - 1) < 0.4
    learnt = RewardModel.from_decoder(noisy_decoder(seed=9), torch.Generator().manual_seed(8))
    learnt.rescale(2.0, 0.7)
    kept, reset = both(start=learnt, head="reward"), both(start=learnt, head="zero")
    assert torch.equal(kept.critic.score.weight, learnt.score.weight) and kept.critic.config.bias == pytest.approx(0.7)
    assert torch.equal(reset.critic.trunk.embed.weight, learnt.trunk.embed.weight) and reset.critic.config.bias == 0
    with pytest.raises(UserError, match="critic.head=reward needs a reward model"):
        both(head="reward")


def test_item_9_scores_of_the_reference_get_mean_0_and_deviation_1():
    scores, state = [3.0, 5.0, 10.0], RewardState(0.1)
    state.normalise(scores)
    shaped = shape_scores(scores, [True] * 3, state, RewardShape(normalise=True), EndConfig())
    assert float(shaped.mean()) == pytest.approx(0, abs=1e-6) and float(shaped.std()) == pytest.approx(1)
    assert shape_scores([6.0], [True], state, RewardShape(), EndConfig()).abs() < 1e-6  # gain and shift stay for later roll-outs
    equal = RewardState(0.1)
    equal.normalise([2.0, 2.0])
    assert (equal.gain, equal.shift) == (1.0, -2.0)


def test_item_10_log_probabilities_are_those_of_the_sampling_temperature():
    model = both()
    rows = rows_of(model.policy, temperature=0.5)
    rows |= {name: rows["log_probs"] for name in ("reference", "values", "returns", "advantages")}
    sample = SampleConfig(group_size=2, max_tokens=12, temperature=0.5)
    for same, low, high in ((True, -1e-4, 1e-4), (False, 0.02, 9.0)):
        config = dataclasses.replace(PpoConfig(), sample=sample, train_at_temperature=same)
        _, count, metrics = ppo_loss(model, rows, config)
        assert low < metrics["kl_sampler"] / count < high


def test_item_12_prompts_are_chosen_by_a_pattern():
    asked = [Prompt([{"role": "user", "content": text}]) for text in ("Review the lamp.", "How is the lamp?")]
    assert matching(asked, None) == asked and matching(asked, r"\.$") == asked[:1]
    with pytest.raises(UserError, match="matches none of 2 prompts"):
        matching(asked, "^x")
    with pytest.raises(UserError, match="is no regular expression"):
        changed("prompt", pattern="(")


def test_item_13_dropout_is_off_and_where_it_is_on_moves_the_ratio_off_1():
    model = both()
    rows = scored(model)
    off, count, at_once = ppo_loss(model, rows, PpoConfig())
    assert abs(at_once["kl_sampler"]) / count < 1e-5
    config = dataclasses.replace(PpoConfig(), dropout=0.3)
    on, again = (ppo_loss(model, rows, config) for _ in range(2))
    assert abs(on[2]["kl_sampler"]) / count > 0.01 and float(on[0].detach()) == float(again[0].detach()) != float(off.detach())


def test_item_14_completions_end_at_a_text_and_others_get_a_fixed_score():
    tokenizer, tokens = words("It is neat. It is dull. It", "It is neat")
    rollouts = Rollouts([[3], [4]], 1, tokens, [[0.1] * len(row) for row in tokens], [False] * 2)
    found, texts = end_completions(rollouts, EndConfig(truncate_at=".", truncate_from=1), tokenizer, [0])
    assert texts == ["It is neat.", "It is neat"] and found.finished == [True, False]
    assert len(found.completions[0]) == len(found.log_probs[0]) < len(tokens[0])
    later, texts = end_completions(rollouts, EndConfig(truncate_at=".", truncate_from=len(found.completions[0])), tokenizer, [0])
    assert texts[0] == "It is neat. It is dull."
    state, scores = RewardState(0.1), [0.5, 0.5]
    assert shape_scores(scores, found.finished, state, RewardShape(), EndConfig(missing_score=-1)).tolist() == [0.5, -1]
    assert shape_scores(scores, found.finished, state, RewardShape(), EndConfig(missing_penalty=2)).tolist() == [0.5, -1.5]
    assert shape_scores([50.0, -50.0], [True, True], state, RewardShape(clip=10), EndConfig()).tolist() == [10, -10]


def test_item_15_the_discount_reaches_back_from_the_score():
    rows = scored(both()) | {"kl_coef": torch.zeros(6)}
    rows |= {"values": torch.zeros_like(rows["values"])}
    last = rows["mask"].sum(1) - 1
    for gamma in (1.0, 0.9):
        config = dataclasses.replace(PpoConfig(), advantage=AdvantageConfig(gamma=gamma, lam=1.0, whiten=False))
        first = advantages(rows, config)["advantages"][:, 0]
        torch.testing.assert_close(first, rows["scores"] * gamma**last)


def test_item_16_each_pass_is_dealt_anew():
    orders = {}
    for reshuffle in (True, False):
        rows = {"mask": torch.ones(16, 3, dtype=torch.bool), "prompt_tokens": torch.ones(16, dtype=torch.long), "id": torch.arange(16)}
        frame = RolloutBatches(lambda number, rows=rows: (rows, {}), epochs=2, minibatches=2, micro_batch_size=4, reshuffle=reshuffle)
        orders[reshuffle] = [[part["id"].tolist() for part in frame.batches_at(step)] for step in range(4)]
    assert orders[True][:2] != orders[True][2:] and orders[False][:2] == orders[False][2:]


def test_item_17_the_kl_is_taken_off_token_by_token_or_off_the_score():
    rows = scored(both()) | {"values": torch.zeros(6, 12)}
    settings = AdvantageConfig(lam=1.0, whiten=False)
    each, at_once = (
        advantages(rows, dataclasses.replace(PpoConfig(), advantage=settings, kl=KlConfig(per_token=per_token)))["advantages"]
        for per_token in (True, False)
    )
    torch.testing.assert_close(each[:, 0], at_once[:, 0])  # the same in sum
    expected = rows["scores"] - 0.1 * (rows["log_probs"] - rows["reference"]).sum(1)
    for found in at_once.unbind(1):
        torch.testing.assert_close(found[found != 0], expected[found != 0])
    assert not torch.allclose(each, at_once)


def test_item_18_whitening_of_rewards_and_advantages():
    rows = scored(both())
    mask = rows["mask"]
    plain, white = (advantages(rows, changed("advantage", whiten=whiten))["advantages"][mask] for whiten in (False, True))
    torch.testing.assert_close(white, (plain - plain.mean()) / plain.std(), atol=1e-5, rtol=1e-5)
    biased = advantages(rows, changed("advantage", unbiased=False))["advantages"][mask]
    torch.testing.assert_close(biased, white * math.sqrt(len(white) / (len(white) - 1)), atol=1e-5, rtol=1e-5)
    settings = AdvantageConfig(lam=0.0, whiten=False)
    flat = rows | {"values": torch.zeros_like(rows["values"])}  # then advantages at λ 0 are the rewards
    found, scaled = (
        advantages(flat, dataclasses.replace(PpoConfig(), advantage=settings, reward=RewardShape(whiten=white)))["advantages"][mask]
        for white in (False, True)
    )
    torch.testing.assert_close(scaled, (found - found.mean()) / found.std() + found.mean(), atol=1e-5, rtol=1e-5)


def test_item_18_whitening_goes_over_the_rollout_or_over_each_update():
    config, rows = changed("advantage", over="minibatch"), scored(both())
    parts = [take_rows(rows, torch.tensor(index)) for index in ([4, 1], [0], [5])]
    joint = joint_advantages(parts, config)
    whole = take_rows(rows, torch.tensor([4, 1, 0, 5]))
    expected = advantages(whole, config)["advantages"]
    for part, index in zip(joint, ([0, 1], [2], [3])):
        width = part["mask"].shape[1]
        torch.testing.assert_close(part["advantages"], expected[index][:, :width])
    values = torch.cat([part["advantages"][part["mask"]] for part in joint])
    assert abs(float(values.mean())) < 1e-6 and float(values.std()) == pytest.approx(1, abs=1e-5)


def test_item_19_the_value_loss_is_clipped():
    model = both()
    rows = scored(model)
    rows |= {"values": rows["values"] - 1.0 * rows["mask"], "returns": rows["values"] + 0.5 * rows["mask"]}
    losses = [ppo_loss(model, rows, changed("critic", clip=clip))[2] for clip in (0.2, None)]
    assert losses[0]["value_loss"] > losses[1]["value_loss"] and losses[0]["value_clip_fraction"] > 0
    with torch.no_grad():
        values = model.judge(rows, View()).values_BT
    assert losses[0]["value_loss"] == pytest.approx(
        float(value_loss(values, rows["values"], rows["returns"], rows["mask"], clip=0.2)[0]), rel=1e-5
    )


def test_item_20_the_kl_coefficient_moves_towards_its_target():
    config, state = KlConfig(coef=0.15, target=6.0, horizon=10_000), RewardState(0.15)
    state.adapt(60.0, 512, config)
    assert state.kl_coef == pytest.approx(0.15 * (1 + 0.2 * 512 / 10_000))
    state.adapt(5.4, 512, config)
    assert state.kl_coef == pytest.approx(0.15 * (1 + 0.2 * 0.0512) * (1 - 0.1 * 0.0512))
    fixed = RewardState(0.15)
    fixed.adapt(60.0, 512, KlConfig(coef=0.15))
    assert fixed.kl_coef == 0.15
    with pytest.raises(UserError, match="kl.target=-1"):
        changed("kl", target=-1.0)


def test_item_21_tensorflows_epsilon_against_its_own_formula():
    gradients = [torch.randn(32, generator=torch.Generator().manual_seed(step)) * 1e-4 for step in range(3)]
    for tensorflow in (True, False):
        model = noisy_decoder(noise=0.0)
        name = next(name for name, p in model.named_parameters() if p.shape == (41, 32))
        config = OptimizerConfig(name="adamw", lr=0.01, beta1=0.9, beta2=0.999, eps=1e-5, weight_decay=0.0, tensorflow_eps=tensorflow)
        masters = MasterWeights(model, torch.float32)
        optimizer = build_optimizer(masters, config)
        weight = masters.tensors[name][0].clone().double()
        first, second = torch.zeros(32, dtype=torch.float64), torch.zeros(32, dtype=torch.float64)
        for step, gradient in enumerate(gradients, start=1):
            grads = {each: torch.zeros_like(tensor) for each, tensor in masters.tensors.items()}
            grads[name][0] = gradient
            optimizer.step(grads, 1.0, InlineWorker())
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient.double() ** 2
            corrected = math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
            root = second.sqrt() + (1e-5 if tensorflow else 1e-5 * math.sqrt(1 - 0.999**step))
            weight -= 0.01 * corrected * first / root
        torch.testing.assert_close(masters.tensors[name][0].double(), weight, atol=1e-6, rtol=1e-5)


def test_the_critic_may_share_the_policys_trunk():
    shared, separate = both(trunk="shared"), both()
    assert shared.critic is None and shared.critic_names() == ["value_head.weight"]
    assert all(name.startswith("critic.") for name in separate.critic_names())
    for model, reaches in ((shared, True), (separate, False)):
        rows = scored(model)
        values = model.judge(rows, View()).values_BT
        torch.testing.assert_close(values.detach(), model.values(rows, View())[0].detach())
        gradient = torch.autograd.grad(values.sum(), model.policy.embed.weight, allow_unused=True)[0]
        assert (gradient is not None) == reaches
    start = RewardModel.from_decoder(noisy_decoder(dataclasses.replace(GROUPED, vocab_size=50)), torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match="critic.start has 50 token ids and the policy 41"):
        both(start=start)
    with pytest.raises(UserError, match="critic.start=x is for a trunk of its own"):
        dataclasses.replace(PpoConfig(), critic=CriticConfig(trunk="shared", start="x"))


def test_the_gradient_is_the_same_however_an_update_is_split():
    """huggingface/trl#2175: denominators of accumulated gradients."""
    model = both()
    rows = scored(model)

    def gradient(parts):
        found = [ppo_loss(model, take_rows(rows, torch.tensor(part)), PpoConfig()) for part in parts]
        total, count = sum(loss for loss, _, _ in found), sum(count for _, count, _ in found)
        return torch.autograd.grad(total / count, [model.policy.embed.weight, model.critic.score.weight])

    for one, other in zip(gradient([list(range(6))]), gradient([[3], [0, 5], [1, 2, 4]])):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="epochs=0 must be at least 1"):
        dataclasses.replace(PpoConfig(), epochs=0)
    with pytest.raises(UserError, match="does not fit the value loss"):
        dataclasses.replace(PpoConfig(), policy=PolicyLoss(aggregation="sequence_mean"))
    with pytest.raises(UserError, match="dropout=1"):
        dataclasses.replace(PpoConfig(), dropout=1.0)
    with pytest.raises(UserError, match="advantage.lam=2"):
        changed("advantage", lam=2)
    assert PromptConfig().padding == "right"
