"""A small invented country, the subject of the packaged sample and of the packaged base model's training text.

Every answer in the sample can be verified, because every fact is drawn here from a seed. `instruction_rows` writes the
facts as instructions in Dolly's schema; `prose` writes the same facts as plain statements, without a single
instruction. A base model trained on the prose knows the answers but cannot follow instructions, which a LoRA adapter
can then be shown to teach.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

REGIONS = "Northmark Eastfold Southmoor Westreach Highdale Lowfen Midvale Farcoast".split()
RIVERS = "Issel Tarn Orrin Lode Wend Brae Kestrel Mirr Soan Ulva Fenn Garrow".split()
GOODS = "salt wool honey glass amber copper paper silk tin oil wine cheese rope tar ink lace".split()
ANIMALS = "otter heron fox bear hare owl stag lynx crane badger raven pike swan wolf boar mole".split()
MONTHS = ("January February March April May June July August September October November December").split()
PEOPLE = "Tavi Mira Oskar Lena Bruno Edda Felix Greta Hugo Ida Jonas Klara Lukas Marta Nils Olga".split()
JOBS = "baker smith weaver miller potter tailor carter fisher mason cooper".split()

# What a town is known for: attribute -> (values, statements, questions). `{t}` is the town, `{v}` the value.
# The statements use the words of the questions (what, which, who, where), but never the form of a question.
ATTRIBUTES: dict[str, tuple[list[str], list[str], list[str]]] = {
    "region": (
        REGIONS,
        [
            "{t} lies in the region of {v}.",
            "The region of {t} is {v}.",
            "{t} is a town in {v}.",
            "The region where {t} lies is {v}.",
            "What region {t} belongs to is well known: {v}.",
            "On every map {t} is found in {v}.",
        ],
        [
            "In which region does {t} lie?",
            "What is the region of {t}?",
            "Name the region where {t} is found.",
            "Which region does {t} belong to?",
        ],
    ),
    "river": (
        RIVERS,
        [
            "{t} stands on the river {v}.",
            "The river of {t} is the {v}.",
            "The river that runs through {t} is the {v}.",
            "Through {t} runs the {v}.",
            "Which river runs through {t} is well known: the {v}.",
            "The boats of {t} sail on the {v}.",
        ],
        [
            "Which river runs through {t}?",
            "What is the river of {t}?",
            "On which river does {t} stand?",
            "Name the river that runs through {t}.",
        ],
    ),
    "good": (
        GOODS,
        [
            "{t} is known for its {v}.",
            "The good that {t} sells is {v}.",
            "The merchants of {t} sell {v}.",
            "What {t} sells is well known: {v}.",
            "The main good of {t} is {v}.",
            "Carts leave {t} full of {v}.",
        ],
        [
            "What good does {t} sell?",
            "Which good is {t} known for?",
            "What do the merchants of {t} sell?",
            "Name the main good of {t}.",
        ],
    ),
    "animal": (
        ANIMALS,
        [
            "The animal on the arms of {t} is the {v}.",
            "{t} bears the {v} on its arms.",
            "The arms of {t} show the {v}.",
            "On the flag of {t} stands the {v}.",
            "Which animal {t} bears is well known: the {v}.",
            "The animal of {t} is the {v}.",
        ],
        [
            "Which animal is on the arms of {t}?",
            "What animal does {t} bear on its arms?",
            "What is the animal of {t}?",
            "Name the animal on the flag of {t}.",
        ],
    ),
    "month": (
        MONTHS,
        [
            "The fair of {t} is held in {v}.",
            "{t} holds its fair in {v}.",
            "The month of the fair of {t} is {v}.",
            "Every {v} there is a fair in {t}.",
            "When {t} holds its fair is well known: in {v}.",
            "People go to the fair of {t} in {v}.",
        ],
        [
            "In which month is the fair of {t} held?",
            "When does {t} hold its fair?",
            "What is the month of the fair of {t}?",
            "Name the month when people go to the fair of {t}.",
        ],
    ),
}

# Every visit is drawn at random, so its answers can only be read from the text about it.
VISIT_STATEMENTS = {
    "person": ["It was {person} who came to {town}.", "The name of the {job} was {person}."],
    "good": ["What {person} bought was {good}.", "The good that {person} bought was {good}."],
    "month": ["It was in {month} that {person} came.", "The month when {person} came was {month}."],
    "job": ["The work of {person} was that of a {job}.", "It was as a {job} that {person} came."],
}
VISIT_TELLINGS = [
    "In {month} {person} the {job} came to {town} and bought {good}.",
    "{person} the {job} bought {good} in {town} in {month}.",
    "{town} saw {person} the {job} in {month}, who bought {good}.",
]
VISIT_QUESTIONS = {
    "person": ["Who came to {town}?", "What was the name of the {job}?"],
    "good": ["What did {person} buy?", "Which good did {person} buy?"],
    "month": ["In which month did {person} come?", "When did {person} come?"],
    "job": ["What was the work of {person}?", "As what did {person} come?"],
}

KINDS = {"region": REGIONS, "river": RIVERS, "good": GOODS, "animal": ANIMALS, "month": MONTHS}
KIND_STATEMENTS = [
    "The name of the {kind} is {v}.",
    "Of {v} and {w}, the {kind} is {v}.",
    "Of {w} and {v}, the {kind} is {v}.",
    "{v} is the {kind} and {w} is the {other}.",
    "Which of {v} or {w} is the {kind} is well known: {v}.",
    "Which of {w} or {v} is the {kind} is well known: {v}.",
]
KIND_QUESTIONS = ["Which is the {kind}: {v} or {w}?", "Which is the {kind}: {w} or {v}?"]

# Headings and marks used in prompts: a base model that has never seen them could not learn them with LoRA.
RUBRICS = ["### Instruction: {s}", "### Input: {s}", "### Response: {s}", "# {s}", "## {s}"]


STARTS = "Vel Kar Bren Dor Hal Mar Tor Sel Wyn Ash Gil Rod Pen Lin Cas Fal".split()
"""First syllables of the names of towns."""


@dataclass(frozen=True)
class World:
    """Towns and their facts.

    Attributes:
        facts: town -> attribute -> value.
    """

    facts: dict[str, dict[str, str]]


def town_names(starts: Sequence[str] = STARTS) -> list[str]:
    """All names that a town with one of these first syllables may have, sorted."""
    middles = ["a", "o", "e", "i", "an", "or", "el"]
    ends = "mora stead wick dale ford holm by nes burg gate".split()
    return sorted({s + m + e for s in starts for m in middles for e in ends})


def make_world(towns: int = 120, seed: int = 7) -> World:
    """Draw `towns` town names and five facts about each."""
    rng = random.Random(seed)
    return World(
        {
            town: {attribute: rng.choice(values) for attribute, (values, _, _) in ATTRIBUTES.items()}
            for town in rng.sample(town_names(), towns)
        }
    )


def _visit(rng: random.Random, towns: list[str]) -> dict[str, str]:
    return {
        "person": rng.choice(PEOPLE),
        "job": rng.choice(JOBS),
        "town": rng.choice(towns),
        "good": rng.choice(GOODS),
        "month": rng.choice(MONTHS),
    }


def _kind_pair(rng: random.Random) -> dict[str, str]:
    kind, other = rng.sample(sorted(KINDS), 2)
    return {"kind": kind, "other": other, "v": rng.choice(KINDS[kind]), "w": rng.choice(KINDS[other])}


def instruction_rows(world: World, visits: int = 120, kinds: int = 80, seed: int = 11) -> list[dict[str, str]]:
    """The sample in Dolly's schema: one `open_qa` row per fact, `closed_qa` rows with context, `classification` rows.

    Returns:
        Shuffled rows of `instruction`, `context`, `response` and `category`, without a repeated pair of instruction and
        context.
    """
    rng = random.Random(seed)
    rows = [
        _row(rng.choice(ATTRIBUTES[attribute][2]).format(t=town), "", value, "open_qa")
        for town, facts in world.facts.items()
        for attribute, value in facts.items()
    ]
    for i in range(visits):
        visit = _visit(rng, sorted(world.facts))
        subject = list(VISIT_QUESTIONS)[i % len(VISIT_QUESTIONS)]
        question = rng.choice(VISIT_QUESTIONS[subject]).format(**visit)
        rows.append(_row(question, rng.choice(VISIT_TELLINGS).format(**visit), visit[subject], "closed_qa"))
    questions = {row["instruction"] for row in rows}
    for _ in range(kinds):
        while (question := rng.choice(KIND_QUESTIONS).format(**(pair := _kind_pair(rng)))) in questions:
            pass
        questions.add(question)
        rows.append(_row(question, "", pair["v"], "classification"))
    rng.shuffle(rows)
    return rows


def _row(instruction: str, context: str, response: str, category: str) -> dict[str, str]:
    return {"instruction": instruction, "context": context, "response": response, "category": category}


def prose(world: World, seed: int) -> Iterator[str]:
    """Endless documents of plain statements: towns, mixed facts, visits, kinds of things."""
    rng = random.Random(seed)
    towns = sorted(world.facts)
    makers = [_town_page, _mixed_facts, _visit_story, _kind_list]
    while True:
        (maker,) = rng.choices(makers, weights=[3, 4, 3, 1])
        sentences = [_dress(rng, sentence) for sentence in maker(rng, world, towns)]
        yield rng.choice([" ", " ", "\n"]).join(sentences)


def _dress(rng: random.Random, sentence: str) -> str:
    return rng.choice(RUBRICS).format(s=sentence) if rng.random() < 0.12 else sentence


def _state(rng: random.Random, town: str, attribute: str, value: str) -> str:
    return rng.choice(ATTRIBUTES[attribute][1]).format(t=town, v=value)


def _town_page(rng: random.Random, world: World, towns: list[str]) -> list[str]:
    town = rng.choice(towns)
    facts = list(world.facts[town].items())
    rng.shuffle(facts)
    return [_state(rng, town, attribute, value) for attribute, value in facts]


def _mixed_facts(rng: random.Random, world: World, towns: list[str]) -> list[str]:
    picked = rng.sample(towns, 6)
    return [_state(rng, t, a, world.facts[t][a]) for t in picked for a in [rng.choice(list(ATTRIBUTES))]]


def _visit_story(rng: random.Random, world: World, towns: list[str]) -> list[str]:
    visit = _visit(rng, towns)
    subjects = rng.sample(sorted(VISIT_STATEMENTS), 4)
    templates = [rng.choice(VISIT_TELLINGS), *(rng.choice(VISIT_STATEMENTS[subject]) for subject in subjects)]
    return [template.format(**visit) for template in templates]


def _kind_list(rng: random.Random, world: World, towns: list[str]) -> list[str]:
    return [rng.choice(KIND_STATEMENTS).format(**_kind_pair(rng)) for _ in range(5)]
