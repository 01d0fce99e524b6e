"""What a metric is."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A number that an evaluation reports for each contender.

    Attributes:
        name: Key in `evaluation.json` and in Dagster's metadata; letters, digits and underscores.
        title: Label in tables, plots and the model card.
        form: Format of its values, as `str.format` takes it.
    """

    name: str
    title: str
    form: str


@dataclass(frozen=True)
class AnswerMetric(Metric):
    """A metric of generated answers: the mean of `score` over the rows.

    Attributes:
        score: Compares a generated answer with the expected one.
    """

    score: Callable[[str, str], float]
