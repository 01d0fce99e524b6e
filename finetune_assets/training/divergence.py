"""When training has stopped to make sense, and what to do about it."""

import math
from collections.abc import Iterable

from torch import Tensor

from finetune_assets.config.schema import Training
from finetune_assets.errors import UserError

STALLED_AFTER = 20
"""Steps in a row without any gradient, after which training is ended: nothing is learned."""


class TrainingDiverged(UserError):
    """The loss is no longer a number."""


class TrainingStalled(UserError):
    """There has been no gradient for many steps."""


def check_learning(step: int, loss: float, grad_norm: float, stalled: int, training: Training) -> None:
    """End a training whose loss is no number, or which has had no gradient for too many steps.

    Args:
        step: Steps done.
        loss: Mean loss of the last steps.
        grad_norm: Of the last step.
        stalled: Steps in a row, up to this one, with a gradient of zero.
        training: The settings.

    Raises:
        TrainingDiverged: if the loss is NaN or infinite.
        TrainingStalled: if nothing is learned.
    """
    if not math.isfinite(loss):
        raise TrainingDiverged(
            f"step {step}: the loss is {loss}, grad_norm {grad_norm:.3g}, training.learning_rate "
            f"{training.learning_rate:g}; lower the learning rate, lengthen training.warmup_steps, or set "
            "training.precision to fp32"
        )
    if stalled >= STALLED_AFTER:
        raise TrainingStalled(
            f"step {step}: grad_norm has been 0 for {stalled} steps, so nothing is learned; see whether any token is "
            "learned (data.tokenization.cutoff_len, train_on_inputs), or lower training.learning_rate "
            f"({training.learning_rate:g})"
        )


def check_finite(held_out_loss: float | None, parameters: Iterable[Tensor], training: Training) -> None:
    """Publish no adapter that the last steps destroyed.

    Raises:
        TrainingDiverged: if a weight or the held-out loss is NaN or infinite.
    """
    finite = held_out_loss is None or math.isfinite(held_out_loss)
    if not finite or not all(parameter.isfinite().all() for parameter in parameters):
        raise TrainingDiverged(
            f"the trained adapter is not finite (held-out loss {held_out_loss}); lower training.learning_rate "
            f"({training.learning_rate:g}) or lengthen training.warmup_steps"
        )
