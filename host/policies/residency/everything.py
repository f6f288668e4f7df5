"""No need to choose."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeaccel.host.policies.residency.base import Residency

__all__ = ["Everything"]


class Everything(Residency):
    """All experts are resident, whatever the slots: a torch device with memory for the whole model.

    Parameters
    ----------
    **options
        See :class:`Residency`.
    """

    name = "everything"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options | {"slots": options["n_experts"]})
        self.resident[:] = True

    def _use(self, layer: int, uses: np.ndarray, used: np.ndarray, mass: np.ndarray | None) -> None:
        pass
