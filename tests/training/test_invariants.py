"""Settings that must not change what is computed do not."""

from collections.abc import Callable

import pytest
import torch
from training.measuring import gradients, relative, token_losses

from finetune_assets.training.batches import Batch, collate
from finetune_assets.training.loss import learned_tokens, summed_loss
from finetune_assets.training.recipe import LoraFinetune

Finetune = Callable[..., LoraFinetune]
CPU = torch.device("cpu")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_equals_alone_token_by_token(finetune: Finetune, attention: str) -> None:
    """An example packed between others has the loss that it has alone; the mean would hide a leak."""
    run = finetune(f"model.attention={attention}")
    packs = sorted(run.sequences, key=len, reverse=True)[:3]
    packed = token_losses(run, collate(packs, run.train, CPU))
    for pack, losses in zip(packs, packed, strict=True):
        assert len(pack) > 2
        alone = torch.cat([token_losses(run, collate([[example]], run.train, CPU))[0] for example in pack])
        assert (losses - alone).abs().max() < 1e-5


def test_a_leak_would_be_seen(finetune: Finetune) -> None:
    """The test above is able to fail: without position ids, or with a mask beside them, losses differ by far."""
    run = finetune()
    pack = max(run.sequences, key=len)
    batch = collate([pack], run.train, CPU)
    right = token_losses(run, batch)[0]
    leaking = token_losses(run, Batch(batch.input_ids, batch.labels, None, batch.tokens))[0]
    assert (right - leaking).abs().max() > 0.1


def test_padded_row_equals_alone(finetune: Finetune) -> None:
    run = finetune("data.tokenization.packing=false")
    examples = sorted(range(len(run.train)), key=lambda i: int(run.train.lengths[i]))
    few = [examples[0], examples[len(examples) // 2], examples[-1]]
    padded = token_losses(run, collate([[i] for i in few], run.train, CPU))
    for example, losses in zip(few, padded, strict=True):
        alone = token_losses(run, collate([[example]], run.train, CPU))[0]
        assert (losses - alone).abs().max() < 1e-5


def test_loss_is_the_sum_of_its_tokens(finetune: Finetune) -> None:
    run = finetune()
    batch = collate(run.sequences[:4], run.train, CPU)
    losses = torch.cat(token_losses(run, batch))
    assert len(losses) == learned_tokens(batch)
    assert torch.allclose(summed_loss(run.model, batch), losses.sum(), rtol=1e-5)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("micro", [1, 3])
def test_accumulation_equals_one_batch(finetune: Finetune, micro: int, packing: bool) -> None:
    same = (f"data.tokenization.packing={packing}", "training.max_grad_norm=0")
    whole = gradients(finetune(*same, "training.micro_batch_size=8"))
    parts = gradients(finetune(*same, f"training.micro_batch_size={micro}"))
    assert whole.norm() > 0
    assert relative(parts, whole) < 1e-5


def test_packed_equals_padded(finetune: Finetune) -> None:
    """The same examples in one global batch give the same gradient, packed or each in a row of its own."""
    everything = ("training.macro_batch_size=1000", "training.micro_batch_size=8", "training.max_grad_norm=0")
    packed = gradients(finetune(*everything))
    padded = gradients(finetune(*everything, "data.tokenization.packing=false"))
    assert relative(packed, padded) < 1e-5


def test_checkpointing_changes_memory_alone(finetune: Finetune) -> None:
    plain = gradients(finetune("training.max_grad_norm=0"))
    checkpointed = gradients(finetune("training.max_grad_norm=0", "training.gradient_checkpointing=true"))
    assert relative(checkpointed, plain) < 1e-6


def test_clipping_bounds_the_gradient_and_tells_the_norm_before(finetune: Finetune) -> None:
    free = gradients(finetune("training.max_grad_norm=0"))
    clipped = gradients(finetune("training.max_grad_norm=0.001"))
    assert free.norm() > 0.01
    assert float(clipped.norm()) == pytest.approx(0.001, rel=1e-3)
    assert relative(clipped / clipped.norm(), free / free.norm()) < 1e-4
