"""Training content -> token ids and the positions that carry loss; micro-batches of them. Does not know models or gradients.

Shapes: B examples of a batch, T tokens of the longest.
"""

from dataclasses import dataclass
from datetime import date
from typing import Any, cast

import torch
from jinja2 import TemplateNotFound, TemplateSyntaxError
from jinja2.exceptions import SecurityError
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from prism_job.data.examples import BadRow, Content
from prism_job.errors import RequestError
from prism_job.plan.extractor import TEMPLATE_DATE
from prism_job.spec.extraction import LossOn

MAX_EXAMPLES_PER_BATCH = 256
"""Bounds a batch of very short examples: its unfolded rows would outgrow its activations."""


@dataclass(frozen=True)
class Encoded:
    """One tokenised text: for each token its id, and whether it carries loss. The first never does: nothing predicts it."""

    ids: list[int]
    supervised: list[bool]
    num_cut: int = 0  # tokens beyond max_length, which are left out

    @property
    def num_supervised(self) -> int:
        return sum(self.supervised)


def encode_candidate(
    content: Content, tokenizer: PreTrainedTokenizerBase, max_length: int, loss_on: LossOn = "assistant"
) -> Encoded:
    """Tokenise a candidate; loss falls on assistant turns, on the completion, or on the whole text.

    Raises:
        BadRow: no supervised token within max_length, or a template that does not show where the response stands.
        RequestError: messages, and a tokenizer without a chat template, or with one that does not work.
    """
    if "messages" in content:
        return _encode_chat(content["messages"], 0, content.get("tools"), tokenizer, max_length, loss_on)
    if "text" in content:
        return _encode_text("", content["text"], tokenizer, max_length)
    return _encode_response(content, "completion", tokenizer, max_length, loss_on)


SIDES = ("chosen", "rejected")


def encode_target(
    content: Content, tokenizer: PreTrainedTokenizerBase, max_length: int, loss_on: LossOn = "assistant"
) -> dict[str, Encoded]:
    """Tokenise the sides of a target, chosen and, where there is one, rejected.

    Raises:
        BadRow: as for a candidate, naming the side; or both sides become the same tokens.
        RequestError: as for a candidate.
    """
    encoded: dict[str, Encoded] = {}
    for side in SIDES:
        if side in content:
            try:
                encoded[side] = _encode_response(content, side, tokenizer, max_length, loss_on)
            except BadRow as error:
                raise BadRow(f"its {side} response: {error}") from error
    return encoded


def _encode_response(
    content: Content, name: str, tokenizer: PreTrainedTokenizerBase, max_length: int, loss_on: LossOn
) -> Encoded:
    """The prompt, and the response that carries the loss: both strings, or both message lists."""
    prompt, response = content["prompt"], content[name]
    if isinstance(prompt, str):
        return _encode_text(prompt, response, tokenizer, max_length)
    return _encode_chat([*prompt, *response], len(prompt), content.get("tools"), tokenizer, max_length, loss_on)


