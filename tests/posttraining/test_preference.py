"""DPO: the published loss, the masks, and the reference that is computed once."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from cut_short import killed_at
from plinth.cli.main import main
from plinth.config import UserError
from plinth.models.hub import load_model, save_model
from plinth.posttraining import preference_rows
from plinth.posttraining.examples import Conversation
from plinth.posttraining.formats import read_examples
from plinth.posttraining.inspection import inspect_data
from plinth.posttraining.pair_scores import Pairs, down_sampled
from plinth.posttraining.pairs import render_pairs, share_sides
from plinth.posttraining.preference import train_dpo
from plinth.posttraining.preference_config import REFERENCE_FREE, DpoConfig
from plinth.posttraining.preference_losses import cdpo, preference_loss
from plinth.posttraining.preference_objective import in_answer_order, pairs_log_probs, pairs_loss, reference_pairs_log_probs
from plinth.posttraining.preference_rows import PairedRows
from plinth.posttraining.sft import render_examples, train_sft
from plinth.posttraining.sft_config import SftConfig
from plinth.run import Run
from plinth.training.loop import TrainConfig
from plinth.training.optim import OptimizerConfig
from small_models import SUBJECTS, plain_decoder, subjects_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return subjects_tokenizer()


@pytest.fixture
def model_dir(tmp_path, tokenizer):
    save_model(plain_decoder(tokenizer.vocab_size), tokenizer, tmp_path / "model")
    return tmp_path / "model"


def write_lines(path, records):
    path.write_text("".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records))
    return path


def conversation(name):
    return {"messages": [{"role": "user", "content": f"What does {name} do?"}, {"role": "assistant", "content": f"It does {name}."}]}


def pair(name, other):
    return {"prompt": [{"role": "user", "content": f"What does {name} do?"}], "chosen": f"It does {name}.", "rejected": f"It does {other}."}


def rendered_pairs(tokenizer, path, records):
    pairs, left_out = render_pairs(tokenizer, read_examples(write_lines(path, records), "preference"), 64)
    assert not left_out
    return pairs


def sides(pairs):
    return share_sides([(pair.chosen, pair.rejected) for pair in pairs], pad_id=1)


def quick(steps, **optimizer):
    return TrainConfig(
        steps=steps, warmup_steps=2, dtype="float32", num_threads=2, optimizer=OptimizerConfig(**{"lr": 0.01, "muon_lr": 0.02, **optimizer})
    )


def test_dpo_loss_worked_by_hand():
    chosen, rejected, ref_chosen, ref_rejected = (torch.tensor([x], dtype=torch.float64) for x in (-10.0, -12.0, -11.0, -11.5))
    loss, count, metrics = preference_loss("sigmoid", Pairs(chosen, rejected, ref_chosen, ref_rejected), beta=0.5)
    margin = 0.5 * ((-10 + 11) - (-12 + 11.5))
    assert count == 1 and metrics == {"accuracy": 1.0, "margin": margin}
    assert math.isclose(loss.item(), -math.log(1 / (1 + math.exp(-margin))), rel_tol=1e-12)
    with pytest.raises(ValueError, match="shapes differ"):
        Pairs(chosen, rejected, ref_chosen, torch.zeros(2))


def test_dpo_gradient_equals_finite_differences():
    inputs = [torch.randn(4, dtype=torch.float64, requires_grad=i < 2) for i in range(4)]
    assert torch.autograd.gradcheck(lambda *x: preference_loss("sigmoid", Pairs(*x), beta=0.3)[0], inputs)


def test_sequence_log_probs_count_the_answer_only(tmp_path, tokenizer, model_dir):
    pairs = rendered_pairs(tokenizer, tmp_path / "pairs.jsonl", [pair("copy", "seek"), pair("open", "move")])
    model = load_model(model_dir)
    log_probs = pairs_log_probs(model, sides(pairs))
    for row, rendered in enumerate([pairs[0].chosen, pairs[0].rejected, pairs[1].chosen, pairs[1].rejected]):
        ids = torch.tensor(rendered.tokens)
        table = model.logits(model(ids[None]))[0].log_softmax(-1)
        expected = sum(table[i - 1, ids[i]] for i in range(1, len(ids)) if rendered.loss_mask[i])
        torch.testing.assert_close(log_probs.flatten()[row], expected, rtol=1e-4, atol=1e-4)
        answer = tokenizer.decode([t for t, counted in zip(rendered.tokens, rendered.loss_mask) if counted])
        assert answer.startswith("It does")


def test_dpo_moves_preferences_and_computes_the_reference_once(tmp_path, tokenizer, model_dir):
    records = [pair(name, other) for name, other in zip(SUBJECTS, SUBJECTS[1:] + SUBJECTS[:1])]
    file = write_lines(tmp_path / "pairs.jsonl", records)
    config = DpoConfig(train=quick(12), pairs_per_step=8, micro_batch_size=4, chosen_nll_coef=0.0)
    run = train_dpo(tmp_path / "dpo", model_dir, file, config)
    metrics = run.metrics()
    assert abs(metrics[0]["margin"]) < 1e-3 and metrics[0]["loss_nats"] == pytest.approx(math.log(2), abs=1e-3)
    assert metrics[-1]["accuracy"] == 1.0 and metrics[-1]["margin"] > 0.5
    assert (run.path / "reference_log_probs.npy").exists()
    assert run.summary["pairs"] == 8 and run.summary["steps"] == 12


@pytest.mark.parametrize("name", ["ipo", "simpo"])
def test_another_loss_trains_too_and_computes_a_reference_only_if_it_reads_one(tmp_path, tokenizer, model_dir, name):
    records = [pair(subject, other) for subject, other in zip(SUBJECTS, SUBJECTS[1:] + SUBJECTS[:1])]
    file = write_lines(tmp_path / "pairs.jsonl", records)
    run = train_dpo(tmp_path / "out", model_dir, file, DpoConfig(train=quick(8), loss=name, pairs_per_step=8, micro_batch_size=4))
    metrics = run.metrics()
    assert metrics[-1]["loss_nats"] < metrics[0]["loss_nats"] and metrics[-1]["accuracy"] >= metrics[0]["accuracy"]
    assert (run.path / "reference_log_probs.npy").exists() == (name not in REFERENCE_FREE) == ("chosen_fell" in metrics[-1])


def test_metrics_show_lengths_and_whether_the_chosen_answer_fell(tmp_path, tokenizer, model_dir):
    pairs = rendered_pairs(tokenizer, tmp_path / "pairs.jsonl", [pair("copy", "seek and tell"), pair("open", "move")])
    model = load_model(model_dir)
    with torch.no_grad():
        own = pairs_log_probs(model, sides(pairs))
        _, count, metrics = pairs_loss(model, (*sides(pairs), own + torch.tensor([[1.0, 0.0], [-1.0, 0.0]])), DpoConfig())
    assert count == 2 and metrics["chosen_fell"] == 1.0
    assert metrics["chosen_tokens"] == sum(sum(p.chosen.loss_mask) for p in pairs) < metrics["rejected_tokens"]


def test_soft_labels_are_learnt_by_cdpo_and_named_where_they_are_not(tmp_path, tokenizer, model_dir):
    records = [pair("copy", "seek") | {"probability": 0.5}, pair("open", "move") | {"probability": 0.5}]
    file, told = write_lines(tmp_path / "pairs.jsonl", records), []
    config = DpoConfig(train=quick(3), loss="cdpo", pairs_per_step=2, micro_batch_size=1)
    run = train_dpo(tmp_path / "even", model_dir, file, config, warn=told.append)
    assert not told and all(abs(line["grad_norm"]) < 1e-6 for line in run.metrics()[:1])  # an even pair pulls nowhere
    hard = train_dpo(tmp_path / "hard", model_dir, file, dataclasses.replace(config, loss="sigmoid"), warn=told.append)
    assert hard.metrics()[0]["grad_norm"] > 1e-3 and "the probabilities of 2 pairs are not read; --loss cdpo" in told[0]
    margin, epsilon = torch.tensor([2.0, -1.0]), torch.tensor([0.3, 0.0])
    values = cdpo(Pairs(margin, torch.zeros(2), torch.zeros(2), torch.zeros(2)), beta=1.0, epsilon=epsilon)
    expected = [-0.7 * math.log(1 / (1 + math.exp(-2))) - 0.3 * math.log(1 / (1 + math.exp(2))), -math.log(1 / (1 + math.exp(1)))]
    torch.testing.assert_close(values, torch.tensor(expected))


SPLITS = [
    {"loss": "sigmoid"},
    {"loss": "ipo", "divergence": "js"},
    {"loss": "orpo"},
    {"loss": "sigmoid=0.8,bco_pair=0.2,sft", "tail_weight": 0.3, "weigh_by_policy": True},
]


@pytest.mark.parametrize("options", SPLITS)
def test_any_split_of_a_step_of_pairs_gives_the_same_loss_and_gradient(tmp_path, tokenizer, model_dir, options):
    """The class of complaint of trl#2175 and trl#2604: a step is divided once, by its pairs, however it is accumulated and padded."""
    records = [pair(a, b + " and more" * i) for i, (a, b) in enumerate(zip(SUBJECTS[:5], SUBJECTS[1:]))]
    pairs = rendered_pairs(tokenizer, tmp_path / "pairs.jsonl", records)
    model, config, reference = load_model(model_dir), DpoConfig(**options), torch.linspace(-60, -40, 10).view(5, 2)
    found = []
    for split in ([[0, 1, 2, 3, 4]], [[4], [0, 2], [1, 3]]):
        parts = [pairs_loss(model, (*sides([pairs[i] for i in part]), reference[part]), config) for part in split]
        total, count = sum(part[0] for part in parts), sum(part[1] for part in parts)
        found.append((total / count, torch.autograd.grad(total / count, list(model.parameters()))))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    for one, other in zip(found[0][1], found[1][1]):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def separate_rows(model, pairs):
    """Return of each answer the log-probabilities of its counted tokens and the log of the sum of squares there, in float64."""
    found = []
    for each in (side for pair in pairs for side in (pair.chosen, pair.rejected)):
        ids, counted = torch.tensor(each.tokens), torch.tensor(each.loss_mask)[1:]
        table = model.logits(model(ids[None]))[0].double().log_softmax(-1)[:-1]
        found.append((table.gather(1, ids[1:, None])[:, 0][counted], (2 * table).logsumexp(-1)[counted]))
    return found


