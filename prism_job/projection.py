"""The random numbers of the method: Rademacher projections and count-sketch tables, the same on every machine.

Bits come from SHAKE-128 (FIPS 202) over a text that names seed, layer, side, dims and version; no library's generator, no
device and no order of calls can change them. Only numpy: extraction and reduction use the same tables.

Shapes: P projected dims a side, D folded dims, M = P·P numbers of one layer's sketch.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

VERSION = "prism-projection/1"


def signs(seed: int, layer: str, side: str, dim_in: int, dim_out: int) -> NDArray[np.float32]:
    """±1 [dim_in, dim_out]. Times `scale` it is P with E[P Pᵀ] = I, so inner products are unbiased (Achlioptas 2003).

    Args:
        side: "a" for a layer's input, "b" for the gradient of its output, "e" for its experts: [experts, dim_out].
    """
    text = f"{VERSION}|{seed}|{layer}|{side}|{dim_in}x{dim_out}"
    count = dim_in * dim_out
    bits = np.frombuffer(hashlib.shake_128(text.encode()).digest((count + 7) // 8), np.uint8)
    return (np.unpackbits(bits, bitorder="little")[:count].astype(np.float32) * 2 - 1).reshape(dim_in, dim_out)


def scale(dim_out: int) -> np.float32:
    """1/√dim_out."""
    return np.float32(1) / np.float32(np.sqrt(dim_out))


@dataclass(frozen=True)
class FoldTable:
    """Bucket and sign of each of a layer's M numbers in the folded row (Charikar et al. 2002)."""

    bucket_M: NDArray[np.int64]
    sign_M: NDArray[np.float32]


def fold_table(seed: int, layer: str, dim: int, dims: int) -> FoldTable:
    """The signed count-sketch of one layer: M = dim² numbers into `dims` (a power of two) buckets."""
    text = f"{VERSION}|{seed}|{layer}|fold|{dim}x{dim}|{dims}"
    words = np.frombuffer(hashlib.shake_128(text.encode()).digest(4 * dim * dim), "<u4")
    sign = np.where(words >> 31, 1.0, -1.0).astype(np.float32)
    return FoldTable((words & np.uint32(dims - 1)).astype(np.int64), sign)


def fold(sketches_LM: NDArray[np.float64], layers: list[str], seed: int, dims: int) -> NDArray[np.float64]:
    """Fold one unfolded vector, layer by layer, into float64 [D]. Used for directions; rows are folded in extraction."""
    folded_KD = fold_each(sketches_LM[None], layers, seed, dims)
    return folded_KD.reshape(dims)


def fold_each(sketches_KLM: NDArray[np.float64], layers: list[str], seed: int, dims: int) -> NDArray[np.float64]:
    """Fold several unfolded vectors, each as if alone: float64 [K, D]. The table of a layer is made once for all."""
    folded_KD: NDArray[np.float64] = np.zeros((len(sketches_KLM), dims))
    dim = round(sketches_KLM.shape[2] ** 0.5)
    for number, layer in enumerate(layers):
        table = fold_table(seed, layer, dim, dims)
        for folded_D, sketch_M in zip(folded_KD, sketches_KLM[:, number], strict=True):
            folded_D += np.bincount(table.bucket_M, weights=sketch_M * table.sign_M, minlength=dims)
    return folded_KD
