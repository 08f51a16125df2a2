"""`plinth pretrain --family lstm`: recurrent sequence to sequence with LSTM cells."""

from __future__ import annotations

from plinth.cli.pretrain_gru import train


def main(argv: list[str]) -> int:
    return train(argv, "lstm")
