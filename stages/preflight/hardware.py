"""Rules about the hardware that changes: video, disk names, the network card, the console."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

from stages.preflight.findings import Evidence, Outcome, failed, passed, plain, skipped, unknown
from stages.preflight.rules import Rule, Target
from stages.preflight.subject import Subject
from stages.preflight.texts import Text, exists, names_in, read_text, texts_in
from stages.preflight.volumes import disk_name_in

_PLAIN_VIDEO = ("modesetting", "vesa", "fbdev", "cirrus", "qxl", "dummy")
_VENDOR_VIDEO = ("nvidia", "nvidia-current", "amdgpu-pro", "fglrx")
# Files in which administrators write device names; fstab, crypttab, boot menus and mdadm have rules of their own.
_DEVICE_FILES = (
    "/boot/grub/device.map",
    "/boot/grub2/device.map",
    "/etc/smartd.conf",
    "/etc/hdparm.conf",
    "/etc/sysconfig/smartmontools",
    "/etc/rc.local",
    "/etc/crontab",
    "/etc/lilo.conf",
    "/etc/udev/rules.d/60-persistent-storage.rules",
)
_DEVICE_FOLDERS = (
    ("/etc/default", ()),
    ("/etc/cron.d", ()),
    ("/var/spool/cron", ()),
    ("/var/spool/cron/crontabs", ()),
    ("/etc/systemd/system", (".service", ".mount", ".swap", ".timer", ".automount")),
)
_HITS_MAX = 20
_ANY = "another card"


async def check_video(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether the system needs a video card that is not there."""
    view = subject.view
    becomes = (
        f"graphics becomes {target.profile.hardware.video.capitalize()} VGA"
        if target.profile.hardware.video
        else ("the video card is another one there")
    )
    has_x = (
        await exists(view, "/usr/bin/Xorg")
        or await exists(view, "/usr/lib/xorg/Xorg")
        or await exists(view, "/usr/bin/X")
    )
    found = False
    texts = [await read_text(view, "/etc/X11/xorg.conf"), *await texts_in(view, "/etc/X11/xorg.conf.d", ".conf")]
    for text in texts:
        section = ""
        for number, line in text.numbered():
            words = line.replace('"', " ").split() or [""]
            if words[0].lower() == "section" and len(words) > 1:
                section = words[1].lower()
            elif words[0].lower() == "driver" and len(words) > 1 and section == "device":
                if words[1].lower() in _PLAIN_VIDEO:
                    continue
                found = True
                yield failed(
                    "warn" if has_x else "info",
                    f"{becomes}, and X is told to use the driver {words[1]}",
                    text.at(number),
                    command=f"mv {plain(text.path)} {plain(text.path)}.before",
                )
    for kernel in subject.kernels:
        for name in _VENDOR_VIDEO:
            path = kernel.modules.get(name.replace("-", "_"))
            if path is not None and not found:
                found = True
                yield failed(
                    "warn" if has_x else "info",
                    f"{becomes}, and the driver {name} is installed",
                    Evidence(f"{kernel.folder}/{path}"),
                    remedy="Uninstall the vendor's video driver.",
                )
    for entry in subject.menus.entries[:1]:
        if entry.value("nomodeset") is not None:
            found = True
            yield failed(
                "info",
                "the kernel line has nomodeset, which some video card here may have asked for",
                entry.where,
                remedy="Remove it where the console over there stays dark.",
            )
    if not found:
        yield passed(f"{becomes}; nothing here depends on the card")


