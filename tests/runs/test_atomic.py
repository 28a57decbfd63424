from __future__ import annotations

import errno
import json
import os

import pytest

from weightsmith.errors import InputError, SystemFault
from weightsmith.runs import append_line, read_json, read_lines, write_json, write_text


def test_a_failed_replacement_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    target = tmp_path / "stage.json"
    write_text(target, "old")

    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(SystemFault, match=r"stage\.json: no space left on device"):
        write_text(target, "new")
    assert target.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["stage.json"]


def test_a_permission_fault_is_one_line_naming_the_place(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(SystemFault, match="file") as caught:
        write_text(blocker / "inside.json", "x")
    assert "\n" not in str(caught.value)


def test_json_keeps_key_order_and_refuses_nan(tmp_path):
    write_json(tmp_path / "a.json", {"z": 1, "a": 2})
    assert list(json.loads((tmp_path / "a.json").read_text())) == ["z", "a"]
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "b.json", {"loss": float("nan")})
    assert not (tmp_path / "b.json").exists()


def test_broken_json_is_bad_input_that_names_the_file(tmp_path):
    (tmp_path / "a.json").write_text('{"a": ')
    with pytest.raises(InputError, match=r"a\.json: not valid JSON"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("torn", [b'{"step": 3', b"x" * 10_000])
def test_a_torn_last_line_is_skipped_by_readers_and_cut_by_the_next_writer(tmp_path, torn):
    ledger = tmp_path / "ledger.jsonl"
    append_line(ledger, {"step": 1})
    append_line(ledger, {"step": 2})
    with open(ledger, "ab") as file:
        file.write(torn)
    assert read_lines(ledger) == [{"step": 1}, {"step": 2}]
    append_line(ledger, {"step": 3})
    assert read_lines(ledger) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_a_line_torn_before_any_newline_leaves_an_empty_ledger(tmp_path):
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_bytes(b'{"st')
    assert read_lines(ledger) == []
    append_line(ledger, {"step": 1})
    assert ledger.read_bytes() == b'{"step": 1}\n'


def test_a_damaged_finished_line_is_not_passed_over_in_silence(tmp_path):
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(InputError, match=r"ledger\.jsonl:2"):
        read_lines(ledger)


def test_no_ledger_yet_is_an_empty_one(tmp_path):
    assert read_lines(tmp_path / "none.jsonl") == []
