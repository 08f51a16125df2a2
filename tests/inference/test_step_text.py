"""Text from a recurrent language model: greedy, seeds, beams, stop strings, and what it cannot do."""

import json

import pytest
import torch

from plinth.cli.generate import main
from plinth.config import UserError
from plinth.inference.sampling_params import SamplingParams
from plinth.inference.step_text import StepText
from plinth.models.hub import save_model
from plinth.models.recurrent import AwdLstm, AwdLstmConfig
from plinth.tokenizer.train import train_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = train_tokenizer(["the cat sat on the mat and the dog ran. " * 30], 290)
    config = AwdLstmConfig(vocab_size=tokenizer.vocab_size, embedding_size=12, hidden_size=16, num_layers=2)
    model = AwdLstm(config).init_weights(torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.embed.weight.mul_(20)  # scores that differ
    path = tmp_path_factory.mktemp("recurrent") / "model"
    save_model(model, tokenizer, path)
    return path


def generate(capsys, *arguments):
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])["completions"]


def test_greedy_takes_the_most_probable_token_each_time(folder, capsys):
    text = StepText.load(folder)
    tokens = text.encode("the cat")
    for _ in range(12):
        tokens.append(int(text.engine.model.logits(text.engine.model(torch.tensor([tokens]))[0, -1]).argmax()))
    (found,) = generate(capsys, folder, "--prompt", "the cat", "--temperature", "0", "--max-tokens", "12")
    assert [token["id"] for token in found["tokens"]] == tokens[-12:] and found["finish_reason"] == "length"
    scores = torch.log_softmax(text.engine.model.logits(text.engine.model(torch.tensor([tokens]))[0]), -1)
    expected = [scores[len(tokens) - 13 + i, token].item() for i, token in enumerate(tokens[-12:])]
    assert [token["logprob"] for token in found["tokens"]] == pytest.approx(expected, abs=1e-4)


def test_a_seed_gives_the_same_text_in_any_company(folder, capsys):
    alone = generate(capsys, folder, "--prompt", "the dog", "--seed", "8", "--max-tokens", "9")
    both = generate(capsys, folder, "--prompt", "a cat on", "the dog", "--seed", "7", "--max-tokens", "9")
    assert both[1]["text"] == alone[0]["text"] and both[0]["text"] != alone[0]["text"]


def test_stop_strings_cut_the_text(folder):
    text = StepText.load(folder)
    whole = text.complete(["the"], SamplingParams(temperature=0, max_tokens=20))[0]
    stop = whole.text[4:6]
    cut = text.complete(["the"], SamplingParams(temperature=0, max_tokens=20, stop=(stop,)))[0]
    assert cut.text == whole.text[: whole.text.index(stop)] and cut.finish_reason == "stop"
    assert whole.tokens[: len(cut.tokens)] == cut.tokens


def test_one_beam_is_greedy_and_more_are_no_worse(folder, capsys):
    arguments = (folder, "--prompt", "the mat", "--max-tokens", "6", "--length-penalty", "0")
    greedy = StepText.load(folder).complete(["the mat"], SamplingParams(temperature=0, max_tokens=6))[0]
    (one,), (four,) = (generate(capsys, *arguments, "--beams", beams) for beams in (1, 4))
    assert one["text"] == greedy.text and one["logprob"] == pytest.approx(sum(greedy.logprobs), abs=1e-3)
    assert four["logprob"] >= one["logprob"] - 1e-4


@pytest.mark.parametrize("option", [("--chat",), ("--best-of", "2"), ("--regex", "a+"), ("--speculate", "prompt-lookup")])
def test_what_needs_the_engine_is_refused(folder, option):
    with pytest.raises(UserError, match="holds a recurrent model, and .* needs a decoder"):
        main([str(folder), "--prompt", "x", *option])
    with pytest.raises(UserError, match="fp32 or bf16"):
        main([str(folder), "--prompt", "x", "--weights", "int8"])
