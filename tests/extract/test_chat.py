"""Where the assistant's turns stand in a rendered conversation: compared with transformers' own mask of generation marks."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from prism_job.data.examples import BadRow
from prism_job.extract.tokenise import Encoded, encode_candidate, encode_target
from tests.chat_templates import MARKED, SPECIAL, plain
from tests.conftest import turn
from tests.models import CHAT_TEMPLATE, build_tokenizer

CALL = {"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
EIGHT = turn("assistant", "Eight.") | {"reasoning_content": "One more."}
Y = turn("assistant", "y")
ASK, MORE, RESULT = turn("user", "Seven?"), turn("user", "And now?"), turn("tool", "3")
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "single": [ASK, turn("assistant", "Eight.")],
    "system": [turn("system", "Be brief."), ASK, turn("assistant", "Eight.")],
    "multi": [ASK, turn("assistant", "Eight."), MORE, turn("assistant", "Nine: x")],
    "three": [turn("system", "S"), ASK, turn("assistant", "y"), MORE, turn("assistant", "<table>"), MORE, Y],
    "user last": [ASK, turn("assistant", "Eight."), MORE],
    "tools": [ASK, turn("assistant", "") | CALL, RESULT, turn("assistant", "It is 3.")],
    "tools, then more": [ASK, turn("assistant", "") | CALL, RESULT, turn("assistant", "It is 3."), MORE, Y],
    "text and tools": [ASK, turn("assistant", "I add.") | CALL, RESULT, turn("assistant", "It is 3.")],
    "reasoning": [ASK, EIGHT],
    "reasoning, multi": [ASK, EIGHT, MORE, turn("assistant", "Nine.") | {"reasoning_content": "Again."}],
    "reasoning as text": [
        ASK,
        turn("assistant", "<think>\nOne more.\n</think>\n\nEight."),
        MORE,
        turn("assistant", "<think>\nAgain.\n</think>\n\nNine."),
    ],
    "like a prompt": [ASK, turn("assistant", "<think again"), MORE, turn("assistant", "<|no")],
    "assistant first": [turn("assistant", "Welcome."), ASK, turn("assistant", "Eight.")],
    "empty turn": [ASK, turn("assistant", " \n")],
}
IGNORED = "its content is empty, and the chat template writes no tool calls"
REFUSED = {
    **{(kind, "empty turn"): "turn 2 holds nothing once it is rendered: its content is empty" for kind in MARKED},
    **{(kind, name): f"turn 2 holds nothing once it is rendered: {IGNORED}" for kind in ("chatml", "eos at the end")
       for name in ("tools", "tools, then more")},
    **{(kind, "text and tools"): "writes no tool calls: those of turn 2" for kind in ("chatml", "eos at the end")},
    **{("inst", name): "roles must alternate" for name in CONVERSATIONS if "tools" in name or name == "assistant first"},
}  # fmt: skip
"""(kind of template, conversation) -> why it is refused; every other combination is read."""


def tokenizer_of(template: str, *, special: bool = True) -> PreTrainedTokenizerFast:
    """`special`: the template's markers are tokens of their own; otherwise they are text, cut anyhow."""
    tokenizer = build_tokenizer(chat_template=False)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *SPECIAL]})
    tokenizer.chat_template = template
    return tokenizer


def content_of(name: str) -> dict[str, Any]:
    return {"messages": CONVERSATIONS[name], **({"tools": TOOLS} if "tools" in name else {})}


def shown(ids: list[int], losses: list[bool], tokenizer: PreTrainedTokenizerFast) -> str:
    """The tokens, with ⟦ ⟧ around each run that carries loss."""
    parts, before = [], False
    for token, loss in zip(ids, losses, strict=True):
        parts.append(("⟦" if loss else "⟧") * (loss != before) + tokenizer.decode(token))
        before = loss
    return "".join(parts) + "⟧" * before


def read(content: dict[str, Any], tokenizer: PreTrainedTokenizerFast, **options: Any) -> str:
    encoded = encode_candidate(content, tokenizer, 4096, **options)
    return shown(encoded.ids, encoded.supervised, tokenizer)


