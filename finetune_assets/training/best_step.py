"""Choice of the step whose adapter is published: the last one, or the one with the lowest held-out loss.

The held-out loss is that of the validation split. The gate's rows have no part in it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune_assets.config.schema import Training

if TYPE_CHECKING:
    import numpy as np

EVALUATION_SHARE = 0.05
"""Maximum share of the training's time for evaluations with `eval_steps: auto`."""
FORWARD_SHARE = 0.5
"""Operations for a token of an evaluation over those for a trained token: with a frozen base, 2N of about 4N."""


@dataclass
class BestStep:
    """The best evaluation so far, stored in the training log and in every checkpoint.

    Attributes:
        step: Number of completed steps at the lowest held-out loss.
        held_out_loss: The lowest held-out loss, in nats per token.
        reference: Held-out loss that an evaluation must improve on, by more than `min_improvement`.
        without_improvement: Number of consecutive evaluations that did not.
        saved_steps: Number of steps that stopping early saved; 0 if training has not stopped early.
        is_published: Whether the adapter of this step is published, instead of that of the last one.
    """

    step: int
    held_out_loss: float
    reference: float
    without_improvement: int = 0
    saved_steps: int = 0
    is_published: bool = True


@dataclass(frozen=True)
class Selection:
    """When a training evaluates, what it keeps, and when it stops.

    Attributes:
        every: Number of steps between evaluations; None if there are none.
        keeps_best: Whether the adapter with the lowest held-out loss is published.
        patience: Number of evaluations without improvement after which training stops; None to never stop early.
        min_improvement: Decrease of the held-out loss, in nats per token, that counts as an improvement.
    """

    every: int | None
    keeps_best: bool
    patience: int | None
    min_improvement: float

    @staticmethod
    def of(training: Training, validation_tokens: int, lengths: "np.ndarray[Any, Any]") -> "Selection":
        """Resolve the settings for a dataset; without validation tokens, nothing is evaluated.

        Args:
            training: Settings of the training.
            validation_tokens: Number of tokens in the validation split.
            lengths: Length of each training sequence in tokens.
        """
        every = training.eval_steps
        if every is None or not validation_tokens:
            return Selection(None, False, None, 0.0)
        if every == "auto":
            tokens_per_step = float(lengths.sum()) / math.ceil(len(lengths) / training.macro_batch_size)
            cost = FORWARD_SHARE * validation_tokens / tokens_per_step
            every = max(1, math.ceil(cost / EVALUATION_SHARE))
        return Selection(int(every), training.keep != "last", training.patience, training.min_improvement)

    def is_due(self, step: int, steps: int) -> bool:
        """Whether to evaluate after `step` of `steps` steps. The last step is a candidate for the best one too."""
        if self.every is None:
            return False
        return self.keeps_best if step == steps else step % self.every == 0

    def counted(self, best: BestStep | None, step: int, loss: float) -> BestStep:
        """Add an evaluation; a loss that is not finite is no improvement."""
        if best is None or not math.isfinite(best.held_out_loss):
            return BestStep(step, loss, loss, is_published=self.keeps_best)
        improved = loss < best.reference - self.min_improvement
        lower = loss < best.held_out_loss
        return BestStep(
            step if lower else best.step,
            loss if lower else best.held_out_loss,
            loss if improved else best.reference,
            0 if improved else best.without_improvement + 1,
            is_published=self.keeps_best,
        )

    def stops(self, best: BestStep | None) -> bool:
        """Whether patience is exhausted."""
        return self.patience is not None and best is not None and best.without_improvement >= self.patience

    def evaluations(self, steps: int) -> int:
        """Number of evaluations before the last of `steps` steps, if training does not stop early.

        The one after the last step is not counted: without these settings, training makes it as well.
        """
        return 0 if self.every is None else (steps - 1) // self.every

    def fewest_steps(self, steps: int) -> int:
        """Number of steps after which patience is exhausted if no evaluation improves on the first one."""
        if self.every is None or self.patience is None:
            return steps
        return min(steps, (1 + self.patience) * self.every)


def training_seconds(state: Mapping[str, Any]) -> float:
    """Duration of the steps in a trainer state, and of the evaluations between them."""
    return float(state["seconds"]) + float(state.get("evaluation_seconds", 0.0))


def published(state: Mapping[str, Any], price_per_hour: float | None = None) -> dict[str, float]:
    """Step of the published adapter and what stopping early saved, from a trainer state.

    Args:
        state: Content of `trainer_state.json`.
        price_per_hour: Price of a device per hour.

    Returns:
        `published_step`; if training stopped early also `saved_steps`, `saved_device_hours` at the average speed of the
        training, and with a price `saved_cost`. Empty without evaluations.
    """
    best = state.get("best")
    if not best:
        return {}
    numbers: dict[str, float] = {"published_step": best["step"] if best["is_published"] else state["step"]}
    if not best["saved_steps"]:
        return numbers
    hours = training_seconds(state) / state["step"] * best["saved_steps"] * state["active"]["processes"] / 3600
    numbers |= {"saved_steps": best["saved_steps"], "saved_device_hours": hours}
    return numbers if price_per_hour is None else {**numbers, "saved_cost": hours * price_per_hour}


def describe_saved(numbers: Mapping[str, float]) -> str:
    """What stopping early saved, such as `8 steps, 0.02 device hours and 0.05 of cost`; empty if nothing."""
    if "saved_steps" not in numbers:
        return ""
    steps, hours = f"{numbers['saved_steps']:,} steps", f"{numbers['saved_device_hours']:,.3g} device hours"
    if "saved_cost" not in numbers:
        return f"{steps} and {hours}"
    return f"{steps}, {hours} and {numbers['saved_cost']:,.3g} of cost"
