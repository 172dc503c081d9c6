"""How a reader says no: the image is damaged, or it uses what is not read here."""

from __future__ import annotations

from pipeline.errors import EXIT_CONFIG, FormatError

_DAMAGED = "The image is damaged, incomplete or made to mislead. Fetch or export it again."


class UnsupportedError(FormatError):
    """The image may be in order, but uses a feature that is not read here, or was not named as it has to be.

    Exits as a plan that does not work: nothing was found out about the image.
    """

    exit_code = EXIT_CONFIG


def corrupt(
    format: str, reason: str, offset: int | None, guest_offset: int | None = None, *, hint: str = ""
) -> FormatError:
    """An error about damage. `offset` is an image offset."""
    return FormatError(
        reason, operation=f"read {format}", offset=offset, guest_offset=guest_offset, hint=hint or _DAMAGED
    )


def unsupported(format: str, feature: str, offset: int | None, *, hint: str = "") -> UnsupportedError:
    """An error about a feature, by its name. `offset` is the image offset of the field that asks for it."""
    return UnsupportedError(
        f"the image uses {feature}, which is not read here",
        operation=f"read {format}",
        offset=offset,
        hint=hint or 'Convert it with "qemu-img convert" first.',
    )


def misnamed(format: str, reason: str, *, hint: str = "Leave it out.") -> UnsupportedError:
    """An error about what the user named for an image that has no use for it, or did not name."""
    return UnsupportedError(reason, operation=f"read {format}", hint=hint)
