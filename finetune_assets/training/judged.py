"""Training objectives with judged answers: which examples of a batch are judged, and their loss against the reference.

Both answers of a pair are in one sequence, and so in one micro-batch of one process. Sums over the judged answers and
over the target tokens of instruction rows are divided by their numbers in the global batch, so the gradient is the same
for every number of processes and every micro-batch size, as with cross-entropy alone.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune_assets.config.schema import Training
from finetune_assets.data.labels import IGNORED
from finetune_assets.training.batches import Batch
from finetune_assets.training.order import Examples
from finetune_assets.training.preference import JudgedLoss, dpo_loss, kto_loss, sequence_log_probs


@dataclass(frozen=True)
class LossTerms:
    """Loss of a batch, before it is divided by numbers of the global batch.

    Attributes:
        judged: Sum of the losses of judged answers.
        instructions: Summed cross-entropy of instruction rows, in nats.
        sums: `JudgedLoss.sums`.
    """

    judged: Tensor
    instructions: Tensor
    sums: Tensor


class JudgedExamples:
    """The judged answers among the examples of a split.

    Args:
        examples: The split.
        training: The training settings; their objective is `dpo` or `kto`.
        cutoff: Maximum length of an example, in tokens.
    """

    def __init__(self, examples: Examples, training: Training, cutoff: int) -> None:
        self.examples, self.preference = examples, training.preference
        self.is_dpo = training.objective == "dpo"
        self.good = _flags(examples, "chosen" if self.is_dpo else "desirable")
        self.is_judged: NDArray[np.bool_] = self.good >= 0
        self.cutoff = cutoff
        self.reference = torch.zeros(len(examples))
        self.reference_mismatched = torch.zeros(len(examples))

    @cached_property
    def mismatched(self) -> "MismatchedExamples":
        """Prompts with answers to other prompts, for KTO's divergence."""
        return MismatchedExamples(self.examples, np.flatnonzero(self.is_judged), self.cutoff)

    def judged_in(self, sequences: list[list[int]]) -> list[list[int]]:
        """The sequences without their examples that are not judged."""
        kept = ([example for example in sequence if self.is_judged[example]] for sequence in sequences)
        return [sequence for sequence in kept if sequence]

    def numbers(self, sequences: list[list[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Number of judged answers (pairs with DPO), and of target tokens of instruction rows, of each sequence."""
        each = 2 if self.is_dpo else 1
        judged = np.array([self.is_judged[sequence].sum() // each for sequence in sequences])
        learned = np.where(self.is_judged, 0, self.examples.learned)
        return judged, np.array([learned[sequence].sum() for sequence in sequences])

    def terms(self, token_losses: Tensor, batch: Batch, divergence: Tensor) -> LossTerms:
        """The loss of a batch.

        Args:
            token_losses: Cross-entropy of each target token in nats; shape (tokens,).
            batch: The batch.
            divergence: KTO's divergence; ignored with DPO.
        """
        device, members = token_losses.device, np.array(batch.examples)
        log_probs = sequence_log_probs(token_losses, batch.counts)
        judged = np.flatnonzero(self.is_judged[members])
        others = np.flatnonzero(~self.is_judged[members])
        loss = self._loss(log_probs, batch, members, judged, divergence)
        instructions = -log_probs[torch.from_numpy(others).to(device)].sum()
        return LossTerms(loss.losses.sum(), instructions, loss.sums())

    def _loss(
        self,
        log_probs: Tensor,
        batch: Batch,
        members: NDArray[np.int64],
        judged: NDArray[np.int64],
        divergence: Tensor,
    ) -> JudgedLoss:
        device, preference = log_probs.device, self.preference
        reference = self.reference[torch.from_numpy(members)].to(device)
        if not self.is_dpo:
            at = torch.from_numpy(judged).to(device)
            good = torch.from_numpy(self.good[members[judged]] == 1).to(device)
            weights = preference.desirable_weight, preference.undesirable_weight
            return kto_loss(log_probs[at], reference[at], good, divergence, preference.beta, weights)
        chosen, rejected = (torch.from_numpy(judged[start::2]).to(device) for start in (0, 1))
        counts = None
        if preference.length_normalised:
            tokens = torch.tensor(batch.counts, dtype=torch.float32, device=device)
            counts = tokens[chosen], tokens[rejected]
        return dpo_loss(
            (log_probs[chosen], log_probs[rejected]),
            (reference[chosen], reference[rejected]),
            preference.beta,
            preference.label_smoothing,
            counts,
        )


class MismatchedExamples(Examples):
    """Each judged prompt with the answer of the judged example of another row before it, the first with the last one's.

    The pairing is fixed, so reference log-probabilities are computed once. TRL pairs within a batch in the same way.

    Args:
        examples: Examples of a split.
        judged: Indices of the judged ones, in order.
        cutoff: Maximum length of an example, in tokens.
    """

    def __init__(self, examples: Examples, judged: NDArray[np.int64], cutoff: int) -> None:
        self.examples, self.cutoff = examples, cutoff
        self.prompts = examples.table["prompt_length"].to_numpy()
        rows = examples.table["row"].to_numpy()[judged]
        first = np.flatnonzero(np.diff(rows, prepend=-1))  # of each row
        start = np.repeat(first, np.diff([*first, len(judged)]))
        self.answers = np.arange(len(examples))
        self.answers[judged] = judged[start - 1] if len(judged) else judged
        answer_lengths = (examples.lengths - self.prompts)[self.answers]
        self.lengths = np.minimum(self.prompts + answer_lengths, cutoff)

    def __len__(self) -> int:
        return len(self.examples)

    def tokens(self, example: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        other, prompt = int(self.answers[example]), int(self.prompts[example])
        (ids, _), (other_ids, other_labels) = self.examples.tokens(example), self.examples.tokens(other)
        start = int(self.prompts[other])
        mixed = np.concatenate([ids[:prompt], other_ids[start:]])[: self.cutoff]
        labels = np.concatenate([np.full(prompt, IGNORED, np.int32), other_labels[start:]])[: self.cutoff]
        return mixed, labels


def _flags(examples: Examples, column: str) -> NDArray[np.int8]:
    """A column of booleans: 1, 0, or -1 where it is null; shape (n,)."""
    values = examples.table[column].to_numpy()
    return np.array([-1 if value is None else int(value) for value in values.tolist()], np.int8)
