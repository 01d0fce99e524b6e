"""`finetune run`: materialize an experiment's assets in this process, with an account of what each has found."""

import os
import time
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

import click

from finetune_assets.artifacts.raw_lineage import refuse_missing_sources
from finetune_assets.cli.foreground import INTERRUPTED, in_own_group
from finetune_assets.cli.terminal import EXPERIMENT, out
from finetune_assets.config.loading import load_experiment, load_raw_data_config
from finetune_assets.display import message
from finetune_assets.resources import deployment

if TYPE_CHECKING:
    import dagster as dg

    from finetune_assets.cli.account import Account

ALL = "*"
ALL_ASSETS = "__ASSET_JOB"
"""Name that Dagster gives the job of all assets, under which the UI shows a run as one of assets."""
DEFINITIONS = "finetune_assets.definitions"
"""Imported by name, as workspace.yaml does: the definitions are above the command line, and are loaded last."""
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


@click.command()
@click.argument("experiment", type=EXPERIMENT)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting for this run.")
@click.option("--select", default=ALL, show_default=True, help="Assets to materialize, in Dagster's selection syntax.")
@click.option("--force", is_flag=True, help="Materialize even where the store has the same artifact.")
@click.option("-v", "--verbose", is_flag=True, help="Print Dagster's log instead of the account.")
@click.option("--log-level", type=click.Choice(LEVELS), default="INFO", show_default=True, help="Of Dagster's log.")
@click.pass_context
def run(
    ctx: click.Context,
    experiment: str,
    overrides: tuple[str, ...],
    select: str,
    force: bool,
    verbose: bool,
    log_level: str,
) -> None:
    """Prepare data, train, evaluate and promote EXPERIMENT.

    Materializes its assets, and prints for each whether it was computed or reused, and what it has found. An adapter
    that was trained with --set is never promoted automatically. With DAGSTER_HOME, the run is recorded in the UI.

    \b
    Examples:
      finetune run demo
      finetune run demo --set training.learning_rate=1e-4 --set lora.rank=16
      finetune run demo --select lora_adapter --force
    """
    deployment.use_dagster_home()
    loaded = load_experiment(deployment.configs(), experiment, list(overrides))  # fails here, not in a minute
    if select == ALL:
        refuse_missing_sources(loaded, load_raw_data_config(deployment.configs(), deployment.raw_data()))
    ctx.exit(materialize(experiment, select, overrides, force, log_level if verbose else None))


def materialize(
    experiment: str,
    select: str = ALL,
    overrides: Sequence[str] = (),
    force: bool = False,
    log_level: str | None = None,
) -> int:
    """Materialize assets of one experiment, and print an account, which ends with the error if any.

    In a terminal this is done in a child process, which alone gets Ctrl-C; see `in_own_group`.

    Args:
        experiment: Name of the experiment, or of a point of a sweep.
        select: Assets, in Dagster's selection syntax, separated by commas.
        overrides: Settings of this run, as `training.learning_rate=1e-4`.
        force: Materialize even where the store has the same artifact.
        log_level: Print Dagster's log from this level on, instead of the account.

    Returns:
        The exit code.
    """
    return in_own_group(lambda: _materialize(experiment, select, overrides, force, log_level))


def _materialize(experiment: str, select: str, overrides: Sequence[str], force: bool, log_level: str | None) -> int:
    if log_level is None:
        warnings.simplefilter("ignore")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of the processes that train
    import dagster as dg

    from finetune_assets.cli.account import Account

    account, began = Account(prints=log_level is None), time.monotonic()
    try:
        success = _execute(account, experiment, select, overrides, force, log_level)
    except dg.DagsterExecutionInterruptedError:
        account.outcomes.interrupted, success = True, False
    except dg.DagsterError as e:  # for example, no such asset
        return _failed(str(e))
    if account.outcomes.interrupted:
        click.echo("Interrupted. The same command continues: a training resumes from its last checkpoint", err=True)
        return INTERRUPTED
    if not success:
        return _failed(account.outcomes.first_error)
    computed, reused = len(account.outcomes.computed), len(account.outcomes.reused)
    if log_level is None:
        out.print(f"{experiment}: {computed} computed, {reused} cache hits, in {time.monotonic() - began:.0f} s")
    return 0


def _failed(error: str) -> int:
    """Print an error as the last line, as other commands do."""
    click.echo(f"Error: {message(error, lines=True)}", err=True)
    return 1


def _execute(
    account: "Account", experiment: str, select: str, overrides: Sequence[str], force: bool, log_level: str | None
) -> bool:
    """Run the job of the selected assets, and return whether it has succeeded."""
    import dagster as dg

    defs = import_module(DEFINITIONS).defs
    console = {"console": dg.colored_console_logger, "account": account.logger()}
    complete = dg.Definitions.merge(defs, dg.Definitions(loggers=console))
    keys = dg.AssetSelection.from_coercible(select.split(",")).resolve(complete.resolve_asset_graph())
    loggers = {"account": {}} if log_level is None else {"console": {"config": {"log_level": log_level}}, "account": {}}
    project = {"overrides": list(overrides), "force": force}
    with _instance() as instance:
        result = complete.resolve_job_def(ALL_ASSETS).execute_in_process(
            run_config={"resources": {"project": {"config": project}}, "loggers": loggers},
            instance=instance,
            asset_selection=sorted(keys),
            partition_key=experiment,
            raise_on_error=False,
        )
    return bool(result.success)


def _instance() -> "dg.DagsterInstance":
    """The instance in DAGSTER_HOME, or without it a temporary one in memory."""
    import dagster as dg

    return dg.DagsterInstance.get() if os.environ.get("DAGSTER_HOME") else dg.DagsterInstance.ephemeral()
