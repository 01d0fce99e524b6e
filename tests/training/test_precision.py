"""What `auto` types are on a CPU, and that all processes and resumed trainings agree on them.

This machine need not have instructions for bfloat16: capabilities and measurements are faked.
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from training.conftest import FAST, SLOW, configured
from training.measuring import Killed, die_at, weights

from finetune_assets.config.schema import Model, Training
from finetune_assets.evaluation.losses import RowLosses
from finetune_assets.preflight.device import Device, device_of
from finetune_assets.training import precision, telemetry
from finetune_assets.training.model import load_base
from finetune_assets.training.precision import AutoTypes, MatrixRates, auto_types, decide, measure, product_shape_of
from finetune_assets.training.recipe import LoraFinetune

Finetune = Callable[..., LoraFinetune]
CPU = torch.device("cpu")
IS_NATIVE = bool(precision.cpu_instructions())
"""Whether this machine has instructions for bfloat16, which the fixtures hide."""
AUTO = ("model.dtype=auto", "training.precision=auto")
TRAINED = (*AUTO, "training.max_steps=4", "training.macro_batch_size=2", "training.micro_batch_size=1")


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


def test_measurement_is_bounded_and_draws_no_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of the widest models are cut to a number of operations; here they are small, as emulation takes long."""
    operands, operations = precision._operands, list[int]()

    def small(tokens: int, width: int, inner: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        operations.append(2 * tokens * width * inner)
        return operands(32, 256, 688, dtype)

    monkeypatch.setattr(precision, "_operands", small)
    state = torch.random.get_rng_state()
    rates = measure(8_192, 28_672)
    assert len(operations) == 2
    assert max(operations) <= precision.OPERATIONS
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
    config = configured(*AUTO)
    base = load_base(base_model("llama"), config.model, config.training, CPU)
    losses = RowLosses(base, config, CPU)
    assert (base.dtype, losses.precision) == (dtype, "bf16" if dtype == torch.bfloat16 else "fp32")
    assert measured == [(32, 48)]


def test_plans_expect_bf16_of_a_cpu_with_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    experiment = configured(*AUTO)
    for flags, expected in (("avx avx512f", False), ("avx avx512_bf16 x", True), ("amx_tile amx_bf16", True)):
        info = f"model name\t: CPU\nflags\t\t: fpu {flags} vme\nbugs\t\t: none\n"
        monkeypatch.setattr(telemetry, "_cpu_info", lambda info=info: info)
        device: Device = device_of(experiment)
        assert (device.kind, device.bf16) == ("cpu", expected)
        assert (device.precision(experiment), device.dtype(experiment)) == (
            ("bf16", "bfloat16") if expected else ("fp32", "float32")
        )


# ---- resume, and several processes


@pytest.mark.parametrize(
    ("before", "after"),
    [pytest.param(("avx512_bf16",), (), marks=pytest.mark.system), ((), ("avx512_bf16",))],
)
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


RANKS = """
import os
from pathlib import Path
import torch
from finetune_assets.config.schema import ExperimentConfig, Model
from finetune_assets.training import precision, setup
from finetune_assets.training.distributed import joined
from finetune_assets.training.state import TrainingPaths

nowhere = Path("/nowhere")
torch.cpu.get_capabilities = lambda: {"avx512_bf16": True}
first = os.fork() != 0
os.environ["RANK"] = os.environ["LOCAL_RANK"] = "0" if first else "1"
with joined() as process:
    for slow in range(2):
        rate = 57 if process.rank == slow else 158
        precision.measure = lambda *shape: precision.MatrixRates(rate, 57)
        precision._of_this_cpu.cache_clear()
        job = TrainingPaths(nowhere, nowhere, nowhere, nowhere, {})
        bf16 = setup.select_types(job, ExperimentConfig(model=Model("m")), process).bf16
        os.write(1, f"{process.rank} {bf16}\\n".encode())
if first:
    os.wait()
"""


@pytest.mark.system
def test_rank_0_decides_for_all(tmp_path: Path) -> None:
    """The measurements of two real processes disagree: first that of rank 0 is too slow, then that of rank 1."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    shared = {**os.environ, "WORLD_SIZE": "2", "FINETUNE_RANKS_FILE": str(tmp_path / "ranks")}
    shared |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run([sys.executable, script], env=shared, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    assert sorted(ended.stdout.splitlines()) == ["0 False", "0 True", "1 False", "1 True"]
