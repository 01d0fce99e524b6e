"""Names in the `lora` settings: one that selects nothing is an error, before a training and in its plan."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from training.conftest import configured
from training.models import CONFIGS
from transformers import AutoModelForCausalLM, PreTrainedModel

from finetune_assets.errors import UserError
from finetune_assets.preflight.plan import make_plan, read_shape
from finetune_assets.training.lora_names import adapted_modules, lora_problem
from finetune_assets.training.model import ModelError, peft_config, with_adapter

WRONG = [
    (["lora.target_modules=[q_proj, v_prj]"], ["lora.target_modules", "'v_prj'", "'v_proj'"]),
    (["lora.target_modules=[roj]"], ["lora.target_modules", "'roj'"]),
    (["lora.target_modules=[self_attn]"], ["lora.target_modules", "'self_attn'", "q_proj"]),
    (["lora.target_modules=[model.layers.7.mlp.up_proj, q_proj]"], ["lora.target_modules", "layers.7"]),
    (
        ["lora.target_modules=[q_proj, lm_head]", "lora.modules_to_save=[lm_head]"],
        ["'lm_head'", "lora.modules_to_save"],
    ),
    (["lora.target_modules=[q_proj, lm_head]", "lora.layers_to_transform=[0]"], ["'lm_head'", "[0]"]),
    (["lora.rank_pattern={q_porj: 4}"], ["lora.rank_pattern.q_porj", "'q_proj'"]),
    (["lora.rank_pattern={q_proj: 4, 'layers.9.*': 8}"], ["lora.rank_pattern.layers.9.*"]),
    (
        ["lora.target_modules=[q_proj]", "lora.rank_pattern={k_proj: 4}"],
        ["lora.rank_pattern.k_proj", "q_proj"],
    ),
    (["lora.rank_pattern={q_proj: 4, '.*attn.*': 8}"], ["lora.rank_pattern", "q_proj", "4", "8"]),
    (["lora.layers_to_transform=[0, 1]", "lora.rank_pattern={'.*layers.1..*': 4, 'x': 2}"], ["lora.rank_pattern.x"]),
    (["lora.modules_to_save=[lm_hed]"], ["lora.modules_to_save", "'lm_hed'", "'lm_head'"]),
    (["lora.layers_to_transform=[0, 99]"], ["lora.layers_to_transform", "99", "0 to 1"]),
]
RIGHT = [
    [],
    ["lora.target_modules=[q_proj, v_proj]", "lora.layers_to_transform=[1]"],
    ["lora.target_modules=[model.layers.0.mlp.up_proj, embed_tokens, lm_head]"],
    ["lora.target_modules=[self_attn.q_proj]", "lora.rank_pattern={'layers.0..*': 4}"],
    ["lora.rank_pattern={q_proj: 4, '(k|v)_proj': 8, model.layers.1.mlp.up_proj: 2}"],
    ["lora.rank_pattern={q_proj: 4, '.*attn.q_proj': 4}"],
    ["lora.modules_to_save=[norm, lm_head]"],
    ["lora.layers_to_transform=[0]"],
]


def on_meta(name: str = "llama") -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[name])
    return model


@pytest.mark.parametrize(("overrides", "facts"), WRONG)
def test_a_name_that_selects_nothing_is_refused(overrides: list[str], facts: list[str]) -> None:
    config, base = configured(*overrides), on_meta()
    with pytest.raises(ModelError) as error:
        with_adapter(base, config, None)
    for fact in facts:
        assert fact in str(error.value)
    assert not any(p.is_floating_point() and "lora" in name for name, p in base.named_parameters())


@pytest.mark.parametrize("overrides", RIGHT)
def test_what_peft_adapts_is_what_is_checked(overrides: list[str]) -> None:
    lora, base = configured(*overrides).lora, on_meta()
    assert lora_problem(lora, base) is None
    expected = adapted_modules(peft_config(lora, base), base)
    adapted = with_adapter(base, configured(*overrides), None)
    assert expected == [name for name in adapted.targeted_module_names if name in {*expected}]
    assert {*expected} == {*adapted.targeted_module_names}


@pytest.mark.parametrize("name", [*CONFIGS])
def test_every_architecture_is_adapted_by_default(name: str) -> None:
    lora, base = configured("lora.layers_to_transform=[0, 1]").lora, on_meta(name)
    assert lora_problem(configured().lora, base) is None
    assert lora_problem(lora, base) is None
    problem = lora_problem(configured("lora.layers_to_transform=[0, 2]").lora, base)
    assert problem is not None
    assert "0 to 1" in problem


def test_the_plan_refuses_it_before_a_gpu_is_used(base_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = base_model("llama")
    for overrides, facts in WRONG[:1] + WRONG[-2:]:
        for _ in range(2):  # the second time from the cache
            config = configured(*overrides)
            with pytest.raises(UserError) as error:
                make_plan(read_shape(folder, config, tmp_path), config)
            for fact in facts:
                assert fact in str(error.value)
    assert make_plan(read_shape(folder, configured(), tmp_path), configured()).memory is not None
