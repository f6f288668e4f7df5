"""The registry of boards: what each says of itself, and how wrong names are refused."""

import sys

import pytest
from typer.testing import CliRunner

from moeaccel.cli import app
from moeaccel.config import PRESETS
from moeaccel.errors import UnknownBoardError
from moeaccel.fpga import boards
from moeaccel.fpga.boards import BOARDS, BitstreamBoard, Board, ProjectBoard, board
from moeaccel.hdl.array.multiplier import FAMILIES
from moeaccel.host import transports


@pytest.mark.parametrize("found", BOARDS.values(), ids=BOARDS)
def test_boards_are_whole(found):
    for name, kind in Board.__annotations__.items():
        if "ClassVar" not in kind:
            assert getattr(found, name), name
    assert type(found).__module__.endswith(f".{found.name}")  # it is the file's name
    assert found.family in FAMILIES
    assert found.config in PRESETS
    assert board(found.name) is found
    assert isinstance(found, BitstreamBoard) != isinstance(found, ProjectBoard)


@pytest.mark.parametrize("found", BOARDS.values(), ids=BOARDS)
def test_a_transport_drives_it(found):
    """There is one, and it opens the board with the preset that was built, or asks the board."""
    assert found.transport in transports.names().values()
    _, scheme, _ = transports.scheme(found.transport)
    assert scheme.config in (None, found.config)


@pytest.mark.parametrize(("name", "kind", "message"), [
    ("ulx4s", Board, "board must be one of u55c, ulx3s, not 'ulx4s'$"),
    ("base", Board, "board must be one of u55c, ulx3s, not 'base'$"),
    ("u55c", BitstreamBoard,
     "must be one of ulx3s, not 'u55c'; .* 'moeaccel verilog --board u55c'$"),
    ("ulx3s", ProjectBoard,
     "must be one of u55c, not 'ulx3s'; .* 'moeaccel bitstream --board ulx3s'$"),
])
def test_wrong_names(name, kind, message):
    with pytest.raises(UnknownBoardError, match=message):
        board(name, kind)


def test_a_board_is_one_file(monkeypatch, tmp_path):
    """A file in the folder is found, and the command line builds for it."""
    (tmp_path / "card.py").write_text("""
from moeaccel.fpga.boards.base import ProjectBoard

class Card(ProjectBoard):
    name = "card"
    family = "ecp5"
    clock_hz = 50_000_000

    def project(self, config, *, name, core_mhz):
        return {"card.txt": f"{config.name} {name} {core_mhz:g}"}

BOARD = Card()
""")
    monkeypatch.setattr(boards, "__path__", [*boards.__path__, str(tmp_path)])
    monkeypatch.setattr(boards, "BOARDS", boards._registry())
    monkeypatch.delitem(sys.modules, "moeaccel.fpga.boards.card")
    result = CliRunner().invoke(app, [
        "verilog", "--board", "card", "--config", "tiny", "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "card.txt").read_text() == "tiny moeaccel 50"
    assert "MULT18X18D" in (tmp_path / "out" / "moeaccel.v").read_text()
    with pytest.raises(UnknownBoardError, match="one of card, u55c, ulx3s, not 'x'"):
        board("x")


def test_the_command_line_names_them():
    result = CliRunner().invoke(app, ["bitstream", "--board", "ulx4s"])
    assert result.exit_code == 2
    assert "board must be one of ulx3s, not 'ulx4s'" in result.stderr
