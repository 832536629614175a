"""Which tokens a row becomes, and which of them carry loss: text by text, read off the decoded tokens.

Every case is written down by hand; nothing here calls the code it tests for what it expects.
"""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from prism_job.data.examples import BadRow
from prism_job.errors import RequestError
from prism_job.extract.tokenise import Encoded, encode_candidate, encode_target
from tests.conftest import turn
from tests.models import CHAT_TEMPLATE, build_tokenizer

BOS = "<|endoftext|>"


def with_bos(chat_template: str | None = "{{ bos_token }}" + CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Puts BOS before any text, as Llama's does; so does its template, as Llama's does too."""
    tokenizer = build_tokenizer(chat_template=False)
    tokenizer.bos_token = BOS
    tokenizer.backend_tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.bos_token_id)]),
        ]
    )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def trimming() -> PreTrainedTokenizerFast:
    """Leaves white space out of its offsets, as GPT-2's and many others do."""
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def read(encoded: Encoded, tokenizer: PreTrainedTokenizerFast) -> str:
    """The text of the tokens, with [ ] around each run that carries loss."""
    runs: list[tuple[bool, list[int]]] = []
    for token, loss in zip(encoded.ids, encoded.supervised, strict=True):
        if not runs or runs[-1][0] != loss:
            runs.append((loss, []))
        runs[-1][1].append(token)
    return "".join(f"[{tokenizer.decode(ids)}]" if loss else tokenizer.decode(ids) for loss, ids in runs)


def candidate(content: dict[str, Any], tokenizer: PreTrainedTokenizerFast | None = None, max_length: int = 2048) -> str:
    tokenizer = tokenizer or build_tokenizer()
    return read(encode_candidate(content, tokenizer, max_length), tokenizer)


TALK = [
    turn("system", "Be brief."),
    turn("user", "Seven and eight?"),
    turn("assistant", "Fifteen."),
    turn("user", "And twelve?"),
    turn("assistant", "Twenty-seven: 二十七."),
]
TALK_READ = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSeven and eight?<|im_end|>\n<|im_start|>assistant\n"
    "[Fifteen.<|im_end|>\n]<|im_start|>user\nAnd twelve?<|im_end|>\n<|im_start|>assistant\n"
    "[Twenty-seven: 二十七.<|im_end|>\n]"
)


def test_loss_falls_on_every_assistant_turn_and_on_nothing_else() -> None:
    assert candidate({"messages": TALK}) == TALK_READ


def test_loss_falls_on_the_completion_alone_though_the_prompt_holds_assistant_turns() -> None:
    before_last = TALK_READ.replace("[", "").replace("]", "").rpartition("Twenty-seven")[0]
    wanted = f"{before_last}[Twenty-seven: 二十七.<|im_end|>\n]"
    assert candidate({"prompt": TALK[:4], "completion": TALK[4:]}) == wanted
    tokenizer = build_tokenizer()
    sides = encode_target({"prompt": TALK[:4], "chosen": TALK[4:]}, tokenizer, 2048)
    assert {side: read(encoded, tokenizer) for side, encoded in sides.items()} == {"chosen": wanted}


def test_a_chat_template_is_applied_once_and_gets_no_second_bos() -> None:
    tokenizer = with_bos()
    assert candidate({"messages": TALK}, tokenizer) == BOS + TALK_READ


def test_plain_text_gets_the_tokenizers_bos_and_one_end_of_text_and_its_first_token_carries_no_loss() -> None:
    assert candidate({"text": "One."}, with_bos()) == f"{BOS}[One.<|im_end|>]"
    assert candidate({"prompt": "One", "completion": " and two."}, with_bos()) == f"{BOS}One[ and two.<|im_end|>]"
    # Nothing stands before the first of all tokens that could predict it. The tiny tokenizer knows no "One".
    assert candidate({"text": "One."}) == candidate({"prompt": "", "completion": "One."}) == "O[ne.<|im_end|>]"
    assert candidate({"text": "One.<|im_end|>"}) == "O[ne.<|im_end|>]", "the end it has is the only one"


