"""The decoder: blocks of attention and feed-forward layers on a residual stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from plinth.config import UserError
from plinth.models.attention import Attention, takes_kernel
from plinth.models.config import DecoderConfig
from plinth.models.embedding import Embedding
from plinth.models.kv_cache import PagedCache, View
from plinth.models.mlp import feed_forward
from plinth.models.moe import MixtureOfExperts
from plinth.models.norm import normalisation
from plinth.models.rope import has_own_rotation, rotation
from plinth.ops.linear import linear_rows
from plinth.ops.moe import Routing
from plinth.ops.norm import add_rms_norm
from plinth.ops.segments import positions_in_segments, segment_mask, segment_runs, window_mask
from plinth.ops.shared_rows import SharedRows
from plinth.ops.softcap import softcap

# What a parameter's name ends with; of the others, those of one dimension start at 1, and the matrices are drawn.
START_AT_ZERO = (
    "attention.out.weight", "mlp.down.weight", "mlp.shared.down.weight", "x0_lambda", "value_embed.table.weight", "value_embed.gate.weight",
    ".bias",
)  # fmt: skip


class Block(nn.Module):
    """Pre-norm attention and feed-forward layer; with post-norms, what each gives is normalised too before it is added."""

    def __init__(self, config: DecoderConfig, layer: int = 0):
        super().__init__()
        self.attention_norm = normalisation(config, config.hidden_size)
        self.attention = Attention(config, layer)
        self.post_attention_norm = normalisation(config, config.hidden_size) if config.post_norms else None
        self.mlp_norm = normalisation(config, config.hidden_size)
        self.mlp = MixtureOfExperts(config) if config.has_experts(layer) else feed_forward(config, layer)
        self.post_mlp_norm = normalisation(config, config.hidden_size) if config.post_norms else None

    def forward(
        self, x, delta, cos, sin, mask=None, tokens=None, routings=None, shared=None, wanted=None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the residual stream and what is still to be added to it; return the same two. A value embedding needs the tokens.

        What a router decides is appended to `routings`. Handing on the sum unfinished lets each sum fuse with the normalisation that
        follows it. With places `wanted` (B, R) only these are returned, and the feed-forward layer runs on no others.
        """
        x, normed = self.attention_norm.add(x, delta)
        attended = self.attention(normed, cos, sin, mask, tokens, shared)
        if wanted is not None:
            index = wanted[..., None].expand(-1, -1, x.shape[-1])
            x, attended = x.gather(1, index), attended.gather(1, index)
        x, normed = self.mlp_norm.add(x, self._after_attention(attended))
        given = (routings,) if isinstance(self.mlp, MixtureOfExperts) else ()
        return x, self._after_mlp(self.mlp(normed, *given))

    def forward_rows(self, x, delta, cos, sin, places, tokens, cache: PagedCache, layer: int, views) -> tuple[torch.Tensor, torch.Tensor]:
        """Do what `forward` does for rows of a ragged batch, against the cache; see `Transformer.forward_rows`."""
        x, normed = self.attention_norm.add(x, delta)
        attended = self.attention.forward_rows(normed, cos, sin, places, tokens, cache, layer, views)
        x, normed = self.mlp_norm.add(x, self._after_attention(attended))
        return x, self._after_mlp(self.mlp.forward_rows(normed))

    def _after_attention(self, delta: torch.Tensor) -> torch.Tensor:
        return delta if self.post_attention_norm is None else self.post_attention_norm(delta)

    def _after_mlp(self, delta: torch.Tensor) -> torch.Tensor:
        return delta if self.post_mlp_norm is None else self.post_mlp_norm(delta)


