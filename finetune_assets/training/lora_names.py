"""Names of modules in the `lora` settings: what they select in a base model, by PEFT's own rules.

PEFT passes over a name that matches nothing if another one does. Here, such a name is a problem. `lora_problem` needs
module names only, so it also works on the meta device, before a GPU is used.
"""

import re
from collections.abc import Iterator

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finetune_assets.config.errors import suggest
from finetune_assets.config.schema import Lora

ALL_LINEAR = "all-linear"
LINEAR = (nn.Linear, Conv1D)
"""Kinds of the layers that PEFT's `all-linear` selects; GPT-2's layers are the latter."""
LAYER_INDEX = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")
"""PEFT's pattern for the index of a module's layer."""


def linear_modules(base: PreTrainedModel) -> list[str]:
    """Full names of the linear layers, excluding the output layer, as PEFT's `all-linear` selects them."""
    output = base.get_output_embeddings()
    return [name for name, module in base.named_modules() if isinstance(module, LINEAR) and module is not output]


def linear_names(base: PreTrainedModel) -> list[str]:
    """Last name components of the linear layers, excluding the output layer."""
    return sorted({_last(name) for name in linear_modules(base)})


def adapted_modules(config: LoraConfig, base: PreTrainedModel) -> list[str]:
    """Full names of the modules that PEFT adapts with this config, in the order of the model."""
    targets = config.target_modules
    chosen = LoraConfig(
        target_modules=linear_modules(base) if targets == ALL_LINEAR else targets,
        exclude_modules=config.exclude_modules,
        modules_to_save=config.modules_to_save,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
    )
    return [name for name, _ in base.named_modules() if name and check_target_module_exists(chosen, name)]


def saved_modules(names: list[str] | None, base: PreTrainedModel) -> list[str]:
    """Full names of the modules that PEFT trains fully: those that end with one of the names."""
    return [name for name, _ in base.named_modules() if name and name.endswith(tuple(names or ()))]


def pattern_of(patterns: dict[str, int], module: str) -> list[str]:
    """Patterns of a `rank_pattern` that match a module; PEFT uses the first."""
    return [pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)]


def lora_problem(lora: Lora, base: PreTrainedModel) -> str | None:
    """The first name in the `lora` settings that selects nothing in the model, with similar names; None if all do."""
    checks = (_targets, _layers, _ranks, _saved)
    return next((problem for check in checks for problem in check(lora, base)), None)


def _targets(lora: Lora, base: PreTrainedModel) -> Iterator[str]:
    modules = dict(base.named_modules())
    targets = lora.target_modules if isinstance(lora.target_modules, list) else []
    for target in targets:
        config = LoraConfig(target_modules=[target], modules_to_save=lora.modules_to_save)
        named = [name for name in modules if name == target or name.endswith(f".{target}")]
        found = adapted_modules(config, base)
        if not named:
            near = suggest(target, {*linear_names(base), *_embeddings(base)})
            yield f"lora.target_modules: no module of the base model is named '{target}'; {near}"
        elif not found:
            yield f"lora.target_modules: '{target}' is also in lora.modules_to_save {lora.modules_to_save}; remove one"
        elif lora.layers_to_transform and not _in_layers(found, lora.layers_to_transform):
            yield f"lora.target_modules: '{target}' is in none of the layers {lora.layers_to_transform}"
        elif group := next((name for name in found if any(modules[name].children())), None):
            inside = sorted({_last(name) for name in modules if name.startswith(f"{group}.")})
            yield f"lora.target_modules: '{target}' is a group of layers; name its layers: {', '.join(inside)}"


def _layers(lora: Lora, base: PreTrainedModel) -> Iterator[str]:
    if lora.layers_to_transform is None:
        return
    targets = lora.target_modules if isinstance(lora.target_modules, list) else linear_names(base)
    adapted = adapted_modules(LoraConfig(target_modules=targets, modules_to_save=lora.modules_to_save), base)
    known = {index for name in adapted if (index := _layer(name)) is not None}
    for layer in lora.layers_to_transform:
        if layer not in known:
            valid = f"layers with these modules: {_ranges(known)}" if known else "no layer has these modules"
            yield f"lora.layers_to_transform: the base model has no layer {layer} to adapt; {valid}"


def _ranks(lora: Lora, base: PreTrainedModel) -> Iterator[str]:
    if not lora.rank_pattern:
        return
    targets = lora.target_modules
    if targets == ALL_LINEAR and lora.layers_to_transform is not None:
        targets = linear_names(base)
    config = LoraConfig(
        target_modules=targets, modules_to_save=lora.modules_to_save, layers_to_transform=lora.layers_to_transform
    )
    adapted = adapted_modules(config, base)
    matches = {module: pattern_of(lora.rank_pattern, module) for module in adapted}
    used = {pattern for patterns in matches.values() for pattern in patterns}
    for pattern in lora.rank_pattern:
        if pattern not in used:
            near = suggest(_last(pattern), {_last(name) for name in adapted})
            yield f"lora.rank_pattern.{pattern}: matches none of the {len(adapted)} adapted modules; {near}"
    for module, patterns in matches.items():
        ranks = {pattern: lora.rank_pattern[pattern] for pattern in patterns}
        if len({*ranks.values()}) > 1:
            yield f"lora.rank_pattern: {module} has several ranks: {ranks}; let only one name match it"


def _saved(lora: Lora, base: PreTrainedModel) -> Iterator[str]:
    for name in lora.modules_to_save or ():
        if not saved_modules([name], base):
            names = {_last(module) for module, _ in base.named_modules() if module and not _last(module).isdigit()}
            yield f"lora.modules_to_save: no module of the base model is named '{name}'; {suggest(_last(name), names)}"


def _embeddings(base: PreTrainedModel) -> set[str]:
    layers = (base.get_input_embeddings(), base.get_output_embeddings())
    return {_last(name) for name, module in base.named_modules() if any(module is layer for layer in layers)}


def _layer(module: str) -> int | None:
    match = LAYER_INDEX.match(module)
    return int(match["idx"]) if match else None


def _in_layers(modules: list[str], layers: list[int]) -> bool:
    return any(_layer(name) in layers for name in modules)


def _ranges(numbers: set[int]) -> str:
    ordered = sorted(numbers)
    contiguous = ordered == [*range(ordered[0], ordered[-1] + 1)]
    return f"{ordered[0]} to {ordered[-1]}" if contiguous else ", ".join(map(str, ordered))


def _last(name: str) -> str:
    return name.rpartition(".")[2]
