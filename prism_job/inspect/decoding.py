"""Tokens -> the text that each of them adds, and whether it carries loss. Does not tokenise."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from tokenizers.decoders import DecodeStream

if TYPE_CHECKING:
    from prism_job.extract.tokenise import Encoded


def text_facts(encoded: Encoded, tokenizer: Any) -> dict[str, Any]:
    """The text that the model sees: `text`, and for each token its id, its characters [begin, end) and whether it carries loss.

    Decoded from the ids, so it also shows what the tokenizer added, and nothing that was cut.
    """
    pieces = decode_pieces(encoded.ids, tokenizer)
    offsets = pairwise([0, *accumulate(map(len, pieces))])
    return {
        "text": "".join(pieces),
        "tokens": len(encoded.ids),
        "tokens_with_loss": encoded.num_supervised,
        "tokens_cut": encoded.num_cut,
        "ids": encoded.ids,
        "offsets": [list(span) for span in offsets],
        "loss": encoded.supervised,
    }


def decode_pieces(ids: list[int], tokenizer: Any) -> list[str]:
    """The text that each token adds. Of tokens that make one character together, the last adds it."""
    stream = DecodeStream(skip_special_tokens=False)
    pieces = [stream.step(tokenizer.backend_tokenizer, token) or "" for token in ids]
    if pieces and not pieces[-1]:  # half of a character, where the text is cut
        whole = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        pieces[-1] = whole[sum(map(len, pieces)) :]
    return pieces
