"""Tokenizes rendered rows and labels the tokens.

The prompt is masked by the tokens' character offsets, never by tokenizing it separately.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding

from finetune_assets.config.schema import Data
from finetune_assets.data.chat import Rendered, Span
from finetune_assets.data.errors import DataError, RefusedRow
from finetune_assets.data.labels import IGNORED
from finetune_assets.data.prompts import make_renderer
from finetune_assets.data.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENCODED_TOGETHER = 64
"""Number of texts that are tokenized at a time: enough for the tokenizer's threads, and an encoding takes 100 KB."""


class Refused(NamedTuple):
    """A row that the template cannot render.

    Attributes:
        row: Index of the row in the input batch.
        reason: Reason for the refusal.
    """

    row: int
    reason: str


@dataclass(frozen=True)
class TokenizedRows:
    """A batch of examples with concatenated tokens.

    Attributes:
        rows: Index of each example's row in the input batch; shape (n,).
        lengths: Number of tokens of each example; shape (n,).
        input_ids: Token ids; shape (sum of lengths,), int32.
        labels: The same ids, or `IGNORED`; same shape.
        prompt_lengths: Number of tokens before the last answer; shape (n,).
        truncated: Whether the example was truncated at `cutoff_len`; shape (n,).
        refused: Rows that the template cannot render.
        omitted: Number of rows by the part that the chat template does not render although nothing to learn is lost.
    """

    rows: NDArray[np.int64]
    lengths: NDArray[np.int64]
    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    prompt_lengths: NDArray[np.int32]
    truncated: NDArray[np.bool_]
    refused: list[Refused]
    omitted: Counter[str] = field(default_factory=Counter)


class Encoder:
    """Renders and tokenizes rows with the settings of one experiment. It can be pickled without the tokenizer's class.

    Args:
        tokenizer: A fast tokenizer.
        data: The experiment's data settings.

    Raises:
        DataError: if the tokenizer is slow, or lacks an end token or chat template that the settings require.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", data: Data) -> None:
        self.render = make_renderer(data.prompt_template, tokenizer)
        self.settings = data.tokenization
        self.whole_text = data.prompt_template.chat_template
        if not tokenizer.is_fast:
            raise DataError(f"{tokenizer.name_or_path}: has no fast tokenizer (tokenizer.json), which masking requires")
        self.backend = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        self.backend.no_padding()  # tokenizer.json may enable padding and truncation
        self.backend.no_truncation()
        self.adds_bos, self.adds_eos = _added_by(tokenizer)
        self.bos = str(tokenizer.bos_token)
        self.eos = None if self.whole_text or not self.settings.add_eos_token else tokenizer.eos_token_id
        if self.settings.add_eos_token and not self.whole_text and self.eos is None:
            raise DataError(
                f"{tokenizer.name_or_path}: has no end-of-sequence token; set data.tokenization.add_eos_token to false"
            )

    def encode(self, rows: Sequence[Row | RefusedRow]) -> TokenizedRows:
        """Render and tokenize rows, append the end token, truncate, and label. Refused rows stay refused."""
        taken, rendered, refused = self._rendered(rows)
        cutoff, count = self.settings.cutoff_len, len(rendered)
        lengths = np.empty(count, np.int64)
        prompts = np.empty(count, np.int32)
        truncated = np.zeros(count, np.bool_)
        ids: list[int] = []
        answers: list[Span] = []  # start and end (exclusive) in `ids`
        masked: list[Span] = []
        for i, (encoding, row) in enumerate(zip(self._encodings(rendered), rendered, strict=True)):
            tokens = self._ended(encoding.ids)
            if len(tokens) > cutoff:
                del tokens[cutoff:]
                truncated[i] = True
            inside = self._tokens_of(row.spans, encoding, row.text, len(tokens))
            prompts[i] = inside[-1][0] if inside else len(tokens)
            answers += [(len(ids) + first, len(ids) + last) for first, last in inside]
            hidden = self._tokens_of(row.masked, encoding, row.text, len(tokens))
            masked += [(len(ids) + first, len(ids) + last) for first, last in hidden]
            ids += tokens
            lengths[i] = len(tokens)
        input_ids = np.array(ids, np.int32)
        labels = self._label(input_ids, answers, masked)
        omitted = Counter(part for row in rendered for part in row.omitted)
        return TokenizedRows(
            np.array(taken, np.int64), lengths, input_ids, labels, prompts, truncated, refused, omitted
        )

    def lengths(self, rows: Sequence[Row]) -> list[int]:
        """Number of tokens of each row before it is truncated; 0 for a row that the template cannot render."""
        taken, rendered, _ = self._rendered(rows)
        lengths = [0] * len(rows)
        for row, encoding in zip(taken, self._encodings(rendered), strict=True):
            lengths[row] = len(self._ended(encoding.ids))
        return lengths

    def _rendered(self, rows: Sequence[Row | RefusedRow]) -> tuple[list[int], list[Rendered], list[Refused]]:
        taken, rendered, refused = [], [], []
        for i, row in enumerate(rows):
            try:
                if isinstance(row, RefusedRow):
                    raise row
                rendered.append(self.render(row))
                taken.append(i)
            except RefusedRow as e:
                refused.append(Refused(i, str(e)))
        if self.adds_bos and not self.whole_text:
            rendered = [_without_start(one, self.bos) for one in rendered]
        return taken, rendered, refused

    def _ended(self, tokens: list[int]) -> list[int]:
        """The tokens of a row with the end token that the settings ask for."""
        if self.adds_eos and not self.whole_text and not self.settings.add_eos_token:
            tokens.pop()
        if self.eos is not None and tokens[-1] != self.eos:
            tokens.append(self.eos)
        return tokens

    def _encodings(self, rendered: list[Rendered]) -> Iterator[Encoding]:
        for start in range(0, len(rendered), ENCODED_TOGETHER):
            texts = [row.text for row in rendered[start : start + ENCODED_TOGETHER]]
            yield from self.backend.encode_batch(texts, add_special_tokens=not self.whole_text)

    def _last(self, encoding: Encoding, end: int, text: str) -> int:
        """Index after the last token of an answer. An answer at the end of the text extends to the example's end."""
        return 1 << 31 if end >= len(text) else token_behind(encoding, end, len(text))

    def _tokens_of(self, spans: Sequence[Span], encoding: Encoding, text: str, count: int) -> list[Span]:
        """First and last (exclusive) token of each span, without spans that begin after the first `count` tokens."""
        return [
            (first, min(self._last(encoding, end, text), count))
            for start, end in spans
            if (first := first_token_at(encoding, start, end)) < count
        ]

    def _label(self, ids: NDArray[np.int32], answers: list[Span], masked: list[Span]) -> NDArray[np.int32]:
        if self.settings.train_on_inputs:
            return np.where(_inside(masked, len(ids)), np.int32(IGNORED), ids)
        return np.where(_inside(answers, len(ids)), ids, np.int32(IGNORED))


