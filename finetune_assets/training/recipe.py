"""The training itself, from top to bottom."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune_assets.config.schema import ExperimentConfig
from finetune_assets.config.validation import REWRITES_BASE
from finetune_assets.errors import UserError
from finetune_assets.training import checkpoint, memory, output
from finetune_assets.training.attention import settle
from finetune_assets.training.batches import Batch, Examples, TrainOrder, collate, evaluation_batches, read_packs
from finetune_assets.training.distributed import Process
from finetune_assets.training.embeddings import check_begins_with_same, experiment_tokenizer, make_room
from finetune_assets.training.lora import speed_up
from finetune_assets.training.loss import SummedLoss
from finetune_assets.training.model import compute_precision, layers_of, load_base, trainable, with_adapter
from finetune_assets.training.optimizer import make_optimizer, make_scheduler
from finetune_assets.training.reporting import Reporter, StepReport
from finetune_assets.training.sharding import resident_bytes, shard
from finetune_assets.training.state import Job, Log, Step, Window, Work
from finetune_assets.training.telemetry import (
    CONVENTION,
    Utilisation,
    multiplied_weights,
    peak_flops,
    peak_memory_mib,
)

STALLED_AFTER = 20
"""Steps in a row without any gradient, after which training is ended: nothing is learned."""


class TrainingDiverged(UserError):
    """The loss is no longer a number."""


class TrainingStalled(UserError):
    """There has been no gradient for many steps."""


class Preempted(UserError):
    """Asked by SIGTERM to end; a checkpoint was kept."""

    retriable = True


class LoraFinetune:
    """LoRA fine-tuning of a causal language model on one tokenized dataset.

    Supported: one to many processes on one or more nodes, each with the whole base model or, sharded, a part of it; any
    global batch from any number of processes; examples end to end without padding, or padded rows; float32, mixed and
    16-bit precision; int8 and nf4 bases; tokens that the base lacks; gradient checkpointing; resuming from a
    checkpoint, also one written on SIGTERM; beginning from another adapter.
    Not supported: tensor or pipeline parallelism; one example spread over several GPUs; bitsandbytes' optimizers
    without CUDA.

    Every number of processes and every micro-batch size computes the same gradient: the loss is a sum over the learned
    tokens of the global batch, divided by their number in it.
    """

    def __init__(self, job: Job, config: ExperimentConfig, process: Process, reporter: Reporter) -> None:
        self.job, self.config, self.process, self.reporter = job, config, process, reporter
        self.training, self.log = config.training, Log()
        self.precision = compute_precision(config.training, process.device)
        self.sharded = config.training.sharding == "fsdp" and process.world > 1
        self.estimate: memory.Estimate | None = None
        self.utilisation = Utilisation()
        self.told_to_stop = threading.Event()
        self.stalled = torch.zeros((), device=process.device)
        self.stopping = False
        with memory.explained(config, process.device, lambda: self.estimate):
            self._load_data()
            self._load_model()
            self._settle_how_to_compute()
            self._set_up_optimization()

    def run(self) -> None:
        """Train, measure, and write the output folder."""
        self._resume()
        self._describe()
        if self.reporter.wandb_run:
            self.reporter.wandb_run.watch(self.model)
        with memory.explained(self.config, self.process.device, lambda: self.estimate):
            if self.log.held_out_loss["before"] is None:
                self.log.held_out_loss["before"] = self.held_out_loss()
            self._train()
            self.log.held_out_loss["after"] = self.held_out_loss()
        self._check_finite()
        self._write_output()

    # ---- set-up

    def _load_data(self) -> None:
        self.train, self.val = (Examples(self.job.dataset / name) for name in ("train.arrow", "val.arrow"))
        packs = read_packs(self.job.dataset)
        self.sequences = packs or [[example] for example in range(len(self.train))]
        self.lengths = np.array([self.train.lengths[sequence].sum() for sequence in self.sequences])
        self.learned = np.array([self.train.learned[sequence].sum() for sequence in self.sequences])
        self.packed = packs is not None
        tokens = self.config.data.tokenization
        self.longest = (tokens.packing_length if packs else None) or tokens.cutoff_len

    def _load_model(self) -> None:
        # One that is to be spread over GPUs may fit none of them
        where = (
            torch.device("cpu") if self.sharded and self.config.model.quantization == "none" else self.process.device
        )
        base = load_base(self.job.base_model, self.config.model, self.training, where)
        self.multiplied_weights = multiplied_weights(base)
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

    def _settle_how_to_compute(self) -> None:
        """Decide what settings leave open, and keep a note of it."""
        fused = speed_up(self.model)
        self.summed_loss = SummedLoss(self.model)
        layers = layers_of(self.summed_loss.decoder)
        if self.sharded:
            shard(self.summed_loss, layers, self.parameters, self.process)
        self.flat = settle(self.model, self.config.model.attention, self.train, self._logits, self.packed)
        self.model.eval()
        with self._autocast():
            self.summed_loss.check(self._batch(self.sequences[:1]))
        checkpointing = self._settle_checkpointing()
        if self.training.compile:
            for layer in layers:
                layer.compile(dynamic=True)
        self.peak_flops, source = peak_flops(self.process.device, self.precision)
        self.log.active = {
            "attention": self.model.get_base_model().config._attn_implementation,
            "padding": not self.flat,
            "loss": self.summed_loss.way,
            "precision": self.precision,
            "weights": str(self.model.get_base_model().dtype).removeprefix("torch."),
            "quantization": self.config.model.quantization,
            "gradient_checkpointing": checkpointing,
            "fused_lora_layers": fused,
            "compiled_layers": len(layers) if self.training.compile else 0,
            "sharding": self.training.sharding if self.sharded else "none",
            "weights_mib": round(resident_bytes(self.model) / 2**20, 1),
            "processes": self.process.world,
            "mfu": CONVENTION.format(peak=source),
        }

    def _settle_checkpointing(self) -> bool:
        """Whether activations are computed twice: as the settings say, or where what they take does not fit."""
        base, wanted = self.model.get_base_model(), self.training.gradient_checkpointing
        median = self.sequences[np.argsort(self.lengths)[len(self.lengths) // 2]]
        batches = self._batch([median]), self._batch([median, median])
        tokens = self.training.micro_batch_size * self.longest
        sharing = self.process.local_world if self.process.device.type == "cpu" else 1
        self.model.train()

        def estimate() -> memory.Estimate:
            return memory.estimate(self._loss, batches, tokens, self.model, self.process.device, sharing)

        self.estimate = estimate()
        checkpointing = not self.estimate.fits if wanted is None else wanted
        if self.process.any(checkpointing):
            checkpointing = True
            base.gradient_checkpointing_enable({"use_reentrant": False})
            base.enable_input_require_grads()
            self.estimate = estimate()
        self.estimate = self.estimate.told(checkpointing)
        return checkpointing

    def _set_up_optimization(self) -> None:
        by_length = self.training.group_by_length and not self.packed
        self.budget = self.training.micro_batch_size * self.longest if self.flat else None
        self.order = TrainOrder(self.lengths, self.training, by_length, self.process.world, self.budget)
        self.log.steps = self.order.steps
        self.optimizer = make_optimizer(self.parameters, self.training, self.process.device)
        self.scheduler = make_scheduler(self.optimizer, self.training, self.order.steps)
        self.scaler = torch.amp.GradScaler(self.process.device.type, enabled=self.precision == "fp16")

    def _autocast(self) -> AbstractContextManager[None]:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return torch.autocast(self.process.device.type, dtype, enabled=dtype is not None)

    def _loss(self, batch: Batch) -> Tensor:
        with self._autocast():
            return self.summed_loss(batch)

    def _logits(self, sequences: list[list[int]], flat: bool) -> Tensor:
        batch = collate(sequences, self.train, self.process.device, flat)
        with self._autocast():
            return self.summed_loss.logits(batch)[0].float()

    @property
    def _parts(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.scaler}

    def _resume(self) -> None:
        found = checkpoint.load_newest(self.job.checkpoints, self.model, self._parts, self.process.device)
        if found:
            self.log = Log(**{**found, "active": self.log.active})
            self.reporter.say(f"going on from the checkpoint of step {self.log.step}")

    def _describe(self) -> None:
        self.reporter.say(
            f"{len(self.train):,} examples in {len(self.sequences):,} sequences, {self.order.steps:,} steps of "
            f"{self.training.macro_batch_size} on {self.process.world} x {self.process.device.type} in "
            f"{self.precision}; {self.log.trainable_parameters:,} trainable parameters"
        )
        active = {name: value for name, value in self.log.active.items() if value and name != "mfu"}
        self.reporter.say(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in active.items()))
        if self.estimate:
            self.reporter.say(self.estimate.describe())
        if self.new_tokens.texts:
            self.reporter.say(self.new_tokens.describe())

    # ---- training

    def _train(self) -> None:
        self._open_window()
        usual = signal.signal(signal.SIGTERM, lambda *_: self.told_to_stop.set()) if _in_main_thread() else None
        try:
            with self.utilisation.sampling(self.process.device):
                for step, work in self._work():
                    self._account(step + 1, self.train_step(step, work))
                    self._save_checkpoint_if_due()
        finally:
            if usual is not None:
                signal.signal(signal.SIGTERM, usual)

    def _work(self) -> Iterator[tuple[int, Work]]:
        """The steps that are left, each made ready while the one before is computed."""
        steps = range(self.log.step, self.order.steps)
        with ThreadPoolExecutor(1, "batches") as ahead:
            coming = ahead.submit(self.work, steps.start)
            for step in steps:
                work = coming.result()
                if step + 1 < steps.stop:
                    coming = ahead.submit(self.work, step + 1)
                yield step, work

    def work(self, step: int) -> Work:
        """This process's share of a step."""
        mine = self.order.micro_batches(step, self.process.rank)
        batches = [self._batch([self.sequences[i] for i in micro]) for micro in mine]
        idle = []
        if self.sharded:
            most = max(len(self.order.micro_batches(step, rank)) for rank in range(self.process.world))
            idle = [self._batch(self.sequences[:1])] * (most - len(mine))
        return Work(batches, idle, int(self.learned[self.order.global_batch(step)].sum()))

    def _batch(self, sequences: list[list[int]]) -> Batch:
        return collate(sequences, self.train, self.process.device, self.flat)

    def train_step(self, step: int, work: Work) -> Step:
        """One optimizer step over the global batch."""
        self.model.train()
        torch.manual_seed(hash((self.training.seed, step, self.process.rank)) % 2**63)
        total = torch.zeros((), device=self.process.device)
        shares = [1 / max(1, work.learned)] * len(work.batches) + [0.0] * len(work.idle)
        for batch, share in zip([*work.batches, *work.idle], shares, strict=True):
            loss = self._loss(batch) * share
            self.scaler.scale(loss).backward()
            total += loss.detach()
        self.process.sum_gradients(self.parameters)
        self.scaler.unscale_(self.optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.training.max_grad_norm or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        learning_rate = float(self.scheduler.get_last_lr()[0])
        self.scheduler.step()
        return Step(total, sum(batch.tokens for batch in work.batches), grad_norm, learning_rate)

    @torch.no_grad()  # not inference mode: FSDP keeps what it gathers in it for the steps that follow
    def held_out_loss(self) -> float | None:
        """Mean cross-entropy in nats over the learned tokens of the validation split; None if the split is empty."""
        if not len(self.val):
            return None
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.process.device)
        shares = evaluation_batches(self.val, self.process.world, self.training.micro_batch_size, self.budget)
        mine = shares[self.process.rank]
        for sequences in mine:
            batch = collate(sequences, self.val, self.process.device, self.flat)
            sums[0] += self._loss(batch)
            sums[1] += len(batch.targets)
        for _ in range(max(map(len, shares)) - len(mine) if self.sharded else 0):
            self._loss(self._batch(self.sequences[:1]))
        loss, tokens = self.process.sum(sums).tolist()
        return loss / tokens

    # ---- telling and keeping

    def _open_window(self) -> None:
        self.window = Window(torch.zeros((), device=self.process.device))

    def _account(self, done: int, step: Step) -> None:
        """Count a step, and report where one is due."""
        self.log.step = self.utilisation.step = done
        self.window.loss += step.loss
        self.window.tokens += step.tokens
        self.window.steps += 1
        self.stalled = (self.stalled + 1) * (step.grad_norm == 0)
        last, every = done == self.order.steps, self.training.eval_steps
        evaluate = every is not None and done % every == 0 and not last
        self.stopping = self.process.any(self.told_to_stop.is_set()) and not last
        # a checkpoint holds what was counted up to it
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
        self._check_learning(done, mean, step)
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
            held_out_loss=self.held_out_loss() if evaluate else None,
        )
        self.log.history.append(report.to_dict())
        self.reporter.step(report)

    def _check_learning(self, done: int, loss: float, step: Step) -> None:
        if not math.isfinite(loss):
            raise TrainingDiverged(
                f"step {done}: the loss is {loss}, grad_norm {step.grad_norm:.3g}, training.learning_rate "
                f"{self.training.learning_rate:g}; lower the learning rate, lengthen training.warmup_steps, or set "
                "training.precision to fp32"
            )
        if self.stalled >= STALLED_AFTER:
            raise TrainingStalled(
                f"step {done}: grad_norm has been 0 for {int(self.stalled)} steps, so nothing is learned; see whether "
                "any token is learned (data.tokenization.cutoff_len, train_on_inputs), or lower training.learning_rate "
                f"({self.training.learning_rate:g})"
            )

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
        if not self.stopping and not self._saves_at(self.log.step):
            return
        if self.process.reports:
            keep = self.training.save_total_limit
            checkpoint.save(self.job.checkpoints, self.model, self._parts, vars(self.log), keep)
        self.process.barrier()
        if self.stopping:
            raise Preempted(
                f"asked to end (SIGTERM) at step {self.log.step} of {self.order.steps}; a checkpoint is kept, from "
                "which the next run of this asset goes on"
            )

    def _write_output(self) -> None:
        before, after = self.log.held_out_loss.values()
        if before is not None and after is not None:
            self.reporter.say(f"held-out loss {before:.4f} before, {after:.4f} after")
        self.log.peak_memory_mib = peak_memory_mib(self.process.device)
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
            self.utilisation.write(self.job.output / output.UTILISATION)
        if self.reporter.wandb_run:
            self.reporter.wandb_run.log_adapter(self.job.output)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
