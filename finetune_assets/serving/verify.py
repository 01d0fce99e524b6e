"""Verifies by numbers which adapter a server answers with.

The evaluation of an adapter has the loss of each gate row for base model, champion and challenger. A server that
answers with the adapter gives the answers of the same rows the same log-probabilities. The base model is measured on
the server too: how closely it reproduces its own evaluation gives the precision of the server, and thus the tolerance.
"""

import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from finetune_assets.serving.diagnosis import projection, scale_of
from finetune_assets.serving.errors import (
    BASE,
    OTHER,
    OTHER_BASE,
    PREVIOUS,
    SCALE,
    STALE,
    TEMPLATE,
    UNKNOWN,
    ServerError,
)
from finetune_assets.serving.gate_rows import BASE as BASE_COLUMN
from finetune_assets.serving.gate_rows import CHALLENGER, CHAMPION, GateRows
from finetune_assets.serving.vllm import Generated, VllmServer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

T = TypeVar("T")
R = TypeVar("R")
FLOAT32_NOISE = 0.001
"""Mean difference of the base model's log-probabilities, in nats per token, up to which server and evaluation both
compute in float32. Measured on the packaged model with vLLM 0.32 on a CPU: 1.2e-6 in float32, 0.016 in bfloat16 against
an evaluation in float32; adapters 1e-6, and 0.019 to 0.022."""
TOLERANCE = {"float32": 0.005, "16 bits": 0.05}
"""Largest mean difference of the answers' log-probabilities from the evaluation's, in nats per token. The mean is over
the rows' tokens, of the absolute differences of the rows' sums."""
FIRST_TOKEN_TOLERANCE = {"float32": 0.01, "16 bits": 0.15}
"""The same for the first token of an answer in chat, compared with that of the same tokens in completions."""
REQUESTS = 8
"""Requests at a time."""
PROBE_TOKENS = 8
"""Maximum number of tokens of a probe, each of which is one request."""
MOST_OTHERS = 8
"""Maximum number of other adapters that are asked for their numbers to find out which one answered."""


@dataclass(frozen=True)
class Verdict:
    """What a server answers with.

    Attributes:
        passed: Whether it answers with the adapter.
        diagnosis: What it answers with instead; empty if it passed.
        reason: Both as text, with the numbers.
        numbers: Measured values, in nats per token.
        probe: One row, by which the server can be asked again with few requests: token ids, positions of the answer,
            its summed log-probability on this server, and the tolerance in nats per token.
    """

    passed: bool
    diagnosis: str
    reason: str
    numbers: dict[str, Any] = field(default_factory=dict)
    probe: dict[str, Any] = field(default_factory=dict)


