"""PRISM in Python, for notebooks and training scripts: `select` makes a selection, `Selection` reads one.

Each call that computes is a verb of the job in a process of its own, as the command `prism` starts it: the same results, and
the memory of a model is free afterwards. Importing this module imports neither torch nor transformers.
"""

import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from prism_job.errors import DataError, PrismError, RequestError, TransientError
from prism_job.spec.document import parse_spec
from prism_job.spec.used import variables_of

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

    from prism_job.publish.manifest import Manifest
    from prism_job.publish.published import Published

__all__ = ["DataError", "PrismError", "RequestError", "Selection", "TransientError", "select"]

FAMILIES = {family.exit_code: family for family in (RequestError, DataError, TransientError)}


class Selection:
    """A published selection. Files are read when they are asked for, and checked against the manifest."""

    def __init__(self, published: "Published") -> None:
        self._published = published

    @classmethod
    def load(cls, uri: str | Path) -> "Selection":
        """The selection of this manifest.json, a path or an s3:// address. Raises RequestError, DataError: none, or damaged."""
        from prism_job.publish.published import load

        return cls(load(str(uri)))

    def __repr__(self) -> str:
        counts = self.manifest.counts
        return f"<Selection of {counts.selected:,} of {counts.candidates - counts.quarantined:,} usable examples: {self.uri}>"

    @property
    def uri(self) -> str:
        """Address of manifest.json."""
        return self._published.uri

    @property
    def manifest(self) -> "Manifest":
        return self._published.manifest

    def examples(self, format: str | None = None) -> "datasets.Dataset":
        """The selected rows in the candidates' order, in memory.

        Args:
            format: None: all columns, as they were. "trl", "sharegpt", "alpaca": the training content, as exports have it.

        Raises:
            RequestError: a column holds values of several types, or the format cannot hold a row.
        """
        import datasets
        import pyarrow.parquet as pq

        with tempfile.TemporaryDirectory(prefix="prism-") as folder:
            path = str(Path(folder) / "rows.parquet")
            _call("export", [*(["--format", format] if format else []), "--", self.uri, path])
            return datasets.Dataset(pq.read_table(path))

    def scores(self) -> "pa.Table":
        """scores.parquet: a row for each candidate, with id, source, line, score and `selected` (docs/architecture.md)."""
        return self._published.table("scores.parquet")

    def explain(self, example: str, pairs: int = 3) -> dict[str, Any]:
        """The target pairs that this example's score comes from, the largest contributions first (0: all); they and `others`
        add up to the score. The facts of `prism explain -o json`.

        Args:
            example: its id, the beginning of it, or FILE:LINE.
        """
        return _call("explain", ["--pairs", str(pairs), "--", self.uri, example])

    def report(self) -> str:
        """The report, a page of HTML without outside references and scripts. Show it in a frame of its own (docs/python.md)."""
        return self._published.read("report.html").decode()


def select(document: str | Path | Mapping[str, Any]) -> Selection:
    """Plan, extract what the store lacks, reduce. What `prism run` does; a selection that is there already is returned.

    Args:
        document: path of a selection.yaml, or the document itself (docs/selection.md). Progress goes to stderr.

    Raises:
        SpecError, RequestError, DataError, TransientError: as the stages raise them. What a run warns of is a UserWarning.
        RuntimeError: a stage ended without an outcome, for example killed for memory.
    """
    is_path = isinstance(document, str | Path)
    where = str(document) if is_path else "document"
    try:
        text = Path(where).read_text(encoding="utf-8") if is_path else yaml.safe_dump(_plain(document), sort_keys=False)
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot be read: {error}", where=where, fix="give the path of a selection.yaml") from error
    price = parse_spec(text, where).spec.gpu_hour_price
    with tempfile.TemporaryDirectory(prefix="prism-") as folder:
        path = Path(folder) / "selection.yaml"
        path.write_text(text, encoding="utf-8")
        arguments = ["--spec", str(path)]
        _call("plan", arguments)
        outcome = _call("reduce", arguments, variables_of(_call("extract", arguments), price))
    for warning in outcome.get("warnings", ()):
        warnings.warn(warning, stacklevel=2)
    if outcome["badRows"]:
        listed = "quarantine.jsonl beside the manifest lists them"
        warnings.warn(f"unusable rows: {outcome['badRows']:,}; {listed}", stacklevel=2)
    return Selection.load(outcome["manifest"])


def _plain(document: Any) -> Any:
    return json.loads(json.dumps(document, default=str))


def _call(verb: str, arguments: list[str], variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run one verb of the job. Returns its outcome; raises the error that it reports."""
    outcome: dict[str, Any] = {}
    with tempfile.TemporaryFile() as stderr:
        # -P: a module in the current folder must not shadow a library's.
        command = [sys.executable, "-P", "-m", "prism_job", verb, *arguments]
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": stderr}
        pipes["env"] = {**os.environ, **(variables or {})}
        with subprocess.Popen(command, **pipes, encoding="utf-8", errors="replace") as process:
            try:
                for line in process.stdout or ():
                    if line.startswith('{"event": '):  # libraries print on stdout too
                        outcome = json.loads(line)
                        _show_progress(outcome)
            except BaseException:  # Ctrl-C: the stage stops after its micro-batch, and keeps its finished units
                process.terminate()
                raise
        if outcome.get("event") == "done" and process.returncode == 0:
            return outcome
        if outcome.get("event") == "failed" and outcome["exitCode"] in FAMILIES:
            family = FAMILIES[outcome["exitCode"]]
            raise family(outcome["error"], where=outcome["where"], fix=outcome["fix"])
        stderr.seek(0)
        ending = stderr.read().decode(errors="replace")[-2000:]
    raise RuntimeError(f"{verb} ended with exit code {process.returncode} and no outcome\n{ending}")


def _show_progress(event: dict[str, Any]) -> None:
    if event["event"] == "progress":
        end = "\n" if event["done"] == event["total"] else ""
        print(f"\r{event['stage']}: {event['done']} of {event['total']}", end=end, file=sys.stderr, flush=True)
