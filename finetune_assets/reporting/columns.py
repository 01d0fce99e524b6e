"""Columns of the table of runs."""

from collections.abc import Iterable
from dataclasses import dataclass

from finetune_assets.evaluation.metrics import ANSWER_METRICS, PREFERENCE_ACCURACY
from finetune_assets.reporting.runs import Run


@dataclass(frozen=True)
class Column:
    """A column of the table of runs.

    Attributes:
        title: Column title.
        number: Key in the numbers of a run.
        form: Format string.
        factor: Factor that the number is multiplied by before formatting.
    """

    title: str
    number: str
    form: str
    factor: float = 1.0

    def of(self, run: Run | None) -> str:
        value = self.value(run)
        return "" if value is None else self.form.format(value * self.factor)

    def value(self, run: Run | None) -> float | None:
        return run.numbers.get(self.number) if run else None


COLUMNS = (
    Column("base loss", "loss_base", "{:.4f}"),
    Column("champion loss", "loss_champion", "{:.4f}"),
    Column("run loss", "loss_challenger", "{:.4f}"),
    *(Column(metric.title, f"{metric.name}_challenger", metric.form) for metric in ANSWER_METRICS),
    Column(PREFERENCE_ACCURACY.title, f"{PREFERENCE_ACCURACY.name}_challenger", PREFERENCE_ACCURACY.form),
    Column("forgetting", "forgetting", "{:+.3f}"),
    Column("published step", "published_step", "{:,.0f}"),
    Column("tokens/s", "tokens_per_second", "{:,.0f}"),
    Column("MFU", "mfu", "{:.0%}"),
    Column("peak GiB", "peak_memory_mib", "{:.1f}", 1 / 1024),
    Column("hours", "training_hours", "{:.3g}"),
    Column("cost", "cost", "{:,.2f}"),
    Column("device hours saved", "saved_device_hours", "{:.3g}"),
    Column("cost saved", "saved_cost", "{:,.2f}"),
)
EXPLAINED = (
    "Losses are in nats per token on held-out rows, for the base model, the champion that the run was compared with, "
    "and the run. Exact match and ROUGE-L are measured on generated answers to held-out rows. Preference accuracy is "
    "the share of held-out judgements that the run follows more than the base model does. Forgetting is the loss "
    "of the run minus that of the base model on general text, in nats per token. Cost is hours x processes x "
    "hardware.price_per_hour. Hours and cost are saved where the training stopped early (training.patience)."
)


def filled(runs: Iterable[Run]) -> list[Column]:
    """The columns in which any of the runs has a value."""
    shown = list(runs)
    return [column for column in COLUMNS if any(column.value(run) is not None for run in shown)]
