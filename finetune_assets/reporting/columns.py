"""What is shown of a run in one line, and in the pictures of all of them."""

from dataclasses import dataclass
from typing import Any

from finetune_assets.plots.bars import by_experiment
from finetune_assets.plots.style import OF_CONTENDER, ON_WHITE, Look
from finetune_assets.plots.training import Curve, overlaid
from finetune_assets.reporting.collect import Report
from finetune_assets.reporting.runs import Run

MOST_BARS = 12


@dataclass(frozen=True)
class Column:
    """One number of a run.

    Attributes:
        title: For people.
        number: Its name among the run's numbers.
        form: How it is written.
        factor: What it is multiplied with before.
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
    Column("loss of the base", "loss_base", "{:.4f}"),
    Column("of the champion", "loss_champion", "{:.4f}"),
    Column("of this run", "loss_challenger", "{:.4f}"),
    Column("exact match", "exact_match_challenger", "{:.1%}"),
    Column("ROUGE-L", "rouge_l_challenger", "{:.3f}"),
    Column("forgetting", "forgetting", "{:+.3f}"),
    Column("tokens/s", "tokens_per_second", "{:,.0f}"),
    Column("MFU", "mfu", "{:.0%}"),
    Column("peak GiB", "peak_memory_mib", "{:.1f}", 1 / 1024),
    Column("hours", "training_hours", "{:.3g}"),
    Column("cost", "cost", "{:,.2f}"),
)
EXPLAINED = (
    "Losses are nats a token on held-out rows: of the base model, of the champion that the run was measured against, "
    "and of the run itself. Exact match and ROUGE-L are of answers to such rows. Forgetting is how many nats a token "
    "worse than the base a run is on general text. Cost is hours x processes x hardware.price_per_hour."
)


def pictures(report: Report, look: Look = ON_WHITE) -> dict[str, Any]:
    """Figures of the latest runs by what they show; none where there is nothing to show."""
    latest = [(one.name, one.latest) for one in report.experiments if one.latest]
    curves = [Curve(name, run.steps, run.losses) for name, run in latest if run.steps]
    losses = {
        name: {who: run.numbers.get(f"loss_{who}") for who in OF_CONTENDER}
        for name, run in latest
        if "loss_challenger" in run.numbers
    }
    newest = dict([*losses.items()][:MOST_BARS])
    found = {"Training loss of the latest runs": overlaid(curves, look)} if curves else {}
    return found | ({"Held-out loss of the latest runs": by_experiment(newest, look)} if newest else {})
