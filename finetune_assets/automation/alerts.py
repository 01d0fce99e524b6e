"""Alerts by webhook (Slack-compatible JSON), by email, or both. Disabled until configured.

FINETUNE_ALERT_WEBHOOK: URL that accepts `{"text": "..."}`, such as Slack's, Mattermost's or Discord's (with /slack).
FINETUNE_ALERT_EMAIL: recipients, separated by commas.
FINETUNE_SMTP: `smtp://user:password@host:587` (STARTTLS where the server offers it) or `smtps://...:465`.
FINETUNE_ALERT_FROM: sender; default the first address in FINETUNE_ALERT_EMAIL.
FINETUNE_UI_URL: URL of Dagster's UI, for links to runs.
"""

import json
import os
import smtplib
from email.message import EmailMessage
from urllib.error import URLError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

from finetune_assets.errors import UserError

TIMEOUT_SECONDS = 10
VARIABLES = ("FINETUNE_ALERT_WEBHOOK", "FINETUNE_ALERT_EMAIL")


class AlertError(UserError):
    """An alert could not be delivered. The message contains no secrets."""


def configured() -> bool:
    return any(os.environ.get(name) for name in VARIABLES)


def send_alert(title: str, text: str) -> None:
    """Send an alert through each configured channel.

    Raises:
        AlertError: If any channel failed. All channels are tried first; the message names those that failed.
    """
    failed = []
    for variable, send in zip(VARIABLES, (_to_webhook, _by_email), strict=True):
        if to := os.environ.get(variable):
            try:
                send(to, title, text)
            except (OSError, ValueError, smtplib.SMTPException) as e:
                failed.append(f"{variable}: {_reason(e)}")
    if failed:
        raise AlertError("an alert could not be sent: " + "; ".join(failed))


def link(run_id: str) -> str:
    """URL of a run in Dagster's UI; empty if FINETUNE_UI_URL is not set."""
    ui = os.environ.get("FINETUNE_UI_URL", "").rstrip("/")
    return f"{ui}/runs/{run_id}" if ui else ""


def _reason(error: Exception) -> str:
    """Type and code of an error, without the address, which may itself be a secret."""
    if isinstance(error, URLError) and isinstance(error.reason, Exception):
        error = error.reason
    return f"{type(error).__name__} {getattr(error, 'code', '')}".strip()


def _to_webhook(url: str, title: str, text: str) -> None:
    body = json.dumps({"text": f"*{title}*\n{text}"}).encode()
    request = Request(url, body, {"Content-Type": "application/json"})
    with urlopen(request, timeout=TIMEOUT_SECONDS):
        pass


def _by_email(to: str, title: str, text: str) -> None:
    server = urlsplit(os.environ.get("FINETUNE_SMTP", ""))
    if server.scheme not in ("smtp", "smtps") or not server.hostname:
        raise ValueError("FINETUNE_SMTP must be smtp://user:password@host:587 or smtps://user:password@host:465")
    message = EmailMessage()
    message["Subject"], message["To"] = title, to
    message["From"] = os.environ.get("FINETUNE_ALERT_FROM") or to.split(",")[0]
    message.set_content(text)
    kind = smtplib.SMTP_SSL if server.scheme == "smtps" else smtplib.SMTP
    with kind(server.hostname, server.port or 0, timeout=TIMEOUT_SECONDS) as client:
        client.ehlo()
        if client.has_extn("starttls"):
            client.starttls()
        if server.username:
            client.login(unquote(server.username), unquote(server.password or ""))
        client.send_message(message)
