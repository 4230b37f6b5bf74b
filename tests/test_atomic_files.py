"""A file is there whole or not at all."""

from __future__ import annotations

import errno

import pytest

from dynamo_lm.errors import InputError
from dynamo_lm.files import (
    atomic_files,
    atomic_folder,
    atomic_write,
    decode,
    is_disk_full,
    read_bytes,
    split_lines,
    write_text,
)


def test_a_file_is_made_and_replaced(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "one\n")
    write_text(path, "two é\n", durable=True)
    assert path.read_bytes() == "two é\n".encode()
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "one")
    with pytest.raises(OSError, match="full"), atomic_write(path) as temporary:
        temporary.write_text("tw")
        raise OSError(errno.ENOSPC, "full")
    assert path.read_text() == "one"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_the_mode_of_a_file_that_is_replaced_stays(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    path.chmod(0o640)
    write_text(path, "two")
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "x"), True),
        (RuntimeError("I/O error: No space left on device (os error 28)"), True),
        (OSError(errno.EACCES, "x"), False),
    ],
)
def test_a_full_disk_is_told_by_its_number_or_its_words(error, full):
    assert is_disk_full(error) is full


def test_a_folder_takes_the_place_of_an_older_one_whole(tmp_path):
    path = tmp_path / "step-1"
    (tmp_path / ".writing-step-1").mkdir()
    (tmp_path / ".writing-step-1" / "half").touch()  # of a process that was killed
    for content in ("a", "b"):
        with atomic_folder(path) as temporary:
            (temporary / content).touch()
    assert [file.name for file in path.iterdir()] == ["b"]
    with pytest.raises(OSError, match="full"), atomic_folder(path) as temporary:
        (temporary / "c").touch()
        raise OSError(errno.ENOSPC, "full")
    assert [file.name for file in path.iterdir()] == ["b"]
    assert [file.name for file in tmp_path.iterdir()] == ["step-1"]


def test_files_move_up_together_beside_those_that_are_there(tmp_path):
    path = tmp_path / "model"
    with atomic_files(path) as temporary:
        (temporary / "a").write_text("1")
    with atomic_files(path) as temporary:
        (temporary / "b").write_text("2")
    with pytest.raises(OSError, match="full"), atomic_files(path) as temporary:
        (temporary / "a").write_text("3")
        raise OSError(errno.ENOSPC, "full")
    assert {file.name: file.read_text() for file in path.iterdir()} == {"a": "1", "b": "2"}


def test_text_is_utf8_without_its_byte_order_mark():
    assert decode("\ufeffOnce\ufeff".encode(), "a.txt") == "Once\ufeff"
    with pytest.raises(InputError, match=r"^a.txt is not UTF-8: line 3, byte 2 is 0xff\.$"):
        decode(b"a\nb\xff", "a.txt", first_line=2)


def test_lines_end_at_the_line_feed_alone():
    assert split_lines("a\u2028b\x85c\x0c\r\n\nd\re\n") == ["a\u2028b\x85c\x0c", "", "d\re"]
    assert split_lines("") == [] and split_lines("\n") == [""] and split_lines("a\n\n") == ["a", ""]


def test_a_file_that_cannot_be_read_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"nowhere cannot be read: No such file"):
        read_bytes(tmp_path / "nowhere")
