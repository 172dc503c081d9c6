"""The product as a contender: it writes an export.toml for the run and hands it to `pipeline run`."""

from __future__ import annotations

from collections.abc import Mapping

from perf.case import Attempt, Contender, Ground, ImageFormat, StoredFile, StoredObject
from perf.measure import one

MIB = 1 << 20
MEMORY = 96 * MIB
"""The product's default, written down so that a change of the default does not change what is measured."""
BASE_MEMORY = 128 * MIB
"""What the process may hold on top of `memory`."""

Option = str | bool
StageTable = Mapping[str, Option]


def export_to_file(
    name: str,
    image_format: ImageFormat,
    encode: StageTable,
    *,
    compress: StageTable | None = None,
    memory: int = MEMORY,
    filesystem: str = "",
) -> Contender:
    """Return the contender that exports the disk into a local image file.

    Args:
        filesystem: fills the disk; only the blocks that it uses are exported.
    """

    def prepare(ground: Ground) -> Attempt:
        image = ground.folder / f"image.{image_format}"
        sink: StageTable = {"use": "write.file", "path": str(image), "overwrite": True}
        shaping = [encode, compress] if compress else [encode]
        stored = StoredFile(path=image, format=image_format, filesystem=filesystem)
        return _attempt(ground, [*shaping, sink], memory, stored, blocks="used" if filesystem else "all")

    return Contender(name, prepare, memory_limit=memory + BASE_MEMORY)


def export_to_store(
    name: str, image_format: ImageFormat, encode: StageTable, *, memory: int = MEMORY, rate_limit: str = ""
) -> Contender:
    """Return the contender that streams the disk into the S3 store."""

    def prepare(ground: Ground) -> Attempt:
        if ground.store is None:
            raise ValueError(f"{name} needs a store")
        key = f"ours.{image_format}"
        url = f"s3://{ground.store.bucket}/{key}"
        sink: StageTable = {"use": "write.s3", "url": url, "endpoint": ground.store.endpoint, "overwrite": True}
        if rate_limit:
            sink = {**sink, "rate_limit": rate_limit}
        return _attempt(
            ground, [encode, sink], memory, StoredObject(key=key, format=image_format), ground.store.environment
        )

    return Contender(name, prepare, needs_store=True, memory_limit=memory + BASE_MEMORY)


def export_to_nothing(name: str, encode: StageTable, *, memory: int = MEMORY) -> Contender:
    """Return the contender that reads, digests and encodes the disk and throws the image away."""

    def prepare(ground: Ground) -> Attempt:
        return _attempt(ground, [encode, {"use": "write.null"}], memory, None)

    return Contender(name, prepare, memory_limit=memory + BASE_MEMORY)


def _attempt(
    ground: Ground,
    last_stages: list[StageTable],
    memory: int,
    image: StoredFile | StoredObject | None,
    environment: Mapping[str, str] | None = None,
    blocks: str = "all",
) -> Attempt:
    config = ground.folder / "export.toml"
    stages: list[StageTable] = [
        # Every block, as all rivals but one do it: the same bytes are moved and proven.
        {"use": "read.disk", "path": str(ground.disk), "blocks": blocks},
        {"use": "checksum.guest"},
        {"use": "sparse.zeros"},
        *last_stages,
    ]
    config.write_text(export_toml(stages, memory))
    # The journal goes where the run's other files go, not into the state folder of whoever measures.
    state = {"XDG_STATE_HOME": str(ground.folder / "state")}
    steps = (one(*ground.product, str(config)),)
    return Attempt(
        steps=steps, image=image, environment={**state, **(environment or {})}, explained=_explained(stages, memory)
    )


def _explained(stages: list[StageTable], memory: int) -> str:
    """Say the configuration in a line."""
    words = [
        " ".join(str(value) if name == "use" else f"{name}={value}" for name, value in stage.items())
        for stage in stages
    ]
    return f"    export.toml: memory {memory // MIB} MiB; " + " > ".join(words)


def export_toml(stages: list[StageTable], memory: int) -> str:
    """Write the configuration of one export."""
    lines = ["[export]", 'name = "perf"', f'memory = "{memory // MIB} MiB"']
    for stage in stages:
        lines += ["", "[[stage]]", *(f"{name} = {_value(value)}" for name, value in stage.items())]
    return "\n".join(lines) + "\n"


def _value(value: Option) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
