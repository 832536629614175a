"""Notes on the columns of an export: types that changed, columns left out. Does not know rows."""

MAX_NAMES = 8
"""Column names that a note lists: the termination message holds 4,096 bytes."""


class Notes:
    """Notes in the order in which they first came up, each with the names it holds for."""

    def __init__(self) -> None:
        self._names: dict[str, dict[str, None]] = {}

    def add(self, text: str, *names: str) -> None:
        if names:
            self._names.setdefault(text, {}).update(dict.fromkeys(names))

    def lines(self) -> list[str]:
        """Each note and its names, in a line."""
        return [f"{text}: {shown_names(list(names))}" for text, names in self._names.items()]


def shown_names(names: list[str]) -> str:
    """The names, or the first few and the number of the others."""
    shown = ", ".join(name[:40] for name in names[:MAX_NAMES])
    return shown + (f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else "")
