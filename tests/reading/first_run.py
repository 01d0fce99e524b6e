"""The first page of the documentation, followed once for all test processes."""

import json
import shutil
from pathlib import Path

from filelock import FileLock
from reading.blocks import FIRST_RUN, blocks
from reading.reader import new_project

SAID, OWN_RUN = "said.json", "dagster asset materialize"


def followed(folder: Path) -> Path:
    """The project that the page leaves behind in a folder, and in `said.json` what its commands said."""
    with FileLock(f"{folder}.lock"):
        if not (folder / SAID).exists():
            shutil.rmtree(folder, ignore_errors=True)
            reader = new_project(folder)
            for block in blocks(FIRST_RUN):
                if OWN_RUN in block.text:
                    adopt_adapter(folder / ".finetune" / "store")
                reader.do(block)
            (folder / SAID).write_text(json.dumps(reader.said), encoding="utf-8")
    return folder


def adopt_adapter(store: Path) -> None:
    """Give the reader's own namespace the adapter of the demo, which the page trains a second time."""
    (demos,) = store.glob("*-demo/adapters")
    shutil.copytree(demos, store / demos.parent.name.removesuffix("-demo") / "adapters")
