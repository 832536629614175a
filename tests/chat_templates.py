"""Small chat templates of the kinds that models come with, with generation marks around what the assistant writes.

`plain` takes the marks out: the same template as most models have it. Ours, in the manner of the models named beside them.
"""

import re

_LOOP = "{% for message in messages %}"
_CALLS = (
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function.name }} {{ call.function.arguments | tojson }}"
    "</tool_call>{% endfor %}"
)
_CHATML = "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
# Reasoning of a turn: its own field, or what stands before </think> in its content.
_REASONING = (
    "{% set content = message.content or '' %}{% set reasoning = message.reasoning_content or '' %}"
    "{% if '</think>' in content %}{% set reasoning = content.split('</think>')[0].replace('<think>', '').strip() %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)
_LAST_USER = (
    "{% set ns = namespace(user=-1) %}"
    "{% for message in messages %}{% if message.role == 'user' %}{% set ns.user = loop.index0 %}{% endif %}{% endfor %}"
)
_MARK, _END = "{% generation %}", "{% endgeneration %}"

MARKED = {
    # ChatML: SmolLM2, Qwen2; a default system prompt where none is given.
    "chatml": "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    + _LOOP
    + "{% if message.role == 'assistant' %}<|im_start|>assistant\n"
    + f"{_MARK}{{{{ message.content }}}}<|im_end|>\n{_END}{{% else %}}{_CHATML}{{% endif %}}{{% endfor %}}"
    + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    # The end of the text in place of a generation prompt: Phi-3.
    "eos at the end": _LOOP
    + "{% if message.role == 'assistant' %}<|assistant|>\n"
    + f"{_MARK}{{{{ message.content }}}}<|end|>\n{_END}"
    + "{% else %}<|{{ message.role }}|>\n{{ message.content }}<|end|>\n{% endif %}{% endfor %}"
    + "{% if add_generation_prompt %}<|assistant|>\n{% elif messages[-1].role == 'assistant' %}"
    + f"{_MARK}{{{{ eos_token }}}}{_END}{{% else %}}{{{{ eos_token }}}}{{% endif %}}",
    # Headers, BOS, trimmed content, tool calls in place of content: Llama 3.
    "headers": "{{ bos_token }}"
    + _LOOP
    + "<|header|>{{ message.role }}<|end_header|>\n\n"
    + f"{{% if message.role == 'assistant' %}}{_MARK}{{% if message.tool_calls %}}{_CALLS}"
    + f"{{% else %}}{{{{ message.content | trim }}}}{{% endif %}}<|eot|>{_END}"
    + "{% else %}{{ message.content | trim }}<|eot|>{% endif %}{% endfor %}"
    + "{% if add_generation_prompt %}<|header|>assistant<|end_header|>\n\n{% endif %}",
    # System prompt first, tool outputs without a turn of their own: DeepSeek-V3.
    "deepseek": "{{ bos_token }}{% for message in messages if message.role == 'system' %}{{ message.content }}{% endfor %}"
    + "{% set ns = namespace(after_tool=false) %}"
    + _LOOP
    + "{% if message.role == 'user' %}{% set ns.after_tool = false %}<|User|>{{ message.content }}"
    + "{% elif message.role == 'tool' %}{% set ns.after_tool = true %}<|tool|>{{ message.content }}<|/tool|>"
    + "{% elif message.role == 'assistant' %}{% if not ns.after_tool %}<|Assistant|>{% endif %}"
    + f"{_MARK}{{{{ message.content or '' }}}}{_CALLS}{{{{ eos_token }}}}{_END}{{% endif %}}{{% endfor %}}"
    + "{% if add_generation_prompt and not ns.after_tool %}<|Assistant|>{% endif %}",
    # Drops what stands before </think>; the generation prompt opens <think>: R1-Distill.
    "r1": "{{ bos_token }}"
    + _LOOP
    + "{% if message.role == 'assistant' %}<|Assistant|>"
    + f"{_MARK}{{{{ (message.content or '').split('</think>')[-1] }}}}{_CALLS}{{{{ eos_token }}}}{_END}"
    + "{% elif message.role == 'user' %}<|User|>{{ message.content }}{% else %}{{ message.content }}{% endif %}{% endfor %}"
    + "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}",
    # Reasoning of earlier turns left out, an empty think block for the last turn: Qwen3.
    "qwen3": _LAST_USER
    + _LOOP
    + "{% if message.role == 'assistant' %}"
    + _REASONING
    + f"<|im_start|>assistant\n{_MARK}{{% if loop.index0 > ns.user and (loop.last or reasoning) %}}"
    + "<think>\n{{ reasoning }}\n</think>\n\n{% endif %}"
    + f"{{{{ content }}}}{_CALLS}<|im_end|>\n{_END}{{% else %}}{_CHATML}{{% endif %}}{{% endfor %}}"
    + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    # The same, and the generation prompt holds the empty think block unless thinking is asked for: Qwen3.5.
    "qwen3.5": _LAST_USER
    + _LOOP
    + "{% if message.role == 'assistant' %}"
    + _REASONING
    + "<|im_start|>assistant\n{% if loop.index0 > ns.user %}<think>\n"
    + "{% if not reasoning and not enable_thinking %}\n</think>\n\n{% endif %}"
    + f"{_MARK}{{% if reasoning or enable_thinking %}}{{{{ reasoning }}}}\n</think>\n\n{{% endif %}}"
    + f"{{{{ content }}}}{_CALLS}<|im_end|>\n{_END}"
    + f"{{% else %}}{_MARK}{{{{ content }}}}{_CALLS}<|im_end|>\n{_END}{{% endif %}}"
    + f"{{% else %}}{_CHATML}{{% endif %}}{{% endfor %}}"
    + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% if not enable_thinking %}\n</think>\n\n{% endif %}"
    + "{% endif %}",
    # History holds an empty think block, and the generation prompt opens one: Nemotron 3.
    "nemotron": _LOOP
    + "{% if message.role == 'assistant' %}"
    + _REASONING
    + f"<|im_start|>assistant\n<think>{_MARK}{{% if reasoning and loop.last %}}\n{{{{ reasoning }}}}\n{{% endif %}}</think>"
    + f"{{{{ content | trim }}}}{_CALLS}<|im_end|>\n{_END}{{% else %}}{_CHATML}{{% endif %}}{{% endfor %}}"
    + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
    # Channels; reasoning and another end token for the last turn alone: gpt-oss.
    "channels": "<|start|>system<|message|>Today is {{ strftime_now('%Y-%m-%d') }}.<|end|>"
    + _LOOP
    + f"<|start|>{{% if message.role == 'assistant' %}}assistant{_MARK}"
    + "{% if message.tool_calls %} to={{ message.tool_calls[0].function.name }}<|channel|>commentary<|message|>"
    + "{{ message.tool_calls[0].function.arguments | tojson }}<|call|>"
    + "{% elif loop.last and not add_generation_prompt %}{% if message.thinking %}<|channel|>analysis<|message|>"
    + "{{ message.thinking }}<|end|><|start|>assistant{% endif %}<|channel|>final<|message|>{{ message.content }}<|return|>"
    + f"{{% else %}}<|channel|>final<|message|>{{{{ message.content }}}}<|end|>{{% endif %}}{_END}"
    + "{% else %}{{ message.role }}<|message|>{{ message.content }}<|end|>{% endif %}{% endfor %}"
    + "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
    # The system prompt in the first user turn, strict roles, no generation prompt: Llama 2, Mistral.
    "inst": "{% if messages[0].role == 'system' %}{% set system = messages[0].content ~ '\n\n' %}{% set rest = messages[1:] %}"
    + "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for message in rest %}"
    + "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    + "{% if message.role == 'user' %}[INST]{% if loop.first %}{{ system }}{% endif %}{{ message.content }}[/INST]"
    + f"{{% else %}}{_MARK} {{{{ message.content | trim }}}}{{{{ eos_token }}}}{_END}{{% endif %}}{{% endfor %}}",
    # Tools before the last user turn alone: Mistral of version 3.
    "tools late": _LAST_USER
    + "{{ bos_token }}"
    + _LOOP
    + "{% if message.role == 'assistant' %}"
    + f"{_MARK}{{{{ message.content or '' }}}}{_CALLS}{{{{ eos_token }}}}{_END}"
    + "{% elif message.role == 'tool' %}[RESULT]{{ message.content }}[/RESULT]"
    + "{% else %}{% if tools and loop.index0 == ns.user %}[TOOLS]{{ tools | tojson }}[/TOOLS]{% endif %}"
    + "[INST]{{ message.content }}[/INST]{% endif %}{% endfor %}",
}

SPECIAL = sorted(
    {token for text in MARKED.values() for token in re.findall(r"<\|[^|{}]+\|>|\[/?[A-Z]+\]|</?think>", text)}
    - {"<|im_start|>", "<|im_end|>"}
)


def plain(marked: str) -> str:
    return marked.replace(_MARK, "").replace(_END, "")
