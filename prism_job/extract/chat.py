"""A conversation -> its text by the chat template, and the characters of it that carry loss. Does not know tokens' limits.

The rule: an assistant turn is what the template writes after the generation prompt, up to where the next turn begins. So the
token that ends a turn belongs to it, and the last turn reaches to the end of the text. What the generation prompt holds already
(`<think>`, an empty think block) carries no loss. A template with `{% generation %}` marks states the turns itself.

Without marks the turns are found by rendering parts of the conversation (docs/architecture.md, Tokens and loss).
"""

from collections.abc import Iterator
from string import ascii_lowercase

from transformers import PreTrainedTokenizerBase

from prism_job.data.examples import BadRow, Content, Message
from prism_job.data.messages import REASONING
from prism_job.extract.chat_template import ChatTemplate, Span
from prism_job.spec.extraction import LossOn


class _Hidden(Exception):
    """Renderings do not show where a turn stands."""


def render(
    messages: list[Message], first: int, content: Content, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn
) -> tuple[str, list[Span]]:
    """The text of the messages, and the parts of it that carry loss: those of assistant turns from message `first` on.

    Args:
        content: whose `tools` and `chat_template_kwargs` the template gets.

    Raises:
        BadRow: the template refuses the messages, writes nothing for a turn, or does not show where a turn stands; or no turn
            carries loss.
        RequestError: a tokenizer without a chat template, or with one that does not work.
    """
    chat = ChatTemplate.of(content, tokenizer)
    assistant = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    asked = [index for index in assistant if index >= first][-1 if loss_on == "last" else 0 :]
    turns = [index for index in asked if messages[index].get("weight") != 0]
    if not turns:  # a row without any such turn was refused with its layout
        raise BadRow("no response: the last turn of the assistant has weight 0, and extraction.lossOn is last")
    text, marked = chat.text_and_marks(messages)
    _refuse_left_out(chat, messages, text)
    if not chat.has_marks:
        spans = _turn_spans(chat, messages, turns, text)
        written = [text[begin:end] for begin, end in spans]
    else:
        spans = marked if turns == assistant else _within(marked, _turn_spans(chat, messages, turns, text))
        parts = [text[begin:end] for begin, end in spans]
        written = parts if len(parts) == len(turns) else ["".join(parts)] * len(turns)
        if not spans:
            raise BadRow("no response token: the chat template has generation marks, and none in these turns")
    for index, part in zip(turns, written, strict=True):
        _refuse_dropped(chat, messages, index, text, part)
    return text, spans


def _turn_spans(chat: ChatTemplate, messages: list[Message], turns: list[int], text: str) -> list[Span]:
    spans: list[Span] = []
    for index in turns:
        try:
            begin, end = _turn_span(chat, messages, index, text)
            if not (spans[-1][1] if spans else 0) <= begin < end:
                raise _Hidden
        except _Hidden as error:
            raise BadRow(_why_hidden(chat, messages, index, turns[-1], text)) from error
        spans.append((begin, end))
    return spans


def _why_hidden(chat: ChatTemplate, messages: list[Message], index: int, last: int, text: str) -> str:
    if index == last:
        return f"the chat template does not show where the response, turn {index + 1}, begins and ends"
    what = f"the chat template renders turn {index + 1} differently once more turns follow"
    try:
        _turn_span(chat, messages, last, text)
    except _Hidden:
        return f"{what}; split the conversation so that each row ends with the response to learn"
    return f"{what}; set extraction.lossOn: last to learn only the last turn of each row"


def _turn_span(chat: ChatTemplate, messages: list[Message], index: int, text: str) -> Span:
    """Where assistant turn `index` stands in `text`, the rendering of all messages. Raises _Hidden."""
    if index > 0:
        try:
            return _span_in_place(chat, messages, index, text)
        except (_Hidden, BadRow):  # the template may refuse a part of a conversation that it takes whole
            pass
    # After a user turn in place of all that precedes it. Nothing can be rendered before a turn that begins the conversation.
    shorter = [{"role": "user", "content": "x"}, *messages[index:]]
    try:
        user, other = chat.text(shorter[:1]), chat.text(shorter)
        begin, end = _span_in_place(chat, shorter, 1, other)
    except BadRow as error:
        raise _Hidden from error
    shift = len(text) - len(other)
    rest = chat.shared(user, other)  # the generation prompt, the turn, and all that follows: the same in both
    if rest + shift < 0 or text[rest + shift :] != other[rest:]:
        raise _Hidden
    return begin + shift, end + shift


def _span_in_place(chat: ChatTemplate, messages: list[Message], index: int, text: str) -> Span:
    before = chat.text(messages[:index], prompt=True)
    through = text if index == len(messages) - 1 else chat.text(messages[: index + 1])
    if text.startswith(before) and text.startswith(through):
        return len(before), len(through)
    bare = chat.text(messages[:index])
    for other in _other_messages(messages[index]):
        try:
            return _changed_turn_span(chat, messages, index, other, text, before, through, bare)
        except (_Hidden, BadRow):
            continue
    raise _Hidden


