"""Checks that stop a training that has diverged or stalled."""

import math
from collections.abc import Iterable

from torch import Tensor

from finetune_assets.config.schema import Training
from finetune_assets.errors import UserError

STALLED_AFTER = 20
"""Number of consecutive steps with a zero gradient after which training stops, because nothing is learned."""


class TrainingDiverged(UserError):
    """The loss or a trained weight is NaN or infinite."""


class TrainingStalled(UserError):
    """The gradient has been zero for many consecutive steps."""


def check_learning(step: int, loss: float, grad_norm: float, stalled: int, training: Training) -> None:
    """Stop a training with a non-finite loss, or with a zero gradient for too many consecutive steps.

    Args:
        step: Number of completed steps.
        loss: Mean loss since the last report, in nats per token.
        grad_norm: Gradient norm of the last step.
        stalled: Number of consecutive steps, up to this one, with a zero gradient.
        training: The training settings.

    Raises:
        TrainingDiverged: if the loss is NaN or infinite.
        TrainingStalled: if the gradient was zero for `STALLED_AFTER` steps.
    """
    if not math.isfinite(loss):
        raise TrainingDiverged(
            f"step {step}: the loss is {loss}, grad_norm {grad_norm:.3g}, training.learning_rate "
            f"{training.learning_rate:g}; lower the learning rate, lengthen training.warmup_steps, or set "
            "training.precision to fp32"
        )
    if stalled >= STALLED_AFTER:
        raise TrainingStalled(
            f"step {step}: grad_norm has been 0 for {stalled} steps, so nothing is learned; check that examples "
            "have target tokens (data.tokenization.cutoff_len, train_on_inputs), or lower training.learning_rate "
            f"({training.learning_rate:g})"
        )


def check_finite(held_out_loss: float | None, parameters: Iterable[Tensor], training: Training) -> None:
    """Refuse to publish an adapter with non-finite weights or a non-finite held-out loss.

    Raises:
        TrainingDiverged: if a weight or the held-out loss is NaN or infinite.
    """
    finite = held_out_loss is None or math.isfinite(held_out_loss)
    if not finite or not all(parameter.isfinite().all() for parameter in parameters):
        raise TrainingDiverged(
            f"the trained adapter has non-finite weights or held-out loss ({held_out_loss}); lower "
            f"training.learning_rate ({training.learning_rate:g}) or lengthen training.warmup_steps"
        )
