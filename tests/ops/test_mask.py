import numpy as np
import pytest
import torch

from plinth.ops.mask import add_mask, add_mask_by_table, mask_bytes

SIZES = [(1, 16), (3, 211), (2, 4096), (5, 1), (1, 33)]


def random_case(rows: int, vocab: int) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(rows * vocab)
    allowed = generator.random((rows, vocab)) < 0.3
    masks = np.packbits(allowed, axis=1, bitorder="little")
    return torch.from_numpy(generator.normal(size=(rows, vocab)).astype(np.float32)), masks, allowed


@pytest.mark.parametrize("apply", [add_mask, add_mask_by_table])
@pytest.mark.parametrize("rows, vocab", SIZES)
def test_exactly_the_tokens_whose_bit_is_set_keep_their_logit(apply, rows, vocab):
    logits, masks, allowed = random_case(rows, vocab)
    masked = apply(logits.clone(), masks).numpy()
    assert masks.shape[1] == mask_bytes(vocab)
    assert np.array_equal(masked, np.where(allowed, logits.numpy(), -np.inf))


def test_other_dtypes_and_strides_take_the_table():
    logits, masks, allowed = random_case(3, 211)
    masked = add_mask(logits.double(), masks)
    assert torch.equal(masked, torch.where(torch.from_numpy(allowed), logits.double(), -torch.inf))


def test_shapes_that_do_not_belong_together_are_refused():
    logits, masks, _ = random_case(3, 211)
    with pytest.raises(ValueError, match="do not fit"):
        add_mask(logits, masks[:, :-1])
