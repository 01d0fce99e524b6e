"""Signatures of an adapter's folder by a key pair, with OpenSSF's model-signing (the extra `signing`).

`model.sig` is a Sigstore bundle over the names and sha256 of all files of the folder, SHA256SUMS included, that
`model_signing verify key` reads too. No network is used.
"""

import base64
import hashlib
import importlib
import json
import os
from pathlib import Path
from types import ModuleType

import click

from finetune_assets.artifacts.layout import SIGNATURE
from finetune_assets.cli.verification import differences
from finetune_assets.errors import UserError

PASSPHRASE = "FINETUNE_SIGNING_PASSPHRASE"
"""Variable with the passphrase of an encrypted private key; without it, a terminal is asked."""
UNSIGNED = (SIGNATURE, ".gitattributes")
"""The signature itself, and what the Hub adds to each repository."""
MAX_SIGNATURE_BYTES = 8 * 2**20
KEYS = "an elliptic curve key as PEM is needed (openssl: prime256v1, secp384r1 or secp521r1)"


class SignatureError(UserError):
    """A folder cannot be signed, or a key cannot be read."""


def sign(folder: Path, private_key: Path) -> str:
    """Sign all files of a folder, and return the fingerprint of the key.

    Raises:
        SignatureError: if the key cannot be read, or model-signing is not installed.
    """
    from cryptography.hazmat.primitives import serialization

    signing = _library("signing")
    data = _read(private_key)
    passphrase = _passphrase(private_key) if b"ENCRYPTED" in data else None
    try:
        key = serialization.load_pem_private_key(data, passphrase)
        signer = signing.Config().use_elliptic_key_signer(private_key=private_key, password=passphrase)
    except (ValueError, TypeError, AttributeError) as e:  # never the library's words: they are about a secret
        why = f"wrong passphrase, or {KEYS}" if passphrase else KEYS
        raise SignatureError(f"{private_key}: cannot be used to sign: {why}") from e
    signer.set_hashing_config(_hashing()).sign(folder, folder / SIGNATURE)
    return _fingerprint(key.public_key())


def key_fingerprint(public_key: Path) -> str:
    """The sha256 of a public key, as `openssl pkey -pubin -outform DER | sha256sum` prints it.

    Raises:
        SignatureError: if it is no elliptic curve key.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_pem_public_key(_read(public_key))
    except ValueError as e:
        raise SignatureError(f"{public_key}: is no public key: {KEYS}") from e
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise SignatureError(f"{public_key}: is a key of another kind: {KEYS}")
    return _fingerprint(key)


def signature_problems(folder: Path, public_key: Path) -> list[str]:
    """Why a folder's signature is not one of all its files by the holder of a key; empty if it is.

    Raises:
        SignatureError: if the key cannot be read, or model-signing is not installed.
    """
    verifying, key = _library("verifying"), key_fingerprint(public_key)
    signature = folder / SIGNATURE
    if signature.is_symlink() or not signature.is_file():
        return [f"{SIGNATURE}: missing; the folder is not signed"]
    if signature.stat().st_size > MAX_SIGNATURE_BYTES:
        return [f"{SIGNATURE}: {signature.stat().st_size} bytes; a signature has at most {MAX_SIGNATURE_BYTES}"]
    links = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink()]
    if links:
        return [_one_line(f"{link}: is a link, which no signature covers") for link in sorted(links)]
    config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    try:
        config.set_hashing_config(_hashing()).verify(folder, signature)
    except Exception as e:  # the file is a stranger's, and the library raises what its parsers raise
        mismatch = str(e).startswith("Signature mismatch")  # the signature itself is the key's
        changed = differences(folder, _signed_files(signature), SIGNATURE) if mismatch else []
        return [_one_line(problem) for problem in changed] or [
            f"{SIGNATURE}: no signature of these files by the key {key[:16]} ({public_key})"
        ]
    return []


def _signed_files(signature: Path) -> dict[str, str]:
    """The sha256 of each file that a signature covers, once it is known to be the key's."""
    bundle = json.loads(signature.read_bytes())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    return {file["name"]: file["digest"] for file in statement["predicate"]["resources"]}


def _one_line(text: str) -> str:
    """A message that quotes names of files, which are a stranger's too."""
    return "".join(character if character.isprintable() else "?" for character in " ".join(text.split()))


def _hashing() -> object:
    """All files count, those of a `.git` folder too, which the library leaves out by default."""
    return _library("hashing").Config().set_ignored_paths(paths=UNSIGNED, ignore_git_paths=False)


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"model_signing.{name}")
    except ImportError as e:
        raise SignatureError(f"model-signing is not installed ({e}); run pip install 'finetune-assets[signing]'") from e


def _read(key: Path) -> bytes:
    try:
        return key.read_bytes()
    except OSError as e:
        raise SignatureError(f"{key}: cannot be read: {e.strerror}") from e


def _passphrase(key: Path) -> bytes:
    given = os.environ.get(PASSPHRASE)
    return (given if given is not None else click.prompt(f"Passphrase of {key}", hide_input=True, err=True)).encode()


def _fingerprint(public_key: object) -> str:
    from cryptography.hazmat.primitives import serialization

    der = public_key.public_bytes(  # type: ignore[attr-defined]
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(der).hexdigest()
