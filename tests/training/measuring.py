"""What several tests measure of a training."""

import torch
import torch.nn.functional as F
from peft import PeftModel

from finetune_assets.training.batches import Batch
from finetune_assets.training.recipe import LoraFinetune


@torch.inference_mode()
def token_losses(run: LoraFinetune, batch: Batch) -> torch.Tensor:
    """Loss of every learned token, row by row."""
    run.model.eval()
    logits = run.model(**batch.inputs).logits.flatten(0, 1)[batch.learned]
    return F.cross_entropy(logits, batch.targets, reduction="none")


def unbounded(run: LoraFinetune) -> PeftModel:
    """The trained model with an attention that generates and takes plain inputs."""
    if run.flat:
        run.model.get_base_model().set_attn_implementation("sdpa")
    return run.model


def gradients(run: LoraFinetune) -> torch.Tensor:
    """Gradients of the first step, from a fixed non-zero adapter."""
    torch.manual_seed(1)
    for parameter in run.parameters:
        torch.nn.init.normal_(parameter, std=0.02)
    caught: list[torch.Tensor] = []
    step = run.optimizer.step

    def catch(*args: object, **kwargs: object) -> object:
        caught.append(torch.cat([parameter.grad.flatten().clone() for parameter in run.parameters]))
        return step(*args, **kwargs)  # type: ignore[arg-type]

    run.optimizer.step = catch  # type: ignore[method-assign]
    run.train_step(0, run.work(0))
    run.optimizer.step = step  # type: ignore[method-assign]
    return caught[0]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())
