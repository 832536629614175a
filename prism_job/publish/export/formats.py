"""Training content -> a row in the format of a trainer: TRL, ShareGPT, Alpaca. Does not know files, other columns or places.

A conversation in ShareGPT or Alpaca is an optional system turn, then user and assistant by turns, the assistant last.
LLaMA-Factory skips any other with no more than a warning.
"""

import json
from collections.abc import Callable
from typing import Any

from prism_job.data.examples import Content, Message
from prism_job.data.readers import Row


class UnfitError(Exception):
    """The format cannot hold this content; the text says why."""


def to_trl(content: Content) -> Row:
    """TRL's own columns are those of the content. Tools are JSON text: their schemas share no type that a table could have."""
    return content | ({"tools": _json(content["tools"])} if "tools" in content else {})


def to_sharegpt(content: Content) -> Row:
    """`conversations` of from/value, and `tools` as JSON text. A call is a turn `function_call`, its result `observation`."""
    turns = [_sharegpt_turn(turn, number) for number, turn in enumerate(_turns(content), start=1)]
    _check_order([turn["from"] for turn in turns], ("human", "observation"), ("gpt", "function_call"))
    row: Row = {"conversations": turns}
    return row | ({"tools": _json(content["tools"])} if "tools" in content else {})


def _sharegpt_turn(turn: Message, number: int) -> Message:
    calls = turn.get("tool_calls")
    if calls and turn["role"] == "assistant" and not turn.get("content"):
        functions = [call.get("function") for call in calls]
        return {"from": "function_call", "value": _json(functions[0] if len(functions) == 1 else functions)}
    senders = {"user": "human", "assistant": "gpt", "tool": "observation"}
    return {"from": senders.get(turn["role"], turn["role"]), "value": _text_alone(turn, number)}


def to_alpaca(content: Content) -> Row:
    """The last question and answer as instruction and output, those before as history; all rows have the same columns."""
    if "tools" in content:
        raise UnfitError("it has tools")
    turns = [turn | {"content": _text_alone(turn, n)} for n, turn in enumerate(_turns(content), start=1)]
    _check_order([turn["role"] for turn in turns], ("user",), ("assistant",))
    system = turns.pop(0)["content"] if turns[0]["role"] == "system" else ""
    texts = [turn["content"] for turn in turns]
    *history, (question, answer) = zip(texts[::2], texts[1::2], strict=True)
    return {
        "instruction": question,
        "input": "",
        "output": answer,
        "system": system,
        "history": [list(pair) for pair in history],
    }


def _turns(content: Content) -> list[Message]:
    if "chat_template_kwargs" in content:
        raise UnfitError("it has chat_template_kwargs")
    turns = as_messages(content).get("messages")
    if not turns:
        raise UnfitError("it is plain text, not a conversation")
    return list(turns)


def _text_alone(turn: Message, number: int) -> str:
    """The turn's text. Raises UnfitError: it holds more (tool calls, a weight, reasoning), which would be lost."""
    more = sorted(turn.keys() - {"role", "content"})
    if more or not isinstance(turn.get("content"), str):
        raise UnfitError(f"turn {number} of role {turn['role']!r} holds {', '.join(more) or 'no text'}")
    return str(turn["content"])


def _check_order(roles: list[str], asking: tuple[str, ...], answering: tuple[str, ...]) -> None:
    begin = 1 if roles[0] == "system" else 0
    for number, role in enumerate(roles[begin:], start=begin + 1):
        wanted = asking if (number - begin) % 2 else answering
        if role not in wanted:
            raise UnfitError(f"turn {number} is of role {role!r}, not {' or '.join(wanted)!r}")
    if len(roles) - begin < 2 or (len(roles) - begin) % 2:
        raise UnfitError("it does not end with a question and its answer")


def as_messages(content: Content) -> Content:
    """A prompt and completion of messages as one conversation, where that has the same loss: no assistant in the prompt."""
    prompt = content.get("prompt")
    if not isinstance(prompt, list):
        return content
    if any(turn["role"] == "assistant" for turn in prompt):
        raise UnfitError("its prompt holds assistant turns, which a conversation would learn too")
    return {name: value for name, value in content.items() if name not in ("prompt", "completion")} | {
        "messages": prompt + content["completion"]
    }


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


FORMATS: dict[str, Callable[[Content], Row]] = {"trl": to_trl, "sharegpt": to_sharegpt, "alpaca": to_alpaca}
