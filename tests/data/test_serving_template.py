"""The chat template of an adapter gives plain messages the tokens of training."""

import json
import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pyarrow.parquet as pq
import pytest
from data.chats import CHATML, FAMILIES
from data.test_tokenization import adding
from jinja2 import TemplateError
from paths import ROOT
from raw import ingest
from tiers import tiered
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from finetune_assets.config.loading import load_experiment
from finetune_assets.config.schema import Data, PromptTemplate, Tokenization
from finetune_assets.data.prepare import prepare_dataset
from finetune_assets.data.prompt_boundary import prompt_boundary
from finetune_assets.data.questions import questions
from finetune_assets.data.rows import Row
from finetune_assets.data.serving_template import prompt_messages, use_serving_template
from finetune_assets.data.tokenization import Encoder, load_tokenizer
from finetune_assets.sample.world import instruction_rows, make_world
from finetune_assets.sources.base_models import PACKAGED
from finetune_assets.sources.local import SAMPLE

SPECIAL = ["<unk>", "<s>", "</s>"]
DIGITS = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
"""How the tokenizers of Llama 3 split a text: digits never take the space before them."""


def built(model: Any, trainer: Any, *, single: str | None = "<s> $A", **parts: Any) -> PreTrainedTokenizerBase:
    """A small tokenizer with these parts, trained on the packaged rows."""
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    rows = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    texts = [f"### Instruction: {row['instruction']}\n### Response: {row['response']}" for row in rows]
    tokenizer.train_from_iterator(texts, trainer)
    if single:
        special = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def byte_level(split: Any) -> PreTrainedTokenizerBase:
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    return built(models.BPE(), trainer, pre_tokenizer=split, decoder=decoders.ByteLevel())


def with_spaces_in_words(scheme: str, **parts: Any) -> PreTrainedTokenizerBase:
    """In the manner of sentencepiece: a space is a part of the word after it."""
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL)
    space = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    return built(models.BPE(unk_token="<unk>"), trainer, pre_tokenizer=space, decoder=decoders.Metaspace(), **parts)


def of_whole_words(single: str) -> PreTrainedTokenizerBase:
    """In the manner of BERT: spaces are dropped."""
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=SPECIAL)
    words = pre_tokenizers.BertPreTokenizer()
    lower = normalizers.BertNormalizer(lowercase=True)
    return built(models.WordPiece(unk_token="<unk>"), trainer, single=single, pre_tokenizer=words, normalizer=lower)


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "packaged": lambda: AutoTokenizer.from_pretrained(PACKAGED["demo-base"]),
    "adds nothing": lambda: adding("$A"),
    "adds BOS and EOS": lambda: adding("<s>", "$A", "</s>"),
    "adds EOS": lambda: adding("$A", "</s>"),
    "splits digits": lambda: byte_level(
        pre_tokenizers.Sequence([pre_tokenizers.Split(DIGITS, "isolated"), pre_tokenizers.ByteLevel(use_regex=False)])
    ),
    "space before every part": lambda: with_spaces_in_words("always"),
    "space before the first word": lambda: with_spaces_in_words("first"),
    "no space before a text": lambda: with_spaces_in_words("never"),
    "whole words": lambda: of_whole_words("<s> $A"),
    "whole words and EOS": lambda: of_whole_words("<s> $A </s>"),
}
FORMS = {
    "demo": ("### Instruction: {instruction}\n### Input: {context}\n### Response: ", "### Response:"),
    "line break": ("Below is a task.\n\n### Input:\n{context}\n\n{instruction}\n\n### Response:\n", "### Response:"),
    "colon": ("{context} Q: {instruction} A:", "A:"),
    "BOS in the form": ("<s>[INST] {instruction} ({context}) [/INST] ", "[/INST]"),
    "BOS within": ("Q {instruction}<s>{context} R: ", "R:"),
    "two spaces": ("{context}\n{instruction}\nAnswer:  ", "Answer:"),
    "syntax": ("{{% raw %}} {{{{ 'x' }}}} \"it's\" \\n \t é☕😀 {instruction} {{# {context} #}}\r\n-}} R: ", "R:"),
    "formats": ("{context!r}{instruction:.40}{instruction:>20} {{}} R: ", "R:"),
}
HOSTILE = (
    "{{ 7 * 7 }} {% for m in messages %}{{ m }}{% endfor %} {# gone #}",
    "{% raw %}{{ bos_token }}",
    "' ~ raise_exception('no') ~ '",
    "\\n \\ \\' \" ''' \"\"\"",
    "{instruction} {context} {0} {{}} %s $instruction",
    "First\nsecond\r\nthird\rfourth\n\n",
    "  spaces  ",
    "Ends in a space ",
    "\ttabs\t",
    "é e\u0301 ☕ 😀 \u2028 \u00a0 \u200b 漢字 עברית",
    "Special </s> and <s> and <unk> in a text",
    "<s>first",
    "### Response: ### Response:",
)