def test_the_tail_and_the_policy_weigh_as_the_equations_say(tmp_path, tokenizer, model_dir):
    """LD-DPO and WPO on the shared rows against a loop over separate ones: the loss, the weights, and the gradient."""
    pairs = rendered_pairs(tokenizer, tmp_path / "pairs.jsonl", [pair("copy", "seek and tell"), pair("open and close", "move")])
    model, alpha, beta = load_model(model_dir), 0.3, 0.4
    config = DpoConfig(beta=beta, tail_weight=alpha, weigh_by_policy=True, chosen_nll_coef=0.0)
    with torch.no_grad():
        model.output_weight.mul_(10)  # sure of itself, so that the weights are not all 1
        reference = reference_pairs_log_probs(model, sides(pairs), config) + torch.tensor([[2.0, 0.0], [-1.0, 0.5]])
    total, count, metrics = pairs_loss(model, (*sides(pairs), reference), config)
    expected, weights, rows = 0.0, [], separate_rows(model, pairs)
    for b in range(2):
        sums, means = [], []
        shorter = min(len(rows[2 * b][0]), len(rows[2 * b + 1][0]))
        for r in range(2):
            log_probs, squares = rows[2 * b + r]
            sums.append(log_probs[:shorter].sum() + alpha * log_probs[shorter:].sum())
            means.append((log_probs - squares).mean())
        weights.append(float(torch.exp(means[0] + means[1]).detach().clamp(max=1)))
        margin = beta * ((sums[0] - reference[b, 0]) - (sums[1] - reference[b, 1]))
        expected = expected - weights[-1] * torch.nn.functional.logsigmoid(margin)
    assert count == 2 and metrics["weight"] == pytest.approx(sum(weights), rel=1e-4) and 0 < metrics["weight"] < 2
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    parameters = list(model.parameters())
    for one, other in zip(torch.autograd.grad(total, parameters), torch.autograd.grad(expected, parameters)):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-5)


