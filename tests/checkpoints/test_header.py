"""Headers that are torn or lie, and the reference implementation's opinion of the same files."""

import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from weightsmith.checkpoints.header import read_header
from weightsmith.errors import CheckpointError

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def pack(header: dict | str, data: int | bytes = 32, length: int | None = None) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8")
    body = data if isinstance(data, bytes) else bytes(data)
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def parse(path, content: bytes):
    path.write_bytes(content)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return read_header(descriptor, path)
    finally:
        os.close(descriptor)


def with_a(**changes) -> dict:
    return {**GOOD, "a": {**GOOD["a"], **changes}}


def test_a_good_header_gives_shapes_and_absolute_offsets(tmp_path):
    content = pack({"__metadata__": {"format": "pt"}, **GOOD})
    found = parse(tmp_path / "m.safetensors", content)
    start = len(content) - 32
    assert [(t.name, t.dtype, t.shape, t.begin, t.nbytes, t.numel) for t in found.values()] == [
        ("a", "F32", (2, 3), start, 24, 6),
        ("b", "BF16", (4,), start + 24, 8, 4),
    ]


LIES = {
    "an empty file": (b"", "truncated: 0 bytes"),
    "a file cut inside the header": (pack(GOOD)[:40], "truncated: the header alone needs"),
    "a file cut inside the data": (pack(GOOD, 31), "truncated: the header promises"),
    "bytes after the last tensor": (pack(GOOD, 33), "over-long: the header promises"),
    "a header length past the file": (pack(GOOD, length=10**6), "truncated: the header alone needs 1000008"),
    "a header length that no one means": (pack(GOOD, length=2**63), "at most 100000000 expected"),
    "a header that is no JSON": (pack("{'a': 1}"), "not valid JSON"),
    "a header that is no object": (pack("[1]" + " " * 20), "not a JSON object"),
    "a pickle": (b"\x80\x04\x95\x10\x00\x00\x00\x00" + bytes(100), "not a safetensors file"),
    "bytes that are no UTF-8": (pack(GOOD).replace(b'"a"', b'"\xff"'), "not valid JSON"),
    "a name twice": (
        pack(json.dumps(GOOD)[:-1] + ', "a": ' + json.dumps(GOOD["b"]) + "}"),
        "names `a` twice",
    ),
    "deep nesting": (pack('{"a":' * 100_000 + "1" + "}" * 100_000), "not valid JSON"),
    "metadata that is no map of strings": (pack({"__metadata__": {"x": 1}, **GOOD}), "strings to strings"),
    "an unknown dtype": (pack(with_a(dtype="F23")), "unknown dtype 'F23'; did you mean `F32`"),
    "a dtype that is no string": (pack(with_a(dtype=32)), "unknown dtype 32"),
    "a missing key": (pack({"a": {"dtype": "F32", "shape": [8]}}), "has dtype, shape; expected"),
    "an entry that is a list": (pack({"a": [1]}), "has list; expected"),
    "a negative size": (pack(with_a(shape=[-2, -3])), "not a list of sizes"),
    "a size that is a float": (pack(with_a(shape=[2.0, 3])), "not a list of sizes"),
    "a size that is a truth value": (pack(with_a(shape=[True, 6])), "not a list of sizes"),
    "offsets the wrong way round": (pack(with_a(data_offsets=[24, 0])), "not [begin, end]"),
    "three offsets": (pack(with_a(data_offsets=[0, 12, 24])), "not [begin, end]"),
    "a shape its bytes don't fit": (pack(with_a(shape=[2, 2])), "needs 16 bytes, its data_offsets give 24"),
    "tensors that overlap": (
        pack({**GOOD, "b": {**GOOD["b"], "data_offsets": [20, 28]}}, 28),
        "overlaps `a`",
    ),
    "a hole between tensors": (
        pack({**GOOD, "b": {**GOOD["b"], "data_offsets": [28, 36]}}, 36),
        "leaves a hole after `a`",
    ),
    "a hole before the first tensor": (
        pack({"b": {"dtype": "BF16", "shape": [4], "data_offsets": [8, 16]}}, 16),
        "leaves a hole after the header",
    ),
    "half a byte": (
        pack({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}}, 2),
        "do not fill whole bytes",
    ),
}


@pytest.mark.parametrize("case", LIES)
def test_a_lie_is_one_line_that_names_the_file_and_the_reference_refuses_it_too(case, tmp_path):
    content, message = LIES[case]
    file = tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError) as caught:
        parse(file, content)
    line = str(caught.value)
    assert line.startswith(f"{file}: ")
    assert message in line
    assert "\n" not in line
    with pytest.raises((SafetensorError, OSError)), safe_open(file, "np") as opened:
        opened.keys()


def test_empty_tensors_and_scalars_are_sound(tmp_path):
    tensors = {
        "none": np.zeros((0, 4), np.float32),
        "one": np.array(3, np.float32),
        "x": np.ones(2, np.int64),
    }
    found = parse(tmp_path / "m.safetensors", save(tensors))
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
        "none": ("F32", (0, 4)),
        "one": ("F32", ()),
        "x": ("I64", (2,)),
    }


DTYPES = [np.float32, np.float16, np.float64, np.int64, np.int8, np.uint8, np.bool_]


@given(
    st.dictionaries(
        st.text(max_size=12).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
        max_size=5,
    ),
    st.integers(0, 10**9),
    st.integers(0, 255),
)
def test_any_file_of_the_reference_is_read_and_no_changed_byte_escapes_as_another_error(
    tmp_path_factory, layout, place, byte
):
    folder = tmp_path_factory.mktemp("fuzz")
    content = save({name: np.zeros(shape, dtype) for name, (dtype, shape) in layout.items()})
    found = parse(folder / "good", content)
    assert {name: t.shape for name, t in found.items()} == {
        n: tuple(shape) for n, (_, shape) in layout.items()
    }

    changed = bytearray(content)
    changed[place % len(content)] = byte
    file = folder / "changed"
    try:
        found = parse(file, bytes(changed))
    except CheckpointError:
        return
    with safe_open(file, "np") as opened:  # what we take, the reference takes as well
        assert set(opened.keys()) == set(found)
