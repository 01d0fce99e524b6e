"""The invariants of training hold in bfloat16 on a CPU, in each of the ways in which it is computed.

This machine need not have instructions for bfloat16: capabilities are faked, the arithmetic is real.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from raw import ingest
from tiers import tiered
from torch import nn
from training.conftest import ALONE, MADE_FROM, FinishedRun, configured
from training.measuring import (
    Killed,
    die_at,
    equal,
    gradients,
    relative,
    token_losses,
    unbounded,
    weights,
    without_fused_lora,
)

from finetune_assets.data.prepare import prepare_dataset
from finetune_assets.data.tokenization import load_tokenizer
from finetune_assets.training import attention, lora
from finetune_assets.training.attention import varlen_attention
from finetune_assets.training.batches import collate
from finetune_assets.training.loss import CHUNK_BYTES, SummedLoss
from finetune_assets.training.recipe import LoraFinetune
from finetune_assets.training.reporting import Reporter
from finetune_assets.training.state import TrainingPaths

Finetune = Callable[..., LoraFinetune]
CPU = torch.device("cpu")
BF16 = ("model.dtype=bfloat16", "training.precision=bf16")
NATIVE = ("avx512_bf16",)
"""Capabilities of a CPU that multiplies in bfloat16; without them, it emulates that."""
TRAINED = ("training.max_steps=4", "training.macro_batch_size=2", "training.micro_batch_size=1")


@pytest.mark.system
def test_packed_equals_alone_in_bf16(finetune: Finetune) -> None:
    """Within the rounding of the logits: 0.02 on average, 2.07 where packed examples see one another."""
    run = finetune(*BF16)
    assert run.flat
    packs = sorted(run.sequences, key=len, reverse=True)[:3]
    batch = collate(packs, run.train, CPU, run.flat)
    packed = token_losses(run, batch).float()
    assert batch.boundaries is not None
    leaking = token_losses(run, replace(batch, boundaries=batch.boundaries[[0, -1]])).float()
    with unbounded(run):
        examples = [example for pack in packs for example in pack]
        alone = torch.cat([token_losses(run, collate([[example]], run.train, CPU)).float() for example in examples])
    assert (packed - alone).abs().mean() < 0.05
    assert (packed.sum() - alone.sum()).abs() < 0.001 * alone.sum()
    assert (leaking - alone).abs().mean() > 1


@pytest.mark.parametrize("capabilities", tiered([(), NATIVE], system={NATIVE}))
def test_bf16_gradients_are_fp32s_within_rounding(
    cpu: Callable[..., list[tuple[int, int]]],
    finetune: Finetune,
    base_model: Callable[[str], Path],
    capabilities: tuple[str, ...],
) -> None:
    """Also for micro-batches of other sizes, and with PEFT's own layers."""
    cpu(*capabilities)
    same = ("training.max_grad_norm=0", "lora.dropout=0")
    tiny = base_model("llama")
    exact = gradients(finetune(*same, "training.precision=fp32", base=tiny, name="fp32"))
    assert exact.norm() > 0
    for micro in (1, 8):
        run = finetune(*same, *BF16, f"training.micro_batch_size={micro}", base=tiny, name=f"bf16-{micro}")
        assert relative(gradients(run), exact) < 0.05
    plain = finetune(*same, *BF16, base=tiny, name="plain")
    without_fused_lora(plain)
    assert relative(gradients(plain), exact) < 0.05


def test_bf16_dropout_drops_the_same(finetune: Finetune, base_model: Callable[[str], Path]) -> None:
    x = torch.randn(3, 50, 16).bfloat16()
    kept = torch.rand(3, 50, 16) > 0.5
    assert torch.equal(lora._dropped(x, kept), torch.where(kept, x, torch.zeros(()).bfloat16()))
    assert lora._dropped(x, None) is x


