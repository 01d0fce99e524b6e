"""Set-up of a training before its first step: data, model, loss and compute options."""

from contextlib import AbstractContextManager
from functools import partial

import numpy as np
import torch
from torch import Tensor

from finetune_assets.config.schema import ExperimentConfig
from finetune_assets.config.validation import REWRITES_BASE
from finetune_assets.data.learning import Learning
from finetune_assets.data.packing import sequences_of
from finetune_assets.training import checkpoint, memory
from finetune_assets.training.attention import select_attention
from finetune_assets.training.batches import Batch, collate, shortest_batch
from finetune_assets.training.distributed import DistributedContext
from finetune_assets.training.embeddings import check_begins_with_same, experiment_tokenizer, resize_embeddings
from finetune_assets.training.judged import JudgedExamples
from finetune_assets.training.kernels import require_kernels, use_kernels
from finetune_assets.training.lora import use_fused_lora
from finetune_assets.training.loss import SummedLoss
from finetune_assets.training.model import autocast, layers_of, load_base, trainable, with_adapter
from finetune_assets.training.order import Examples, read_packs
from finetune_assets.training.precision import AutoTypes, auto_types, compute_precision, product_shape_of
from finetune_assets.training.sharding import resident_bytes, shard
from finetune_assets.training.state import TrainerState, TrainingPaths
from finetune_assets.training.telemetry import CONVENTION, hardware_name, multiplied_weights, peak_flops


def select_types(job: TrainingPaths, config: ExperimentConfig, process: DistributedContext) -> AutoTypes:
    """Decide what `auto` selects, alike in all processes.

    A resumed training keeps what its checkpoint was computed with, also on another machine; otherwise rank 0 decides.
    """
    if active := checkpoint.newest_log(job.checkpoints, process).get("active"):
        types = AutoTypes.recorded(config.training, active)
        types.warn_if_emulated(process.device)
        return types
    types = AutoTypes(False)
    if process.reports:
        shape = partial(product_shape_of, job.base_model, job.own_code)
        types = auto_types(config.model, config.training, process.device, shape)
    return AutoTypes(**process.share(types.to_dict()))


