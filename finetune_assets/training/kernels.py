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
PACKAGES = {"liger_kernel": "liger-kernel", "triton": "triton"}
TOLERANCE = 0.2
"""Largest relative difference of logits and gradients with and without the kernels: far above 16-bit rounding, and far
below that of a wrong rotary embedding or of an overwritten activation."""


class UnsupportedKernels(UserError):
    """The device, the installed packages or the model do not support `training.kernels`."""


def require_kernels(config: ExperimentConfig, device: torch.device) -> None:
    """Check the requirements of `training.kernels` before the model is loaded.

    Raises:
        UnsupportedKernels: without CUDA, or without a package.
    """
    kernels = config.training.kernels
    if kernels == "none":
        return
    if device.type != "cuda":
        raise UnsupportedKernels(
            f"training.kernels: {kernels} requires a GPU with CUDA, found {device.type}; set it to none"
        )
    for module, package in PACKAGES.items():
        if not find_spec(module):
            raise UnsupportedKernels(
                f"training.kernels: {kernels} requires the package {package}, which is not installed; "
                f"run `pip install {package}`, or set it to none"
            )


def use_kernels(model: PeftModel, config: ExperimentConfig, outputs: Callable[[], tuple[Tensor, Tensor]]) -> int:
    """Replace parts of the model by fused kernels, according to `training.kernels`.

    Rotary position embeddings are a function of the model's Python module, so they are replaced for every model of
    the same kind in this process.

    Args:
        model: Model with an adapter, on the GPU.
        config: The experiment's settings.
        outputs: Computes logits and gradient of one example, which are compared with and without the kernels.

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
    expected, before = outputs(), _own_forward(model)
    _apply_liger_kernel_to_instance(model=base, **FUSED, **OWN_LOSS)
    for name, with_kernels, without in zip(("logits", "gradients"), outputs(), expected, strict=True):
        difference = float((with_kernels - without).norm() / without.norm())
        if not difference <= TOLERANCE:
            raise ModelError(
                f"training.kernels: liger changes the {name} of model.base_model {config.model.base_model} by "
                f"{difference:.0%}; set it to none"
            )
    return _own_forward(model) - before


def _own_forward(model: PeftModel) -> int:
    """Count the modules whose `forward` was replaced."""
    return sum("forward" in vars(module) for module in model.modules())
