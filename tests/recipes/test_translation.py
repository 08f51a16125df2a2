"""Training on parallel text through the command line: it learns, it resumes bit for bit, and what it publishes translates."""

import dataclasses
import json

import pytest
import torch

from plinth.cli.main import main
from plinth.config import UserError
from plinth.inference.translate import Translator
from plinth.models.encoder_decoder_config import EncoderDecoderConfig
from plinth.models.hub import load_model
from plinth.recipes import parallel_batches
from plinth.recipes.translation import TranslationConfig, pretrain_translation
from plinth.recipes.translation_data import PairsConfig
from plinth.run import Run
from plinth.training.loop import TrainConfig
from plinth.training.optim import OptimizerConfig
from recipes.parallel_toy import toy_pairs, write_toy

TRAIN = TrainConfig(steps=4, warmup_steps=1, dtype="float32", num_threads=2, checkpoint_every_s=0.0, optimizer=OptimizerConfig(name="muon"))
DATA = PairsConfig(pairs_per_step=16, micro_batch_size=8, tokenizer_size=290, max_seq_len=32)
SHAPE = EncoderDecoderConfig(hidden_size=32, num_layers=1, num_heads=2, head_dim=16, intermediate_size=48, max_seq_len=32, dropout=0.2)
TRANSFORMER = TranslationConfig(model=SHAPE, train=TRAIN, data=DATA)
CONFIGS = {
    "transformer": TRANSFORMER,
    "two vocabularies": dataclasses.replace(TRANSFORMER, data=dataclasses.replace(DATA, shared_vocabulary=False)),
    "t5": dataclasses.replace(TRANSFORMER, model=dataclasses.replace(SHAPE, style="t5", activation="geglu"), label_smoothing=0.0),
}