class TrainingSetup:
    """Loads the examples and the model with its adapter, and resolves the settings with automatic values.

    Attributes:
        sequences: Train examples of each sequence.
        lengths: Length of each sequence, in tokens.
        learned: Number of target tokens of each sequence, judged answers excluded.
        judged: Judged answers of the training and the validation split; empty with `sft`.
        judged_counts: Number of judged answers (pairs, with `dpo`) of each sequence.
        auto_types: What the setting `auto` selects for weights and precision.
        model: Base model with the adapter.
        parameters: Trainable parameters.
        summed_loss: Training loss of the model.
        flat: Whether a batch is one row with boundaries.
        log: Training log; `active` contains the resolved values.
    """

    def __init__(self, job: TrainingPaths, config: ExperimentConfig, process: DistributedContext) -> None:
        self.job, self.config, self.process = job, config, process
        self.training, self.log = config.training, TrainerState()
        self.auto_types = select_types(job, config, process)
        self.precision = compute_precision(config.training, self.auto_types.bf16)
        self.sharded = config.training.sharding == "fsdp" and process.world > 1
        self.estimate: memory.Estimate | None = None
        require_kernels(config, process.device)
        with memory.explained(config, process.device, lambda: self.estimate):
            self._load_data()
            self._load_model()
            self._configure_computation()

    def _load_data(self) -> None:
        self.train, self.val = (Examples.read(self.job.dataset / name) for name in ("train.arrow", "val.arrow"))
        packs, learning = read_packs(self.job.dataset), Learning.of(self.training)
        self.sequences = packs or sequences_of(self.train.table["row"], learning.pairs)
        self.val_sequences = sequences_of(self.val.table["row"], learning.pairs)
        self.lengths = np.array([self.train.lengths[sequence].sum() for sequence in self.sequences])
        self.learned = np.array([self.train.learned[sequence].sum() for sequence in self.sequences])
        self.packed = packs is not None
        tokens = self.config.data.tokenization
        self.longest = learning.sequence_tokens(tokens, self.packed)
        self.judged: list[JudgedExamples] = []
        self.judged_counts = np.zeros(len(self.sequences), np.int64)
        if learning.judged:
            splits = self.train, self.val
            self.judged = [JudgedExamples(split, self.training, tokens.cutoff_len) for split in splits]
            self.judged_counts, self.learned = self.judged[0].numbers(self.sequences)

    def _load_model(self) -> None:
        # A model that will be sharded may be too large for a single GPU
        where = (
            torch.device("cpu") if self.sharded and self.config.model.quantization == "none" else self.process.device
        )
        base = load_base(
            self.job.base_model, self.config.model, self.training, where, self.job.own_code, self.auto_types.bf16
        )
        self.multiplied_weights = multiplied_weights(base)
        tokenizer = experiment_tokenizer(self.job.base_model, self.config, self.job.own_code)
        self.new_tokens = resize_embeddings(base, tokenizer, self.config)
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
            if self.process.writes:
                self.model.save_pretrained(self.initial_adapter, save_embedding_layers=False)

    def _configure_computation(self) -> None:
        """Resolve the settings with automatic values, and record the result in `log.active`."""
        fused = use_fused_lora(self.model)
        self.summed_loss = SummedLoss(self.model)
        layers = layers_of(self.summed_loss.decoder)
        if self.sharded:
            shard(self.summed_loss, layers, self.parameters, self.process)
        replaced = use_kernels(self.model, self.config, self._shortest_outputs)
        self.flat = select_attention(self.model, self.config.model.attention, self.train, self._logits, self.packed)
        self.model.eval()
        with self._autocast():
            self.summed_loss.check(shortest_batch(self.train, self.process.device, self.flat))
        checkpointing = self._select_checkpointing()
        if self.training.compile:
            for layer in layers:
                layer.compile(dynamic=True)
        self.peak_flops, source = peak_flops(self.process.device, self.precision)
        self.log.active = {
            "attention": self.model.get_base_model().config._attn_implementation,
            "padding": not self.flat,
            "loss": self.summed_loss.way,
            "precision": self.precision,
            "auto_types": self.auto_types.to_dict(),
            "weights": str(self.model.get_base_model().dtype).removeprefix("torch."),
            "quantization": self.config.model.quantization,
            "gradient_checkpointing": checkpointing,
            "fused_lora_layers": fused,
            "compiled_layers": len(layers) if self.training.compile else 0,
            "liger_modules": replaced,
            "sharding": self.training.sharding if self.sharded else "none",
            "weights_mib": round(resident_bytes(self.model) / 2**20, 1),
            "processes": self.process.world,
            "hardware": hardware_name(self.process.device),
            "multiplied_weights": self.multiplied_weights,
            "mfu": CONVENTION.format(peak=source),
        }

    def _select_checkpointing(self) -> bool:
        """Enable gradient checkpointing if the settings require it or, by default, if the activations do not fit."""
        base, wanted = self.model.get_base_model(), self.training.gradient_checkpointing
        batches = self._measured_batches()
        tokens = self.training.micro_batch_size * self.longest
        sharing = self.process.local_world if self.process.device.type == "cpu" else 1
        self.model.train()

        def estimate(checkpointing: bool) -> memory.Estimate:
            device = self.process.device
            return memory.estimate(self._measured_loss, batches, tokens, self.model, device, sharing, checkpointing)

        def fits() -> bool:
            try:
                self.estimate = estimate(False)
            except (RuntimeError, MemoryError) as e:
                if wanted is None and memory.is_out_of_memory(e):
                    return False
                raise
            return self.estimate.fits

        # With gradient checkpointing in the settings, never store all activations, not even to measure them
        if self.process.any(wanted or (not fits() and wanted is None)):
            base.gradient_checkpointing_enable({"use_reentrant": False})
            base.enable_input_require_grads()
            self.estimate = estimate(True)
        return bool(self.estimate and self.estimate.checkpointing)

    def _measured_batches(self) -> tuple[Batch, Batch]:
        """Two batches of different size, which are no larger than a micro-batch if the sequences permit that."""
        by_length = np.argsort(self.lengths)
        first, middle = by_length[0], by_length[len(by_length) // 2]
        shortest, median = self.sequences[first], self.sequences[middle]
        if self.training.micro_batch_size > 1:
            return self.batch([median]), self.batch([median, median])
        if len(median) > 1:
            return self.batch([median[: len(median) // 2]]), self.batch([median])
        if self.lengths[first] < self.lengths[middle]:
            return self.batch([shortest]), self.batch([median])
        return self.batch([median]), self.batch([median, median])

    def _autocast(self) -> AbstractContextManager[None]:
        return autocast(self.precision, self.process.device)

    def _loss(self, batch: Batch) -> Tensor:
        with self._autocast():
            return self.summed_loss(batch)

    def token_losses(self, batch: Batch) -> Tensor:
        """Cross-entropy of each target token of a batch, in nats; shape (tokens,)."""
        with self._autocast():
            losses: Tensor = self.summed_loss(batch, by_token=True)
        return losses

    def _measured_loss(self, batch: Batch) -> Tensor:
        return self.token_losses(batch).sum() if self.judged else self._loss(batch)

    def _logits(self, sequences: list[list[int]], flat: bool) -> Tensor:
        batch = collate(sequences, self.train, self.process.device, flat)
        with self._autocast():
            return self.summed_loss.logits(batch)[0].float()

    def _shortest_outputs(self) -> tuple[Tensor, Tensor]:
        """Compute the logits of the shortest sequence, and the gradient of the adapter, without dropout."""
        self.model.eval()
        shortest = [self.sequences[int(self.lengths.argmin())]]
        batch = collate(shortest, self.train, self.process.device)
        gradients = torch.autograd.grad(self._loss(batch), self.parameters, allow_unused=True)
        with torch.no_grad():
            logits = self._logits(shortest, False)
        return logits, torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])

    def rows(self, sequences: list[list[int]]) -> list[list[int]]:
        """Sequences as rows of a batch: without packing, the answers of a pair are two rows."""
        return sequences if self.packed or self.flat else [[example] for each in sequences for example in each]

    def batch(self, sequences: list[list[int]]) -> Batch:
        """A batch of sequences of the training split."""
        return collate(self.rows(sequences), self.train, self.process.device, self.flat)
