"""Writing: the same bytes as the reference libraries, exact plans, honest refusals, full disks."""

import ctypes
import errno
import json
import os
import resource
import sys
import threading
import types

import numpy as np
import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file as save_torch

from weightsmith.checkpoints import Checkpoint, CheckpointWriter, Lineage, TensorSpec, plan_layout
from weightsmith.checkpoints import writer as writer_module
from weightsmith.errors import CheckpointError, InputError, SystemFault

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
LINEAGE = Lineage("test", {"weight": 0.5})


def specs_of(tensors):
    return [TensorSpec(name, NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()]


def write_all(out, tensors, **options):
    """Write torch tensors through the writer: floats as float32, the rest raw."""
    options = {"side_files": {"config.json": b"{}"}, "lineage": LINEAGE, **options}
    with CheckpointWriter(out, specs_of(tensors), **options) as writer:
        for name, values in tensors.items():
            if values.is_floating_point():
                writer.write(name, values.float().numpy())
            else:
                writer.write_raw(name, values.numpy().tobytes())
        writer.commit()
    return writer


@pytest.fixture
def state():
    generator = torch.Generator().manual_seed(0)
    state = {
        f"model.layers.{i}.w": torch.randn(3, 5, generator=generator).to(dtype)
        for i, dtype in enumerate([torch.bfloat16, torch.float32, torch.float16, torch.bfloat16])
    }
    return {
        **state,
        "model.embed_tokens.weight": torch.randn(11, 5, generator=generator).bfloat16(),
        "zähler": torch.arange(3),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
    }


@pytest.mark.parametrize("limit", [10**9, 130, 60, 1])
def test_files_and_index_are_byte_for_byte_those_of_the_reference_libraries(state, tmp_path, limit):
    write_all(tmp_path / "ours", state, max_shard_bytes=limit)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    split = split_torch_state_dict_into_shards(
        state, filename_pattern="model{suffix}.safetensors", max_shard_size=limit
    )
    for file, names in split.filename_to_tensors.items():
        save_torch({name: state[name] for name in names}, theirs / file, metadata={"format": "pt"})
    assert bool(split.is_sharded) == (limit < 10**9)
    if split.is_sharded:
        numel = sum(t.numel() for t in state.values())
        index = {
            "metadata": {"total_parameters": numel, **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (theirs / "model.safetensors.index.json").write_text(text)
    ours = {p.name: p.read_bytes() for p in (tmp_path / "ours").iterdir()}
    ours.pop("config.json")
    ours.pop("weightsmith.json")
    assert ours == {p.name: p.read_bytes() for p in theirs.iterdir()}


def test_transformers_loads_what_was_written(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=32, tie_word_embeddings=True, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).bfloat16()
    model.save_pretrained(tmp_path / "a")
    with Checkpoint.open(tmp_path / "a") as source:
        specs = [TensorSpec(t.name, t.dtype, t.shape) for t in source.tensors.values()]
        side = source.side_file_map()
        with CheckpointWriter(
            tmp_path / "b", specs, side_files=side, lineage=LINEAGE, max_shard_bytes=3000
        ) as writer:
            for name in source.tensors:
                writer.write(name, source.read(name))
            writer.commit()
    assert len(writer.layout.shards) > 1
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    for name, values in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], values)


@pytest.mark.parametrize("limit", [10**9, 100])
def test_planned_bytes_are_the_bytes_on_the_disk(state, tmp_path, limit):
    extra = tmp_path / "tokenizer.json"
    extra.write_text("x" * 1234)
    side = {
        "config.json": b'{"a": 1}',
        "tokenizer.json": extra,
        "additional_chat_templates/t.jinja": b"{{x}}",
    }
    writer = write_all(tmp_path / "out", state, side_files=side, max_shard_bytes=limit)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) == writer.planned_bytes
    assert (tmp_path / "out" / "additional_chat_templates" / "t.jinja").read_text() == "{{x}}"


