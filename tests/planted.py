"""Secrets and personal data of every kind that is found, none of them real.

They are made up when tests run, so that no scanner of repositories finds them in this file.
"""

import base64
import random
import string

from finetune_assets.data.sensitive.personal import IBAN_LENGTHS, is_iban, passes_luhn

LETTERS, HEX = string.ascii_letters + string.digits, "0123456789abcdef"
_RANDOM = random.Random(7)


def tail(length: int, alphabet: str = LETTERS) -> str:
    return "".join(_RANDOM.choices(alphabet, k=length))


def web_token() -> str:
    parts = ['{"alg":"HS256","typ":"JWT"}', '{"sub":"1234567890","name":"Somebody"}']
    return ".".join([*(base64.urlsafe_b64encode(part.encode()).decode().rstrip("=") for part in parts), tail(43)])


def key_body() -> str:
    return "\n".join(tail(64) for _ in range(4))


def private_key(kind: str, body: str) -> str:
    return f"-----BEGIN {kind}PRIVATE KEY-----\n{body}\n-----END {kind}PRIVATE KEY-----"


def putty_key() -> str:
    lines = "\n".join(tail(64) for _ in range(3))
    head = "PuTTY-User-Key-File-3: ssh-ed25519\nEncryption: none\nComment: mine\nPublic-Lines: 1\nAAAAC3Nz\n"
    return f"{head}Private-Lines: 3\n{lines}\nPrivate-MAC: 00ff"


def card(start: str, length: int) -> str:
    digits = start + tail(length - len(start) - 1, string.digits)
    return next(digits + check for check in string.digits if passes_luhn(digits + check))


def iban(country: str) -> str:
    account = tail(IBAN_LENGTHS[country] - 4, string.digits)
    numbers = (f"{country}{check:02}{account}" for check in range(2, 99))
    return next(number for number in numbers if is_iban(number))


def grouped(number: str, size: int = 4) -> str:
    return " ".join(number[at : at + size] for at in range(0, len(number), size))


