import sys

import pytest

from moeaccel.host.policies import placement
from moeaccel.host.policies.errors import UnknownPolicy
from moeaccel.host.policies.placement import Placement
from moeaccel.host.policies.registry import find, lookup

POLICY = """
from moeaccel.host.policies.placement.base import NONE, Placement, Plan

class {cls}(Placement):
    name = "{name}"

    def place(self, work):
        return Plan(NONE, NONE)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    package = tmp_path / "found_policies"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith("found_policies")]:
        monkeypatch.delitem(sys.modules, name)
    return package


def test_a_file_is_enough(folder):
    (folder / "mine.py").write_text(POLICY.format(cls="Mine", name="mine"))
    (folder / "base.py").write_text("raise RuntimeError")
    assert list(find("found_policies", [str(folder)], Placement)) == ["mine"]


def test_two_of_one_name(folder):
    for index in (1, 2):
        (folder / f"two{index}.py").write_text(POLICY.format(cls=f"P{index}", name="twice"))
    with pytest.raises(UnknownPolicy, match=r"name of a policy must be its own.*'twice'"):
        find("found_policies", [str(folder)], Placement)


def test_lookup_names_what_is_near():
    with pytest.raises(UnknownPolicy, match=r"a thing must be one of one, two, not 'twoo'; did you "
                                            r"mean two\?"):
        lookup("a thing", {"one": 1, "two": 2}, "twoo")
    with pytest.raises(UnknownPolicy, match=r"not 3$"):
        lookup("a thing", {"one": 1}, 3)
    assert "scan" in placement.PLACEMENTS and "base" not in placement.PLACEMENTS
