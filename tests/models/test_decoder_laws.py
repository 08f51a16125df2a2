"""Laws that hold for a decoder of every family."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from decoder_families import BASE, FAMILIES, LLAMA, random_decoder, some_tokens
from plinth.config import UserError
from plinth.inference.engine import Engine
from plinth.inference.sampling import SamplingParams
from plinth.inference.torch_runner import TorchRunner
from plinth.models.config import RopeScaling
from plinth.models.cost import count_params, forward_flops_per_token
from plinth.models.rope import attention_factor, rotation, scaled_frequencies
from plinth.models.transformer import Transformer
from plinth.ops.rope import rope_frequencies
from plinth.training.objectives import causal_lm_loss
from plinth.training.optim import OptimizerConfig, build_optimizer
from plinth.training.precision import MasterWeights
from plinth.training.step import open_workers, train_step


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Let small products run in one thread: several would wait for each other longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=FAMILIES, ids=list(FAMILIES))
def config(request):
    return FAMILIES[request.param]


@torch.no_grad()
def test_no_future_token_changes_a_past_score(config):
    model, x = random_decoder(config), some_tokens(2, 24)
    changed = x.clone()
    changed[:, 15:] = (changed[:, 15:] + 1) % 96
    before, after = (model.logits(model(y)) for y in (x, changed))
    torch.testing.assert_close(before[:, :15], after[:, :15])
    assert not torch.allclose(before[:, 15:], after[:, 15:])


@torch.no_grad()
def test_padding_company_and_other_documents_change_nothing(config):
    model, x = random_decoder(config), some_tokens(3, 20)
    alone = model(x)
    padded = torch.cat((x, torch.zeros(3, 5, dtype=torch.long)), 1)
    torch.testing.assert_close(model(padded)[:, :20], alone)
    torch.testing.assert_close(model(x[[2, 0, 1]]), alone[[2, 0, 1]])
    row, segments = x.reshape(1, 60), torch.arange(3).repeat_interleave(20)[None]
    torch.testing.assert_close(model(row, segments).view(3, 20, -1), alone)


@torch.no_grad()
def test_the_engine_gives_what_the_whole_text_gives_and_a_batch_its_singles_bits(config):
    """Texts longer than the window and than the length before scaling, in company and alone."""
    model = random_decoder(config)
    prompts = [row[:length].tolist() for row, length in zip(some_tokens(3, 40), (1, 17, 40))]
    params = SamplingParams(temperature=0, max_tokens=12)
    together = Engine(TorchRunner(model), max_batch=3).generate(prompts, params)
    single = Engine(TorchRunner(model), max_batch=1)
    for prompt, completion in zip(prompts, together):
        assert completion == single.generate([prompt], params)[0]
        whole = torch.tensor([prompt + completion.tokens])
        scores = torch.log_softmax(model.logits(model(whole)).float(), -1)[0, len(prompt) - 1 : -1]
        assert scores.argmax(-1).tolist() == completion.tokens
        found = scores.gather(-1, torch.tensor(completion.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), found, atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mistral", "qwen2", "gemma2", "gemma3"])
def test_a_window_wider_than_the_text_is_none(name):
    wide = replace(FAMILIES[name], sliding_window=24)
    full = replace(wide, sliding_window=None, window_layers=None, local_rope_theta=None)
    if name == "gemma3":  # blocks with a window have frequencies of their own: those of the others, here
        wide, full = (replace(config, rope_scaling=None, rope_theta=1e4) for config in (wide, full))
    x = some_tokens(2, 24)
    assert torch.equal(random_decoder(wide)(x), random_decoder(full)(x))
    narrow = random_decoder(replace(wide, sliding_window=23))(x)
    torch.testing.assert_close(narrow[:, :23], random_decoder(full)(x)[:, :23])
    assert not torch.allclose(narrow[:, 23], random_decoder(full)(x)[:, 23])


@torch.no_grad()
def test_the_fused_operation_too_knows_windows():
    config = replace(BASE, learnable_norm=False, sliding_window=24)
    x, full = some_tokens(2, 24), random_decoder(replace(config, sliding_window=None))
    assert torch.equal(random_decoder(config)(x), full(x))
    narrow = random_decoder(replace(config, sliding_window=3))
    alone = torch.stack([narrow.attention_weights(row)["self"] for row in x])
    assert (alone.tril(-3) == 0).all() and (alone.tril(0).triu(-2) > 0).any()


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2"])
def test_grouped_queries_with_as_many_keys_are_plain_multi_head_attention(name):
    """Groups of one equal full heads; and keys and values repeated for each query head equal groups."""
    grouped = random_decoder(replace(FAMILIES[name], num_kv_heads=2))
    full = Transformer(replace(grouped.config, num_kv_heads=4))
    head_dim, state = grouped.config.head_dim, grouped.state_dict()
    for key, value in state.items():
        if ".qkv." in key:
            q, k, v = value.unflatten(0, (-1, head_dim)).split((4, 2, 2))
            state[key] = torch.cat((q, k.repeat_interleave(2, 0), v.repeat_interleave(2, 0))).flatten(0, 1)
    full.load_state_dict(state)
    x = some_tokens(2, 20)
    torch.testing.assert_close(full(x), grouped(x), atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_attention_weights_are_those_that_forward_uses(config):
    """Each row sums to 1, sees nothing to come, and reading the values with them gives what attention gives."""
    model, x = random_decoder(config), some_tokens(1, 20)
    weights = model.attention_weights(x[0])["self"]
    assert weights.shape == (3, 4, 20, 20) and (weights.triu(1) == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 20))
    seen, attention = [], model.layers[1].attention
    attention.register_forward_hook(lambda module, args, y: seen.extend((args[0], y)))
    model(x)
    values = attention.qkv(seen[0])[0].unflatten(-1, (-1, config.head_dim))[:, -config.num_kv_heads :]
    values = values.repeat_interleave(config.num_heads // config.num_kv_heads, 1).transpose(0, 1)
    torch.testing.assert_close(attention.out((weights[1] @ values).transpose(0, 1).flatten(1)), seen[1][0], atol=2e-5, rtol=1e-4)


def test_parameters_and_operations_are_those_of_the_model(config):
    model, counts = Transformer(config), count_params(config)
    embeddings = [p.numel() for name, p in model.named_parameters() if name in ("embed.weight", "position_embed.weight", "head.weight")]
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    assert counts["embedding"] == sum(embeddings) and counts["non_embedding"] == counts["total"] - counts["embedding"]
    assert counts["matrix"] == sum(model.get_parameter(name).numel() for name in model.matrix_parts())
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():  # products that the counter knows
        model.logits(model(torch.zeros(2, 16, dtype=torch.long)))
    assert counter.get_total_flops() == 2 * 16 * forward_flops_per_token(config, 16, causal=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_batch_is_learnt_by_heart_and_every_weight_moves(config, dtype):
    model = Transformer(config).init_weights(torch.Generator().manual_seed(0))
    masters = MasterWeights(model, dtype)
    optimizer = build_optimizer(masters, OptimizerConfig(lr=0.01))
    before = {name: tensor.clone() for name, tensor in masters.tensors.items()}
    x = some_tokens(4, 32)
    targets = (x + x.roll(1, 1)) % 96  # of two tokens, so that attention is needed
    with open_workers(1) as workers:
        losses = [train_step(masters, causal_lm_loss, [(x, targets)], optimizer, workers, lr_scale=1.0).loss_nats for _ in range(40)]
    assert losses[-1] < 0.3 * losses[0]
    assert all(not torch.equal(tensor, before[name]) for name, tensor in masters.tensors.items())


def test_a_start_adds_nothing_to_the_stream(config):
    """Biases start at 0, scales at 1 (an offset and its weight together), and blocks as the identity."""
    model = Transformer(config).init_weights(torch.Generator().manual_seed(0))
    bare = Transformer(replace(config, num_layers=1, window_layers=None)).init_weights(torch.Generator().manual_seed(0))
    x = some_tokens(1, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(x), bare(x))


def test_a_window_costs_what_it_shows():
    """Rows of 5 tokens under a window of 2 attend to 1 + 2 + 2 + 2 + 2 = 9 positions, where they attend to 15 without."""
    windowed = replace(LLAMA, num_layers=2, sliding_window=2, window_layers=(True, False))
    plain, counted = (forward_flops_per_token(config, 5) for config in (replace(LLAMA, num_layers=2), windowed))
    assert plain - counted == 4 * 4 * 8 * (15 - 9) // 5
    assert forward_flops_per_token(replace(windowed, sliding_window=5), 5) == plain


def test_rows_scaled_linearly_are_those_of_a_slower_clock():
    scaled = replace(LLAMA, rope_scaling=RopeScaling("linear", 4.0))
    for slow, plain in zip(rotation(scaled, torch.arange(0, 40, 4)), rotation(LLAMA, torch.arange(10))):
        torch.testing.assert_close(slow, plain)


def test_llama3_keeps_fast_frequencies_and_divides_slow_ones():
    scaling = RopeScaling("llama3", factor=8.0, original_max_seq_len=8192, low_freq_factor=1.0, high_freq_factor=4.0)
    plain = rope_frequencies(128, 500_000.0)
    turns, ratio = 8192 * plain / (2 * torch.pi), scaled_frequencies(plain, scaling, 500_000.0) / plain
    assert (ratio[turns > 4] == 1).all()
    torch.testing.assert_close(ratio[turns < 1], torch.full_like(ratio[turns < 1], 1 / 8))
    assert (ratio.diff() <= 0).all() and ((ratio > 1 / 8 + 1e-3) & (ratio < 1 - 1e-3)).any()


def test_yarn_by_hand():
    """Head of 8 channels, base 100, first length 64: full turns fall from 10.2 to 0.3, the bounds 8 and 1 at channels 0.2 and 1.0."""
    scaling = RopeScaling("yarn", factor=4.0, original_max_seq_len=64, beta_fast=8.0, beta_slow=1.0)
    plain = rope_frequencies(8, 100.0)
    # channel(turns) = 8 ln(64 / (turns 2 pi)) / (2 ln 100): 0.2097 -> 0 and 2.0159 -> 3
    expected = plain * torch.tensor([1.0, 1 / 3 * 0.25 + 2 / 3, 2 / 3 * 0.25 + 1 / 3, 0.25])
    torch.testing.assert_close(scaled_frequencies(plain, scaling, 100.0), expected)
    assert attention_factor(scaling) == pytest.approx(1.1386294361)


def test_a_text_longer_than_the_places_learnt_is_refused():
    model = random_decoder(replace(FAMILIES["gpt2"], max_seq_len=8))
    with pytest.raises(UserError, match="9 tokens is longer than the max_seq_len=8 places"):
        model(some_tokens(1, 9))