class Killed(BaseException):
    """Stands for a power cut."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy"), "train", toy_pairs(60))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_stopped_and_resumed_equals_never_stopped_dropout_and_all(files, tmp_path, monkeypatch, config):
    whole = pretrain_translation(tmp_path / "whole", files, config, held_out=files)
    batches = parallel_batches.ParallelBatches.at

    def until(self, step):
        if step == 2:
            raise Killed
        return batches(self, step)

    monkeypatch.setattr(parallel_batches.ParallelBatches, "at", until)
    with pytest.raises(Killed):
        pretrain_translation(tmp_path / "cut", files, config)
    monkeypatch.setattr(parallel_batches.ParallelBatches, "at", batches)
    resumed = pretrain_translation(tmp_path / "cut", files, config, held_out=files, resume=True)
    states = [load_model(run.model_dir).state_dict() for run in (whole, resumed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert whole.summary["heldout_nats"] == resumed.summary["heldout_nats"]
    assert [whole.summary[name] for name in ("pairs", "too_long_rows", "unusable_rows")] == [60, 0, 0]
    assert len(whole.metrics()) == 4
    translator = Translator.load(resumed.path)
    assert (translator.source_tokenizer is translator.target_tokenizer) == config.data.shared_vocabulary
    assert translator.source_tokenizer.decode(translator.source_tokenizer.encode("one two")) == "one two"


def train(capsys, family, files, out, *more):
    options = (
        "--data.tokenizer-size 400 --data.max-seq-len 32 --data.pairs-per-step 64 --data.micro-batch-size 32 --model.hidden-size 64 "
        "--model.num-layers 1 --model.num-heads 2 --model.head-dim 32 --model.intermediate-size 128 --model.dropout 0 "
        "--label-smoothing 0 --train.dtype float32 --train.warmup-steps 5 --train.optimizer.name muon "
    )
    arguments = ["pretrain", "--family", family, "--pairs", *map(str, files), "--out", str(out), "--json", *options.split(), *more]
    assert main(arguments) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("family", ["transformer", "t5"])
def test_a_batch_is_learnt_and_translated_from_the_command_line(family, tmp_path, capsys):
    pairs = toy_pairs(48, seed=3, longest=4)
    files = write_toy(tmp_path, "train", pairs)
    more = ("--train.steps", "60", "--held-out", *map(str, files), "--train.optimizer.muon-lr", "0.03", "--train.optimizer.lr", "0.01")
    summary = train(capsys, family, files, tmp_path / "run", *more)
    assert summary["heldout_nats"] < 0.1 < summary["heldout_unigram_nats"]
    assert main(["translate", str(tmp_path / "run"), "--pairs", *map(str, files), "--json", "--batch-size", "20"]) == 0
    answer = json.loads(capsys.readouterr().out)
    right = sum(one["text"] == pair[1] for one, pair in zip(answer["translations"], pairs))
    assert right >= 47
    if answer["scores"]:
        assert [score["name"] for score in answer["scores"]] == ["bleu", "chrf"] and answer["scores"][0]["value"] > 95
    texts = ["translate", str(tmp_path / "run"), "--text", pairs[0][0], pairs[1][0], "--json"]
    for options in ([], ["--beams", "3"], ["--temperature", "0.01", "--seed", "1"]):
        assert main([*texts, *options]) == 0
        assert [one["text"] for one in json.loads(capsys.readouterr().out)["translations"]] == [pairs[0][1], pairs[1][1]]
    (tmp_path / "lines").write_text(f"{pairs[2][0]}\n\n{pairs[3][0]}\n", encoding="utf-8")
    assert main(["translate", str(tmp_path / "run"), "--file", str(tmp_path / "lines"), "--out", str(tmp_path / "done")]) == 0
    assert (tmp_path / "done").read_text(encoding="utf-8") == f"{pairs[2][1]}\n\n{pairs[3][1]}\n"
    capsys.readouterr()
    provenance = Run(tmp_path / "run").provenance
    assert provenance["stage"] == f"pretrain-{family}" and len(provenance["parents"]) == 4


def test_mistakes_are_told_before_there_is_a_run(files, tmp_path, capsys):
    out = tmp_path / "run"

    def told(*arguments):
        assert main(list(map(str, arguments))) == 1
        return capsys.readouterr().err

    assert "name them in pairs" in told("pretrain", "--family", "transformer", "--pairs", files[0], "--out", out)
    assert "exceeds model.max_seq_len" in told("pretrain", "--family", "t5", "--pairs", *files, "--out", out, "--data.max-seq-len", 400)
    assert "T5 has one vocabulary" in told(
        "pretrain", "--family", "t5", "--pairs", *files, "--out", out, "--data.no-shared-vocabulary", "--data.tokenizer-size", 300
    )
    assert not out.exists()
    assert "name the text to translate once" in told("translate", out, "--text", "a", "--file", files[0])
    assert "does not exist" in told("translate", out, "--text", "a")
    with pytest.raises(UserError, match="label_smoothing=1"):
        TranslationConfig(label_smoothing=1.0)


def test_a_model_that_reads_no_source_is_named(tmp_path, capsys):
    from plinth.models.config import DecoderConfig
    from plinth.models.hub import save_model
    from plinth.models.transformer import Transformer

    shape = DecoderConfig(vocab_size=300, hidden_size=32, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=32, intermediate_size=32)
    save_model(Transformer(shape).init_weights(torch.Generator()), None, tmp_path / "m")
    assert main(["translate", str(tmp_path / "m"), "--text", "a"]) == 1
    assert "holds no model that translates; it goes with plinth generate" in capsys.readouterr().err


def test_a_text_beyond_the_context_is_refused(files, tmp_path, capsys):
    pretrain_translation(tmp_path / "run", files, dataclasses.replace(TRANSFORMER, train=dataclasses.replace(TRAIN, steps=1)))
    assert main(["translate", str(tmp_path / "run"), "--text", "one", "two " * 60]) == 1
    assert "text 2 has" in (told := capsys.readouterr().err) and "Cut it into sentences" in told
