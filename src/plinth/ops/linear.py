"""Linear layers whose result for a row does not depend on how many other rows share the call.

A matrix library picks its kernel, and with it the order of additions, by the number of rows: the same row can round
differently alone and in a batch. Here rows always pass in tiles of ROW_TILE; a wider call is made only where this
machine's kernel was seen to give the very same bits as the tiles.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F

ROW_TILE = 16
WIDEST_TILE = 256


def pad_rows(count: int) -> int:
    """Return the smallest multiple of ROW_TILE that holds `count` rows."""
    return -(-count // ROW_TILE) * ROW_TILE


def linear_rows(x_ND: torch.Tensor, weight_FD: torch.Tensor) -> torch.Tensor:
    """Return x · weightᵀ, (N, F), each row bit for bit as in any other company; N is a multiple of ROW_TILE."""
    num_rows = x_ND.shape[0]
    if num_rows == ROW_TILE:
        return F.linear(x_ND, weight_FD)
    assert num_rows % ROW_TILE == 0, f"{num_rows} rows are not whole tiles of {ROW_TILE}"
    kind = (*weight_FD.shape, weight_FD.dtype, weight_FD.device, torch.get_num_threads())
    parts, start = [], 0
    while start < num_rows:
        width = WIDEST_TILE
        while width > ROW_TILE and (width > num_rows - start or not gives_same_bits(width, *kind)):
            width //= 2
        parts.append(F.linear(x_ND[start : start + width], weight_FD))
        start += width
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@lru_cache(maxsize=1024)
def gives_same_bits(rows: int, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device, num_threads: int) -> bool:
    """Try whether one call with `rows` rows equals calls with ROW_TILE rows, bit for bit, on random numbers.

    Which kernel runs depends on the shape, the dtype and the threads, never on the numbers; a kernel that adds in
    another order differs in some of rows x out_features random results.
    """
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(rows, in_features, generator=generator).to(device, dtype)
    weight_FD = torch.randn(out_features, in_features, generator=generator).to(device, dtype)
    tiles = torch.cat([F.linear(tile, weight_FD) for tile in x_ND.split(ROW_TILE)])
    return torch.equal(F.linear(x_ND, weight_FD), tiles)
