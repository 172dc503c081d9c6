"""Rules about getting in: a network, a server that lets people in, somebody whom it lets in."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

from stages.preflight.findings import Evidence, Outcome, failed, passed, to_read_it, unknown
from stages.preflight.rules import Rule, Target
from stages.preflight.subject import Subject
from stages.preflight.texts import exists, names_in, read_text

_SERVERS = ("/usr/sbin/sshd", "/usr/sbin/dropbear", "/usr/bin/dropbear")
_SERVER_UNITS = ("ssh.service", "sshd.service", "ssh.socket", "sshd.socket", "dropbear.service")
_UNIT_FOLDERS = ("/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")
_WANTED_BY = ("multi-user.target.wants", "sockets.target.wants", "default.target.wants")
_CLIENTS = (
    *("/sbin/dhclient", "/usr/sbin/dhclient", "/sbin/dhcpcd", "/usr/sbin/dhcpcd", "/usr/bin/dhcpcd"),
    "/usr/sbin/NetworkManager",
    *("/sbin/udhcpc", "/usr/sbin/udhcpc", "/usr/sbin/wicked", "/usr/sbin/wickedd", "/sbin/pump"),
)
_NETWORKD = (
    "/etc/systemd/system/multi-user.target.wants/systemd-networkd.service",
    "/etc/systemd/system/dbus-org.freedesktop.network1.service",
    "/usr/sbin/netplan",
)
_AGENTS = ("/usr/bin/cloud-init", "/usr/local/bin/cloud-init", "/usr/sbin/waagent")
_ACCOUNTS_MAX = 200
_PACKAGES = {
    "debian": "openssh-server",
    "rhel": "openssh-server",
    "suse": "openssh",
    "alpine": "openssh",
    "arch": "openssh",
}
_CLIENT_PACKAGES = {"debian": "isc-dhcp-client", "rhel": "NetworkManager", "suse": "wicked", "arch": "dhcpcd"}


async def check_server(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether a server for logins is there and runs at boot."""
    program = next((path for path in [one for one in _SERVERS if await exists(subject.view, one)]), None)
    family = subject.distribution.family
    if program is None:
        yield failed(
            "warn",
            "no SSH server is installed: nobody gets in but by the console",
            Evidence(_SERVERS[0]),
            command=subject.distribution.install(_PACKAGES[family]) if family in _PACKAGES else "",
            remedy="Install an SSH server.",
        )
        return
    never = "/etc/ssh/sshd_not_to_be_run"
    if await exists(subject.view, never):
        yield failed("warn", "the SSH server is switched off by a file", Evidence(never), command=f"rm {never}")
        return
    if await _starts(subject):
        yield passed("an SSH server runs at boot", Evidence(program))
        return
    unit = "ssh" if family == "debian" else "sshd"
    yield failed(
        "warn",
        "the SSH server does not run at boot",
        Evidence(program),
        command=f"rc-update add {unit}" if family == "alpine" else f"systemctl enable {unit}",
    )


async def _starts(subject: Subject) -> bool:
    for folder in _UNIT_FOLDERS:
        for wanted in _WANTED_BY:
            for name in await names_in(subject.view, f"{folder}/{wanted}"):
                if name in _SERVER_UNITS and not await _is_masked(subject, name):
                    return True
    if any([await exists(subject.view, folder) for folder in _UNIT_FOLDERS[1:]]):
        return False  # beside a unit of systemd a link in rc3.d does nothing
    for level in ("/etc/runlevels/default", "/etc/rc3.d", "/etc/rc2.d", "/etc/rc.d/rc3.d"):
        if any(re.fullmatch(r"(S\d\d)?(sshd?|dropbear)", name) for name in await names_in(subject.view, level)):
            return True
    return False


async def _is_masked(subject: Subject, unit: str) -> bool:
    try:
        return await subject.view.target(f"/etc/systemd/system/{unit}") == "/dev/null"
    except OSError:
        return False


async def check_login(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether somebody gets in where no agent sets up an account."""
    shadow = await read_text(subject.view, "/etc/shadow")
    if shadow.problem:
        yield unknown(f"/etc/shadow can't be read: {shadow.problem}", Evidence(shadow.path))
        return
    with_password = []
    for _, line in shadow.numbered():
        fields = line.split(":")
        if len(fields) > 1 and fields[1] and not fields[1].startswith(("!", "*", "x")):
            with_password.append(fields[0])
    with_key, hidden = [], ""
    for name, home in await _homes(subject):
        keys = await read_text(subject.view, f"{home}/.ssh/authorized_keys")
        if keys.problem:
            hidden = f"{keys.path}: {keys.problem}"
        if any(True for _ in keys.numbered()):
            with_key.append(name)
    told = [
        f"{', '.join(names[:4])} by {how}" for names, how in ((with_password, "password"), (with_key, "key")) if names
    ]
    if told:
        yield passed(f"may log in: {'; '.join(told)}")
    elif any([await exists(subject.view, one) for one in _AGENTS]):
        yield passed("nobody has a password or a key here; the agent gives one at first boot")
    elif hidden:
        yield unknown(f"whether anybody has a key can't be told: {hidden}", remedy=to_read_it())
    else:
        yield failed(
            "warn",
            "root's password is locked, nobody has another or a key, and no agent gives one at first boot",
            Evidence("/etc/shadow"),
            remedy="Set a password (passwd root), or put a key into /root/.ssh/authorized_keys.",
        )


async def _homes(subject: Subject) -> list[tuple[str, str]]:
    """Accounts that may log in, with their folders."""
    text = await read_text(subject.view, "/etc/passwd")
    found = []
    for _, line in text.numbered():
        fields = line.split(":")
        if len(fields) == 7 and fields[5].startswith("/") and not fields[6].endswith(("nologin", "/false", "/sync")):
            found.append((fields[0], fields[5].rstrip("/")))
    return found[:_ACCOUNTS_MAX]


async def check_client(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether something asks for an address."""
    for path in _CLIENTS:
        if await exists(subject.view, path):
            yield passed(f"addresses are asked for by {path.rpartition('/')[2]}", Evidence(path))
            return
    for path in _NETWORKD:  # its program is part of systemd; only enabled, or started by netplan, it does something
        if await exists(subject.view, path):
            yield passed("addresses are asked for by systemd-networkd", Evidence(path))
            return
    family = subject.distribution.family
    yield failed(
        "warn",
        "no DHCP client is installed: clouds give addresses by DHCP",
        Evidence(_CLIENTS[0]),
        command=subject.distribution.install(_CLIENT_PACKAGES[family]) if family in _CLIENT_PACKAGES else "",
        remedy="Install a DHCP client.",
    )


RULES = (
    Rule(
        id="access.ssh",
        title="an SSH server runs at boot",
        why="Without it nobody gets in. AWS, Alibaba and Google want it before they take an image.",
        check=check_server,
    ),
    Rule(
        id="access.login",
        title="somebody can log in",
        why=(
            "Where no agent sets up an account, a locked root without a key leaves nobody who gets in. Accounts, "
            "passwords and keys are counted, never told."
        ),
        check=check_login,
    ),
    Rule(
        id="access.dhcp",
        title="something asks for an address",
        why="Clouds give addresses by DHCP; a server with a static address may never have had a client for it.",
        check=check_client,
    ),
)
