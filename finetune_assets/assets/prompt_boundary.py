"""Check `prompt_boundary` of `tokenized_dataset`: prompts whose tokens change once an answer follows."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg

from finetune_assets import data
from finetune_assets.artifacts.lineage import Lineage
from finetune_assets.assets.dataset_builder import dataset_builder
from finetune_assets.assets.materialization import fraction_check
from finetune_assets.data.processes import in_own_process
from finetune_assets.store.artifacts import ArtifactRef
from finetune_assets.store.results import code_and_libraries

if TYPE_CHECKING:
    from finetune_assets.data.prompt_boundary import PromptBoundary

NAME, TRAIN = "prompt_boundary", "train.arrow"
FIELDS = {"compared", "changed", "first", "difference"}
REMEDY_OF_PROMPTS = (
    "end data.prompt_template.prompt_input and prompt_no_input in text that the tokenizer never merges with an answer, "
    "such as a line break instead of a space, and remove white space before the answers"
)
REMEDY_OF_CHAT_TEMPLATE = (
    "serve with the variables of the chat template that render it as in training (such as enable_thinking: false), or "
    "repair the base model's chat_template.jinja"
)


def prompt_boundary_check(
    context: dg.AssetExecutionContext,
    lineage: Lineage,
    dolly_raw: ArtifactRef,
    cached_base_model: ArtifactRef,
    dataset: ArtifactRef,
    compared: "PromptBoundary | None",
) -> dg.AssetCheckResult:
    """Compare the prompts of a sample of the training rows with those that a server renders.

    The comparison is no part of the dataset: a materialization whose dataset is a cache hit is checked too. A machine
    compares a dataset once, unless the base model brings its own code.

    Args:
        context: Context of the asset step.
        lineage: Lineage of the experiment.
        dolly_raw: The raw data.
        cached_base_model: The base model.
        dataset: The dataset.
        compared: The comparison, if it was made when the dataset was built.
    """
    from finetune_assets.data.sensitive import masked

    config, derived = lineage.experiment.config, lineage.store.cache.derived
    trusted = config.model.trust_remote_code is not None
    code = code_and_libraries((Path(data.__file__).parent,), ("transformers", "tokenizers", "jinja2"))
    question = {"prompt_boundary": dataset.fingerprint, "content": dataset.content, **code}
    found = None if trusted or compared else derived.get(question, FIELDS)
    if found is None:
        compared = compared or _compare(lineage, dolly_raw, cached_base_model, dataset)
        found = {**asdict(compared), "difference": masked(compared.difference)}
        if not trusted:
            derived.put(question, found)
    most, first = config.data.checks.max_changed_prompts_share, ", ".join(map(str, found["first"]))
    remedy = REMEDY_OF_CHAT_TEMPLATE if config.data.prompt_template.chat_template else REMEDY_OF_PROMPTS
    problem = (
        f"have a prompt whose tokens change once an answer follows (data.checks.max_changed_prompts_share = {most:g}), "
        f"so a server does not continue them as in training; {remedy}. First, by number in dolly_raw: {first}; in the "
        f"first, {found['difference']}"
    )
    severity = dg.AssetCheckSeverity.WARN
    return fraction_check(context, NAME, found["changed"], found["compared"], most, problem, severity, first_rows=first)


def _compare(
    lineage: Lineage, dolly_raw: ArtifactRef, cached_base_model: ArtifactRef, dataset: ArtifactRef
) -> "PromptBoundary":
    from finetune_assets.data.ingest import PARQUET

    store, selected = lineage.store, lineage.selected_sources(dolly_raw)
    used = [*selected.values(), *lineage.replayed(selected)]
    raw = [store.fetch(ref, lambda path: path == PARQUET) / PARQUET for ref in used]
    train = store.fetch(dataset, lambda path: path == TRAIN) / TRAIN
    builder = dataset_builder(lineage, cached_base_model)
    return in_own_process(builder.compare_prompts, raw, train, torch=builder.needs_torch)
