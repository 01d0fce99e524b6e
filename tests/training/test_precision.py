"""What `auto` types are on a CPU, that all processes and resumed trainings agree on them, and bfloat16's own paths.

This machine need not have instructions for bfloat16: capabilities and measurements are faked, the arithmetic is real.
"""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from raw import ingest
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

from finetune_assets.config.schema import Model, Training
from finetune_assets.data.prepare import prepare_dataset
from finetune_assets.data.tokenization import load_tokenizer
from finetune_assets.evaluation.losses import RowLosses
from finetune_assets.preflight.device import Device, device_of
from finetune_assets.training import attention, lora, precision, telemetry
from finetune_assets.training.attention import varlen_attention
from finetune_assets.training.batches import collate
from finetune_assets.training.loss import CHUNK_BYTES, SummedLoss
from finetune_assets.training.model import load_base
from finetune_assets.training.precision import AutoTypes, MatrixRates, auto_types, decide, measure, product_shape_of
from finetune_assets.training.recipe import LoraFinetune
from finetune_assets.training.reporting import Reporter
from finetune_assets.training.state import TrainingPaths

Finetune = Callable[..., LoraFinetune]
CPU = torch.device("cpu")
IS_NATIVE = bool(precision.cpu_instructions())
"""Whether this machine has instructions for bfloat16, which the fixtures hide."""
FAST, SLOW = MatrixRates(bf16=158.0, fp32=57.0), MatrixRates(bf16=57.0, fp32=57.0)
BF16 = ("model.dtype=bfloat16", "training.precision=bf16")
TRAINED = ("training.max_steps=4", "training.macro_batch_size=2", "training.micro_batch_size=1")


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[tuple[int, int]]]]:
    """Fakes a CPU's capabilities and measured rates; the shapes that are measured."""

    def fake(*capabilities: str, rates: MatrixRates = FAST) -> list[tuple[int, int]]:
        measured: list[tuple[int, int]] = []

        def measuring(*shape: int) -> MatrixRates:
            measured.append(shape)  # type: ignore[arg-type]
            return rates

        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(capabilities, True))
        monkeypatch.setattr(precision, "measure", measuring)
        precision._of_this_cpu.cache_clear()
        return measured

    yield fake
    precision._of_this_cpu.cache_clear()


# ---- the decision


@pytest.mark.parametrize(("bf16", "expected"), [(158, True), (68.4, True), (68.3, False), (57, False), (9, False)])
def test_bf16_is_selected_where_it_is_measured_to_be_faster(bf16: float, expected: bool) -> None:
    types = decide("avx512_bf16", MatrixRates(bf16, 57))
    assert types == AutoTypes(expected, "avx512_bf16", bf16, 57)


@pytest.mark.parametrize(
    ("capabilities", "rates", "expected"),
    [
        (["avx512_bf16"], FAST, AutoTypes(True, "avx512_bf16", 158, 57)),
        (["avx512_bf16", "amx_bf16"], FAST, AutoTypes(True, "amx_bf16", 158, 57)),
        (["amx_bf16"], SLOW, AutoTypes(False, "amx_bf16", 57, 57)),
        (["avx512_f", "amx_int8"], FAST, AutoTypes(False)),
    ],
)
def test_instructions_and_measurement_decide(
    cpu: Callable[..., list[tuple[int, int]]], capabilities: list[str], rates: MatrixRates, expected: AutoTypes
) -> None:
    measured = cpu(*capabilities, rates=rates)
    assert auto_types(Model("m"), Training(), CPU, lambda: (576, 1536)) == expected
    assert measured == ([(576, 1536)] if expected.instructions else [])


@pytest.mark.parametrize("name", ["fp32", "bf16", "full_bf16"])
def test_nothing_is_measured_for_types_in_the_settings(cpu: Callable[..., list[tuple[int, int]]], name: Any) -> None:
    measured = cpu("avx512_bf16")
    dtype: Any = "auto" if name == "full_bf16" else "float32"
    auto_types(Model("m", dtype=dtype), Training(precision=name), CPU, lambda: (576, 1536))
    assert not measured
    auto_types(Model("m"), Training(precision="bf16"), CPU, lambda: (576, 1536))
    assert measured, "the weights' data type is auto"


def test_one_measurement_for_all_models_of_a_process(cpu: Callable[..., list[tuple[int, int]]]) -> None:
    measured = cpu("avx512_bf16")
    first, second = (auto_types(Model("m"), Training(), CPU, lambda: (576, 1536)) for _ in range(2))
    assert first is second
    assert len(measured) == 1


