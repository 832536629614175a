"""The stages and the verbs behind the CLI: `python -m prism_job <verb>`.

Errors become exit codes here; the only sys.exit.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prism_job.errors import PrismError, RequestError, Stopped
from prism_job.progress import event, write_termination_message
from prism_job.spec.document import SelectionRun, parse_spec
from prism_job.storage.retries import num_retries


def _plan(run: SelectionRun, _: argparse.Namespace) -> dict[str, Any]:
    from prism_job.stages.plan import make_plan

    plan = make_plan(run)
    return {
        "units": plan.num_units,
        "missing": plan.num_missing,
        "examples": plan.num_examples,
        "pairs": plan.num_pairs,
        "badRows": len(plan.quarantine),
        "extractor": plan.extractor,
    }


def _extract(run: SelectionRun, arguments: argparse.Namespace) -> dict[str, Any]:
    from prism_job.extract.distributed.world import Topology
    from prism_job.stages.extract import extract

    topology = Topology(**{name: getattr(arguments, name) for name in TOPOLOGY})
    given = ["--spec", arguments.spec, *(f"--{name}={getattr(arguments, name)}" for name in TOPOLOGY)]
    return extract(run, topology, given)


def _reduce(run: SelectionRun, _: argparse.Namespace) -> dict[str, Any]:
    from prism_job.stages.reduce import reduce

    return reduce(run)


def _evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    from prism_job.publish.evaluate import evaluate

    return evaluate(arguments.manifest, arguments.label, arguments.positive, arguments.target_label)


def _export(arguments: argparse.Namespace) -> dict[str, Any]:
    from prism_job.publish.export import export

    return export(arguments.manifest, arguments.destination)


def _estimate(arguments: argparse.Namespace) -> dict[str, Any]:
    from prism_job.estimate.estimate import estimate

    return estimate(_read_spec(arguments.spec), arguments.gpu, arguments.utilisation, arguments.sample)


def _store(arguments: argparse.Namespace) -> dict[str, Any]:
    from prism_job.publish.needed_keys import find_needed
    from prism_job.store import inventory

    if arguments.action == "prune" and not arguments.keep:
        fix = "give --keep OUTPUT for every output whose selections use this store"
        raise RequestError("nothing is kept: all of the store would be removed", where=arguments.store, fix=fix)
    contents = inventory.list_contents(arguments.store)  # before the manifests are read: see `prune`
    needed = find_needed(arguments.keep) if arguments.keep else None
    if arguments.action == "list":
        return inventory.count_rows(contents, needed)
    if needed is None or arguments.action == "du":
        return inventory.disk_use(contents, needed)
    return inventory.prune(contents, needed, arguments.older_than, really=arguments.yes)


STAGES: dict[str, Callable[[SelectionRun, argparse.Namespace], dict[str, Any]]] = {
    "plan": _plan,
    "extract": _extract,
    "reduce": _reduce,
}
TOPOLOGY = {
    "ranks": (0, "processes of this node; 0: one a GPU, or one"),
    "nodes": (1, "nodes of this world"),
    "node": (0, "which of them this is"),
    "master": ("127.0.0.1:29500", "host:port of node 0, where the ranks of several nodes meet"),
    "groups": (1, "worlds that share the store and nothing else"),
    "group": (0, "which of them this is"),
}
"""Options of `extract`: name -> default and help. The launcher sets them from spec.cluster."""
VERBS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "evaluate": _evaluate,
    "export": _export,
    "estimate": _estimate,
    "store": _store,
}
OF_A_MANIFEST = ("evaluate", "export")


def main(arguments: list[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 0 done, 64, 65, 75 by family of error, 143 stopped, 130 Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m prism_job", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name in STAGES:
        verbs.add_parser(name).add_argument("--spec", required=True, help="path of selection.yaml")
    for name in OF_A_MANIFEST:
        verbs.add_parser(name).add_argument("manifest", help="address of a manifest.json")
    for name, (default, text) in TOPOLOGY.items():
        verbs.choices["extract"].add_argument(f"--{name}", type=type(default), default=default, help=text)
    verbs.choices["evaluate"].add_argument(
        "--label", help="column that says good or bad; else as the run's document says"
    )
    verbs.choices["evaluate"].add_argument("--positive", help="its value that means good")
    verbs.choices["evaluate"].add_argument(
        "--target-label", help="column of the targets that says which pairs are right"
    )
    verbs.choices["export"].add_argument("destination", help="path or s3:// address of the file to write")
    estimating = verbs.add_parser("estimate")
    estimating.add_argument("--spec", required=True, help="path of selection.yaml")
    estimating.add_argument("--gpu", default="H100", help="type of card")
    estimating.add_argument("--utilisation", type=float, default=0.35, help="share of its peak that is reached")
    estimating.add_argument("--sample", type=int, default=1, help="tokenise one row in so many")
    storing = verbs.add_parser("store")
    storing.add_argument("action", choices=("list", "du", "prune"))
    storing.add_argument("store", help="path or s3:// address of the store")
    storing.add_argument("--keep", action="append", default=[], help="output whose manifests are kept; repeatable")
    storing.add_argument("--older-than", type=float, default=24.0, help="hours; younger objects are never removed")
    storing.add_argument("--yes", action="store_true", help="remove; else only say what would be removed")
    chosen = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _on_sigterm)
    before = num_retries()
    try:
        if chosen.verb in STAGES:
            words = STAGES[chosen.verb](_read_spec(chosen.spec), chosen)
            words["retries"] = words.get("retries", 0) + num_retries() - before  # a spawner's words hold its ranks'
        else:
            words = VERBS[chosen.verb](chosen)
    except (PrismError, Stopped) as error:
        words = {"error": error.what, "where": error.where, "fix": error.fix, "exitCode": error.exit_code}
        write_termination_message({"verb": chosen.verb, **words, "retries": num_retries() - before})
        return error.exit_code
    except MemoryError:
        fix = "free memory, lower extraction.tokensPerBatch, or look for one huge row; finished units are kept"
        write_termination_message(
            {"verb": chosen.verb, "error": "out of memory", "where": chosen.verb, "fix": fix, "exitCode": 75}
        )
        return 75
    except KeyboardInterrupt:
        event("interrupted", verb=chosen.verb)
        return 130
    write_termination_message({"verb": chosen.verb, **words})
    return 0


def _on_sigterm(*_: object) -> None:
    raise Stopped("stopped by SIGTERM", where="outside a micro-batch", fix="run again: finished units are kept")


def _read_spec(path: str) -> SelectionRun:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"the document cannot be read: {error}", where=path, fix="check the path") from error
    return parse_spec(text, path)


if __name__ == "__main__":
    sys.exit(main())
