"""What a second run, new data, moved data and other settings cost; and which shards are refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from prism_job.errors import TransientError
from prism_job.plan.units import FACTOR_UNIT_SHARE, factor_units
from prism_job.spec.digest import digest
from prism_job.spec.document import parse_spec
from prism_job.storage.objects import Store
from prism_job.store import shards
from tests.conftest import Job, candidate, pair, read_json, table_of, write_jsonl
from tests.models import save_tiny_adapter, save_tiny_model


def scores_of(manifest: Path) -> dict[str, float]:
    return {row["example_id"]: row["score"] for row in table_of(manifest, "scores")}


def files_of(folder: Path) -> dict[Path, int]:
    """Every file with the time of its last change."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def selected_sha(manifest: Path) -> str:
    return hashlib.sha256((manifest.parent / "selected.parquet").read_bytes()).hexdigest()


def test_a_second_identical_run_extracts_nothing_and_selects_the_same_bytes(job: Job) -> None:
    first = job.run()
    shards_before, before = files_of(job.folder / "store"), files_of(first.parent)
    assert job.passes("extract")["units"] == 0
    assert files_of(job.folder / "store") == shards_before
    assert job.plan()["missing"] == 0
    words = job.passes("reduce")
    assert (words["unchanged"], words["selected"], words["manifest"]) == (True, 4, str(first))
    assert files_of(first.parent) == before
    second = job.copy(output=str(job.folder / "elsewhere"))
    manifest = second.run()
    assert manifest != first
    assert selected_sha(manifest) == selected_sha(first)


def test_appended_rows_cost_only_their_own_units(job: Job) -> None:
    # 8 rows are two whole units of 4, so what is appended begins a unit of its own.
    write_jsonl(job.folder / "pool" / "a.jsonl", [candidate(number) for number in range(8)])
    job.run()
    write_jsonl(job.folder / "pool" / "a.jsonl", [candidate(number) for number in range(11)])
    write_jsonl(job.folder / "pool" / "b.jsonl", [candidate(number) for number in range(20, 24)])
    words = job.plan()
    assert words["examples"] == 15
    assert words["missing"] == 2
    appended = job.run()
    clean = job.copy(store=str(job.folder / "store2"), output=str(job.folder / "output2")).run()
    assert selected_sha(appended) == selected_sha(clean)


def test_moved_and_renamed_files_cost_nothing(job: Job) -> None:
    before = scores_of(job.run())
    (job.folder / "pool2").mkdir()
    shutil.move(job.folder / "pool" / "a.jsonl", job.folder / "pool2" / "renamed.jsonl")
    job.spec["candidates"]["uris"] = [str(job.folder / "pool2")]
    assert job.plan()["missing"] == 0
    assert scores_of(job.run()) == before


def test_new_targets_cost_their_own_unit_and_are_another_selection(job: Job) -> None:
    first = job.run()
    write_jsonl(job.folder / "targets.jsonl", [pair(number) for number in range(50, 53)])
    assert job.plan()["missing"] == 1
    second = job.run()
    assert second != first
    ids = [{row["example_id"] for row in table_of(manifest, "targets")} for manifest in (first, second)]
    assert not ids[0] & ids[1]


@pytest.mark.parametrize(
    "change",
    [
        {"projection": {"dim": 8, "seed": 1}},
        {"projection": {"dim": 16}},
        {"layers": ["*.mlp.*"]},
        {"maxLength": 64},
        {"codec": {"kind": "float16"}},
        {"codec": {"kind": "sign", "dims": 256}},
    ],
)
def test_another_extractor_reads_no_old_shard(job: Job, change: dict[str, Any]) -> None:
    job.run()
    job.spec["extraction"] |= change
    words = job.plan()
    assert words["missing"] == words["units"]


def test_batch_size_budget_and_scoring_reuse_every_shard(job: Job) -> None:
    job.run()
    job.spec["extraction"]["tokensPerBatch"] = 100
    job.spec["scoring"] = {"weighting": "uniform", "curvature": {"kind": "none"}}
    job.spec["selection"] = {"drop": "lowest", "budget": {"fraction": 0.3}}
    assert job.plan()["missing"] == 0


