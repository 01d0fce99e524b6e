"""`finetune adapter`: champions and their history, manual promotion and rollback, publishing and verification."""

import getpass
import json
import socket
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import click
from rich.tree import Tree

from finetune_assets.artifacts.champions import Champions, Record
from finetune_assets.artifacts.evaluations import newest_evaluations
from finetune_assets.artifacts.kinds import ADAPTERS, BASE_MODELS, CHAMPIONS, EVALUATIONS, STACKS
from finetune_assets.artifacts.layout import NOT_ON_THE_HUB, SIGNATURE
from finetune_assets.artifacts.update_spectrum import ENERGY, suggested
from finetune_assets.cli.signing import key_fingerprint, sign, signature_problems
from finetune_assets.cli.terminal import (
    EXPERIMENT,
    FOLDER,
    SHORT,
    StoreGroup,
    ancestors,
    as_json,
    copy_out,
    find_artifact,
    label,
    local_time,
    new_table,
    open_store,
    out,
    plot,
    styled,
)
from finetune_assets.cli.verification import against_manifest, against_sums, published_artifact
from finetune_assets.config.errors import ConfigError, suggest
from finetune_assets.config.loading import experiment_names, load_experiment
from finetune_assets.errors import UserError
from finetune_assets.evaluation.files import read_evaluation
from finetune_assets.reporting.wandb_champion import log_champion
from finetune_assets.resources import deployment
from finetune_assets.serving.rollback import move_back
from finetune_assets.serving.servers import servers_of
from finetune_assets.store.artifacts import ArtifactRef, ArtifactStore
from finetune_assets.store.errors import ArtifactMissing, StoreError
from finetune_assets.store.gc import inventory
from finetune_assets.worker.model_libraries import import_lean

experiment_argument = click.argument("experiment", type=EXPERIMENT)
signing_key = click.option(
    "--sign",
    "signing_key",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="KEY",
    help="Sign the files with this private key (PEM, elliptic curve); needs the extra `signing`.",
)
reason = click.option("--reason", required=True, help="Why; recorded in the history.")


@click.group(cls=StoreGroup)
def adapter() -> None:
    """List, promote, roll back, fetch and publish adapters.

    ADAPTER is a fingerprint or name, or the first characters of one.

    \b
    Examples:
      finetune adapter champions
      finetune adapter rollback demo --reason "stutters on lists"
      finetune adapter fetch demo ./adapter
    """


@adapter.command()
@click.argument("experiment", type=EXPERIMENT, required=False)
@as_json
def champions(experiment: str | None, as_json: bool) -> bool:
    """List the champion of EXPERIMENT, or of each one."""
    store = open_store()
    names = [experiment] if experiment else experiments_with_champions(store)
    records, problems = {}, []
    for name in names:
        try:
            if record := Champions(store, name).current():
                records[name] = record
        except StoreError as e:  # of one experiment; others are shown
            problems.append(str(e))
    for problem in problems:
        click.echo(problem, err=True)
    if as_json:
        _print_json([asdict(record) for record in records.values()])
        return not problems
    if not records:
        out.print(f"No champion{f' of {experiment}' if experiment else ''} yet; materialize champion_adapter")
        return not problems
    table = new_table("experiment", "champion", "adapter", "since", "why")
    for name, record in records.items():
        why = f"{record.action}: {record.reason}"
        table.add_row(name, str(record.number), record.adapter[:SHORT], _time_of(record), why)
    out.print(table)
    return not problems


def experiments_with_champions(store: ArtifactStore) -> list[str]:
    keys = (stored.key for stored in store.objects.listing(f"{store.namespace}/{CHAMPIONS.folder}/"))
    return sorted({key.split("/")[2] for key in keys})


@adapter.command()
@experiment_argument
@as_json
def history(experiment: str, as_json: bool) -> None:
    """List the champions that EXPERIMENT had, and why."""
    records = Champions(open_store(), experiment).history()
    if not records:
        raise StoreError(f"{experiment}: no adapter was promoted yet; see the check `gate` of champion_adapter")
    if as_json:
        _print_json([asdict(record) for record in records])
        return
    table = new_table("", "when", "what", "adapter", "by", "why")
    for record in records:
        number, fingerprint = str(record.number), record.adapter[:SHORT]
        table.add_row(number, _time_of(record), record.action, fingerprint, record.by, record.reason)
    out.print(table)


@adapter.command()
@experiment_argument
@click.argument("adapter")
@reason
def promote(experiment: str, adapter: str, reason: str) -> None:
    """Promote ADAPTER manually to champion of EXPERIMENT."""
    store, known = open_store(), experiment_names(deployment.configs())
    if experiment not in known:
        raise StoreError(f"no experiment '{experiment}'; {suggest(experiment, known)}")
    ref = _adapter(store, adapter)
    manifest, fingerprint = store.manifest(ref.kind, ref.name), ref.fingerprint[:SHORT]
    trained_for = manifest.made_from.get("experiment") if manifest else None
    if trained_for != experiment:
        out.print(f"Note: {fingerprint} was trained for experiment {trained_for}, with its settings")
    if ref.fingerprint not in newest_evaluations(inventory(store.objects), store.namespace):
        out.print(
            f"Note: {fingerprint} was not evaluated, so it may be worse than its base model, and no server can be "
            f"verified with it; materialize adapter_evaluation of {trained_for}"
        )
    record = Champions(store, experiment).promote_by_hand(ref, reason, _user())
    if record is None:
        out.print(f"{fingerprint} is already the champion of {experiment}")
        return
    out.print(f"{fingerprint} is the champion of {experiment} (record {record.number})")
    _log_to_wandb(store, record)


