"""What a model looks at: the page's numbers are the model's, and the page is whole and safe."""

import base64
import json
import re

import numpy as np
import pytest
import torch

from plinth.cli.main import main
from plinth.config import UserError, read_json, save_json
from plinth.data.image_questions import with_image_token
from plinth.data.images import ImageProcessor, save_image
from plinth.evaluation.attention_maps import AttentionMap, token_labels
from plinth.evaluation.attention_page import fitting, pack_map, render_attention_page
from plinth.evaluation.attention_view import context_costs, view_attention
from plinth.models.config import DecoderConfig
from plinth.models.dual_encoder import DualEncoder, DualEncoderConfig, TextTowerConfig
from plinth.models.encoder import EncoderModel
from plinth.models.encoder_config import EncoderConfig
from plinth.models.encoder_decoder import EncoderDecoder
from plinth.models.encoder_decoder_config import EncoderDecoderConfig
from plinth.models.hub import save_model
from plinth.models.recurrent import AwdLstm, AwdLstmConfig
from plinth.models.recurrent_seq2seq import RecurrentSeq2Seq, RecurrentSeq2SeqConfig
from plinth.models.transformer import Transformer
from plinth.models.vision import VisionConfig
from plinth.models.vision_language import VisionLanguageConfig, VisionLanguageModel
from plinth.tokenizer.encoder_tokens import encoder_tokens, with_encoder_tokens
from plinth.tokenizer.train import train_tokenizer

TEXT = "the cat sat on the mat. "
SIZES = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24, "max_seq_len": 40}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT * 20], vocab_size=280)


