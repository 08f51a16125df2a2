"""The runner on our own kernels: one call in C runs the whole model for all rows, on weights packed once.

A row's bits do not depend on its company, on how a prompt was cut, on blocks or on the number of threads: every product adds its
terms in one order, and attention takes the blocks of a sequence in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from plinth.config import UserError
from plinth.inference.runner import BLOCK_TOKENS, Rows, check_same_shape
from plinth.models.config import DecoderConfig
from plinth.models.kv_cache import untouched_zeros
from plinth.models.transformer import Transformer
from plinth.ops import decoder, kernels
from plinth.ops.matrix import PackedMatrix, Stretch, most_packed_bytes, pack_bf16
from plinth.ops.quantise import pack_int4, pack_int8
from plinth.ops.rope import rope_table

PACK = {"bf16": pack_bf16, "int8": pack_int8, "int4": pack_int4}
PACK_ENDS = PACK | {"int4": pack_int8}  # embedding and head: 4 bits lose more there than in layers, for their share of memory
LOG2E = 1.4426950408889634  # the kernels' exponentials have base 2


def why_not_native(config: DecoderConfig, weights: str = "bf16") -> str | None:
    """Return why this runner does not take a model, or None when it does."""
    if weights not in PACK:
        return f"weights={weights} is none of {', '.join(PACK)}"
    if reason := kernels.why_not():
        return reason
    if config.head_dim not in decoder.HEAD_DIMS:
        return f"head_dim={config.head_dim} is none of {', '.join(map(str, decoder.HEAD_DIMS))}"
    if extras := sorted(set(config.extras) - {"logit_softcap"}):
        return f"the kernels lack {', '.join(extras)}"
    return None


class NativeRunner:
    """Runs a decoder's packed weights over a cache in blocks. Not for use from several threads at once.

    weights: format of the matrices. num_threads: threads of a call (None: as many as torch uses at the call).
    The model is read, not kept: it may be dropped. Raises UserError where `why_not_native` gives a reason.
    """

    uniform = True
    device = torch.device("cpu")

    def __init__(self, model: Transformer, weights: str = "bf16", *, num_threads: int | None = None):
        if reason := why_not_native(model.config, weights):
            raise UserError(f"weights={weights} cannot run on the native kernels: {reason}. Use weights=fp32.")
        self.config, self.weights, self.num_threads = model.config, weights, num_threads
        self.vocab_size, self.max_seq_len = model.config.vocab_size, model.config.max_seq_len
        self._keys = self._values = torch.empty(0, dtype=torch.bfloat16)
        self._workspace = torch.empty(0, dtype=torch.uint8)
        self._logits = torch.empty(0, self.vocab_size)
        self.reload(model)

    @torch.no_grad()
    def reload(self, model: Transformer) -> None:
        """Pack the weights of a model of the same shape anew; the cache's content, which belongs to the old ones, is stale then."""
        check_same_shape(model, self.config)
        config = self.config
        cos, sin = rope_table(torch.arange(config.max_seq_len), config.head_dim, config.rope_theta)
        self._tables = (cos.contiguous(), sin.contiguous())
        ends = [model.output_weight, *(() if model.head is None else (model.embed.weight,))]
        place = Stretch(most_packed_bytes([*(matrix for layer in model.layers for matrix in _matrices(layer)), *ends])).place
        self._layers = [_pack_layer(layer, partial(PACK[self.weights], place=place)) for layer in model.layers]
        self._head, *untied = [PACK_ENDS[self.weights](matrix, place) for matrix in ends]
        self._embed = untied[0] if untied else self._head
        self._final_norm = _scales(model.final_norm.weight)
        self._link()

    def _link(self) -> None:
        """Write down for C where everything lies."""
        config, layers = self.config, (decoder.Layer * self.config.num_layers)()
        for i, (matrices, norms) in enumerate(self._layers):
            keys, values = (None, None) if not len(self._keys) else (self._keys[i].data_ptr(), self._values[i].data_ptr())
            layers[i] = decoder.Layer(*(matrix.struct() for matrix in matrices), *map(_address, norms), keys, values)
        factor = config.attention_multiplier * config.head_dim**-0.5 * LOG2E
        self._decoder = decoder.Decoder(
            config.hidden_size, config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim,
            config.norm_eps, factor, config.output_multiplier, config.logit_softcap or 0.0,
            self._embed.struct(), self._head.struct(), _address(self._final_norm), *map(_address, self._tables), layers,
        )  # fmt: skip

    @property
    def weight_bytes(self) -> int:
        """Memory of the packed matrices, of which a decoded token reads all but an untied embedding."""
        matrices = [matrix for layer, _ in self._layers for matrix in layer] + [self._head]
        return sum(matrix.bytes for matrix in matrices) + (0 if self._embed is self._head else self._embed.bytes)

    def block_bytes(self) -> int:
        """Return the bytes of keys and values that one block takes."""
        return 4 * self.config.num_layers * self.config.num_kv_heads * BLOCK_TOKENS * self.config.head_dim

    def allocate(self, num_blocks: int) -> None:
        """Make the cache, num_blocks blocks; what an earlier one held is lost."""
        config = self.config
        shape = (config.num_layers, num_blocks, config.num_kv_heads * BLOCK_TOKENS * config.head_dim)
        self._keys, self._values = (untouched_zeros(shape, torch.bfloat16) for _ in range(2))
        self._link()

    def forward(self, rows: Rows) -> torch.Tensor:
        """Return the logits of the wanted rows, float32 (M, V), valid until the next call."""
        count = len(rows.wanted)
        if len(self._logits) < count:
            self._logits = torch.empty(count, self.vocab_size)
        logits = self._logits[:count]
        self._run(rows, logits=logits)
        return logits

    def hidden(self, rows: Rows) -> torch.Tensor:
        """Return the hidden states after the last norm of the wanted rows, float32 (M, D)."""
        hidden = torch.empty(len(rows.wanted), self.config.hidden_size)
        self._run(rows, hidden=hidden)
        return hidden

    def _run(self, rows: Rows, logits: torch.Tensor | None = None, hidden: torch.Tensor | None = None) -> None:
        if not len(rows.tokens):
            return
        arrays = [
            np.ascontiguousarray(array, dtype=np.int32)
            for array in (rows.tokens, rows.positions, rows.sequences, rows.block_tables, rows.wanted)
        ]
        call = decoder.Call(
            len(rows.tokens), rows.block_tables.shape[1], len(rows.wanted), self.num_threads or torch.get_num_threads(),
            *(array.__array_interface__["data"][0] for array in arrays), _address(logits), _address(hidden), None,
        )  # fmt: skip
        needed = decoder.workspace_bytes(self._decoder, call)
        if len(self._workspace) < needed:
            self._workspace = torch.empty(needed, dtype=torch.uint8)
        call.memory = self._workspace.data_ptr()
        decoder.forward(self._decoder, call)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks, each pair (source, target).

        numpy copies them on this thread: PyTorch would wake threads of its own, which then wait on the core that the next call needs.
        """
        for cache in (self._keys.view(torch.int16).numpy(), self._values.view(torch.int16).numpy()):
            for source, target in pairs:
                cache[:, target] = cache[:, source]


def _pack_layer(layer, pack) -> tuple[list[PackedMatrix], list[torch.Tensor | None]]:
    qkv, out, gate_up, down = _matrices(layer)
    norms = [layer.attention_norm, layer.mlp_norm, layer.attention.q_norm, layer.attention.k_norm]
    return [pack(qkv), pack(out), pack(interleaved(gate_up)), pack(down)], [_scales(norm.weight) for norm in norms]


def _matrices(layer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return layer.attention.qkv.weight, layer.attention.out.weight, layer.mlp.gate_up.weight, layer.mlp.down.weight


def interleaved(gate_up_2FD: torch.Tensor) -> torch.Tensor:
    """Return the rows as sixteen gates, their sixteen ups, and so on, filled up with zeros to whole panels of both."""
    gate, up = (F.pad(half, (0, 0, 0, -len(half) % 32)).unflatten(0, (-1, 16)) for half in gate_up_2FD.chunk(2))
    return torch.stack((gate, up), 1).flatten(0, 2)


def _scales(weight: torch.Tensor | None) -> torch.Tensor | None:
    return None if weight is None else F.pad(weight.detach().float(), (0, -len(weight) % 32)).clone()


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
