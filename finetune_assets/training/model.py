"""Loading of the frozen base model and its adapter."""

from contextlib import AbstractContextManager, suppress
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from finetune_assets.config.schema import ExperimentConfig, Lora, Model, Training
from finetune_assets.errors import UserError
from finetune_assets.sources.model_sizes import ModelSizeError, check_sizes, weights_in
from finetune_assets.training.adapter_config import check_adapter
from finetune_assets.training.lora_names import linear_names, lora_problem
from finetune_assets.training.precision import auto_types, product_shape_of, weights_dtype
from finetune_assets.training.warm_start import warm_start_problem
from finetune_assets.training.weight_validation import explain, misfit, misquantized, stored_quantization
from finetune_assets.worker.model_libraries import use_bitsandbytes


class ModelError(UserError):
    """The model is invalid or incompatible with the settings."""


def load_base(
    folder: Path,
    model: Model,
    training: Training,
    device: torch.device,
    own_code: bool = False,
    bf16: bool | None = None,
) -> PreTrainedModel:
    """Load the base model of a local folder onto `device`, quantized according to the settings.

    Args:
        folder: Folder of the base model.
        model: Model settings. `trust_remote_code` is not read: they may be those of an artifact.
        training: Training settings.
        device: Device of the weights.
        own_code: Run the Python code in the folder, because the experiment trusts this version; see `arguments.trusts`.
        bf16: Whether `auto` types are bfloat16; None decides it for `device`, see `precision.auto_types`.

    Raises:
        ModelError: if the model cannot be loaded, its weights do not match its config, or the device does not support
            it.
    """
    try:
        check_sizes(folder, weights_in(folder))
    except ModelSizeError as e:
        raise ModelError(f"model.base_model: {model.base_model} cannot be loaded: {e}") from e
    if bf16 is None:
        bf16 = auto_types(model, training, device, lambda: product_shape_of(folder, own_code)).bf16
    dtype = weights_dtype(model, training, bf16)
    quantization = _quantization(model, dtype)
    disable_progress_bar()
    try:
        if quantization or _is_quantized(folder):
            use_bitsandbytes()
        base, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=None if model.attention == "auto" else model.attention,
            device_map={"": device},
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=own_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with their shapes
            # With None, transformers 5.23 ignores the quantization of the folder's own weights
            **({"quantization_config": quantization} if quantization else {}),
        )
    except Exception as e:  # damaged folders raised eight error types, and custom model code may raise any
        reason = explain(e)
        raise ModelError(f"model.base_model: {model.base_model} cannot be loaded with these settings: {reason}") from e
    problem = misquantized(base, folder, model.quantization) or misfit(base, info)
    if problem:
        raise ModelError(f"model.base_model: {model.base_model} is inconsistent: {problem}")
    _exact_4bit_on_cpu(base)
    return base


def _is_quantized(folder: Path) -> bool:
    with suppress(OSError, ValueError, AttributeError):  # a damaged folder; loading it reports the problem
        return bool(stored_quantization(folder))
    return False


def _quantization(model: Model, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if model.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if model.quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return None


def _exact_4bit_on_cpu(base: nn.Module) -> None:
    """Disable bitsandbytes' AVX512-bf16 repacking.

    With bitsandbytes 0.50, the first forward pass in eval mode repacks the weights for that path. LoRA gradients after
    it were measured to have a relative error of 0.79, without any warning.
    """
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (not a declared attribute of Module)


def with_adapter(
    base: PreTrainedModel,
    config: ExperimentConfig,
    warm_start: Path | None,
    token_indices: dict[str, list[int]] | None = None,
) -> PeftModel:
    """Freeze the base model and add a new adapter, or the adapter for a warm start.

    Args:
        base: The base model.
        config: The experiment's settings.
        warm_start: Folder of the adapter for a warm start.
        token_indices: Embedding rows to train as well, by layer name.

    Raises:
        ModelError: if a name in the `lora` settings is not in the model, or the warm-start adapter is incompatible.
    """
    training = config.training
    if problem := lora_problem(config.lora, base):
        raise ModelError(problem)
    torch.manual_seed(training.seed)
    mixed = not training.precision.startswith("full_")
    if warm_start:
        adapted = _warm_started(base, config.lora, warm_start, mixed)
    else:
        adapted = _new(base, config.lora, token_indices, mixed)
    for parameter in trainable(adapted) if mixed else []:
        parameter.data = parameter.data.float()  # PEFT leaves tokens, whole modules and biases in the base's type
    return adapted


def _new(base: PreTrainedModel, lora: Lora, token_indices: dict[str, list[int]] | None, mixed: bool) -> PeftModel:
    try:
        return get_peft_model(base, peft_config(lora, base, token_indices), autocast_adapter_dtype=mixed)
    except ValueError as e:
        raise ModelError(f"lora.target_modules: {lora.target_modules} does not match this model: {e}") from e


def _warm_started(base: PreTrainedModel, lora: Lora, folder: Path, mixed: bool) -> PeftModel:
    check_adapter(folder)
    try:
        adapter_config = PeftConfig.from_pretrained(str(folder))
        if problem := warm_start_problem(adapter_config, lora, peft_config(lora, base), base):
            raise ModelError(f"training.warm_start: {problem}")
        adapter_config.lora_dropout, adapter_config.task_type = lora.dropout, lora.task_type  # not part of the weights
        return PeftModel.from_pretrained(
            base, folder, is_trainable=True, autocast_adapter_dtype=mixed, config=adapter_config
        )
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, IndexError, SafetensorError) as e:
        reason = " ".join(str(e).split())
        raise ModelError(
            f"training.warm_start: adapter {folder.name} is incompatible with model.base_model: {reason}"
        ) from e


def with_adapter_of(base: PreTrainedModel, folder: Path, name: str = "default") -> PeftModel:
    """Add the adapter of a folder to a base model for inference.

    Raises:
        ModelError: if the adapter is incompatible with this base model.
    """
    check_adapter(folder)
    try:
        return PeftModel.from_pretrained(base, folder, adapter_name=name).eval()
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as e:
        reason = " ".join(str(e).split())
        raise ModelError(f"adapter {folder.name} is incompatible with its base model: {reason}") from e


def peft_config(lora: Lora, base: PreTrainedModel, token_indices: dict[str, list[int]] | None = None) -> LoraConfig:
    """Convert the `lora` settings to a PEFT config."""
    targets = lora.target_modules
    if targets == "all-linear" and lora.layers_to_transform is not None:
        targets = linear_names(base)  # PEFT supports layers_to_transform only with a list of names
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        bias=lora.bias,
        target_modules=targets,
        task_type=lora.task_type,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=lora.init_lora_weights,
        layers_to_transform=lora.layers_to_transform,
        rank_pattern=dict(lora.rank_pattern),
        modules_to_save=lora.modules_to_save,
        trainable_token_indices=token_indices,
    )


def base_of(model: PeftModel | PreTrainedModel) -> PreTrainedModel:
    """Return the base model, with or without an adapter on it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Autocast context for bf16 and fp16; disabled for any other precision."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """List the trainable parameters, in the order of the model."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def layers_of(decoder: nn.Module) -> list[nn.Module]:
    """List the decoder's layers, independent of the architecture's name for their list."""
    lists = [module for module in decoder.children() if isinstance(module, nn.ModuleList)]
    return [*max(lists, key=len)] if lists else []