AWS_SECRET = tail(38) + "/a"
PUTTY, BODY, RSA_BODY = putty_key(), key_body(), key_body()
ADDRESS_PASSWORD, QUOTED, BARE, SPOKEN = "hunter2x", "Tr0ub4dor&3", "s3cr3tValue99z", "C0rrectHorse!9"
BEARER = tail(40)
PLANTED: tuple[tuple[str, str, str], ...] = tuple(
    (kind, text.replace("@", secret) if marked else text, secret)
    for kind, text, secret, marked in (
        ("AWS access key", "aws_access_key_id = @", "AKIA" + tail(16, "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"), True),
        ("AWS secret key", 'aws_secret_access_key = "@"', AWS_SECRET, True),
        ("GitHub token", "git clone with @", "ghp_" + tail(36), True),
        ("GitHub token", "or @", "gho_" + tail(36), True),
        ("GitHub token", "or @", "github_pat_" + tail(22) + "_" + tail(59), True),
        ("GitLab token", "PRIVATE-TOKEN: @", "glpat-" + tail(20), True),
        ("Slack token", "the bot is @", "xoxb-" + tail(12, string.digits) + "-" + tail(24), True),
        ("Slack webhook", "post to https://hooks.slack.com/services/@", f"T{tail(8)}/B{tail(8)}/{tail(24)}", True),
        ("Stripe key", "charge with @", "sk_live_" + tail(24), True),
        ("Stripe key", "restricted @", "rk_live_" + tail(24), True),
        ("OpenAI key", "OPENAI_API_KEY=@", "sk-" + tail(48), True),
        ("OpenAI key", "now @", "sk-proj-" + tail(64), True),
        ("Anthropic key", "x-api-key: @", "sk-ant-api03-" + tail(93), True),
        ("OpenRouter key", "route by @", "sk-or-v1-" + tail(64, HEX), True),
        ("Hugging Face token", "login(token='@')", "hf_" + tail(34), True),
        ("Google API key", "maps?key=@", "AIza" + tail(35), True),
        ("Google OAuth token", "@", "GOCSPX-" + tail(28), True),
        ("npm token", "//registry.npmjs.org/:_authToken=@", "npm_" + tail(36), True),
        ("PyPI token", "twine upload -p @", "pypi-AgEIcHlwaS5vcmc" + tail(80), True),
        ("SendGrid key", "mail by @", "SG." + tail(22) + "." + tail(43), True),
        ("Twilio key", "sms by @", "SK" + tail(32, HEX), True),
        ("Telegram bot token", "https://api.telegram.org/bot@/getMe", tail(9, "123456789") + ":AA" + tail(33), True),
        ("Discord webhook", "https://discord.com/api/webhooks/123456789012345678/@", tail(68), True),
        ("Mailgun key", "api:@", "key-" + tail(32, HEX), True),
        ("DigitalOcean token", "doctl auth @", "dop_v1_" + tail(64, HEX), True),
        ("Shopify token", "shop @", "shpat_" + tail(32, HEX), True),
        ("Square token", "pay @", "sq0csp-" + tail(43), True),
        ("Databricks token", "dbx @", "dapi" + tail(32, HEX), True),
        ("Docker token", "docker login -p @", "dckr_pat_" + tail(27), True),
        ("Vault token", "vault login @", "hvs." + tail(90), True),
        ("Grafana token", "dash @", "glsa_" + tail(32) + "_" + tail(8, HEX), True),
        ("Linear key", "issue @", "lin_api_" + tail(40), True),
        ("Notion token", "page @", "ntn_" + tail(46), True),
        ("New Relic key", "apm @", "NRAK-" + tail(27, string.ascii_uppercase + string.digits), True),
        ("Postman key", "call @", "PMAK-" + tail(24, HEX) + "-" + tail(34, HEX), True),
        ("Groq key", "fast @", "gsk_" + tail(52), True),
        ("xAI key", "ask @", "xai-" + tail(80), True),
        ("Replicate token", "run @", "r8_" + tail(37), True),
        ("age key", "sops @", "AGE-SECRET-KEY-1" + tail(58, string.ascii_uppercase + string.digits), True),
        ("JSON web token", "Cookie: session=@", web_token(), True),
        ("private key", private_key("RSA ", RSA_BODY), RSA_BODY, False),
        ("private key", f"the key\n{private_key('', BODY)}\nis secret", BODY, False),
        ("PuTTY private key", PUTTY, PUTTY.split("Private-Lines: 3\n")[1].split("\n")[1], False),
        ("password in an address", "postgresql://app:" + ADDRESS_PASSWORD + "@db.host:5432/x", ADDRESS_PASSWORD, False),
        ("Azure storage key", "AccountName=a;AccountKey=@", tail(86) + "==", True),
        ("authorization header", "Authorization: Bearer @", BEARER, True),
        ("assigned secret", 'password = "@"', QUOTED, True),
        ("assigned secret", "api_key: @", BARE, True),
        ("assigned secret", "My password is @, keep it.", SPOKEN, True),
        ("e-mail address", "Write to jane.roe.4711@mailbox.org soon.", "jane.roe.4711@mailbox.org", False),
        ("payment card", "Visa @ 12/29 123", grouped(card("4", 16)), True),
        ("payment card", "Mastercard @.", card("53", 16), True),
        ("payment card", "Amex @", card("37", 15), True),
        ("IBAN", "Pay to @ today", grouped(iban("DE")), True),
        ("IBAN", "or to @.", iban("GB"), True),
        ("phone number", "Call @ now", "+49 151 2345 6789", True),
        ("phone number", "or @.", "+1 (415) 867-5309", True),
    )
)
"""Of each: its kind, a text that contains it, and what must not be shown anywhere."""
