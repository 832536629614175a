"""What a run has used of GPUs: how whoever runs the stages tells `reduce`, and the text for people. Measures nothing."""

from collections.abc import Mapping
from typing import Any

GPU_SECONDS, GPU, GPU_HOUR_PRICE = "PRISM_GPU_SECONDS", "PRISM_GPU", "PRISM_GPU_HOUR_PRICE"
"""Environment of `reduce`: seconds × GPUs before it, their name, and what an hour of one costs. An argument, or a field of the
document, would stop an image of an older version.
"""


def variables_of(extraction: Mapping[str, Any], price: float | None) -> dict[str, str]:
    """The environment of `reduce`, from the outcome of `extract`; without one nothing was extracted, which is 0 seconds."""
    gpu = {GPU: str(extraction["gpu"])} if extraction.get("gpu") else {}
    prices = {} if price is None else {GPU_HOUR_PRICE: str(price)}
    return {GPU_SECONDS: str(extraction.get("gpuSeconds", 0)), **gpu, **prices}


def used_text(gpu_hours: float, gpu: str | None, price: float | None) -> str:
    """'12.3 GPU-hours on NVIDIA H200, price 43.05'."""
    on = f" on {gpu}" if gpu else ""
    return f"{gpu_hours:,.4g} GPU-hours{on}{'' if price is None else f', price {price:,.2f}'}"
