"""A conversation in the terminal with an experiment's base model, champion and challenger."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer

from finetune_assets.artifacts.kinds import ADAPTERS, BASE_MODELS
from finetune_assets.artifacts.lineage import Lineage
from finetune_assets.config.schema import ExperimentConfig
from finetune_assets.data.serving_template import use_serving_template
from finetune_assets.display import plain
from finetune_assets.evaluation.contenders import BASE, CHALLENGER, CHAMPION, Contender, leaves_traces
from finetune_assets.evaluation.generation import end_tokens
from finetune_assets.retrieval.asking import Found, RetrievalFormat, Retriever
from finetune_assets.store.errors import ArtifactMissing
from finetune_assets.training.embeddings import resize_embeddings
from finetune_assets.training.model import with_adapter_of

ALL = "all"
HELP = """\
/base, /champion, /challenger    switch the model that answers
/all                             let all of them answer each question
/sources                         show the passages that the last answer is from
/new                             start a new conversation
/help, /quit"""


def contenders(lineage: Lineage) -> list[Contender]:
    """The base model, champion and challenger of an experiment, as far as they exist, fetched from the store.

    Raises:
        ArtifactMissing: if there is neither champion nor challenger.
    """
    adapters: dict[str, Any] = {}
    with suppress(ArtifactMissing):
        adapters[CHAMPION] = lineage.champion()
    with suppress(ArtifactMissing):
        challenger = lineage.expected(ADAPTERS)
        if adapters.get(CHAMPION) != challenger:
            adapters[CHALLENGER] = challenger
    if not adapters:
        asset = "stacked_adapter" if lineage.experiment.config.stack else "lora_adapter"
        raise ArtifactMissing(f"{lineage.experiment.name} has no adapter yet: materialize {asset} first")
    base = lineage.store.fetch(lineage.expected(BASE_MODELS))
    trusted = lineage.trusts_own_code
    adapted = [Contender.of_folder(name, base, lineage.store.fetch(ref), trusted) for name, ref in adapters.items()]
    return [Contender(BASE, base, lineage.experiment.config, own_code=trusted), *adapted]


class LoadedModel:
    """A base model in memory with the adapters of one or several contenders.

    Args:
        contender: The first of them.
    """

    def __init__(self, contender: Contender) -> None:
        config, device = contender.config, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.base = contender.load_base(device)
        resize_embeddings(self.base, contender.tokenizer(), config)
        self.adapted: PeftModel | None = None

    def add(self, contender: Contender) -> None:
        if contender.adapter is None:
            return
        if self.adapted is None:
            self.adapted = with_adapter_of(self.base, contender.adapter, contender.name)
        else:
            self.adapted.load_adapter(str(contender.adapter), adapter_name=contender.name)
        self.adapted.eval()

    @contextmanager
    def answering(self, name: str) -> Iterator[Any]:
        """The model with that contender's adapter, or without one for the base."""
        if self.adapted is None:
            yield self.base.eval()
        elif name == BASE:
            with self.adapted.disable_adapter():
                yield self.adapted
        else:
            self.adapted.set_adapter(name)
            yield self.adapted


