"""Rules about drivers: what the hardware over there needs, for every kernel that can boot, and whether it is in time.

The disk's driver must be in the kernel or in the initramfs, with all that it needs; the network card's may lie on the
root filesystem.

Source: Tencent Cloud, "Checking Virtio Drivers in Linux" (213/9929), which looks at the running kernel only and leaves
CONFIG_VIRTIO_PCI out.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from stages.preflight.findings import Evidence, Outcome, Severity, failed, passed, plain, skipped, unknown
from stages.preflight.initramfs import module_name
from stages.preflight.kernels import CONFIG_OF, Kernel, look_into, with_needs
from stages.preflight.menus import version_key
from stages.preflight.rules import Rule, Target
from stages.preflight.subject import Subject
from stages.preflight.texts import exists

_ROOT_KINDS = ("ext4", "xfs", "btrfs", "f2fs", "jfs", "ext3", "ext2")


@dataclass(frozen=True, slots=True)
class _Need:
    """What a kernel needs for one purpose: the alternative that it comes closest to."""

    modules: tuple[str, ...]
    lacking: tuple[str, ...]


def _alternatives(kernel: Kernel, wanted: Sequence[Sequence[str]]) -> _Need:
    """The first alternative of which nothing lacks, else the one of which the least lacks."""
    best: _Need | None = None
    for modules in wanted:
        lacking = tuple(one for one in modules if not _has(kernel, one))
        if best is None or len(lacking) < len(best.lacking):
            best = _Need(tuple(modules), lacking)
    return best or _Need((), ())


def _has(kernel: Kernel, module: str) -> bool:
    """Whether a kernel has a driver at all, as a part of itself or as a module."""
    if kernel.is_builtin(module) or module in kernel.modules:
        return True
    if kernel.folder:
        return False
    # Without a folder of modules nothing but the configuration tells; "m" then means a file that is not there.
    return False


def _tells(kernel: Kernel) -> bool:
    """Whether anything says what a kernel has."""
    return bool(kernel.config) or kernel.builtin is not None or bool(kernel.modules)


def _for_root(subject: Subject) -> tuple[tuple[tuple[str, ...], ...], ...]:
    """What the root filesystem needs besides the disk's driver: for each need its alternatives."""
    root = subject.root
    if root is None:
        return ()
    found: list[tuple[tuple[str, ...], ...]] = []
    if root.kind in ("ext2", "ext3"):
        found.append((("ext4",), (root.kind,)))  # since 2.6.28 one driver mounts all three
    elif root.kind in _ROOT_KINDS:
        found.append(((root.kind,),))
    if root.inside == "lvm":
        found.append((("dm_mod",),))
    return tuple(found)


def _default(kernel: Kernel) -> str:
    return "the default kernel" if kernel.is_default else "the kernel"


