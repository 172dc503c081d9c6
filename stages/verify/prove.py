"""Prove the sealed image: structure, filesystems and, where asked, a boot; disproven, it is not published."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pipeline.flow.items import StoredImage, Verdict
from pipeline.flow.stage import STORED_IMAGE, VERDICT, StageContext, StageSpec, option
from pipeline.units import Duration, MiB, Size
from stages.compress.index import FRAME_INDEX

if TYPE_CHECKING:
    from stages.prove.steps import StepResult
    from stages.serve.opening import OpenedDisk


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of verify.prove."""

    skip: tuple[str, ...] = option(("preflight",), doc="Steps not to take: structure, filesystems, preflight, boot.")
    firmware: Literal["auto", "bios", "uefi"] = option("auto", doc="To boot with; auto: as the disk is made for.")
    pattern: str = option("", doc="A regular expression for console or screen that means that it came up.")
    timeout: Duration = option(Duration(120.0), doc="How long the boot may take.")
    memory: Size = option(Size(1024 * MiB), doc="Of the machine that is booted; not part of the run's memory.")

    def __post_init__(self) -> None:
        from stages.prove.steps import STEPS

        unknown = set(self.skip) - set(STEPS)
        if unknown:
            raise ValueError(f'"{min(unknown)}" is no step; there are {", ".join(STEPS)}')
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern is no regular expression: {error}") from None


class Proof:
    """Take the steps of `pipeline prove` on what was just stored. The digest is the other stages' matter."""

    def __init__(self, options: Options, context: StageContext) -> None:
        self._options = options
        self._context = context

    async def verify(self, image: StoredImage) -> Verdict:
        """As `pipeline prove` says; whether the image is the disk is not looked at, and not said.

        Raises:
            StoreError: the image can't be opened.
        """
        from pipeline.errors import FormatError
        from stages.decode.refusal import UnsupportedError
        from stages.prove.steps import conclude, told_passed

        if self._context.layout is None:
            return Verdict("prove", "unknown", 0.0, detail="the format of the image is not known")
        results: list[StepResult] = []
        try:
            async with self._opened(image) as opened:
                await self._take_steps(opened, results)
        except UnsupportedError as error:
            return Verdict("prove", "unknown", 0.0, detail=f"{error.message}. {error.hint}".strip())
        except FormatError as error:
            return Verdict("prove", "disproven", 0.0, detail=f"the stored image can't be read: {error}")
        verdict = conclude(results, preflight_decides=False)
        evidence: dict[str, str] = {one.name: f"{one.state}: {one.summary}" for one in results}
        if verdict == "proven":
            # The digest is for others to compare; preflight only informs here.
            passed = told_passed(results, ("structure", "filesystems", "boot"))
            return Verdict("prove", "proven", 0.0, detail=f"proven by {passed}", evidence=evidence)
        wanted = "failed" if verdict == "disproven" else "unknown"
        decisive = next((one for one in results if one.state == wanted), None)
        detail = (
            f"{decisive.name}: {decisive.summary}. {decisive.hint}".strip() if decisive else "every step was skipped"
        )
        return Verdict("prove", verdict, 0.0, detail=detail, evidence=evidence)

    @asynccontextmanager
    async def _opened(self, image: StoredImage) -> AsyncIterator[OpenedDisk]:
        from stages.decode.named import NamedImage, OpenedFiles
        from stages.serve.cache import CachedImage
        from stages.serve.opening import OpenedDisk, counted

        layout = self._context.layout
        assert layout is not None, "looked at before"
        async with image.open_reader() as reader:
            counter = counted(reader)
            files = OpenedFiles(
                named=NamedImage(place=image.uri, format=layout.format),
                reader=counter,
                format=layout.format,
                note="",
                extents=(),
                index=self._context.facts.find(FRAME_INDEX),
                backing=None,
            )
            decoded = await files.open_image()
            yield OpenedDisk(files=files, image=decoded, disk=CachedImage(decoded), counter=counter)

    async def _take_steps(self, opened: OpenedDisk, results: list[StepResult]) -> None:
        from stages.prove.boot import Machine
        from stages.prove.proving import Asked, parse_steps, steps_over, take_step

        options = self._options
        machine = Machine(
            firmware=options.firmware if options.firmware != "auto" else "bios",
            memory=int(options.memory),
            timeout_s=float(options.timeout),
            pattern=re.compile(options.pattern) if options.pattern else None,
        )
        asked = Asked(
            image=opened.files.named,
            skip=parse_steps(options.skip) | {"digest"},
            machine=machine,
            firmware_is_told=options.firmware != "auto",
        )
        for name, work in steps_over(asked, opened):
            if name not in asked.skip:
                results.append(await take_step(name, work))


def _missing(options: Options) -> str:
    """Said before the start: a proof that can't be had is better known before hours of upload than after."""
    from stages.prove.boot import Machine, why_not
    from stages.prove.checkers import why_no_files

    found = why_no_files() if "filesystems" not in options.skip else None
    if "boot" not in options.skip:
        firmware = options.firmware if options.firmware != "auto" else "bios"
        found = why_not(Machine(firmware=firmware)) or found
    return f"verify.prove will not be able to tell: {found[0]}. {found[1]}" if found else ""


SPEC = StageSpec(
    name="verify.prove",
    summary="Prove the stored image: its structure, its filesystems by their own checkers, and a boot. Needs qemu.",
    options=Options,
    takes=STORED_IMAGE,
    gives=VERDICT,
    build=Proof,
    missing=_missing,
)
