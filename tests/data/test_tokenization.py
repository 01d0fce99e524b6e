"""Masking, end token and cut-off, against a slow reference by character spans."""

import hashlib
import math
from itertools import islice
from pathlib import Path

import pytest
from data.chats import CHATML
from raw import ingest, rows_of
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetune_assets.config.loading import load_experiment
from finetune_assets.config.schema import Data, PromptTemplate, Tokenization
from finetune_assets.data.errors import DataError
from finetune_assets.data.prepare import prepare_dataset
from finetune_assets.data.prompts import render_prompt
from finetune_assets.data.rows import Row
from finetune_assets.data.tokenization import IGNORED, Encoder, load_tokenizer
from finetune_assets.sample.world import instruction_rows, make_world
from finetune_assets.sources.base_models import PACKAGED

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(PACKAGED["demo-base"])


def row(instruction: str = "Say a.", context: str = "", response: str = "a") -> Row:
    return {"instruction": instruction, "context": context, "response": response, "category": "", "messages": None}


def split(encoder: Encoder, rows: list[Row]) -> list[tuple[list[int], list[int]]]:
    examples = encoder.encode(rows)
    ends = examples.lengths.cumsum()
    return [
        (examples.input_ids[end - n : end].tolist(), examples.labels[end - n : end].tolist())
        for end, n in zip(ends, examples.lengths, strict=True)
    ]


def expected(tokenizer: PreTrainedTokenizerBase, data: Data, one: Row) -> tuple[list[int], list[int]]:
    """Every token that holds a character of the response is learned, each decided by its own character span."""
    text, ((start, _),), *_ = render_prompt(data.prompt_template, one)
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids = [*encoded["input_ids"], tokenizer.eos_token_id]
    learned = [end > start and end > begin for begin, end in encoded["offset_mapping"]] + [True]
    first = learned.index(True)
    labels = [IGNORED if i < first else token for i, token in enumerate(ids)]
    cutoff = data.tokenization.cutoff_len
    return ids[:cutoff], labels[:cutoff]


HARD = [
    row(response=" leading space"),
    row(response="\n\nline"),
    row(response="☕ coffee"),
    row(response="😀"),
    row(instruction="Ends in a space ", response="x"),
    row(instruction="### Response:", response="### Response: ### Response:"),
    row(context="{instruction} {braces}", response="{context}"),
    row(instruction="é", context="e\u0301", response="e\u0301"),
    row(response="a" * 400),
]


@pytest.mark.parametrize("template", ["default", "demo"])
def test_masks_equal_the_slow_reference(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    data = Data() if template == "default" else load_experiment_data()
    data.tokenization.cutoff_len = 300
    rows = [*HARD, *({**one, "messages": None} for one in instruction_rows(make_world()))]
    for one, (ids, labels) in zip(rows, split(Encoder(tokenizer, data), rows), strict=True):
        assert (ids, labels) == expected(tokenizer, data, one), one


def load_experiment_data() -> Data:
    from paths import ROOT

    return load_experiment(ROOT / "configs", "demo").config.data


@pytest.mark.real_data
@pytest.mark.parametrize("each", [16, pytest.param(1, marks=pytest.mark.soak)])
def test_masks_equal_the_slow_reference_on_real_rows(dolly: Path, stories260k: Path, tmp_path: Path, each: int) -> None:
    """On every 16th row, and in the soak on all of them."""
    real = AutoTokenizer.from_pretrained(str(stories260k))
    data = Data()
    with dolly.open("rb") as lines, (tmp_path / "rows.jsonl").open("wb") as some:
        some.writelines(islice(lines, 0, None, each))
    rows = rows_of(tmp_path / "rows.jsonl", out=tmp_path)
    assert len(rows) == math.ceil(15_011 / each)
    for one, (ids, labels) in zip(rows, split(Encoder(real, data), rows), strict=True):
        assert (ids, labels) == expected(real, data, one), one


def test_end_token_is_learned_once_and_only_where_nothing_was_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    eos = tokenizer.eos_token_id
    (whole, _), (cut, _) = split(
        Encoder(tokenizer, Data(tokenization=Tokenization(cutoff_len=80))), [row(), row(response="word " * 200)]
    )
    assert whole[-1] == eos
    assert whole.count(eos) == 1
    assert len(cut) == 80
    assert eos not in cut


def test_no_end_token_where_none_is_wanted(tokenizer: PreTrainedTokenizerBase) -> None:
    ((ids, _),) = split(Encoder(tokenizer, Data(tokenization=Tokenization(add_eos_token=False))), [row()])
    assert tokenizer.eos_token_id not in ids


def adding(*pieces: str) -> PreTrainedTokenizerBase:
    """A tokenizer that adds these special tokens to every text (`$A`)."""
    tokenizer = AutoTokenizer.from_pretrained(PACKAGED["demo-base"])
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(pieces), special_tokens=special
    )
    return tokenizer