def test_measurement_is_short_and_draws_no_random_numbers() -> None:
    state = torch.random.get_rng_state()
    began = time.process_time()
    rates = measure(8_192, 28_672)
    assert (time.process_time() - began) / torch.get_num_threads() < 2
    assert torch.equal(state, torch.random.get_rng_state())
    assert min(rates.bf16, rates.fp32) > 0.1
    if not IS_NATIVE:
        assert not decide("none", rates).bf16, "emulated bfloat16 is not faster"


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_products_have_the_models_shape(base_model: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    assert product_shape_of(base_model(name)) == (32, 4 * 32 if name == "gpt2" else 48)
    (tmp_path / "config.json").write_text("{")
    assert product_shape_of(tmp_path) == (1024, 4096)


# ---- training, evaluation and planning


@pytest.mark.parametrize(("rates", "selected"), [(FAST, "bf16"), (SLOW, "fp32")])
def test_training_follows_and_records_the_decision(
    cpu: Callable[..., list[tuple[int, int]]],
    finetune: Finetune,
    base_model: Callable[[str], Path],
    caplog: pytest.LogCaptureFixture,
    rates: MatrixRates,
    selected: str,
) -> None:
    measured = cpu("avx512_bf16", rates=rates)
    with caplog.at_level(logging.INFO, "finetune_assets"):
        run = finetune(*TRAINED, base=base_model("llama"))
    assert measured == [(32, 48)]
    assert (run.precision, run.log.active["precision"]) == (selected, selected)
    assert run.log.active["weights"] == {"bf16": "bfloat16", "fp32": "float32"}[selected]
    assert run.log.active["auto_types"] == {
        "bf16": selected == "bf16",
        "instructions": "avx512_bf16",
        "bf16_gflops": rates.bf16,
        "fp32_gflops": rates.fp32,
    }
    assert [record.getMessage() for record in caplog.records if "avx512_bf16" in record.getMessage()]
    run.run()
    state = json.loads((run.job.output / "trainer_state.json").read_text())
    assert state["active"]["auto_types"]["bf16_gflops"] == rates.bf16
    assert {tensor.dtype for tensor in weights(run).values()} == {torch.float32}


@pytest.mark.parametrize(("rates", "dtype"), [(FAST, torch.bfloat16), (SLOW, torch.float32)])
def test_evaluation_and_generation_resolve_auto_alike(
    cpu: Callable[..., list[tuple[int, int]]], base_model: Callable[[str], Path], rates: MatrixRates, dtype: torch.dtype
) -> None:
    measured = cpu("avx512_bf16", rates=rates)
    config = configured()
    base = load_base(base_model("llama"), config.model, config.training, CPU)
    losses = RowLosses(base, config, CPU)
    assert (base.dtype, losses.precision) == (dtype, "bf16" if dtype == torch.bfloat16 else "fp32")
    assert measured == [(32, 48)]


def test_plans_expect_bf16_of_a_cpu_with_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    experiment = configured()
    for flags, expected in (("avx avx512f", False), ("avx avx512_bf16 x", True), ("amx_tile amx_bf16", True)):
        info = f"model name\t: CPU\nflags\t\t: fpu {flags} vme\nbugs\t\t: none\n"
        monkeypatch.setattr(telemetry, "_cpu_info", lambda info=info: info)
        device: Device = device_of(experiment)
        assert (device.kind, device.bf16) == ("cpu", expected)
        assert (device.precision(experiment), device.dtype(experiment)) == (
            ("bf16", "bfloat16") if expected else ("fp32", "float32")
        )


# ---- resume, and several processes


@pytest.mark.parametrize(("before", "after"), [(("avx512_bf16",), ()), ((), ("avx512_bf16",))])
def test_resumed_training_keeps_its_types_on_another_machine(
    cpu: Callable[..., list[tuple[int, int]]],
    finetune: Finetune,
    base_model: Callable[[str], Path],
    before: tuple[str, ...],
    after: tuple[str, ...],
) -> None:
    settings = (*TRAINED, "training.save_steps=2")
    cpu(*before)
    first = finetune(*settings, base=base_model("llama"))
    die_at(first, 3)
    with pytest.raises(Killed):
        first.run()
    measured = cpu(*after)
    second = finetune(*settings, base=base_model("llama"))
    assert second.precision == first.precision == ("bf16" if before else "fp32")
    assert second.model.get_base_model().dtype == first.model.get_base_model().dtype
    assert second.log.active["auto_types"] == first.log.active["auto_types"]
    assert not measured
    second.run()
    assert second.log.step == 4
    fresh = finetune(*settings, base=base_model("llama"), name="fresh")
    assert fresh.precision == ("bf16" if after else "fp32"), "the machine itself selects the other type"


def test_checkpoint_of_an_earlier_version_keeps_its_types() -> None:
    active = {"precision": "bf16", "weights": "bfloat16"}
    assert AutoTypes.recorded(Training(), active).bf16
    assert not AutoTypes.recorded(Training(), {"precision": "fp32", "weights": "float32"}).bf16
    assert AutoTypes.recorded(Training(precision="bf16"), active).bf16
    assert not AutoTypes.recorded(Training(precision="bf16"), {**active, "weights": "float32"}).bf16


@pytest.mark.parametrize("capabilities", [(), ("avx512_bf16",)])
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


RANK = """
import sys
from pathlib import Path
import torch
from finetune_assets.training import precision, setup
from finetune_assets.training.distributed import joined
from finetune_assets.training.state import TrainingPaths
from training.conftest import BASE, configured

torch.cpu.get_capabilities = lambda: {"avx512_bf16": True}
with joined() as process:
    slow_of = int(sys.argv[1])
    precision.measure = lambda *shape: precision.MatrixRates(57 if process.rank == slow_of else 158, 57)
    job = TrainingPaths(BASE, Path("/nowhere"), Path("/nowhere"), Path("/nowhere"), {})
    print(setup.select_types(job, configured(), process).bf16)
"""


@pytest.mark.system
@pytest.mark.parametrize(("slow", "expected"), [(0, "False"), (1, "True")])
def test_rank_0_decides_for_all(tmp_path: Path, slow: int, expected: str) -> None:
    """The measurements of two real processes disagree."""
    script, tests = tmp_path / "rank.py", Path(__file__).parents[1]
    script.write_text(RANK)
    shared = {**os.environ, "WORLD_SIZE": "2", "FINETUNE_RANKS_FILE": str(tmp_path / "ranks")}
    shared["PYTHONPATH"] = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(slow)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        assert [rank.communicate(timeout=120)[0].split()[-1] for rank in ranks] == [expected] * 2
    finally:
        for rank in ranks:
            rank.kill()


# ---- the invariants, computed in bfloat16


def test_packed_equals_alone_in_bf16(finetune: Finetune) -> None:
    """Within rounding: a leak changes the losses of tokens by more than 0.1."""
    run = finetune(*BF16)
    assert run.flat
    packs = sorted(run.sequences, key=len, reverse=True)[:3]
    packed = token_losses(run, collate(packs, run.train, CPU, run.flat)).float()
    with unbounded(run):
        alone = [token_losses(run, collate([[example]], run.train, CPU)) for pack in packs for example in pack]
    difference = (packed - torch.cat(alone).float()).abs()
    assert difference.mean() < 0.02
    assert (packed.sum() - torch.cat(alone).float().sum()).abs() < 0.01 * packed.sum()


@pytest.mark.parametrize("capabilities", [(), ("avx512_bf16",)])
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

    def spying(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(query.dtype)
        output = original(query, *args, **kwargs)
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
            output = attend(rounded)
        assert {*seen} == {expected}
        assert output.dtype == torch.bfloat16
        assert torch.allclose(output.float(), reference, atol=0.02)


@pytest.mark.parametrize("capabilities", [(), ("avx512_bf16",)])
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


def test_held_out_loss_in_bf16_is_near_fp32s(trained: Callable[..., FinishedRun]) -> None:
    settings = ("training.max_steps=6", "training.macro_batch_size=4", "training.learning_rate=1e-2")
    exact, rounded = (
        trained(*settings, *types).run.log.held_out_loss for types in (("training.precision=fp32",), BF16)
    )
    assert exact["after"] < 0.9 * exact["before"]  # type: ignore[operator]
    for when in ("before", "after"):
        assert rounded[when] == pytest.approx(exact[when], rel=0.02)


@pytest.mark.real_data
@pytest.mark.system
def test_held_out_loss_on_dolly_is_within_half_a_percent(
    cpu: Callable[..., list[tuple[int, int]]], dolly: Path, stories260k: Path, tmp_path: Path
) -> None:
    """A real Llama on real rows, packed, after equal steps; `auto` selects the type, by faked instructions."""
    settings = ["data.num_samples=400", "data.val_fraction=0.2", "data.tokenization.cutoff_len=192"]
    settings += ["training.macro_batch_size=4", "training.micro_batch_size=4", "training.max_steps=20"]
    settings += ["training.learning_rate=7e-3", "training.warmup_steps=2"]
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
