"""The branches for CUDA, run on an emulated GPU: which operators are called, with which types and shapes.

The values are computed too, so a training on the emulated GPU is compared with the same training on the CPU.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import emulated_gpu as emulated
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from emulated_gpu import CUDA, NAME, emulated_gpu
from torch import Tensor, nn
from torch.nn.attention import varlen
from training.conftest import MADE_FROM, configured
from training.measuring import Killed, die_at, equal, names, relative, weights
from transformers import AutoModelForCausalLM

from finetune_assets.cli.conversation import LoadedModel
from finetune_assets.config.schema import ExperimentConfig, Merge, Training
from finetune_assets.data.tokenization import load_tokenizer
from finetune_assets.evaluation.generation import answers
from finetune_assets.evaluation.losses import RowLosses
from finetune_assets.merging.merge import merged
from finetune_assets.training import loss, memory, sharding, telemetry
from finetune_assets.training.attention import varlen_attention
from finetune_assets.training.distributed import DistributedContext, joined
from finetune_assets.training.lora import kept_by_dropout
from finetune_assets.training.memory import OutOfMemory
from finetune_assets.training.model import ModelError, load_base
from finetune_assets.training.optimizer import make_optimizer
from finetune_assets.training.recipe import LoraFinetune
from finetune_assets.training.reporting import Reporter
from finetune_assets.training.state import TrainingPaths

LAYERS = 2
FORWARD, BACKWARD = "torch_attn::_varlen_attn", "torch_attn::_varlen_attn_backward"
SMALL = ("training.macro_batch_size=8", "training.micro_batch_size=2", "training.max_steps=2")
Make = Callable[..., LoraFinetune]


@pytest.fixture
def gpu() -> Iterator[Counter[str]]:
    """The emulated GPU; the number of calls of each operator."""
    with emulated_gpu() as calls:
        yield calls


@pytest.fixture
def make(dataset: Callable[..., Path], base_model: Callable[[str], Path], tmp_path: Path) -> Make:
    """Makes trainings of the tiny Llama on a device, the emulated GPU by default."""

    def make(*overrides: str, device: torch.device = CUDA, name: str = "run") -> LoraFinetune:
        config = configured("model.dtype=auto", "training.precision=auto", *SMALL, *overrides)
        folder = tmp_path / name
        (folder / "output").mkdir(parents=True, exist_ok=True)
        rows = dataset(config.data.tokenization)
        job = TrainingPaths(base_model("llama"), rows, folder / "output", folder / "scratch", MADE_FROM)
        return LoraFinetune(job, config, DistributedContext(0, 1, device), Reporter(print))

    return make


def test_a_training_on_cuda(gpu: Counter[str], make: Make) -> None:
    """In bfloat16 with FlashAttention, from pinned memory, and with one call of the fused AdamW a step."""
    run = make()
    active = run.log.active
    assert (active["precision"], active["weights"]) == ("bf16", "bfloat16")
    assert (active["attention"], active["padding"], active["loss"]) == ("varlen", False, "fused")
    assert active["hardware"] == NAME
    assert "989 TFLOP/s (H100" in active["mfu"]
    assert run.peak_flops == 989e12
    assert {parameter.device for parameter in run.model.parameters()} == {CUDA}
    assert {parameter.dtype for parameter in run.parameters} == {torch.float32}

    work = run.work(0)
    assert {tensor.device for batch in work.batches for tensor in (batch.input_ids, batch.targets)} == {CUDA}
    assert {id(host) for host in emulated.pinned}, "batches are copied from pinned memory"
    gpu.clear()
    run.train_step(0, work)
    assert gpu[FORWARD] == gpu[BACKWARD] == LAYERS * len(work.batches)
    assert not [name for name in gpu if "scaled_dot_product" in name]
    assert gpu["aten::_fused_adamw_"] == 1


@pytest.mark.system
def test_a_training_on_cuda_has_the_losses_of_one_on_a_cpu(gpu: Counter[str], make: Make) -> None:
    run = make()
    run.run()
    assert [entry["peak_memory_mib"] for entry in run.log.history] == [3072, 3072]
    assert all(type(tensor) is Tensor and tensor.isfinite().all() for tensor in weights(run).values())
    on_cpu = make(device=torch.device("cpu"), name="cpu")
    on_cpu.run()
    assert on_cpu.log.active["precision"] == "fp32"
    for ours, theirs in zip(run.log.history, on_cpu.log.history, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=5e-3)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=5e-2)
    for when, value in run.log.held_out_loss.items():
        assert value == pytest.approx(on_cpu.log.held_out_loss[when], rel=2e-3)


@pytest.mark.system
def test_flash_attention_in_mixed_precision_with_float32_weights(gpu: Counter[str], make: Make) -> None:
    """Rotary embeddings in float32 promote query and key, which FlashAttention takes in 16 bits only."""
    run = make("training.precision=bf16", "model.dtype=float32")
    gpu.clear()
    work = run.work(0)
    run.train_step(0, work)
    assert gpu[FORWARD] == LAYERS * len(work.batches)


@pytest.mark.system
def test_fp16_scales_the_loss_on_cuda(gpu: Counter[str], make: Make) -> None:
    run = make("training.precision=fp16")
    assert run.scaler.is_enabled()
    run.run()
    assert gpu["aten::_amp_foreach_non_finite_check_and_unscale_"] == run.order.steps
    assert all(0 < entry["grad_norm"] < 1e3 for entry in run.log.history), "of unscaled gradients"


@pytest.mark.soak
@pytest.mark.system
def test_a_killed_training_on_cuda_resumes_bit_equal(gpu: Counter[str], make: Make) -> None:
    steps = ("training.max_steps=4", "training.save_steps=2")
    undisturbed = make(*steps, name="undisturbed")
    undisturbed.run()
    killed = make(*steps, name="killed")
    die_at(killed, 3)
    with pytest.raises(Killed):
        killed.run()
    resumed = make(*steps, name="killed")
    resumed.run()
    assert len(resumed.log.history) < len(undisturbed.log.history) + 1
    assert equal(weights(resumed), weights(undisturbed))


def test_little_memory_enables_gradient_checkpointing(make: Make) -> None:
    with emulated_gpu(free=1 << 20):
        run = make()
        assert memory.free_bytes(CUDA) == 1 << 20
    assert run.log.active["gradient_checkpointing"] is True


def test_cached_memory_is_free(gpu: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 << 30)
    assert memory.free_bytes(CUDA) == emulated.MEMORY + (2 << 30)


def test_out_of_memory_names_what_fits(gpu: Counter[str], make: Make) -> None:
    run = make()
    with pytest.raises(OutOfMemory) as error, memory.explained(run.config, CUDA, lambda: run.estimate):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert names(error, "cuda:0", "3.0 GiB", "training.micro_batch_size to 1", "model.quantization to nf4")


# ---- attention


def attended(device: str, dtype: torch.dtype, **options: Any) -> Tensor:
    """Output and gradients of the attention over two examples, four heads on two."""
    torch.manual_seed(0)
    query, *pair = (torch.randn(1, heads, 12, 8).to(device, dtype).requires_grad_() for heads in (4, 2, 2))
    boundaries = torch.tensor([0, 5, 12], dtype=torch.int32).to(device)
    out, _ = varlen_attention(nn.Module(), query, *pair, None, cu_seq_lens_q=boundaries, max_length_q=7, **options)
    assert out.shape == (1, 12, 4, 8)
    out.float().square().sum().backward()
    gradients = [tensor.grad for tensor in (query, *pair)]
    return torch.cat([tensor.float().cpu().flatten() for tensor in (out.detach(), *gradients)])


OPTIONS: list[dict[str, Any]] = [{}, {"sliding_window": 3}, {"sliding_window": 100}, {"scaling": 0.2}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_flash_attention_equals_that_of_a_cpu(gpu: Counter[str], options: dict[str, Any]) -> None:
    on_gpu = attended("cuda", torch.bfloat16, **options)
    assert gpu[FORWARD] == gpu[BACKWARD] == 1
    assert relative(on_gpu, attended("cpu", torch.float32, **options)) < 1e-2


def test_grouped_heads_without_the_argument_for_them(gpu: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As before PyTorch 2.12."""
    new, own = attended("cuda", torch.bfloat16), varlen.varlen_attn

    def older(
        q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, longest_q: int, longest_k: int,
        *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    ) -> Any:  # fmt: skip
        assert q.shape == k.shape == v.shape
        return own(q, k, v, ends_q, ends_k, longest_q, longest_k, scale=scale, window_size=window_size)

    monkeypatch.setattr(varlen, "varlen_attn", older)
    assert relative(attended("cuda", torch.bfloat16), new) < 1e-2


