"""LSTM and GRU: a whole sequence in one call, and a single step, which is the slow twin of the call.

Weights have PyTorch's layout and so its counts: weight_ih (G·H, D), weight_hh (G·H, H), bias_ih and bias_hh (G·H), with the gates in the
order input, forget, candidate, output (LSTM, G = 4) or reset, update, candidate (GRU, G = 3). A state is a tuple of (B, H): (h, c) of an
LSTM, (h,) of a GRU.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from plinth.ops.linear import linear

Cell = Literal["lstm", "gru"]
State = tuple[torch.Tensor, ...]
Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""weight_ih, weight_hh, bias_ih, bias_hh"""
GATES: dict[str, int] = {"lstm": 4, "gru": 3}
STATES: dict[str, int] = {"lstm": 2, "gru": 1}


def lstm_step(x_BD: torch.Tensor, state: State, weights: Weights) -> State:
    """Return the state after one input. Source: Hochreiter and Schmidhuber 1997 with forget gates (Gers et al. 2000)."""
    h_BH, c_BH = state
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    gates = linear(x_BD, weight_ih) + linear(h_BH, weight_hh) + (bias_ih + bias_hh)
    enter, forget, candidate, leave = gates.chunk(4, dim=-1)
    c_BH = torch.sigmoid(forget) * c_BH + torch.sigmoid(enter) * torch.tanh(candidate)
    return torch.sigmoid(leave) * torch.tanh(c_BH), c_BH


def gru_step(x_BD: torch.Tensor, state: State, weights: Weights) -> State:
    """Return the state after one input.

    Source: Cho et al. 2014, arXiv:1406.1078.  Differs: the reset gate multiplies the recurrent product (as cuDNN and PyTorch do), and
    the update gate keeps the old state where it is 1.
    """
    (h_BH,) = state
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    reset_x, update_x, candidate_x = (linear(x_BD, weight_ih) + bias_ih).chunk(3, dim=-1)
    reset_h, update_h, candidate_h = (linear(h_BH, weight_hh) + bias_hh).chunk(3, dim=-1)
    update = torch.sigmoid(update_x + update_h)
    candidate = torch.tanh(candidate_x + torch.sigmoid(reset_x + reset_h) * candidate_h)
    return (torch.lerp(candidate, h_BH, update),)


STEPS = {"lstm": lstm_step, "gru": gru_step}


def run_layer(
    cell: Cell, x_BTD: torch.Tensor, state: State, weights: Weights, lengths_B: torch.Tensor | None = None
) -> tuple[torch.Tensor, State]:
    """Return the outputs (B, T, H) and the state behind each row's last input.

    With lengths (int64, at least 1 each) the inputs behind a row's length are not read and its outputs there are 0.
    """
    if lengths_B is None:
        return _run_whole(cell, x_BTD, state, weights)
    if cell == "gru" and x_BTD.device.type == "cpu":  # PyTorch's packed GRU takes several times as long there
        return _run_gru_over_padding(x_BTD, state, weights, lengths_B)
    packed = pack_padded_sequence(x_BTD, lengths_B.cpu(), batch_first=True, enforce_sorted=False)
    order = packed.sorted_indices
    start = tuple(part[order][None] for part in state)
    run, first = (torch.lstm, start) if cell == "lstm" else (torch.gru, start[0])
    data, *after = run(packed.data, packed.batch_sizes, first, weights, True, 1, 0.0, torch.is_grad_enabled(), False)
    done = PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
    outputs, _ = pad_packed_sequence(done, batch_first=True, total_length=x_BTD.shape[1])
    return outputs, tuple(part[0][packed.unsorted_indices] for part in after)


def _run_whole(cell: Cell, x_BTD: torch.Tensor, state: State, weights: Weights) -> tuple[torch.Tensor, State]:
    start = tuple(part[None].contiguous() for part in state)
    run, first = (torch.lstm, start) if cell == "lstm" else (torch.gru, start[0])
    outputs, *after = run(x_BTD, first, weights, True, 1, 0.0, torch.is_grad_enabled(), False, True)
    return outputs, tuple(part[0] for part in after)


def _run_gru_over_padding(x_BTD, state: State, weights: Weights, lengths_B: torch.Tensor) -> tuple[torch.Tensor, State]:
    """Run to the end and take what stood at each length: a GRU's state is its output, and padding comes behind."""
    outputs, _ = _run_whole("gru", x_BTD, state, weights)
    inside_BT = torch.arange(x_BTD.shape[1], device=x_BTD.device) < lengths_B[:, None]
    last_B11 = (lengths_B - 1)[:, None, None].expand(-1, 1, outputs.shape[2])
    return outputs * inside_BT[..., None], (outputs.gather(1, last_B11)[:, 0],)


def reverse_rows(x_BTD: torch.Tensor, lengths_B: torch.Tensor | None = None) -> torch.Tensor:
    """Return each row backwards within its length; what lies behind it stays."""
    if lengths_B is None:
        return x_BTD.flip(1)
    places_T = torch.arange(x_BTD.shape[1], device=x_BTD.device)
    mirrored_BT = lengths_B[:, None] - 1 - places_T
    places_BT = torch.where(mirrored_BT >= 0, mirrored_BT, places_T)
    return x_BTD.gather(1, places_BT[..., None].expand_as(x_BTD))


def attend(scores_BTS: torch.Tensor, values_BSD: torch.Tensor, mask_BS: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the values' means by softmax of the scores, (B, T, D), and the weights, (B, T, S); masked places (False) get weight 0."""
    if mask_BS is not None:
        scores_BTS = scores_BTS.masked_fill(~mask_BS[:, None, :], float("-inf"))
    weights_BTS = F.softmax(scores_BTS, dim=-1, dtype=torch.float32).to(values_BSD.dtype)
    return torch.bmm(weights_BTS, values_BSD), weights_BTS
