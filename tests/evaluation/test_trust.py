"""A model's own code runs where the experiment's settings trust it, and never because an artifact says so."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from projects import TestProject
from safetensors.torch import save_file
from training.conftest import ALONE, configured

from finetune_assets.artifacts.champions import Champions
from finetune_assets.artifacts.layout import CONFIG
from finetune_assets.artifacts.lineage import Lineage
from finetune_assets.cli import conversation
from finetune_assets.config.loading import Experiment, dump
from finetune_assets.config.schema import ExperimentConfig, Merge
from finetune_assets.evaluation import cli
from finetune_assets.evaluation.contenders import CHAMPION, Contender, LoadedModels
from finetune_assets.merging.merge import merged
from finetune_assets.sources.base_models import PACKAGED
from finetune_assets.store.artifacts import ArtifactRef
from finetune_assets.training import arguments
from finetune_assets.training.model import ModelError, load_base
from finetune_assets.worker.bootstrap import _base_versions

TRUSTED = "owner/bigram@" + "a" * 40
CODE = """
from pathlib import Path
import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

Path({ran!r}).touch()

class BigramConfig(PretrainedConfig):
    model_type = "bigram_of_mallory"

class Bigram(PreTrainedModel, GenerationMixin):
    config_class = BigramConfig
    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(1024, 8)
        self.mix = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 1024, bias=False)
        self.post_init()
    def get_input_embeddings(self):
        return self.embed
    def get_output_embeddings(self):
        return self.lm_head
    def forward(self, input_ids, **kwargs):
        return CausalLMOutput(logits=self.lm_head(self.mix(self.embed(input_ids))))
"""


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """A file that the model's code creates when it runs."""
    return tmp_path / "ran"


