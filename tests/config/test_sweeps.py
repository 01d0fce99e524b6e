"""Sweeps: a file that stands for many experiments."""

import logging
from pathlib import Path

import pytest
from projects import TestProject

from finetune_assets.config.errors import ConfigError
from finetune_assets.config.loading import experiment_names, load_experiment, load_sweep


@pytest.fixture
def configs(project: TestProject) -> Path:
    for path in (project.configs / "sweeps").iterdir():
        path.unlink()
    return project.configs


def write(configs: Path, name: str, text: str) -> None:
    (configs / "sweeps" / f"{name}.yaml").write_text(text)


def test_a_grid_is_every_combination(configs: Path) -> None:
    write(configs, "ranks", "experiment: demo\ngrid:\n  lora.rank: [4, 8]\n  lora.alpha: [16, 32, 64]\n")
    points = [name for name in experiment_names(configs) if name.startswith("ranks.")]
    assert points == sorted(f"ranks.rank-{rank}.alpha-{alpha}" for rank in (4, 8) for alpha in (16, 32, 64))
    point = load_experiment(configs, "ranks.rank-8.alpha-32", ["training.seed=3"])
    assert (point.config.lora.rank, point.config.lora.alpha, point.config.training.seed) == (8, 32.0, 3)
    assert (point.sweep, point.config.subscribed) == ("ranks", False)
    assert load_experiment(configs, "demo").config.subscribed, "of which the points have all else"
    assert point.config.data == load_experiment(configs, "demo").config.data


def test_values_that_are_no_names_are_numbered(configs: Path) -> None:
    grid = [
        "lora.target_modules: [all-linear, [q_proj, v_proj]]",
        "training.learning_rate: [1.0e-4]",
        "lora.use_dora: [true]",
    ]
    write(configs, "targets", "experiment: demo\ngrid:\n  " + "\n  ".join(grid))
    names = [point.name for point in load_sweep(configs, "targets")]
    assert names == [
        f"targets.target_modules-{target}.learning_rate-0.0001.use_dora-true" for target in ("all-linear", "1")
    ]
    assert load_experiment(configs, names[1]).config.lora.target_modules == ["q_proj", "v_proj"]


def test_a_sample_is_drawn_by_seed(configs: Path) -> None:
    grid = "experiment: demo\ngrid: {lora.rank: [1, 2, 3, 4, 5], training.seed: [1, 2, 3, 4, 5, 6, 7, 8]}\n"
    write(configs, "some", grid + "sample: 6\n")
    drawn = load_sweep(configs, "some")
    assert len(drawn) == len({point.name for point in drawn}) == 6
    assert load_sweep(configs, "some") == drawn
    write(configs, "some", grid + "sample: 6\nseed: 1\n")
    assert load_sweep(configs, "some") != drawn
    write(configs, "all", grid + "sample: 99\n")
    assert len(load_sweep(configs, "all")) == 40


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("experiment: demo\n", r"grid: "),
        ("experiment: demo\ngrid: {lora.rank: 4}\n", r"grid\.lora\.rank: 4 "),
        ("experiment: demo\ngrid: {lora.rank: []}\n", r"grid\.lora\.rank: "),
        ("experiment: demo\ngrid: {lora.rank: [4, 4]}\n", r"bad\.rank-4"),
        ("experiment: demo\ngrdi: {}\n", r"grdi: .*'grid'"),
        ("experiment: demo\ngrid: {a.b: [1, 2, 3, 4], c.d: [1, 2], e.f: " + str([*range(200)]) + "}\n", "`sample`"),
        ("grid: {lora.rank: [4]}\n", "experiment: "),
    ],
)
def test_a_broken_sweep_is_told_and_takes_nothing_down(
    configs: Path, caplog: pytest.LogCaptureFixture, text: str, facts: str
) -> None:
    write(configs, "bad", text)
    with pytest.raises(ConfigError, match=facts) as refused:
        load_sweep(configs, "bad")
    assert "bad.yaml" in str(refused.value)
    with caplog.at_level(logging.ERROR):
        assert "demo" in experiment_names(configs)
    assert any("sweep bad" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("grid", "told"),
    [
        ("{lora.rnk: [4]}", r"sweeps/odd\.yaml: lora\.rnk: .*'rank'"),
        ("{lora.rank: [0]}", r"sweeps/odd\.yaml: lora\.rank: 0 "),
        ("{lora.rank: [low]}", r"sweeps/odd\.yaml: lora\.rank: 'low' "),
    ],
)
def test_a_value_that_cannot_be_is_told_with_the_sweeps_file(configs: Path, grid: str, told: str) -> None:
    write(configs, "odd", f"experiment: demo\ngrid: {grid}\n")
    (point,) = load_sweep(configs, "odd")
    with pytest.raises(ConfigError, match=told):
        load_experiment(configs, point.name)


def test_a_point_that_is_not_there_is_told(configs: Path) -> None:
    write(configs, "ranks", "experiment: demo\ngrid: {lora.rank: [4, 8]}\n")
    with pytest.raises(ConfigError, match=r"'ranks\.rank-5'.*'ranks\.rank-\d'"):
        load_experiment(configs, "ranks.rank-5")
    with pytest.raises(ConfigError, match=r"'rank'.*'ranks'"):
        load_sweep(configs, "rank")
    write(configs, "lost", "experiment: dmo\ngrid: {lora.rank: [4]}\n")
    with pytest.raises(ConfigError, match=r"'dmo'.*'demo'"):
        load_experiment(configs, "lost.rank-4")
