"""`finetune report` and `finetune compare`: pages of all experiments, and any two runs side by side."""

import json
from pathlib import Path

import click
from rich.table import Table

from finetune_assets.artifacts.champions import Champions
from finetune_assets.cli.terminal import (
    FOLDER,
    SHORT,
    StoreCommand,
    as_json,
    find_artifact,
    new_table,
    open_store,
    out,
    styled,
)
from finetune_assets.config.comparing import SettingDifference
from finetune_assets.reporting.collect import collect
from finetune_assets.reporting.comparison import Pair, RunComparison
from finetune_assets.reporting.comparison import compare as compare_adapters
from finetune_assets.reporting.page_names import moment, pages_folder
from finetune_assets.reporting.pages import write_html
from finetune_assets.reporting.runs import adapters
from finetune_assets.resources import deployment
from finetune_assets.store.artifacts import ArtifactStore
from finetune_assets.store.gc import Artifact, Inventory, inventory


@click.command(cls=StoreCommand)
@click.argument("file", type=FOLDER, default="report.html")
def report(file: Path) -> None:
    """Write the report of all experiments to FILE, and a page for each of them into a folder beside it.

    By default report.html and report-experiments/. The asset experiment_report publishes the same pages.
    """
    store = open_store()
    found = collect(store, deployment.configs())
    write_html(found, file, store.cache.derived)
    for problem in found.problems:
        out.print(styled(problem, "red"))
    out.print(f"Experiments: {len(found.experiments)}, with a run: {len(found.trained)}")
    out.print(f"Overview: {file}")
    out.print(f"Page of each experiment: {file.parent / pages_folder(file)}/")


@click.command(cls=StoreCommand)
@click.argument("first")
@click.argument("second")
@as_json
def compare(first: str, second: str, as_json: bool) -> None:
    """Compare two runs: settings, inputs and measurements.

    FIRST and SECOND are experiments (their champions, or their newest adapters), or fingerprints of adapters.
    """
    store = open_store()
    found = inventory(store.objects)
    compared = compare_adapters(store, found, *(_adapter_of(store, found, name) for name in (first, second)))
    if as_json:
        print(json.dumps(compared.to_dict()))
        return
    titles = [f"{run.experiment} {run.fingerprint[:SHORT]}" for run in (compared.first, compared.second)]
    for title, run in zip(titles, (compared.first, compared.second), strict=True):
        alone = f", with {', '.join(run.overrides)}" if run.overrides else ""
        out.print(f"{title}, made {moment(run.created)} UTC{alone}")
    for what, differing in _parts(compared).items():
        out.print()
        out.print(_differing(what, differing, titles) if differing else f"{what}: no differences")
    out.print()
    if any(difference.setting == "tokenized_dataset" for difference in compared.inputs):
        out.print("Their datasets differ: losses are of other rows, or of other tokens of the same.")
    out.print(_measured(compared.numbers, titles))


def _adapter_of(store: ArtifactStore, found: Inventory, name: str) -> Artifact:
    """The adapter of an experiment, or of a fingerprint."""
    ours = adapters(found, store.namespace)
    of_experiment = [artifact for artifact in ours if artifact.experiment == name]
    champion = Champions(store, name).current() if of_experiment else None
    serving = [artifact for artifact in ours if champion and artifact.manifest.fingerprint == champion.adapter]
    if of_experiment:
        return (serving or of_experiment)[0]
    return find_artifact(store, Inventory(ours, {}, {}, {}), name, "adapter or experiment with a run")


def _parts(compared: RunComparison) -> dict[str, list[SettingDifference]]:
    return {"setting": compared.settings, "made from": compared.inputs, "version": compared.versions}


def _differing(what: str, differing: list[SettingDifference], titles: list[str]) -> Table:
    table = new_table(what, *titles)
    for difference in differing:
        table.add_row(difference.setting, difference.before, difference.after)
    return table


def _measured(numbers: list[Pair], titles: list[str]) -> Table:
    table = new_table("measured", *titles, "difference")
    for pair in numbers:
        table.add_row(pair.name, _number(pair.first), _number(pair.second), _number(pair.difference, "+"))
    return table


def _number(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign},.6g}"
