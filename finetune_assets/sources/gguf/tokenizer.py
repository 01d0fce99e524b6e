"""Builds the tokenizer of a GGUF file."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from finetune_assets.sources.gguf.header import GgufError, Header, shortened
from finetune_assets.sources.gguf.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer, named

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerBase

KEY = "tokenizer.ggml."
MODEL, PRE, TOKENS, TYPES, MERGES = (KEY + name for name in ("model", "pre", "tokens", "token_type", "merges"))
CHAT_TEMPLATE = "tokenizer.chat_template"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""Names of special tokens in transformers and in a GGUF file."""


def build_tokenizer(header: Header) -> "PreTrainedTokenizerBase":
    """Build the tokenizer that llama.cpp uses for the file.

    Raises:
        GgufError: if the tokenizer is of a kind that is not supported, or its values do not fit together.
    """
    from transformers import PreTrainedTokenizerFast

    model = header.get(MODEL, str)
    if model != "gpt2":
        raise GgufError(
            f"{header.path}: {MODEL} is {shortened(model)}; only byte-level BPE ('gpt2') is supported. Use the model's "
            "original repository or folder as model.base_model"
        )
    pre = _pre_tokenizer(header)
    tokens = _strings(header, TOKENS)
    special = {name: tokens[index] for name, index in _special_ids(header, len(tokens)).items()}
    backend = _byte_level(header, tokens, pre, special)
    template = header.get(CHAT_TEMPLATE, str, "") or None
    context = header.metadata.get(f"{header.get('general.architecture', str)}.context_length")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template, model_max_length=context, **special
    )


def _pre_tokenizer(header: Header) -> PreTokenizer:
    name = header.get(PRE, str)
    pre = named(name)
    if pre is None:
        raise GgufError(
            f"{header.path}: {PRE} is {shortened(name)}, whose tokens cannot be reproduced exactly; supported: "
            f"{', '.join(each.name for each in PRE_TOKENIZERS)}. Use the model's original repository or folder as "
            "model.base_model"
        )
    return pre


def _byte_level(header: Header, tokens: list[str], pre: PreTokenizer, special: Mapping[str, str]) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, processors

    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        again = next(token for index, token in enumerate(tokens) if vocabulary[token] != index)
        raise GgufError(f"{header.path}: {TOKENS} has the token {shortened(again)} twice; convert the file again")
    merges = [_merge(header, merge, vocabulary) for merge in _strings(header, MERGES)]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre.ignores_merges))
    tokenizer.pre_tokenizer = _backend(pre)
    tokenizer.decoder = decoders.ByteLevel()
    for added in _added(header, tokens):
        (tokenizer.add_special_tokens if added.special else tokenizer.add_tokens)([added])
    begins = header.get(f"{KEY}add_bos_token", bool, pre.adds_bos) and special.get("bos_token")
    ends = header.get(f"{KEY}add_eos_token", bool, False) and special.get("eos_token")
    if begins or ends:
        around = [f"{begins}:0"] * bool(begins), [f"{ends}:0"] * bool(ends)
        pair = [*around[0], "$A:0", *around[1], *(f"{begins}:1" for _ in around[0]), "$B:1"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*around[0], "$A:0", *around[1]],
            pair=[*pair, *(f"{ends}:1" for _ in around[1])],
            special_tokens=[(token, vocabulary[token]) for token in {begins, ends} if token],
        )
    return tokenizer


def _backend(pre: PreTokenizer) -> Any:
    """The pre-tokenizer as an object of `tokenizers`, which reads it only as part of a tokenizer."""
    from tokenizers import Tokenizer, models

    tree = json.loads(Tokenizer(models.BPE()).to_str())
    return Tokenizer.from_str(json.dumps({**tree, "pre_tokenizer": pre.to_json()})).pre_tokenizer


def _merge(header: Header, merge: str, vocabulary: Mapping[str, int]) -> tuple[str, str]:
    first, _, second = merge.partition(" ")
    if not {first, second, first + second} <= vocabulary.keys():
        raise GgufError(f"{header.path}: {MERGES} has {shortened(merge)}, which is not of its tokens; convert it again")
    return first, second


def _added(header: Header, tokens: list[str]) -> "list[AddedToken]":
    """Tokens that are matched as a whole, in the order of their ids."""
    from tokenizers import AddedToken

    types = header.get(TYPES, list)
    if len(types) != len(tokens):
        raise GgufError(
            f"{header.path}: {TYPES} has {len(types):,} elements for {len(tokens):,} tokens; convert the file again"
        )
    return [
        AddedToken(token, normalized=False, special=kind != USER_DEFINED)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]


def _special_ids(header: Header, tokens: int) -> dict[str, int]:
    ids = {name: header.get(f"{KEY}{key}_token_id", int, -1) for name, key in SPECIAL.items()}
    for name, index in ids.items():
        if index >= tokens:
            raise GgufError(
                f"{header.path}: {KEY}{SPECIAL[name]}_token_id is {index:,}, but there are {tokens:,} tokens; convert "
                "the file again"
            )
    return {name: index for name, index in ids.items() if index >= 0}


def _strings(header: Header, key: str) -> list[str]:
    values = header.get(key, list)
    wrong = next((value for value in values if not isinstance(value, str)), None)
    if wrong is not None or not values:
        raise GgufError(f"{header.path}: {key} is {shortened(values)}; expected texts; convert the file again")
    return list(values)
