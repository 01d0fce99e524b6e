"""Settings: every shipped file loads, and every mistake is one clear error."""

from pathlib import Path

import pytest
from paths import ROOT
from projects import TestProject, all_configs

from finetune_assets.config.errors import ConfigError
from finetune_assets.config.loading import (
    dump,
    experiment_files,
    experiment_names,
    load_experiment,
    load_raw_data_config,
    load_resolved,
    load_store_config,
    load_sweep,
)

CONFIGS = ROOT / "configs"


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    return all_configs(tmp_path)


@pytest.mark.parametrize("name", experiment_files(CONFIGS))
def test_shipped_experiment_loads_and_says_how_to_run_it(name: str) -> None:
    experiment = load_experiment(CONFIGS, name)
    head = (CONFIGS / "experiments" / f"{name}.yaml").read_text(encoding="utf-8")
    assert "# Needs: nothing" in head, "the others are examples"
    assert f"finetune run {name}" in head
    assert experiment.config.subscribed == (name == "demo")


def test_the_reference_examples_own_settings(tmp_path: Path) -> None:
    config = load_experiment(all_configs(tmp_path), "llama-7b-int8").config
    assert config.model.base_model == "yahma/llama-7b-hf"
    assert config.model.quantization == "int8"
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (16, 32, 0.05)
    assert config.lora.target_modules == ["q_proj", "v_proj"]
    assert config.data.tokenization.cutoff_len == 258


def test_layers_win_in_order(configs: Path) -> None:
    (configs / "base.yaml").write_text("training: {seed: 1, epochs: 1, learning_rate: 1.0}")
    (configs / "experiments" / "mine.yaml").write_text("model: {base_model: demo-base}\ntraining: {seed: 2, epochs: 2}")
    config = load_experiment(configs, "mine", ["training.seed=3"]).config
    assert (config.training.seed, config.training.epochs, config.training.learning_rate) == (3, 2.0, 1.0)


def test_no_other_rows_have_the_name_of_the_packaged_ones(configs: Path) -> None:
    raw = configs / "raw_data.yaml"
    raw.write_text("sources: {sample: {source: sample}, mine: {source: ./mine}}")
    assert [*load_raw_data_config(configs).sources] == ["sample", "mine"]
    raw.write_text("sources: {sample: {source: ./mine}}")
    with pytest.raises(ConfigError, match=r"sources\.sample: "):
        load_raw_data_config(configs)


