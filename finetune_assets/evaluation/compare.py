"""Base, champion and challenger on the same rows: what each loses, what each answers, what each still knows."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune_assets.config.schema import ExperimentConfig
from finetune_assets.data.rows import HoldoutRows
from finetune_assets.evaluation.contenders import Contender, LoadedModels
from finetune_assets.evaluation.generation import answers, end_tokens, readable
from finetune_assets.evaluation.harness import run_tasks
from finetune_assets.evaluation.losses import RowLosses
from finetune_assets.evaluation.metrics import exact_match, rouge_l
from finetune_assets.evaluation.rows import (
    HeldOut,
    held_out,
    questions,
    rendered_again,
    rendering,
    running_text,
    unseen_rows,
)
from finetune_assets.progress import ROWS, Progress, Unit

PIECES = Unit("pieces")
WINDOW = 512
"""Tokens of a piece of general text."""


@dataclass
class Measured:
    """What was found of one contender.

    Attributes:
        rows: The rows as it reads them.
        losses: Summed nats of each row's answer; shape (rows,).
        general: Mean nats a token of the general text; None if it was not read.
        answered: Its answers to the rows; None where the time was up.
        told: Its answers to a person's own questions.
        asked: The rows' prompts as text.
        expected: The rows' answers as text.
        tasks: What it reaches in tasks of the lm-evaluation-harness, as `task/metric`.
        seconds: How long each part took.
    """

    rows: HeldOut
    losses: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    general: float | None = None
    answered: list[str | None] = field(default_factory=list)
    told: list[str | None] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)
    tasks: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


class Comparison:
    """Measures contenders one after another.

    Args:
        config: The experiment's settings, which say what is measured.
        dataset: Folder of its tokenized dataset.
        split: `gate`, or `val` where a choice is made among several.
        texts: The general text.
        raw: Folder of the raw data; needed where a contender has another rendering.
        say: Is told how far it is.
        tasks: Folder of further tasks of the lm-evaluation-harness.
        held_back: What no contender was trained on, where that is less than the split says; needs `raw`.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        dataset: Path,
        split: str,
        texts: list[str],
        raw: Path | None,
        say: Callable[[str], None],
        tasks: Path | None = None,
        held_back: HoldoutRows | None = None,
    ) -> None:
        self.tasks = tasks
        self.config, self.settings = config, config.evaluation
        self.split, self.texts, self.raw, self.say = split, texts, raw, say
        self.rows = held_out(dataset, split, config.data)
        self.unseen = np.ones(len(self.rows.examples), bool)
        if held_back and raw:
            self.unseen = unseen_rows(self.rows, raw, split, held_back)
            seen = len(self.unseen) - int(self.unseen.sum())
            say(f"{seen} of {len(self.unseen)} rows are not compared: one of the adapters was trained on them")
        self.measured: dict[str, Measured] = {}

    def run(self, contenders: list[Contender], device: torch.device) -> LoadedModels:
        """Measure all, those on one base model together."""
        self.rendering = rendering(self.config, contenders[0].tokenizer())
        seats = LoadedModels(device)
        share = self.settings.max_generation_seconds / len(contenders)
        for contender in sorted(contenders, key=lambda one: one.seat != contenders[0].seat):
            with seats.seated(contender) as model:
                self.measured[contender.name] = self._measure(contender, model, device, share)
        return seats

    def _measure(
        self, contender: Contender, model: PeftModel | PreTrainedModel, device: torch.device, seconds: float
    ) -> Measured:
        tokenizer = contender.tokenizer()
        found = Measured(self._rows_for(contender, tokenizer))
        meter = RowLosses(model, contender.config, device)
        if len(self.rows.examples):
            with (
                self._timed(found, "loss"),
                Progress(f"{contender.name}, loss", len(found.rows.examples), ROWS) as progress,
            ):
                found.losses = meter.of(found.rows.examples, progress.reach)
        window = min(WINDOW, getattr(model.config, "max_position_embeddings", None) or WINDOW)
        text = running_text(self.texts, tokenizer, self.settings.general_tokens, window)
        if text:
            with (
                self._timed(found, "general"),
                Progress(f"{contender.name}, loss of general text", len(text), PIECES) as progress,
            ):
                found.general = float(meter.of(text, progress.reach).sum() / text.learned.sum())
        with self._timed(found, "generation"):
            self._let_answer(contender, model, tokenizer, found, seconds)
        if self.settings.lm_eval:
            self.say(f"{contender.name}: tasks {', '.join(self.settings.lm_eval.tasks)}")
            with self._timed(found, "tasks"):
                found.tasks = run_tasks(model, tokenizer, self.settings.lm_eval, self.tasks)
        return found

    def _rows_for(self, contender: Contender, tokenizer: PreTrainedTokenizerBase) -> HeldOut:
        if not len(self.rows.examples) or rendering(contender.config, tokenizer) == self.rendering:
            return self.rows
        if self.raw is None:
            raise ValueError(f"the {contender.name} has another rendering, and the raw data was not given")
        self.say(
            f"{contender.name}: its own prompts and tokens are not those of the experiment now; rows are made anew"
        )
        return rendered_again(self.rows, self.raw, tokenizer, contender.config.data)

    def _let_answer(
        self,
        contender: Contender,
        model: PeftModel | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        found: Measured,
        seconds: float,
    ) -> None:
        kept, most = contender.config.data.tokenization.added_tokens, self.settings.generated_rows
        prompts, expected = found.rows.prompts[:most], found.rows.answers[:most]
        ends = end_tokens(tokenizer, found.rows.answers)
        found.asked = [readable(tokenizer, ids, kept) for ids in prompts]
        found.expected = [readable(tokenizer, ids, kept) for ids in expected]
        own = questions(self.settings.prompts, tokenizer, contender.config.data) if self.settings.prompts else []
        longest = self.settings.max_new_tokens
        found.told = answers(model, tokenizer, own, longest, ends=ends, kept=kept)
        with Progress(f"{contender.name}, answers", len(prompts), ROWS) as progress:
            found.answered = answers(model, tokenizer, prompts, longest, progress.reach, ends, kept, seconds)

    def _timed(self, found: Measured, part: str) -> "_Timer":
        return _Timer(found.seconds, part)

    # ---- what came out

    @property
    def tokens(self) -> NDArray[np.int64]:
        """Tokens of each row's answer, as the experiment has them now."""
        return self.rows.examples.learned

    @property
    def comparable(self) -> NDArray[np.bool_]:
        """Rows whose losses mean the same for all contenders."""
        kinds = {id(found.rows): found.rows for found in self.measured.values()}
        whole = [rows.whole for rows in kinds.values()]
        return np.logical_and.reduce([self.unseen, *(whole if len(whole) > 1 else [])])

    def result(self) -> dict[str, Any]:
        """What `evaluation.json` holds."""
        answered = self._answered_by_all()
        return {
            "split": self.split,
            "rows": len(self.tokens),
            "comparable_rows": int(self.comparable.sum()),
            "generated_rows": len(answered),
            "contenders": {name: self._of(found, answered) for name, found in self.measured.items()},
            "categories": self._categories(),
            "samples": self._samples(answered),
            "seconds": {
                name: {part: round(s, 2) for part, s in found.seconds.items()} for name, found in self.measured.items()
            },
        }

    def table(self) -> dict[str, Any]:
        """Columns of `rows.parquet`: each row's tokens and summed loss by each contender."""
        rows = self.rows.examples.table
        return {
            "row": rows["row"],
            "category": rows["category"],
            "tokens": self.tokens,
            "comparable": self.comparable,
            **{name: found.losses for name, found in self.measured.items()},
        }

    def _answered_by_all(self) -> list[int]:
        columns = zip(*(found.answered for found in self.measured.values()), strict=True)
        return [row for row, texts in enumerate(columns) if None not in texts and self.unseen[row]]

    def _of(self, found: Measured, answered: list[int]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        loss = self._mean(found)
        if loss is not None:
            result |= {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if found.general is not None:
            result["general_loss"] = found.general
        if answered:
            pairs = [(found.answered[row] or "", found.expected[row]) for row in answered]
            result["exact_match"] = sum(exact_match(*pair) for pair in pairs) / len(pairs)
            result["rouge_l"] = sum(rouge_l(*pair) for pair in pairs) / len(pairs)
        return result | found.tasks

    def _mean(self, found: Measured, category: NDArray[np.bool_] | None = None) -> float | None:
        """Nats a token of the unseen rows that the contender reads whole, of a category or of all; None without any."""
        taken = self.unseen if found.rows is self.rows else self.unseen & found.rows.whole
        taken = taken if category is None else taken & category
        tokens = found.rows.examples.learned[taken].sum()
        return float(found.losses[taken].sum() / tokens) if tokens else None

    def _categories(self) -> list[dict[str, Any]]:
        names = np.array(self.rows.examples.table["category"].to_pylist(), object)
        found = []
        for name in sorted(set(names)):
            here = names == name
            losses = {who: self._mean(measured, here) for who, measured in self.measured.items()}
            found.append({"category": name, "rows": int((here & self.unseen).sum()), **losses})
        return found

    def _samples(self, answered: list[int]) -> list[dict[str, Any]]:
        first = next(iter(self.measured.values()))
        by_row = [
            {
                "prompt": first.asked[row],
                "expected": first.expected[row],
                **{name: found.answered[row] for name, found in self.measured.items()},
            }
            for row in answered[: self.settings.samples]
        ]
        own = [
            {
                "prompt": prompt,
                "expected": "",
                **{name: found.told[place] for name, found in self.measured.items()},
            }
            for place, prompt in enumerate(self.settings.prompts)
        ]
        return by_row + own


class _Timer:
    def __init__(self, seconds: dict[str, float], part: str) -> None:
        self.seconds, self.part = seconds, part

    def __enter__(self) -> None:
        self.began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.part] = time.monotonic() - self.began
