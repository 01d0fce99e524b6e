"""A report as one page: HTML that needs nothing but itself, and Markdown with pictures."""

import json
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from finetune_assets.artifacts.layout import PAGE, PAGE_MARKDOWN, PAGE_NUMBERS
from finetune_assets.data.tables import cell
from finetune_assets.plots.style import ON_ANY_PAGE, as_address, as_markdown
from finetune_assets.reporting.collect import Report, Reported
from finetune_assets.reporting.columns import COLUMNS, EXPLAINED, pictures

SHORT = 12
MOST_LINES = 100
"""Experiments in the table of the Markdown, which Dagster keeps in its database."""


def write(report: Report, folder: Path) -> None:
    """The page, the same in Markdown, and all that it was made of as JSON."""
    numbers = json.dumps(asdict(report), indent=1, ensure_ascii=False)
    for name, text in {PAGE: as_html(report), PAGE_MARKDOWN: as_page(report), PAGE_NUMBERS: numbers}.items():
        (folder / name).write_text(text, encoding="utf-8")


def as_html(report: Report) -> str:
    """The whole page, as UTF-8 text; every word of a person's is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    pages = Environment(
        loader=PackageLoader("finetune_assets.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters.update(moment=moment, short=short)
    drawn = {what: as_address(figure) for what, figure in pictures(report, ON_ANY_PAGE).items()}
    page = pages.get_template("report.html.jinja")
    return page.render(report=report, columns=COLUMNS, explained=EXPLAINED, pictures=drawn)


def as_page(report: Report) -> str:
    """The same in Markdown, without the experiments' details."""
    trained = report.trained[:MOST_LINES]
    titles = ["experiment", "run", "made", *(column.title for column in COLUMNS)]
    lines = [_line(titles), _line(["---"] * len(titles)), *map(_of_experiment, trained)] if trained else []
    more = len(report.trained) - len(trained)
    broken = [f"{one.name} cannot be read: {one.error}" for one in report.experiments if one.error]
    parts = [
        "\n".join(lines) or "No experiment has a run yet.",
        f"{more} older ones stand on the page." if more else "",
        EXPLAINED if trained else "",
        *(as_markdown(figure, what) for what, figure in pictures(report).items()),
        "\n".join(f"- {cell(told)}" for told in [*broken, *report.problems]),
    ]
    return "\n\n".join(part for part in parts if part)


def _of_experiment(one: Reported) -> str:
    run = one.latest
    assert run is not None
    serves = "champion" if one.serves(run) else f"champion: {short(one.champion.adapter)}" if one.champion else ""
    name = f"**{cell(one.name)}**" + (f" ({serves})" if serves else "")
    return _line([name, f"`{short(run.fingerprint)}`", moment(run.created), *(column.of(run) for column in COLUMNS)])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def short(fingerprint: str) -> str:
    return fingerprint[:SHORT]


def moment(written: str) -> str:
    """In UTC, so that the page is the same wherever it is made."""
    return f"{datetime.fromisoformat(written):%Y-%m-%d %H:%M}"