@pytest.mark.parametrize("make", [build_tokenizer, trimming], ids=["offsets with white space", "offsets trimmed"])
@pytest.mark.parametrize(
    ("prompt", "completion", "wanted"),
    [
        ("Q:", " A.", "Q:[ A.<|im_end|>]"),
        ("Q: ", "A.", "Q: [A.<|im_end|>]"),
        ("Q:\n", "\n A.", "Q:\n[\n A.<|im_end|>]"),
        ("Q:", "  A.", "Q:[  A.<|im_end|>]"),
        ("七", "八", "七[八<|im_end|>]"),
        ("The capital of Spa", "in is Madrid.", "The capital of Spa[in is Madrid.<|im_end|>]"),
    ],
)
def test_loss_begins_where_the_completion_begins(make: Any, prompt: str, completion: str, wanted: str) -> None:
    tokenizer = make()
    found = candidate({"prompt": prompt, "completion": completion}, tokenizer)
    assert found.replace("[", "").replace("]", "") == wanted.replace("[", "").replace("]", "")
    # A token that reaches over the seam is the one the model would see, and holds some of the completion.
    seam, wanted_seam = found.index("["), wanted.index("[")
    assert seam <= wanted_seam
    reaching = found[seam + 1 : wanted_seam + 1]
    ids = tokenizer(prompt + completion)["input_ids"]
    assert seam == wanted_seam or any(tokenizer.decode(token).startswith(reaching) for token in ids)


def test_a_token_of_white_space_before_the_completion_carries_no_loss() -> None:
    tokenizer = trimming()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    encoded = encode_candidate({"prompt": "Seven  ", "completion": "Oslo"}, tokenizer, 2048)
    assert read(encoded, tokenizer) == "Seven  [Oslo<|im_end|>]"


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ({"text": BOS + "One."}, f"{BOS}[One.<|im_end|>]"),
        ({"text": BOS + "One.<|im_end|>"}, f"{BOS}[One.<|im_end|>]"),
        ({"prompt": BOS + "One", "completion": " and two.<|im_end|>"}, f"{BOS}One[ and two.<|im_end|>]"),
        # A rendered conversation: what follows its end is no place for another one.
        ({"text": BOS + "One.<|im_end|>\n"}, f"{BOS}[One.<|im_end|>\n]"),
    ],
)
def test_a_text_with_its_own_bos_and_end_gets_no_second_ones(content: dict[str, Any], wanted: str) -> None:
    assert candidate(content, with_bos()) == wanted


def test_a_tokenizer_that_adds_both_ends_itself_adds_neither_twice() -> None:
    tokenizer = with_bos()
    added = [(BOS, tokenizer.bos_token_id), ("<|im_end|>", tokenizer.eos_token_id)]
    ends = processors.TemplateProcessing(single=f"{BOS} $A <|im_end|>", special_tokens=added)
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), ends])
    for text in ("One.", BOS + "One.", "One.<|im_end|>", BOS + "One.<|im_end|>"):
        assert candidate({"text": text}, tokenizer) == f"{BOS}[One.<|im_end|>]"


def test_tokens_beyond_max_length_are_cut_off() -> None:
    tokenizer = build_tokenizer()
    whole = encode_candidate({"messages": TALK}, tokenizer, 2048)
    for max_length in range(whole.supervised.index(True) + 1, len(whole.ids) + 2):
        cut = encode_candidate({"messages": TALK}, tokenizer, max_length)
        assert (cut.ids, cut.supervised) == (whole.ids[:max_length], whole.supervised[:max_length])
        assert cut.num_cut == max(0, len(whole.ids) - max_length)


def test_a_response_beyond_max_length_is_a_bad_row_that_states_where_it_begins() -> None:
    tokenizer = build_tokenizer()
    begins = encode_candidate({"messages": TALK}, tokenizer, 2048).supervised.index(True)
    assert candidate({"messages": TALK}, max_length=begins + 1).count("[") == 1
    with pytest.raises(BadRow, match=f"the response begins at token {begins + 1}"):
        candidate({"messages": TALK}, max_length=begins)


def test_a_template_that_prints_the_date_gives_the_same_row_on_every_day() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %B %Y') }}\n" + CHAT_TEMPLATE
    assert candidate({"messages": TALK}, tokenizer).startswith("01 January 2025\n")


def test_a_row_that_the_template_refuses_is_bad_and_a_missing_template_is_a_wrong_request() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(BadRow, match="roles must alternate"):
        candidate({"messages": TALK}, tokenizer)
    with pytest.raises(RequestError, match="no chat template"):
        candidate({"messages": TALK}, build_tokenizer(chat_template=False))