def test_float32_attention_on_cuda_is_computed_by_example(gpu: Counter[str]) -> None:
    assert relative(attended("cuda", torch.float32), attended("cpu", torch.float32)) < 1e-6
    assert not gpu[FORWARD]


# ---- loss, adapter, optimizer


def test_the_bfloat16_loss_is_not_rounded(gpu: Counter[str], make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's result is: a sum of some thousand nats would have steps of 8 to 64."""
    run = make("data.tokenization.packing=true")
    monkeypatch.setitem(loss.CHUNK_BYTES, "cuda", 16 * 4 * 1024)
    batch = run.batch(run.sequences[:8])
    logits = run._logits(run.sequences[:8], True)[batch.learned]
    exact = float(F.cross_entropy(logits.cpu(), batch.targets.cpu(), reduction="sum"))
    assert len(batch.targets) > 100
    run.model.eval()
    with torch.enable_grad():
        assert float(run._loss(batch)) == pytest.approx(exact, rel=1e-3)
    with torch.no_grad():
        assert float(run._loss(batch)) == pytest.approx(exact, rel=1e-5)


def test_dropout_on_cuda(gpu: Counter[str]) -> None:
    torch.manual_seed(0)
    kept = kept_by_dropout(torch.empty(50, 400, device="cuda", dtype=torch.bfloat16), 0.25)
    assert (kept.device, kept.dtype, kept.shape) == (CUDA, torch.bool, (50, 400))
    assert float(kept.float().mean()) == pytest.approx(0.75, abs=0.01)
    assert gpu["aten::rand"] + gpu["aten::ge"] > 0


@pytest.mark.parametrize(("name", "paged"), [("adamw_8bit", False), ("paged_adamw_8bit", True)])
def test_8_bit_optimizers(gpu: Counter[str], name: str, paged: bool) -> None:
    weight = nn.Parameter(torch.randn(64, 128, device="cuda"))
    training = Training(optimizer=name, learning_rate=0.5, weight_decay=0.1)  # type: ignore[arg-type]
    optimizer: Any = make_optimizer([weight], training, CUDA)
    assert optimizer.args.optim_bits == 8
    assert optimizer.is_paged is paged
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.1)
    assert group["params"] == [weight]


