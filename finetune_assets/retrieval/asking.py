"""Retrieves the passages for a question, in the format that an adapter was trained with.

    retriever = Retriever(adapter="adapter", index="adapter-index")
    found = retriever.find("Which river runs through Ashaford?")
    found.messages   # for the tokenizer's chat template
    found.sources    # where each numbered passage is from

`retrieval.json` in an adapter's folder describes the format, and names the index of the training. An index of newer
documents is used in the same way.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from finetune_assets.config.schema import Data
from finetune_assets.data.layouts.instruction import conversation
from finetune_assets.retrieval.contexts import BETWEEN, PASSAGE
from finetune_assets.retrieval.index import open_index
from finetune_assets.store.json_object import check_types, read_json

RETRIEVAL_FILE = "retrieval.json"
CONTEXT, QUESTION = "context", "user"
"""Roles of the messages of a prompt without a chat template of the base model."""


@dataclass(frozen=True)
class RetrievalFormat:
    """What `retrieval.json` of an adapter has.

    Attributes:
        documents: Name of the document set.
        index: Fingerprint of the index that the adapter was trained with; None if it is not known.
        passages: Maximum number of passages for a question.
        passage: Format of a passage in the context, with `{number}` and `{text}`.
        between: Text between two passages.
        separate: Whether the context is a message of its own, with the role `context`. Otherwise it follows the
            question in the user's message.
        cite: Whether answers end with the numbers of the passages they are from.
        refusal: The answer where no passage has one; empty if the adapter has learned none.
    """

    documents: str
    index: str | None
    passages: int
    passage: str = PASSAGE
    between: str = BETWEEN
    separate: bool = True
    cite: bool = False
    refusal: str = ""

    @classmethod
    def of_experiment(cls, data: Data, index: str | None) -> "RetrievalFormat":
        """The format of an experiment's adapters.

        Args:
            data: Data settings of the experiment, with `retrieval`.
            index: Fingerprint of the index.
        """
        settings = data.retrieval
        assert settings is not None
        refusal = settings.refusal if settings.without_golden == "refuse" else ""
        separate = not data.prompt_template.chat_template
        return cls(settings.documents, index, settings.passages, separate=separate, cite=settings.cite, refusal=refusal)

    @classmethod
    def read(cls, adapter: Path) -> "RetrievalFormat":
        """Read `retrieval.json` of an adapter's folder.

        Raises:
            InvalidJson: if it is not such a file.
        """
        tree = read_json(adapter / RETRIEVAL_FILE, f"the adapter in {adapter}")
        known = {"index": None, **{field.name: tree[field.name] for field in fields(cls) if field.name in tree}}
        check_types(known, TYPES)
        return cls(**known)

    def write(self, folder: Path) -> None:
        (folder / RETRIEVAL_FILE).write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False), encoding="utf-8")


TYPES: dict[str, type | tuple[type, ...]] = {"documents": str, "passages": int, "index": (str, type(None))}
"""Types of the required fields of `retrieval.json`."""


@dataclass(frozen=True)
class FoundPassage:
    """A passage in the context of a question.

    Attributes:
        number: Its number in the context, from 1.
        text: Its text.
        source: Document that it is from.
        position: Number of the passage in its document, from 0.
        title: Title of the document, or heading above the passage; may be empty.
    """

    number: int
    text: str
    source: str
    position: int
    title: str

    def __str__(self) -> str:
        title = f"{self.title}, " if self.title else ""
        return f"[{self.number}] {title}{self.source}, passage {self.position + 1}"


@dataclass(frozen=True)
class Found:
    """A question with its passages.

    Attributes:
        question: The question.
        sources: Its passages, best first.
        settings: Format of the adapter.
    """

    question: str
    sources: Sequence[FoundPassage]
    settings: RetrievalFormat

    @property
    def context(self) -> str:
        """The numbered passages as text; empty if none was found."""
        form = self.settings.passage
        return self.settings.between.join(form.format(number=each.number, text=each.text) for each in self.sources)

    @property
    def messages(self) -> list[dict[str, str]]:
        """Messages for the adapter's chat template."""
        if not self.settings.separate:
            return conversation(self.question, self.context, "")[:1]
        question = {"role": QUESTION, "content": self.question}
        return [{"role": CONTEXT, "content": self.context}, question] if self.context else [question]

    def fitting(self, fits: Callable[[list[dict[str, str]]], bool]) -> "Found":
        """The question with as many of its best passages as fit.

        Args:
            fits: Whether messages fit into the model's context.
        """
        found = self
        while found.sources and not fits(found.messages):
            found = Found(self.question, found.sources[:-1], self.settings)
        return found


class Retriever:
    """Finds the passages for questions.

    Args:
        adapter: Folder of an adapter that was trained with retrieval, or its format.
        index: Folder of a retrieval index.

    Raises:
        InvalidJson: if one of the folders is not what it should be.
    """

    def __init__(self, adapter: Path | str | RetrievalFormat, index: Path | str) -> None:
        self.settings = adapter if isinstance(adapter, RetrievalFormat) else RetrievalFormat.read(Path(adapter))
        self.index = open_index(Path(index))

    def find(self, question: str) -> Found:
        """Find the passages for a question."""
        (hits,) = self.index.search([question], self.settings.passages)
        return Found(question, [self._passage(hit.passage, i) for i, hit in enumerate(hits, 1)], self.settings)

    def _passage(self, passage: int, number: int) -> FoundPassage:
        row: dict[str, Any] = self.index.passages.table.slice(passage, 1).to_pylist()[0]
        return FoundPassage(number, row["text"], row["source"], row["position"], row["title"])