def test_factors_needed_later_cost_only_the_units_that_carry_them(job: Job) -> None:
    job.spec["scoring"] = {"curvature": {"kind": "none"}}
    job.run()
    del job.spec["scoring"]
    assert job.plan()["missing"] == len(factor_units(job.planned().candidates))
    assert job.run().exists()


def test_factor_units_depend_only_on_ids_and_are_never_empty() -> None:
    def unit(text: str, num_rows: int = 1024) -> Any:
        from prism_job.plan.plan import Unit

        return Unit(id=digest(text), rows="", num_rows=num_rows, source=0, lines=[(1, num_rows)])

    units = [unit(str(number)) for number in range(400)]
    chosen = factor_units(units)
    assert chosen == factor_units(units[::-1])
    assert 400 / FACTOR_UNIT_SHARE / 2 < len(chosen) < 400 / FACTOR_UNIT_SHARE * 2
    assert all(factor_units([one]) == [one.id] for one in units[:20])
    few = [unit("whole", 64), unit("tail", 1)]
    assert sorted(factor_units(few)) == sorted(one.id for one in few), "curvature does not rest on a single row"


@pytest.mark.parametrize("curvature", ["kfac", "none"])
@pytest.mark.parametrize("codec_kind", ["sign", "float16"])
def test_the_cut_into_units_and_their_order_change_no_score(job: Job, curvature: str, codec_kind: str) -> None:
    job.spec["scoring"] = {"curvature": {"kind": curvature}}
    job.use_codec(codec_kind)
    fine = scores_of(job.run())
    job.spec["extraction"]["examplesPerShard"] = 1000
    whole = scores_of(job.run())
    rows = [candidate(number) for number in range(10)]
    (job.folder / "pool" / "a.jsonl").unlink()
    write_jsonl(job.folder / "pool" / "b.jsonl", rows[6:][::-1])
    write_jsonl(job.folder / "pool" / "c.jsonl", rows[:6])
    other = scores_of(job.run())
    # Another cut makes other micro-batches. A sign within rounding of zero may flip, which moves a score by one dim of
    # 512; a float16 value may round the other way, which is 5e-4 of it.
    largest = max(map(abs, fine.values()))
    for cut in (whole, other):
        assert cut.keys() == fine.keys()
        for key, value in fine.items():
            assert cut[key] == pytest.approx(value, abs=largest * (1 / 512 if codec_kind == "sign" else 5e-4))


def shard_files(job: Job, kind: shards.Kind = "candidates") -> list[Path]:
    return [job.folder / "store" / shards.shard_key(*shard) for shard in job.shards() if shard[1] == kind]


