"""What is checked of a command before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from moeaccel.config import AcceleratorConfig
from moeaccel.host.transports.golden.memory_port import Fault
from moeaccel.interface.commands import (
    ENTRY_BYTES,
    LAYER,
    ROUTER,
    SUBMISSION,
    ElementType,
    Field,
    Status,
    bad_field,
    decode,
    field_of,
)

__all__ = ["check_descriptor", "check_layer"]

_DESCRIPTORS = {Status.BAD_LAYER: LAYER, Status.BAD_ROUTER: ROUTER}


@lru_cache(maxsize=256)
def _decoded(status: Status, raw: bytes, config: AcceleratorConfig
             ) -> tuple[dict[str, int], Field | None]:
    """Return the fields of a descriptor, and the bad one."""
    values = decode(_DESCRIPTORS[status], raw)
    wrong = bad_field(_DESCRIPTORS[status], values, config)
    return values, wrong and wrong[0]


def check_descriptor(status: Status, raw: bytes, config: AcceleratorConfig) -> dict[str, int]:
    """Return the fields of a descriptor, the one that a status is about, each within its limits.

    Raises
    ------
    Fault
        Naming the lowest word that is not.
    """
    values, wrong = _decoded(status, raw, config)
    if wrong is not None:
        raise Fault(status, detail=wrong.word)
    return values


def check_layer(submission: Mapping[str, int], layer: Mapping[str, int],
                config: AcceleratorConfig, *, d_in: int | None = None) -> None:
    """End the command where an array of it runs beyond the address space, or the layer has another
    d_in than it must have, if something is said of that.

    Raises
    ------
    Fault
        Naming the lowest word, the submission's first.
    """
    top = 1 << config.address_bits
    tokens = submission["tokens"]
    pairs = 4 * tokens * submission["top_k"]
    x_bytes, y_bytes = (ElementType(submission[name]).bytes for name in ("x_type", "y_type"))
    sizes = {"x_address": x_bytes * tokens * layer["d_in"], "ids_address": pairs,
             "weights_address": pairs, "y_address": y_bytes * tokens * layer["d_out"],
             "workspace_address": 8 * tokens * layer["d_out"]}
    for name, size in sizes.items():
        if submission[name] + size > top:
            raise Fault(Status.BAD_FIELD, detail=field_of(SUBMISSION, name).word)
    for name, bad in (
            ("d_in", d_in not in (None, layer["d_in"])),
            ("table_address", layer["table_address"] + ENTRY_BYTES * layer["num_experts"] > top)):
        if bad:
            raise Fault(Status.BAD_LAYER, detail=field_of(LAYER, name).word)
