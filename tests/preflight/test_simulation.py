"""A deep model is judged by two shallow ones; that must come to the same as all of it."""

from dataclasses import replace
from typing import Any

import pytest
from paths import ROOT
from tiers import tiered
from transformers import AutoConfig

from finetune_assets.config.loading import load_experiment
from finetune_assets.preflight import advice, simulation
from finetune_assets.preflight.advice import ways
from finetune_assets.preflight.case import Case, NotSimulated, Shape, simulate
from finetune_assets.preflight.device import Device
from finetune_assets.preflight.memory import Memory, predict
from finetune_assets.preflight.plan import make_plan
from finetune_assets.preflight.simulation import base_on_meta

GPU = Device("cuda", 80 << 30, 1, True, "H100")
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 500}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 9},
    "gpt_neox": {"num_hidden_layers": 7},
    "gemma3_text": {"num_hidden_layers": 20, "head_dim": 16},
}
"""Kinds of models; of the last, every sixth layer is of another kind."""


def case(kind: str, *overrides: str) -> Case:
    experiment = load_experiment(ROOT / "configs", "demo", list(overrides)).config
    shape = Shape.of(AutoConfig.for_model(kind, **SMALL, **SHAPES[kind]))
    return Case(shape, experiment, GPU, [30, 50, 20], 70, bool(experiment.training.gradient_checkpointing))


QUANTIZED = (["model.quantization=nf4", "training.gradient_checkpointing=true"], ["model.quantization=int8"])
SWEPT = tiered(
    [(kind, overrides) for kind in SHAPES for overrides in ([], *QUANTIZED)],
    [("llama", QUANTIZED[0])],
    [("gpt_neox", QUANTIZED[1])],
)


@pytest.mark.parametrize("swept", SWEPT, ids=str)
def test_two_depths_stand_for_all(swept: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    kind, overrides = swept
    one = case(kind, *overrides)
    depths = []
    at_depth = simulation._simulated

    def seen(shape: Any, question: Any, layers: int | None) -> Any:
        depths.append(layers)
        return at_depth(shape, question, layers)

    monkeypatch.setattr(simulation, "_simulated", seen)
    short = simulate(one)
    assert len(depths) == 2
    assert max(depths) < one.shape.config.num_hidden_layers
    assert vars(short) == pytest.approx(vars(at_depth(one.shape.config, one.question, None)))


@pytest.mark.system
def test_layers_with_adapters_of_their_own_are_all_looked_at() -> None:
    whole, some = case("llama"), case("llama", "lora.layers_to_transform=[0, 8]")
    assert simulate(some).trained == pytest.approx(simulate(whole).trained * 2 / 9)


def test_a_model_that_cannot_be_simulated_is_planned_without_its_memory() -> None:
    """A mixture of experts sends tokens where their values say, which tensors without data do not have."""
    sizes = {**SMALL, "num_hidden_layers": 4, "num_local_experts": 4, "num_experts_per_tok": 9}
    shape = Shape.of(AutoConfig.for_model("mixtral", **sizes))
    with pytest.raises(NotSimulated):
        simulate(replace(case("llama"), shape=shape))
    plan = make_plan(shape, case("llama").experiment)
    assert plan.memory is None
    assert plan.fits, "what is not known forbids nothing"
    assert plan.unknown
    assert plan.to_dict()["peak_memory_mib"] is None


def test_a_change_that_cannot_be_simulated_is_not_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    def known(case: Case) -> Memory:
        if case.experiment.model.quantization == "nf4":
            raise NotSimulated("no such weights")
        return predict(case)

    monkeypatch.setattr(advice, "predict", known)
    one = case("llama")
    too_much = replace(predict(one), activations=100 << 30)
    assert "nf4" not in " ".join(ways(one, too_much))


def test_a_class_that_has_no_causal_model_is_told_in_its_own_words() -> None:
    with pytest.raises(NotSimulated, match=r"^ValueError: .*T5Config"):
        base_on_meta(AutoConfig.for_model("t5"), case("llama").question)
