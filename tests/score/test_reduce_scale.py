"""Laws of the streaming reducer: it is the plain reduction in memory, whatever is read ahead and however it is cut."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy

from prism_job.errors import DataError
from prism_job.score import column
from prism_job.score.column import Column
from prism_job.score.direction import fold_directions
from prism_job.score.scorers import finish, scorer
from prism_job.score.targets import weigh_targets
from prism_job.storage.folder import LocalFolder
from prism_job.store import shards
from tests.conftest import Job, candidate, write_jsonl


def many_units(job: Job) -> None:
    """Nine units in two files, duplicates within and across them, a row quarantined in extraction, a hole in the lines."""
    first = [candidate(number) for number in (*range(18), 3, 3)]
    first[5] = {"prompt": "x " * 200, "completion": "y"}  # beyond maxLength: no token of the response is left
    first[7] = {"nothing": "usable"}  # never gets as far as a unit
    write_jsonl(job.folder / "pool" / "a.jsonl", first)
    write_jsonl(job.folder / "pool" / "b.jsonl", [candidate(number) for number in range(10, 26)])
    job.spec["candidates"]["maxBadFraction"] = 0.2
    job.spec["selection"] = {"drop": "lowest", "budget": {"fraction": 0.3}}


def reduce_to(job: Job, output: str) -> Path:
    """The same selection again, in another folder."""
    again = job.copy(output=str(job.folder / output))
    again.plan()
    return Path(again.passes("reduce")["manifest"]).parent


def tables_in_memory(job: Job) -> tuple[pa.Table, pa.Table]:
    """scores.parquet and selected.parquet as they must read, with every row held at once and plain Python for the rest."""
    run, plan, store = job.parsed(), job.planned(), job.store()
    targets = weigh_targets(run.spec, plan, store)
    (direction_D,), _ = fold_directions(run.spec, plan, store, targets.layers, targets.directions_KLPP)
    loaded = [
        safetensors.numpy.load(store.get(shards.shard_key(plan.extractor, "candidates", unit.id)))
        for unit in plan.candidates
    ]
    arrays = {name: np.concatenate([part[name] for part in loaded]) for name in loaded[0]}
    scoring = run.spec.scoring
    raw_N = scorer(run.spec.extraction.codec.kind, direction_D)(arrays)
    scores = finish(raw_N, arrays["tokens"], arrays["norm"], scoring.score, scoring.loss).tolist()
    ids = [row.tobytes().hex() for row in arrays["ids"]]
    places = [(plan.sources[unit.source], line) for unit in plan.candidates for line in unit.line_numbers()]
    usable = [tokens > 0 for tokens in arrays["tokens"].tolist()]
    ranked: list[int] = []
    for place, example_id in enumerate(ids):
        if usable[place] and example_id not in {ids[earlier] for earlier in ranked}:
            ranked.append(place)
    duplicate = [usable[place] and place not in ranked for place in range(len(ids))]
    rising = sorted(ranked, key=lambda place: (scores[place], ids[place]))
    dropped = rising[: round(0.3 * len(rising))]
    order = sorted(set(ranked) - set(dropped), key=lambda place: (-scores[place], ids[place]))

    def known(values: Any) -> Any:
        return pa.array(values, mask=~np.array(usable))

    everything = {
        "example_id": ids,
        "source": pa.array([source for source, _ in places]),
        "line": [line for _, line in places],
        "score": known(np.array(scores)),
        "nll": known(arrays["nll"]),
        "norm": known(arrays["norm"]),
        "num_tokens": arrays["tokens"],
        "selected": [place in order for place in range(len(ids))],
        "duplicate": duplicate,
    }
    whole = pa.table(everything)
    return whole, whole.take(order).select(["example_id", "source", "line", "score", "num_tokens"])


def plain(path: Path) -> pa.Table:
    table = pq.read_table(path)
    return table.set_column(1, "source", table["source"].cast(pa.string())).combine_chunks()


@pytest.mark.parametrize("part_rows", [1, 3, 2**16])
@pytest.mark.parametrize("kind", ["sign", "float16"])
def test_streaming_is_the_reduction_in_memory_to_the_bit(
    job: Job, kind: str, part_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    many_units(job)
    job.use_codec(kind)
    monkeypatch.setattr(column, "PART_ROWS", part_rows)
    folder = job.run().parent
    wanted_scores, wanted_selected = tables_in_memory(job)
    assert wanted_scores["duplicate"].to_pylist().count(True) > 2
    assert wanted_scores["score"].null_count == 1
    for name, wanted in (("scores.parquet", wanted_scores), ("selected.parquet", wanted_selected)):
        found = plain(folder / name)
        assert found.column_names == wanted.column_names
        assert found.to_pydict() == wanted.to_pydict()  # floats compare as they are: no tolerance


def test_how_far_is_read_ahead_changes_no_byte_and_no_event(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    many_units(job)
    job.run()
    seen: list[tuple[list[Any], dict[str, str]]] = []
    for depth in (1, 2, 5, 100):
        monkeypatch.setattr(shards, "read_depth", lambda _, depth=depth: depth)
        folder = reduce_to(job, f"output{depth}")
        names = ("selected.parquet", "scores.parquet", "quarantine.jsonl")
        digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
        seen.append(([event["done"] for event in job.events if event["event"] == "progress"][-1:], digests))
    assert seen == [seen[0]] * 4
    assert seen[0][0] == [35]


@pytest.mark.parametrize("depth", [1, 2, 100])
def test_of_two_damaged_shards_the_first_is_named_whatever_is_read_ahead(
    job: Job, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    many_units(job)
    job.plan()
    job.passes("extract")
    plan, store = job.planned(), job.store()
    for place in (6, 4):
        path = Path(store.uri(shards.shard_key(plan.extractor, "candidates", plan.candidates[place].id)))
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    monkeypatch.setattr(shards, "read_depth", lambda _: depth)
    job.refuses("reduce", 65, path.name)


def test_a_damaged_shard_has_the_same_words_with_and_without_reading_ahead(job: Job) -> None:
    job.plan()
    job.passes("extract")
    plan, store = job.planned(), job.store()
    ids = [unit.id for unit in plan.candidates]
    path = Path(store.uri(shards.shard_key(plan.extractor, "candidates", ids[1])))
    content = path.read_bytes()
    for damaged in (b"", content[:5], content[:-3], content + b"\0", b"\xff" * 64, b"\2" + bytes(7) + b"[]"):
        path.write_bytes(damaged)
        with pytest.raises(DataError) as alone:
            shards.read_shard(store, plan.extractor, "candidates", ids[1])
        with pytest.raises(DataError) as ahead:
            list(shards.read_ahead(store, plan.extractor, ids, lambda shard: shard.unit_id, 3))
        assert str(alone.value) == str(ahead.value)
        assert path.name in str(ahead.value)


def test_arrays_read_are_those_of_the_safetensors_library(job: Job) -> None:
    job.plan()
    job.passes("extract")
    store = job.store()
    for extractor, kind, unit in job.shards():
        found = shards.read_shard(store, extractor, kind, unit).arrays
        wanted = safetensors.numpy.load(store.get(shards.shard_key(extractor, kind, unit)))
        assert found.keys() == wanted.keys()
        for name, array in wanted.items():
            assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
            assert found[name].tobytes() == array.tobytes()


class Watched(LocalFolder):
    """A store that counts shards read and not yet used, and can hold one read back for ever."""

    def __init__(self, root: Path, hang_on: str | None = None) -> None:
        super().__init__(str(root))
        self.hang_on, self.forever = hang_on, threading.Event()
        self.lock, self.in_hand, self.most_in_hand = threading.Lock(), 0, 0

    def get(self, key: str) -> bytes:
        if self.hang_on is not None and self.hang_on in key:
            self.forever.wait()
        with self.lock:
            self.in_hand += 1
            self.most_in_hand = max(self.most_in_hand, self.in_hand)
        return super().get(key)

    def used(self, _: shards.Shard) -> None:
        with self.lock:
            self.in_hand -= 1


def made_up_units(folder: Path, count: int) -> list[str]:
    random, ids = np.random.default_rng(0), []
    for _ in range(count):
        rows = random.integers(0, 256, (3, 16), np.uint8)
        ids.append(shards.unit_id_of(shards.hex_ids(rows)))
        shards.write_shard(LocalFolder(str(folder)), "extractor", "candidates", ids[-1], {"ids": rows}, {})
    return ids


def test_no_more_shards_are_in_hand_than_asked_for(tmp_path: Path) -> None:
    ids = made_up_units(tmp_path, 30)
    for depth in (1, 3):
        store = Watched(tmp_path)
        assert len(list(shards.read_ahead(store, "extractor", ids, store.used, depth))) == 30
        assert 1 <= store.most_in_hand <= depth
    assert shards.read_depth(2**40) == 1
    assert shards.read_depth(9 * 2**20) * 9 * 2**20 <= shards.AHEAD_BYTES
    assert shards.read_depth(1) == shards.MAX_AHEAD


def test_a_stop_does_not_wait_for_a_read_that_hangs(tmp_path: Path) -> None:
    ids = made_up_units(tmp_path, 4)
    store = Watched(tmp_path, hang_on=ids[1])
    units = shards.read_ahead(store, "extractor", ids, lambda shard: shard.unit_id, 2)
    assert next(units) == ids[0]
    units.close()  # would never come back
    store.forever.set()


def test_a_column_gives_back_what_was_appended() -> None:
    random = np.random.default_rng(0)
    for dtype in ("f8", "f4", "V16"):
        values = random.integers(0, 256, 100 * np.dtype(dtype).itemsize, np.uint8).view(dtype)
        found = Column(dtype)
        for start in range(0, 100, 7):
            found.append(values[start : start + 7])
        assert found.part(slice(13, 61)).tobytes() == values[13:61].tobytes()
        places = random.integers(0, 100, 50).astype(np.uint32)
        assert found.at(places).tobytes() == values[places].tobytes()
        assert len(found.at(places[:0])) == len(found.part(slice(5, 5))) == 0
