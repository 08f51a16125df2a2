"""Scores of a reward model: batches, renderings, and what is refused."""

import pytest
import torch

from plinth.config import UserError
from plinth.models.hub import save_model
from plinth.models.reward import RewardModel
from plinth.posttraining.reward import like_lengths, load_reward
from plinth.tokenizer.chat import render
from small_models import plain_decoder, subjects_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return subjects_tokenizer()


@pytest.fixture(scope="module")
def decoder(tokenizer):
    return plain_decoder(tokenizer.vocab_size)


@pytest.fixture
def reward_dir(tmp_path, tokenizer, decoder):
    save_model(RewardModel.from_decoder(decoder, torch.Generator().manual_seed(1)), tokenizer, tmp_path / "reward")
    return tmp_path / "reward"


def test_scores_are_those_of_the_rendered_conversation_whatever_stands_beside_it(reward_dir, tokenizer):
    reward = load_reward(reward_dir)
    prompts = ["What does copy do?", [{"role": "user", "content": "What does seek do?"}], "What does it do?"]
    answers = ["It does copy.", "It does " + "seek " * 9, [{"role": "assistant", "content": "Open."}]]
    together = reward.score(prompts, answers)
    for prompt, answer, score in zip(prompts, answers, together):
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        messages = messages + (answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}])
        tokens = render(tokenizer, messages).tokens
        hidden = reward.model.trunk(torch.tensor([tokens]))[0, -1].detach()
        assert score == pytest.approx(float(reward.model.score.weight[0].detach() @ hidden), abs=1e-5)
        assert reward.score([prompt], [answer])[0] == pytest.approx(score, abs=1e-5)


def test_like_lengths_hold_each_row_once_within_the_limit():
    lengths = [3, 60, 9, 17, 200, 8, 8, 41]
    parts = like_lengths(lengths, 64)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert all(len(part) == 1 or len(part) * max(lengths[i] for i in part) <= 64 for part in parts)


def test_what_is_refused(reward_dir, tokenizer, decoder, tmp_path):
    reward = load_reward(reward_dir)
    with pytest.raises(UserError, match="text 1 has 65 tokens; a reward model of max_seq_len=64"):
        reward.score_tokens([[1], [1] * 65])
    with pytest.raises(UserError, match="text 0 has 0 tokens"):
        reward.score_tokens([[]])
    with pytest.raises(ValueError, match="2 prompts for 1 answers"):
        reward.score(["a", "b"], ["c"])
    save_model(decoder, tokenizer, tmp_path / "decoder")
    with pytest.raises(UserError, match="holds no reward model.*plinth reward"):
        load_reward(tmp_path / "decoder")
