"""The store's transfers against boto3's: `python -m benchmarks.store`, on a real S3 server.

1 GB in four safetensors goes up and comes down, each side in a process of its own, and both hash every byte (sha256).
Client CPU is that process's; a server on the same machine is not counted. The server is the environment's (AWS_*, with
a bucket in `--bucket`), or a Ceph RADOS gateway that is started on loopback if Debian's `radosgw`, `ceph-mon`,
`ceph-osd` and `ceph-common` are installed.
"""

import argparse
import contextlib
import hashlib
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

from benchmarks.harness import Runs, arguments, in_process, interleaved, median, report
from finetune_assets.store.hashing import sha256

FILES = 4
SIDES = ("ours", "boto3", "boto3_tuned", "obstore_path", "s3fs")


def make_files(folder: Path, megabytes: int) -> None:
    """So many megabytes in four files of random bytes."""
    for i in range(FILES):
        with open(folder / f"model-{i + 1:05}-of-{FILES:05}.safetensors", "wb") as file:
            for _ in range(megabytes // FILES):
                file.write(os.urandom(1_000_000))


def ours(bucket: str, source: Path, target: Path, name: str) -> tuple[Callable[[], object], ...]:
    """What this project does: publish with a manifest, fetch into a node cache."""
    from finetune_assets.store.artifacts import open_store

    store = open_store(f"s3://{bucket}/ours", "bench", target)
    store.find("raw", "nothing")  # as boto3's client, connected before the clock starts
    return lambda: store.publish(source, "raw", name, name, {}), lambda: store.fetch(store.resolve("raw", name, "us"))


def boto3(bucket: str, source: Path, target: Path, tuned: bool = False) -> tuple[Callable[[], object], ...]:
    """boto3's own transfers, file after file; `tuned` takes parts of 64 MB and compares no CRC."""
    from boto3 import Session
    from boto3.s3.transfer import TransferConfig
    from botocore.config import Config

    options = {"response_checksum_validation": "when_required", "request_checksum_calculation": "when_required"}
    client = Session().client("s3", config=Config(**options) if tuned else None)
    config = TransferConfig(multipart_threshold=64 << 20, multipart_chunksize=64 << 20) if tuned else None
    prefix = "boto3_tuned" if tuned else "boto3"

    def up() -> None:
        for file in sorted(source.iterdir()):
            client.upload_file(str(file), bucket, f"{prefix}/{file.name}", Config=config)
            sha256(file)

    def down() -> None:
        for file in sorted(source.iterdir()):
            client.download_file(bucket, f"{prefix}/{file.name}", str(target / file.name), Config=config)
            sha256(target / file.name)

    return up, down


def obstore_path(bucket: str, source: Path, target: Path) -> tuple[Callable[[], object], ...]:
    """obstore as its documentation has it: a path goes up and is hashed by itself; one stream a file comes down."""
    import obstore
    from obstore.auth.boto3 import Boto3CredentialProvider
    from obstore.store import S3Store

    options = {"allow_http": True, "timeout": "1h"}
    store = S3Store(bucket, prefix="path", client_options=options, credential_provider=Boto3CredentialProvider())

    def up() -> None:
        for file in sorted(source.iterdir()):
            obstore.put(store, file.name, file)
            sha256(file)

    def down() -> None:
        for file in sorted(source.iterdir()):
            digest = hashlib.sha256()
            with open(target / file.name, "wb") as out:
                for chunk in obstore.get(store, file.name).stream():
                    digest.update(chunk)
                    out.write(chunk)

    return up, down


def s3fs(bucket: str, source: Path, target: Path) -> tuple[Callable[[], object], ...]:
    """s3fs, file after file. It is in no extra of this project: it holds botocore back."""
    from s3fs import S3FileSystem

    system = S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL_S3"])

    def up() -> None:
        for file in sorted(source.iterdir()):
            system.put(str(file), f"{bucket}/s3fs/{file.name}")
            sha256(file)

    def down() -> None:
        for file in sorted(source.iterdir()):
            system.get(f"{bucket}/s3fs/{file.name}", str(target / file.name))
            sha256(target / file.name)

    return up, down


def one_side(side: str, direction: str, bucket: str, source: Path, artifact: str) -> dict[str, float]:
    """One transfer in this process: CPU seconds, megabytes a second."""
    target = Path(tempfile.mkdtemp(dir=source.parent))
    makers: dict[str, Callable[..., tuple[Callable[[], object], ...]]] = {
        "ours": lambda *args: ours(*args, artifact),
        "boto3": boto3,
        "boto3_tuned": lambda *args: boto3(*args, tuned=True),
        "obstore_path": obstore_path,
        "s3fs": s3fs,
    }
    up, down = makers[side](bucket, source, target)
    size = sum(file.stat().st_size for file in source.iterdir())
    figures: dict[str, float] = {}
    try:
        act = up if direction == "up" else down
        before, began = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
        act()
        seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        figures = {"cpu_s_per_gb": cpu / size * 1e9, "mb_per_s": size / seconds / 1e6}
        if side == "ours" and direction == "down":
            figures["warm_resolve_ms"] = median([{"ms": milliseconds(act)} for _ in range(11)], "ms")
    finally:
        shutil.rmtree(target)
    return figures


def milliseconds(act: Callable[[], object]) -> float:
    began = time.monotonic()
    act()
    return (time.monotonic() - began) * 1000


@contextlib.contextmanager
def server(bucket: str | None, folder: Path) -> Iterator[str]:
    """The environment's S3 server, or one of our own; the bucket to use."""
    if bucket:
        yield bucket
        return
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from servers import ceph

    if missing := ceph.missing():
        sys.exit(f"name a --bucket, or install {missing}: apt-get install radosgw ceph-mon ceph-osd ceph-common")
    data = folder / "ceph"
    data.mkdir()
    with ceph.running(data) as running:
        os.environ.update(ceph.environment(running.url))
        from boto3 import Session

        Session().client("s3").create_bucket(Bucket="benchmark")
        yield "benchmark"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--bucket", help="of the environment's S3 server; its objects below our prefixes are replaced")
    parser.add_argument("--sides", default="ours,boto3", help=f"of {', '.join(SIDES)}")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        side, direction, bucket, source, artifact = args.one
        print(json.dumps(one_side(side, direction, bucket, Path(source), artifact)))
        return
    megabytes, runs = (200, 1) if args.quick else (1000, 5)
    with tempfile.TemporaryDirectory() as folder, server(args.bucket, Path(folder)) as bucket:
        sides = args.sides.split(",")
        source = Path(folder) / "files"
        source.mkdir()
        make_files(source, megabytes)
        number = count()

        def side(name: str, direction: str) -> dict[str, float]:
            # An artifact that the store has is not published again, so each is new; the first is what comes down
            artifact = str(next(number)) if direction == "up" else "0"
            return in_process("benchmarks.store", "--one", name, direction, bucket, str(source), artifact)

        measured: dict[str, Runs] = {
            direction: interleaved({name: partial(side, name, direction) for name in sides}, runs)
            for direction in ("up", "down")
        }
    tell(measured, sides, megabytes, runs, args.json)


def tell(measured: dict[str, Runs], sides: list[str], megabytes: int, runs: int, as_json: bool) -> None:
    rows = [
        (f"{direction} {name}: {figure.replace('_', ' ')}", f"{median(measured[direction][name], figure):,.2f}")
        for direction in ("down", "up")
        for name in sides
        for figure in ("cpu_s_per_gb", "mb_per_s")
    ]
    down, up = measured["down"], measured["up"]
    ratios = {
        "download_cpu_vs_boto3": median(down["ours"], "cpu_s_per_gb") / median(down["boto3"], "cpu_s_per_gb"),
        "download_throughput_vs_boto3": median(down["ours"], "mb_per_s") / median(down["boto3"], "mb_per_s"),
        "publish_throughput_vs_boto3": median(up["ours"], "mb_per_s") / median(up["boto3"], "mb_per_s"),
        "publish_cpu_vs_boto3": median(up["ours"], "cpu_s_per_gb") / median(up["boto3"], "cpu_s_per_gb"),
        "warm_resolve_ms": median(down["ours"], "warm_resolve_ms"),
    }
    report(f"{megabytes} MB in {FILES} files, median of {runs}", rows, ratios, as_json)


if __name__ == "__main__":
    main()
