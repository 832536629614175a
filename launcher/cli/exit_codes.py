"""The exit codes of `prism`. Errors that a verb raises get their code here; how a wait ends, in waiting.py.

| code     | meaning                                                                                          |
|----------|--------------------------------------------------------------------------------------------------|
| 0        | Done; `wait`, `watch`, `submit --wait`: the run is Complete.                                     |
| 1        | The launcher failed: no API server, a request refused, the job's packages not installed.         |
| 2        | Wrong usage of the command line.                                                                 |
| 3        | The document is invalid, or `prism doctor` found an error. Nothing was started.                  |
| 100      | The run failed.                                                                                  |
| 101      | Not finished: --timeout is over, or a cancelled run has not ended yet.                           |
| 102      | No such run, or it was deleted.                                                                  |
| 103      | The run was cancelled.                                                                           |
| 104      | A gate said no: `prism diff` found more churn than --max-churn.                                  |
| 130, 143 | Stopped by Ctrl-C, by SIGTERM (128 + the signal's number).                                       |

The stages in the container have exit codes of their own (64, 65, 75, 143): prism_job/errors.py.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from launcher.cli.options import Output
from launcher.cli.printing import print_facts, print_note

LAUNCHER_ERROR = 1
WRONG_USAGE = 2
PREFLIGHT_FAILED = 3
RUN_FAILED = 100
NOT_FINISHED = 101
NOT_FOUND = 102
CANCELLED = 103
GATE_FAILED = 104

OF_PHASE = {"Complete": 0, "Failed": RUN_FAILED, "Cancelled": CANCELLED}
"""Terminal phase of a run -> exit code."""


def exit_on_error(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb, with every error of its printed as three lines (what, where, hint) before it exits with its code."""

    @functools.wraps(verb)
    def run(**options: Any) -> None:
        from launcher.kube.errors import ClusterError, NotFound
        from launcher.local.process import NotInstalledError, StageError
        from launcher.local.signals import StopError
        from prism_job.errors import SpecError

        output = options.get("output", Output.table)
        if not isinstance(output, Output):  # markdown: errors are for a person
            output = Output.table
        try:
            verb(**options)
        except SpecError as error:
            fail(PREFLIGHT_FAILED, output, error.what, error.where, error.fix, stage="preflight")
        except NotFound as error:
            fail(NOT_FOUND, output, error.what, error.where, error.fix)
        except ClusterError as error:
            fail(LAUNCHER_ERROR, output, error.what, error.where, error.fix)
        except NotInstalledError as error:
            fail(LAUNCHER_ERROR, output, str(error), sys.executable, "pip install 'prism-selection[job]'")
        except StageError as error:
            for line in error.tail:
                print_note(line)
            code = WRONG_USAGE if error.is_about_an_option else RUN_FAILED
            fail(code, output, error.what, error.where, error.fix, stage=error.stage, stage_exit=error.exit_code)
        except StopError as error:
            kept = "; finished units are kept; run the same command again to continue" if error.is_stage else ""
            print_note(f"stopped{kept}")
            sys.exit(128 + error.signal_number)

    return run


def fail(
    code: int, output: Output, what: str, where: str, fix: str, stage: str | None = None, stage_exit: int | None = None
) -> NoReturn:
    """Print the error on stderr, and as data on stdout where data were asked for; exit."""
    print_note(f"error: {what}\n  where: {where}\n  hint: {fix}")
    if output is not Output.table:
        failure = {"error": what, "where": where, "fix": fix, "stage": stage, "stageExitCode": stage_exit}
        print_facts(failure, output, table="")
    sys.exit(code)
