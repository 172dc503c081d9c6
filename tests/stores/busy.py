"""A store that answers 503 to every part above a rate, in a process of its own: for measurements."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import anyio

from tests.stores.faults import AboveRate, Rule, slow_down
from tests.stores.process import Command, ServerProcess, fresh_folder
from tests.stores.proxy import FaultProxy


@contextmanager
def running_busy_proxy(upstream_port: int, parts_per_s: float) -> Iterator[int]:
    """Run the proxy before a store; gives the port for clients."""
    folder = fresh_folder("busy")
    port_file = folder / "port"
    arguments = [sys.executable, "-m", "tests.stores.busy", str(upstream_port), str(parts_per_s), str(port_file)]
    process = ServerProcess(
        folder=folder,
        commands=[Command(name="busy", arguments=tuple(arguments), environment={"PYTHONPATH": ":".join(sys.path)})],
        is_ready=port_file.exists,
    )
    process.start()
    try:
        yield int(port_file.read_text())
    finally:
        process.kill()


async def _run(upstream_port: int, parts_per_s: float, port_file: str) -> None:
    # Half a second of its rate at once, two parts at the least: stores count over some time.
    rate = AboveRate(parts_per_s, burst=max(2.0, parts_per_s / 2))
    rule = Rule(slow_down(), method="PUT", query="partNumber=", when=rate)
    async with FaultProxy(upstream_port, rules=[rule]) as proxy:
        path = anyio.Path(port_file)
        fresh = path.with_suffix(".new")
        await fresh.write_text(str(proxy.port))
        await fresh.rename(path)
        await anyio.sleep_forever()


def main() -> None:
    """Run the proxy until the process is killed."""
    parser = argparse.ArgumentParser(description="Pass HTTP on to a store, and refuse parts above a rate.")
    parser.add_argument("upstream_port", type=int)
    parser.add_argument("parts_per_s", type=float)
    parser.add_argument("port_file", help="the port for clients is written here")
    given = parser.parse_args()
    anyio.run(_run, given.upstream_port, given.parts_per_s, given.port_file)


if __name__ == "__main__":
    main()
