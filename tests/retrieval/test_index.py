"""The BM25 index: what it finds, that it is the same bytes when rebuilt, and how well it finds real rows' contexts."""

import json
import shutil
from collections import defaultdict
from pathlib import Path

import pytest
from retrieval.towns import TOWNS, passage

from finetune_assets.config.documents_schema import DocumentsConfig, IndexSettings, PassageSettings
from finetune_assets.data.errors import DataError
from finetune_assets.retrieval.documents import Document
from finetune_assets.retrieval.golden import golden_passages
from finetune_assets.retrieval.index import Index, build_index, open_index
from finetune_assets.retrieval.metrics import hit_rate, rank_of
from finetune_assets.sources.base_models import PACKAGED


def built(folder: Path, *texts: str, config: DocumentsConfig | None = None) -> Index:
    folder.mkdir(parents=True)
    build_index(
        (Document(text, f"{number}.txt") for number, text in enumerate(texts)), config or DocumentsConfig(), folder
    )
    return open_index(folder)


def numbers(index: Index, query: str, k: int = 3) -> list[int]:
    return [hit.passage for hit in index.search([query], k)[0]]


def same_bytes(ours: Path, theirs: Path) -> bool:
    """Whether two folders have the same files with the same bytes."""
    files = [
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (ours, theirs)
    ]
    return len(files[0]) > 3 and files[0] == files[1]


def test_search(tmp_path: Path) -> None:
    texts = ["The red fox.", "A red, red house.", "Blue seas.", "The red fox!"]
    index = built(tmp_path / "a", *texts, "The fox\n\nA fox red")
    assert numbers(index, "RED house") == [1, 0, 3]
    assert numbers(index, "fox", 9) == [4, 0, 3, 5], "equal scores by number; all that have a word of the query"
    assert numbers(index, "the") == numbers(index, "") == numbers(index, "unknown words") == []
    hits = index.search(["blue", "red"], 1)
    assert [[hit.passage for hit in found] for found in hits] == [[2], [1]]
    assert hits[0][0].score > 0


def test_settings_act(tmp_path: Path) -> None:
    texts = ["red", "red red red and many other words of no use here", "blue"]
    first = {
        name: numbers(built(tmp_path / name, *texts, config=DocumentsConfig(index=settings)), "red and")
        for name, settings in {
            "default": IndexSettings(),
            "no length": IndexSettings(b=0.0),
            "no repeats": IndexSettings(k1=0.0, b=0.0),
            "with and": IndexSettings(stopwords="none"),
        }.items()
    }
    assert first == {"default": [0, 1], "no length": [1, 0], "no repeats": [0, 1], "with and": [1, 0]}


def test_titles_are_searched_and_words_in_other_scripts_found(tmp_path: Path) -> None:
    tmp_path = tmp_path / "a"
    tmp_path.mkdir()
    documents = [
        Document("# Alby\nIt sells oil.\n# Breham\nIt sells oil.\n\nIt is large.", "a.md", markdown=True),
        Document("東京は日本の首都", "t"),
        Document("ﬁsh and Straße", "u"),
    ]
    build_index(documents, DocumentsConfig(), tmp_path)
    index = open_index(tmp_path)
    assert numbers(index, "Breham") == [1]
    assert numbers(index, "首都") == [2]
    assert numbers(index, "fish") == numbers(index, "STRASSE") == [3]


def test_rebuilt_it_is_the_same_bytes(tmp_path: Path) -> None:
    texts = [passage(town) for town in TOWNS]
    for name in ("a", "b"):
        built(tmp_path / name, *texts)
    assert same_bytes(tmp_path / "a", tmp_path / "b")
    added, deleted = built(tmp_path / "c", *texts, "One more town."), built(tmp_path / "d", *texts[1:])
    assert added.fingerprint != open_index(tmp_path / "a").fingerprint != deleted.fingerprint
    assert golden_passages(deleted.passages, texts[0]) == [], "a deleted document is not found in place of another"