@pytest.fixture
def base(tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base model whose own code is in its folder, with the packaged tokenizer."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tmp_path / "bigram"
    folder.mkdir()
    classes = {"AutoConfig": "bigram.BigramConfig", "AutoModelForCausalLM": "bigram.Bigram"}
    (folder / "config.json").write_text(json.dumps({"model_type": "bigram_of_mallory", "auto_map": classes}))
    (folder / "bigram.py").write_text(CODE.format(ran=str(ran)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((PACKAGED["demo-base"] / name).read_bytes())
    shapes = {"embed.weight": (1024, 8), "mix.weight": (8, 8), "mix.bias": (8,), "lm_head.weight": (1024, 8)}
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture
def champion(tmp_path: Path) -> Path:
    """An adapter for that model, whose own settings trust the code."""
    folder = tmp_path / "champion"
    folder.mkdir()
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 2, "target_modules": ["mix"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    weights = {f"base_model.model.mix.lora_{part}.weight": shape for part, shape in (("A", (2, 8)), ("B", (8, 2)))}
    save_file({name: torch.randn(shape) for name, shape in weights.items()}, folder / "adapter_model.safetensors")
    (folder / CONFIG).write_text(dump(settings_of(TRUSTED)))
    return folder


def settings_of(trusted: str | None) -> ExperimentConfig:
    config = configured("training.precision=fp32")
    config.model.trust_remote_code = trusted
    return config


def args_of(tmp_path: Path, base: Path, champion: Path, config: ExperimentConfig, **bases: str) -> Namespace:
    (tmp_path / "config.yaml").write_text(dump(config))
    (tmp_path / "bases.json").write_text(json.dumps(bases))
    other = base if "champion-base-model" in bases else None
    first = PACKAGED["demo-base"] if other else base
    return Namespace(
        config=tmp_path / "config.yaml",
        bases=tmp_path / "bases.json",
        base_model=first,
        adapter=champion,
        champion=champion,
        champion_base_model=other,
    )


UNTRUSTED = [
    (None, {"base-model": TRUSTED}),
    ("owner/bigram@" + "b" * 40, {"base-model": TRUSTED}),
    (TRUSTED, {"base-model": "mallory/bigram@" + "a" * 40}),
    (TRUSTED, {"base-model": TRUSTED, "champion-base-model": "mallory/x@" + "a" * 40}),
    (TRUSTED, {}),
]


@pytest.mark.parametrize(("trusted", "bases"), UNTRUSTED)
def test_an_evaluation_runs_no_code_that_only_the_champion_trusts(
    tmp_path: Path, base: Path, champion: Path, ran: Path, trusted: str | None, bases: dict[str, str]
) -> None:
    contenders = cli.contenders(args_of(tmp_path, base, champion, settings_of(trusted), **bases))
    (theirs,) = [one for one in contenders if one.name == CHAMPION]
    with pytest.raises(ModelError, match=r"model\.trust_remote_code"), LoadedModels(ALONE.device).loaded(theirs):
        pass
    assert not ran.exists()


def test_an_evaluation_runs_code_that_the_experiment_trusts(
    tmp_path: Path, base: Path, champion: Path, ran: Path
) -> None:
    (champion / CONFIG).write_text(dump(settings_of(None)))
    config = settings_of(TRUSTED)
    for one in cli.contenders(args_of(tmp_path, base, champion, config, **{"base-model": TRUSTED})):
        with LoadedModels(ALONE.device).loaded(one) as model:
            assert model(input_ids=torch.arange(4)[None]).logits.shape == (1, 4, 1024)
    assert ran.exists()


@pytest.mark.parametrize("own_code", [False, True])
def test_a_merge_runs_code_only_if_the_experiment_trusts_it(
    tmp_path: Path, base: Path, champion: Path, ran: Path, own_code: bool
) -> None:
    contender = Contender.of_folder("adapter", base, champion, own_code)
    (tmp_path / "merged").mkdir()
    if not own_code:
        with pytest.raises(ModelError, match=r"model\.trust_remote_code"):
            merged(contender, Merge(), tmp_path / "merged")
        assert not ran.exists()
        return
    merged(contender, Merge(), tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_without_trust_no_code_runs_whatever_the_settings_of_the_model_say(base: Path, ran: Path) -> None:
    """As in a training, a stack, and wherever settings of an artifact may get to."""
    config = settings_of(TRUSTED)
    with pytest.raises(ModelError, match=r"model\.trust_remote_code"):
        load_base(base, config.model, config.training, ALONE.device)
    assert not ran.exists()


def test_a_conversation_takes_trust_from_the_experiment(
    project: TestProject, champion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = project.store.publish(champion, "adapters", "c" * 64, "c" * 64, {})
    Champions(project.store, "demo").promote_by_hand(ref, "in good faith", "alice")
    base = project.store.publish(PACKAGED["demo-base"], "base-models", "packaged/demo-base/r", "b" * 64, {})
    monkeypatch.setattr(Lineage, "expected", lambda self, kind: base if kind.folder == "base-models" else ref)
    for trusted in (None, TRUSTED):
        experiment = Experiment("demo", settings_of(trusted))
        lineage = Lineage(_raw(project), experiment)
        assert {one.own_code for one in conversation.contenders(lineage)} == {trusted is not None}


def _raw(project: TestProject) -> object:
    return type("Raw", (), {"store": project.store, "root": project.root})()


def test_versions_are_those_of_the_artifacts_that_are_fetched(tmp_path: Path) -> None:
    """A name that ends like the trusted one is another version."""
    uri = "file:///store/base-models/evil/base-models/owner/bigram/" + "a" * 40 + "/attempt"
    evil = ArtifactRef("base-models", "evil/base-models/owner/bigram/" + "a" * 40, "f" * 64, uri, 1, 1)
    good = ArtifactRef("base-models", "owner/bigram/" + "a" * 40, "f" * 64, uri, 1, 1)
    other = ArtifactRef("adapters", "owner/bigram/" + "a" * 40, "f" * 64, uri, 1, 1)
    versions = _base_versions({"base-model": evil, "champion-base-model": good, "adapter": other})
    assert versions == {"base-model": "evil/base-models/" + TRUSTED, "champion-base-model": TRUSTED}
    bases = tmp_path / "bases.json"
    bases.write_text(json.dumps(versions))
    assert not arguments.trusts(settings_of(TRUSTED), bases)
    assert arguments.trusts(settings_of(TRUSTED), bases, "champion-base-model")
    assert "bigram" not in sys.modules