def _changed_turn_span(
    chat: ChatTemplate,
    messages: list[Message],
    index: int,
    other: Message,
    text: str,
    before: str,
    through: str,
    bare: str,
) -> Span:
    """Of a turn that `text` does not hold as it is rendered without the turns that follow.

    Args:
        other: what takes its place to see where its content stands.
        before, through, bare: the messages before it with the generation prompt, up to it, and before it without.
    """
    prompt_begin = chat.shared(bare, before)
    prompt, up_to = before[prompt_begin:], messages[: index + 1]
    content_begin, content_end = _content_span(chat, messages, index, other, text)
    if text.startswith(before):
        begin = len(before)
    elif text.startswith(before[:prompt_begin]):
        # Where a response follows, the template leaves out the end of the generation prompt.
        begin = min(chat.shared(before, text), content_begin)
    else:  # earlier turns are rendered differently; this one begins as far before its content as it does at the end
        lead = through[len(before) : _content_span(chat, up_to, index, other, through)[0]]
        if not through.startswith(before) or not text.endswith(prompt + lead, 0, content_begin):
            raise _Hidden
        begin = prompt_begin = content_begin - len(lead)
    if begin < prompt_begin:
        raise _Hidden
    if text.startswith(through):
        return begin, len(through)
    # What stands between its content and the generation prompt of the next turn ends a turn.
    going_on = chat.text(up_to, prompt=True)
    _, ending_begin = _content_span(chat, up_to, index, other, going_on, prompt=True)
    has_prompt = going_on.endswith(prompt)
    ending = going_on[ending_begin : len(going_on) - len(prompt) if has_prompt else chat.shared(through, going_on)]
    if not text.startswith(ending, content_end):
        raise _Hidden
    return begin, content_end + len(ending)


def _content_span(
    chat: ChatTemplate, messages: list[Message], index: int, other: Message, text: str, *, prompt: bool = False
) -> Span:
    """The characters of `text`, the rendering of `messages`, that change if `other` takes the place of a message."""
    another = chat.text([*messages[:index], other, *messages[index + 1 :]], prompt=prompt)
    if another == text:
        raise _Hidden
    return _num_equal(another, text), len(text) - _num_equal(another[::-1], text[::-1])


def _num_equal(one: str, other: str) -> int:
    """Characters at the beginning that are equal."""
    begin, end = 0, min(len(one), len(other))
    while begin < end:
        middle = (begin + end + 1) // 2
        if one[begin:middle] == other[begin:middle]:
            begin = middle
        else:
            end = middle - 1
    return begin


def _other_messages(message: Message) -> Iterator[Message]:
    """The message with other texts, which begin and end with another letter, so that all of a text changes."""
    fields = [name for name in ("content", *REASONING) if isinstance(message.get(name), str)]
    ends = {end for name in fields for end in (message[name].strip()[:1], message[name].strip()[-1:])}
    letter = next(letter for letter in ascii_lowercase if letter not in ends)
    yield {**message, **dict.fromkeys(["content", *fields], letter)}
    if message.keys() > {"role", "content"}:
        yield {"role": message["role"], "content": letter}


def _within(marked: list[Span], turns: list[Span]) -> list[Span]:
    parts = [(max(begin, first), min(end, last)) for first, last in turns for begin, end in marked]
    return [(begin, end) for begin, end in parts if begin < end]


def _refuse_dropped(chat: ChatTemplate, messages: list[Message], index: int, text: str, written: str) -> None:
    """Raises BadRow for a turn of which the template writes nothing, or not the tool calls."""
    message, content = messages[index], _stripped(messages[index])
    calls = message.get("tool_calls")

    def is_rendered_like(other: Message) -> bool:
        try:
            another = chat.text([*messages[:index], other, *messages[index + 1 :]])
        except BadRow:  # the template takes one and refuses the other
            return False
        return "".join(another.split()) == "".join(text.split())

    if not (content and content in written) and is_rendered_like({"role": message["role"], "content": ""}):
        why = "the chat template leaves out its content" if content else "its content is empty"
        why += ", and the chat template writes no tool calls" if calls else ""
        raise BadRow(f"no response token: turn {index + 1} holds nothing once it is rendered: {why}")
    if calls and is_rendered_like({key: value for key, value in message.items() if key != "tool_calls"}):
        raise BadRow(f"the chat template writes no tool calls: those of turn {index + 1} would be left out")


def _refuse_left_out(chat: ChatTemplate, messages: list[Message], text: str) -> None:
    """Raises BadRow for what the assistant answers and the template does not write, as a role that it does not know."""
    for index, message in enumerate(messages):
        content = _stripped(message)
        if message["role"] in ("assistant", "system", "developer") or content in text:
            continue
        try:
            is_left_out = chat.text([*messages[:index], {**message, "content": "x"}, *messages[index + 1 :]]) == text
        except BadRow:
            continue
        if is_left_out:
            raise BadRow(f"the chat template leaves out turn {index + 1}, whose role is {message['role']!r:.40}")


def _stripped(message: Message) -> str:
    content = message.get("content")
    return content.strip() if isinstance(content, str) else ""
