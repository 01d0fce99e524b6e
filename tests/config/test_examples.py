"""Examples: what a copy is, and what is refused."""

import shutil
from pathlib import Path

import pytest
from paths import ROOT

from finetune_assets.config.errors import ConfigError
from finetune_assets.config.examples import Example, copy_example, load_examples
from finetune_assets.config.loading import experiment_names, load_experiment, load_sweep

CONFIGS = ROOT / "configs"


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CONFIGS, tmp_path / "configs"))


@pytest.mark.parametrize("example", load_examples(CONFIGS).values(), ids=lambda example: example.name)
def test_a_shipped_example_says_what_it_needs_and_its_copy_says_how_to_run_it(example: Example, configs: Path) -> None:
    assert example.description
    assert example.needs
    assert f"#   finetune new NAME --from {example.name}\n" in example.text
    copy = copy_example(configs, example.name, "mine").read_text(encoding="utf-8")
    command = "sweep run" if example.kind == "sweep" else "run"
    assert f"finetune {command} mine" in copy
    assert "NAME" not in copy
    assert "finetune new" not in copy
    if example.kind == "sweep":
        assert {point.name for point in load_sweep(configs, "mine")} == {*experiment_names(configs)} - {"demo"}
    else:
        assert not load_experiment(configs, "mine").config.subscribed


def test_an_example_is_no_experiment_before_it_is_copied(configs: Path) -> None:
    assert experiment_names(configs) == ["demo"]
    copy_example(configs, "demo-ranks", "ranks")
    assert len(experiment_names(configs)) == 7


@pytest.mark.parametrize(
    ("example", "name", "named"),
    [
        ("lama-7b-int8", "mine", "'llama-7b-int8'"),
        ("llama-7b-int8", "../mine", "'../mine'"),
        ("llama-7b-int8", "demo", "demo.yaml"),
        ("demo-ranks", "a...b", "a...b"),
    ],
)
def test_what_cannot_be_copied_changes_nothing(configs: Path, example: str, name: str, named: str) -> None:
    before = {path: path.read_bytes() for path in configs.rglob("*.yaml")}
    with pytest.raises(ConfigError, match=named):
        copy_example(configs, example, name)
    assert {path: path.read_bytes() for path in configs.rglob("*.yaml")} == before


def test_an_example_that_base_yaml_contradicts_is_not_copied(configs: Path) -> None:
    (configs / "base.yaml").write_text("training: {precision: fp8}\n")
    with pytest.raises(ConfigError, match=r"base\.yaml"):
        copy_example(configs, "demo-retrieval", "mine")
    assert not (configs / "experiments" / "mine.yaml").exists()
