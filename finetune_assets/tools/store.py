"""`finetune-store`: what the store holds, where it came from, whether it is whole, and what may go."""

import argparse
import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from rich.tree import Tree

from finetune_assets.artifacts.kinds import RETENTION
from finetune_assets.config.loading import load_store_config
from finetune_assets.progress import gigabytes
from finetune_assets.resources import deployment
from finetune_assets.store.artifacts import ArtifactStore
from finetune_assets.store.gc import Artifact, Inventory, inventory, plan, remove, used_by
from finetune_assets.tools.terminal import (
    NAMED,
    Commands,
    ancestors,
    copy_out,
    label,
    new_table,
    one,
    out,
    short,
    when,
)


def main(arguments: Sequence[str] | None = None) -> None:
    _commands().run(arguments)


def _commands() -> Commands:
    commands = Commands("finetune-store", __doc__ or "")
    add = commands.add
    listing = add("list", list_artifacts, "list artifacts, newest first")
    listing.add_argument("kind", nargs="?", help="raw, base-models, tokenized, adapters or evaluations; all without")
    listing.add_argument("--all-namespaces", action="store_true", help="also those of others")
    listing.add_argument("--json", action="store_true", help="one JSON object a line")
    add("show", show, "where an artifact came from, its files, and what was made from it").add_argument(
        "name", help=NAMED
    )
    fetch = add("fetch", fetch_artifact, "copy an artifact's files, verified, into a new folder")
    fetch.add_argument("name", help=NAMED)
    fetch.add_argument("folder", type=Path, help="must not exist, or be empty")
    verify = add("verify", verify_artifacts, "read every byte and compare with the manifests; exit code 1 if damaged")
    verify.add_argument("name", nargs="*", help=f"{NAMED}; all without")
    verify.add_argument("--cache", action="store_true", help="this machine's cache instead; what is damaged leaves it")
    add("cache", show_cache, "what this machine's cache keeps")
    collect = add("gc", collect_garbage, "show what may go, by configs/store.yaml; --delete removes it")
    collect.add_argument("--delete", action="store_true", help="remove it")
    collect.add_argument("--older-than", type=float, metavar="DAYS", help="instead of keep_days")
    return commands


def list_artifacts(store: ArtifactStore, args: argparse.Namespace) -> bool:
    found = inventory(store.objects)
    shown = [
        artifact
        for artifact in found.artifacts
        if (args.all_namespaces or artifact.namespace in ("", store.namespace)) and args.kind in (None, artifact.kind)
    ]
    if args.json:
        for artifact in shown:
            print(json.dumps(_as_json(store, artifact)))
        return True
    table = new_table(
        "kind", "name", "experiment", "files", "size", "made", *(["namespace"] if args.all_namespaces else [])
    )
    for artifact in shown:
        files, size = str(len(artifact.manifest.files)), gigabytes(artifact.manifest.size)
        row = [artifact.kind, short(artifact), artifact.experiment, files, size, when(artifact.created)]
        table.add_row(*row, *([artifact.namespace] if args.all_namespaces else []))
    out.print(table)
    out.print(f"{len(shown)} artifacts, {gigabytes(sum(a.manifest.size for a in shown))} in {store.url}")
    _tell_unreadable(found)
    return True


def show(store: ArtifactStore, args: argparse.Namespace) -> bool:
    found = inventory(store.objects)
    artifact = one(store, found, args.name)
    out.print(f"[bold]{artifact.kind}/{artifact.name}[/bold]")
    facts = {
        "fingerprint": artifact.manifest.fingerprint,
        "uri": f"{store.url}/{artifact.prefix}/{artifact.manifest.folder}",
        "made": when(artifact.created),
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
    return True


def fetch_artifact(store: ArtifactStore, args: argparse.Namespace) -> bool:
    artifact = one(store, inventory(store.objects), args.name)
    copy_out(store, store.ref(artifact.kind, artifact.name, artifact.manifest), args.folder)
    out.print(f"{label(artifact)} stored in {args.folder}")
    return True


def verify_artifacts(store: ArtifactStore, args: argparse.Namespace) -> bool:
    if args.cache:
        return _verify_cache(store)
    found = inventory(store.objects)
    all_ours = [artifact for artifact in found.artifacts if artifact.namespace in ("", store.namespace)]
    wanted = [one(store, found, name) for name in args.name] if args.name else all_ours
    whole = True
    for artifact in wanted:
        bad = store.verify(artifact.kind, artifact.name)
        whole &= not bad
        out.print(f"{'[red]damaged[/red]' if bad else 'whole  '} {label(artifact)} {', '.join(bad)}")
    _tell_unreadable(found)
    if not whole:
        out.print("Materialize the asset of a damaged artifact again, with force, to replace it.")
    return whole and not found.unreadable


def _verify_cache(store: ArtifactStore) -> bool:
    whole = True
    for cached in store.cache.entries():
        bad = cached.entry.damaged()
        whole &= not bad
        removed = bool(bad) and cached.entry.remove()
        told = "evicted; fetched again when needed" if removed else "in use: end what uses it, then verify again"
        state = "[red]damaged[/red]" if bad else "whole  "
        out.print(f"{state} {cached.entry.label} {', '.join(bad)}" + (f" ({told})" if bad else ""))
    return whole


def show_cache(store: ArtifactStore, args: argparse.Namespace) -> bool:
    entries = sorted(store.cache.entries(), key=lambda cached: cached.used, reverse=True)
    table = new_table("artifact", "size", "last used", "")
    for cached in entries:
        table.add_row(cached.entry.name, gigabytes(cached.size), when(cached.used), "in use" if cached.in_use else "")
    out.print(table)
    limit = "" if store.cache.limit is None else f" of at most {gigabytes(store.cache.limit)} (FINETUNE_CACHE_LIMIT)"
    out.print(f"{gigabytes(sum(cached.size for cached in entries))}{limit} in {store.cache.root}")
    return True


def collect_garbage(store: ArtifactStore, args: argparse.Namespace) -> bool:
    config = load_store_config(deployment.configs())
    if args.older_than is not None:
        config.keep_days = args.older_than
    found = inventory(store.objects)
    removals = plan(found, store.namespace, config, RETENTION)
    table = new_table("what", "size", "why")
    for removal in removals:
        if args.delete and not remove(store, removal):
            continue  # somebody has published there since
        what = removal.prefix if removal.whole else f"{removal.prefix}/{removal.attempt}"
        table.add_row(what, gigabytes(removal.size), removal.why)
    if table.row_count:
        out.print(table)
    before = datetime.now(UTC) - timedelta(days=config.keep_days)
    uploads = [
        key
        for prefix in (f"{store.namespace}/", "base-models/")
        for key in store.objects.abort_uploads(prefix, before, dry_run=not args.delete)
    ]
    scratch = store.cache.old_scratch(before, dry_run=not args.delete)
    done = "removed" if args.delete else "to remove"
    size = gigabytes(sum(removal.size for removal in removals))
    out.print(
        f"{done}: {table.row_count} artifacts or attempts ({size}), {len(uploads)} unfinished uploads, "
        f"{len(scratch)} interrupted trainings on this host; all older than {config.keep_days:g} days"
    )
    if not args.delete:
        out.print("Nothing was removed. Run again with --delete.")
    _tell_unreadable(found)
    return True


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


def _tell_unreadable(found: Inventory) -> None:
    for problem in found.unreadable.values():
        out.print(f"[red]{problem}[/red]")


if __name__ == "__main__":
    main()
