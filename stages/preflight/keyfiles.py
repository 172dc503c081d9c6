"""Rules about the files that the cloud changes at first boot: readable, writable, with the right owner and mode."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from dataclasses import dataclass

from stages.disk.tree import Kind, Node
from stages.preflight.findings import Evidence, Outcome, Severity, failed, passed, to_read_it, unknown
from stages.preflight.rules import Rule, Target
from stages.preflight.subject import Subject
from stages.preflight.texts import read_text

_SHADOW = "/etc/shadow"
# What distributions give it: 0640 root:shadow (Debian, SUSE, Alpine), 0000 (RHEL), 0600 (Arch), 0400.
_SHADOW_MODES = (0o000, 0o400, 0o600, 0o640)


@dataclass(frozen=True, slots=True)
class _KeyFile:
    path: str
    modes: tuple[int, ...]
    must_exist: bool = False


# Source: the packages base-passwd, shadow, setup (RHEL), filesystem (Arch), baselayout (Alpine), sudo.
_KEY_FILES = (
    _KeyFile("/etc/passwd", (0o644, 0o444), must_exist=True),
    _KeyFile("/etc/group", (0o644, 0o444), must_exist=True),
    _KeyFile("/etc/gshadow", (0o000, 0o400, 0o600, 0o640)),
    _KeyFile("/etc/sudoers", (0o440, 0o400, 0o640, 0o600)),
    _KeyFile("/etc/fstab", (0o644, 0o640, 0o600, 0o664, 0o444)),
    _KeyFile("/etc/issue", (0o644, 0o444)),
    _KeyFile("/boot/grub/grub.cfg", (0o400, 0o444, 0o600, 0o644, 0o700)),
    _KeyFile("/boot/grub2/grub.cfg", (0o400, 0o444, 0o600, 0o644, 0o700)),
)


async def check_shadow(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether the cloud can set a password."""
    where = Evidence(_SHADOW)
    group = "shadow" if subject.distribution.family in ("debian", "suse", "alpine", "other") else "root"
    mode = "640" if group == "shadow" else "000" if subject.distribution.family == "rhel" else "600"
    mend = f"chattr -i -a {_SHADOW}; chown root:{group} {_SHADOW}; chmod {mode} {_SHADOW}"
    try:
        node = await subject.view.stat(_SHADOW)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise
        yield failed("block", "/etc/shadow is missing: no password can be set", where, command="pwconv")
        return
    if node.kind is not Kind.FILE:
        yield failed("block", f"/etc/shadow is a {node.kind.value}, not a file", where, remedy="Restore it.")
        return
    flags = _flags(node)
    if flags:
        yield failed("block", f"/etc/shadow is {flags}; the cloud cannot set a password", where, command=mend)
    if node.uid != 0:
        yield failed("block", f"/etc/shadow belongs to user {node.uid}, not to root", where, command=mend)
    if node.mode & 0o007:
        yield failed("warn", f"/etc/shadow can be read by everybody (mode {node.mode:04o})", where, command=mend)
    elif node.mode not in _SHADOW_MODES:
        yield failed("warn", f"/etc/shadow has the odd mode {node.mode:04o}", where, command=mend)
    if node.immutable is None:
        yield unknown("whether /etc/shadow is immutable can't be told", where)
    text = await read_text(subject.view, _SHADOW)
    if text.problem:
        yield unknown(f"/etc/shadow can't be read: {text.problem}", where, remedy=to_read_it())
    elif not any(line.startswith("root:") for line in text.lines):
        yield failed("block", "/etc/shadow has no line for root", where, command="pwconv")
    else:
        number = next(at for at, line in enumerate(text.lines, 1) if line.startswith("root:"))
        yield passed("/etc/shadow is a file of root's that can be changed", text.at(number))
    if subject.live is not None:
        mount = next((one for one in subject.live.mounts if one.point == "/"), None)
        if mount is not None and not mount.writable:
            yield failed(
                "warn", "/ is mounted read-only", Evidence("/proc/self/mountinfo"), command="mount -o remount,rw /"
            )


async def check_critical(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether the other key files are as distributions ship them."""
    looked = 0
    for one in _KEY_FILES:
        where = Evidence(one.path)
        try:
            node = await subject.view.stat(one.path)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                raise
            if one.must_exist:
                yield failed("warn", f"{one.path} is missing", where, remedy="Restore it from a backup.")
            continue
        looked += 1
        severity: Severity = "warn"
        if node.kind is not Kind.FILE:
            yield failed(severity, f"{one.path} is a {node.kind.value}, not a file", where, remedy="Restore it.")
            continue
        if flags := _flags(node):
            yield failed(
                severity,
                f"{one.path} is {flags}: the cloud cannot change it",
                where,
                command=f"chattr -i -a {one.path}",
            )
        if node.uid != 0:
            yield failed(
                severity, f"{one.path} belongs to user {node.uid}, not to root", where, command=f"chown root {one.path}"
            )
        if node.mode & 0o022 or (node.mode & 0o777) not in one.modes:
            yield failed(
                severity,
                f"{one.path} has the mode {node.mode:04o}",
                where,
                command=f"chmod {one.modes[0]:04o} {one.path}",
            )
        if one.path in ("/etc/passwd",) and not node.size:
            yield failed("block", f"{one.path} is empty", where, remedy="Restore it from a backup.")
    release = subject.distribution
    if not release.id or not (release.file.endswith("/os-release") or release.predates_os_release):
        yield failed(
            "warn",
            "/etc/os-release does not say which distribution it is",
            Evidence("/etc/os-release"),
            remedy="Some importers name the system by it; restore it from the package that owns it.",
        )
    yield passed(f"{looked} key files were looked at")


def _flags(node: Node) -> str:
    return " and ".join([*(["immutable"] if node.immutable else []), *(["append-only"] if node.append_only else [])])


RULES = (
    Rule(
        id="fs.shadow",
        title="the cloud can set a password",
        why=(
            "At first boot the cloud writes root's password into /etc/shadow. A file that `chattr +i` has frozen, that "
            "belongs to somebody else or is missing makes that fail. The guide: it can be read and written with normal "
            "permissions."
        ),
        check=check_shadow,
    ),
    Rule(
        id="fs.critical",
        title="the other key files are as distributions ship them",
        why=(
            "passwd, group, sudoers, fstab and the boot menu are changed at first boot or decide whether anybody can "
            "log in; /etc/issue and os-release are what some importers know the system by."
        ),
        check=check_critical,
    ),
)
