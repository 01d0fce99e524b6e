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
        ("experiment: demo\ngrid: {lora.rank: [4]}\nsample: -1\n", "sample: -1 "),
        ("experiment: demo\ngrid: {lora.rank: [4]}\nsample: 0\n", "sample: 0 "),
        ("experiment: demo\ngrid: {lora.rank: [4]}\nsample: 1.5\n", r"sample: '1\.5'"),
        ("experiment: demo\ngrid: {lora.rank: [4]}\nsample: 99999999999999999999\n", "sample: .*64 bits"),
        ("experiment: demo\ngrid: {lora.rank: [4]}\nseed: weird\n", "seed: 'weird'"),
        ("experiment: demo\ngrid: {lora.rnk: [4]}\n", r"lora\.rnk: .*'rank'"),
        ("experiment: demo\ngrid: {lora.rank: [low]}\n", r"grid\.lora\.rank: 'low'"),
        ("experiment: demo\ngrid: {lora.rank: [null]}\n", r"grid\.lora\.rank: null"),
        ("experiment: demo\ngrid: {lora: {rank: [4]}}\n", r"grid\.lora: "),
        ("experiment: demo\ngrid: {5: [4]}\n", "5: unknown"),
        ("experiment: demo\ngrid: {lora.alpha: [16, 16.0]}\n", r"grid\.lora\.alpha: .*16\.0"),
        ("experiment: demo\ngrid: {lora.alpha: [16], lora: [{rank: 4}]}\n", r"grid\.lora\.alpha: .*lora"),
        ("experiment: demo\ngrid: {description: [a..], lora.rank: [4]}\n", r"grid: .*'\.\.\.'"),
        ("experiment: dmo\ngrid: {lora.rank: [4]}\n", "experiment: .*'dmo'.*'demo'"),
        ("- a\n", "settings"),
        ("a\0b", "YAML"),
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


def test_a_value_out_of_range_stops_its_point_alone(configs: Path) -> None:
    write(configs, "odd", "experiment: demo\ngrid: {lora.rank: [0, 4]}\n")
    bad, good = load_sweep(configs, "odd")
    with pytest.raises(ConfigError, match=r"sweeps/odd\.yaml: lora\.rank: 0 "):
        load_experiment(configs, bad.name)
    assert load_experiment(configs, good.name).config.lora.rank == 4


def test_values_are_read_as_their_settings_are(configs: Path) -> None:
    grid = (
        "{launcher.slurm.account: [0017, off], lora.rank_pattern.layers.0.q_proj: [4], training.learning_rate: [1e-4]}"
    )
    write(configs, "typed", f"experiment: demo\ngrid: {grid}\n")
    first, second = load_sweep(configs, "typed")
    assert [first.name, second.name] == [
        f"typed.account-{account}.q_proj-4.learning_rate-0.0001" for account in ("0017", "off")
    ]
    config = load_experiment(configs, first.name).config
    assert config.launcher.slurm.account == "0017"
    assert config.lora.rank_pattern == {"layers.0.q_proj": 4}
    assert config.training.learning_rate == 1e-4


def test_a_sweep_of_groups(configs: Path) -> None:
    write(configs, "groups", "experiment: demo\ngrid: {merge: [null, {dtype: float32}]}\n")
    without, merged = [load_experiment(configs, point.name).config for point in load_sweep(configs, "groups")]
    assert without.merge is None
    assert merged.merge is not None
    assert merged.merge.dtype == "float32"


def test_more_combinations_than_a_computer_can_count(configs: Path) -> None:
    values = ", ".join(map(str, range(1, 1_000)))
    names = ("rank", "alpha", "dropout")
    others = [f"training.{name}: [{values}]" for name in ("epochs", "max_steps", "seed", "learning_rate")]
    grid = ", ".join([f"lora.{name}: [{values}]" for name in names] + others)
    write(configs, "many", f"experiment: demo\ngrid: {{{grid}}}\nsample: 3\n")
    with pytest.raises(ConfigError, match="grid: 3 points of "):
        load_sweep(configs, "many")


def test_files_that_are_no_sweeps_stop_no_other(configs: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(configs, "ranks", "experiment: demo\ngrid: {lora.rank: [4]}\n")
    write(configs, "my sweep", "experiment: demo\ngrid: {lora.rank: [4]}\n")
    (configs / "sweeps" / "folder.yaml").mkdir()
    (configs / "sweeps" / "other.yml").write_text("experiment: demo\ngrid: {lora.rank: [4]}\n")
    (configs / "sweeps" / "ranks.rank-4.yaml").write_text("[")
    names = experiment_names(configs)
    assert [name for name in names if name.startswith(("ranks", "my", "folder", "other"))] == ["ranks.rank-4"]
    for name in ("my sweep", "folder", "other.yml", "ranks.rank-4"):
        assert name in caplog.text
    (configs / "sweeps" / "ranks.rank-4.yaml").unlink()
    write(configs, "ra", "[")
    write(configs, "ranks.x", "experiment: demo\ngrid: {lora.rank: [8]}\n")
    write(configs, "ranks", "[")
    assert load_experiment(configs, "ranks.x.rank-8").config.lora.rank == 8


def test_an_experiment_with_the_name_of_a_point(configs: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(configs, "ranks", "experiment: demo\ngrid: {lora.rank: [4]}\n")
    (configs / "experiments" / "ranks.rank-4.yaml").write_text("model: {base_model: demo-base}\nlora: {rank: 9}\n")
    assert experiment_names(configs).count("ranks.rank-4") == 1
    assert "ranks.rank-4" in caplog.text
    assert load_experiment(configs, "ranks.rank-4").config.lora.rank == 9


def test_a_point_that_is_not_there_is_told(configs: Path) -> None:
    write(configs, "ranks", "experiment: demo\ngrid: {lora.rank: [4, 8]}\n")
    with pytest.raises(ConfigError, match=r"'ranks\.rank-5'.*'ranks\.rank-\d'"):
        load_experiment(configs, "ranks.rank-5")
    with pytest.raises(ConfigError, match=r"'rank'.*'ranks'"):
        load_sweep(configs, "rank")
    write(configs, "lost", "experiment: dmo\ngrid: {lora.rank: [4]}\n")
    with pytest.raises(ConfigError, match=r"'dmo'.*'demo'"):
        load_experiment(configs, "lost.rank-4")
