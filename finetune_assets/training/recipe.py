"""The training loop, from start to finish."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from finetune_assets.artifacts.layout import REFERENCE_LOG_PROBS, UTILISATION
from finetune_assets.config.schema import ExperimentConfig
from finetune_assets.errors import UserError
from finetune_assets.progress import ROWS, Progress
from finetune_assets.training import checkpoint, divergence, memory, output
from finetune_assets.training.batches import collate
from finetune_assets.training.best_step import BestStep, Selection, describe_saved, published
from finetune_assets.training.distributed import DistributedContext
from finetune_assets.training.judged_objective import JudgedObjective
from finetune_assets.training.optimizer import make_optimizer, make_scheduler
from finetune_assets.training.order import GlobalBatchSampler, evaluation_batches
from finetune_assets.training.preference import judged_metrics
from finetune_assets.training.reporting import Reporter, StepReport
from finetune_assets.training.setup import TrainingSetup
from finetune_assets.training.state import MetricWindow, Step, StepBatches, TrainerState, TrainingPaths
from finetune_assets.training.telemetry import Utilisation, peak_memory_mib


class Preempted(UserError):
    """The training was preempted by SIGTERM; a checkpoint was saved."""

    retriable = True


class LoraFinetune(TrainingSetup):
    """LoRA fine-tuning of a causal language model on one tokenized dataset.

    Supported: one or more processes on one or more nodes, each with the whole base model or a shard of it; any global
    batch size with any number of processes; concatenated examples without padding, or padded rows; float32, mixed and
    16-bit precision; int8 and nf4 base models; tokens that the base model lacks; gradient checkpointing; resuming from
    a checkpoint, including one saved on SIGTERM; warm start from another adapter; pairs of answers (DPO) and labelled
    answers (KTO), compared with the base model or the champion, beside instruction rows.
    Not supported: tensor or pipeline parallelism; one example split across several GPUs; bitsandbytes' optimizers
    without CUDA.

    The gradient is the same for every number of processes and every micro-batch size: the loss is a sum over the target
    tokens of the global batch, divided by their number.
    """

    def __init__(
        self, job: TrainingPaths, config: ExperimentConfig, process: DistributedContext, reporter: Reporter
    ) -> None:
        super().__init__(job, config, process)
        self.reporter, self.utilisation = reporter, Utilisation()
        self.stop_requested = threading.Event()
        self.stalled = torch.zeros((), device=process.device)
        self.stopping = False
        self._set_up_optimization()

    def run(self) -> None:
        """Train, evaluate, and write the output folder."""
        with memory.explained(self.config, self.process.device, lambda: self.estimate):
            reference = self.objective.prepare_reference() if self.objective else ""
        self._resume()
        self._describe()
        if reference:
            self.reporter.write_line(reference)
        with memory.explained(self.config, self.process.device, lambda: self.estimate):
            if self.log.held_out_loss["before"] is None:
                self.log.held_out_loss["before"] = self.held_out_loss("before")
            if not self.has_stopped:
                self._train()
            if self.selection.keeps_best and self.best:
                self._restore_best(self.best)
            else:
                self.log.held_out_loss["after"] = self.held_out_loss("after")
        divergence.check_finite(self.log.held_out_loss["after"], self.parameters, self.training)
        self._write_output()

    # ---- set-up

    def _set_up_optimization(self) -> None:
        by_length = self.training.group_by_length and not self.packed
        self.budget = self.training.micro_batch_size * self.longest if self.flat else None
        self.order = GlobalBatchSampler(self.lengths, self.training, by_length, self.process.world, self.budget)
        self.objective = JudgedObjective(self, self.budget) if self.judged else None
        self.log.steps = self.order.steps
        self.optimizer = make_optimizer(self.parameters, self.training, self.process.device)
        self.scheduler = make_scheduler(self.optimizer, self.training, self.order.steps)
        self.selection = Selection.of(self.training, int(self.val.lengths.sum()), self.lengths)
        self.best_weights: dict[str, Tensor] = {}
        self.scaler = torch.amp.GradScaler(self.process.device.type, enabled=self.precision == "fp16")

    @property
    def _parts(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.scaler}

    def _resume(self) -> None:
        restored = checkpoint.load_newest(self.job.checkpoints, self.model, self._parts, self.process)
        if restored:
            self.log = TrainerState(**{**restored.log, "active": self.log.active})
            self.best_weights = restored.best
            self.reporter.write_line(f"Resuming from checkpoint at step {self.log.step}")

    def _describe(self) -> None:
        self.reporter.write_line(
            f"{len(self.train):,} examples in {len(self.sequences):,} sequences, {self.order.steps:,} steps of "
            f"{self.training.macro_batch_size} on {self.process.world} x {self.process.device.type} in "
            f"{self.precision}; {self.log.trainable_parameters:,} trainable parameters"
        )
        details = ("mfu", "auto_types")
        active = {name: value for name, value in self.log.active.items() if value and name not in details}
        self.reporter.write_line(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in active.items()))
        if self.estimate:
            self.reporter.write_line(self.estimate.describe())
        if self.new_tokens.texts:
            self.reporter.write_line(self.new_tokens.describe())

    # ---- training

    def _train(self) -> None:
        self._open_window()
        previous_handler = None
        if _in_main_thread():
            previous_handler = signal.signal(signal.SIGTERM, lambda *_: self.stop_requested.set())
        try:
            with (
                self.utilisation.sampling(self.process.device),
                self.reporter.training(self.log.step, self.order.steps) as progress,
            ):
                for step, work in self._work():
                    done = self.train_step(step, work)
                    progress.reach(step + 1)
                    self._account(step + 1, done)
                    self._save_checkpoint_if_due()
                    if self.has_stopped:
                        break
        finally:
            if previous_handler is not None:
                signal.signal(signal.SIGTERM, previous_handler)

    @property
    def best(self) -> BestStep | None:
        """The best evaluation so far."""
        return BestStep(**self.log.best) if self.log.best else None

    @property
    def has_stopped(self) -> bool:
        """Whether the training has stopped early."""
        return bool(self.best and self.best.saved_steps)

    def _count_evaluation(self, step: int, loss: float) -> None:
        """Keep the adapter if its held-out loss is the lowest so far, and stop if patience is exhausted."""
        best = self.selection.counted(self.best, step, loss)
        if best.step == step and self.selection.keeps_best and self.process.writes:
            weights = checkpoint.weights_of(self.model)
            self.best_weights = {name: weight.detach().to("cpu", copy=True) for name, weight in weights.items()}
        if self.selection.stops(best):
            best.saved_steps = self.order.steps - step
        self.log.best = vars(best)

    def _restore_best(self, best: BestStep) -> None:
        """Replace the adapter by that of the best step."""
        self.log.held_out_loss["after"] = best.held_out_loss
        if self.process.writes and best.step != self.log.step:
            checkpoint.set_weights(self.model, self.best_weights, self.process.device)

    def _work(self) -> Iterator[tuple[int, StepBatches]]:
        """Iterate over the remaining steps; each is prepared while the previous one is computed."""
        steps = range(self.log.step, self.order.steps)
        with ThreadPoolExecutor(1, "batches") as executor:
            next_work = executor.submit(self.work, steps.start)
            for step in steps:
                work = next_work.result()
                if step + 1 < steps.stop:
                    next_work = executor.submit(self.work, step + 1)
                yield step, work

    def work(self, step: int) -> StepBatches:
        """Prepare the micro-batches of this process for a step."""
        micro_batches = self.order.micro_batches(step, self.process.rank)
        batches = [self.batch([self.sequences[i] for i in micro_batch]) for micro_batch in micro_batches]
        idle = []
        if self.sharded:
            most = max(len(self.order.micro_batches(step, rank)) for rank in range(self.process.world))
            idle = [self.batch(self.sequences[:1])] * (most - len(micro_batches))
        everything = self.order.global_batch(step)
        mismatched = self.objective.work(micro_batches, len(idle)) if self.objective else []
        judged = int(self.judged_counts[everything].sum())
        return StepBatches(batches, idle, int(self.learned[everything].sum()), judged, mismatched)

    def train_step(self, step: int, work: StepBatches) -> Step:
        """Run an optimizer step over the global batch."""
        self.model.train()
        torch.manual_seed(hash((self.training.seed, step, self.process.rank)) % 2**63)
        total = torch.zeros((), device=self.process.device)
        for loss in self.objective.losses(work) if self.objective else self._losses(work):
            self.scaler.scale(loss).backward()
            total += loss.detach()
        self.process.sum_gradients(self.parameters)
        self.scaler.unscale_(self.optimizer)
        for tracker in self.reporter.trackers.values():
            trained = ((name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad)
            tracker.watch(step + 1, trained)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.training.max_grad_norm or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        learning_rate = float(self.scheduler.get_last_lr()[0])
        self.scheduler.step()
        judged = self.objective.sums if self.objective else None
        return Step(total, sum(batch.tokens for batch in work.batches), grad_norm, learning_rate, judged)

    def _losses(self, work: StepBatches) -> Iterator[Tensor]:
        """The share of each micro-batch in the loss of a step."""
        shares = [1 / max(1, work.learned)] * len(work.batches) + [0.0] * len(work.idle)
        for batch, share in zip([*work.batches, *work.idle], shares, strict=True):
            yield self._loss(batch) * share

    @torch.no_grad()  # not inference mode: FSDP reuses tensors gathered in it in the following steps
    def held_out_loss(self, when: str = "after") -> float | None:
        """Mean cross-entropy in nats per target token of the validation split; None if the split is empty.

        With judged answers, it is the loss of the training's objective.

        Args:
            when: Key of the metrics of judged answers in the log.
        """
        if not len(self.val):
            return None
        if self.objective:
            loss, self.log.held_out_preference[when] = self.objective.held_out_loss()
            return loss
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.process.device)
        shares = evaluation_batches(self.val, self.process.world, self.training.micro_batch_size, self.budget)
        batches = shares[self.process.rank]
        with Progress("held-out loss", sum(map(len, batches)), ROWS) as progress:
            for sequences in batches:
                batch = collate(sequences, self.val, self.process.device, self.flat)
                sums[0] += self._loss(batch)
                sums[1] += len(batch.targets)
                progress.add(len(sequences))
        for _ in range(max(map(len, shares)) - len(batches) if self.sharded else 0):
            self._loss(self.batch(self.sequences[:1]))
        summed_loss, tokens = self.process.sum(sums).tolist()
        return float(summed_loss / tokens)

    # ---- reporting and output

    def _selection_line(self, best: BestStep, numbers: dict[str, float]) -> str:
        reason = ": lowest held-out loss" if best.is_published else ""
        line = f"Publishing the adapter of step {numbers['published_step']} of {self.log.step}{reason}"
        if best.saved_steps:
            line += (
                f". Stopped early at step {self.log.step} of {self.order.steps}: no improvement in "
                f"{best.without_improvement} measurements; {describe_saved(numbers)} saved"
            )
        return line

    def _measure_during(self, done: int) -> float | None:
        """Measure the held-out loss between steps. After the last step, its time is not counted: it is always due."""
        began = time.monotonic()
        loss = self.held_out_loss()
        if done < self.order.steps:
            self.log.evaluation_seconds += time.monotonic() - began
        return loss

    def _open_window(self) -> None:
        self.window = MetricWindow(torch.zeros((), device=self.process.device))

    def _account(self, done: int, step: Step) -> None:
        """Add a step to the window, and report if a report is due."""
        self.log.step = self.utilisation.step = done
        self.window.loss += step.loss
        self.window.tokens += step.tokens
        self.window.steps += 1
        if step.judged is not None:
            self.window.judged = step.judged + (0 if self.window.judged is None else self.window.judged)
        self.stalled = (self.stalled + 1) * (step.grad_norm == 0)
        last, evaluate = done == self.order.steps, self.selection.is_due(done, self.order.steps)
        self.stopping = self.process.any(self.stop_requested.is_set()) and not last
        # report before a checkpoint, because it contains the counts up to its step
        due = done == 1 or done % self.training.logging_steps == 0 or self._saves_at(done)
        if due or evaluate or last or self.stopping:
            self._report(done, step, evaluate)
            self._open_window()

    def _report(self, done: int, step: Step, evaluate: bool) -> None:
        window = self.window
        sums = torch.stack([window.loss.double(), torch.tensor(float(window.tokens), device=window.loss.device)])
        loss, tokens = self.process.sum(sums).tolist()
        seconds = time.monotonic() - window.began
        mean = loss / window.steps
        divergence.check_learning(done, mean, float(step.grad_norm), int(self.stalled), self.training)
        self.log.tokens += int(tokens)
        self.log.seconds += seconds
        per_process = tokens / seconds / self.process.world
        report = StepReport(
            step=done,
            total=self.order.steps,
            loss=mean,
            grad_norm=float(step.grad_norm),
            learning_rate=step.learning_rate,
            tokens_per_second=tokens / seconds,
            mfu=4 * self.multiplied_weights * per_process / self.peak_flops,
            peak_memory_mib=peak_memory_mib(self.process.device),
            eta_seconds=seconds / window.steps * (self.order.steps - done),
            held_out_loss=self._measure_during(done) if evaluate else None,
            **({} if window.judged is None else judged_metrics(self.process.sum(window.judged))),
        )
        self.log.history.append(report.to_dict())
        self.reporter.step(report)
        if report.held_out_loss is not None:
            self._count_evaluation(done, report.held_out_loss)

    def _saves_at(self, done: int) -> bool:
        every = self.training.save_steps
        return every is not None and done % every == 0 and done < self.order.steps

    def _save_checkpoint_if_due(self) -> None:
        if not self.stopping and not self._saves_at(self.log.step):
            return
        if self.process.writes:
            keep = self.training.save_total_limit
            log = vars(self.log)
            checkpoint.save(self.job.checkpoints, self.model, self._parts, log, keep, self.best_weights)
        self.process.barrier()
        if self.stopping:
            step = f"{self.log.step}/{self.order.steps}"
            raise Preempted(f"Preempted (SIGTERM) at step {step}; checkpoint saved, the next run resumes")

    def _write_output(self) -> None:
        before, after = self.log.held_out_loss.values()
        if before is not None and after is not None:
            self.reporter.write_line(f"held-out loss {before:.4f} before, {after:.4f} after")
        choice = published(vars(self.log), self.config.hardware.price_per_hour)
        if self.best and (self.best.is_published or self.best.saved_steps):
            self.reporter.write_line(self._selection_line(self.best, choice))
        self.log.peak_memory_mib = peak_memory_mib(self.process.device)
        links = {name: link for name, tracker in self.reporter.trackers.items() if (link := tracker.link())}
        state = {**vars(self.log), **self.process.share(links)}
        if self.process.writes:
            self.utilisation.write(self.job.output / UTILISATION)  # before the checksums are written
            if self.objective:
                (self.job.output / REFERENCE_LOG_PROBS).write_bytes(self.objective.serialized_reference())
            output.save(
                self.job.output,
                self.model,
                self.job.base_model,
                self.config,
                self.job.made_from,
                state,
                self.initial_adapter,
                self.new_tokens.rows,
                self.job.own_code,
            )
        numbers = {**{name: state[name] for name in ("steps", "tokens", "seconds", "peak_memory_mib")}, **choice}
        losses = {f"held_out_loss_{when}": loss for when, loss in self.log.held_out_loss.items()}
        for tracker in self.reporter.trackers.values():
            tracker.summarize({**numbers, **losses})
            tracker.log_adapter(self.job.output, {"fingerprint": self.job.made_from["fingerprint"], **losses})


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
