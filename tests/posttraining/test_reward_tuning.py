"""Training of reward models: the loss of rankings, what is held out, cut and said, normalisation, resume."""

import json
import math

import pytest
import torch

from cut_short import killed_at
from plinth.config import UserError
from plinth.models.config import DecoderConfig
from plinth.models.hub import load_model, save_model
from plinth.models.reward import RewardModel
from plinth.models.transformer import Transformer
from plinth.posttraining import reward_tuning
from plinth.posttraining.examples import Preference, Ranking
from plinth.posttraining.reward import load_reward
from plinth.posttraining.reward_data import batch_of, make_choice, read_choices, repeated_prompts, shared_tokens, split_tail
from plinth.posttraining.reward_losses import bradley_terry_loss
from plinth.posttraining.reward_tuning import RewardTuning, reward_loss, train_reward
from plinth.training.loop import TrainConfig
from plinth.training.optim import OptimizerConfig
from small_models import SUBJECTS, plain_decoder, subjects_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return subjects_tokenizer()


@pytest.fixture(scope="module")
def decoder(tokenizer):
    return plain_decoder(tokenizer.vocab_size)


@pytest.fixture
def model_dir(tmp_path, tokenizer, decoder):
    save_model(decoder, tokenizer, tmp_path / "model")
    return tmp_path / "model"


def user(text):
    return [{"role": "user", "content": text}]


def answer(text):
    return [{"role": "assistant", "content": text}]


