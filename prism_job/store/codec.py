"""Rows <-> bytes, in the two codecs of docs/architecture.md, Method. Knows no files and no scores.

Shapes: N rows, D dims, W = D / 8 bytes of signs, S = D / 256 blocks that share a scale.
Every row carries a float32 factor `unit_N`, so that float16 holds relative sizes and cannot overflow.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 256
"""Dims that share one scale: smaller blocks take more bytes, larger ones mix layers of different size."""

Float32 = NDArray[np.float32]
Arrays = dict[str, NDArray[Any]]


def encode_sign(rows_ND: Float32) -> Arrays:
    """One sign bit a dim and one scale (the block's mean absolute value, which is the least-squares fit) for each 256.

    Returns `signs` uint8 [N, W] (bit set where the value is >= 0, first dim in the lowest bit), `scales` float16 [N, S]
    relative to `unit` float32 [N]. Bytes a row: D/8 + D/128 + 4.
    """
    num_rows, dims = rows_ND.shape
    blocks = np.abs(rows_ND).reshape(num_rows, dims // BLOCK, BLOCK).mean(axis=2, dtype=np.float64)
    unit = blocks.max(axis=1, initial=0.0)
    safe = np.where(unit > 0, unit, 1.0)[:, None]
    return {
        "signs": np.packbits(rows_ND >= 0, axis=1, bitorder="little"),
        "scales": (blocks / safe).astype(np.float16),
        "unit": unit.astype(np.float32),
    }


def decode_sign(arrays: Arrays) -> Float32:
    """The rows that `encode_sign` stands for: ± scale. float32 [N, D]."""
    bits = np.unpackbits(arrays["signs"].view(np.uint8), axis=1, bitorder="little").astype(np.float32)
    scales = arrays["scales"].astype(np.float32) * arrays["unit"].astype(np.float32)[:, None]
    return (2 * bits - 1) * np.repeat(scales, BLOCK, axis=1)


def encode_float16(rows_ND: Float32) -> Arrays:
    """`values` float16 [N, D] relative to the row's largest absolute value, `unit` float32 [N]."""
    unit = np.abs(rows_ND).max(axis=1, initial=0.0)
    safe = np.where(unit > 0, unit, np.float32(1.0))[:, None]
    return {"values": (rows_ND / safe).astype(np.float16), "unit": unit.astype(np.float32)}


def decode_float16(arrays: Arrays) -> Float32:
    """float32 [N, D]."""
    values: Float32 = arrays["values"].astype(np.float32) * arrays["unit"].astype(np.float32)[:, None]
    return values


def zeros(kind: str, num_rows: int, dims: int) -> Arrays:
    """Stored arrays of that many zero rows, for rows that cannot be used."""
    zero_row = encode(kind, np.zeros((1, dims), np.float32))
    return {name: np.zeros((num_rows, *array.shape[1:]), array.dtype) for name, array in zero_row.items()}


def encode(kind: str, rows_ND: Float32) -> Arrays:
    return encode_sign(rows_ND) if kind == "sign" else encode_float16(rows_ND)