# ---- processes, telemetry, evaluation


@pytest.mark.parametrize("world", [1, 2])
def test_each_process_has_its_gpu_and_nccl(gpu: Counter[str], monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    selected: list[torch.device] = []
    begun: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_device", selected.append)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: begun.append(backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: begun.append("left"))
    for name, value in {"RANK": "0", "WORLD_SIZE": str(world), "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    before = torch.get_float32_matmul_precision()
    try:
        with joined() as process:
            assert process.device == torch.device("cuda", 3)
            assert torch.get_float32_matmul_precision() == "high", "TF32"
    finally:
        torch.set_float32_matmul_precision(before)
    assert selected == [torch.device("cuda", 3)]
    assert begun == (["cpu:gloo,cuda:nccl", "left"] if world > 1 else [])


def test_shards_are_on_a_mesh_of_gpus(gpu: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    meshes: list[Any] = []
    monkeypatch.setattr(sharding, "init_device_mesh", lambda kind, shape: meshes.append((kind, shape)))
    trained = nn.Linear(2, 2).weight
    with (
        mock.patch("torch.distributed.fsdp.fully_shard") as fully_shard,
        mock.patch("torch.distributed.fsdp.register_fsdp_forward_method"),
    ):
        root = nn.Sequential(nn.Linear(2, 2))
        sharding.shard(root, [root[0]], [trained], DistributedContext(0, 4, CUDA))
    assert meshes == [("cuda", (4,))]
    assert [call.args[0] for call in fully_shard.call_args_list] == [root[0], root]


def test_peak_rates_of_a_gpu(gpu: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """From the data sheet for 16 bits; measured in float32, and for a GPU that is not known."""
    waited: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    assert telemetry.peak_flops(CUDA, "bf16") == (989e12, "989 TFLOP/s (H100, data sheet)")
    assert not waited
    assert telemetry.peak_flops(CUDA, "fp32")[1].endswith("(measured here, matrices of 1,024)")
    assert set(waited) == {CUDA}, "a product is timed to its end"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Unknown 1")
    assert "measured here" in telemetry.peak_flops(CUDA, "bf16")[1]


@pytest.mark.system
def test_evaluation_on_cuda(gpu: Counter[str], make: Make) -> None:
    """Losses and answers of a model, on the GPU as on a CPU."""
    run, on_cpu = make(), make(device=torch.device("cpu"), name="cpu")
    for each in (run, on_cpu):
        each.model.get_base_model().set_attn_implementation("sdpa")  # as loaded, before a training selects another
    ours, theirs = (RowLosses(each.model, each.config, each.process.device).of(each.val) for each in (run, on_cpu))
    assert gpu[FORWARD] > 0
    assert ours == pytest.approx(theirs, rel=1e-2)
    tokenizer = load_tokenizer(str(run.job.base_model))
    texts = answers(run.model.eval(), tokenizer, [[5, 6, 7], [8, 9]], 4)
    assert len(texts) == 2
    assert all(isinstance(text, str) for text in texts)


@dataclass
class Recorded:
    """A contender that only reports where its model is loaded."""

    config: ExperimentConfig
    adapter: Path | None = Path("adapter")
    device: torch.device | None = None

    def load_base(self, device: torch.device) -> None:
        self.device = device
        raise Killed


@pytest.mark.parametrize(("quantization", "device"), [("none", "cpu"), ("nf4", "cuda"), ("int8", "cuda")])
def test_quantized_models_are_merged_on_the_gpu(
    gpu: Counter[str], tmp_path: Path, quantization: str, device: str
) -> None:
    """bitsandbytes dequantizes there; a model that is not quantized need not fit on the GPU."""
    contender: Any = Recorded(configured(f"model.quantization={quantization}"))
    with pytest.raises(Killed):
        merged(contender, Merge(), tmp_path)
    assert contender.device == torch.device(device)


def test_chats_are_on_the_gpu(gpu: Counter[str]) -> None:
    contender: Any = Recorded(configured())
    with pytest.raises(Killed):
        LoadedModel(contender)
    assert contender.device == torch.device("cuda")


# ---- quantization


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantized_weights_are_loaded_onto_the_gpu(
    gpu: Counter[str], base_model: Callable[[str], Path], quantization: str
) -> None:
    """And multiplied in bfloat16. No further: the parameters of bitsandbytes cannot hold emulated tensors."""
    config = configured("model.dtype=auto", "training.precision=auto", f"model.quantization={quantization}")
    loaded = mock.patch.object(AutoModelForCausalLM, "from_pretrained", side_effect=ValueError("seen"))
    with loaded as loading, pytest.raises(ModelError):
        load_base(base_model("llama"), config.model, config.training, CUDA)
    arguments = loading.call_args.kwargs
    assert (arguments["device_map"], arguments["dtype"]) == ({"": CUDA}, torch.bfloat16)
    settings = arguments["quantization_config"]
    assert (settings.load_in_8bit, settings.load_in_4bit) == (quantization == "int8", quantization == "nf4")
    if quantization == "nf4":
        assert settings.bnb_4bit_compute_dtype is torch.bfloat16