def marked_by_transformers(content: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> str:
    tools, flags = content.get("tools"), {"return_assistant_tokens_mask": True, "return_dict": True}
    encoding = tokenizer.apply_chat_template(content["messages"], tools=tools, **flags)
    return shown(encoding["input_ids"], [loss == 1 for loss in encoding["assistant_masks"]], tokenizer)


@pytest.mark.parametrize("special", [True, False], ids=["markers are tokens", "markers are text"])
@pytest.mark.parametrize("kind", MARKED)
def test_the_mask_is_that_of_transformers_for_the_same_template_with_marks(kind: str, special: bool) -> None:
    unmarked, marked = (tokenizer_of(text, special=special) for text in (plain(MARKED[kind]), MARKED[kind]))
    for name in CONVERSATIONS:
        content = content_of(name)
        if reason := REFUSED.get((kind, name)):
            for tokenizer in (unmarked, marked):
                with pytest.raises(BadRow, match=reason):
                    encode_candidate(content, tokenizer, 4096)
        else:
            found = read(content, marked)  # before transformers: it fixes the date in the template that both use
            assert found == marked_by_transformers(content, marked), name
            assert "⟦" in found
            assert read(content, unmarked) == found, name


PIECES = (
    "x",
    "y",
    "Hello",
    " ",
    "\n",
    "\n\n",
    "<think>",
    "</think>",
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "<|end|>",
    "<|",
)
PIECES += ("<|assistant|>\n", "user", "assistant", "[INST]", "[/INST]", "<s>", "<|start|>", "<|Assistant|>", "<|eot|>")


def drawn_messages(random: Random) -> list[dict[str, Any]]:
    """A conversation of texts that look like parts of templates."""

    def drawn(role: str) -> dict[str, Any]:
        message: dict[str, Any] = turn(role, "".join(random.choices(PIECES, k=random.choice((1, 2, 5)))))
        if role == "assistant" and random.random() < 0.25:
            message["reasoning_content"] = random.choice(PIECES)
        return message

    roles = random.choice((["system"], ["assistant"], [], [])) + random.choice((1, 2, 3)) * ["user", "assistant"]
    return [drawn(role) for role in roles]


# The other kinds hold a part of the response in their generation prompt, which a drawn text may begin with.
@pytest.mark.parametrize("kind", [kind for kind in MARKED if kind not in ("r1", "qwen3.5", "nemotron")])
def test_texts_that_look_like_the_template_do_not_move_the_mask(kind: str) -> None:
    random, num_read = Random(7), 0
    unmarked, marked = (tokenizer_of(text) for text in (plain(MARKED[kind]), MARKED[kind]))
    for _ in range(25):
        content = {"messages": drawn_messages(random)}
        try:
            found = read(content, unmarked)
        except BadRow:
            continue
        assert found == read(content, marked)
        num_read += 1
    assert num_read > 10


def test_so_many_combinations_are_read_and_refused() -> None:
    """The count that the documentation states."""
    combinations = [(kind, name) for kind in MARKED for name in CONVERSATIONS]
    assert set(REFUSED) <= set(combinations)
    assert (len(combinations), len(combinations) - len(REFUSED)) == (154, 133)
    assert Counter(reason.rpartition(": ")[2][:30] for reason in REFUSED.values()) == {
        "its content is empty": 11,
        "its content is empty, and the chat template writes no tool calls"[:30]: 4,
        "those of turn 2": 2,
        "roles must alternate": 4,
    }


REWRITES = CHAT_TEMPLATE.replace(
    "{{ message['content'] }}", "{{ message['content'] if loop.last or message['role'] != 'assistant' else '...' }}"
)
"""Earlier turns are rendered without their content, so they cannot be told."""


def test_the_last_turn_alone_can_be_learnt_where_earlier_ones_cannot_be_told() -> None:
    content, tokenizer = content_of("multi"), tokenizer_of(REWRITES)
    with pytest.raises(BadRow, match=r"renders turn 2 differently once more turns follow; set extraction.lossOn: last"):
        read(content, tokenizer)
    assert read(content, tokenizer, loss_on="last").endswith("...<|im_end|>\n" + AFTER + "⟦Nine: x<|im_end|>\n⟧")


AFTER = "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("kind", MARKED)
def test_loss_on_last_marks_the_last_assistant_turn_alone(kind: str) -> None:
    for text in (plain(MARKED[kind]), MARKED[kind]):
        tokenizer = tokenizer_of(text)
        every, last = (read(content_of("multi"), tokenizer, loss_on=each) for each in ("assistant", "last"))
        head, _, tail = every.rpartition("⟦")
        assert last == head.replace("⟦", "").replace("⟧", "") + "⟦" + tail


@pytest.mark.parametrize("kind", MARKED)
def test_a_prompt_of_messages_carries_no_loss_though_it_holds_assistant_turns(kind: str) -> None:
    messages = CONVERSATIONS["multi"]
    for text in (plain(MARKED[kind]), MARKED[kind]):
        tokenizer = tokenizer_of(text)
        last = read({"messages": messages}, tokenizer, loss_on="last")
        assert read({"prompt": messages[:3], "completion": messages[3:]}, tokenizer) == last


def test_turns_of_weight_0_carry_no_loss() -> None:
    messages = [ASK, turn("assistant", "Bad.") | {"weight": 0}, MORE, turn("assistant", "Nine.") | {"weight": 1}]
    for text in (plain(MARKED["chatml"]), MARKED["chatml"]):
        tokenizer = tokenizer_of(text)
        assert read({"messages": messages}, tokenizer).endswith(AFTER + "⟦Nine.<|im_end|>\n⟧")
        reversed_turns = {"messages": [*messages[2:], *messages[:2]]}
        assert "⟦Nine.<|im_end|>\n⟧" in read(reversed_turns, tokenizer)
        with pytest.raises(BadRow, match="last turn of the assistant has weight 0"):
            read(reversed_turns, tokenizer, loss_on="last")


def test_settings_of_a_row_reach_the_template() -> None:
    tokenizer = tokenizer_of(plain(MARKED["qwen3.5"]))
    content = content_of("single")
    without = read(content, tokenizer)
    assert without.endswith("assistant\n<think>\n</think>\n\n⟦Eight.<|im_end|>\n⟧")
    thinking = read(content | {"chat_template_kwargs": {"enable_thinking": True}}, tokenizer)
    assert thinking.endswith("assistant\n<think>\n⟦\n</think>\n\nEight.<|im_end|>\n⟧")


def test_marks_that_mark_nothing_of_a_row_are_named() -> None:
    tokenizer = tokenizer_of(
        "{% if messages | length > 9 %}{% generation %}x{% endgeneration %}{% endif %}" + CHAT_TEMPLATE
    )
    with pytest.raises(BadRow, match="has generation marks, and none in these turns"):
        read(content_of("single"), tokenizer)


def test_a_turn_of_a_role_that_the_template_does_not_write_is_named() -> None:
    tokenizer = tokenizer_of(
        "{% for message in messages %}{% if message.role in ('user', 'assistant') %}{{ message.role }}: "
        "{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert read(content_of("system"), tokenizer).endswith("assistant: ⟦Eight.<|im_end|>\n⟧"), (
        "training leaves it out too"
    )
    for role in ("prompter", "tool"):
        with pytest.raises(BadRow, match=f"leaves out turn 2, whose role is '{role}'"):
            read({"messages": [ASK, turn(role, "Eleven?"), turn("assistant", "Eight.")]}, tokenizer)


def test_a_content_that_the_template_leaves_out_is_named_by_its_turn() -> None:
    content = {"messages": [ASK, Y, MORE, turn("assistant", "<think>only</think>")]}
    with pytest.raises(BadRow, match=r"turn 4 holds nothing .*: the chat template leaves out its content"):
        read(content, tokenizer_of(plain(MARKED["r1"])))


def sides(chosen: Any, rejected: Any, tokenizer: PreTrainedTokenizerFast, max_length: int = 99) -> dict[str, Encoded]:
    as_turns = isinstance(chosen, str)
    both = {"chosen": [turn("assistant", chosen)], "rejected": [turn("assistant", rejected)]} if as_turns else {}
    return encode_target({"prompt": [ASK], **(both or {"chosen": chosen, "rejected": rejected})}, tokenizer, max_length)


def test_pairs_of_the_same_response_tokens_are_refused() -> None:
    trims, keeps = tokenizer_of(plain(MARKED["headers"])), tokenizer_of(CHAT_TEMPLATE)
    assert sides("Eight.", "Eight.  ", keeps).keys() == {"chosen", "rejected"}
    with pytest.raises(BadRow, match=r"become the same .* response tokens"):
        sides("Eight.", "Eight.  ", trims)
    with pytest.raises(BadRow, match="its rejected response: no response token: turn 2 holds nothing"):
        sides("Eight.", "   ", keeps)
    long = "We look at it with care. " * 5
    assert sides(long + "Eight.", long + "Nine.", keeps, 200)["chosen"].num_cut == 0
    with pytest.raises(BadRow, match="identical up to maxLength 60: they differ only beyond it"):
        sides(long + "Eight.", long + "Nine.", keeps, 60)
    # Other context, and the same tokens to learn.
    chosen, rejected = ([turn("assistant", text) | {"weight": 0}, MORE, Y] for text in ("a", "b"))
    with pytest.raises(BadRow, match=r"become the same .* they differ only in what carries no loss"):
        sides(chosen, rejected, keeps)
