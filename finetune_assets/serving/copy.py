"""The servable copy of an adapter: the same update, in a form that all servers compute alike.

Servers limit the ranks of adapters, and not all of them read more than one rank and one scale: earlier versions of vLLM
ignore `rank_pattern` and `alpha_pattern` without an error. In the copy, each module's scale is part of its matrix B,
all modules have the same rank, padded with zeros, and the scale of the adapter is 1.
"""

import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from finetune_assets.artifacts.layout import CONFIG
from finetune_assets.config.loading import load_resolved
from finetune_assets.config.serving_validation import RANKS
from finetune_assets.errors import UserError
from finetune_assets.sources.base_models import is_tokenizer_file
from finetune_assets.sources.json_files import read_json_object
from finetune_assets.training.adapter_config import ADAPTER_CONFIG, MOST_BYTES, check_adapter
from finetune_assets.training.generation_files import GENERATION, adapter_tokenizer

WEIGHTS, CHAT_TEMPLATE = "adapter_model.safetensors", "chat_template.jinja"
TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?:embedding_)?(?P<side>[AB])(?:\.weight)?")
NEUTRAL: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "lora_bias": False,
    "use_qalora": False,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "layer_replication": None,
    "alora_invocation_tokens": None,
}
"""Keys of an adapter's configuration that no server supports with another value."""


class NotServable(UserError):
    """The adapter cannot be converted to a form that servers support."""


