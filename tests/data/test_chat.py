"""Chat templates: every token that the assistant says is learned and no other, against spans known by construction."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from data.chats import CHATML, FAMILIES, MARKED, THINKING, TURNS, Spans, conversations
from tokenizers import processors
from transformers import PreTrainedTokenizerBase

from finetune_assets.config.schema import Data, PromptTemplate, Tokenization
from finetune_assets.data.chat import ChatTemplate
from finetune_assets.data.errors import DataError, RefusedRow
from finetune_assets.data.rows import Row, Turn
from finetune_assets.data.tokenization import IGNORED, Encoder, load_tokenizer
from finetune_assets.sources.base_models import PACKAGED

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|eot|>", "<|head|>", "<start_of_turn>", "<end_of_turn>"]
COUNT = 500 if os.environ.get("SOAK") else 150
PLAIN = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}] * 2


def tokenizer_of(kind: str, folder: Path = PACKAGED["demo-base"]) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(str(folder), () if kind == "plain text" else SPECIAL)
    if kind == "trimmed offsets":  # as Llama 3's and Qwen's: a token's span leaves out the space that it begins with
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def chat_data(cutoff: int = 100_000, **settings: bool) -> Data:
    tokenization = Tokenization(cutoff_len=cutoff, **settings)
    return Data(prompt_template=PromptTemplate(chat_template=True), tokenization=tokenization)


def row(turns: list[Turn]) -> Row:
    return {"instruction": "", "context": "", "response": "", "category": "", "messages": turns}


def encoded(
    tokenizer: PreTrainedTokenizerBase, data: Data, made: list[list[Turn]]
) -> Iterator[tuple[list[int], list[int], int]]:
    """Ids, labels and prompt length of each conversation; a thousand at a time, as in preparing."""
    examples = Encoder(tokenizer, data).encode([row(turns) for turns in made])
    assert not examples.refused
    ends = np.cumsum(examples.lengths)
    for end, length, prompt in zip(ends, examples.lengths, examples.prompt_lengths, strict=True):
        yield examples.input_ids[end - length : end].tolist(), examples.labels[end - length : end].tolist(), int(prompt)


def by_spans(tokenizer: PreTrainedTokenizerBase, text: str, spans: Spans) -> tuple[list[int], list[int]]:
    """The slow reference: a token is learned if its own characters meet a span, or if it stands between two that do."""
    found = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    ids, offsets = found["input_ids"], found["offset_mapping"]
    labels = [IGNORED] * len(ids)
    for start, end in spans:
        inside = [i for i, (begin, stop) in enumerate(offsets) if begin < stop and begin < end and stop > start]
        for i in range(inside[0], inside[-1] + 1):
            labels[i] = ids[i]
    return ids, labels


@pytest.mark.parametrize("kind", ["special tokens", "plain text", "trimmed offsets"])
@pytest.mark.parametrize("family", FAMILIES)
def test_conversations_equal_the_slow_reference(family: str, kind: str) -> None:
    template, by_hand, system = FAMILIES[family].template, FAMILIES[family].by_hand, FAMILIES[family].system
    tokenizer = tokenizer_of(kind)
    tokenizer.chat_template = template
    made = conversations(COUNT, seed=len(family), system=system)
    learned = 0
    for turns, (ids, labels, prompt) in zip(made, encoded(tokenizer, chat_data(), made), strict=True):
        text, spans = by_hand(turns)
        assert text == tokenizer.apply_chat_template(turns, tokenize=False), "the two ways of writing agree"
        assert (ids, labels) == by_spans(tokenizer, text, spans), turns
        assert prompt == by_spans(tokenizer, text, spans[-1:])[1].index(ids[prompt]), "the last answer begins here"
        learned += sum(label != IGNORED for label in labels)
    assert learned > 5_000


@pytest.mark.real_data
@pytest.mark.parametrize("family", FAMILIES)
def test_conversations_on_a_real_tokenizer(family: str, stories260k: Path) -> None:
    tokenizer = tokenizer_of("special tokens", stories260k)
    tokenizer.chat_template = FAMILIES[family].template
    made = conversations(COUNT, seed=7, system=FAMILIES[family].system)
    for turns, (ids, labels, _) in zip(made, encoded(tokenizer, chat_data(), made), strict=True):
        assert (ids, labels) == by_spans(tokenizer, *FAMILIES[family].by_hand(turns)), turns


def test_generation_marks_are_those_of_transformers() -> None:
    tokenizer = tokenizer_of("special tokens")
    tokenizer.chat_template = MARKED
    made = conversations(100, seed=1)
    for turns, (ids, labels, _) in zip(made, encoded(tokenizer, chat_data(), made), strict=True):
        theirs = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
        assert ids == theirs["input_ids"]
        assert [label != IGNORED for label in labels] == [bool(mask) for mask in theirs["assistant_masks"]]


WORDS_ONLY = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")


def test_the_end_mark_outside_of_generation_marks_is_learned() -> None:
    """Also where the template rewrites words, for which there is no frame."""
    tokenizer = tokenizer_of("special tokens")
    tokenizer.chat_template = WORDS_ONLY
    made = conversations(100, seed=2)
    for turns, (ids, labels, _) in zip(made, encoded(tokenizer, chat_data(), made), strict=True):
        assert (ids, labels) == by_spans(tokenizer, *FAMILIES["chatml"].by_hand(turns)), turns
    tokenizer.chat_template = WORDS_ONLY.replace("{{ m.content }}", "{{ m.content | upper }}")
    text, spans, *_ = ChatTemplate(tokenizer).render(PLAIN)
    assert [text[start:end] for start, end in spans] == ["HELLO<|im_end|>\n"] * 2


def test_generation_marks_around_a_part_of_the_turn_are_refused_where_it_has_more() -> None:
    tokenizer = tokenizer_of("special tokens")
    call = "{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}"
    tokenizer.chat_template = WORDS_ONLY.replace("{% endgeneration %}", "{% endgeneration %}" + call)
    calls = '[{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]'
    with pytest.raises(RefusedRow, match=r"generation marks.* turn 2"):
        ChatTemplate(tokenizer).render([PLAIN[0], {**PLAIN[1], "tool_calls": calls}])


@pytest.mark.parametrize(
    ("end", "written"), [("", ""), ("\n", ""), ("\n  ", "  "), ("{# end #}\n", ""), (".\n\n", ".\n")]
)
def test_the_date_of_a_template_is_fixed(end: str, written: str) -> None:
    tokenizer = tokenizer_of("special tokens")
    dated = "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}{{ m.content }}{% endfor %}" + end
    tokenizer.chat_template = dated
    text, spans, *_ = ChatTemplate(tokenizer).render(PLAIN[:2])
    assert (text, spans) == ("2024-07-26HiHello" + written, ((12, 17 + len(written)),))
    assert "2024-07-26" not in tokenizer.apply_chat_template(PLAIN[:2], tokenize=False), "only where rows are prepared"


def test_a_wrong_span_would_be_seen() -> None:
    """The reference is able to fail: spans one character longer give other labels."""
    tokenizer = tokenizer_of("plain text")
    text, spans = FAMILIES["chatml"].by_hand(PLAIN)
    assert by_spans(tokenizer, text, [(a, b + 1) for a, b in spans[:1]]) != by_spans(tokenizer, text, spans[:1])


def test_what_follows_the_last_answer_is_left_out() -> None:
    tokenizer = tokenizer_of("special tokens")
    tokenizer.chat_template = CHATML
    ((whole, _, _),) = encoded(tokenizer, chat_data(), [PLAIN])
    ((ids, _, _),) = encoded(tokenizer, chat_data(), [[*PLAIN, {"role": "user", "content": "Thanks"}]])
    assert ids == whole


def test_a_cut_conversation_keeps_the_turns_before_the_cut() -> None:
    tokenizer = tokenizer_of("special tokens")
    tokenizer.chat_template = CHATML
    ((ids, labels, prompt),) = encoded(tokenizer, chat_data(), [PLAIN])
    ((cut_ids, cut_labels, cut_prompt),) = encoded(tokenizer, chat_data(cutoff=prompt - 2), [PLAIN])
    assert (cut_ids, cut_labels) == (ids[: prompt - 2], labels[: prompt - 2])
    assert any(label != IGNORED for label in cut_labels)
    assert cut_prompt == next(i for i, label in enumerate(labels) if label != IGNORED), "the first answer is the last"


def test_train_on_inputs_masks_nothing() -> None:
    tokenizer = tokenizer_of("special tokens")
    tokenizer.chat_template = CHATML
    ((ids, labels, _),) = encoded(tokenizer, chat_data(train_on_inputs=True), [PLAIN])
    assert ids == labels


def thinking(*said: str) -> list[Turn]:
    return [
        turn
        for answer in said
        for turn in ({"role": "user", "content": "Why?"}, {"role": "assistant", "content": answer})
    ]


def test_reasoning_of_the_last_turn_is_learned() -> None:
    """This family rewrites an answer that holds reasoning; what it adds to the prompt is the assistant's anyway."""
    tokenizer = tokenizer_of("special tokens")
    tokenizer.chat_template = THINKING
    text, spans, *_ = ChatTemplate(tokenizer).render(thinking("<think>\nIt rains.\n</think>\n\nBecause."))
    assert [text[start:end] for start, end in spans] == ["<think>\nIt rains.\n</think>\n\nBecause.<|im_end|>\n"]
    text, spans, *_ = ChatTemplate(tokenizer).render(thinking("No.", "<think>\nHm\n</think>\n\nYes."))
    assert [text[start:end] for start, end in spans] == ["No.<|im_end|>\n", "<think>\nHm\n</think>\n\nYes.<|im_end|>\n"]