@adapter.command("rollback")
@experiment_argument
@click.option("--to", type=int, metavar="NUMBER", help="Record to roll back to; by default the one before.")
@reason
def roll_back(experiment: str, to: int | None, reason: str) -> None:
    """Make an earlier champion of EXPERIMENT the champion again."""
    store = open_store()
    record = Champions(store, experiment).roll_back(reason, _user(), to)
    out.print(
        f"{record.adapter[:SHORT]} is the champion of {experiment} again (record {record.number}); "
        f"{(record.before or '')[:SHORT]} is excluded from automatic promotion"
    )
    _move_alias(store, record)
    _log_to_wandb(store, record)


@adapter.command("fetch")
@experiment_argument
@click.argument("folder", type=FOLDER)
@click.option("--with-index", is_flag=True, help="Also copy the index of its documents, into FOLDER-index.")
@signing_key
def fetch_champion(experiment: str, folder: Path, with_index: bool, signing_key: Path | None) -> None:
    """Copy the champion's files into a new FOLDER.

    The files are verified; FOLDER must not exist, or be empty.
    """
    store = open_store()
    champion = Champions(store, experiment).champion()
    if champion is None:
        raise ArtifactMissing(f"{experiment} has no champion yet")
    index = _index_of(experiment) if with_index else None
    copy_out(store, champion, folder)
    out.print(f"Champion {champion.fingerprint[:SHORT]} of {experiment} stored in {folder}")
    if index:
        copy_out(store, index, beside := folder.with_name(f"{folder.name}-index"))
        out.print(f"Retrieval index {index.fingerprint[:SHORT]} stored in {beside}")
    if signing_key:
        out.print(f"Signed with key {sign(folder, signing_key)}")
    manifest = store.manifest(champion.kind, champion.name)
    origin = manifest.made_from if manifest else {}
    if str(origin.get("base_model", "")).startswith(NOT_ON_THE_HUB):
        base = f"{BASE_MODELS.folder}/{origin['base_model']}/{origin['revision']}"
        out.print(f"Its base model: finetune store fetch {base} ./base")


@adapter.command()
@experiment_argument
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Create the repository as private.")
@signing_key
def publish(experiment: str, repo: str, private: bool, signing_key: Path | None) -> None:
    """Upload the champion of EXPERIMENT to the Hub.

    Its evaluation is added to the model card. The repository is created if it does not exist. HF_TOKEN needs
    permission to write.
    """
    from finetune_assets.cli import publishing

    store = open_store()
    champions = Champions(store, experiment)
    record = champions.current()
    if record is None:
        raise ArtifactMissing(f"{experiment} has no champion yet")
    measured = store.find(EVALUATIONS.folder, record.evaluation) if record.evaluation else None
    evaluation = read_evaluation(store.fetch(measured)) if measured else None
    with store.cache.workspace("publish") as folder:
        files = store.fetch(champions.adapter(record))
        address = publishing.publish(files, evaluation, repo, private, folder, signing_key)
    out.print(f"Champion {record.number} of {experiment}, {record.adapter[:SHORT]}: {address}")


@adapter.command("updates")
@click.argument("adapter")
@plot
def show_updates(adapter: str, plot: Path | None) -> None:
    """Show the size of each module's update.

    Also the rank that it needs. ADAPTER may be an experiment, whose champion is taken, or a folder.
    """
    from finetune_assets.plots import modules
    from finetune_assets.plots.style import save

    updates = import_lean("finetune_assets.training.updates").updates(folder_of(open_store(), adapter))
    table = new_table("module", "rank", "norm", "effective rank", f"rank for {ENERGY:.0%}")
    for update in updates:
        numbers = (f"{update.norm:.3g}", f"{update.effective_rank:.1f}", str(update.enough))
        table.add_row(update.module, str(update.rank), *numbers)
    out.print(table)
    usual, pattern = suggested(updates)
    out.print(f"Ranks that keep {ENERGY:.0%} of each update's squared norm, as settings of an experiment:\n")
    out.print("lora:\n  rank: " + str(usual) + ("\n  rank_pattern:" if pattern else ""))
    for module, rank in pattern.items():
        out.print(f"    {module}: {rank}")
    if plot:
        save(modules.updates(updates, f"Updates of {adapter}"), plot)
        out.print(f"\nPlot saved to {plot}")


