"""What the commands for people share: how they end, what they print, how an artifact is named."""

import argparse
import logging
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.tree import Tree

from finetune_assets.errors import UserError
from finetune_assets.progress.screen import drawn
from finetune_assets.resources import deployment
from finetune_assets.store.artifacts import ArtifactRef, ArtifactStore
from finetune_assets.store.errors import ArtifactMissing, StoreError
from finetune_assets.store.gc import Artifact, Inventory, made_from
from finetune_assets.store.objects import boto3_client

Command = Callable[[ArtifactStore, argparse.Namespace], bool]
"""Does what was asked for; whether all is well."""
NAMED = "its name or fingerprint, or the first characters of it"
SHORT = 12
"""Digits of a fingerprint that are shown; any number of first ones may be given."""
WIDE = 250
"""Columns where no terminal says how many it has, so that a file or a pipe gets whole lines."""
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDE)


class Commands:
    """A program of several commands.

    Args:
        program: Its name.
        what: What it is for.
    """

    def __init__(self, program: str, what: str) -> None:
        where = "Store, namespace and cache are the environment's: FINETUNE_*."
        self.program = program
        self.parser = argparse.ArgumentParser(prog=program, description=f"{what} {where}")
        self.commands = self.parser.add_subparsers(required=True, metavar="COMMAND")

    def add(self, name: str, command: Command, what: str) -> argparse.ArgumentParser:
        one = self.commands.add_parser(name, help=what, description=what)
        one.set_defaults(command=command)
        return one

    def run(self, arguments: Sequence[str] | None) -> None:
        """Run one command; the exit code is 1 if something is wrong with what was asked for, or with the store."""
        args = self.parser.parse_args(arguments)
        command: Command = args.command
        try:
            with told():
                whole = command(deployment.store(boto3_client), args)
            sys.exit(not whole)
        except (UserError, OSError) as e:
            sys.exit(f"{self.program}: {e}")
        except KeyboardInterrupt:
            sys.exit(130)


@contextmanager
def told() -> Iterator[None]:
    """Show on stderr what goes on meanwhile: what this project logs, and bars if a person looks at it."""
    package = logging.getLogger("finetune_assets")
    package.setLevel(logging.INFO)
    with drawn() as stderr:
        handler = logging.StreamHandler(stderr)
        package.addHandler(handler)
        try:
            yield
        finally:
            package.removeHandler(handler)


def picture(text: str) -> Path:
    """The path of a picture to draw, as argparse reads it."""
    path = Path(text)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"'{text}' does not end in .png, .svg or .pdf")
    return path


def copy_out(store: ArtifactStore, ref: ArtifactRef, folder: Path) -> None:
    """An artifact's files, verified, as a new folder.

    Raises:
        StoreError: if the folder is there already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StoreError(f"{folder}: exists already; name a new folder")
    source = store.fetch(ref)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, copy_function=shutil.copyfile)
    partial.replace(folder)


def one(store: ArtifactStore, found: Inventory, name: str, what: str = "artifact") -> Artifact:
    """The artifact that `name` means: of a kind and name, or either a name's or a fingerprint's first characters."""
    ours = [artifact for artifact in found.artifacts if artifact.namespace in ("", store.namespace)]

    def means(artifact: Artifact) -> bool:
        names = (artifact.name, artifact.manifest.fingerprint, f"{artifact.kind}/{artifact.name}")
        return any(one.startswith(name) for one in names)

    meant = [artifact for artifact in ours if means(artifact)]
    if len(meant) == 1:
        return meant[0]
    if not meant:
        raise ArtifactMissing(f"'{name}': no {what} of that name in {store.url}; see `finetune-store list`")
    some = ", ".join(f"{artifact.kind}/{short(artifact)}" for artifact in meant[:5])
    raise StoreError(f"'{name}': {len(meant)} artifacts begin so ({some}); give more characters, or KIND/NAME")


def ancestors(found: Inventory, artifact: Artifact, tree: Tree) -> Tree:
    for other in made_from(found, artifact):
        ancestors(found, other, tree.add(label(other)))
    return tree


def label(artifact: Artifact) -> str:
    experiment = f" ({artifact.experiment})" if artifact.experiment else ""
    return f"{artifact.kind}/{short(artifact)}{experiment}"


def short(artifact: Artifact) -> str:
    repo, slash, last = artifact.name.rpartition("/")
    return f"{repo}{slash}{last[:SHORT]}"


def when(moment: datetime) -> str:
    return f"{moment.astimezone():%Y-%m-%d %H:%M}"


def new_table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in ("files", "size") else "left", overflow="fold")
    return table
