"""FP8 E4M3 with a scale for each block of 128 by 128, row, or matrix: always quantised."""

from __future__ import annotations

from moeaccel.host.importers.base import Contents, Family
from moeaccel.host.importers.coded import Matrix
from moeaccel.host.importers.errors import ForeignCheckpoint
from moeaccel.host.importers.files import StoredTensor

__all__ = ["FAMILIES"]


class Fp8(Family):
    """DeepSeek-V3 (``weight_scale_inv``), compressed-tensors and ModelOpt (``weight_scale``)."""

    name = "fp8"

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def claims(self, contents: Contents, stem: str) -> bool:
        return contents.dtype(stem + self.mark) == "F8_E4M3"

    def shape(self, contents: Contents, stem: str) -> tuple[int, ...]:
        return contents.need(stem + self.mark).shape

    def read(self, contents: Contents, stem: str, expert: int | None) -> Matrix:
        import torch

        from moeaccel.host.importers.fp8 import dequantise

        weight = contents.need(stem + self.mark)
        scale = self._scale(contents, stem)
        index = expert if scale.shape[:1] == weight.shape[:1] else None  # of stacked experts
        if index is None and expert is not None and scale.shape not in ((), (1,)):
            raise ForeignCheckpoint(f"{scale} must have scales for each of {weight.shape[0]} "
                                    "experts, or one for all")
        stored = scale.array(index) if scale.dtype in ("U8", "F8_E8M0") else scale.float32(index)
        if stored.ndim == 1 and stored.size == weight.shape[-2]:
            stored = stored[:, None]
        grid = torch.from_numpy(stored if stored.ndim == 2 else stored.reshape(1, -1))
        codes = torch.from_numpy(weight.array(expert)).view(torch.float8_e4m3fn)
        block = contents.quantisation.get("weight_block_size", (128, 128))
        if not (isinstance(block, list | tuple) and len(block) == 2
                and all(type(size) is int and size > 0 for size in block)):
            raise ForeignCheckpoint("weight_block_size of quantization_config must be two positive "
                                    f"numbers, not {block!r}")
        return dequantise(codes, grid, block, parts=2 if stem.endswith("gate_up_proj") else 1
                          ).numpy()

    def _scale(self, contents: Contents, stem: str) -> StoredTensor:
        """Return the scales' tensor, whose name has one of two ends."""
        inverse = f"{stem}{self.mark}_scale_inv"
        return contents.tensors.get(inverse) or contents.need(f"{stem}{self.mark}_scale")


FAMILIES = (Fp8(".weight"), Fp8(""))
