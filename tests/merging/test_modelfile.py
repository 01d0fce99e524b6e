"""The template of a Modelfile, rendered as Ollama does, is the prompt of the training."""

import json
import re
from typing import Any

import pytest
from training.conftest import BASE, configured

from finetune_assets.data.tokenization import load_tokenizer
from finetune_assets.merging.gguf_tokenizer import ExportError
from finetune_assets.merging.modelfile import Template, modelfile, template_of

USER, ANSWER, AGAIN = (
    {"role": "user", "content": "What?"},
    {"role": "assistant", "content": "That."},
    {"role": "user", "content": "Why {x}?"},
)
SYSTEM = {"role": "system", "content": "Be brief."}
CHATS = {"one turn": [USER], "two turns": [USER, ANSWER, AGAIN], "system": [SYSTEM, USER, ANSWER, AGAIN]}
CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' and DEFAULT %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML.replace("DEFAULT", "false"),
    "chatml with a default system message": CHATML.replace("DEFAULT", "true"),
    "llama 3": "{{ bos_token }}{% for m in messages %}"
    "{{ '<|h|>' + m.role + '<|e|>\n\n' + m.content + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|h|>assistant<|e|>\n\n' }}{% endif %}",
    "without system messages": "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no') }}"
    "{% elif m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ m.content + '</s>' }}{% endif %}"
    "{% endfor %}",
    "braces": "{% for m in messages %}{{ '{{' + m.role + '}{' + m.content + '}' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '{{assistant}{' }}{% endif %}",
}


def ollama(template: Template, messages: list[dict[str, str]]) -> str:
    """What Ollama writes: the template once for each pair of turns, the last time up to the answer."""
    if template.system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": template.system}, *messages]
    text, values = "", {"System": "", "Prompt": "", "Response": ""}
    for message in messages:
        name = {"system": "System", "user": "Prompt", "assistant": "Response"}[message["role"]]
        if name == "Prompt" and values["Response"]:
            text += _executed(template.text, values)
            values = dict.fromkeys(values, "")
        values[name] = message["content"]
    return text + _executed(template.text.partition("{{ .Response }}")[0], values)


def _executed(text: str, values: dict[str, str]) -> str:
    """A Go template with one condition at most."""
    condition = r"\{\{ if \.System \}\}(.*?)(?:\{\{ else \}\}(.*?))?\{\{ end \}\}"
    text = re.sub(condition, lambda part: (part[1] if values["System"] else part[2]) or "", text, flags=re.DOTALL)

    def action(part: re.Match[str]) -> str:
        return values[part[1]] if part[1] else json.loads(part[2])

    return re.sub(r"\{\{ (?:\.(\w+)|(\".*?\")) \}\}", action, text)


@pytest.mark.parametrize(
    ("name", "chat"),
    [(name, chat) for name in TEMPLATES for chat in CHATS if (name, chat) != ("without system messages", "system")],
)
def test_a_chat_template_as_ollama_renders_it(name: str, chat: str) -> None:
    tokenizer = load_tokenizer(str(BASE))
    tokenizer.chat_template = TEMPLATES[name]
    template = template_of(configured("data.prompt_template.chat_template=true"), tokenizer)
    expected = tokenizer.apply_chat_template(CHATS[chat], tokenize=False, add_generation_prompt=True)
    assert ollama(template, CHATS[chat]) == str(expected).removeprefix("<s>"), template


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ loop.index }}{{ m.role }}{{ m.content }}{% endfor %}>", "second turn|first answer"),
        ("{% for m in messages %}{{ '> ' if m.role == 'user' else '. ' }}{{ m.content }}{% endfor %}.", "first answer"),
        ("{{ messages[-1].content }}", "omits"),
        ("{% for m in messages %}{{ m.role }}{{ m.content }}{{ m.content }}{% endfor %}", "repeats"),
    ],
)
def test_other_chat_templates_are_refused(template: str, reason: str) -> None:
    tokenizer = load_tokenizer(str(BASE))
    tokenizer.chat_template = template
    with pytest.raises(ExportError, match=rf"Ollama template: .*({reason}).*merge\.modelfile"):
        template_of(configured("data.prompt_template.chat_template=true"), tokenizer)


def _prompts(*settings: str) -> Any:
    return template_of(configured(*settings), load_tokenizer(str(BASE)))


def test_prompts_without_their_last_space() -> None:
    template = _prompts()
    assert ollama(template, [USER]) == "### Instruction: What?\n### Response:"
    assert (
        ollama(template, [{"role": "system", "content": "Facts."}, USER])
        == "### Instruction: What?\n### Input: Facts.\n### Response:"
    )


def test_the_file() -> None:
    text = modelfile("model-q8_0.gguf", Template("{{ .Prompt }}\n{{ .Response }}", "You help."), ["</s>", "<|im_end|>"])
    assert text == (
        'FROM ./model-q8_0.gguf\nTEMPLATE """{{ .Prompt }}\n{{ .Response }}"""\nSYSTEM """You help."""\n'
        'PARAMETER stop """</s>"""\nPARAMETER stop """<|im_end|>"""\nPARAMETER temperature 0\n'
        "PARAMETER repeat_penalty 1\n"
    )


def test_quotation_marks_that_end_a_value_are_refused() -> None:
    template = _prompts('data.prompt_template.prompt_no_input=\'"""{instruction}### Response:\'')
    with pytest.raises(ExportError, match=r"merge\.modelfile"):
        modelfile("model.gguf", template, [])
