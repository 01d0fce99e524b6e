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
                    adopt_demo(folder / ".finetune" / "store", "adapters")
                reader.do(block)
            (folder / SAID).write_text(json.dumps(reader.said), encoding="utf-8")
    return folder


def adopt_demo(store: Path, *kinds: str) -> None:
    """Give the reader's own namespace artifacts of the demo, so that they are not made a second time."""
    (demo,) = store.glob("*-demo")
    for kind in kinds:
        shutil.copytree(demo / kind, store / demo.name.removesuffix("-demo") / kind)
