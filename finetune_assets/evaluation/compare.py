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

from finetune_assets.config.retrieval_validation import RETRIEVED
from finetune_assets.config.schema import ExperimentConfig
from finetune_assets.data.questions import questions
from finetune_assets.data.rows import HoldoutRows
from finetune_assets.data.sensitive import masked_values
from finetune_assets.evaluation.contenders import Contender, LoadedModels
from finetune_assets.evaluation.generation import answers, end_tokens, readable
from finetune_assets.evaluation.harness import run_tasks
from finetune_assets.evaluation.losses import RowLosses
from finetune_assets.evaluation.metrics import ANSWER_METRICS, GENERAL_LOSS, LOSS, PERPLEXITY
from finetune_assets.evaluation.modes import MeasuredMode, Modes, mode_columns, mode_results
from finetune_assets.evaluation.preferences import Judgements, Preferences, answer_words
from finetune_assets.evaluation.rows import (
    HeldOut,
    held_out,
    raw_rows_of,
    rendered,
    rendering,
    running_text,
    unseen_rows,
)
from finetune_assets.progress import ROWS, Progress, Unit
from finetune_assets.retrieval.contexts import Mode, RowContexts

PIECES = Unit("pieces")
WINDOW = 512
"""Length of a piece of general text, in tokens."""


