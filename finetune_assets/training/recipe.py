"""The training itself, from top to bottom."""

import math
import resource
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import get_scheduler

from finetune_assets.config.schema import ExperimentConfig, Training
from finetune_assets.config.validation import REWRITES_BASE
from finetune_assets.errors import UserError
from finetune_assets.training import checkpoint, output
from finetune_assets.training.batches import Examples, TrainOrder, collate, evaluation_batches, read_packs
from finetune_assets.training.distributed import Process
from finetune_assets.training.embeddings import check_begins_with_same, experiment_tokenizer, make_room
from finetune_assets.training.loss import learned_tokens, summed_loss
from finetune_assets.training.model import (
    ModelError,
    compute_precision,
    load_base,
    trainable,
    with_adapter,
)
from finetune_assets.training.reporting import Reporter, StepReport

PACKING_TOLERANCE = 0.1
"""Largest share by which a logit may differ packed and alone: far above 16-bit rounding, far below a leak."""


class TrainingDiverged(UserError):
    """The loss is no longer a number."""


class UnsupportedOptimizer(UserError):
    """An optimizer that this device cannot run."""


@dataclass(frozen=True)
class Job:
    """The folders of one training.

    Attributes:
        base_model: Weights and tokenizer.
        dataset: A tokenized dataset.
        output: Where the adapter goes; empty.
        checkpoints: Where checkpoints go and are looked for.
        made_from: Fingerprints and names of the inputs, for the provenance.
        warm_start: An adapter to begin from.
    """

    base_model: Path
    dataset: Path
    output: Path
    checkpoints: Path
    made_from: dict[str, Any]
    warm_start: Path | None = None


