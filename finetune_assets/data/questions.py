"""Tokenizes questions without an answer, up to where an answer begins."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from finetune_assets.config.schema import Data
from finetune_assets.data.tokenization import Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIRST_WORDS = ("The", "It", "In", "A", "Yes")
"""Common first words of an answer; see `questions`."""


def questions(
    prompts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", data: Data, context: str = ""
) -> list[list[int]]:
    """Tokenize the user's prompts, up to where the answer begins.

    The boundary depends on the first word of the answer, because a tokenizer may merge the preceding space with it. The
    boundary that most of `FIRST_WORDS` give is the one most common in training.

    Args:
        prompts: The instructions.
        tokenizer: The experiment's tokenizer.
        data: The experiment's data settings.
        context: Context of each instruction.
    """
    same = {"context": context, "category": "", "messages": None}
    rows = [{**same, "instruction": prompt, "response": word} for prompt in prompts for word in FIRST_WORDS]
    encoded = Encoder(tokenizer, data).encode(rows)
    starts = encoded.lengths.cumsum() - encoded.lengths
    spans = zip(starts, encoded.prompt_lengths, strict=True)
    candidates = [tuple(encoded.input_ids[start : start + length].tolist()) for start, length in spans]
    each = len(FIRST_WORDS)
    return [[*Counter(candidates[at : at + each]).most_common(1)[0][0]] for at in range(0, len(candidates), each)]
