"""Plots of the report: of the latest run of each experiment, and of the runs of one experiment."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from finetune_assets.plots.bars import by_mode, by_run
from finetune_assets.plots.plot_cache import drawn_once
from finetune_assets.plots.preferences import margins
from finetune_assets.plots.style import OF_CONTENDER, ON_ANY_PAGE, ON_WHITE, Look, as_address, as_markdown
from finetune_assets.plots.training import Curve, overlaid
from finetune_assets.reporting.collect import Report, Reported
from finetune_assets.reporting.page_names import short
from finetune_assets.reporting.runs import Run
from finetune_assets.store.results import Results

MOST_BARS = 12
NamedRun = tuple[str, Run]


@dataclass(frozen=True)
class Plot:
    """A plot that has not been drawn yet.

    Attributes:
        title: Title, also the alternative text.
        draw: Draws it for a page.
        shown: The data in the plot.
    """

    title: str
    draw: Callable[[Look], Any]
    shown: Any

    def address(self, drawn: Results) -> str | None:
        """Data URI for an HTML page; None if plotting fails."""
        return drawn_once(f"report, SVG: {self.title}", lambda: as_address(self.draw(ON_ANY_PAGE)), drawn, self.shown)

    def markdown(self, drawn: Results) -> str | None:
        """Image for a Markdown page; None if plotting fails."""
        draw = lambda: as_markdown(self.draw(ON_WHITE), self.title)  # noqa: E731
        return drawn_once(f"report, PNG: {self.title}", draw, drawn, self.shown)


def of_latest_runs(report: Report) -> list[Plot]:
    """Plots of the latest run of each experiment; those without data are omitted."""
    latest = [(entry.name, entry.latest) for entry in report.experiments if entry.latest]
    plots = [_losses("Training loss of the latest runs", latest), _held_out("Held-out loss of the latest runs", latest)]
    return [plot for plot in plots if plot]


def of_experiment(experiment: Reported) -> dict[str, Plot]:
    """Plots of the runs of an experiment, by section of its page; those without data are omitted."""
    named = [(_name(experiment, run), run) for run in experiment.runs]
    plots = {
        "losses": _losses("Training and held-out loss of the runs", named, with_held_out=True),
        "held_out": _held_out("Held-out loss of the runs, with base and champion", named),
        "modes": modes_of(experiment),
        "margins": _margins(experiment.evaluated),
    }
    return {section: plot for section, plot in plots.items() if plot}


def modes_of(experiment: Reported) -> Plot | None:
    """Loss and exact match by retrieval mode; None without retrieval."""
    run = experiment.evaluated
    if run is None or not run.modes:
        return None
    return Plot(f"Retrieval modes of {experiment.name}", lambda look: by_mode(run.modes, look), run.modes)


def _name(experiment: Reported, run: Run) -> str:
    return short(run.fingerprint) + (" (champion)" if experiment.is_champion(run) else "")


def _losses(title: str, runs: Iterable[NamedRun], with_held_out: bool = False) -> Plot | None:
    curves = [
        Curve(name, run.steps, run.losses, run.held_out if with_held_out else ()) for name, run in runs if run.steps
    ]
    return Plot(title, lambda look: overlaid(curves, look), [asdict(curve) for curve in curves]) if curves else None


def _held_out(title: str, runs: Iterable[NamedRun]) -> Plot | None:
    losses = {
        name: {contender: run.numbers.get(f"loss_{contender}") for contender in OF_CONTENDER}
        for name, run in runs
        if "loss_challenger" in run.numbers
    }
    newest = dict([*losses.items()][:MOST_BARS])
    return Plot(title, lambda look: by_run(newest, look), [*newest.items()]) if newest else None


def _margins(run: Run | None) -> Plot | None:
    histograms = run.preferences.get("margins") if run else None
    if not histograms:
        return None
    return Plot("Reward margins of the held-out judgements", lambda look: margins(histograms, look), histograms)
