"""write.pipe: a command or stdout takes the image; what goes wrong there fails the run."""

from __future__ import annotations

import json
import os
import pty
import shlex
import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from pipeline.errors import ConfigError, PlanError, StageError, StoreError
from pipeline.events import Event, UploadOpened, UploadRemoved
from pipeline.flow.channels import Outlet
from pipeline.flow.items import Piece, StoredImage
from pipeline.units import MiB
from stages.write.pipe import SPEC, Options, PipeWriter
from tests.chains import export, write_toml
from tests.disks.letters import write_disk
from tests.verify.context import make_context

RUN = (sys.executable, "-m", "pipeline", "run")
TREE = Path(__file__).parents[2]


def chain(folder: Path, *command: str, letters: str = "AB0-A" + "-" * 9 + "C0", more: tuple[str, ...] = ()) -> Path:
    """A raw disk into a command, or into stdout without one."""
    disk = write_disk(folder / "disk.raw", letters)
    stages = [f'read.disk; path = "{disk}"', "checksum.guest", "sparse.zeros", "encode.raw", *more]
    sink = f"write.pipe; command = {json.dumps(list(command))}" if command else "write.pipe"
    return write_toml(folder / "export.toml", *stages, sink)


def script(folder: Path, text: str) -> tuple[str, ...]:
    """A command that runs a shell script."""
    file = folder / "command.sh"
    file.write_text(text)
    return ("sh", str(file))


async def test_command_gets_the_image_and_the_manifest_stays_here(tmp_path: Path) -> None:
    outcome = await export(chain(tmp_path, *script(tmp_path, f"exec cat > {tmp_path}/image")))
    assert (tmp_path / "image").read_bytes() == (tmp_path / "disk.raw").read_bytes()
    assert outcome.state == "stored"
    assert outcome.manifest_uri == ""
    assert outcome.manifest_path == tmp_path / "test.manifest.json"


async def test_compressed_image_goes_through_a_pipe(tmp_path: Path) -> None:
    command = script(tmp_path, f"zstd -dc > {tmp_path}/image")
    await export(chain(tmp_path, *command, more=("compress.zstd",)))
    assert (tmp_path / "image").read_bytes() == (tmp_path / "disk.raw").read_bytes()


async def test_command_that_fails_at_the_end_fails_the_run_and_is_quoted(tmp_path: Path) -> None:
    command = script(tmp_path, "cat > /dev/null\necho the disk over there >&2\necho is full >&2\nexit 7")
    with pytest.raises(StoreError, match="the command failed, with exit status 7: is full") as caught:
        await export(chain(tmp_path, *command))
    assert "the disk over there" in caught.value.hint


@pytest.mark.parametrize("code", [0, 3])
async def test_command_that_exits_early_fails_the_run_whatever_its_exit_status(tmp_path: Path, code: int) -> None:
    command = script(tmp_path, f"head -c 3000000 > /dev/null\nexit {code}")
    with pytest.raises(StoreError, match=f"ended before it had all of the image, with exit status {code}"):
        await export(chain(tmp_path, *command, letters="ABCDEFGHIJ" * 3))


async def test_command_that_takes_nothing_of_an_image_that_fits_the_pipe_fails_the_run(tmp_path: Path) -> None:
    disk = write_disk(tmp_path / "disk.raw", "A", block=4096)
    toml = write_toml(
        tmp_path / "export.toml", f'read.disk; path = "{disk}"', "encode.raw", 'write.pipe; command = ["true"]'
    )
    with pytest.raises(StoreError, match=r"ended before it had all|were not taken"):
        await export(toml)


async def test_command_killed_by_a_signal_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="signal SIGKILL"):
        await export(chain(tmp_path, *script(tmp_path, "head -c 100 >/dev/null\nkill -9 $$"), letters="ABC" * 6))


async def test_program_that_is_not_there_is_refused_in_planning(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="there is no program no-such-program"):
        await export(chain(tmp_path, "no-such-program"))


@pytest.mark.parametrize("stubborn", [False, True])
async def test_cancelled_run_ends_the_command_and_what_it_started_without_an_end_of_input(
    tmp_path: Path, stubborn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.write.pipe._END_S", 0.3)
    ignoring = 'trap "" TERM\n' if stubborn else ""
    text = f"{ignoring}head -c 100000 > begun\necho $$ > pid\n(sleep 1000; echo)\ntouch end"
    text = f"cd {tmp_path}\n{text}"
    toml = chain(tmp_path, *script(tmp_path, text), letters="ABC" * 9)
    events: list[Event] = []
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: export(toml, events=events))
            while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
                await anyio.sleep(0.005)
            tasks.cancel_scope.cancel()
    assert [type(one) for one in events if isinstance(one, (UploadOpened, UploadRemoved))] == [
        UploadOpened,
        UploadRemoved,
    ]
    assert not (tmp_path / "end").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


