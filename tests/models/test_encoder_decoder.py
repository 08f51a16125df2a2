"""Laws of the encoder-decoders, and their numbers beside transformers' through real files."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from plinth.config import UserError
from plinth.inference.beam import BeamParams, beam_search
from plinth.inference.sampling_params import SamplingParams
from plinth.inference.step_space import StepSpace, sample_sequences
from plinth.models.encoder_decoder import EncoderDecoder, relative_buckets, sinusoids
from plinth.models.encoder_decoder_config import EncoderDecoderConfig
from plinth.models.hub import load_decoder, load_model, save_model

SHAPE = {"vocab_size": 61, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "head_dim": 8, "intermediate_size": 48, "max_seq_len": 90}
KINDS = {
    "transformer": {"num_decoder_layers": 3},
    "two vocabularies": {"target_vocab_size": 47, "activation": "silu", "scale_embedding": False},
    "own head": {"tie_embeddings": False, "target_vocab_size": 61, "output_bias": True, "activation": "gelu"},
    "t5": {"style": "t5", "head_dim": 12, "norm_eps": 1e-6, "num_decoder_layers": 1, "relative_buckets": 8, "relative_max_distance": 20},
    "t5 1.1": {"style": "t5", "activation": "geglu", "tie_embeddings": False, "norm_eps": 1e-6},
}


def make(kind: str) -> EncoderDecoder:
    """A model in which every parameter matters."""
    model, generator = EncoderDecoder(EncoderDecoderConfig(**SHAPE | KINDS[kind])), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            scale = 1.5 * tensor.shape[1] ** -0.5 if tensor.dim() > 1 and "embed" not in name else 0.7
            tensor.normal_(1.0 if "norm.weight" in name else 0.0, scale, generator=generator)
    return model.eval()


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return make(request.param)


def batch(model, lengths=(9, 5, 7), targets=8, seed=1):
    """Sources of some lengths padded on the right, and decoder inputs."""
    generator, config = torch.Generator().manual_seed(seed), model.config
    source = torch.randint(2, config.vocab_size, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    inputs = torch.randint(2, config.output_size, (len(lengths), targets), generator=generator)
    inputs[:, 0] = config.start_id
    return torch.where(mask, source, config.pad_id), mask, inputs


def close(a, b, tolerance=1e-5):
    return (a - b).abs().max() <= tolerance * b.abs().max()


@torch.no_grad()
def encoded(model, source, mask):
    return model._encoded(source, mask[:, None, None], model._drop(None))


@torch.no_grad()
def test_no_target_token_sees_later_ones_and_every_one_sees_the_whole_source(model):
    source, mask, inputs = batch(model)
    whole = model(source, mask, inputs)
    changed = inputs.clone()
    changed[:, 5:] = 3
    assert close(model(source, mask, changed)[:, :5], whole[:, :5])
    source[:, 0] = (source[:, 0] + 7) % model.config.vocab_size
    assert ((model(source, mask, inputs) - whole).abs().amax(-1) > 1e-4).all()
    source, *_ = batch(model)
    before = encoded(model, source, mask)
    source[0, 8] = (source[0, 8] + 7) % model.config.vocab_size
    assert not close(encoded(model, source, mask)[0, 0], before[0, 0]), "the encoder looks both ways"


@torch.no_grad()
def test_padding_and_company_change_nothing(model):
    source, mask, inputs = batch(model)
    together = model(source, mask, inputs)
    for i in range(len(source)):
        alone = model(source[i : i + 1, mask[i]], None, inputs[i : i + 1, :6])
        assert close(together[i, :6], alone[0])
    order = [2, 0, 1]
    assert close(model(source[order], mask[order], inputs[order]), together[order])


def test_steps_with_caches_give_what_the_whole_target_gives(model):
    source, mask, inputs = batch(model)
    with torch.no_grad():
        whole = model.logits(model(source, mask, inputs))
    state = model.begin(model.encode(source, mask), 3)
    for t in range(inputs.shape[1]):
        logits, state = model.step(inputs[:, t], state)
        assert close(logits, whole[:, t])
    chosen = torch.tensor([2, 2, 0])
    logits, _ = model.step(torch.tensor([4, 5, 6]), state.select(chosen))
    more = torch.cat((inputs[chosen], torch.tensor([[4], [5], [6]])), 1)
    with torch.no_grad():
        assert close(logits, model.logits(model(source[chosen], mask[chosen], more))[:, -1])


def test_a_state_goes_on_more_than_once(model):
    source, mask, inputs = batch(model)
    _, state = model.step(inputs[:, 0], model.begin(model.encode(source, mask), 3))
    first = model.step(inputs[:, 1], state)[0]
    model.step(inputs[:, 2], state)
    assert torch.equal(model.step(inputs[:, 1], state.select(torch.arange(3)))[0], first)


@torch.no_grad()
def test_attention_weights_are_those_that_the_model_reads_with(model):
    source, mask, inputs = batch(model, lengths=(6,), targets=5)
    weights = model.attention_weights(source[0], inputs[0])
    config = model.config
    assert weights["encoder"].shape == (config.num_layers, 4, 6, 6)
    assert weights["decoder"].shape == (config.decoder_layers, 4, 5, 5) and not weights["decoder"].triu(1).any()
    assert weights["cross"].shape == (config.decoder_layers, 4, 5, 6)
    assert all(torch.allclose(w.sum(-1), torch.ones(())) for w in weights.values())
    layer = model.encoder.layers[0]
    x = model._embedded(model.embed, source, 0, model._drop(None))
    now = layer._read(x, layer.attention_norm)
    values = layer.attention.project(now)[2]
    read = layer.attention.out((weights["encoder"][:1] @ values).transpose(1, 2).flatten(2))
    bias = None if model.encoder.bias is None else model.encoder.bias(6, 6)
    assert close(read, layer.attention(now, bias=bias))


def test_dropout_follows_its_generator_and_touches_nothing_without(model):
    source, mask, inputs = batch(model)
    with torch.no_grad():
        one, two = (model(source, mask, inputs, torch.Generator().manual_seed(3)) for _ in range(2))
        assert torch.equal(one, two) and not close(one, model(source, mask, inputs))


def test_every_parameter_gets_a_gradient_and_muon_its_matrices(model):
    source, mask, inputs = batch(model)
    loss = F.cross_entropy(model.logits(model(source, mask, inputs)).flatten(0, 1), inputs.flatten() % model.config.output_size)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    state, parts = model.state_dict(), model.matrix_parts()
    assert all(sum(rows) == state[name].shape[0] for name, rows in parts.items())
    assert {name for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name} == set(parts)


def test_weights_are_drawn_so_that_blocks_begin_as_the_identity():
    for kind in KINDS:
        model = EncoderDecoder(EncoderDecoderConfig(**SHAPE | KINDS[kind])).init_weights(torch.Generator().manual_seed(0))
        source, mask, inputs = batch(model)
        with torch.no_grad():
            logits = model.logits(model(source, mask, inputs))
            assert torch.isfinite(logits).all() and logits.std() < 3
            nats = F.cross_entropy(logits.flatten(0, 1), inputs.roll(-1, 1).flatten() % model.config.output_size)
            assert nats < math.log(model.config.output_size) + (0.2 if not model.config.is_t5 and model.config.tie_embeddings else 3.0)
        again = EncoderDecoder(model.config).init_weights(torch.Generator().manual_seed(0))
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_sinusoids_are_the_papers():
    table = sinusoids(50, 16)
    for position, column in ((0, 3), (7, 0), (31, 5)):
        angle = position / 10_000 ** (2 * column / 16)
        assert table[position, column].item() == pytest.approx(math.sin(angle), abs=1e-6)
        assert table[position, 8 + column].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_near_distances_have_buckets_of_their_own_and_far_ones_share():
    distance = torch.arange(-200, 201)
    two = relative_buckets(distance, 32, 128, both_sides=True)
    assert two[200 - 7 : 200 + 1].tolist() == [7, 6, 5, 4, 3, 2, 1, 0] and two[201:208].tolist() == [17, 18, 19, 20, 21, 22, 23]
    assert set(two.tolist()) == set(range(32)) - {16} and two[0] == two[200 - 128] == 15 and two[-1] == 31
    back = relative_buckets(distance, 32, 128, both_sides=False)
    assert (back[200:] == 0).all() and back[:72].unique().tolist() == [31] and back[200 - 15 : 200].tolist() == list(range(15, 0, -1))


@pytest.mark.parametrize("changes,text", [
    ({"head_dim": 6}, "do not make hidden_size=32"),
    ({"style": "t5", "target_vocab_size": 9}, "the transformer's"),
    ({"style": "t5", "relative_buckets": 30}, "multiple of 4"),
    ({"tie_embeddings": False}, "Set target_vocab_size"),
    ({"dropout": 1.0}, "dropout=1.0"),
    ({"end_id": 61}, "end_id=61 lies outside"),
    ({"activation": "tanh"}, "activation='tanh'"),
])  # fmt: skip
def test_a_shape_that_cannot_be_is_refused(changes, text):
    with pytest.raises(UserError, match=text):
        EncoderDecoderConfig(**SHAPE | changes)


def test_a_folder_gives_the_same_model_back_and_is_no_decoder(model, tmp_path):
    save_model(model, None, tmp_path / "m")
    back = load_model(tmp_path / "m")
    assert back.config == model.config
    assert all(torch.equal(a, back.state_dict()[name]) for name, a in model.state_dict().items())
    with pytest.raises(UserError, match="family encoder-decoder.*plinth translate"):
        load_decoder(tmp_path / "m")


def peer(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()


@pytest.mark.oracle
def test_transformers_gives_the_same_logits_hidden_states_and_loss(model, tmp_path):
    save_model(model, None, tmp_path / "m")
    theirs, (source, mask, inputs) = peer(tmp_path / "m"), batch(model)
    labels = torch.randint(2, model.config.output_size, inputs.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        out = theirs(input_ids=source, attention_mask=mask.long(), decoder_input_ids=inputs, output_hidden_states=True)
        hidden = model(source, mask, inputs)
        assert close(model.logits(hidden), out.logits)
        assert close(encoded(model, source, mask)[mask], out.encoder_last_hidden_state[mask])
        last = out.decoder_hidden_states[-1]
        assert close(hidden, last * 32**-0.5 if model.config.is_t5 and model.config.tie_embeddings else last)
        shifted = torch.cat((inputs[:, :1], labels[:, :-1]), 1)
        ours = F.cross_entropy(model.logits(model(source, mask, shifted)).flatten(0, 1), labels.flatten())
        if model.config.target_vocab_size is None:  # theirs counts the source's vocabulary
            assert close(ours, theirs(input_ids=source, attention_mask=mask.long(), labels=labels).loss)
    assert sum(p.numel() for p in theirs.parameters()) - positions(theirs) == sum(p.numel() for p in model.parameters())


def positions(theirs) -> int:
    return sum(p.numel() for name, p in theirs.named_parameters() if "embed_positions" in name)


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["transformer", "t5", "t5 1.1"])
def test_transformers_writes_the_same_64_tokens(kind, tmp_path):
    model = make(kind)
    save_model(model, None, tmp_path / "m")
    theirs, (source, mask, _) = peer(tmp_path / "m"), batch(model)
    sources = [row[shown].tolist() for row, shown in zip(source, mask)]
    settings = {"input_ids": source, "attention_mask": mask.long(), "max_new_tokens": 64, "do_sample": False}
    greedy = theirs.generate(**settings, min_new_tokens=64)[:, 1:].tolist()
    params = SamplingParams(temperature=0, max_tokens=64, min_tokens=64)
    ours = sample_sequences(model, sources, params, (model.config.end_id,), start_id=model.config.start_id)
    assert [one.tokens for one in ours] == greedy
    found = theirs.generate(**settings | {"max_new_tokens": 12}, num_beams=4, length_penalty=0.6, num_return_sequences=2)
    space = StepSpace(model, model.config.start_id)
    beams = beam_search(space, sources, BeamParams(num_beams=4, max_tokens=12, length_penalty=0.6, num_return=2), (model.config.end_id,))
    clean = [[token for token in row[1:].tolist() if token not in (model.config.end_id, model.config.pad_id)] for row in found]
    assert [[token for token in beam.tokens if token != model.config.pad_id] for each in beams for beam in each] == clean


@pytest.mark.oracle
def test_what_transformers_writes_is_read_and_written_back(model, tmp_path):
    save_model(model, None, tmp_path / "ours")
    peer(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    back = load_model(tmp_path / "theirs")
    state = back.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert dataclasses.replace(back.config, output_bias=model.config.output_bias, max_seq_len=90) == model.config
    save_model(back, None, tmp_path / "again")
    source, mask, inputs = batch(model)
    with torch.no_grad():
        first, second = (
            peer(tmp_path / name)(input_ids=source, attention_mask=mask.long(), decoder_input_ids=inputs) for name in ("theirs", "again")
        )
    assert torch.equal(first.logits, second.logits)


def test_published_fields_that_we_cannot_compute_are_named(tmp_path):
    import json

    for kind, changes, text in (
        ("transformer", {"decoder_ffn_dim": 9}, "encoder_ffn_dim=48 and decoder_ffn_dim=9 differ"),
        ("transformer", {"activation_function": "tanh"}, "activation_function='tanh'"),
        ("t5", {"feed_forward_proj": "gated-silu"}, "feed_forward_proj='gated-silu'"),
    ):
        folder = tmp_path / text[:9]
        save_model(make(kind), None, folder)
        values = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(values))
        with pytest.raises(UserError, match=text):
            load_model(folder)
