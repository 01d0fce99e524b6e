"""An adapter for a warm start: what is stated with the new one was used, or it is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training.conftest import FinishedRun, configured
from training.measuring import names

from finetune_assets.config.errors import ConfigError
from finetune_assets.config.loading import load_resolved
from finetune_assets.training.model import ModelError
from finetune_assets.training.recipe import LoraFinetune

Finetune = Callable[..., LoraFinetune]
Trained = Callable[..., FinishedRun]
ONE = ("training.max_steps=1", "training.macro_batch_size=2", "training.micro_batch_size=2")
FIRST = (*ONE, "lora.target_modules=[q_proj, v_proj]", "lora.rank_pattern={v_proj: 4}")


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ("lora.target_modules=[q_proj, k_proj, v_proj]", ["target_modules", "['q_proj', 'v_proj']", "'k_proj'"]),
        ("lora.target_modules=all-linear", ["target_modules", "['q_proj', 'v_proj']"]),
        ("lora.layers_to_transform=[0]", ["layers_to_transform", "None", "[0]"]),
        ("lora.rank_pattern={v_proj: 8}", ["rank_pattern", "{'v_proj': 4}", "{'v_proj': 8}"]),
        ("lora.rank_pattern={q_proj: 4, v_proj: 4}", ["rank_pattern", "{'v_proj': 4}"]),
        ("lora.modules_to_save=[lm_head]", ["modules_to_save", "None", "['lm_head']"]),
        ("lora.bias=lora_only", ["bias", "none", "lora_only"]),
        ("lora.use_dora=true", ["use_dora", "False", "True"]),
        ("lora.use_rslora=true", ["use_rslora", "False", "True"]),
        ("lora.rank=16", ["rank", "32", "16"]),
    ],
)
def test_other_modules_than_the_adapters_are_refused(
    trained: Trained, finetune: Finetune, change: str, facts: list[str]
) -> None:
    first = trained(*FIRST).run
    with pytest.raises(ModelError) as error:
        finetune(*FIRST, change, warm_start=first.job.output)
    assert names(error, "training.warm_start", *facts)


@pytest.mark.parametrize(
    "same",
    [
        "lora.target_modules=[self_attn.q_proj, self_attn.v_proj]",
        "lora.rank_pattern={self_attn.v_proj: 4}",
        "lora.layers_to_transform=null",
    ],
)
def test_the_same_modules_in_other_words(trained: Trained, finetune: Finetune, same: str) -> None:
    first = trained(*FIRST).run
    changed = [*FIRST, same] if "rank" not in same else [*FIRST[:-1], same]
    finetune(*changed, warm_start=first.job.output)


def test_all_linear_continues_all_linear(trained: Trained, finetune: Finetune) -> None:
    finetune(*ONE, warm_start=trained(*ONE).run.job.output)


def test_dropout_is_that_of_the_settings(trained: Trained, finetune: Finetune) -> None:
    first = trained(*FIRST).run
    assert first.model.peft_config["default"].lora_dropout == 0.0
    second = finetune(*FIRST, "lora.dropout=0.25", warm_start=first.job.output)
    used = {m.p for name, m in second.model.named_modules() if "lora_dropout" in name and hasattr(m, "p")}
    assert used == {0.25}
    second.run()
    assert json.loads((second.job.output / "adapter_config.json").read_text())["lora_dropout"] == 0.25
    assert load_resolved(second.job.output / "config.yaml").lora.dropout == 0.25


@pytest.mark.parametrize(
    ("field", "value", "facts"),
    [
        ("alpha_pattern", {"q_proj": 8}, ["alpha_pattern", "q_proj"]),
        ("init_lora_weights", "pissa", ["pissa"]),
        ("layer_replication", [[0, 1]], ["layer_replication"]),
        ("task_type", "SEQ_CLS", ["task_type", "SEQ_CLS"]),
        ("exclude_modules", ["v_proj"], ["target_modules", "['q_proj']"]),
        ("layers_to_transform", [0], ["layers_to_transform", "[0]"]),
        ("peft_type", "IA3", ["IA3"]),
        ("r", "many", ["rank", "many"]),
    ],
)
def test_an_adapter_with_what_no_setting_states(
    trained: Trained, finetune: Finetune, tmp_path: Path, field: str, value: Any, facts: list[str]
) -> None:
    folder = Path(shutil.copytree(trained(*FIRST).run.job.output, tmp_path / "adapter"))
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    with pytest.raises(ModelError) as error:
        finetune(*FIRST, warm_start=folder)
    assert names(error, "training.warm_start", *facts)


def test_an_initialization_that_would_not_be_used() -> None:
    with pytest.raises(ConfigError, match=r"lora\.init_lora_weights: gaussian .*training\.warm_start"):
        configured("training.warm_start=./x", "lora.init_lora_weights=gaussian")
