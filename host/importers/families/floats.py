"""Weights in float32, float16 or bfloat16, and float64: always quantised."""

from __future__ import annotations

from moeaccel.host.importers.base import Contents, Family
from moeaccel.host.importers.coded import Matrix
from moeaccel.host.importers.files.stored import FLOATS

__all__ = ["FAMILIES"]


class Floats(Family):
    """Floats, in a tensor of the stem's name and a mark."""

    rank = -1

    def __init__(self, name: str, mark: str) -> None:
        self.name, self.mark = name, mark

    def claims(self, contents: Contents, stem: str) -> bool:
        return contents.dtype(stem + self.mark) in FLOATS

    def shape(self, contents: Contents, stem: str) -> tuple[int, ...]:
        return contents.need(stem + self.mark).shape

    def read(self, contents: Contents, stem: str, expert: int | None) -> Matrix:
        tensor = contents.need(stem + self.mark)
        return tensor.array(expert) if tensor.dtype == "BF16" else tensor.float32(expert)


FAMILIES = (Floats("floats", ".weight"), Floats("floats", ""))
