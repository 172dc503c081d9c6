"""Rules about software of other hypervisors and clouds, which fights with the new machine.

Source: virt-v2v convert_linux.ml, "unconfigure_xen", "unconfigure_vbox", "unconfigure_vmware", "unconfigure_citrix",
"unconfigure_kudzu", "unconfigure_prltools"; the vendors' own packages.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass

from stages.preflight.findings import Evidence, Outcome, Severity, failed, passed, plain, unknown
from stages.preflight.rules import Check, Rule, Target
from stages.preflight.subject import Subject
from stages.preflight.texts import exists, names_in, read_text, texts_in


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tool:
    """Software that one hypervisor's guests have.

    Attributes:
        packages: a regular expression for whole package names.
        files: traces of an installation by hand.
        modules: shell patterns of kernel modules that are not part of the kernel, below /lib/modules/V.
        uninstall: a script that removes it, where there is one.
        severity: of its packages and traces.
        lines: of configuration that its drivers left: (file or folder of *.conf, regular expression, what it does).
    """

    title: str
    packages: str
    files: tuple[str, ...]
    modules: tuple[str, ...] = ()
    folders: tuple[str, ...] = ("misc", "extra", "updates", "updates/dkms", "weak-updates", "extra/vmware-tools")
    uninstall: str = ""
    lines: tuple[tuple[str, str, str], ...] = ()
    severity: Severity = "warn"


_XEN_PV = r"(xennet|xen-vnif|xenblk|xen-vbd)"
_LOADED = "drivers of Xen are loaded in place of those of the new hardware"

_TOOLS = {
    "sw.vmware": _Tool(
        title="VMware tools",
        packages=r"open-vm-tools.*|vmware-tools.*|VMwareTools.*|kmod-vmware-tools.*|vmware-open-vm-tools.*",
        files=(
            "/usr/bin/vmware-uninstall-tools.pl",
            "/etc/vmware-tools/locations",
            "/usr/lib/vmware-tools/bin64",
            "/etc/systemd/system/multi-user.target.wants/vmtoolsd.service",
            "/etc/systemd/system/multi-user.target.wants/open-vm-tools.service",
        ),
        modules=("vmci.ko*", "vmhgfs.ko*", "vmxnet.ko*", "vsock.ko*", "vmblock.ko*", "vmmemctl.ko*", "pvscsi.ko*"),
        uninstall="/usr/bin/vmware-uninstall-tools.pl",
    ),
    "sw.xen": _Tool(
        title="Xen tools",
        packages=r"xe-guest-utilities.*|xenstore-utils|citrix-.*tools.*|xen-guest-agent|kmod-xenpv.*|xenserver-.*",
        files=("/usr/sbin/xe-daemon", "/usr/bin/xe-update-guest-attrs", "/etc/init.d/xe-linux-distribution"),
        modules=("xen-vbd.ko*", "xen-vnif.ko*", "xennet.ko*", "xenblk.ko*"),
        lines=(
            ("/etc/sysconfig/kernel", r"INITRD_MODULES=.*\b(xennet|xen-vnif|xenblk|xen-vbd)\b", _LOADED),
            ("/etc/modprobe.d", rf"alias\s+\S+\s+{_XEN_PV}\b", _LOADED),
            ("/etc/modprobe.conf", rf"alias\s+\S+\s+{_XEN_PV}\b", _LOADED),
            ("/etc/inittab", r"[^#]*\b[hx]vc0\b", "a login is started on a console that only Xen has"),
        ),
    ),
    "sw.virtualbox": _Tool(
        title="VirtualBox Guest Additions",
        packages=r"virtualbox-guest-.*|kmod-VirtualBox-guest.*|virtualbox-guest-utils.*|VBoxGuestAdditions.*",
        files=(
            "/var/lib/VBoxGuestAdditions/config",
            "/usr/sbin/VBoxService",
            "/etc/systemd/system/multi-user.target.wants/vboxadd.service",
            "/etc/systemd/system/multi-user.target.wants/vboxadd-service.service",
        ),
        modules=("vboxguest.ko*", "vboxsf.ko*", "vboxvideo.ko*"),
    ),
    "sw.parallels": _Tool(
        title="Parallels Tools",
        packages=r"parallels-tools.*|kmod-prl.*",
        files=("/usr/lib/parallels-tools/install", "/usr/bin/prltoolsd", "/etc/init.d/prltoolsd"),
        modules=("prl_*.ko*",),
        uninstall="/usr/lib/parallels-tools/install -r",
    ),
    "sw.hyperv": _Tool(
        title="Hyper-V daemons",
        packages=r"hyperv-daemons|hypervkvpd|hypervvssd|hypervfcopyd|hyperv-tools|microsoft-hyper-v|kmod-microsoft-hyper-v|"
        r"linux-cloud-tools-.*",
        files=("/usr/sbin/hv_kvp_daemon", "/usr/sbin/hypervkvpd"),
    ),
    "sw.antivirus": _Tool(
        title="virus scanners and intrusion detection",
        packages=r"clamav-daemon|clamd|falcon-sensor|mdatp|SentinelAgent|sentinelagent|ds-agent|ds_agent|esets?|eea|"
        r"sophos-.*|savinstpkg|McAfeeTP|ISecTP|MFEcma|symcpackage|sav|auditbeat|ossec-hids.*|wazuh-agent|samhain|aide",
        files=(
            "/opt/CrowdStrike/falconctl",
            "/opt/sentinelone/bin/sentinelctl",
            "/opt/sophos-av",
            "/opt/ds_agent",
            "/opt/microsoft/mdatp",
            "/var/ossec/bin/ossec-control",
        ),
        severity="info",
    ),
}

# Packages of clouds' own agents, and the profiles that they belong to.
_AGENTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (r"waagent|walinuxagent|WALinuxAgent", "the Azure agent", ("azure",)),
    (r"google-guest-agent|google-compute-engine.*|google-osconfig-agent", "the Google guest agent", ("gcp",)),
    (r"amazon-ssm-agent|ec2-instance-connect|ec2-net-utils|amazon-ec2-net-utils", "the AWS agent", ("aws-import",)),
    (r"aliyun-assist|aegis|cloudmonitor", "the Alibaba agent", ("alibaba",)),
    (r"oracle-cloud-agent", "the Oracle Cloud agent", ("oci",)),
    (r"qcloud-.*|tat-agent|barad.*", "the Tencent agent", ("tencent", "tencent-migrate")),
    (
        r"qemu-guest-agent",
        "the QEMU guest agent",
        ("proxmox", "openstack", "generic", "tencent", "tencent-migrate", "gcp", "oci", "aws-import", "azure"),
    ),
    (r"kudzu", "kudzu", ()),
)
_AGENT_FILES = (
    ("/usr/sbin/waagent", "the Azure agent", ("azure",)),
    ("/usr/local/share/aliyun-assist", "the Alibaba agent", ("alibaba",)),
    ("/usr/local/qcloud/stargate", "the Tencent agent", ("tencent", "tencent-migrate")),
)


def _check_of(id: str) -> Check:
    tool = _TOOLS[id]

    async def check(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
        async for one in _look(subject, target, id, tool):
            yield one

    return check


async def _look(subject: Subject, target: Target, id: str, tool: _Tool) -> AsyncIterator[Outcome]:
    found = False
    wanted_there = id == "sw.hyperv" and target.profile.name == "azure"
    packages = subject.packages.matching(tool.packages)
    if packages:
        found = True
        names = tuple(one.name for one in packages)
        version = packages[0].version
        severity = tool.severity
        if wanted_there or (id == "sw.vmware" and _is_part_of_ubuntu(subject)):
            severity = "info"
        yield failed(
            severity,
            f"{tool.title} are installed ({names[0]}{f' {version}' if version else ''}"
            + (f" and {len(names) - 1} more" if len(names) > 1 else "")
            + ")",
            *(one.where for one in packages[:3]),
            command=subject.distribution.remove(*names),
            remedy=f"Remove {', '.join(names)}.",
        )
    modules = await _foreign_modules(subject, tool)
    for path in modules[:5]:
        found = True
        yield failed(
            "block",
            f"a kernel module of {tool.title} is installed: {path}",
            Evidence(path),
            command=(
                f"{await _uninstall(subject, tool) or f'rm {plain(path)}'} && depmod -a && "
                f"{subject.distribution.update_initramfs('')}"
            ),
        )
    if not packages and not modules:
        for path in tool.files:
            if await exists(subject.view, path):
                found = True
                script = await _uninstall(subject, tool)
                yield failed(
                    tool.severity,
                    f"{tool.title} were installed by hand: {path}",
                    Evidence(path),
                    command=script,
                    remedy=f"Run the uninstaller of {tool.title}.",
                )
                break
    for path, pattern, what in tool.lines:
        folder = path.endswith(".d")
        for text in await texts_in(subject.view, path, ".conf") if folder else (await read_text(subject.view, path),):
            for number, line in text.numbered():
                if re.match(pattern, line):
                    found = True
                    yield failed(
                        "warn",
                        what,
                        text.at(number),
                        command=f"sed -i '{number}s/^/# /' {plain(text.path)}",
                    )
    if found:
        return
    if subject.packages.problem:
        yield unknown(
            f"no trace of {tool.title} in the files, but the packages can't be listed: {subject.packages.problem}",
            remedy=f"Look yourself on that system: rpm -qa --qf '%{{NAME}}\\n' | grep -xE '{tool.packages}'"
            if subject.packages.manager == "rpm"
            else "",
        )
    else:
        yield passed(f"no {tool.title} among {len(subject.packages.installed)} packages")


def _is_part_of_ubuntu(subject: Subject) -> bool:
    return subject.distribution.id == "ubuntu" and bool(subject.packages.matching(r"ubuntu-server"))


async def _foreign_modules(subject: Subject, tool: _Tool) -> list[str]:
    found = []
    for kernel in subject.kernels:
        if not kernel.folder or not tool.modules:
            continue
        for folder in tool.folders:
            names = await names_in(subject.view, f"{kernel.folder}/{folder}")
            matching = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in tool.modules)]
            found += [f"{kernel.folder}/{folder}/{name}" for name in matching]
    return found


async def _uninstall(subject: Subject, tool: _Tool) -> str:
    if tool.uninstall and await exists(subject.view, tool.uninstall.split()[0]):
        return tool.uninstall
    config = await read_text(subject.view, "/var/lib/VBoxGuestAdditions/config")
    if tool is _TOOLS["sw.virtualbox"] and config.lines:
        for line in config.lines:
            if match := re.match(r"INSTALL_DIR='?([\w./-]+)'?$", line):
                return f"{match[1]}/uninstall.sh"
    return ""


async def check_agents(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether agents of other clouds are left."""
    name = target.profile.name
    removed = target.profile.agents.remove
    found = False
    for pattern, title, homes in _AGENTS:
        packages = subject.packages.matching(pattern)
        refused = any(one.name in removed for one in packages)
        if not packages or (not refused and (name in homes or name == "generic")):
            continue
        found = True
        names = tuple(one.name for one in packages)
        yield failed(
            "warn",
            f"{title} is installed ({', '.join(names)})" + (f", which {name} asks to remove" if refused else ""),
            *(one.where for one in packages[:3]),
            command=subject.distribution.remove(*names),
            remedy=f"Remove {', '.join(names)}.",
        )
    for path, title, homes in _AGENT_FILES:
        if name not in homes and name != "generic" and not found and await exists(subject.view, path):
            found = True
            yield failed("warn", f"{title} is installed: {path}", Evidence(path), remedy="Remove it.")
    if not found and subject.packages.problem:
        yield unknown(
            "no trace of an agent of another cloud in the files, but the packages can't be listed: "
            f"{subject.packages.problem}"
        )
    elif not found:
        yield passed("no agent of another cloud was found")


_WHY = {
    "sw.antivirus": (
        "Scanners and intrusion detection stop what an import and a first boot do to a system, and bring modules for "
        "one kernel only. AWS asks to switch them off before an import."
    )
}

RULES = (
    *(
        Rule(
            id=id,
            title=f"no {tool.title}",
            why=_WHY.get(id)
            or (
                f"{tool.title} bring drivers and services that look for their own hypervisor; drivers that are not "
                "part of the kernel can take the place of its own or stop the boot. Packages, traces in the file "
                "system and modules outside of the kernel's own tree are looked for. The guide: uninstall them."
            ),
            check=_check_of(id),
        )
        for id, tool in _TOOLS.items()
    ),
    Rule(
        id="sw.cloudagent",
        title="no agent of another cloud",
        why=(
            "An agent of the cloud that one leaves waits for a metadata server that does not answer, and may undo what "
            "the new one sets up. Some clouds refuse the QEMU guest agent."
        ),
        check=check_agents,
    ),
)
