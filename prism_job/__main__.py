"""`python -m prism_job <verb>`: the three stages, and the verbs behind the CLI. Errors become exit codes: the only sys.exit."""

import argparse
import functools
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_job.errors import PrismError, RequestError, Stopped
from prism_job.logs.kept_logs import LOG_VARIABLE, put_log
from prism_job.progress import event, write_termination_message
from prism_job.spec.document import SelectionRun, parse_spec
from prism_job.spec.used import GPU, GPU_HOUR_PRICE, GPU_SECONDS
from prism_job.storage.retries import num_retries

if TYPE_CHECKING:
    from prism_job.inspect.view import View


def _run_verb(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the verb. Returns its outcome. Imports only what the verb needs: a plan must not import torch."""
    match arguments.verb:
        case "plan":
            from prism_job.stages.plan import make_plan

            plan = make_plan(_read_spec(arguments.spec))
            return {
                "units": plan.num_units,
                "missing": plan.num_missing,
                "examples": plan.num_examples,
                "pairs": plan.num_pairs,
                "badRows": len(plan.quarantine),
                "extractor": plan.extractor,
            }
        case "extract":
            from prism_job.extract.distributed.world import Topology
            from prism_job.stages.extract import extract

            topology = Topology(**{name: getattr(arguments, name) for name in TOPOLOGY})
            given = ["--spec", arguments.spec, *(f"--{name}={getattr(arguments, name)}" for name in TOPOLOGY)]
            return extract(_read_spec(arguments.spec), topology, given)
        case "reduce":
            from prism_job.stages.reduce import reduce

            seconds, gpu = os.environ.get(GPU_SECONDS, ""), os.environ.get(GPU) or None
            run, price = _read_spec(arguments.spec), os.environ.get(GPU_HOUR_PRICE)
            if price:  # pods do not find it in their document
                run = run.model_copy(update={"spec": run.spec.model_copy(update={"gpu_hour_price": float(price)})})
            return reduce(run, int(seconds) if seconds.isdecimal() else None, gpu)
        case "evaluate":
            event("step", text=f"reading the rows and the labels of {arguments.manifest}")
            from prism_job.publish.evaluate import evaluate

            return evaluate(arguments.manifest, arguments.label, arguments.positive, arguments.target_label)
        case "export":
            from prism_job.publish.export.export import export
            from prism_job.publish.export.rows import Columns

            columns = Columns(arguments.format, arguments.weight_column, arguments.score_column)
            return export(
                arguments.manifest, arguments.destination, columns, card=arguments.card, public=arguments.public
            )
        case "diff":
            from prism_job.publish.compare.diff import diff

            return diff(arguments.old, arguments.new)
        case "explain":
            event("step", text=f"reading the gradients behind {arguments.manifest}")
            from prism_job.publish import explain

            ends = arguments.top, arguments.bottom
            if arguments.pair is not None:
                return explain.explain_pair(arguments.manifest, arguments.pair, *ends)
            return explain.explain(arguments.manifest, arguments.examples, *ends, arguments.pairs)
        case "estimate":
            from prism_job.plan.sources import refuse_missing

            run = _read_spec(arguments.spec)
            refuse_missing(run.spec, needs_weights=False)  # before torch is imported, which takes seconds
            event("step", text=f"loading the tokenizer of {run.spec.model.uri} and counting tokens")
            from prism_job.estimate.estimate import estimate

            return estimate(run, arguments.gpu, arguments.utilisation, arguments.sample)
        case "inspect":
            from prism_job.inspect.rows import inspect

            return inspect(_view_to_inspect(arguments), arguments.rows, arguments.line, read_all=arguments.all)
        case "logs":
            from prism_job.logs.kept_logs import read_logs
            from prism_job.storage.address import open_store

            wanted = {name: getattr(arguments, name) for name in ("round_key", "pods", "stage", "group", "tail")}
            for log in read_logs(open_store(arguments.output), arguments.run, **wanted):
                event("log", **log)
            return {}
        case _:
            return _inspect_store(arguments)


def _view_to_inspect(arguments: argparse.Namespace) -> "View":
    from prism_job.inspect.view import view_of_document, view_of_files

    if arguments.spec:
        return view_of_document(_read_spec(arguments.spec))
    extraction = {"maxLength": arguments.max_length, "lossOn": arguments.loss_on}
    given = {name: value for name, value in extraction.items() if value is not None}
    return view_of_files(arguments.sources, arguments.targets, arguments.columns, arguments.model, given)


def _inspect_store(arguments: argparse.Namespace) -> dict[str, Any]:
    from prism_job.publish.needed_keys import find_needed
    from prism_job.store import inventory

    if arguments.action == "prune" and not arguments.keep:
        fix = "give --keep OUTPUT for every output whose selections use this store"
        raise RequestError("nothing is kept: all of the store would be removed", where=arguments.store, fix=fix)
    contents = inventory.list_contents(arguments.store)  # before the manifests are read: see `prune`
    needed = find_needed(arguments.keep) if arguments.keep else None
    if arguments.action == "list":
        return inventory.count_rows(contents, needed)
    if arguments.action == "du" or needed is None:
        return inventory.disk_use(contents, needed)
    return inventory.prune(contents, needed, arguments.older_than, really=arguments.yes)


STAGES = ("plan", "extract", "reduce")
VERBS = (*STAGES, "evaluate", "export", "diff", "explain", "estimate", "inspect", "logs", "store")
TOPOLOGY = {
    "ranks": (0, "processes of this node; 0: one per GPU, or one"),
    "nodes": (1, "nodes of this world"),
    "node": (0, "index of this node"),
    "master": ("127.0.0.1:29500", "host:port of node 0, where the ranks of several nodes meet"),
    "groups": (1, "worlds that share only the store"),
    "group": (0, "index of this world"),
}
"""Options of `extract`: name -> default and help. The launcher sets them from spec.cluster."""


def main(arguments: list[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 0 done, 64, 65, 75 by family of error, 143 stopped, 130 Ctrl-C."""
    chosen = _parser().parse_args(arguments)
    if chosen.verb in STAGES and os.environ.get(LOG_VARIABLE) and (exit_code := _run_and_keep_log(chosen)) is not None:
        return exit_code
    signal.signal(signal.SIGTERM, _on_sigterm)
    retries_before = num_retries()
    try:
        outcome = _run_verb(chosen)
    except (PrismError, Stopped) as error:
        failure = {"error": error.what, "where": error.where, "fix": error.fix, "exitCode": error.exit_code}
        write_termination_message({"verb": chosen.verb, **failure, "retries": num_retries() - retries_before})
        return error.exit_code
    except MemoryError:
        fix = "free memory, lower extraction.tokensPerBatch, or look for one huge row; finished units are kept"
        failure = {"error": "out of memory", "where": chosen.verb, "fix": fix, "exitCode": 75}
        write_termination_message({"verb": chosen.verb, **failure})
        return 75
    except KeyboardInterrupt:
        event("interrupted", verb=chosen.verb)
        return 130
    if chosen.verb in STAGES:  # a spawner's outcome already counts the retries of its ranks
        outcome["retries"] = outcome.get("retries", 0) + num_retries() - retries_before
    write_termination_message({"verb": chosen.verb, **outcome})
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m prism_job", description=__doc__)
    subparsers = parser.add_subparsers(dest="verb", required=True)
    verbs = {name: subparsers.add_parser(name) for name in VERBS}
    for name in (*STAGES, "estimate"):
        verbs[name].add_argument("--spec", required=True, help="path of selection.yaml")
    for name in ("evaluate", "export", "explain"):
        verbs[name].add_argument("manifest", help="address of a manifest.json")
    verbs["explain"].add_argument("examples", nargs="*", help="candidates: ids, beginnings of ids, or FILE:LINE")
    verbs["explain"].add_argument("--top", type=int, default=0, help="also those of the highest scores")
    verbs["explain"].add_argument("--bottom", type=int, default=0, help="also those of the lowest scores")
    verbs["explain"].add_argument("--pairs", type=int, default=3, help="pairs listed for each example; 0: all")
    verbs["explain"].add_argument("--pair", type=int, help="the examples that this target pair raises and lowers most")
    for name in ("old", "new"):
        verbs["diff"].add_argument(name, help="address of a manifest.json")
    for name, (default, text) in TOPOLOGY.items():
        verbs["extract"].add_argument(f"--{name}", type=type(default), default=default, help=text)
    evaluate, estimate, inspect, store = (verbs[name] for name in ("evaluate", "estimate", "inspect", "store"))
    evaluate.add_argument(
        "--label", help="column that marks candidates good or bad (default: the run's spec.evaluation)"
    )
    evaluate.add_argument("--positive", help="its value that means good")
    evaluate.add_argument("--target-label", help="column of the targets that marks pairs right or wrong")
    export = verbs["export"]
    export.add_argument("destination", help="path, s3:// or hf://datasets/ address of the file to write")
    export.add_argument("--format", choices=("trl", "sharegpt", "alpaca"), help="default: the candidates' own rows")
    export.add_argument("--weight-column", help="column to add: a training weight in (0, 1] from the rank")
    export.add_argument("--score-column", help="column to add: the score")
    export.add_argument("--card", action=argparse.BooleanOptionalAction, help="README.md and croissant.json beside it")
    export.add_argument(
        "--public", action="store_true", help="a data set that is created on the hub can be read by all"
    )
    estimate.add_argument("--gpu", default="H100", help="type of GPU")
    estimate.add_argument("--utilisation", type=float, default=0.35, help="share of its peak FLOP/s that is reached")
    estimate.add_argument("--sample", type=int, default=1, help="tokenise one row in this many")
    inspect.add_argument("--spec", help="path of selection.yaml, instead of sources and options")
    inspect.add_argument("sources", nargs="*", help="data files, folders or s3:// addresses")
    inspect.add_argument("--targets", action="store_true", help="read the rows as targets")
    inspect.add_argument("--columns", help="YAML of columns: which column holds which part of an example")
    inspect.add_argument(
        "--model", help="hub id, folder, s3:// address or .gguf file of the model whose tokens are shown"
    )
    inspect.add_argument("--max-length", type=int, help="tokens at which longer texts are cut")
    inspect.add_argument("--loss-on", help="assistant or last")
    inspect.add_argument("--rows", type=int, default=3, help="rows shown of each source")
    inspect.add_argument("--line", type=int, help="line of the first row that is shown")
    inspect.add_argument("--all", action="store_true", help="read all rows, to count layouts and unusable rows")
    logs = verbs["logs"]
    logs.add_argument("output", help="spec.output of the run")
    logs.add_argument("run", help="its name")
    logs.add_argument("--round", dest="round_key", default="", help="UID/ROUND; default: that of the newest log")
    logs.add_argument(
        "--pod", dest="pods", action="append", default=[], help="prefix of a pod wanted; repeatable; default: all"
    )
    logs.add_argument("--stage", choices=STAGES, help="only this stage")
    logs.add_argument("--group", type=int, help="only this group")
    logs.add_argument("--tail", type=int, help="only so many last lines of each log")
    store.add_argument("action", choices=("list", "du", "prune"))
    store.add_argument("store", help="path or s3:// address of the store")
    store.add_argument("--keep", action="append", default=[], help="output whose selections are kept; repeatable")
    store.add_argument("--older-than", type=float, default=24.0, help="hours; younger objects are never removed")
    store.add_argument("--yes", action="store_true", help="remove; without it, only list what would be removed")
    return parser


def _run_and_keep_log(arguments: argparse.Namespace) -> int | None:
    """The same command as a child process whose log is kept. None: the document, which names the bucket, cannot be read."""
    from prism_job.logs.keeper import run_and_keep

    environment = dict(os.environ)
    key = environment.pop(LOG_VARIABLE)
    try:
        run = _read_spec(arguments.spec)
    except PrismError:
        return None
    put = functools.partial(put_log, run.spec.output, run.metadata.name, key)
    return run_and_keep([sys.executable, *sys.orig_argv[1:]], environment, put)


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
