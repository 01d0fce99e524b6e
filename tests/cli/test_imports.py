"""Commands that need no model import none of its libraries; planning does so once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from projects import TestProject

from finetune_assets.store.artifacts import ArtifactRef

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "dagster")


def imported(*arguments: str) -> tuple[str, list[str]]:
    """What a command printed that succeeded in a process of its own, and which libraries it imported."""
    program = (
        "import atexit, json, sys\n"
        f"atexit.register(lambda: print(json.dumps([n for n in {LIBRARIES} if n in sys.modules]), file=sys.stderr))\n"
        "from finetune_assets.cli.main import finetune\n"
        f"finetune({list(arguments)!r})"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return ended.stdout, json.loads(ended.stderr.splitlines()[-1])


@pytest.fixture
def served(project: TestProject, champion: ArtifactRef) -> ArtifactRef:
    """A store that holds a champion."""
    return champion


@pytest.mark.parametrize(
    "command", ["store list", "adapter champions", "adapter history demo", "compare demo demo --json"]
)
def test_no_command_imports_what_it_does_not_need(served: ArtifactRef, command: str) -> None:
    printed, libraries = imported(*command.split())
    assert served.fingerprint[:8] in printed
    assert libraries == []


def test_a_report_is_written_without_torch(served: ArtifactRef, tmp_path: Path) -> None:
    assert imported("report", str(tmp_path / "report.html"))[1] == []
    assert served.fingerprint[:12] in (tmp_path / "report.html").read_text(encoding="utf-8")