async def test_image_that_lacks_guest_bytes_gets_no_end(tmp_path: Path) -> None:
    options = Options(command=script(tmp_path, f"cat > {tmp_path}/image && touch {tmp_path}/end"))
    writer = PipeWriter(options, make_context(SPEC.name, disk_size=2 * MiB))

    class Short:
        async def __aiter__(self):  # type: ignore[no-untyped-def]
            yield Piece(0, MiB, b"x" * MiB, MiB)

    class Nowhere:
        async def send(self, item: StoredImage) -> None:
            raise AssertionError("it was sealed")

    nowhere: Outlet[StoredImage] = Nowhere()
    with pytest.raises(StageError, match="1048576 of 2097152 guest bytes"):
        await writer.run(Short(), nowhere)
    await writer.close()
    assert not (tmp_path / "end").exists()


def test_stdout_carries_the_image_and_nothing_else(tmp_path: Path) -> None:
    done = subprocess.run([*RUN, chain(tmp_path)], capture_output=True, check=True, cwd=TREE)
    assert done.stdout == (tmp_path / "disk.raw").read_bytes()
    assert b"stored, not verified" in done.stderr


def test_stdout_into_a_file_works_and_appends_where_the_shell_says(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"before")
    with open(image, "ab") as file:
        subprocess.run([*RUN, chain(tmp_path), "--quiet"], stdout=file, stderr=subprocess.DEVNULL, check=True, cwd=TREE)
    assert image.read_bytes() == b"before" + (tmp_path / "disk.raw").read_bytes()


async def test_image_goes_no_faster_than_it_may(tmp_path: Path) -> None:
    """Data and zeros alike: 1 MiB of the 16 go at once, the rest at 8 MiB a second."""
    toml = chain(tmp_path, "sh", "-c", f"cat > {tmp_path / 'out.raw'}", letters="AB" + "-" * 14)
    toml.write_text(toml.read_text().replace('use = "write.pipe"', 'use = "write.pipe"\nrate_limit = "8 MiB"'))
    begun = anyio.current_time()
    await export(toml)
    size = (tmp_path / "disk.raw").stat().st_size
    assert anyio.current_time() - begun > (size - 2 * MiB) / (8 * MiB)
    assert (tmp_path / "out.raw").read_bytes() == (tmp_path / "disk.raw").read_bytes()


@pytest.mark.parametrize("operator", [">>", "1<>"])
def test_stdout_that_is_the_source_is_refused(tmp_path: Path, operator: str) -> None:
    toml = chain(tmp_path)
    disk = tmp_path / "disk.raw"
    before = disk.read_bytes()
    line = f"{shlex.join([*RUN, str(toml)])} {operator} {shlex.quote(str(disk))}"
    done = subprocess.run(["sh", "-c", line], cwd=TREE, capture_output=True, text=True, check=False)
    assert (done.returncode, disk.read_bytes()) == (2, before)
    assert "stdout is the source" in done.stderr


def test_reader_of_stdout_that_goes_away_fails_the_run(tmp_path: Path) -> None:
    toml = chain(tmp_path, letters="ABCDEFGH" * 4)
    command = f"{' '.join(RUN)} {toml} --quiet | head -c 1000 > /dev/null; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, cwd=TREE)
    assert done.returncode == 1
    assert "nobody reads it any more" in done.stderr


def test_json_and_the_image_together_are_refused(tmp_path: Path) -> None:
    done = subprocess.run([*RUN, chain(tmp_path), "--json"], capture_output=True, text=True, check=False, cwd=TREE)
    assert done.returncode == 2
    assert "--json writes to stdout" in done.stderr


def test_terminal_as_stdout_is_refused(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [*RUN, chain(tmp_path), "--quiet"], stdout=theirs, stderr=subprocess.PIPE, text=True, check=False, cwd=TREE
    )
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 2
    assert "stdout is a terminal" in done.stderr


@pytest.mark.parametrize("also", ["", "<&-"])
def test_closed_stdout_is_refused_whoever_has_its_number_by_now(tmp_path: Path, also: str) -> None:
    command = f"{shlex.join([*RUN, str(chain(tmp_path))])} >&- {also}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, cwd=TREE)
    assert done.returncode == 2
    assert "stdout is closed, and the image is to go there" in done.stderr


@pytest.mark.parametrize("verifier", ["verify.readback", "verify.sample", "verify.receipt"])
async def test_verification_of_what_went_through_a_pipe_is_refused(tmp_path: Path, verifier: str) -> None:
    toml = chain(tmp_path, "cat")
    toml.write_text(toml.read_text() + f'[[stage]]\nuse = "{verifier}"\n')
    with pytest.raises(ConfigError, match=r"and write\.pipe before it gives nothing"):
        await export(toml)


def test_empty_command_is_refused() -> None:
    with pytest.raises(ValueError, match="must name a program"):
        Options(command=())
