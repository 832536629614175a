"""Shared by the quality experiments: extraction through the job, scores of any weighting from its store, statistics.

An experiment is a script with `--work FOLDER` (the store and finished parts; a second run resumes there), `--seeds` and
`--json FILE`. Rows come from `python -m prism_job plan` and `extract`; scores come from the reducer's own functions, so
weightings that the product does not offer (1 − π, swapped pairs) differ from it in one array only.

Shapes: N candidates, Q pairs, L layers, P projected dims a side, S seeds.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from benchmarks import job
from prism_job.evaluate import metrics
from prism_job.plan.plan import Plan, read_plan
from prism_job.publish.manifest import MANIFEST_FORMAT
from prism_job.score.candidates import score_candidates
from prism_job.score.column import Column
from prism_job.score.direction import fold_directions
from prism_job.score.groups import Groups
from prism_job.score.selection import Selected, select
from prism_job.score.targets import Targets, wanted_responses, weigh_targets
from prism_job.score.walk import SIGN_BYTES, sign_bytes
from prism_job.spec.digest import digest
from prism_job.spec.document import SelectionRun, parse_spec
from prism_job.spec.ranking import CurvatureSpec, SelectionSpec
from prism_job.storage.address import open_store
from prism_job.store import shards

Float64 = NDArray[np.float64]
Rows = list[dict[str, Any]]

STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's t for 1 to 9 degrees of freedom: intervals of a mean over 2 to 10 seeds."""


def parser(description: str | None, seeds: int) -> argparse.ArgumentParser:
    """The options that every experiment has."""
    made = job.parser(description)
    made.add_argument("--seeds", type=int, default=seeds, choices=range(1, 11), help="how many, from 0 (%(default)s)")
    made.add_argument("--work", type=Path, default=Path("build/quality"), help="store and finished parts (%(default)s)")
    made.add_argument("--model", default=job.MODEL, help="%(default)s")
    made.add_argument("--data", type=Path, default=Path(), help="folder of GSM8K and BIG-Bench-Hard")
    made.add_argument("--figure", type=Path, help="draw them there, as SVG (needs the extra `quality`)")
    return made


def constants(module: str) -> dict[str, Any]:
    """The settings that a script states at its top: its names in capitals, as plain values."""
    named = vars(sys.modules[module]).items()
    found = {
        name: repr(value) for name, value in named if name.isupper() and isinstance(value, int | float | tuple | dict)
    }
    moving = [name for name, text in found.items() if " at 0x" in text]
    if moving:  # an address differs in each process, so nothing that was finished would ever be found
        raise ValueError(f"{module}: {moving[0]} holds functions or objects; settings are plain values")
    return found


