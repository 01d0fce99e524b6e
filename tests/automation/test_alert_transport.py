"""Alerts go over verified TLS to the configured server and no other, and quoted text is shown as text."""

import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.handlers import Message as MessageHandler
from aiosmtpd.smtp import AuthResult, LoginPassword
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from projects import TestProject

from finetune_assets.automation import alert_sensors, alerts
from finetune_assets.automation.alerts import AlertError, problems, send_alert, slack_text

HOST, OTHER = "mail.example.org", "elsewhere.example.org"
PASSWORD, HOOK_SECRET = "planted-mail-password", "T000-planted-hook-secret"
Serve = Callable[..., "Mailbox"]


class Mailbox(MessageHandler):
    """What a mail server got: mails, and passwords of logins."""

    def __init__(self) -> None:
        super().__init__()
        self.mails: list[Any] = []
        self.passwords: list[bytes] = []

    def handle_message(self, message: Any) -> None:
        self.mails.append(message)

    def authenticate(self, _server: Any, _session: Any, _envelope: Any, _mechanism: str, data: Any) -> AuthResult:
        assert isinstance(data, LoginPassword)
        self.passwords.append(data.password)
        return AuthResult(success=True)


class ImplicitTls(Controller):
    """A server of smtps; the controller's own check at its start does not verify this certificate."""

    def _trigger_server(self) -> None:
        socket.create_connection((self.hostname, self.port)).close()


def certificate(folder: Path, name: str) -> Path:
    """A self-signed certificate of a host, with its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = folder / f"{name}.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    pem.write_bytes(private + signed.public_bytes(serialization.Encoding.PEM))
    return pem


@pytest.fixture
def mail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Starts a mail server on loopback, and points the environment to it under a name."""
    servers: list[Controller] = []
    look_up, resolved = socket.getaddrinfo, {HOST: "127.0.0.1"}
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest, **more: look_up(resolved.get(host, host), *rest, **more)
    )

    def serve(scheme: str = "smtp", named: str | None = HOST, trusted: bool = True, host: str = HOST) -> Mailbox:
        box, context = Mailbox(), None
        if named:
            pem = certificate(tmp_path, named)
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(pem)
            if trusted:
                monkeypatch.setenv("SSL_CERT_FILE", str(pem))
        shared: dict[str, Any] = {"hostname": "127.0.0.1", "port": free_port()}
        shared |= {"authenticator": box.authenticate, "auth_require_tls": False}
        if scheme == "smtps":
            server: Controller = ImplicitTls(box, ssl_context=context, **shared)
        else:
            server = Controller(box, tls_context=context, **shared)
        server.start()
        servers.append(server)
        monkeypatch.setenv("FINETUNE_SMTP", f"{scheme}://me:{PASSWORD}@{host}:{server.port}")
        monkeypatch.setenv("FINETUNE_ALERT_EMAIL", "on-call@example.org")
        return box

    yield serve
    for server in servers:
        server.stop(no_assert=True)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.parametrize("scheme", ["smtp", "smtps"])
def test_mail_over_verified_tls_arrives(mail: Serve, scheme: str) -> None:
    box = mail(scheme)
    send_alert("title", "text")
    assert box.passwords == [PASSWORD.encode()]
    assert len(box.mails) == 1


@pytest.mark.parametrize("scheme", ["smtp", "smtps"])
@pytest.mark.parametrize(("named", "trusted"), [(OTHER, True), (HOST, False)], ids=["another name", "nobody's"])
def test_no_password_and_no_mail_for_another_certificate(mail: Serve, scheme: str, named: str, trusted: bool) -> None:
    box = mail(scheme, named, trusted)
    with pytest.raises(AlertError) as error:
        send_alert("title", "text")
    assert (box.passwords, box.mails) == ([], [])
    assert "FINETUNE_ALERT_EMAIL: " in str(error.value)
    assert "certificate" in str(error.value)
    assert PASSWORD not in str(error.value)


