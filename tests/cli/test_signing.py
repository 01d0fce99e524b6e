"""Adapters signed by a key pair: what a signature covers, and whose it is."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import run
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from projects import TestProject
from servers.hub import TOKEN, Hub

from finetune_assets.artifacts.layout import SIGNATURE, write_sums
from finetune_assets.cli.signing import MAX_SIGNATURE_BYTES, PASSPHRASE, key_fingerprint, sign, signature_problems
from finetune_assets.errors import UserError
from finetune_assets.store.artifacts import ArtifactRef

SECRET = "correct horse battery staple"


def key_pair(folder: Path, name: str, passphrase: str | None = None) -> tuple[Path, Path]:
    """A private and a public key as files."""
    key = ec.generate_private_key(ec.SECP256R1())
    encryption = BestAvailableEncryption(passphrase.encode()) if passphrase else NoEncryption()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return key_pair(tmp_path, "ours")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files as an adapter has them."""
    folder = tmp_path / "adapter"
    (folder / "sub").mkdir(parents=True)
    for name in ("adapter_model.safetensors", "adapter_config.json", "sub/more.txt"):
        (folder / name).write_text(name)
    write_sums(folder)
    return folder


def alter(path: Path) -> None:
    path.write_text(path.read_text() + " ")


CHANGES: dict[str, Callable[[Path], object]] = {
    "adapter_model.safetensors": lambda folder: alter(folder / "adapter_model.safetensors"),
    "sub/more.txt": lambda folder: alter(folder / "sub/more.txt"),
    "SHA256SUMS": lambda folder: alter(folder / "SHA256SUMS"),
    "adapter_config.json": lambda folder: (folder / "adapter_config.json").unlink(),
    "evil.py": lambda folder: (folder / "evil.py").touch(),
    "sub/evil.py": lambda folder: (folder / "sub/evil.py").touch(),
    ".git/hooks": lambda folder: [(folder / ".git").mkdir(), (folder / ".git/hooks").touch()],
    ".gitignore": lambda folder: (folder / ".gitignore").touch(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_signature_covers_every_file(folder: Path, keys: tuple[Path, Path], name: str) -> None:
    private, public = keys
    assert sign(folder, private) == key_fingerprint(public)
    assert signature_problems(folder, public) == []
    CHANGES[name](folder)
    (problem,) = signature_problems(folder, public)
    assert problem.startswith(f"{name}: ")
    assert SIGNATURE in problem


def test_new_sums_do_not_hide_an_altered_file(folder: Path, keys: tuple[Path, Path]) -> None:
    sign(folder, keys[0])
    (folder / "adapter_model.safetensors").write_text("other weights")
    (folder / SIGNATURE).rename(folder.parent / SIGNATURE)
    write_sums(folder)
    (folder.parent / SIGNATURE).rename(folder / SIGNATURE)
    problems = signature_problems(folder, keys[1])
    assert [problem.partition(":")[0] for problem in problems] == ["SHA256SUMS", "adapter_model.safetensors"]


def test_a_link_is_not_followed(folder: Path, keys: tuple[Path, Path]) -> None:
    sign(folder, keys[0])
    (folder / "sub/more.txt").rename(folder.parent / "more.txt")
    (folder / "sub/more.txt").symlink_to(folder.parent / "more.txt")
    (problem,) = signature_problems(folder, keys[1])
    assert problem.startswith("sub/more.txt: ")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"{}", b'{"mediaType": 1}', b"[" * 100_000, b"\xff\xfe", b"x" * (MAX_SIGNATURE_BYTES + 1)],
    ids=["empty", "half", "object", "types", "deep", "binary", "huge"],
)
def test_a_signature_of_a_stranger_is_one_line(folder: Path, keys: tuple[Path, Path], content: bytes) -> None:
    (folder / SIGNATURE).write_bytes(content)
    (problem,) = signature_problems(folder, keys[1])
    assert problem.startswith(f"{SIGNATURE}: ")
    assert "\n" not in problem


def test_a_name_of_an_added_file_is_one_line(folder: Path, keys: tuple[Path, Path]) -> None:
    sign(folder, keys[0])
    (folder / "a\x1b[2J\nb").touch()
    (problem,) = signature_problems(folder, keys[1])
    assert problem.isprintable()


