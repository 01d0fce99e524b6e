"""Render a report as a self-contained HTML page, and as Markdown with embedded images."""

import json
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from finetune_assets.artifacts.layout import PAGE, PAGE_MARKDOWN, PAGE_NUMBERS
from finetune_assets.data.tables import rows_table
from finetune_assets.display import markdown
from finetune_assets.plots.style import ON_ANY_PAGE, as_address, as_markdown
from finetune_assets.reporting.collect import Report, Reported
from finetune_assets.reporting.columns import COLUMNS, EXPLAINED, pictures
from finetune_assets.reporting.modes import TITLES, mode_table

SHORT = 12
MOST_LINES = 100
"""Maximum number of experiments in the Markdown table, which Dagster stores in its database."""


def write(report: Report, folder: Path) -> None:
    """Write the report as HTML, as Markdown, and its data as JSON."""
    numbers = json.dumps(asdict(report), indent=1, ensure_ascii=False)
    for name, text in {PAGE: as_html(report), PAGE_MARKDOWN: as_page(report), PAGE_NUMBERS: numbers}.items():
        (folder / name).write_text(text, encoding="utf-8")


def as_html(report: Report) -> str:
    """Render the HTML page; all user-defined text is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    pages = Environment(
        loader=PackageLoader("finetune_assets.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters.update(moment=moment, short=short, mode_table=mode_table)
    drawn = {what: as_address(figure) for what, figure in pictures(report, ON_ANY_PAGE).items()}
    page = pages.get_template("report.html.jinja")
    return page.render(report=report, columns=COLUMNS, explained=EXPLAINED, pictures=drawn, mode_titles=TITLES)


def as_page(report: Report) -> str:
    """Render the report as Markdown, without the details of each experiment."""
    trained = report.trained[:MOST_LINES]
    titles = ["experiment", "run", "created (UTC)", *(column.title for column in COLUMNS)]
    lines = [_table_row(titles), _table_row(["---"] * len(titles)), *map(_experiment_row, trained)] if trained else []
    omitted = len(report.trained) - len(trained)
    broken = [f"{entry.name}: invalid settings: {entry.error}" for entry in report.experiments if entry.error]
    parts = [
        "\n".join(lines) or "No experiment has a run yet.",
        f"{omitted} older experiments are on the HTML page." if omitted else "",
        EXPLAINED if trained else "",
        *map(_mode_tables, trained),
        *(as_markdown(figure, what) for what, figure in pictures(report).items()),
        "\n".join(f"- {markdown(problem)}" for problem in [*broken, *report.problems]),
    ]
    return "\n\n".join(part for part in parts if part)


def _experiment_row(experiment: Reported) -> str:
    run = experiment.latest
    assert run is not None
    status = (
        "champion"
        if experiment.serves(run)
        else f"champion: {short(experiment.champion.adapter)}"
        if experiment.champion
        else ""
    )
    name = f"**{markdown(experiment.name)}**" + (f" ({status})" if status else "")
    return _table_row(
        [name, f"`{short(run.fingerprint)}`", moment(run.created), *(column.of(run) for column in COLUMNS)]
    )


def _mode_tables(experiment: Reported) -> str:
    """Tables of the modes of the latest run; empty without retrieval."""
    assert experiment.latest is not None
    found = {title: getattr(experiment.latest, name) for name, title in TITLES.items()}
    return "\n\n".join(
        f"**{markdown(experiment.name)}**: {title}\n\n{rows_table(*mode_table(modes))}"
        for title, modes in found.items()
        if modes
    )


def _table_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def short(fingerprint: str) -> str:
    return fingerprint[:SHORT]


def moment(written: str) -> str:
    """Format an ISO 8601 timestamp in UTC, so that the page does not depend on the local time zone."""
    return f"{datetime.fromisoformat(written):%Y-%m-%d %H:%M}"
