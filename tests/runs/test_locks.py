from __future__ import annotations

import os
import signal
import threading
import time

from weightsmith.runs import FolderLock


def test_a_second_holder_says_who_it_waits_for_and_then_gets_the_lock(tmp_path):
    order, said, waiting = [], [], threading.Event()

    def on_wait(line):
        said.append(line)
        waiting.set()

    def second():
        with FolderLock(tmp_path, on_wait=on_wait) as lock:
            order.append("second")
            assert lock.waited

    with FolderLock(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(10)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert said == [f"{tmp_path} is in use by process {os.getpid()}: waiting until it is done"]


def test_a_killed_holder_leaves_no_stale_lock(tmp_path):
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        with FolderLock(tmp_path):
            os.write(told, b"x")
            time.sleep(60)
        os._exit(0)
    assert os.read(ready, 1) == b"x"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with FolderLock(tmp_path) as lock:
        assert not lock.waited


def test_a_waiter_is_not_fooled_by_a_folder_deleted_meanwhile(tmp_path):
    folder = tmp_path / "run"
    waiting = threading.Event()
    held = []

    def second():
        with FolderLock(folder, on_wait=lambda _: waiting.set()) as lock:
            held.append(os.stat(lock.path).st_ino)

    with FolderLock(folder) as first:
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(10)
        first.path.unlink()
        folder.rmdir()
    thread.join(10)
    assert held == [os.stat(folder / ".lock").st_ino]


def test_different_names_do_not_exclude_each_other(tmp_path):
    with FolderLock(tmp_path, name="locks/a"), FolderLock(tmp_path, name="locks/b") as other:
        assert not other.waited