def _inside(spans: list[Span], count: int) -> NDArray[np.bool_]:
    """Whether each of `count` tokens is inside a span; shape (count,)."""
    edges = np.zeros(count + 1, np.int32)
    ends = np.array(spans, np.int64).reshape(-1, 2)
    np.add.at(edges, ends[:, 0], 1)
    np.add.at(edges, ends[:, 1], -1)
    return np.cumsum(edges[:-1]) > 0


def _added_by(tokenizer: "PreTrainedTokenizerBase") -> tuple[bool, bool]:
    """Whether the tokenizer adds its BOS token before a text, and its EOS token after it."""
    ids = tokenizer.backend_tokenizer.encode("a").ids  # type: ignore[attr-defined]
    bare = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).ids  # type: ignore[attr-defined]
    longer = len(ids) > len(bare)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return longer and bos is not None and ids[0] == bos, longer and eos is not None and ids[-1] == eos


def _without_start(row: Rendered, start: str) -> Rendered:
    """The row without the text that it starts with; unchanged if it starts with another text."""
    if not row.text.startswith(start):
        return row
    spans = tuple((first - len(start), last - len(start)) for first, last in row.spans)
    return row._replace(text=row.text.removeprefix(start), spans=spans)


def first_token_at(encoding: Encoding, start: int, end: int) -> int:
    """Index of the first token that holds a character of text[start:end]; the number of tokens if none does.

    A character that the tokenizer drops (such as a stripped space) belongs to no token, so the next one is used.
    """
    for character in range(start, end):
        token = encoding.char_to_token(character)
        if token is not None:
            return int(token)
    return len(encoding.ids)


def token_behind(encoding: Encoding, end: int, length: int) -> int:
    """Index after the last token that holds a character of text[:end], in a text of `length` characters."""
    for character in range(end, length):
        token = encoding.char_to_token(character)
        if token is not None:
            begins, _ = encoding.token_to_chars(token) or (character, character)
            return int(token) + (begins < end)
    return len(encoding.ids)


def check_positions(folder: Path, data: Data) -> None:
    """Check that `cutoff_len` does not exceed the maximum number of positions of the model in this folder.

    Raises:
        DataError: naming both values.
    """
    positions = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings")
    cutoff = data.tokenization.cutoff_len
    if positions is not None and cutoff > positions:
        raise DataError(f"data.tokenization.cutoff_len: {cutoff} is more than the base model's {positions} positions")


def load_tokenizer(
    folder: str, added_tokens: Sequence[str] = (), trust_remote_code: bool = False
) -> "PreTrainedTokenizerBase":
    """Load the tokenizer from the local folder of a base model or adapter.

    Args:
        folder: Folder with the tokenizer's files.
        added_tokens: Tokens to add if the tokenizer lacks them (`data.tokenization.added_tokens`).
        trust_remote_code: Run the Python code in the folder, if the tokenizer requires it.

    Raises:
        DataError: if no tokenizer can be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as e:  # the parser, written in Rust, raises any exception type for a damaged file
        raise DataError(f"{folder}: the tokenizer cannot be loaded: {e}") from e
    if added_tokens:
        tokenizer.add_special_tokens({"extra_special_tokens": list(added_tokens)}, replace_extra_special_tokens=False)
    return tokenizer
