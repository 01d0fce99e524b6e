"""Losses of judged answers: DPO for pairs, KTO for single answers.

Both compare the log-probability of an answer with that under a reference model: the reward of an answer is beta times
the difference. Log-probabilities are sums over the answer's target tokens, in nats. Papers: DPO arXiv:2305.18290, KTO
arXiv:2402.01306. Losses and gradients are those of TRL's DPOTrainer and KTOTrainer.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class JudgedLoss(NamedTuple):
    """Losses and rewards of the judged answers of a batch.

    Attributes:
        losses: Loss of each pair (DPO) or answer (KTO); shape (n,).
        good: Rewards of the chosen or good answers, detached; shape (good,).
        bad: Rewards of the rejected or bad answers, detached; shape (bad,).
        correct: Number of pairs whose chosen answer has the larger reward (DPO), or of answers with a reward on their
            side of the estimated divergence (KTO).
    """

    losses: Tensor
    good: Tensor
    bad: Tensor
    correct: Tensor

    def sums(self) -> Tensor:
        """Sums for `judged_metrics`; shape (6,), float64."""
        counts = [len(self.good), len(self.bad), len(self.losses)]
        values = torch.stack([self.good.sum(), self.bad.sum(), self.correct]).double()
        return torch.cat([values, values.new_tensor(counts)])


def judged_metrics(sums: Tensor) -> dict[str, float]:
    """Reward margin and preference accuracy of all batches whose `JudgedLoss.sums` were added; empty without any."""
    good, bad, correct, good_count, bad_count, count = sums.tolist()
    if not count:
        return {}
    margin = {"reward_margin": good / good_count - bad / bad_count} if good_count and bad_count else {}
    return {**margin, "preference_accuracy": correct / count}


def sequence_log_probs(token_losses: Tensor, counts: list[int]) -> Tensor:
    """Log-probability of each example's target tokens.

    Args:
        token_losses: Cross-entropy of each target token in nats, example by example; shape (tokens,).
        counts: Number of target tokens of each example.

    Returns:
        Shape (examples,), in nats.
    """
    return -torch.stack([part.sum() for part in token_losses.split(counts)])


def dpo_loss(
    log_probs: tuple[Tensor, Tensor],
    reference: tuple[Tensor, Tensor],
    beta: float,
    label_smoothing: float = 0.0,
    counts: tuple[Tensor, Tensor] | None = None,
) -> JudgedLoss:
    """Loss of pairs: -log sigmoid(reward of the chosen answer - reward of the rejected one).

    Args:
        log_probs: Log-probabilities of the chosen and of the rejected answers; each of shape (pairs,).
        reference: The same under the reference model.
        beta: Factor of the rewards.
        label_smoothing: Fraction of pairs that are assumed to be interchanged (conservative DPO).
        counts: Numbers of target tokens, by which log-probabilities are divided; None without length normalisation
            (TRL's `sigmoid_norm`, and its `sigmoid` without).
    """
    good, bad = (ours - theirs for ours, theirs in zip(log_probs, reference, strict=True))
    if counts:
        good, bad = good / counts[0], bad / counts[1]
    good, bad = beta * good, beta * bad
    losses = -F.logsigmoid(good - bad)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(bad - good)
    return JudgedLoss(losses, good.detach(), bad.detach(), (good > bad).sum())


def kto_loss(
    log_probs: Tensor,
    reference: Tensor,
    desirable: Tensor,
    divergence: Tensor,
    beta: float,
    weights: tuple[float, float] = (1.0, 1.0),
) -> JudgedLoss:
    """Loss of single answers: 1 - sigmoid(reward - beta z0) of good ones, 1 - sigmoid(beta z0 - reward) of bad ones.

    Args:
        log_probs: Log-probability of each answer; shape (n,).
        reference: The same under the reference model.
        desirable: Whether each answer is good; shape (n,), bool.
        divergence: z0, the estimated divergence from the reference: the mean log-ratio of answers to other prompts in
            the global batch, at least 0; a scalar, without gradient.
        beta: Factor of the rewards.
        weights: Weights of the losses of good and of bad answers.
    """
    rewards = beta * (log_probs - reference)
    sign = torch.where(desirable, 1.0, -1.0)
    distance = sign * (rewards - beta * divergence)
    weight = torch.where(desirable, weights[0], weights[1])
    losses = weight * (1 - torch.sigmoid(distance))
    given = rewards.detach()
    return JudgedLoss(losses, given[desirable], given[~desirable], (distance > 0).sum())