def save(tmp_path, model, tokenizer):
    """Publish a model whose every parameter matters."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.5, generator=generator)
    save_model(model.eval(), tokenizer, tmp_path / "model")
    return tmp_path


@pytest.fixture
def decoder(tmp_path, tokenizer):
    config = DecoderConfig(vocab_size=tokenizer.vocab_size, head_dim=8, num_kv_heads=1, learnable_norm=True, **SIZES)
    return save(tmp_path, Transformer(config), tokenizer)


@pytest.fixture
def translator(tmp_path, tokenizer):
    marks = {"pad_id": tokenizer.pad_id, "start_id": tokenizer.pad_id, "end_id": tokenizer.end_of_text_id}
    return save(tmp_path, EncoderDecoder(EncoderDecoderConfig(vocab_size=tokenizer.vocab_size, head_dim=8, **SIZES, **marks)), tokenizer)


def sums_to_one(each: AttentionMap) -> bool:
    return np.allclose(each.weights_LHTS.sum(-1), 1, atol=1e-5)


def test_a_decoder_looks_at_what_stands_before(decoder, tokenizer):
    view = view_attention(decoder, "the cat sat")
    (each,) = view.maps
    assert each.name == "self" and each.weights_LHTS.shape == (2, 2, len(each.rows), len(each.columns)) and sums_to_one(each)
    assert "".join(each.rows).replace("␣", " ") == "the cat sat"
    assert not np.triu(each.weights_LHTS, 1).any()
    assert view.costs[0]["kv_bytes"] == 2 * len(each.columns) * 2 * 2 * 8  # keys and values, two layers, one head of 8, bf16
    assert [cost["beyond"] for cost in view.costs] == [cost["tokens"] > 40 for cost in view.costs]


def test_an_encoder_looks_both_ways_with_its_marks_around_the_text(tmp_path, tokenizer):
    marked = with_encoder_tokens(tokenizer)
    config = EncoderConfig(vocab_size=marked.vocab_size, pad_id=encoder_tokens(marked).pad, **SIZES).with_head("mlm")
    view = view_attention(save(tmp_path, EncoderModel(config), marked), "the cat sat")
    (each,) = view.maps
    assert (each.rows[0], each.rows[-1]) == ("[CLS]", "[SEP]") and sums_to_one(each) and (each.weights_LHTS > 0).all()
    assert {cost["kv_bytes"] for cost in view.costs} == {0}


def test_an_encoder_decoder_looks_at_its_source_for_each_token_that_it_writes(translator):
    view = view_attention(translator, "the cat sat", "the mat")
    maps = {each.name: each for each in view.maps}
    assert list(maps) == ["encoder", "decoder", "cross"] and all(map(sums_to_one, view.maps))
    written, read = maps["cross"].rows, maps["decoder"].rows
    assert written[-1] == "<|endoftext|>" and read[0] == "<|pad|>" and written[:-1] == read[1:]
    assert maps["cross"].columns == maps["encoder"].rows and view.target == "the mat"
    assert not np.triu(maps["decoder"].weights_LHTS, 1).any()


def test_without_a_target_it_writes_its_own(translator):
    own = view_attention(translator, "the cat sat", max_tokens=12)
    again = view_attention(translator, "the cat sat", own.target, max_tokens=12)
    if len(own.maps[2].rows) == len(again.maps[2].rows):  # bytes that are no text do not come back as the same tokens
        assert np.array_equal(own.maps[2].weights_LHTS, again.maps[2].weights_LHTS)
    assert len(own.maps[2].rows) <= 12


def test_a_recurrent_model_with_attention_has_one_map(tmp_path, tokenizer):
    vocab = {"source_vocab_size": tokenizer.vocab_size, "target_vocab_size": tokenizer.vocab_size}
    config = RecurrentSeq2SeqConfig(embedding_size=6, hidden_size=8, **vocab)
    view = view_attention(save(tmp_path, RecurrentSeq2Seq(config), tokenizer), "the cat", "a mat")
    (each,) = view.maps
    assert each.name == "cross" and each.weights_LHTS.shape[:2] == (1, 1) and sums_to_one(each)
    assert view.costs[0]["kv_bytes"] == 2 * len(each.columns) * (8 + 16)


def test_two_towers_look_at_a_caption_and_at_an_image(tmp_path, tokenizer):
    pytest.importorskip("PIL", reason="Pillow is not installed")
    text = TextTowerConfig(vocab_size=tokenizer.vocab_size, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=12)
    vision = VisionConfig(image_size=16, patch_size=8, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=12)
    folder = save(tmp_path, DualEncoder(DualEncoderConfig(text=text, vision=vision)), tokenizer)
    save_json(folder / "model" / "preprocessor_config.json", ImageProcessor.for_size(16).to_hf())
    save_image(np.random.default_rng(0).integers(0, 255, (20, 20, 3)).astype(np.uint8), tmp_path / "image.png")
    view = view_attention(folder, "the cat", image=tmp_path / "image.png")
    maps = {each.name: each for each in view.maps}
    assert maps["vision"].rows == ("image", "1.1", "1.2", "2.1", "2.2") and maps["vision"].weights_LHTS.shape[:2] == (2, 2)
    assert all(map(sums_to_one, view.maps)) and "".join(maps["text"].columns).count("cat") == 1
    with pytest.raises(UserError, match="Pass --image"):
        view_attention(folder, "the cat")


def test_a_decoder_that_sees_looks_at_patches_before_the_question(tmp_path, tokenizer):
    pytest.importorskip("PIL", reason="Pillow is not installed")
    seeing = with_image_token(tokenizer)
    vision = VisionConfig(image_size=16, patch_size=8, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=12)
    decoder = DecoderConfig(vocab_size=seeing.vocab_size, head_dim=8, num_kv_heads=1, learnable_norm=True, **SIZES)
    model = VisionLanguageModel(VisionLanguageConfig(vision=vision, decoder=decoder, image_id=seeing.token_id("<image>")))
    folder = save(tmp_path, model, seeing)
    save_json(folder / "model" / "preprocessor_config.json", ImageProcessor.for_size(16).to_hf())
    save_image(np.random.default_rng(0).integers(0, 255, (16, 16, 3)).astype(np.uint8), tmp_path / "image.png")
    view = view_attention(folder, "the cat", image=tmp_path / "image.png")
    maps = {each.name: each for each in view.maps}
    assert maps["self"].rows == ("<|user|>", "1.1", "1.2", "2.1", "2.2", "the", "␣cat", "<|end|>", "<|assistant|>")
    assert all(map(sums_to_one, view.maps)) and not np.triu(maps["self"].weights_LHTS, 1).any()


def test_models_that_do_not_attend_are_refused(tmp_path, tokenizer):
    vocab = {"source_vocab_size": tokenizer.vocab_size, "target_vocab_size": tokenizer.vocab_size}
    plain = RecurrentSeq2Seq(RecurrentSeq2SeqConfig(embedding_size=6, hidden_size=8, attention="none", **vocab))
    with pytest.raises(UserError, match="has no attention"):
        view_attention(save(tmp_path / "a", plain, tokenizer), "the cat", "a mat")
    lstm = AwdLstm(AwdLstmConfig(vocab_size=tokenizer.vocab_size, embedding_size=6, hidden_size=8))
    with pytest.raises(UserError, match="does not attend"):
        view_attention(save(tmp_path / "b", lstm, tokenizer), "the cat")


def test_a_long_text_is_cut_and_said_so(decoder):
    view = view_attention(decoder, TEXT * 20, max_tokens=10)
    assert len(view.maps[0].rows) == 10 and view.num_cut > 50
    assert "tokens at its end are left out" in render_attention_page(view)
    assert len(view_attention(decoder, TEXT * 20).maps[0].rows) == 40  # no more than the model takes


def test_a_map_that_is_too_large_shows_the_mean_of_its_heads():
    weights = np.full((2, 3, 4, 5), 0.2, np.float32)
    each = AttentionMap("self", "", ("a",) * 4, ("b",) * 5, weights)
    assert fitting((each,), limit=120) == ((each,), [])
    (merged,), names = fitting((each,), limit=119)
    assert names == ["self"] and merged.weights_LHTS.shape == (2, 1, 4, 5) and sums_to_one(merged)


def test_packed_weights_come_back_within_their_error():
    weights = np.random.default_rng(0).dirichlet(np.full(9, 0.2), size=(2, 3, 5)).astype(np.float32)
    packed = pack_map(AttentionMap("self", "", ("a",) * 5, ("b",) * 9, weights))
    data = np.frombuffer(base64.b64decode(packed["weights"]), np.uint8).reshape(weights.shape)
    assert np.abs((data / 255.0) ** 2 - weights).max() < 0.004


def test_the_page_is_whole_and_holds_no_markup_of_the_text(decoder, tmp_path, capsys):
    evil = "the cat </script><img src=x onerror=alert(1)> sat"
    page = tmp_path / "page.html"
    assert main(["attend", str(decoder), "--text", evil, "--out", str(page), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    html = page.read_text()
    assert "<img" not in html and html.count("</script>") == 2
    assert not re.findall(r"<[^>]*\b(?:src|href)\s*=|url\(|@import|https?://", html)
    data = json.loads(html.split('id="data">')[1].split("</script>")[0])
    assert data["maps"][0]["rows"] == list(view_attention(decoder, evil).maps[0].rows)
    assert record["maps"][0]["last_layer"][0]["looks_at"][0] == [data["maps"][0]["rows"][0], 1.0]  # the first token sees itself alone


def test_mistakes_are_named(decoder, capsys):
    for extra, words in ((["--text", ""], "no tokens"), (["--text", "a", "--target", "b"], "takes no target"),
                         (["--text", "a", "--max-tokens", "1"], "at least 4")):  # fmt: skip
        assert main(["attend", str(decoder), *extra]) == 1
        assert words in capsys.readouterr().err


def test_tokens_are_shown_with_their_spaces_and_bytes(tokenizer):
    assert token_labels(tokenizer, tokenizer.encode("the cat\n")) == ("the", "␣cat", "⏎")
    assert token_labels(tokenizer, tokenizer.encode("é")[:1]) == ("⟨c3⟩",)
    assert token_labels(tokenizer, [tokenizer.end_of_text_id]) == ("<|endoftext|>",)


def test_costs_of_what_is_not_counted_are_left_out(decoder):
    assert context_costs({"model_type": "mamba"}, 3) == []
    values = read_json(decoder / "model" / "config.json")
    assert [cost["tokens"] for cost in context_costs(values, 3)] == [3, 40, 1024, 4096, 16384, 65536]


def test_layers_heads_and_tokens_are_chosen_in_the_browser(translator, tmp_path, open_page):
    path = tmp_path / "page.html"
    view = view_attention(translator, "the cat sat", "the mat")
    path.write_text(render_attention_page(view), encoding="utf-8")
    page = open_page(path.as_uri(), viewport={"width": 390, "height": 844}, color_scheme="dark")
    cross = view.maps[2]
    assert page.locator("#kinds [aria-pressed=true]").inner_text() == "cross"
    assert page.locator("#rows button").all_inner_texts() == list(cross.rows)
    page.locator("#grid button").nth(1).click()  # layer 1, head 2
    assert page.locator("#head").input_value() == "1" and page.locator("#layer").input_value() == "0"
    page.locator("#rows button").nth(2).click()
    page.keyboard.press("ArrowLeft")
    best = int(cross.weights_LHTS[0, 1, 1].argmax())
    assert page.locator("#readout").inner_text().startswith(f"“{cross.rows[1]}” looks at “{cross.columns[best]}” ")
    page.get_by_role("button", name="encoder").click()
    assert page.locator("#title").inner_text().startswith("encoder")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
