"""Alerts by webhook (Slack-compatible JSON), by email, or both. Disabled until configured.

FINETUNE_ALERT_WEBHOOK: https URL that accepts `{"text": "..."}`, such as Slack's, Mattermost's or Discord's (with
    /slack); http on loopback only. Redirects are not followed.
FINETUNE_ALERT_EMAIL: recipients, separated by commas.
FINETUNE_SMTP: `smtp://user:password@host:587` (with STARTTLS) or `smtps://...:465`. The server's certificate must be
    valid for its name (SSL_CERT_FILE names other authorities). A server on loopback needs no TLS.
FINETUNE_ALERT_FROM: sender; default the first address in FINETUNE_ALERT_EMAIL.
FINETUNE_UI_URL: URL of Dagster's UI, for links to runs.
"""

import json
import os
import re
import smtplib
import ssl
from email.message import EmailMessage
from http.client import HTTPException
from typing import Any
from urllib.error import URLError
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import HTTPRedirectHandler, HTTPSHandler, Request, build_opener

from finetune_assets.config.hosts import is_loopback
from finetune_assets.errors import UserError

TIMEOUT_SECONDS = 10
VARIABLES = ("FINETUNE_ALERT_WEBHOOK", "FINETUNE_ALERT_EMAIL")
WEBHOOK = "must be an https URL without user and spaces (http on loopback only)"
SMTP = "FINETUNE_SMTP must be smtp://user:password@host:587 or smtps://user:password@host:465"
MENTION = re.compile(r"@(?=(?:channel|here|everyone|all)\b)", re.IGNORECASE)
"""What Mattermost and Discord read as a mention of everybody."""
ZERO_WIDTH_SPACE = "\u200b"


class AlertError(UserError):
    """An alert could not be delivered. The message contains no secrets."""


def configured() -> bool:
    return any(os.environ.get(name) for name in VARIABLES)


def problems() -> list[str]:
    """Invalid settings of the configured channels, without their secrets."""
    found = []
    for variable, read in zip(VARIABLES, (_webhook, lambda _: _smtp_server()), strict=True):
        try:
            if value := os.environ.get(variable):
                read(value)
        except AlertError as e:
            found.append(f"{variable}: {e}")
    return found


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
            except (AlertError, OSError, ValueError, HTTPException, smtplib.SMTPException) as e:
                failed.append(f"{variable}: {_reason(e)}")
    if failed:
        raise AlertError("an alert could not be sent: " + "; ".join(failed))


def link(run_id: str) -> str:
    """URL of a run in Dagster's UI, without a user or password; empty if FINETUNE_UI_URL is not set."""
    ui = os.environ.get("FINETUNE_UI_URL", "").rstrip("/")
    scheme, separator, rest = ui.partition("://")
    netloc, slash, path = rest.partition("/")
    return f"{scheme}{separator}{netloc.rpartition('@')[2]}{slash}{path}/runs/{run_id}" if ui else ""


def slack_text(text: str) -> str:
    """Text that Slack, Mattermost and Discord show as it is: without mentions, links behind words, and code blocks.

    Alerts quote errors, which quote rows: `<!channel>` would notify everybody, and `<https://a|b>` hide its target.
    """
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for control in (
        "](",
        "```",
    ):  # Markdown of Mattermost and Discord: a link or picture; a block of code
        escaped = escaped.replace(control, ZERO_WIDTH_SPACE.join(control))
    return MENTION.sub(f"@{ZERO_WIDTH_SPACE}", escaped)


def _reason(error: Exception) -> str:
    """Type and code of an error, without the address, which may itself be a secret."""
    if isinstance(error, URLError) and isinstance(error.reason, Exception):
        error = error.reason
    if isinstance(error, AlertError):
        return str(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the server's certificate is not valid: {error.verify_message}"
    code = getattr(error, "code", None) or getattr(error, "smtp_code", "")
    return f"{type(error).__name__} {code}".strip()


class _NoRedirects(HTTPRedirectHandler):
    """Turns a redirect into an error: it could lead to another host, to which the alert was not meant to go."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _webhook(url: str) -> str:
    """A webhook's URL, if it is one.

    Raises:
        AlertError: naming what is expected, and no more of the URL than its scheme and its host.
    """
    parts = _split(url)
    if parts is None or not url.isprintable() or " " in url or "@" in parts.netloc:
        raise AlertError(WEBHOOK)
    if parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or "")):
        if parts.hostname:
            return url
        raise AlertError(f"{WEBHOOK}; found no host")
    found = f"; found {parts.scheme}://{parts.hostname or ''}" if f"{parts.scheme}://" in url.lower() else ""
    raise AlertError(f"{WEBHOOK}{found}")


def _split(url: str) -> SplitResult | None:
    """Parts of a URL; None for an invalid URL, because an error of `urlsplit` would quote parts of it."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return None
    return parts


def _to_webhook(url: str, title: str, text: str) -> None:
    body = json.dumps({"text": f"*{slack_text(_one_line(title))}*\n{slack_text(text)}"}).encode()
    request = Request(_webhook(url), body, {"Content-Type": "application/json"})
    opener = build_opener(_NoRedirects, HTTPSHandler(context=ssl.create_default_context()))
    with opener.open(request, timeout=TIMEOUT_SECONDS):
        pass


def _one_line(title: str) -> str:
    return " ".join(title.split())


def _smtp_server() -> SplitResult:
    """The configured mail server.

    Raises:
        AlertError: if there is none.
    """
    server = _split(os.environ.get("FINETUNE_SMTP", ""))
    if server is None or server.scheme not in ("smtp", "smtps") or not server.hostname:
        raise AlertError(SMTP)
    return server


def _by_email(to: str, title: str, text: str) -> None:
    message = EmailMessage()
    message["Subject"], message["To"] = _one_line(title), to
    message["From"] = os.environ.get("FINETUNE_ALERT_FROM") or to.split(",")[0]
    message.set_content(text)
    server = _smtp_server()
    with _connect(server) as client:
        if server.username:
            client.login(unquote(server.username), unquote(server.password or ""))
        client.send_message(message)


def _connect(server: SplitResult) -> smtplib.SMTP:
    """Connect to a mail server over TLS with a valid certificate, or on loopback.

    Raises:
        AlertError: if a server that is not on loopback offers no TLS, as when somebody between has removed the offer.
    """
    host, context = server.hostname or "", ssl.create_default_context()
    if server.scheme == "smtps":
        return smtplib.SMTP_SSL(host, server.port or 0, timeout=TIMEOUT_SECONDS, context=context)
    client = smtplib.SMTP(host, server.port or 0, timeout=TIMEOUT_SECONDS)
    try:
        client.ehlo()
        if client.has_extn("starttls"):
            client.starttls(context=context)
        elif not is_loopback(host):
            raise AlertError(f"FINETUNE_SMTP: {host} offers no STARTTLS, so nothing was sent; use a server with TLS")
    except BaseException:
        client.close()
        raise
    return client
