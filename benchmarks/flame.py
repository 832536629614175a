"""Where the extract stage's time goes, by samples of its threads' stacks: shares by part, and a flame graph. Not: which run.

    python -m benchmarks.flame STACKS.json selection.yaml

is the extract stage with a sampler within; it leaves (stack, number of samples) pairs. py-spy would do the same from outside.
"""

from __future__ import annotations

import json
import linecache
import sys
import threading
from collections import Counter
from html import escape
from pathlib import Path
from types import FrameType

PERIOD_SECONDS = 0.005
PARTS = {
    "load and start": (
        "extract/model.py",
        "_find_and_load",
        "world.py:join",
        "shard_weights",
        "weights.py",
        "gradients.py:__init__",
    ),
    "idle": ("futures/thread.py:_worker",),
    "gather under ZeRO-3": ("deepspeed:",),
    "agree with ranks": ("world.py:agree", "world.py:leave"),
    "tokenise": ("encode_candidate", "encode_response"),
    "encode": ("store/codec.py",),
    "read and put": ("write_shard", "read_rows"),
    "fold": ("index_add_",),
    "factor sums": ("factors.", "a_NP", "factor_arrays", "new_factors"),
    "projection and sketch": ("gradients.py:forward", "gradients.py:backward", "gradients.py:_add_sketch"),
    "backward": ("autograd.grad(",),
    "forward": ("= model(", "cross_entropy"),
}
"""Part -> marks. A sample belongs to the first part of which a mark stands in its stack (see `stack_of`): so what a hook does
within the backward pass is the hook's, and what ZeRO-3 does there is the gathering's."""
NOT_WORK = ("load and start", "idle")
COLOURS = (
    "#bbbbbb",
    "#dddddd",
    "#b08900",
    "#d9c27a",
    "#8d6b94",
    "#7a9e9f",
    "#2f4858",
    "#c8553d",
    "#e09f7d",
    "#7fbf9a",
    "#5a9fd0",
    "#a9cdea",
)


def main(path: str, spec: str) -> int:
    """The extract stage in this process; its samples go to `path`. Returns the exit code."""
    from prism_job.__main__ import main as stage

    stacks: Counter[tuple[str, ...]] = Counter()
    done = threading.Event()

    def sample() -> None:
        while not done.wait(PERIOD_SECONDS):
            names = {thread.ident: thread.name for thread in threading.enumerate()}
            for ident, frame in sys._current_frames().items():
                if names.get(ident) == "MainThread" or names.get(ident, "").startswith("upload"):
                    stacks[stack_of(frame)] += 1

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    code = stage(["extract", "--spec", spec])
    done.set()
    sampler.join()
    Path(path).write_text(json.dumps(list(stacks.items())))
    return code


def stack_of(frame: FrameType | None) -> tuple[str, ...]:
    """`folder/file.py:function` from the project's outermost frame inwards, in gradients.py with the line's source too.

    Module calls that only pass on are left out. What ZeRO-3 does is marked, but not its own linear layer.
    """
    names: list[str] = []
    while frame is not None:
        path = frame.f_code.co_filename
        name = f"{'/'.join(Path(path).parts[-2:])}:{frame.f_code.co_name}"
        if path.endswith("extract/capture/gradients.py"):
            name += f" {linecache.getline(path, frame.f_lineno).strip()}"
        if "/deepspeed/" in path and not path.endswith("zero/linear.py"):
            name = f"deepspeed: {name}"
        if not path.endswith("nn/modules/module.py"):
            names.append(name)
        frame = frame.f_back
    names.reverse()
    return tuple(names[next((place for place, name in enumerate(names) if "extract/worker.py" in name), 0) :])


def part_of(stack: tuple[str, ...]) -> str:
    joined = "\n".join(stack)
    return next((part for part, marks in PARTS.items() if any(mark in joined for mark in marks)), "other")


def shares(stacks: Counter[tuple[str, ...]], name: str) -> dict[str, float]:
    """Shares of the samples by part, without loading and waiting; printed and returned."""
    counts: Counter[str] = Counter()
    for stack, count in stacks.items():
        counts[part_of(stack)] += count
    loading = sum(counts.pop(part, 0) for part in NOT_WORK)
    print(f"\n{name}: {counts.total()} samples of work, and {loading} of loading or an idle thread")
    for part, count in counts.most_common():
        print(f"  {part:<24}{count / counts.total():>8.1%}")
    return {f"share[{name}, {part}]": count / counts.total() for part, count in counts.items()}


def flame_graph(stacks: Counter[tuple[str, ...]]) -> str:
    """One box a frame, as wide as its share of the samples of work, callers above; what is under 0.2 % wide is left out."""
    work = Counter({stack: count for stack, count in stacks.items() if part_of(stack) not in NOT_WORK})
    wide, tall, colours = 1200, 16, dict(zip(PARTS, COLOURS, strict=True))
    boxes: list[str] = []
    deepest = 0

    def draw(depth: int, left: float, inside: Counter[tuple[str, ...]]) -> None:
        nonlocal deepest
        for name in sorted({stack[depth] for stack in inside if len(stack) > depth}):
            part = Counter(
                {stack: count for stack, count in inside.items() if len(stack) > depth and stack[depth] == name}
            )
            width, path = wide * part.total() / work.total(), next(iter(part))[: depth + 1]
            if width >= wide * 0.002:
                deepest = max(deepest, depth)
                label = escape(name.partition(":")[2].strip()[: int(width / 6)]) if width > 24 else ""
                title = f"{escape(name)}: {part.total() / work.total():.1%}"
                boxes.append(
                    f"<g><title>{title}</title>{_box(left, depth * tall + 24, width, colours.get(part_of(path), '#eee'))}"
                    f'<text x="{left + 2:.1f}" y="{depth * tall + 35}">{label}</text></g>'
                )
                draw(depth + 1, left, part)
            left += width

    draw(0, 0.0, work)
    for place, part in enumerate(name for name in PARTS if name not in NOT_WORK):
        boxes.append(f'{_box(120 * place, 2, 10, colours[part])}<text x="{120 * place + 14}" y="13">{part}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {(deepest + 1) * tall + 28}" font-family="sans-serif" '
        f'font-size="10"><rect width="100%" height="100%" fill="white"/>{"".join(boxes)}</svg>\n'
    )


def _box(left: float, top: float, width: float, colour: str) -> str:
    return f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="15" fill="{colour}"/>'


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
