"""Validates settings of the right type: ranges, formats, and combinations."""

import math
import re
import string
from collections import Counter
from collections.abc import Iterator

from finetune_assets.config.cluster import AUTO, ENGINES, TIME_LIMIT
from finetune_assets.config.errors import is_secret, shown, suggest
from finetune_assets.config.gpus import MEMORY_GIB, memory_gib
from finetune_assets.config.patterns import pattern_problem
from finetune_assets.config.preference_validation import impossible_preference_settings
from finetune_assets.config.raw_validation import PROCESSES, Problem, data_processes, named, shares
from finetune_assets.config.retrieval_validation import impossible_retrieval_settings
from finetune_assets.config.schema import (
    Data,
    ExperimentConfig,
    Hardware,
    LmEval,
    Lora,
    Merge,
    Model,
    PromptTemplate,
    Stack,
    StoreConfig,
    Tokenization,
    Training,
    Wandb,
)
from finetune_assets.config.serving_validation import impossible_serving_settings

SECRET_VALUE = re.compile(
    r"://[^/?#\s]*:[^/?#\s]*@|-----BEGIN [A-Z ]*PRIVATE KEY|\b(?:gh[opsur]|github_pat|hf|glpat|xox[abeprs])[_-]\w{16}"
)
"""A URL with a password, a private key, or a token of a well-known form."""
PLACEHOLDERS = ("instruction", "context")
COMPUTED_AS_STORED = {"fp32": "float32", "full_bf16": "bfloat16", "full_fp16": "float16"}
"""Required data type of the base model's weights, if mixed precision does not cast them."""
VERSION = re.compile(r"[^@\s]+@[0-9a-f]{40}")
"""One version of a model, as `model.trust_remote_code` names it."""
REWRITES_BASE = ("pissa", "olora")
"""Initializations that move part of the base model's weights into the adapter."""
LEAST_SIMILARITY = 0.7
"""Less similar texts are found too seldom by their MinHash signatures."""
PISSA_STEPS = re.compile(r"pissa_niter_[1-9][0-9]*")
INIT_SCHEMES = ("gaussian", "pissa", "olora", "orthogonal")
MOST_LAYERS = 10_000
GGUF_FORMATS = ("f16", "bf16", "q8_0")
WANDB_NOT_ALLOWED = "/\\#?%:"
"""Characters that Weights & Biases refuses in the name of a project."""
WANDB_MOST_CHARACTERS = 128


def impossible_settings(config: ExperimentConfig) -> Iterator[Problem]:
    """All problems of an experiment's complete settings, most basic first."""
    yield from _evaluations(config)
    yield from _ranges(config)
    yield from _split(config.data)
    yield from data_processes("data.processes", config.data.processes)
    yield from _added_tokens(config.data.tokenization)
    yield from _trust(config.model)
    yield from _template(config.data.prompt_template)
    yield from _batches(config.training)
    yield from _kernels(config.training)
    yield from _types(config)
    yield from _quantized(config)
    yield from _lora(config.lora)
    yield from _merge(config.merge) if config.merge else ()
    yield from _stack(config.stack) if config.stack else ()
    yield from impossible_serving_settings(config.serving) if config.serving else ()
    yield from impossible_retrieval_settings(config)
    yield from impossible_preference_settings(config)
    yield from _hardware(config.hardware)
    yield from _launcher(config)
    yield from _wandb(config.wandb) if config.wandb else ()
    if config.evaluation.lm_eval and not config.evaluation.lm_eval.tasks:
        yield "evaluation.lm_eval.tasks", "no tasks; add some, or set evaluation.lm_eval to null"
    scheme, added = config.lora.init_lora_weights, config.data.tokenization.added_tokens
    if added and isinstance(scheme, str) and scheme.startswith(REWRITES_BASE):
        yield "lora.init_lora_weights", f"{scheme} cannot save the rows of data.tokenization.added_tokens; use true"
    if config.training.warm_start and scheme is not True:
        yield "lora.init_lora_weights", f"{scheme} has no effect with training.warm_start; use true"