def _encode_text(prompt: str, response: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    # As in TRL: plain text takes no template; the tokenizer adds its own special tokens; EOS ends the response.
    # Prompt and response are tokenised as one text, so the token where they meet is the one the model would see.
    encoding = tokenizer(prompt + response, return_offsets_mapping=True)
    ids = list(encoding["input_ids"])
    spans = _spans(encoding["offset_mapping"])
    supervised = [end > len(prompt) for _, end in spans]
    if tokenizer.eos_token_id is not None:
        if ids and ids[-1] == tokenizer.eos_token_id:
            supervised[-1] = True
        else:
            ids.append(tokenizer.eos_token_id)
            supervised.append(True)
    return _cut(ids, supervised, max_length)


def _encode_chat(
    messages: list[dict[str, Any]],
    first: int,
    tools: Any,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    loss_on: LossOn,
) -> Encoded:
    """Render once with the chat template, tokenise once; loss on assistant turns from message `first` on."""
    if not tokenizer.chat_template:
        raise RequestError(
            "the data are messages, and this tokenizer has no chat template",
            where=str(tokenizer.name_or_path),
            fix="put chat_template.jinja beside the model, take an instruct model, or use prompt/completion strings",
        )

    try:
        template = tokenizer.get_chat_template(tools=tools)
    except ValueError as error:  # several templates, and none of them is the default
        fix = "name one of them default (chat_template.jinja), or use prompt/completion strings"
        raise RequestError(f"no default chat template: {error}", where=str(tokenizer.name_or_path), fix=fix) from error

    def render(part: list[dict[str, Any]], **flags: bool) -> str:
        try:
            _fix_date(template)
            return cast(str, tokenizer.apply_chat_template(part, tools=tools, tokenize=False, **flags))
        except (TemplateSyntaxError, TemplateNotFound, SecurityError) as error:  # not the fault of this row
            fix = "correct the template (chat_template.jinja, or in tokenizer_config.json)"
            what = f"the chat template does not work: {error}"
            raise RequestError(what, where=str(tokenizer.name_or_path), fix=fix) from error
        except Exception as error:  # a template is a program: whatever else it raises is about this row
            raise BadRow(f"the chat template refuses these messages: {error}") from error

    whole = render(messages)
    turns = []
    for position, message in enumerate(messages):
        if position < first or message["role"] != "assistant":
            continue
        before = render(messages[:position], add_generation_prompt=True)
        through = render(messages[: position + 1])
        if not (whole.startswith(through) and through.startswith(before)):
            raise BadRow(
                f"the chat template renders turn {position + 1} differently once more turns follow; "
                "split the conversation so that each row ends with the response to learn"
            )
        turns.append((len(before), len(through)))
    encoding = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    supervised = [
        any(begin < stop and end > start for start, stop in turns) for begin, end in _spans(encoding["offset_mapping"])
    ]
    return _cut(list(encoding["input_ids"]), supervised, max_length)


def _fix_date(template: str) -> None:
    # A row must not depend on the day. transformers passes no function to a template, so the clock is replaced in the
    # compiled template that it caches; test_tokenise checks that this still works.
    _compile_jinja_template(template).globals["strftime_now"] = date.fromisoformat(TEMPLATE_DATE).strftime


def _spans(offsets: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The characters [begin, end) that each token stands for.

    Tokenizers that trim white space from their offsets give a token of white space alone an empty span at its end: it
    stands for what lies between the token before and itself.
    """
    ends = [0, *(end for _, end in offsets)]
    return [(min(begin, before), end) for before, (begin, end) in zip(ends[:-1], offsets, strict=True)]


def _cut(ids: list[int], supervised: list[bool], max_length: int) -> Encoded:
    kept = [False, *supervised[1:max_length]]
    if not any(kept):
        length = next((index for index, loss in enumerate(supervised) if loss and index), len(ids))
        raise BadRow(
            f"no response token within maxLength {max_length}: the response begins at token {length + 1}"
            if length >= max_length
            else "no response token: nothing follows the first token"
        )
    return Encoded(ids[:max_length], kept, max(0, len(ids) - max_length))


def micro_batches(lengths: list[int], tokens_per_batch: int) -> list[list[int]]:
    """Positions of the examples of each micro-batch: similar lengths together, longest first, ties in order.

    Padding counts: a batch holds at most tokens_per_batch // longest examples, and at least one.
    """
    order = sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
    batches: list[list[int]] = []
    start = 0
    while start < len(order):
        room = max(1, min(tokens_per_batch // lengths[order[start]], MAX_EXAMPLES_PER_BATCH))
        batches.append(order[start : start + room])
        start += room
    return batches


@dataclass(frozen=True)
class Batch:
    """One micro-batch, padded on the right, [B, T] each. `supervised` marks tokens that carry loss, `real` all but padding."""

    ids_BT: Tensor
    real_BT: Tensor
    supervised_BT: Tensor

    @property
    def size(self) -> int:
        return self.ids_BT.shape[0]


def collate(encoded: list[Encoded], device: torch.device) -> Batch:
    """Pad to the longest."""
    shape = (len(encoded), max(len(example.ids) for example in encoded))
    ids = torch.zeros(shape, dtype=torch.long)
    real, supervised = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    for row, example in enumerate(encoded):
        length = len(example.ids)
        ids[row, :length] = torch.tensor(example.ids)
        real[row, :length] = True
        supervised[row, :length] = torch.tensor(example.supervised)
    return Batch(ids.to(device), real.to(device), supervised.to(device))
