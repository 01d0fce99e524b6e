"""Client of one replica of a vLLM server that loads adapters at run time.

The server needs `--enable-lora` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True. A status code proves nothing: vLLM accepts
an adapter whose tensors do not match its model, lists it, and answers as the base model. See `verify.py`.
"""

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_assets.display import shown_url
from finetune_assets.serving.errors import ERROR, OTHER_BASE, TEMPLATE, TIMEOUT, TOKEN, ServerError
from finetune_assets.store.json_object import InvalidJson, parse_object

TOKEN_VARIABLE = "FINETUNE_SERVING_TOKEN"
TIMEOUT_SECONDS = 60.0
"""Time limit of one answer, in seconds."""
ATTEMPTS, PAUSE_SECONDS = 3, 0.5
"""Attempts of a request that met an overloaded or restarting server, and the first pause, doubled each time."""
MOST_BYTES = 64 << 20
"""Largest answer that is read, in bytes."""
GREEDY = {"max_tokens": 1, "temperature": 0.0, "repetition_penalty": 1.0}
"""Settings of all requests, of which a model's `generation_config.json` may have others."""
LORA_METRIC = re.compile(r"^vllm:lora_requests_info\{([^}]*)\} (\S+)$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="([^"]*)"')
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Model:
    """A model that a server lists.

    Attributes:
        parent: Name of the base model of an adapter; None for a base model.
        max_length: Largest number of tokens of prompt and answer; None if the server does not list it.
    """

    parent: str | None
    max_length: int | None


@dataclass(frozen=True)
class Generated:
    """The first token of a greedy answer.

    Attributes:
        prompt: Token ids of the prompt, as the server rendered it.
        token: The token id.
        logprob: Its log-probability, in nats.
    """

    prompt: list[int]
    token: int
    logprob: float


class VllmServer:
    """One replica.

    Args:
        url: Its address, `http://host:port`.
        token: Bearer token; it is never shown.
        seconds: Time limit of one answer, of which only one attempt is made; by default `TIMEOUT_SECONDS` and
            `ATTEMPTS`.
    """

    def __init__(self, url: str, token: str | None = None, seconds: float | None = None) -> None:
        self.url, self._token = url.rstrip("/"), token
        self.seconds, self.attempts = seconds or TIMEOUT_SECONDS, 1 if seconds else ATTEMPTS

    def __repr__(self) -> str:
        return self.shown

    @property
    def shown(self) -> str:
        return shown_url(self.url)

    def models(self) -> dict[str, Model]:
        """Models and adapters that the server lists, by name."""
        listed = self._json("GET", "/v1/models").get("data")
        if not isinstance(listed, list):
            raise self._invalid("/v1/models", "no list 'data'")
        return {
            str(entry.get("id")): Model(
                entry.get("parent") if isinstance(entry.get("parent"), str) else None,
                entry.get("max_model_len") if isinstance(entry.get("max_model_len"), int) else None,
            )
            for entry in listed
            if isinstance(entry, dict)
        }

    def names(self) -> list[str]:
        """Names of the adapters that the server lists."""
        return sorted(name for name, model in self.models().items() if model.parent)

    def load(self, name: str, copy: Path) -> None:
        """Load an adapter from a folder that the server sees under the same path."""
        self._send("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(copy)})

    def unload(self, name: str) -> None:
        """Unload an adapter; nothing happens if the server does not list it."""
        try:
            self._send("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        except ServerError as e:
            if e.status != 404:
                raise

    def answers_to(self, name: str) -> bool:
        """Whether the server answers requests for a model, listed or not."""
        try:
            self._json("POST", "/v1/completions", {"model": name, "prompt": [1], "max_tokens": 1})
        except ServerError as e:
            if e.status == 404:
                return False
            raise
        return True

    def logprob(self, name: str, prompt: Sequence[int], token: int, salt: str | None = None) -> float:
        """Log-probability of a token after a prompt, in nats.

        The server is asked for an answer of one token, and allowed only this one: an ordinary request, with which vLLM
        reads its prefix cache, and whose log-probability is that before the restriction. Log-probabilities of the
        prompt's own tokens would need fewer requests, but vLLM 0.32 ends on a CPU if it computes them for an adapter
        beside other requests.

        Args:
            name: Model or adapter.
            prompt: Token ids.
            token: Token id.
            salt: Separates the request from the server's prefix cache.
        """
        path, body = "/v1/completions", {"model": name, "prompt": [*prompt], **GREEDY, "allowed_token_ids": [token]}
        body |= {"logprobs": 0, "return_token_ids": True, **({"cache_salt": salt} if salt else {})}
        answer = self._json("POST", path, body)
        try:
            (choice,) = answer["choices"]
            if choice["token_ids"] != [token]:
                raise ValueError(f"token {choice['token_ids']} instead of {token}")
            return _number(choice["logprobs"]["token_logprobs"][0])
        except (KeyError, IndexError, TypeError, ValueError) as e:
            raise self._invalid(path, f"no log-probability of the token ({e!r})") from e

    def chat(self, name: str, messages: Sequence[Message], salt: str | None = None) -> Generated:
        """First greedy token of the answer to messages, which the server renders with its chat template.

        Raises:
            ServerError: also with the diagnosis `wrong template`, if the server cannot render the messages.
        """
        path = "/v1/chat/completions"
        body = {"messages": [*messages], **GREEDY, "logprobs": True, "top_logprobs": 0}
        body |= {"model": name, "return_token_ids": True, **({"cache_salt": salt} if salt else {})}
        try:
            answer = self._json("POST", path, body)
        except ServerError as e:
            if e.status == 400:
                raise ServerError(str(e), TEMPLATE, e.status) from None
            raise
        try:
            (choice,) = answer["choices"]
            prompt = [int(token) for token in answer["prompt_token_ids"]]
            logprob = _number(choice["logprobs"]["content"][0]["logprob"])
            return Generated(prompt, int(choice["token_ids"][0]), logprob)
        except (KeyError, IndexError, TypeError, ValueError) as e:
            raise self._invalid(path, f"no token ids ({e!r}); vLLM 0.10.2 or newer is required") from e

    def busy(self) -> set[str] | None:
        """Adapters with running or waiting requests; None if the server's metrics do not name them."""
        try:
            text = self._send("GET", "/metrics").decode(errors="replace")
        except ServerError:
            return None
        found = [(float(value), dict(LABEL.findall(labels))) for labels, value in LORA_METRIC.findall(text)]
        if not found:
            return None
        _, labels = max(found, key=lambda entry: entry[0])  # the gauge's value is the time of its last update
        names = ",".join(labels.get(f"{state}_lora_adapters", "") for state in ("running", "waiting"))
        return {name.strip() for name in names.split(",") if name.strip()}

    def _json(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        content = self._send(method, path, body)
        try:
            return parse_object(content, MOST_BYTES)
        except InvalidJson as e:
            raise self._invalid(path, str(e)) from e

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        """Send a request, and again after a pause if the server is overloaded or not reached."""
        for attempt in range(1, self.attempts + 1):
            try:
                return self._attempt(method, path, body)
            except ServerError as e:
                if attempt == self.attempts or (e.status and e.status < 500 and e.status != 429):
                    raise
                time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
        raise AssertionError("unreachable")

    def _attempt(self, method: str, path: str, body: Mapping[str, Any] | None) -> bytes:
        import requests

        where = f"{self.shown}{path}"
        try:
            # A redirect could lead to another host, for which the token is not meant
            with requests.request(
                method,
                f"{self.url}{path}",
                json=body,
                auth=self._authorize,
                timeout=self.seconds,
                allow_redirects=False,
                stream=True,
            ) as response:
                content = _read(response, where, self.seconds)
                status = int(response.status_code)
        except requests.Timeout as e:
            raise ServerError(f"{where}: no answer within {self.seconds:g} s; check the server's load", TIMEOUT) from e
        except requests.RequestException as e:
            raise ServerError(f"{where}: {type(e).__name__}; check that the server runs and its address") from e
        if status == 200:
            return content
        text = self._hidden(content[:300].decode(errors="replace"))
        if status in (401, 403):
            raise ServerError(f"{where}: {status}, the token is refused; set {TOKEN_VARIABLE}", TOKEN, status)
        diagnosis = OTHER_BASE if status == 404 and path == "/v1/load_lora_adapter" else ERROR
        raise ServerError(f"{where}: {status} {text}", diagnosis, status)

    def _authorize(self, request: Any) -> Any:
        """Set the token; also without one, so that requests does not send a password of ~/.netrc."""
        if self._token:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request

    def _hidden(self, text: str) -> str:
        return text.replace(self._token, "(hidden)") if self._token else text

    def _invalid(self, path: str, problem: str) -> ServerError:
        return ServerError(f"{self.shown}{path}: not an answer of vLLM: {problem}", ERROR, 200)


def _read(response: Any, where: str, seconds: float) -> bytes:
    content, end = bytearray(), time.monotonic() + seconds
    for chunk in response.iter_content(1 << 16):
        content += chunk
        if time.monotonic() > end:
            raise ServerError(f"{where}: no complete answer within {seconds:g} s", TIMEOUT)
        if len(content) > MOST_BYTES:
            raise ServerError(f"{where}: more than {MOST_BYTES:,} bytes", ERROR, 200)
    return bytes(content)


def _number(value: Any) -> float:
    """A finite number.

    Raises:
        ValueError: if it is none.
    """
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is not a log-probability")
    return number
