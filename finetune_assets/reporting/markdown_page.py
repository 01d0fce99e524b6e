"""The report as Markdown with embedded images, for Dagster's metadata."""

from finetune_assets.data.tables import rows_table
from finetune_assets.display import markdown
from finetune_assets.reporting.collect import Report, Reported
from finetune_assets.reporting.columns import EXPLAINED, Column, filled
from finetune_assets.reporting.figures import MOST_BARS, modes_of, of_latest_runs
from finetune_assets.reporting.modes import TITLES, mode_table
from finetune_assets.reporting.page_names import moment, short
from finetune_assets.store.results import Results

MOST_LINES = 100
"""Maximum number of experiments in the table, which Dagster stores in its database."""


def as_markdown_page(report: Report, drawn: Results) -> str:
    """Render the overview, with the modes of the experiments that retrieve.

    Args:
        report: The report.
        drawn: Cache of plots.
    """
    trained = report.trained[:MOST_LINES]
    columns = filled(entry.latest for entry in trained if entry.latest)
    titles = ["experiment", "run", "created (UTC)", *(column.title for column in columns)]
    lines = [
        _table_row(titles),
        _table_row(["---"] * len(titles)),
        *(_experiment_row(entry, columns) for entry in trained),
    ]
    omitted = len(report.trained) - len(trained)
    broken = [f"{entry.name}: invalid settings: {entry.error}" for entry in report.experiments if entry.error]
    modes = [plot for entry in trained if (plot := modes_of(entry))][:MOST_BARS]
    parts = [
        "\n".join(lines) if trained else "No experiment has a run yet.",
        f"{omitted} older experiments are on the HTML page." if omitted else "",
        EXPLAINED if trained else "",
        *map(_mode_tables, trained),
        *(plot.markdown(drawn) for plot in [*of_latest_runs(report), *modes]),
        "\n".join(f"- {markdown(problem)}" for problem in [*broken, *report.problems]),
    ]
    return "\n\n".join(part for part in parts if part)


def _experiment_row(experiment: Reported, columns: list[Column]) -> str:
    run = experiment.latest
    assert run is not None
    status = (
        "champion"
        if experiment.is_champion(run)
        else f"champion: {short(experiment.champion.adapter)}"
        if experiment.champion
        else ""
    )
    name = f"**{markdown(experiment.name)}**" + (f" ({status})" if status else "")
    return _table_row(
        [name, f"`{short(run.fingerprint)}`", moment(run.created), *(column.of(run) for column in columns)]
    )


def _mode_tables(experiment: Reported) -> str:
    """Tables of the modes of the newest evaluated run; empty without retrieval."""
    run = experiment.evaluated
    found = {title: getattr(run, name) for name, title in TITLES.items()} if run else {}
    return "\n\n".join(
        f"**{markdown(experiment.name)}**: {title}\n\n{rows_table(*mode_table(modes))}"
        for title, modes in found.items()
        if modes
    )


def _table_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
