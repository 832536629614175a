"""Every error PRISM raises on purpose, in three families with one exit code each (DESIGN, section 6, stage contract).

An error says what is wrong, where, and what to do about it. Anything else that escapes is our own mistake.
"""

from __future__ import annotations


class _Said(BaseException):
    exit_code = 1

    def __init__(self, what: str, *, where: str, fix: str) -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(f"{what}\n  where: {where}\n  to do: {fix}")


class PrismError(_Said, Exception):
    """Base of the three families; never raised itself."""


class RequestError(PrismError):
    """The request is wrong: repeating it fails the same way. Exit code 64."""

    exit_code = 64


class SpecError(RequestError):
    """The document itself does not say a run we can make."""


class DataError(PrismError):
    """Stored data are damaged or are not what they claim to be: stop loudly. Exit code 65."""

    exit_code = 65


class TryAgain(PrismError):
    """The weather is bad (network, disk, service): the same request may pass later. Exit code 75."""

    exit_code = 75


class RankFailed(PrismError):
    """A rank ended badly: its own exit code and words are handed on."""

    def __init__(self, what: str, *, where: str, fix: str, exit_code: int) -> None:
        super().__init__(what, where=where, fix=fix)
        self.exit_code = exit_code


class Stopped(_Said):
    """SIGTERM arrived. Exit code 143, as the shell has it.

    No error of any family: like KeyboardInterrupt it passes through every `except Exception`, so that a stop while a
    library loads a model is not told as a model that cannot be loaded.
    """

    exit_code = 143
