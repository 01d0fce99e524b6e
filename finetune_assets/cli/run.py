"""`finetune run`: materialize an experiment's assets, as `dagster asset materialize` does."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence

import click

from finetune_assets.artifacts.raw_lineage import refuse_missing_sources
from finetune_assets.cli.terminal import EXPERIMENT, out, styled
from finetune_assets.config.loading import load_experiment, load_raw_data_config
from finetune_assets.resources import deployment

ALL = "*"
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
SUPERSEDED = "ignore:Function `asset_materialize_command`"
"""Filter of Dagster's advice to use `dg launch` instead."""


@click.command()
@click.argument("experiment", type=EXPERIMENT)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting for this run.")
@click.option("--select", default=ALL, show_default=True, help="Assets to materialize, in Dagster's selection syntax.")
@click.option("--force", is_flag=True, help="Materialize even where the store has the same artifact.")
@click.option("--log-level", type=click.Choice(LEVELS), default="INFO", show_default=True, help="Of the terminal.")
def run(experiment: str, overrides: tuple[str, ...], select: str, force: bool, log_level: str) -> None:
    """Prepare data, train, evaluate and promote EXPERIMENT.

    Materializes its assets, and prints the `dagster` command that it runs. What the store has already is reused. An
    adapter that was trained with --set is never promoted automatically.

    \b
    Examples:
      finetune run demo
      finetune run demo --set training.learning_rate=1e-4 --set lora.rank=16
      finetune run demo --select lora_adapter --force
    """
    loaded = load_experiment(deployment.configs(), experiment, list(overrides))  # fails here, not in a minute
    if select == ALL:
        refuse_missing_sources(loaded, load_raw_data_config(deployment.configs(), deployment.raw_data()))
    sys.exit(materialize(experiment, select, overrides, force, log_level))


def materialize(
    experiment: str,
    select: str = ALL,
    overrides: Sequence[str] = (),
    force: bool = False,
    log_level: str = "INFO",
    environment: Mapping[str, str] | None = None,
) -> int:
    """Run `dagster asset materialize` for one experiment, in a process of its own, and print its command.

    Args:
        experiment: Name of the experiment, or of a point of a sweep.
        select: Assets, in Dagster's selection syntax.
        overrides: Settings of this run, as `training.learning_rate=1e-4`.
        force: Materialize even where the store has the same artifact.
        log_level: Of what is printed.
        environment: Variables of the process, beside those of this one.

    Returns:
        Its exit code.
    """
    command = materialize_command(experiment, select, overrides, force, log_level)
    out.print(styled(f"$ {shlex.join(command)}", "bold"))
    filters = [filter for filter in (os.environ.get("PYTHONWARNINGS"), SUPERSEDED) if filter]
    variables = {**os.environ, "PYTHONWARNINGS": ",".join(filters), **(environment or {})}
    return subprocess.call([sys.executable, "-m", *command], env=variables)


def materialize_command(
    experiment: str, select: str, overrides: Sequence[str], force: bool, log_level: str
) -> list[str]:
    """The `dagster` command of a run; only what differs from Dagster's defaults is in its configuration."""
    project = {**({"overrides": list(overrides)} if overrides else {}), **({"force": True} if force else {})}
    config: dict[str, object] = {"resources": {"project": {"config": project}}} if project else {}
    if log_level != "DEBUG":
        config["loggers"] = {"console": {"config": {"log_level": log_level}}}
    command = ["dagster", "asset", "materialize", "--select", select, "--partition", experiment]
    command += ["-m", "finetune_assets.definitions"]
    return command + (["--config-json", json.dumps(config)] if config else [])
