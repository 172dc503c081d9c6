"""Rules about drivers: what the hardware over there needs, for every kernel that can boot, and whether it is in time.

The disk's driver must be in the kernel or in the initramfs, with all that it needs; the network card's may lie on the
root filesystem.

Source: Tencent Cloud, "Checking Virtio Drivers in Linux" (213/9929), which looks at the running kernel only and leaves
CONFIG_VIRTIO_PCI out.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from stages.preflight.findings import Evidence, Outcome, Severity, failed, passed, plain, skipped, unknown
from stages.preflight.initramfs import module_name
from stages.preflight.kernels import CONFIG_OF, Kernel, look_into, with_needs
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


def _for_root(subject: Subject) -> tuple[str, ...]:
    """Modules that the root filesystem needs besides the disk's driver."""
    root = subject.root
    if root is None:
        return ()
    found = ["ext4" if root.kind in ("ext2", "ext3") else root.kind] if root.kind in _ROOT_KINDS else []
    if root.inside == "lvm":
        found.append("dm_mod")
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
            remedy="Export the whole system, with its /boot.",
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
        fallback: Severity
        for purpose, wanted, fallback in (
            ("disk", drivers.block, "block"),
            ("network card", drivers.net, "block" if kernel.is_default else "warn"),
            ("agent", tuple((one,) for one in drivers.extra), "warn"),
        ):
            for need in (
                [_alternatives(kernel, wanted)]
                if purpose != "agent"
                else [_alternatives(kernel, [one]) for one in wanted]
            ):
                for module in need.lacking:
                    good = False
                    severity = fallback if kernel.is_default or purpose != "disk" else "warn"
                    yield _missing(subject, target, kernel, module, purpose, severity)
        for module in dict.fromkeys(_needed(kernel, subject, target)):
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


def _needed(kernel: Kernel, subject: Subject, target: Target) -> list[str]:
    drivers = target.profile.drivers
    return [*_alternatives(kernel, drivers.block).modules, *_alternatives(kernel, drivers.net).modules]


def _missing(
    subject: Subject, target: Target, kernel: Kernel, module: str, purpose: str, severity: Severity
) -> Outcome:
    option = CONFIG_OF.get(module, "")
    value = kernel.config.get(option, "")
    where = kernel.config_at(option) if option in kernel.config_lines else ()
    if value == "m":
        reason = f"{option}=m, and there is no {module}.ko below {kernel.folder or '/lib/modules'}"
    elif value == "n":
        reason = f"{option} is not set"
    elif not kernel.folder:
        reason = f"it is not built in, and there is no /lib/modules/{kernel.version}"
    else:
        reason = f"it is neither built in nor below {kernel.folder}"
        where = where or (Evidence(f"{kernel.folder}/modules.dep"),)
    xen = " (a kernel for Xen guests only)" if "xen" in kernel.version.lower() else ""
    return failed(
        severity,
        f"{_default(kernel)} {kernel.title}{xen} has no {module}, which the {purpose} of {target.profile.name} needs: "
        f"{reason}",
        *where,
        command=_another_kernel(subject),
        remedy="Install the distribution's own kernel.",
    )


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
        on_the_way = [*drivers, *(one for one in _for_root(subject) if _has(kernel, one))]
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
        id="drv.virtio.blacklist",
        title="nothing keeps a needed driver from being loaded",
        why="A blacklist in modprobe.d or on the kernel line keeps udev from loading a driver that is there.",
        check=check_blacklist,
    ),
)
