"""Settings of learning from preferences, `training.preference`: part of the schema in `schema.py`."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class Preference:
    """How judged answers are learned, with `training.objective` `dpo` or `kto`. See [Preferences](preferences.md)."""

    beta: float = 0.1
    """Strength of the reference: the reward of an answer is beta times the difference of its log-probability from the
    reference's. Larger values keep the adapter closer to the reference."""
    label_smoothing: float = 0.0
    """With `dpo`: assumed fraction of pairs whose answers are interchanged (conservative DPO), below 0.5."""
    length_normalised: bool = False
    """With `dpo`: divide each answer's log-probability by its number of tokens, so that long answers have no larger
    rewards than short ones. Use a larger `beta`, such as 2 to 10."""
    reference: Literal["base", "champion"] = "base"
    """Model that the adapter is compared with: the base model, or the champion at the start of the training (the base
    model while there is none). Its log-probabilities are computed once, so no second model is in memory."""
    desirable_weight: float = 1.0
    """With `kto`: weight of the loss of good answers."""
    undesirable_weight: float = 1.0
    """With `kto`: weight of the loss of bad answers."""
    instruction_weight: float = 1.0
    """Weight of the cross-entropy of instruction rows, which are learned beside the judged answers. 0 trains on judged
    answers only; held-out instruction rows are kept for the evaluation."""
