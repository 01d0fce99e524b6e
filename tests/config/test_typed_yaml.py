"""What a value in a settings file means: the type of its setting decides, not YAML's spelling."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from paths import ROOT

from finetune_assets.config.errors import ConfigError
from finetune_assets.config.loading import load_experiment, load_raw_data_config
from finetune_assets.config.schema import ExperimentConfig, Merge
from finetune_assets.resources import deployment

Load = Callable[[str], ExperimentConfig]


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT / "configs", tmp_path / "configs"))


@pytest.fixture
def load(configs: Path) -> Load:
    """Loads an experiment with this text."""

    def load(text: str) -> ExperimentConfig:
        (configs / "experiments" / "mine.yaml").write_text(text, encoding="utf-8")
        return load_experiment(configs, "mine").config

    return load


BASE = "model: {base_model: demo-base}\n"


@pytest.mark.parametrize(
    ("text", "setting", "expected"),
    [
        ("launcher: {slurm: {account: 0017}}", "launcher.slurm.account", "0017"),
        ("launcher: {slurm: {partition: off}}", "launcher.slurm.partition", "off"),
        ("launcher: {slurm: {qos: 1_000}}", "launcher.slurm.qos", "1_000"),
        ("launcher: {environment: {DEBUG: yes, LEVEL: 1e3}}", "launcher.environment", {"DEBUG": "yes", "LEVEL": "1e3"}),
        ("launcher: {time_limit: 12:00:00}", "launcher.time_limit", "12:00:00"),
        ("launcher: {time_limit: 1-12:00:00}", "launcher.time_limit", "1-12:00:00"),
        ("launcher: {nodes: 1}", "launcher.nodes", "1"),
        ("launcher: {slurm: {extra_arguments: [--x, 0x10]}}", "launcher.slurm.extra_arguments", ["--x", "0x10"]),
        ("training: {processes_per_node: 2}", "training.processes_per_node", "2"),
        ("description: 2024-01-01", "description", "2024-01-01"),
        ("description: null and void", "description", "null and void"),
        ("data: {categories: [1.0, no, 0001]}", "data.categories", ["1.0", "no", "0001"]),
        ("wandb: {project: 123, watch: off}", "wandb.watch", "off"),
        ("training: {learning_rate: 1e-4}", "training.learning_rate", 1e-4),
        ("training: {learning_rate: '2e-4'}", "training.learning_rate", 2e-4),
        ("training: {learning_rate: .5}", "training.learning_rate", 0.5),
        ("training: {seed: 1_000}", "training.seed", 1000),
        ("training: {compile: yes}", "training.compile", True),
        ("training: {compile: Off}", "training.compile", False),
        ("training: {max_steps: }", "training.max_steps", None),
        ("lora: {init_lora_weights: yes}", "lora.init_lora_weights", True),
        ("lora: &lora {rank: 4, rank_pattern: &p {q_proj: 2}}", "lora.rank_pattern", {"q_proj": 2}),
        ("training: {<<: {seed: 1, epochs: 2}, seed: 3}", "training.seed", 3),
    ],
)
def test_values_are_what_their_settings_are(load: Load, text: str, setting: str, expected: object) -> None:
    found: object = load(BASE + text)
    for name in setting.split("."):
        found = getattr(found, name)
    assert found == expected
    assert type(found) is type(expected)


def test_values_for_kubernetes(load: Load) -> None:
    pod = "{mode: 0644, stdin: yes, port: 1:30, date: 2024-01-01, 5: '7'}"
    job = load(BASE + f"launcher: {{kubernetes: {{node_selector: {{gpu: true, 1: 010}}, pod: {pod}}}}}").launcher
    assert job.kubernetes.node_selector == {"gpu": "true", "1": "010"}
    assert job.kubernetes.pod == {"mode": 0o644, "stdin": True, "port": "1:30", "date": "2024-01-01", "5": "7"}


@pytest.mark.parametrize("name", ["1.0", "1e10", "007", "true"])
def test_names_of_models_and_revisions(load: Load, name: str) -> None:
    config = load(f"model: {{base_model: {name}, revision: {name}}}")
    assert (config.model.base_model, config.model.revision) == (name, name)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("launcher.slurm.account=0017", "0017"),
        ("launcher.slurm.account=off", "off"),
        ("launcher.slurm.account='null'", "null"),
        ("launcher.slurm.account=null", None),
        ("launcher.slurm.account=a: b # c", "a: b # c"),
        ("launcher.slurm.account={a} [b", "{a} [b"),
        ("launcher.slurm.account=\"a\\tb\"", "a\tb"),
        ("launcher.slurm.account=a=b", "a=b"),
    ],
)  # fmt: skip
def test_text_of_overrides_is_kept(configs: Path, override: str, expected: str | None) -> None:
    assert load_experiment(configs, "demo", [override]).config.launcher.slurm.account == expected


@pytest.mark.parametrize(
    "override",
    [
        "lora.rank_pattern.model.layers.0.self_attn.q_proj=4",
        "lora.rank_pattern.'model.layers.0.self_attn.q_proj'=4",
        "lora.rank_pattern={model.layers.0.self_attn.q_proj: 4}",
        'lora={rank_pattern: {"model.layers.0.self_attn.q_proj": 4}}',
    ],
)
def test_names_with_dots_in_overrides(configs: Path, override: str) -> None:
    pattern = load_experiment(configs, "demo", [override]).config.lora.rank_pattern
    assert pattern == {"model.layers.0.self_attn.q_proj": 4}


def test_a_problem_of_a_name_with_dots_is_of_its_override(configs: Path) -> None:
    with pytest.raises(ConfigError, match=r"override .*: lora\.rank_pattern\.layers\.0\.q: 0 "):
        load_experiment(configs, "demo", ["lora.rank_pattern.layers.0.q=0"])


def test_groups_and_lists_whose_lines_are_commented_out(load: Load) -> None:
    default = load(BASE)
    empty = load(BASE + "lora:\n  # rank: 3\ndata:\ntraining: # nothing\nlauncher: {environment: , slurm: }\n")
    assert empty == default
    assert load(BASE + "evaluation: {prompts: }\nstack: null\nwandb: ~\n") == default


def test_an_optional_group_that_is_named_has_its_defaults(load: Load, configs: Path) -> None:
    assert load(BASE + "merge:\n").merge == Merge()
    assert load(BASE + "merge: {}\n").merge == Merge()
    assert load(BASE + "merge: null\n").merge is None
    assert load(BASE).merge is None
    with pytest.raises(ConfigError, match=r"wandb\.project"):
        load(BASE + "wandb:\n  # project: mine\n")
    (configs / "base.yaml").write_text("merge: {dtype: float32}\n")
    assert load(BASE + "merge:\n").merge == Merge(dtype="float32")
    assert load(BASE + "merge: null\n").merge is None


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("lora: {rank_pattern: {layers: {0: 4}}}", ["lora.rank_pattern.layers", "{'0': '4'}"]),
        ("lora: {rank: 4}\nlora: {rank: 8}", ["lora", "line 2", "line 3"]),
        ("lora:\n  rank: 4\n  rank: 8", ["lora.rank", "line 3", "line 4"]),
        ("lora: null", ["lora", "null"]),
        ("training:\n\tseed: 1", ["line 3", "\\t"]),
        ("training: {seed: }", ["training.seed", "no value"]),
        ("description: ", ["description", "no value"]),
        ("launcher: {environment: {A: }}", ["launcher.environment.A", "no value"]),
        ("data: {categories: [a, null]}", ["data.categories", "quotes"]),
        ("data: {categories: !!set {a, b}}", ["data.categories", "line 2", "set"]),
        ("description: !!binary aGk=", ["description", "line 2", "binary"]),
        ("description: !!python/name:os.system", ["description", "line 2", "os.system"]),
        ("description: &x [*x]", ["description"]),
        ("lora: &x {<<: *x}", ["lora", "line 2"]),
        ("lora: &x {rank_pattern: *x}", ["lora.rank_pattern", "line 2"]),
        ('description: "\\ud800"', ["description"]),
        ("? [a, b]\n: c", ["line 2"]),
        ("lora: {target_modules: [q_proj, 5]}", ["lora.target_modules", "5"]),
        ("lora: {target_modules: {q_proj: 1}}", ["lora.target_modules", "q_proj"]),
        (f"description: {'[' * 5_000}", []),
        (f"lora: {'{a: ' * 2_000}", []),
        (f"launcher: {{kubernetes: {{pod: {'{a: ' * 60}1{'}' * 60}}}}}", ["launcher.kubernetes.pod", "40 levels"]),
        (f"'{'x' * 1_000}': 1", ["unknown setting"]),
    ],
)
def test_what_cannot_be_read_is_named(load: Load, text: str, facts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load(BASE + text)
    for fact in ("mine.yaml", *facts):
        assert fact in str(error.value)
    assert "\n" not in str(error.value)


def test_aliases_that_multiply(load: Load) -> None:
    lines = ["launcher:", "  kubernetes:", "    pod:", "      a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    for before, name in zip("abcdefg", "bcdefgh", strict=True):
        lines.append(f"      {name}: &{name} [{', '.join([f'*{before}'] * 10)}]")
    with pytest.raises(ConfigError, match="100,000 values"):
        load(BASE + "\n".join(lines))


def test_raw_data_columns_are_text(configs: Path) -> None:
    (configs / "raw_data.yaml").write_text("source: 2024\ncolumns: {instruction: 0, response: on}\nsplit_salt: 007\n")
    config = load_raw_data_config(configs)
    assert (config.source, config.columns.instruction, config.columns.response) == ("2024", "0", "on")
    assert config.split_salt == "007"


def test_settings_hashes_skip_a_broken_experiment_alone(configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune_assets.automation.settings_hash import settings_hashes

    (configs / "experiments" / "broken.yaml").write_text("subscribed: true\nlora: {rank_pattern: {layers: {0: 4}}}\n")
    (configs / "experiments" / "other.yaml").write_text("subscribed: true\n" + BASE)
    (configs / "sweeps").mkdir()
    (configs / "sweeps" / "all.yaml").write_text("experiment: demo\ngrid: {lora.rank: [4]}\nsample: -1\n")
    monkeypatch.setattr(deployment, "configs", lambda: configs)
    for asset in ("lora_adapter", "tokenized_dataset", "training_plan", "cached_base_model"):
        assert settings_hashes(asset).keys() == {"demo", "other"}
