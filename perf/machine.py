"""What a report says about the machine it was measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Facts that a reader needs to judge a figure."""

    processor: str
    cores: int
    memory: int
    kernel: str
    filesystem: str
    python: str
    tools: dict[str, str]
    load: float
    """Runnable processes when the run began, averaged over a minute: above 0.5 someone else was working here."""

    def line(self) -> str:
        tools = ", ".join(self.tools.values())
        memory = f"{self.memory / (1 << 30):.0f} GiB"
        return (
            f"{self.processor}, {self.cores} cores, {memory}, Linux {self.kernel}, {self.filesystem}, "
            f"Python {self.python}, {tools}; load {self.load:.1f} at the start"
        )


def this_machine(folder: Path, tools: Iterable[str]) -> Machine:
    """Describe this machine, the filesystem of `folder` and the versions of the tools."""
    return Machine(
        processor=_first(Path("/proc/cpuinfo"), "model name"),
        cores=len(os.sched_getaffinity(0)),
        memory=int(_first(Path("/proc/meminfo"), "MemTotal").split()[0]) * 1024,
        kernel=platform.release().split("-")[0],
        filesystem=_filesystem(folder),
        python=platform.python_version(),
        tools={tool: _version(tool) for tool in sorted(set(tools))},
        load=os.getloadavg()[0],
    )


def _first(file: Path, field: str) -> str:
    for line in file.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return "unknown"


def _filesystem(folder: Path) -> str:
    """Name the type of the filesystem that holds the folder: the longest mount point that is a parent of it."""
    best, kind = "", "unknown"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, found, *_ = line.split()
        if folder.is_relative_to(point) and len(point) >= len(best):
            best, kind = point, found
    return kind


def _version(tool: str) -> str:
    """Return the first line of what the tool says about itself, shortened to name and number."""
    try:
        said = subprocess.run([tool, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    except OSError:
        return f"{Path(tool).name} missing"
    words = said.split("\n", 1)[0].split()
    number = next((word for word in words if any(letter.isdigit() for letter in word)), "unknown version")
    return f"{Path(tool).name} {number.rpartition('/')[2]}"