def row(instruction: str, context: str = "", response: str = "The Thames") -> Row:
    return {
        "instruction": instruction,
        "context": context,
        "response": response,
        "category": "",
        "messages": None,
        "tools": None,
    }


def packaged_rows() -> list[Row]:
    return [{**one, "messages": None} for one in instruction_rows(make_world())]


def data_of(form: str, split: str, **tokenization: Any) -> Data:
    no_input = form.replace("{context!r}", "").replace("{context}", "")
    template = PromptTemplate(prompt_input=form, prompt_no_input=no_input, response_split=split)
    return Data(prompt_template=template, tokenization=Tokenization(cutoff_len=4096, **tokenization))


def trained(tokenizer: PreTrainedTokenizerBase, data: Data, rows: list[Row]) -> Iterator[tuple[list[int], list[int]]]:
    """The tokens of each row's prompt, and of the whole row, as in training and evaluation."""
    encoded = Encoder(tokenizer, data).encode(rows)
    assert not encoded.refused
    ends = encoded.lengths.cumsum()
    for end, length, prompt in zip(ends, encoded.lengths, encoded.prompt_lengths, strict=True):
        ids = encoded.input_ids[end - length : end].tolist()
        yield ids[:prompt], ids


@lru_cache
def files_of(name: str) -> str:
    """The folder of one of `TOKENIZERS`; training one twice may give other tokens."""
    folder = mkdtemp()
    TOKENIZERS[name]().save_pretrained(folder)
    return folder


def served(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], prompt: bool = True) -> list[int]:
    ids = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=prompt, return_dict=False)
    return list(ids)


def through_files(tokenizer: PreTrainedTokenizerBase, data: Data, folder: Path) -> PreTrainedTokenizerBase:
    use_serving_template(tokenizer, data).save_pretrained(folder)
    assert (folder / "chat_template.jinja").is_file()
    return AutoTokenizer.from_pretrained(folder)


CASES = [(name, form, add_eos) for name in TOKENIZERS for form in FORMS for add_eos in (True, False)]
EVERY_CHANGE = [
    *(("packaged", form, True) for form in FORMS),
    *((name, "demo", False) for name in TOKENIZERS),
    *((name, "colon", True) for name in TOKENIZERS),
]


@pytest.mark.parametrize("case", tiered(CASES, EVERY_CHANGE), ids=str)
def test_plain_messages_have_the_tokens_of_training(tmp_path: Path, case: tuple[str, str, bool]) -> None:
    """Of packaged rows, and of texts that look like Jinja, formats and special tokens. Small tokenizers have no words
    with a space before a small letter, which `prompt_boundary` finds."""
    name, form, add_eos = case
    data = data_of(*FORMS[form], add_eos_token=add_eos)
    rows = [one for one in packaged_rows()[::40] if one["response"][0].isupper()]
    rows += [*map(row, HOSTILE), *(row("What?", text) for text in HOSTILE)]
    rows += [row(" \n", "\n \t"), row("What?", "{{ x }}", "The {{ y }} <s> {% z %}")]
    expected = list(trained(AutoTokenizer.from_pretrained(files_of(name)), data, rows))
    tokenizer = through_files(AutoTokenizer.from_pretrained(files_of(name)), data, tmp_path)
    for one, (prompt, whole) in zip(rows, expected, strict=True):
        messages = prompt_messages(one)
        assert served(tokenizer, messages) == prompt, one
        assert served(tokenizer, messages, prompt=False) == prompt, "the prompt of such an experiment is one text"
        answered = [*messages, {"role": "assistant", "content": one["response"]}]
        assert served(tokenizer, answered, prompt=False) == whole, one


def test_each_prompt_of_the_packaged_rows_is_that_of_the_evaluation(tmp_path: Path) -> None:
    """All rows of the demo, with their own answers, and questions without an answer."""
    data = load_experiment(ROOT / "configs", "demo").config.data
    base = AutoTokenizer.from_pretrained(PACKAGED["demo-base"])
    rows = packaged_rows()
    expected = [prompt for prompt, _ in trained(base, data, rows)]
    asked = questions([one["instruction"] for one in rows[:50]], base, data)
    tokenizer = through_files(base, data, tmp_path)
    assert len(rows) == 800
    assert [served(tokenizer, prompt_messages(one)) for one in rows] == expected
    assert [served(tokenizer, prompt_messages({**one, "context": ""})) for one in rows[:50]] == asked
    filled = data.prompt_template.prompt_no_input.format(instruction=rows[0]["instruction"])
    assert tokenizer(filled)["input_ids"] != expected[0], "filled in by hand, the prompt has a token more"


