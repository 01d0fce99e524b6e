"""`finetune new`: from an example to a file of one's own."""

import pytest
from commands import run
from paths import ROOT
from projects import TestProject

from finetune_assets.config.examples import load_examples
from finetune_assets.config.loading import load_experiment


def test_examples_are_listed_and_one_is_copied(project: TestProject, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = run(capsys, "new", "--list")
    assert code == 0
    listed = [line for line in printed.splitlines() if not line.startswith(" ")]
    examples = load_examples(ROOT / "configs").values()
    assert listed == [f"{example.name} ({example.kind})" for example in examples]
    assert all(example.needs in printed for example in examples)
    code, printed, _ = run(capsys, "new", "mine", "--from", "llama-3.1-8b-dolly-qlora")
    assert code == 0
    assert "configs/experiments/mine.yaml" in printed.replace("\n", "")
    assert "finetune run mine" in printed
    assert load_experiment(project.configs, "mine").config.model.quantization == "nf4"


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["mine"], 2, "--from"),
        (["--from", "demo-ranks"], 2, "NAME"),
        (["mine", "--list"], 2, "--list"),
        (["mine", "--from", "demo-rank"], 1, "'demo-ranks'"),
        (["demo", "--from", "smollm2-135m-dolly"], 1, "demo.yaml"),
    ],
)
def test_what_is_refused(
    project: TestProject, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, named: str
) -> None:
    ended, _, err = run(capsys, "new", *arguments)
    assert ended == code
    assert named in err
