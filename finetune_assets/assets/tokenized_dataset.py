"""The experiment's rows as training-ready tokens."""

import json
from pathlib import Path

import dagster as dg

from finetune_assets.assets.making import GROUP, make_once, plain_errors, publish_built, result
from finetune_assets.assets.partitions import experiments
from finetune_assets.resources.project import Project
from finetune_assets.store.artifacts import ArtifactRef
from finetune_assets.store.base_models import is_tokenizer_file
from finetune_assets.store.lineage import TOKENIZED

STATISTICS, PREVIEW = "statistics.json", "preview.md"


@dg.asset(group_name=GROUP, kinds={"arrow"}, partitions_def=experiments, code_version="1")
def tokenized_dataset(
    context: dg.AssetExecutionContext, dolly_raw: ArtifactRef, cached_base_model: ArtifactRef, project: Project
) -> dg.MaterializeResult[ArtifactRef]:
    """The experiment's rows: selected, split by content, put into its prompt, tokenized, masked and packed.

    Reads only the tokenizer's files of the base model.
    """
    with plain_errors():
        lineage = project.lineage(context.partition_key)
        fingerprint = lineage.tokenized_fingerprint(dolly_raw, cached_base_model)

        def build(folder: Path) -> None:
            from finetune_assets.data.prepare import prepare_dataset
            from finetune_assets.data.preview import masked_tokens
            from finetune_assets.data.sources import PARQUET
            from finetune_assets.data.tokenization import check_positions, load_tokenizer

            store = project.store()
            base_model = store.fetch(cached_base_model, is_tokenizer_file)
            check_positions(base_model, lineage.experiment.config.data)
            tokenizer = load_tokenizer(str(base_model))
            rows = store.fetch(dolly_raw) / PARQUET
            salt = lineage.raw.config.split_salt
            statistics = prepare_dataset(rows, tokenizer, lineage.experiment.config.data, salt, folder)
            (folder / STATISTICS).write_text(json.dumps(statistics.to_dict()), encoding="utf-8")
            (folder / PREVIEW).write_text(masked_tokens(folder / "train.arrow", tokenizer), encoding="utf-8")

        def make() -> ArtifactRef:
            made_from = {"dolly_raw": dolly_raw.fingerprint, "cached_base_model": cached_base_model.fingerprint}
            return publish_built(project, TOKENIZED, fingerprint, fingerprint, made_from, build)

        made = make_once(context, project, TOKENIZED, fingerprint, make)
        return result(made, **_describe(project, made.ref))


def _describe(project: Project, ref: ArtifactRef) -> dict[str, object]:
    folder = project.store().fetch(ref, lambda path: path in (STATISTICS, PREVIEW))
    statistics = json.loads((folder / STATISTICS).read_text(encoding="utf-8"))
    examples = statistics.pop("examples")
    return {
        "dagster/row_count": sum(examples.values()),
        **{f"{split}_examples": count for split, count in examples.items()},
        **{f"length_{name}": length for name, length in statistics.pop("length_quantiles").items()},
        **statistics,
        "preview": dg.MetadataValue.md((folder / PREVIEW).read_text(encoding="utf-8")),
    }
