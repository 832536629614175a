"""The prompt of a pair without one: what chosen and rejected both begin with (TRL's "implicit prompt").

Does not know the columns of a row.
"""

import os
import re
from typing import Any

from prism_job.data.bad_row import BadRow, line_of
from prism_job.data.messages import read_messages

SIDES = ("chosen", "rejected")


def implicit_prompt(sides: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The prompt and what is left of each side. Raises BadRow: there is no common beginning, or nothing is left."""
    if len(sides) < 2:
        raise BadRow("no 'prompt', and no 'rejected': a prompt within chosen is what both sides begin with")
    chosen, rejected = (sides[name] for name in SIDES)
    if isinstance(chosen, str) and isinstance(rejected, str):
        cut = _text_cut(chosen, rejected)
    else:
        chosen, rejected = (read_messages(sides[name], name) for name in SIDES)
        cut = 0
        while cut < min(len(chosen), len(rejected)) and chosen[cut] == rejected[cut]:
            cut += 1
        if not cut:
            raise BadRow(
                "no 'prompt', and chosen and rejected do not begin with a message in common that could be it; if a column "
                f"holds it, write targets.columns: {line_of(user='QUESTION', chosen='chosen', rejected='rejected')}"
            )
    if cut == len(chosen) == len(rejected):
        raise BadRow("chosen and rejected are identical")
    for name, value, other in (("chosen", chosen, "rejected"), ("rejected", rejected, "chosen")):
        if cut == len(value):
            raise BadRow(
                f"{name} is the beginning of {other}: without a 'prompt' their common beginning is the prompt, and no "
                f"response of {name} is left; add the prompt, or make both end with a response to the same prompt"
            )
    return chosen[:cut], {"chosen": chosen[cut:], "rejected": rejected[cut:]}


_ASSISTANT_BEGINS = re.compile(
    r"(?:^|\n)(?:#+ ?)?Assistant:|(?:^|\n)#+ ?Response:|<\|assistant\|>\n?|<｜Assistant｜>|\[/INST\]"
    r"|<\|im_start\|>assistant\n|<\|start_header_id\|>assistant<\|end_header_id\|>\n\n|<start_of_turn>model\n",
    re.IGNORECASE,
)
"""What stands before a response where a whole conversation is one text: HH-RLHF's, Alpaca's, and those of common templates."""


def _text_cut(chosen: str, rejected: str) -> int:
    """Characters of the prompt: through the last mark of the assistant in the common beginning, or, without one, up to its
    last white space, as in TRL's examples. What the responses share after a mark belongs to both."""
    common = _common_beginning(chosen, rejected)
    if marks := list(_ASSISTANT_BEGINS.finditer(common)):
        return marks[-1].end()
    if len(common) in (len(chosen), len(rejected)):
        return len(common)
    words = re.match(r"(.*\S)\s", common, re.DOTALL)
    if words is None:
        raise BadRow("no 'prompt', and chosen and rejected have no common beginning that could be it")
    return words.end(1)


def _common_beginning(one: str, other: str) -> str:
    return os.path.commonprefix([one, other])  # noqa: RUF071 (character by character is what is meant)


def shares_a_mark(chosen: str, rejected: str) -> bool:
    """Whether the common beginning of two texts shows where the response begins."""
    return _ASSISTANT_BEGINS.search(_common_beginning(chosen, rejected)) is not None
