"""Verifies by numbers which adapter a server answers with.

The evaluation of an adapter has the loss of each gate row for base model, champion and challenger. A server that
answers with the adapter gives the answers of the same rows the same log-probabilities. The base model is measured on
the server too: how closely it reproduces its own evaluation gives the precision of the server, and thus the tolerance.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from finetune_assets.serving.diagnosis import first_differences, projection, scale_of, sums
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
from finetune_assets.serving.vllm import Generated, Scored, VllmServer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FLOAT32_NOISE = 0.001
"""Mean difference of the base model's log-probabilities, in nats per token, up to which server and evaluation both
compute in float32. Measured on the packaged model: below 1e-5; with bfloat16 on one side: 0.003 to 0.02."""
TOLERANCE = {"float32": 0.005, "16 bits": 0.05}
"""Largest mean difference of the answers' log-probabilities from the evaluation's, in nats per token. The mean is over
the rows' tokens, of the absolute differences of the rows' sums."""
FIRST_TOKEN_TOLERANCE = {"float32": 0.01, "16 bits": 0.15}
"""The same for the first token of an ordinary answer, compared with the log-probabilities of the prompt's tokens."""
BATCH = 4
"""Prompts of one request."""
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
        probe: One row, by which the server can be asked again with one request: token ids, positions of the answer,
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
        self._scores: dict[str, list[Scored]] = {}
        self.numbers: dict[str, Any] = {"rows": len(rows.ids), "tokens": rows.tokens}

    def run(self) -> Verdict:
        """Compare completions, ordinary answers and chat."""
        expected = -self.rows.losses[CHALLENGER]
        answered, base = self._sums(self.name), self._sums(self.base_name)
        self._choose_tolerance(base)
        references = self._references(base)
        self.numbers |= {
            "distance_to_challenger": self._distance(answered, expected),
            "logprob_server": float(answered.sum() / self.rows.tokens),
            "logprob_challenger": float(expected.sum() / self.rows.tokens),
            **{f"distance_to_{name}": self._distance(answered, sum_) for name, sum_ in references.items()},
            **{f"logprob_{name}": float(sum_.sum() / self.rows.tokens) for name, sum_ in references.items()},
        }
        if self.numbers["base_noise"] > TOLERANCE["16 bits"]:
            return self._failed(OTHER_BASE, "the server's base model does not reproduce its evaluation")
        if not self._agrees(answered, expected, references):
            return self._failed(*self._diagnose(answered, expected, references))
        if self._is_without_effect(expected, -self.rows.losses[BASE_COLUMN]):
            return self._failed(BASE, "the adapter has no effect on these rows")
        for problem in (self._ordinary(), self._chat(answered, expected)):
            if problem:
                return self._failed(*problem)
        return Verdict(
            True, "", self._text("answers as the challenger"), self.numbers, self._probe(answered, references)
        )

    # ---- what is compared

    def _choose_tolerance(self, base: "NDArray[np.float64]") -> None:
        noise = self._distance(base, -self.rows.losses[BASE_COLUMN])
        self.precision = "float32" if noise <= FLOAT32_NOISE else "16 bits"
        self.tolerance = TOLERANCE[self.precision]
        self.numbers |= {"base_noise": noise, "precision": self.precision, "tolerance": self.tolerance}

    def _references(self, base: "NDArray[np.float64]") -> "dict[str, NDArray[np.float64]]":
        """Summed log-probabilities of base and previous adapter.

        Those of the previous adapter are the evaluation's, if it has them: the server may answer to that name with
        something else, too.
        """
        references = {"base": base}
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
        return self._distance(one, other) <= max(2 * self.numbers["base_noise"], 1e-4)

    def _diagnose(
        self,
        answered: "NDArray[np.float64]",
        expected: "NDArray[np.float64]",
        references: "dict[str, NDArray[np.float64]]",
    ) -> tuple[str, str]:
        """What the server answered as, and an explanation."""
        fresh = sums(self._score(self.name, salt=uuid.uuid4().hex), self.rows.learned)
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
        if scale := scale_of(answered, references["base"], expected):
            return SCALE, f"the answers are those of an update scaled by about {scale:.2g}"
        return UNKNOWN, "the answers are those of no adapter that is known here"

    def _ordinary(self) -> tuple[str, str] | None:
        """Compare the first tokens of ordinary answers, for which a server reads its prefix cache."""
        rows = [*range(len(self.rows.ids))]
        generated, scored = self._generate(), self._scored(self.name)
        difference = first_differences(generated, scored, self.rows.starts)
        self.numbers["first_token_difference"] = difference
        if difference <= FIRST_TOKEN_TOLERANCE[self.precision]:
            return None
        fresh = first_differences(self._generate(uuid.uuid4().hex), scored, self.rows.starts)
        return self._misrouted(generated, rows, fresh)

    def _misrouted(self, generated: list[Generated], rows: list[int], fresh: float) -> tuple[str, str]:
        """What ordinary answers are, if they are not those of the adapter.

        Args:
            generated: The answers.
            rows: Indices of their rows.
            fresh: Difference of the same answers without the prefix cache.
        """
        most, starts = FIRST_TOKEN_TOLERANCE[self.precision], [self.rows.starts[row] for row in rows]
        if fresh <= most:
            return STALE, "ordinary answers come from the prefix cache of another adapter"
        for diagnosis, name in ((BASE, self.base_name), (PREVIOUS, self.previous)):
            if name:
                scored = [self._scored(name)[row] for row in rows]
                if first_differences(generated, scored, starts) <= most:
                    return diagnosis, f"ordinary answers are those of {name}"
        return UNKNOWN, "ordinary answers differ from the scored ones"

    def _chat(self, answered: "NDArray[np.float64]", expected: "NDArray[np.float64]") -> tuple[str, str] | None:
        """Compare the rendering of messages, and the first tokens of the answers to them."""
        chosen = [row for row, messages in enumerate(self.rows.messages) if messages]
        self.numbers["chat_rows"] = len(chosen)
        if not chosen:
            return None
        try:
            generated = [self.server.chat(self.name, self.rows.messages[row] or []) for row in chosen]
        except ServerError as e:
            if e.diagnosis != TEMPLATE:
                raise
            return TEMPLATE, str(e)
        prompts = self.rows.prompts
        differing = [at for at, row in enumerate(chosen) if generated[at].prompt != prompts[row]]
        scored = [self._scored(self.name)[row] for row in chosen]
        starts = [self.rows.starts[row] for row in chosen]
        chat_sums = answered[chosen].copy()
        for at in differing:
            row, start = chosen[at], len(generated[at].prompt)
            (again,) = self.server.score(self.name, [generated[at].prompt + self.rows.ids[row][starts[at] :]])
            answer = [position for position in self.rows.learned[row] if position >= starts[at]]
            moved = sum(again.tokens[position - starts[at] + start] for position in answer)
            chat_sums[at] += moved - sum(scored[at].tokens[position] for position in answer)
            scored[at], starts[at] = again, start
        tokens = sum(len(self.rows.learned[row]) for row in chosen)
        distance = float(abs(chat_sums - expected[chosen]).sum() / tokens)
        self.numbers |= {"chat_distance": distance, "chat_prompts_that_differ": len(differing)}
        if distance > self.tolerance:
            return TEMPLATE, self._differing_prompt(generated[differing[0]], chosen[differing[0]], len(differing))
        difference = first_differences(generated, scored, starts)
        self.numbers["chat_first_token_difference"] = difference
        if difference <= FIRST_TOKEN_TOLERANCE[self.precision]:
            return None
        again_chat = [self.server.chat(self.name, self.rows.messages[row] or [], uuid.uuid4().hex) for row in chosen]
        return self._misrouted(generated, chosen, first_differences(again_chat, scored, starts))

    def _differing_prompt(self, generated: Generated, row: int, count: int) -> str:
        expected = self.rows.prompts[row]
        pairs = enumerate(zip(generated.prompt, expected, strict=False))
        first = next((at for at, (ours, theirs) in pairs if ours != theirs), min(len(expected), len(generated.prompt)))
        return (
            f"{count} chat prompts are rendered otherwise than in training: that of row {self.rows.numbers[row]} has "
            f"{len(generated.prompt)} tokens instead of {len(expected)} and differs from token {first}; start the "
            "server with --chat-template and the adapter's chat_template.jinja"
        )

    # ---- requests

    def _score(self, name: str, salt: str | None = None) -> list[Scored]:
        ids = self.rows.ids
        batches = (ids[at : at + BATCH] for at in range(0, len(ids), BATCH))
        return [scored for batch in batches for scored in self.server.score(name, batch, salt)]

    def _scored(self, name: str) -> list[Scored]:
        """Scores of all rows, asked for once."""
        if name not in self._scores:
            self._scores[name] = self._score(name)
        return self._scores[name]

    def _sums(self, name: str) -> "NDArray[np.float64]":
        return sums(self._scored(name), self.rows.learned)

    def _generate(self, salt: str | None = None) -> list[Generated]:
        prompts = self.rows.prompts
        batches = (prompts[at : at + BATCH] for at in range(0, len(prompts), BATCH))
        return [generated for batch in batches for generated in self.server.generate(self.name, batch, salt)]

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
        return {
            "ids": self.rows.ids[row],
            "learned": self.rows.learned[row],
            "logprob": float(answered[row]),
            "tolerance": self.tolerance,
        }


def answers_as_probed(server: VllmServer, name: str, probe: dict[str, Any]) -> bool:
    """Whether a server still answers as when it was verified; one request.

    Args:
        server: The server.
        name: Name of the adapter.
        probe: `Verdict.probe` of the verification.
    """
    (scored,) = server.score(name, [probe["ids"]])
    learned = probe["learned"]
    difference = sum(scored.tokens[at] for at in learned) - probe["logprob"]
    return abs(difference) <= probe["tolerance"] * len(learned)