def test_of_the_longer_answer_as_many_tokens_are_read_as_the_shorter_has(tmp_path, tokenizer, model_dir):
    """SamPO on the shared rows against a loop over separate ones, the reference cached as training keeps it."""
    records = [pair("copy", "seek and tell"), pair("open and close it all", "move"), pair("read", "write")]
    pairs = rendered_pairs(tokenizer, tmp_path / "pairs.jsonl", records)
    model, other, config = load_model(model_dir), noisy(load_model(model_dir)), DpoConfig(beta=0.4, down_sample=True)
    rows, part = PairedRows(pairs, config, 0), np.arange(3)
    with torch.no_grad():
        reference = rows.score(other, rows.reference_batch(part)).numpy()
    assert reference.shape == (3, rows.sides)
    policy_tokens, reference_tokens = ([found[0].detach() for found in separate_rows(each, pairs)] for each in (model, other))
    drawn = set()
    for step in range(3):
        batch = rows.batches([part], reference, model, step)[0]
        total, count, metrics = pairs_loss(model, batch, config)
        expected = 0.0
        for b, lengths in enumerate(rows.answers):
            shorter, ratios = min(lengths), []
            for r, length in enumerate(lengths):
                kept = batch[-1][b, r].nonzero()[:, 0]
                assert len(kept) == shorter and int(kept.max()) < length
                ratios.append((policy_tokens[2 * b + r] - reference_tokens[2 * b + r])[kept].sum())
            expected += float(-torch.nn.functional.logsigmoid(0.4 * (ratios[0] - ratios[1])) - 0.2 * policy_tokens[2 * b].sum())
        assert count == 3 and float(total.detach()) == pytest.approx(expected, rel=1e-6)
        assert metrics["chosen_tokens"] == sum(chosen for chosen, _ in rows.answers)
        again = rows.batches([part[::-1], part[:1]], reference, model, step)  # of a pair, whatever stands beside it
        assert torch.equal(again[0][-1].flip(0), batch[-1]) and torch.equal(again[1][-1][0, 1], batch[-1][0, 1, : again[1][-1].shape[2]])
        drawn.add(tuple(batch[-1].flatten().tolist()))
    assert len(drawn) == 3


