"""Settings that must not change what is computed do not."""

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training.conftest import FinishedRun
from training.measuring import gradients, relative, token_losses, unbounded, without_fused_lora
from training.models import CONFIGS, save_model
from transformers import LlamaForCausalLM

from finetune_assets.training import lora
from finetune_assets.training.attention import UnsupportedAttention, varlen_attention
from finetune_assets.training.batches import collate
from finetune_assets.training.lora import kept_by_dropout
from finetune_assets.training.loss import CHUNK_BYTES
from finetune_assets.training.recipe import LoraFinetune

Finetune = Callable[..., LoraFinetune]
CPU = torch.device("cpu")


@pytest.fixture
def plain(trained: Callable[..., FinishedRun]) -> LoraFinetune:
    """A training with the defaults, only to be read."""
    return trained("training.max_steps=2", "training.macro_batch_size=2", "training.micro_batch_size=2").run


@pytest.fixture
def tiny(base_model: Callable[[str], Path]) -> Path:
    """A base model of 32 dimensions."""
    return base_model("llama")


@pytest.mark.parametrize("attention", ["auto", "sdpa", "eager"])
def test_packed_equals_alone_token_by_token(finetune: Finetune, attention: str) -> None:
    """An example packed between others has the loss that it has alone; the mean would hide a leak."""
    run = finetune(f"model.attention={attention}")
    assert run.flat == (attention == "auto")
    packs = sorted(run.sequences, key=len, reverse=True)[:3]
    assert min(map(len, packs)) > 2
    packed = token_losses(run, collate(packs, run.train, CPU, run.flat))
    with unbounded(run):
        alone = [token_losses(run, collate([[example]], run.train, CPU)) for pack in packs for example in pack]
    assert (packed - torch.cat(alone)).abs().max() < 1e-5


def test_a_leak_would_be_seen(plain: LoraFinetune, finetune: Finetune) -> None:
    """The test above is able to fail: without boundaries examples see one another, and losses differ by far."""
    run = plain
    pack = max(run.sequences, key=len)
    batch = collate([pack], run.train, CPU, flat=True)
    right = token_losses(run, batch)
    assert batch.boundaries is not None
    one = replace(batch, boundaries=batch.boundaries[[0, -1]])
    assert (right - token_losses(run, one)).abs().max() > 0.1
    rows = finetune("model.attention=sdpa", name="rows")
    leaking = token_losses(rows, replace(collate([pack], run.train, CPU), position_ids=None))
    assert (right - leaking).abs().max() > 0.1


@pytest.mark.parametrize("flat", [True, False])
def test_no_batch_has_an_attention_mask(plain: LoraFinetune, flat: bool) -> None:
    """One of ones beside position ids would switch off, silently, what keeps examples apart."""
    assert not [name for name in collate(plain.sequences[:3], plain.train, CPU, flat).inputs if "mask" in name]


def test_attention_without_boundaries_refuses(plain: LoraFinetune) -> None:
    batch = collate([max(plain.sequences, key=len)], plain.train, CPU)
    with pytest.raises(UnsupportedAttention):
        plain.model(**batch.inputs)


def test_flat_batch_has_no_padding(finetune: Finetune) -> None:
    run = finetune("data.tokenization.packing=false")
    for batch in run.work(0).batches:
        assert batch.input_ids.shape == (1, batch.tokens)
        assert batch.tokens <= run.training.micro_batch_size * run.config.data.tokenization.cutoff_len


def test_padded_row_equals_alone(finetune: Finetune) -> None:
    run = finetune("data.tokenization.packing=false", "model.attention=sdpa")
    examples = sorted(range(len(run.train)), key=lambda i: int(run.train.lengths[i]))
    few = [examples[0], examples[len(examples) // 2], examples[-1]]
    padded = token_losses(run, collate([[i] for i in few], run.train, CPU))
    alone = torch.cat([token_losses(run, collate([[example]], run.train, CPU)) for example in few])
    assert (padded - alone).abs().max() < 1e-5


@pytest.mark.parametrize("window", [1, 7, 40])
def test_sliding_window_equals_a_mask(window: int) -> None:
    """Examples shorter and longer than it, in groups of query heads, with their gradients."""
    torch.manual_seed(0)
    lengths = [3, 60, 7, 41]
    query, key, value = (torch.randn(1, heads, sum(lengths), 8, requires_grad=True) for heads in (4, 2, 2))
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    found, _ = varlen_attention(
        nn.Module(), query, key, value, None, sliding_window=window, cu_seq_lens_q=ends, max_length_q=60
    )
    place, example = torch.arange(sum(lengths)), torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    behind = place[:, None] - place
    mask = (behind >= 0) & (behind < window) & (example[:, None] == example)
    expected = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True).transpose(1, 2)
    assert (found - expected).abs().max() < 1e-5
    weights = torch.randn_like(found)
    ours = torch.autograd.grad((found * weights).sum(), (query, key, value))
    theirs = torch.autograd.grad((expected * weights).sum(), (query, key, value))
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("extra", [{"softcap": 50.0}, {"s_aux": torch.ones(4)}, {"is_causal": False}])
def test_attention_that_would_not_be_the_models_own_refuses(extra: dict[str, object]) -> None:
    states = torch.randn(1, 4, 5, 8)
    ends = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(UnsupportedAttention):
        varlen_attention(nn.Module(), states, states, states, None, cu_seq_lens_q=ends, max_length_q=5, **extra)


@pytest.mark.parametrize(("way", "settings"), [("fused", []), ("chunked", ["lora.modules_to_save=[lm_head]"])])
def test_chunked_loss_equals_plain(
    finetune: Finetune, tiny: Path, monkeypatch: pytest.MonkeyPatch, way: str, settings: list[str]
) -> None:
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 40 * 1024 * 4)  # 40 tokens of the vocabulary at a time
    same = ("training.max_grad_norm=0", *settings)
    run, plain = (finetune(*same, base=tiny, name=name) for name in ("chunked", "plain"))
    assert run.summed_loss.way == way
    plain.summed_loss.way = "whole"
    batch = run.work(0).batches[0]
    assert len(batch.targets) > 100
    assert float(run.summed_loss(batch)) == pytest.approx(float(plain.summed_loss(batch)), rel=1e-6)
    assert float(run.summed_loss(batch)) == pytest.approx(float(token_losses(run, batch).sum()), rel=1e-6)
    assert relative(gradients(run), gradients(plain)) < 1e-5


