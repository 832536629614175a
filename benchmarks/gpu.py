"""Passes of models with real shapes and random weights: rates, memory, agreement of rows, and where the time goes.

For one bare GPU machine: the models are made on the device, nothing is downloaded, no model folder is needed. Each part has
a time limit and writes its figures as soon as it has them; a part that fails is recorded, and the others go on.

    python -m benchmarks.gpu --json gpu.json                                                    # all parts, under 6 minutes
    python -m benchmarks.gpu --parts moe-100m --dtype float32 --json experts.json               # cost of experts, on a CPU
    python -m benchmarks.gpu --tiny                                                             # tiny shapes, on a CPU

On a CPU seconds are those of the processor, so that other load does not count.
"""

import contextlib
import gc
import importlib.util
import itertools
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
NEEDED = ["torch", "transformers", "numpy", "safetensors", "pydantic", "pydantic_core", "typing_inspection", "yaml"]
NEEDED += [
    "annotated_types",
    "xxhash",
    "pyarrow",
    "tenacity",
    "boto3",
    "botocore",
    "s3transfer",
    "jmespath",
    "dateutil",
]
if MISSING := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    sys.exit(f"missing Python packages: {' '.join(MISSING)}\nhint: carry their wheels (versions in constraints.txt)")

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import job
from benchmarks.extraction import loss_of
from prism_job.estimate import costs
from prism_job.estimate.model_shape import model_shape
from prism_job.estimate.workload import Load, Workload
from prism_job.extract import tokenise
from prism_job.extract.capture.gradients import GradientCapture
from prism_job.extract.capture.layers import captured_layers
from prism_job.extract.capture.row_format import RowFormat
from prism_job.extract.distributed.world import Topology, World, shard_weights, zero3_settings
from prism_job.extract.load.model import load_model
from prism_job.extract.passes import is_out_of_memory
from prism_job.extract.tokenise import Encoded
from prism_job.spec.document import RunSpec
from prism_job.spec.extraction import DeepSpeedSpec
from prism_job.spec.model import ModelSpec
from prism_job.store import codec

Figures = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """Sizes of a model's config, and the micro-batches that it is measured with."""

    model_type: str
    sizes: dict[str, Any]
    tokens: tuple[int, ...] = (4096,)
    length: int = 512  # of each text; the second half carries loss

    @property
    def config(self) -> Any:
        return AutoConfig.for_model(
            self.model_type, bos_token_id=None, eos_token_id=None, use_cache=False, **self.sizes
        )

    def with_layers(self, number: int) -> "Shape":
        return replace(self, sizes=self.sizes | {"num_hidden_layers": number})


def sizes(hidden: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **others: Any) -> dict[str, Any]:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    return dict(zip(names, (hidden, layers, heads, kv_heads, vocabulary), strict=True)) | others


def experts(number: int, chosen: int, inner: int) -> dict[str, Any]:
    return {
        "num_experts": number,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": inner,
        "norm_topk_prob": True,
    }


SHAPES = {
    "llama-1b": Shape(  # Llama-3.2-1B
        "llama", sizes(2048, 16, 32, 8, 128256, intermediate_size=8192, tie_word_embeddings=True), (4096, 16384)
    ),
    "llama-8b": Shape("llama", sizes(4096, 32, 32, 8, 128256, intermediate_size=14336), (4096, 8192)),  # Llama-3.1-8B
    "qwen3-moe": Shape(  # the layers of Qwen3-30B-A3B, 12 of 48
        "qwen3_moe", sizes(2048, 12, 32, 4, 151936, head_dim=128, **experts(128, 8, 768)), (4096, 16384)
    ),
    "moe-100m": Shape(
        "qwen3_moe",
        sizes(512, 8, 8, 4, 8192, head_dim=64, tie_word_embeddings=True, **experts(32, 4, 256)),
        (512,),
        128,
    ),
}
TINY = sizes(32, 2, 4, 2, 300, intermediate_size=48, head_dim=8) | experts(4, 2, 16)
TIME_LIMITS = {"peak": 20, "llama-1b": 50, "llama-8b": 80, "qwen3-moe": 80, "rows": 50, "zero3": 70}
"""Seconds of each part that runs by default, in this order."""