def ranking(name="copy", ranks=(2, 0, 1, 1)):
    return Ranking(user(f"What does {name} do?"), [answer(f"It does {other}.") for other in SUBJECTS[: len(ranks)]], ranks)


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def pairs(count=24):
    names = [(SUBJECTS[i % 8], SUBJECTS[(i + 1 + i // 8) % 8]) for i in range(count)]
    return [
        {"prompt": f"What does {name} do?", "chosen": f"It does {name}.", "rejected": f"It does {other} things."} for name, other in names
    ]


def quick(steps, **options):
    optimizer = OptimizerConfig(lr=0.005, muon_lr=0.02)
    return TrainConfig(steps=steps, warmup_steps=2, **{"dtype": "float32", "num_threads": 2, "optimizer": optimizer, **options})


def gradients(model, loss):
    return torch.autograd.grad(loss, [parameter for parameter in model.parameters() if parameter.requires_grad])


def test_a_ranking_in_one_element_has_the_gradient_of_its_pairs_with_one_forward_an_answer(tokenizer, decoder):
    model = RewardModel.from_decoder(decoder, torch.Generator().manual_seed(1)).double()
    choices = [make_choice(row, tokenizer) for row in (ranking(), ranking("open", (1, 0)), ranking("seek", (0, 0)))]
    seen = []
    hook = model.trunk.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    loss, count, metrics = reward_loss(model, batch_of(choices, 0), 0.02)
    hook.remove()
    assert seen == [3] and count == 2  # prompts: each answer is read once, and what they begin with once for all
    assert choices[0].together == sum(map(len, choices[0].rows)) - 3 * shared_tokens(choices[0].rows)
    expected = torch.zeros((), dtype=torch.float64)
    for choice, weight in ((choices[0], 1 / 5), (choices[1], 1.0)):
        for a, rank in enumerate(choice.ranks):
            for b, other in enumerate(choice.ranks):
                if rank < other:
                    one, two = (model(torch.tensor([choice.rows[i]]), torch.tensor([len(choice.rows[i])])).double() for i in (a, b))
                    expected = expected + weight * bradley_terry_loss(one, two, center_coef=0.02)[0]
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    for ours, theirs in zip(gradients(model, loss), gradients(model, expected)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_any_split_into_micro_batches_has_the_same_sums(tokenizer, decoder):
    model = RewardModel.from_decoder(decoder, torch.Generator().manual_seed(1))
    choices = [
        make_choice(row, tokenizer) for row in (ranking(), ranking("open", (1, 0)), ranking("seek", (0, 0)), ranking("read", (0, 1, 2)))
    ]
    whole = reward_loss(model, batch_of(choices, 0))
    parts = [reward_loss(model, batch_of(part, 7)) for part in (choices[:1], choices[1:3], choices[3:])]
    assert float(whole[0].detach()) == pytest.approx(sum(float(part[0].detach()) for part in parts), rel=1e-5)
    assert whole[1] == sum(part[1] for part in parts) == 3
    for name in ("accuracy", "margin", "mean_score"):
        assert whole[2][name] == pytest.approx(sum(part[2][name] for part in parts), rel=1e-4, abs=1e-5)


def test_margin_and_soft_label_worked_by_hand(tokenizer):
    chosen, rejected = torch.tensor([2.0, 0.5], dtype=torch.float64), torch.tensor([1.0, 1.5], dtype=torch.float64)
    loss, count, _ = bradley_terry_loss(
        chosen, rejected, margin_B=torch.tensor([0.25, 0.0]), probability_B=torch.tensor([1.0, 0.75]), weight_B=torch.tensor([1.0, 2.0])
    )
    expected = math.log(1 + math.exp(-0.75)) + 2 * (0.75 * math.log(1 + math.exp(1.0)) + 0.25 * math.log(1 + math.exp(-1.0)))
    assert count == 3 and float(loss) == pytest.approx(expected, rel=1e-12)
    row = Preference(user("What?"), answer("A"), answer("B"), margin=0.5, probability=0.8)
    *_, margins, probabilities = batch_of([make_choice(row, tokenizer)], 0)
    assert margins.tolist() == [0.5] and probabilities.tolist() == pytest.approx([0.8])


def test_long_rows_are_cut_at_the_start_or_left_out_and_counted(tmp_path, tokenizer):
    records = [*pairs(2), {"prompt": "What does copy do? " * 9, "chosen": "It does copy.", "rejected": "It does seek."},
               {"prompt": "What?", "chosen": "It does copy. " * 9, "rejected": "No."}]  # fmt: skip
    file = write_lines(tmp_path / "pairs.jsonl", records)
    out, cut = (read_choices(file, tokenizer, 48, how) for how in ("leave_out", "cut_start"))
    assert (len(out.choices), out.too_long, out.cut) == (2, [3, 4], [])
    assert (len(cut.choices), cut.too_long, cut.cut) == (3, [4], [3])
    assert "1 prompts lost their beginning (row 3), 1 left out (row 4)" in cut.describe_left(48)
    whole = read_choices(file, tokenizer, 1000).choices[2]
    assert cut.choices[2].longest == 48 and whole.rows[1][whole.longest - 48 :] == cut.choices[2].rows[1]
    with pytest.raises(UserError, match="no row is left; longer than 3 tokens"):
        read_choices(file, tokenizer, 3)


def test_rows_whose_answers_are_all_the_same_are_left_out_and_counted(tmp_path, tokenizer):
    records = [*pairs(2), {"prompt": "What?", "chosen": "It does copy.", "rejected": "It does copy."}]
    found = read_choices(write_lines(tmp_path / "pairs.jsonl", records), tokenizer, 48)
    assert (len(found.choices), found.alike, found.counts()["unusable_rows"]) == (2, [3], 1)
    assert found.describe_left(48) == "answers all the same: 1 left out (row 3)"
    with pytest.raises(UserError, match="no row is left; answers all the same: 1 left out"):
        read_choices(write_lines(tmp_path / "alike.jsonl", records[2:]), tokenizer, 48)


def test_shared_tokens_and_the_tail():
    assert shared_tokens([[1, 2, 3], [1, 2, 4, 5], [1, 2]]) == 2 and shared_tokens([[1], [1]]) == 1 and shared_tokens([[2], [1]]) == 0
    assert split_tail(list(range(10)), 0.25) == (list(range(8)), [8, 9])


def test_it_learns_says_what_it_did_and_normalises(tmp_path, tokenizer, model_dir):
    file = write_lines(tmp_path / "pairs.jsonl", [*pairs(), {"prompt": "x"}])
    told = []
    config = RewardTuning(train=quick(25), prompts_per_step=12, micro_batch_size=6, held_out_share=0.25, normalise="mean_std")
    run = train_reward(tmp_path / "reward", model_dir, file, config, warn=told.append)
    assert "1 rejected (row 25" in told[0] and "6 of 6 held-out prompts are trained on too" in told[1]
    assert run.summary["prompts"] == 18 and run.summary["held_out_prompts"] == 6 and run.summary["rejected_rows"] == 1
    metrics = run.metrics()
    assert metrics[-1]["accuracy"] == 1.0 > metrics[0]["accuracy"] and metrics[-1]["margin"] > 1
    reward = load_reward(run.path)
    choices = read_choices(file, tokenizer, 64).choices[:18]
    scores = reward.score_tokens([choice.rows[0] for choice in choices])
    assert float(scores.mean()) == pytest.approx(0, abs=1e-4) and float(scores.std(correction=0)) == pytest.approx(1, rel=1e-3)
    assert repeated_prompts(choices[:2], choices) >= 2


def test_before_and_after_normalisation_and_a_file_of_references(tmp_path, tokenizer, model_dir):
    file = write_lines(tmp_path / "pairs.jsonl", pairs(8))
    references = write_lines(tmp_path / "refs.jsonl", [{"messages": user(f"What does {n} do?") + answer("Well.")} for n in SUBJECTS])
    config = RewardTuning(train=quick(1), prompts_per_step=8, held_out_share=0.0, normalise="mean", normalise_before=True)
    run = train_reward(tmp_path / "reward", model_dir, file, config, references=references)
    reward = load_reward(run.path)
    assert sum(reward.score([f"What does {name} do?" for name in SUBJECTS], ["Well."] * 8)) == pytest.approx(0, abs=1e-3)
    plain = train_reward(tmp_path / "plain", run.path, file, RewardTuning(train=quick(1), held_out_share=0.0, normalise="none"))
    assert load_model(plain.model_dir).config.bias == load_model(run.model_dir).config.bias != 0  # goes on with a reward model


def test_learnt_positions_have_no_place_to_spare(tmp_path, tokenizer):
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16, intermediate_size=64,
        max_seq_len=21, position="learned", qk_norm=False,
    )  # fmt: skip
    save_model(Transformer(config).init_weights(torch.Generator().manual_seed(0)), tokenizer, tmp_path / "model")
    file = write_lines(tmp_path / "pairs.jsonl", [pairs(1)[0] | {"prompt": "What does it do? " * 9}, *pairs(5)])
    config = RewardTuning(train=quick(2), too_long="cut_start", held_out_share=0.2)
    run = train_reward(tmp_path / "reward", tmp_path / "model", file, config)
    assert run.summary["cut_rows"] >= 1
    reward = load_reward(run.path)
    longest = list(range(21))
    assert reward.score_tokens([longest]).shape == (1,)


def test_resume_gives_the_same_bits(tmp_path, tokenizer, model_dir):
    file = write_lines(tmp_path / "pairs.jsonl", pairs())
    train = quick(6, dtype="bfloat16", checkpoint_every_s=0.0)
    config = RewardTuning(train=train, prompts_per_step=4, micro_batch_size=2, normalise_before=True)
    whole = load_model(train_reward(tmp_path / "whole", model_dir, file, config).model_dir)

    with killed_at(7, reward_tuning, "batch_of"):
        train_reward(tmp_path / "cut", model_dir, file, config)
    resumed = load_model(train_reward(tmp_path / "cut", model_dir, file, config, resume=True).model_dir)
    assert resumed.config == whole.config
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))


def test_what_is_refused(tmp_path, tokenizer, model_dir):
    for options, text in (
        ({"epochs": 0}, "epochs=0 must be positive"),
        ({"held_out_share": 1.0}, "must lie in"),
        ({"center_coef": -1}, "0 or"),
    ):
        with pytest.raises(UserError, match=text):
            RewardTuning(**options)
    file = write_lines(tmp_path / "sft.jsonl", [{"messages": user("x") + answer("y")}])
    with pytest.raises(UserError, match="holds no preference row"):
        train_reward(tmp_path / "out", model_dir, file, RewardTuning())
    bad = write_lines(tmp_path / "bad.jsonl", [pairs(1)[0] | {"probability": 1.5}])
    with pytest.raises(UserError, match="probability=1.5 does not lie between 0 and 1"):
        train_reward(tmp_path / "out", model_dir, bad, RewardTuning())
