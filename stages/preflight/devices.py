"""Rules about what stands between partitions and filesystems: encryption, RAID, LVM."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

from stages.preflight.findings import Evidence, Outcome, Severity, failed, passed, plain, skipped, unknown
from stages.preflight.rules import Rule, Target
from stages.preflight.subject import Subject
from stages.preflight.texts import exists, read_text

_MD_CONFIGS = ("/etc/mdadm/mdadm.conf", "/etc/mdadm.conf")
_LVM_CONFIGS = ("/etc/lvm/lvm.conf", "/etc/lvm/lvmlocal.conf")
_PINNED_KEYS = re.compile(r"\b(tpm2-device|fido2-device|pkcs11-uri)=")


async def check_crypttab(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether something is encrypted that the target refuses, or that can't be opened over there."""
    severity: Severity = "warn" if target.profile.encryption else "block"
    luks = [one for one in subject.volumes if one.kind in ("luks", "bitlocker")]
    for volume in luks:
        yield failed(
            severity,
            f"{volume.name} is encrypted"
            + (
                "; its passphrase is needed at the console"
                if severity == "warn"
                else f"; {target.profile.name} refuses that"
            ),
            remedy=(
                "Set up a way to open it there (a network-bound key, the console), or copy the system to plain volumes."
            ),
        )
    text = await read_text(subject.view, "/etc/crypttab")
    if text.problem:
        yield unknown(f"/etc/crypttab can't be read: {text.problem}", Evidence(text.path))
        return
    for number, line in text.numbered():
        fields = line.split()
        if len(fields) < 2:
            continue
        name, spec, key, options = fields[0], fields[1], fields[2] if len(fields) > 2 else "", fields[3:]
        where = text.at(number)
        if _PINNED_KEYS.search(" ".join(options)):
            yield failed(
                "block" if target.profile.encryption is False else "warn",
                f"{name} is opened by a chip or token of this machine, which is not there",
                where,
                command=f"systemd-cryptenroll --password {plain(spec)}",
            )
            continue
        if key.startswith(("/dev/urandom", "/dev/random")):
            continue  # a new key at each boot: swap
        if key.startswith("/") and not await exists(subject.view, key.partition(":")[0]):
            yield failed(
                "warn",
                f"the key file of {name} is not in the image: {key}",
                where,
                remedy="Put the key into the system, or enter a passphrase at the console.",
            )
        meaning = subject.volumes.resolve(spec)
        if meaning.volume is None and meaning.is_certain and subject.table is not None:
            careful = {"nofail", "noauto"} & set(",".join(options).split(","))
            yield failed(
                "info" if careful else "warn",
                f"{name} lies on {spec}, which is not in the image",
                where,
                command=f"sed -i '{number}s/^/# /' /etc/crypttab",
            )
        elif meaning.naming == "device" and target.profile.renames_disks:
            better = meaning.volume.best_spec if meaning.volume else "UUID=..."
            yield failed(
                "warn",
                f"{name} names {spec}, which is called differently there",
                where,
                command=f"sed -i '{number}s#{plain(spec)}#{plain(better)}#' /etc/crypttab",
            )
    if not luks and not list(text.numbered()):
        yield passed("nothing is encrypted")


async def check_md(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether RAID arrays come along."""
    members = [one for one in subject.volumes if one.kind == "md"]
    for path in _MD_CONFIGS:
        text = await read_text(subject.view, path)
        if text.problem:
            yield unknown(f"{path} can't be read: {text.problem}", Evidence(path))
        for number, line in text.numbered():
            if line.split()[0].lower() == "device" and re.search(r"/dev/(sd|hd|vd|xvd|nvme)", line):
                yield failed(
                    "warn",
                    "arrays are looked for on devices that are called differently there",
                    text.at(number),
                    command=f"sed -i '{number}s/.*/DEVICE partitions/' {path} && "
                    + subject.distribution.update_initramfs(""),
                )
            elif line.split()[0].lower() == "array" and not members and subject.table is not None:
                yield failed(
                    "info",
                    "an array is configured whose members are not in the image",
                    text.at(number),
                    remedy="Remove the line where the array stays behind.",
                )
    for volume in members:
        yield failed(
            "warn",
            f"{volume.name} is a member of a RAID array: its mirror does not come along, the array starts degraded",
            remedy="Check that the array starts with one disk (mdadm --run), or copy the system to a plain disk.",
        )
    if not members:
        yield passed("no RAID array is involved")


async def check_lvm(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether LVM will see its physical volumes on other hardware."""
    has_lvm = any(one.kind == "lvm2" for one in subject.volumes)
    root_in_lvm = subject.root is not None and subject.root.inside == "lvm"
    if not has_lvm:
        yield skipped("there is no LVM on the disk")
        return
    severity: Severity = "block" if root_in_lvm else "warn"
    found = False
    devices = await read_text(subject.view, "/etc/lvm/devices/system.devices")
    if devices.problem:
        yield unknown(f"{devices.path} can't be read: {devices.problem}", Evidence(devices.path))
    for number, line in devices.numbered():
        if re.search(r"IDTYPE=(?!lvmlv_uuid|devname)\w+", line):
            found = True
            yield failed(
                severity,
                "the LVM devices file pins physical volumes by hardware: it hides the volume group on other hardware",
                devices.at(number),
                command=f"rm {devices.path} && {subject.distribution.update_initramfs('')}",
            )
            break
    for path in _LVM_CONFIGS:
        text = await read_text(subject.view, path)
        for number, line in text.numbered():
            if (
                re.match(r"(global_)?filter\s*=", line)
                and re.search(r"/dev/|\b(sd|hd|vd|nvme)", line)
                and "a|.*|" not in line
            ):
                found = True
                yield failed(
                    "warn",
                    "an LVM filter names devices that are called differently there",
                    text.at(number),
                    command=f"sed -i '{number}s/^/# /' {path} && {subject.distribution.update_initramfs('')}",
                )
    if not found:
        yield passed("LVM looks at every device")


RULES = (
    Rule(
        id="fs.crypttab",
        title="what is encrypted can be opened over there",
        why="Some importers refuse encrypted disks; keys in a TPM stay with the old machine.",
        check=check_crypttab,
    ),
    Rule(
        id="fs.mdadm",
        title="RAID arrays start over there",
        why="One disk of a mirror arrives alone, and its device has another name.",
        check=check_md,
    ),
    Rule(
        id="fs.lvm.filter",
        title="LVM sees its volumes on other hardware",
        why=(
            "From RHEL 9 on, /etc/lvm/devices/system.devices lists physical volumes by the serial numbers of their "
            "disks: after a move the volume group is not found, and the root filesystem with it."
        ),
        check=check_lvm,
    ),
)
