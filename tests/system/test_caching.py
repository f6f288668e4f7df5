"""Verilog that the tests keep is never older than the sources it is made from."""

from pathlib import Path

import pytest

from moeaccel.formats import base
from tests.support import pair


@pytest.mark.parametrize("name", ["top.py", "formats/base.py", "formats/deeper/one.py"])
def test_any_changed_source_changes_the_digest(tmp_path, name):
    source = tmp_path / "hdl" / name
    source.parent.mkdir(parents=True)
    found = [pair.digest_of(tmp_path / "hdl")]
    for text in ("one", "two"):
        source.write_text(text, encoding="utf-8")
        found.append(pair.digest_of(tmp_path / "hdl"))
    source.rename(source.with_name("other.py"))
    found.append(pair.digest_of(tmp_path / "hdl"))
    assert len(set(found)) == 4


def test_the_digest_covers_the_formats(monkeypatch):
    """They have a folder of their own."""
    before = pair.sources_digest.__wrapped__()
    changed, read = Path(base.__file__).resolve(), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + (
        b"#" if path.resolve() == changed else b""))
    assert pair.sources_digest.__wrapped__() != before