def test_pieces_in_any_order_from_many_threads_give_the_same_bytes(tmp_path, rng):
    values = rng.standard_normal(200_003).astype(np.float32)
    specs = [TensorSpec("w", "BF16", (200_003,))]

    def write(out, pieces, threads):
        with CheckpointWriter(tmp_path / out, specs, side_files={}, lineage=LINEAGE) as writer:
            lock, left = threading.Lock(), list(pieces)

            def work():
                while True:
                    with lock:
                        if not left:
                            return
                        start, stop = left.pop()
                    writer.write("w", values[start:stop], start)

            workers = [threading.Thread(target=work) for _ in range(threads)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            writer.commit()
        return {path.name: path.read_bytes() for path in (tmp_path / out).iterdir()}

    whole = write("whole", [(0, 200_003)], 1)
    cuts = [0, *sorted(int(cut) for cut in rng.choice(np.arange(1, 200_003), 60, replace=False)), 200_003]
    pieces = [(cuts[i], cuts[i + 1]) for i in rng.permutation(61)]
    assert write("pieces", pieces, 4) == whole  # the lineage's full fingerprint included


def test_what_was_written_has_the_fingerprint_the_lineage_says(state, tmp_path):
    config = {"config.json": b'{"model_type": "llama"}'}
    write_all(tmp_path / "a", state, side_files=config)
    write_all(tmp_path / "b", state, side_files=config, max_shard_bytes=60)
    with Checkpoint.open(tmp_path / "a") as one, Checkpoint.open(tmp_path / "b") as other:
        assert one.fingerprint(full=True) == one.lineage.content == other.lineage.content
        assert other.fingerprint(full=True) == one.lineage.content
        assert one.fingerprint() == other.fingerprint()


def test_pieces_missing_doubled_outside_or_of_the_wrong_type_are_programming_errors(tmp_path):
    specs = [TensorSpec("w", "F32", (10,)), TensorSpec("i", "I64", (2,))]
    with CheckpointWriter(tmp_path / "out", specs, side_files={}, lineage=LINEAGE) as writer:
        writer.write("w", np.zeros(4, np.float32), 2)
        for start, size in [(1, 2), (5, 3), (2, 4), (0, 10), (3, 1)]:
            with pytest.raises(ValueError, match="written twice"):
                writer.write("w", np.zeros(size, np.float32), start)
        for start, size in [(-1, 1), (8, 3)]:
            with pytest.raises(ValueError, match="of 10"):
                writer.write("w", np.zeros(size, np.float32), start)
        for name, values in [("w", np.zeros(1)), ("i", np.zeros(1, np.float32))]:
            with pytest.raises(ValueError, match="got float"):
                writer.write(name, values)
        with pytest.raises(ValueError, match="no whole elements"):
            writer.write_raw("i", b"12345")
        writer.write("i", np.arange(2))
        with pytest.raises(ValueError, match=r"w: only elements \[\(2, 6\)\] of 10"):
            writer.commit()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_before_anything_is_made(state, tmp_path):
    write_all(tmp_path / "out", state)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(CheckpointError, match=r"out: exists already; .*--overwrite"):
        CheckpointWriter(tmp_path / "out", specs_of(state), side_files={}, lineage=LINEAGE)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_overwriting_replaces_the_folder_and_leaves_nothing_beside_it(state, tmp_path):
    write_all(tmp_path / "out", state, side_files={"tokenizer.json": b"{}", "config.json": b"{}"})
    write_all(tmp_path / "out", {"w": torch.ones(2)}, overwrite=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "weightsmith.json",
    ]
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_that_is_no_checkpoint_is_never_overwritten(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for name, message in [("thesis", "holds files but no checkpoint"), ("file", "expected a folder")]:
        with pytest.raises(CheckpointError, match=message):
            write_all(tmp_path / name, {"w": torch.ones(2)}, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["file", "thesis"]


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path):
    spec = [TensorSpec("w", "F32", (1,))]
    with CheckpointWriter(tmp_path / "out", spec, side_files={}, lineage=LINEAGE) as writer:
        writer.write("w", np.ones(1, np.float32))
        write_all(tmp_path / "out", {"w": torch.zeros(1)})
        with pytest.raises(CheckpointError, match="exists already"):
            writer.commit()
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        assert checkpoint.read("w").tolist() == [0]
    assert os.listdir(tmp_path) == ["out"]


def test_two_writers_of_one_output_leave_each_other_alone(tmp_path):
    spec = [TensorSpec("w", "F32", (1,))]
    writers = [
        CheckpointWriter(tmp_path / "out", spec, side_files={}, lineage=LINEAGE, overwrite=True)
        for _ in range(2)
    ]
    for number, writer in enumerate(writers):
        writer.write("w", np.full(1, number, np.float32))
    for number, writer in enumerate(writers):
        writer.commit()
        with Checkpoint.open(tmp_path / "out") as checkpoint:
            assert checkpoint.read("w").tolist() == [number]
    assert os.listdir(tmp_path) == ["out"]


def test_an_error_inside_the_block_leaves_nothing_behind(tmp_path):
    spec = [TensorSpec("w", "F32", (1,))]
    with (
        pytest.raises(KeyboardInterrupt),
        CheckpointWriter(tmp_path / "deep" / "out", spec, side_files={}, lineage=LINEAGE),
    ):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path / "deep") == []


@pytest.mark.parametrize("nth", [1, 2, 5])
def test_a_full_disk_is_one_line_and_the_temporary_folder_is_gone(nth, tmp_path, monkeypatch):
    calls = 0

    def full(*_):
        nonlocal calls
        calls += 1
        if calls == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(*_)

    pwrite = os.pwrite
    monkeypatch.setattr(writer_module.os, "pwrite", full)
    with pytest.raises(SystemFault, match=r"out: .*[Nn]o space left on device") as caught:
        write_all(tmp_path / "out", {f"w{i}": torch.ones(3) for i in range(6)})
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1
    assert os.listdir(tmp_path) == []


def test_a_limit_on_file_size_is_one_line_too(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(SystemFault, match=r"[Ff]ile too large"):
            write_all(tmp_path / "out", {"w": torch.ones(3000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def answer_fallocate(monkeypatch, *numbers):
    """Let the system's `fallocate` fail with each of `numbers` in turn, then do nothing and succeed."""
    left = list(numbers)

    def fallocate(*_):
        ctypes.set_errno(left[0] if left else 0)
        return -1 if left and left.pop(0) else 0

    library = types.SimpleNamespace(fallocate=fallocate)
    monkeypatch.setattr(writer_module.ctypes, "CDLL", lambda *_, **__: library)
    return left


@pytest.mark.skipif(sys.platform != "linux", reason="blocks are reserved on Linux")
def test_blocks_are_reserved_before_the_first_tensor(tmp_path):
    spec = [TensorSpec("w", "F32", (1 << 20,))]
    with CheckpointWriter(tmp_path / "out", spec, side_files={"config.json": b"{}"}, lineage=LINEAGE):
        (shard,) = tmp_path.glob(".out*/*.safetensors")
        assert shard.stat().st_blocks * 512 >= shard.stat().st_size > 4 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="blocks are reserved on Linux")
def test_a_disk_that_others_filled_is_found_before_the_first_byte(tmp_path, monkeypatch):
    answer_fallocate(monkeypatch, errno.ENOSPC)
    monkeypatch.setattr(writer_module.os, "pwrite", lambda *_: pytest.fail("something was written"))
    with pytest.raises(SystemFault, match=r"out: .*[Nn]o space left on device"):
        write_all(tmp_path / "out", {"w": torch.ones(3)})
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="blocks are reserved on Linux")
def test_a_file_system_that_cannot_reserve_gets_the_same_file(tmp_path, monkeypatch):
    write_all(tmp_path / "reserved", {"w": torch.ones(3)})
    left = answer_fallocate(monkeypatch, errno.EINTR, errno.EOPNOTSUPP)
    write_all(tmp_path / "plain", {"w": torch.ones(3)})
    assert not left
    files = [tmp_path / name / "model.safetensors" for name in ("reserved", "plain")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_free_disk_is_looked_at_before_the_first_byte(tmp_path, monkeypatch):
    class Disk:
        f_bavail, f_frsize = 10, 4096

    monkeypatch.setattr(writer_module.os, "statvfs", lambda _: Disk)
    with pytest.raises(SystemFault, match=r"needs 0.40 GB of disk, 0.00 GB are free; nothing was written"):
        write_all(tmp_path / "out", {"w": torch.empty(100_000_000, device="meta")})
    assert os.listdir(tmp_path) == []


def test_a_parent_that_is_a_file_is_a_system_fault(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SystemFault, match="file"):
        write_all(tmp_path / "file" / "out", {"w": torch.ones(2)})


def test_everything_is_on_the_disk_before_the_folder_appears(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.rename

    def note_fsync(descriptor):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def note_rename(source, target):
        events.append("RENAME")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    tensors = {"a": torch.ones(4), "b": torch.ones(4)}
    write_all(tmp_path / "out", tensors, max_shard_bytes=16)
    before = set(events[: events.index("RENAME")])
    assert {path.name for path in (tmp_path / "out").iterdir()} <= before
    assert any(name.endswith(".part") for name in before)
    assert events[-1] == tmp_path.name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../config.json", "not a name inside"),
        ("/etc/x", "not a name inside"),
        ("model.safetensors", "taken by the checkpoint"),
        ("weightsmith.json", "taken by the checkpoint"),
    ],
)
def test_side_files_can_not_escape_or_replace_weights(tmp_path, name, message):
    with pytest.raises(CheckpointError, match=message):
        write_all(tmp_path / "out", {"w": torch.ones(2)}, side_files={name: b""})
    with pytest.raises(CheckpointError, match="side file is missing"):
        write_all(tmp_path / "out", {"w": torch.ones(2)}, side_files={"config.json": tmp_path / "none"})
    assert os.listdir(tmp_path) == []


def test_layouts_that_make_no_sense_are_refused():
    with pytest.raises(InputError, match="no tensors"):
        plan_layout([])
    with pytest.raises(InputError, match="`w` is to be written twice"):
        plan_layout([TensorSpec("w", "F32", (1,))] * 2)
    with pytest.raises(InputError, match="'float32'"):
        plan_layout([TensorSpec("w", "float32", (1,))])


def test_further_files_lie_beside_the_weights_and_are_none_of_them(tmp_path):
    specs = [TensorSpec("w", "F32", (3,))]
    parts = {"weightsmith/part.safetensors": [TensorSpec("p", "U8", (4,))]}
    with CheckpointWriter(
        tmp_path / "out",
        specs,
        side_files={"weightsmith/facts.json": b"{}", "config.json": b"{}"},
        lineage=Lineage("made"),
        parts=parts,
    ) as writer:
        writer.write("w", np.ones(3, np.float32))
        writer.write_raw("p", b"abcd")
        writer.set_side_file("weightsmith/facts.json", b"[]")
        writer.commit()
    with Checkpoint.open(tmp_path / "out") as made:
        assert list(made.tensors) == ["w"]
        assert made.fingerprint(full=True) == made.lineage.content
    assert (tmp_path / "out/weightsmith/part.safetensors").read_bytes().endswith(b"abcd")
    assert (tmp_path / "out/weightsmith/facts.json").read_bytes() == b"[]"


def test_a_further_file_has_a_place_and_names_of_its_own(tmp_path):
    specs = [TensorSpec("w", "F32", (3,))]
    for parts, said in (
        ({"part.safetensors": [TensorSpec("p", "U8", (4,))]}, "expected a name inside weightsmith/"),
        ({"weightsmith/part.safetensors": specs}, "tensor `w` is to be written twice"),
    ):
        with pytest.raises(ValueError, match=said):
            CheckpointWriter(tmp_path / "out", specs, side_files={}, lineage=Lineage("made"), parts=parts)
