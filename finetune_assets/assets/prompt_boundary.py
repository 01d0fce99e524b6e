"""Check `prompt_boundary` of `tokenized_dataset`: prompts whose tokens change once an answer follows."""

import dagster as dg

from finetune_assets.artifacts.lineage import Lineage
from finetune_assets.artifacts.passages import row_contexts
from finetune_assets.assets.materialization import fraction_check
from finetune_assets.sources.base_models import is_tokenizer_file
from finetune_assets.store.artifacts import ArtifactRef

NAME, TRAIN = "prompt_boundary", "train.arrow"
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
) -> dg.AssetCheckResult:
    """Compare the prompts of a sample of the training rows with those that a server renders.

    The comparison is no part of the dataset: it is done at each materialization, also after a cache hit.
    """
    from finetune_assets.data.ingest import PARQUET
    from finetune_assets.data.prompt_boundary import prompt_boundary
    from finetune_assets.data.sensitive import masked
    from finetune_assets.data.tokenization import load_tokenizer

    config, store = lineage.experiment.config, lineage.store
    selected, data = lineage.selected_sources(dolly_raw), config.data
    used = [*selected.values(), *lineage.replayed(selected)]
    raw = [store.fetch(ref, lambda path: path == PARQUET) / PARQUET for ref in used]
    train = store.fetch(dataset, lambda path: path == TRAIN) / TRAIN
    base_model = store.fetch(cached_base_model, is_tokenizer_file)
    trusted = config.model.trust_remote_code is not None
    tokenizer = load_tokenizer(str(base_model), data.tokenization.added_tokens, trusted)
    contexts = row_contexts(lineage, raw, load_tokenizer(str(base_model), data.tokenization.added_tokens, trusted))
    found = prompt_boundary(train, raw, tokenizer, data, contexts=contexts)
    most = data.checks.max_changed_prompts_share
    first = ", ".join(map(str, found.first))
    remedy = REMEDY_OF_CHAT_TEMPLATE if data.prompt_template.chat_template else REMEDY_OF_PROMPTS
    problem = (
        f"have a prompt whose tokens change once an answer follows (data.checks.max_changed_prompts_share = {most:g}), "
        f"so a server does not continue them as in training; {remedy}. First, by number in dolly_raw: {first}; in the "
        f"first, {masked(found.difference)}"
    )
    severity = dg.AssetCheckSeverity.WARN
    return fraction_check(context, NAME, found.changed, found.compared, most, problem, severity, first_rows=first)
