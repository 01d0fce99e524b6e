"""Settings that decide what code runs are written in a file; no override of a run sets them."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT
from projects import TestProject

from finetune_assets.config.errors import ConfigError
from finetune_assets.config.fields import IN_FILE_ONLY
from finetune_assets.config.loading import load_experiment
from finetune_assets.config.overrides import read_override
from finetune_assets.config.reference import reference
from finetune_assets.config.schema import ExperimentConfig, Serving
from finetune_assets.config.typed_yaml import hints_of, required_type
from finetune_assets.resources.project import Project
from finetune_assets.sources.base_models import BaseModelError

CONFIGS = ROOT / "configs"
VERSION = "owner/x@" + "0" * 40
MARKED = {
    "model.trust_remote_code": VERSION,
    "evaluation.lm_eval.folder": "./tasks",
    "serving.servers": "[http://example.org:8000]",
    "launcher.environment": "{LD_PRELOAD: /tmp/x.so}",
    "launcher.slurm.python": "/tmp/python",
    "launcher.slurm.extra_arguments": "[--wrap=id]",
    "launcher.kubernetes.image": "registry.example.org/mine",
    "launcher.kubernetes.namespace": "kube-system",
    "launcher.kubernetes.service_account": "admin",
    "launcher.kubernetes.secrets": "[other]",
    "launcher.kubernetes.pod": "{hostNetwork: true}",
}


def marked(schema: Any, before: str = "") -> Iterator[str]:
    for setting in fields(schema):
        required, _ = required_type(hints_of(schema)[setting.name])
        if setting.metadata.get("in_file_only"):
            yield f"{before}{setting.name}"
        elif is_dataclass(required):
            yield from marked(required, f"{before}{setting.name}.")


def test_the_settings_that_decide_what_code_runs() -> None:
    assert {*marked(ExperimentConfig)} == {*MARKED}


@pytest.mark.parametrize(
    ("override", "setting"),
    [
        *((f"{setting}={value}", setting) for setting, value in MARKED.items()),
        (f" model.trust_remote_code = {VERSION}", "model.trust_remote_code"),
        (f"model={{base_model: owner/x, trust_remote_code: {VERSION}}}", "model.trust_remote_code"),
        ("model.trust_remote_code=null", "model.trust_remote_code"),
        ("evaluation.lm_eval={tasks: [a], folder: ./tasks}", "evaluation.lm_eval.folder"),
        ("evaluation={lm_eval: {tasks: [a], folder: ./tasks}}", "evaluation.lm_eval.folder"),
        ("launcher.environment.PATH=/tmp", "launcher.environment"),
        ("launcher={engine: slurm, slurm: {python: /tmp/python}}", "launcher.slurm.python"),
        ("launcher={<<: {slurm: {python: /tmp/python}}}", "launcher.slurm.python"),
        ("launcher.slurm={extra_arguments: [--uid=0]}", "launcher.slurm.extra_arguments"),
        ("launcher.kubernetes.pod.containers=[]", "launcher.kubernetes.pod"),
        ("serving={servers: ['folder:/tmp/x']}", "serving.servers"),
        ("launcher.kubernetes={node_selector: {a: b}, secrets: [x]}", "launcher.kubernetes.secrets"),
    ],
)
def test_override_is_refused_with_the_setting_and_what_to_do(override: str, setting: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_experiment(CONFIGS, "demo", [override])
    assert f": {setting}: " in str(error.value)
    assert "configs/experiments/NAME.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_run_that_the_ui_launches_is_refused(project: TestProject) -> None:
    """As Dagster gives a run's configuration to its resource."""
    with pytest.raises(ConfigError, match=r"model\.trust_remote_code"):
        Project(overrides=["model.base_model=owner/x", f"model.trust_remote_code={VERSION}"]).experiment("demo")


@pytest.mark.parametrize(
    "override",
    [
        "model.base_model=owner/x",
        "launcher.engine=slurm",
        "launcher.slurm={partition: gpu, account: a, qos: high}",
        "launcher.kubernetes.node_selector.gpu=h100",
        "evaluation.lm_eval={tasks: [arc_easy]}",
        "evaluation.lm_eval=null",
    ],
)
def test_settings_that_run_no_code_are_overridden(override: str) -> None:
    assert load_experiment(CONFIGS, "demo", [override]).overrides == (override,)


def test_file_sets_them_all(project: TestProject) -> None:
    settings = {setting: value for setting, value in MARKED.items() if setting != "evaluation.lm_eval.folder"}
    tree: dict[str, Any] = {}
    for setting, value in settings.items():
        *groups, last = setting.split(".")
        group = tree
        for name in groups:
            group = group.setdefault(name, {})
        group[last] = value
    lines = ["model: {base_model: demo-base, trust_remote_code: " + VERSION + "}"]
    lines += ["evaluation: {lm_eval: {tasks: [a], folder: ./tasks}}", "launcher:"]
    lines += [f"  environment: {tree['launcher']['environment']}"]
    for engine in ("slurm", "kubernetes"):
        lines += [f"  {engine}:", *(f"    {name}: {value}" for name, value in tree["launcher"][engine].items())]
    lines += ["serving:", f"  servers: {settings['serving.servers']}"]
    project.write_experiment("mine", "\n".join(lines))
    config = load_experiment(project.configs, "mine").config
    assert config.model.trust_remote_code == VERSION
    assert config.launcher.environment == {"LD_PRELOAD": "/tmp/x.so"}
    assert config.launcher.kubernetes.pod == {"hostNetwork": True}
    assert config.serving == Serving(["http://example.org:8000"])


def test_trust_of_a_file_is_for_its_own_model_alone(project: TestProject) -> None:
    """Another base model as an override runs no code: the trusted version is another one."""
    project.write_experiment("mine", f"model: {{base_model: owner/x, trust_remote_code: {VERSION}}}")
    folder = project.root / "other"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        source = ROOT / "finetune_assets" / "sample" / "base_model" / name
        Path(folder / name).write_bytes(source.read_bytes())
    lineage = Project(overrides=["model.base_model=./other"]).lineage("mine")
    with pytest.raises(BaseModelError) as error:
        lineage.base_source()
    assert "model.trust_remote_code" in str(error.value)
    assert VERSION in str(error.value)


def test_reference_marks_them() -> None:
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert len([row for row in rows if "‡" in row.split("|")[1]]) == len(MARKED)


@dataclass
class Member:
    command: str = field(default="", metadata=IN_FILE_ONLY)
    name: str = ""


@dataclass
class Members:
    by_name: dict[str, Member] = field(default_factory=dict)
    group: Member | None = None


@pytest.mark.parametrize("override", ["by_name={a: {command: x}}", "group={command: x}", "group.command=x"])
def test_mark_holds_in_groups_by_name_and_in_optional_groups(override: str) -> None:
    with pytest.raises(ConfigError, match="command"):
        read_override(Members, override, "override")
    assert read_override(Members, override.replace("command", "name"), "override")
