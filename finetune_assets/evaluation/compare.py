"""Compare base, champion and challenger on the same rows: losses, generated answers, loss on general text."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune_assets.config.schema import ExperimentConfig
from finetune_assets.data.questions import questions
from finetune_assets.data.rows import HoldoutRows
from finetune_assets.data.sensitive import masked_values
from finetune_assets.evaluation.contenders import Contender, LoadedModels
from finetune_assets.evaluation.generation import answers, end_tokens, readable
from finetune_assets.evaluation.harness import run_tasks
from finetune_assets.evaluation.losses import RowLosses
from finetune_assets.evaluation.metrics import ANSWER_METRICS, GENERAL_LOSS, LOSS, PERPLEXITY
from finetune_assets.evaluation.rows import (
    HeldOut,
    held_out,
    rendered_again,
    rendering,
    running_text,
    unseen_rows,
)
from finetune_assets.progress import ROWS, Progress, Unit

PIECES = Unit("pieces")
WINDOW = 512
"""Length of a piece of general text, in tokens."""


@dataclass
class Measured:
    """Measurements of one contender.

    Attributes:
        rows: The rows in the contender's rendering.
        losses: Summed cross-entropy of each row's answer, in nats; shape (rows,).
        general: Mean loss on the general text, in nats per token; None if not measured.
        answered: Generated answers to the rows; None where the time limit was reached.
        prompt_answers: Generated answers to the prompts in `evaluation.prompts`.
        asked: Prompts of the rows as text.
        expected: Reference answers of the rows as text.
        tasks: Metrics of the lm-evaluation-harness, as `task/metric`.
        seconds: Duration of each part, in seconds.
    """

    rows: HeldOut
    losses: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    general: float | None = None
    answered: list[str | None] = field(default_factory=list)
    prompt_answers: list[str | None] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)
    tasks: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


class Comparison:
    """Measures contenders one after another.

    Args:
        config: Settings of the experiment, which define what is measured.
        dataset: Folder of the experiment's tokenized dataset.
        split: `gate`, or `val` to choose among several adapters.
        texts: The general text.
        raw: Parquet files of the raw data, one per source; required if a contender has a different rendering.
        log: Called with each log line.
        tasks: Folder of additional lm-evaluation-harness tasks.
        held_back: Rows that no contender was trained on, if fewer than the split; requires `raw`.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        dataset: Path,
        split: str,
        texts: list[str],
        raw: Sequence[Path],
        log: Callable[[str], None],
        tasks: Path | None = None,
        held_back: HoldoutRows | None = None,
    ) -> None:
        self.tasks = tasks
        self.config, self.settings = config, config.evaluation
        self.split, self.texts, self.raw, self.log = split, texts, raw, log
        self.rows = held_out(dataset, split, config.data)
        self.unseen = np.ones(len(self.rows.examples), bool)
        if held_back and raw:
            self.unseen = unseen_rows(self.rows, raw, split, held_back)
            seen = len(self.unseen) - int(self.unseen.sum())
            log(f"Excluded {seen} of {len(self.unseen)} rows: at least one adapter was trained on them")
        self.measured: dict[str, Measured] = {}

    def run(self, contenders: list[Contender], device: torch.device) -> LoadedModels:
        """Measure all contenders, grouped by base model so that each is loaded once."""
        self.rendering = rendering(self.config, contenders[0].tokenizer())
        models = LoadedModels(device)
        limit_s = self.settings.max_generation_seconds / len(contenders)
        for contender in sorted(contenders, key=lambda contender: contender.base_key != contenders[0].base_key):
            with models.loaded(contender) as model:
                self.measured[contender.name] = self._measure(contender, model, device, limit_s)
        return models

    def _measure(
        self, contender: Contender, model: PeftModel | PreTrainedModel, device: torch.device, limit_s: float
    ) -> Measured:
        tokenizer = contender.tokenizer()
        measured = Measured(self._rows_for(contender, tokenizer))
        row_losses = RowLosses(model, contender.config, device)
        if len(self.rows.examples):
            with (
                self._timed(measured, "loss"),
                Progress(f"{contender.name}, loss", len(measured.rows.examples), ROWS) as progress,
            ):
                measured.losses = row_losses.of(measured.rows.examples, progress.reach)
        window = min(WINDOW, getattr(model.config, "max_position_embeddings", None) or WINDOW)
        text = running_text(self.texts, tokenizer, self.settings.general_tokens, window)
        if text:
            with (
                self._timed(measured, "general"),
                Progress(f"{contender.name}, loss of general text", len(text), PIECES) as progress,
            ):
                measured.general = float(row_losses.of(text, progress.reach).sum() / text.learned.sum())
        with self._timed(measured, "generation"):
            self._generate_answers(contender, model, tokenizer, measured, limit_s)
        if self.settings.lm_eval:
            self.log(f"{contender.name}: lm-eval tasks {', '.join(self.settings.lm_eval.tasks)}")
            with self._timed(measured, "tasks"):
                measured.tasks = run_tasks(model, tokenizer, self.settings.lm_eval, self.tasks)
        return measured

    def _rows_for(self, contender: Contender, tokenizer: PreTrainedTokenizerBase) -> HeldOut:
        if not len(self.rows.examples) or rendering(contender.config, tokenizer) == self.rendering:
            return self.rows
        if not self.raw:
            raise ValueError(
                f"{contender.name}: prompt template or tokenizer differs, and raw data is missing; pass --raw"
            )
        self.log(
            f"{contender.name}: prompt template or tokenizer differs from the experiment; rendering its rows again"
        )
        return rendered_again(self.rows, self.raw, tokenizer, contender.config.data)

    def _generate_answers(
        self,
        contender: Contender,
        model: PeftModel | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        measured: Measured,
        limit_s: float,
    ) -> None:
        kept, max_rows = contender.config.data.tokenization.added_tokens, self.settings.generated_rows
        prompts, expected = measured.rows.prompts[:max_rows], measured.rows.answers[:max_rows]
        ends = end_tokens(tokenizer, measured.rows.answers)
        measured.asked = [readable(tokenizer, ids, kept) for ids in prompts]
        measured.expected = [readable(tokenizer, ids, kept) for ids in expected]
        own_prompts = (
            questions(self.settings.prompts, tokenizer, contender.config.data) if self.settings.prompts else []
        )
        max_new_tokens = self.settings.max_new_tokens
        measured.prompt_answers = answers(model, tokenizer, own_prompts, max_new_tokens, ends=ends, kept=kept)
        with Progress(f"{contender.name}, answers", len(prompts), ROWS) as progress:
            measured.answered = answers(model, tokenizer, prompts, max_new_tokens, progress.reach, ends, kept, limit_s)

    def _timed(self, measured: Measured, part: str) -> "_Timer":
        return _Timer(measured.seconds, part)

    # ---- results

    @property
    def tokens(self) -> NDArray[np.int64]:
        """Number of tokens of each row's answer in the experiment's current rendering; shape (rows,)."""
        return self.rows.examples.learned

    @property
    def comparable(self) -> NDArray[np.bool_]:
        """Mask of the rows on which the losses of all contenders are comparable; shape (rows,)."""
        renderings = {id(measured.rows): measured.rows for measured in self.measured.values()}
        whole = [rows.whole for rows in renderings.values()]
        return np.logical_and.reduce([self.unseen, *(whole if len(whole) > 1 else [])])

    def result(self) -> dict[str, Any]:
        """Return the content of `evaluation.json`."""
        answered = self._answered_by_all()
        return {
            "split": self.split,
            "rows": len(self.tokens),
            "comparable_rows": int(self.comparable.sum()),
            "generated_rows": len(answered),
            "contenders": {name: self._metrics(measured, answered) for name, measured in self.measured.items()},
            "categories": self._losses_by("category"),
            **({"sources": self._losses_by("source")} if "source" in self.rows.examples.table.column_names else {}),
            "samples": self._samples(answered),
            "seconds": {
                name: {part: round(s, 2) for part, s in measured.seconds.items()}
                for name, measured in self.measured.items()
            },
        }

    def table(self) -> dict[str, Any]:
        """Return the columns of `rows.parquet`: tokens of each row and its summed loss by contender, in nats."""
        rows = self.rows.examples.table
        return {
            "row": rows["row"],
            "category": rows["category"],
            "tokens": self.tokens,
            "comparable": self.comparable,
            **{name: measured.losses for name, measured in self.measured.items()},
        }

    def _answered_by_all(self) -> list[int]:
        columns = zip(*(measured.answered for measured in self.measured.values()), strict=True)
        return [row for row, texts in enumerate(columns) if None not in texts and self.unseen[row]]

    def _metrics(self, measured: Measured, answered: list[int]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        loss = self._mean_loss(measured)
        if loss is not None:
            result |= {LOSS.name: loss, PERPLEXITY.name: math.exp(min(loss, 700.0))}
        if measured.general is not None:
            result[GENERAL_LOSS.name] = measured.general
        if answered:
            pairs = [(measured.answered[row] or "", measured.expected[row]) for row in answered]
            for metric in ANSWER_METRICS:
                result[metric.name] = sum(metric.score(*pair) for pair in pairs) / len(pairs)
        return result | measured.tasks

    def _mean_loss(self, measured: Measured, group: NDArray[np.bool_] | None = None) -> float | None:
        """Loss in nats per token over unseen rows (untruncated ones if rendered again); None without such rows."""
        selected = self.unseen if measured.rows is self.rows else self.unseen & measured.rows.whole
        selected = selected if group is None else selected & group
        tokens = measured.rows.examples.learned[selected].sum()
        return float(measured.losses[selected].sum() / tokens) if tokens else None

    def _losses_by(self, column: str) -> list[dict[str, Any]]:
        """Number of rows and loss of each contender, by category or source."""
        names = np.array(self.rows.examples.table[column].to_pylist(), object)
        groups = []
        for name in sorted(set(names)):
            group = names == name
            losses = {contender: self._mean_loss(measured, group) for contender, measured in self.measured.items()}
            groups.append({column: name, "rows": int((group & self.unseen).sum()), **losses})
        return groups

    def _samples(self, answered: list[int]) -> list[dict[str, Any]]:
        """Prompts and answers to show, in which secrets and personal data are hidden."""
        first = next(iter(self.measured.values()))
        by_row = [
            {
                "prompt": first.asked[row],
                "expected": first.expected[row],
                **{name: measured.answered[row] for name, measured in self.measured.items()},
            }
            for row in answered[: self.settings.samples]
        ]
        own = [
            {
                "prompt": prompt,
                "expected": "",
                **{name: measured.prompt_answers[index] for name, measured in self.measured.items()},
            }
            for index, prompt in enumerate(self.settings.prompts)
        ]
        return [masked_values(sample) for sample in by_row + own]


class _Timer:
    def __init__(self, seconds: dict[str, float], part: str) -> None:
        self.seconds, self.part = seconds, part

    def __enter__(self) -> None:
        self.began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.part] = time.monotonic() - self.began
