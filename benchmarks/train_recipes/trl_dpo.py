"""TRL's DPOTrainer on the same pairs; runs in an environment of its own (`python -m benchmarks.peers`)."""

from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.train_recipes.hf import Measured, count_tokens, loop
from benchmarks.train_recipes.meter import Meter, given, lora_settings, plain_rows


def main() -> None:
    from trl import DPOConfig, DPOTrainer

    class TokenizedPairs(DPOTrainer):
        """Takes the tokens as they are, which are ours."""

        def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
            return dataset

    subject, settings, device = given()
    base = AutoModelForCausalLM.from_pretrained(subject.model, dtype=torch.float32, device_map={"": device})
    meter = Meter(base, device, "fp32")
    arguments = DPOConfig(
        **loop(subject, settings, device, subject.examples_a_step),
        max_length=subject.length,
        precompute_ref_log_probs=settings.get("precompute", True),
        disable_dropout=False,
    )
    measured = Measured(meter)
    count_tokens(TokenizedPairs, measured)
    trainer = TokenizedPairs(
        model=base,
        args=arguments,
        train_dataset=Dataset.from_list(plain_rows(subject)),
        processing_class=AutoTokenizer.from_pretrained(subject.model),
        peft_config=LoraConfig(**lora_settings(settings)),
        callbacks=[measured],
    )
    trainer.train()
    meter.report()


if __name__ == "__main__":
    main()
