"""Two sources of real rows by weight: what an epoch consists of, and that each row occurs once in it."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from raw import ingest
from tiers import tiered

from finetune_assets.config.schema import Data, Tokenization, Training
from finetune_assets.data.prepare import prepare_dataset
from finetune_assets.data.raw_files import RawPart
from finetune_assets.data.tokenization import load_tokenizer
from finetune_assets.training.order import Examples, GlobalBatchSampler, read_packs

EPOCHS = 3


@pytest.fixture(scope="module")
def sources(dolly: Path, tmp_path_factory: pytest.TempPathFactory) -> list[RawPart]:
    """Dolly's rows with and without a context, as two sources of weights 9 and 1."""
    lines = dolly.read_text(encoding="utf-8").splitlines()
    parts = []
    for name, weight, with_context in (("asked", 9.0, False), ("read", 1.0, True)):
        folder = tmp_path_factory.mktemp(name)
        own = [line for line in lines if bool(json.loads(line)["context"]) is with_context][:2000]
        (folder / "rows.jsonl").write_text("\n".join(own), encoding="utf-8")
        parts.append(RawPart(name, ingest(folder, folder / "rows.jsonl"), weight))
    return parts


@pytest.mark.real_data
@pytest.mark.parametrize("packing", tiered([True, False], {False}))
def test_an_epoch_has_the_shares_and_each_row_once(
    sources: list[RawPart], stories260k: Path, tmp_path: Path, packing: bool
) -> None:
    data = Data(tokenization=Tokenization(cutoff_len=1024, packing=packing))
    statistics = prepare_dataset(sources, load_tokenizer(str(stories260k)), data, "salt", tmp_path)
    examples = Examples.read(tmp_path / "train.arrow")
    names = examples.table["source"].to_pylist()
    packs = read_packs(tmp_path) if packing else [[index] for index in range(len(examples))]
    assert packs is not None
    lengths = np.array([examples.lengths[pack].sum() for pack in packs])
    training = Training(epochs=EPOCHS, macro_batch_size=16, micro_batch_size=4)
    sampler, later = (GlobalBatchSampler(lengths, training, not packing, 1) for _ in range(2))
    batches = [sampler.global_batch(step).tolist() for step in range(sampler.steps)]
    drawn = [example for batch in batches for sequence in batch for example in packs[sequence]]
    per_epoch = len(examples)
    for epoch in range(EPOCHS):
        rows = drawn[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert max(Counter(rows).values()) == 1
        tokens = Counter[str]()
        for row in rows:
            tokens[names[row]] += int(examples.lengths[row])
        assert tokens["asked"] / tokens.total() == pytest.approx(0.9, abs=0.01)
    middle = sampler.steps // 2
    assert [later.global_batch(step).tolist() for step in range(middle, sampler.steps)] == batches[middle:], "resumed"
    assert statistics.sources["read"]["left_out_rows"] > 0
    assert statistics.sources["asked"]["left_out_rows"] == 0
    for split in ("val", "gate"):
        held_out = pa.ipc.open_stream(pa.memory_map(str(tmp_path / f"{split}.arrow"))).read_all()
        assert {*held_out["source"].to_pylist()} == {"asked", "read"}
