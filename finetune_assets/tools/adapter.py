"""`finetune-adapter`: which adapters serve and served, promotion and roll-back by hand, where an adapter is from."""

import argparse
import getpass
import json
import re
import socket
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from rich.tree import Tree

from finetune_assets.artifacts.champions import Champions, Record
from finetune_assets.artifacts.kinds import ADAPTERS, BASE_MODELS, CHAMPIONS, EVALUATIONS, STACKS
from finetune_assets.artifacts.layout import CARD, EVALUATION, NOT_ON_THE_HUB, PROVENANCE, SUMS
from finetune_assets.artifacts.update_spectrum import ENERGY, suggested
from finetune_assets.config.errors import suggest
from finetune_assets.config.loading import experiment_names
from finetune_assets.resources import deployment
from finetune_assets.store.artifacts import ArtifactRef, ArtifactStore
from finetune_assets.store.errors import ArtifactMissing, StoreError
from finetune_assets.store.gc import Artifact, Inventory, inventory
from finetune_assets.store.hashing import sha256
from finetune_assets.tools.terminal import (
    NAMED,
    SHORT,
    Commands,
    ancestors,
    copy_out,
    label,
    new_table,
    one,
    out,
    picture,
    when,
)
from finetune_assets.worker.model_libraries import import_lean


def main(arguments: Sequence[str] | None = None) -> None:
    _commands().run(arguments)


def _commands() -> Commands:
    commands = Commands("finetune-adapter", __doc__ or "")
    experiment = "the experiment's name"
    listing = commands.add("champions", champions, "the adapter in service of each experiment")
    listing.add_argument("experiment", nargs="?", help=f"{experiment}; all without")
    commands.add("history", history, "every adapter that served an experiment, and why").add_argument(
        "experiment", help=experiment
    )
    promotion = commands.add("promote", promote, "promote an adapter manually")
    promotion.add_argument("experiment", help=experiment)
    promotion.add_argument("adapter", help=NAMED)
    rollback = commands.add("rollback", roll_back, "have an earlier champion serve again; it alone changes")
    rollback.add_argument("experiment", help=experiment)
    rollback.add_argument("--to", type=int, metavar="NUMBER", help="of its record; the one before by default")
    for one_of in (promotion, rollback):
        one_of.add_argument("--reason", required=True, help="why; it stands in the history")
    fetch = commands.add("fetch", fetch_champion, "copy the champion's files, verified, into a new folder")
    fetch.add_argument("experiment", help=experiment)
    fetch.add_argument("folder", type=Path, help="must not exist, or be empty")
    publishing = commands.add("publish", publish, "upload the champion to the Hub, what was measured in its card")
    publishing.add_argument("experiment", help=experiment)
    publishing.add_argument(
        "repo", metavar="OWNER/NAME", help="made if it is not there; HF_TOKEN must be able to write"
    )
    publishing.add_argument("--private", action="store_true", help="for its owner alone")
    sizes = commands.add("updates", show_updates, "how large the update of each module is, and the rank that it needs")
    sizes.add_argument("adapter", help=f"an experiment, whose champion is taken; a folder; or {NAMED}")
    sizes.add_argument("--plot", type=picture, help="also draw it, as .png or .svg")
    check = commands.add("verify", verify, "compare an adapter's folder with the store, and tell where it is from")
    check.add_argument("folder", type=Path, help="of an adapter, wherever it was copied to")
    return commands


def champions(store: ArtifactStore, args: argparse.Namespace) -> bool:
    names = [args.experiment] if args.experiment else experiments_with_champions(store)
    table = new_table("experiment", "champion", "adapter", "since", "why")
    for name in names:
        current = Champions(store, name).current()
        if current:
            table.add_row(name, str(current.number), current.adapter[:SHORT], _moment(current), _why(current))
    if not table.row_count:
        out.print(f"No champion{f' of {args.experiment}' if args.experiment else ''} yet; materialize champion_adapter")
        return True
    out.print(table)
    return True


def experiments_with_champions(store: ArtifactStore) -> list[str]:
    keys = (stored.key for stored in store.objects.listing(f"{store.namespace}/{CHAMPIONS.folder}/"))
    return sorted({key.split("/")[2] for key in keys})