def test_loss_of_nothing_learned_is_zero(finetune: Finetune, tiny: Path) -> None:
    run = finetune(base=tiny)
    batch = run.work(0).batches[0]
    for way in ("fused", "chunked", "whole"):
        run.summed_loss.way = way
        loss = run.summed_loss(replace(batch, learned=batch.learned[:0], targets=batch.targets[:0]))
        loss.backward()
        assert float(loss) == 0


def test_loss_that_is_not_the_models_own_is_noticed(
    plain: LoraFinetune, finetune: Finetune, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that scales its logits, as some do, in a place that is not known here."""
    forward = LlamaForCausalLM.forward

    def scaled(self: LlamaForCausalLM, *args: object, **kwargs: object) -> object:
        out = forward(self, *args, **kwargs)
        out.logits = out.logits * 0.5
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    other = finetune(name="scaled")
    assert (plain.summed_loss.way, other.summed_loss.way) == ("fused", "whole")
    batch = other.work(0).batches[0]
    assert float(other.summed_loss(batch)) == pytest.approx(float(token_losses(other, batch).sum()), rel=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_fused_lora_equals_pefts(
    finetune: Finetune, tiny: Path, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    """Also with dropout, where both drop the same."""
    settings = ("training.max_grad_norm=0", "lora.use_rslora=true", f"lora.dropout={dropout}")
    fused, plain = (finetune(*settings, base=tiny, name=name) for name in ("fused", "plain"))
    assert fused.log.active["fused_lora_layers"] == 7 * fused.model.config.num_hidden_layers
    without_fused_lora(plain)
    kept = torch.rand(1, 4096, 1024) >= dropout
    monkeypatch.setattr(lora, "kept_by_dropout", lambda x, share: kept[:, : x.shape[1], : x.shape[2]])
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x * kept[:, : x.shape[1], : x.shape[2]] / (1 - self.p))
    assert relative(gradients(fused), gradients(plain)) < 1e-5


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_dropout_drops_its_share_and_follows_the_seed(share: float) -> None:
    x = torch.ones(300, 1001)
    torch.manual_seed(3)
    first, second = kept_by_dropout(x, share), kept_by_dropout(x, share)
    torch.manual_seed(3)
    assert torch.equal(first, kept_by_dropout(x, share))
    assert not torch.equal(first, second)
    for along in (0, 1):
        dropped = 1 - first.float().mean(along)
        assert abs(float(dropped.mean()) - share) < 0.003
        assert dropped.max() < share + 6 * (share * (1 - share) / first.shape[along]) ** 0.5


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("micro", [1, 3])
def test_accumulation_equals_one_batch(finetune: Finetune, tiny: Path, micro: int, packing: bool) -> None:
    same = (f"data.tokenization.packing={packing}", "training.max_grad_norm=0")
    whole = gradients(finetune(*same, "training.micro_batch_size=8", base=tiny))
    parts = gradients(finetune(*same, f"training.micro_batch_size={micro}", base=tiny))
    assert whole.norm() > 0
    assert relative(parts, whole) < 1e-5


def test_packed_equals_padded(finetune: Finetune, tiny: Path) -> None:
    """The same examples in one global batch give the same gradient, packed or each in a row of its own."""
    everything = ("training.macro_batch_size=1000", "training.micro_batch_size=8", "training.max_grad_norm=0")
    packed = gradients(finetune(*everything, base=tiny))
    padded = gradients(finetune(*everything, "data.tokenization.packing=false", base=tiny))
    assert relative(packed, padded) < 1e-5


def test_clipping_bounds_the_gradient(finetune: Finetune, tiny: Path) -> None:
    free = gradients(finetune("training.max_grad_norm=0", base=tiny))
    clipped = gradients(finetune("training.max_grad_norm=0.001", base=tiny))
    assert free.norm() > 0.01
    assert float(clipped.norm()) == pytest.approx(0.001, rel=1e-3)
    assert relative(clipped / clipped.norm(), free / free.norm()) < 1e-4


@pytest.mark.soak
def test_compiled_equals_eager(finetune: Finetune, tmp_path: Path) -> None:
    """With a model of one layer, as compiling takes its time."""
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler, which torch.compile needs on a CPU")
    one = copy.copy(CONFIGS["llama"])
    one.num_hidden_layers = 1
    base = save_model(one, tmp_path / "model")
    same = ("training.max_grad_norm=0", "lora.dropout=0")
    eager = gradients(finetune(*same, base=base, name="eager"))
    run = finetune(*same, "training.compile=true", base=base, name="compiled")
    assert run.log.active["compiled_layers"] == 1
    assert relative(gradients(run), eager) < 1e-5
