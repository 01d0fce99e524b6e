"""`finetune-plan`: what a training will take, before it takes anything.

Memory of a GPU by part, from the base model's configuration alone; steps and tokens, exactly, once `tokenized_dataset`
is made; hours and money, by what earlier trainings on the same hardware have shown.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_assets.artifacts.history import trainer_states
from finetune_assets.artifacts.kinds import BASE_MODELS, TOKENIZED
from finetune_assets.artifacts.lineage import Lineage, RawLineage
from finetune_assets.config.loading import load_experiment, load_raw_data_config
from finetune_assets.errors import UserError
from finetune_assets.resources import deployment
from finetune_assets.sources.base_models import BaseModelError, is_shape_file
from finetune_assets.store.errors import ArtifactMissing
from finetune_assets.tools.terminal import new_table, out, told

if TYPE_CHECKING:
    from finetune_assets.preflight.plan import Plan


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="finetune-plan", description=__doc__)
    parser.add_argument("experiment", help="the experiment's name")
    differ = "settings that differ, such as training.micro_batch_size=8"
    parser.add_argument("overrides", nargs="*", default=[], help=differ)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    args = parser.parse_args(arguments)
    try:
        with told():
            fits = plan(args.experiment, args.overrides, args.json)
        sys.exit(not fits)
    except (UserError, OSError) as e:
        sys.exit(f"finetune-plan: {e}")


def plan(experiment: str, overrides: list[str], as_json: bool) -> bool:
    """Print the plan of an experiment; whether it fits."""
    raw_config = load_raw_data_config(deployment.configs(), deployment.raw_data())
    raw = RawLineage(deployment.store(), raw_config, deployment.root(), connect=deployment.s3_client)
    lineage = Lineage(raw, load_experiment(deployment.configs(), experiment, overrides))
    config = lineage.experiment.config
    folder = shape_of(lineage)
    from finetune_assets.preflight.plan import make_plan, read_shape

    dataset = None
    with suppress(ArtifactMissing, BaseModelError):
        dataset = lineage.store.fetch(lineage.expected(TOKENIZED))
    made = make_plan(
        read_shape(folder, config, lineage.store.cache.simulations), config, dataset, trainer_states(lineage.store)
    )
    if as_json:
        out.print_json(json.dumps(made.to_dict()))
    else:
        show(experiment, made)
    return made.fits


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
        table.add_row("[bold]peak[/bold]", f"[bold]{sized(plan.memory.total)}[/bold]")
        table.add_row("usable", sized(plan.device.usable))
        out.print(table)
    if plan.checkpointing:
        out.print("gradient checkpointing: on")
    out.print()
    if plan.work:
        out.print(f"steps     {plan.work.steps:,}\ntokens    {plan.work.tokens:,}")
    known = "not known:" if plan.hours is None else f"{duration(plan.hours)}, by"
    out.print(f"time      {known} {plan.known_from}")
    if plan.cost is not None:
        out.print(f"cost      {plan.cost:,.2f}")
    out.print(f"\n{'' if plan.fits else '[red]'}{plan.told()}")


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
    with hub.explained(UserError, f"model.base_model: '{source.repo}'", source.repo, ""):
        found = hub.client().hf_hub_download(source.repo, "config.json", revision=source.revision)
    return Path(found).parent


def duration(hours: float) -> str:
    """For people."""
    seconds = hours * 3600
    if hours >= 2:
        return f"{hours:.1f} hours"
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} s"


if __name__ == "__main__":
    main()
