"""Invented towns as documents, and rows that ask about them."""

import json
from pathlib import Path

from finetune_assets.config.documents_schema import DocumentsConfig
from finetune_assets.config.schema import Data, PromptTemplate, Retrieval, Tokenization
from finetune_assets.data.rows import Row
from finetune_assets.retrieval.documents import Document
from finetune_assets.retrieval.index import build_index

FIRST, LAST = (
    ("Al", "Bre", "Cor", "Dun", "Elm", "Fal", "Gor", "Hal", "Ist", "Jor"),
    ("by", "dale", "ford", "ham", "wick"),
)
GOODS, RIVERS = ("oil", "wool", "salt", "wine", "fish"), ("Ahr", "Enz", "Iser", "Lahn")
TOWNS = [first + last for first in FIRST for last in LAST]
TEMPLATE = PromptTemplate(
    prompt_input="{context}\nQ: {instruction}\nA: ", prompt_no_input="Q: {instruction}\nA: ", response_split="A:"
)
REFUSAL = "Not in the documents."


def passage(town: str) -> str:
    number = TOWNS.index(town)
    return f"{town} sells {GOODS[number % 5]} and lies on the {RIVERS[number % 4]}."


def rows() -> list[Row]:
    """Two questions about each town."""
    same = {"messages": None, "tools": None}
    return [
        {"instruction": question.format(town), "context": passage(town), "response": answer, "category": kind, **same}
        for number, town in enumerate(TOWNS)
        for question, answer, kind in (
            ("What is it that {} sells?", GOODS[number % 5], "goods"),
            ("On which river lies {}?", RIVERS[number % 4], "rivers"),
        )
    ]


def write_rows(path: Path) -> Path:
    names = ("instruction", "context", "response", "category")
    path.write_text("".join(json.dumps({name: row[name] for name in names}) + "\n" for row in rows()))
    return path


def index(folder: Path, without: str = "") -> Path:
    """An index of the towns, except of one."""
    folder.mkdir(parents=True)
    build_index((Document(passage(town), town) for town in TOWNS if town != without), DocumentsConfig(), folder)
    return folder


def data(cutoff_len: int = 256, **settings: object) -> Data:
    retrieval = Retrieval(documents="towns", **settings)  # type: ignore[arg-type]
    tokens = Tokenization(cutoff_len=cutoff_len)
    held_out = {"val_fraction": 0.2, "gate_fraction": 0.2, "near_duplicate_threshold": None}
    return Data(prompt_template=TEMPLATE, tokenization=tokens, retrieval=retrieval, **held_out)  # type: ignore[arg-type]