def history(store: ArtifactStore, args: argparse.Namespace) -> bool:
    records = Champions(store, args.experiment).history()
    if not records:
        raise StoreError(f"{args.experiment}: no adapter was promoted yet; the check of champion_adapter says why")
    table = new_table("", "when", "what", "adapter", "by", "why")
    for record in records:
        table.add_row(
            str(record.number), _moment(record), record.action, record.adapter[:SHORT], record.by, record.reason
        )
    out.print(table)
    return True


def promote(store: ArtifactStore, args: argparse.Namespace) -> bool:
    known = experiment_names(deployment.configs())
    if args.experiment not in known:
        raise StoreError(f"no experiment '{args.experiment}'; {suggest(args.experiment, known)}")
    adapter = _adapter(store, args.adapter)
    manifest = store.manifest(adapter.kind, adapter.name)
    made_for = manifest.made_from.get("experiment") if manifest else None
    if made_for != args.experiment:
        out.print(f"note: {adapter.fingerprint[:SHORT]} was made for experiment {made_for}, with its settings")
    record = Champions(store, args.experiment).promote_by_hand(adapter, args.reason, _who())
    if record is None:
        out.print(f"{adapter.fingerprint[:SHORT]} is the champion of {args.experiment} already")
        return True
    out.print(f"{adapter.fingerprint[:SHORT]} is the champion of {args.experiment} (record {record.number})")
    return True


def roll_back(store: ArtifactStore, args: argparse.Namespace) -> bool:
    record = Champions(store, args.experiment).roll_back(args.reason, _who(), args.to)
    out.print(
        f"{record.adapter[:SHORT]} is the champion of {args.experiment} again (record {record.number}); "
        f"{(record.before or '')[:SHORT]} is excluded from automatic promotion"
    )
    return True


def fetch_champion(store: ArtifactStore, args: argparse.Namespace) -> bool:
    adapter = Champions(store, args.experiment).champion()
    if adapter is None:
        raise ArtifactMissing(f"{args.experiment} has no champion yet")
    copy_out(store, adapter, args.folder)
    out.print(f"champion {adapter.fingerprint[:SHORT]} of {args.experiment} stored in {args.folder}")
    manifest = store.manifest(adapter.kind, adapter.name)
    origin = manifest.made_from if manifest else {}
    if str(origin.get("base_model", "")).startswith(NOT_ON_THE_HUB):
        base = f"{BASE_MODELS.folder}/{origin['base_model']}/{origin['revision']}"
        out.print(f"its base model: finetune-store fetch {base} ./base")
    return True


def publish(store: ArtifactStore, args: argparse.Namespace) -> bool:
    from finetune_assets.tools import publishing

    champions = Champions(store, args.experiment)
    record = champions.current()
    if record is None:
        raise ArtifactMissing(f"{args.experiment} has no champion yet")
    measured = store.find(EVALUATIONS.folder, record.evaluation) if record.evaluation else None
    evaluation = json.loads((store.fetch(measured) / EVALUATION).read_text("utf-8")) if measured else None
    with store.cache.workspace("publish") as folder:
        adapter = store.fetch(champions.adapter(record))
        address = publishing.publish(adapter, evaluation, args.repo, args.private, folder)
    out.print(f"champion {record.number} of {args.experiment}, {record.adapter[:SHORT]}: {address}")
    return True


def show_updates(store: ArtifactStore, args: argparse.Namespace) -> bool:
    from finetune_assets.drawing import modules
    from finetune_assets.drawing.style import save

    found = import_lean("finetune_assets.training.updates").updates(folder_of(store, args.adapter))
    table = new_table("module", "rank", "norm", "effective rank", f"{ENERGY:.0%} of it in")
    for update in found:
        numbers = (f"{update.norm:.3g}", f"{update.effective_rank:.1f}", str(update.enough))
        table.add_row(update.module, str(update.rank), *numbers)
    out.print(table)
    usual, pattern = suggested(found)
    out.print(f"Ranks that keep {ENERGY:.0%} of each update's squared norm, as settings of an experiment:\n")
    out.print("lora:\n  rank: " + str(usual) + ("\n  rank_pattern:" if pattern else ""))
    for module, rank in pattern.items():
        out.print(f"    {module}: {rank}")
    if args.plot:
        save(modules.updates(found, f"Updates of {args.adapter}"), args.plot)
        out.print(f"\ndrawn in {args.plot}")
    return True


