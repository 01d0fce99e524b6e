"""`finetune` itself: what it offers, how it ends, and what the shell completes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import run
from projects import TestProject

from finetune_assets.cli.main import COMMANDS
from finetune_assets.cli.run import materialize_command


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


def test_the_command_of_a_run_says_what_differs_from_the_defaults_alone() -> None:
    plain = materialize_command("demo", "*", (), force=False, log_level="DEBUG")
    assert plain == "dagster asset materialize --select * --partition demo -m finetune_assets.definitions".split()
    *_, flag, config = materialize_command("demo", "*", ("lora.rank=4",), force=True, log_level="INFO")
    assert flag == "--config-json"
    assert json.loads(config) == {
        "resources": {"project": {"config": {"overrides": ["lora.rank=4"], "force": True}}},
        "loggers": {"console": {"config": {"log_level": "INFO"}}},
    }


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