def _hardware(hardware: Hardware) -> Iterator[Problem]:
    for key, number in named("hardware", hardware).items():
        if not isinstance(number, str | None) and number <= 0 and not (key.endswith("price_per_hour") and number == 0):
            yield key, f"{number} must be more than 0"
    if hardware.gpu and not hardware.memory_gib and memory_gib(hardware.gpu) is None:
        known = f"known GPUs: {', '.join(MEMORY_GIB)}"
        yield "hardware.gpu", f"the memory of '{hardware.gpu}' is unknown; also set hardware.memory_gib ({known})"


def _launcher(config: ExperimentConfig) -> Iterator[Problem]:
    launcher, macro = config.launcher, config.training.macro_batch_size
    nodes = re.fullmatch(r"([1-9][0-9]{0,5})(?:-([1-9][0-9]{0,5}))?", launcher.nodes)
    if not nodes or int(nodes[1]) > int(nodes[2] or nodes[1]):
        yield "launcher.nodes", f"{launcher.nodes!r} must be a number of at least 1, or a range such as 1-4"
        return
    each = config.training.processes_per_node
    processes = launcher.node_range[1] * (int(each) if PROCESSES.fullmatch(each) else launcher.gpus_per_node or 1)
    if launcher.node_range[1] > 1 and processes > macro:
        yield "launcher.nodes", f"{processes} processes in total are more than training.macro_batch_size {macro}"
    if launcher.engine not in (AUTO, *ENGINES):
        yield "launcher.engine", f"{launcher.engine!r} is not an engine; {suggest(launcher.engine, [AUTO, *ENGINES])}"
    if launcher.node_range[1] > 1 and launcher.engine == "local":
        yield "launcher.nodes", f"{launcher.nodes!r} machines require launcher.engine slurm or kubernetes"
    for name in ("gpus_per_node", "cpus_per_node", "rendezvous_seconds"):
        if (number := getattr(launcher, name)) is not None and number < 1:
            yield f"launcher.{name}", f"{number} must be at least 1"
    if launcher.time_limit is not None and not TIME_LIMIT.fullmatch(launcher.time_limit):
        yield (
            "launcher.time_limit",
            f"{launcher.time_limit!r} must be hours:minutes:seconds, or days-hours:minutes:seconds",
        )
    if launcher.memory is not None and not re.fullmatch(r"[1-9]\d*[MGT]", launcher.memory):
        yield "launcher.memory", f"{launcher.memory!r} must be a size such as 64G"
    for name in launcher.environment:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            yield "launcher.environment", f"{name!r} is not a valid name of an environment variable"
        elif is_secret(name) or SECRET_VALUE.search(launcher.environment[name]):
            yield (
                "launcher.environment",
                f"{name} looks like a secret, and settings are stored with artifacts; set it in the environment, or "
                "name a secret in launcher.kubernetes.secrets",
            )


def _wandb(wandb: Wandb) -> Iterator[Problem]:
    for name in ("project", "entity", "run_name"):
        text = getattr(wandb, name)
        if text is None:
            continue
        refused = "" if name == "run_name" else "".join(char for char in WANDB_NOT_ALLOWED if char in text)
        if not text.strip() or len(text) > WANDB_MOST_CHARACTERS or refused:
            limit = f"W&B allows 1 to {WANDB_MOST_CHARACTERS} characters"
            limit += "" if name == "run_name" else f", and none of {' '.join(WANDB_NOT_ALLOWED)}"
            found = f", found {' '.join(refused)}" if refused else ""
            yield f"wandb.{name}", f"{shown(text)} is not a valid name: {limit}{found}"


def impossible_store_settings(config: StoreConfig) -> Iterator[Problem]:
    """All problems of the store's settings."""
    for name in ("keep_raw", "keep_indexes", "keep_adapters", "keep_reports"):
        if getattr(config, name) < 1:
            yield name, f"{getattr(config, name)} must be at least 1"
    if not 0 <= config.keep_days < math.inf:
        yield "keep_days", f"{config.keep_days} must be a number of days"


