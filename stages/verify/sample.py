"""Read a part of the stored image back, decode it, and compare it with the disk that was read.

Less than `verify.readback`: it finds an image that is wrong in many places, one that can't be opened, or one of another
disk. A single changed block it finds as likely as the share says. The verdict says how much was compared.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.flow.items import StoredImage, Verdict
from pipeline.flow.stage import STORED_IMAGE, VERDICT, StageContext, StageSpec, option
from pipeline.units import MiB, Size
from stages.checksum.leaves import GUEST_DIGEST
from stages.compress.index import FRAME_INDEX
from stages.verify.comparison import ProgressReport, verify_image
from stages.verify.sampling import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of verify.sample."""

    share: float = option(0.01, doc="How much of what holds data is compared: 0.01 is a hundredth.")
    bytes: Size = option(Size(64 * MiB), doc="At least so much of it, however small the share.")
    seed: str = option("", doc="Another one looks at other places; without it, the disk's digest decides.")
    parallel: int = option(4, doc="Windows of 2 MiB in flight; each holds up to 6 MiB.", minimum=1)

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError("share must lie between 0 and 1, for example 0.01")


class SampleCheck:
    """Compare seeded windows of the stored image with the guest digest."""

    def __init__(self, options: Options, context: StageContext) -> None:
        self._options = options
        self._context = context

    async def verify(self, image: StoredImage) -> Verdict:
        """Read the sample. A damaged image is the verdict "differs", with the reason.

        Raises:
            StoreError: the image can't be read.
        """
        context, options = self._context, self._options
        digest = context.facts.get(GUEST_DIGEST)
        if context.layout is None:
            return Verdict("sample", "unproven", 0.0, detail="the format of the image is not known")
        async with image.open_reader() as reader:
            return await verify_image(
                reader,
                context.layout.format,
                digest,
                virtual_size=context.layout.virtual_size,
                image_size=image.size,
                parallel=options.parallel,
                threads=context.threads,
                ledger=context.ledger,
                progress=ProgressReport(context.name, context.emit, context.clock),
                index=context.facts.find(FRAME_INDEX),
                sample=Sample(seed=options.seed or digest.root, share=options.share, at_least=int(options.bytes)),
            )


SPEC = StageSpec(
    name="verify.sample",
    summary="Read a seeded sample of the stored image back and compare it with the disk; says how much it covers.",
    options=Options,
    takes=STORED_IMAGE,
    gives=VERDICT,
    build=SampleCheck,
    needs=(GUEST_DIGEST,),
)
