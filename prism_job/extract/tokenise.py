"""Training content -> token ids and the positions that carry loss; micro-batches of them. Does not know models or gradients.

Shapes: B examples of a batch, T tokens of the longest.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prism_job.data.examples import BadRow, Content, Message
from prism_job.extract import chat
from prism_job.spec.extraction import LossOn
from prism_job.spec.ranking import ScoringSpec

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
        return _encode_chat(content["messages"], 0, content, tokenizer, max_length, loss_on)
    if "text" in content:
        return _encode_text("", content["text"], tokenizer, max_length)
    return _encode_response(content, "completion", tokenizer, max_length, loss_on)


SIDES = ("chosen", "rejected")


def sides_of(scoring: ScoringSpec) -> tuple[str, ...]:
    """The sides of a target that pass through the model. Candidates are compared with hidden states of chosen responses."""
    return SIDES[:1] if scoring.is_forward_only else SIDES


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
    if len(encoded) == len(SIDES):
        _refuse_same_tokens(encoded, max_length)
    return encoded


def _refuse_same_tokens(encoded: dict[str, Encoded], max_length: int) -> None:
    # Their difference would be zero, or that of two contexts: no preference between responses.
    chosen, rejected = (
        [token for token, loss in zip(each.ids, each.supervised, strict=True) if loss] for each in encoded.values()
    )
    if chosen != rejected:
        return
    if any(each.num_cut for each in encoded.values()):
        raise BadRow(f"chosen and rejected are identical up to maxLength {max_length}: they differ only beyond it")
    raise BadRow(
        f"chosen and rejected become the same {len(chosen)} response tokens: they differ only in what carries no loss, "
        "or in what the chat template or the tokenizer leaves out"
    )


def _encode_response(
    content: Content, name: str, tokenizer: PreTrainedTokenizerBase, max_length: int, loss_on: LossOn
) -> Encoded:
    """The prompt, and the response that carries the loss: both strings, or both message lists."""
    prompt, response = content["prompt"], content[name]
    if isinstance(prompt, str):
        return _encode_text(prompt, response, tokenizer, max_length)
    return _encode_chat([*prompt, *response], len(prompt), content, tokenizer, max_length, loss_on)


def _encode_text(prompt: str, response: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    # As in TRL: plain text takes no template; the tokenizer adds its own special tokens; EOS ends the response.
    # Prompt and response are tokenised as one text, so the token where they meet is the one the model would see.
    text, bos, eos = prompt + response, tokenizer.bos_token_id, tokenizer.eos_token_id
    encoding = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    ids, is_added = list(encoding["input_ids"]), encoding["special_tokens_mask"]
    supervised = [end > len(prompt) for _, end in _spans(encoding["offset_mapping"])]
    # A text may bring its own BOS and EOS, as a rendered conversation does: the tokenizer must not add a second one.
    if ids[:2] == [bos, bos] and is_added[0]:
        ids, supervised = ids[1:], supervised[1:]
    if ids[-2:] == [eos, eos] and is_added[-1]:
        ids, supervised = ids[:-1], supervised[:-1]
    if eos is not None:
        if ids and ids[-1] == eos:
            supervised[-1] = True
        elif not text.rstrip().endswith(str(tokenizer.eos_token)):
            ids.append(eos)
            supervised.append(True)
    return _cut(ids, supervised, max_length)


def _encode_chat(
    messages: list[Message],
    first: int,
    content: Content,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    loss_on: LossOn,
) -> Encoded:
    """Render with the chat template, tokenise once; loss on assistant turns from message `first` on."""
    text, spans = chat.render(messages, first, content, tokenizer, loss_on)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    supervised = [
        any(begin < stop and end > start for start, stop in spans) for begin, end in _spans(encoding["offset_mapping"])
    ]
    return _cut(list(encoding["input_ids"]), supervised, max_length)


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
