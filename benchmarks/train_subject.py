"""What all recipes of `benchmarks.train` train on: a random model of a given shape, and real rows tokenized for it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "13m": {
        "vocab_size": 8192,
        "hidden_size": 320,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "llama-3.2-3b": {
        "vocab_size": 128_256,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "llama-3-8b": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "llama-3-70b": {
        "vocab_size": 128_256,
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}
"""Llamas by name. The output layer of `13m` is a fifth of its weights, as in the 1B model."""


@dataclass(frozen=True)
class Subject:
    """Folders and numbers that every recipe is given.

    Attributes:
        model: Folder of the random model and its tokenizer.
        packed: Tokenized dataset for our trainer.
        rows: JSON Lines with `input_ids` and `labels` of the same train examples, for the others.
        examples: How many train examples there are.
        length: Longest example, and tokens of a packed sequence.
        examples_a_step: Examples of a global batch; packed recipes take as many tokens.
        learning_rate: The same for all.
    """

    model: str
    packed: str
    rows: str
    examples: int
    length: int
    examples_a_step: int
    sequences_a_step: int
    learning_rate: float = 1e-3

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


def read(path: Path) -> Subject:
    return Subject(**json.loads(path.read_text(encoding="utf-8")))


def make(folder: Path, shape: str, rows: Path, examples: int, length: int, steps: int, device: str) -> Subject:
    """Write model, tokenizer and rows below `folder`.

    The tokenizer is a byte-level BPE trained on the rows, so that lengths are those of a real one of its vocabulary.

    Args:
        folder: Empty.
        shape: Name in SHAPES.
        rows: Raw rows: JSON Lines of instruction, context and response.
        examples: Take so many of them, by content.
        length: Longest example in tokens; 5% of the rows are held out.
        steps: Global batches that the examples make up.
        device: Whose preferred type the weights are saved in.
    """
    import numpy as np
    import pyarrow as pa

    from finetune_assets.config.raw_data_schema import Columns
    from finetune_assets.config.schema import Data, Tokenization
    from finetune_assets.data.ingest import PARQUET, write_raw
    from finetune_assets.data.prepare import prepare_dataset
    from finetune_assets.data.readers import SourceFile
    from finetune_assets.data.tokenization import load_tokenizer

    model = write_model(folder, shape, rows, device)
    data = Data(num_samples=examples, val_fraction=0.05, gate_fraction=0.0)
    data.tokenization = Tokenization(cutoff_len=length, packing=True)
    packed = folder / "packed"
    packed.mkdir()
    write_raw([SourceFile(rows.name, rows)], Columns(), folder)
    prepare_dataset(folder / PARQUET, load_tokenizer(str(model)), data, "benchmark", packed)
    table = pa.ipc.open_stream(pa.memory_map(str(packed / "train.arrow"))).read_all()
    packs = pa.ipc.open_stream(pa.memory_map(str(packed / "packs.arrow"))).read_all()
    plain = folder / "rows.jsonl"
    with plain.open("w", encoding="utf-8") as file:
        for row in table.select(["input_ids", "labels"]).to_pylist():
            file.write(json.dumps(row) + "\n")
    return Subject(
        str(model),
        str(packed),
        str(plain),
        len(table),
        length,
        int(np.ceil(len(table) / steps)),
        int(np.ceil(len(packs) / steps)),
    )


def write_model(folder: Path, shape: str, rows: Path, device: str) -> Path:
    """Write a random model and its tokenizer to `folder/model`; arguments as above."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    model = folder / "model"
    _tokenizer(rows, SHAPES[shape]["vocab_size"]).save_pretrained(model)
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    with torch.device(device):
        made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    made.save_pretrained(model)
    return model


def _tokenizer(rows: Path, vocabulary: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    with rows.open(encoding="utf-8") as file:
        texts = ["\n".join(str(value) for value in json.loads(line).values()) for line in file]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special, alphabet = ["<pad>", "<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
