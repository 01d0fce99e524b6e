"""Which kinds of rows an objective learns, and in which sequences."""

from dataclasses import dataclass
from typing import Any

from finetune_assets.config.schema import Tokenization, Training
from finetune_assets.data.rows import RowKind, Split


@dataclass(frozen=True)
class Learning:
    """What a training learns from.

    Attributes:
        objective: `training.objective`.
        instructions: Whether instruction rows are learned beside judged answers.
    """

    objective: str = "sft"
    instructions: bool = True

    @staticmethod
    def of(training: Training) -> "Learning":
        return Learning(training.objective, training.objective == "sft" or training.preference.instruction_weight > 0)

    @property
    def identity(self) -> dict[str, Any]:
        """Parts of a tokenized dataset's fingerprint; none for `sft`, so that its datasets are found."""
        is_sft = self.objective == "sft"
        return {} if is_sft else {"objective": {"name": self.objective, "instructions": self.instructions}}

    @property
    def judged(self) -> bool:
        """Whether judged answers are learned."""
        return self.objective != "sft"

    @property
    def pairs(self) -> bool:
        """Whether both answers of a pair are learned together, in one sequence. KTO learns each alone."""
        return self.objective == "dpo"

    def uses(self, kind: RowKind) -> bool:
        """Whether rows of a kind are part of the dataset."""
        return (
            kind
            in {
                "sft": (RowKind.INSTRUCTION,),
                "dpo": (RowKind.INSTRUCTION, RowKind.PAIR),
                "kto": (RowKind.INSTRUCTION, RowKind.PAIR, RowKind.LABELLED),
            }[self.objective]
        )

    def trains_on(self, kind: RowKind, split: Split) -> bool:
        """Whether rows of a kind are examples of a split; instruction rows are always held out for the evaluation."""
        return self.uses(kind) and (kind is not RowKind.INSTRUCTION or self.instructions or split is not Split.TRAIN)

    def sequence_tokens(self, tokenization: Tokenization, packed: bool) -> int:
        """Maximum length of a sequence, in tokens; both answers of a pair are in one."""
        return (tokenization.packing_length if packed else None) or tokenization.cutoff_len * (2 if self.pairs else 1)


SFT = Learning()
"""Instruction rows alone."""
