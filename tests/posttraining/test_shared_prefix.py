"""Answers to one prompt computed together: log-probabilities, loss and gradient are those of the separate sequences."""

import pytest
import torch

from plinth.models.config import DecoderConfig
from plinth.models.transformer import Transformer
from plinth.ops import kernels
from plinth.ops.shared_rows import share_rows
from plinth.posttraining.log_probs import sequence_log_probs, shared_log_probs
from plinth.posttraining.pairs import pad_sides, row_tokens, share_sides, shared_rows_of, shared_tokens
from plinth.tokenizer.chat import Rendered

SHAPE = {
    "vocab_size": 97, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16,
    "intermediate_size": 64, "max_seq_len": 40,
}  # fmt: skip
VARIANTS = {
    "plain": {},
    "grouped": {"num_kv_heads": 1},
    "learnt places": {"position": "learned", "norm": "layer", "learnable_norm": True, "qk_norm": False},
    "window and value embedding": {"sliding_window": 5, "window_layers": (True, False), "value_embeddings": True, "residual_scalars": True},
}


def decoder(**changes):
    model = Transformer(DecoderConfig(**(SHAPE | changes)))
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def examples(sides=2, seed=0):
    """Prompts and answers of several lengths; the first answers of one prompt begin alike, and one prompt is a single token."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count):
        return torch.randint(0, 97, (count,), generator=generator).tolist()

    found = []
    for prompt, answers in ((9, (4, 7, 2)), (1, (6, 3, 5)), (20, (1, 12, 3)), (5, (5, 5, 5))):
        start = draw(prompt)
        texts = [draw(count) for count in answers[:sides]]
        if prompt == 5:
            texts = [texts[0][:3] + text[3:] for text in texts]
        found.append([Rendered(start + text, [False] * prompt + [True] * len(text)) for text in texts])
    return found


@pytest.mark.parametrize("sides", [2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradient_equal_those_of_separate_sequences(variant, sides):
    model, rows = decoder(**VARIANTS[variant]), examples(sides)
    inputs, targets = pad_sides(rows, pad_id=3)
    weights = torch.randn(len(rows), sides, generator=torch.Generator().manual_seed(1))
    separate = sequence_log_probs(model, inputs.flatten(0, 1), targets.flatten(0, 1)).view(-1, sides)
    batch = share_sides(rows, pad_id=3)
    shared = shared_log_probs(model, *batch[:2], shared_rows_of(batch))
    torch.testing.assert_close(shared, separate, rtol=1e-5, atol=1e-5)
    for one, other in zip(
        torch.autograd.grad((separate * weights).sum(), list(model.parameters()), allow_unused=True),
        torch.autograd.grad((shared * weights).sum(), list(model.parameters()), allow_unused=True),
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(kernels.library() is None, reason="our kernels cannot be built here")
def test_our_kernels_give_the_same_bits_together_as_apart():
    model = decoder(hidden_size=64, head_dim=32).to(torch.bfloat16)
    rows = examples()
    inputs, targets = pad_sides(rows, pad_id=3)
    batch = share_sides(rows, pad_id=3)
    with torch.no_grad():
        separate = sequence_log_probs(model, inputs.flatten(0, 1), targets.flatten(0, 1)).view(-1, 2)
        assert torch.equal(shared_log_probs(model, *batch[:2], shared_rows_of(batch)), separate)


def test_a_row_alone_gives_what_it_gives_in_a_batch():
    model, rows = decoder(), examples()
    whole = share_sides(rows, pad_id=3)
    together = shared_log_probs(model, *whole[:2], shared_rows_of(whole))
    for i in range(len(rows)):
        part = tuple(tensor[i : i + 1] for tensor in whole)
        torch.testing.assert_close(shared_log_probs(model, *part[:2], shared_rows_of(part))[0], together[i], rtol=1e-5, atol=1e-5)


def test_what_is_shared_ends_before_the_first_learnt_token_is_predicted():
    one, other = Rendered([7, 8, 9, 1, 2], [False, False, False, True, True]), Rendered([7, 8, 9, 1, 3, 4], [False] * 3 + [True] * 3)
    assert shared_tokens((one, other)) == 2 and row_tokens((one, other)) == 2 + 2 + 3
    assert shared_tokens((one, Rendered([7, 5, 9, 1], [False, False, False, True]))) == 1
    assert shared_tokens((Rendered([1, 2], [True, True]), one)) == 0
    rows, tokens = share_rows([[[7, 8, 9, 1], [7, 8, 9, 1, 3]]], [2], 8, 8)
    assert tokens[0].tolist() == [7, 8, 9, 1, 9, 1, 3, 0] and rows.positions_BL[0].tolist() == [0, 1, 2, 3, 2, 3, 4, 0]
    assert rows.owners_BL[0].tolist()[:7] == [0, 0, 0, 0, 1, 1, 1] and rows.places_BRT[0, 1].tolist() == [0, 1, 4, 5, 6, 7, 7, 7]