@dataclass
class Conversation:
    """A conversation, one history for each model.

    Args:
        contenders: The models that can answer; each is loaded at its first question.
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 is greedy decoding.
        index: Folder of the retrieval index, from which contenders that were trained with retrieval get passages; None
            asks the question alone.
        history: The turns so far, by contender, as chat templates take them; without passages.

    Attributes:
        found: The last question with its passages, if any were searched for.
    """

    contenders: list[Contender]
    max_new_tokens: int
    temperature: float = 0.0
    index: Path | None = None
    history: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    found: Found | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.names = [contender.name for contender in self.contenders]
        self.active = self.names[-1] if CHAMPION not in self.names else CHAMPION
        self.loaded: dict[str, LoadedModel] = {}
        self.models: dict[str, LoadedModel] = {}

    def _model(self, contender: Contender) -> LoadedModel:
        if contender.name not in self.models:
            print(f"(loading {contender.name} ...)", file=sys.stderr)
            alone = contender.adapter is not None and leaves_traces(contender.adapter)
            key = f"{contender.base_key} {contender.name if alone else ''}"
            model = self.loaded.get(key) or LoadedModel(contender)
            model.add(contender)
            self.loaded[key] = self.models[contender.name] = model
        return self.models[contender.name]

    def answer(self, name: str, question: str) -> str:
        """Generate the answer of one contender, and print it token by token."""
        contender = next(contender for contender in self.contenders if contender.name == name)
        loaded, config = self._model(contender), contender.config
        tokenizer = use_serving_template(contender.tokenizer(), config.data)
        turns = [*self.history.get(name, []), {"role": "user", "content": question}]
        ids = self._prompt(contender, tokenizer, turns)
        ends = {tokenizer.eos_token_id, *end_tokens(tokenizer, [_turn_end(tokenizer, config)])} - {None}
        sampling = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        settings = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
            eos_token_id=sorted(ends) or None,
            **sampling,
        )
        with torch.inference_mode(), loaded.answering(name) as model:
            prompt = torch.tensor([ids], device=model.device)
            out = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=settings,
                streamer=_PlainStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            )
        text = str(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)).strip()
        self.history[name] = [*turns, {"role": "assistant", "content": text}]
        return text

    def _prompt(
        self, contender: Contender, tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]]
    ) -> list[int]:
        """Tokens of the last question, with its passages, as in training."""
        data = contender.config.data
        earlier = turns[:-1] if data.prompt_template.chat_template else []  # other prompts hold one question

        def tokens(messages: list[dict[str, str]]) -> list[int]:
            asked = [*earlier, *messages]
            return list(tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False))

        self.found = None
        if not data.retrieval or self.index is None:
            return tokens(turns[-1:])
        settings = RetrievalFormat.of_experiment(data, None)
        found = Retriever(settings, self.index).find(turns[-1]["content"])
        self.found = found.fitting(lambda messages: len(tokens(messages)) <= data.tokenization.cutoff_len)
        return tokens(self.found.messages)


class _PlainStreamer(TextStreamer):  # type: ignore[misc]
    """Prints an answer without characters that control the terminal."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(plain(text, lines=True), stream_end)


def _turn_end(tokenizer: PreTrainedTokenizerBase, config: ExperimentConfig) -> list[int]:
    """Tokens of a whole turn, the last special one of which ends it."""
    if not config.data.prompt_template.chat_template:
        return []
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    return list(tokenizer.apply_chat_template(turns, return_dict=False))


def run(talk: Conversation, lines: Iterator[str]) -> None:
    """Answer line by line, until the end of input or `/quit`."""
    for line in lines:
        command = line.strip()
        if command in ("/quit", "/exit"):
            return
        if command == "/help":
            print(HELP)
        elif command == "/sources":
            print(shown_texts(talk.found) if talk.found else "(the last answer has no passages)")
        elif command == "/new":
            talk.history.clear()
            print("(new conversation)")
        elif command.removeprefix("/") in (*talk.names, ALL) and command.startswith("/"):
            talk.active = command[1:]
            print(f"({talk.active} answers now)")
        elif command.startswith("/"):
            hint = "; the newest adapter is the champion" if command == f"/{CHALLENGER}" else ""
            known = ", ".join(f"/{name}" for name in talk.names)
            print(f"(unknown or unavailable: {plain(command)}{hint}; available: {known}, /all, /help)")
        elif command:
            for name in talk.names if talk.active == ALL else [talk.active]:
                if talk.active == ALL:
                    print(f"[{name}]")
                talk.answer(name, command)
                if talk.found:
                    print(shown_sources(talk.found))


def shown_sources(found: Found) -> str:
    """Where the numbered passages of a question are from, one a line."""
    lines = [f"  {plain(str(source))}" for source in found.sources]
    return "\n".join(["Sources:", *lines]) if lines else "(no passage has a word of the question)"


def shown_texts(found: Found) -> str:
    """The numbered passages of a question, each with its text."""
    return "\n\n".join(f"{plain(str(source))}\n{plain(source.text, lines=True)}" for source in found.sources)


def typed_lines() -> Iterator[str]:
    with suppress(ImportError):
        import readline  # noqa: F401  (line editing and history)
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
