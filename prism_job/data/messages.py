"""Turns of a conversation -> canonical messages: role and content as text. Knows TRL's, OpenAI's and ShareGPT's keys.

The same turn in any of these forms becomes the same message. Other keys of a message stay, as a chat template may read them; of
ShareGPT's turns only the weight does. Does not know layouts.
"""

import json
from typing import Any

from prism_job.data.bad_row import BadRow, wrong_type

Message = dict[str, Any]

ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model", "bing", "bard", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
"""ShareGPT's `from` -> role."""

TEMPLATE_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython", "observation"})
"""Roles that go to the template as they are. Another that ShareGPT's `from` may hold means what it means there."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys under which templates look for an assistant's reasoning."""


def read_messages(value: Any, name: str) -> list[Message]:
    """A list of turns, each with `role` and `content`, or ShareGPT's `from` and `value`. Raises BadRow, which names the turn.

    A whole conversation may be JSON text, as CSV has to hold it. Content as a list of text parts is joined, tool arguments as
    JSON text are parsed, nulls are left out, and a `weight` is kept only where it changes something: 0 on a turn of the
    assistant.
    """
    if isinstance(value, str) and name in ("messages", "conversations"):
        value = parse_json(value, name)
    if not isinstance(value, list) or not value:
        raise wrong_type(value, name, "a list of messages") if value != [] else BadRow(f"{name} holds no message")
    return [_message(turn, name, index) for index, turn in enumerate(value)]


def check_response(messages: list[Message], name: str) -> None:
    """Raises BadRow: no turn of the assistant carries loss, or one that does holds nothing to learn."""
    num_turns = num_learnt = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        num_turns += 1
        if message.get("weight") == 0:
            continue
        num_learnt += 1
        content = message.get("content")
        if (not content or content.isspace()) and not any(message.get(key) for key in ("tool_calls", *REASONING)):
            is_only_one = sum(other["role"] == "assistant" for other in messages) == 1
            fix = "remove the row" if is_only_one else "remove the turn"
            raise BadRow(f"no response: {name}[{index}] is a turn of the assistant without content; {fix}")
    if not num_turns:
        raise BadRow(f"no response: {name} holds no turn of role 'assistant'")
    if not num_learnt:
        raise BadRow(f"no response: all turns of the assistant in {name} have weight 0")


def without_weights(messages: list[Message]) -> list[Message]:
    """Those of a prompt, which carries no loss."""
    if not any("weight" in message for message in messages):
        return messages
    return [{key: value for key, value in message.items() if key != "weight"} for message in messages]


def system_and(text: Any, messages: list[Message]) -> list[Message]:
    """The messages after a system turn with this text; without one where there is no text.

    Raises BadRow: it is no text, or they begin with another system turn already.
    """
    if text is not None and not isinstance(text, str):
        raise wrong_type(text, "system", "text")
    if not text or text.isspace():
        return messages
    if messages and messages[0]["role"] == "system":
        if messages[0].get("content") != text:
            raise BadRow("two system prompts: that of the column is not that of the first message; remove one")
        return messages
    return [{"role": "system", "content": text}, *messages]


def without_nulls(value: Any) -> Any:
    """Parquet fills absent keys of a struct with null, at any depth. The same value from jsonl must get the same id.

    What JSON cannot hold, such as a time, becomes text, as it does where the plan stages a row.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)


def parse_json(text: str, name: str) -> Any:
    """Raises BadRow."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadRow(f"{name} is text, but not JSON: {error}") from error


def _message(turn: Any, name: str, index: int) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(f"{name}[{index}] is a {type(turn).__name__}, not a message with role and content")
    role, content = turn.get("role"), turn.get("content")
    if (
        type(role) is str and role in TEMPLATE_ROLES and type(content) is str and len(turn) == 2
    ):  # nearly all: no time for more
        return turn
    where = f"{name}[{index}]"
    if role is None and "from" in turn:
        return _sharegpt_message(turn, where)
    if not isinstance(role, str):
        raise BadRow(f"{where} has no role")
    message = without_nulls(turn)
    if message.get("tool_calls") == []:  # as no calls; some templates only ask whether the key is there
        del message["tool_calls"]
    if role not in TEMPLATE_ROLES:
        role = message["role"] = ROLES.get(role.lower(), role)
    if isinstance(content, list):
        message["content"] = _joined(content, where)
    if message.get("tool_calls"):
        message["tool_calls"] = _tool_calls(message["tool_calls"], where)
    elif not isinstance(message.get("content"), str) and not (
        role == "assistant" and any(message.get(key) for key in REASONING)
    ):
        raise BadRow(f"{where} has no text content")
    return _with_weight(message, where)


def _sharegpt_message(turn: Message, where: str) -> Message:
    sender, value = turn["from"], turn.get("value")
    if not isinstance(sender, str) or sender.lower() not in ROLES:
        raise BadRow(f"{where} has no role that PRISM knows: from is {sender!r:.40}; it may be {', '.join(ROLES)}")
    role, content = ROLES[sender.lower()], _joined(value, where) if isinstance(value, list) else value
    if not isinstance(content, str):
        raise BadRow(f"{where} has no text content: value is a {type(content).__name__}")
    message: Message = {"role": role, "content": content}
    if sender.lower() == "function_call":
        calls = parse_json(content, f"{where} of function_call")
        calls = [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]
        message = {"role": role, "tool_calls": _tool_calls(without_nulls(calls), where)}
    return _with_weight({**message, "weight": turn.get("weight")}, where)


def _with_weight(message: Message, where: str) -> Message:
    if "weight" not in message:
        return message
    weight = message.pop("weight")
    if weight is None or weight == 1 or (weight == 0 and message["role"] != "assistant"):
        return message
    if isinstance(weight, str) or weight != 0:
        raise BadRow(f"{where} has the weight {weight!r:.40}; PRISM takes 0 (no loss) and 1")
    return {**message, "weight": 0}


def _joined(parts: list[Any], where: str) -> str:
    """The text of a content that is a list of text parts. Without a separator, as templates for such a content print it."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise BadRow(
                f"{where} has a part of type {kind!r:.40}: PRISM reads text alone; remove rows with other parts"
            )
        if not isinstance(part.get("text"), str):
            raise BadRow(f"{where} has a text part without text")
        texts.append(part["text"])
    return "".join(texts)


def _tool_calls(calls: Any, where: str) -> list[Any]:
    """Calls whose arguments are objects, as transformers' templates expect them; OpenAI's are JSON text."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadRow(f"{where}: tool_calls is not a list of calls")
    return [_tool_call(call, where) for call in calls]


def _tool_call(call: dict[str, Any], where: str) -> dict[str, Any]:
    if "function" in call:
        if not isinstance(call["function"], dict):
            raise BadRow(f"{where}: a tool call whose function is no object with name and arguments")
        return {**call, "function": _tool_call(call["function"], where)}
    if not isinstance(call.get("name"), str):
        raise BadRow(f"{where}: a tool call without the name of a function")
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        parsed = parse_json(arguments, f"{where}: arguments of {call['name']:.40}") if arguments.strip() else {}
        if not isinstance(parsed, dict):
            raise BadRow(f"{where}: arguments of {call['name']:.40} are a {type(parsed).__name__}, not an object")
        return {**call, "arguments": without_nulls(parsed)}
    return call
