"""`finetune-plan`: what a training will take, before it takes anything.

Memory of a GPU by part, from the base model's configuration alone; steps and tokens, exactly, once `tokenized_dataset`
is made; hours and money, by what earlier trainings on the same hardware have shown.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from finetune_assets.contents import TRAINER_STATE
from finetune_assets.errors import UserError
from finetune_assets.resources.project import Project
from finetune_assets.store.artifacts import ADAPTERS, ArtifactStore
from finetune_assets.store.base_models import BaseModelError
from finetune_assets.store.care import inventory
from finetune_assets.store.errors import ArtifactMissing
from finetune_assets.store.lineage import Lineage
from finetune_assets.store.terminal import new_table, out, told

GIB = 1 << 30
LOOKED_BACK = 20
"""Newest adapters that are asked how fast they were trained."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="finetune-plan", description=__doc__)
    parser.add_argument("experiment", help="the experiment's name")
    parser.add_argument("overrides", nargs="*", help="settings that differ, such as training.micro_batch_size=8")
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
    project = Project(overrides=overrides)
    lineage = project.lineage(experiment)
    config = lineage.experiment.config
    folder = shape_of(lineage)
    from transformers import AutoConfig

    from finetune_assets.preflight.memory import described
    from finetune_assets.preflight.plan import Past, make_plan

    shape = AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=bool(config.model.trust_remote_code)
    )
    dataset = None
    with suppress(ArtifactMissing, BaseModelError):
        dataset = lineage.store.fetch(lineage.tokenized())
    past = [found for state in past_states(lineage.store) if (found := Past.of(state))]
    made = make_plan(shape, config, dataset, past)
    if as_json:
        work = made.work and {"steps": made.work.steps, "tokens": made.work.tokens}
        told = {"memory_mib": described(made.memory), "fits": made.fits, "advice": made.advice, "work": work}
        out.print_json(json.dumps({**told, "hours": made.hours, "cost": made.cost}))
        return made.fits
    device = made.device
    each = "GPU" if device.kind == "cuda" else "process"
    table = new_table(f"of a {each}", "GiB")
    for name, size in made.memory.parts.items():
        if size:
            table.add_row(name, f"{size / GIB:.2f}")
    table.add_row("[bold]peak[/bold]", f"[bold]{made.memory.total / GIB:.2f}[/bold]")
    out.print(f"{experiment} on {device.processes} x {device.name}, {device.usable / GIB:.1f} GiB of each usable\n")
    out.print(table)
    if made.checkpointing:
        out.print("with activations computed twice (training.gradient_checkpointing)")
    out.print()
    if made.work:
        out.print(f"steps     {made.work.steps:,}\ntokens    {made.work.tokens:,}")
    if made.hours is None:
        out.print(f"time      not known: {made.known_from}")
    else:
        out.print(f"time      {_duration(made.hours)}, by {made.known_from}")
    if made.cost is not None:
        out.print(f"cost      {made.cost:,.2f}")
    out.print("\nit fits" if made.fits else "\n[red]it does not fit.[/red] What would, by itself:")
    for way in made.advice:
        out.print(f"  {way}")
    return made.fits


def shape_of(lineage: Lineage) -> Path:
    """Folder of the base model's config.json, and of no more than that where it is not here yet.

    Raises:
        UserError: if there is no such model.
    """
    from finetune_assets import hub

    setting = lineage.experiment.config.model.base_model
    folder = lineage.raw.root / Path(setting).expanduser()
    if setting.startswith((".", "/", "~")) and (folder / "config.json").is_file():
        return folder  # weights or not
    with suppress(ArtifactMissing):
        return lineage.store.fetch(lineage.base_model(), lambda path: path.endswith((".json", ".py")))
    source = lineage.base_source()
    if source.folder:
        return source.folder
    with hub.explained(UserError, f"model.base_model: '{source.repo}'", source.repo, ""):
        found = hub.client().hf_hub_download(source.repo, "config.json", revision=source.revision)
    return Path(found).parent


def past_states(store: ArtifactStore) -> Iterator[dict[str, Any]]:
    """Trainer states of the newest adapters."""
    found = [artifact for artifact in inventory(store.objects).artifacts if artifact.kind == ADAPTERS]
    for artifact in sorted(found, key=lambda one: one.created, reverse=True)[:LOOKED_BACK]:
        with suppress(UserError, OSError, ValueError):
            ref = store.ref(artifact.kind, artifact.name, artifact.manifest)
            folder = store.fetch(ref, lambda path: path == TRAINER_STATE)
            yield json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))


def _duration(hours: float) -> str:
    seconds = hours * 3600
    if hours >= 2:
        return f"{hours:.1f} hours"
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} s"


if __name__ == "__main__":
    main()
