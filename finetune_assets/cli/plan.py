"""`finetune plan`: memory, time and cost of a training, before it starts.

Memory by part, from the base model's configuration alone; steps and tokens, exactly, once `tokenized_dataset` is
materialized; hours and cost, by what earlier trainings on the same hardware took.
"""

import atexit
import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import TYPE_CHECKING

import click

from finetune_assets.artifacts.history import trainer_states
from finetune_assets.artifacts.kinds import BASE_MODELS, TOKENIZED
from finetune_assets.artifacts.layout import read_object
from finetune_assets.artifacts.lineage import Lineage
from finetune_assets.artifacts.raw_lineage import RawLineage
from finetune_assets.cli.terminal import EXPERIMENT, StoreCommand, as_json, new_table, out, styled
from finetune_assets.config.loading import load_experiment, load_raw_data_config
from finetune_assets.errors import UserError
from finetune_assets.resources import deployment
from finetune_assets.serving.servable import problems
from finetune_assets.sources.base_models import BaseModelError, is_shape_file
from finetune_assets.sources.gguf.convert import write_config
from finetune_assets.store.errors import ArtifactMissing

if TYPE_CHECKING:
    from finetune_assets.preflight.plan import Plan


@click.command(cls=StoreCommand)
@click.argument("experiment", type=EXPERIMENT)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Plan with another setting.")
@as_json
def plan(experiment: str, overrides: tuple[str, ...], as_json: bool) -> bool:
    """Estimate memory, steps, time and cost of training EXPERIMENT.

    Needs no weights and, for a model that was planned before, no torch. Exit code 1 if it does not fit, or
    if a vLLM server cannot serve the adapter and the experiment has `serving` settings.

    \b
    Examples:
      finetune plan demo
      finetune plan demo --set hardware.gpu=H100 --set model.quantization=nf4
    """
    raw_config = load_raw_data_config(deployment.configs(), deployment.raw_data())
    raw = RawLineage(
        deployment.store(), raw_config, deployment.root(), connect=deployment.s3_client, configs=deployment.configs()
    )
    lineage = Lineage(raw, load_experiment(deployment.configs(), experiment, list(overrides)))
    config = lineage.experiment.config
    folder = shape_of(lineage)
    from finetune_assets.preflight.plan import make_plan, read_shape

    dataset = None
    with suppress(ArtifactMissing, BaseModelError):
        dataset = lineage.store.fetch(lineage.expected(TOKENIZED))
    planned = make_plan(
        read_shape(folder, config, lineage.store.cache.simulations), config, dataset, trainer_states(lineage.store)
    )
    found = problems(config, read_object(folder / "config.json"))
    if as_json:
        out.print_json(json.dumps({**planned.to_dict(), "not_servable": list(map(str, found))}), ensure_ascii=True)
    else:
        show(experiment, planned)
        for problem in found:
            out.print(styled(f"{problem.heading}: {problem}", "yellow"))
    return planned.fits and not (config.serving and any(problem.refused for problem in found))


def show(experiment: str, plan: "Plan") -> None:
    """Print a plan for people."""
    from finetune_assets.preflight.plan import sized

    each = "GPU" if plan.device.kind == "cuda" else "process"
    out.print(f"{experiment} on {plan.device.processes} x {plan.device.name}\n")
    if plan.memory:
        table = new_table(f"of a {each}", "size")
        for name, size in plan.memory.parts.items():
            if size:
                table.add_row(name, sized(size))
        table.add_row(styled("peak", "bold"), styled(sized(plan.memory.total), "bold"))
        table.add_row("usable", sized(plan.device.usable))
        out.print(table)
    if plan.checkpointing:
        out.print("gradient checkpointing: on")
    out.print()
    if plan.work:
        fewest = plan.work.fewest_steps
        least = f", at least {fewest:,} (training.patience)" if fewest < plan.work.steps else ""
        out.print(f"steps     {plan.work.steps:,}{least}\ntokens    {plan.work.tokens:,}")
        if plan.work.evaluations:
            out.print(f"measured  {plan.work.evaluations:,} times, about {plan.work.evaluation_share:.1%} of the time")
    estimate = "unknown:" if plan.hours is None else f"{duration(plan.hours)}, from"
    out.print(f"time      {estimate} {plan.known_from}")
    if plan.cost is not None:
        out.print(f"cost      {plan.cost:,.2f}")
    out.print(styled(f"\n{plan.summary()}", "" if plan.fits else "red"))


def shape_of(lineage: Lineage) -> Path:
    """Folder of the base model's config.json, and of no more than that where it is not here yet.

    Raises:
        UserError: if there is no such model.
    """
    from finetune_assets.sources import hub

    setting = lineage.experiment.config.model.base_model
    folder = lineage.raw.root / Path(setting).expanduser()
    if setting.startswith((".", "/", "~")) and (folder / "config.json").is_file():
        return folder  # weights or not
    with suppress(ArtifactMissing):
        return lineage.store.fetch(lineage.expected(BASE_MODELS), is_shape_file)
    source = replace(lineage, asks_hub=True).base_source()
    if source.folder:
        return source.folder
    if source.gguf:
        folder = Path(mkdtemp(prefix="finetune-plan-"))
        atexit.register(rmtree, folder, ignore_errors=True)
        write_config(source.gguf, folder)
        return folder
    with hub.explained(UserError, f"model.base_model: '{source.repo}'", source.repo, ""):
        found = hub.client().hf_hub_download(source.repo, "config.json", revision=source.revision)
    return Path(found).parent


def duration(hours: float) -> str:
    """For people."""
    seconds = hours * 3600
    if hours >= 2:
        return f"{hours:.1f} hours"
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} s"
