"""A walk along a ranking that takes rows for a budget: within each group's limits, and none that nearly repeats a taken one.

Two rows are near-duplicates where enough of their signs are equal. A row is compared with taken rows alone. Up to ALL_PAIRS
rows all are compared; beyond, those that share all of some bits in one of several tables (locality-sensitive hashing of
Hamming space: Indyk and Motwani 1998), so that the work stays near-linear. The tables find a pair at the threshold with
probability FOUND, and a closer one almost surely.

Shapes: C rows of a part, in ranking order; G groups; K taken rows; V 64-bit words of signs; L tables; H heads of a table.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prism_job.score.column import Column, parts
from prism_job.score.sign_kernel import compiled, import_numba

SIGN_BYTES = 512
"""Bytes of signs that are compared: 4,096 signs. Folding spreads every layer over all dims, so the first ones are a fair
sample; their agreement differs from that of all 65,536 by .005 (one standard deviation at .9)."""

ALL_PAIRS = 4096
"""Taken rows up to which all pairs are compared, in a second at most."""

FOUND = 0.99

NOT_TAKEN, TAKEN = -2, -1
"""Outcomes of a row; any other is the number of the taken row that it nearly repeats."""

Int64 = NDArray[np.int64]


def sign_bytes(arrays: dict[str, NDArray[Any]]) -> NDArray[np.void]:
    """The signs that are compared, of each row of a shard: void [N], of at most SIGN_BYTES bytes, a multiple of 8.

    Rows of codec float16 have no signs stored: those of their values are taken.
    """
    signs_NW = arrays["signs"] if "signs" in arrays else np.packbits(arrays["values"] >= 0, axis=1, bitorder="little")
    compared_NW = signs_NW[:, :SIGN_BYTES]
    compared_NW = np.pad(compared_NW, ((0, 0), (0, -compared_NW.shape[1] % 8)))
    return np.ascontiguousarray(compared_NW).view(f"V{compared_NW.shape[1]}")[:, 0]


@dataclass(frozen=True)
class Walked:
    """The outcome of a walk over R ranked rows."""

    taken_R: NDArray[np.bool_]
    repeats: NDArray[np.uint32]  # rows left out as near-duplicates
    repeated: NDArray[np.uint32]  # the taken row that each of them nearly repeats
    short_G: NDArray[np.bool_]  # groups that ended before they had their reserve
    used_G: Int64  # what each group took
    filled: bool  # False: the ranking ended before the budget


def walk(
    ranked: NDArray[np.uint32],
    budget: int,
    tokens: Column | None,
    group_N: NDArray[np.uint32] | None,
    reserve_G: Int64,
    cap_G: Int64,
    signs: Column | None,
    agreement: float,
    num_expected: int,
) -> Walked:
    """Take rows in ranking order: for each group first its reserve, and the rest of the budget from any group below its cap.

    A row that nearly repeats a taken one is left out and counts for nothing. A group, or the budget, is closed by its first
    row that would exceed it.

    Args:
        budget, reserve_G, cap_G: rows, or response tokens where `tokens` is given.
        group_N: of every row, in plan order; None: one group.
        signs: what `sign_bytes` gives, in plan order; None: no row is compared.
        num_expected: rows that will be taken, roughly; it sets the size of the tables.
    """
    taken_R = np.zeros(len(ranked), np.bool_)
    found = Tables(signs.dtype.itemsize if signs is not None else 0, agreement, num_expected)
    room = budget - int(reserve_G.sum())
    state = np.array([room, room > 0, 0], np.int64)  # what any group may take, is it open, rows taken
    used_G, closed_G = np.zeros(len(cap_G), np.int64), np.zeros(len(cap_G), np.bool_)
    settled_G = reserve_G == 0  # its reserve is spent, or its next row exceeds it
    taken_rows: list[NDArray[np.uint32]] = []
    repeats: list[NDArray[np.uint32]] = []
    numbers: list[NDArray[np.int32]] = []
    for part in parts(len(ranked)):
        if not state[1] and settled_G.all():
            break
        rows = ranked[part]
        group_C = np.zeros(len(rows), np.uint32) if group_N is None else group_N[rows]
        weight_C = np.ones(len(rows), np.int64) if tokens is None else tokens.at(rows).astype(np.int64)
        words_CV = np.empty((len(rows), 0), np.uint64)
        if signs is not None:
            words_CV = signs.at(rows).view(np.uint64).reshape(len(rows), -1).copy()
        found.make_room(int(state[2]) + len(rows))
        outcome_C = np.empty(len(rows), np.int32)
        compiled_walk()(
            group_C,
            weight_C,
            words_CV,
            reserve_G,
            cap_G,
            used_G,
            closed_G,
            settled_G,
            state,
            *found.arrays(),
            outcome_C,
        )
        taken_R[part] = outcome_C == TAKEN
        taken_rows.append(rows[outcome_C == TAKEN])
        repeats.append(rows[outcome_C >= 0])
        numbers.append(outcome_C[outcome_C >= 0])
    taken = np.concatenate([np.empty(0, np.uint32), *taken_rows])
    return Walked(
        taken_R=taken_R,
        repeats=np.concatenate([np.empty(0, np.uint32), *repeats]),
        repeated=taken[np.concatenate([np.empty(0, np.int32), *numbers])],
        short_G=~settled_G,
        used_G=used_G,
        filled=not state[1],
    )


def table_sizes(num_bits: int, agreement: float, num_expected: int) -> tuple[int, int]:
    """Bits of a key and number of tables, for rows of `num_bits` signs; (0, 1), which compares all pairs, for few rows.

    As many bits as leave a few unrelated rows in common, and as many tables as find a pair at the threshold with probability
    FOUND; fewer bits where the signs do not last for these tables.
    """
    if num_expected <= ALL_PAIRS or not num_bits:
        return 0, 1
    for bits in range(min(32, math.ceil(math.log2(num_expected)) + 4), 0, -1):
        misses = 1 - agreement**bits
        tables = math.ceil(math.log(1 - FOUND) / math.log(misses)) if misses else 1
        if bits * tables <= num_bits:
            return bits, tables
    return 0, 1


class Tables:
    """The taken rows' signs, and the tables in which rows of equal bits find each other."""

    def __init__(self, num_bytes: int, agreement: float, num_expected: int) -> None:
        num_bits = 8 * num_bytes
        self.num_words = num_bytes // 8
        self.num_bits, num_tables = table_sizes(num_bits, agreement, num_expected)
        self.max_differences = math.floor((1 - agreement) * num_bits + 1e-9)
        log_heads = max(1, math.ceil(math.log2(max(2, num_expected)))) if self.num_bits else 1
        self.head_LH = np.full((num_tables, 2**log_heads), -1, np.int32)
        self.next_KL = np.empty((0, num_tables), np.int32)
        self.words_KV = np.empty((0, self.num_words), np.uint64)
        self.seen_K = np.empty(0, np.int64)

    def make_room(self, num_rows: int) -> None:
        """For so many taken rows."""
        capacity = len(self.seen_K)
        if num_rows <= capacity:
            return
        more = max(num_rows, capacity + capacity // 2) - capacity
        self.words_KV = np.concatenate([self.words_KV, np.empty((more, self.num_words), np.uint64)])
        self.next_KL = np.concatenate([self.next_KL, np.empty((more, self.next_KL.shape[1]), np.int32)])
        self.seen_K = np.concatenate([self.seen_K, np.full(more, -1, np.int64)])

    def arrays(self) -> tuple[Any, ...]:
        settings = np.array([self.num_bits, self.max_differences], np.int64)
        self.seen_K[:] = -1  # numbers of rows begin anew in each part
        return self.words_KV, self.next_KL, self.head_LH, self.seen_K, settings


def _walk(
    group_C: Any,
    weight_C: Any,
    words_CV: Any,
    reserve_G: Any,
    cap_G: Any,
    used_G: Any,
    closed_G: Any,
    settled_G: Any,
    state: Any,
    words_KV: Any,
    next_KL: Any,
    head_LH: Any,
    seen_K: Any,
    settings: Any,
    outcome_C: Any,
) -> None:
    num_words, num_tables, num_bits, most = words_CV.shape[1], head_LH.shape[0], settings[0], settings[1]
    heads = np.uint64(head_LH.shape[1] - 1)
    bucket_L = np.zeros(num_tables, np.int64)
    for row in range(len(group_C)):
        group, weight = group_C[row], weight_C[row]
        outcome_C[row] = NOT_TAKEN
        if closed_G[group] or (settled_G[group] and not state[1]):
            continue
        if num_words:
            for table in range(num_tables):
                if num_bits:
                    first = table * num_bits
                    word, shift = first >> 6, first & 63
                    bits = words_CV[row, word] >> np.uint64(shift)
                    if shift + num_bits > 64:
                        bits |= words_CV[row, word + 1] << np.uint64(64 - shift)
                    bits &= (np.uint64(1) << np.uint64(num_bits)) - np.uint64(1)
                    # Multiplied by 2^64 over the golden ratio, so that the upper bits depend on all.
                    bucket_L[table] = ((bits * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)) & heads
            repeated = -1
            for table in range(num_tables):
                other = head_LH[table, bucket_L[table]]
                while other >= 0:
                    # Taken rows are numbered in ranking order: of several the best ranked is named.
                    if seen_K[other] != row and (repeated < 0 or other < repeated):
                        differences = np.int64(0)
                        for word in range(num_words):
                            x = words_CV[row, word] ^ words_KV[other, word]
                            # The number of its bits that are set.
                            x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
                            x = (x & np.uint64(0x3333333333333333)) + (
                                (x >> np.uint64(2)) & np.uint64(0x3333333333333333)
                            )
                            x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
                            differences += np.int64((x * np.uint64(0x0101010101010101)) >> np.uint64(56))
                            if differences > most:
                                break
                        if differences <= most:
                            repeated = other
                    seen_K[other] = row
                    other = next_KL[other, table]
            if repeated >= 0:
                outcome_C[row] = repeated
                continue
        if used_G[group] + weight > cap_G[group]:
            closed_G[group] = True
        if not settled_G[group] and used_G[group] + weight > reserve_G[group]:
            # What is left of its reserve is for anyone.
            state[0] += reserve_G[group] - used_G[group]
            settled_G[group] = True
        if closed_G[group]:
            continue
        if settled_G[group]:
            if weight > state[0]:
                state[1] = 0
            if not state[1]:
                continue
            state[0] -= weight
            if state[0] == 0:
                state[1] = 0
        used_G[group] += weight
        if used_G[group] == reserve_G[group]:
            settled_G[group] = True
        outcome_C[row] = TAKEN
        if num_words:
            number = state[2]
            words_KV[number] = words_CV[row]
            for table in range(num_tables):
                next_KL[number, table] = head_LH[table, bucket_L[table]]
                head_LH[table, bucket_L[table]] = number
        state[2] += 1


@cache
def compiled_walk() -> Callable[..., None]:
    """The loop as machine code. Raises RequestError: a system that forbids code made at run time."""
    fix = "run the reduce stage elsewhere, or leave out perSource, perGroup and dedupe: near"
    types = import_numba(fix).types
    flat, table = {}, {}
    for name in ("uint32", "int64", "boolean", "int32", "uint64"):
        flat[name], table[name] = getattr(types, name)[::1], getattr(types, name)[:, ::1]
    groups = [flat["int64"]] * 3 + [flat["boolean"]] * 2
    found = [table["uint64"], table["int32"], table["int32"], flat["int64"], flat["int64"]]
    signature = types.void(
        flat["uint32"], flat["int64"], table["uint64"], *groups, flat["int64"], *found, flat["int32"]
    )
    return compiled(_walk, signature, fix)
