"""Rules about /etc/fstab: what it mounts must be in the image, by a name that travels, and not behind a network."""

from __future__ import annotations

from collections.abc import AsyncIterator

from stages.preflight.findings import Evidence, Outcome, failed, passed, plain, unknown
from stages.preflight.rules import Rule, Target
from stages.preflight.subject import FstabEntry, Subject, rooted

_BOOT_POINTS = ("/", "/boot", "/boot/efi", "/usr")


def _unread(subject: Subject) -> Outcome | None:
    text = subject.fstab.text
    if text.problem:
        return unknown(f"/etc/fstab can't be read: {text.problem}", Evidence(text.path))
    return None


def _edit(entry: FstabEntry, *, options: str) -> str:
    """The command that adds mount options to one line."""
    fields = r"\(\s*\S\+\s\+\S\+\s\+\S\+\s\+\S\+\)"
    return f"sed -i '{entry.line}s#^{fields}#\\1,{options}#' /etc/fstab"


def _dropped(entry: FstabEntry, target: Target) -> bool:
    volume = entry.meaning.volume
    return (
        volume is not None
        and volume.number is not None
        and target.kept is not None
        and volume.number not in target.kept
    )


async def check_foreign(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether everything that is mounted at boot is in the image."""
    if unread := _unread(subject):
        yield unread
        return
    here = 0
    for entry in rooted(subject.fstab.entries):
        where = subject.fstab.text.at(entry.line)
        what = "swap" if entry.is_swap else entry.point
        meaning = entry.meaning
        if meaning.volume is not None and not _dropped(entry, target):
            here += 1
            continue
        if entry.spec.startswith("/") and not entry.spec.startswith("/dev/"):
            continue  # a file of a filesystem that has its own line
        lives = ""
        if subject.live is not None and (disk := subject.live.elsewhere.get(entry.spec)):
            lives = f" (it is on {disk})"
        if _dropped(entry, target):
            assert meaning.volume is not None
            lives = f" ({meaning.volume.name} is not exported)"
        if meaning.volume is None and subject.table is None and not lives:
            yield unknown(f"{entry.spec} on {what} could not be looked up: {subject.table_problem}", where)
        elif meaning.volume is None and not meaning.is_certain and not lives:
            inside = ", ".join(subject.volumes.opaque)
            yield unknown(f"{entry.spec} on {what} was not found; it may be inside of {inside}", where)
        elif entry.may_be_missing:
            yield failed(
                "info",
                f"{entry.spec} on {what} is not in the image{lives}; the boot goes on without it",
                where,
                remedy="Export its disk too where it is needed there; else remove the line.",
            )
        elif entry.is_swap:
            yield failed(
                "warn",
                f"the swap space {entry.spec} is not in the image{lives}: the boot waits for it, then goes on",
                where,
                command=f"sed -i '{entry.line}s/^/# /' /etc/fstab",
            )
        else:
            yield failed(
                "block",
                f"{entry.spec} on {what} is not in the image{lives}; the boot stops in emergency mode",
                where,
                command=_edit(entry, options="nofail,x-systemd.device-timeout=5s"),
            )
    if not subject.fstab.text.exists:
        yield passed("there is no /etc/fstab")
    elif here:
        yield passed(f"{here} entries of /etc/fstab are in the image", Evidence(subject.fstab.text.path))


async def check_names(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether filesystems are named by what travels with them."""
    if unread := _unread(subject):
        yield unread
        return
    bad = 0
    for entry in rooted(subject.fstab.entries):
        naming = entry.meaning.naming
        if naming not in ("device", "path") or (entry.meaning.volume is None and naming == "device"):
            continue  # what is not on this disk has a rule of its own
        bad += 1
        where = subject.fstab.text.at(entry.line)
        volume = entry.meaning.volume
        spec = volume.best_spec if volume is not None else ""
        what = "swap" if entry.is_swap else entry.point
        command = f"sed -i '{entry.line}s#^\\s*{plain(entry.spec)}#{plain(spec)}#' /etc/fstab" if spec else ""
        yield failed(
            "block" if entry.point in _BOOT_POINTS[:2] and target.profile.renames_disks else "warn",
            f"{entry.spec} on {what} names a device that is called differently there"
            + (f": use {spec}" if spec else ""),
            where,
            command=command,
            remedy="" if command else "Use the UUID that `blkid` shows.",
        )
    if not bad:
        yield passed("no filesystem is named by its device", Evidence(subject.fstab.text.path))


async def check_network(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether the boot waits for servers that may not be reached from the cloud."""
    if unread := _unread(subject):
        yield unread
        return
    for entry in subject.fstab.entries:
        if entry.is_network and not entry.options & {"_netdev", "nofail", "noauto", "x-systemd.automount"}:
            yield failed(
                "warn",
                f"{entry.spec} on {entry.point} may be out of reach from the cloud, and the boot waits for it",
                subject.fstab.text.at(entry.line),
                command=_edit(entry, options="_netdev,nofail"),
            )


RULES = (
    Rule(
        id="fs.fstab.foreign",
        title="everything that is mounted at boot is in the image",
        why=(
            "systemd stops in emergency mode, without a network, when a filesystem of /etc/fstab is missing. Each "
            "entry is looked up among the volumes of the exported disk; network and kernel filesystems are left out. "
            "The guide: mount no other disks."
        ),
        check=check_foreign,
    ),
    Rule(
        id="fs.fstab.devname",
        title="no filesystem is named by its device",
        why="/dev/sda2 and names by-id or by-path mean nothing where the disk is /dev/vda.",
        check=check_names,
    ),
    Rule(
        id="fs.fstab.netfs",
        title="the boot waits for no server",
        why=(
            "A file server of the old network is not there: the mount waits for its timeout, or fails the boot. AWS "
            "and Azure disable such lines when they import."
        ),
        check=check_network,
    ),
)
