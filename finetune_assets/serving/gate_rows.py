"""The gate rows that servers are verified on: their tokens, their messages, and their losses in the evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_assets.artifacts import provenance
from finetune_assets.artifacts.evaluations import newest_evaluations
from finetune_assets.artifacts.kinds import EVALUATIONS, INDEXES, RAW, TOKENIZED
from finetune_assets.artifacts.layout import CONFIG, ROWS
from finetune_assets.artifacts.lineage import Lineage
from finetune_assets.artifacts.passages import row_passages
from finetune_assets.config.loading import load_resolved
from finetune_assets.config.schema import Data
from finetune_assets.errors import UserError
from finetune_assets.store.artifacts import ArtifactRef
from finetune_assets.store.errors import StoreError
from finetune_assets.store.gc import inventory

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from finetune_assets.data.rows import Row

SHORT_ANSWER = 64
"""Rows with at most so many tokens of answers are preferred, because each token is one request."""
BASE, CHAMPION, CHALLENGER = "base", "champion", "challenger"
"""Columns of the evaluation."""


@dataclass(frozen=True)
class GateRows:
    """Rows of the gate split, as the adapter was evaluated on them.

    Attributes:
        numbers: Number of each row in the raw data.
        ids: Token ids of prompt and answer.
        starts: Number of tokens of the prompt.
        learned: Positions of the tokens whose log-probabilities count.
        losses: Loss of each row in the evaluation, in nats, by contender; shape (rows,) each.
        messages: Messages of the prompt, for the chat form; None for a row that has none.
        champion: Fingerprint of the adapter in the column `champion`; None without one.
    """

    numbers: list[int]
    ids: list[list[int]]
    starts: list[int]
    learned: list[list[int]]
    losses: Mapping[str, "NDArray[np.float64]"]
    messages: list[list[dict[str, Any]] | None]
    champion: str | None = None

    def prompt(self, row: int) -> list[int]:
        """Token ids of a row's prompt."""
        return self.ids[row][: self.starts[row]]

    @property
    def tokens(self) -> int:
        """Number of tokens whose log-probabilities count."""
        return sum(map(len, self.learned))


def evaluation_of(lineage: Lineage, adapter: ArtifactRef, recorded: str | None) -> ArtifactRef:
    """The evaluation of an adapter: that of its promotion, or the newest one.

    Args:
        lineage: Lineage of the experiment.
        adapter: The adapter.
        recorded: Fingerprint of the evaluation in the champion record; None after a promotion by hand.

    Raises:
        StoreError: if there is none in the store.
    """
    store = lineage.store
    if recorded and (found := store.find(EVALUATIONS.folder, recorded)):
        return found
    newest = newest_evaluations(inventory(store.objects), store.namespace).get(adapter.fingerprint)
    if not newest:
        raise StoreError(
            f"no evaluation of adapter {adapter.fingerprint[:12]} in the store, so no server can be verified; "
            f"materialize adapter_evaluation of {lineage.experiment.name}"
        )
    return store.ref(newest.kind, newest.name, newest.manifest)