KINDS = ("candidates", "targets", "factors", "sums")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", ["truncated", "header", "renamed", "foreign", "missing", "empty"])
def test_a_damaged_shard_is_refused_by_name(job: Job, damage: str, kind: shards.Kind) -> None:
    write_jsonl(job.folder / "targets.jsonl", [pair(number) for number in range(20)])  # two units of targets
    job.spec["audit"] = {"examples": 10 if kind == "sums" else 0}
    job.plan()
    job.passes("extract")
    victim, other = shard_files(job, kind)[:2]
    content = victim.read_bytes()
    if damage == "truncated":
        victim.write_bytes(content[: len(content) // 2])
    elif damage == "header":
        victim.write_bytes(content.replace(b'"unit":"', b'"unit":"0', 1)[: len(content)])
    elif damage == "renamed":
        victim.write_bytes(other.read_bytes())
    elif damage == "foreign":
        foreign = job.copy(extraction=job.spec["extraction"] | {"projection": {"dim": 8, "seed": 5}})
        foreign.document["metadata"]["name"] = "foreign"
        foreign.run()
        shutil.copy(shard_files(foreign, kind)[0], victim)
    elif damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(b"")
    words = job.refuses("reduce", 65, victim.name)
    assert "again" in words["fix"]
    victim.unlink(missing_ok=True)
    assert job.run().exists(), "what the message advises works"


@pytest.mark.parametrize("kind", KINDS)
def test_every_flipped_bit_is_noticed(job: Job, kind: shards.Kind) -> None:
    job.spec["audit"] = {"examples": 10 if kind == "sums" else 0}
    job.run()
    victim = shard_files(job, kind)[0]
    content = victim.read_bytes()
    generator = np.random.default_rng(0)
    for place in generator.integers(len(content), size=20).tolist():
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(generator.integers(8))
        victim.write_bytes(damaged)
        # Byte by byte the refusal must come from reading, whatever the byte was: length, header, payload.
        again = job.copy(output=str(job.folder / f"out{place}"))
        again.plan()
        again.refuses("reduce", 65, victim.name)


def test_the_manifest_has_a_checksum_of_every_file_beside_it(job: Job) -> None:
    manifest = job.run()
    files = read_json(manifest)["files"]
    beside = {path.name for path in manifest.parent.iterdir()} - {"manifest.json"}
    assert set(files) == beside
    for name, stated in files.items():
        assert hashlib.sha256((manifest.parent / name).read_bytes()).hexdigest() == stated["sha256"]


def test_the_published_spec_replays_the_run(job: Job) -> None:
    manifest = job.run()
    replay = job.copy()
    replay.document = parse_spec((manifest.parent / "spec.yaml").read_text(), "spec.yaml").to_document()
    replay.plan()
    assert replay.stage("reduce")[1] == {**replay.events[-1], "manifest": str(manifest), "unchanged": True}


def test_load_dataset_reads_the_selection(job: Job) -> None:
    import datasets

    manifest = job.run()
    loaded = datasets.load_dataset(
        "parquet", data_files=str(manifest.parent / "selected.parquet"), cache_dir=str(job.folder / "cache")
    )["train"]
    assert len(loaded) == 4
    assert loaded[0]["score"] >= loaded[3]["score"]


def test_an_export_holds_the_selected_rows_whole(job: Job) -> None:
    manifest = job.run()
    lines = sorted(row["line"] for row in table_of(manifest, "selected"))
    wanted = [candidate(line - 1) for line in lines]
    code, words = job.call("export", str(manifest), str(job.folder / "subset.jsonl"))
    assert (code, words["rows"]) == (0, 4)
    assert [json.loads(line) for line in (job.folder / "subset.jsonl").read_text().splitlines()] == wanted
    job.passes("export", str(manifest), str(job.folder / "subset.parquet"))
    assert pq.read_table(job.folder / "subset.parquet").to_pylist() == wanted
    assert job.call("export", str(manifest), str(job.folder / "subset.jsonl"))[0] == 64, "nothing is overwritten"


def test_rows_that_are_not_ranked_need_no_label(job: Job) -> None:
    rows = [candidate(number) for number in range(6)]
    write_jsonl(job.folder / "pool" / "a.jsonl", [*rows, {"messages": rows[0]["messages"]}])
    code, words = job.call("evaluate", str(job.run()))
    assert (code, words["num_examples"]) == (0, 6)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest.json", "{}"),
        ("manifest.json", "not JSON"),
        ("manifest.json", '{"format": "prism-selection/2", "files": {"../../../etc/passwd": {}}}'),
        ("plan.json", "{}"),
        ("scores.parquet", ""),
        ("selected.parquet", "something else"),
        ("report.html", "<html>"),
    ],
)
def test_a_damaged_selection_is_refused_by_name(job: Job, name: str, content: str) -> None:
    manifest = job.run()
    (manifest.parent / name).write_text(content)
    readers = {"evaluate": {"scores.parquet", "plan.json"}}
    for verb in ("evaluate", "export"):
        rest = [str(job.folder / "subset.jsonl")] if verb == "export" else []
        if name == "manifest.json" or name in readers.get(verb, {name}):
            job.refuses((verb, str(manifest), *rest), 65, name)
        else:
            job.passes(verb, str(manifest), *rest)
    job.refuses("reduce", 65)


