"""(c) TRL's SFTTrainer, on the same tokens; runs in an environment of its own (`python -m benchmarks.peers`)."""

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.train_recipes.hf import Measured, count_tokens, loop
from benchmarks.train_recipes.meter import Meter, given, lora_settings, plain_rows


def main() -> None:
    from trl import SFTConfig, SFTTrainer

    subject, settings, device = given()
    bf16, packing = settings.get("bf16", False), settings.get("packing", False)
    base = AutoModelForCausalLM.from_pretrained(
        subject.model,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        attn_implementation=settings.get("attention", "sdpa"),
        device_map={"": device},
    )
    meter = Meter(base, device, "bf16" if bf16 else "fp32")
    model = get_peft_model(base, LoraConfig(**lora_settings(settings)))
    rows = Dataset.from_list(plain_rows(subject))
    a_step = subject.sequences_a_step if packing else subject.examples_a_step
    arguments = SFTConfig(
        **loop(subject, settings, device, a_step),
        max_length=subject.length,
        packing=packing,
        packing_strategy="bfd",
        padding_free=settings.get("padding_free", False),
        train_sampling_strategy="random" if packing else "group_by_length",
        use_liger_kernel=settings.get("liger", False),
    )
    measured = Measured(meter)
    count_tokens(SFTTrainer, measured)
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(subject.model),
        callbacks=[measured],
    )
    trainer.train()
    meter.report()


if __name__ == "__main__":
    main()
