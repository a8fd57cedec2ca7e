"""What the secure sum costs: bytes, CPU seconds, and that it changes no bit.

*Bytes* are counted at the seam, headers and all, over one round of the real coordinator, sites, stores and journal with
a learner that returns at once: `bytes_ratio` is everything a site sends in a round of 10 sites over 10^6 float32
values; `control_bytes` is everything a site sends beside its update. *Masking* is the CPU time of one of 10 sites for
a whole attempt (keys, shares, masks, signature, reveal), with the update already in memory and no file written.
*Schedules* are random federations, layouts, thresholds and dropouts, each compared bit for bit with the plain sum of
the survivors. *CKKS* is TenSEAL (polynomial degree 8192, [60, 40, 40], scale 2^40) doing the same job, from floats to
the sum of 10 sites in floats, in CPU seconds; it runs where `requirements-secure.txt` is installed, in this environment
or the one whose Python `--ckks` names.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common import arguments, conditions, finish, median, table

SITES, VALUES = 10, 1_000_000
PHASES = ("advert", "shares", "upload", "consent", "reveal")


def play(count: int, threshold: int, segments: Any, updates: Any, lost: dict[str, str], spent: Any = None) -> Any:
    """One attempt in memory: the sum, and the survivors. `spent[site]` collects each site's own CPU seconds."""
    from wardround.protection.secure_sum import Attempt, CoordinatorSession, Identity, MaskStream, Roster, SiteSession
    from wardround.wire.ring import ExactSum

    names = [f"S{i:02d}" for i in range(count)]
    identities = {name: Identity.generate() for name in names}
    roster = Roster({name: identity.public for name, identity in identities.items()})
    context = Attempt("study", 1, 0, "request", "model", "layout", roster.sha256, threshold)
    coordinator, total = CoordinatorSession(roster, context), ExactSum(segments)
    sessions = {name: SiteSession(name, identities[name], roster, context) for name in names}
    gone: set[str] = set()

    def asked(phase: str, among: Iterable[str]) -> list[str]:
        gone.update(site for site, when in lost.items() if when == phase)
        return [site for site in sorted(among) if site not in gone]

    def at(site: str, step: Any) -> Any:
        began = time.process_time()
        try:
            return step()
        finally:
            if spent is not None:
                spent[site] = spent.get(site, 0.0) + time.process_time() - began

    for site in asked("advert", names):
        coordinator.advert(at(site, sessions[site].advertise))
    roll = coordinator.roll()
    for site in asked("shares", coordinator.adverts):
        coordinator.shares(at(site, lambda site=site: sessions[site].share(roll)))
    deals = coordinator.deals()
    for site in asked("upload", deals):
        masks = at(site, lambda site=site: sessions[site].mask(deals[site]))
        clear = updates(site)
        stream = at(site, lambda masks=masks, clear=clear: MaskStream(masks, segments).masked(clear))
        offset = 0
        while (chunk := at(site, lambda stream=stream: next(stream, None))) is not None:
            total.add(chunk, offset)
            offset += len(chunk)
        coordinator.uploaded(site)
    announcement = coordinator.announce()
    for site in asked("consent", announcement.survivors):
        coordinator.consent(at(site, lambda site=site: sessions[site].sign(announcement, lambda word: word)))
    quorum = coordinator.quorum()
    for site in asked("reveal", coordinator.consents):
        coordinator.reveal(at(site, lambda site=site: sessions[site].reveal(quorum)))
    MaskStream(coordinator.unmask(), segments).add_to(total)
    return total, announcement.survivors


def schedules(number: int, seed: int) -> tuple[int, int]:
    """How many of so many random schedules gave the plain sum, bit for bit, and how many sites dropped out in them."""
    from wardround.wire.ring import ExactSum, Ring

    random = np.random.default_rng(seed)
    equal = dropped = 0
    for _ in range(number):
        count = int(random.integers(3, 11))
        least = count // 2 + 1
        threshold = int(random.integers(least, count + 1))
        segments = tuple(
            (12 * int(random.integers(1, 40)), Ring(int(random.choice([16, 24, 32]))))
            for _ in range(int(random.integers(1, 4)))
        )
        size = sum(nbytes for nbytes, _ in segments)
        names = [f"S{i:02d}" for i in range(count)]
        bodies = {name: random.bytes(size) for name in names}
        leaving = random.permutation(names)[: int(random.integers(0, count - threshold + 1))]
        lost = {str(name): str(random.choice(PHASES)) for name in leaving}
        total, survivors = play(count, threshold, segments, lambda site, bodies=bodies: [bodies[site]], lost)
        plain = ExactSum(segments)
        for site in survivors:
            plain.add(bodies[site], 0)
        equal += total.to_bytes() == plain.to_bytes()
        dropped += len(lost)
    return equal, dropped