def once(path: Path, settings: Any, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of `compute`, kept at `path`, so that a run that was stopped or is repeated resumes.

    `settings` are what the figures depend on: the script's constants, model, data. Figures of other settings, or of other
    formats of shards and selections, are computed again. Changed code is not noticed: remove the file, or `--work`.
    """
    wanted = digest([settings, shards.FORMAT, MANIFEST_FORMAT])
    if path.exists():
        kept = json.loads(path.read_text())
        if kept["settings"] == wanted:
            return dict(kept["figures"])
    started = time.monotonic()
    figures = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    part, seconds = path.with_suffix(".part"), time.monotonic() - started
    part.write_text(json.dumps({"settings": wanted, "seconds": seconds, "figures": figures}, indent=1))
    part.rename(path)
    print(f"{path.stem}: {seconds:.0f} s", file=sys.stderr, flush=True)
    return figures


@dataclass(frozen=True)
class Extracted:
    """A planned and extracted run: its rows lie in the store, and scores of any weighting follow from them."""

    run: SelectionRun
    plan: Plan

    def without_curvature(self) -> Self:
        """The same rows scored by plain inner products: nothing is extracted again."""
        plain = CurvatureSpec.model_validate({"kind": "none"})
        scoring = self.run.spec.scoring.model_copy(update={"curvature": plain})
        spec = self.run.spec.model_copy(update={"scoring": scoring})
        return replace(self, run=self.run.model_copy(update={"spec": spec}))

    @cached_property
    def targets(self) -> Targets:
        """The reducer's targets under the run's own scoring."""
        return weigh_targets(self.run.spec, self.plan, open_store(self.run.spec.store))

    @cached_property
    def pair_rows_QM(self) -> NDArray[np.float32]:
        """ḡ(y⁺) − ḡ(y⁻) of each pair, unfolded: float32 [Q, L·P²]."""
        store = open_store(self.run.spec.store)
        parts = [shards.read_shard(store, self.plan.extractor, "targets", unit.id) for unit in self.plan.targets]
        return np.concatenate([part.arrays["rows"] for part in parts])

    def scores(self, weight_Q: Float64) -> Float64:
        """Equation 4 with these weights in equation 3: float64 [N] in plan order."""
        return self._scores_along(weight_Q[None] @ self.pair_rows_QM.astype(np.float64) / len(weight_Q))[:, 0]

    def scores_by_pair(self) -> Float64:
        """The score along each pair alone, float64 [N, Q]: scores are linear in the pairs, so this holds every weighting."""
        return self._scores_along(self.pair_rows_QM.astype(np.float64))

    def _scores_along(self, directions_KM: Float64) -> Float64:
        """The reducer's scores along any directions: float64 [N, K]."""
        spec, store, dim = self.run.spec, open_store(self.run.spec.store), self.run.spec.extraction.projection.dim
        directions_KLPP = directions_KM.reshape(len(directions_KM), -1, dim, dim)
        folded_KD, _ = fold_directions(spec, self.plan, store, self.targets.layers, directions_KLPP)
        with contextlib.redirect_stdout(sys.stderr):  # its progress; what an experiment prints is its tables
            columns = score_candidates(spec, self.plan, store, self.targets.layers, folded_KD).scores
        return np.stack([column.part(slice(0, len(column))) for column in columns], axis=1)

    def similarities(self, similarity: str) -> Float64:
        """With `score: representation`, the reducer's scores under this `similarity`: float64 [N] in plan order."""
        scoring = self.run.spec.scoring.model_copy(update={"similarity": similarity})
        spec, store = self.run.spec.model_copy(update={"scoring": scoring}), open_store(self.run.spec.store)
        _, compared = wanted_responses(spec, self.plan, store)
        with contextlib.redirect_stdout(sys.stderr):
            (column,) = score_candidates(spec, self.plan, store, [], compared).scores
        return column.part(slice(0, len(column)))

    @cached_property
    def norm_N(self) -> Float64:
        return self.column("norm")

    @cached_property
    def signs_NW(self) -> NDArray[np.uint8]:
        return np.concatenate([arrays["signs"] for arrays in self.candidate_arrays()])

    @cached_property
    def loss_N(self) -> Float64:
        """Token-mean negative log-likelihood of each candidate's response."""
        return self.column("nll") / self.column("tokens")

    def column(self, name: str) -> Float64:
        return np.concatenate([arrays[name] for arrays in self.candidate_arrays()]).astype(np.float64)

    def candidate_arrays(self) -> Iterator[dict[str, NDArray[Any]]]:
        """The stored arrays of each unit, in plan order."""
        store = open_store(self.run.spec.store)
        for unit in self.plan.candidates:
            yield shards.read_shard(store, self.plan.extractor, "candidates", unit.id).arrays


def extract(
    work: Path,
    name: str,
    candidates: Rows,
    targets: Rows,
    *,
    model: str,
    dtype: str = "float32",
    weighting: str = "preference",
    representation: bool = False,
    extraction: dict[str, Any] | None = None,
    audit: int = 0,
    preference_model: str | None = None,
) -> Extracted:
    """Plan and extract through the job's own stages, into the store that all experiments under `work` share.

    Args:
        representation: rows of hidden states, in place of gradients.
        audit: candidates that are extracted once more for the audit; experiments that look at labels need none.
    """
    folder = work / "data" / name
    folder.mkdir(parents=True, exist_ok=True)
    job.write_jsonl(folder / "pool.jsonl", candidates)
    job.write_jsonl(folder / "targets.jsonl", targets)
    of_preference = (
        {"preferenceModel": {"uri": str(Path(preference_model).resolve()), "dtype": dtype}} if preference_model else {}
    )
    spec = job.selection(
        folder,
        model={"uri": str(Path(model).resolve()), "dtype": dtype},
        store=str(work / "store"),
        output=str(work / "selections"),
        extraction={"tokensPerBatch": 2048, **(extraction or {})},
        scoring={"score": "representation"} if representation else {"weighting": weighting, **of_preference},
        audit={"examples": audit},
        selection={"drop": "lowest", "budget": {"fraction": 0.5}, "dedupe": "none"},
    )
    path = job.write_document(folder / "selection.yaml", name, spec)
    for stage in ("plan", "extract"):
        job.run_stage(stage, path)
    run = parse_spec(path.read_text(), str(path))
    return Extracted(run, read_plan(run))


def selected(
    scores_N: Float64, selection: dict[str, Any], signs_NW: NDArray[np.uint8], group_of: Sequence[str] = ()
) -> Selected:
    """The reducer's selection of these rows under `spec.selection`. No two rows count as exact copies.

    Args:
        signs_NW: as stored. group_of: what the column of `perGroup` holds, where the selection has one.
    """
    spec, num_rows = SelectionSpec.model_validate(selection), len(scores_N)
    ids, signs, tokens = Column("V16"), Column(f"V{SIGN_BYTES}"), Column("i4")
    ids.append(np.array([[row, 0] for row in range(num_rows)], ">u8").view("V16")[:, 0])
    signs.append(sign_bytes({"signs": signs_NW}))
    tokens.append(np.ones(num_rows, np.int32))
    groups = None
    if spec.per_group:
        names = sorted(set(group_of))
        groups = Groups(spec.per_group, "spec.selection.perGroup", list(names))
        groups.of.append(np.array([names.index(name) for name in group_of], np.uint32))
    usable_N = np.ones(num_rows, np.bool_)
    return select(scores_N, ids, tokens, usable_N, spec, groups, signs if spec.dedupe == "near" else None)


def draw_swapped(generator: np.random.Generator, count: int, share: float) -> NDArray[np.bool_]:
    """Which of so many pairs are swapped: exactly that share of them, rounded."""
    swapped_Q = np.zeros(count, np.bool_)
    swapped_Q[generator.permutation(count)[: round(share * count)]] = True
    return swapped_Q


def flipped(preference_Q: Float64, swapped_Q: NDArray[np.bool_]) -> tuple[Float64, Float64]:
    """Sign and π of each pair once chosen and rejected of those `swapped` change places: its row is −row, its π is 1 − π."""
    return np.where(swapped_Q, -1.0, 1.0), np.where(swapped_Q, 1 - preference_Q, preference_Q)


def area(ranking_N: Float64, good_N: NDArray[np.bool_]) -> float:
    """AUROC: the probability that a good candidate ranks above a bad one."""
    value = metrics.auroc(ranking_N, good_N)
    assert value is not None
    return value


def precision_of_dropped(ranking_N: Float64, good_N: NDArray[np.bool_], fraction: float) -> float:
    """Share of bad candidates among the lowest `fraction`."""
    taken = np.argsort(ranking_N, kind="stable")[: round(fraction * len(ranking_N))]
    return float((~good_N[taken]).mean())


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % interval by Student's t."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        mean, low, high = (
            f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.3f}"
            for value in (self.mean, self.low, self.high)
        )
        return f"{mean} (one seed)" if self.low != self.low else f"{mean} ({low} to {high})"


def interval(values_S: Iterable[float]) -> Interval:
    """Mean over seeds, which are independent draws of data and order; one seed has no interval (NaN)."""
    values = np.array(list(values_S), np.float64)
    mean = float(values.mean())
    if len(values) < 2:
        return Interval(mean, float("nan"), float("nan"))
    half = STUDENT_T[len(values) - 2] * float(values.std(ddof=1)) / len(values) ** 0.5
    return Interval(mean, mean - half, mean + half)


def over_seeds(by_seed: Sequence[dict[str, float]]) -> dict[str, Interval]:
    """Figure by figure."""
    return {name: interval(figures[name] for figures in by_seed) for name in by_seed[0]}


def flat(intervals: dict[str, Interval]) -> dict[str, float]:
    """As `--json` writes them: name, name_low, name_high."""
    return {
        f"{name}{suffix}": value
        for name, found in intervals.items()
        for suffix, value in (("", found.mean), ("_low", found.low), ("_high", found.high))
    }


def table(heads: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """A Markdown table, as docs/method.md shows it."""
    rows = [heads, ["---"] * len(heads), *([str(cell) for cell in line] for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
