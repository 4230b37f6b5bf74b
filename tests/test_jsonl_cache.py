"""JSON lines that a stopped run continues from: what they keep, and which files they refuse."""

import pytest

from dynamo_lm.errors import InputError
from dynamo_lm.jsonl_cache import JsonlCache, JsonlLog

SEPARATORS = "a\u2028b\u2029c\u0085d\x0ce\x0bf\x1cg\rh"  # all that str.splitlines splits at


def test_a_cache_survives_a_line_that_was_cut_off(tmp_path):
    file = tmp_path / "answers.jsonl"
    first = JsonlCache(file)
    first.put("a", 1)
    first.put("b", None, answer="what?")
    file.write_bytes(file.read_bytes() + b'{"key": "c", "val')
    second = JsonlCache(file)
    assert "c" not in second
    second.put("d", 0.5)
    third = JsonlCache(file)
    assert (third["a"], third["b"], third["d"]) == (1, None, 0.5)
    assert len(third) == 3


@pytest.mark.parametrize("content", ["dear diary\n", "dear diary", '{"seed": 1}\n', "[1]\n"])
def test_a_file_that_holds_something_else_is_refused_and_kept(tmp_path, content):
    file = tmp_path / "notes.txt"
    file.write_text(content)
    with pytest.raises(InputError, match="holds no"):
        JsonlCache(file)
    assert file.read_text() == content


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        JsonlCache(tmp_path)


def test_records_end_at_a_newline_alone(tmp_path):
    file = tmp_path / "answers.jsonl"
    JsonlCache(file).put("key", SEPARATORS, answer=SEPARATORS)
    assert JsonlCache(file)["key"] == SEPARATORS
    log = JsonlLog(file)
    assert log.records == [{"key": "key", "value": SEPARATORS, "answer": SEPARATORS}] and log.damaged == 0
    assert SEPARATORS[:7].encode() in file.read_bytes()  # U+2028 and its like stand in the line as they are


def test_lone_surrogates_and_newlines_survive(tmp_path):
    file = tmp_path / "answers.jsonl"
    JsonlCache(file).put("key", "one\ntwo\ud800")
    assert JsonlCache(file)["key"] == "one\ntwo\ud800"


def test_a_damaged_line_in_the_middle_is_counted_and_left_out(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text('{"a": 1}\n{"a": \n\n{"a": 3}\n')
    log = JsonlLog(file)
    assert log.records == [{"a": 1}, {"a": 3}] and log.damaged == 1
