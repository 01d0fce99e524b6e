"""(a) the reference example's recipe, and (b) the Hugging Face Trainer as a careful user sets it up."""

from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.train_recipes.meter import Meter, given, lora_settings, plain_rows


class Measured(TrainerCallback):
    """Reads the figures off a Trainer's own events."""

    def __init__(self, meter: Meter) -> None:
        self.meter, self.tokens = meter, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.meter.step_done(self.tokens)
        self.tokens = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        self.meter.loss = logs.get("loss", self.meter.loss)
        self.meter.grad_norm = logs.get("grad_norm", self.meter.grad_norm)


def count_tokens(trainer_class: Any, measured: Measured) -> None:
    """Have a class of Trainers also count the tokens which are not padding."""
    step = trainer_class.training_step

    def counted(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        mask = inputs.get("attention_mask")
        measured.tokens += int(inputs["input_ids"].numel() if mask is None else mask.sum())
        return step(self, model, inputs, *args, **kwargs)

    trainer_class.training_step = counted


def loop(subject: Any, settings: dict[str, Any], device: torch.device, a_step: int) -> dict[str, Any]:
    """What every Trainer is told alike, with `a_step` rows in a global batch."""
    return {
        "output_dir": "/tmp/finetune-benchmark",
        "per_device_train_batch_size": settings["micro"],
        "gradient_accumulation_steps": max(1, round(a_step / settings["micro"])),
        "num_train_epochs": 1,
        "max_steps": settings.get("steps", -1),
        "learning_rate": subject.learning_rate,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": settings.get("checkpointing", False),
        "bf16": settings.get("bf16", False),
        "optim": "adamw_torch_fused",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": device.type == "cpu",
    }


def main() -> None:
    subject, settings, device = given()
    int8, bf16 = settings.get("quantization") == "int8", settings.get("bf16", False)
    base = AutoModelForCausalLM.from_pretrained(
        subject.model,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True) if int8 else None,
        device_map={"": device},
    )
    meter = Meter(base, device, "bf16" if bf16 else "fp32")
    if int8:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=settings["checkpointing"])
    model = get_peft_model(base, LoraConfig(**lora_settings(settings)))
    rows = Dataset.from_list([{**row, "length": len(row["input_ids"])} for row in plain_rows(subject)])
    tokenizer = AutoTokenizer.from_pretrained(subject.model)
    pad = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8 if device.type == "cuda" else None)

    def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return pad([{"input_ids": example["input_ids"], "labels": example["labels"]} for example in examples])

    arguments = TrainingArguments(
        **loop(subject, settings, device, subject.examples_a_step),
        gradient_checkpointing_kwargs={"use_reentrant": False},
        train_sampling_strategy="group_by_length" if settings.get("by_length", True) else "random",
        length_column_name="length",
        remove_unused_columns=False,
    )
    measured = Measured(meter)
    count_tokens(Trainer, measured)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[measured])
    trainer.train()
    meter.report()


if __name__ == "__main__":
    main()
