"""The second half of the demo: does a model that is tuned without the dropped half add rightly? `make demo-retrain`.

Tunes SmolLM2 as the demo's adapter was tuned, on half of the rows each time: a random half, and PRISM's selection. Asks all
of them 60 sums that no row and no pair is about.
"""

from __future__ import annotations

import random
from pathlib import Path

from demo import SPEC, prism
from peft import PeftModel
from tune import SEED, Rows, Tuned, read_rows

from prism_job.api import Selection

DATA = Path("build/sums")


def main() -> None:
    rows, held_out = (read_rows(DATA / f"{name}.jsonl") for name in ("candidates", "held_out"))
    selected = Selection.load(prism("run", SPEC)).examples().to_list()
    at_random = random.Random(SEED).sample(rows, len(selected))
    shares = {
        "before any tuning": Tuned().share_wrong(held_out),
        "all rows (the demo's adapter)": _of_adapter(held_out),
    }
    for name, chosen in (("a random half", at_random), ("the half that PRISM selected", selected)):
        tuned = Tuned()
        tuned.learn(chosen, name)
        shares[name] = tuned.share_wrong(held_out)
    print(f"\n{'tuned on':<32}the wrong answer is the likelier for")
    for name, share in shares.items():
        print(f"{name:<32}{round(share * len(held_out))} of {len(held_out)} other sums")


def _of_adapter(held_out: Rows) -> float:
    tuned = Tuned()
    tuned.model = PeftModel.from_pretrained(tuned.model.unload(), str(Path(__file__).with_name("adapter")))
    tuned.model.eval()
    return tuned.share_wrong(held_out)


if __name__ == "__main__":
    main()
