"""Dense retrieval: passages whose embeddings are most similar to that of the query (cosine similarity).

`index.model` names one of:

- a sentence-transformers model, a folder with `modules.json` or `owner/name@commit` on the Hub (needs the extra
  `retrieval`);
- a folder with a language model: a text's embedding is the mean of the model's input embeddings of its tokens, in which
  a token counts less the more frequent it is in the passages (SIF, Arora et al. 2017). No other weights are read, and
  nothing is computed by the model. It needs no further package, and finds less than a model that was trained to embed.

The index holds a copy of what embeds queries, so that it finds the same passages on every machine.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from finetune_assets.config.documents_schema import IndexSettings
from finetune_assets.data.errors import DataError
from finetune_assets.progress import Progress, Unit
from finetune_assets.retrieval.index import Hit
from finetune_assets.retrieval.passages import Passages

Vectors = NDArray[np.float32]
PASSAGES = Unit("passages")
EMBEDDINGS, TOKENS, TOKENIZER, MODEL = "embeddings.npy", "token_embeddings.npy", "tokenizer.json", "model"
INPUT_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")
"""How names of a language model's input embeddings end."""
FREQUENT = 1e-3
"""Share of all tokens from which a token counts less than half."""
AT_A_TIME = 256
"""Passages that are embedded at a time."""
QUERIES_AT_A_TIME = 64
"""Queries that are compared with all passages at a time."""


class Embedder(Protocol):
    """Embeds texts."""

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Embeddings of length 1, or 0 for a text without a token; shape (texts, dimensions)."""


class TokenMeans:
    """Embeds a text as the mean of a language model's input embeddings of its tokens.

    Args:
        folder: Folder with the tokens' embeddings and the tokenizer.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self.tokens: Vectors = np.load(folder / TOKENS, mmap_mode="r")
        self.tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))

    def embed(self, texts: Sequence[str]) -> Vectors:
        encoded = self.tokenizer.encode_batch([*texts], add_special_tokens=False)
        sums = [np.asarray(self.tokens[each.ids], np.float32).sum(axis=0, dtype=np.float64) for each in encoded]
        return _of_length_one(np.stack(sums))

    @staticmethod
    def save(model: Path, texts: Sequence[str], folder: Path) -> None:
        """Copy the tokenizer of a language model, and its input embeddings with the weight of each token in texts.

        Raises:
            DataError: if the model has none.
        """
        from safetensors import safe_open

        if not (model / TOKENIZER).is_file():
            raise DataError(f"index.model: {model} has no {TOKENIZER}; name the folder of a model with one")
        for path in sorted(model.glob("*.safetensors")):
            with safe_open(path, framework="pt") as tensors:
                name = next((name for name in tensors.keys() if name.endswith(INPUT_EMBEDDINGS)), None)  # noqa: SIM118
                if name:
                    shutil.copyfile(model / TOKENIZER, folder / TOKENIZER)
                    embeddings = tensors.get_tensor(name).float().numpy()
                    np.save(folder / TOKENS, embeddings * _weights(folder, texts, len(embeddings))[:, None])
                    return
        raise DataError(f"index.model: {model} has no input embeddings ({', '.join(INPUT_EMBEDDINGS)}) in safetensors")


class SentenceTransformers:
    """Embeds texts with a sentence-transformers model, in float32: with less, what is found for a query depends on the
    other queries of its batch.

    Args:
        model: Its folder, or `owner/name@commit`.
    """

    def __init__(self, model: Path | str) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as e:
            raise DataError(
                f"index.model: {model} needs sentence-transformers; install the extra: pip install "
                "'finetune-assets[retrieval]'"
            ) from e
        name, _, revision = str(model).partition("@")
        try:
            self.model = SentenceTransformer(
                name,
                revision=revision or None,
                device="cpu",
                trust_remote_code=False,
                model_kwargs={"dtype": "float32"},
            )
        except Exception as e:  # damaged folders and missing models raise many types
            raise DataError(f"index.model: {model} cannot be loaded by sentence-transformers: {e}") from e

    def save(self, folder: Path) -> None:
        """Copy the model, without a model card: that has the time and the versions of the libraries."""
        self.model.save(str(folder), create_model_card=False)

    def embed(self, texts: Sequence[str]) -> Vectors:
        return _of_length_one(np.asarray(self.model.encode([*texts], show_progress_bar=False), np.float64))


def build(passages: Passages, settings: IndexSettings, folder: Path, models: Path | None) -> Mapping[str, Any]:
    """Write the embeddings of passages to a folder, and what embeds queries; see `IndexKind`."""
    setting = settings.model or ""
    model = (models or Path()) / Path(setting).expanduser()
    if model.is_dir() and not (model / "modules.json").is_file():
        TokenMeans.save(model, passages.texts, folder)
    else:
        SentenceTransformers(model if model.is_dir() else setting).save(folder / MODEL)
    embedder, embedded = _embedder(folder), []
    with Progress("embedding passages", len(passages), PASSAGES) as progress:
        for start in range(0, len(passages), AT_A_TIME):
            part = slice(start, start + AT_A_TIME)
            titled = zip(passages.titles[part], passages.texts[part], strict=True)
            embedded.append(embedder.embed([f"{title}\n{text}" if title else text for title, text in titled]))
            progress.add(len(embedded[-1]))
    vectors = np.concatenate(embedded)
    np.save(folder / EMBEDDINGS, vectors)
    return {"dimensions": vectors.shape[1]}


def open_index(passages: Passages, settings: IndexSettings, folder: Path) -> "DenseSearcher":
    """Open the index that `build` wrote; see `IndexKind`."""
    return DenseSearcher(folder)


def _embedder(folder: Path) -> Embedder:
    return TokenMeans(folder) if (folder / TOKENS).is_file() else SentenceTransformers(folder / MODEL)


class DenseSearcher:
    """Finds passages by cosine similarity, also those without a word of the query.

    Args:
        folder: Folder of the index.
    """

    def __init__(self, folder: Path) -> None:
        self.embeddings: Vectors = np.load(folder / EMBEDDINGS, mmap_mode="r")
        self.embedder = _embedder(folder)

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        found: list[list[Hit]] = []
        for start in range(0, len(queries), QUERIES_AT_A_TIME):
            vectors = self.embedder.embed(queries[start : start + QUERIES_AT_A_TIME])
            scores = vectors @ self.embeddings.T
            found += [self._best(row, k) if vector.any() else [] for row, vector in zip(scores, vectors, strict=True)]
        return found

    @staticmethod
    def _best(scores: Vectors, k: int) -> list[Hit]:
        if k < 1:
            return []
        high = np.flatnonzero(scores >= np.partition(scores, -k)[-k])
        order = high[np.lexsort((high, -scores[high]))][:k]
        return [Hit(int(passage), float(scores[passage])) for passage in order]


def _weights(folder: Path, texts: Sequence[str], tokens: int) -> Vectors:
    """Weight of each token: less, the more frequent it is in the texts; 0 for one that does not occur in them."""
    from tokenizers import Tokenizer

    tokenizer, counts = Tokenizer.from_file(str(folder / TOKENIZER)), np.zeros(tokens)
    for start in range(0, len(texts), AT_A_TIME):
        for each in tokenizer.encode_batch(texts[start : start + AT_A_TIME], add_special_tokens=False):
            np.add.at(counts, each.ids, 1)
    weights = np.where(counts, FREQUENT / (FREQUENT + counts / max(1, counts.sum())), 0)
    return weights.astype(np.float32)


def _of_length_one(vectors: NDArray[np.float64]) -> Vectors:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: Vectors = (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)
    return scaled
