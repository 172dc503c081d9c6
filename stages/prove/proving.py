"""All steps of a proof, one after the other, over one open image."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field

from pipeline.config.options import without_secrets
from pipeline.errors import FormatError, PipelineError
from pipeline.flow.items import RangeReader
from pipeline.units import format_size
from stages.decode.named import NamedImage, open_files
from stages.decode.refusal import UnsupportedError
from stages.prove.boot import Firmware, Machine, try_boot
from stages.prove.digest import check_digest
from stages.prove.filesystems import DiskReader, check_filesystems
from stages.prove.preflight import check_preflight
from stages.prove.steps import STEPS, Proof, StepName, StepResult, conclude, told_passed
from stages.prove.structure import check_structure
from stages.serve.opening import OpenedDisk, open_disk


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is to be proven, and how.

    Attributes:
        manifest: path or URL of it; empty: beside the image.
        profile: name of a target; empty: none, and preflight only informs.
        machine: what is booted; None: whatever boots the disk has.
    """

    image: NamedImage
    manifest: str = ""
    profile: str = ""
    skip: frozenset[StepName] = frozenset()
    machine: Machine = field(default_factory=Machine)
    firmware_is_told: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ProofReport:
    """The verdict and what it rests on.

    Attributes:
        place: path or URL of the image, as it was named.
        size: of the disk; 0 where the image could not be opened.
        read_bytes, file_bytes: of the image's file: what was read, and how long it is.
    """

    place: str
    format: str
    size: int
    verdict: Proof
    steps: tuple[StepResult, ...]
    read_bytes: int
    file_bytes: int
    elapsed_s: float

    @property
    def sentence(self) -> str:
        """The verdict in one line."""
        if self.verdict == "proven":
            return f"proven: {told_passed(self.steps)}"
        failed = [one for one in self.steps if one.state == "failed"]
        if self.verdict == "disproven":
            return f"disproven by {failed[0].name}: {failed[0].summary}"
        open_questions = [one for one in self.steps if one.state == "unknown"]
        if not open_questions:
            return "could not tell: every step was skipped"
        return f"could not tell: {open_questions[0].name}: {open_questions[0].summary}"


async def prove(
    asked: Asked,
    *,
    on_step: Callable[[StepResult], None] = lambda result: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> ProofReport:
    """Take every step that is not skipped, whatever the others find.

    Raises:
        PlanError, StoreError: the image can't be read.
        FormatError: nobody could tell what it is.
    Cancellation: machines and mounts are gone first.
    """
    begun = time.monotonic()
    results: list[StepResult] = []

    async def step(name: StepName, work: Work) -> None:
        if name in asked.skip:
            result = StepResult(name=name, state="skipped", summary="skipped, as asked")
        else:
            on_note(f"{name} ...")
            result = await take_step(name, work)
        results.append(result)
        on_step(result)

    async with open_files(asked.image) as files:
        format, file_bytes = files.format, files.reader.size
    read_bytes, size = 0, 0
    try:
        async with open_disk(dataclasses.replace(asked.image, format=format)) as opened:
            size = opened.image.size
            for name, work in steps_over(asked, opened, on_note):
                await step(name, work)
            read_bytes = opened.counter.read_bytes
    except FormatError as error:
        if results or isinstance(error, UnsupportedError):
            raise
        # It can't even be opened: that is what structure is about, and nothing else can be told.
        results.append(StepResult(name="structure", state="failed", summary=f"it can't be opened: {error}"))
        on_step(results[-1])
    verdict = conclude(results, preflight_decides=bool(asked.profile))
    return ProofReport(
        place=asked.image.place,
        format=format,
        size=size,
        verdict=verdict,
        steps=tuple(results),
        read_bytes=read_bytes,
        file_bytes=file_bytes,
        elapsed_s=time.monotonic() - begun,
    )


Work = Callable[[], Awaitable[StepResult]]


async def take_step(name: StepName, work: Work) -> StepResult:
    """What a step found, also where it could not be finished: that an image can't be read is no reason to stop."""
    started = time.monotonic()
    try:
        result = await work()
    except UnsupportedError as error:
        result = StepResult(name=name, state="unknown", summary=error.message, hint=error.hint)
    except FormatError as error:
        result = StepResult(name=name, state="failed", summary=f"the image is damaged: {error}")
    except PipelineError as error:
        result = StepResult(name=name, state="unknown", summary=str(error), hint=error.hint)
    return dataclasses.replace(result, elapsed_s=time.monotonic() - started)


def steps_over(
    asked: Asked, opened: OpenedDisk, on_note: Callable[[str], None] = lambda note: None
) -> Sequence[tuple[StepName, Work]]:
    """What each step does over an open image, in order; also those that are to be skipped."""
    disk, files, image = opened.disk, opened.files, asked.image

    async def digest() -> StepResult:
        # By the reader itself: the wrapper that counts does not know a store's receipt.
        async with open_files(dataclasses.replace(image, format=files.format)) as plain:
            return await check_digest(
                plain.reader, image.place, image.endpoint, asked.manifest, on_read=opened.counter.count
            )

    async def preflight() -> StepResult:
        result = await check_preflight(
            DiskReader(disk),
            asked.profile,
            place=without_secrets(image.place),
            format=files.format,
            file_size=opened.counter.size,
        )
        if not asked.profile and result.state in ("failed", "unknown"):
            return dataclasses.replace(result, state="informs")
        return result

    async def boot() -> StepResult:
        machine = asked.machine
        if not asked.firmware_is_told:
            machine = dataclasses.replace(machine, firmware=await firmware_of(DiskReader(disk)))
        before = opened.counter.read_bytes
        result = await try_boot(disk, machine, on_note=on_note)
        fetched = opened.counter.read_bytes - before
        note = f"{format_size(fetched)} of the image were read for it"
        return dataclasses.replace(
            result, details=(*result.details, note), evidence={**result.evidence, "fetched_bytes": str(fetched)}
        )

    made: dict[StepName, Work] = {
        "digest": digest,
        "structure": lambda: check_structure(files),
        "filesystems": lambda: check_filesystems(disk, on_note=on_note),
        "preflight": preflight,
        "boot": boot,
    }
    return [(name, made[name]) for name in STEPS]


async def firmware_of(reader: RangeReader) -> Firmware:
    """What a disk is made for: UEFI where it has an EFI system partition and no boot code in its first sector."""
    from stages.disk.tables import read_table

    esp = ("c12a7328-f81f-11d2-ba4b-00a0c93ec93b", "0xef")
    table = await read_table(reader, reader.size)
    has_esp = any(one.type in esp for one in table.partitions)
    head = await reader.read(0, min(440, reader.size))
    return "uefi" if has_esp and not any(head) else "bios"


def parse_steps(names: Collection[str]) -> frozenset[StepName]:
    """Names of steps, also several with commas between. Raises ValueError for one that is none."""
    found: set[StepName] = set()
    for name in ",".join(names).split(","):
        match = next((one for one in STEPS if one == name.strip()), None)
        if match is not None:
            found.add(match)
        elif name.strip():
            raise ValueError(f'"{name.strip()}" is no step; there are {", ".join(STEPS)}')
    return frozenset(found)
