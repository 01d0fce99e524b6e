"""What training needs of memory, and which settings would fit where there is not enough."""

import gc
import json
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from training.measuring import names

from finetune_assets.training import memory
from finetune_assets.training.batches import Batch
from finetune_assets.training.loss import SummedLoss
from finetune_assets.training.memory import OutOfMemory
from finetune_assets.training.recipe import LoraFinetune

Finetune = Callable[..., LoraFinetune]


def test_what_a_token_keeps_is_the_same_in_any_batch(finetune: Finetune) -> None:
    run = finetune()
    run.model.train()
    found = []
    for few, many in ((1, 2), (2, 6)):
        batches = run.batch(run.sequences[:few]), run.batch(run.sequences[:many])
        found.append(
            memory.estimate(run.summed_loss, batches, 1_000, run.model, run.process.device, 1, False).activations
        )
    assert found[0] == pytest.approx(found[1], rel=0.15)
    width, layers = run.model.config.hidden_size, run.model.config.num_hidden_layers
    assert found[0] > 4 * width * layers * 5, "at least five activations of a layer's width"


def living_tensors() -> list[torch.Tensor]:
    gc.collect()
    return [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]


def test_what_was_measured_is_freed(finetune: Finetune) -> None:
    others = living_tensors()  # held, so that no new tensor takes the place of one of them
    known = {id(found) for found in others}
    run = finetune()
    parameters = {parameter.data_ptr() for parameter in run.model.parameters()}
    new = [found for found in living_tensors() if id(found) not in known]
    assert new, "the run's own parameters"
    assert not [found.shape for found in new if found.grad_fn is not None and found.data_ptr() not in parameters]


def test_activations_are_computed_twice_where_they_do_not_fit(
    finetune: Finetune, monkeypatch: pytest.MonkeyPatch
) -> None:
    plenty = finetune(name="plenty")
    assert plenty.estimate
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(plenty.estimate.needed / memory.RESERVE) - 1)
    little = finetune("training.max_steps=1", name="little")
    assert little.estimate
    assert little.estimate.activations < plenty.estimate.activations / 3
    assert (plenty.log.active["gradient_checkpointing"], little.log.active["gradient_checkpointing"]) == (False, True)
    asked = finetune("training.gradient_checkpointing=false", name="asked")
    assert not asked.log.active["gradient_checkpointing"]
    little.run()
    state = json.loads((little.job.output / "trainer_state.json").read_text())
    assert state["active"]["gradient_checkpointing"] is True


def test_out_of_memory_names_settings_that_would_fit(finetune: Finetune, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finetune("training.micro_batch_size=8", "training.macro_batch_size=8")
    assert run.estimate
    room = run.estimate.fixed + 3.5 * run.estimate.activations * run.longest
    run.estimate = replace(run.estimate, free=int(room / memory.RESERVE))
    forward = run.summed_loss.forward

    def too_much(batch: object) -> torch.Tensor:
        torch.empty(1 << 60)
        return forward(batch)  # type: ignore[arg-type]

    monkeypatch.setattr(run.summed_loss, "forward", too_much)
    with pytest.raises(OutOfMemory) as error:
        run.run()
    assert names(error, "cpu", "training.gradient_checkpointing", "model.quantization", "nf4")
    assert re.search(r"training\.micro_batch_size\D+3\b", str(error.value))
    assert not list(run.job.output.iterdir())


def test_model_that_does_not_fit_names_settings_that_would(finetune: Finetune, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoraFinetune, "_load_model", lambda self: torch.empty(1 << 60))
    with pytest.raises(OutOfMemory) as error:
        finetune()
    assert names(error, "model.quantization", "nf4", "training.sharding", "fsdp")
    assert not names(error, "training.micro_batch_size")


def test_other_errors_stay_what_they_are(finetune: Finetune, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finetune()
    monkeypatch.setattr(run.summed_loss, "forward", lambda batch: torch.ones(2, 3) @ torch.ones(2, 3))
    with pytest.raises(RuntimeError) as error:
        run.run()
    assert error.type is RuntimeError


@pytest.mark.parametrize("packing", [True, False])
def test_no_more_is_measured_than_a_micro_batch_holds(
    packing: bool, finetune: Finetune, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the model's own logits, which are whole in memory, are computed of the shortest example."""
    measured, checked = list[int](), list[int]()
    estimate, check = memory.estimate, SummedLoss.check

    def of_batches(loss: object, batches: tuple[Batch, Batch], tokens: int, *rest: object) -> memory.Estimate:
        measured.extend(batch.tokens for batch in batches)
        assert measured[0] < measured[1] <= tokens
        return estimate(loss, batches, tokens, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(memory, "estimate", of_batches)
    monkeypatch.setattr(SummedLoss, "check", lambda loss, batch: (checked.append(batch.tokens), check(loss, batch)))
    run = finetune("training.micro_batch_size=1", f"data.tokenization.packing={packing}".lower())
    assert len(measured) == 2
    assert checked == [run.train.lengths.min()]
