"""Towns that the packaged base model has never read: documents about them, and questions that only these answer.

The base model knows the towns of `make_world`. The towns here have other names, and their facts occur in no text that
it was trained on, so a model can answer a question about one of them only if it reads the town's document. Each town
is asked about once: a held-out question is about a town that no training row mentions.
"""

import random
from collections.abc import Iterator
from itertools import groupby

from finetune_assets.sample.world import ATTRIBUTES, World, make_world, town_names

TOWNS = 3_000
"""With fewer, an adapter learns the questions by heart: of 900, it answered 65% of the held-out ones."""
FACTS_PER_TOWN = 4
STARTS = (
    "Al Bel Cor Dun Er Fen Gar Hol Il Jor Kel Lor Mel Nor Os Pel Quin Ras "
    "Sal Tam Ul Ver Wes Yor Zan Brun Cren Drum Elm Frey Grim Hart Ing Keld Lund Mord"
).split()
"""First syllables of names besides those of the base model's towns."""
QUESTION_CATEGORY = "closed_qa"


def new_towns(towns: int = TOWNS, seed: int = 17) -> World:
    """Draw towns that are not in `make_world`, with a few facts about each, in the order of their documents."""
    rng = random.Random(seed)
    names = sorted({*town_names(), *town_names(STARTS)} - {*make_world().facts})
    return World({town: _facts(rng) for town in sorted(rng.sample(names, towns))})


def _facts(rng: random.Random) -> dict[str, str]:
    attributes = rng.sample(list(ATTRIBUTES), FACTS_PER_TOWN)
    return {attribute: rng.choice(ATTRIBUTES[attribute][0]) for attribute in attributes}


def paragraphs(world: World, seed: int = 19) -> dict[str, dict[str, str]]:
    """The document of each town: town -> attribute -> a paragraph that states the fact."""
    rng = random.Random(seed)
    return {
        town: {name: rng.choice(ATTRIBUTES[name][1]).format(t=town, v=value) for name, value in facts.items()}
        for town, facts in world.facts.items()
    }


def documents(world: World) -> Iterator[tuple[str, str]]:
    """Name and text of Markdown files, one for each first letter of a town."""
    texts = paragraphs(world)
    for letter, towns in groupby(texts, key=lambda town: town[0]):
        sections = ["\n\n".join([f"## {town}", *texts[town].values()]) for town in towns]
        yield f"towns-{letter.lower()}.md", "\n\n".join([f"# Towns with {letter}", *sections]) + "\n"


def question_rows(world: World, seed: int = 23) -> list[dict[str, str]]:
    """One question about each town in Dolly's schema; its context is the paragraph that the answer is in."""
    rng = random.Random(seed)
    texts = paragraphs(world)
    rows = []
    for town, facts in world.facts.items():
        attribute = rng.choice(list(facts))
        question = rng.choice(ATTRIBUTES[attribute][2]).format(t=town)
        row = {"instruction": question, "context": texts[town][attribute], "response": facts[attribute]}
        rows.append({**row, "category": QUESTION_CATEGORY})
    rng.shuffle(rows)
    return rows
