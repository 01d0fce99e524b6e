"""What several tests measure of a training."""

import torch
import torch.nn.functional as F

from finetune_assets.data.tokenization import IGNORED
from finetune_assets.training.batches import Batch
from finetune_assets.training.recipe import LoraFinetune


@torch.inference_mode()
def token_losses(run: LoraFinetune, batch: Batch) -> list[torch.Tensor]:
    """Loss of every learned token, row by row."""
    run.model.eval()
    logits = run.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    targets = batch.labels[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none", ignore_index=IGNORED)
    return [row[target != IGNORED] for row, target in zip(losses, targets, strict=True)]


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
    run.train_step(0)
    run.optimizer.step = step  # type: ignore[method-assign]
    return caught[0]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())