@dataclass
class Log:
    """What training remembers about itself; `trainer_state.json` and every checkpoint hold it."""

    step: int = 0
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    held_out_loss: dict[str, float | None] = field(default_factory=lambda: {"before": None, "after": None})
    trainable_parameters: int = 0
    peak_memory_mib: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        loss: This process's part of the mean loss; a scalar.
        tokens: Tokens that this process read, padding not counted.
        grad_norm: Global gradient norm before clipping; a scalar.
        learning_rate: What the step was taken with.
    """

    loss: Tensor
    tokens: int
    grad_norm: Tensor
    learning_rate: float


@dataclass
class Window:
    """What is counted from one report to the next.

    Attributes:
        loss: Sum of this process's part of the steps' mean losses.
        tokens: Tokens that this process read.
        steps: Steps done.
        began: When, on the monotonic clock.
    """

    loss: Tensor
    tokens: int = 0
    steps: int = 0
    began: float = field(default_factory=time.monotonic)


class LoraFinetune:
    """LoRA fine-tuning of a causal language model on one tokenized dataset.

    Supported: one to many processes on one or more nodes, each with the whole model; any global batch from any number
    of processes; packed and padded sequences; float32, mixed and 16-bit precision; int8 and nf4 bases; tokens that the
    base lacks; gradient checkpointing; resuming from a checkpoint; beginning from another adapter.
    Not supported: a base model that does not fit one device; bitsandbytes' optimizers without CUDA.

    Every number of processes and every micro-batch size computes the same gradient: the loss is a sum over the learned
    tokens of the global batch, divided by their number in it.
    """

    def __init__(self, job: Job, config: ExperimentConfig, process: Process, reporter: Reporter) -> None:
        self.job, self.config, self.process, self.reporter = job, config, process, reporter
        self.training = config.training
        self.train = Examples(job.dataset / "train.arrow")
        self.val = Examples(job.dataset / "val.arrow")
        packs = read_packs(job.dataset)
        self.sequences = packs or [[example] for example in range(len(self.train))]
        lengths = np.array([self.train.lengths[sequence].sum() for sequence in self.sequences])
        by_length = self.training.group_by_length and packs is None
        self.order = TrainOrder(lengths, self.training, by_length, process.world)
        self.log = Log(steps=self.order.steps)
        self._load_model()
        self._make_optimizer()

    def run(self) -> None:
        """Train, measure, and write the output folder."""
        self._resume()
        self._describe()
        self._check_packing()
        if self.reporter.wandb_run:
            self.reporter.wandb_run.watch(self.model)
        if self.log.held_out_loss["before"] is None:
            self.log.held_out_loss["before"] = self.held_out_loss()
        self._open_window()
        for step in range(self.log.step, self.order.steps):
            self._account(step + 1, self.train_step(step))
            self._save_checkpoint_if_due()
        self.log.held_out_loss["after"] = self.held_out_loss()
        self._check_finite()
        self._write_output()

    def train_step(self, step: int) -> Step:
        """One optimizer step over the global batch."""
        self.model.train()
        torch.manual_seed(hash((self.training.seed, step, self.process.rank)) % 2**63)
        batches = [
            collate([self.sequences[i] for i in micro], self.train, self.process.device)
            for micro in self.order.micro_batches(step, self.process.rank)
        ]
        learned = self.process.sum(torch.tensor(sum(map(learned_tokens, batches)), device=self.process.device))
        total = torch.zeros((), device=self.process.device)
        for batch in batches:
            with self._autocast():
                loss = summed_loss(self.model, batch) / learned
            self.scaler.scale(loss).backward()
            total += loss.detach()
        self.process.sum_gradients(self.parameters)
        self.scaler.unscale_(self.optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.training.max_grad_norm or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        learning_rate = self.scheduler.get_last_lr()[0]
        self.scheduler.step()
        return Step(total, sum(batch.tokens for batch in batches), grad_norm, learning_rate)

    @torch.inference_mode()
    def held_out_loss(self) -> float | None:
        """Mean cross-entropy in nats over the learned tokens of the validation split; None if the split is empty."""
        if not len(self.val):
            return None
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.process.device)
        shares = evaluation_batches(self.val, self.process.rank, self.process.world, self.training.micro_batch_size)
        for sequences in shares:
            batch = collate(sequences, self.val, self.process.device)
            with self._autocast():
                sums[0] += summed_loss(self.model, batch)
            sums[1] += learned_tokens(batch)
        loss, tokens = self.process.sum(sums).tolist()
        return loss / tokens

    def _load_model(self) -> None:
        base = load_base(self.job.base_model, self.config.model, self.training, self.process.device)
        self.new_tokens = make_room(base, experiment_tokenizer(self.job.base_model, self.config), self.config)
        if self.job.warm_start:
            check_begins_with_same(self.new_tokens, self.job.warm_start)
        self.model = with_adapter(base, self.config, self.job.warm_start, self.new_tokens.indices)
        self.parameters = trainable(self.model)
        self.process.share_weights(self.parameters)
        self.log.trainable_parameters = sum(parameter.numel() for parameter in self.parameters)
        self.initial_adapter = None
        scheme = self.config.lora.init_lora_weights
        if isinstance(scheme, str) and scheme.startswith(REWRITES_BASE) and not self.job.warm_start:
            self.model.peft_config["default"].init_lora_weights = True
            self.initial_adapter = self.job.checkpoints / "initial"
            if self.process.reports:
                self.model.save_pretrained(self.initial_adapter, save_embedding_layers=False)

    def _make_optimizer(self) -> None:
        self.precision = compute_precision(self.training, self.process.device)
        self.optimizer = make_optimizer(self.parameters, self.training, self.process.device)
        warmup = self.training.warmup_steps
        name = "constant_with_warmup" if self.training.lr_scheduler == "constant" else self.training.lr_scheduler
        self.scheduler = get_scheduler(
            name,
            self.optimizer,
            num_warmup_steps=round(warmup * self.order.steps) if warmup < 1 else int(warmup),
            num_training_steps=self.order.steps,
        )
        self.scaler = torch.amp.GradScaler(self.process.device.type, enabled=self.precision == "fp16")

    def _autocast(self) -> AbstractContextManager[None]:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return torch.autocast(self.process.device.type, dtype, enabled=dtype is not None)

    @property
    def _parts(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.scaler}

    def _resume(self) -> None:
        found = checkpoint.load_newest(self.job.checkpoints, self.model, self._parts, self.process.device)
        if found:
            self.log = Log(**found)
            self.reporter.say(f"going on from the checkpoint of step {self.log.step}")

    def _describe(self) -> None:
        self.reporter.say(
            f"{len(self.train):,} examples in {len(self.sequences):,} sequences, {self.order.steps:,} steps of "
            f"{self.training.macro_batch_size} on {self.process.world} x {self.process.device.type} in "
            f"{self.precision}; {self.log.trainable_parameters:,} trainable parameters"
        )
        if self.new_tokens.texts:
            self.reporter.say(self.new_tokens.describe())

    @torch.inference_mode()
    def _check_packing(self) -> None:
        """Compare examples packed and alone, because not every attention keeps those of one row apart.

        Raises:
            ModelError: if the packed ones see one another. The difference was 2 to 5 in logits where they did, and
                1e-6 in float32 where they did not.
        """
        rows = sorted(self.sequences, key=len)[-2:]
        if len(rows[-1]) < 2:
            return
        self.model.eval()
        packed = self._logits(rows)[-1, : self.train.lengths[rows[-1]].sum()]
        last = rows[-1][-1]
        alone = self._logits([[last]])[0]
        apart = (packed[-len(alone) :] - alone).abs().max() / alone.abs().max()
        if apart > PACKING_TOLERANCE:
            raise ModelError(
                f"data.tokenization.packing: with this model and model.attention {self.config.model.attention}, packed "
                f"examples see one another (logits differ by {apart:.0%}); set data.tokenization.packing to false"
            )

    def _logits(self, sequences: list[list[int]]) -> Tensor:
        batch = collate(sequences, self.train, self.process.device)
        with self._autocast():
            out = self.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
        return out.logits.float()

    def _open_window(self) -> None:
        self.window = Window(torch.zeros((), device=self.process.device))

    def _account(self, done: int, step: Step) -> None:
        """Count a step, and report where one is due."""
        self.log.step = done
        self.window.loss += step.loss
        self.window.tokens += step.tokens
        self.window.steps += 1
        last, every = done == self.order.steps, self.training.eval_steps
        evaluate = every is not None and done % every == 0 and not last
        saved = self._saves_at(done)  # a checkpoint holds what was counted up to it
        if evaluate or saved or last or done == 1 or done % self.training.logging_steps == 0:
            self._report(done, step, evaluate)
            self._open_window()

    def _report(self, done: int, step: Step, evaluate: bool) -> None:
        window = self.window
        sums = torch.stack([window.loss.double(), torch.tensor(float(window.tokens), device=window.loss.device)])
        loss, tokens = self.process.sum(sums).tolist()
        seconds = time.monotonic() - window.began
        mean = loss / window.steps
        if not math.isfinite(mean):
            raise TrainingDiverged(
                f"step {done}: the loss is {mean}, grad_norm {step.grad_norm:.3g}, training.learning_rate "
                f"{self.training.learning_rate:g}; lower the learning rate, lengthen training.warmup_steps, or set "
                "training.precision to fp32"
            )
        self.log.tokens += int(tokens)
        self.log.seconds += seconds
        report = StepReport(
            step=done,
            total=self.order.steps,
            loss=mean,
            grad_norm=float(step.grad_norm),
            learning_rate=step.learning_rate,
            tokens_per_second=tokens / seconds,
            eta_seconds=seconds / window.steps * (self.order.steps - done),
            held_out_loss=self.held_out_loss() if evaluate else None,
        )
        self.log.history.append(report.to_dict())
        self.reporter.step(report)

    def _check_finite(self) -> None:
        """Publish no adapter that the last steps destroyed."""
        after = self.log.held_out_loss["after"]
        if not (after is None or math.isfinite(after)) or not all(p.isfinite().all() for p in self.parameters):
            raise TrainingDiverged(
                f"the trained adapter is not finite (held-out loss {after}); lower training.learning_rate "
                f"({self.training.learning_rate:g}) or lengthen training.warmup_steps"
            )

    def _saves_at(self, done: int) -> bool:
        every = self.training.save_steps
        return every is not None and done % every == 0 and done < self.order.steps

    def _save_checkpoint_if_due(self) -> None:
        if self._saves_at(self.log.step):
            if self.process.reports:
                keep = self.training.save_total_limit
                checkpoint.save(self.job.checkpoints, self.model, self._parts, vars(self.log), keep)
            self.process.barrier()

    def _write_output(self) -> None:
        before, after = self.log.held_out_loss.values()
        if before is not None and after is not None:
            self.reporter.say(f"held-out loss {before:.4f} before, {after:.4f} after")
        self.log.peak_memory_mib = _peak_memory_mib(self.process.device)
        if self.process.reports:
            output.save(
                self.job.output,
                self.model,
                self.job.base_model,
                self.config,
                self.job.made_from,
                vars(self.log),
                self.initial_adapter,
                self.new_tokens.rows,
            )
        if self.reporter.wandb_run:
            self.reporter.wandb_run.log_adapter(self.job.output)


def make_optimizer(
    parameters: list[torch.nn.Parameter], training: Training, device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer that the settings name.

    Raises:
        UnsupportedOptimizer: for an 8-bit one without CUDA.
    """
    kwargs: dict[str, Any] = {"lr": training.learning_rate, "weight_decay": training.weight_decay}
    if training.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **kwargs)
    if device.type != "cuda":
        raise UnsupportedOptimizer(f"training.optimizer: {training.optimizer} needs CUDA; use adamw here")
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    return {"adamw_8bit": AdamW8bit, "paged_adamw_8bit": PagedAdamW8bit}[training.optimizer](parameters, **kwargs)


def _peak_memory_mib(device: torch.device) -> int:
    """Of this process: of its GPU where it has one, else resident memory (ru_maxrss is in KiB on Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
