"""Statistics of a prepared dataset."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_assets.data.rows import Split

SHOWN = 5
"""Maximum number of rows to name for each problem."""
LENGTH_BINS, FILL_BINS = 40, 20
"""Number of bins of the histograms of example lengths and of packed sequences' fill."""


@dataclass
class Statistics:
    """Statistics of a prepared dataset. Token counts are of the train split unless named otherwise.

    `refused` rows cannot be rendered with the experiment's template; `first_refused` names the first of them and the
    reason. `near_duplicates_left_out` counts training rows that are left out because they repeat a held-out row, and
    `first_left_out` names the first of them, each with that row. `overlap` counts held-out rows that a training row
    repeats (`cross_split`). `drawn` counts the chosen rows by split, before any is left out;
    `most_frequent_prompt_rows` of them share one prompt. Rows are named by their numbers in the raw data, from 0;
    of several sources, the numbers count on from source to source. `sources` has the numbers of each source where there
    are several or their rows are limited; `replayed_*` are of rows of earlier versions.
    """

    rows_read: int = 0
    rows_of_other_kinds: dict[str, int] = field(default_factory=dict)
    """Number of rows by kind that the objective does not learn."""
    rows_of_other_categories: int = 0
    rows_beyond_num_samples: int = 0
    drawn: dict[str, int] = field(default_factory=lambda: dict.fromkeys(Split, 0))
    most_frequent_prompt: str = ""
    most_frequent_prompt_rows: int = 0
    near_duplicates_left_out: int = 0
    first_left_out: list[tuple[int, int]] = field(default_factory=list)
    examples: dict[str, int] = field(default_factory=lambda: dict.fromkeys(Split, 0))
    pairs: dict[str, int] = field(default_factory=dict)
    """Number of pairs by split, each of two examples; empty without pairs."""
    labelled: dict[str, int] = field(default_factory=dict)
    """Number of labelled answers by split; empty without any."""
    conflicting: int = 0
    """Number of pairs and labelled answers that contradict another one of the same answers."""
    first_conflicting: list[tuple[int, int]] = field(default_factory=list)
    judged_tokens: dict[str, float] = field(default_factory=dict)
    """Mean number of tokens of `chosen` and `rejected` answers, or good and bad ones."""
    adapters: dict[str, int] = field(default_factory=dict)
    """Number of judgements by the served adapter that gave the rejected or labelled answer."""
    refused: int = 0
    first_refused: str = ""
    omitted: dict[str, int] = field(default_factory=dict)
    """Number of rows by the part that the chat template does not render although nothing to learn is lost."""
    without_label: int = 0
    first_without_label: list[int] = field(default_factory=list)
    truncated: int = 0
    first_truncated: list[int] = field(default_factory=list)
    overlap: int = 0
    first_overlap: list[int] = field(default_factory=list)
    sources: dict[str, dict[str, float]] = field(default_factory=dict)
    replayed_rows: int = 0
    replayed_tokens: int = 0
    tokens: int = 0
    labelled_tokens: int = 0
    length_quantiles: dict[str, int] = field(default_factory=dict)
    sequences: int = 0
    fill: float = 1.0
    """Fraction of the sequences' positions that hold a token."""
    length_histogram: dict[str, Any] = field(default_factory=dict)
    """`width` of a bin in tokens, and `counts` of the train examples in each bin, starting at 0."""
    fill_histogram: list[int] = field(default_factory=list)
    """Number of packed sequences by fill fraction, in `FILL_BINS` bins of equal width from 0 to 1."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def name_first(names: list[int], rows: NDArray[np.int64]) -> None:
    """Add rows to those that are named, up to `SHOWN`."""
    names += map(int, rows[: SHOWN - len(names)])