@dataclass
class Measured:
    """Measurements of one contender.

    Attributes:
        rows: The rows in the contender's rendering.
        losses: Summed cross-entropy of each row's answer, in nats; shape (rows,).
        judged: The judged answers in the contender's rendering, and the log-probability of each example of the split,
            in nats; None without judgements.
        general: Mean loss on the general text, in nats per token; None if not measured.
        answered: Generated answers to the rows; None where the time limit was reached.
        prompt_answers: Generated answers to the prompts in `evaluation.prompts`.
        asked: Prompts of the rows as text.
        expected: Reference answers of the rows as text.
        modes: Measurements in the modes beside the one that serves, by mode.
        tasks: Metrics of the lm-evaluation-harness, as `task/metric`.
        seconds: Duration of each part, in seconds.
    """

    rows: HeldOut
    losses: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    judged: tuple[HeldOut, NDArray[np.float64]] | None = None
    general: float | None = None
    answered: list[str | None] = field(default_factory=list)
    prompt_answers: list[str | None] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)
    modes: dict[str, MeasuredMode] = field(default_factory=dict)
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
        contexts: Puts passages into rows, for an experiment with `data.retrieval`; requires `raw`.
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
        contexts: RowContexts | None = None,
    ) -> None:
        self.tasks = tasks
        self.config, self.settings = config, config.evaluation
        self.split, self.texts, self.raw, self.log = split, texts, raw, log
        self.examples = held_out(dataset, split, config.data)
        self.unseen_examples = np.ones(len(self.examples.examples), bool)
        if held_back and raw:
            self.unseen_examples = unseen_rows(self.examples, raw, split, held_back)
            seen = len(self.unseen_examples) - int(self.unseen_examples.sum())
            log(f"Excluded {seen} of {len(self.unseen_examples)} rows: at least one adapter was trained on them")
        self.judgements = Judgements.of(self.examples.examples.table)
        self.rows, self.unseen = self.examples, self.unseen_examples
        if self.judgements:
            self.rows = self.examples.take(self.judgements.accepted)
            self.unseen = self.unseen_examples[self.judgements.accepted]
        self.contexts, self.modes, self.counted = contexts, None, self.unseen
        if contexts:
            self.modes = Modes(config, contexts, dataset, split, raw_rows_of(self.rows, raw))
            self.counted = self.unseen & self.modes.scored(RETRIEVED)
        self.measured: dict[str, Measured] = {}

    def run(self, contenders: list[Contender], device: torch.device) -> LoadedModels:
        """Measure all contenders, grouped by base model so that each is loaded once."""
        self.rendering = rendering(self.config, contenders[0].tokenizer())
        models = LoadedModels(device)
        generations = len(contenders) * (len(self.modes.rows) if self.modes else 1)
        limit_s = self.settings.max_generation_seconds / generations
        for contender in sorted(contenders, key=lambda contender: contender.base_key != contenders[0].base_key):
            with models.loaded(contender) as model:
                self.measured[contender.name] = self._measure(contender, model, device, limit_s)
        return models

    def _measure(
        self, contender: Contender, model: PeftModel | PreTrainedModel, device: torch.device, limit_s: float
    ) -> Measured:
        tokenizer = contender.tokenizer()
        examples = self._examples_for(contender, tokenizer)
        measured = Measured(self.rows if examples is self.examples else examples)
        row_losses = RowLosses(model, contender.config, device)
        with self._timed(measured, "loss"):
            measured.losses = self._losses(contender.name, row_losses, examples)
        if self.judgements:
            measured.judged = examples, -measured.losses
            measured.losses = measured.losses[self.judgements.accepted]
            if examples is not self.examples:
                measured.rows = examples.take(self.judgements.accepted)
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
        if self.modes:
            with self._timed(measured, "modes"):
                for mode in self.modes.further:
                    rows = rendered(self.modes.rows[mode], tokenizer, contender.config.data)
                    losses = self._losses(f"{contender.name}, {mode}", row_losses, rows)
                    texts = self._answers(contender, model, tokenizer, rows, limit_s, f"{contender.name}, {mode}")
                    measured.modes[mode] = MeasuredMode(rows, losses, *texts)
        if self.settings.lm_eval:
            self.log(f"{contender.name}: lm-eval tasks {', '.join(self.settings.lm_eval.tasks)}")
            with self._timed(measured, "tasks"):
                measured.tasks = run_tasks(model, tokenizer, self.settings.lm_eval, self.tasks)
        return measured

    def _losses(self, name: str, row_losses: RowLosses, rows: HeldOut) -> NDArray[np.float64]:
        if not len(rows.examples):
            return np.zeros(0)
        with Progress(f"{name}, loss", len(rows.examples), ROWS) as progress:
            return row_losses.of(rows.examples, progress.reach)

    def _examples_for(self, contender: Contender, tokenizer: PreTrainedTokenizerBase) -> HeldOut:
        if not len(self.examples.examples) or rendering(contender.config, tokenizer) == self.rendering:
            return self.examples
        if not self.raw:
            raise ValueError(
                f"{contender.name}: prompt template or tokenizer differs, and raw data is missing; pass --raw"
            )
        self.log(
            f"{contender.name}: prompt template or tokenizer differs from the experiment; rendering its rows again"
        )
        rows = self.modes.rows[RETRIEVED] if self.modes else raw_rows_of(self.examples, self.raw)
        return rendered(rows, tokenizer, contender.config.data)

    def _generate_answers(
        self,
        contender: Contender,
        model: PeftModel | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        measured: Measured,
        limit_s: float,
    ) -> None:
        kept, max_rows = contender.config.data.tokenization.added_tokens, self.settings.generated_rows
        ends = end_tokens(tokenizer, measured.rows.answers)
        measured.asked = [readable(tokenizer, ids, kept) for ids in measured.rows.prompts[:max_rows]]
        own_prompts = self._own_prompts(tokenizer, contender)
        max_new_tokens = self.settings.max_new_tokens
        measured.prompt_answers = answers(model, tokenizer, own_prompts, max_new_tokens, ends=ends, kept=kept)
        measured.answered, measured.expected = self._answers(
            contender, model, tokenizer, measured.rows, limit_s, contender.name
        )

    def _own_prompts(self, tokenizer: PreTrainedTokenizerBase, contender: Contender) -> list[list[int]]:
        """The prompts in `evaluation.prompts`, with retrieval each with its passages."""
        prompts, data = self.settings.prompts, contender.config.data
        if not prompts or not self.contexts:
            return questions(prompts, tokenizer, data) if prompts else []
        asked = [{"instruction": prompt, "context": "", "response": "", "messages": None} for prompt in prompts]
        found = [row["context"] for row in self.contexts.apply(asked, Mode.RETRIEVED) if isinstance(row, dict)]
        pairs = zip(prompts, found, strict=True)
        return [questions([prompt], tokenizer, data, context)[0] for prompt, context in pairs]

    def _answers(
        self,
        contender: Contender,
        model: PeftModel | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: HeldOut,
        limit_s: float,
        name: str,
    ) -> tuple[list[str | None], list[str]]:
        """Generated and expected answers to the first rows."""
        kept, most = contender.config.data.tokenization.added_tokens, self.settings.generated_rows
        prompts, expected, ends = rows.prompts[:most], rows.answers[:most], end_tokens(tokenizer, rows.answers)
        with Progress(f"{name}, answers", len(prompts), ROWS) as progress:
            generated = answers(
                model, tokenizer, prompts, self.settings.max_new_tokens, progress.reach, ends, kept, limit_s
            )
        return generated, [readable(tokenizer, ids, kept) for ids in expected]

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
        return np.logical_and.reduce([self.counted, *(whole if len(whole) > 1 else [])])

    @property
    def preferences(self) -> Preferences | None:
        """Preferences of the contenders; None for an experiment that learns from no judgements."""
        if self.judgements is None:
            return None
        settings, preferences, masks = self.config.training.preference, {}, [self.unseen_examples]
        judged = {name: measured.judged for name, measured in self.measured.items() if measured.judged}
        renderings = {id(examples): examples for examples, _ in judged.values()}
        if len(renderings) > 1:
            masks += [examples.whole for examples in renderings.values()]
        for name, (examples, log_probabilities) in judged.items():
            lengths = examples.examples.learned if settings.length_normalised else 1
            preferences[name] = self.judgements.preferences(log_probabilities / lengths)
        comparable = self.judgements.all_of(np.logical_and.reduce(masks))
        return Preferences(self.judgements, comparable, preferences, settings)

    def result(self) -> dict[str, Any]:
        """Return the content of `evaluation.json`."""
        answered, preferences = self._answered_by_all(), self.preferences
        return {
            "split": self.split,
            "rows": len(self.tokens),
            "comparable_rows": int(self.comparable.sum()),
            "generated_rows": len(answered),
            "contenders": {
                name: self._metrics(name, measured, answered, preferences) for name, measured in self.measured.items()
            },
            "categories": self._losses_by("category"),
            **({"sources": self._losses_by("source")} if "source" in self.rows.examples.table.column_names else {}),
            "samples": self._samples(answered),
            "seconds": {
                name: {part: round(s, 2) for part, s in measured.seconds.items()}
                for name, measured in self.measured.items()
            },
            **({"preferences": preferences.described()} if preferences else {}),
            **(mode_results(self.modes, self._by_mode(), self.unseen) if self.modes else {}),
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
            **(mode_columns(self.modes, self._by_mode(), self.unseen) if self.modes else {}),
        }

    def _by_mode(self) -> dict[str, dict[str, MeasuredMode]]:
        """Measurements by mode and contender."""
        assert self.modes
        serving = {
            name: MeasuredMode(measured.rows, measured.losses, measured.answered, measured.expected)
            for name, measured in self.measured.items()
        }
        further = {
            mode: {name: each.modes[mode] for name, each in self.measured.items()} for mode in self.modes.further
        }
        return {RETRIEVED: serving, **further}

    def _answered_by_all(self) -> list[int]:
        columns = zip(*(measured.answered for measured in self.measured.values()), strict=True)
        return [row for row, texts in enumerate(columns) if None not in texts and self.unseen[row]]

    def _metrics(
        self, name: str, measured: Measured, answered: list[int], preferences: Preferences | None
    ) -> dict[str, Any]:
        result: dict[str, Any] = {}
        loss = self._mean_loss(measured)
        if loss is not None:
            result |= {LOSS.name: loss, PERPLEXITY.name: math.exp(min(loss, 700.0))}
        if measured.general is not None:
            result[GENERAL_LOSS.name] = measured.general
        if self.modes:
            result |= self.modes.answer_metrics(RETRIEVED, self._by_mode()[RETRIEVED][name], answered)
        elif answered:
            pairs = [(measured.answered[row] or "", measured.expected[row]) for row in answered]
            for metric in ANSWER_METRICS:
                result[metric.name] = sum(metric.score(*pair) for pair in pairs) / len(pairs)
        if preferences:
            result |= preferences.metrics(name) | answer_words(measured.answered, answered)
        return result | measured.tasks

    def _mean_loss(self, measured: Measured, group: NDArray[np.bool_] | None = None) -> float | None:
        """Loss in nats per token over unseen rows (untruncated ones if rendered again); None without such rows."""
        selected = self.counted if measured.rows is self.rows else self.counted & measured.rows.whole
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
            groups.append({column: name, "rows": int((group & self.counted).sum()), **losses})
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
