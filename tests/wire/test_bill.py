"""The bill: every byte of a message has a kind, and a name says which."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from wardround.federation.exchange import TRAIN, UPDATE
from wardround.federation.metering import Meter
from wardround.wire.bill import ADAPTERS, Bill, Kinds, Sizes
from wardround.wire.message import Header, HeldBody, Message
from wardround.wire.sparse import DENSE, INDEX, Encoding, Sparse
from wardround.wire.tensors import TensorInfo, TensorWriter
from wardround.wire.update import Group, Layout, Metric

KINDS = Kinds(frozenset({"encoder.weight"}), frozenset({"unseen"}), frozenset({"q.lora.a.weight", "q.lora.b.weight"}))
# Of the rings of 16, 24 and 32 bits, and with padding behind the first group.
MODEL = (TensorInfo("head.weight", "float32", (71,)), TensorInfo("q.lora.b.weight", "float32", (8, 9)))
LAYOUT = Layout(
    (
        Group("model", MODEL, 16),
        Group("unseen", (TensorInfo("norm.weight", "float32", (3,)),), 24),
        Group(ADAPTERS, (TensorInfo("residual", "float32", (2, 2)),), 32),
    ),
    # Digits have 29 bits with up to 8 sites: one and two of them.
    (Metric("loss", 0, 10, 1e-6), Metric("dice", 0, 1e6, 1e-6, size=2)),
    max_sites=8,
)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("encoder.weight", "base"),
        ("model/encoder.weight", "base"),
        ("head.weight", "model"),
        ("buffers/head.running_mean", "model"),
        ("control", "model"),
        ("q.lora.a.weight", "adapters"),
        ("model/q.lora.b.weight", "adapters"),
        ("folded/q.lora.a.weight/left", "adapters"),
        ("model/k.lora.b.weight", "model"),
        (f"{ADAPTERS}/residual", "adapters"),
        ("unseen/q.lora.a.weight", "side_channels"),
    ],
)
def test_a_name_says_the_kind(name: str, kind: str) -> None:
    assert KINDS.of(name) == kind


@pytest.mark.parametrize(
    ("form", "model", "adapters"),
    [(DENSE, 71 * 2, 72 * 2 + 4 * 4), (Sparse(0.1), 8 * (2 + INDEX.itemsize), 8 * (2 + INDEX.itemsize) + 4 * 4)],
)
def test_every_byte_of_an_update_has_a_kind(form: Encoding, model: int, adapters: int) -> None:
    found = KINDS.of_update(LAYOUT, form)
    assert (found.base, found.model, found.adapters, found.side_channels) == (0, model, adapters, 3 * 3)
    assert LAYOUT.digit_bits == 29
    assert found.metrics == 4 * (1 + 2 * 2)
    assert found.total == form.nbytes(LAYOUT)


def test_a_message_is_its_header_and_its_body() -> None:
    file = io.BytesIO()
    writer = TensorWriter(file)
    for info in (*(TensorInfo(f"model/{each.name}", each.dtype, each.shape) for each in MODEL),):
        writer.add(info.name, np.zeros(info.shape, np.float32))
    meter = Meter(KINDS, LAYOUT)
    header = Header(TRAIN, "s", "A", tensors=writer.table, body_nbytes=writer.nbytes)
    meter.sent(Message(header, HeldBody(file.getvalue())))
    reply = Message(Header(UPDATE, "s", "A", reply_to="r"), HeldBody(bytes(LAYOUT.nbytes)))
    meter.came(reply)
    other = len(header.to_bytes())
    assert meter.bill.down == Sizes(model=4 * 71, adapters=4 * 72, other=other)
    assert meter.bill.up == KINDS.of_update(LAYOUT, DENSE) + Sizes(other=len(reply.header.to_bytes()))
    # What is no update of the layout is not taken for one.
    before = meter.bill
    wrong = Message(reply.header, HeldBody(bytes(5)))
    meter.came(wrong)
    assert meter.bill == before + Bill(up=Sizes(other=wrong.nbytes))


def test_a_file_is_billed_by_its_own_table(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    tensors = {"head.weight": np.zeros(7, np.float32), "q.lora.a.weight": np.zeros(5, np.float64)}
    save_file(tensors, path, metadata={"format": "x"})
    found = KINDS.of_file(path)
    assert (found.model, found.adapters, found.base) == (28, 40, 0)
    assert found.total == path.stat().st_size
