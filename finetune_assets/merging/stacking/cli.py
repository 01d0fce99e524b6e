"""`python -m finetune_assets.merging.stacking --config FILE --base-model DIR --adapter-0 DIR --adapter-1 DIR ...`.

Combines several adapters of one base model into one.
"""

import json
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError

from finetune_assets.config.loading import load_resolved
from finetune_assets.config.schema import ExperimentConfig
from finetune_assets.training import arguments, output
from finetune_assets.training.adapter_config import check_adapter
from finetune_assets.training.distributed import joined
from finetune_assets.training.embeddings import experiment_tokenizer, resize_embeddings
from finetune_assets.training.model import ModelError, load_base
from finetune_assets.training.reporting import reporter
from finetune_assets.training.state import TrainerState


def main() -> None:
    args, rest = arguments.parser("finetune_assets.merging.stacking", __doc__).parse_known_args()
    folders = arguments.numbered(rest, "adapter")  # in the order of `stack.adapters`

    config = load_resolved(args.config)
    config.wandb = None
    made_from = json.loads(args.made_from.read_text(encoding="utf-8"))
    with joined() as process, reporter(process) as log:
        own_code = arguments.trusts(config, args.bases)
        base = load_base(args.base_model, config.model, config.training, process.device, own_code)
        rows = resize_embeddings(base, experiment_tokenizer(args.base_model, config, own_code), config).rows
        model = stacked(base, config, folders)
        assert config.stack is not None
        log.write_line(f"Combined {', '.join(config.stack.adapters)} with method {config.stack.method}")
        output.save(args.output, model, args.base_model, config, made_from, vars(TrainerState()), None, rows, own_code)


def stacked(base: torch.nn.Module, config: ExperimentConfig, folders: list[Path]) -> PeftModel:
    """Combine several adapters into one with PEFT's `add_weighted_adapter`.

    Args:
        base: The base model of all adapters.
        config: Settings; `stack` has the adapters, their weights, and the combination method.
        folders: Folders of the adapters, in the order of `stack.adapters`.

    Returns:
        The base model with the combined adapter.

    Raises:
        ModelError: if the adapters cannot be combined with this method.
    """
    settings = config.stack
    assert settings is not None
    names = [f"{index}" for index in range(len(folders))]
    sparse = settings.method.startswith(("ties", "dare", "magnitude"))
    torch.manual_seed(config.training.seed)  # the dare methods drop values at random
    try:
        for folder in folders:
            check_adapter(folder)
        model = PeftModel.from_pretrained(base, folders[0], adapter_name=names[0])
        for name, folder in zip(names[1:], folders[1:], strict=True):
            model.load_adapter(str(folder), adapter_name=name)
        model.add_weighted_adapter(
            adapters=names,
            weights=list(settings.adapters.values()),
            adapter_name="default",
            combination_type=settings.method,
            svd_rank=settings.svd_rank,
            density=settings.density if sparse else None,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as e:
        message = " ".join(str(e).split())
        raise ModelError(
            f"stack.method: {settings.method} cannot combine {', '.join(settings.adapters)}: {message}"
        ) from e
    model.set_adapter("default")
    for name in names:
        model.delete_adapter(name)
    return model.eval()
