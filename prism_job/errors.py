"""The errors that PRISM raises on purpose, each with its exit code (docs/architecture.md, Contracts).

Every error states what is wrong, where, and a fix. Any other exception that escapes is a bug of PRISM.
"""

import re


def one_line(error: Exception) -> str:
    """Its text without the queries of addresses: the hub signs those of its files, and who has one may use the file."""
    return re.sub(r"\s+", " ", re.sub(r"(https?://[^\s?]*)\?\S*", r"\1", str(error) or repr(error))).strip()[:300]


class _ErrorWithFix(BaseException):
    exit_code = 1

    def __init__(self, what: str, *, where: str, fix: str) -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(f"{what}\n  where: {where}\n  hint: {fix}")


class PrismError(_ErrorWithFix, Exception):
    """Base of the three error classes; never raised itself."""


class RequestError(PrismError):
    """The request is wrong; repeating it fails the same way. Exit code 64."""

    exit_code = 64


class SpecError(RequestError):
    """The selection document is invalid."""


class DataError(PrismError):
    """Stored data are damaged, or not what they claim to be. Exit code 65."""

    exit_code = 65


class TransientError(PrismError):
    """Network, disk or service failed; the same request may succeed later. Exit code 75."""

    exit_code = 75


class RankFailed(PrismError):
    """A rank failed; carries the rank's own exit code and error."""

    def __init__(self, what: str, *, where: str, fix: str, exit_code: int) -> None:
        super().__init__(what, where=where, fix=fix)
        self.exit_code = exit_code


class Stopped(_ErrorWithFix):
    """SIGTERM arrived; finished units are kept. Exit code 143, as in a shell.

    Derives from BaseException, like KeyboardInterrupt: `except Exception` in a library that is loading a model must not
    turn a stop into "this model cannot be loaded".
    """

    exit_code = 143
