"""Pre-tokenizers of byte-level BPE tokenizers that llama.cpp splits text with exactly as `tokenizers` does.

A GGUF file does not contain the pre-tokenizer; it names one (`tokenizer.ggml.pre`) that is compiled into llama.cpp. A
name that does not fit splits numbers or punctuation differently, so that the model reads other tokens than it was
trained with, and nothing reports it. Names whose regular expression in llama.cpp only approximates the original
(such as `tekken` and `gpt-4o`) are left out.
"""

from dataclasses import dataclass
from typing import Any

_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class PreTokenizer:
    """How text is split before merges are applied.

    Attributes:
        name: Value of `tokenizer.ggml.pre` to write.
        aliases: Other values that llama.cpp treats alike.
        steps: Steps before the bytes are mapped to characters, in the format of tokenizer.json.
        splits: Whether the last step (`ByteLevel`) also splits, with the regular expression of GPT-2.
        ignores_merges: Whether a word that is a token remains whole, even if merges do not produce it.
        adds_bos: Whether a file without `tokenizer.ggml.add_bos_token` means that a text begins with the BOS token.
    """

    name: str
    aliases: tuple[str, ...] = ()
    steps: tuple[dict[str, Any], ...] = ()
    splits: bool = False
    ignores_merges: bool = False
    adds_bos: bool = False

    def to_json(self) -> dict[str, Any]:
        """The `pre_tokenizer` of tokenizer.json."""
        last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": self.splits}
        return {"type": "Sequence", "pretokenizers": [*self.steps, last]} if self.steps else last


def _split(digits: str) -> dict[str, Any]:
    pattern = {"Regex": _ENGLISH + digits + _REST}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


PRE_TOKENIZERS = (
    PreTokenizer("gpt-2", ("phi-2",), splits=True),
    PreTokenizer(
        "smollm",
        ("starcoder", "refact", "command-r", "codeshell"),
        ({"type": "Digits", "individual_digits": True},),
        splits=True,
    ),
    PreTokenizer("qwen2", ("deepseek-r1-qwen", "kormo", "f2llmv2"), (_split(r"\p{N}"),)),
    PreTokenizer("llama-bpe", ("llama3", "llama-v3"), (_split(r"\p{N}{1,3}"),), ignores_merges=True, adds_bos=True),
)


def named(name: str) -> PreTokenizer | None:
    """The pre-tokenizer with this value of `tokenizer.ggml.pre`, or None."""
    return next((each for each in PRE_TOKENIZERS if name in (each.name, *each.aliases)), None)


def of_json(pre_tokenizer: Any, ignores_merges: bool) -> PreTokenizer | None:
    """The pre-tokenizer with this `pre_tokenizer` in tokenizer.json, or None."""
    wanted = _comparable(pre_tokenizer)
    fitting = (each for each in PRE_TOKENIZERS if _comparable(each.to_json()) == wanted)
    return next((each for each in fitting if each.ignores_merges == ignores_merges), None)


def _comparable(step: Any) -> Any:
    """The steps without `trim_offsets`, which does not change tokens, and without a sequence of one."""
    if not isinstance(step, dict):
        return step
    steps = step["pretokenizers"] if step.get("type") == "Sequence" else [step]
    return [{key: value for key, value in each.items() if key != "trim_offsets"} for each in steps]
