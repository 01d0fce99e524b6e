"""Fused kernels of liger-kernel for rotary position embeddings, RMSNorm and gated MLPs, in place of the model's own.

The loss is not replaced: `SummedLoss` does not store the logits of all tokens either.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from peft import PeftModel
from torch import Tensor

from finetune_assets.config.schema import ExperimentConfig
from finetune_assets.errors import UserError
from finetune_assets.training.model import ModelError, base_of

FUSED = {"rope": True, "rms_norm": True, "swiglu": True, "geglu": True}
OWN_LOSS = {"cross_entropy": False, "fused_linear_cross_entropy": False}
TOLERANCE = 0.1
"""Largest relative difference of the logits with and without the kernels: far above 16-bit rounding."""


class UnsupportedKernels(UserError):
    """The device, the installed packages or the model do not support `training.kernels`."""


def require_kernels(config: ExperimentConfig, device: torch.device) -> None:
    """Check the requirements of `training.kernels` before the model is loaded.

    Raises:
        UnsupportedKernels: without CUDA, or without liger-kernel.
    """
    kernels = config.training.kernels
    if kernels == "none":
        return
    if device.type != "cuda":
        raise UnsupportedKernels(
            f"training.kernels: {kernels} requires a GPU with CUDA, found {device.type}; set it to none"
        )
    if not find_spec("liger_kernel"):
        raise UnsupportedKernels(
            f"training.kernels: {kernels} requires the package liger-kernel, which is not installed; "
            "run `pip install liger-kernel`, or set it to none"
        )


@torch.no_grad()
def use_kernels(model: PeftModel, config: ExperimentConfig, logits: Callable[[], Tensor]) -> int:
    """Replace parts of the model by fused kernels, according to `training.kernels`.

    Rotary position embeddings are a function of the model's Python module, so they are replaced for every model of
    the same kind in this process.

    Args:
        model: Model with an adapter, on the GPU.
        config: The experiment's settings.
        logits: Computes the logits of one example, which are compared with and without the kernels.

    Returns:
        Number of replaced modules.

    Raises:
        UnsupportedKernels: if liger-kernel has no kernels for this kind of model.
        ModelError: if the kernels change the outputs of the model.
    """
    if config.training.kernels == "none":
        return 0
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance

    base = base_of(model)
    if base.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UnsupportedKernels(
            f"training.kernels: liger has no kernels for models of type {base.config.model_type} "
            f"(model.base_model {config.model.base_model}); set it to none"
        )
    model.eval()
    own, before = logits(), _own_forward(model)
    _apply_liger_kernel_to_instance(model=base, **FUSED, **OWN_LOSS)
    difference = float((logits() - own).abs().max() / own.abs().max())
    if not difference <= TOLERANCE:
        raise ModelError(
            f"training.kernels: liger changes the outputs of model.base_model {config.model.base_model} (logits "
            f"differ by {difference:.0%}); set it to none"
        )
    return _own_forward(model) - before


def _own_forward(model: PeftModel) -> int:
    """Count the modules whose `forward` was replaced."""
    return sum("forward" in vars(module) for module in model.modules())
