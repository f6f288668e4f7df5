"""The register page in docs/ is the one that the tables give."""

from pathlib import Path

import pytest

from moeaccel.errors import MoeAccelError
from moeaccel.interface.register_page import generated, updated
from moeaccel.interface.registers import REGISTERS

PAGE = Path(__file__).parents[3] / "docs" / "registers.md"


def test_the_page_is_up_to_date():
    page = PAGE.read_text(encoding="utf-8")
    assert updated(page) == page, (
        "run: python -m moeaccel.interface.register_page docs/registers.md")


def test_everything_is_there():
    text = generated()
    for register in REGISTERS.values():
        assert f"| `0x{register.address:03x}` | `{register.name}` |" in text
    assert "| 9 | `WATCHDOG` | No progress for WATCHDOG cycles. |" in text
    assert "| 0 | 24 | `phase` | Inverts on each pass" in text
    assert "### Expert table entry" in text
    assert "| 1 | `relu` | max(g, 0) |" in text


def test_limits_stand_beside_the_meaning():
    text = generated()
    assert "| `tokens` | Tokens. Allowed: from 1 to max_tokens. |" in text
    assert "| `sink0` | Sink. Allowed: 1 where sections is 1; 0 where sections is 2. |" in text
    assert "Allowed: from -100 to 60. Signed. |" in text
    assert "| `tag` | Returned in the completion. |" in text


def test_a_page_without_markers():
    with pytest.raises(MoeAccelError, match="page must hold the lines '<!-- BEGIN"):
        updated("# Registers\n")
