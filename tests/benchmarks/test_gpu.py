"""Laws of the GPU check: every part runs on the CPU with tiny shapes, and one part's failure costs only its own figures."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu

PASSES = ("extract", "extract_attention", "train", "forward")


def _figures(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    gpu.main(["--tiny", "--json", str(tmp_path / "gpu.json"), *arguments])
    return dict(json.loads((tmp_path / "gpu.json").read_text()))


def test_every_part_writes_its_figures(tmp_path: Path) -> None:
    figures = _figures(tmp_path)
    assert not {name: value for name, value in figures.items() if name.endswith((".error", ".skipped"))}
    expected = {f"{part}.seconds" for part in gpu.TIME_LIMITS}
    expected |= {f"peak.matmul_flops[{dtype}]" for dtype in ("bfloat16", "float32")}
    for model in ("llama-1b", "llama-8b", "qwen3-moe"):
        expected |= {f"{model}.{name}[{each},32]" for name in ("tokens_per_second", "peak_bytes") for each in PASSES}
        expected |= {f"{model}.{name}" for name in ("share_of_matmul[extract,32]", "predicted_bytes[32]", "profile")}
    for model in gpu.SMALL:
        expected |= {
            f"rows.cosine_min[{model}]",
            f"zero3.error_from_stage0[{model}]",
            f"zero3.predicted_bytes[{model}]",
        }
        # Tiny models of random weights in bfloat16, which has 8 bits: a row is its float32 row to about a hundredth.
        assert figures[f"rows.cosine_min[{model}]"] > 0.99
        assert figures[f"rows.batch_mates_error[{model},float32]"] < 2e-5
        assert figures[f"rows.error_from_cpu[{model},float32]"] == 0  # here the device is the CPU
        assert figures[f"zero3.error_from_stage0[{model}]"] < 1e-4
    assert expected <= figures.keys()


def test_a_part_that_fails_is_recorded_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Iterator[dict[str, Any]]:
        yield {"before": 1}
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu, "rows", fails)
    figures = _figures(tmp_path, "--parts", "rows", "peak")
    assert (figures["rows.before"], figures["rows.error"]) == (1, "RuntimeError: no such kernel")
    assert figures["peak.matmul_flops[float32]"] > 0


def test_a_part_ends_at_its_time_limit() -> None:
    with pytest.raises(TimeoutError), gpu.time_limit(0.05):
        time.sleep(10)
