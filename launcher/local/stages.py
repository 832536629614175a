"""The stages of a run on this machine, one after the other; and single verbs of the job.

Does not know what they compute (prism_job) or how progress is drawn (follow/).
"""

import contextlib
import importlib.util
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from launcher.follow.bars import Display, Steps
from launcher.follow.event_text import audit_share
from launcher.local.process import Facts, NotInstalledError, run_process, stream_events
from launcher.local.signals import Signals, StopError
from prism_job.spec.document import parse_spec
from prism_job.spec.used import used_text, variables_of

JOB = (sys.executable, "-P", "-m", "prism_job")
"""-P: a module in the current folder must not shadow a library's."""

STAGES = ("plan", "extract", "reduce")

JOB_PACKAGES = ("numba", "numpy", "pyarrow", "torch", "transformers")
"""Checked before anything starts: a plan may take minutes, and only extract would miss torch, and only reduce numba."""


def run_stages(text: str, where: str, display: Display, *, job: Sequence[str] = JOB, verbose: bool = False) -> Facts:
    """Plan, extract what the store lacks, reduce. Returns the facts of the run, the manifest's location among them.

    Args:
        text: the document. Every stage reads a copy of it, so that the text checked is the text run.
        where: what errors call the document, usually its path.
        display: shows the progress to a person.
        job: the command to which a stage's name and arguments are added.
        verbose: show the stages' own stderr.

    Raises:
        SpecError: before any process starts.
        NotInstalledError, StageError, StopError: see there.
    """
    started = time.monotonic()
    run = parse_spec(text, where)
    require_packages(job)
    with checked_copy(text, where) as document, Signals() as signals:

        def stage(name: str, variables: Mapping[str, str] | None = None) -> Facts:
            arguments = ["--spec", document]
            return _run(name, arguments, display, signals, job=job, verbose=verbose, variables=variables)

        plan = stage("plan")
        if plan["missing"]:
            extraction = stage("extract")
            num_extracted, share = extraction["units"], audit_share(extraction)
        else:
            num_extracted, share, extraction = 0, 0.0, {}
            display.say(f"0 units extracted: the store holds all {plan['units']}")
        reduced = stage("reduce", variables_of(extraction, run.spec.gpu_hour_price))
        gpu_hours = extraction.get("gpuSeconds", 0) / 3600
        price = run.spec.price_of(gpu_hours)
        if gpu_hours:
            display.say(f"used: {used_text(gpu_hours, extraction.get('gpu'), price)}")
        if reduced.get("audit"):
            display.say(f"audit: {reduced['audit']}")
        for warning in reduced.get("warnings", ()):
            display.say(f"warning: {warning}")
        if reduced["badRows"]:
            display.say(f"unusable rows: {reduced['badRows']:,}; quarantine.jsonl beside the manifest lists them")
        if reduced.get("cutRows"):
            display.say(f"rows cut at extraction.maxLength: {reduced['cutRows']:,}")
    return {
        "manifest": reduced["manifest"],
        "run": run.metadata.name,
        "examples": plan["examples"],
        "pairs": plan["pairs"],
        "units": plan["units"],
        "extracted": num_extracted,
        "auditShare": share,
        "gpuHours": round(gpu_hours, 4),
        **({} if price is None else {"price": price}),
        "selected": reduced["selected"],
        "badRows": reduced["badRows"],
        "cutRows": reduced.get("cutRows", 0),
        "warnings": reduced.get("warnings", []),
        "unchanged": reduced.get("unchanged", False),
        "seconds": round(time.monotonic() - started, 3),
    }


def run_verb(verb: str, arguments: Sequence[str], *, job: Sequence[str] = JOB, verbose: bool = False) -> Facts:
    """Run a verb that shows no progress, only where its slow steps begin. Returns its facts. Raises as run_stages."""
    require_packages(job)
    with Signals() as signals:
        outcome = _run(verb, arguments, Steps(), signals, job=job, verbose=verbose)
    return {key: value for key, value in outcome.items() if key not in ("event", "time", "verb")}


def stream_verb(verb: str, arguments: Sequence[str], *, job: Sequence[str] = JOB) -> Iterator[Facts]:
    """The events of a verb, as it writes them. Raises NotInstalledError, StageError."""
    require_packages(job)
    yield from stream_events([*job, verb, *arguments], verb)


@contextlib.contextmanager
def checked_copy(text: str, where: str) -> Iterator[str]:
    """The path of a copy of the document, so that the text checked is the text a verb reads. Raises SpecError."""
    parse_spec(text, where)
    with tempfile.TemporaryDirectory(prefix="prism-") as folder:
        document = Path(folder) / "selection.yaml"
        document.write_text(text, encoding="utf-8")
        yield str(document)


def require_packages(job: Sequence[str] = JOB) -> None:
    """Raises NotInstalledError if our own job cannot start; imports nothing."""
    for package in JOB_PACKAGES if job is JOB else ():
        if importlib.util.find_spec(package) is None:
            raise NotInstalledError(package)


def _run(
    verb: str,
    arguments: Sequence[str],
    display: Display,
    signals: Signals,
    *,
    job: Sequence[str],
    verbose: bool,
    variables: Mapping[str, str] | None = None,
) -> Facts:
    if not signals.wants_stop():
        display.start(verb)
        outcome = run_process([*job, verb, *arguments], verb, display, signals, verbose=verbose, variables=variables)
    if signals.wants_stop():
        raise StopError(signals.received[0][0], is_stage=verb in STAGES)
    display.finish(verb, outcome)
    return outcome
