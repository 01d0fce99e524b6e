"""Rebuild the packaged sample and the packaged base model: `python -m finetune_assets.sample.build`.

Writes `dolly_sample.jsonl`, `demo_prose.txt`, `towns.jsonl`, `documents/` and `base_model/` to this file's folder,
or with `--texts` all but the last. The base model is a Llama of two
million parameters, trained from random weights only on the prose of `world.py`: it never sees an instruction or an
answer. On two cores this takes about half an hour; recipe and measured recall are recorded in `base_model/README.md`.
"""

import argparse
import json
import math
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from finetune_assets.sample.towns import documents, new_towns, question_rows
from finetune_assets.sample.world import ATTRIBUTES, World, instruction_rows, make_world, prose

HERE = Path(__file__).parent
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
SEQUENCE_LENGTH = 192


def train_tokenizer(world: World, documents: int = 20_000, vocabulary: int = 1_024) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the prose; it prepends `<s>` to a text and leaves `</s>` to the caller."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(prose(world, seed=1), documents), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=512
    )


def batches(world: World, tokenizer: PreTrainedTokenizerFast, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches of concatenated prose documents. Shape (batch_size, SEQUENCE_LENGTH), int64."""
    documents, buffer = prose(world, seed), list[int]()
    size = batch_size * SEQUENCE_LENGTH
    while True:
        while len(buffer) < size:
            for ids in tokenizer(list(islice(documents, 500)))["input_ids"]:
                buffer += [*ids, tokenizer.eos_token_id]
        yield torch.tensor(buffer[:size]).view(batch_size, SEQUENCE_LENGTH)
        buffer = buffer[size:]


def pretrain(world: World, tokenizer: PreTrainedTokenizerFast, steps: int, batch_size: int) -> LlamaForCausalLM:
    """Train a Llama from random weights with AdamW and a cosine schedule; prints the loss."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    peak, warmup = 2e-3, 100
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    started = time.monotonic()
    for step, ids in enumerate(islice(batches(world, tokenizer, batch_size, seed=2), steps)):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = peak * min(1, (step + 1) / warmup) * (0.05 + 0.95 * cosine)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            tokens = (step + 1) * ids.numel() / (time.monotonic() - started)
            print(f"step {step:5d}/{steps}  loss {loss.item():.4f}  {tokens:,.0f} tokens/s", flush=True)
    return model.eval()


@torch.inference_mode()
def recall(world: World, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """Fraction of all facts for which the model completes the start of a statement with the correct value."""
    hits = total = 0
    for town, facts in world.facts.items():
        for attribute, value in facts.items():
            statement = ATTRIBUTES[attribute][1][1].format(t=town, v=value)
            begin = tokenizer(statement[: statement.rindex(f" {value}")], return_tensors="pt")
            out = model.generate(**begin, max_new_tokens=4, do_sample=False)
            hits += tokenizer.decode(out[0, begin["input_ids"].shape[1] :]).strip().startswith(value)
            total += 1
    return hits / total


def write_prose(world: World, path: Path, documents: int = 250) -> None:
    """Write prose of the base model's training distribution, for measuring how much an adapter makes it forget."""
    path.write_text("\n\n".join(islice(prose(world, seed=3), documents)) + "\n", encoding="utf-8")


def write_rows(rows: Iterable[dict[str, str]], path: Path) -> None:
    with path.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_towns(out: Path) -> None:
    """Write documents about towns that the base model never reads, and questions about them."""
    world = new_towns()
    write_rows(question_rows(world), out / "towns.jsonl")
    (out / "documents").mkdir(exist_ok=True)
    for name, text in documents(world):
        (out / "documents" / name).write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2_500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--texts", action="store_true", help="write rows and documents only")
    args = parser.parse_args()

    world = make_world()
    write_rows(instruction_rows(world), args.out / "dolly_sample.jsonl")
    write_prose(world, args.out / "demo_prose.txt")
    write_towns(args.out)
    if args.texts:
        return
    tokenizer = train_tokenizer(world)
    model = pretrain(world, tokenizer, args.steps, args.batch_size)
    known = recall(world, model, tokenizer)
    print(f"prose recall {known:.1%}")
    folder = args.out / "base_model"
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_recipe(folder, args.steps, args.batch_size, model.num_parameters(), known)


def write_recipe(folder: Path, steps: int, batch_size: int, parameters: int, known: float) -> None:
    """Write the README of the base model, with its training recipe."""
    (folder / "README.md").write_text(
        f"""---
license: apache-2.0
---
# The packaged base model

A Llama of {parameters:,} parameters, made by `python -m finetune_assets.sample.build` from random weights: {steps:,}
steps of {batch_size} x {SEQUENCE_LENGTH} tokens of the prose in `finetune_assets/sample/world.py` (AdamW, peak learning
rate 2e-3, cosine, seed 0), then rounded to bfloat16. It has read about 120 invented towns and completes {known:.1%} of
the facts as prose; it has never seen an instruction. It is made for this project's demonstration and is good for
nothing else.
""",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
