"""(d) LLaMA-Factory; runs in an environment of its own (`python -m benchmarks.peers`)."""

import sys
import tempfile
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import torch
from datasets import Dataset, DatasetDict
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.train_recipes.hf import Measured, count_tokens
from benchmarks.train_recipes.meter import Meter, given, plain_rows


def main() -> None:
    # It is imported for audio models only; the builds that pip finds fit another torch
    audio = ModuleType("torchaudio")
    audio.__spec__ = ModuleSpec("torchaudio", None)
    sys.modules["torchaudio"] = audio
    from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
    from llamafactory.train.tuner import run_exp

    subject, settings, device = given()
    bf16 = settings.get("bf16", False)
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in plain_rows(subject)]
    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(subject.model))
    meter = Meter(shape, device, "bf16" if bf16 else "fp32")
    measured = Measured(meter)
    count_tokens(CustomSeq2SeqTrainer, measured)
    with tempfile.TemporaryDirectory() as folder:
        DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(Path(folder, "rows"))
        run_exp(
            {
                "stage": "sft",
                "do_train": True,
                "model_name_or_path": subject.model,
                "tokenized_path": str(Path(folder, "rows")),
                "dataset": "rows",  # asked for, not read
                "template": "default",
                "finetuning_type": "lora",
                "lora_target": "all",
                "lora_rank": 16,
                "lora_alpha": 32,
                "lora_dropout": settings.get("dropout", 0.05),
                "output_dir": str(Path(folder, "out")),
                "per_device_train_batch_size": settings["micro"],
                "gradient_accumulation_steps": max(1, round(subject.examples_a_step / settings["micro"])),
                "num_train_epochs": 1,
                "max_steps": settings.get("steps", -1),
                "learning_rate": subject.learning_rate,
                "lr_scheduler_type": "constant",
                "disable_gradient_checkpointing": not settings.get("checkpointing", False),
                "train_sampling_strategy": "group_by_length",
                "bf16": bf16,
                "pure_bf16": False,
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": "none",
                "use_cpu": device.type == "cpu",
            },
            callbacks=[measured],
        )
    meter.report()


if __name__ == "__main__":
    main()
