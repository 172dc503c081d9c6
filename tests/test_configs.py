"""Every file in configs/ is right, and exports a small disk to where it says: only paths and addresses are changed.

A new file is picked up by itself. Where it goes is decided by its stages' names: `PLACES` says for each how a test
stands in for the real thing.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.flow.manifest import Manifest
from pipeline.units import MiB
from tests.decode.images import run
from tests.disks.letters import write_disk
from tests.disks.mounts import loop_device
from tests.end_to_end.command import call
from tests.stores.azurite import AzureServer
from tests.stores.nbd import NbdServer
from tests.stores.nginx import PASSWORD, USER, WebServer
from tests.stores.openssh import SftpServer
from tests.stores.s3 import S3Server

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))


@dataclass(frozen=True)
class Bench:
    """What a config is run with."""

    folder: Path
    disk: Path
    server: S3Server
    bucket: str
    sftp: SftpServer
    web: WebServer
    azure: AzureServer
    stack: ExitStack

    def name_of(self, told: str) -> str:
        """The last part of a path or URL in a config."""
        return told.rpartition("/")[2]


Stage = Mapping[str, str]
Overrides = dict[str, str]


def _to_file(bench: Bench, stage: Stage) -> Overrides:
    return {"path": str(bench.folder / bench.name_of(stage["path"]))}


def _to_s3(bench: Bench, stage: Stage) -> Overrides:
    url = f"s3://{bench.bucket}/{bench.name_of(stage['url'])}"
    return {"url": url, "endpoint": bench.server.endpoint}


def _to_sftp(bench: Bench, stage: Stage) -> Overrides:
    return {
        "url": bench.sftp.url(f"{bench.folder.name}-{bench.name_of(stage['url'])}"),
        "identity_files": f'["{bench.sftp.identity}"]',
        "known_hosts": str(bench.sftp.known_hosts),
    }


def _to_web(bench: Bench, stage: Stage) -> Overrides:
    name = bench.name_of(stage["url"])
    return {
        "url": bench.web.url(f"private/{bench.folder.name}-{name}", stage["url"].partition(":")[0]),
        "user": USER,
        "ca_file": str(bench.web.ca_file),
    }


def _to_azure(bench: Bench, stage: Stage) -> Overrides:
    return {"url": f"az://{bench.bucket}/{bench.name_of(stage['url'])}"}


def _to_gcs(bench: Bench, stage: Stage) -> Overrides:
    # The parts of GCS are S3's, so an S3 store takes them, in its own dialect.
    return {"url": f"gs://{bench.bucket}/{bench.name_of(stage['url'])}", "endpoint": bench.server.endpoint}


def _from_image(bench: Bench, stage: Stage) -> Overrides:
    image = bench.folder / f"source.{stage['format']}"
    run("qemu-img", "convert", "-f", "raw", "-O", stage["format"], str(bench.disk), str(image))
    return {"url": f"file://{image}"}


def _to_nbd(bench: Bench, stage: Stage) -> Overrides:
    return {"url": bench.stack.enter_context(NbdServer("nbdkit", "memory", "64M")).url(), "overwrite": "false"}


def _to_device(bench: Bench, stage: Stage) -> Overrides:
    blank = bench.folder / "blank"
    with blank.open("wb") as file:
        file.truncate(64 * MiB)
    return {"path": str(bench.stack.enter_context(loop_device(blank, read_only=False)))}


# What to change in a stage so that it runs here; a stage that is not named runs as it is written.
PLACES: dict[str, Callable[[Bench, Stage], Overrides]] = {
    "read.disk": lambda bench, _: {"path": str(bench.disk)},
    "read.image": _from_image,
    "write.file": _to_file,
    "write.s3": _to_s3,
    "write.sftp": _to_sftp,
    "write.http": _to_web,
    "write.nbd": _to_nbd,
    "write.device": _to_device,
    # The disk is of letters: there is nothing on it to check or to boot. tests/prove does both.
    "verify.prove": lambda bench, _: {"skip": '["filesystems", "preflight", "boot"]'},
    "write.azure_block": _to_azure,
    "write.azure_page": _to_azure,
    "write.gcs": _to_gcs,
    "write.pipe": lambda bench, _: {"command": f'["dd", "of={bench.folder / "image"}", "status=none"]'},
}


# What the configs take from the environment.
SECRETS = {"WEBDAV_PASSWORD": PASSWORD}


def stages_of(config: Path) -> list[dict[str, str]]:
    stages: list[dict[str, str]] = tomllib.loads(config.read_text())["stage"]
    return stages


def overrides(config: Path, bench: Bench) -> list[str]:
    """The --set arguments that put a config on the bench."""
    changes = {"export.manifest": str(bench.folder / "local.manifest.json")}
    for stage in stages_of(config):
        place = PLACES.get(stage["use"])
        if place is not None:
            changes |= {f"{stage['use']}.{name}": value for name, value in place(bench, stage).items()}
    return [word for name, value in changes.items() for word in ("--set", f"{name}={value}")]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small disk; large enough for more than one request."""
    return write_disk(tmp_path_factory.mktemp("configs") / "disk.raw", "ABCD0--EFGH00-IJKLMN---")


def test_there_are_configs() -> None:
    assert {"demo", "file-qcow2", "file-raw", "s3-qcow2", "s3-raw"} <= {config.stem for config in CONFIGS}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_config_is_right_as_it_stands(config: Path) -> None:
    said = call("check", config, env=SECRETS)
    assert said.code == 0, said.err
    assert " -> ".join(stage["use"] for stage in stages_of(config)) in said.out


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_config_explains_itself(config: Path) -> None:
    # The first line may be for editors: where the schema is.
    lines = [line for line in config.read_text().splitlines() if not line.startswith("#:schema ")]
    assert lines[0].startswith("# ")
    assert max(len(line) for line in lines) <= 140


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_config_exports_a_disk(
    config: Path,
    seaweedfs: S3Server,
    sftp_server: SftpServer,
    web_server: WebServer,
    azure_server: AzureServer,
    tmp_path: Path,
    disk: Path,
) -> None:
    bucket = seaweedfs.new_bucket()
    azure_server.create_container(bucket)
    google = {
        "GS_ACCESS_KEY_ID": seaweedfs.credentials.access_key,
        "GS_SECRET_ACCESS_KEY": seaweedfs.credentials.secret_key,
    }
    env = {**seaweedfs.environment(), **azure_server.environment(), **google, **SECRETS}
    with ExitStack() as stack:
        bench = Bench(tmp_path, disk, seaweedfs, bucket, sftp_server, web_server, azure_server, stack)
        said = call("run", config, "--json", *overrides(config, bench), env=env)
    assert said.code == 0, said.err
    finished = said.last("run_finished")
    assert finished["disk_bytes"] == disk.stat().st_size
    names = [stage["use"] for stage in stages_of(config)]
    assert finished["verified"] == ("identical" if "verify.readback" in names else finished["verified"])
    if "write.null" not in names:
        manifest = Manifest.from_json((tmp_path / "local.manifest.json").read_bytes(), where="the local copy")
        assert manifest.disk.size == disk.stat().st_size
    seaweedfs.delete_bucket(bench.bucket)
