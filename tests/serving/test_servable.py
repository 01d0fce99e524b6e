"""Settings that a vLLM server cannot serve are known before training, with settings that it can."""

import pytest
from training.conftest import configured

from finetune_assets.config.overrides import read_override
from finetune_assets.config.schema import ExperimentConfig, Serving
from finetune_assets.serving.servable import problems, server_base_name


@pytest.mark.parametrize(
    ("override", "what", "remedies"),
    [
        ("lora.use_dora=true", "lora.use_dora", ["false", "merged_model"]),
        ("lora.bias=all", "lora.bias is all", ["none", "merged_model"]),
        ("lora.modules_to_save=[lm_head]", "lora.modules_to_save is [lm_head]", ["null", "merged_model"]),
        ("data.tokenization.added_tokens=['<|x|>']", "data.tokenization.added_tokens", ["'<|x|>'", "merged_model"]),
        ("lora.rank=80", "lora.rank is 80", ["64", "serving.max_rank to 128", "--max-lora-rank 128"]),
        ("lora.rank=600", "lora.rank is 600", ["64"]),
        ("lora.rank_pattern={q_proj: 65}", "lora.rank_pattern.q_proj is 65", ["set it to 64", "128"]),
    ],
)
def test_each_setting_that_cannot_be_served(override: str, what: str, remedies: list[str]) -> None:
    (problem,) = problems(configured(override))
    assert problem.refused
    for text in (what, *remedies):
        assert text in str(problem)


def test_rank_that_no_server_allows_has_no_larger_limit() -> None:
    (problem,) = problems(configured("lora.rank=600"))
    assert "serving.max_rank to" not in problem.remedy


@pytest.mark.parametrize("scheme", ["pissa", "pissa_niter_4", "olora"])
def test_doubled_rank_of_an_initialization_that_modifies_the_base(scheme: str) -> None:
    setting = f"lora.init_lora_weights={scheme}"
    assert problems(configured(setting, "lora.rank=32")) == []
    (problem,) = problems(configured(setting, "lora.rank=33"))
    assert problem.what == f"lora.rank is 33, which is saved as 66 after {scheme}"
    assert "set it to 32" in problem.remedy
    assert "serving.max_rank to 128" in problem.remedy


@pytest.mark.parametrize(
    "override",
    [
        "lora.use_rslora=true",
        "lora.rank=17",
        "lora.rank=64",
        "lora.rank_pattern={q_proj: 4, v_proj: 63}",
        "lora.init_lora_weights=orthogonal",
        "lora.target_modules=[q_proj]",
        "lora.layers_to_transform=[1]",
        "lora.alpha=1.5",
    ],
)
def test_what_a_servable_copy_converts_is_no_problem(override: str) -> None:
    assert problems(configured(override)) == []


def test_limit_of_the_servers_counts() -> None:
    config = configured("lora.rank=100")
    config.serving = Serving(["folder:./served"], max_rank=128)
    assert problems(config) == []
    config.serving.max_rank = 16
    (problem,) = problems(config)
    assert "serving.max_rank 16" in problem.why


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_base_that_is_quantized_for_the_training_changes_answers(quantization: str) -> None:
    (problem,) = problems(configured(f"model.quantization={quantization}"))
    assert problem.what == f"model.quantization is {quantization}"
    assert not problem.refused
    assert "set it to none" in problem.remedy


@pytest.mark.parametrize(
    ("base", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
    ],
)
def test_base_that_no_server_loads(base: dict[str, object], named: str) -> None:
    (problem,) = problems(configured(), base)
    assert problem.refused
    assert named in problem.what
    assert "demo-base" in problem.what


@pytest.mark.parametrize(
    "base",
    [
        {"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": "gptq"}},
        {"architectures": None, "quantization_config": None},
        {"architectures": "GPT2LMHeadModel", "quantization_config": "bitsandbytes"},
        {},
    ],
)
def test_nothing_is_reported_of_a_base_that_is_not_known_to_fail(base: dict[str, object]) -> None:
    assert problems(configured(), base) == []


def test_name_of_the_base_model_on_the_servers() -> None:
    config = configured()
    assert server_base_name(config) == "demo-base"
    config.serving = Serving(["http://127.0.0.1:8000"])
    assert server_base_name(config) == "demo-base"
    config.serving.base_name = "llama"
    assert server_base_name(config) == "llama"


def test_overrides_of_a_run_may_set_the_limit_but_no_server() -> None:
    assert read_override(ExperimentConfig, "serving.max_rank=16", "override") == {"serving": {"max_rank": 16}}
