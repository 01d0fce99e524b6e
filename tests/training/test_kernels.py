"""`training.kernels`: what it requires, what it replaces, and that the outputs stay the same."""

import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

import pytest
import torch
from emulated_gpu import CUDA, emulated_gpu
from torch import Tensor
from training.conftest import ALONE, MADE_FROM, configured
from training.measuring import names

from finetune_assets.config.errors import ConfigError
from finetune_assets.config.fingerprint import identity
from finetune_assets.training.distributed import DistributedContext
from finetune_assets.training.kernels import UnsupportedKernels
from finetune_assets.training.model import ModelError
from finetune_assets.training.recipe import LoraFinetune
from finetune_assets.training.reporting import Reporter
from finetune_assets.training.state import TrainingPaths

LIGER = "training.kernels=liger"
Make = Callable[..., LoraFinetune]


class Liger:
    """Stands in for liger-kernel, whose kernels run on a GPU only.

    Attributes:
        asked: Keyword arguments of each call.
        factor: What its RMSNorm multiplies its result with.
        gradient_factor: What it multiplies its gradient with.
    """

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.factor = self.gradient_factor = 1.0

    def apply(self, model: Any, **options: bool) -> None:
        self.asked.append(options)
        for layer in model.model.layers:
            layer.input_layernorm.forward = MethodType(self._normalized, layer.input_layernorm)

    def _normalized(self, module: Any, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + module.variance_epsilon)
        out = self.factor * module.weight * wide.to(hidden.dtype)
        if out.requires_grad:
            out.register_hook(lambda gradient: self.gradient_factor * gradient)
        return out


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> Liger:
    """The stand-in, installed."""
    stand_in = Liger()
    for name in ("triton", "liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.monkey_patch"):
        module: Any = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    module.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": stand_in.apply}
    module._apply_liger_kernel_to_instance = stand_in.apply
    return stand_in


@pytest.fixture
def make(dataset: Callable[..., Path], base_model: Callable[[str], Path], tmp_path: Path) -> Iterator[Make]:
    """Makes trainings of a tiny model on an emulated GPU."""

    def make(*overrides: str, base: str = "llama", device: torch.device = CUDA) -> LoraFinetune:
        small = ("training.macro_batch_size=4", "training.micro_batch_size=2", "training.max_steps=1")
        config = configured(*small, *overrides)
        rows = dataset(config.data.tokenization)
        job = TrainingPaths(base_model(base), rows, tmp_path, tmp_path / "scratch", MADE_FROM)
        return LoraFinetune(job, config, DistributedContext(0, 1, device), Reporter(print))

    with emulated_gpu():
        yield make


@pytest.mark.system
def test_kernels_replace_all_but_the_loss(make: Make, liger: Liger) -> None:
    plain, fused = make(), make(LIGER)
    assert plain.log.active["liger_modules"] == 0
    assert fused.log.active["liger_modules"] == 2
    assert liger.asked == [
        {
            "rope": True, "rms_norm": True, "swiglu": True, "geglu": True,
            "cross_entropy": False, "fused_linear_cross_entropy": False,
        }
    ]  # fmt: skip
    assert fused.log.active["fused_lora_layers"] == plain.log.active["fused_lora_layers"] > 0
    losses = [float(run.train_step(0, run.work(0)).loss) for run in (plain, fused)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("what", ["factor", "gradient_factor"])
def test_kernels_that_change_outputs_or_gradients_are_refused(make: Make, liger: Liger, what: str) -> None:
    setattr(liger, what, 3.0)
    with pytest.raises(ModelError) as error:
        make(LIGER)
    assert names(error, "training.kernels", "liger", "demo-base")


def test_a_kind_of_model_without_kernels_is_refused(make: Make, liger: Liger) -> None:
    with pytest.raises(UnsupportedKernels) as error:
        make(LIGER, base="gpt2")
    assert names(error, "training.kernels", "liger", "gpt2", "demo-base")
    assert not liger.asked


def test_kernels_require_a_gpu(make: Make, liger: Liger) -> None:
    with pytest.raises(UnsupportedKernels) as error:
        make(LIGER, device=ALONE.device)
    assert names(error, "training.kernels", "liger", "CUDA", "cpu")


@pytest.mark.parametrize(("module", "package"), [("liger_kernel", "liger-kernel"), ("triton", "triton")])
def test_kernels_require_their_packages(
    make: Make, liger: Liger, monkeypatch: pytest.MonkeyPatch, module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UnsupportedKernels) as error:
        make(LIGER)
    assert names(error, "training.kernels", "liger", f"pip install {package}")


def test_kernels_and_compile_exclude_each_other() -> None:
    with pytest.raises(ConfigError) as error:
        configured(LIGER, "training.compile=true")
    assert names(error, "training.kernels", "liger", "training.compile")


def test_only_kernels_that_are_used_are_part_of_a_fingerprint() -> None:
    settings = identity(configured().training)
    assert "kernels" not in settings
    assert identity(configured(LIGER).training) == {**settings, "kernels": "liger"}


@pytest.mark.soak
@pytest.mark.skipif(not find_spec("liger_kernel"), reason="liger-kernel is not installed")
def test_the_interface_of_liger_kernel() -> None:
    """Where it is installed, with a GPU or without."""
    from inspect import signature

    from liger_kernel.transformers import monkey_patch

    for kind in ("llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3"):
        parameters = signature(monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN[kind]).parameters
        assert {"rope", "rms_norm", "cross_entropy", "fused_linear_cross_entropy", "model"} <= parameters.keys()
        assert parameters.keys() & {"swiglu", "geglu"}
    assert "model" in signature(monkey_patch._apply_liger_kernel_to_instance).parameters
