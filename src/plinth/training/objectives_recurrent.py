"""Losses of recurrent models: the AWD-LSTM's with carried state, and the next target token of sequence to sequence."""

from __future__ import annotations

import torch
from torch import nn

from plinth.ops.dropout import seeded
from plinth.ops.loss import biased_cross_entropy
from plinth.training.carried_state import CarriedState
from plinth.training.step import LossFunction


def awd_lstm_loss(carried: CarriedState, activation_penalty: float = 0.0, slowness_penalty: float = 0.0) -> LossFunction:
    """Return the next-token loss of rows that go on where the step before left them.

    The batch is inputs (B, T), targets (B, T), seeds of dropout (B,) and the rows' numbers (B,), whose state `carried` holds. The
    penalties, on the mean square of the last layer's outputs after dropout, and on that of their change from position to position
    before it, are summed over positions; the metric nll_nats is the loss without them.
    Source: Merity et al. 2017, arXiv:1708.02182, sections 3 and 4.7.
    Differs: the second penalty is divided by all positions, not by those that have one before them in the step.
    """

    def loss(model: nn.Module, batch: tuple[torch.Tensor, ...]):
        inputs_BT, targets_BT, seeds_B, rows_B = batch
        run = model.run(inputs_BT, carried.read(rows_B, model.head_bias.dtype), seeded(seeds_B))
        carried.write(rows_B, run.state)
        hidden_BTD, raw_BTD = run.hidden[-1], run.raw[-1]
        nll = biased_cross_entropy(hidden_BTD.flatten(0, 1), model.output_weight, model.head_bias, targets_BT.flatten())
        total = nll
        if activation_penalty:
            total = total + activation_penalty * hidden_BTD.float().square().mean(-1).sum()
        if slowness_penalty:
            total = total + slowness_penalty * (raw_BTD[:, 1:] - raw_BTD[:, :-1]).float().square().mean(-1).sum()
        return total, (targets_BT >= 0).sum(dtype=torch.float64), {"nll_nats": nll.detach()}

    return loss


def recurrent_seq2seq_loss(teacher_forcing: float = 1.0) -> LossFunction:
    """Return the loss of the next target token; targets below 0 do not count.

    The batch is the source (B, S), its mask (B, S), decoder inputs (B, T), targets (B, T) and seeds of dropout (B,). The decoder reads
    its input with probability `teacher_forcing`, place by place, else the token that it found most probable itself.
    Source: Bengio et al. 2015, arXiv:1506.03099 (scheduled sampling), at a constant rate and with the most probable token.
    """

    def loss(model: nn.Module, batch: tuple[torch.Tensor, ...]):
        source_BS, mask_BS, inputs_BT, targets_BT, *seeds_B = batch
        generator = seeded(seeds_B[0] if seeds_B else None)
        reads_BTD = model(source_BS, inputs_BT, mask_BS, teacher_forcing=teacher_forcing, generator=generator)
        targets_N = targets_BT.flatten()
        total = biased_cross_entropy(reads_BTD.flatten(0, 1), model.head.weight, model.head.bias, targets_N)
        return total, (targets_N >= 0).sum(dtype=torch.float64), {}

    return loss