def test_no_passage(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        built(tmp_path / "a", " ", "\n")
    index = built(tmp_path / "b", "---", "***")
    assert numbers(index, "---") == [], "passages without a word are not found"


def test_hit_rate() -> None:
    assert rank_of([4, 2, 9], {9, 2}) == 2
    assert rank_of([4], {1}) is None
    rates = hit_rate([1, 2, None, 4], (1, 3, 10))
    assert (rates.queries, rates.hits, rates.mrr) == (4, {1: 0.25, 3: 0.5, 10: 0.75}, (1 + 0.5 + 0.25) / 4)
    assert hit_rate([]).mrr == 0


PUBLISHED = {"closed_qa": (0.78, 0.90), "information_extraction": (0.69, 0.82), "summarization": (0.72, 0.84)}


@pytest.mark.system
@pytest.mark.real_data
def test_contexts_of_real_rows_are_found(dolly: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in dolly.read_text(encoding="utf-8").splitlines()]
    by_category = defaultdict(list)
    for row in rows:
        if row["context"].strip():
            by_category[row["category"]].append(row)
    contexts = [row["context"] for rows in by_category.values() for row in rows]
    index = built(tmp_path / "a", *contexts, config=DocumentsConfig(passages=PassageSettings("document")))
    assert len(index.passages) == 4_112, "4,120 distinct contexts, eight of which differ in spacing or case alone"
    for category, (first, third) in PUBLISHED.items():
        found = index.search([row["instruction"] for row in by_category[category]], 10)
        golden = [golden_passages(index.passages, row["context"]) for row in by_category[category]]
        rates = hit_rate(
            [rank_of((hit.passage for hit in hits), known) for hits, known in zip(found, golden, strict=True)]
        )
        assert rates.hits[1] == pytest.approx(first, abs=0.02)
        assert rates.hits[3] == pytest.approx(third, abs=0.02)
        assert rates.hits[10] > 0.87
        assert all(golden)


def dense_index(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    """An index by the model in `model`, a relative path. It is built twice, as the same bytes, and opened in another
    place, where the model is not: as on the machine of a worker.
    """
    config = DocumentsConfig(index=IndexSettings("dense", model="model"))
    for name in ("a", "b"):
        (folder / name).mkdir()
        build_index((Document(passage(town), "t") for town in TOWNS), config, folder / name, folder)
    assert same_bytes(folder / "a", folder / "b")
    shutil.rmtree(folder / "model")
    elsewhere = folder / "elsewhere"
    (folder / "a").rename(elsewhere)
    monkeypatch.chdir(elsewhere)
    return open_index(elsewhere)


def finds_each_passage(index: Index) -> bool:
    """Whether each passage is the nearest to its own text, with a similarity of 1."""
    hits = [found[0] for found in index.search([passage(town) for town in TOWNS], 1)]
    assert [hit.score for hit in hits] == pytest.approx([1] * len(TOWNS))
    return [hit.passage for hit in hits] == [*range(len(TOWNS))]


def test_dense_index_of_the_packaged_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(PACKAGED["demo-base"], tmp_path / "model")
    index = dense_index(tmp_path, monkeypatch)
    assert finds_each_passage(index)
    assert len(index.search([passage(TOWNS[7])], 99)[0]) == len(TOWNS)
    assert index.search([""], 3) == [[]]
    questions = [f"What is it that {town} sells?" for town in TOWNS]
    ranks = [rank_of((hit.passage for hit in found), {at}) for at, found in enumerate(index.search(questions, 10))]
    assert hit_rate(ranks).hits[10] > 0.5, hit_rate(ranks)


@pytest.mark.system
def test_dense_index_of_a_sentence_transformers_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the library itself, with the packaged model as its transformer."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(PACKAGED["demo-base"]), device="cpu", model_kwargs={"dtype": "float32"})
    model.save(str(tmp_path / "model"))
    index = dense_index(tmp_path, monkeypatch)
    assert finds_each_passage(index)
    (hits,) = index.search(["oil"], len(TOWNS))
    query, *texts = model.encode(["oil", *map(passage, TOWNS)], normalize_embeddings=True)
    similarities = sorted((float(query @ text) for text in texts), reverse=True)
    assert [hit.score for hit in hits] == pytest.approx(similarities, abs=1e-5)


@pytest.mark.parametrize("files", [(), ("tokenizer.json",), ("model.safetensors",), ("modules.json",)])
def test_models_that_embed_nothing(tmp_path: Path, files: tuple[str, ...]) -> None:
    (tmp_path / "model").mkdir()
    for name in files:
        source = PACKAGED["demo-base"] / name
        (tmp_path / "model" / name).write_bytes(source.read_bytes() if source.exists() else b"[]")
    (tmp_path / "out").mkdir()
    config = DocumentsConfig(index=IndexSettings("dense", model="model"))
    with pytest.raises(DataError):
        build_index([Document("Text.", "t")], config, tmp_path / "out", tmp_path)
