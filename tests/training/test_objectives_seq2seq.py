"""The loss of encoder-decoders: its definition, its smoothing, and that batches may be cut anyhow."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from plinth.models.encoder_decoder import EncoderDecoder
from plinth.models.encoder_decoder_config import EncoderDecoderConfig, forward_flops
from plinth.ops.dropout import step_seeds
from plinth.training.objectives_seq2seq import sequence_to_sequence_loss

SHAPE = {"vocab_size": 50, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "head_dim": 16, "intermediate_size": 48, "max_seq_len": 60}
STYLES = {"transformer": {}, "bias": {"output_bias": True}, "t5": {"style": "t5", "activation": "geglu"}}


@pytest.fixture(params=STYLES)
def model(request):
    model = EncoderDecoder(EncoderDecoderConfig(**SHAPE | STYLES[request.param])).init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor += 0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(tensor.numel()))
    return model


def batch(rows=5, seed=0):
    draw = torch.Generator().manual_seed(seed)
    source = torch.randint(2, 50, (rows, 9), generator=draw)
    mask = torch.arange(9) < torch.randint(1, 10, (rows, 1), generator=draw)
    targets = torch.randint(2, 50, (rows, 7), generator=draw)
    inputs = torch.cat((torch.ones(rows, 1, dtype=torch.int64), targets[:, :-1]), 1)
    targets[torch.arange(7) >= torch.randint(1, 8, (rows, 1), generator=draw)] = -1
    return source, mask, inputs, targets


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_it_is_the_cross_entropy_with_smoothed_labels(model, smoothing):
    source, mask, inputs, targets = batch()
    loss, count, metrics = sequence_to_sequence_loss(model, (source, mask, inputs, targets), smoothing)
    logits = model.logits(model(source, mask, inputs)).flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="sum", label_smoothing=smoothing)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and count == int((targets >= 0).sum())
    ours, theirs = (torch.autograd.grad(each, list(model.parameters())) for each in (loss, expected))
    assert all(torch.allclose(a, b, atol=1e-4 * b.abs().max().item() + 1e-6) for a, b in zip(ours, theirs))
    if smoothing:
        plain = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="sum")
        assert metrics["nll_nats"] == pytest.approx(plain.item(), rel=1e-5)


def test_a_batch_may_be_cut_anyhow(model):
    whole, count, _ = sequence_to_sequence_loss(model, batch(), 0.1)
    parts = [sequence_to_sequence_loss(model, tuple(part[i : i + 1] for part in batch()), 0.1) for i in range(5)]
    assert sum(part[0].item() for part in parts) == pytest.approx(whole.item(), rel=1e-5)
    assert sum(part[1] for part in parts) == count


def test_what_is_dropped_follows_from_the_batch(model):
    first, second = (sequence_to_sequence_loss(model, (*batch(), step_seeds(0, 3, 1, 5)))[0] for _ in range(2))
    other = sequence_to_sequence_loss(model, (*batch(), step_seeds(0, 4, 1, 5)))[0]
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_operations_are_counted_as_pytorch_counts_them(model):
    source, _, inputs, _ = batch()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted, torch.no_grad():
        model.logits(model(source, None, inputs))
    assert counted.get_total_flops() == 5 * forward_flops(model.config, 9, 7)
