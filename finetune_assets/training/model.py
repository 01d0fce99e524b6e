"""The frozen base model and the adapter on it."""

from contextlib import AbstractContextManager, suppress
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import disable_progress_bar

from finetune_assets.config.schema import ExperimentConfig, Lora, Model, Training
from finetune_assets.config.validation import COMPUTED_AS_STORED
from finetune_assets.errors import UserError
from finetune_assets.training.weight_validation import explain, misfit, misquantized, stored_quantization
from finetune_assets.worker.model_libraries import use_bitsandbytes


class ModelError(UserError):
    """A model and settings that do not go together."""


def weights_dtype(model: Model, training: Training, device: torch.device) -> torch.dtype:
    """What the base's weights are kept in; `auto` follows a precision that computes in the type of the weights."""
    name = model.dtype if model.dtype != "auto" else COMPUTED_AS_STORED.get(training.precision)
    if name:
        return getattr(torch, name)
    return torch.bfloat16 if _computes_in_bf16(device) else torch.float32


def compute_precision(training: Training, device: torch.device) -> str:
    """`training.precision` with `auto` decided."""
    if training.precision != "auto":
        return training.precision
    return "bf16" if _computes_in_bf16(device) else "fp32"


def _computes_in_bf16(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def load_base(folder: Path, model: Model, training: Training, device: torch.device) -> PreTrainedModel:
    """The base model of a local folder, quantized as asked, on `device`.

    Raises:
        ModelError: if it does not load, its weights are not those of its config, or it is not made for the device.
    """
    dtype = weights_dtype(model, training, device)
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
            trust_remote_code=bool(model.trust_remote_code),  # None would ask on stdin
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told below, with their shapes
            # None would have transformers 5.23 forget how the folder's own weights are quantized
            **({"quantization_config": quantization} if quantization else {}),
        )
    except Exception as e:  # a damaged folder was seen to raise eight types, and a model's own code may raise any
        raise ModelError(f"model.base_model: {model.base_model} does not load with these settings: {explain(e)}") from e
    problem = misquantized(base, folder, model.quantization) or misfit(base, info)
    if problem:
        raise ModelError(f"model.base_model: {model.base_model} does not fit together: {problem}")
    _exact_4bit_on_cpu(base)
    return base


def _is_quantized(folder: Path) -> bool:
    with suppress(OSError, ValueError, AttributeError):  # of a damaged folder; loading it says what is wrong
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
    """Switch off bitsandbytes' AVX512-bf16 repacking.

    With bitsandbytes 0.50 the first forward in eval mode repacks the weights for that path; LoRA gradients after it
    were measured to differ by 0.79 relative, silently.
    """
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (no declared attribute of Module)


def with_adapter(
    base: PreTrainedModel,
    config: ExperimentConfig,
    warm_start: Path | None,
    token_indices: dict[str, list[int]] | None = None,
) -> PeftModel:
    """Freeze the base and put a new adapter on it, or the one to begin from.

    Args:
        base: The base model.
        config: The experiment's settings.
        warm_start: Folder of an adapter to begin from.
        token_indices: Rows of embeddings that are trained too, by the layer's name.

    Raises:
        ModelError: if the adapter's targets are not in the model, or the one to begin from is of another kind.
    """
    training = config.training
    torch.manual_seed(training.seed)
    mixed = not training.precision.startswith("full_")
    if warm_start:
        adapted = _begun(base, config.lora, warm_start, mixed)
    else:
        adapted = _new(base, config.lora, token_indices, mixed)
    for parameter in trainable(adapted) if mixed else []:
        parameter.data = parameter.data.float()  # tokens, whole modules, biases: PEFT leaves them in the base's type
    return adapted


def _new(base: PreTrainedModel, lora: Lora, token_indices: dict[str, list[int]] | None, mixed: bool) -> PeftModel:
    try:
        return get_peft_model(base, peft_config(lora, base, token_indices), autocast_adapter_dtype=mixed)
    except ValueError as e:
        raise ModelError(f"lora.target_modules: {lora.target_modules} does not fit this model: {e}") from e


def _begun(base: PreTrainedModel, lora: Lora, folder: Path, mixed: bool) -> PeftModel:
    try:
        found = PeftConfig.from_pretrained(str(folder))
        _check_same_kind(found, lora)
        return PeftModel.from_pretrained(base, folder, is_trainable=True, autocast_adapter_dtype=mixed)
    except (OSError, ValueError, RuntimeError, KeyError, IndexError, SafetensorError) as e:
        raise ModelError(
            f"training.warm_start: adapter {folder.name} does not fit model.base_model: {' '.join(str(e).split())}"
        ) from e


def with_adapter_of(base: PreTrainedModel, folder: Path, name: str = "default") -> PeftModel:
    """Put the adapter of a folder on a base, to be computed with and not trained.

    Raises:
        ModelError: if it is not made for this base.
    """
    try:
        return PeftModel.from_pretrained(base, folder, adapter_name=name).eval()
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as e:
        said = " ".join(str(e).split())
        raise ModelError(f"adapter {folder.name} does not fit its base model: {said}") from e


def _check_same_kind(found: PeftConfig, lora: Lora) -> None:
    settings = {"rank": "r", "alpha": "lora_alpha", "use_rslora": "use_rslora", "use_dora": "use_dora"}
    for name, theirs in settings.items():
        has, wanted = getattr(found, theirs), getattr(lora, name)
        if has != wanted:
            raise ModelError(
                f"training.warm_start: that adapter has {name} {has}, lora.{name} is {wanted}; set it to {has}"
            )


def peft_config(lora: Lora, base: PreTrainedModel, token_indices: dict[str, list[int]] | None = None) -> LoraConfig:
    """The `lora` group as PEFT takes it."""
    targets = lora.target_modules
    if targets == "all-linear" and lora.layers_to_transform is not None:
        targets = linear_names(base)  # PEFT takes layers_to_transform beside a list of names only
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


def linear_names(base: PreTrainedModel) -> list[str]:
    """Last names of the linear layers, the output layer aside: what PEFT's `all-linear` stands for."""
    output = base.get_output_embeddings()
    kinds = (nn.Linear, Conv1D)  # GPT-2's layers are the latter
    linear = (name for name, module in base.named_modules() if isinstance(module, kinds) and module is not output)
    return sorted({name.rpartition(".")[2] for name in linear})


def base_of(model: PeftModel | PreTrainedModel) -> PreTrainedModel:
    """The base model, whether or not an adapter is on it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Mixed precision, where `compute_precision` says so."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that training changes, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def layers_of(decoder: nn.Module) -> list[nn.Module]:
    """The decoder's layers, whatever its architecture calls their list."""
    lists = [module for module in decoder.children() if isinstance(module, nn.ModuleList)]
    return [*max(lists, key=len)] if lists else []
