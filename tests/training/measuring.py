"""What several tests measure of a training."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from finetune_assets.training.batches import Batch
from finetune_assets.training.recipe import LoraFinetune


@torch.inference_mode()
def token_losses(run: LoraFinetune, batch: Batch) -> Tensor:
    """Loss of every learned token, row by row."""
    run.model.eval()
    logits = run.model(**batch.inputs).logits.flatten(0, 1)[batch.learned]
    return F.cross_entropy(logits, batch.targets, reduction="none")


@contextmanager
def attention(run: LoraFinetune, kind: str) -> Iterator[PeftModel]:
    """The model of a training, computing with another attention for as long as the context lasts."""
    base = run.model.get_base_model()
    own = base.config._attn_implementation
    base.set_attn_implementation(kind)
    try:
        yield run.model.eval()
    finally:
        base.set_attn_implementation(own)


@contextmanager
def unbounded(run: LoraFinetune) -> Iterator[PeftModel]:
    """The trained model with an attention that generates and takes plain inputs."""
    with attention(run, "sdpa") if run.flat else attention(run, run.model.config._attn_implementation) as model:
        yield model


@torch.inference_mode()
def logits(run: LoraFinetune, input_ids: Tensor) -> Tensor:
    """What the trained model predicts for plain inputs."""
    with unbounded(run) as model:
        return model(input_ids=input_ids).logits


def weights(run: LoraFinetune) -> dict[str, Tensor]:
    """The adapter that a training wrote."""
    return load_file(run.job.output / "adapter_model.safetensors")


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two adapters are the same to the bit."""
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def gradients(run: LoraFinetune) -> Tensor:
    """Gradients of the first step, from a fixed non-zero adapter."""
    torch.manual_seed(1)
    for parameter in run.parameters:
        torch.nn.init.normal_(parameter, std=0.02)
    caught: list[Tensor] = []
    step = run.optimizer.step

    def catch(*args: object, **kwargs: object) -> object:
        caught.append(torch.cat([parameter.grad.flatten().clone() for parameter in run.parameters]))
        return step(*args, **kwargs)  # type: ignore[arg-type]

    run.optimizer.step = catch  # type: ignore[method-assign]
    run.train_step(0, run.work(0))
    run.optimizer.step = step  # type: ignore[method-assign]
    return caught[0]


def without_fused_lora(run: LoraFinetune) -> int:
    """Have a training compute with PEFT's own layers; the number of layers that had a faster way."""
    return sum(vars(module).pop("forward", None) is not None for module in run.model.modules())


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def card_code(output: Path, base: Path) -> str:
    """The model card's Python code, with the folders of adapter and base filled in."""
    code = (output / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace('adapter = "."', f"adapter = {str(output)!r}")
    return code.replace('"the folder of packaged/demo-base"', repr(str(base)))


class Killed(Exception):
    """Stands for what ends a process."""


def die_at(run: LoraFinetune, step: int) -> list[int]:
    """Have a training end by `Killed` where it comes to a step; the steps that it takes."""
    taken: list[int] = []
    train_step: Callable[..., object] = run.train_step

    def dying(at: int, work: object) -> object:
        if at == step:
            raise Killed
        taken.append(at)
        return train_step(at, work)

    run.train_step = dying  # type: ignore[assignment, method-assign]
    return taken


def names(error: BaseException | pytest.ExceptionInfo[BaseException], *facts: object) -> bool:
    """Whether an error names settings, values and files, whatever words it has around them."""
    text = str(error.value if isinstance(error, pytest.ExceptionInfo) else error)
    return all(re.search(rf"(?<!\w){re.escape(str(fact))}(?!\w)", text) for fact in facts)
