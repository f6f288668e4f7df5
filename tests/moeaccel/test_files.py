"""Files that appear when they are whole."""

import os

import pytest

from moeaccel.errors import OutputError
from moeaccel.files import whole_file


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")

    def write(numerator):
        with whole_file(path) as part:
            part.write_text("torn")
            part.write_text(str(numerator // 0))

    with pytest.raises(ZeroDivisionError):
        write(1)
    assert path.read_text() == "before"
    with whole_file(path) as part:
        part.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after" and os.listdir(tmp_path) == ["file"]


def test_two_writers_of_one_path_write_to_different_places(tmp_path):
    with whole_file(tmp_path / "file") as one:
        one.write_text("one")
        with whole_file(tmp_path / "file") as two:
            two.write_text("two")
        assert (tmp_path / "file").read_text() == "two"
    assert (tmp_path / "file").read_text() == "one"


@pytest.mark.parametrize(("kind", "said"), [("folder", "a folder"), ("pipe", "a device or a pipe"),
                                            ("", "a folder")])
def test_what_is_no_file_is_left_as_it_is(tmp_path, monkeypatch, kind, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match=said), whole_file(kind):
        raise AssertionError("nothing may be written")
    assert sorted(os.listdir()) == ["folder", "pipe"]
