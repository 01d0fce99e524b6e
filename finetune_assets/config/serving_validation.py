"""Validates the group `serving` of an experiment."""

from collections.abc import Iterator
from urllib.parse import urlsplit

from finetune_assets.config.raw_validation import Problem
from finetune_assets.config.schema import Serving
from finetune_assets.display import has_credentials, shown_url

FOLDER = "folder:"
"""Prefix of a server that is a folder."""
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM's `--max-lora-rank` accepts."""
EXPECTED = "expected folder:./path, http://host:port or https://host:port"


def serving_problems(serving: Serving) -> Iterator[Problem]:
    """All problems of the settings of servers."""
    if not serving.servers:
        yield "serving.servers", f"names no server; {EXPECTED}, or remove the group `serving`"
    for index, server in enumerate(serving.servers):
        if problem := server_problem(server):
            yield f"serving.servers.{index}", problem
        elif server in serving.servers[:index]:
            yield f"serving.servers.{index}", f"'{server}' is named twice; name each replica once"
    if serving.max_rank not in RANKS:
        yield "serving.max_rank", f"{serving.max_rank} is not a rank of vLLM: {', '.join(map(str, RANKS))}"
    if serving.base_name is not None and not serving.base_name.strip():
        yield "serving.base_name", "is blank; write the name that the server lists, or null for model.base_model"
    if serving.verify_rows < 1:
        yield "serving.verify_rows", f"{serving.verify_rows} must be at least 1"


def server_problem(server: str) -> str:
    """What is wrong with one server; empty if nothing is."""
    if server.startswith(FOLDER):
        return "" if server.removeprefix(FOLDER).strip() else f"'{server}' names no folder; {EXPECTED}"
    shown = shown_url(server)
    if has_credentials(server):
        return f"'{shown}': a URL must contain no user, password or token; set FINETUNE_SERVING_TOKEN"
    try:
        parts = urlsplit(server)
        _ = parts.port
    except ValueError:
        return f"'{shown}' is not a URL; {EXPECTED}"
    is_plain = parts.path in ("", "/") and not parts.query and not parts.fragment and server.isprintable()
    if parts.scheme not in ("http", "https") or not parts.hostname or not is_plain or " " in server:
        return f"'{shown}' is not a server; {EXPECTED}"
    return ""