def test_the_down_sampled_loss_in_closed_form():
    """−log σ(β Σ_(t in K) (ρ(chosen, t) − ρ(rejected, t))), in float64, answers standing anywhere in rows of other tokens."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = -torch.rand(2, 4, 2, 30, generator=generator, dtype=torch.float64) * 5
    counted = torch.rand(4, 2, 30, generator=generator) < 0.5
    lengths = counted.sum(2).tolist()
    kept = down_sampled(lengths, [(7, 3, i) for i in range(4)])
    assert torch.equal(kept, down_sampled(lengths, [(7, 3, i) for i in range(4)])) and not torch.equal(
        kept, down_sampled(lengths, [(7, 4, i) for i in range(4)])
    )
    read = [(in_answer_order(each * counted, counted.double(), kept.shape[2]) * kept).sum(2).unbind(1) for each in (policy, reference)]
    found = preference_loss("sigmoid", Pairs(*read[0], *read[1]), beta=0.3)[0]
    expected = 0.0
    for b in range(4):
        margin = 0.0
        for r, sign in ((0, 1), (1, -1)):
            places = [t for t in range(30) if counted[b, r, t]]
            chosen = [t for rank, t in enumerate(places) if kept[b, r, rank]]
            assert len(chosen) == min(lengths[b])
            margin += sign * sum(float(policy[b, r, t] - reference[b, r, t]) for t in chosen)
        expected += math.log1p(math.exp(-0.3 * margin))
    assert float(found) == pytest.approx(expected, abs=1e-9)


def noisy(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3), dtype=parameter.dtype))
    return model


def test_a_mix_logs_each_of_its_losses(tmp_path, tokenizer, model_dir):
    pairs = rendered_pairs(tokenizer, tmp_path / "pairs.jsonl", [pair("copy", "seek and tell"), pair("open", "move")])
    model, batch = load_model(model_dir), (*sides(pairs), torch.tensor([[-50.0, -60.0], [-55.0, -52.0]]))
    weights = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}
    total, _, metrics = pairs_loss(model, batch, DpoConfig(loss="sigmoid=0.8,bco_pair=0.2,sft", beta=0.3))
    alone = {name: {"loss": name, "chosen_nll_coef": 0.0} | ({} if name == "sft" else {"beta": 0.3}) for name in weights}
    single = {name: pairs_loss(model, batch, DpoConfig(**options)) for name, options in alone.items()}
    assert float(total.detach()) == pytest.approx(sum(weights[name] * float(part[0].detach()) for name, part in single.items()), rel=1e-5)
    assert all(metrics[f"loss_{name}"] == pytest.approx(float(part[0].detach()), rel=1e-5) for name, part in single.items())
    assert metrics["margin"] == pytest.approx(single["sigmoid"][2]["margin"]) and "loss_sigmoid" not in single["sigmoid"][2]


WRONG_OPTIONS = [
    ({"loss": "sigmiod"}, "loss='sigmiod': 'sigmiod' is not one of .* Did you mean sigmoid?"),
    ({"loss": "sigmoid=0,sft"}, "name each loss once, with a positive weight after it, as in sigmoid=0.8"),
    ({"loss": "sigmoid=x,sft"}, "name each loss once"),
    ({"loss": "sft,sft"}, "name each loss once"),
    ({"loss": "sigmoid,kto"}, "kto is of single answers and cannot be mixed"),
    ({"loss": "kto=0.5"}, "cannot be mixed or weighed. Write --loss kto."),
    ({"loss": "sigmoid,sft", "gamma": 1.0}, "gamma=1.0 is not read by the loss sigmoid, sft, which takes beta, divergence"),
    ({"loss": "sft", "beta": 1.0}, "beta=1.0 is not read by the loss sft, which takes none"),
    ({"loss": "apo_zero", "divergence": "js"}, "divergence=js is not read by the loss apo_zero, which takes beta"),
    ({"divergence_alpha": 0.3}, "divergence_alpha=0.3 is for --divergence alpha"),
    ({"divergence": "alpha", "divergence_alpha": 1.0}, "at 1 that is reverse_kl"),
    ({"tail_weight": 1.5}, "tail_weight=1.5 must lie between 0"),
    ({"loss": "kto", "tail_weight": 0.5}, "tail_weight=0.5 is for losses of pairs"),
    ({"loss": "aot", "weigh_by_policy": True}, "aot sorts them apart"),
    ({"loss": "bco", "down_sample": True}, "down_sample=True is for losses of pairs"),
    ({"down_sample": True, "length_penalty": 0.1}, "length_penalty=0.1 is about answers of unequal length"),
    ({"length_penalty": -0.1}, "length_penalty=-0.1 must be 0 or more"),
    ({"loss": "ipo", "length_penalty": 0.1}, "length_penalty=0.1 is not read by the loss ipo"),
]


@pytest.mark.parametrize(("options", "text"), WRONG_OPTIONS)
def test_options_of_the_command_line_are_checked_before_anything_is_read(options, text):
    with pytest.raises(UserError, match=text):
        DpoConfig(**options)


def test_cpo_reads_the_weight_of_its_own_likelihood():
    config = DpoConfig(loss="cpo", chosen_nll_coef=0.25)
    assert (config.nll_coef, config.options_of("cpo")) == (0.0, {"nll_coef": 0.25})


RESUMED = {
    "a weighed mix": ["--loss", "sigmoid=0.8,bco_pair=0.2,sft", "--divergence", "js", "--tail-weight", "0.5", "--weigh-by-policy"],
    "down-sampled": ["--down-sample", "--loss", "sigmoid=0.8,bco_pair=0.2,sft", "--weigh-by-policy"],
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, tokenizer, model_dir, name):
    """From the command line, and stopped in its midst: the metrics of every step and the weights are the same to the bit."""
    file = write_lines(tmp_path / "pairs.jsonl", [pair(a, b + " too" * (i % 3)) for i, (a, b) in enumerate(zip(SUBJECTS, SUBJECTS[1:]))])
    words = f"prefer {tmp_path} --data {file} --pairs-per-step 4 --micro-batch-size 2 --train.steps 6 --train.num-threads 2".split()
    words += ["--held-out", str(file), "--held-out-every", "1", "--train.checkpoint-every-s", "0", *RESUMED[name]]
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    with killed_at(27, preference_rows, "share_sides"):  # behind the reference's 7 or so, and 6 an update
        main([*words, "--out", str(tmp_path / "cut")])
    assert main([*words, "--out", str(tmp_path / "cut"), "--resume"]) == 0
    names = ("step", "loss_nats", "loss_sigmoid", "loss_bco_pair", "loss_sft", "weight", "margin", "chosen_ratio", "grad_norm")
    names = (*names, "held_out_loss_nats", "held_out_margin")
    found = [[[line.get(name) for name in names] for line in Run.open(tmp_path / run).metrics()] for run in ("whole", "cut")]
    assert len(found[0]) == 6 and found[0] == found[1]
    models = [load_model(tmp_path / run / "model") for run in ("whole", "cut")]
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models)))


def test_cross_entropy_is_added_to_dpo_alone_unless_asked():
    assert (DpoConfig().nll_coef, DpoConfig(loss="simpo").nll_coef, DpoConfig(loss="simpo", chosen_nll_coef=0.5).nll_coef) == (0.2, 0, 0.5)
    with pytest.raises(UserError, match="gamma=1.0 is not read by the loss sigmoid"):
        DpoConfig(gamma=1.0)
    with pytest.raises(UserError, match="loss='dpo': 'dpo' is not one of sigmoid"):
        DpoConfig(loss="dpo")


def test_bad_pairs_are_counted_and_good_ones_kept(tmp_path, tokenizer, model_dir):
    lines = [pair("copy", "move"), "{broken", {"prompt": "x", "chosen": "y"}, {"prompt": "x", "chosen": 3, "rejected": "z"}]
    lines += [pair("seek", "seek"), pair("open", "x" * 300)]
    told, file = [], write_lines(tmp_path / "pairs.jsonl", lines)
    run = train_dpo(tmp_path / "out", model_dir, file, DpoConfig(train=quick(1), pairs_per_step=2, micro_batch_size=1), warn=told.append)
    counts = ("pairs", "rejected_rows", "too_long_rows", "unusable_rows")
    assert [run.summary[name] for name in counts] == [1, 3, 1, 1]
    assert "3 rejected (row 2: not JSON" in told[0] and "row 3: " in told[0]
    assert "2 left out, 1 used (row 5: chosen and rejected are the same; row 6: rejected has" in told[1]
    with pytest.raises(UserError, match="holds no preference row that can be read: row 1"):
        train_dpo(tmp_path / "bad", model_dir, write_lines(tmp_path / "bad.jsonl", ["{"]), DpoConfig())
    with pytest.raises(UserError, match="holds no preference row that can be learnt: row 1"):
        train_dpo(tmp_path / "bad", model_dir, write_lines(tmp_path / "bad.jsonl", [pair("seek", "seek")]), DpoConfig())


def test_rankings_and_transcripts_are_read_as_pairs_and_said(tmp_path, tokenizer, model_dir):
    """The classes of complaint of trl#2541 and of hh-rlhf's pairs whose prompts differ: what was read, and what not, has row numbers."""
    ask = "\n\nHuman: What does copy do?\n\nAssistant:"
    records = [
        {"prompt": "What does copy do?", "completions": ["It does copy.", "It does read.", "It does seek."], "ranks": [1, 2, 2]},
        {"chosen": f"{ask} It does copy.", "rejected": f"{ask} It does move."},
        {"chosen": f"{ask} It does copy.", "rejected": "\n\nHuman: Other?\n\nAssistant: It does move."},
    ]
    told, file = [], write_lines(tmp_path / "mixed.jsonl", records)
    run = train_dpo(tmp_path / "out", model_dir, file, DpoConfig(train=quick(1), pairs_per_step=4, micro_batch_size=2), warn=told.append)
    assert "read as preference: ranking (1 row), hh-rlhf transcripts (1 row); 3 rows used" in told[0]
    assert "1 rejected (row 3" in told[0] and run.summary["pairs"] == 3