def gate_rows(lineage: Lineage, adapter: ArtifactRef, recorded: str | None, count: int, longest: int) -> GateRows:
    """Rows to verify servers with, evenly spaced among those that all contenders were compared on.

    Args:
        lineage: Lineage of the experiment.
        adapter: The adapter.
        recorded: Fingerprint of its evaluation, if it is known.
        count: Maximum number of rows.
        longest: Maximum number of tokens of a row.

    Raises:
        StoreError: if the store lacks the evaluation or its rows, or no row is short enough.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from finetune_assets.evaluation.preferences import Judgements
    from finetune_assets.training.order import Examples

    store = lineage.store
    evaluation = evaluation_of(lineage, adapter, recorded)
    manifest = store.manifest(evaluation.kind, evaluation.name)
    made_from = manifest.made_from if manifest else {}
    split = provenance.text(made_from, "split") or "gate"
    table = pq.read_table(store.fetch(evaluation, lambda path: path == ROWS) / ROWS)
    dataset = _dataset(lineage, adapter, provenance.text(made_from, "tokenized_dataset"))
    file = f"{split}.arrow"
    examples = Examples.read(store.fetch(dataset, lambda path: path == file) / file)
    if judgements := Judgements.of(examples.table):
        examples = Examples(examples.table.take(pa.array(judgements.accepted)))
    numbers = np.asarray(table["row"])
    if not np.array_equal(numbers, np.asarray(examples.table["row"])):
        raise StoreError(
            f"evaluation {evaluation.fingerprint[:12]} and dataset {dataset.fingerprint[:12]} have different rows; "
            f"materialize adapter_evaluation of {lineage.experiment.name} again"
        )
    data = load_resolved(store.fetch(adapter, lambda path: path == CONFIG) / CONFIG).data
    usable = np.asarray(table["comparable"]) & (examples.lengths < min(data.tokenization.cutoff_len, longest))
    tokens = np.asarray(table["tokens"])
    short = np.flatnonzero(usable & (tokens > 0) & (tokens <= SHORT_ANSWER))
    found = short if len(short) >= count else np.flatnonzero(usable & (tokens > 0))
    if not len(found):
        raise StoreError(
            f"no row of the {split} split is shorter than {longest} tokens (the server's --max-model-len), so no "
            "server can be verified; increase --max-model-len or data.gate_fraction"
        )
    chosen = found[np.unique(np.linspace(0, len(found) - 1, min(count, len(found))).astype(int))]
    columns = [name for name in (BASE, CHAMPION, CHALLENGER) if name in table.column_names]
    rows = examples.table.take(chosen).to_pylist()
    return GateRows(
        numbers[chosen].tolist(),
        [row["input_ids"] for row in rows],
        [row["prompt_length"] for row in rows],
        [_learned(row, data) for row in rows],
        {name: np.asarray(table[name])[chosen] for name in columns},
        _messages(lineage, adapter, dataset, numbers[chosen].tolist(), data),
        provenance.text(made_from, "champion"),
    )


def _learned(row: Mapping[str, Any], data: Data) -> list[int]:
    """Positions of the tokens whose loss the evaluation sums; of the answer alone with `train_on_inputs`."""
    from finetune_assets.data.labels import IGNORED

    if data.tokenization.train_on_inputs:
        return [*range(max(1, row["prompt_length"]), len(row["input_ids"]))]
    return [at for at, label in enumerate(row["labels"]) if at and label != IGNORED]


def _dataset(lineage: Lineage, adapter: ArtifactRef, evaluated: str | None) -> ArtifactRef:
    """The dataset that an adapter was evaluated on, or else trained on; of a stack, that of its experiment."""
    manifest = lineage.store.manifest(adapter.kind, adapter.name)
    named = evaluated or provenance.text(manifest.made_from if manifest else {}, "tokenized_dataset")
    return (lineage.store.find(TOKENIZED.folder, named) if named else None) or lineage.expected(TOKENIZED)


def _messages(
    lineage: Lineage, adapter: ArtifactRef, dataset: ArtifactRef, numbers: Sequence[int], data: Data
) -> list[list[dict[str, Any]] | None]:
    """Messages of the rows' prompts; None where the raw data is no longer in the store."""
    from finetune_assets.data.raw_files import rows_at

    try:
        rows = rows_at(_raw_files(lineage, dataset), numbers)
        if data.retrieval:
            rows = _with_passages(lineage, adapter, dataset, rows)
    except (UserError, KeyError):
        return [None] * len(numbers)
    return [_prompt_messages(row, data) for row in rows]


def _with_passages(lineage: Lineage, adapter: ArtifactRef, dataset: ArtifactRef, rows: list["Row"]) -> list["Row"]:
    """The rows with the passages that they have in the dataset.

    Raises:
        StoreError: if the store no longer has the index.
    """
    from finetune_assets.data.tokenization import load_tokenizer
    from finetune_assets.retrieval.contexts import Mode

    manifest, folder = lineage.store.manifest(dataset.kind, dataset.name), lineage.store.fetch(adapter)
    named = provenance.text(manifest.made_from if manifest else {}, INDEXES.asset or "") or ""
    index = lineage.store.resolve(INDEXES.folder, named, made_by="retrieval_index")
    config = load_resolved(folder / CONFIG)
    passages = row_passages(lineage, index, config.data)
    assert passages
    contexts = passages.contexts(load_tokenizer(str(folder)))
    return [row for row in contexts.apply(rows, Mode.RETRIEVED) if isinstance(row, dict)]


def _raw_files(lineage: Lineage, dataset: ArtifactRef) -> list[Path]:
    from finetune_assets.data.ingest import PARQUET

    store = lineage.store
    manifest = store.manifest(dataset.kind, dataset.name)
    name = provenance.text(manifest.made_from if manifest else {}, "dolly_raw")
    raw = (store.find(RAW.folder, name) if name else None) or lineage.expected(RAW)
    sources = lineage.selected_sources(raw).values()
    return [store.fetch(ref, lambda path: path == PARQUET) / PARQUET for ref in sources]


def _prompt_messages(row: Mapping[str, Any], data: Data) -> list[dict[str, Any]] | None:
    """The messages before the last answer; None for a conversation with tools, which servers parse."""
    from finetune_assets.data.layouts.instruction import conversation
    from finetune_assets.data.serving_template import prompt_messages

    if not data.prompt_template.chat_template:
        return prompt_messages(row)  # type: ignore[arg-type]
    turns = row["messages"] or conversation(row["instruction"], row["context"], row["response"])
    messages = [{key: value for key, value in turn.items() if value is not None} for turn in turns]
    if row.get("tools") or messages[-1]["role"] != "assistant" or any(len(message) > 2 for message in messages):
        return None
    return messages[:-1]