def test_reasoning_that_a_template_takes_back_is_refused() -> None:
    tokenizer = tokenizer_of("special tokens")
    tokenizer.chat_template = THINKING
    with pytest.raises(RefusedRow, match=r"'Yes\.'"):
        ChatTemplate(tokenizer).render(thinking("<think>\nHm\n</think>\n\nNo.", "Yes."))


@pytest.mark.parametrize(
    ("template", "turns", "words"),
    [
        (TURNS, [{"role": "system", "content": "x"}, *PLAIN], "System role not supported"),
        (FAMILIES["[INST], system inside the first turn"].template, [PLAIN[0], *PLAIN], "must alternate"),
        ("{% for m in messages %}{{ m.content[:2] }}{% endfor %}", PLAIN, "."),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", PLAIN, "."),
    ],
)
def test_conversation_that_a_template_cannot_hold_is_refused(template: str, turns: list[Turn], words: str) -> None:
    tokenizer = tokenizer_of("special tokens")
    tokenizer.chat_template = template
    with pytest.raises(RefusedRow, match=words):
        ChatTemplate(tokenizer).render(turns)
    examples = Encoder(tokenizer, chat_data()).encode([row(turns), row(turns)])
    assert [refused.row for refused in examples.refused] == [0, 1]
    assert len(examples.rows) == 0


def test_template_that_is_no_template_is_told() -> None:
    tokenizer = tokenizer_of("special tokens")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}"
    with pytest.raises(DataError, match="chat template"):
        Encoder(tokenizer, chat_data()).encode([row(PLAIN)])


def test_a_template_that_writes_bos_gives_one_bos() -> None:
    """Also with a tokenizer that adds BOS and EOS to every text."""
    tokenizer = tokenizer_of("special tokens")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    )
    tokenizer.chat_template = TURNS
    ((ids, labels, _),) = encoded(tokenizer, chat_data(), [PLAIN])
    assert (ids, labels) == by_spans(tokenizer, *FAMILIES["model turns, no system"].by_hand(PLAIN))
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in ids


def test_the_default_of_several_templates_is_taken() -> None:
    tokenizer = tokenizer_of("special tokens")
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ 1 }}"}
    assert ChatTemplate(tokenizer).render(PLAIN)[0] == FAMILIES["chatml"].by_hand(PLAIN)[0]
