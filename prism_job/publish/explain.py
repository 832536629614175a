"""The verb `explain`: which target pairs an example's score comes from, and which examples a pair speaks for and against.

Shapes: N candidates in plan order, E examples, Q target pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from prism_job.errors import RequestError
from prism_job.plan.plan import Plan
from prism_job.progress import Meter
from prism_job.publish.published import Published, load
from prism_job.publish.texts import example_texts, pair_texts
from prism_job.score.candidates import score_units
from prism_job.score.contributions import contributions, folded_pairs, pair_factors, read_stored_rows, target_layers
from prism_job.score.direction import read_folding
from prism_job.spec.document import RunSpec
from prism_job.storage.address import open_store
from prism_job.storage.objects import Store

Float64 = NDArray[np.float64]

EXAMPLE_FACTS = ["example_id", "source", "line", "score", "selected"]


@dataclass(frozen=True)
class _Selection:
    """A published selection with what every explanation reads of it."""

    published: Published
    plan: Plan
    store: Store
    targets: pa.Table
    set_Q: NDArray[np.int64]
    factor_Q: Float64

    @classmethod
    def open(cls, manifest_uri: str) -> "_Selection":
        published = load(manifest_uri)
        if published.manifest.spec.spec.scoring.is_forward_only:
            what = "its scores are cosines of hidden states, which target pairs do not add up to"
            fix = "explain a selection with scoring.score: influence or cosine"
            raise RequestError(what, where=manifest_uri, fix=fix)
        spec, targets = published.manifest.spec.spec, published.table("targets.parquet")
        names = [target_set.name for target_set in spec.targets.as_sets()]
        set_Q = np.zeros(len(targets), np.int64)
        if "set" in targets.column_names:
            set_Q = np.array([names.index(name) for name in targets["set"].to_pylist()], np.int64)
        factor_Q = pair_factors(spec, targets["weight"].to_numpy(), set_Q)
        return cls(published, published.plan(), open_store(spec.store), targets, set_Q, factor_Q)

    @property
    def spec(self) -> RunSpec:
        return self.published.manifest.spec.spec

    def scores(self) -> pa.Table:
        """What an explanation reads of each candidate, in plan order."""
        return self.published.table("scores.parquet", [*EXAMPLE_FACTS, "duplicate"])

    def facts(self) -> dict[str, Any]:
        manifest = self.published.manifest
        return {"run": manifest.run, "selection_id": manifest.selection_id, "num_pairs": len(self.targets)}

    def pairs(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Facts and text of these pairs. `pair`: its row in targets.parquet, from 1."""
        texts = pair_texts(self.spec, self.plan, self.store, numbers)
        rows = self.targets.take(pa.array(numbers, pa.int64())).to_pylist()
        kept = ("example_id", "set", "preference", "weight")
        return [
            {"pair": number + 1, **{name: row[name] for name in kept if name in row}, "text": text}
            for number, row, text in zip(numbers, rows, texts, strict=True)
        ]

    def examples(self, scores: pa.Table, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Facts and text of these candidates."""
        facts = scores.select(EXAMPLE_FACTS).take(pa.array(rows, pa.int64())).to_pylist()
        texts = example_texts(self.spec, self.plan, self.store, rows)
        return [{**row, "text": text} for row, text in zip(facts, texts, strict=True)]


def explain(manifest_uri: str, names: Sequence[str], top: int, bottom: int, num_shown: int) -> dict[str, Any]:
    """The contributions of the target pairs to the scores of these examples, then of the highest and the lowest scores.

    What an example lists adds up to its score, up to rounding: `num_shown` pairs of the largest contributions in absolute
    value (0: all), and `others`, the sum of the rest. Reads the units of these examples and all pairs.

    Args:
        names: example ids, beginnings of ids, or FILE:LINE.

    Raises:
        RequestError: no manifest, no example of that name or several, or one without a score.
        DataError: the selection or the store is damaged, or shards are missing.
    """
    selection = _Selection.open(manifest_uri)
    spec, plan, store = selection.spec, selection.plan, selection.store
    scores = selection.scores()
    rows = [*_find(scores, names, manifest_uri), *_ends(scores, top, bottom)]
    if not rows:
        raise RequestError(
            "no example to explain", where=manifest_uri, fix="give an example id, FILE:LINE, --top or --bottom"
        )
    layers = target_layers(plan, store)
    arrays = read_stored_rows(spec, plan, store, rows, layers)
    meter = Meter("explain", len(selection.targets))
    folding = read_folding(spec, plan, store, layers)
    found_EQ = contributions(plan, store, folding, selection.factor_Q, arrays, lambda: meter.add(1))
    shown: dict[int, None] = {}
    explained = []
    for example, of_pairs_Q in zip(selection.examples(scores, rows), found_EQ, strict=True):
        largest = np.argsort(-np.abs(of_pairs_Q), kind="stable")[: num_shown or None].tolist()
        shown |= dict.fromkeys(largest)
        rest = np.delete(of_pairs_Q, largest)
        explained.append(
            {
                **example,
                **({"sets": _by_set(spec, selection.set_Q, of_pairs_Q)} if spec.targets.sets else {}),
                "pairs": [{"pair": pair + 1, "contribution": float(of_pairs_Q[pair])} for pair in largest],
                "others": {"pairs": len(rest), "contribution": float(rest.sum())},
            }
        )
    return {**selection.facts(), "examples": explained, "pairs": selection.pairs(sorted(shown))}


def explain_pair(manifest_uri: str, pair: int, top: int, bottom: int) -> dict[str, Any]:
    """The examples whose score one target pair raises and lowers most. Reads every shard once, as the reduce stage does.

    Args:
        pair: its row in targets.parquet, from 1, as the report counts.

    Raises: as `explain`.
    """
    selection = _Selection.open(manifest_uri)
    spec, plan, store = selection.spec, selection.plan, selection.store
    if not 1 <= pair <= len(selection.targets):
        fix = f"give a number from 1 to {len(selection.targets):,}, as the report counts the pairs"
        raise RequestError(f"no target pair {pair}", where=manifest_uri, fix=fix)
    layers = target_layers(plan, store)
    (direction_D,) = folded_pairs(plan, store, read_folding(spec, plan, store, layers), only=pair - 1)
    found_N, start, meter = np.empty(plan.num_examples), 0, Meter("explain", plan.num_examples)
    for unit in score_units(spec, store, plan.extractor, plan.candidates, layers, direction_D[None]):
        found_N[start : start + len(unit.ids)] = selection.factor_Q[pair - 1] * unit.scores[0]
        start += len(unit.ids)
        meter.add(len(unit.ids))
    scores = selection.scores()
    rows = _ends(scores, top, bottom, found_N)
    examples = [
        {**example, "contribution": float(found_N[row])}
        for example, row in zip(selection.examples(scores, rows), rows, strict=True)
    ]
    num_top = min(top, len(rows))
    (facts,) = selection.pairs([pair - 1])
    return {**selection.facts(), "pair": facts, "for": examples[:num_top], "against": examples[num_top:]}


def _find(scores: pa.Table, names: Sequence[str], where: str) -> list[int]:
    """The row of each name in plan order: an example id, a beginning that only one id has, or FILE:LINE as it is printed.
    Of the rows of one id the first, which has the same score."""
    wanted = pa.array(dict.fromkeys(names), pa.string())
    matches = np.flatnonzero(pc.is_in(scores["example_id"], value_set=wanted).to_numpy())
    found: dict[str, int] = {}
    for row, example_id in zip(matches.tolist(), scores["example_id"].take(matches).to_pylist(), strict=True):
        found.setdefault(example_id, row)
    for name in wanted.to_pylist():
        if name not in found:
            found[name] = _named_row(scores, name, where)
        if scores["score"][found[name]].as_py() is None:
            what, fix = f"the candidate {name} has no score", "quarantine.jsonl beside the manifest has the reason"
            raise RequestError(what, where=where, fix=fix)
    return list(dict.fromkeys(found[name] for name in wanted.to_pylist()))


def _named_row(scores: pa.Table, name: str, where: str) -> int:
    """The row at FILE:LINE, or of the one id that begins so. Raises RequestError: none, or several."""
    file, _, line = name.rpartition(":")
    if file and line.isdecimal() and len(line) < 19:  # as a column of int64 holds it
        at_line = pc.and_(pc.equal(scores["source"], file), pc.equal(scores["line"], int(line)))
        rows = np.flatnonzero(at_line.to_numpy())
        if len(rows):
            return int(rows[0])
    rows = np.flatnonzero(pc.starts_with(scores["example_id"], name).to_numpy()) if name else np.array([], np.int64)
    ids = dict.fromkeys(scores["example_id"].take(pa.array(rows)).to_pylist())
    if len(ids) > 1:
        what = f"{len(ids):,} example ids begin with {name!r}: {', '.join(list(ids)[:3])}{' …' if len(ids) > 3 else ''}"
        raise RequestError(what, where=where, fix="give more of the id, or FILE:LINE")
    if not ids:
        fix = (
            "give an example id, its beginning, or FILE:LINE, as `prism explain` prints them and scores.parquet beside the "
            "manifest has them (columns example_id, source, line)"
        )
        raise RequestError(f"no candidate has the example id or the FILE:LINE {name!r}", where=where, fix=fix)
    return int(rows[0])


def _ends(scores: pa.Table, top: int, bottom: int, by_N: Float64 | None = None) -> list[int]:
    """Rows of the highest values, best first, then of the lowest, worst first: of the scores, or of `by_N`. Ties break by
    example id. Rows without a score and duplicates do not count."""
    ranked = np.flatnonzero(scores["score"].is_valid().to_numpy() & ~scores["duplicate"].to_numpy())
    value_R = (scores["score"].to_numpy() if by_N is None else by_N)[ranked]
    return [
        row for count, sign in ((top, -1.0), (bottom, 1.0)) for row in _first(scores, ranked, sign * value_R, count)
    ]


def _first(scores: pa.Table, ranked: NDArray[np.int64], value_R: Float64, count: int) -> list[int]:
    count = min(count, len(ranked))
    if not count:
        return []
    last = np.partition(value_R, count - 1)[count - 1]
    first_R = value_R <= last  # more than `count` where several have the last value
    rows = ranked[first_R]
    ids = scores["example_id"].take(pa.array(rows)).to_pylist()
    ordered = sorted(zip(value_R[first_R].tolist(), ids, rows.tolist(), strict=True))
    return [row for _, _, row in ordered[:count]]


def _by_set(spec: RunSpec, set_Q: NDArray[np.int64], of_pairs_Q: Float64) -> list[dict[str, Any]]:
    sets = spec.targets.as_sets()
    sums_K = np.bincount(set_Q, weights=of_pairs_Q, minlength=len(sets)).tolist()
    return [{"set": target_set.name, "contribution": value} for target_set, value in zip(sets, sums_K, strict=True)]
