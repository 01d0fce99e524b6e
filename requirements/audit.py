"""Looks for known vulnerabilities of every locked package with pip-audit. `make audit` runs it.

Exit code 1 if there are some. Where PyPI's advisories cannot be read, as on a machine without the internet or with a
mirror that has only files, it prints that the audit was skipped; with --strict that is a failure too.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
LOCKS = ("build.txt", "torch.txt", "runtime.txt", "dev.txt", "tools.txt")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strict", action="store_true", help="fail where packages could not be audited")
    strict = parser.parse_args().strict
    packages = [package for lock in LOCKS for package in audited(FOLDER / lock)]
    found = [(package, hole) for package in packages for hole in package.get("vulns", ())]
    for package, hole in found:
        fixed = ", ".join(hole["fix_versions"]) or "none yet"
        print(f"{package['name']} {package['version']}: {hole['id']}; fixed in: {fixed}")
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    checked = len(packages) - len(skipped)
    print(f"pip-audit: {checked} packages audited, {len(found)} vulnerabilities")
    if skipped or not packages:
        print(f"pip-audit was SKIPPED for {len(skipped) or 'all'} packages: no advisories from the index for them")
    return 1 if found or (strict and (skipped or not packages)) else 0


def audited(lock: Path) -> list[dict]:
    """pip-audit's answer for each package of a lock file; none if it could not ask."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "pip_audit", "--disable-pip", "--require-hashes", "--progress-spinner=off"]
        command += ["-r", str(lock), "--format=json", f"--output={answer}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.exists():
            return json.loads(answer.read_text("utf-8"))["dependencies"]
    reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
    print(f"{lock.name}: {reason}", file=sys.stderr)
    return [{"name": lock.name, "skip_reason": reason}]


if __name__ == "__main__":
    sys.exit(main())
