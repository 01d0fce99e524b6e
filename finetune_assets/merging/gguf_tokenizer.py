"""The tokenizer of a merged model, as a GGUF file contains it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from finetune_assets.errors import UserError
from finetune_assets.sources.gguf.header import read_header
from finetune_assets.sources.gguf.pre_tokenizers import PRE_TOKENIZERS, of_json
from finetune_assets.sources.gguf.tokenizer import CONTROL, NORMAL, SPECIAL, UNUSED, USER_DEFINED, build_tokenizer

ADVICE = "remove merge.gguf, or use another base model"
NEUTRAL = {
    "dropout": (None,),
    "unk_token": (None,),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (False,),
}
"""Settings of a BPE model, with the values that llama.cpp's has."""
PROBE = (
    "\n \n\n \t\t \n  \n    \U0001f680 (normal) \U0001f636\u200d\U0001f32b\ufe0f ✅ 3 33 333 3333 33333 3.3 3..3 "
    "កាន់ ?我想在apple工作1314151天～ "
    "------======= нещо '''```\"\"\"......!!!???? I've been 'sold he's there, 'RE you SURE? 'M not, a'lL x_y"
)
"""Digits, contractions, scripts and white space on which pre-tokenizers differ; after the probe of llama.cpp."""


class ExportError(UserError):
    """A merged model that cannot be exported, or whose export is not equal to it."""


@dataclass(frozen=True)
class TokenizerValues:
    """The tokenizer in a GGUF file.

    Attributes:
        pre_tokenizer: Name of the pre-tokenizer.
        tokens: All tokens, in the order of their ids.
        types: Type of each token.
        merges: The merges, each as two tokens with a space between.
        special: Ids of special tokens, by their names in the file.
        begins: Whether llama.cpp puts the BOS token before each prompt.
    """

    pre_tokenizer: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special: dict[str, int]
    begins: bool


def tokenizer_values(
    tokenizer: PreTrainedTokenizerBase, rows: int, ends: Sequence[int], begins: bool
) -> TokenizerValues:
    """Values for a GGUF file.

    Args:
        tokenizer: The tokenizer.
        rows: Number of rows of the embedding.
        ends: Ids of the tokens that end an answer.
        begins: Whether each prompt begins with the BOS token.

    Raises:
        ExportError: naming what llama.cpp would tokenize otherwise.
    """
    backend = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    tree: dict[str, Any] = json.loads(backend.to_str())
    model = tree["model"]
    pre_tokenizer = _checked(tree, model)
    vocabulary = tokenizer.get_vocab()
    if max(vocabulary.values()) >= rows:
        raise ExportError(f"the tokenizer has ids up to {max(vocabulary.values()):,}, the model {rows:,} embeddings")
    tokens, types = [f"[PAD{index}]" for index in range(rows)], [UNUSED] * rows
    for token, index in vocabulary.items():
        tokens[index], types[index] = token, NORMAL
    for index, added in tokenizer.added_tokens_decoder.items():
        if added.lstrip or added.rstrip or added.single_word:
            raise ExportError(
                f"the token {added.content!r} has lstrip, rstrip or single_word, which llama.cpp ignores; {ADVICE}"
            )
        types[index] = CONTROL if added.special else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return TokenizerValues(pre_tokenizer, tokens, types, merges, _special(tokenizer, ends), begins)


def _checked(tree: dict[str, Any], model: dict[str, Any]) -> str:
    """Name of the pre-tokenizer, if llama.cpp computes all other parts."""
    if model.get("type") != "BPE" or (tree.get("decoder") or {}).get("type") != "ByteLevel":
        raise ExportError(
            f"tokenizer.json: a tokenizer of the type {model.get('type')} with the decoder "
            f"{(tree.get('decoder') or {}).get('type')} cannot be exported as GGUF, only byte-level BPE; {ADVICE}"
        )
    for key, supported in NEUTRAL.items():
        if model.get(key, supported[0]) not in supported:
            raise ExportError(f"tokenizer.json: model.{key} is {model[key]!r}, which llama.cpp ignores; {ADVICE}")
    if (tree.get("normalizer") or {"type": "NFC"}) != {"type": "NFC"}:
        raise ExportError(
            f"tokenizer.json: the normalizer {tree['normalizer'].get('type')} is not applied by llama.cpp; {ADVICE}"
        )
    pre = of_json(tree.get("pre_tokenizer"), bool(model.get("ignore_merges")))
    if pre is None:
        raise ExportError(
            "tokenizer.json: llama.cpp has no pre-tokenizer that splits exactly as "
            f"{json.dumps(tree.get('pre_tokenizer'))} with ignore_merges {bool(model.get('ignore_merges'))} does; "
            f"supported: those of {', '.join(each.name for each in PRE_TOKENIZERS)}; {ADVICE}"
        )
    return pre.name


def _special(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> dict[str, int]:
    ids = {name: getattr(tokenizer, f"{token}_id") for token, name in SPECIAL.items()}
    more = [index for index in ends if index != ids["eos"]]
    if len(more) > 2:
        raise ExportError(
            f"generation_config.json: an answer ends with one of {len(ends)} tokens ({[*ends]}); a GGUF file has room "
            f"for 3; {ADVICE}"
        )
    return {
        name: index
        for name, index in {**ids, **dict(zip(("eot", "eom"), more, strict=False))}.items()
        if index is not None
    }


def check_tokens(path: Path, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
    """Check that the tokenizer in a GGUF file gives the same tokens as the original.

    Args:
        path: The file.
        tokenizer: The original.
        texts: Texts to compare, besides a probe.

    Raises:
        ExportError: naming the first text that differs.
    """
    exported = build_tokenizer(read_header(path))
    for number, text in enumerate([PROBE, *texts]):
        expected, actual = (each.encode(text, add_special_tokens=False) for each in (tokenizer, exported))
        if expected != actual:
            where = f"held-out row {number}" if number else "the probe"
            at = next(
                (i for i, pair in enumerate(zip(expected, actual, strict=False)) if pair[0] != pair[1]), len(actual)
            )
            raise ExportError(
                f"{path.name}: the tokens of {where} differ from token {at + 1} on: {actual[at : at + 5]}, expected "
                f"{expected[at : at + 5]}; {ADVICE}"
            )