def test_bf16_attention_is_computed_in_float32(
    cpu: Callable[..., list[tuple[int, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also under autocast, which would convert it back; on a CPU with AMX it stays in bfloat16."""
    seen: list[torch.dtype] = []
    original = F.scaled_dot_product_attention

    def spying(*args: Any, **kwargs: Any) -> torch.Tensor:
        output = original(*args, **kwargs)
        seen.append(output.dtype)
        return output

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", spying)
    torch.manual_seed(0)
    exact = [torch.randn(1, heads, 30, 8) for heads in (4, 2, 2)]
    rounded = [tensor.bfloat16() for tensor in exact]
    ends = torch.tensor([0, 20, 30], dtype=torch.int32)

    def attend(inputs: list[torch.Tensor]) -> torch.Tensor:
        query, key, value = inputs
        return varlen_attention(nn.Module(), query, key, value, None, cu_seq_lens_q=ends, max_length_q=20)[0]

    reference = attend([tensor.float() for tensor in rounded])
    for capabilities, expected in (
        ((), torch.float32),
        (("avx512_bf16",), torch.float32),
        (("amx_bf16",), torch.bfloat16),
    ):
        cpu(*capabilities)
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = [attend(rounded), attend([*exact[:2], rounded[2]])]
        assert {*seen} == {expected}
        assert {output.dtype for output in outputs} == {torch.bfloat16}
        for output in outputs:
            assert torch.allclose(output.float(), reference, atol=0.03)


@pytest.mark.parametrize("capabilities", [(), NATIVE])
def test_bf16_loss_equals_plain(
    cpu: Callable[..., list[tuple[int, int]]],
    finetune: Finetune,
    base_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capabilities: tuple[str, ...],
) -> None:
    """Loss and gradient of the chunks, against all logits at once; the loss is not rounded to 16 bits."""
    cpu(*capabilities)
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 40 * 1024 * 4)  # 40 tokens of the vocabulary at a time
    run = finetune(*BF16, base=base_model("llama"))
    loss: SummedLoss = run.summed_loss
    assert loss.way == "fused"
    hidden = torch.randn(130, 32).bfloat16().requires_grad_()
    targets = torch.randint(0, 1024, (130,))
    ours = loss._fused(hidden, targets, loss._chunk(hidden))
    assert ours.dtype == torch.float32
    (gradient,) = torch.autograd.grad(3 * ours, hidden)
    logits = hidden.float() @ loss.head.weight.float().t()
    plain = F.cross_entropy(logits, targets, reduction="sum")
    (expected,) = torch.autograd.grad(3 * plain, hidden)
    assert float(ours) == pytest.approx(float(plain), rel=1e-4)
    assert relative(gradient.float(), expected.float()) < 0.02
    with torch.no_grad():
        assert float(loss._fused(hidden, targets, 40)) == float(ours)


def test_bf16_output_layer_multiplies_in_bf16_where_the_cpu_can(
    cpu: Callable[..., list[tuple[int, int]]], finetune: Finetune, base_model: Callable[[str], Path]
) -> None:
    """No float32 copy of the output layer is made, which the library does in every call."""
    run = finetune(*BF16, base=base_model("llama"))
    hidden, targets = torch.randn(50, 32).bfloat16().requires_grad_(), torch.randint(0, 1024, (50,))

    def copies(*capabilities: str) -> int:
        cpu(*capabilities)
        with torch.profiler.profile(record_shapes=True) as profile:
            run.summed_loss._fused(hidden, targets, 40).backward()
        return sum(
            event.name == "aten::_to_copy" and event.input_shapes[:1] == [[1024, 32]] for event in profile.events()
        )

    assert copies("avx512_bf16") == 0
    assert copies() >= 1, "where products in bfloat16 are emulated, those in float32 are faster"


@pytest.mark.system
@pytest.mark.parametrize("capabilities", [pytest.param((), marks=pytest.mark.soak), NATIVE])
def test_resumed_training_in_bf16_ends_bit_equal(
    cpu: Callable[..., list[tuple[int, int]]],
    finetune: Finetune,
    base_model: Callable[[str], Path],
    capabilities: tuple[str, ...],
) -> None:
    cpu(*capabilities)
    settings = (*TRAINED, *BF16, "training.save_steps=2", "lora.dropout=0.1")
    undisturbed = finetune(*settings, base=base_model("llama"), name="undisturbed")
    undisturbed.run()
    first = finetune(*settings, base=base_model("llama"))
    die_at(first, 3)
    with pytest.raises(Killed):
        first.run()
    second = finetune(*settings, base=base_model("llama"))
    taken = die_at(second, -1)
    second.run()
    assert taken == [2, 3]
    assert equal(weights(second), weights(undisturbed))


@pytest.mark.soak
@pytest.mark.system
def test_held_out_loss_in_bf16_is_near_fp32s(trained: Callable[..., FinishedRun]) -> None:
    settings = ("training.max_steps=6", "training.learning_rate=1e-2")
    settings += ("training.macro_batch_size=4", "training.micro_batch_size=4")
    exact, rounded = (
        trained(*settings, *types).run.log.held_out_loss for types in (("training.precision=fp32",), BF16)
    )
    assert exact["after"] < 0.9 * exact["before"]  # type: ignore[operator]
    for when in ("before", "after"):
        assert rounded[when] == pytest.approx(exact[when], rel=0.02)


@pytest.mark.real_data
@pytest.mark.system
@pytest.mark.soak
def test_held_out_loss_on_dolly_is_within_half_a_percent(
    cpu: Callable[..., list[tuple[int, int]]], dolly: Path, stories260k: Path, tmp_path: Path
) -> None:
    """A real Llama on real rows, packed, after equal steps; `auto` selects the type, by faked instructions."""
    settings = ["data.num_samples=400", "data.val_fraction=0.2", "data.tokenization.cutoff_len=192"]
    settings += ["training.macro_batch_size=4", "training.micro_batch_size=4", "training.max_steps=20"]
    settings += ["training.learning_rate=7e-3", "training.warmup_steps=2"]
    settings += ["model.dtype=auto", "training.precision=auto"]
    rows, dataset = ingest(tmp_path, dolly), tmp_path / "dataset"
    dataset.mkdir()
    prepare_dataset(rows, load_tokenizer(str(stories260k)), configured(*settings).data, "salt", dataset)
    after = {}
    for capabilities in ((), ("avx512_bf16",)):
        cpu(*capabilities)
        output = tmp_path / "-".join(("run", *capabilities)) / "output"
        output.mkdir(parents=True)
        job = TrainingPaths(stories260k, dataset, output, output.parent / "scratch", MADE_FROM)
        run = LoraFinetune(job, configured(*settings), ALONE, Reporter(print))
        run.run()
        after[run.precision] = run.log.held_out_loss["after"]
        assert after[run.precision] < 0.95 * run.log.held_out_loss["before"]  # type: ignore[operator]
    print(after)
    assert after["bf16"] == pytest.approx(after["fp32"], rel=0.005)