def test_resolved_tree_reads_back_equal(tmp_path: Path) -> None:
    config = load_experiment(CONFIGS, "demo", ["wandb.project=x", "lora.rank_pattern={q_proj: 4}"]).config
    (tmp_path / "config.yaml").write_text(dump(config), encoding="utf-8")
    assert load_resolved(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("override", "facts"),
    [
        ("training.lerning_rate=1", ["training.lerning_rate", "'learning_rate'"]),
        ("trainig.seed=1", ["trainig", "'training'"]),
        ("training.learning_rate=fast", ["training.learning_rate", "'fast'"]),
        ("training.seed=1.5", ["training.seed", "1.5"]),
        ("training.gradient_checkpointing=maybe", ["training.gradient_checkpointing", "maybe"]),
        ("model.quantization=int9", ["model.quantization", "int9", "'int8'"]),
        ("training.lr_scheduler=polynomial", ["training.lr_scheduler", "constant", "cosine", "linear"]),
        ("lora=3", ["lora", "3"]),
        ("lora.target_modules=q_proj", ["lora.target_modules", "'q_proj'", "all-linear"]),
        ("training.micro_batch_size=64", ["training.micro_batch_size", "64", "macro_batch_size 8"]),
        ("training.processes_per_node=many", ["training.processes_per_node", "many", "auto"]),
        ("training.processes_per_node=9", ["training.processes_per_node", "9", "macro_batch_size 8"]),
        ("data.processes=0", ["data.processes", "'0'", "auto", "256"]),
        ("data.processes=257", ["data.processes", "'257'"]),
        ("data.val_fraction=1.5", ["data.val_fraction", "1.5"]),
        ("data.val_fraction=0.97", ["data.val_fraction", "0.97"]),
        ("data.near_duplicate_threshold=0.5", ["data.near_duplicate_threshold", "0.5", "null"]),
        ("data.near_duplicate_threshold=1.1", ["data.near_duplicate_threshold", "1.1"]),
        ("data.near_duplicate_threshold=nan", ["data.near_duplicate_threshold", "nan"]),
        ("data.checks.max_left_out_share=2", ["data.checks.max_left_out_share", "2.0"]),
        ("data.categories=[]", ["data.categories", "null"]),
        ("data.tokenization.packing_length=8", ["data.tokenization.packing_length", "8", "cutoff_len 192"]),
        ("data.tokenization.cutoff_len=1", ["data.tokenization.cutoff_len", "1"]),
        ("data.tokenization.added_tokens=[' ']", ["data.tokenization.added_tokens", "' '"]),
        ("data.prompt_template.prompt_no_input='Do: ### Response:'", ["prompt_no_input", "'{instruction}'"]),
        (
            "data.prompt_template.prompt_input='{instruction} {input} ### Response:'",
            ["data.prompt_template.prompt_input", "'{input}'", "context"],
        ),
        ("data.prompt_template.response_split='### Answer:'", ["data.prompt_template.response_split", "### Answer:"]),
        ("lora.rank=0", ["lora.rank", "0", "1"]),
        ("lora.dropout=1", ["lora.dropout", "1.0"]),
        ("training.learning_rate=-1", ["training.learning_rate", "-1"]),
        ("training.epochs=nan", ["training.epochs", "nan"]),
        ("lora.init_lora_weights=gausian", ["lora.init_lora_weights", "'gausian'", "'gaussian'"]),
        ("wandb.mode=offline", ["wandb.project"]),
        ("training.seed", ["training.seed", "key=value"]),
        ("description=${oc.env:HOME}", ["description", "${oc.env:HOME}"]),
        ("training.learning_rate=${", ["training.learning_rate", "${"]),
        ("data.categories=[a", ["data.categories", "[a"]),
        ("data.categories=[a, b] # c", ["data.categories", "# c", "quotes"]),
        ("description='a' b", ["description", "quotes"]),
        ("merge=", ["merge", "null"]),
        ("lora.rank=8.0", ["lora.rank", "'8.0'", "write 8"]),
        ("lora.rank=true", ["lora.rank", "'true'"]),
        ("training.seed=010", ["training.seed", "010"]),
        ("training.max_steps=1:30", ["training.max_steps", "'1:30'"]),
        ("hardware.memory_gib=.nan", ["hardware.memory_gib", ".nan"]),
        ("training.seed=99999999999999999999", ["training.seed", "64 bits"]),
        ("lora.rank_pattern={layers: {0: 4}}", ["lora.rank_pattern.layers", "{'0': '4'}"]),
        ("lora.rank_pattern.(=4", ["lora.rank_pattern.(", "regular expression"]),
        ("lora.rank.x=4", ["lora.rank", "lora.rank.x"]),
        ("lora.layers_to_transform=[-1]", ["lora.layers_to_transform", "-1"]),
        ("lora.layers_to_transform=[]", ["lora.layers_to_transform", "null"]),
        ("lora.init_lora_weights='true'", ["lora.init_lora_weights", "'true'", "without quotes"]),
        ("lora.init_lora_weights=pissa_niter_x", ["lora.init_lora_weights", "'pissa_niter_x'"]),
        ("wandb.project=my project/x", ["wandb.project", "'my project/x'", "/ \\ # ? % :"]),
        ("wandb={project: a, entity: b/c}", ["wandb.entity", "'b/c'"]),
        ("wandb.project=' '", ["wandb.project", "' '"]),
        (f"wandb.project={'x' * 129}", ["wandb.project", "128"]),
        ("launcher.time_limit=99999999999-00:00:00", ["launcher.time_limit", "99999999999"]),
        ("launcher.environment={A: null}", ["launcher.environment.A", "quotes"]),
        ("description=null", ["description", "'null' in quotes"]),
        ("data.categories.0=x", ["data.categories"]),
        ("training.epochs=.inf", ["training.epochs", "inf"]),
        ("training.seed=-1", ["training.seed", "-1"]),
        ("hardware.gpu=mine", ["hardware.gpu", "'mine'", "hardware.memory_gib", "H100"]),
        ("hardware.count=0", ["hardware.count", "0"]),
        ("launcher.engine=slrm", ["launcher.engine", "'slrm'", "'slurm'"]),
        ("launcher.nodes=0", ["launcher.nodes", "'0'", "1-4"]),
        ("launcher.nodes=4-2", ["launcher.nodes", "'4-2'", "1-4"]),
        ("launcher={engine: local, nodes: 2}", ["launcher.nodes", "'2'", "slurm", "kubernetes"]),
        ("launcher.nodes=9", ["launcher.nodes", "9 processes", "macro_batch_size 8"]),
        ("launcher={nodes: 2, gpus_per_node: 8}", ["launcher.nodes", "16 processes"]),
        ("launcher.gpus_per_node=0", ["launcher.gpus_per_node", "0", "1"]),
        ("launcher.rendezvous_seconds=0", ["launcher.rendezvous_seconds", "0", "1"]),
        ("launcher.time_limit=90", ["launcher.time_limit", "'90'", "hours:minutes:seconds"]),
        ("launcher.slurm.partitoin=gpu", ["launcher.slurm.partitoin", "'partition'"]),
        ("model.dtype=bfloat16", ["training.precision", "fp32", "model.dtype", "bfloat16"]),
        ("evaluation.lm_eval={tasks: []}", ["evaluation.lm_eval.tasks", "null"]),
        ("evaluation.samples=-1", ["evaluation.samples", "-1"]),
        ("evaluation.lm_eval={tasks: [x], limit: 0}", ["evaluation.lm_eval.limit", "0"]),
        ("gate.min_gain=nan", ["gate.min_gain", "nan"]),
        ("gate.confidence=1", ["gate.confidence", "1.0", "0.95"]),
        ("gate.max_loss_increase=0.2", ["gate.max_loss_increase", "sft"]),
        ("gate.max_loss_increase=-1", ["gate.max_loss_increase", "-1.0"]),
        ("gate.min_preference_gain=1", ["gate.min_preference_gain", "1.0"]),
        ("launcher.memory=64 GB", ["launcher.memory", "'64 GB'", "64G"]),
        ("stack={adapters: {demo: 1.0}}", ["stack.adapters", "demo"]),
        ("stack={adapters: {demo: 1.0, llama-7b-int8: nan}}", ["stack.adapters.llama-7b-int8", "nan"]),
        ("stack={adapters: {demo: 1.0, llama-7b-int8: 1.0}, density: 0}", ["stack.density", "0"]),
        ("data.tokenization.added_tokens=[<a>, <a>]", ["data.tokenization.added_tokens", "'<a>'"]),
        ("data.prompt_template.prompt_input='{instruction'", ["data.prompt_template.prompt_input"]),
        ("lora={use_dora: true, bias: all}", ["lora.bias", "all", "use_dora"]),
    ],
)
def test_wrong_override_is_named_in_one_line(override: str, facts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_experiment(CONFIGS, "demo", [override])
    for fact in facts:
        assert fact in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "override",
    [["training.precision=full_fp16"], ["training.precision=full_bf16"], ["lora.init_lora_weights=pissa"]],
    ids=["full_fp16", "full_bf16", "pissa"],
)
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantization_refuses_what_it_cannot_be_trained_with(quantization: str, override: list[str]) -> None:
    with pytest.raises(ConfigError, match=quantization):
        load_experiment(CONFIGS, "demo", [f"model.quantization={quantization}", *override])


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("training: {sed: 1}", ["training.sed", "'seed'"]),
        ("training:\n  seed: [1\n", ["line 3", "YAML"]),
        ("training: {seed: 1}\ntraining: {seed: 2}", ["line 2", "training"]),
        ("- a\n- b", []),
        ("just words", []),
        ("", ["model.base_model"]),
        ("model: {base_model: '???'}", ["model.base_model"]),
        ("model: {base_model: x}\ntraining: {micro_batch_size: 99}", ["training.micro_batch_size", "99"]),
        ("model: {base_model: '${oc.env:HF_TOKEN}'}", ["model.base_model", "${oc.env:HF_TOKEN}"]),
        ('description: "costs ${"', ["${"]),
        (
            "model: {base_model: x, trust_remote_code: 'true'}",
            ["model.trust_remote_code", "'true'", "owner/name@commit"],
        ),
        ("model: {base_model: x}\nlauncher: {environment: {1X: a}}", ["launcher.environment", "'1X'"]),
        (
            "model: {base_model: x}\nlauncher: {environment: {MY_API_KEY: a}}",
            ["launcher.environment", "MY_API_KEY", "launcher.kubernetes.secrets"],
        ),
        ("5", []),
        ("description: a\x00b", []),
    ],
)
def test_wrong_file_is_named(configs: Path, text: str, facts: list[str]) -> None:
    (configs / "experiments" / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_experiment(configs, "mine")
    for fact in ("mine.yaml", *facts):
        assert fact in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("scheme", ["pissa", "olora", "pissa_niter_4"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_dora", "true"),
        ("use_rslora", "true"),
        ("modules_to_save", "[norm]"),
        ("rank_pattern", "{q_proj: 4}"),
        ("bias", "all"),
    ],
)
def test_initialisation_that_could_not_be_saved_is_refused(scheme: str, name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"lora\.{name}: .*init_lora_weights {scheme}"):
        load_experiment(CONFIGS, "demo", [f"lora.init_lora_weights={scheme}", f"lora.{name}={value}"])


def test_a_comment_may_speak_of_anything(configs: Path) -> None:
    (configs / "experiments" / "mine.yaml").write_text("# not ${oc.env:X}\nmodel: {base_model: demo-base}")
    assert load_experiment(configs, "mine").name == "mine"


def test_a_mistake_in_base_yaml_names_base_yaml(configs: Path) -> None:
    (configs / "base.yaml").write_text("lora: {rank: 0}")
    with pytest.raises(ConfigError, match=r"base\.yaml: lora\.rank: "):
        load_experiment(configs, "smollm2-135m-dolly")


def test_file_names_that_differ_by_case_are_warned_of(configs: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("mine", "Mine"):
        (configs / "experiments" / f"{name}.yaml").write_text("model: {base_model: demo-base}")
    assert {"mine", "Mine"} <= {*experiment_names(configs)}
    assert "Mine and mine" in caplog.text
    assert load_experiment(configs, "Mine").name == "Mine"


def test_a_folder_and_an_unreadable_file_are_named(configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (configs / "experiments" / "folder.yaml").mkdir()
    (configs / "experiments" / "dangling.yaml").symlink_to("gone.yaml")
    for name in ("folder", "dangling"):
        with pytest.raises(ConfigError, match=rf"{name}\.yaml: "):
            load_experiment(configs, name)

    def refused(path: Path, *_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(ConfigError, match=r"base\.yaml: .*Permission denied"):
        load_experiment(configs, "demo")


@pytest.mark.parametrize("name", ["../base", "a\0b", "x" * 300, "", "a/b", "a...b"])
def test_a_name_that_no_file_can_have(configs: Path, name: str) -> None:
    for load in (load_experiment, load_sweep):
        with pytest.raises(ConfigError):
            load(configs, name)


def test_store_settings_under_another_name_are_refused(configs: Path) -> None:
    (configs / "store.yaml").rename(configs / "store.yml")
    with pytest.raises(ConfigError, match=r"store\.yml.*store\.yaml"):
        load_store_config(configs)


def test_latin_1_file_is_named(configs: Path) -> None:
    (configs / "experiments" / "mine.yaml").write_bytes("description: für".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"mine\.yaml: .*UTF-8"):
        load_experiment(configs, "mine")


def test_unknown_experiment_names_the_nearest(configs: Path) -> None:
    with pytest.raises(ConfigError, match=r"'dmeo'.*'demo'"):
        load_experiment(configs, "dmeo")


def test_one_broken_file_takes_no_other_down(configs: Path) -> None:
    (configs / "experiments" / "broken.yaml").write_text("training: [")
    assert "broken" in experiment_names(configs)
    assert load_experiment(configs, "demo").name == "demo"


def test_file_that_cannot_name_a_partition_is_passed_over_and_told(
    configs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = experiment_names(configs)
    for name in ("a...b.yaml", "my exp.yaml", "mine.yml", "a,b.yaml", ".hidden.yaml"):
        (configs / "experiments" / name).write_text("")
    assert experiment_names(configs) == before
    for name in ("a...b.yaml", "my exp.yaml", "mine.yml", "a,b.yaml"):
        assert name in caplog.text


def test_raw_data_environment_wins(configs: Path) -> None:
    assert load_raw_data_config(configs).source == "sample"
    assert load_raw_data_config(configs, "/rows").source == "/rows"


def test_raw_data_unknown_setting(configs: Path) -> None:
    (configs / "raw_data.yaml").write_text("sorce: sample")
    with pytest.raises(ConfigError, match=r"raw_data\.yaml: sorce: .*'source'"):
        load_raw_data_config(configs)


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("max_quarantine_share: 1.5", ["max_quarantine_share", "1.5"]),
        ("checks: {near_duplicates: simhash}", ["checks.near_duplicates", "simhash", "minhash"]),
        ("columns: {instruction: text, response: text}", ["columns.instruction", "'text'"]),
        ("columns: {instruction: ' '}", ["columns.instruction", "' '"]),
        ("columns: {instruction: text, ignore: [text]}", ["columns.instruction", "'text'"]),
        ("arrivals: {quiet_seconds: -1}", ["arrivals.quiet_seconds", "-1"]),
    ],
)
def test_wrong_raw_data_setting_is_named(configs: Path, text: str, facts: list[str]) -> None:
    (configs / "raw_data.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_raw_data_config(configs)
    for fact in ("raw_data.yaml", *facts):
        assert fact in str(error.value)


@pytest.mark.parametrize("scheme", ["pissa", "olora"])
def test_added_tokens_and_a_scheme_that_cannot_save_them(scheme: str) -> None:
    with pytest.raises(ConfigError, match=rf"lora\.init_lora_weights: {scheme} .*added_tokens"):
        load_experiment(
            ROOT / "configs", "demo", [f"lora.init_lora_weights={scheme}", "data.tokenization.added_tokens=['<x>']"]
        )


def test_a_stack_of_an_experiment_that_there_is_not_is_told(project: TestProject) -> None:
    text = "model: {base_model: demo-base}\nstack: {adapters: {demo: 0.5, smolm2-135m-dolly: 0.5}}\n"
    project.write_experiment("both", text)
    with pytest.raises(ConfigError, match=r"stack\.adapters.*smolm2-135m-dolly.*'smollm2-135m-dolly'"):
        load_experiment(project.configs, "both")


def test_a_text_where_a_list_is_wanted_is_told(project: TestProject) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.prompts: 'hello' "):
        load_experiment(project.configs, "demo", ["evaluation.prompts=hello"])


def test_the_packaged_rows_have_names_of_their_own(project: TestProject) -> None:
    (project.configs / "raw_data.yaml").write_text("source: ./mine.csv\ncolumns: {instruction: asked}\n")
    assert load_raw_data_config(project.configs).columns.instruction == "asked"
    assert load_raw_data_config(project.configs, "sample").columns.instruction is None


def test_what_is_loaded_is_the_callers_own_and_of_the_file_as_it_is(configs: Path) -> None:
    """Though what is merged once is kept."""
    file = configs / "experiments" / "demo.yaml"
    first = load_experiment(configs, "demo").config
    first.training.learning_rate = 7.0
    first.lora.rank_pattern["q_proj"] = 1
    second = load_experiment(configs, "demo").config
    assert second.training.learning_rate != 7.0
    assert second.lora.rank_pattern == {}
    file.write_text(file.read_text().replace("rank: 32", "rank: 4"))
    assert (second.lora.rank, load_experiment(configs, "demo").config.lora.rank) == (32, 4)
