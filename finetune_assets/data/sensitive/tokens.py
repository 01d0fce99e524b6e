"""API keys and tokens that their services mark by a prefix, and signed web tokens."""

import base64
import json
import re

from finetune_assets.data.sensitive.kind import END, START, Kind, ends, entropy

LEAST_ENTROPY = 2.5
"""In bits per character; below it, a key is a placeholder such as `ghp_xxxx...`. Random hexadecimal has 3 to 4."""

SHORT = 4
"""Hints below this length occur in many texts without a key."""

PREFIXED: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("AWS access key", ("AKIA", "ASIA", "ABIA", "ACCA"), r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}"),
    (
        "GitHub token",
        ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
        r"(?:gh[opsur]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{40,})",
    ),
    (
        "GitLab token",
        ("glpat-", "gldt-", "glrt-", "glptt-", "glcbt-"),
        r"gl(?:pat|dt|rt|ptt|cbt)-[A-Za-z0-9_-]{20,}(?:\.[A-Za-z0-9_.-]+)?",
    ),
    (
        "Slack token",
        ("xoxa-", "xoxb-", "xoxe", "xoxo-", "xoxp-", "xoxr-", "xoxs-", "xapp-"),
        r"(?:xox[abeoprs](?:\.xox[a-z])?-|xapp-\d-)[A-Za-z0-9-]{20,}",
    ),
    ("Stripe key", ("k_live_", "whsec_"), r"(?:[rs]k_live_[A-Za-z0-9]{16,}|whsec_[A-Za-z0-9+/]{24,})"),
    ("Anthropic key", ("sk-ant-",), r"sk-ant-[A-Za-z0-9_-]{20,}"),
    ("OpenRouter key", ("sk-or-",), r"sk-or-v1-[0-9a-f]{40,}"),
    ("OpenAI key", ("sk-",), r"sk-(?:(?:proj|svcacct|admin|None)-[A-Za-z0-9_-]{20,}|[A-Za-z0-9]{32,})"),
    ("Hugging Face token", ("hf_", "api_org_"), r"(?:hf|api_org)_[A-Za-z0-9]{30,}"),
    ("Google API key", ("AIza",), r"AIza[A-Za-z0-9_-]{35}"),
    ("Google OAuth token", ("ya29.", "GOCSPX-"), r"(?:ya29\.[A-Za-z0-9_-]{20,}|GOCSPX-[A-Za-z0-9_-]{28})"),
    ("npm token", ("npm_",), r"npm_[A-Za-z0-9]{36}"),
    ("PyPI token", ("pypi-Ag",), r"pypi-Ag[A-Za-z0-9_-]{50,}"),
    ("SendGrid key", ("SG.",), r"SG\.[A-Za-z0-9_-]{20,24}\.[A-Za-z0-9_-]{39,50}"),
    ("Twilio key", ("SK",), r"SK[0-9a-f]{32}"),
    ("Mailgun key", ("key-",), r"key-[0-9a-f]{32}"),
    ("DigitalOcean token", ("dop_v1_", "doo_v1_", "dor_v1_"), r"do[opr]_v1_[0-9a-f]{64}"),
    ("Shopify token", ("shpat_", "shpca_", "shppa_", "shpss_"), r"shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}"),
    ("Square token", ("sq0", "EAAA"), r"(?:sq0[a-z]{3}-[A-Za-z0-9_-]{22,}|EAAA[A-Za-z0-9_-]{60})"),
    ("Databricks token", ("dapi",), r"dapi[0-9a-f]{32}(?:-\d)?"),
    ("Docker token", ("dckr_",), r"dckr_(?:oat|pat)_[A-Za-z0-9_-]{27,}"),
    ("Vault token", ("hvs.", "hvb."), r"hv[bs]\.[A-Za-z0-9_-]{24,}"),
    ("Grafana token", ("glsa_", "glc_"), r"(?:glsa|glc)_[A-Za-z0-9_+/=]{32,}"),
    ("Linear key", ("lin_",), r"lin_(?:api|oauth)_[A-Za-z0-9]{32,}"),
    ("Notion token", ("ntn_", "secret_"), r"(?:ntn_[A-Za-z0-9]{40,}|secret_[A-Za-z0-9]{43})"),
    ("New Relic key", ("NRAK-",), r"NRAK-[A-Z0-9]{27}"),
    ("Postman key", ("PMAK-",), r"PMAK-[0-9a-f]{24}-[0-9a-f]{34}"),
    ("Groq key", ("gsk_",), r"gsk_[A-Za-z0-9]{40,}"),
    ("xAI key", ("xai-",), r"xai-[A-Za-z0-9]{60,}"),
    ("Replicate token", ("r8_",), r"r8_[A-Za-z0-9]{37}"),
    ("age key", ("AGE-SECRET-KEY-1",), r"AGE-SECRET-KEY-1[A-Z0-9]{58}"),
)
"""Keys by service: name, hints, and prefix with alphabet and length. The more specific of two comes first."""


def is_random(key: str) -> bool:
    """Whether a key is made of different characters, as a placeholder is not."""
    return entropy(key[4:]) >= LEAST_ENTROPY


def is_from_documentation(key: str) -> bool:
    """Whether a key is one that AWS prints in its documentation."""
    return key.endswith("EXAMPLE")


def _is_web_token(token: str) -> bool:
    header = token.partition(".")[0]
    try:
        return "alg" in json.loads(base64.urlsafe_b64decode(header + "=" * (-len(header) % 4)))
    except (TypeError, ValueError):
        return False


def _secret(name: str, hints: tuple[str, ...], pattern: str) -> Kind:
    sieve = pattern if min(map(len, hints)) < SHORT else ""
    return Kind(name, re.compile(START + pattern + END), hints, is_random, ends, is_from_documentation, sieve)


TOKENS: tuple[Kind, ...] = (
    *(_secret(*row) for row in PREFIXED),
    Kind(
        "JSON web token",
        re.compile(START + r"eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"),
        ("eyJ",),
        _is_web_token,
    ),
    Kind(
        "Telegram bot token",
        re.compile(r"(?<![A-Za-z0-9])(?:bot)?(?P<secret>\d{8,10}:AA[A-Za-z0-9_-]{33})" + END),
        (":AA",),
        is_random,
    ),
    Kind(
        "Slack webhook",
        re.compile(r"hooks\.slack\.com/(?:services|workflows)/(?P<secret>[A-Za-z0-9+/]{30,})"),
        ("hooks.slack.com",),
        is_random,
    ),
    Kind(
        "Discord webhook",
        re.compile(r"discord(?:app)?\.com/api/webhooks/\d{17,20}/(?P<secret>[A-Za-z0-9_-]{60,})"),
        ("/api/webhooks/",),
        is_random,
    ),
)
