"""Remedies do what they say: run on the tree that a rule complained about, they end the complaint."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from stages.disk.live import LiveView
from tests.disk.making import needs_root
from tests.preflight.disks import findings_of, subject_of, target_of
from tests.preflight.images import write_tree
from tests.preflight.systems import rhel_files
from tests.preflight.test_rules import CASES, LVM, Case, named
from tests.preflight.trees import Made

# Programs that change nothing but the files that they are given. Others (package managers, grub) are not run here.
_HARMLESS = ("sed", "rm", "chmod", "chown", "truncate", "echo", "mv", "printf", "chattr")
# Whose file is written anew by another program (update-grub), or whose complaint has a second half.
_ELSEWHERE = re.compile(
    r"/etc/default/grub|update-|dracut|grub|systemctl|cloud-init clean|depmod|pwconv|nmcli|initramfs-tools/modules"
)


_WITH_COMMANDS = (
    *("boot.resume", "fs.crypttab", "fs.lvm", "fs.fstab", "fs.shadow", "fs.critical", "drv.virtio.blacklist"),
    *("agent.cloudinit.enabled", "agent.cloudinit.datasource", "agent.cloudinit.state"),
    *("sw.virtualbox", "hw.video", "hw.diskname", "hw.nic"),
)


def first_part(command: str) -> str:
    """The command without what makes menus and initramfs again."""
    return command.removeprefix("mkdir -p /etc/cloud/cloud.cfg.d && ").split(" && ")[0]


def below(command: str, tree: Path) -> str:
    """The command with every absolute path below the tree."""
    return re.sub(r"(?<![\w#:=/.])/(etc|usr|var|boot|lib)/", rf"{tree}/\1/", command)


RUNNABLE = [
    case
    for case in CASES
    if case.status == "fail"
    and case.id.startswith(_WITH_COMMANDS)
    and case.files
    # Frozen files can't be written by a test that does not freeze them.
    and not any(isinstance(one, Made) and one.immutable for one in case.files.values())
]


@needs_root
@pytest.mark.parametrize("case", RUNNABLE, ids=named)
async def test_a_remedy_ends_what_was_complained_of(case: Case, tmp_path: Path) -> None:
    tree = write_tree({**case.system(), **case.files}, tmp_path / "tree")
    for path, content in case.files.items():
        if content is None:
            shutil.rmtree(tree / path.lstrip("/"), ignore_errors=True)
            (tree / path.lstrip("/")).unlink(missing_ok=True)
    disk: dict[str, Any] = (LVM if case.system is rhel_files else {}) | case.disk
    subject = await subject_of(LiveView(tree), **disk)
    findings = await findings_of(subject, target_of(subject, case.profile, **case.target), case.id)
    found = next((one for one in findings if one.status == "fail" and case.said in one.message), None)
    if found is None or not found.is_command:
        pytest.skip("no command, or it takes more than files to complain of it")
    command = first_part(found.remedy)
    if not command.startswith(_HARMLESS) or _ELSEWHERE.search(command):
        pytest.skip("it needs programs of the system itself")
    done = subprocess.run(["sh", "-c", below(command, tree)], capture_output=True, text=True)
    assert done.returncode == 0, (command, done.stderr)
    subject = await subject_of(LiveView(tree), **disk)
    after = await findings_of(subject, target_of(subject, case.profile, **case.target), case.id)
    same = [
        one for one in after if one.status == "fail" and one.message == found.message and one.severity == found.severity
    ]
    assert not same, (command, same)
