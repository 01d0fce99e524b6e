"""`finetune store`: list, inspect, verify and clean up the artifacts in the store."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
from rich.text import Text
from rich.tree import Tree

from finetune_assets.artifacts.kinds import RETENTION
from finetune_assets.cli.terminal import (
    FOLDER,
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
    short,
    styled,
)
from finetune_assets.config.loading import load_store_config
from finetune_assets.progress import gigabytes
from finetune_assets.resources import deployment
from finetune_assets.store.artifacts import ArtifactStore
from finetune_assets.store.gc import Artifact, Inventory, inventory, plan, remove, used_by


@click.group(cls=StoreGroup)
def store() -> None:
    """Inspect, verify and clean up the artifact store.

    ARTIFACT is a name or fingerprint, or the first characters of one; KIND/NAME where that is ambiguous.

    \b
    Examples:
      finetune store list adapters --json
      finetune store show 3fa9
      finetune store gc --delete
    """


@store.command("list")
@click.argument("kind", required=False)
@click.option("--all-namespaces", is_flag=True, help="Include the artifacts of other namespaces.")
@as_json
def list_artifacts(kind: str | None, all_namespaces: bool, as_json: bool) -> None:
    """List artifacts, newest first.

    Of one KIND (raw, base-models, tokenized, adapters, ...), or of all. With --json, one JSON object a line.
    """
    store = open_store()
    found = inventory(store.objects)
    shown = [
        artifact
        for artifact in found.artifacts
        if (all_namespaces or artifact.namespace in ("", store.namespace)) and kind in (None, artifact.kind)
    ]
    if as_json:
        for artifact in shown:
            print(json.dumps(_as_json(store, artifact)))
        for problem in found.problems:
            click.echo(problem, err=True)
        return
    columns = ("kind", "name", "experiment", "files", "size", "created")
    table = new_table(*columns, *(["namespace"] if all_namespaces else []))
    for artifact in shown:
        files, size = str(len(artifact.manifest.files)), gigabytes(artifact.manifest.size)
        row = [artifact.kind, short(artifact), artifact.experiment, files, size, local_time(artifact.created)]
        table.add_row(*row, *([artifact.namespace] if all_namespaces else []))
    out.print(table)
    out.print(f"{len(shown)} artifacts, {gigabytes(sum(a.manifest.size for a in shown))} in {store.url}")
    _print_unreadable(found)


@store.command()
@click.argument("artifact")
@as_json
def show(artifact: str, as_json: bool) -> None:
    """Show an artifact's files and provenance."""
    store = open_store()
    found = inventory(store.objects)
    shown = find_artifact(store, found, artifact)
    if as_json:
        contents = [{"path": file.path, "size": file.size, "sha256": file.sha256} for file in shown.manifest.files]
        print(json.dumps({**_as_json(store, shown), "contents": contents}))
        return
    _print_artifact(store, found, shown)


def _print_artifact(store: ArtifactStore, found: Inventory, artifact: Artifact) -> None:
    out.print(styled(f"{artifact.kind}/{artifact.name}", "bold"))
    facts = {
        "fingerprint": artifact.manifest.fingerprint,
        "uri": f"{store.url}/{artifact.prefix}/{artifact.manifest.folder}",
        "created": local_time(artifact.created),
        **{f"from {name}": value for name, value in artifact.manifest.made_from.items()},
    }
    table = new_table("", "")
    table.show_header = False
    for name, value in facts.items():
        table.add_row(name, value if isinstance(value, str) else json.dumps(value))
    out.print(table)
    files = new_table("file", "size", "sha256")
    for file in artifact.manifest.files:
        files.add_row(file.path, gigabytes(file.size), file.sha256)
    out.print(files)
    out.print(ancestors(found, artifact, Tree("made from")))
    users = Tree("used by")
    for other in used_by(found, artifact):
        users.add(label(other))
    out.print(users)


@store.command("fetch")
@click.argument("artifact")
@click.argument("folder", type=FOLDER)
def fetch_artifact(artifact: str, folder: Path) -> None:
    """Copy an artifact's files into a new FOLDER.

    The files are verified; FOLDER must not exist, or be empty.
    """
    store = open_store()
    found = find_artifact(store, inventory(store.objects), artifact)
    copy_out(store, store.ref(found.kind, found.name, found.manifest), folder)
    out.print(f"{label(found)} stored in {folder}")


