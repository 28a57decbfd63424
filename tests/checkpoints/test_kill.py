"""kill -9 while a checkpoint is written: at every system call that matters, and at random moments."""

import os
import random
import shutil
import signal
import time

import numpy as np
import pytest

from weightsmith.checkpoints import Checkpoint, CheckpointWriter, Lineage, TensorSpec
from weightsmith.errors import CheckpointError

SIZE = 4000
STEPS = ("mkdir", "ftruncate", "pwrite", "fsync", "rename", "unlink", "rmdir")


def write(out, value, overwrite=True, tensors=3, size=SIZE):
    specs = [TensorSpec(f"w{i}", "BF16", (size,)) for i in range(tensors)]
    with CheckpointWriter(
        out,
        specs,
        side_files={"config.json": b"{}"},
        lineage=Lineage("test", {"value": value}),
        max_shard_bytes=2 * size,
        overwrite=overwrite,
    ) as writer:
        for spec in specs:
            writer.write(spec.name, np.full(size, value, np.float32))
        writer.commit()


def value_of(out):
    """The one value of a whole checkpoint; every byte is looked at."""
    with Checkpoint.open(out) as checkpoint:
        assert checkpoint.fingerprint(full=True) == checkpoint.lineage.content
        values = np.concatenate([checkpoint.read(name) for name in checkpoint.tensors])
    assert len(values) % SIZE == 0
    assert len(set(values)) == 1
    return values[0]


def in_fork(action):
    """Run `action` in a forked child; its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        action()
        os._exit(0)
    except BaseException:
        os._exit(3)


def dies_at(step, action):
    """Run `action` in a child, killed right before its system call number `step`; False when it has fewer."""

    def child():
        left = step

        def wrap(call):
            def counted(*args, **options):
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **options)

            return counted

        for name in STEPS:
            setattr(os, name, wrap(getattr(os, name)))
        action()

    status = os.waitpid(in_fork(child), 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_killed_before_any_system_call_of_a_first_write_there_is_no_output_or_a_whole_one(tmp_path):
    out = tmp_path / "out"
    seen = set()
    for step in range(1000):
        if not dies_at(step, lambda: write(out, 1, overwrite=False)):
            break
        seen.add(out.exists())
        if out.exists():
            assert value_of(out) == 1
            shutil.rmtree(out)
        write(out, 2, overwrite=False)
        assert value_of(out) == 2
        assert os.listdir(tmp_path) == ["out"]
        shutil.rmtree(out)
    assert step > 12
    assert seen == {True, False}


def test_killed_before_any_system_call_of_an_overwrite_the_old_one_or_the_new_one_is_there(tmp_path):
    out = tmp_path / "out"
    put_back = 0
    for step in range(1000):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        write(out, 1)
        if not dies_at(step, lambda: write(out, 2)):
            break
        if out.exists():
            assert value_of(out) in (1, 2)
        else:
            with pytest.raises(CheckpointError, match="an interrupted overwrite left its old content in"):
                Checkpoint.open(out)
            put_back += 1
        with pytest.raises(CheckpointError, match="exists already"):
            write(out, 3, overwrite=False)  # even a run that is refused puts the old one back first
        assert value_of(out) in (1, 2)
        write(out, 3)
        assert value_of(out) == 3
        assert os.listdir(tmp_path) == ["out"]
    assert value_of(out) == 2
    assert step > 20
    assert put_back == 1  # between the two renames, and nowhere else


def killed_at_random(tmp_path, seed, rounds):
    random.seed(seed)
    out = tmp_path / "out"
    write(out, 1)
    started = time.perf_counter()
    assert os.waitpid(in_fork(lambda: write(out, 1, tensors=8, size=50 * SIZE)), 0)[1] == 0
    usual = time.perf_counter() - started
    before = 1.0
    for number in range(2, rounds + 2):
        value = float(number % 256)  # bfloat16 holds these exactly
        pid = in_fork(lambda value=value: write(out, value, tensors=8, size=50 * SIZE))
        time.sleep(random.uniform(0, 1.1 * usual))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if out.exists():
            found = value_of(out)
            assert found in (before, value)
            before = found
    write(out, 0)
    assert value_of(out) == 0
    assert os.listdir(tmp_path) == ["out"]


def test_killed_at_twenty_random_moments_what_is_visible_is_whole(tmp_path):
    killed_at_random(tmp_path, 0, 20)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_a_thousand_random_moments_what_is_visible_is_whole(tmp_path):
    killed_at_random(tmp_path, 1, 1000)


def test_the_folder_of_a_living_writer_is_left_alone_and_that_of_a_dead_one_is_not(tmp_path):
    spec = [TensorSpec("w", "F32", (1,))]
    options = {"side_files": {}, "lineage": Lineage("test"), "overwrite": True}
    with CheckpointWriter(tmp_path / "out", spec, **options) as living:
        read_end, write_end = os.pipe()

        def child():
            CheckpointWriter(tmp_path / "out", spec, **options)
            os.write(write_end, b"x")
            signal.pause()

        pid = in_fork(child)
        os.read(read_end, 1)
        assert len(os.listdir(tmp_path)) == 2
        with CheckpointWriter(tmp_path / "out", spec, **options):
            assert len(os.listdir(tmp_path)) == 3
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with CheckpointWriter(tmp_path / "out", spec, **options):
            assert len(os.listdir(tmp_path)) == 2  # the living one's and this one
        living.write("w", np.ones(1, np.float32))
        living.commit()
    assert os.listdir(tmp_path) == ["out"]
    os.close(read_end)
    os.close(write_end)


def test_a_failed_second_rename_puts_the_old_one_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(out, 1)
    rename = os.rename

    def refuse(source, target):
        if str(source).endswith(".part"):
            raise PermissionError(13, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match=r"out: .*permission denied"):
        write(out, 2)
    assert value_of(out) == 1
    assert os.listdir(tmp_path) == ["out"]