class Transformer(nn.Module):
    """A decoder-only language model; `forward` gives hidden states, `logits` the scores of the next token."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size)
        self.position_embed = nn.Embedding(config.max_seq_len, config.hidden_size) if config.position == "learned" else None
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.final_norm = normalisation(config, config.hidden_size)
        self.head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.resid_lambda = nn.Parameter(torch.ones(config.num_layers)) if config.residual_scalars else None
        self.x0_lambda = nn.Parameter(torch.zeros(config.num_layers)) if config.residual_scalars else None

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> Transformer:
        """Draw the weights: normal with deviation 1/sqrt(fan_in); matrices that write to the residual stream start at 0.

        Zero output projections make every block the identity at first (as in modded-nanogpt and nanochat). What the options of the
        model add starts where it changes nothing, and takes no random numbers: the other weights are those of the model without.
        """
        for name, parameter in self.named_parameters():
            self.init_parameter(name, parameter, generator)
        return self

    @torch.no_grad()
    def init_parameter(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        """Draw one parameter, given whole; all of them in the model's order give what `init_weights` gives."""
        if name.endswith(START_AT_ZERO):
            parameter.zero_()
        elif parameter.dim() < 2:
            parameter.fill_(1.0 - self.config.norm_offset if name.endswith("norm.weight") else 1.0)
        else:
            deviation = self.embed_deviation if name.endswith("embed.weight") else parameter.shape[1] ** -0.5
            parameter.normal_(0.0, deviation, generator=generator)

    @property
    def embed_deviation(self) -> float:
        return 0.02 if self.config.tie_embeddings else 1.0

    @property
    def output_weight(self) -> torch.Tensor:
        """The head's matrix, shape (V, D)."""
        return self.embed.weight if self.head is None else self.head.weight

    def rotation(self, positions: torch.Tensor, *, local: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin for positions, shape (*positions.shape, E), in the model's dtype, or in fp32 for our kernel and on a GPU.

        Both fuse the products with it, so that fp32 costs nothing. `local` gives those of blocks with a sliding window.
        """
        cos, sin = rotation(self.config, positions, local=local)
        fused = positions.device.type != "cpu" or takes_kernel(self.config, self.embed.weight)
        dtype = torch.float32 if fused else self.embed.weight.dtype
        return cos.to(dtype), sin.to(dtype)

    def forward(
        self,
        tokens_BT: torch.Tensor,
        segments_BT: torch.Tensor | None = None,
        routings: list[Routing] | None = None,
        embedded_BTD: torch.Tensor | None = None,
        frozen: int = 0,
        shared: SharedRows | None = None,
        wanted_BR: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return hidden states after the last norm, times the output multiplier, shape (B, T, D); of the places wanted alone, (B, R, D).

        What the routers of experts decide is appended to `routings`, a block after the other.

        With segments, attention keeps to each and positions restart in it, as if each stood alone. `embedded_BTD` takes the place of
        the tokens' rows of the embedding table: among them an image may stand. No gradient reaches the first `frozen` of the
        `depth_groups`: the embedding, and then block after block. With `shared` the tokens are rows in which what several sequences
        begin with stands once; each token gets the hidden state that it has in its sequence.
        """
        learns = torch.is_grad_enabled()
        with torch.set_grad_enabled(learns and not frozen):
            positions, views = self._views(tokens_BT, segments_BT, shared)
            x, delta = self._embedded(tokens_BT, positions, embedded_BTD), None
            first = self._first(x)
        for i, layer in enumerate(self.layers):
            with torch.set_grad_enabled(learns and i + 1 >= frozen):
                last = wanted_BR if i + 1 == len(self.layers) else None
                x, delta = layer(*self._mixed(i, x, delta, first), *views[self.config.slides(i)], tokens_BT, routings, shared, last)
        return self._output(self.final_norm.add(x, delta)[1])

    @torch.no_grad()
    def attention_weights(self, tokens_T: torch.Tensor, embedded_BTD=None) -> dict[str, torch.Tensor]:
        """Return under "self" what each token of one text gives each before it, by plain softmax, fp32 (L, H, T, T)."""
        tokens_BT = tokens_T[None]
        positions, views = self._views(tokens_BT)
        x, delta = self._embedded(tokens_BT, positions, embedded_BTD), None
        first, weights = self._first(x), []
        for i, layer in enumerate(self.layers):
            x, delta = self._mixed(i, x, delta, first)
            view = views[self.config.slides(i)]
            weights.append(layer.attention.weights(layer.attention_norm.add(x, delta)[1], *view)[0])
            x, delta = layer(x, delta, *view, tokens_BT)
        return {"self": torch.stack(weights)}

    def _views(
        self, tokens_BT: torch.Tensor, segments_BT: torch.Tensor | None = None, shared: SharedRows | None = None
    ) -> tuple[torch.Tensor, dict[bool, tuple]]:
        """Return the tokens' positions, and for blocks without a window and with it (cos, sin, mask); a mask of None is causal.

        On a CPU segments attend one at a time, unless there is a window: cos and sin are then those of the longest, without the batch.
        """
        config, length = self.config, tokens_BT.shape[1] if shared is None else shared.width
        positions, mask = torch.arange(length, device=tokens_BT.device), None
        turned = positions
        if segments_BT is not None:
            assert shared is None, "rows that share a beginning are no packed rows"
            positions = positions_in_segments(segments_BT)
            if tokens_BT.device.type == "cpu" and config.sliding_window is None:
                mask = segment_runs(segments_BT)
                turned = torch.arange(length := max(mask.lengths))
            else:
                turned, mask = positions, segment_mask(segments_BT)
        rotates = config.position == "rope"
        if not rotates and length > config.max_seq_len:
            raise UserError(f"a text of {length} tokens is longer than the max_seq_len={config.max_seq_len} places learnt. Cut it.")
        views: dict[bool, tuple] = {False: (*(self.rotation(turned) if rotates else (None, None)), mask)}
        if config.sliding_window is not None:
            if config.sliding_window < length:
                near = window_mask(length, config.sliding_window, tokens_BT.device)
                mask = near if mask is None else mask & near
            local = self.rotation(turned, local=True) if has_own_rotation(config) else views[False][:2]
            views[True] = (*local, mask)
        return positions if shared is None else shared.positions_BL, views

    def _embedded(self, tokens: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Return what enters the first block: token embeddings times their factor, with the places' own where they are learnt.

        The factor is rounded to the weights' type first, as in Gemma.
        """
        x = self.embed(tokens) if rows is None else rows
        if self.config.embed_multiplier != 1.0:
            x = x * torch.tensor(self.config.embed_multiplier, dtype=x.dtype)
        return x if self.position_embed is None else x + self.position_embed(positions)

    def _first(self, embedded: torch.Tensor) -> torch.Tensor | None:
        """Return the normalised embedding that `_mixed` adds to the residual stream; None without residual scalars."""
        return add_rms_norm(embedded, None, self.config.norm_eps)[1] if self.config.residual_scalars else None

    def _mixed(self, i: int, x, delta, first) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the residual stream before block i, and what is still to be added: resid_lambda · (x + delta) + x0_lambda · first.

        Source: modded-nanogpt and nanochat.  Differs: x0_lambda starts at 0, where nanochat's starts at 0.1.
        """
        if self.resid_lambda is None or self.x0_lambda is None:
            return x, delta
        total = x if delta is None else x + delta
        return self.resid_lambda[i] * total + self.x0_lambda[i] * first, None

    def _output(self, normed: torch.Tensor) -> torch.Tensor:
        factor = self.config.output_multiplier
        return normed if factor == 1.0 else normed * factor

    def matrix_parts(self) -> dict[str, tuple[int, ...]]:
        """Return the hidden matrices by parameter name, each with the row counts of the projections fused in it."""
        config = self.config
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        parts = {}
        for i in range(config.num_layers):
            parts[f"layers.{i}.attention.qkv.weight"] = tuple(n * config.head_dim for n in heads)
            parts[f"layers.{i}.attention.out.weight"] = (config.hidden_size,)
            parts |= {f"layers.{i}.mlp.{name}": rows for name, rows in self.layers[i].mlp.matrix_parts().items()}
        return parts

    def depth_groups(self) -> list[list[str]]:
        """Return the parameters' names from the input to the output: embeddings, each block, and what stands over all blocks.

        Finetuning gives each group a rate of its own (Howard and Ruder 2018, arXiv:1801.06146). A tied head is in the first group; the last
        is empty where nothing of it has weights.
        """
        groups: list[list[str]] = [[] for _ in range(len(self.layers) + 2)]
        for name, _ in self.named_parameters():
            kind, _, rest = name.partition(".")
            place = int(rest.split(".")[0]) + 1 if kind == "layers" else 0 if kind in ("embed", "position_embed") else -1
            groups[place].append(name)
        return groups

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return next-token scores, shape (..., V); fp32 where they are capped."""
        return self._capped(nn.functional.linear(hidden, self.output_weight))

    def _capped(self, logits: torch.Tensor) -> torch.Tensor:
        cap = self.config.logit_softcap
        return logits if cap is None else softcap(logits, cap)

    @torch.no_grad()
    def forward_rows(self, tokens_N, positions_N, places_N, cache: PagedCache, views: Sequence[View]) -> torch.Tensor:
        """Run N rows of a ragged batch against the cache; returns hidden states (N, D). N is a multiple of ROW_TILE.

        Row i is the token at position positions_N[i] of its sequence; its keys and values go to place places_N[i] of the
        cache. Those of all rows are written before any row attends, so the rows of one prompt may come in one call.
        Views tell which rows attend how, in order from row 0; rows behind the last one are padding.
        """
        config = self.config
        rotations = {local: cache.rotation(positions_N, local=local) for local in {config.slides(i) for i in range(config.num_layers)}}
        # Rows that only fill a chunk may stand behind the last place that is learnt.
        x, delta = self._embedded(tokens_N, positions_N.clamp_max(config.max_seq_len - 1)), None
        first = self._first(x)
        for i, layer in enumerate(self.layers):
            x, delta = self._mixed(i, x, delta, first)
            x, delta = layer.forward_rows(x, delta, *rotations[config.slides(i)], places_N, tokens_N, cache, i, views)
        return self._output(self.final_norm.add(x, delta)[1])

    @torch.no_grad()
    def logits_rows(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Return next-token scores of N rows, a multiple of ROW_TILE, each independent of its company bit for bit."""
        return self._capped(linear_rows(hidden_ND, self.output_weight))
