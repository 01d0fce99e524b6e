"""Seeded conversations with tools, weights and reasoning."""

import json
import random
from collections.abc import Callable
from typing import Any

from data.chats import HARD
from data.tool_chats import ToolFamily, Tools

from finetune_assets.data.rows import Turn


def tool(name: str) -> dict[str, Any]:
    city = {"type": "string", "description": 'a "city" <or> ☕'}
    schema = {"type": "object", "properties": {"city": city}, "required": ["city"]}
    return {"type": "function", "function": {"name": name, "description": f"Does {name}.", "parameters": schema}}


class Generator:
    """Conversations with tools, weights and reasoning, as far as a family represents them."""

    def __init__(self, family: ToolFamily, seed: int) -> None:
        self.family, self.random = family, random.Random(seed)

    def words(self) -> str:
        ordinary = ["Kelm", "river", "the", "Why?", "because", "of", "12", "it.", "And", "so", "on,"]
        parts = [
            self.random.choice(HARD) if self.random.random() < 0.3 else self.random.choice(ordinary) + " "
            for _ in range(self.random.randint(1, 8))
        ]
        return "".join(parts) if "".join(parts).strip() else "x"

    def value(self, depth: int = 0) -> Any:
        kinds: list[Callable[[], Any]] = [
            *(self.words, lambda: self.random.randint(-9, 9), lambda: self.random.random(), lambda: None, lambda: True),
            *(lambda: [self.value(2)], lambda: {'a"b': self.value(2), "☕": {}}),
        ]
        return self.random.choice(kinds[: 5 if depth else 7])()

    def call(self, identifier: str) -> dict[str, Any]:
        given = {key: self.value() for key in self.random.sample(["city", "n", "é", "x y"], self.random.randint(0, 3))}
        name = self.random.choice(["get_weather", "add", "suche.Öl"])
        return {"type": "function", "function": {"name": name, "arguments": given}, "id": identifier}

    def answer(self) -> Turn:
        turn: Turn = {"role": "assistant", "content": self.words()}
        if self.family.reasons and self.random.random() < 0.5:
            turn["reasoning_content"] = self.words()
        return turn

    def calling(self, number: int) -> list[Turn]:
        calls = [self.call(f"{number:04d}{i:05d}") for i in range(self.random.randint(1, self.family.calls))]
        turn = self.answer()
        turn["tool_calls"] = json.dumps(calls, ensure_ascii=False)
        if not self.family.speaks or self.random.random() < 0.5:
            turn["content"] = ""
        if not self.family.speaks:
            turn.pop("reasoning_content", None)
        results = [
            {"role": "tool", "content": self.words(), "tool_call_id": call["id"], "name": call["function"]["name"]}
            for call in calls
        ]
        return [turn, *results]

    def conversation(self) -> tuple[list[Turn], Tools]:
        turns: list[Turn] = []
        if self.family.system and self.random.random() < 0.4:
            turns.append({"role": "system", "content": self.words()})
        for _ in range(self.random.randint(1, 3)):
            turns.append({"role": "user", "content": self.words()})
            for _ in range(self.random.randint(0, 2) if self.family.calls else 0):
                turns += self.calling(len(turns))
            if self.family.calls == 0 or self.random.random() < 0.85 or turns[-1]["role"] == "user":
                turns.append(self.answer())
        for turn in turns:
            if turn["role"] == "assistant" and self.random.random() < 0.3:
                turn["weight"] = self.random.choice([0.0, 1.0])
        assistants = [turn for turn in turns if turn["role"] == "assistant"]
        if all(turn.get("weight") == 0 for turn in assistants):
            assistants[-1].pop("weight")
        has_tools = self.family.defines and self.random.random() < 0.6
        return turns, [tool(name) for name in ("get_weather", "add")] if has_tools else None


def up_to_the_last_learned(turns: list[Turn]) -> list[Turn]:
    while turns[-1]["role"] != "assistant" or turns[-1].get("weight") == 0:
        turns = turns[:-1]
    return turns
