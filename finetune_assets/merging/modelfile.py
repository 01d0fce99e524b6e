"""The Ollama Modelfile of an exported model: its prompt as in training, where an answer stops, and greedy decoding.

Ollama writes prompts with a Go template. Its variables are `.System`, `.Prompt` and `.Response`; for a conversation of
several turns the template is rendered once for each pair of user and assistant turn.
"""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from finetune_assets.config.schema import ExperimentConfig, PromptTemplate
from finetune_assets.merging.gguf_tokenizer import ExportError

NAME = "Modelfile"
ADVICE = "set merge.modelfile to false, and use `llama-server --jinja`, which applies the chat template of the file"
SYSTEM, FIRST, ANSWER, SECOND = "\ue000system\ue000", "\ue001first\ue001", "\ue002answer\ue002", "\ue003second\ue003"
"""Placeholders of turns, which no template contains."""


@dataclass(frozen=True)
class Template:
    """A Go template for Ollama.

    Attributes:
        text: The template.
        system: The system message that a chat template adds to conversations without one; empty if it adds none.
    """

    text: str
    system: str = ""


def modelfile(file: str, template: Template, stops: list[str]) -> str:
    """The content of a Modelfile.

    Args:
        file: Name of the GGUF file beside it.
        template: The template.
        stops: Texts that end an answer.
    """
    lines = [f"FROM ./{file}", f"TEMPLATE {_quoted(template.text)}"]
    lines += [f"SYSTEM {_quoted(template.system)}"] if template.system else []
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops]
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1"]
    return "\n".join(lines) + "\n"


def template_of(config: ExperimentConfig, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The experiment's prompt as a Go template.

    Raises:
        ExportError: if a Go template cannot express it.
    """
    template = config.data.prompt_template
    return _of_chat(tokenizer) if template.chat_template else _of_prompts(template)


def _of_prompts(template: PromptTemplate) -> Template:
    """The two prompts: a system message is the row's context.

    Spaces at the end are left out. In training they belong to the first token of the answer.
    """
    both, one = (_filled(text) for text in (template.prompt_input, template.prompt_no_input))
    text = one if both == one else f"{{{{ if .System }}}}{both}{{{{ else }}}}{one}{{{{ end }}}}"
    return Template(text + "{{ .Response }}")


def _filled(prompt: str) -> str:
    filled = prompt.format(instruction=FIRST, context=SYSTEM).rstrip(" ")
    return _escaped(filled).replace(FIRST, "{{ .Prompt }}").replace(SYSTEM, "{{ .System }}")


def _of_chat(tokenizer: PreTrainedTokenizerBase) -> Template:
    """The wrappers of turns in a chat template, if it writes the same ones around every turn of a role."""
    user, assistant, again = (
        {"role": "user", "content": FIRST},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": SECOND},
    )
    system = {"role": "system", "content": SYSTEM}
    two = _rendered(tokenizer, [user, assistant, again], prompt=True)
    begin, user_end, answer_end, prompt = _pieces(two, (FIRST, ANSWER, SECOND))
    if not prompt or user_end != prompt:
        raise _refused("it writes other text before the first answer than before the last one")
    with_system = _with_system(tokenizer, [system, user, assistant, again])
    bos = tokenizer.bos_token or ""
    start = begin.removeprefix(bos)
    if with_system is None:  # no system message at all
        head, added = start, ""
        turn = f"{_escaped(head)}{{{{ .Prompt }}}}"
    else:
        before, after, *rest = with_system
        if rest != [user_end, answer_end, prompt]:
            raise _refused("a system message changes other turns")
        before = before.removeprefix(bos)
        user_start = _common_end(after, start, answer_end)
        head, added = after.removesuffix(user_start), start.removesuffix(user_start)
        if added:
            if not (added.startswith(before) and added.endswith(head)):
                raise _refused("its default system message has another form than a given one")
            added = added.removeprefix(before).removesuffix(head)
        opening = f"{{{{ if .System }}}}{_escaped(before)}{{{{ .System }}}}{_escaped(head)}{{{{ end }}}}"
        turn = f"{opening}{_escaped(user_start)}{{{{ .Prompt }}}}"
        start = user_start
    if not answer_end.endswith(start):
        raise _refused("the second turn of the user begins otherwise than the first")
    end = answer_end.removesuffix(start)
    return Template(f"{turn}{_escaped(user_end)}{{{{ .Response }}}}{_escaped(end)}", added)


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], prompt: bool) -> str:
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt))


def _with_system(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]]) -> list[str] | None:
    """Pieces of a conversation with a system message; None if the chat template refuses or omits it."""
    try:
        text = _rendered(tokenizer, turns, prompt=True)
    except Exception:  # a template raises whatever it wants
        return None
    return _pieces(text, (SYSTEM, FIRST, ANSWER, SECOND)) if SYSTEM in text else None


def _pieces(text: str, values: tuple[str, ...]) -> list[str]:
    """The text around values, each of which must occur once, in this order."""
    pieces = []
    for value in values:
        piece, found, text = text.partition(value)
        if not found or value in text:
            raise _refused("it omits, repeats or reorders turns")
        pieces.append(piece)
    return [*pieces, text]


def _common_end(*texts: str) -> str:
    """The longest common end of texts."""
    shortest = min(texts, key=len)
    return next(
        (shortest[at:] for at in range(len(shortest)) if all(text.endswith(shortest[at:]) for text in texts)), ""
    )


def _refused(reason: str) -> ExportError:
    return ExportError(f"the tokenizer's chat template cannot be written as an Ollama template: {reason}; {ADVICE}")


def _escaped(text: str) -> str:
    """Literal text in a Go template."""
    return text.replace("{", '{{ "{" }}')


def _quoted(text: str) -> str:
    if '"""' in text:
        raise ExportError(f"a Modelfile cannot contain three quotation marks in a row, as the prompt does; {ADVICE}")
    return f'"""{text}"""'
