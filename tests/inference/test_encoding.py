"""Hidden words filled in, vectors of texts, and the best stretch of a context: against transformers and against brute force."""

import json

import numpy as np
import pytest
import torch

from plinth.cli.main import main
from plinth.config import UserError
from plinth.inference.encoding import TextEncoder, embed, embed_texts, fill
from plinth.inference.labelling import best_span, check_task
from plinth.models.config import DecoderConfig
from plinth.models.encoder import EncoderModel
from plinth.models.encoder_config import EncoderConfig
from plinth.models.hub import save_model
from plinth.models.transformer import Transformer
from plinth.tokenizer.encoder_tokens import encoder_tokens, with_encoder_tokens
from plinth.tokenizer.train import train_tokenizer

TEXTS = ["the cat sat on the mat", "a dog", "the log on the cat " * 3]


def drawn(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model folder with a masked-token head, one without a head, one of a decoder, and the tokenizer of the first two."""
    root = tmp_path_factory.mktemp("encoders")
    plain = train_tokenizer(["the cat sat on the mat, a dog on the log. " * 20], 290)
    tokenizer = with_encoder_tokens(plain)
    shape = EncoderConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24, max_seq_len=24,
        pad_id=encoder_tokens(tokenizer).pad,
    )  # fmt: skip
    save_model(drawn(EncoderModel(shape)), tokenizer, root / "mlm")
    save_model(drawn(EncoderModel(shape.with_head("none"))), tokenizer, root / "none")
    decoder = DecoderConfig(
        vocab_size=plain.vocab_size, hidden_size=16, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=16, intermediate_size=24,
        max_seq_len=16,
    )  # fmt: skip
    save_model(drawn(Transformer(decoder)), plain, root / "decoder")
    return root


@pytest.mark.oracle
def test_fill_is_transformers_pipeline(folders):
    transformers = pytest.importorskip("transformers")
    pipe = transformers.pipeline("fill-mask", model=str(folders / "mlm"), top_k=3)
    special = TextEncoder.load(folders / "mlm").tokenizer.special_ids
    for text in ("the [MASK] sat on", "[MASK] dog"):
        expected = [(one["token"], one["score"]) for one in pipe(text, top_k=40) if one["token"] not in special][:3]
        (filled,) = fill(TextEncoder.load_filler(folders / "mlm"), [text], 3)
        found = [(guess.token_id, guess.probability) for guess in filled.places[0]]
        assert [i for i, _ in found] == [i for i, _ in expected]
        # Ours are shares among ordinary tokens: in the same proportions.
        assert [p / found[0][1] for _, p in found] == pytest.approx([p / expected[0][1] for _, p in expected], rel=1e-3)


def test_filling_a_batch_is_filling_each_and_the_text_around_stays(folders):
    encoder, texts = TextEncoder.load_filler(folders / "mlm"), ["the [MASK] sat on the [MASK]", "a [MASK]"]
    together = fill(encoder, texts, 2)
    assert [len(one.places) for one in together] == [2, 1]
    for text, filled in zip(texts, together):
        (alone,) = fill(encoder, [text], 2)
        assert alone.text == filled.text and filled.text.startswith(text.split(" [MASK]")[0])


def test_what_cannot_be_filled_is_told(folders):
    encoder = TextEncoder.load_filler(folders / "mlm")
    with pytest.raises(UserError, match="hides nothing. Write \\[MASK\\]"):
        fill(encoder, ["the cat"])
    with pytest.raises(UserError, match="more than max_seq_len=24"):
        fill(encoder, ["the cat " * 30 + "[MASK]"])
    with pytest.raises(UserError, match="fills no masks: its head is none"):
        TextEncoder.load_filler(folders / "none")
    with pytest.raises(UserError, match="holds no encoder"):
        TextEncoder.load(folders / "decoder")
    with pytest.raises(UserError, match="head is mlm; predictions need a finetuned one"):
        check_task(encoder)


@pytest.mark.oracle
def test_vectors_are_means_of_transformers_hidden_states(folders):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModel.from_pretrained(folders / "none").eval()
    encoder = TextEncoder.load(folders / "none")
    means, firsts = embed(encoder, TEXTS), embed(encoder, TEXTS, "cls")
    for text, mean, first in zip(TEXTS, means, firsts):
        row = torch.tensor([encoder.tokens.single(encoder.tokenizer.encode(text))])
        with torch.no_grad():
            states = theirs(row).last_hidden_state[0].numpy()
        np.testing.assert_allclose(mean, states[1:-1].mean(0), atol=1e-5)
        np.testing.assert_allclose(first, states[0], atol=1e-5)


def test_a_text_has_the_same_vector_in_any_company_and_long_ones_come_in_pieces(folders):
    encoder = TextEncoder.load(folders / "none")
    together = embed(encoder, [*TEXTS, "", "the cat " * 40])
    for text, vector in zip(TEXTS, together):
        np.testing.assert_allclose(embed(encoder, [text])[0], vector, atol=1e-5)
    assert np.isfinite(together).all()
    with pytest.raises(UserError, match="Shorten it, or use mean"):
        embed(encoder, ["the cat " * 40], "cls")


def test_a_decoders_vectors_are_means_too(folders):
    vectors = embed_texts(folders / "decoder", ["the cat", "", "the cat " * 20])
    assert vectors.shape == (3, 16) and np.isfinite(vectors).all()
    with pytest.raises(UserError, match="pool=cls needs an encoder"):
        embed_texts(folders / "decoder", ["x"], "cls")


def test_the_best_stretch_is_the_one_that_brute_force_finds():
    generator = torch.Generator().manual_seed(5)
    for longest in (1, 3, 50):
        scores = torch.randn(12, 2, generator=generator)
        spans = [None] * 3 + [(2 * i, 2 * i + 1) for i in range(8)] + [None]
        inside = range(3, 11)
        best = max((float(scores[i, 0] + scores[j, 1]), i, j) for i in inside for j in inside if i <= j < i + longest)
        score, stretch, empty = best_span(scores, spans, longest)
        assert score == pytest.approx(best[0]) and stretch == (spans[best[1]][0], spans[best[2]][1])
        assert empty == pytest.approx(float(scores[0].sum()))


def test_the_commands_fill_and_embed(folders, tmp_path, capsys):
    assert main(["fill", str(folders / "mlm"), "--text", "the [MASK] sat", "--top", "2", "--json"]) == 0
    filled = json.loads(capsys.readouterr().out)["filled"][0]
    assert len(filled["places"][0]) == 2 and filled["text"].startswith("the")
    (tmp_path / "texts.txt").write_text("the cat\na dog\n")
    for name in ("v.npy", "v.jsonl"):
        assert (
            main(["embed", str(folders / "none"), "--file", str(tmp_path / "texts.txt"), "--normalise", "--out", str(tmp_path / name)]) == 0
        )
    vectors = np.load(tmp_path / "v.npy")
    lines = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose([line["embedding"] for line in lines], vectors, rtol=1e-6)
    assert [line["text"] for line in lines] == ["the cat", "a dog"]
    assert main(["embed", str(folders / "none"), "--text", "x", "--out", str(tmp_path / "v.txt")]) == 1