def _evaluations(config: ExperimentConfig) -> Iterator[Problem]:
    training = config.training
    every = training.eval_steps
    if not (every is None or every == AUTO or (isinstance(every, int) and not isinstance(every, bool))):
        yield "training.eval_steps", f"{shown(every)} is not a number of steps, auto or null"
        training.eval_steps = None  # so that its range is not checked
    for name in ("keep", "patience"):
        value = getattr(training, name)
        if value in (None, "last") or (every is not None and config.data.val_fraction > 0):
            continue
        yield (
            f"training.{name}",
            (
                f"{value} needs measurements of the held-out loss; set training.eval_steps (such as auto) and "
                "data.val_fraction"
            ),
        )


def _ranges(config: ExperimentConfig) -> Iterator[Problem]:
    tokens, training, lora = config.data.tokenization, config.training, config.lora
    at_least_one = {
        "data.num_samples": config.data.num_samples,
        "data.tokenization.packing_length": tokens.packing_length,
        "training.max_steps": training.max_steps,
        "training.macro_batch_size": training.macro_batch_size,
        "training.micro_batch_size": training.micro_batch_size,
        "training.eval_steps": None if training.eval_steps == AUTO else training.eval_steps,
        "training.patience": training.patience,
        "training.logging_steps": training.logging_steps,
        "training.save_steps": training.save_steps,
        "training.save_total_limit": training.save_total_limit,
        "lora.rank": lora.rank,
        "evaluation.max_new_tokens": config.evaluation.max_new_tokens,
        "gate.min_rows": config.gate.min_rows,
        **({"merge.compared_rows": config.merge.compared_rows} if config.merge else {}),
        **({} if (tasks := config.evaluation.lm_eval) is None else _counts_of(tasks)),
        "stack.svd_rank": config.stack.svd_rank if config.stack else None,
        **{f"lora.rank_pattern.{name}": rank for name, rank in lora.rank_pattern.items()},
    }
    for key, number in at_least_one.items():
        if number is not None and number < 1:
            yield key, f"{number} must be at least 1"
    above_zero = {
        "training.epochs": training.epochs,
        "training.learning_rate": training.learning_rate,
        "lora.alpha": lora.alpha,
        "evaluation.max_generation_seconds": config.evaluation.max_generation_seconds,
    }
    for key, value in above_zero.items():
        if not (value > 0 and math.isfinite(value)):
            yield key, f"{value} must be above 0 and finite"
    not_negative = {
        "merge.max_difference": (config.merge and config.merge.max_difference) or 0.0,
        "merge.gguf_max_difference": (config.merge and config.merge.gguf_max_difference) or 0.0,
        "training.min_improvement": training.min_improvement,
        "training.warmup_steps": training.warmup_steps,
        "training.weight_decay": training.weight_decay,
        "training.max_grad_norm": training.max_grad_norm,
        "evaluation.generated_rows": config.evaluation.generated_rows,
        "evaluation.samples": config.evaluation.samples,
        "evaluation.general_tokens": config.evaluation.general_tokens,
        "gate.min_gain": config.gate.min_gain,
        "gate.max_forgetting": config.gate.max_forgetting,
    }
    for key, value in not_negative.items():
        if not (value >= 0 and math.isfinite(value)):
            yield key, f"{value} must be finite and not negative"
    if not 0.5 <= config.gate.confidence < 1:
        yield "gate.confidence", f"{config.gate.confidence} must be from 0.5 to below 1, such as 0.95"
    if not 0 <= training.seed < 2**63:
        yield "training.seed", f"{training.seed} must be from 0 to 2^63 - 1"
    if not 0 <= lora.dropout < 1:
        yield "lora.dropout", f"{lora.dropout} must be from 0 to below 1"
    if tokens.cutoff_len < 2:
        yield "data.tokenization.cutoff_len", f"{tokens.cutoff_len} leaves no room for a prompt and an answer"
    if tokens.packing and tokens.packing_length and tokens.packing_length < tokens.cutoff_len:
        yield (
            "data.tokenization.packing_length",
            f"{tokens.packing_length} is below cutoff_len {tokens.cutoff_len}: the longest example would not fit",
        )


def _counts_of(tasks: LmEval) -> dict[str, int | None]:
    return {"evaluation.lm_eval.limit": tasks.limit, "evaluation.lm_eval.batch_size": tasks.batch_size}