class Verification:
    """Compares the answers of one server with an evaluation.

    Args:
        server: The server.
        name: Name of the adapter on the server.
        rows: The gate rows.
        base_name: Name of the base model on the server.
        previous: Name of the adapter that served before, if the server lists it.
        was_evaluated: Whether the evaluation's champion is that adapter.
        others: Names of other adapters that the server lists.
    """

    def __init__(
        self,
        server: VllmServer,
        name: str,
        rows: GateRows,
        base_name: str,
        previous: str | None = None,
        was_evaluated: bool = True,
        others: Sequence[str] = (),
    ) -> None:
        self.server, self.name, self.rows, self.base_name = server, name, rows, base_name
        self.previous, self.was_evaluated, self.others = previous, was_evaluated, others
        self._logprobs: dict[str, list[list[float]]] = {}
        self.numbers: dict[str, Any] = {"rows": len(rows.ids), "tokens": rows.tokens}

    def run(self) -> Verdict:
        """Compare completions and chat."""
        expected = -self.rows.losses[CHALLENGER]
        answered = self._sums(self.name)
        distance = self._distance(answered, expected)
        self._choose_tolerance()
        references = self._references()
        self.numbers |= {
            "distance_to_challenger": distance,
            "logprob_server": float(answered.sum() / self.rows.tokens),
            "logprob_challenger": float(expected.sum() / self.rows.tokens),
            **{f"distance_to_{name}": self._distance(answered, sum_) for name, sum_ in references.items()},
            **{f"logprob_{name}": float(sum_.sum() / self.rows.tokens) for name, sum_ in references.items()},
        }
        if not self._agrees(answered, expected, references):
            return self._failed(*self._diagnose(answered, expected, references))
        if self._is_without_effect(expected, -self.rows.losses[BASE_COLUMN]):
            return self._failed(BASE, "the adapter has no effect on these rows")
        if problem := self._chat(answered, expected):
            return self._failed(*problem)
        return Verdict(
            True, "", self._text("answers as the challenger"), self.numbers, self._probe(answered, references)
        )

    # ---- what is compared

    def _choose_tolerance(self) -> None:
        """Choose the tolerance by how closely the server reproduces the base model's evaluation.

        If it does not at all, the adapter must agree as closely as in float32: on a CPU, vLLM 0.32 confuses the base
        model with an adapter while requests of both run, and answers to the adapter rightly.
        """
        noise = self._distance(self._sums(self.base_name), -self.rows.losses[BASE_COLUMN])
        self.is_base = noise <= TOLERANCE["16 bits"]
        self.precision = "16 bits" if FLOAT32_NOISE < noise and self.is_base else "float32"
        self.tolerance = TOLERANCE[self.precision]
        self.noise = noise if self.is_base else 0.0
        self.numbers |= {"base_noise": noise, "precision": self.precision, "tolerance": self.tolerance}

    def _references(self) -> "dict[str, NDArray[np.float64]]":
        """Summed log-probabilities of base and previous adapter.

        They are the evaluation's, if it has them: the server may answer to these names with something else, too.
        """
        references = {"base": -self.rows.losses[BASE_COLUMN]}
        if CHAMPION in self.rows.losses and self.was_evaluated:
            references["previous"] = -self.rows.losses[CHAMPION]
        elif self.previous:
            references["previous"] = self._sums(self.previous)
        return references

    def _agrees(
        self,
        answered: "NDArray[np.float64]",
        expected: "NDArray[np.float64]",
        references: "dict[str, NDArray[np.float64]]",
    ) -> bool:
        """Whether the answers are those of the challenger, and nearer to it than to each reference."""
        if self._distance(answered, expected) > self.tolerance:
            return False
        return all(
            self._is_without_effect(expected, other) or projection(answered, other, expected) > 0.5
            for other in references.values()
        )

    def _is_without_effect(self, one: "NDArray[np.float64]", other: "NDArray[np.float64]") -> bool:
        """Whether two models differ by no more than the server's noise."""
        return self._distance(one, other) <= max(2 * self.noise, 1e-4)

    def _diagnose(
        self,
        answered: "NDArray[np.float64]",
        expected: "NDArray[np.float64]",
        references: "dict[str, NDArray[np.float64]]",
    ) -> tuple[str, str]:
        """What the server answered as, and an explanation."""
        fresh = _sums(self._ask(self.name, salt=uuid.uuid4().hex))
        if self._distance(fresh, expected) <= self.tolerance < self._distance(answered, expected):
            return STALE, "without its prefix cache, the server answers as the challenger"
        nearest = min(references, key=lambda name: self._distance(answered, references[name]))
        if self._distance(answered, references[nearest]) <= self.tolerance:
            return (BASE if nearest == "base" else PREVIOUS), f"the answers are those of the {nearest}"
        for other in self.others[:MOST_OTHERS]:
            if self._distance(answered, self._sums(other)) <= self.tolerance:
                return f"{OTHER} {other}", f"the answers are those of {other}"
        if self.previous and self._distance(answered, self._sums(self.previous)) <= self.tolerance:
            return PREVIOUS, f"the answers are those that the server gives as {self.previous}"
        if not self.is_base:
            return OTHER_BASE, "the server's base model does not reproduce its evaluation"
        if scale := scale_of(answered, references["base"], expected):
            return SCALE, f"the answers are those of an update scaled by about {scale:.2g}"
        return UNKNOWN, "the answers are those of no adapter that is known here"

    def _chat(self, answered: "NDArray[np.float64]", expected: "NDArray[np.float64]") -> tuple[str, str] | None:
        """Compare the rendering of messages, and the first tokens of the answers to them."""
        chosen = [row for row, messages in enumerate(self.rows.messages) if messages]
        self.numbers["chat_rows"] = len(chosen)
        if not chosen:
            return None
        try:
            generated = self._each(lambda row: self.server.chat(self.name, self.rows.messages[row] or []), chosen)
        except ServerError as e:
            if e.diagnosis != TEMPLATE:
                raise
            return TEMPLATE, str(e)
        chat_sums = answered[chosen].copy()
        differing = [at for at, row in enumerate(chosen) if generated[at].prompt != self.rows.prompt(row)]
        for at in differing:
            chat_sums[at] += self._change(chosen[at], generated[at].prompt)
        tokens = sum(len(self.rows.learned[row]) for row in chosen)
        distance = float(abs(chat_sums - expected[chosen]).sum() / tokens)
        self.numbers |= {"chat_distance": distance, "chat_prompts_that_differ": len(differing)}
        if distance > self.tolerance:
            return TEMPLATE, self._differing_prompt(generated[differing[0]], chosen[differing[0]], len(differing))
        self.numbers["chat_first_token_difference"] = difference = self._first_difference(generated, self.name)
        if difference <= FIRST_TOKEN_TOLERANCE[self.precision]:
            return None
        return self._misrouted(generated, chosen)

    def _change(self, row: int, prompt: list[int]) -> float:
        """How a row's summed log-probability changes with another prompt."""
        ids, start = self.rows.ids[row], self.rows.starts[row]
        after = [at for at in self.rows.learned[row] if at >= start]
        again = self._each(lambda at: self.server.logprob(self.name, prompt + ids[start:at], ids[at]), after)
        return sum(again) - sum(self._scored(self.name)[row][-len(after) :])

    def _first_difference(self, generated: list[Generated], name: str) -> float:
        """Mean difference of the first tokens' log-probabilities from those that completions give as `name`."""
        logprobs = self._each(lambda answer: self.server.logprob(name, answer.prompt, answer.token), generated)
        return sum(abs(a.logprob - b) for a, b in zip(generated, logprobs, strict=True)) / len(generated)

    def _misrouted(self, generated: list[Generated], chosen: list[int]) -> tuple[str, str]:
        """What the answers in chat are, if they are not those of the adapter."""
        most, salt = FIRST_TOKEN_TOLERANCE[self.precision], uuid.uuid4().hex
        fresh = self._each(lambda row: self.server.chat(self.name, self.rows.messages[row] or [], salt), chosen)
        if self._first_difference(fresh, self.name) <= most:
            return STALE, "without its prefix cache, the server answers in chat as the challenger"
        for diagnosis, name in ((BASE, self.base_name), (PREVIOUS, self.previous)):
            if name and self._first_difference(generated, name) <= most:
                return diagnosis, f"answers in chat are those of {name}"
        return UNKNOWN, "answers in chat differ from those in completions"

    def _differing_prompt(self, generated: Generated, row: int, count: int) -> str:
        expected = self.rows.prompt(row)
        pairs = enumerate(zip(generated.prompt, expected, strict=False))
        first = next((at for at, (ours, theirs) in pairs if ours != theirs), min(len(expected), len(generated.prompt)))
        return (
            f"{count} chat prompts are rendered otherwise than in training: that of row {self.rows.numbers[row]} has "
            f"{len(generated.prompt)} tokens instead of {len(expected)} and differs from token {first}; start the "
            "server with --chat-template and the adapter's chat_template.jinja"
        )

    # ---- requests

    def _each(self, ask: Callable[[T], R], of: Iterable[T]) -> list[R]:
        """Results of several requests at a time, in order."""
        with ThreadPoolExecutor(REQUESTS) as pool:
            return [*pool.map(ask, of)]

    def _ask(self, name: str, salt: str | None = None) -> list[list[float]]:
        """Log-probability of each learned token of each row."""
        ids, learned = self.rows.ids, self.rows.learned
        wanted = [(row, at) for row, positions in enumerate(learned) for at in positions]
        logprobs = iter(self._each(lambda one: self.server.logprob(name, *_until(ids, *one), salt), wanted))
        return [[next(logprobs) for _ in positions] for positions in learned]

    def _scored(self, name: str) -> list[list[float]]:
        """Log-probabilities of all rows, asked for once."""
        if name not in self._logprobs:
            self._logprobs[name] = self._ask(name)
        return self._logprobs[name]

    def _sums(self, name: str) -> "NDArray[np.float64]":
        return _sums(self._scored(name))

    # ---- results

    def _distance(self, one: "NDArray[np.float64]", other: "NDArray[np.float64]") -> float:
        return float(abs(one - other).sum() / self.rows.tokens)

    def _failed(self, diagnosis: str, why: str) -> Verdict:
        return Verdict(False, diagnosis, self._text(f"{diagnosis}: {why}"), self.numbers)

    def _text(self, what: str) -> str:
        distances = ", ".join(
            f"{name} {self.numbers[f'distance_to_{name}']:.4f}"
            for name in ("challenger", "base", "previous")
            if f"distance_to_{name}" in self.numbers
        )
        return (
            f"{self.server.shown}, {self.name}: {what}. Mean difference of the answers' log-probabilities on "
            f"{self.numbers['rows']} gate rows, in nats per token: {distances} (tolerance {self.tolerance:g}, "
            f"{self.precision})"
        )

    def _probe(self, answered: "NDArray[np.float64]", references: "dict[str, NDArray[np.float64]]") -> dict[str, Any]:
        """The row on which the adapter differs most from base and previous adapter."""
        import numpy as np

        apart = np.min([abs(answered - other) for other in references.values()], axis=0)
        row = int(apart.argmax())
        learned = self.rows.learned[row][:PROBE_TOKENS]
        return {
            "ids": self.rows.ids[row][: learned[-1] + 1],
            "learned": learned,
            "logprob": sum(self._scored(self.name)[row][:PROBE_TOKENS]),
            "tolerance": self.tolerance,
        }


def answers_as_probed(server: VllmServer, name: str, probe: dict[str, Any]) -> bool:
    """Whether a server still answers as when it was verified; at most `PROBE_TOKENS` requests.

    Args:
        server: The server.
        name: Name of the adapter.
        probe: `Verdict.probe` of the verification.
    """
    ids, learned = probe["ids"], probe["learned"]
    difference = sum(server.logprob(name, ids[:at], ids[at]) for at in learned) - probe["logprob"]
    return bool(abs(difference) <= probe["tolerance"] * len(learned))


def _until(ids: list[list[int]], row: int, at: int) -> tuple[list[int], int]:
    """The tokens before a position of a row, and the token there."""
    return ids[row][:at], ids[row][at]


def _sums(logprobs: list[list[float]]) -> "NDArray[np.float64]":
    import numpy as np

    return np.array([sum(row) for row in logprobs])
