"""A federated arm in one process, with the bytes of every message that passed between its coordinator and its sites."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wardround.engines.local import LocalEngine
from wardround.federation.coordinator import Coordinator
from wardround.federation.exchange import UPDATE, Engine, ExchangeFactory, PlainSum
from wardround.federation.parts import LACKS
from wardround.runs.machine import Machine
from wardround.storage.journal import Journal
from wardround.study.schema import Study
from wardround.study.sites import SiteData, SitesFile
from wardround.wire.message import Message

# The kind of a request, its site and its round.
Key = tuple[str, str, int]


@dataclass
class Counting:
    """An engine, and bytes by request: of the requests themselves (`down`) and of what answered them (`up`)."""

    engine: Engine
    down: dict[Key, int] = field(default_factory=lambda: defaultdict(int))
    up: dict[Key, int] = field(default_factory=lambda: defaultdict(int))

    def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
        """What the engine gives; a site's refusal ends the benchmark."""
        for message in messages:
            key = (message.header.kind, message.header.site, message.header.round)
            self.down[key] += message.nbytes
            for reply in self.engine.exchange([message]):
                if reply.header.kind not in (UPDATE, LACKS):
                    raise SystemExit(f"site {reply.header.site}: {reply.header.meta.get('reason')}")
                self.up[key] += reply.nbytes
                yield reply

    def close(self) -> None:
        """Close the engine."""
        self.engine.close()

    def largest(self, bytes_of: dict[Key, int], kind: str) -> int:
        """The most bytes of a request of a kind, or of an answer to one."""
        return max(nbytes for key, nbytes in bytes_of.items() if key[0] == kind)


def counted(
    study: dict[str, Any], protocol: Callable[[Path], ExchangeFactory] = lambda _: PlainSum
) -> tuple[Counting, Machine]:
    """The bytes of a study's federated arm over all its rounds, and the machine that had its sites.

    `protocol` gets a folder for what it keeps.
    """
    read = Study.model_validate(study)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        for name in read.sites:
            (out / name).mkdir()
        sites = SitesFile(sites={name: SiteData(data=out / name) for name in read.sites}).with_code()
        host = Machine(read, sites, out / "run", ())
        engine = Counting(LocalEngine(host.find))
        spec, plan = host.arm_spec("federated"), host.plan("federated")
        journal = Journal(out / "arm", spec.identity)
        coordinator = Coordinator(plan, spec.method, engine, journal, protocol(out / "updates"))
        for _ in coordinator.rounds(coordinator.start(lambda: host.initial(spec))):
            pass
        engine.close()
    return engine, host