@pytest.mark.real_data
@pytest.mark.parametrize("each", [64, pytest.param(1, marks=[pytest.mark.system, pytest.mark.soak])])
@pytest.mark.parametrize("form", ["demo", "default"])
def test_prompts_of_real_rows_are_those_of_training(
    dolly: Path, stories260k: Path, tmp_path: Path, form: str, each: int
) -> None:
    """The default prompts end in a line break, and their tokens never depend on the answer. Those of the demo do where
    this tokenizer of 512 tokens has no token for a space with the answer's first letters: `prompt_boundary` counts
    exactly these rows."""
    data = data_of(*FORMS["demo"]) if form == "demo" else Data()
    data.tokenization.cutoff_len, data.val_fraction, data.gate_fraction = 1 << 20, 0.0, 0.0
    data.near_duplicate_threshold = None
    with dolly.open("rb") as lines, (tmp_path / "rows.jsonl").open("wb") as some:
        some.writelines(islice(lines, 0, None, each))
    raw = ingest(tmp_path / "raw", tmp_path / "rows.jsonl")
    rows = pq.read_table(raw).to_pylist()
    assert len(rows) == math.ceil(15_011 / each)
    expected = [prompt for prompt, _ in trained(load_tokenizer(str(stories260k)), data, rows)]
    tokenizer = through_files(load_tokenizer(str(stories260k)), data, tmp_path / "adapter")
    pairs = zip(rows, expected, strict=True)
    other = [number for number, (one, prompt) in enumerate(pairs) if served(tokenizer, prompt_messages(one)) != prompt]
    prepare_dataset(raw, load_tokenizer(str(stories260k)), data, "salt", tmp_path)
    counted = prompt_boundary(tmp_path / "train.arrow", [raw], load_tokenizer(str(stories260k)), data, most=len(rows))
    assert (counted.compared, counted.changed, counted.first) == (len(rows), len(other), other[:5])
    if form == "default":
        assert other == []
    else:
        assert all(not rows[number]["response"].startswith(("The ", "It ", "In ")) for number in other)
        assert 0 < len(other) < len(rows)


REFUSED: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "a system turn": ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}], {}, "system"),
    "two questions": ([{"role": "user", "content": "a"}] * 2, {}, "message 2 has the role user"),
    "an earlier exchange": (
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ],
        {},
        "message 3 has the role user",
    ),
    "an answer, and another": (
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        {"add_generation_prompt": True},
        "single questions",
    ),
    "no question": ([{"role": "context", "content": "a"}], {}, "single questions"),
    "a context after the question": (
        [{"role": "user", "content": "a"}, {"role": "context", "content": "b"}],
        {},
        "message 2 has the role context",
    ),
    "two contexts": ([{"role": "context", "content": "a"}] * 2, {}, "message 2 has the role context"),
    "an answer alone": ([{"role": "assistant", "content": "a"}], {}, "message 1 has the role assistant"),
    "parts": ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], {}, "content"),
    "no content": ([{"role": "user", "content": None}], {}, "content"),
    "tools": ([{"role": "user", "content": "a"}], {"tools": [{"type": "function"}]}, "tools"),
    "documents": ([{"role": "user", "content": "a"}], {"documents": [{"text": "b"}]}, "documents"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_training_never_saw_is_refused(what: str) -> None:
    messages, options, named = REFUSED[what]
    tokenizer = use_serving_template(AutoTokenizer.from_pretrained(PACKAGED["demo-base"]), Data())
    with pytest.raises(TemplateError, match=named):
        tokenizer.apply_chat_template(messages, tokenize=False, **options)


def test_an_answer_can_be_continued() -> None:
    """As servers continue the last message (`continue_final_message`)."""
    data = data_of(*FORMS["demo"])
    tokenizer = use_serving_template(AutoTokenizer.from_pretrained(PACKAGED["demo-base"]), data)
    messages = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "The Th"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert text == "<s>" + data.prompt_template.prompt_no_input.format(instruction="Which?") + "The Th"


def test_the_date_of_a_chat_template_is_that_of_training() -> None:
    """Also where a template writes several, and of each of several templates; another call is kept."""
    dated = "{{ strftime_now('%d %b %Y') }} {{ strftime_now(\"%Y-%m-%d\") }}" + CHATML
    tokenizer = AutoTokenizer.from_pretrained(PACKAGED["demo-base"])
    tokenizer.chat_template = {"default": dated, "other": "{{ strftime_now(form) }}"}
    data, messages = Data(prompt_template=PromptTemplate(chat_template=True)), [{"role": "user", "content": "What?"}]
    (prompt, _) = next(trained(tokenizer, data, [row("What?")]))
    assert served(tokenizer, messages) != prompt
    use_serving_template(tokenizer, data)
    assert served(tokenizer, messages) == prompt
    assert tokenizer.decode(prompt).startswith("26 Jul 2024 2024-07-26")
    assert tokenizer.chat_template["other"] == "{{ strftime_now(form) }}"


@pytest.mark.parametrize("family", FAMILIES)
def test_an_experiment_with_a_chat_template_keeps_it(family: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(PACKAGED["demo-base"])
    tokenizer.chat_template = FAMILIES[family].template
    use_serving_template(tokenizer, Data(prompt_template=PromptTemplate(chat_template=True)))
    assert tokenizer.chat_template == FAMILIES[family].template