async def check_names(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether configuration names disks by names that change."""
    if not target.profile.renames_disks:
        yield skipped(f"disks of {target.profile.name} may keep their names")
        return
    becomes = target.profile.hardware.disk
    texts: list[Text] = [await read_text(subject.view, path) for path in _DEVICE_FILES]
    for folder, suffixes in _DEVICE_FOLDERS:
        texts += await texts_in(subject.view, folder, *suffixes)
    hits = 0
    for text in texts:
        for number, line in text.numbered():
            match = disk_name_in(line)
            if match is None or match[1].startswith(becomes[:-1]):
                continue
            hits += 1
            if hits > _HITS_MAX:
                continue
            meaning = subject.volumes.resolve(match[0])
            better = ""
            if meaning.volume is not None:
                better = f"/dev/disk/by-uuid/{meaning.volume.uuid}" if meaning.volume.uuid else ""
            renamed = f"/dev/{becomes}{match[2] or ''}"
            yield failed(
                "warn",
                f"{text.path} names {match[0]}, which becomes {renamed}",
                text.at(number),
                command=f"rm {plain(text.path)}"
                if text.path.endswith("device.map")
                else f"sed -i '{number}s#{plain(match[0])}#{plain(better or renamed)}#' {plain(text.path)}",
            )
    if hits > _HITS_MAX:
        yield failed("warn", f"and {hits - _HITS_MAX} more lines name disks", Evidence("/etc"))
    if not hits:
        yield passed(f"{sum(1 for one in texts if one.lines)} files name no disk by a name that changes")


async def check_nic(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether the network comes up on one card with another name and address."""
    view = subject.view
    nic = target.profile.hardware.nic or _ANY
    family = subject.distribution.family
    anywhere = _any_card(family)
    bound: list[Outcome] = []
    tied = 0  # configurations that hold for one card only
    free = 0  # those that hold for any

    rules = "/etc/udev/rules.d/70-persistent-net.rules"
    text = await read_text(view, rules)
    for number, line in text.numbered():
        if "ATTR{address}" in line:
            bound.append(
                failed(
                    "warn",
                    "network cards are named by their addresses: the new one becomes eth1 or later",
                    text.at(number),
                    command=f"rm {rules}",
                )
            )
            break
    for text in await texts_in(view, "/etc/netplan", ".yaml", ".yml"):
        mac = static = named = 0
        for number, line in text.numbered():
            if line.startswith("macaddress:"):
                mac = number
            elif re.match(r"addresses:|-\s*\d+\.\d+\.\d+\.\d+/", line) and not static:
                static = number
            elif match := re.match(r"(en\w+|eth\d+):", line):
                named = number if match[1] != nic else 0
        if mac:
            tied += 1
            bound.append(
                failed(
                    "warn",
                    "the network is set up for one card by its address",
                    text.at(mac),
                    command=f"mv {plain(text.path)} {plain(text.path)}.before && {anywhere}",
                )
            )
        elif named and "match:" not in "".join(text.lines):
            tied += 1
            bound.append(
                failed(
                    "warn",
                    f"the network is set up for a card of another name; it becomes {nic} there",
                    text.at(named),
                    command=f"mv {plain(text.path)} {plain(text.path)}.before && {anywhere}",
                )
            )
        elif text.lines:
            free += 1
        if static:
            bound.append(_static(text, static))
    text = await read_text(view, "/etc/network/interfaces")
    texts = [text, *await texts_in(view, "/etc/network/interfaces.d")]
    for text in texts:
        for number, line in text.numbered():
            if match := re.match(r"(?:allow-hotplug|auto)\s+(\S+)", line):
                if match[1] in ("lo", "lo0"):
                    continue
                if match[1] == nic or match[1].startswith("/"):
                    free += 1
                else:
                    tied += 1
                    bound.append(
                        failed(
                            "warn",
                            f"the network is set up for {match[1]}; the card is {nic} there",
                            text.at(number),
                            command=rf"sed -i 's/\b{plain(match[1])}\b/{nic}/g' {plain(text.path)}"
                            if nic != _ANY
                            else "",
                            remedy="Name the card as it is called there.",
                        )
                    )
            elif re.match(r"iface\s+\S+\s+inet6?\s+static", line):
                bound.append(_static(text, number))
            elif line.startswith("hwaddress"):
                bound.append(
                    failed(
                        "warn",
                        "a card is given the old card's address",
                        text.at(number),
                        command=f"sed -i '{number}d' {plain(text.path)}",
                    )
                )
    for name in await names_in(view, "/etc/sysconfig/network-scripts"):
        if not name.startswith("ifcfg-") or name == "ifcfg-lo":
            continue
        text = await read_text(view, f"/etc/sysconfig/network-scripts/{name}")
        tied, free = _ifcfg(text, name.removeprefix("ifcfg-"), nic, bound, tied, free)
    for name in await names_in(view, "/etc/sysconfig/network"):
        if name.startswith("ifcfg-") and name != "ifcfg-lo" and not name.endswith(("~", ".bak")):
            text = await read_text(view, f"/etc/sysconfig/network/{name}")
            tied, free = _ifcfg(text, name.removeprefix("ifcfg-"), nic, bound, tied, free)
    for text in await texts_in(view, "/etc/NetworkManager/system-connections"):
        where = 0
        for number, line in text.numbered():
            if re.match(r"(mac-address|cloned-mac-address)=[0-9A-Fa-f:]{17}", line):
                where = number
                bound.append(
                    failed(
                        "warn",
                        "the network is set up for one card by its address",
                        text.at(number),
                        command=f"sed -i '{number}d' {plain(text.path)}",
                    )
                )
            elif (match := re.match(r"interface-name=(\S+)", line)) and match[1] != nic:
                where = number
                bound.append(
                    failed(
                        "warn",
                        f"a connection is bound to {match[1]}; the card is {nic} there",
                        text.at(number),
                        command=f"sed -i '{number}d' {plain(text.path)}",
                    )
                )
            elif re.match(r"address\d*=\d", line):
                bound.append(_static(text, number))
        tied, free = (tied + 1, free) if where else (tied, free + bool(text.lines))
    for text in await texts_in(view, "/etc/systemd/network", ".network", ".link"):
        for number, line in text.numbered():
            if re.match(r"(MACAddress|PermanentMACAddress)=", line):
                tied += 1
                bound.append(
                    failed(
                        "warn",
                        "the network is set up for one card by its address",
                        text.at(number),
                        command=f"sed -i '{number}s/.*/Name=e*/' {plain(text.path)}",
                    )
                )
            elif re.match(r"Address=\d", line):
                bound.append(_static(text, number))
            elif line.startswith("DHCP=") and text.path.endswith(".network"):
                free += 1
    agent = any([await exists(view, path) for path in ("/usr/bin/cloud-init", "/usr/local/bin/cloud-init")])
    for one in bound:
        # cloud-init writes a configuration of its own at first boot; without it nothing else brings the network up.
        alone = bool(tied) and not free and not agent and target.profile.hardware.nic
        yield failed(
            "block" if alone and "card by its address" in one.message else one.severity,
            one.message,
            *one.evidence,
            command=one.remedy if one.is_command else "",
            remedy=one.remedy,
        )
    if (
        subject.live is not None
        and target.profile.hardware.nics
        and len(subject.live.nics) > target.profile.hardware.nics
    ):
        yield failed(
            "warn",
            f"this machine has {len(subject.live.nics)} network cards ({', '.join(subject.live.nics)}); there is "
            f"{target.profile.hardware.nics} there",
            Evidence("/sys/class/net"),
            remedy="Move what the other cards do to the first, or ask for more cards.",
        )
    if nic == "eth0" and subject.menus.entries:
        entry = subject.menus.entries[0]
        if entry.value("net.ifnames") != "0" and not agent:
            yield failed(
                "info",
                "cards keep their long names (net.ifnames=0 is not on the kernel line); the cloud expects eth0",
                entry.where,
                command=f"sed -i 's/^GRUB_CMDLINE_LINUX=\"/&net.ifnames=0 biosdevname=0 /' /etc/default/grub && "
                f"{subject.distribution.update_menu}",
            )
    if not bound:
        yield passed("no network configuration is bound to a card of this machine")


def _static(text: Text, number: int) -> Outcome:
    return failed(
        "warn",
        "a static address is set up; the cloud gives addresses by DHCP",
        text.at(number),
        remedy="Change it to DHCP, or let cloud-init set up the network.",
    )


def _ifcfg(text: Text, card: str, nic: str, bound: list[Outcome], tied: int, free: int) -> tuple[int, int]:
    by_card = False
    for number, line in text.numbered():
        name, _, value = line.partition("=")
        value = value.strip("\"'")
        if name == "HWADDR" and value:
            by_card = True
            bound.append(
                failed(
                    "warn",
                    "the network is set up for one card by its address",
                    text.at(number),
                    command=f"sed -i '/^HWADDR/d' {plain(text.path)}",
                )
            )
        elif name == "BOOTPROTO" and value.lower() in ("static", "none"):
            bound.append(_static(text, number))
        elif name == "DEVICE" and value not in (nic, ""):
            by_card = True
            bound.append(
                failed(
                    "warn",
                    f"the network is set up for {value}; the card is {nic} there",
                    text.at(number),
                    command=f"sed -i 's/^DEVICE=.*/DEVICE={plain(nic)}/' {plain(text.path)} && "
                    f"mv {plain(text.path)} {plain(text.path.rpartition('/')[0])}/ifcfg-{plain(nic)}",
                )
            )
    if not by_card and text.lines and card != nic and not any(line.startswith("DEVICE=") for line in text.lines):
        by_card = True
        bound.append(
            failed(
                "warn",
                f"the network is set up for {card}; the card is {nic} there",
                text.at(1),
                command=f"mv {plain(text.path)} {plain(text.path.rpartition('/')[0])}/ifcfg-{plain(nic)}",
            )
        )
    return (tied + 1, free) if by_card else (tied, free + bool(text.lines))


def _any_card(family: str) -> str:
    if family == "debian":
        return (
            'printf \'network:\\n  version: 2\\n  ethernets:\\n    any:\\n      match: {name: "e*"}\\n      dhcp4: '
            "true\\n' > /etc/netplan/01-any.yaml"
        )
    return "nmcli connection add type ethernet con-name any ifname '*' ipv4.method auto"


# Source: "Architectures" of each release's notes.
_LEVELS = {("rhel", 9): "x86-64-v2", ("rhel", 10): "x86-64-v3", ("suse", 16): "x86-64-v2"}


async def check_processor(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether machines over there run its programs."""
    taken = target.profile.hardware.processors
    if not subject.architecture:
        yield unknown("no program tells for which processor the system is")
    elif taken and subject.architecture not in taken:
        yield failed(
            "block",
            f"the system's programs are for {subject.architecture}; {target.profile.name} takes {', '.join(taken)}",
            Evidence("/sbin/init"),
            remedy="Choose another target, or install the system anew for that processor.",
        )
    else:
        distribution = subject.distribution
        major = distribution.version.partition(".")[0]
        is_amazon = distribution.id == "amzn"
        level = _LEVELS.get((distribution.family, int(major))) if major.isdigit() and not is_amazon else None
        least = f"; choose a machine type with {level}" if level and subject.architecture == "x86_64" else ""
        yield passed(f"its programs are for {subject.architecture}{least}")


async def check_console(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether there is something to see where the cloud shows a console."""
    if not subject.menus.entries:
        yield skipped("no boot menu was found")
        return
    entry = subject.menus.entries[0]
    wanted = target.profile.command_line.console or "ttyS0"
    if any(one.partition(",")[0] == wanted.partition(",")[0] for one in entry.values("console")):
        yield passed(f"the kernel speaks on {wanted.partition(',')[0]}", entry.where)
        return
    add = f"console=tty0 console={wanted}"
    yield failed(
        "warn" if target.profile.command_line.console else "info",
        "no serial console: a boot that fails can't be watched",
        entry.where,
        command=(
            f"grubby --update-kernel=ALL --args='{add}'"
            if "bls" in subject.menus.loaders
            else f"sed -i 's/^GRUB_CMDLINE_LINUX=\"/&{add} /' /etc/default/grub && {subject.distribution.update_menu}"
        ),
    )


RULES = (
    Rule(
        id="hw.video",
        title="nothing depends on the video card",
        why=(
            "The guide: the video card becomes a Cirrus VGA. An X server that is told a vendor's driver does not start."
        ),
        check=check_video,
    ),
    Rule(
        id="hw.diskname",
        title="no configuration names disks by names that change",
        why=(
            "The guide: disks become vda and vdb. Device names hide in device.map, smartd.conf, cron jobs, systemd "
            "units and /etc/default; each line with one is shown, with the name that travels."
        ),
        check=check_names,
    ),
    Rule(
        id="hw.nic",
        title="the network comes up on one card of another name",
        why=(
            "The guide: there is one virtio network card, eth0. Configuration that is bound to the address or the long "
            "name of the old card leaves the machine without a network; static addresses belong to the old one."
        ),
        check=check_nic,
    ),
    Rule(
        id="hw.cpu",
        title="the processor over there runs its programs",
        why=(
            "The first program that is started says for which processor the system is. Some importers take 64-bit "
            "systems only; newer distributions want processors of a level that old machine types lack."
        ),
        check=check_processor,
    ),
    Rule(
        id="hw.console",
        title="a failed boot can be watched",
        why="Clouds show the serial port, many show nothing else. Without console=ttyS0 it stays empty.",
        check=check_console,
    ),
)
