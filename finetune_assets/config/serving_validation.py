"""Validates the `serving` settings."""

from collections import Counter
from collections.abc import Iterator
from urllib.parse import urlsplit

from finetune_assets.config.raw_validation import Problem
from finetune_assets.config.schema import Serving
from finetune_assets.display import shown_url

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's `--max-lora-rank` (vLLM 0.32, `MaxLoRARanks`)."""
FOLDER = "folder:"
FORMS = "use http://host:port, https://host:port or folder:./path"


def impossible_serving_settings(serving: Serving) -> Iterator[Problem]:
    """All problems of the `serving` settings."""
    if not serving.servers:
        yield "serving.servers", f"no servers; {FORMS}, or set serving to null"
    counts = Counter(server.rstrip("/") for server in serving.servers)
    for server in serving.servers:
        if problem := _server(server):
            yield "serving.servers", problem
        elif counts[server.rstrip("/")] > 1:
            yield "serving.servers", f"'{server}' is listed twice"
            break
    if serving.max_rank not in RANKS:
        yield "serving.max_rank", f"{serving.max_rank} is not a rank that vLLM allows; use one of {RANKS}"
    if serving.base_name is not None and not serving.base_name.strip():
        yield "serving.base_name", f"{serving.base_name!r} is blank; use null for the name in model.base_model"
    if serving.verify_rows < 1:
        yield "serving.verify_rows", f"{serving.verify_rows} must be at least 1"


def _server(server: str) -> str | None:
    """Problem of one server; None if its form is right. Settings are stored with artifacts: no credentials in a URL."""
    if server.startswith(FOLDER):
        return None if server.removeprefix(FOLDER).strip() else f"'{server}' names no folder; use folder:./path"
    if shown_url(server) != server:
        return (
            f"'{shown_url(server)}': a URL must contain no user, password, token, query or fragment; set the bearer "
            "token in the environment (FINETUNE_SERVING_TOKEN)"
        )
    try:
        url = urlsplit(server)
        valid = url.scheme in ("http", "https") and url.hostname and url.port != 0 and url.path in ("", "/")
    except ValueError:  # a port that is not a number, or brackets that do not match
        valid = False
    return None if valid else f"'{server}' is not a server; {FORMS}"
