"""Chat templates with tools and reasoning in the manner of well-known families, each beside the same in plain Python.

As in `chats`, the Python side writes the text piece by piece and notes where the assistant speaks. It shares nothing
with the code under test.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetune_assets.data.rows import Turn

Tools = list[dict[str, Any]] | None
CALLS_IN_TAGS = (
    "{% macro calls(m) %}{% for c in m.tool_calls or [] %}{% if not loop.first or m.content %}{{ '\\n' }}{% endif %}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}{% endmacro %}"
)
TOOLS_IN_SYSTEM = (
    "{% set first = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% if tools %}<|im_start|>system\n{{ first + '\\n\\n' if first else '' }}# Tools\n<tools>"
    "{% for t in tools %}{{ '\\n' ~ (t | tojson) }}{% endfor %}{{ '\\n' }}</tools><|im_end|>\n"
    "{% elif first %}<|im_start|>system\n{{ first }}<|im_end|>\n{% endif %}"
)
RESULTS_AS_USER = (
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\\n' }}<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
)
QWEN25 = (
    CALLS_IN_TAGS + TOOLS_IN_SYSTEM + "{% for m in messages %}"
    "{% if m.role == 'assistant' %}<|im_start|>assistant\n{{ m.content }}{{ calls(m) }}<|im_end|>\n"
    "{% elif m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'tool' %}" + RESULTS_AS_USER + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3 = (
    CALLS_IN_TAGS + TOOLS_IN_SYSTEM + "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% set thought = m.reasoning_content if m.reasoning_content is string else '' %}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}<think>\n{{ thought.strip('\\n') }}\n</think>\n\n"
    "{{ m.content.lstrip('\\n') }}{% else %}{{ m.content }}{% endif %}{{ calls(m) }}<|im_end|>\n"
    "{% elif m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'tool' %}" + RESULTS_AS_USER + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content | trim %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "<|head|>system<|/head|>\n\nToday: {{ strftime_now('%d %b %Y') }}\n\n{{ first }}<|eot|>"
    "{% for m in rest %}"
    "{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call only') }}{% endif %}"
    '<|head|>assistant<|/head|>\n\n{"name": "{{ m.tool_calls[0].function.name }}", "parameters": '
    "{{ m.tool_calls[0].function.arguments | tojson }}}<|eot|>"
    "{% elif m.role == 'tool' %}<|head|>ipython<|/head|>\n\n{{ m.content }}<|eot|>"
    "{% else %}<|head|>{{ m.role }}<|/head|>\n\n"
    "{% if loop.first and tools %}Functions:\n{% for t in tools %}{{ t | tojson(indent=4) }}\n\n{% endfor %}{% endif %}"
    "{{ m.content | trim }}<|eot|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and loop.index0 == ns.last %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST] {{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' and m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
    "{% if c.id is not defined or c.id | length != 9 %}{{ raise_exception('ids must have 9 characters') }}{% endif %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}'
    "{{ ', ' if not loop.last else ']' }}{% endfor %}{{ eos_token }}"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}"
    '{% elif m.role == \'tool\' %}[TOOL_RESULTS] {"content": {{ m.content }}, "call_id": "{{ m.tool_call_id }}"}'
    "[/TOOL_RESULTS]{% else %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role not in ('user', 'assistant') %}{{ raise_exception('no role ' + m.role) }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI = (
    "{% for m in messages %}{% if m.role == 'system' %}<|system|>{{ m.content }}"
    "{% if tools %}<|tool|>{{ tools | tojson }}<|/tool|>{% endif %}<|end|>"
    "{% elif m.role == 'tool' %}<|tool_response|>{{ m.content }}<|end|>"
    "{% else %}{% if loop.first and tools %}<|system|><|tool|>{{ tools | tojson }}<|/tool|><|end|>{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}{% if m.tool_calls %}<|tool_call|>[{% for c in m.tool_calls %}"
    "{{ c.function | tojson }}{{ ', ' if not loop.last }}{% endfor %}]<|/tool_call|>{% endif %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
)
DEEPSEEK = (
    "{% set ns = namespace(after_tool=false) %}{{ bos_token }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.after_tool = false %}<|User|>{{ m.content }}"
    "{% elif m.role == 'assistant' and m.content is none %}{% if not ns.after_tool %}<|Assistant|>{% endif %}"
    "<|calls|>{% for c in m.tool_calls %}<|call|>function<|sep|>{{ c.function.name }}"
    "{{ '\\n```json\\n' + c.function.arguments + '\\n```' }}<|/call|>{% endfor %}<|/calls|></s>"
    "{% elif m.role == 'assistant' %}{% if not ns.after_tool %}<|Assistant|>{% endif %}{% set ns.after_tool = false %}"
    "{% if loop.last and m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1] }}</s>"
    "{% elif m.role == 'tool' %}{% set ns.after_tool = true %}<|output|>{{ m.content }}<|/output|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt and not ns.after_tool %}<|Assistant|><think>\n{% endif %}"
)
SMOLLM = (
    "{% if messages[0].role != 'system' or tools %}<|im_start|>system\n"
    "{{ messages[0].content if messages[0].role == 'system' else 'You are helpful.' }}"
    "{% if tools %}{{ '\\n' }}<tools>{{ tools | tojson }}</tools>{% endif %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}"
    "{% if m.reasoning_content and loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n{% endif %}{{ m.content }}"
    '{% if m.tool_calls %}<tool_call>[{% for c in m.tool_calls %}{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}{{ ', ' if not loop.last }}{% endfor %}]</tool_call>{% endif %}"
    "{% endgeneration %}<|im_end|>\n"
    "{% elif m.role != 'system' or not tools %}<|im_start|>{{ m.role }}{{ ' ' + m.name if m.name }}\n{{ m.content }}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL_TOKENS = [
    *("<|im_start|>", "<|im_end|>", "<|eot|>", "<|head|>", "<|/head|>", "<start_of_turn>", "<end_of_turn>"),
    *("<tool_call>", "</tool_call>", "<think>", "</think>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]"),
    *("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|tool_call|>", "<|/tool_call|>", "<|tool_response|>"),
    *("<|User|>", "<|Assistant|>", "<|calls|>", "<|call|>", "<|sep|>", "<|/call|>", "<|/calls|>", "<|output|>"),
]


def dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def arguments(call: dict[str, Any]) -> str:
    return dumped(call["function"]["arguments"])


class Writer:
    """A text that notes spans of learned text."""

    def __init__(self, text: str = "") -> None:
        self.text, self.spans, self.begun = text, list[tuple[int, int]](), 0

    def add(self, text: str) -> "Writer":
        self.text += text
        return self

    def begin(self) -> "Writer":
        self.begun = len(self.text)
        return self

    def end(self, turn: Turn) -> None:
        if turn.get("weight") != 0:
            self.spans.append((self.begun, len(self.text)))


def calls_of(turn: Turn) -> list[dict[str, Any]]:
    return json.loads(turn.get("tool_calls") or "[]")


def in_tags(turn: Turn) -> str:
    blocks = [
        f'<tool_call>\n{{"name": "{call["function"]["name"]}", "arguments": {arguments(call)}}}\n</tool_call>'
        for call in calls_of(turn)
    ]
    return ("\n" if turn["content"] and blocks else "") + "\n".join(blocks)


def qwen(turns: list[Turn], tools: Tools, thinks: bool) -> Writer:
    out = Writer()
    system = turns[0]["content"] if turns[0]["role"] == "system" else ""
    if tools:
        lines, shown = "".join("\n" + dumped(tool) for tool in tools), f"{system}\n\n" if system else ""
        out.add(f"<|im_start|>system\n{shown}# Tools\n<tools>{lines}\n</tools><|im_end|>\n")
    elif system:
        out.add(f"<|im_start|>system\n{system}<|im_end|>\n")
    asked = max(i for i, turn in enumerate(turns) if turn["role"] == "user")
    for i, turn in enumerate(turns):
        if turn["role"] == "user":
            out.add(f"<|im_start|>user\n{turn['content']}<|im_end|>\n")
        elif turn["role"] == "tool":
            out.add("<|im_start|>user" if turns[i - 1]["role"] != "tool" else "")
            out.add(f"\n<tool_response>\n{turn['content']}\n</tool_response>")
            out.add("" if i + 1 < len(turns) and turns[i + 1]["role"] == "tool" else "<|im_end|>\n")
        elif turn["role"] == "assistant":
            out.add("<|im_start|>assistant\n").begin()
            thought = (turn.get("reasoning_content") or "").strip("\n")
            content = turn["content"]
            if thinks and i > asked and (thought or i == len(turns) - 1):
                out.add(f"<think>\n{thought}\n</think>\n\n")
                content = content.lstrip("\n")
                if not thought and not calls_of(turn):
                    out.begin()  # the empty reasoning before a plain answer is the template's
            out.add(content + in_tags(turn) + "<|im_end|>\n").end(turn)
    return out


def llama3(turns: list[Turn], tools: Tools) -> Writer:
    system = turns[0]["content"].strip() if turns[0]["role"] == "system" else ""
    out = Writer(f"<s><|head|>system<|/head|>\n\nToday: 26 Jul 2024\n\n{system}<|eot|>")
    for i, turn in enumerate(turns[1:] if system else turns):
        if calls_of(turn):
            (call,) = calls_of(turn)
            out.add("<|head|>assistant<|/head|>\n\n").begin()
            out.add(f'{{"name": "{call["function"]["name"]}", "parameters": {arguments(call)}}}<|eot|>').end(turn)
        elif turn["role"] == "tool":
            out.add(f"<|head|>ipython<|/head|>\n\n{turn['content']}<|eot|>")
        else:
            out.add(f"<|head|>{turn['role']}<|/head|>\n\n")
            if i == 0 and tools:
                defined = (json.dumps(tool, ensure_ascii=False, indent=4) + "\n\n" for tool in tools)
                out.add("Functions:\n" + "".join(defined))
            out.begin().add(turn["content"].strip() + "<|eot|>")
            if turn["role"] == "assistant":
                out.end(turn)
    return out


def mistral(turns: list[Turn], tools: Tools) -> Writer:
    out = Writer("<s>")
    asked = max(i for i, turn in enumerate(turns) if turn["role"] == "user")
    for i, turn in enumerate(turns):
        if turn["role"] == "user":
            out.add(f"[AVAILABLE_TOOLS] {dumped(tools)}[/AVAILABLE_TOOLS]" if tools and i == asked else "")
            out.add(f"[INST] {turn['content']}[/INST]")
        elif turn["role"] == "tool":
            out.add(
                f'[TOOL_RESULTS] {{"content": {turn["content"]}, "call_id": "{turn["tool_call_id"]}"}}[/TOOL_RESULTS]'
            )
        elif calls_of(turn):
            written = ", ".join(
                f'{{"name": "{call["function"]["name"]}", "arguments": {arguments(call)}, "id": "{call["id"]}"}}'
                for call in calls_of(turn)
            )
            out.begin().add(f"[TOOL_CALLS] [{written}]</s>").end(turn)
        else:
            out.add(" ").begin().add(turn["content"].strip() + "</s>").end(turn)
    return out


def gemma(turns: list[Turn], tools: Tools) -> Writer:
    out = Writer("<s>")
    for turn in turns:
        out.add(f"<start_of_turn>{'model' if turn['role'] == 'assistant' else turn['role']}\n").begin()
        out.add(turn["content"].strip() + "<end_of_turn>\n")
        if turn["role"] == "assistant":
            out.end(turn)
    return out


def phi(turns: list[Turn], tools: Tools) -> Writer:
    out, defined = Writer(), f"<|tool|>{dumped(tools)}<|/tool|>" if tools else ""
    for i, turn in enumerate(turns):
        if turn["role"] == "system":
            out.add(f"<|system|>{turn['content']}{defined}<|end|>")
        elif turn["role"] == "tool":
            out.add(f"<|tool_response|>{turn['content']}<|end|>")
        else:
            out.add(f"<|system|>{defined}<|end|>" if i == 0 and tools else "")
            out.add(f"<|{turn['role']}|>").begin().add(turn["content"])
            if calls_of(turn):
                functions = ", ".join(dumped(call["function"]) for call in calls_of(turn))
                out.add(f"<|tool_call|>[{functions}]<|/tool_call|>")
            out.add("<|end|>" + ("</s>" if i == len(turns) - 1 else ""))
            if turn["role"] == "assistant":
                out.end(turn)
    return out


def deepseek(turns: list[Turn], tools: Tools) -> Writer:
    out = Writer("<s>" + (turns[0]["content"] if turns[0]["role"] == "system" else ""))
    for i, turn in enumerate(turns):
        if turn["role"] == "user":
            out.add(f"<|User|>{turn['content']}")
        elif turn["role"] == "tool":
            out.add(f"<|output|>{turn['content']}<|/output|>")
        elif turn["role"] == "assistant":
            out.add("" if turns[i - 1]["role"] == "tool" else "<|Assistant|>").begin()
            if calls_of(turn):
                blocks = (
                    f"<|call|>function<|sep|>{call['function']['name']}\n```json\n{arguments(call)}\n```<|/call|>"
                    for call in calls_of(turn)
                )
                out.add(f"<|calls|>{''.join(blocks)}<|/calls|></s>").end(turn)
                continue
            if i == len(turns) - 1 and turn.get("reasoning_content"):
                out.add("<think>\n")
                if turns[i - 1]["role"] != "tool":
                    out.begin()  # the generation prompt writes it
                out.add(f"{turn['reasoning_content']}\n</think>\n\n")
            out.add(turn["content"] + "</s>").end(turn)
    return out


def smollm(turns: list[Turn], tools: Tools) -> Writer:
    out, system = Writer(), turns[0]["content"] if turns[0]["role"] == "system" else ""
    if not system or tools:
        out.add(f"<|im_start|>system\n{system or 'You are helpful.'}")
        out.add(f"\n<tools>{dumped(tools)}</tools>" if tools else "").add("<|im_end|>\n")
    for i, turn in enumerate(turns):
        if turn["role"] == "assistant":
            out.add("<|im_start|>assistant\n").begin()
            if turn.get("reasoning_content") and i == len(turns) - 1:
                out.add(f"<think>\n{turn['reasoning_content']}\n</think>\n")
            out.add(turn["content"])
            if calls_of(turn):
                written = ", ".join(
                    f'{{"name": "{call["function"]["name"]}", "arguments": {arguments(call)}}}'
                    for call in calls_of(turn)
                )
                out.add(f"<tool_call>[{written}]</tool_call>")
            out.add("<|im_end|>\n").end(turn)
        elif turn["role"] != "system" or not tools:
            name = f" {turn['name']}" if turn.get("name") else ""
            out.add(f"<|im_start|>{turn['role']}{name}\n{turn['content']}<|im_end|>\n")
    return out


@dataclass(frozen=True)
class ToolFamily:
    """A chat template, its twin in Python, and what the template can represent.

    Attributes:
        calls: Maximum number of calls of a turn; 0 if there are no tools.
        defines: Whether tool definitions are written.
        speaks: Whether a turn may have content beside its calls.
    """

    template: str
    by_hand: Callable[[list[Turn], Tools], Writer]
    calls: int = 2
    defines: bool = True
    speaks: bool = True
    reasons: bool = False
    system: bool = True


TOOL_FAMILIES = {
    "Llama 3": ToolFamily(LLAMA3, llama3, calls=1, speaks=False),
    "Qwen 2.5": ToolFamily(QWEN25, lambda turns, tools: qwen(turns, tools, False)),
    "Qwen 3": ToolFamily(QWEN3, lambda turns, tools: qwen(turns, tools, True), reasons=True),
    "Mistral": ToolFamily(MISTRAL, mistral, speaks=False, system=False),
    "Gemma": ToolFamily(GEMMA, gemma, calls=0, defines=False, system=False),
    "Phi": ToolFamily(PHI, phi),
    "DeepSeek": ToolFamily(DEEPSEEK, deepseek, defines=False, speaks=False, reasons=True),
    "SmolLM": ToolFamily(SMOLLM, smollm, reasons=True),
}
