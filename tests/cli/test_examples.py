"""The examples that `--help` shows: all are valid, and those that train and serve nothing do what they say."""

import shlex
from collections.abc import Callable, Iterator

import click
import pytest
from commands import run
from projects import TestProject

from finetune_assets.artifacts.champions import Champions
from finetune_assets.cli.main import finetune
from finetune_assets.store.artifacts import ArtifactRef

FINGERPRINT = "3fa9"
"""What an example has in place of a fingerprint."""
TRAINING = ("run", "plan", "sweep", "--demo")
"""First words of examples that are run by tests of their own."""


def examples(command: click.Command = finetune) -> Iterator[str]:
    """All lines of the help of a command, and of those below it, that are commands themselves."""
    lines = (line.partition("#")[0].strip() for line in (command.help or "").splitlines())
    yield from (line.removeprefix("finetune ") for line in lines if line.startswith("finetune "))
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from examples(command.get_command(context, name) or click.Command(name))


EXAMPLES = [*examples()]


def test_every_example_is_valid(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(click.Command, "invoke", lambda *_: None)
    assert len(EXAMPLES) >= 20
    ended = {example: run(capsys, *shlex.split(example)) for example in EXAMPLES}
    assert {example: end.err for example, end in ended.items() if end.code != 0} == {}


def test_examples_do_what_they_say(
    project: TestProject,
    champion: ArtifactRef,
    publish: Callable[..., ArtifactRef],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(project.root)
    (project.configs / "sweeps" / "demo-ranks.yaml").unlink()
    Champions(project.store, "demo").promote_by_hand(publish("b"), "the second", "tests")
    done = [example for example in EXAMPLES if not example.startswith(TRAINING)]
    for example in done:
        arguments = shlex.split(example.replace(FINGERPRINT, champion.fingerprint[:8]))
        code, _, err = run(capsys, *arguments)
        assert code == 0, f"{example}: {err}"
    assert Champions(project.store, "demo").champion() == champion, "rolled back"
    assert (project.root / "adapter" / "adapter_model.safetensors").is_file()
    assert (project.root / "my-adapters" / "workspace.yaml").is_file()
    assert (project.configs / "experiments" / "mine.yaml").is_file()