def _split(data: Data) -> Iterator[Problem]:
    for name, value in (("val_fraction", data.val_fraction), ("gate_fraction", data.gate_fraction)):
        if not 0 <= value < 1:
            yield f"data.{name}", f"{value} must be a fraction from 0 to below 1"
    if not 0 <= data.replay < 1:
        yield "data.replay", f"{data.replay} must be a fraction from 0 to below 1"
    if data.sources is not None and not data.sources:
        yield "data.sources", "is an empty list; name sources of raw_data.yaml, or use null for all"
    if data.val_fraction + data.gate_fraction >= 1:
        total = data.val_fraction + data.gate_fraction
        yield (
            "data.val_fraction",
            f"val_fraction + gate_fraction is {total:g}; it must be below 1 to leave rows to train on",
        )
    yield from shares({"data.max_refused_share": data.max_refused_share, **named("data.checks", data.checks)})
    threshold = data.near_duplicate_threshold
    if threshold is not None and not LEAST_SIMILARITY <= threshold <= 1:
        yield (
            "data.near_duplicate_threshold",
            f"{threshold} must be from {LEAST_SIMILARITY} to 1; use null to keep near-duplicates",
        )
    if data.categories == []:
        yield "data.categories", "an empty list selects no rows; use null to select all"


def _merge(merge: Merge) -> Iterator[Problem]:
    formats = merge.gguf or []
    for name in formats:
        if name not in GGUF_FORMATS:
            yield "merge.gguf", f"{name!r} is not a format; use {', '.join(GGUF_FORMATS)}"
    if len({*formats}) < len(formats):
        yield "merge.gguf", f"{formats} names a format twice; remove one"


def _stack(stack: Stack) -> Iterator[Problem]:
    if len(stack.adapters) < 2:
        yield "stack.adapters", f"{stack.adapters} must name at least two experiments, each with its weight"
    for name, weight in stack.adapters.items():
        if not math.isfinite(weight):
            yield f"stack.adapters.{name}", f"{weight} is not a valid weight"
    if not 0 < stack.density <= 1:
        yield "stack.density", f"{stack.density} must be a fraction above 0 and at most 1"


def _added_tokens(tokenization: Tokenization) -> Iterator[Problem]:
    counts = Counter(tokenization.added_tokens)
    for token in tokenization.added_tokens:
        if not token.strip() or token != token.strip():
            yield "data.tokenization.added_tokens", f"{token!r} is blank, or has leading or trailing white space"
        elif counts[token] > 1:
            yield "data.tokenization.added_tokens", f"{token!r} is listed twice"


def _trust(model: Model) -> Iterator[Problem]:
    trusted = model.trust_remote_code
    if trusted is not None and not VERSION.fullmatch(trusted):
        yield (
            "model.trust_remote_code",
            f"{trusted!r} must be owner/name@commit, with all 40 digits of the commit whose code you have read",
        )


def _template(template: PromptTemplate) -> Iterator[Problem]:
    if template.chat_template:
        return
    wanted = {"prompt_input": {"instruction", "context"}, "prompt_no_input": {"instruction"}}
    for name, needed in wanted.items():
        text, key = getattr(template, name), f"data.prompt_template.{name}"
        try:
            placeholders = {field for _, field, _, _ in string.Formatter().parse(text) if field is not None}
        except ValueError as e:
            yield key, f"invalid template: {e}; double literal braces"
            continue
        for field in sorted(placeholders - set(PLACEHOLDERS)):
            yield key, f"unknown placeholder '{{{field}}}'; {suggest(field, PLACEHOLDERS)}"
        for field in sorted(needed - placeholders):
            yield key, f"'{{{field}}}' is missing, so the model would never see the row's {field}"
        if not text.rstrip().endswith(template.response_split.rstrip()):
            yield (
                "data.prompt_template.response_split",
                f"{template.response_split!r} must be the last words of {name}: the answer follows them",
            )


