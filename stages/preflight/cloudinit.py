"""Rules about cloud-init, by which the cloud sets up password, keys, network and disk size at first boot.

Source: Tencent Cloud, "Installing Cloud-Init on Linux" (213/12587); cloud-init documentation, "Boot stages",
"ds-identify", "Network configuration".
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

from stages.preflight.findings import Evidence, Outcome, Severity, failed, passed, skipped, unknown
from stages.preflight.menus import version_key
from stages.preflight.rules import Rule, Target
from stages.preflight.subject import Subject
from stages.preflight.texts import Text, exists, names_in, read_text, texts_in

_PROGRAMS = ("/usr/bin/cloud-init", "/usr/local/bin/cloud-init", "/bin/cloud-init")
_WAAGENT = ("/usr/sbin/waagent", "/usr/bin/waagent")
_UNIT_FOLDERS = ("/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")
# Four stages; cloud-init 24.3 renamed two of them.
_STAGES = (
    ("cloud-init-local.service",),
    ("cloud-init.service", "cloud-init-network.service"),
    ("cloud-config.service",),
    ("cloud-final.service",),
)
# Short names that are written on kernel lines.
_SOURCES = {"nocloud": "NoCloud", "nocloud-net": "NoCloud", "configdrive": "ConfigDrive", "openstack": "OpenStack"}
_GENERATORS = (
    "/lib/systemd/system-generators/cloud-init-generator",
    "/usr/lib/systemd/system-generators/cloud-init-generator",
)


async def _program(subject: Subject) -> str | None:
    for path in _PROGRAMS:
        if await exists(subject.view, path):
            return path
    return None


async def _waagent(subject: Subject) -> bool:
    return any([await exists(subject.view, path) for path in _WAAGENT])


async def _version(subject: Subject) -> tuple[str, Evidence | None]:
    """The version of cloud-init: by its package, else by what pip leaves."""
    package = subject.packages.installed.get("cloud-init")
    if package is not None and package.version:
        return package.version, package.where
    for base in ("/usr/lib/python3", "/usr/local/lib", "/usr/lib"):
        for name in await names_in(subject.view, base):
            if base != "/usr/lib/python3" and not name.startswith("python"):
                continue
            folder = f"{base}/{name}" if base == "/usr/lib/python3" else ""
            for inner in (folder,) if folder else (f"{base}/{name}/site-packages", f"{base}/{name}/dist-packages"):
                for found in await names_in(subject.view, inner):
                    if match := re.fullmatch(r"cloud_init-([\w.]+)\.(?:dist|egg)-info", found):
                        return match[1], Evidence(f"{inner}/{found}")
    return "", package.where if package is not None else None


async def check_installed(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether an agent is there that the target accepts."""
    agents = target.profile.agents
    wanted = agents.any_of or ("cloud-init",)
    if "waagent" in wanted and await _waagent(subject):
        yield passed("waagent is installed")
        return
    program = await _program(subject)
    install = subject.distribution.install("cloud-init", *_grow_packages(subject))
    waiver = f" {agents.waiver}" if agents.waiver else ""
    if program is None and "cloud-init" not in subject.packages.installed:
        yield failed(
            "block" if agents.any_of else "warn",
            f"cloud-init is not installed; {target.profile.name} sets up password, keys and network by it.{waiver}",
            Evidence(_PROGRAMS[0]),
            command=install,
            remedy="Install cloud-init.",
        )
        return
    version, where = await _version(subject)
    place = (where,) if where else (Evidence(program or "cloud-init"),)
    least = agents.version
    if program is None:
        yield failed(
            "block" if agents.any_of else "warn",
            "the package cloud-init is installed, its program is not there",
            *place,
            command=install,
        )
    elif least and version and version_key(version.partition("-")[0]) < version_key(least):
        yield failed(
            "warn",
            f"cloud-init {version} is older than {least}, the least that {target.profile.name} takes",
            *place,
            command=install,
        )
    elif least and not version:
        yield unknown(f"the version of cloud-init can't be told; {target.profile.name} takes {least} and later", *place)
    else:
        yield passed(f"cloud-init {version} is installed".replace("  ", " "), *place)


def _grow_packages(subject: Subject) -> tuple[str, ...]:
    return {
        "debian": ("cloud-guest-utils",),
        "rhel": ("cloud-utils-growpart",),
        "suse": ("growpart",),
        "alpine": ("cloud-utils-growpart",),
        "arch": ("cloud-guest-utils",),
        "other": (),
    }[subject.distribution.family]


