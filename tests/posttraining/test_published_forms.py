"""Stages that learn from conversations in the form of a model tuned elsewhere, whose template leaves reasoning out of earlier answers."""

import json

import pytest

from plinth.models.hub import save_model
from plinth.posttraining.inspection import inspect_data
from plinth.posttraining.learnt_texts import read_texts, render_texts
from plinth.posttraining.sft import train_sft
from plinth.posttraining.sft_config import SftConfig
from plinth.tokenizer.encode import Tokenizer
from plinth.training.config import TrainConfig
from small_models import plain_decoder
from tokenizer.published_families import FAMILIES


@pytest.fixture
def model_dir(tmp_path):
    tokenizer = Tokenizer.load(FAMILIES["Qwen 3"].write(tmp_path / "form"))
    save_model(plain_decoder(tokenizer.vocab_size, max_seq_len=128), tokenizer, tmp_path / "model")
    return tmp_path / "model"


def test_a_conversation_with_reasoning_is_learnt_answer_by_answer_and_told(tmp_path, model_dir):
    """The class of complaint of trl#3781: what a template drops is neither lost in silence nor refused."""
    answers = ["<think>\nhm\n</think>\n\ncat", "hat"]
    talk = [message for answer in answers for message in ({"role": "user", "content": "the?"}, {"role": "assistant", "content": answer})]
    file = tmp_path / "talk.jsonl"
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in (talk, talk[:2])))
    told = []
    config = SftConfig(train=TrainConfig(steps=1, num_threads=1), conversations_per_step=3, micro_batch_size=3, held_out=file)
    run = train_sft(tmp_path / "sft", model_dir, file, config, warn=told.append)
    assert [text for text in told if "1 row learnt answer by answer" in text] and run.summary["conversations"] == 2
    seen = inspect_data(file, Tokenizer.load(model_dir))
    assert [(finding.name, finding.rows) for finding in seen.findings] == [("answers_apart", [1])] and seen.is_clean
    texts = render_texts(Tokenizer.load(model_dir), read_texts(file, Tokenizer.load(model_dir)), 128)
    assert run.metrics()[0]["tokens"] == seen.learnt == sum(sum(text.loss_mask) for text in texts) and seen.sequences == len(texts) == 3
