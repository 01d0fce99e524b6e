"""What the commands share: progress and exit codes, tables, and how an artifact is named on the command line."""

import logging
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from finetune_assets.config.loading import experiment_names
from finetune_assets.display import PlainRecords, message
from finetune_assets.errors import UserError
from finetune_assets.progress.screen import drawn
from finetune_assets.resources import deployment
from finetune_assets.store.artifacts import ArtifactRef, ArtifactStore
from finetune_assets.store.errors import ArtifactMissing, StoreError
from finetune_assets.store.gc import Artifact, Inventory, made_from
from finetune_assets.store.objects import boto3_client

SHORT = 12
"""Digits of a fingerprint that are shown; any number of first ones may be given."""
DEEPEST = 50
"""Levels of provenance that are shown; rich draws a tree recursively."""
WIDE = 250
"""Columns where stdout is not a terminal, so that a file or a pipe gets whole lines."""
FORMATS = (".png", ".svg", ".pdf")


class PlainConsole(Console):
    """Prints texts as they are, without markup, and with control characters as escapes; `styled` sets a style."""

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]
        options |= {"markup": False, "emoji": False}
        return super().render_str(message(text, lines=True), **options)


def styled(text: object, style: str) -> Text:
    """A text for `out` in a style of rich, such as `bold` or `red`."""
    return Text(message(text, lines=True), style)


out = PlainConsole(
    highlight=False, markup=False, emoji=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDE
)


class StoreCommand(click.Command):
    """A command that shows progress on stderr, and ends with exit code 1 where it returns False."""

    def invoke(self, ctx: click.Context) -> None:
        with progress_shown():
            if super().invoke(ctx) is False:
                ctx.exit(1)


class StoreGroup(click.Group):
    """A group of such commands."""

    command_class = StoreCommand


class ExperimentName(click.ParamType):  # type: ignore[type-arg]  # generic since Click 8.5 only
    """The name of an experiment, which the shell completes; whether it exists is checked where it is read."""

    name = "experiment"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        try:
            names: Iterable[str] = experiment_names(deployment.configs())
        except UserError:
            names = ()
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


class PlotPath(click.ParamType):  # type: ignore[type-arg]
    """The path of a picture to draw."""

    name = "file"

    def convert(self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(value)
        if path.suffix not in FORMATS:
            self.fail(f"'{value}' does not end in {', '.join(FORMATS)}", param, ctx)
        return path


EXPERIMENT = ExperimentName()
FOLDER = click.Path(path_type=Path)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
plot = click.option("--plot", type=PlotPath(), help=f"Also draw it, as {', '.join(FORMATS)}.")


def open_store() -> ArtifactStore:
    """The store of this environment, without Dagster."""
    return deployment.store(boto3_client)


@contextmanager
def progress_shown() -> Iterator[None]:
    """Show on stderr what this project logs, and progress bars where stderr is a terminal."""
    package = logging.getLogger("finetune_assets")
    package.setLevel(logging.INFO)
    with drawn() as stderr:
        handler = logging.StreamHandler(stderr)
        handler.addFilter(PlainRecords())
        package.addHandler(handler)
        try:
            yield
        finally:
            package.removeHandler(handler)


def copy_out(store: ArtifactStore, ref: ArtifactRef, folder: Path) -> None:
    """Copy an artifact's files, verified, into a new folder.

    Raises:
        StoreError: if the folder exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StoreError(f"{folder}: exists already; name a new folder")
    source = store.fetch(ref)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, copy_function=shutil.copyfile)
    partial.replace(folder)


def find_artifact(store: ArtifactStore, found: Inventory, name: str, what: str = "artifact") -> Artifact:
    """The one artifact whose name, fingerprint or `KIND/NAME` begins with `name`.

    Raises:
        ArtifactMissing: if there is none.
        StoreError: if there are several.
    """
    ours = [artifact for artifact in found.artifacts if artifact.namespace in ("", store.namespace)]

    def matches(artifact: Artifact) -> bool:
        names = (artifact.name, artifact.manifest.fingerprint, f"{artifact.kind}/{artifact.name}")
        return any(candidate.startswith(name) for candidate in names)

    matching = [artifact for artifact in ours if matches(artifact)]
    if len(matching) == 1:
        return matching[0]
    if not matching:
        raise ArtifactMissing(f"'{name}': no such {what} in {store.url}; list them with `finetune store list`")
    some = ", ".join(f"{artifact.kind}/{short(artifact)}" for artifact in matching[:5])
    raise StoreError(f"'{name}' is ambiguous: {len(matching)} artifacts ({some}); give more characters, or KIND/NAME")


def ancestors(found: Inventory, artifact: Artifact, tree: Tree) -> Tree:
    """Add to a tree what an artifact was made from, and what that was made from; each artifact once.

    Manifests that others wrote may refer to each other in a circle, or so often that a full tree has no end.
    """
    seen, waiting = {artifact.prefix}, [(artifact, tree, 0)]
    while waiting:
        child, branch, depth = waiting.pop()
        for parent in made_from(found, child):
            if parent.prefix not in seen:
                seen.add(parent.prefix)
                node = branch.add(label(parent))
                if depth < DEEPEST:
                    waiting.append((parent, node, depth + 1))
    return tree


def label(artifact: Artifact) -> str:
    """An artifact's kind, name and experiment."""
    experiment = f" ({artifact.experiment})" if artifact.experiment else ""
    return f"{artifact.kind}/{short(artifact)}{experiment}"


def short(artifact: Artifact) -> str:
    repo, slash, last = artifact.name.rpartition("/")
    return f"{repo}{slash}{last[:SHORT]}"


def shown_path(uri: str) -> str:
    """The path or URL of an artifact; a path inside the current folder is relative to it."""
    return uri.removeprefix("file://").removeprefix(f"{Path.cwd()}/")


def local_time(moment: datetime) -> str:
    return f"{moment.astimezone():%Y-%m-%d %H:%M}"


def new_table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in ("files", "size") else "left", overflow="fold")
    return table