def write_servable_copy(adapter: Path, out: Path, base_name: str, max_rank: int) -> None:
    """Write the servable copy of an adapter, with the files of its tokenizer.

    The copy computes the logits of the adapter. Tensors are converted one at a time, to float32: a scale that is
    multiplied into 16-bit values would round them.

    Args:
        adapter: Folder of the adapter.
        out: Empty folder to write to.
        base_name: Name of the base model on the server.
        max_rank: Largest rank that the server loads.

    Raises:
        AdapterConfigError: if the configuration of the adapter is invalid.
        NotServable: if the adapter has other parts than LoRA matrices, or its rank is above `max_rank`.
    """
    check_adapter(adapter)
    settings = read_settings(adapter / ADAPTER_CONFIG)
    rank = padded_rank(settings, max_rank, str(adapter))
    try:
        _write_tensors(adapter / WEIGHTS, out / WEIGHTS, settings, rank)
    except (FileNotFoundError, SafetensorError) as e:
        raise NotServable(f"{adapter / WEIGHTS}: cannot be read ({e}); copy the adapter again") from e
    served = {
        **settings,
        "base_model_name_or_path": base_name,
        "revision": None,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    (out / ADAPTER_CONFIG).write_text(json.dumps(served, indent=2, sort_keys=True), encoding="utf-8")
    for path in sorted(adapter.iterdir()):
        if path.is_file() and (path.name == GENERATION or _is_tokenizer_file(path.name)):
            shutil.copyfile(path, out / path.name)
    if (adapter / CONFIG).is_file() and not load_resolved(adapter / CONFIG).model.trust_remote_code:
        template = adapter_tokenizer(adapter).chat_template  # earlier versions stored none, or the base model's
        if isinstance(template, str):
            (out / CHAT_TEMPLATE).write_text(template, encoding="utf-8")


def _is_tokenizer_file(name: str) -> bool:
    return is_tokenizer_file(name) and not name.endswith(".py") and name != "config.json"


def read_settings(path: Path) -> dict[str, Any]:
    """Read an `adapter_config.json`.

    Raises:
        NotServable: if the file is missing or invalid.
    """
    if not path.is_file():
        raise NotServable(f"{path}: missing; copy the adapter again")
    return read_json_object(path, f"{path}:", NotServable, "copy the adapter again", MOST_BYTES)


def padded_rank(settings: dict[str, Any], max_rank: int, where: str) -> int:
    """Rank of an adapter's servable copy: the smallest rank that vLLM allows and that fits all modules.

    Args:
        settings: Content of the adapter's `adapter_config.json`.
        max_rank: Largest rank that the server loads.
        where: Name of the adapter, for the error message.

    Raises:
        NotServable: if the adapter has other parts than LoRA matrices, or its rank is above `max_rank`.
    """
    for key, neutral in NEUTRAL.items():
        value = settings.get(key, neutral)
        if value != neutral and value not in (None, False, [], {}):
            raise NotServable(
                f"{where}: {ADAPTER_CONFIG} has {key} {json.dumps(value)[:80]}, which vLLM does not load; train "
                "without it, or add `merge: {}` to the experiment and serve merged_model"
            )
    ranks = {"r": settings.get("r"), **{f"rank_pattern.{name}": rank for name, rank in _of(settings, "rank").items()}}
    for key, rank in ranks.items():
        if not isinstance(rank, int) or rank < 1:
            raise NotServable(f"{where}: {ADAPTER_CONFIG} has {key} {rank!r}, which is not a rank")
        if rank > max_rank:
            raise NotServable(
                f"{where}: {ADAPTER_CONFIG} has {key} {rank}, above serving.max_rank {max_rank}; increase it, and "
                "--max-lora-rank of the server, or train with a lower lora.rank"
            )
    largest = max(ranks.values())
    return next(allowed for allowed in (*RANKS, largest) if allowed >= largest)


def _of(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """An adapter's `rank_pattern` or `alpha_pattern`."""
    return settings.get(f"{name}_pattern") or {}


@dataclass(frozen=True)
class Matrix:
    """A tensor of an adapter's file.

    Attributes:
        name: Name in the file.
        module: Module that it updates, as PEFT's patterns name it.
        axis: Axis of its rank: 0 for a matrix A, 1 for a matrix B.
        shape: Shape in the file.
    """

    name: str
    module: str
    axis: int
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        return self.shape[self.axis]

    def padded(self, rank: int) -> tuple[int, ...]:
        """Shape with another rank."""
        return (*self.shape[: self.axis], rank, *self.shape[self.axis + 1 :])


def _write_tensors(source: Path, out: Path, settings: dict[str, Any], rank: int) -> None:
    """Write a safetensors file tensor by tensor; safetensors' own writer holds all tensors in memory."""
    with safe_open(source, framework="pt") as tensors, out.open("xb") as file:
        shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in sorted(tensors.keys())}
        matrices = [_matrix(name, shape, source) for name, shape in shapes.items()]
        _check_ranks(matrices, rank, source)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for matrix in matrices:
            begin, shape = end, matrix.padded(rank)
            end += 4 * math.prod(shape)
            header[matrix.name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        for matrix in matrices:
            scale = _scale(settings, matrix, source) if matrix.axis else 1.0
            padded = torch.zeros(matrix.padded(rank))
            padded.narrow(matrix.axis, 0, matrix.rank).copy_(tensors.get_tensor(matrix.name)).mul_(scale)
            file.write(padded.numpy().data)


def _matrix(name: str, shape: tuple[int, ...], source: Path) -> Matrix:
    match = TENSOR.fullmatch(name)
    if match is None or len(shape) < 2:
        raise NotServable(
            f"{source}: tensor {name} is not a LoRA matrix, and vLLM does not load it; train without lora.use_dora, "
            "lora.bias, lora.modules_to_save and data.tokenization.added_tokens"
        )
    return Matrix(name, match["module"], "AB".index(match["side"]), shape)


def _check_ranks(matrices: list[Matrix], most: int, source: Path) -> None:
    """Check that each module has two matrices of one rank, and that the adapter's configuration allows it."""
    modules: dict[str, dict[int, int]] = {}
    for matrix in matrices:
        modules.setdefault(matrix.module, {})[matrix.axis] = matrix.rank
    if not modules:
        raise NotServable(f"{source}: contains no tensors; copy the adapter again")
    for module, ranks in modules.items():
        if len(ranks) < 2 or ranks[0] != ranks[1] or ranks[0] > most:
            raise NotServable(
                f"{source}: the matrices of {module} have the ranks {[*ranks.values()]}; two of one rank, at most "
                f"{most} by {ADAPTER_CONFIG}, are required; copy the adapter again"
            )


def _scale(settings: dict[str, Any], matrix: Matrix, source: Path) -> float:
    """Factor of a module's update, by PEFT's own rules."""
    alphas = _of(settings, "alpha")
    alpha = alphas.get(get_pattern_key([*alphas], matrix.module), settings.get("lora_alpha"))
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        where = source.with_name(ADAPTER_CONFIG)
        raise NotServable(f"{where}: the alpha of {matrix.module} is {alpha!r}; a number is required")
    return alpha / (math.sqrt(matrix.rank) if settings.get("use_rslora") else matrix.rank)