def masking(values: int) -> float:
    """CPU seconds of one of 10 sites, in the middle of the list, for an attempt with so many values."""
    from wardround.protection.secure_sum import KeyedMask, MaskStream
    from wardround.wire.ring import Ring

    # The attempt with a tiny update, and the stream of a large one beside it: ten large sites would not fit in memory.
    spent: dict[str, float] = {}
    play(SITES, 7, ((12, Ring(32)),), lambda site: [bytes(12)], {}, spent)
    chunk = memoryview(np.random.default_rng(0).integers(0, 1 << 32, 1_000_000, dtype=np.uint32)).cast("B")
    masks = [KeyedMask(os.urandom(16), negative=bool(n % 2)) for n in range(SITES)]
    began = time.process_time()
    for _ in MaskStream(masks, ((4 * values, Ring(32)),)).masked(itertools.repeat(chunk, values // 1_000_000)):
        pass
    return spent["S05"] + time.process_time() - began


def at_the_seam(count: int, values: int) -> dict[str, float]:
    """Bytes of a round by site: everything up, everything up but the update, everything down but the model."""
    from wardround.engines.local import LocalEngine
    from wardround.federation.coordinator import Coordinator, Plan
    from wardround.federation.exchange import UPDATE
    from wardround.federation.secure import secure_sum
    from wardround.learning.methods.method import MODEL, Method
    from wardround.learning.training import Trained
    from wardround.plan.sums import round_metrics
    from wardround.protection.identity import Roster
    from wardround.site.rules import Rules
    from wardround.site.secure import SecureUpload
    from wardround.site.site import Site
    from wardround.storage.journal import Journal
    from wardround.storage.store import SiteStore
    from wardround.study.protection import Protection
    from wardround.wire.message import Message
    from wardround.wire.tensors import TensorInfo
    from wardround.wire.update import Group, Layout

    layout = Layout((Group(MODEL, (TensorInfo("weight", "float32", (values,)),)),), round_metrics(()), 64, 1.0)
    change = np.random.default_rng(0).standard_normal(values).astype(np.float32) * 1e-3

    class NoTraining:
        """A learner that has learned already."""

        measures_validation = False

        class dataset:
            @staticmethod
            def fingerprint() -> str:
                return "none"

        def load(self, public: Any, memory: Any) -> None:
            pass

        def train(self, number: int, public: Any, memory: Any) -> Trained:
            return Trained({MODEL: {"weight": change}}, {MODEL: 1.0}, {}, 0.0, 0.0)

    names = tuple(f"S{n:02d}" for n in range(count))
    up, control, down = dict.fromkeys(names, 0), dict.fromkeys(names, 0), dict.fromkeys(names, 0)

    class Scales:
        """An engine that weighs what it carries."""

        def __init__(self, sites: dict[str, Any]) -> None:
            self._engine = LocalEngine(lambda header: sites[header.site])

        def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
            for message in messages:
                down[message.header.site] += message.nbytes - message.body.nbytes
                for reply in self._engine.exchange([message]):
                    site = reply.header.site
                    up[site] += reply.nbytes
                    control[site] += 0 if reply.header.kind == UPDATE else reply.nbytes
                    yield reply

        def close(self) -> None:
            pass

    with tempfile.TemporaryDirectory() as folder:
        root, study = Path(folder), "0" * 64
        stores = {name: SiteStore(root / name) for name in names}
        roster = Roster({name: store.enrol().public for name, store in stores.items()})
        threshold = Protection(secure=True).threshold_for(count)
        rules = Rules(study, layout, layout, layout, 0, 7, lint=False)
        protocols = {name: SecureUpload(threshold, lambda: roster) for name in names}
        sites: dict[str, Any] = {
            name: Site(name, rules, NoTraining, stores[name], protocol=protocols[name])  # type: ignore[arg-type]
            for name in names
        }
        plan = Plan("federated", study, names, 1, 1, layout, layout, 0.05, validate_every=0, release="last")
        journal = Journal(root / "coordinator", study)
        protocol = secure_sum(roster, threshold, journal)
        coordinator = Coordinator(plan, Method("equal"), Scales(sites), journal, protocol)
        state = coordinator.start(lambda: ({"model/weight": np.zeros(values, np.float32)}, {}))
        reports = list(coordinator.rounds(state))
    if len(reports[0].participants) != count:
        raise SystemExit("a site was lost")
    return {"up": max(up.values()), "control": max(control.values()), "down": max(down.values())}


def ours_in_floats() -> float:
    """CPU seconds from the floats of 10 sites to their sum in floats, everything included."""
    from wardround.wire.ring import Ring, dequantise, quantise, value_bits

    ring, bits = Ring(32), value_bits(32, SITES)
    values = np.random.default_rng(0).standard_normal(VALUES).astype(np.float32)

    def update(site: str) -> Iterator[Any]:
        yield ring.pack(quantise(values, 8.0, bits, ring, np.random.default_rng(int(site[1:])))[0])

    began = time.process_time()
    total, survivors = play(SITES, 7, ((4 * VALUES, ring),), update, {})
    found = dequantise(total.segment(0), 8.0, bits, ring)
    seconds = time.process_time() - began
    if np.abs(found - len(survivors) * values).max() > 1e-5:
        raise SystemExit("the sum is wrong")
    return seconds


def ckks_in_floats() -> float:
    """The same with TenSEAL; the clients' key is one for all, as in the products that offer it."""
    import tenseal as ts

    context = ts.context(ts.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[60, 40, 40], n_threads=1)
    context.global_scale = 2**40
    values = np.random.default_rng(0).standard_normal(VALUES)
    blocks = np.array_split(values, -(-VALUES // 4096))
    began = time.process_time()
    total = [ts.ckks_vector(context, block) for block in blocks]
    for _ in range(SITES - 1):
        for index, block in enumerate(blocks):
            total[index] += ts.ckks_vector(context, block)
    found = np.concatenate([vector.decrypt() for vector in total])
    seconds = time.process_time() - began
    if np.abs(found - SITES * values).max() > 1e-3:
        raise SystemExit("the sum is wrong")
    return seconds


def speedup(python: str, repeats: int) -> tuple[float | None, float, float | None]:
    """CKKS over ours (median of ratios, in turn), and both in CPU seconds; nothing where TenSEAL is not installed."""
    ours, theirs = [], []
    for _ in range(repeats):
        ours.append(ours_in_floats())
        child = subprocess.run([python, __file__, "--child"], capture_output=True, text=True, check=False)
        if child.returncode == 0:
            theirs.append(float(json.loads(child.stdout.splitlines()[-1])["seconds"]))
    if len(theirs) < repeats:
        return None, median(ours), None
    return median([t / o for o, t in zip(ours, theirs, strict=True)]), median(ours), median(theirs)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--ckks", default=sys.executable, metavar="PYTHON", help="a Python that has TenSEAL")
    parser.add_argument("--child", action="store_true", help="internal")
    options = parser.parse_args()
    if options.child:
        finish({"seconds": ckks_in_floats()})
        return
    repeats, number = (3, 1000) if options.quick else (7, 3000)
    state = conditions(sites=SITES, values=VALUES, repeats=repeats, schedule_seed=11)
    small = [masking(10**7) for _ in range(repeats)]
    large = [masking(10**8) for _ in range(max(3, repeats // 2))]
    ten, fifty = at_the_seam(10, VALUES), at_the_seam(50, 1000)
    ratio = ten["up"] / (4 * VALUES)
    equal, dropped = schedules(number, 11)
    faster, ours, theirs = speedup(options.ckks, repeats)
    table(
        ["", "value"],
        [
            ["upload over float32, 10 sites, 10^6 values", ratio],
            ["control bytes up / down a site, 10 sites", f"{ten['control']} / {ten['down']}"],
            ["control bytes up / down a site, 50 sites", f"{fifty['control']} / {fifty['down']}"],
            ["CPU s of a site, 10 sites, 10^7 values", median(small)],
            ["CPU s of a site, 10 sites, 10^8 values", median(large)],
            ["schedules with the plain sum's bits", f"{equal} of {number} ({dropped} dropouts)"],
            ["10 sites x 10^6 floats to their sum, CPU s", ours],
            ["  the same with CKKS (TenSEAL)", "not installed" if theirs is None else theirs],
        ],
    )
    finish(
        {
            "bytes_ratio": round(ratio, 6),
            "mask_seconds_1e7": median(small),
            "mask_seconds_1e8": median(large),
            "control_bytes_10": ten["control"],
            "control_bytes_50": fifty["control"],
            "control_bytes_down_10": ten["down"],
            "control_bytes_down_50": fifty["down"],
            "bit_equal": int(equal == number),
            "schedules": number,
            "dropouts": dropped,
            "speedup_over_ckks": faster,
            "seconds_ours": ours,
            "seconds_ckks": theirs,
            "conditions": state,
        }
    )


if __name__ == "__main__":
    main()
