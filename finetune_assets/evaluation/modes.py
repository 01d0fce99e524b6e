"""Held-out rows in the modes of an evaluation with retrieval: what is given with each question, and what counts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_assets.config.retrieval_validation import RETRIEVED, measured_modes
from finetune_assets.config.schema import ExperimentConfig
from finetune_assets.data.errors import RefusedRow
from finetune_assets.data.rows import Row
from finetune_assets.evaluation.files import column
from finetune_assets.evaluation.metrics import (
    ANSWER_METRICS,
    CITATIONS,
    FALSE_REFUSALS,
    LOSS,
    PASSAGE_METRICS,
    REFUSALS,
)
from finetune_assets.evaluation.metrics.exact_match import exact_match
from finetune_assets.evaluation.rows import HeldOut
from finetune_assets.retrieval.citations import cited, without_citations
from finetune_assets.retrieval.contexts import Mode, RowContexts
from finetune_assets.retrieval.statistics import shows_golden, unseen_passages

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class MeasuredMode:
    """Measurements of one contender in one mode.

    Attributes:
        rows: The rows in the contender's rendering.
        losses: Summed cross-entropy of each row's answer, in nats; shape (rows,).
        answered: Generated answers to the first rows; None where the time limit was reached.
        expected: Reference answers of these rows.
    """

    rows: HeldOut
    losses: NDArray[np.float64]
    answered: Sequence[str | None]
    expected: Sequence[str]


class Modes:
    """The rows of a split with the passages of each mode.

    The expected answer is the row's own in every mode, with its citation if the experiment cites. With refusals, a row
    without a golden passage among its passages is to be refused: it counts in the share of refusals alone.

    Args:
        config: Settings of the experiment.
        contexts: Puts passages into rows.
        dataset: Folder of the experiment's tokenized dataset.
        split: The split.
        raw_rows: The rows of the split.

    Attributes:
        rows: The rows with passages, by mode.
    """

    def __init__(
        self, config: ExperimentConfig, contexts: RowContexts, dataset: Path, split: str, raw_rows: Sequence[Row]
    ) -> None:
        assert config.data.retrieval is not None
        self.retrieval, self.dataset, self.split = config.data.retrieval, dataset, split
        self.rows: dict[str, list[Row | RefusedRow]] = {
            mode: contexts.apply(raw_rows, Mode(mode)) for mode in measured_modes(config)
        }
        self._golden = {mode: shows_golden(rows) for mode, rows in self.rows.items()}

    @property
    def further(self) -> list[str]:
        """The modes beside the one that serves, whose rows are those of the dataset."""
        return [mode for mode in self.rows if mode != RETRIEVED]

    @property
    def refuses(self) -> bool:
        return self.retrieval.without_golden == "refuse"

    @cached_property
    def unseen_passages(self) -> Mask:
        """Mask of the rows with golden passages that are the golden passages of no training row; shape (rows,)."""
        return unseen_passages(self.dataset, self.split)

    def scored(self, mode: str) -> Mask:
        """Mask of the rows whose answers are compared with the expected ones; shape (rows,)."""
        needs_golden = mode in (Mode.GOLDEN, Mode.GOLDEN_AND_DISTRACTORS) or (mode == RETRIEVED and self.refuses)
        return self._golden[mode] if needs_golden else np.ones_like(self._golden[mode])

    def described(self, mode: str) -> dict[str, int]:
        """Number of rows with a golden passage among their passages, and with fewer passages than fit."""
        rows = [row for row in self.rows[mode] if isinstance(row, dict)]
        shortened = sum(row["dropped_passages"] > 0 for row in rows)
        return {"golden_rows": int(self._golden[mode].sum()), "shortened_rows": shortened}

    # ---- metrics

    def metrics(self, mode: str, measured: MeasuredMode, compared: Mask, answered: Sequence[int]) -> dict[str, float]:
        """Metrics of one contender.

        Args:
            mode: The mode.
            measured: What was measured.
            compared: Mask of the rows whose losses are compared; shape (rows,).
            answered: Rows that all contenders answered.
        """
        tokens = measured.rows.examples.learned[compared].sum()
        loss = {LOSS.name: float(measured.losses[compared].sum() / tokens)} if tokens else {}
        return loss | self.answer_metrics(mode, measured, answered)

    def answer_metrics(self, mode: str, measured: MeasuredMode, answered: Sequence[int]) -> dict[str, float]:
        """Metrics of generated answers, without those that no row counts for."""
        scored, golden = self.scored(mode), self._golden[mode]
        texts = {row: measured.answered[row] or "" for row in answered}
        pairs = [(self._plain(texts[row]), self._plain(measured.expected[row])) for row in answered if scored[row]]
        scores = {
            metric.name: [metric.score(*pair) for pair in pairs] for metric in (*ANSWER_METRICS, *PASSAGE_METRICS)
        }
        if self.retrieval.cite:
            scores[CITATIONS.name] = [self._citation(mode, row, texts[row]) for row in answered if golden[row]]
        if self.refuses and mode != Mode.CLOSED_BOOK:
            refusals = {row: exact_match(text, self.retrieval.refusal) for row, text in texts.items()}
            scores[REFUSALS.name] = [refusals[row] for row in answered if not golden[row] and mode == RETRIEVED]
            scores[FALSE_REFUSALS.name] = [refusals[row] for row in answered if golden[row]]
        return {name: float(sum(values) / len(values)) for name, values in scores.items() if values}

    def _plain(self, answer: str) -> str:
        return without_citations(answer) if self.retrieval.cite else answer

    def _citation(self, mode: str, index: int, answer: str) -> float:
        """Share of the cited passages that are golden; 0 without a citation."""
        row, numbers = self.rows[mode][index], cited(answer)
        assert isinstance(row, dict)
        golden = {number for number, passage in enumerate(row["passages"], 1) if passage in row["golden"]}
        return sum(number in golden for number in numbers) / len(numbers) if numbers else 0.0


def answered_by_all(contenders: Mapping[str, MeasuredMode], unseen: Mask) -> list[int]:
    """Numbers of the rows that all contenders answered within the time limit, and none was trained on."""
    columns = zip(*(measured.answered for measured in contenders.values()), strict=True)
    return [row for row, texts in enumerate(columns) if None not in texts and unseen[row]]


def mode_results(modes: Modes, measured: Mapping[str, Mapping[str, MeasuredMode]], unseen: Mask) -> dict[str, Any]:
    """Return what `evaluation.json` has of each mode: all rows, and those with unseen passages.

    Args:
        modes: The modes.
        measured: Measurements by mode and contender.
        unseen: Mask of the rows that no contender was trained on; shape (rows,).
    """

    def result(mode: str, group: Mask) -> dict[str, Any]:
        contenders, compared = measured[mode], comparable(modes, mode, measured[mode], group)
        answered = answered_by_all(contenders, group)
        metrics = {name: modes.metrics(mode, each, compared, answered) for name, each in contenders.items()}
        return {"rows": int(compared.sum()), "generated_rows": len(answered), "contenders": metrics}

    return {
        "modes": {mode: {**modes.described(mode), **result(mode, unseen)} for mode in modes.rows},
        "unseen_passages": {mode: result(mode, unseen & modes.unseen_passages) for mode in modes.rows},
    }


def mode_columns(
    modes: Modes, measured: Mapping[str, Mapping[str, MeasuredMode]], unseen: Mask
) -> dict[str, NDArray[Any]]:
    """Return what `rows.parquet` has of the modes beside the one that serves; `column` names the columns."""
    columns: dict[str, NDArray[Any]] = {"unseen_passages": modes.unseen_passages}
    for mode in modes.further:
        contenders = measured[mode]
        columns[column("tokens", mode)] = next(iter(contenders.values())).rows.examples.learned
        columns[column("comparable", mode)] = comparable(modes, mode, contenders, unseen)
        columns |= {column(name, mode): each.losses for name, each in contenders.items()}
    return columns


def comparable(modes: Modes, mode: str, contenders: Mapping[str, MeasuredMode], unseen: Mask) -> Mask:
    """Return the mask of the rows on which the losses of all contenders in a mode are comparable; shape (rows,)."""
    whole = [measured.rows.whole for measured in contenders.values()]
    return np.logical_and.reduce([unseen, modes.scored(mode), *whole])
