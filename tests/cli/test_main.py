"""`finetune` itself: what it offers, how it ends, and what the shell completes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import run
from projects import TestProject

from finetune_assets.cli.main import COMMANDS


def test_help_names_every_command_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = run(capsys, "--help")
    assert code == 0
    offered = [line.split()[0] for line in printed.partition("Commands:")[2].splitlines() if line.strip()]
    assert offered == list(COMMANDS)
    assert all(f"  {number} " in printed for number in (0, 1, 2, 130))


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = run(capsys, command, "-h")
    assert code == 0
    assert printed.startswith(f"Usage: finetune {command}")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["pln", "demo"], "'plan'"),
        (["plan"], "EXPERIMENT"),
        (["plan", "demo", "--jsn"], "--json"),
        (["adapter", "rollback", "demo"], "--reason"),
        (["adapter", "rollback", "demo", "--reason", "so", "--to", "x"], "'x'"),
    ],
)
def test_wrong_usage_ends_with_2_and_names_what_is_wrong(
    project: TestProject, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert named in err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["run", "dmo"], ["'dmo'", "'demo'"]),
        (["run", "demo", "--set", "training.learnin_rate=1e-4"], ["training.learnin_rate", "'learning_rate'"]),
        (["run", "demo", "--set", "lora.rank"], ["lora.rank"]),
        (["run", "demo", "--set", "data.sources=[sample-towns]"], ["sample-towns", "FINETUNE_RAW_DATA=sample-towns"]),
        (["run", "demo", "--set", "data.sources=[smple]"], ["smple", "'sample'"]),
    ],
)
def test_a_run_that_cannot_be_fails_before_dagster_starts(
    project: TestProject, capsys: pytest.CaptureFixture[str], arguments: list[str], named: list[str]
) -> None:
    code, printed, err = run(capsys, *arguments)
    assert code == 1
    assert printed == "", "no command was run"
    assert all(name in err for name in named)


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("finetune pl", {"plan"}),
        ("finetune plan smo", {"smollm2-135m-dolly"}),
        ("finetune store ver", {"verify"}),
    ],
)
def test_the_shell_completes_commands_and_experiments(project: TestProject, words: str, completed: set[str]) -> None:
    asked = {"_FINETUNE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    program = Path(sys.executable).with_name("finetune")
    ended = subprocess.run([program], env=os.environ | asked, capture_output=True, text=True, check=False)
    assert {line.partition(",")[2] for line in ended.stdout.splitlines()} == completed
