"""BERT and ELECTRA with every head through real files, against transformers, there and back."""

import json

import pytest
import safetensors.torch
import torch

from plinth.config import UserError
from plinth.models.encoder import EncoderModel
from plinth.models.encoder_config import EncoderConfig
from plinth.models.hub import load_decoder, load_model, save_model
from plinth.training.objectives_encoder import classification_loss, masked_lm_loss, span_loss, tagging_loss

LABELS = ("O", "B-X", "I-X")
ARCHITECTURES = [
    *(("bert", f"Bert{name}") for name in ("Model", "ForMaskedLM", "ForPreTraining", "ForSequenceClassification")),
    *(("bert", f"BertFor{name}") for name in ("TokenClassification", "QuestionAnswering")),
    *(("electra", f"Electra{name}") for name in ("Model", "ForMaskedLM", "ForPreTraining", "ForSequenceClassification")),
    *(("electra", f"ElectraFor{name}") for name in ("TokenClassification", "QuestionAnswering")),
]
HEADS = {"Model": "none", "ForMaskedLM": "mlm", "ForPreTraining": "rtd", "ForSequenceClassification": "classify"}
HEADS |= {"ForTokenClassification": "tag", "ForQuestionAnswering": "answer"}


def theirs(family: str, name: str):
    """Return a tiny random model of transformers, every tensor drawn."""
    transformers = pytest.importorskip("transformers")
    shape = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24)
    shape |= dict(max_position_embeddings=14, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    if "Sequence" in name or "Token" in name:
        shape |= dict(id2label=dict(enumerate(LABELS)), label2id={label: i for i, label in enumerate(LABELS)})
    if family == "electra":
        config = transformers.ElectraConfig(**shape, embedding_size=8)
    else:
        config = transformers.BertConfig(**shape, hidden_act="gelu_new")
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(i))
    return model


def inputs():
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(50, (3, 9), generator=generator)
    mask = torch.arange(9) < torch.tensor([[9], [6], [4]])
    return tokens, mask, (torch.arange(9) > 4).long().expand(3, 9).clone()


def close(ours, other):
    """Assert equality to 1e-5 of the scale."""
    assert (ours - other).abs().max() <= 1e-5 * other.abs().max().clamp_min(1.0)


def compare(model, other, name: str) -> None:
    tokens, mask, segments = inputs()
    with torch.no_grad():
        expected = other(tokens, mask, segments, output_hidden_states=True)
        states = list(model.encoder.states(tokens, mask, segments))
        for state, wanted in zip(states, expected.hidden_states, strict=True):
            close(state[mask], wanted[mask])
        if name == "BertModel":
            close(model.pooled(states[-1]), expected.pooler_output)
        if model.config.head == "none":
            return
        scores = model.scores(states[-1])
        if model.config.head == "answer":
            close(scores[mask], torch.stack((expected.start_logits, expected.end_logits), -1)[mask])
        elif model.config.head == "classify":
            close(scores, expected.logits)
        else:
            logits = expected.prediction_logits if name == "BertForPreTraining" else expected.logits
            close(scores[mask], logits[mask])


@pytest.mark.oracle
@pytest.mark.parametrize("family, name", ARCHITECTURES)
def test_published_models_compute_as_transformers_and_go_back_bit_for_bit(family, name, tmp_path):
    transformers = pytest.importorskip("transformers")
    other = theirs(family, name)
    other.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    head = HEADS[name.removeprefix(family.capitalize())]
    assert model.config.head == ("mlm" if name == "BertForPreTraining" else head)
    compare(model, other, name)

    save_model(model, None, tmp_path / "ours")
    back = load_model(tmp_path / "ours")
    assert back.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), back.state_dict().values(), strict=True))
    if name == "BertForPreTraining":
        return  # the head of next-sentence prediction is left behind
    again, report = getattr(transformers, name).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for key, tensor in other.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