async def check_kernels(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether each kernel has the drivers, with the files that they need."""
    drivers = target.profile.drivers
    if not drivers.block and not drivers.net:
        yield skipped(f"{target.profile.name} asks for no drivers")
        return
    if not subject.kernels:
        yield failed(
            "block",
            "no kernel was found in /boot or on the EFI system partition",
            Evidence("/boot"),
            remedy="Mount /boot where it is a partition of its own; else install a kernel"
            + (f": {_another_kernel(subject)}" if _another_kernel(subject) else "."),
        )
        return
    for kernel in subject.kernels:
        where = _places(kernel)
        if not _tells(kernel):
            yield unknown(
                f"nothing says what {_default(kernel)} {kernel.title} has: no configuration, no modules", *where
            )
            continue
        good = True
        weight: Severity = "block" if kernel.is_default else "warn"
        wanted: list[tuple[str, Severity, Sequence[Sequence[str]]]] = [
            (f"the disk of {target.profile.name}", weight, drivers.block),
            (f"the network card of {target.profile.name}", weight, drivers.net),
            *((f"the agent of {target.profile.name}", "warn", [(one,)]) for one in drivers.extra),
            *(("the root filesystem", weight, alternatives) for alternatives in _for_root(subject)),
        ]
        for purpose, severity, alternatives in wanted:
            for module in _alternatives(kernel, alternatives).lacking:
                good = False
                yield _missing(subject, kernel, module, purpose, severity)
        needed = [
            *_needed(kernel, target),
            *(m for ones in _for_root(subject) for m in _alternatives(kernel, ones).modules),
        ]
        kernel = await with_needs(subject.view, kernel, [module_name(one) for one in needed])
        for module in dict.fromkeys(inner for one in needed for inner in kernel.closure(module_name(one))):
            path = kernel.modules.get(module)
            if (
                path is not None
                and not kernel.is_builtin(module)
                and not await exists(subject.view, f"{kernel.folder}/{path}")
            ):
                good = False
                yield failed(
                    "block" if kernel.is_default else "warn",
                    f"{_default(kernel)} {kernel.title}: {path} is listed in modules.dep and not there",
                    Evidence(f"{kernel.folder}/modules.dep"),
                    command=f"depmod {plain(kernel.version)}",
                )
        if good:
            yield passed(f"{_default(kernel)} {kernel.title} has what {target.profile.name} needs", *where)


def _places(kernel: Kernel) -> tuple[Evidence, ...]:
    return kernel.config_at("CONFIG_VIRTIO_BLK") or ((kernel.entries[0].where,) if kernel.entries else ())


def _needed(kernel: Kernel, target: Target) -> list[str]:
    drivers = target.profile.drivers
    return [*_alternatives(kernel, drivers.block).modules, *_alternatives(kernel, drivers.net).modules]


def _missing(subject: Subject, kernel: Kernel, module: str, purpose: str, severity: Severity) -> Outcome:
    option = CONFIG_OF.get(module, "")
    value = kernel.config.get(option, "")
    where = kernel.config_at(option) if option in kernel.config_lines else ()
    if not kernel.config and kernel.builtin is None:
        return unknown(
            f"whether {_default(kernel)} {kernel.title} has {module}, which {purpose} needs, can't be told: it is no "
            "module, and nothing lists what is built in",
            *((kernel.entries[0].where,) if kernel.entries else ()),
            remedy=f"Put its configuration into /boot/config-{kernel.version}.",
        )
    if value == "m":
        reason = f"{option}=m, and there is no {module}.ko below {kernel.folder or '/lib/modules'}"
    elif value == "n":
        reason = f"{option} is not set"
    elif not kernel.folder:
        reason = f"it is not built in, and there is no /lib/modules/{kernel.version}"
    else:
        reason = f"it is neither built in nor below {kernel.folder}"
        where = where or (Evidence(f"{kernel.folder}/modules.dep"),)
    kind = " (a kernel for Xen guests only)" if "xen" in kernel.version.lower() else ""
    if module.startswith("virtio") and _is_too_old(kernel.version):
        kind = " (older than 2.6.25, the first with virtio)"
    return failed(
        severity,
        f"{_default(kernel)} {kernel.title}{kind} has no {module}, which {purpose} needs: {reason}",
        *where,
        command=_another_kernel(subject),
        remedy="Install the distribution's own kernel.",
    )


def _is_too_old(version: str) -> bool:
    match = re.match(r"2\.6\.(\d+)", version)
    return bool(match and int(match[1]) < 25) or version.startswith(("2.4.", "2.2."))


def _another_kernel(subject: Subject) -> str:
    family = subject.distribution.family
    packages = {
        "debian": "linux-image-generic" if subject.distribution.id == "ubuntu" else "linux-image-amd64",
        "rhel": "kernel",
        "suse": "kernel-default",
        "alpine": "linux-virt",
        "arch": "linux",
    }
    return subject.distribution.install(packages[family]) if family in packages else ""


async def check_initramfs(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether the way to the root filesystem is in the kernel or in its initramfs."""
    if not target.profile.drivers.block:
        yield skipped(f"{target.profile.name} asks for no drivers")
        return
    if not subject.kernels:
        yield unknown("no kernel was found")
        return
    for kernel in subject.kernels:
        if not _tells(kernel):
            yield unknown(f"nothing says what {_default(kernel)} {kernel.title} needs from an initramfs")
            continue
        severity: Severity = "block" if kernel.is_default or len(subject.kernels) == 1 else "warn"
        drivers = _alternatives(kernel, target.profile.drivers.block).modules
        # What the kernel lacks altogether is told by the rule about kernels.
        for_root = [one for alternatives in _for_root(subject) for one in _alternatives(kernel, alternatives).modules]
        on_the_way = [*drivers, *(one for one in for_root if _has(kernel, one))]
        kernel = await with_needs(subject.view, kernel, [module_name(one) for one in on_the_way])
        wanted = frozenset(
            one for module in on_the_way if not kernel.is_builtin(module) for one in kernel.closure(module)
        )
        if not wanted:
            yield passed(f"{_default(kernel)} {kernel.title} has {', '.join(on_the_way)} built in")
            continue
        if not kernel.initrds:
            yield failed(
                severity,
                f"{_default(kernel)} {kernel.title} has no initramfs, and {', '.join(sorted(wanted))} are modules",
                *((kernel.entries[0].where,) if kernel.entries else ()),
                command=subject.distribution.update_initramfs(kernel.version),
            )
            continue
        contents, problem = await look_into(subject.view, kernel, wanted)
        where = Evidence(kernel.initrds[-1].path)
        lacking = sorted(one for one in wanted if not contents.has_module(kernel.version, one))
        if not lacking:
            yield passed(f"{where.file} has {', '.join(sorted(wanted))}", where)
        elif problem:
            yield unknown(
                f"what the initramfs of {kernel.title} holds could not be told: {problem}",
                where,
                remedy=subject.distribution.update_initramfs(kernel.version),
            )
        else:
            others = sorted(one for one in contents.modules if one != kernel.version)
            why = (
                f"; its modules are for {', '.join(others)}"
                if others and kernel.version not in contents.modules
                else ""
            )
            yield failed(
                severity,
                f"{where.file} lacks {', '.join(lacking)}: {_default(kernel)} {kernel.title} does not find its "
                f"disk{why}",
                where,
                command=subject.distribution.add_to_initramfs(tuple(drivers), kernel.version),
            )


async def check_default(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether the kernel that starts by itself is the one that should."""
    if not subject.kernels:
        yield unknown("no kernel was found")
        return
    default = next((one for one in subject.kernels if one.is_default), None)
    if default is None:
        yield skipped("no boot menu says which kernel starts by itself")
        return
    where = default.entries[0].where if default.entries else Evidence(default.image)
    wanted = (target.profile.drivers.block, target.profile.drivers.net)
    fit = [one for one in subject.kernels if not any(_alternatives(one, ones).lacking for ones in wanted)]
    better = max((one for one in fit if not _is_debug(one)), key=lambda one: version_key(one.version), default=None)
    if better is None or better.version == default.version:
        yield passed(f"{default.title} starts by itself", where)
    elif default not in fit:
        yield failed(
            "warn",
            f"{default.title} starts by itself and lacks drivers; {better.title} has them",
            where,
            remedy=_start_with(subject, better),
        )
    elif _is_debug(default):
        yield failed("warn", f"a kernel for debugging starts by itself: {default.title}", where,
                     remedy=_start_with(subject, better))  # fmt: skip
    else:
        yield failed("info", f"{default.title} starts by itself; {better.title} is newer", where,
                     remedy=_start_with(subject, better))  # fmt: skip


def _is_debug(kernel: Kernel) -> bool:
    return re.search(r"\bdebug\b|\bdbg\b", kernel.version) is not None


def _start_with(subject: Subject, kernel: Kernel) -> str:
    """How one makes a kernel the default, in words: menus differ too much for one command."""
    if subject.distribution.family == "rhel":
        return f"grubby --set-default {kernel.image}"
    title = next((one.title for one in kernel.entries if one.title), kernel.version)
    return f'Make "{title}" the default of the boot menu (GRUB_DEFAULT in /etc/default/grub), or remove the other.'


async def check_blacklist(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether nothing keeps a needed driver from being loaded."""
    drivers = target.profile.drivers
    wanted = {module_name(one) for group in (*drivers.block, *drivers.net) for one in group} | set(drivers.extra)
    if not wanted:
        yield skipped(f"{target.profile.name} asks for no drivers")
        return
    found = False
    builtin = {one for one in wanted if subject.kernels and all(kernel.is_builtin(one) for kernel in subject.kernels)}
    for module in sorted(wanted):
        for where in subject.blacklist.modules.get(module, ()):
            found = True
            yield failed(
                "info" if module in builtin else "block",
                f"{module} is blacklisted" + (", and built in all the same" if module in builtin else ""),
                where,
                command=f"sed -i '{where.line}d' {plain(where.file)} && {subject.distribution.update_initramfs('')}",
            )
    for entry in subject.menus.entries:
        for name in ("modprobe.blacklist", "module_blacklist", "rd.driver.blacklist"):
            refused = {module_name(one) for value in entry.values(name) for one in value.split(",")} & wanted
            for module in sorted(refused - builtin):
                found = True
                yield failed(
                    "block" if entry.is_default else "warn",
                    f"the kernel line refuses {module}: {name}",
                    entry.where,
                    command=f"sed -i 's# *{name}=[^ \"]*##' /etc/default/grub && {subject.distribution.update_menu}",
                )
    if not found:
        yield passed(f"nothing keeps {', '.join(sorted(wanted))} from being loaded")


RULES = (
    Rule(
        id="drv.virtio.kernel",
        title="every kernel can drive the hardware over there",
        why=(
            'Without a driver for its disk a kernel stops with "unable to mount root fs". For each kernel that a menu '
            "starts, its configuration, modules.builtin, modules.dep and the files named there are read. The guide's "
            "document looks at the running kernel only, and forgets virtio_pci."
        ),
        check=check_kernels,
    ),
    Rule(
        id="drv.virtio.initramfs",
        title="the initramfs finds the disk over there",
        why=(
            "A driver that is a module must be in the initramfs, with every module that it needs: what lies on the "
            "root filesystem comes too late. Every archive of the initramfs is walked through, whatever packed it."
        ),
        check=check_initramfs,
    ),
    Rule(
        id="drv.virtio.default",
        title="the best kernel starts by itself",
        why=(
            "A boot menu may start an older kernel, one for debugging or one without the drivers while a better one is "
            "installed. The best one is the newest with the drivers of the target that is not made for debugging."
        ),
        check=check_default,
    ),
    Rule(
        id="drv.virtio.blacklist",
        title="nothing keeps a needed driver from being loaded",
        why="A blacklist in modprobe.d or on the kernel line keeps udev from loading a driver that is there.",
        check=check_blacklist,
    ),
)
