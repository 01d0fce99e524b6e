"""Identity of the settings that choose the step whose adapter is published."""

from typing import Any

from finetune_assets.config.schema import ExperimentConfig


def selection_identity(config: ExperimentConfig) -> dict[str, Any]:
    """Settings of the choice that determine the bytes of an adapter; empty without evaluations.

    An adapter of the last step does not depend on when the training evaluated, unless it stops early.
    """
    training = config.training
    is_evaluated = training.eval_steps is not None and config.data.val_fraction > 0
    if not is_evaluated or (training.keep == "last" and training.patience is None):
        return {}
    settings = {"keep": training.keep or "best", "eval_steps": training.eval_steps, "patience": training.patience}
    return settings if training.patience is None else {**settings, "min_improvement": training.min_improvement}
