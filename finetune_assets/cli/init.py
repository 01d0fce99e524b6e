"""`finetune init`: the files of a project of one's own."""

import os
import shutil
from pathlib import Path

import click

from finetune_assets.cli.terminal import out
from finetune_assets.errors import UserError

TEMPLATE = Path(__file__).resolve().parents[1] / "template"
"""The configuration of this project, which the wheel contains; in a checkout, links to it."""


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), default=Path())
def init(folder: Path) -> None:
    """Create the files of a project in FOLDER, by default the current one.

    These are configs/ (settings, the experiment `demo`, and examples for `finetune new`), workspace.yaml for Dagster,
    and .dagster_home/dagster.yaml. Existing files are never overwritten.

    \b
    Examples:
      finetune init my-adapters
    """
    names = template_files()
    if existing := [name for name in names if os.path.lexists(folder / name)]:
        raise UserError(f"{folder / existing[0]} exists already; choose a folder without a project")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(TEMPLATE / name, folder / name)
    out.print(f"Created a project of {len(names)} files in {folder.resolve()}\n\nNext:")
    if folder.resolve() != Path.cwd():
        out.print(f"  cd {folder}")
    out.print(
        "  finetune demo      try everything on packaged data, offline\n"
        "  finetune ui        Dagster's UI, and automatic training on new data\n"
        "  edit configs/raw_data.yaml to read your own rows; `finetune new --list` lists experiments to start from"
    )


def template_files() -> list[Path]:
    """Paths of all files of the template, relative to it, sorted."""
    found = (
        Path(folder, name).relative_to(TEMPLATE)
        for folder, _, names in os.walk(TEMPLATE, followlinks=True)
        for name in names
        if name.endswith(".yaml")
    )
    return sorted(found)
