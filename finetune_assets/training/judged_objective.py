"""Trains on judged answers: loss of a step, held-out loss, and the log-probabilities of the reference model."""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from finetune_assets.artifacts.layout import REFERENCE_LOG_PROBS
from finetune_assets.progress import ROWS, Progress
from finetune_assets.training.batches import Batch, collate
from finetune_assets.training.judged import JudgedExamples, LossTerms
from finetune_assets.training.order import Examples, evaluation_batches
from finetune_assets.training.preference import judged_metrics, sequence_log_probs
from finetune_assets.training.reference import reference_model, restore, serialized
from finetune_assets.training.state import StepBatches

if TYPE_CHECKING:
    from finetune_assets.training.setup import TrainingSetup


class JudgedObjective:
    """The objectives `dpo` and `kto` of a training.

    Attributes:
        train: Judged answers of the training split.
        sums: Sums of the rewards of the last step, or of the last measurement of the held-out loss, over the batches of
            this process; see `JudgedLoss.sums`.

    Args:
        setup: The training; its model has its initial adapter.
        budget: Maximum tokens of a micro-batch; None for rows.
    """

    def __init__(self, setup: "TrainingSetup", budget: int | None) -> None:
        self.setup, self.process, self.budget = setup, setup.process, budget
        self.is_kto = setup.training.objective == "kto"
        self.instruction_weight = setup.training.preference.instruction_weight
        self.train, self.val = setup.judged
        self.sums = self._no_sums()

    # ---- reference

    def prepare_reference(self) -> str:
        """Read or compute the log-probabilities of the reference model; returns a line for the log."""
        splits, job = {"train": self.train, "val": self.val}, self.setup.job
        file, content = job.checkpoints / REFERENCE_LOG_PROBS, b""
        if self.process.writes:
            folders = [folder for folder in (job.checkpoints, job.reference_log_probs) if folder]
            files = [path for folder in folders if (path := folder / REFERENCE_LOG_PROBS).exists()]
            content = files[0].read_bytes() if files else b""
        content = self.process.share_bytes(content)
        answers = sum(int(judged.is_judged.sum()) for judged in splits.values())
        if content and restore(content, splits, self._types):
            return f"Reference log-probabilities of {answers:,} answers read from {REFERENCE_LOG_PROBS}"
        began = time.monotonic()
        setup, preference = self.setup, self.setup.training.preference
        champion = job.reference if preference.reference == "champion" else None
        is_initial = champion == job.warm_start if champion else setup.initial_adapter is not None
        setup.model.eval()
        with reference_model(setup.model, champion, is_initial):
            for judged in splits.values():
                judged.reference = self._log_probs(judged, judged.examples)
                if self.is_kto:
                    judged.reference_mismatched = self._log_probs(judged, judged.mismatched)
        if self.process.writes:
            job.checkpoints.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            partial.write_bytes(self.serialized_reference())
            partial.rename(file)
        seconds = time.monotonic() - began
        return f"Reference log-probabilities of {answers:,} answers computed in {seconds:.1f} s"

    def serialized_reference(self) -> bytes:
        """The log-probabilities of the reference model, as a file."""
        return serialized({"train": self.train, "val": self.val}, self._types)

    @property
    def _types(self) -> str:
        return f"{self.setup.precision}, weights {self.setup.model.get_base_model().dtype}"

    @torch.no_grad()  # not inference mode: see LoraFinetune.held_out_loss
    def _log_probs(self, judged: JudgedExamples, examples: Examples) -> Tensor:
        """Log-probability of each judged answer, from all processes; 0 of other examples. Shape (examples,)."""
        setup = self.setup
        values = torch.zeros(len(examples), device=self.process.device)
        sequences = [[example] for example in np.flatnonzero(judged.is_judged).tolist()]
        shares = self._shares(examples, sequences)
        batches = shares[self.process.rank]
        with Progress("reference", sum(map(len, batches)), ROWS) as progress:
            for members in batches:
                batch = collate(members, examples, self.process.device, setup.flat)
                log_probs = sequence_log_probs(setup.token_losses(batch), batch.counts)
                values[torch.tensor(batch.examples, device=values.device)] = log_probs
                progress.add(len(members))
        self._keep_up(shares)
        return self.process.sum(values).cpu()

    def _shares(self, examples: Examples, sequences: list[list[int]]) -> list[list[list[list[int]]]]:
        rows = self.setup.training.micro_batch_size
        return evaluation_batches(examples, self.process.world, rows, self.budget, sequences)

    def _keep_up(self, shares: list[list[list[list[int]]]], passes: int = 1) -> None:
        """With sharding, compute as many batches as the process with the most, since all take part in each."""
        if self.setup.sharded:
            for _ in range(passes * (max(map(len, shares)) - len(shares[self.process.rank]))):
                self.setup.token_losses(self.setup.batch(self.setup.sequences[:1]))

    # ---- loss

    def work(self, batches: list[list[int]], idle: int) -> list[Batch]:
        """KTO's mismatched examples of each micro-batch, whose sequences are given, and of idle micro-batches."""
        if not self.is_kto:
            return []
        setup, mismatched = self.setup, self.train.mismatched
        prepared = []
        for members in batches:
            judged = self.train.judged_in([setup.sequences[index] for index in members])
            if judged:
                prepared.append(self._mismatched_batch(judged, mismatched))
            elif setup.sharded:
                idle += 1
        return prepared + [setup.batch(setup.sequences[:1])] * (idle if setup.sharded else 0)

    def _mismatched_batch(self, sequences: list[list[int]], mismatched: Examples) -> Batch:
        single = [[example] for sequence in sequences for example in sequence]
        return collate(single, mismatched, self.process.device, self.setup.flat)

    def losses(self, work: StepBatches) -> Iterator[Tensor]:
        """The share of each micro-batch in the loss of a step: terms divided by numbers of the global batch."""
        self.sums = self._no_sums()
        divergence = self._divergence(self.train, work.mismatched) if self.is_kto else self._zero()
        for batch in work.batches:
            terms = self.train.terms(self.setup.token_losses(batch), batch, divergence)
            self.sums += terms.sums
            yield terms.judged / max(1, work.judged) + self.instruction_weight * terms.instructions / max(
                1, work.learned
            )
        for batch in work.idle:
            yield self.setup.token_losses(batch).sum() * 0.0

    @torch.no_grad()
    def _divergence(self, judged: JudgedExamples, batches: list[Batch]) -> Tensor:
        """Estimate of the divergence from the reference (z0), over the batches of all processes; a scalar."""
        training = self.setup.model.training
        self.setup.model.eval()  # the estimate has no dropout, and draws no random numbers
        sums = torch.zeros(2, dtype=torch.float64, device=self.process.device)
        for batch in batches:
            log_probs = sequence_log_probs(self.setup.token_losses(batch), batch.counts)
            members = torch.tensor(batch.examples)
            of_judged = torch.from_numpy(judged.is_judged)[members].to(log_probs.device)
            ratios = (log_probs - judged.reference_mismatched[members].to(log_probs.device))[of_judged]
            sums += torch.stack([ratios.sum().double(), of_judged.sum().double()])
        self.setup.model.train(training)
        total, count = self.process.sum(sums)
        return (total / count.clamp(min=1)).clamp(min=0).float()

    @torch.no_grad()
    def held_out_loss(self) -> tuple[float, dict[str, float]]:
        """Loss of the validation split as in training, and the metrics of its judged answers."""
        setup = self.setup
        setup.model.eval()
        divergence = self._zero()
        if self.is_kto:
            singles = [[example] for example in np.flatnonzero(self.val.is_judged).tolist()]
            shares = self._shares(self.val.mismatched, singles)
            own = (self._mismatched_batch(members, self.val.mismatched) for members in shares[self.process.rank])
            divergence = self._divergence(self.val, list(own))
            self._keep_up(shares)
        numbers = torch.zeros(3, dtype=torch.float64, device=self.process.device)
        rewards = self._no_sums()
        shares = self._shares(setup.val, setup.val_sequences)
        batches = shares[self.process.rank]
        with Progress("held-out loss", sum(map(len, batches)), ROWS) as progress:
            for members in batches:
                batch = collate(setup.rows(members), setup.val, self.process.device, setup.flat)
                terms: LossTerms = self.val.terms(setup.token_losses(batch), batch, divergence)
                _, learned = self.val.numbers(members)
                numbers += torch.stack(
                    [terms.judged.double(), terms.instructions.double(), numbers.new_tensor(learned.sum())]
                )
                rewards += terms.sums
                progress.add(len(members))
        self._keep_up(shares)
        judged, instructions, tokens = self.process.sum(numbers).tolist()
        rewards = self.process.sum(rewards)
        loss = judged / max(1.0, float(rewards[-1])) + self.instruction_weight * instructions / max(1.0, tokens)
        return loss, judged_metrics(rewards)

    def _zero(self) -> Tensor:
        return torch.zeros((), device=self.process.device)

    def _no_sums(self) -> Tensor:
        return torch.zeros(6, dtype=torch.float64, device=self.process.device)
