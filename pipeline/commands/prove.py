"""`pipeline prove`: one verdict on an image, where it is stored: digest, structure, filesystems, preflight, a boot."""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.commands.console import Console, ca_file_option, run_async, until_interrupted, verb
from pipeline.config.options import without_secrets
from pipeline.errors import EXIT_DIFFERS, EXIT_FAILED, EXIT_OK, ConfigError, Fault, FormatError, PipelineError
from pipeline.units import MiB, parse_duration, parse_size

if TYPE_CHECKING:
    from stages.prove.boot import Machine
    from stages.prove.proving import Asked, ProofReport
    from stages.prove.steps import StepResult

_EXIT_CODES = {"proven": EXIT_OK, "disproven": EXIT_DIFFERS, "unknown": EXIT_FAILED}


@click.command("prove")
@click.argument("image", metavar="IMAGE|URL")
@click.option("--profile", default="", metavar="NAME", help="A target cloud: its hardware is booted, its rules decide.")
@click.option(
    "--pattern", metavar="REGEX", help="What on console or screen means that it came up; else a login prompt."
)
@click.option("--timeout", default="120", show_default=True, metavar="S", help="For the boot, in seconds or as 3min.")
@click.option("--skip", multiple=True, metavar="STEP", help="digest, structure, filesystems, preflight or boot.")
@click.option("--firmware", type=click.Choice(["bios", "uefi"]), help="To boot with; else as the disk is made for.")
@click.option("--memory", default="1 GiB", show_default=True, metavar="SIZE", help="Of the machine that is booted.")
@click.option("--kvm", is_flag=True, help="Boot with the processor's virtualisation; it has to work here.")
@click.option("--manifest", default="", metavar="FILE|URL", help="Where it does not lie beside the image.")
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write an HTML page.")
@click.option("--junit", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write JUnit XML.")
@click.option("-f", "--format", default="auto", metavar="FMT", help="Of the image; else told once by its first bytes.")
@click.option("--extent", "extents", multiple=True, metavar="FILE", help="A VMDK's other file.")
@click.option("--member", default="", metavar="NAME", help="The disk inside of an OVA that has several.")
@click.option("--endpoint", default="", metavar="URL", help="Of an S3-compatible store.")
@ca_file_option
@verb
def command(console: Console, image: str, **options: Any) -> int:
    """Prove that an image is what it should be and boots, by ranges, without downloading or changing it.

    Exits 0 when it is proven, 3 when it is disproven, 1 when that could not be told: which step, and what to install.
    """
    asked = _asked(image, options)
    return run_async(partial(_prove, console, asked, options["report"], options["junit"]))


def _asked(image: str, options: dict[str, Any]) -> Asked:
    from stages.decode.named import NamedImage
    from stages.prove.boot import Machine
    from stages.prove.preflight import video_of
    from stages.prove.proving import Asked, parse_steps

    faults: list[Fault] = []

    def parsed(name: str, parse: Any, text: Any) -> Any:
        try:
            return parse(text)
        except (ValueError, re.error) as error:
            faults.append(Fault(reason=str(error), file=f"--{name}"))
            return None

    timeout = parsed(
        "timeout", lambda text: float(text) if text.isdigit() else parse_duration(text), options["timeout"]
    )
    memory = parsed("memory", parse_size, options["memory"])
    pattern = parsed("pattern", re.compile, options["pattern"]) if options["pattern"] else None
    skip = parsed("skip", parse_steps, options["skip"])
    if faults:
        raise ConfigError(faults)
    machine: Machine = Machine(
        firmware=options["firmware"] or "bios",
        video="std" if video_of(options["profile"]) not in ("", "cirrus") else "cirrus",
        memory=max(128 * MiB, memory),
        timeout_s=float(timeout),
        pattern=pattern,
        kvm=options["kvm"],
    )
    names = ("format", "extents", "member", "endpoint", "ca_file")
    return Asked(
        image=NamedImage(place=image, **{name: options[name] for name in names}),
        manifest=options["manifest"],
        profile=options["profile"],
        skip=skip,
        machine=machine,
        firmware_is_told=options["firmware"] is not None,
    )


async def _prove(console: Console, asked: Asked, html: Path | None, junit: Path | None) -> int:
    work = partial(_work, console, asked, html, junit)
    return await until_interrupted(work, console, cleaned="nothing was changed")


async def _work(console: Console, asked: Asked, html: Path | None, junit: Path | None) -> int:
    from stages.prove.proving import prove
    from stages.prove.report import figures_line
    from stages.prove.report import junit as junit_of
    from stages.prove.report import page as page_of

    console.say(without_secrets(asked.image.place))
    try:
        report = await prove(asked, on_step=partial(_tell_step, console), on_note=partial(_note, console))
    except FormatError as error:
        # Nothing was found out about the image: that is not "disproven".
        raise PipelineError(
            error.message, operation=error.operation, hint=error.hint or "Say with -f what it is.", **error.context
        ) from None
    for path, made in ((html, page_of), (junit, junit_of)):
        if path is not None:
            _write(path, made(report))
    _tell(console, report)
    console.say(f"{report.sentence}")
    console.say(f"  {figures_line(report)}")
    return _EXIT_CODES[report.verdict]


def _note(console: Console, note: str) -> None:
    import sys

    if sys.stderr.isatty():
        console.note(f"  {note}")


def _tell_step(console: Console, step: StepResult) -> None:
    from stages.prove.report import lines_of

    fields = dataclasses.asdict(step)
    fields["screen_bytes"] = len(fields.pop("screen"))
    console.tell("step", **fields)
    for line in lines_of(step):
        console.say(line)


def _tell(console: Console, report: ProofReport) -> None:
    console.tell(
        "proved",
        image=without_secrets(report.place),
        verdict=report.verdict,
        sentence=report.sentence,
        steps={one.name: one.state for one in report.steps},
        format=report.format,
        size=report.size,
        read_bytes=report.read_bytes,
        file_bytes=report.file_bytes,
        elapsed_s=report.elapsed_s,
    )


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise PipelineError(f"{path} can't be written: {error.strerror}", operation="prove") from None
