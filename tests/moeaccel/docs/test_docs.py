"""Pages: generated parts are those that the sources give, and hold what they must."""

import re
import struct
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from moeaccel.docs import PARTS, generated, updated
from moeaccel.docs.__main__ import app
from moeaccel.docs.blocks import Block, components
from moeaccel.errors import MoeAccelError
from moeaccel.formats import ALL_FORMATS, quantise
from moeaccel.image import Section, build_linear_image
from moeaccel.interface.commands import Sink
from moeaccel.interface.registers import REGISTERS

ROOT = Path(__file__).parents[3]
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_page_is_up_to_date(path):
    page = path.read_text(encoding="utf-8")
    assert updated(page) == page, "run: python -m moeaccel.docs"


def test_every_part_stands_in_one_page():
    text = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
    assert sorted(re.findall(r"<!-- BEGIN GENERATED ([\w-]+):", text)) == sorted(PARTS)


def test_registers_and_commands():
    text = "\n".join(generated(name) for name in PARTS)
    for register in REGISTERS.values():
        assert f"| `0x{register.address:03x}` | `{register.name}` |" in text
    assert "| 9 | `WATCHDOG` | No progress for WATCHDOG cycles. |" in text
    assert "| 0 | 24 | `phase` | Inverts on each pass" in text
    assert "### Expert table entry" in text
    assert "| 1 | `relu` | max(g, 0) | 1 where g is positive, else 0 |" in text


def test_limits_stand_beside_the_meaning():
    text = generated("submission") + generated("expert-table")
    assert "| `tokens` | Tokens. Allowed: from 1 to max_tokens. |" in text
    assert ("| `sink0` | Sink. Allowed: 1 where sections is 1; one of activation_sinks where "
            "sections is 2. |") in text
    assert "Allowed: from -100 to 60. Signed. |" in text
    assert "| `tag` | Returned in the completion. |" in text


@pytest.mark.parametrize(("fmt", "tile_rows"), [("int4_g32", 4), ("int4_g32+2:4", 8)])
def test_words_of_the_example(fmt, tile_rows):
    section = Section(ALL_FORMATS[fmt], 64, 256, 2)
    kinds = np.bincount(section.kinds(), minlength=4)
    row = " | ".join(map(str, (tile_rows, section.tiles, *kinds, section.words)))
    assert f"| `{fmt}` | {row} |" in generated("section-words")


def test_the_header_is_where_the_page_says():
    matrix = quantise(np.ones((64, 96), np.float32), "int4_g128").with_bias(np.ones(64))
    image = build_linear_image(matrix, 2).tobytes()
    page = (ROOT / "docs" / "images.md").read_text(encoding="utf-8")
    kinds = {8: "B", 16: "H", 32: "I"}
    values = {
        what.split(",")[0]: [struct.unpack_from(f"<{kinds[int(bits)]}", image, int(offset))[0]
                             for offset in offsets.split(", ")]
        for offsets, bits, what in re.findall(r"^\| ([\d, ]+) \| (\d+) \| (.*) \|$", page, re.M)}
    crc = values.pop("CRC-32 of the bytes before it and of everything behind the header")
    assert crc[0] == int.from_bytes(image[32:36], "little") != 0 and not any(image[36:64])
    words = Section(matrix.format, 64, 96, 2, biased=True).words
    assert list(values.values()) == [
        [int.from_bytes(b"MOXE", "little")], [3], [1], [2], [0, 0], [matrix.format.code, 0],
        [Sink.COMBINE, 0], [1, 0], [64, 96], [words, 0]]


def test_a_block_is_found_by_its_name():
    rows = {block.name: block for block in components()}
    block = rows["ResultSerialiser"]
    assert block.path == "hdl/array/result_serialiser.py"
    assert block.cycles(ROOT) == "[result_serialiser.py](../moeaccel/cycles/result_serialiser.py)"
    assert "tests/hdl/array/test_result_serialiser.py" in block.tests(ROOT)
    assert block.golden(ROOT) == "`arithmetic.normalise`"
    assert block.speed.startswith("Throughput: one element per cycle")
    assert "moeaccel/golden/dot_array.py" in rows["DotArray"].golden(ROOT)
    assert "test_command_processor" in rows["CommandProcessor"].tests(ROOT)
    assert not any(name.startswith("_") for name in rows)


def test_what_a_docstring_gives():
    block = Block("RowSums", "Sum ``a | b``. More.\n\nLatency N_CYCLES; one\na cycle. Reset: "
                  "none.\n\nMembers\n-------\nLatency x.", "hdl/x.py")
    assert block.stem == "row_sums"
    assert block.summary == r"Sum `a \| b`."
    assert block.speed == "Latency N_CYCLES; one a cycle."
    assert (block.golden(ROOT), block.cycles(ROOT)) == ("", "")


@pytest.mark.parametrize(("page", "match"), [
    ("<!-- BEGIN GENERATED register: x -->\n<!-- END GENERATED -->",
     "generated part must be one of activations, .* not 'register'"),
    ("<!-- BEGIN GENERATED registers: x -->\n", "part 'registers' must end with the line"),
    ("<!-- BEGIN GENERATED codes: x -->\n<!-- BEGIN GENERATED a: x -->\n<!-- END GENERATED -->",
     "part 'codes' must end with the line"),
])
def test_markers_that_are_wrong(page, match):
    with pytest.raises(MoeAccelError, match=match):
        updated(page)


def test_a_folder_of_pages(tmp_path):
    (tmp_path / "a.md").write_text("before\n<!-- BEGIN GENERATED codes: old -->\nold\n"
                                   "<!-- END GENERATED -->\nafter\n")
    (tmp_path / "b.md").write_text("nothing generated\n")
    runner = CliRunner()
    first = runner.invoke(app, [str(tmp_path)])
    assert first.exit_code == 0 and first.output == f"{tmp_path / 'a.md'} has changed\n"
    page = (tmp_path / "a.md").read_text()
    assert page.startswith("before\n<!-- BEGIN GENERATED codes: python -m moeaccel.docs -->\n")
    assert page.endswith("<!-- END GENERATED -->\nafter\n") and "old" not in page
    assert runner.invoke(app, [str(tmp_path)]).output == ""
