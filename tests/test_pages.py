"""Texts for people: links lead somewhere, and commands name what there is."""

import re
from pathlib import Path

import pytest

from moeaccel.cli import COMMANDS

ROOT = Path(__file__).parents[1]
SKIPPED = {"build", "dist", "node_modules"}
PAGES = sorted(
    path for path in ROOT.rglob("*.md")
    if not any(part in SKIPPED or part[0] == "." for part in path.relative_to(ROOT).parts))
TARGETS = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.M))


def prose(page: str) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page, flags=re.M | re.S)


def anchors(page: str) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(page: str, path: Path) -> list[str]:
    """Return a page's links into the tree that lead nowhere."""
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:|mailto:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (
                anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            dead.append(link)
    return dead


def unknown_commands(page: str) -> list[str]:
    """Return what a page's commands name and the tree does not have."""
    wrong = [path for path in re.findall(r"\btests/[\w./-]*\w", page)
             if not (ROOT / path).exists() and not re.search(r"\b[A-Z]+\b|_NAME", path)]
    blocks = re.findall(r"^```sh\n(.*?)^```", page, re.M | re.S)
    code = "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", prose(page))])
    wrong += [f"moeaccel {name}" for name in re.findall(r"(?:^|/)moeaccel ([a-z]+)", code, re.M)
              if name not in COMMANDS]
    return wrong + [f"make {name}" for name in re.findall(r"^make ([a-z-]+)", code, re.M)
                    if name not in TARGETS]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_commands_of(path):
    page = path.read_text(encoding="utf-8")
    assert dead_links(page, path) == []
    assert unknown_commands(page) == []


def test_what_is_dead():
    page = ("# A b/c\n[a](#a-bc) [b](README.md) [c](https://x.y) [d](none.md)\n"
            "```\n# no heading\n[e](code.md)\n```\n[f](#no-heading) [g](README.md#quick-start)\n")
    assert dead_links(page, ROOT / "CHANGELOG.md") == ["#a-bc", "none.md", "#no-heading"]
    page = ("`make tests` `make test` `moeaccel ran` `pytest tests/none.py`\n"
            "```sh\nmake clear\n```\n")
    assert unknown_commands(page) == ["tests/none.py", "moeaccel ran", "make clear", "make tests"]
