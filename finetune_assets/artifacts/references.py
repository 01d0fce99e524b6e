"""Log-probabilities of a dataset's judged answers under a reference model, shared by all trainings on the dataset."""

from finetune_assets.artifacts.kinds import REFERENCES
from finetune_assets.artifacts.layout import REFERENCE_LOG_PROBS
from finetune_assets.artifacts.lineage import Lineage
from finetune_assets.store.artifacts import ArtifactRef


def find_reference(
    lineage: Lineage, dataset: ArtifactRef, base_model: ArtifactRef, reference: ArtifactRef | None
) -> ArtifactRef | None:
    """The log-probabilities from an earlier training on the same dataset, if there was one.

    Args:
        lineage: The experiment's artifacts.
        dataset: The tokenized dataset.
        base_model: The base model.
        reference: The champion that is the reference; None for the base model.
    """
    if lineage.experiment.config.training.objective == "sft":
        return None
    return lineage.store.find(REFERENCES.folder, _name(lineage, dataset, base_model, reference))


def publish_reference(
    lineage: Lineage,
    adapter: ArtifactRef,
    dataset: ArtifactRef,
    base_model: ArtifactRef,
    reference: ArtifactRef | None,
) -> None:
    """Publish the log-probabilities in an adapter's folder, unless the store has them; arguments as above."""
    if lineage.experiment.config.training.objective == "sft" or find_reference(lineage, dataset, base_model, reference):
        return
    file = lineage.store.fetch(adapter, lambda path: path == REFERENCE_LOG_PROBS) / REFERENCE_LOG_PROBS
    name = _name(lineage, dataset, base_model, reference)
    inputs = {"tokenized_dataset": dataset, "cached_base_model": base_model, "reference": reference}
    made_from = {key: ref.fingerprint if ref else None for key, ref in inputs.items()}
    lineage.store.publish({REFERENCE_LOG_PROBS: file}, REFERENCES.folder, name, name, made_from)


def _name(lineage: Lineage, dataset: ArtifactRef, base_model: ArtifactRef, reference: ArtifactRef | None) -> str:
    return REFERENCES.fingerprint(
        lineage.experiment.config,
        tokenized_dataset=dataset.fingerprint,
        cached_base_model=base_model.fingerprint,
        reference=reference.fingerprint if reference else None,
    )