def _batches(training: Training) -> Iterator[Problem]:
    macro, micro = training.macro_batch_size, training.micro_batch_size
    if micro > macro:
        yield "training.micro_batch_size", f"{micro} is more than training.macro_batch_size {macro}"
    if training.processes_per_node != "auto":
        number = training.processes_per_node
        if not PROCESSES.fullmatch(number):
            yield "training.processes_per_node", f"{number!r} must be auto or a number of at least 1"
        elif int(number) > macro:
            yield "training.processes_per_node", f"{number} processes are more than training.macro_batch_size {macro}"


def _kernels(training: Training) -> Iterator[Problem]:
    if training.kernels != "none" and training.compile:
        yield (
            "training.kernels",
            f"{training.kernels} cannot be used with training.compile, which fuses the same operations; use one",
        )


def _types(config: ExperimentConfig) -> Iterator[Problem]:
    """`fp32` and `full_*` compute in the data type of the base model's weights, so the two must agree."""
    precision, dtype = config.training.precision, config.model.dtype
    wanted = COMPUTED_AS_STORED.get(precision)
    if wanted and dtype not in ("auto", wanted) and config.model.quantization == "none":
        yield "training.precision", f"{precision} requires model.dtype {wanted} (or auto), found {dtype}"


def _quantized(config: ExperimentConfig) -> Iterator[Problem]:
    quantization, precision = config.model.quantization, config.training.precision
    if quantization == "none":
        return
    if precision.startswith("full_"):
        yield (
            "training.precision",
            f"{precision} cannot be used with an {quantization} base model: the adapter's small gradients vanish in 16 "
            "bits; use fp16 or bf16, which keep the adapter in float32",
        )
    if isinstance(config.lora.init_lora_weights, str) and config.lora.init_lora_weights != "gaussian":
        scheme = config.lora.init_lora_weights
        yield (
            "lora.init_lora_weights",
            f"{scheme} modifies the base weights, which {quantization} does not support; use true",
        )


def _lora(lora: Lora) -> Iterator[Problem]:
    targets = lora.target_modules
    names = isinstance(targets, list) and targets and all(isinstance(name, str) and name for name in targets)
    if targets != "all-linear" and not names:
        yield "lora.target_modules", f"{targets!r} must be all-linear or a list of module names"
    scheme = lora.init_lora_weights
    known = isinstance(scheme, str) and (scheme in INIT_SCHEMES or PISSA_STEPS.fullmatch(scheme))
    if isinstance(scheme, str) and scheme.lower() in ("true", "false"):
        yield "lora.init_lora_weights", f"{scheme!r} is text; write {scheme.lower()} without quotes"
    elif not (isinstance(scheme, bool) or known):
        options = ["true", "pissa_niter_16", *INIT_SCHEMES]
        yield "lora.init_lora_weights", f"{shown(scheme)} is not valid; {suggest(str(scheme), options)}"
    for layer in lora.layers_to_transform or ():
        if layer < 0:
            yield "lora.layers_to_transform", f"{layer} must be the index of a layer, from 0"
    if len(lora.layers_to_transform or ()) > MOST_LAYERS:
        yield (
            "lora.layers_to_transform",
            f"{len(lora.layers_to_transform or ()):,} layers; at most {MOST_LAYERS:,}",
        )
    if lora.layers_to_transform == []:
        yield "lora.layers_to_transform", "an empty list selects no layers; use null to adapt all"
    for name in lora.rank_pattern:
        if problem := pattern_problem(name):
            yield f"lora.rank_pattern.{name}", f"{shown(name)}: {problem}"
    for name in lora.modules_to_save or ():
        if not name:
            yield "lora.modules_to_save", "'' is not the name of a module"
    if isinstance(scheme, str) and scheme.startswith(REWRITES_BASE):
        # PEFT's conversion back to the published base model keeps only lora_A and lora_B
        incompatible = [
            name for name in ("use_dora", "use_rslora", "modules_to_save", "rank_pattern") if getattr(lora, name)
        ]
        for name in incompatible + (["bias"] if lora.bias != "none" else []):
            yield f"lora.{name}", f"cannot be used with init_lora_weights {scheme}: the adapter could not be saved"
    if lora.use_dora and lora.bias != "none":
        yield "lora.bias", f"{lora.bias} cannot be trained with use_dora; use none"