@store.command("verify")
@click.argument("artifacts", nargs=-1)
@click.option("--cache", is_flag=True, help="Verify this machine's cache instead, and evict what is damaged.")
def verify_artifacts(artifacts: tuple[str, ...], cache: bool) -> bool:
    """Compare every byte with the manifests.

    Of ARTIFACTS, or of all. Exit code 1 if one is damaged.
    """
    store = open_store()
    if cache:
        return _verify_cache(store)
    found = inventory(store.objects)
    all_ours = [artifact for artifact in found.artifacts if artifact.namespace in ("", store.namespace)]
    wanted = [find_artifact(store, found, name) for name in artifacts] if artifacts else all_ours
    whole = True
    for artifact in wanted:
        bad = store.verify(artifact.kind, artifact.name)
        whole &= not bad
        out.print(_state(bool(bad)), f"{label(artifact)} {', '.join(bad)}")
    _print_unreadable(found)
    if not whole:
        out.print("Materialize the asset of a damaged artifact again, with force, to replace it.")
    return whole and not found.problems


def _verify_cache(store: ArtifactStore) -> bool:
    whole = True
    for cached in store.cache.entries():
        bad = cached.entry.damaged()
        whole &= not bad
        removed = bool(bad) and cached.entry.remove()
        action = "evicted; fetched again when needed" if removed else "in use: end what uses it, then verify again"
        out.print(_state(bool(bad)), f"{cached.entry.label} {', '.join(bad)}" + (f" ({action})" if bad else ""))
    return whole


def _state(is_damaged: bool) -> Text:
    return styled("damaged", "red") if is_damaged else Text("whole  ")


@store.command("cache")
def show_cache() -> None:
    """Show what this machine's cache holds."""
    store = open_store()
    entries = sorted(store.cache.entries(), key=lambda cached: cached.used, reverse=True)
    table = new_table("artifact", "size", "last used", "")
    for cached in entries:
        table.add_row(
            cached.entry.name, gigabytes(cached.size), local_time(cached.used), "in use" if cached.in_use else ""
        )
    out.print(table)
    limit = "" if store.cache.limit is None else f" of at most {gigabytes(store.cache.limit)} (FINETUNE_CACHE_LIMIT)"
    out.print(f"{gigabytes(sum(cached.size for cached in entries))}{limit} in {store.cache.root}")


@store.command("gc")
@click.option("--delete", is_flag=True, help="Remove it.")
@click.option("--older-than", type=float, metavar="DAYS", help="Instead of keep_days.")
def collect_garbage(delete: bool, older_than: float | None) -> None:
    """Show what may be removed; --delete removes it.

    According to configs/store.yaml.
    """
    store = open_store()
    config = load_store_config(deployment.configs())
    if older_than is not None:
        config.keep_days = older_than
    found = inventory(store.objects)
    removals = plan(found, store.namespace, config, RETENTION)
    table = new_table("what", "size", "why")
    for removal in removals:
        if delete and not remove(store, removal):
            continue  # somebody has published there since
        what = removal.prefix if removal.whole else f"{removal.prefix}/{removal.attempt}"
        table.add_row(what, gigabytes(removal.size), removal.why)
    if table.row_count:
        out.print(table)
    before = datetime.now(UTC) - timedelta(days=config.keep_days)
    uploads = [
        key
        for prefix in (f"{store.namespace}/", "base-models/")
        for key in store.objects.abort_uploads(prefix, before, dry_run=not delete)
    ]
    scratch = store.cache.old_scratch(before, dry_run=not delete)
    done = "removed" if delete else "to remove"
    size = gigabytes(sum(removal.size for removal in removals))
    out.print(
        f"{done}: {table.row_count} artifacts or attempts ({size}), {len(uploads)} unfinished uploads, "
        f"{len(scratch)} interrupted trainings on this host; all older than {config.keep_days:g} days"
    )
    if not delete:
        out.print("Nothing was removed. Run again with --delete.")
    _print_unreadable(found)
    if names := sorted(found.incomplete):
        out.print(
            styled(
                "As long as these are in the store, no base model is removed, and no artifact of "
                f"{', '.join(names)}: they may refer to them.",
                "red",
            )
        )


def _as_json(store: ArtifactStore, artifact: Artifact) -> dict[str, object]:
    manifest = artifact.manifest
    return {
        "namespace": artifact.namespace,
        "kind": artifact.kind,
        "name": artifact.name,
        "fingerprint": manifest.fingerprint,
        "uri": f"{store.url}/{artifact.prefix}/{manifest.folder}",
        "files": len(manifest.files),
        "bytes": manifest.size,
        "created": manifest.created,
        "made_from": manifest.made_from,
    }


def _print_unreadable(found: Inventory) -> None:
    for problem in found.problems:
        out.print(styled(problem, "red"))
