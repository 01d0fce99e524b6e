"""Chat templates in the manner of well-known families, each beside the same thing written by hand in Python.

The Python side writes the text piece by piece and notes where the assistant speaks, so it knows the spans without ever
looking for anything.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from finetune_assets.data.rows import Turn

Spans = list[tuple[int, int]]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{{ '\\n' }}{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
INST = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token }}[INST] "
    "{% if loop.first and system %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n{% endif %}{{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
TURNS = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') "
    "if '</think>' in m.content else '' %}"
    "<|im_start|>assistant\n{% if loop.index0 > ns.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ said }}"
    "<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chatml(turns: list[Turn], newline_learned: bool = True) -> tuple[str, Spans]:
    text, spans = "", []
    for turn in turns:
        text += f"<|im_start|>{turn['role']}\n"
        start = len(text)
        text += turn["content"] + "<|im_end|>"
        end = len(text)
        text += "\n"
        if turn["role"] == "assistant":
            spans.append((start, end + newline_learned))
    return text, spans


def marked(turns: list[Turn]) -> tuple[str, Spans]:
    return chatml(turns, newline_learned=False)


def headers(turns: list[Turn]) -> tuple[str, Spans]:
    text, spans = "<s>", []
    for turn in turns:
        text += f"<|head|>{turn['role']}<|/head|>\n\n"
        start = len(text)
        text += turn["content"].strip() + "<|eot|>"
        if turn["role"] == "assistant":
            spans.append((start, len(text)))
    return text, spans


def inst(turns: list[Turn]) -> tuple[str, Spans]:
    system = turns[0]["content"] if turns[0]["role"] == "system" else ""
    text, spans = "", []
    for i, turn in enumerate(turns[1:] if system else turns):
        if turn["role"] == "user":
            head = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if i == 0 and system else ""
            text += f"<s>[INST] {head}{turn['content'].strip()} [/INST]"
        else:
            text += " "
            start = len(text)
            text += turn["content"].strip() + " </s>"
            spans.append((start, len(text)))
    return text, spans


def turned(turns: list[Turn]) -> tuple[str, Spans]:
    text, spans = "<s>", []
    for turn in turns:
        text += f"<start_of_turn>{'model' if turn['role'] == 'assistant' else turn['role']}\n"
        start = len(text)
        text += turn["content"].strip() + "<end_of_turn>\n"
        if turn["role"] == "assistant":
            spans.append((start, len(text)))
    return text, spans


@dataclass(frozen=True)
class Family:
    """A chat template and its twin in Python."""

    template: str
    by_hand: Callable[[list[Turn]], tuple[str, Spans]]
    system: bool = True


FAMILIES = {
    "chatml": Family(CHATML, chatml),
    "generation marks": Family(MARKED, marked),
    "headers, trimmed": Family(HEADERS, headers),
    "[INST], system inside the first turn": Family(INST, inst),
    "model turns, no system": Family(TURNS, turned, system=False),
}
HARD = [
    *("a", "d", "end", "assistant", "user", "\n", "model", "I", " x ", "\n\nx\n", "é", "e\u0301", "😀", "☕ ", "…"),
    *(
        "<|im_end|>",
        "<|im_start|>assistant\n",
        "[INST]",
        "[/INST] ",
        "</s>",
        "<s>",
        "<|eot|>",
        "<end_of_turn>",
        "im_end",
    ),
    *(
        "{{ m.content }}",
        "{% generation %}",
        "### Response:",
        "\ue000",
        "0\ue001",
        "  two  spaces  ",
        "tab\there",
        "\r\n",
    ),
]


def conversations(count: int, seed: int, system: bool = True) -> list[list[Turn]]:
    """Conversations of one to four exchanges, of ordinary words and of words that look like a template's own."""
    rng = random.Random(seed)
    words = ["Kelm", "river", "the", "Why?", "because", "of", "12", "it.", "And", "so", "on,"]

    def said() -> str:
        text = "".join(
            rng.choice(HARD) if rng.random() < 0.3 else rng.choice(words) + " " for _ in range(rng.randint(1, 12))
        )
        return text if text.strip() else "x"

    made = []
    for _ in range(count):
        turns = [{"role": "system", "content": said()}] if system and rng.random() < 0.4 else []
        for _ in range(rng.randint(1, 4)):
            turns += [{"role": "user", "content": said()}, {"role": "assistant", "content": said()}]
        made.append(turns)
    return made
