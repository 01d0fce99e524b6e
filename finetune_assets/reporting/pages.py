"""The report as HTML: an overview of all experiments, and a page for each of them."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from finetune_assets.artifacts.layout import PAGE, PAGE_MARKDOWN, PAGE_NUMBERS
from finetune_assets.display import plain
from finetune_assets.evaluation.metrics import PREFERENCE_METRICS
from finetune_assets.reporting.collect import Report, Reported
from finetune_assets.reporting.columns import EXPLAINED, filled
from finetune_assets.reporting.figures import Plot, of_experiment, of_latest_runs
from finetune_assets.reporting.histories import gain, verifications
from finetune_assets.reporting.markdown_page import as_markdown_page
from finetune_assets.reporting.modes import TITLES, mode_table
from finetune_assets.reporting.numbers import CONTENDERS
from finetune_assets.reporting.page_names import moment, page_file, pages_folder, short
from finetune_assets.reporting.run_inputs import inputs_of
from finetune_assets.store.results import Results

if TYPE_CHECKING:
    from jinja2 import Template


def write(report: Report, folder: Path, drawn: Results) -> None:
    """Write the report as HTML, as Markdown, and its data as JSON.

    Args:
        report: The report.
        folder: Folder of the files.
        drawn: Cache of plots.
    """
    write_html(report, folder / PAGE, drawn)
    (folder / PAGE_MARKDOWN).write_text(as_markdown_page(report, drawn), encoding="utf-8")
    (folder / PAGE_NUMBERS).write_text(json.dumps(asdict(report), indent=1, ensure_ascii=False), encoding="utf-8")


def write_html(report: Report, file: Path, drawn: Results) -> None:
    """Write the overview, and the pages of the experiments into a folder beside it, one at a time."""
    pages = file.parent / pages_folder(file)
    pages.mkdir(parents=True, exist_ok=True)
    for name, text in experiment_pages(report, file, drawn):
        (pages / name).write_text(text, encoding="utf-8")
    file.write_text(overview(report, file, drawn), encoding="utf-8")


def overview(report: Report, file: Path, drawn: Results) -> str:
    """Render the overview; all user-defined text is escaped.

    Args:
        report: The report.
        file: File of the overview, from which its links begin.
        drawn: Cache of plots.
    """
    runs = [experiment.latest for experiment in report.trained if experiment.latest]
    return _template("report.html.jinja").render(
        report=report,
        columns=filled(runs),
        explained=EXPLAINED,
        plots=_addresses(of_latest_runs(report), drawn),
        pages=quote(pages_folder(file)),
    )


def experiment_pages(report: Report, file: Path, drawn: Results) -> Iterator[tuple[str, str]]:
    """Yield the file name and the text of each experiment's page."""
    for experiment in report.experiments:
        yield page_file(experiment.name), _experiment_page(report, experiment, file, drawn)


def _experiment_page(report: Report, experiment: Reported, file: Path, drawn: Results) -> str:
    plots = of_experiment(experiment)
    pictures = {section: _addresses([plot], drawn) for section, plot in plots.items()}
    return _template("experiment.html.jinja").render(
        report=report,
        experiment=experiment,
        overview=quote(file.name),
        columns=filled(experiment.runs),
        explained=EXPLAINED,
        plots=pictures,
        mode_titles=TITLES,
        contenders=CONTENDERS,
        preference_metrics=PREFERENCE_METRICS,
    )


def _addresses(plots: list[Plot], drawn: Results) -> dict[str, str]:
    """Data URIs by title."""
    return {plot.title: address for plot in plots if (address := plot.address(drawn))}


@cache
def _template(name: str) -> "Template":
    """A template that escapes all values, and shows characters that hide or reorder others as escapes."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    def visible(value: Any) -> Any:
        return plain(value, lines=True) if isinstance(value, str) and not isinstance(value, Markup) else value

    pages = Environment(
        loader=PackageLoader("finetune_assets.reporting"),
        autoescape=True,
        finalize=visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters.update(
        moment=moment,
        short=short,
        mode_table=mode_table,
        page_file=page_file,
        gain=gain,
        verifications=verifications,
        inputs_of=inputs_of,
    )
    return pages.get_template(name)
