"""Near-duplicate passages: of two with the same content, one takes a place that another passage needs."""

from typing import Any

import numpy as np

from finetune_assets.data.folding import words_of
from finetune_assets.data.near_duplicates import THRESHOLD, GrowingSignatures, earlier_near_duplicates, sign
from finetune_assets.progress import Progress, Unit
from finetune_assets.retrieval.passages import Passages

UNIT = Unit("passages")
AT_A_TIME = 1_000
SHOWN = 10
"""Maximum number of pairs that are named."""


def near_duplicate_passages(passages: Passages) -> dict[str, Any]:
    """Number of passages that are near-duplicates of an earlier one, and the first pairs by number."""
    signatures = GrowingSignatures()
    with Progress("comparing passages", len(passages), UNIT) as progress:
        for start in range(0, len(passages), AT_A_TIME):
            texts = passages.texts[start : start + AT_A_TIME]
            signatures.append(sign(words_of(texts), np.arange(len(texts) + 1)))
            progress.reach(start + len(texts))
    earlier = earlier_near_duplicates(signatures.all(), THRESHOLD)
    repeated = np.flatnonzero(earlier >= 0)
    first = [[int(number), int(earlier[number])] for number in repeated[:SHOWN]]
    return {"passages": len(repeated), "first": first}
