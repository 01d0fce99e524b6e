"""Commands that need no model import none of its libraries; planning does so once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from projects import TestProject

from finetune_assets.store.artifacts import ArtifactRef

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "dagster")


def imported(module: str, *arguments: str) -> tuple[str, list[str]]:
    """What a command printed that succeeded in a process of its own, and which libraries it imported."""
    program = (
        "import atexit, json, sys\n"
        f"atexit.register(lambda: print(json.dumps([n for n in {LIBRARIES} if n in sys.modules]), file=sys.stderr))\n"
        f"from {module} import main\n"
        f"main({list(arguments)!r})"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return ended.stdout, json.loads(ended.stderr.splitlines()[-1])


@pytest.fixture
def served(project: TestProject, champion: ArtifactRef) -> ArtifactRef:
    """A store that holds a champion."""
    return champion


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("finetune_assets.tools.store", ["list"]),
        ("finetune_assets.tools.adapter", ["champions"]),
        ("finetune_assets.tools.adapter", ["history", "demo"]),
        ("finetune_assets.tools.report", ["compare", "demo", "demo", "--json"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_no_command_imports_what_it_does_not_need(served: ArtifactRef, module: str, arguments: list[str]) -> None:
    printed, libraries = imported(module, *arguments)
    assert served.fingerprint[:8] in printed
    assert libraries == []


def test_a_report_is_written_without_torch(served: ArtifactRef, tmp_path: Path) -> None:
    assert imported("finetune_assets.tools.report", "html", str(tmp_path / "report.html"))[1] == []
    assert served.fingerprint[:12] in (tmp_path / "report.html").read_text(encoding="utf-8")
