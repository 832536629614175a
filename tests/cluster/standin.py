"""A stand-in for a worker: stages, units as files, termination messages, exit codes by script. Standard library only.

`python -S -m tests.cluster.standin STAGE …` as a pod's command stands for `python -m prism_job STAGE …`: it starts in a few
hundredths of a second, so that hundreds of runs test what makes and watches pods. Its folder is
STANDIN_FOLDER/STANDIN_RUN: `units/` holds a file a unit that is done, `orders/` what shall go wrong: `extract.0` is met by one
attempt, `extract.always` by each. An order is an exit code, or `hang`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

PAIRS = 3
EXAMPLES_PER_UNIT = 4


def main() -> int:
    stage, options = sys.argv[1], sys.argv[2:]
    home = Path(os.environ["STANDIN_FOLDER"]) / os.environ["STANDIN_RUN"]
    num_units, seconds = int(os.environ["STANDIN_UNITS"]), float(os.environ["STANDIN_SECONDS"])
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
    order = take_order(home / "orders", stage)
    say(event="started", stage=stage, order=order)
    time.sleep(seconds)
    if order and stage != "extract":
        return obey(order)
    if stage == "plan":
        missing = num_units - len(done(home, num_units))
        examples = num_units * EXAMPLES_PER_UNIT
        return end(units=num_units, missing=missing, examples=examples, pairs=PAIRS, badRows=0)
    if stage == "extract":
        return extract(home, num_units, seconds, order, place(options))
    if len(done(home, num_units)) < num_units:
        return fail(65, "units are missing")
    (home / "manifest.json").write_text("{}")
    return end(manifest=f"s3://standin/{home.name}/manifest.json", selected=num_units, badRows=0)


def extract(home: Path, num_units: int, seconds: float, order: str, first: int) -> int:
    """Every unit that is missing, beginning at a place of one's own; nobody waits for anybody."""
    written = 0
    for unit in [*range(first % num_units, num_units), *range(first % num_units)]:
        if unit in done(home, num_units):
            continue
        time.sleep(seconds)
        if order and written:
            return obey(order)
        scratch = home / "units" / f"{unit}.{os.getpid()}.partial"
        scratch.write_text(str(unit))
        scratch.rename(home / "units" / str(unit))
        written += 1
        say(event="shard", unit=unit)
    return obey(order) if order else end(units=written)


def done(home: Path, num_units: int) -> set[int]:
    """Units that are there."""
    (home / "units").mkdir(parents=True, exist_ok=True)
    return {unit for unit in range(num_units) if (home / "units" / str(unit)).exists()}


def place(options: list[str]) -> int:
    """Where this pod begins: other groups and nodes begin elsewhere."""
    given = dict(option.removeprefix("--").split("=", 1) for option in options if "=" in option)
    return 3 * int(given.get("group", 0)) + 2 * int(given.get("node", 0))


def take_order(orders: Path, stage: str) -> str:
    """What shall go wrong with this attempt; "" for nothing. Two that look at once do not take the same one."""
    for order in sorted(orders.glob(f"{stage}.*")):
        if order.suffix == ".always":
            return order.read_text()
        if order.suffix != ".taken":
            with contextlib.suppress(FileNotFoundError):
                taken = order.rename(order.with_name(f"{order.name}.{os.getpid()}.taken"))
                return taken.read_text()
    return ""


def obey(order: str) -> int:
    if order == "hang":
        while True:
            signal.pause()
    return fail(int(order), f"told to end with {order}")


def fail(code: int, why: str) -> int:
    write_termination_message(error=why, where="standin", fix="take its order away")
    return code


def end(**words: object) -> int:
    write_termination_message(**words)
    say(event="done", **words)
    return 0


def write_termination_message(**words: object) -> None:
    Path(os.environ["PRISM_TERMINATION_LOG"]).write_text(json.dumps(words))


def say(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    sys.exit(main())
