"""`finetune-sweep`: run the points of a sweep, and report what they found."""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence

from finetune_assets.artifacts.kinds import ADAPTERS
from finetune_assets.artifacts.layout import TRAINER_STATE
from finetune_assets.config.loading import load_sweep
from finetune_assets.config.sweeps import sweep_files
from finetune_assets.resources import deployment
from finetune_assets.resources.project import Project
from finetune_assets.store.artifacts import ArtifactStore
from finetune_assets.store.errors import ArtifactMissing
from finetune_assets.tools.terminal import Commands, new_table, out, picture

ASSETS = "dolly_raw,cached_base_model,tokenized_dataset,lora_adapter,adapter_evaluation"
QUIET = json.dumps({"loggers": {"console": {"config": {"log_level": "INFO"}}}})
CONFIDENCE = 0.95


def main(arguments: Sequence[str] | None = None) -> None:
    commands = Commands("finetune-sweep", __doc__ or "")
    commands.add("list", list_sweeps, "the sweeps in configs/sweeps, and how many of their points are done")
    commands.add("run", run, "materialize every point that is not done yet, one after the other").add_argument(
        "sweep", help="the sweep's name"
    )
    reporting = commands.add("report", report, "loss against size, time and memory; the smallest that is as good")
    reporting.add_argument("sweep", help="the sweep's name")
    reporting.add_argument("--plot", type=picture, help="also draw it, as .png or .svg")
    commands.run(arguments)


def list_sweeps(store: ArtifactStore, args: argparse.Namespace) -> bool:
    table = new_table("sweep", "points", "done")
    for path in sweep_files(deployment.configs()):
        names = [point.name for point in load_sweep(deployment.configs(), path.stem)]
        table.add_row(path.stem, str(len(names)), str(sum(map(_is_done, names))))
    out.print(table)
    return True


def run(store: ArtifactStore, args: argparse.Namespace) -> bool:
    points = load_sweep(deployment.configs(), args.sweep)
    failed = []
    for number, point in enumerate(points, 1):
        if _is_done(point.name):
            out.print(f"{number}/{len(points)} {point.name}: done already")
            continue
        out.print(f"{number}/{len(points)} {point.name}")
        command = ["dagster", "asset", "materialize", "--select", ASSETS, "--partition", point.name]
        command += ["-m", "finetune_assets.definitions", "--config-json", QUIET]
        if subprocess.call([sys.executable, "-m", *command]) != 0:
            failed.append(point.name)
    if failed:
        out.print(f"[red]failed: {', '.join(failed)}[/red]")
    return not failed


def report(store: ArtifactStore, args: argparse.Namespace) -> bool:
    from finetune_assets.evaluation import sweeps

    points, waiting = [], []
    for point in load_sweep(deployment.configs(), args.sweep):
        try:
            lineage = Project().lineage(point.name)
            adapter = lineage.expected(ADAPTERS)
            evaluation = store.fetch(lineage.evaluation(adapter))
            folder = store.fetch(adapter, lambda path: path == TRAINER_STATE)
            points.append(sweeps.found(point.name, point.settings, folder, evaluation))
        except ArtifactMissing:
            waiting.append(point.name)
    if not points:
        raise ArtifactMissing(f"{args.sweep}: no point is done yet; finetune-sweep run {args.sweep}")
    behind = sweeps.behind_best(points, CONFIDENCE)
    chosen = sweeps.smallest(points, behind)
    best = min(points, key=lambda point: point.loss)
    on_frontier = {point.name for point in sweeps.frontier(points, "parameters")}
    names = [*points[0].settings]
    table = new_table(*names, "parameters", "seconds", "MiB", "held-out loss", "behind the best", "forgetting", "")
    for trained in sorted(points, key=lambda one: one.parameters):
        gain = behind[trained.name]
        marks = ["frontier"] if trained.name in on_frontier else []
        marks += ["best"] if trained is best else []
        marks += ["[bold]smallest within noise[/bold]"] if trained is chosen else []
        table.add_row(
            *(str(trained.settings[name]) for name in names),
            f"{trained.parameters:,}",
            f"{trained.seconds:.1f}",
            f"{trained.memory:,}",
            f"{trained.loss:.4f}",
            "" if trained is best else f"{gain.mean:.4f} (at least {gain.lower:.4f})",
            "" if trained.forgetting is None else f"{trained.forgetting:.3f}",
            ", ".join(marks),
        )
    out.print(table)
    noise = f"({CONFIDENCE:.0%}, {len(best.rows)} validation rows)"
    if chosen is best:
        out.print(f"The best of {len(points)} is {best.name}; it beats all smaller ones beyond noise {noise}.")
    else:
        out.print(
            f"The best of {len(points)} is {best.name}. {chosen.name} is the smallest that it does not beat beyond "
            f"noise {noise}."
        )
    if waiting:
        out.print(f"Not done yet: {', '.join(waiting)}")
    if args.plot:
        sweeps.draw(points, chosen, f"Sweep {args.sweep}", args.plot)
        out.print(f"drawn in {args.plot}")
    return True


def _is_done(name: str) -> bool:
    try:
        Project().lineage(name).evaluation()
    except ArtifactMissing:
        return False
    return True


if __name__ == "__main__":
    main()
