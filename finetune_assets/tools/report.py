"""`finetune-report`: all experiments on one page, and any two runs side by side."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from finetune_assets.artifacts.champions import Champions
from finetune_assets.config.comparing import Difference
from finetune_assets.reporting.collect import collect
from finetune_assets.reporting.comparison import Comparison, Pair, compare
from finetune_assets.reporting.pages import as_html, moment
from finetune_assets.reporting.runs import adapters
from finetune_assets.resources import deployment
from finetune_assets.store.artifacts import ArtifactStore
from finetune_assets.store.gc import Artifact, Inventory, inventory
from finetune_assets.tools.terminal import NAMED, SHORT, Commands, new_table, one, out


def main(arguments: Sequence[str] | None = None) -> None:
    commands = Commands("finetune-report", __doc__ or "")
    page = commands.add("html", html, "write the page that the asset experiment_report publishes, as the store is now")
    page.add_argument("file", nargs="?", type=Path, default=Path("report.html"), help="report.html by default")
    comparing = commands.add("compare", compare_runs, "what differs between two runs, and all that was measured")
    for place in ("first", "second"):
        comparing.add_argument(
            place, help=f"an experiment, whose champion is taken, or its newest run where it has none; or {NAMED}"
        )
    comparing.add_argument("--json", action="store_true", help="print one JSON object")
    commands.run(arguments)


def html(store: ArtifactStore, args: argparse.Namespace) -> bool:
    report = collect(store, deployment.configs())
    args.file.parent.mkdir(parents=True, exist_ok=True)
    args.file.write_text(as_html(report), encoding="utf-8")
    for problem in report.problems:
        out.print(f"[red]{escape(problem)}[/red]")
    out.print(f"{len(report.experiments)} experiments, {len(report.trained)} with a run: {args.file}")
    return True


def compare_runs(store: ArtifactStore, args: argparse.Namespace) -> bool:
    found = inventory(store.objects)
    first, second = (_meant(store, found, name) for name in (args.first, args.second))
    compared = compare(store, found, first, second)
    if args.json:
        print(json.dumps(compared.to_dict(), ensure_ascii=False))
        return True
    titles = [f"{run.experiment} {run.fingerprint[:SHORT]}" for run in (compared.first, compared.second)]
    for title, run in zip(titles, (compared.first, compared.second), strict=True):
        alone = f", with {', '.join(run.overrides)}" if run.overrides else ""
        out.print(escape(f"{title}, made {moment(run.created)} UTC{alone}"))
    for what, differing in _parts(compared).items():
        out.print()
        out.print(_differing(what, differing, titles) if differing else f"{what}: no differences")
    out.print()
    if any(difference.setting == "tokenized_dataset" for difference in compared.inputs):
        out.print("Their datasets differ: losses are of other rows, or of other tokens of the same.")
    out.print(_measured(compared.numbers, titles))
    return True


def _meant(store: ArtifactStore, found: Inventory, name: str) -> Artifact:
    """The adapter of an experiment, or of a fingerprint."""
    ours = adapters(found, store.namespace)
    of_experiment = [artifact for artifact in ours if artifact.experiment == name]
    champion = Champions(store, name).current() if of_experiment else None
    serving = [artifact for artifact in ours if champion and artifact.manifest.fingerprint == champion.adapter]
    if of_experiment:
        return (serving or of_experiment)[0]
    return one(store, Inventory(ours, {}, {}, {}), name, "adapter or experiment with a run")


def _parts(compared: Comparison) -> dict[str, list[Difference]]:
    return {"setting": compared.settings, "made from": compared.inputs, "version": compared.versions}


def _differing(what: str, differing: list[Difference], titles: list[str]) -> Table:
    table = new_table(what, *titles)
    for difference in differing:
        table.add_row(difference.setting, escape(difference.before), escape(difference.after))
    return table


def _measured(numbers: list[Pair], titles: list[str]) -> Table:
    table = new_table("measured", *titles, "difference")
    for pair in numbers:
        table.add_row(pair.name, _number(pair.first), _number(pair.second), _number(pair.difference, "+"))
    return table


def _number(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign},.6g}"


if __name__ == "__main__":
    main()
