"""A tokenizer's chat template: messages -> their text, and what stands in it between generation marks.

Does not know which turns carry loss.
"""

import re
from dataclasses import dataclass
from datetime import date
from typing import Any

from jinja2 import TemplateNotFound, TemplateSyntaxError
from jinja2.exceptions import SecurityError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from prism_job.data.examples import BadRow, Content, Message
from prism_job.errors import RequestError
from prism_job.plan.extractor import TEMPLATE_DATE

Span = tuple[int, int]
"""Characters [begin, end) of a rendered text."""

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template, and what it gets beside the messages."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    tools: list[Any] | None
    settings: dict[str, Any]

    @classmethod
    def of(cls, content: Content, tokenizer: PreTrainedTokenizerBase) -> "ChatTemplate":
        where, tools = str(tokenizer.name_or_path), content.get("tools") or None
        settings = content.get("chat_template_kwargs") or {}
        if not tokenizer.chat_template:
            raise RequestError(
                "the data are messages, and this tokenizer has no chat template",
                where=where,
                fix="put chat_template.jinja beside the model, take an instruct model, or use prompt/completion strings",
            )
        try:
            template = tokenizer.get_chat_template(tools=tools)
        except ValueError as error:  # several templates, and none of them is the default
            fix = "name one of them default (chat_template.jinja), or use prompt/completion strings"
            raise RequestError(f"no default chat template: {error}", where=where, fix=fix) from error
        return cls(tokenizer, template, tools, {**tokenizer.special_tokens_map, **settings})

    @property
    def has_marks(self) -> bool:
        return _MARKS.search(self.template) is not None

    def text(self, messages: list[Message], *, prompt: bool = False) -> str:
        """`prompt`: with the generation prompt. Raises BadRow if the template refuses the messages."""
        return self._rendered(messages, add_generation_prompt=prompt)[0]

    def text_and_marks(self, messages: list[Message]) -> tuple[str, list[Span]]:
        """The text, and what stands in it between generation marks."""
        text, marks = self._rendered(messages, return_assistant_tokens_mask=self.has_marks)
        return text, [(begin, end) for begin, end in marks if begin < end]

    def _rendered(self, messages: list[Message], **flags: bool) -> tuple[str, list[Span]]:
        try:
            _fix_date(self.template)
            texts, marks = render_jinja_template(
                [messages], tools=self.tools, chat_template=self.template, **flags, **self.settings
            )
            return texts[0], marks[0] if marks else []
        except (TemplateSyntaxError, TemplateNotFound, SecurityError) as error:  # not the fault of this row
            fix = "correct the template (chat_template.jinja, or in tokenizer_config.json)"
            what = f"the chat template does not work: {error}"
            raise RequestError(what, where=str(self.tokenizer.name_or_path), fix=fix) from error
        except Exception as error:  # a template is a program: whatever else it raises is about this row
            raise BadRow(f"the chat template refuses these messages: {error}") from error

    def shared(self, one: str, other: str) -> int:
        """Characters of the beginning that two texts have in common, to the end of the last token that both have."""
        if other.startswith(one):
            return len(one)
        encoded = [self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True) for text in (one, other)]
        end = 0
        for token, another, (_, stop) in zip(
            encoded[0]["input_ids"], encoded[1]["input_ids"], encoded[0]["offset_mapping"], strict=False
        ):
            if token != another:
                break
            end = stop
        return end


def _fix_date(template: str) -> None:
    # A row must not depend on the day. transformers passes no function to a template, so the clock is replaced in the
    # compiled template that it caches; test_chat checks that this still works.
    _compile_jinja_template(template).globals["strftime_now"] = date.fromisoformat(TEMPLATE_DATE).strftime
