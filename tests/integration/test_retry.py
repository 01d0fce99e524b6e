"""A training that dies in the night is gone on with by itself."""

import os
import re
import signal
import subprocess
from pathlib import Path

from integration.cli import materialize_command
from projects import TestProject


def test_run_whose_worker_is_killed_goes_on_by_itself(project: TestProject) -> None:
    overrides = ["training.max_steps=16", "training.save_steps=3", "training.logging_steps=1"]
    run = subprocess.Popen(
        materialize_command("*lora_adapter", overrides=overrides),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=project.root,
    )
    said = ""
    assert run.stdout
    for line in run.stdout:
        said += line
        if "step 8/16" in line:
            os.kill(_rank(project), signal.SIGKILL)
            break
    said += run.communicate(timeout=300)[0]
    assert run.returncode == 0, said[-3000:]
    assert re.search(r"tried again in \d+ s, 1 of 3: ", said)
    begun = re.search(r"going on from the checkpoint of step (\d+)", said)
    assert begun
    assert int(begun[1]) >= 6
    assert len(project.published("adapters")) == 1
    assert not project.leftovers()


def _rank(project: TestProject) -> int:
    """The process that trains, which torchrun started."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        ours = any(word.startswith(str(project.cache).encode()) for word in words)
        if ours and b"finetune_assets.training" in words and b"torch.distributed.run" not in words:
            return int(folder.name)
    raise AssertionError("no process trains")
