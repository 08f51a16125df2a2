"""Finetuning's other objectives: dynamic finetuning against its formula, the noise of NEFTune, and both from the command line."""

import json
import math

import pytest
import torch

from cut_short import killed_at
from plinth.cli.main import main
from plinth.config import UserError
from plinth.models.config import DecoderConfig
from plinth.models.hub import load_model, save_model
from plinth.models.transformer import Transformer
from plinth.ops import loss as ops_loss
from plinth.posttraining import sft
from plinth.posttraining.batches import pack_rows, pad_rows
from plinth.posttraining.embedding_noise import noise_scales, noisy_embeddings, noisy_lm_loss
from plinth.posttraining.sft_config import SftConfig
from plinth.run import Run
from plinth.tokenizer.chat import Rendered
from plinth.tokenizer.train import train_tokenizer
from plinth.training.objectives import causal_lm_loss

SHAPE = DecoderConfig(
    vocab_size=64, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16, intermediate_size=48, max_seq_len=64
)
EXAMPLES = [
    Rendered([(7 * i + j) % 61 + 3 for j in range(6 + 5 * i)], [False, False, *[(i + j) % 3 > 0 for j in range(4 + 5 * i)]])
    for i in range(4)
]


def sharp_model(shape=SHAPE):
    """A model whose probabilities differ."""
    model = Transformer(shape).init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.output_weight.mul_(20)
    return model


def padded(examples=EXAMPLES):
    return pad_rows([each.tokens for each in examples], [each.loss_mask for each in examples], 0)


@pytest.mark.parametrize("batch", [padded(), pack_rows([EXAMPLES[:2], EXAMPLES[2:]], 0)], ids=["padded", "packed"])
@pytest.mark.parametrize("cap", [None, 6.0])
def test_dft_is_its_formula_in_float64(batch, cap, monkeypatch):
    """Loss and gradient of the head and of what is below it, by chunks of one step of rows and all logits in float64."""
    monkeypatch.setattr(ops_loss, "CHUNK_ELEMENTS", 1)
    model = sharp_model(DecoderConfig(**{**SHAPE.__dict__, "logit_softcap": cap}))
    total, count, metrics = causal_lm_loss(model, batch, dynamic=True)
    hidden = model(batch[0], *batch[2:]).flatten(0, 1)
    logits = hidden.double() @ model.output_weight.double().t()
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    targets = batch[1].flatten()
    found = logits.log_softmax(-1).gather(1, targets.clamp_min(0)[:, None])[:, 0][targets >= 0]
    expected = -(found.detach().exp() * found).sum()
    assert count == len(found) and float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert float(metrics["nll_nats"]) == pytest.approx(-float(found.detach().sum()), rel=1e-5)
    parameters = list(model.parameters())
    grads = [torch.autograd.grad(value, parameters, retain_graph=True) for value in (total, expected)]
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_any_split_of_a_step_gives_the_same_dynamic_loss():
    model = sharp_model()
    whole = causal_lm_loss(model, padded(), dynamic=True)
    parts = [causal_lm_loss(model, padded([EXAMPLES[i] for i in part]), dynamic=True) for part in ([3], [0, 2], [1])]
    assert whole[1] == sum(part[1] for part in parts)
    assert float(whole[0].detach()) == pytest.approx(sum(float(part[0].detach()) for part in parts), rel=1e-5)


def test_noise_is_as_wide_as_the_conversation_says_and_belongs_to_the_batch():
    rows = [[EXAMPLES[0], EXAMPLES[1]], [EXAMPLES[3]]]
    scales = noise_scales(rows, 5.0, 32)
    assert scales.shape == pack_rows(rows, 0)[0].shape
    lengths = [len(each.tokens) - 1 for each in EXAMPLES]
    assert scales[0, 0] == pytest.approx(5 / math.sqrt(lengths[0] * 32)) and scales[0, lengths[0]] == pytest.approx(
        5 / math.sqrt(lengths[1] * 32)
    )
    assert scales[0, lengths[0] + lengths[1] :].abs().sum() == 0 == scales[1, lengths[3] :].abs().sum()
    seeds = torch.full((2,), 7)
    first, again, other = (noisy_embeddings(torch.zeros(*scales.shape, 32), scales, each) for each in (seeds, seeds, seeds + 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    share = first[scales > 0] / scales[scales > 0][:, None]
    assert -1 <= share.min() < -0.9 and 0.9 < share.max() <= 1 and abs(float(share.mean())) < 0.1
    assert first[scales == 0].abs().max() == 0


def test_noise_reaches_the_loss_alone_and_none_leaves_it_as_it_was():
    model, batch = sharp_model(), padded()
    plain = float(causal_lm_loss(model, batch)[0].detach())
    scales, seeds = noise_scales([[each] for each in EXAMPLES], 10.0, 32), torch.full((4,), 3)
    noisy = noisy_lm_loss(model, (*batch, scales, seeds))
    assert abs(float(noisy[0].detach()) - plain) > 1e-3
    silent = noisy_lm_loss(model, (*batch, 0 * scales, seeds))
    assert float(silent[0].detach()) == plain
    grads = torch.autograd.grad(noisy[0], model.embed.weight)[0]
    assert torch.isfinite(grads).all() and grads.abs().sum() > 0


def test_wrong_values_are_said():
    with pytest.raises(UserError, match="embedding_noise=-1 must be 0"):
        SftConfig(embedding_noise=-1)


@pytest.mark.parametrize("words", [["--loss", "dft", "--embedding-noise", "5"], ["--loss", "dft", "--unpadded", "--embedding-noise", "5"]])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, words):
    tokenizer = train_tokenizer(["what does it do? it does copy things." * 5], 280)
    model = sharp_model(DecoderConfig(**{**SHAPE.__dict__, "vocab_size": tokenizer.vocab_size}))
    save_model(model, tokenizer, tmp_path / "model")
    rows = [{"prompt": f"what {i}?", "completion": "it does copy" + " things" * (i % 3)} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["sft", str(tmp_path / "model"), "--messages", str(tmp_path / "rows.jsonl"), *words, "--train.steps", "5"]
    words += ["--conversations-per-step", "4", "--micro-batch-size", "2", "--train.num-threads", "2", "--train.checkpoint-every-s", "0"]
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0

    with killed_at(7, sft, "noise_scales"):
        main([*words, "--out", str(tmp_path / "cut")])
    assert main([*words, "--out", str(tmp_path / "cut"), "--resume"]) == 0
    found = [[(line["loss_nats"], line["nll_nats"]) for line in Run.open(tmp_path / run).metrics()] for run in ("whole", "cut")]
    assert len(found[0]) == 5 and found[0] == found[1] and all(dft < plain for dft, plain in found[0])
    models = [load_model(tmp_path / run / "model") for run in ("whole", "cut")]
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models)))