def test_sft_learns_its_answers_and_says_what_it_left_out(tmp_path, tokenizer, model_dir):
    file = write_lines(tmp_path / "sft.jsonl", [conversation(name) for name in SUBJECTS] + ["{broken", {"messages": [{"role": "user"}]}])
    told = []
    config = SftConfig(train=quick(60), conversations_per_step=8, micro_batch_size=4)
    run = train_sft(tmp_path / "sft", model_dir, file, config, warn=told.append)
    assert "2 rejected" in told[0] and "row 9" in told[0]
    assert run.summary["conversations"] == 8 and run.summary["rejected_rows"] == 2
    assert run.metrics()[-1]["loss_nats"] < 0.2 < run.metrics()[0]["loss_nats"]
    examples, too_long = render_examples(tokenizer, [Conversation(**conversation(name)) for name in SUBJECTS], 64)
    assert run.metrics()[0]["tokens"] == sum(sum(e.loss_mask) for e in examples) and too_long is None
    ids = torch.tensor(examples[0].tokens)
    model = load_model(run.model_dir)
    predicted = model.logits(model(ids[None]))[0].argmax(-1)
    counted = torch.tensor(examples[0].loss_mask)[1:]
    assert torch.equal(predicted[:-1][counted], ids[1:][counted])


def test_sft_reads_other_formats_says_so_and_counts_what_inspect_shows(tmp_path, tokenizer, model_dir):
    """The classes of complaint of trl#3781 and trl#2175: what is shown as learnt is what the loss counts, and divides by."""
    told, turns = [], [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Old.", "weight": 0}]
    records = [
        {"instruction": "What does copy do?", "output": "It does copy."},
        {"messages": [*turns, {"role": "user", "content": "And move?"}, {"role": "assistant", "content": "It does move."}]},
        {"prompt": "What does read do?", "chosen": "It does read.", "rejected": "It does write."},
    ]
    file = write_lines(tmp_path / "mixed.jsonl", records)
    config = SftConfig(train=quick(1), conversations_per_step=4, micro_batch_size=2)
    run = train_sft(tmp_path / "mixed", model_dir, file, config, warn=told.append)
    assert "read as messages: Alpaca (1 row), messages (1 row), preference (1 row); 3 rows used" in told[0]
    shown = inspect_data(file, tokenizer, kind="messages")
    assert run.metrics()[0]["tokens"] == shown.learnt and run.summary["conversations"] == 3
    assert run.summary["supervised_share"] == pytest.approx(shown.learnt / shown.tokens)


def test_sft_refuses_a_conversation_that_does_not_fit(tokenizer):
    with pytest.raises(UserError, match="1 row of more than max_seq_len=4 tokens .row 1; their lengths: 50% .*: none is left"):
        render_examples(tokenizer, [Conversation(**conversation("copy"))], 4)


def test_sft_resumes_to_the_same_weights(tmp_path, tokenizer, model_dir):
    file = write_lines(tmp_path / "sft.jsonl", [conversation(name) for name in SUBJECTS])
    train = TrainConfig(steps=6, warmup_steps=2, dtype="bfloat16", num_threads=2, checkpoint_every_s=0.0)
    config = SftConfig(train=train, conversations_per_step=4, micro_batch_size=2)
    whole = load_model(train_sft(tmp_path / "whole", model_dir, file, config).model_dir)

    from plinth.posttraining import sft

    with killed_at(7, sft, "pad_rows"):
        train_sft(tmp_path / "cut", model_dir, file, config)
    resumed = load_model(train_sft(tmp_path / "cut", model_dir, file, config, resume=True).model_dir)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))
