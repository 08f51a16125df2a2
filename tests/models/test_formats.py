"""The machinery of published formats, on tensors whose places are worked out by hand."""

import torch

from plinth.models.formats.layout import Entry

ROWS = torch.arange(12.0).view(6, 2)


def test_a_fused_projection_is_its_parts_one_under_the_other():
    entry = Entry("qkv", ("q", "k", "v"), ((3, 2), (2, 2), (1, 2)))
    assert entry.shape == (6, 2)
    assert [part.tolist() for part in entry.parts(ROWS)] == [ROWS[:3].tolist(), ROWS[3:5].tolist(), ROWS[5:].tolist()]


def test_a_transposed_matrix_is_published_the_other_way_round_and_a_vector_is_not():
    matrix, vector = Entry("w", ("a", "b"), ((2, 4), (2, 2)), transpose=True), Entry("b", ("a", "b"), ((4,), (2,)), transpose=True)
    assert matrix.shape == (6, 2) and vector.shape == (6,)
    assert [part.tolist() for part in matrix.parts(ROWS)] == [ROWS[:4].T.tolist(), ROWS[4:].T.tolist()]
    assert [part.tolist() for part in vector.parts(torch.arange(6.0))] == [[0, 1, 2, 3], [4, 5]]


def test_experts_are_stacked_and_each_may_be_fused_of_several():
    names = ("0.gate", "0.up", "1.gate", "1.up", "2.gate", "2.up")
    tensor = torch.arange(3 * 3 * 2.0).view(3, 3, 2)
    entry = Entry("gate_up", names, ((1, 2), (2, 2)) * 3, join="stack", groups=3)
    assert entry.shape == (3, 3, 2)
    parts = dict(zip(names, entry.parts(tensor)))
    assert parts["1.gate"].tolist() == tensor[1, :1].tolist() and parts["2.up"].tolist() == tensor[2, 1:].tolist()
    one = Entry("down", ("0.down", "1.down", "2.down"), ((3, 2),) * 3, join="stack")
    assert one.shape == (3, 3, 2) and one.parts(tensor)[2].tolist() == tensor[2].tolist()
    turned = Entry("down", ("0.down", "1.down", "2.down"), ((2, 3),) * 3, join="stack", transpose=True)
    assert turned.shape == (3, 3, 2) and turned.parts(tensor)[1].tolist() == tensor[1].T.tolist()


def test_experts_in_one_published_tensor_may_be_transposed():
    tensor = torch.arange(12.0).view(2, 3, 2)
    entry = Entry("down", ("experts.down",), ((2, 2, 3),), transpose=True)
    assert entry.shape == (2, 3, 2) and torch.equal(entry.parts(tensor)[0], tensor.mT)


def test_filling_the_parts_makes_the_whole():
    entry, whole = Entry("w", ("a", "b"), ((2, 4), (2, 2)), transpose=True), torch.empty(6, 2)
    for part, source in zip(entry.parts(whole), [ROWS[:4].T.contiguous(), ROWS[4:].T.contiguous()]):
        part.copy_(source)
    assert torch.equal(whole, ROWS)