async def _is_wanted(subject: Subject, target: Target) -> Outcome | None:
    """Why the rules behind "installed" have nothing to look at."""
    agents = target.profile.agents
    if "waagent" in agents.any_of and await _waagent(subject) and await _program(subject) is None:
        return skipped("waagent does this work")
    if await _program(subject) is None:
        return skipped("cloud-init is not installed")
    return None


async def check_enabled(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether cloud-init runs at boot."""
    if nothing := await _is_wanted(subject, target):
        yield nothing
        return
    severity: Severity = "block" if target.profile.agents.any_of else "warn"
    view = subject.view
    disabled = "/etc/cloud/cloud-init.disabled"
    good = True
    if await exists(view, disabled):
        good = False
        yield failed(severity, "cloud-init is switched off by a file", Evidence(disabled), command=f"rm {disabled}")
    identify = await read_text(view, "/etc/cloud/ds-identify.cfg")
    for number, line in identify.numbered():
        if re.match(r"policy:\s*disabled\b", line):
            good = False
            yield failed(
                severity,
                "cloud-init is switched off by ds-identify's policy",
                identify.at(number),
                command=f"sed -i '{number}d' {identify.path}",
            )
    for entry in subject.menus.entries:
        if entry.value("cloud-init") == "disabled":
            good = False
            yield failed(
                severity if entry.is_default else "warn",
                "the kernel line switches cloud-init off",
                entry.where,
                command=f"sed -i 's/ *cloud-init=disabled//' /etc/default/grub && {subject.distribution.update_menu}",
            )
            break
    masked = [name for stage in _STAGES for name in stage if await _is_masked(subject, name)]
    for name in masked:
        good = False
        yield failed(
            severity,
            f"{name} is masked",
            Evidence(f"/etc/systemd/system/{name}"),
            command=f"systemctl unmask {name}",
        )
    systemd = any([await exists(view, folder) for folder in _UNIT_FOLDERS[1:]])
    if systemd:
        wants = {name: folder for folder in _UNIT_FOLDERS for name in await _wanted_units(subject, folder)}
        lacking = [stage for stage in _STAGES if not any(name in wants for name in stage)]
        # Since 24.1 one process does all stages; where it runs, they do.
        if "cloud-init-main.service" in wants:
            lacking = [stage for stage in lacking if stage[0] not in ("cloud-init-local.service",)]
        if lacking:
            good = False
            names = " ".join(stage[0].removesuffix(".service") for stage in lacking)
            yield failed(
                severity,
                f"cloud-init does not run at boot: {', '.join(stage[0] for stage in lacking)} not enabled",
                Evidence("/etc/systemd/system/cloud-init.target.wants"),
                command=f"systemctl enable {names}",
            )
        elif not any([await exists(view, path) for path in _GENERATORS]) and "cloud-init.target" not in wants:
            good = False
            yield failed(
                "warn",
                "the generator that starts cloud-init is not there",
                Evidence(_GENERATORS[0]),
                command=subject.distribution.install("cloud-init"),
            )
    else:
        started = [
            name for level in ("boot", "default", "sysinit") for name in await names_in(view, f"/etc/runlevels/{level}")
        ]
        started += [name[3:] for name in await names_in(view, "/etc/rc3.d") if re.match(r"S\d\dcloud-", name)]
        if not any(name.startswith("cloud-") for name in started):
            good = False
            yield failed(
                severity,
                "cloud-init does not run at boot: no runlevel starts it",
                Evidence("/etc/runlevels"),
                command="setup-cloud-init" if subject.distribution.family == "alpine" else "chkconfig cloud-init on",
            )
    if good:
        yield passed("cloud-init runs at boot")


async def _is_masked(subject: Subject, name: str) -> bool:
    try:
        return await subject.view.target(f"/etc/systemd/system/{name}") == "/dev/null"
    except OSError:
        return False


async def _wanted_units(subject: Subject, folder: str) -> list[str]:
    found: list[str] = []
    for name in ("cloud-init.target.wants", "multi-user.target.wants", "sysinit.target.wants", "default.target.wants"):
        found += await names_in(subject.view, f"{folder}/{name}")
    return found


async def _datasources(subject: Subject) -> tuple[tuple[str, ...], Evidence] | None:
    """The list that counts: the kernel line's, that of ds-identify, else that of the last file that has one."""
    for entry in subject.menus.entries[:1]:
        for name in ("ci.ds", "ci.datasource", "ds"):
            if value := entry.value(name):
                return (_SOURCES.get(value.partition(";")[0].lower(), value.partition(";")[0]),), entry.where
    found = _listed(await read_text(subject.view, "/etc/cloud/ds-identify.cfg"), "datasource")
    if found is not None:
        return found
    texts = [await read_text(subject.view, "/etc/cloud/cloud.cfg")]
    texts += await texts_in(subject.view, "/etc/cloud/cloud.cfg.d", ".cfg")
    for text in texts:
        found = _listed(text, "datasource_list") or found
    return found


def _listed(text: Text, key: str) -> tuple[tuple[str, ...], Evidence] | None:
    for number, line in text.numbered():
        if not line.startswith(f"{key}:"):
            continue
        value = line.partition(":")[2].partition("#")[0].strip()
        if value:
            # An inline list may go on over several lines.
            rest = number
            while value.startswith("[") and "]" not in value and rest < len(text.lines):
                value += " " + text.lines[rest].strip()
                rest += 1
            return tuple(one for one in re.split(r"[\s,\[\]'\"]+", value) if one), text.at(number)
        items = []
        for line in text.lines[number:]:
            if match := re.match(r"\s*-\s*['\"]?(\w+)", line):
                items.append(match[1])
            elif line.strip() and not line.strip().startswith("#"):
                break
        return tuple(items), text.at(number)
    return None


async def check_datasource(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether cloud-init asks the source that answers over there."""
    if nothing := await _is_wanted(subject, target):
        yield nothing
        return
    wanted = target.profile.agents.datasource
    if not wanted:
        yield skipped(f"nothing is known of the data source of {target.profile.name}")
        return
    found = await _datasources(subject)
    if found is None:
        yield passed("cloud-init tries every data source")
        return
    listed, where = found
    if wanted.lower() in (one.lower() for one in listed):
        yield passed(f"{wanted} is among the data sources", where)
    else:
        yield failed(
            "warn",
            f"cloud-init asks {', '.join(listed) or 'nothing'} only, and {target.profile.name} answers as {wanted}",
            where,
            command=_name_source(subject, where, wanted),
        )


def _name_source(subject: Subject, where: Evidence, wanted: str) -> str:
    """The command that lets cloud-init ask a source."""
    if where.file == "/etc/cloud/ds-identify.cfg":
        return f"sed -i '{where.line}s/.*/datasource: {wanted}/' {where.file}"
    if not where.file.startswith("/etc/cloud/"):  # the kernel line
        change = r"s/ *\b\(ci\.ds\|ci\.datasource\|ds\)=[^ \"]*//"
        return f"sed -i '{change}' /etc/default/grub && {subject.distribution.update_menu}"
    folder = "/etc/cloud/cloud.cfg.d"
    return f"mkdir -p {folder} && echo 'datasource_list: [{wanted}, None]' > {folder}/99_datasource.cfg"


async def check_state(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether cloud-init takes the new machine for a new one."""
    if nothing := await _is_wanted(subject, target):
        yield nothing
        return
    view = subject.view
    clean = "cloud-init clean --logs --machine-id"
    good = True
    for path in ("/var/lib/cloud/instance", "/var/lib/cloud/instances", "/var/lib/cloud/data/instance-id"):
        names = await names_in(view, path) if path.endswith("s") else (await _is_there(subject, path),)
        if any(names):
            good = False
            yield failed(
                "warn",
                "cloud-init has run here already: it may take the new machine for this one",
                Evidence(path),
                command=clean,
            )
            break
    for path in (
        "/etc/network/interfaces.d/50-cloud-init.cfg",
        "/etc/network/interfaces.d/50-cloud-init",
        "/etc/netplan/50-cloud-init.yaml",
        "/etc/NetworkManager/system-connections/cloud-init-eth0.nmconnection",
    ):
        if await exists(view, path):
            good = False
            yield failed(
                "warn",
                "the network configuration of an earlier first boot is left",
                Evidence(path),
                command=f"rm {path}",
            )
    for text in (
        await read_text(view, "/etc/cloud/cloud.cfg"),
        *await texts_in(view, "/etc/cloud/cloud.cfg.d", ".cfg"),
    ):
        for number, line in enumerate(text.lines, 1):
            if re.match(r"network:\s*\{\s*config:\s*disabled", line) or (
                re.match(r"\s+config:\s*disabled", line)
                and number > 1
                and text.lines[number - 2].startswith("network:")
            ):
                good = False
                yield failed(
                    "warn",
                    "cloud-init is told to leave the network alone",
                    text.at(number),
                    remedy=f"Remove the lines from {text.path} unless the network is set up for DHCP.",
                )
    machine = await read_text(view, "/etc/machine-id")
    if machine.lines and machine.lines[0].strip() not in ("", "uninitialized"):
        good = False
        yield failed(
            "info",
            "/etc/machine-id is filled: machines made of the image share it",
            machine.at(1),
            command="truncate -s 0 /etc/machine-id",
        )
    if good:
        yield passed("no trace of an earlier first boot")


async def _is_there(subject: Subject, path: str) -> str:
    try:
        await subject.view.stat(path, follow=False)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    return path


_RESIZERS = {
    **dict.fromkeys(("ext2", "ext3", "ext4"), ("/usr/sbin/resize2fs", "/sbin/resize2fs")),
    "xfs": ("/usr/sbin/xfs_growfs", "/sbin/xfs_growfs"),
    "btrfs": ("/usr/bin/btrfs", "/usr/sbin/btrfs", "/sbin/btrfs", "/bin/btrfs"),
}
_RESIZE_PACKAGES = {
    **dict.fromkeys(("ext2", "ext3", "ext4"), "e2fsprogs"),
    "xfs": "xfsprogs",
    "btrfs": "btrfs-progs",
}


async def check_growth(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether the root filesystem grows with a larger disk."""
    found = False
    for path in ("/usr/bin/growpart", "/bin/growpart", "/usr/sbin/growpart"):
        found = found or await exists(subject.view, path)
    last = None
    if subject.table is not None:
        parts = [one for one in subject.table.partitions if not one.is_extended]
        last = max(parts, key=lambda one: one.end, default=None)
    if not found:
        yield failed(
            "info",
            "growpart is not installed: the root filesystem stays as small as it is here",
            Evidence("/usr/bin/growpart"),
            command=subject.distribution.install(*_grow_packages(subject)),
        )
    if last is not None and subject.root is not None and subject.root.number not in (None, last.number):
        yield failed(
            "info",
            f"the root filesystem is on partition {subject.root.number}, and partition {last.number} lies behind "
            "it: it can't grow",
            remedy="Put the root partition last before the export where disks should grow.",
        )
    tools = _RESIZERS.get(subject.root.kind, ()) if subject.root is not None else ()
    if tools and not any([await exists(subject.view, path) for path in tools]):
        yield failed(
            "info",
            f"{tools[0].rpartition('/')[2]} is not installed: the partition grows, the filesystem on it does not",
            Evidence(tools[0]),
            command=subject.distribution.install(_RESIZE_PACKAGES[subject.root.kind]) if subject.root else "",
            remedy="Install the tools of the root filesystem.",
        )
    elif found and (last is None or subject.root is None or subject.root.number in (None, last.number)):
        yield passed("the root filesystem can grow with its disk")


RULES = (
    Rule(
        id="agent.cloudinit.installed",
        title="an agent sets up the new machine",
        why=(
            "The cloud gives password, keys, host name and network to cloud-init (on Azure also to waagent). Tencent's "
            "import fails without, with CloudInitNotInstalled."
        ),
        check=check_installed,
    ),
    Rule(
        id="agent.cloudinit.enabled",
        title="cloud-init runs at boot",
        why=(
            "An installed cloud-init does nothing while its four services are not enabled, while "
            "/etc/cloud/cloud-init.disabled exists, or while the kernel line says cloud-init=disabled."
        ),
        check=check_enabled,
    ),
    Rule(
        id="agent.cloudinit.datasource",
        title="cloud-init asks the source that answers over there",
        why="A datasource_list that was written for another cloud or for a lab keeps cloud-init from finding its data.",
        check=check_datasource,
    ),
    Rule(
        id="agent.cloudinit.state",
        title="cloud-init takes the new machine for a new one",
        why=(
            "State of an earlier first boot, network configuration with the old card's address and a filled machine-id "
            "travel with the image. Tencent's page asks to remove /var/lib/cloud and 50-cloud-init.cfg and not to "
            "reboot before the export."
        ),
        check=check_state,
    ),
    Rule(
        id="agent.cloudinit.growpart",
        title="the root filesystem grows with its disk",
        why="growpart enlarges the last partition at first boot; nothing can grow into a partition behind it.",
        check=check_growth,
    ),
)