def test_the_signature_of_another_adapter_is_refused(folder: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    alter(other / "adapter_model.safetensors")
    sign(other, keys[0])
    shutil.copy(other / SIGNATURE, folder / SIGNATURE)
    assert "adapter_model.safetensors" in signature_problems(folder, keys[1])[0]


def test_the_library_of_the_format_verifies_it_too(folder: Path, keys: tuple[Path, Path]) -> None:
    sign(folder, keys[0])
    command = [Path(sys.executable).with_name("model_signing"), "verify", "key", "--public_key", keys[1]]
    done = subprocess.run([*command, "--signature", folder / SIGNATURE, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_keys_that_cannot_be_used_are_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = key_pair(tmp_path, "locked", SECRET)
    monkeypatch.setenv(PASSPHRASE, "wrong " + SECRET)
    with pytest.raises(UserError, match=r"locked\.pem") as refused:
        sign(folder, private)
    assert SECRET not in str(refused.value)
    monkeypatch.setenv(PASSPHRASE, SECRET)
    sign(folder, private)
    assert signature_problems(folder, public) == []
    assert SECRET not in "".join(capsys.readouterr())
    other = rsa.generate_private_key(65537, 2048)
    (tmp_path / "rsa.pem").write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    rsa_public = other.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "rsa.pub").write_bytes(rsa_public)
    (tmp_path / "none.pem").write_text("no key")
    for name in ("rsa.pem", "none.pem", "missing.pem"):
        with pytest.raises(UserError, match=name):
            sign(folder, tmp_path / name)
    for name in ("rsa.pub", "none.pem", "missing.pub"):
        with pytest.raises(UserError, match=name):
            signature_problems(folder, tmp_path / name)


def test_without_the_extra_the_fix_is_named(
    folder: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("model_signing.signing", "model_signing.verifying"):
        monkeypatch.setitem(sys.modules, name, None)
    for refused in (lambda: sign(folder, keys[0]), lambda: signature_problems(folder, keys[1])):
        with pytest.raises(UserError, match="signing"):
            refused()


def test_verify_says_whose_signature_it_is(
    champion: ArtifactRef,
    project: TestProject,
    keys: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    private, public = keys
    _, others = key_pair(tmp_path, "others")
    folder = tmp_path / "out"

    def verified(*arguments: str) -> tuple[int, str]:
        code, said, _ = run(capsys, "adapter", "verify", str(folder), *arguments)
        return code, said.replace("\n", "")

    assert run(capsys, "adapter", "fetch", "demo", str(folder)).code == 0
    code, said = verified("--key", str(public))
    assert code == 1, "it is not signed"
    assert SIGNATURE in said
    shutil.rmtree(folder)
    assert run(capsys, "adapter", "fetch", "demo", str(folder), "--sign", str(private)).code == 0
    code, said = verified("--key", str(public))
    assert code == 0, said
    assert key_fingerprint(public) in said
    assert verified()[0] == 0, "without a key, the store is compared as before"
    code, said = verified("--key", str(others))
    assert code == 1
    assert key_fingerprint(public) not in said
    shutil.rmtree(project.store_root)
    assert verified("--key", str(public))[0] == 0, "the signature proves the origin where the store is another's"
    assert verified("--key", str(others))[0] == verified()[0] == 1
    alter(folder / "config.yaml")
    assert verified("--key", str(public))[0] == 1


def test_what_is_published_is_signed(
    champion: ArtifactRef,
    keys: tuple[Path, Path],
    hub: Hub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (tmp_path / "none.pem").write_text("no key")
    code, _, err = run(capsys, "adapter", "publish", "demo", "me/towns", "--sign", str(tmp_path / "none.pem"))
    assert code == 1
    assert "none.pem" in err
    assert "me/towns" not in hub.repos, "nothing is uploaded without its signature"
    code, _, err = run(capsys, "adapter", "publish", "demo", "me/towns", "--sign", str(keys[0]))
    assert code == 0, err
    repo = hub.repos["me/towns"]
    copy = tmp_path / "copy"
    for name, content in repo.commits[repo.branches["main"]].items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content)
    assert run(capsys, "adapter", "verify", str(copy), "--key", str(keys[1])).code == 0
    assert b"PRIVATE" not in b"".join(path.read_bytes() for path in copy.rglob("*") if path.is_file())