def test_another_store_is_another_selection_that_exports_from_its_own(job: Job) -> None:
    first = job.run()
    other = job.copy(store=str(job.folder / "store2"))
    second = other.run()
    assert second != first
    assert selected_sha(second) == selected_sha(first)
    shutil.rmtree(job.folder / "store")
    other.passes("export", str(second), str(job.folder / "subset.jsonl"))


def test_an_export_writes_any_row_or_names_the_column_it_cannot_write(job: Job) -> None:
    odd = {"empty": {}, "half": "\ud800", "mixed": "0"}
    path = job.folder / "pool" / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (candidate(1) | odd, candidate(2) | {"mixed": 0})))
    job.spec["selection"]["budget"] = {"count": 2}
    manifest = job.run()
    job.passes("export", str(manifest), str(job.folder / "subset.jsonl"))
    lines = (job.folder / "subset.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [candidate(1) | odd, candidate(2) | {"mixed": 0}]
    for name, value in odd.items():
        path.write_text(json.dumps(candidate(1) | {name: value}) + "\n" + json.dumps(candidate(2) | {name: 0}) + "\n")
        path_of_export = str(job.folder / f"{name}.parquet")
        job.refuses(("export", str(job.run()), path_of_export), 64, f"column '{name}'", path_of_export)


def test_evaluation_names_what_it_misses(job: Job) -> None:
    manifest = job.run()
    job.refuses(("evaluate", str(manifest), "--label", "colour"), 64, "a.jsonl line 1")


def test_any_other_model_file_dtype_adapter_or_attention_reads_no_old_shard(job: Job) -> None:
    job.run()
    folder = job.folder / "other"
    job.spec["model"]["uri"] = str(save_tiny_model(folder))
    assert job.plan()["missing"] == 0, "the same files elsewhere"

    def changed(name: str, old: str, new: str) -> dict[str, str]:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))
        return {}

    def other_weights() -> dict[str, str]:
        shutil.copy(save_tiny_model(job.folder / "seed", seed=1) / "model.safetensors", folder / "model.safetensors")
        return {}

    def template_by_name() -> dict[str, str]:
        by_name = save_tiny_model(job.folder / "by_name")
        (by_name / "additional_chat_templates").mkdir()
        shutil.copy(by_name / "chat_template.jinja", by_name / "additional_chat_templates" / "tool_use.jinja")
        return {"uri": str(by_name)}

    for number, change in enumerate(
        (
            other_weights,
            template_by_name,
            lambda: changed("tokenizer.json", '"add_prefix_space": false', '"add_prefix_space": true'),
            lambda: changed("config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'),
            lambda: changed("chat_template.jinja", "<|im_end|>", "<|im_end|> "),
            lambda: {"dtype": "bfloat16"},
            lambda: {"attention": "eager"},
            lambda: {"adapter": str(save_tiny_adapter(job.folder / "adapter"))},
        )
    ):
        save_tiny_model(folder)
        words = job.copy(model=job.spec["model"] | change()).plan()
        assert words["missing"] == words["units"], number


@pytest.mark.parametrize(
    "name", ["prism_job.store.shards.FORMAT", "prism_job.projection.VERSION", "prism_job.plan.extractor.TEMPLATE_DATE"]
)
def test_another_format_projection_or_date_is_another_extractor(
    job: Job, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = job.plan()
    monkeypatch.setattr(name, "another")
    after = job.plan()
    assert after["extractor"] != before["extractor"]


def test_bfloat16_rows_of_products_in_float32_are_of_another_extractor(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they were once computed; float32 rows kept their numbers, and their extractor."""
    found = {}
    for dtype in ("bfloat16", "float32"):
        job.spec["model"]["dtype"] = dtype
        found[dtype] = job.plan()["extractor"]
    monkeypatch.setattr("prism_job.spec.model.ModelSpec.product_dtype", "float32")
    for dtype in ("bfloat16", "float32"):
        job.spec["model"]["dtype"] = dtype
        assert (job.plan()["extractor"] == found[dtype]) == (dtype == "float32")


def test_no_unit_has_rows_before_the_factors_that_go_with_them(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever extraction is cut off, whoever sees a unit's rows may trust that its factors are there too."""
    job.plan()
    folder = type(job.store())
    plain = folder.put
    left = 0

    def failing(store: Store, key: str, content: bytes) -> None:
        nonlocal left
        if key.endswith(".safetensors"):
            left -= 1
            if left < 0:
                raise TransientError("no more puts", where=key, fix="try again")
        plain(store, key, content)

    with_factors = job.planned().factors
    assert len(with_factors) == 3
    for allowed in range(1, 7):  # shards: one of targets, then factors and rows of three units
        shutil.rmtree(job.folder / "store" / job.planned().extractor, ignore_errors=True)
        left = allowed
        with monkeypatch.context() as patch:
            patch.setattr(folder, "put", failing)
            job.refuses("extract", 75)
        present = shards.units_present(job.store(), job.planned().extractor)
        assert sum(map(len, present.values())) == allowed
        assert present["candidates"] <= present["factors"]


def test_staged_rows_and_shards_under_a_wrong_name_are_refused(job: Job) -> None:
    job.plan()
    plan, store = job.planned(), job.store()
    victim, other = (job.folder / "store" / "rows" / f"{unit.rows}.jsonl.zst" for unit in plan.candidates[:2])
    content = victim.read_bytes()
    shutil.copy(other, victim)
    job.refuses("extract", 65, victim.name, "digest")
    victim.write_bytes(content)
    job.passes("extract")
    unit = plan.candidates[0]
    shard = shards.read_shard(store, plan.extractor, "candidates", unit.id)
    # A header and a checksum in order, over the rows of other examples.
    strange = {**shard.arrays, "ids": shard.arrays["ids"][::-1]}
    shards.write_shard(store, plan.extractor, "candidates", unit.id, strange, shard.notes)
    job.refuses("reduce", 65, unit.id, "row ids")
    # Rows and factors of a device on which other weights are captured.
    factors = shards.read_shard(store, plan.extractor, "factors", plan.factors[0])
    notes = factors.notes | {"layers": "other"}
    shards.write_shard(store, plan.extractor, "candidates", unit.id, shard.arrays, shard.notes)
    shards.write_shard(store, plan.extractor, "factors", factors.unit_id, factors.arrays, notes)
    job.refuses("reduce", 65, factors.unit_id, "of other weights")
    shards.write_shard(store, plan.extractor, "factors", factors.unit_id, factors.arrays, factors.notes)
    notes = shard.notes | {"layers": "other"}
    shards.write_shard(store, plan.extractor, "candidates", unit.id, shard.arrays, notes)
    job.refuses("reduce", 65, unit.id, "of other weights")
    notes.pop("layers")  # as older versions wrote it
    shards.write_shard(store, plan.extractor, "candidates", unit.id, shard.arrays, notes)
    job.passes("reduce")


def test_what_a_run_used_is_stated_and_changes_nothing_else(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    without = read_json(job.run())
    assert "used" not in without, "whoever ran the stages did not count it"
    monkeypatch.setenv("PRISM_GPU_SECONDS", "5400")
    monkeypatch.setenv("PRISM_GPU", "NVIDIA H200")
    assert job.passes("reduce")["unchanged"]
    priced = job.copy(gpuHourPrice=3.5)
    assert priced.passes("reduce")["unchanged"], "the plan is of the same work"
    shutil.rmtree(job.folder / "output")
    manifest = priced.run()
    found = read_json(manifest)
    assert found["used"] == {"gpu_hours": 1.5, "gpu": "NVIDIA H200", "price": 5.25}
    assert "1.5 GPU-hours on NVIDIA H200, price 5.25" in (manifest.parent / "report.html").read_text()
    monkeypatch.setenv("PRISM_GPU_HOUR_PRICE", "7")
    shutil.rmtree(manifest.parent)
    job.passes("reduce")
    assert read_json(manifest)["used"]["price"] == 10.5, "as pods are told it"
    for each in (found, without):
        for name in ("used", "spec", "files"):
            each.pop(name, None)
    assert found == without
    assert priced.passes("extract")["gpuSeconds"] == 0, "on CPUs"
