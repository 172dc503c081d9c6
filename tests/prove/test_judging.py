"""What is told from a console, a screen and the steps' results: without starting anything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from signal import SIGKILL
from xml.etree import ElementTree

import pytest

from stages.preflight.rules import all_rules
from stages.prove import boot
from stages.prove.judging import LOGIN, NO_BOOT_CODE, SYMPTOMS, find_symptom, plain
from stages.prove.leash import leashed
from stages.prove.proving import ProofReport, parse_steps
from stages.prove.report import junit, lines_of, page
from stages.prove.scratch import scratch_folder
from stages.prove.screen import is_blank, is_text_mode, png_of, text_of
from stages.prove.steps import STEPS, State, StepName, StepResult, conclude

CONSOLES = {
    "Gave up waiting for root file system device.": "initramfs did not find",
    "ALERT!  UUID=1-2 does not exist.  Dropping to a shell!\n(initramfs) ": "initramfs did not find",
    "[  120.1] dracut-initqueue[300]: Warning: dracut-initqueue timeout - starting timeout scripts": "dracut waited",
    "Warning: /dev/disk/by-uuid/ab does not exist\nEntering emergency mode.": "dracut waited",
    "[DEPEND] Dependency failed for Local File Systems.\nYou are in emergency mode.": "fstab is not there",
    "You are in rescue mode. After logging in": "emergency mode",
    "Cannot open access to console, the root account is locked.": "emergency mode",
    "[  2.1] VFS: Cannot open root device \"sda1\" or unknown-block(0,0): error -6\n"
    "[  2.2] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)": "could not mount its",
    "Kernel panic - not syncing: No working init found.": "no usable init",
    "Kernel panic - not syncing: Fatal exception": "panicked",
    "error: unknown filesystem.\nEntering rescue mode...\ngrub rescue> ": "GRUB did not find",
    "Booting from Hard Disk...\nBoot failed: not a bootable disk\n\nNo bootable device.": "nothing to boot",
    "Loading /boot/vmlinuz... failed: No such file or directory\nboot: ": "could not load the kernel",
    "BdsDxe: No bootable option or device was found.": "nothing to boot",
}  # fmt: skip


@pytest.mark.parametrize("said", CONSOLES, ids=range(len(CONSOLES)))
def test_a_guest_that_failed_is_told_by_what_it_said(said: str) -> None:
    found = find_symptom(plain(said.replace("\n", "\r\n")))
    assert found is not None
    assert CONSOLES[said] in found[0].reason
    assert found[1] in said


@pytest.mark.parametrize(
    "said",
    [
        "Debian GNU/Linux 12 web01 ttyS0\n\nweb01 login: ",
        "[ TIME ] Timed out waiting for device dev-sdb.device.\nweb01 login:",  # nofail
        "error: no such device: 1234.\nGRUB loading",  # it goes on after a search that found nothing
        "Starting emergency-updates.service - what is an emergency?",
        'BdsDxe: failed to load Boot0001 "UEFI PXEv4": Not Found',
        "",
    ],
)
def test_a_guest_that_did_not_fail_is_not_blamed(said: str) -> None:
    assert find_symptom(said) is None


@pytest.mark.parametrize("said", ["\n", "\x1b]", "dracut-initqueue: Warning: ", "Dependency failed for ", "ALERT! "])
def test_a_guest_that_says_the_same_for_ever_is_judged_in_no_time(said: str) -> None:
    """All of the log is judged, again and again: what a guest writes must not make that slow."""
    log = said * (400_000 // len(said))
    begun = time.process_time()
    assert find_symptom(plain(log)) is None
    assert time.process_time() - begun < 2, "a tenth of a second, usually"


def test_every_rule_that_is_named_is_one() -> None:
    named = {id for one in (*SYMPTOMS, NO_BOOT_CODE) for id in one.rule.split(", ") if id}
    assert named <= {rule.id for rule in all_rules()}


def test_login_prompt_is_not_the_greeting_of_the_last_one() -> None:
    assert LOGIN.search("web01 login: ")
    assert not LOGIN.search("Last login: Mon Nov 23")
    assert plain("\x1b[2J\x1b[01;01H\x1b[=3hweb01 \x1b[1mlogin\x1b[0m: \x07") == "web01 login: "


def _ppm(width: int, height: int, pixels: bytes | None = None) -> bytes:
    return b"P6\n%d %d\n255\n" % (width, height) + (bytes(3 * width * height) if pixels is None else pixels)


def test_a_screen_becomes_a_picture_that_others_can_open(tmp_path: Path) -> None:
    pixels = os.urandom(3 * 40 * 30)
    png = png_of(_ppm(40, 30, pixels))
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    data = zlib.decompress(png[png.index(b"IDAT") + 4 : png.index(b"IEND") - 8])
    assert b"".join(data[row * 121 + 1 : (row + 1) * 121] for row in range(30)) == pixels


@pytest.mark.parametrize(
    "dump", [b"", b"P5\n1 1\n255\n\0", _ppm(40, 30, b"x"), _ppm(10**5, 10**5, b""), b"P6\n0 0\n255\n"]
)
def test_what_is_no_screen_is_no_picture(dump: bytes) -> None:
    assert png_of(dump) == b""


def test_text_mode_is_read_by_its_letters() -> None:
    letters = "No bootable device.".ljust(80) + "grub rescue>".ljust(80)
    cells = [f"0x07{ord(char):02x}" for char in letters.ljust(2000)]
    dump = "\r\n".join(f"{0xB8000 + 16 * row:016x}: {' '.join(cells[8 * row : 8 * row + 8])}" for row in range(250))
    assert text_of(dump) == "No bootable device.\ngrub rescue>"
    assert is_text_mode(_ppm(720, 400))
    assert not is_text_mode(_ppm(1024, 768))
    assert is_blank(_ppm(720, 400))
    assert not is_blank(_ppm(2, 1, b"abcdef"))


def test_a_still_screen_without_a_console_is_no_verdict_and_says_so() -> None:
    seen = boot._Seen(picture=_ppm(2, 1, b"abcdef"), changed_at=100.0)
    state, summary, hint, _ = boot._late(seen, boot.Machine(), 130.0)
    assert state == "unknown"
    assert "judged by its screen alone" in summary
    assert "screenshot" in hint
    seen.hear("[    0.1] Linux version 6\n")
    assert "its last words were" in boot._late(seen, boot.Machine(), 130.0)[1]


def test_the_log_of_a_guest_that_never_stops_is_bounded() -> None:
    seen = boot._Seen()
    for number in range(3000):
        seen.hear(f"{number} " * 200)
    assert len(seen.log) < 512 * 1024
    assert seen.log.startswith("0 0 ")
    assert seen.log.endswith("2999 ")


def test_a_screenshot_is_a_file_and_nothing_else(tmp_path: Path) -> None:
    """The folder is QEMU's, and QEMU runs a stranger's system: no link, nothing that keeps a reader waiting."""
    (tmp_path / "secret").write_bytes(_ppm(1, 1))
    (tmp_path / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(tmp_path / "fifo")
    assert boot._read_picture(tmp_path / "secret") == _ppm(1, 1)
    for name in ("link", "fifo", "nosuch"):
        assert boot._read_picture(tmp_path / name) == b""


# ---- the verdict -----------------------------------------------------------------------------------------------------


def _results(**states: State) -> list[StepResult]:
    return [StepResult(name=name, state=states.get(name, "skipped"), summary=name) for name in STEPS]


@pytest.mark.parametrize(
    "states, decides, verdict",
    [
        ({"digest": "passed", "structure": "passed", "filesystems": "passed", "boot": "passed"}, False, "proven"),
        ({"digest": "passed", "boot": "failed"}, False, "disproven"),
        ({"digest": "unknown", "boot": "failed"}, False, "disproven"),
        ({"digest": "unknown", "boot": "passed"}, False, "unknown"),
        ({}, False, "unknown"),
        ({"structure": "passed", "preflight": "failed"}, True, "disproven"),
        ({"structure": "passed", "preflight": "failed"}, False, "proven"),
        ({"boot": "passed", "preflight": "failed"}, True, "proven"),
        ({"boot": "unknown", "preflight": "failed"}, True, "disproven"),
        ({"preflight": "informs"}, False, "unknown"),
    ],
)
def test_verdict_of_all_steps(states: dict[str, State], decides: bool, verdict: str) -> None:
    assert conclude(_results(**states), preflight_decides=decides) == verdict


def test_steps_are_named_or_refused() -> None:
    assert parse_steps(["digest,boot", "preflight"]) == {"digest", "boot", "preflight"}
    assert parse_steps([]) == frozenset()
    with pytest.raises(ValueError, match="is no step; there are digest"):
        parse_steps(["boots"])


# ---- reports ---------------------------------------------------------------------------------------------------------

HOSTILE = "</pre><script>alert(1)</script> & \x1b[31m \x00 \ufffe ]]>"


def _report(place: str = "s3://u:secret@b/x.qcow2") -> ProofReport:
    names: tuple[StepName, ...] = STEPS
    states: tuple[State, ...] = ("passed", "unknown", "failed", "informs", "skipped")
    steps = tuple(
        StepResult(
            name=name, state=state, summary=HOSTILE, details=(HOSTILE,), hint=HOSTILE, log=HOSTILE, screen=b"png"
        )
        for name, state in zip(names, states, strict=True)
    )
    return ProofReport(
        place=place, format="qcow2", size=1 << 30, verdict="disproven", steps=steps, read_bytes=5, file_bytes=100,
        elapsed_s=61.0,
    )  # fmt: skip


def test_page_escapes_all_that_a_guest_said_and_loads_nothing() -> None:
    made = page(_report())
    assert "<script" not in made
    assert "secret" not in made
    assert not re.findall(r"(?:src|href)=\"(?!data:)", made)
    assert "default-src 'none'" in made
    assert made.count("data:image/png;base64,") == 5


def test_junit_is_what_ci_reads() -> None:
    suite = ElementTree.fromstring(junit(_report()).encode())
    assert {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")} == {
        "tests": "5", "failures": "1", "errors": "1", "skipped": "1",
    }  # fmt: skip
    cases = {case.get("name"): [child.tag for child in case] for case in suite}
    assert cases["digest"] == ["system-out"]
    assert cases["structure"] == ["error", "system-out"]
    assert cases["filesystems"] == ["failure", "system-out"]
    assert cases["boot"] == ["skipped", "system-out"]
    assert "secret" not in junit(_report())


def test_terminal_gets_no_control_characters() -> None:
    for step in _report().steps:
        assert all(line.isprintable() for line in lines_of(step))


# ---- the leash -------------------------------------------------------------------------------------------------------


def test_a_program_on_the_leash_ends_with_its_parent(tmp_path: Path) -> None:
    """Also when the parent is killed in a way that nobody can catch."""
    code = (
        "import subprocess, sys, time, signal\n"
        "from stages.prove.leash import leashed\n"
        "process = subprocess.Popen(leashed(['sleep', '1000'], signal=signal.SIGKILL))\n"
        "print(process.pid, flush=True)\n"
        "time.sleep(1000)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    watched = os.pidfd_open(child)
    while Path(f"/proc/{child}/comm").read_text().strip() != "sleep":
        pass
    os.kill(parent.pid, SIGKILL)
    parent.wait()
    parent.stdout.close()
    import select

    assert select.select([watched], [], [], 10)[0], "it ended"
    os.close(watched)


def test_a_program_on_the_leash_has_its_limits() -> None:
    script = "ulimit -v; ulimit -t; ulimit -f; ulimit -c; id -u; grep NoNewPrivs /proc/self/status"
    user = 65534 if os.geteuid() == 0 else 0
    words = leashed(["sh", "-c", script], signal=SIGKILL, user=user, memory=1 << 30, cpu_s=7, file_size=1 << 20)
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    lines = done.stdout.split()
    assert lines[:4] == [str(1 << 20), "7", str((1 << 20) // 512), "0"]
    if os.geteuid() == 0:
        assert lines[4:] == ["65534", "NoNewPrivs:", "1"]


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / f"pipeline-prove-{dead.pid}-abc").mkdir()
    (tmp_path / f"pipeline-prove-{dead.pid}-abc" / "screen.ppm").touch()
    (tmp_path / f"pipeline-prove-{os.getppid()}-abc").mkdir()
    with scratch_folder() as folder:
        assert folder.stat().st_mode & 0o077 == 0
        assert sorted(tmp_path.iterdir()) == sorted([folder, tmp_path / f"pipeline-prove-{os.getppid()}-abc"])
    assert not folder.exists()
