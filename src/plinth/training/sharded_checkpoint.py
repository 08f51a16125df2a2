"""Checkpoints that all ranks write together and any number of ranks, also one, can read.

The tensors lie in torch.distributed.checkpoint's format: each rank writes its blocks, and a reader takes of each file what it needs.
Fused matrices are stored in their parts, so that every degree of tensor parallelism finds its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from plinth.config import UserError
from plinth.training.checkpoint import MANY_RANKS_FILE
from plinth.training.sharded_weights import ShardedWeights
from plinth.training.sharding import fused_name, num_elements

METADATA_FILE = MANY_RANKS_FILE  # the format gives the name; its presence tells such a checkpoint


def is_sharded(folder: Path) -> bool:
    """Return whether a checkpoint was written by several ranks."""
    return (folder / METADATA_FILE).exists()


def distributed_tensors(masters: ShardedWeights, shards: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return views of this rank's shards that know their place in the whole; keys are `prefix/.../name of a parameter`."""
    parameters = dict(zip(masters.names, masters.parameters))
    views: dict[str, torch.Tensor] = {}
    for key, shard in shards.items():
        name = key.rpartition("/")[2]
        if name not in parameters or shard.shape != masters.tensors[name].shape:
            views[key] = shard  # alike on all ranks
            continue
        whole: Any = parameters[name]
        views[key] = DTensor.from_local(
            shard, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )
    return views


def writer(folder: Path) -> dcp.FileSystemWriter:
    """Return a writer of one flushed file a rank."""
    return dcp.FileSystemWriter(folder, single_file_per_rank=True, sync_files=True)


def stored_shapes(folder: Path) -> dict[str, torch.Size]:
    """Return the whole shapes of a checkpoint's tensors by key. Raises UserError when its table of contents cannot be read."""
    try:
        contents = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    except Exception as error:  # a pickle: a damaged one raises anything
        raise UserError(f"{folder / METADATA_FILE} is damaged: {error!r}.") from None
    return {key: entry.size for key, entry in contents.items() if isinstance(entry, TensorStorageMetadata)}


def read_whole(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint of several ranks, whole and under the plain model's names, on one process."""
    contents = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    pieces = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in contents.items()}
    dcp.load(pieces, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    whole: dict[str, Any] = {}
    for key in sorted(pieces, key=lambda key: (fused_name(key)[0], fused_name(key)[1] or 0)):
        name, part = fused_name(key)
        whole.setdefault(name, []).append(pieces[key])
    return {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in whole.items()}


def read_blocks(folder: Path, masters: ShardedWeights, shards: Mapping[str, torch.Tensor]) -> None:
    """Fill this rank's `shards` in place from a checkpoint of any number of ranks; all ranks must call it."""
    dcp.load(distributed_tensors(masters, shards), storage_reader=dcp.FileSystemReader(folder), process_group=masters.ranks.host_group)


def read_blocks_of_plain(file: Path, masters: ShardedWeights, shards: Mapping[str, torch.Tensor]) -> None:
    """Fill this rank's `shards` in place from the safetensors file that one process wrote; only the blocks are read."""
    rows = masters.model.matrix_parts()
    with safe_open(file, "pt") as stored:
        for key, shard in shards.items():
            name = key.rpartition("/")[2]
            if name not in masters.tensors:
                shard.copy_(stored.get_tensor(key))
                continue
            fused, index = fused_name(name)
            first, *others = masters.block(name)
            offset = sum(rows[fused][:index]) if index is not None else 0
            place = (slice(first.start + offset, first.stop + offset), *others)
            if num_elements(place):
                shard.copy_(stored.get_slice(key.removesuffix(name) + fused)[place])