@adapter.command()
@click.argument("folder", type=FOLDER)
@click.option("--namespace", help="Compare with the adapters of this namespace instead of your own.")
@click.option(
    "--key",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Public key (PEM) that must have signed the folder.",
)
def verify(folder: Path, namespace: str | None, key: Path | None) -> bool:
    """Verify an adapter's FOLDER, and show its provenance.

    Compares it with its checksums, with its signature if a key is given, and with the adapters of your namespace in the
    store: others may publish anything under the same fingerprint in theirs. Exit code 1 if a file differs, if the
    signature is missing or of another key, or if the namespace does not have the adapter (unless a signature proves its
    origin).
    """
    problems = against_sums(folder)
    if key:
        unsigned = signature_problems(folder, key)
        problems += unsigned
        if not unsigned:
            out.print(f"Signed with key {key_fingerprint(key)} ({key})")
    elif (folder / SIGNATURE).exists():
        out.print(f"Note: {SIGNATURE} was not checked; name the public key with --key")
    own = open_store()
    store = ArtifactStore(own.objects, namespace or own.namespace, own.cache)
    found = inventory(store.objects)
    artifact = published_artifact(found, folder, store.namespace)
    if artifact is None:
        missing = (
            f"Namespace {store.namespace} of {store.url} has no adapter with its fingerprint; the files were not "
            "compared with it. If a colleague trained it, name the colleague's namespace in --namespace"
        )
        if key and not problems:
            out.print(f"Note: {missing}")
        else:
            problems.append(missing)
    else:
        problems += against_manifest(folder, artifact)
        title = f"{label(artifact)} of namespace {store.namespace}, {local_time(artifact.created)}, made from"
        out.print(ancestors(found, artifact, Tree(title)))
        for record in _records_of(store, artifact.manifest.fingerprint, problems):
            why = f"{record.action} {_time_of(record)}, {record.reason}"
            out.print(f"Champion {record.number} of {record.experiment}: {why}")
    for problem in problems:
        out.print(styled(problem, "red"))
    whose = "" if artifact is None or problems else f", as published in namespace {store.namespace}"
    out.print(f"{folder}:", styled("not verified", "red") if problems else f"verified{whose}")
    return not problems


def _records_of(store: ArtifactStore, fingerprint: str, problems: list[str]) -> list[Record]:
    """The promotions of an adapter; unreadable records are added to `problems`."""
    records = []
    for name in experiments_with_champions(store):
        try:
            records += [record for record in Champions(store, name).history() if record.adapter == fingerprint]
        except StoreError as e:
            problems.append(str(e))
    return records


def folder_of(store: ArtifactStore, name: str) -> Path:
    """The files of an adapter: a folder, an experiment's champion, or the adapter of a fingerprint.

    Raises:
        ArtifactMissing: if `name` is none of these.
    """
    if (Path(name) / "adapter_config.json").is_file():
        return Path(name)
    champion = Champions(store, name).champion() if "/" not in name else None
    try:
        return store.fetch(champion or _adapter(store, name))
    except ArtifactMissing as e:
        raise ArtifactMissing(f"'{name}': no experiment with a champion, no folder of an adapter, and {e}") from e


def _adapter(store: ArtifactStore, name: str) -> ArtifactRef:
    found = inventory(store.objects)
    found.artifacts[:] = [artifact for artifact in found.artifacts if artifact.kind in (ADAPTERS.folder, STACKS.folder)]
    artifact = find_artifact(store, found, name, "adapter")
    return store.ref(artifact.kind, artifact.name, artifact.manifest)


def _index_of(experiment: str) -> ArtifactRef:
    """The current index of an experiment's documents.

    Raises:
        UserError: if the experiment retrieves nothing, or the index was not built yet.
    """
    from finetune_assets.resources.project import Project  # imports dagster

    index = Project().lineage(experiment).index()
    if index is None:
        raise UserError(f"{experiment}: data.retrieval is not set, so there is no index; leave out --with-index")
    return index


def _log_to_wandb(store: ArtifactStore, record: Record) -> None:
    """Move the alias `champion` in Weights & Biases too, if the experiment logs its adapters there."""
    try:
        settings = load_experiment(deployment.configs(), record.experiment).config.wandb
    except ConfigError as e:  # the champion has changed all the same
        out.print(f"Weights & Biases: not updated, the settings cannot be read: {e}")
        return
    log_champion(settings, record, store, out.print)


def _move_alias(store: ArtifactStore, record: Record) -> None:
    """Let the experiment's servers answer with its champion again, if they still have it loaded."""
    try:
        servers = servers_of(load_experiment(deployment.configs(), record.experiment).config, deployment.root())
        if servers:
            served = move_back(store, record, servers, _user())
            out.print(f"{served.name} serves {record.experiment} again (record {served.number}); no files were moved")
    except UserError as e:  # the champion has changed all the same
        out.print(f"The servers still answer as before: {e}. To serve the champion, materialize served_adapter")


def _user() -> str:
    return f"{getpass.getuser()}@{socket.gethostname()}"


def _time_of(record: Record) -> str:
    return local_time(datetime.fromisoformat(record.at))


def _print_json(value: object) -> None:
    print(json.dumps(value))
