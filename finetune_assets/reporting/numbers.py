"""Measurements of an adapter, with the same names in Dagster metadata (and its plots), the report, and comparisons of
two runs."""

from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from finetune_assets.config.retrieval_validation import RETRIEVED
from finetune_assets.evaluation.files import forgetting_of
from finetune_assets.evaluation.metrics import METRICS
from finetune_assets.training.best_step import published, training_seconds

Numbers = dict[str, float]
CONTENDERS = ("base", "champion", "challenger")
"""Models of an evaluation, in the order in which they are shown."""


def in_order(contenders: Iterable[str]) -> list[str]:
    """Names of contenders in the order in which they are shown."""
    return sorted(contenders, key=lambda name: CONTENDERS.index(name) if name in CONTENDERS else len(CONTENDERS))


def of_training(state: Mapping[str, Any]) -> Numbers:
    """Return the measurements in a trainer state; empty for an adapter combined from others."""
    history = state["history"]
    if not history:
        return {}
    seconds, last = training_seconds(state), history[-1]
    held_out = {f"held_out_loss_{when}": loss for when, loss in state["held_out_loss"].items() if loss is not None}
    return {
        **{name: round(loss, 4) for name, loss in held_out.items()},
        "train_loss": round(last["loss"], 4),
        **_of_selection(state),
        "steps": state["step"],
        "tokens": state["tokens"],
        "training_seconds": round(seconds, 1),
        "training_hours": round(seconds / 3600, 4),
        "device_hours": round(seconds * state["active"]["processes"] / 3600, 4),
        "tokens_per_second": round(state["tokens"] / state["seconds"], 1),
        "trainable_parameters": state["trainable_parameters"],
        "mfu": round(median(entry["mfu"] for entry in history), 3),
        "peak_memory_mib": state["peak_memory_mib"],
        "grad_norm": round(last["grad_norm"], 4),
    }


def _of_selection(state: Mapping[str, Any]) -> Numbers:
    """Step of the published adapter, what stopping early saved, and the time of evaluations over that of the steps."""
    share = state.get("evaluation_seconds", 0.0) / state["seconds"]
    numbers = {name: round(number, 4) for name, number in published(state).items()}
    return {**numbers, **({"evaluation_time_share": round(share, 4)} if share else {})}


def of_evaluation(evaluation: Mapping[str, Any]) -> Numbers:
    """Return the metrics of each contender (such as `loss_challenger`), and forgetting in nats per token."""
    forgetting = forgetting_of(evaluation)
    numbers = _by_metric(evaluation["contenders"])
    numbers |= {} if forgetting is None else {"forgetting": forgetting}
    for mode, measured in evaluation.get("modes", {}).items():
        if mode != RETRIEVED:  # the mode that serves has the names of evaluations without modes
            numbers |= {f"{name}_{mode}": value for name, value in _by_metric(measured["contenders"]).items()}
    return numbers


def _by_metric(contenders: Mapping[str, Mapping[str, float]]) -> Numbers:
    """Metrics of all contenders, those of one metric beside each other."""
    measured = {metric for metrics in contenders.values() for metric in metrics}
    known = [metric.name for metric in METRICS if metric.name in measured]
    return {
        f"{metric}_{name}": contenders[name][metric]
        for metric in (*known, *sorted(measured - {*known}))
        for name in in_order(contenders)
        if metric in contenders[name]
    }


def with_cost(numbers: Numbers, price_per_hour: float | None) -> Numbers:
    """Add the cost of all devices, if the price is set."""
    hours = numbers.get("device_hours")
    if price_per_hour is None or hours is None:
        return numbers
    saved = numbers.get("saved_device_hours")
    costs = {"cost": hours, **({} if saved is None else {"saved_cost": saved})}
    return numbers | {name: round(price_per_hour * spent, 4) for name, spent in costs.items()}
