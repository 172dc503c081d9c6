"""A proof for people and programs: JUnit XML, and one HTML page that loads nothing.

Source: the JUnit XML that continuous integration reads (testsuite, testcase, failure, error, skipped). All that comes
from the image is escaped: a guest's console is data that a stranger chose.
"""

from __future__ import annotations

import base64
import re
from html import escape
from pathlib import Path
from xml.sax.saxutils import quoteattr

import pipeline.observe
from pipeline import __version__
from pipeline.config.options import without_secrets
from pipeline.observe.drawing import icon
from pipeline.units import format_duration, format_exact, format_size
from stages.prove.proving import ProofReport
from stages.prove.steps import StepResult

_WORDS = {
    "passed": ("good", "passed"),
    "failed": ("bad", "failed"),
    "unknown": ("warn", "could not tell"),
    "informs": ("warn", "for your information"),
    "skipped": ("", "skipped"),
}
_VERDICTS = {
    "proven": ("good", "Proven"),
    "disproven": ("bad", "Disproven"),
    "unknown": ("warn", "Could not tell"),
}
_XML_LOG = 64 * 1024
_NOT_XML = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_STYLE = """
.step { display: flex; gap: 10px; align-items: baseline; flex-wrap: wrap; }
.step h2 { text-transform: capitalize; }
.tag { padding: 1px 10px; border-radius: 999px; font-size: 14px; font-weight: 600; background: var(--track); }
.tag.good { background: var(--good-soft); } .tag.warn { background: var(--warn-soft); }
.tag.bad { background: var(--bad-soft); }
ul.plain { margin: 8px 0 0; padding-left: 20px; }
pre { margin: 12px 0 0; padding: 12px; max-height: 420px; overflow: auto; border-radius: 8px; background: var(--track);
  font: 13px/1.45 ui-monospace, "SF Mono", "Cascadia Mono", "DejaVu Sans Mono", monospace; white-space: pre-wrap; }
img.screen { display: block; max-width: 100%; margin-top: 12px; border-radius: 8px; border: 1px solid var(--line); }
details summary { cursor: pointer; margin-top: 12px; }
"""


def junit(report: ProofReport) -> str:
    """The proof as a test suite: a step is a test; what could not be told is an error, not a failure."""
    place = without_secrets(report.place)
    steps = report.steps
    counts = (
        f'tests="{len(steps)}" failures="{_count(steps, "failed")}" errors="{_count(steps, "unknown")}" '
        f'skipped="{_count(steps, "skipped")}" time="{report.elapsed_s:.3f}"'
    )
    cases = "".join(_case(one, place) for one in steps)
    head = '<?xml version="1.0" encoding="UTF-8"?>\n'
    return f"{head}<testsuite name={quoteattr(_xml(f'prove {place}'))} {counts}>\n{cases}</testsuite>\n"


def _count(steps: tuple[StepResult, ...], state: str) -> int:
    return sum(one.state == state for one in steps)


def _case(step: StepResult, place: str) -> str:
    told = "\n".join((step.summary, *step.details, *((step.hint,) if step.hint else ())))
    inner = ""
    if step.state in ("failed", "unknown"):
        tag = "failure" if step.state == "failed" else "error"
        inner += f"<{tag} message={quoteattr(_xml(step.summary))}>{escape(_xml(told))}</{tag}>"
    elif step.state == "skipped":
        inner += f"<skipped message={quoteattr(_xml(step.summary))}/>"
    log = "" if step.state in ("failed", "unknown") else told + "\n"
    inner += f"<system-out>{escape(_xml(log + step.log[-_XML_LOG:]))}</system-out>"
    classname = quoteattr(_xml(place))
    return f'<testcase classname={classname} name="{step.name}" time="{step.elapsed_s:.3f}">{inner}</testcase>\n'


def _xml(text: str) -> str:
    """Without what XML can't hold (XML 1.0, section 2.2)."""
    return _NOT_XML.sub("?", text)


def page(report: ProofReport) -> str:
    """The proof as a page for a browser."""
    tone, word = _VERDICTS[report.verdict]
    place = without_secrets(report.place)
    style = (Path(pipeline.observe.__file__).parent / "report.css").read_text(encoding="utf-8")
    parts = [
        "<header>",
        f'<p class="kicker">Proof of an image</p><h1>{escape(place)}</h1>',
        f'<p class="verdict {tone}">{icon(tone)}{word}</p>',
        f"<p>{escape(report.sentence)}</p>",
        "</header>",
        _figures(report),
        *(_section(one) for one in report.steps),
        f'<p class="soft small" style="margin-top:16px">disk-pipeline {escape(__version__)}</p>',
    ]
    title = escape(f"{word}: {place}")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        f'<link rel="icon" href="data:,">\n<title>{title}</title>\n<style>\n{style}{_STYLE}</style>\n</head>\n<body>\n'
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _figures(report: ProofReport) -> str:
    share = f"{100 * report.read_bytes / report.file_bytes:.1f} %" if report.file_bytes else ""
    figures = (
        ("Disk", format_size(report.size), f"{report.size} bytes, {report.format}"),
        ("Read of the image", format_size(report.read_bytes), f"{share} of {format_size(report.file_bytes)}"),
        ("Time", format_duration(report.elapsed_s), ""),
    )
    cells = "".join(
        f'<div><dt>{name}</dt><dd class="large">{escape(value)}</dd><dd class="soft small">{escape(more)}</dd></div>'
        for name, value, more in figures
    )
    return f'<dl class="figures">{cells}</dl>'


def _section(step: StepResult) -> str:
    tone, word = _WORDS[step.state]
    lines = [
        f'<div class="step"><h2>{step.name}</h2><span class="tag {tone}">{word}</span>'
        f'<span class="soft small">{escape(format_duration(step.elapsed_s)) if step.elapsed_s else ""}</span></div>',
        f"<p>{escape(step.summary)}</p>",
    ]
    if step.hint:
        lines.append(f'<p class="soft">{escape(step.hint)}</p>')
    if step.details:
        lines.append(f'<ul class="plain">{"".join(f"<li>{escape(one)}</li>" for one in step.details)}</ul>')
    if step.screen:
        data = base64.b64encode(step.screen).decode()
        lines.append(f'<img class="screen" alt="the guest\'s last screen" src="data:image/png;base64,{data}">')
    if step.log:
        title = "Serial console" if step.name == "boot" else "What the checkers said"
        is_open = " open" if step.state in ("failed", "unknown") else ""
        lines.append(f"<details{is_open}><summary>{title}</summary><pre>{escape(step.log)}</pre></details>")
    return f"<section>{''.join(lines)}</section>"


def lines_of(step: StepResult) -> list[str]:
    """A step for a terminal."""
    marks = {"passed": "ok", "failed": "FAILED", "unknown": "?", "informs": "note", "skipped": "-"}
    first = f"{marks[step.state]:<7} {step.name:<12} {step.summary}"
    more = [f"{'':<20} {line}" for line in (*step.details, *((step.hint,) if step.hint else ()))]
    return [_printable(line) for line in (first, *more)]


def figures_line(report: ProofReport) -> str:
    """What was read."""
    return (
        f"read {format_exact(report.read_bytes)} of an image of {format_exact(report.file_bytes)} "
        f"in {format_duration(report.elapsed_s)}"
    )


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)
