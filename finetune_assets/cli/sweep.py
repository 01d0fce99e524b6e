"""`finetune sweep`: run the points of a sweep, and compare their results."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from finetune_assets.artifacts.kinds import ADAPTERS
from finetune_assets.artifacts.layout import TRAINER_STATE
from finetune_assets.cli.foreground import INTERRUPTED
from finetune_assets.cli.run import materialize
from finetune_assets.cli.terminal import StoreCommand, new_table, open_store, out, plot, styled
from finetune_assets.config.errors import ConfigError
from finetune_assets.config.loading import load_sweep
from finetune_assets.config.sweeps import sweep_files
from finetune_assets.resources import deployment
from finetune_assets.resources.project import Project
from finetune_assets.store.errors import ArtifactMissing

if TYPE_CHECKING:
    from finetune_assets.evaluation.sweeps import Found

ASSETS = "dolly_raw,cached_base_model,tokenized_dataset,lora_adapter,adapter_evaluation"
CONFIDENCE = 0.95


@click.group()
def sweep() -> None:
    """Run the sweeps in configs/sweeps/ and compare them.

    \b
    Examples:
      finetune new demo-ranks --from demo-ranks
      finetune sweep run demo-ranks
      finetune sweep report demo-ranks --plot ranks.svg
    """


@sweep.command("list", cls=StoreCommand)
def list_sweeps() -> bool:
    """List the sweeps, and how many of their points are done. Exit code 1 if a sweep's file is invalid."""
    table, problems = new_table("sweep", "points", "done"), list[ConfigError]()
    for path in sweep_files(deployment.configs()):
        try:
            names = [point.name for point in load_sweep(deployment.configs(), path.stem)]
        except ConfigError as e:
            problems.append(e)
            table.add_row(path.stem, "invalid", "")
            continue
        table.add_row(path.stem, str(len(names)), str(sum(map(_is_done, names))))
    out.print(table)
    for problem in problems:
        click.echo(f"Error: {problem}", err=True)
    return not problems


@sweep.command("run")
@click.argument("name", metavar="SWEEP")
@click.pass_context
def run(ctx: click.Context, name: str) -> None:
    """Run the points of SWEEP that are not done yet.

    One after the other. Exit code 1 if one fails; the others run. After Ctrl-C none does.
    """
    points = load_sweep(deployment.configs(), name)
    failed = []
    for number, point in enumerate(points, 1):
        if _is_done(point.name):
            out.print(f"{number}/{len(points)} {point.name}: already done")
            continue
        out.print(f"{number}/{len(points)} {point.name}")
        code = materialize(point.name, ASSETS)
        if code == INTERRUPTED:
            ctx.exit(code)
        if code != 0:
            failed.append(point.name)
    if failed:
        out.print(styled(f"Failed: {', '.join(failed)}", "red"))
        ctx.exit(1)


@sweep.command("report", cls=StoreCommand)
@click.argument("name", metavar="SWEEP")
@plot
def report(name: str, plot: Path | None) -> None:
    """Compare the points of SWEEP.

    Loss, size, time, memory, and the smallest adapter that is as good as the best.
    """
    from finetune_assets.evaluation import sweeps

    store = open_store()
    points, waiting = [], []
    for point in load_sweep(deployment.configs(), name):
        try:
            lineage = Project().lineage(point.name)
            adapter = lineage.expected(ADAPTERS)
            evaluation = store.fetch(lineage.evaluation(adapter))
            folder = store.fetch(adapter, lambda path: path == TRAINER_STATE)
            points.append(sweeps.found(point.name, point.settings, folder, evaluation))
        except ArtifactMissing:
            waiting.append(point.name)
    if not points:
        raise ArtifactMissing(f"{name}: no point is done yet; run them with `finetune sweep run {name}`")
    points = sweeps.over_seeds(points)
    behind = sweeps.behind_best(points, CONFIDENCE)
    chosen = sweeps.smallest(points, behind)
    best = min(points, key=lambda point: point.loss)
    on_frontier = {point.name for point in sweeps.frontier(points, "parameters")}
    keys, seeds = [*points[0].settings], ["seeds"] if points[0].of_seeds else []
    columns = "parameters", "seconds", "MiB", "held-out loss", "behind the best", "forgetting", ""
    table = new_table(*keys, *seeds, *columns)
    for trained in sorted(points, key=lambda one: one.parameters):
        gain = behind[trained.name]
        marks = ["frontier"] if trained.name in on_frontier else []
        marks += ["best"] if trained is best else []
        marks += ["smallest within noise"] if trained is chosen else []
        table.add_row(
            *(str(trained.settings[key]) for key in keys),
            *(str(len(trained.of_seeds)) for _ in seeds),
            f"{trained.parameters:,}",
            f"{trained.seconds:.1f}",
            f"{trained.memory:,}",
            _loss(trained),
            "" if trained is best else f"{gain.mean:.4f} (at least {gain.lower:.4f})",
            "" if trained.forgetting is None else f"{trained.forgetting:.3f}",
            styled(", ".join(marks), "bold" if trained is chosen else ""),
        )
    out.print(table)
    noise = f"({CONFIDENCE:.0%}, {len(best.rows)} validation rows)"
    if len({point.parameters for point in points}) == 1:
        near = ", ".join(point.name for point in points if point is not best and behind[point.name].lower <= 0)
        verdict = f". Within noise of it {noise}: {near}" if near else f"; it beats all others beyond noise {noise}."
        out.print(f"The best of {len(points)} is {best.name}{verdict}")
    elif chosen is best:
        out.print(f"The best of {len(points)} is {best.name}; it beats all smaller ones beyond noise {noise}.")
    else:
        out.print(
            f"The best of {len(points)} is {best.name}. {chosen.name} is the smallest that it does not beat beyond "
            f"noise {noise}."
        )
    if waiting:
        out.print(f"Not done yet: {', '.join(waiting)}")
    if plot:
        sweeps.draw(points, chosen, f"Sweep {name}", plot)
        out.print(f"Plot saved to {plot}")


def _loss(trained: "Found") -> str:
    """The held-out loss, and its range over several seeds."""
    mean, seeds = f"{trained.loss:.4f}", trained.of_seeds
    return f"{mean} ({seeds[0]:.4f} to {seeds[-1]:.4f})" if len(seeds) > 1 else mean


def _is_done(name: str) -> bool:
    try:
        Project().lineage(name).evaluation()
    except ArtifactMissing:
        return False
    return True