@pytest.mark.parametrize("pieces", [("$A",), ("<s>", "$A"), ("<s>", "$A", "</s>"), ("$A", "</s>")])
@pytest.mark.parametrize("add_eos", [True, False])
@pytest.mark.parametrize("start", ["<s>[INST] ", "[INST] "])
def test_bos_and_eos_occur_once_or_not_at_all(pieces: tuple[str, ...], add_eos: bool, start: str) -> None:
    """Whether the prompt, the tokenizer, or both write BOS, and whatever the tokenizer adds at the end."""
    tokenizer = adding(*pieces)
    template = PromptTemplate(prompt_no_input=start + "{instruction} [/INST] ")
    data = Data(prompt_template=template, tokenization=Tokenization(add_eos_token=add_eos))
    ((ids, labels),) = split(Encoder(tokenizer, data), [row(response="aye")])
    bos = "<s>" in pieces or start.startswith("<s>")
    assert ids.count(tokenizer.bos_token_id) == bos
    assert ids.count(tokenizer.eos_token_id) == add_eos
    learned = [token for token in labels if token != IGNORED]
    assert tokenizer.decode(learned).strip() == ("aye</s>" if add_eos else "aye")
    assert tokenizer.decode(ids).count("[INST] Say a.") == 1
    assert labels.index(learned[0]) == len(ids) - len(learned), "the labels belong to the answer's tokens"


def test_example_that_fits_exactly_keeps_its_end(tokenizer: PreTrainedTokenizerBase) -> None:
    ((whole, _),) = split(Encoder(tokenizer, Data()), [row()])
    for cutoff, kept in ((len(whole), True), (len(whole) - 1, False)):
        examples = Encoder(tokenizer, Data(tokenization=Tokenization(cutoff_len=cutoff))).encode([row()])
        assert examples.lengths[0] == cutoff
        assert bool(examples.truncated[0]) is not kept


def test_train_on_inputs_masks_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    ((ids, labels),) = split(Encoder(tokenizer, Data(tokenization=Tokenization(train_on_inputs=True))), [row()])
    assert ids == labels


def test_prompt_alone_has_no_label(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = Encoder(tokenizer, Data(tokenization=Tokenization(cutoff_len=5))).encode([row()])
    assert (examples.labels == IGNORED).all()
    assert examples.prompt_lengths[0] == 5


def test_chat_template_learns_the_answer_and_its_end(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = AutoTokenizer.from_pretrained(PACKAGED["demo-base"])
    chat.chat_template = CHAT
    data = Data(prompt_template=PromptTemplate(chat_template=True))
    ((ids, labels),) = split(Encoder(chat, data), [row("Say a.", "Here.", "Oslo")])
    learned = [token for token in labels if token != IGNORED]
    assert chat.decode(learned) == "Oslo</s>"
    assert chat.decode(ids) == "<|user|>Say a.\n\nHere.<|assistant|>Oslo</s>"


@pytest.mark.parametrize("answer", ["d", "end", "i", "</s>"])
def test_short_answer_is_found_before_its_end_marker(answer: str) -> None:
    chat = AutoTokenizer.from_pretrained(PACKAGED["demo-base"])
    chat.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    ((_, labels),) = split(
        Encoder(chat, Data(prompt_template=PromptTemplate(chat_template=True))), [row(response=answer)]
    )
    assert chat.decode([token for token in labels if token != IGNORED]) == f"{answer}<|im_end|>\n"


def test_padding_and_truncation_of_the_tokenizers_file_are_not_obeyed(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [row(), row(response="word " * 50)]
    plain = split(Encoder(tokenizer, Data()), rows)
    other = AutoTokenizer.from_pretrained(PACKAGED["demo-base"])
    other.backend_tokenizer.enable_padding()
    other.backend_tokenizer.enable_truncation(20)
    assert split(Encoder(other, Data()), rows) == plain


def test_tokenizer_without_chat_template_says_so(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"chat_template"):
        Encoder(tokenizer, Data(prompt_template=PromptTemplate(chat_template=True)))


def test_tokenizer_without_end_token_says_so() -> None:
    endless = AutoTokenizer.from_pretrained(PACKAGED["demo-base"])
    endless.eos_token = None
    with pytest.raises(DataError, match="add_eos_token"):
        Encoder(endless, Data())


PREPARED = {
    "prompts": "39fa59aeffa9a29671a3f45fd418a28f47855fdfb6b46fa7723ef375d0e9ad78",
    "chat template": "fb8aa08e2c911098044319069ff1d66ccba4da0b1a662145f9b6ed0c110de4ce",
}
"""SHA-256 of the datasets of all real rows, before conversations could call tools."""


@pytest.mark.real_data
@pytest.mark.soak
@pytest.mark.parametrize("name", PREPARED)
def test_datasets_of_instructions_stay_as_they_were(name: str, dolly: Path, stories260k: Path, tmp_path: Path) -> None:
    chat = name == "chat template"
    tokenizer = load_tokenizer(str(stories260k), ["<|im_start|>", "<|im_end|>"] if chat else ())
    tokenizer.chat_template = CHATML
    data = Data(prompt_template=PromptTemplate(chat_template=chat), tokenization=Tokenization(cutoff_len=512))
    out = tmp_path / "out"
    out.mkdir()
    statistics = prepare_dataset(ingest(tmp_path / "raw", dolly), tokenizer, data, "finetune-assets", out)
    assert (statistics.rows_read, statistics.refused) == (15_011, 0)
    digest = hashlib.sha256()
    for path in sorted(out.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    assert digest.hexdigest() == PREPARED[name]
