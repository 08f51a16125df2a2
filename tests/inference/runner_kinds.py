"""One small model on each runner, and what restricts and guesses tokens in tests."""

import numpy as np
import pytest
import torch

from plinth.inference.native_runner import NativeRunner, why_not_native
from plinth.inference.torch_runner import TorchRunner

KINDS = ["torch", "native"]
VOCAB = 64


def make_kind(kind: str, make_model, **options):
    """Return a runner of a model with 64 token ids, whose next token depends on the whole prompt."""
    model = make_model("grouped", **({"vocab_size": VOCAB, "head_dim": 32, "max_seq_len": 256} | options))
    if kind == "torch":
        return TorchRunner(model)
    if reason := why_not_native(model.config):
        pytest.skip(reason)
    return NativeRunner(model, num_threads=1)


class Rule:
    """A constraint whose state is the last token and a count: some tokens are barred, some force the two that follow."""

    def __init__(self, length: int | None = None, skip: bool = True, vocab_size: int = VOCAB):
        self.length, self.skip, self.vocab_size = length, skip, vocab_size
        self.count, self.last, self.ahead = 0, 1, []

    def _bits(self, tokens) -> np.ndarray:
        bits = np.zeros(-(-self.vocab_size // 8) * 8, np.uint8)
        bits[list(tokens)] = 1
        return np.packbits(bits, bitorder="little")

    def allowed(self) -> np.ndarray | None:
        if self.ahead:
            return self._bits(self.ahead[:1])
        if self.last % 9 == 0:
            return None
        return self._bits(t for t in range(self.vocab_size) if (t + self.last) % 3)

    def advance(self, token: int) -> None:
        mask = self.allowed()
        assert mask is None or np.unpackbits(mask, bitorder="little")[token], f"{token} was not allowed"
        if self.ahead:
            self.ahead = self.ahead[1:]
        elif token % 4 == 0:
            self.ahead = [(token * 5 + 1) % 60, (token * 7 + 2) % 60]
        self.count, self.last = self.count + 1, token

    def forced(self) -> list[int]:
        return list(self.ahead) if self.skip else []

    def finished(self) -> bool:
        return self.length is not None and self.count >= self.length and not self.ahead

    def copy(self):
        twin = Rule(self.length, self.skip, self.vocab_size)
        twin.count, twin.last, twin.ahead = self.count, self.last, list(self.ahead)
        return twin


class Guess:
    """A drafter that knows how the completion goes and is wrong now and then."""

    def __init__(self, prompt, completion, wrong_every: int = 4):
        self.prompt, self.completion, self.wrong_every = list(prompt), list(completion), wrong_every
        self.heard = []

    def propose(self, tokens, count):
        at = len(tokens) - len(self.prompt)
        guess = self.completion[at : at + min(count, 5)]
        return [(token + 1) % VOCAB if (at + i) % self.wrong_every == 2 else token for i, token in enumerate(guess)]

    def observe(self, proposed, accepted):
        assert 0 <= accepted <= proposed
        self.heard.append((proposed, accepted))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
