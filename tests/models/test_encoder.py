"""The encoder: what it sees, what padding changes (nothing), how many parameters the published sizes have, its attention weights."""

import dataclasses

import pytest
import torch

from plinth.config import UserError
from plinth.models.electra import Electra, generator_config
from plinth.models.encoder import EncoderModel, attention_mask
from plinth.models.encoder_config import EncoderConfig, train_flops_per_token
from plinth.models.meta import on_meta
from plinth.training.compile import compiled_blocks

TINY = EncoderConfig(vocab_size=40, hidden_size=16, num_layers=2, num_heads=4, intermediate_size=24, max_seq_len=12)
BASE = EncoderConfig(vocab_size=30522, hidden_size=768, num_layers=12, num_heads=12, intermediate_size=3072, max_seq_len=512)
SMALL = dataclasses.replace(
    BASE, hidden_size=256, num_heads=4, intermediate_size=1024, embedding_size=128, head="rtd", published_as="electra"
)


def tiny(config: EncoderConfig = TINY, seed: int = 0) -> EncoderModel:
    """Return a model whose every weight is drawn, so that every block does something."""
    model, generator = EncoderModel(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return model


def some_tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(40, shape, generator=torch.Generator().manual_seed(seed))


def test_every_position_sees_left_and_right():
    model, tokens = tiny(), some_tokens(1, 6)
    states = model(tokens)
    for changed in (0, 5):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % 40
        assert ((model(other) - states).abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("head", ["mlm", "classify", "tag", "answer"])
def test_padding_changes_nothing(head):
    model = tiny(TINY.with_head(head, ("a", "b", "c") if head in ("classify", "tag") else ()))
    tokens, width = some_tokens(2, 8), torch.tensor([5, 8])
    mask = torch.arange(8) < width[:, None]
    padded = model.scores(model(tokens, mask))
    alone = model.scores(model(tokens[:1, :5]))
    torch.testing.assert_close(padded[:1] if head == "classify" else padded[:1, :5], alone, atol=1e-5, rtol=1e-5)
    other = tokens.masked_fill(~mask, 7)
    assert torch.equal(model(other, mask)[mask], model(tokens, mask)[mask])


def test_rows_of_a_batch_do_not_know_each_other():
    model, tokens = tiny(), some_tokens(3, 7)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(model(tokens[order]), model(tokens)[order], atol=1e-6, rtol=1e-5)


def test_a_mask_a_position_keeps_texts_apart():
    model, tokens = tiny(), some_tokens(1, 8)
    texts = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    together = model(tokens, texts[:, :, None] == texts[:, None, :], positions_BT=positions)
    torch.testing.assert_close(together[:, 3:], model(tokens[:, 3:]), atol=1e-5, rtol=1e-5)


def test_segments_are_an_embedding_of_their_own():
    model, tokens = tiny(), some_tokens(1, 6)
    assert torch.equal(model(tokens, None, torch.zeros(1, 6, dtype=torch.long)), model(tokens))
    assert (model(tokens, None, torch.ones(1, 6, dtype=torch.long)) - model(tokens)).abs().max() > 1e-3


def test_attention_weights_are_those_that_the_blocks_read_with():
    model, tokens = tiny(), some_tokens(6)
    mask = torch.tensor([1, 1, 1, 1, 0, 0]).bool()
    weights = model.attention_weights(tokens, mask)["self"]
    assert weights.shape == (2, 4, 6, 6) and weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 6))
    assert weights[..., 4:].abs().max() == 0
    block, x = model.encoder.layers[0], model.encoder.embed(tokens[None])
    values = block.attention.project(x)[2]
    read = block.attention.out((weights[:1] @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(read, block.attention(x, mask=attention_mask(mask[None])))


@pytest.mark.parametrize(
    "config, count",
    [
        (BASE, 109_514_298),
        (dataclasses.replace(BASE, head="none", pooler=True), 109_482_240),
        (SMALL, 13_549_057),
        (SMALL.with_head("mlm"), 13_546_682),
        (dataclasses.replace(BASE, head="rtd", published_as="electra"), 109_483_009),
        (generator_config(dataclasses.replace(BASE, published_as="electra"), 1 / 3), 33_740_602),
    ],
)
def test_the_published_sizes_have_as_many_parameters_as_published(config, count):
    """BERT-base with its head and with its pooler; ELECTRA-small and -base, their generators as in the released configurations."""
    assert sum(p.numel() for p in on_meta(lambda: EncoderModel(config)).parameters()) == count


def test_the_formula_of_operations_counts_every_matrix():
    """Against PyTorch's counter, forward: a third of a training step."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    for config in (TINY, dataclasses.replace(TINY, published_as="electra", embedding_size=8, head="rtd")):
        model, tokens = tiny(config), some_tokens(2, 10)
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model.scores(model(tokens))
        assert counter.get_total_flops() == 20 * train_flops_per_token(config, 10) / 3


def test_a_fresh_model_has_no_opinion():
    """Blocks begin as the identity, and a label's head gives every label the same chance."""
    model = EncoderModel(TINY.with_head("tag", ("a", "b"))).init_weights(torch.Generator().manual_seed(0))
    first, *others = model.encoder.states(some_tokens(1, 6))
    assert all(torch.allclose(first, state, atol=1e-5) for state in others)
    assert model.scores(model(some_tokens(1, 6))).abs().max() == 0


def test_electra_shares_its_embeddings_and_counts_them_once():
    model = Electra(dataclasses.replace(TINY, published_as="electra"), 0.25).init_weights(torch.Generator().manual_seed(0))
    assert model.generator.encoder.embed is model.discriminator.encoder.embed
    assert model.generator.config.hidden_size == 4 and model.generator.config.embedding_width == 16
    names = [name for name, _ in model.named_parameters()]
    assert not any(name.startswith("generator.encoder.embed") for name in names)
    assert set(model.matrix_parts()) <= set(names)


def test_blocks_are_compiled_whole_and_give_the_same():
    """As on a GPU, but for the code that is made; a block that cannot be traced as a whole would be an error."""
    model, tokens = Electra(dataclasses.replace(TINY, published_as="electra"), 0.5), some_tokens(2, 8)
    model.init_weights(torch.Generator().manual_seed(0))
    mask = torch.arange(8) < torch.tensor([[8], [5]])
    expected = model.discriminator(tokens, mask), model.generator(tokens, mask)
    with compiled_blocks(model, backend="eager"):
        found = model.discriminator(tokens, mask), model.generator(tokens, mask)
    assert len(model.layers) == 4
    for a, b in zip(expected, found):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"hidden_size": 250}, "hidden_size=250 is not a multiple of num_heads=4. Use 248"),
        ({"head": "rtd"}, "head=rtd"),
        ({"head": "classify"}, "labels="),
        ({"embedding_size": 8}, "embedding_size=8 differs from hidden_size"),
        ({"num_layers": 0}, "num_layers=0 must be at least 1"),
    ],
)
def test_shapes_that_cannot_be_are_refused(change, told):
    with pytest.raises(UserError, match=told):
        dataclasses.replace(TINY, **change)