ROW_FORMAT, TINY_ROW_FORMAT = RowFormat(64, 0, 65_536), RowFormat(8, 0, 256)
ROUNDS, TOP = 5, 12


@dataclass(frozen=True)
class Setting:
    """What all parts share."""

    device: torch.device
    dtype: str
    is_tiny: bool
    rounds: int

    @property
    def row_format(self) -> RowFormat:
        return TINY_ROW_FORMAT if self.is_tiny else ROW_FORMAT

    def shape(self, name: str) -> Shape:
        shape = SHAPES[name]
        if not self.is_tiny:
            return shape
        fields = shape.sizes | {key: value for key, value in TINY.items() if key in shape.sizes}
        return replace(shape, sizes=fields, tokens=(32,), length=16)


def main(arguments: list[str] | None = None) -> None:
    parser = job.parser(__doc__)
    parts = [*TIME_LIMITS, *(name for name in SHAPES if name not in TIME_LIMITS)]
    parser.add_argument("--parts", nargs="+", choices=parts, help=f"without this: {' '.join(TIME_LIMITS)}")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="%(default)s")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of each pass, in turns (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU, one round")
    options = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available() and not options.tiny
    if not (on_gpu or options.tiny or options.parts):
        parser.error("no GPU here: use --tiny, or choose --parts")
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    setting = Setting(device, options.dtype, options.tiny, 1 if options.tiny else options.rounds)
    figures: Figures = {"device": torch.cuda.get_device_name() if on_gpu else "cpu", "dtype": options.dtype}
    figures |= {f"version[{name}]": sys.modules[name].__version__ for name in ("torch", "transformers")}
    for part in (chosen := options.parts or [*TIME_LIMITS]):
        started = time.monotonic()
        try:
            with time_limit(TIME_LIMITS[part] if on_gpu else sys.maxsize):
                for new in figures_of(part, setting, is_alone=len(chosen) == 1):
                    add(figures, part, new, options.json)
        except Exception as error:  # whatever it is: the next part may work
            add(figures, part, {"error": f"{type(error).__name__}: {error}"[:2000]}, options.json)
        add(figures, part, {"seconds": time.monotonic() - started}, options.json)
        gc.collect()
        torch.cuda.empty_cache()


def add(figures: Figures, part: str, new: Figures, path: Path | None) -> None:
    for name, value in new.items():
        figures[f"{part}.{name}"] = value
        print(f"{part}.{name}: {value}", flush=True)
    job.write_json(path, figures)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds if seconds < sys.maxsize else 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def figures_of(part: str, setting: Setting, *, is_alone: bool) -> Iterator[Figures]:
    if part == "peak":
        return peak(setting)
    if part == "rows":
        return rows(setting)
    if part == "zero3":
        return zero3(setting) if is_alone else zero3_in_a_process(setting)
    return passes(setting, setting.shape(part))


def peak(setting: Setting) -> Iterator[Figures]:
    """What the device reaches: of square products, and of products with the projection's 64 columns."""
    for dtype in ("bfloat16", "float32"):
        yield {f"matmul_flops[{dtype}]": matmul_flops(setting, dtype)}
    for inputs in (2048, 14336):
        yield {f"projection_flops[{inputs}]": matmul_flops(setting, setting.dtype, 16384, inputs, 64)}


@cache
def matmul_flops(setting: Setting, dtype: str, rows: int = 8192, inner: int = 8192, columns: int = 8192) -> float:
    """FLOP/s of torch.mm, the median of ten."""
    if setting.device.type == "cpu":  # smaller: the rate is the same
        rows, inner, columns = (min(size, 64 if setting.is_tiny else 1024) for size in (rows, inner, columns))
    options: Any = {"device": setting.device, "dtype": getattr(torch, dtype)}
    left, right = torch.randn(rows, inner, **options), torch.randn(inner, columns, **options)
    times, _ = measured({"mm": lambda: torch.mm(left, right)}, setting.device, 10)
    return 2 * rows * inner * columns / statistics.median(times["mm"])


def passes(setting: Setting, shape: Shape) -> Iterator[Figures]:
    """A forward pass, a training step without optimiser, and extraction, in turns, at each size of micro-batch."""
    model = build(shape, setting.dtype, setting.device)
    facts = Facts(setting, shape)
    started = time.monotonic()
    captures = {
        "extract": capture_of(model, setting),
        "extract_attention": capture_of(model, setting, "*.self_attn.*"),
    }
    yield {"parameters": facts.sizes.parameters, "projections_seconds": time.monotonic() - started}
    for tokens in shape.tokens:
        examples = texts(shape, [shape.length] * (tokens // shape.length))
        steps = {name: extraction(capture, examples) for name, capture in captures.items()}
        times, peaks = measured(steps | training(model, examples, setting), setting.device, setting.rounds)
        flops = facts.flops(len(examples))
        for name, rounds in times.items():
            seconds = statistics.median(rounds)
            yield {f"tokens_per_second[{name},{tokens}]": tokens / seconds, f"peak_bytes[{name},{tokens}]": peaks[name]}
            if name in flops:
                share = flops[name] / seconds / matmul_flops(setting, setting.dtype)
                yield {f"share_of_matmul[{name},{tokens}]": share}
            if name != "extract" and "extract" in times:
                ratios = [extract / other for extract, other in zip(times["extract"], rounds, strict=True)]
                ends = {"": statistics.median(ratios), "_least": min(ratios), "_most": max(ratios)}
                yield {f"extract_time_over{end}[{name},{tokens}]": ratio for end, ratio in ends.items()}
        memory = facts.memory(len(examples))
        yield {f"predicted_bytes[{tokens}]": memory.device} | {
            f"predicted_bytes[{name},{tokens}]": value for name, value in asdict(memory).items() if value
        }
        if peaks.get("extract"):
            yield {f"peak_over_predicted[{tokens}]": peaks["extract"] / memory.device}
    model.requires_grad_(False)
    yield profile(extraction(captures["extract"], examples), setting.device)


def build(shape: Shape, dtype: str, device: torch.device) -> Any:
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(shape.config, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def capture_of(model: Any, setting: Setting, glob: str = "*") -> GradientCapture:
    return GradientCapture(model, captured_layers(model, (glob,)), (setting.row_format,))


def texts(shape: Shape, lengths: list[int]) -> list[Encoded]:
    """Random tokens; the second half of each text carries loss."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(shape.sizes["vocab_size"], (length,), generator=generator).tolist() for length in lengths]
    return [Encoded(ids, [place >= len(ids) // 2 for place in range(len(ids))]) for ids in drawn]


def extraction(capture: GradientCapture, examples: list[Encoded]) -> Callable[[], object]:
    """A micro-batch to stored rows, without factor sums."""

    def step() -> object:
        capture.model.requires_grad_(False)
        (found,) = capture.gradients_of(tokenise.collate(examples, capture.device), mean=False)
        return codec.encode("sign", found.rows_BD.float().cpu().numpy())

    return step


def training(model: Any, examples: list[Encoded], setting: Setting) -> dict[str, Callable[[], object]]:
    batch = tokenise.collate(examples, setting.device)

    def train() -> None:
        loss_of(model.requires_grad_(True), batch).backward()
        model.zero_grad(set_to_none=True)

    def forward() -> None:
        with torch.no_grad():
            loss_of(model.requires_grad_(False), batch)

    return {"train": train, "forward": forward}


def measured(
    steps: dict[str, Callable[[], object]], device: torch.device, rounds: int
) -> tuple[dict[str, list[float]], dict[str, int | None]]:
    """The seconds of each step by round, in turns, and its peak of memory on the GPU; without what does not fit there."""
    clock, on_gpu = (time.perf_counter, True) if device.type == "cuda" else (time.process_time, False)
    peaks: dict[str, int | None] = {}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _, (name, step) in itertools.product(range(rounds + 1), steps.items()):
        if name not in seconds:
            continue
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = clock()
        try:
            step()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            print(f"{name} does not fit into memory", flush=True)
            del seconds[name]
        else:
            if on_gpu:
                torch.cuda.synchronize()
            seconds[name].append(clock() - started)
            peaks[name] = torch.cuda.max_memory_allocated() if on_gpu else None
    return {name: each[1:] for name, each in seconds.items()}, peaks  # the first time is a warm-up


class Facts:
    """What `prism estimate` predicts for a shape, of texts of equal length."""

    def __init__(self, setting: Setting, shape: Shape) -> None:
        self.setting, self.shape = setting, shape
        with tempfile.TemporaryDirectory() as folder:
            shape.config.save_pretrained(folder)
            rows = {"projection": {"dim": setting.row_format.dim}, "codec": {"dims": setting.row_format.fold_dims}}
            spec = job.selection(Path(folder), model={"uri": folder, "dtype": setting.dtype}, extraction=rows)
            self.spec = RunSpec.model_validate(spec)
            self.sizes = model_shape(self.spec)

    def load(self, texts: int, share: float = 0.5) -> Load:
        tokens = texts * self.shape.length
        return Load(texts, tokens, tokens, tokens * self.shape.length, tokens * share)

    def flops(self, texts: int) -> dict[str, float]:
        """Of extraction; of a training step and a forward pass, which compute all logits."""
        load, dim = self.load(texts), self.setting.row_format.dim
        forward = costs.forward_flops(self.sizes, self.load(texts, 1))
        extract = costs.forward_flops(self.sizes, load) + costs.backward_flops(self.sizes, load)
        extract += costs.projection_flops(self.sizes, dim, load) + costs.sketch_flops(self.sizes, dim, load, Load())
        return {"extract": extract, "train": 3 * forward, "forward": forward}

    def memory(self, texts: int, stage: int = 0, offload: costs.Offload = "none") -> costs.Memory:
        load = self.load(texts)
        longest = {"longest": self.shape.length, "largest_batch": texts, "supervised_share": 0.5}
        work = Workload([], [], [], texts, 0, 0, 0, load, Load(), Load(), is_exact=True, **longest)
        return costs.memory_of_rank(self.sizes, self.spec, work, stage, offload, 1, texts * self.shape.length)


def profile(step: Callable[[], object], device: torch.device) -> Figures:
    """The operations that take most of a step's time, and the share of its seconds in which the GPU computes."""
    on_gpu = device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    step()
    with torch.profiler.profile(activities=kinds) as profiler:
        started = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    # Operations, each with the time of the kernels that it starts; the kernels have rows of their own.
    operations = [each for each in profiler.key_averages() if each.device_type == torch.autograd.DeviceType.CPU]
    spent = {each.key: each.self_device_time_total if on_gpu else each.self_cpu_time_total for each in operations}
    counts, total = {each.key: each.count for each in operations}, sum(spent.values()) or 1
    top = sorted(spent, key=lambda key: -spent[key])[:TOP]
    lines = [f"{spent[key] / total:6.1%} {spent[key] / 1e3:10.3f} ms {counts[key]:7d} {key[:70]}" for key in top]
    return {"busy_share": total / 1e6 / seconds, "profile": "\n".join(["", *lines])}


SMALL = {"llama-1b": 4, "qwen3-moe": 2}
"""Shapes, and their layers, where rows are compared."""


def rows(setting: Setting) -> Iterator[Figures]:
    """Rows of the device beside those of the CPU, of `dtype` beside float32 with the same weights, and with batch-mates."""
    for name, layers in SMALL.items():
        shape = setting.shape(name).with_layers(layers)
        examples = texts(shape, [shape.length * part // 16 for part in (16, 15, 12, 8, 8, 5, 3, 2)])
        low, model = (build(shape, dtype, setting.device) for dtype in (setting.dtype, "float32"))
        model.load_state_dict(low.state_dict())
        low_capture, capture = capture_of(low, setting), capture_of(model, setting)
        low_ND, low_alone_ND = rows_of(low_capture, examples), rows_of(low_capture, examples, is_alone=True)
        rows_ND, alone_ND = rows_of(capture, examples), rows_of(capture, examples, is_alone=True)
        cosine_N = torch.cosine_similarity(low_ND, rows_ND, dim=1)
        yield {f"cosine_min[{name}]": cosine_N.min().item(), f"cosine_mean[{name}]": cosine_N.mean().item()}
        yield {f"batch_mates_error[{name},{setting.dtype}]": largest_error(low_ND, low_alone_ND)}
        yield {f"batch_mates_error[{name},float32]": largest_error(rows_ND, alone_ND)}
        del low, low_capture, capture
        cpu_ND = rows_of(capture_of(model.cpu(), setting), examples)
        yield {f"error_from_cpu[{name},float32]": largest_error(rows_ND, cpu_ND)}
        del model


def rows_of(capture: GradientCapture, examples: list[Encoded], *, is_alone: bool = False) -> torch.Tensor:
    """The rows of one micro-batch, or of each example alone, in float64 on the CPU."""
    batches = [[each] for each in examples] if is_alone else [examples]
    found = [capture.gradients_of(tokenise.collate(batch, capture.device), mean=False) for batch in batches]
    return torch.cat([gradients[0].rows_BD for gradients in found]).double().cpu()


def largest_error(rows_ND: torch.Tensor, expected_ND: torch.Tensor) -> float:
    """Of the rows' norms."""
    return ((rows_ND - expected_ND).norm(dim=1) / expected_ND.norm(dim=1)).max().item()


def zero3(setting: Setting) -> Iterator[Figures]:
    """Stage 3 with one rank and weights in CPU memory: rows, time and memory beside stage 0."""
    if importlib.util.find_spec("deepspeed") is None:
        yield {"skipped": "DeepSpeed is not installed (carry the wheels of deepspeed, hjson and msgpack)"}
        return
    deepspeed = DeepSpeedSpec(stage=3, offload="cpu")
    world = World.init(Topology(), deepspeed, 600)
    settings = zero3_settings(deepspeed, setting.dtype)
    for name, layers in SMALL.items():
        shape = setting.shape(name).with_layers(layers)
        examples = texts(shape, [shape.length] * (shape.tokens[0] // shape.length))
        with tempfile.TemporaryDirectory() as folder:
            build(shape, setting.dtype, world.device).save_pretrained(folder)
            spec = ModelSpec(uri=folder, dtype=setting.dtype)
            plain = capture_of(load_model(spec, world.device), setting)
            rows_ND = rows_of(plain, examples)
            before, _ = measured({"stage0": extraction(plain, examples)}, world.device, setting.rounds)
            del plain
            gc.collect()
            model = load_model(spec, world.device, settings)
        layers_of_model = captured_layers(model, ("*",))
        engine = shard_weights(model, settings)
        capture = GradientCapture(engine.module, layers_of_model, (setting.row_format,))
        yield {f"error_from_stage0[{name}]": largest_error(rows_of(capture, examples), rows_ND)}
        after, peaks = measured({"stage3": extraction(capture, examples)}, world.device, setting.rounds)
        stage0, stage3 = statistics.median(before["stage0"]), statistics.median(after["stage3"])
        yield {f"time_over_stage0[{name}]": stage3 / stage0, f"peak_bytes[{name}]": peaks["stage3"]}
        yield {f"predicted_bytes[{name}]": Facts(setting, shape).memory(len(examples), 3, "cpu").device}
        del model, engine, capture, layers_of_model
        gc.collect()
    world.shutdown()


def zero3_in_a_process(setting: Setting) -> Iterator[Figures]:
    """DeepSpeed changes how every model of a process is loaded, so it has one of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "zero3.json"
        command = [sys.executable, "-m", "benchmarks.gpu", "--parts", "zero3", "--json", str(path)]
        command += ["--dtype", setting.dtype, f"--rounds={setting.rounds}", *(["--tiny"] if setting.is_tiny else [])]
        try:
            subprocess.run(command, cwd=Path(__file__).parents[1], check=True, stdout=subprocess.DEVNULL)
        finally:
            found = json.loads(path.read_text()) if path.exists() else {}
            yield {name.removeprefix("zero3."): value for name, value in found.items() if name.startswith("zero3.")}


if __name__ == "__main__":
    main()