def folder_of(store: ArtifactStore, name: str) -> Path:
    """The files of an adapter that is named by a folder, by its experiment, or by its fingerprint."""
    if (Path(name) / "adapter_config.json").is_file():
        return Path(name)
    champion = Champions(store, name).champion() if "/" not in name else None
    try:
        return store.fetch(champion or _adapter(store, name))
    except ArtifactMissing as e:
        raise ArtifactMissing(f"'{name}': no experiment with a champion, no folder of an adapter, and {e}") from e


def verify(store: ArtifactStore, args: argparse.Namespace) -> bool:
    """Whether a folder's files are those that its adapter was published with."""
    folder: Path = args.folder
    problems = against_sums(folder)
    found = inventory(store.objects)
    artifact = _published(found, folder)
    if artifact is None:
        problems.append(f"{store.url} holds no adapter of its fingerprint, so only SHA256SUMS could be compared")
    else:
        problems += _against_manifest(folder, artifact)
        out.print(ancestors(found, artifact, Tree(f"{label(artifact)} of {when(artifact.created)}, made from")))
        for name in experiments_with_champions(store):
            for record in Champions(store, name).history():
                if record.adapter == artifact.manifest.fingerprint:
                    out.print(f"champion {record.number} of {name}: {record.action} {_moment(record)}, {record.reason}")
    for problem in problems:
        out.print(f"[red]{problem}[/red]")
    out.print(f"{folder}: " + ("[red]not verified[/red]" if problems else "verified"))
    return not problems


def against_sums(folder: Path) -> list[str]:
    """What a folder's own SHA256SUMS says is wrong with it.

    Raises:
        StoreError: if it has none.
    """
    sums = folder / SUMS
    if not folder.is_dir():
        raise StoreError(f"{folder}: no such folder")
    if not sums.is_file():
        raise StoreError(f"{folder}: holds no {SUMS}, so it is no adapter of this project, or not all of one")
    lines = (re.fullmatch(r"([0-9a-f]{64})  (.+)", line) for line in sums.read_text(encoding="utf-8").splitlines())
    wanted = {match[2]: match[1] for match in lines if match}
    return _differences(folder, wanted, SUMS)


def _against_manifest(folder: Path, artifact: Artifact) -> list[str]:
    wanted = {file.path: file.sha256 for file in artifact.manifest.files}
    told = _differences(folder, wanted, "the store's manifest")
    rewritten = (CARD, SUMS)  # where it was published elsewhere, its card tells of that too
    return [problem for problem in told if not problem.startswith(tuple(f"{name}: differs" for name in rewritten))]


def _differences(folder: Path, wanted: dict[str, str], where: str) -> list[str]:
    problems = []
    for name, digest in wanted.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name}: missing, {where} names it")
        elif sha256(path) != digest:
            problems.append(f"{name}: differs from {where}")
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    ignored = {SUMS, ".gitattributes"}
    problems += [f"{name}: not in {where}" for name in sorted(there - wanted.keys() - ignored)]
    return problems


def _published(found: Inventory, folder: Path) -> Artifact | None:
    try:
        fingerprint = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise StoreError(
            f"{folder / PROVENANCE}: does not say which adapter this is; copy the folder again, whole ({e})"
        ) from e
    same = (artifact for artifact in found.artifacts if artifact.kind in (ADAPTERS.folder, STACKS.folder))
    return next((artifact for artifact in same if artifact.manifest.fingerprint == fingerprint), None)


def _adapter(store: ArtifactStore, name: str) -> ArtifactRef:
    found = inventory(store.objects)
    found.artifacts[:] = [artifact for artifact in found.artifacts if artifact.kind in (ADAPTERS.folder, STACKS.folder)]
    artifact = one(store, found, name, "adapter")
    return store.ref(artifact.kind, artifact.name, artifact.manifest)


def _who() -> str:
    return f"{getpass.getuser()}@{socket.gethostname()}"


def _moment(record: Record) -> str:
    return when(datetime.fromisoformat(record.at))


def _why(record: Record) -> str:
    return f"{record.action}: {record.reason}"


if __name__ == "__main__":
    main()
