"""The one loop of reduction that is machine code: sums of a quantised direction over the signs of rows. Not: files, spec.

numpy has no operation that adds where a bit is set. LLVM makes two instructions of it for 16 dims where a processor has
mask registers (AVX-512), four for eight dims where it has none. The code is made for the processor at hand when it is first
asked for, in memory and in a tenth of a second: no compiler, no cache, no file. Its sums are of integers in each block and
in a fixed order over the blocks, so that every processor finds the same bits.

Shapes: N rows, S blocks of 256 dims, W = 32 S bytes of signs.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numpy.typing import NDArray

from prism_job.errors import RequestError
from prism_job.store.codec import BLOCK

LIMIT = 2**23 - 1
"""Largest absolute value of a quantised dim: 256 of them together stay within int32."""

_LANES = 16
"""Dims added at a time: one register of AVX-512, two of AVX2, four of NEON."""
_ROWS = 4
"""Rows that share one reading of the direction: alone, a row would wait for it (256 kB of the second-level cache)."""

_POINTER, _FLOAT, _DOUBLE = ir.PointerType(), ir.FloatType(), ir.DoubleType()
_I16, _I32, _I64 = (ir.IntType(bits) for bits in (16, 32, 64))
_PER_ROW, _PER_LANE = ir.VectorType(_DOUBLE, _ROWS), ir.VectorType(_I32, _LANES)


class SignSums:
    """The code and the engine that it lives in.

    Raises:
        RequestError: a system that forbids code made at run time, or a processor whose lowest bit does not come first.
    """

    def __init__(self) -> None:
        fix = "run the reduce stage elsewhere, or extract with codec float16, which needs none"
        if sys.byteorder != "little":
            raise RequestError("scores of sign rows need a little-endian processor", where=platform.machine(), fix=fix)
        try:
            binding.check_jit_execution()
        except OSError as error:
            what = f"this system forbids code that is made at run time: {error}"
            raise RequestError(what, where=platform.node(), fix=fix) from error
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        machine = binding.Target.from_default_triple().create_target_machine(
            cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=3
        )
        module = binding.parse_assembly(str(_module()))
        module.verify()
        self.engine = binding.create_mcjit_compiler(module, machine)
        self.engine.finalize_object()
        # ctypes lets other threads run meanwhile.
        kind = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 6, *[ctypes.c_int64] * 2)
        self.function = kind(self.engine.get_function_address("sign_sums"))

    def __call__(
        self,
        signs_NW: NDArray[np.uint8],
        scales_NS: NDArray[np.floating[Any]],
        quantised_D: NDArray[np.int32],
        steps_S: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Σ_s scale_ns step_s Σ_{d in s} ± quantised_d: the inner sums exact, the outer one in float64, in order. float64 [N].

        Args:
            scales_NS: float16 or float32.
            quantised_D: none above LIMIT in absolute value.
            steps_S: what 1 in `quantised_D` stands for, in each block.
        """
        num_rows, num_blocks = scales_NS.shape
        # Addresses alone are handed over: what stands there must be of the shape and type that the code reads.
        shapes = (signs_NW.shape, quantised_D.shape, steps_S.shape)
        wanted = ((num_rows, num_blocks * BLOCK // 8), (num_blocks * BLOCK,), (num_blocks,))
        if shapes != wanted:
            raise ValueError(
                f"signs, direction and steps of shapes {shapes} beside scales {scales_NS.shape}, not {wanted}"
            )
        blocks_S = quantised_D.reshape(num_blocks, BLOCK).sum(axis=1, dtype=np.int32)
        scores_N = np.empty(num_rows)
        arrays: list[NDArray[Any]] = [
            np.ascontiguousarray(signs_NW, np.uint8),
            np.ascontiguousarray(scales_NS, np.float32),  # half floats are not every processor's
            np.ascontiguousarray(quantised_D, np.int32),
            np.ascontiguousarray(blocks_S, np.int32),
            np.ascontiguousarray(steps_S, np.float64),
        ]
        self.function(*[array.ctypes.data for array in (*arrays, scores_N)], num_rows, num_blocks)
        return scores_N


@cache
def sign_sums() -> SignSums:
    """One for the process."""
    return SignSums()


def _module() -> ir.Module:
    module = ir.Module()
    kind = ir.FunctionType(ir.VoidType(), [_POINTER] * 6 + [_I64] * 2)
    function = ir.Function(module, kind, "sign_sums")
    signs, scales, quantised, blocks, steps, scores, num_rows, num_blocks = function.args
    code = ir.IRBuilder(function.append_basic_block())
    totals = code.alloca(_PER_ROW)
    last = code.sub(num_rows, _I64(1))
    with _loop(code, num_rows, _ROWS) as first:
        # Past the end the last row is taken again: it has the same score each time.
        rows = [_smaller(code, code.add(first, _I64(row)), last) for row in range(_ROWS)]
        starts = [code.mul(row, num_blocks) for row in rows]
        code.store(ir.Constant(_PER_ROW, [0.0] * _ROWS), totals)
        with _loop(code, num_blocks, 1) as block:
            places = [code.add(start, block) for start in starts]
            bits = [_at(code, signs, _I16, code.mul(place, _I64(BLOCK // _LANES))) for place in places]
            dims = _at(code, quantised, _PER_LANE, code.mul(block, _I64(BLOCK // _LANES)))
            sums = _sum_lanes(code, _sums_where_set(code, bits, dims))
            # Σ ± q = 2 Σ_{set} q - Σ q
            whole = _splat(code, code.load(_at(code, blocks, _I32, block), typ=_I32))
            signed = code.sub(code.add(sums, sums), whole)
            step = _splat(code, code.load(_at(code, steps, _DOUBLE, block), typ=_DOUBLE))
            scale = _gather(code, [_at(code, scales, _FLOAT, place) for place in places])
            term = code.fmul(code.fmul(code.sitofp(signed, _PER_ROW), step), scale)
            code.store(code.fadd(code.load(totals, typ=_PER_ROW), term), totals)
        found = code.load(totals, typ=_PER_ROW)
        for row, place in enumerate(rows):
            code.store(code.extract_element(found, _I32(row)), _at(code, scores, _DOUBLE, place))
    code.ret_void()
    return module


def _sums_where_set(code: ir.IRBuilder, bits: list[Any], dims: Any) -> list[Any]:
    """For each row the sum of the block's dims whose bit is set, in lanes."""
    zero = ir.Constant(_PER_LANE, [0] * _LANES)
    sums = [zero] * _ROWS
    for place in range(BLOCK // _LANES):
        values = code.load(_at(code, dims, _PER_LANE, _I64(place)), typ=_PER_LANE, align=4)
        for row in range(_ROWS):
            word = code.load(_at(code, bits[row], _I16, _I64(place)), typ=_I16, align=1)
            mask = code.bitcast(word, ir.VectorType(ir.IntType(1), _LANES))
            sums[row] = code.add(sums[row], code.select(mask, values, zero))
    return sums


def _sum_lanes(code: ir.IRBuilder, sums: list[Any]) -> Any:
    """One sum for each row: a row's lanes are folded upon each other, first alone, then those of two vectors in one."""
    sums = [_fold(code, one, one, list(range(_LANES // 2)), _LANES // 2) for one in sums]
    span = _LANES // 2
    while span > 1:
        others = sums[1::2] or sums
        num_lanes = sums[0].type.count * min(len(sums), 2)
        low = [lane for lane in range(num_lanes) if lane % span < span // 2]
        sums = [_fold(code, one, other, low, span // 2) for one, other in zip(sums[::2], others, strict=True)]
        span //= 2
    return sums[0]


def _fold(code: ir.IRBuilder, one: Any, other: Any, lanes: list[int], distance: int) -> Any:
    """These lanes of both vectors, counted through, and to each the lane at that distance."""
    near, far = _lanes(lanes), _lanes([lane + distance for lane in lanes])
    return code.add(code.shuffle_vector(one, other, near), code.shuffle_vector(one, other, far))


def _lanes(numbers: list[int]) -> Any:
    return ir.Constant(ir.VectorType(_I32, len(numbers)), numbers)


@contextmanager
def _loop(code: ir.IRBuilder, stop: Any, step: int) -> Iterator[Any]:
    """What is built inside runs for 0, step, 2 step, ... as long as that is below `stop`."""
    before, head, body, after = code.block, *(code.append_basic_block() for _ in range(3))
    code.branch(head)
    code.position_at_end(head)
    number = code.phi(_I64)
    number.add_incoming(_I64(0), before)
    code.cbranch(code.icmp_signed("<", number, stop), body, after)
    code.position_at_end(body)
    yield number
    number.add_incoming(code.add(number, _I64(step)), code.block)
    code.branch(head)
    code.position_at_end(after)


def _at(code: ir.IRBuilder, array: Any, kind: Any, place: Any) -> Any:
    """The address of that element."""
    return code.gep(array, [place], source_etype=kind)


def _gather(code: ir.IRBuilder, addresses: list[Any]) -> Any:
    """The floats there, as a vector of float64."""
    vector = ir.Constant(ir.VectorType(_FLOAT, len(addresses)), ir.Undefined)
    for lane, address in enumerate(addresses):
        vector = code.insert_element(vector, code.load(address, typ=_FLOAT, align=4), _I32(lane))
    return code.fpext(vector, ir.VectorType(_DOUBLE, len(addresses)))


def _splat(code: ir.IRBuilder, value: Any) -> Any:
    """The value once for each row."""
    vector = ir.Constant(ir.VectorType(value.type, _ROWS), ir.Undefined)
    for row in range(_ROWS):
        vector = code.insert_element(vector, value, _I32(row))
    return vector


def _smaller(code: ir.IRBuilder, one: Any, other: Any) -> Any:
    return code.select(code.icmp_signed("<", one, other), one, other)