@pytest.mark.oracle
@pytest.mark.parametrize("family", ["bert", "electra"])
def test_losses_are_transformers(family, tmp_path):
    prefix, (tokens, mask, segments) = family.capitalize(), inputs()
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(50, (3, 9), generator=generator).masked_fill(~mask, -100)
    tags = torch.randint(3, (3, 9), generator=generator).masked_fill(~mask, -100)
    spans = torch.tensor([[1, 3], [0, 0], [2, 3]])
    cases = {
        "ForMaskedLM": (masked_lm_loss, (tokens, words, mask), {"labels": words}),
        "ForSequenceClassification": (classification_loss, (tokens, mask, segments, torch.tensor([0, 2, 1])), None),
        "ForTokenClassification": (tagging_loss, (tokens, mask, segments, tags), {"labels": tags}),
    }
    for name, (loss, batch, labels) in cases.items():
        other = theirs(family, prefix + name)
        other.save_pretrained(tmp_path / name)
        total, count, _ = loss(load_model(tmp_path / name), batch)
        kinds = {} if name == "ForMaskedLM" else {"token_type_ids": segments}
        expected = other(tokens, attention_mask=mask, **kinds, **(labels or {"labels": batch[-1]})).loss
        assert float(total.detach()) / count == pytest.approx(float(expected.detach()), rel=1e-5)
    other = theirs(family, f"{prefix}ForQuestionAnswering")
    other.save_pretrained(tmp_path / "answer")
    whole = torch.ones_like(mask)  # transformers' softmax takes padding in, ours does not: compared without
    total, count, _ = span_loss(load_model(tmp_path / "answer"), (tokens, whole, segments, spans))
    expected = other(tokens, token_type_ids=segments, start_positions=spans[:, 0], end_positions=spans[:, 1]).loss
    assert float(total.detach()) / count == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.oracle
@pytest.mark.parametrize("family", ["bert", "electra"])
def test_an_untied_masked_token_head_keeps_its_own_matrix(family, tmp_path):
    config = EncoderConfig(
        vocab_size=50, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24, max_seq_len=12, tie_embeddings=False,
        published_as=family, activation="relu",
    )  # fmt: skip
    model = EncoderModel(config).init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.head.bias.normal_(generator=torch.Generator().manual_seed(1))
    save_model(model, None, tmp_path / "ours")
    transformers = pytest.importorskip("transformers")
    other = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "ours").eval()
    tokens = inputs()[0]
    with torch.no_grad():
        close(load_model(tmp_path / "ours").scores(model(tokens)), other(tokens).logits)


def test_the_first_checkpoints_names_are_read_too(tmp_path):
    """Files made from the TensorFlow release call a normalisation's scale gamma and its shift beta."""
    config = EncoderConfig(vocab_size=50, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24, max_seq_len=12)
    model = EncoderModel(config).init_weights(torch.Generator().manual_seed(0))
    save_model(model, None, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    old = {"weight": "gamma", "bias": "beta"}
    tensors = {name: tensor for name, tensor in safetensors.torch.load_file(path).items()}
    names = {name: f"{head}.{old[tail]}" if "LayerNorm" in name else name for name in tensors for head, _, tail in [name.rpartition(".")]}
    safetensors.torch.save_file({names[name]: tensor for name, tensor in tensors.items()}, path)
    (tmp_path / "model" / "plinth.json").unlink()
    loaded = load_model(tmp_path / "model").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


def changed_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    (folder / "plinth.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    "fields, told",
    [
        ({"architectures": ["BertForMultipleChoice"]}, "BertForMultipleChoice.*BertForQuestionAnswering"),
        ({"is_decoder": True}, "is_decoder=True is not supported"),
        ({"hidden_act": "mish"}, "hidden_act='mish' is not supported"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ({"hidden_size": 15}, "hidden_size=15 is not a multiple of num_heads=2"),
        ({"num_hidden_layers": 2}, "encoder.layer.1"),
        ({"vocab_size": 51}, r"word_embeddings.weight has shape \(50, 16\)"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(fields, told, tmp_path):
    config = EncoderConfig(vocab_size=50, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24, max_seq_len=12)
    save_model(EncoderModel(config).init_weights(torch.Generator().manual_seed(0)), None, tmp_path / "model")
    changed_config(tmp_path / "model", **fields)
    with pytest.raises(UserError, match=told):
        load_model(tmp_path / "model")


def test_a_verb_for_decoders_says_which_verbs_take_an_encoder(tmp_path):
    config = EncoderConfig(vocab_size=50, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24, max_seq_len=12)
    save_model(EncoderModel(config).init_weights(torch.Generator().manual_seed(0)), None, tmp_path / "model")
    with pytest.raises(UserError, match="family encoder.*plinth fill"):
        load_decoder(tmp_path / "model")