def test_no_password_and_no_mail_where_starttls_is_stripped(mail: Serve) -> None:
    box = mail(named=None)
    with pytest.raises(AlertError) as error:
        send_alert("title", "text")
    assert (box.passwords, box.mails) == ([], [])
    assert all(fact in str(error.value) for fact in ("FINETUNE_SMTP", HOST, "STARTTLS"))
    assert PASSWORD not in str(error.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_server_on_loopback_needs_no_tls(mail: Serve, host: str) -> None:
    box = mail(named=None, host=host)
    send_alert("title", "text")
    assert box.passwords == [PASSWORD.encode()]
    assert len(box.mails) == 1


def test_title_of_several_lines_is_one_header(mail: Serve) -> None:
    box = mail()
    send_alert("failed: a\nBcc: everybody@example.org", "text")
    (received,) = box.mails
    assert received["Subject"] == "failed: a Bcc: everybody@example.org"
    assert received["Bcc"] is None


@pytest.mark.parametrize(
    "server",
    [f"smtp://me:{PASSWORD}", f"http://me:{PASSWORD}@{HOST}", f"smtp://me:{PASSWORD}@{HOST}:x{PASSWORD}", f"smtp://[{PASSWORD}"],
)  # fmt: skip
def test_wrong_mail_server_is_named_without_its_password(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_ALERT_EMAIL", "me@example.org")
    monkeypatch.setenv("FINETUNE_SMTP", server)
    with pytest.raises(AlertError) as error:
        send_alert("title", "text")
    assert "FINETUNE_SMTP must be smtp://" in str(error.value)
    assert PASSWORD not in str(error.value)
    (problem,) = problems()
    assert problem in str(error.value)


# ---- webhooks


@contextmanager
def web(answer: int = 200, location: str = "") -> Iterator[tuple[str, list[Any]]]:
    """A web server that answers each request the same, and what it received."""
    received: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["Content-Length"] or 0))))
            self.send_response(answer)
            if location:
                self.send_header("Location", location)
            self.end_headers()

        def do_GET(self) -> None:
            received.append((self.path, b""))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/{HOOK_SECRET}", received
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_is_not_followed(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with web() as (other, elsewhere), web(status, other) as (hook, received):
        monkeypatch.setenv("FINETUNE_ALERT_WEBHOOK", hook)
        with pytest.raises(AlertError) as error:
            send_alert("title", "text")
        assert len(received) == 1
        assert elsewhere == []
    assert f"FINETUNE_ALERT_WEBHOOK: HTTPError {status}" in str(error.value)
    assert HOOK_SECRET not in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        f"file:///tmp/{HOOK_SECRET}",
        f"ftp://hooks.example.org/{HOOK_SECRET}",
        f"data:text/plain,{HOOK_SECRET}",
        f"http://hooks.example.org/{HOOK_SECRET}",
        f"http://127.0.0.1.hooks.example.org/{HOOK_SECRET}",
        f"http://10.0.0.1/{HOOK_SECRET}",
        f"https://user:{HOOK_SECRET}@hooks.example.org/",
        f"https://hooks.example.org:{HOOK_SECRET}/",
        f"https://hooks.example.org/{HOOK_SECRET}\n",
        f"https://hooks.example.org/{HOOK_SECRET} x",
        f"https:///{HOOK_SECRET}",
        f"https://[{HOOK_SECRET}/",
        f"hooks.example.org/{HOOK_SECRET}",
        HOOK_SECRET,
    ],
)
def test_wrong_webhook_is_refused_without_its_secret(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_ALERT_WEBHOOK", url)
    (problem,) = problems()
    with pytest.raises(AlertError) as error:
        send_alert("title", "text")
    assert problem in str(error.value)
    assert "FINETUNE_ALERT_WEBHOOK: must be an https URL" in problem
    assert HOOK_SECRET.lower() not in str(error.value).lower()


def test_wrong_webhook_is_in_the_log_before_an_alert_is_due(
    project: TestProject, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FINETUNE_ALERT_WEBHOOK", f"http://hooks.example.org/{HOOK_SECRET}")
    with dg.DagsterInstance.ephemeral() as instance:
        alert_sensors.alert_on_standstill(dg.build_sensor_context(instance=instance))
    printed = capfd.readouterr()
    assert "FINETUNE_ALERT_WEBHOOK: must be an https URL" in printed.out + printed.err
    assert HOOK_SECRET not in printed.out + printed.err


@pytest.mark.parametrize("url", ["https://hooks.slack.com/services/T/B/x", "http://localhost:1/x", "http://[::1]/x"])
def test_right_webhook(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_ALERT_WEBHOOK", url)
    assert problems() == []


@pytest.mark.parametrize(
    "text", ["<!channel>", "<@U024BE7LH>", "<!subteam^S1>", "<https://evil.example|log in again>", "<#C1>"]
)
def test_slack_gets_no_markup_of_quoted_text(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with web() as (hook, received):
        monkeypatch.setenv("FINETUNE_ALERT_WEBHOOK", hook)
        send_alert(f"failed: {text}", f"row 1: {text} & more")
    (_, body) = received[0]
    sent = json.loads(body)["text"]
    assert not {"<", ">"} & {*sent}
    assert sent.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") == (
        f"*failed: {text}*\nrow 1: {text} & more"
    )


@pytest.mark.parametrize(
    "text",
    [
        *("@channel", "@here", "@everyone", "@ALL", "```"),
        *("[log in](https://evil.example)", "![x](https://evil.example/x.png)"),
    ],
)
def test_mattermost_and_discord_get_no_markup_of_quoted_text(text: str) -> None:
    shown = slack_text(f"row 1: {text}!")
    assert text not in shown
    assert shown.replace(alerts.ZERO_WIDTH_SPACE, "") == f"row 1: {text}!", "nothing is lost"


def test_usual_text_is_as_it_was() -> None:
    text = "lora_adapter: rank 1: no such target module 'q_prj' (me@example.org) [1]\nhttp://dagster.example.org/runs/1"
    assert slack_text(text) == text


def test_link_has_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_UI_URL", "https://me:planted@dagster.example.org:8443/finetune/")
    assert alerts.link("abc") == "https://dagster.example.org:8443/finetune/runs/abc"
