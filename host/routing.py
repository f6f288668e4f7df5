"""Routing on the device: logits in, experts and weights out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moeaccel.config import PRESETS, AcceleratorConfig
from moeaccel.formats import whole_blocks
from moeaccel.host.calls import Pending, Sent
from moeaccel.host.errors import InvalidOption, InvalidTensor, LimitExceeded
from moeaccel.host.staging import offsets
from moeaccel.host.tensors import Like, Tensor, float32, is_torch, shape_of
from moeaccel.interface.commands import ENTRY_BYTES, ROUTER, Opcode, encode
from moeaccel.router.choices import MODES, Renormalize, Score
from moeaccel.router.descriptor import descriptor, table_bytes, table_words
from moeaccel.router.settings import (
    OFF,
    SELECTION_BIAS_MAX,
    RouterError,
    RouterSettings,
    names_of_mode,
)

if TYPE_CHECKING:
    from moeaccel.host.device import Device

__all__ = ["Router", "check_router", "check_tokens", "route", "settings_of", "submit"]


class Router:
    """A router: its matrix, settings, and what is added to logits and keys.

    Parameters
    ----------
    weight : float tensor, (E, H), optional
        For :meth:`moeaccel.host.Device.load_moe`; :meth:`moeaccel.host.Device.route` is given
        logits. With ``gates`` and ``shared``, the rows of gates behind those of the experts.
    bias : float tensor, (E,), optional
        Added to the logits.
    selection_bias : float tensor, (E,), optional
        Added to the scores, or with ``bias_logits`` to the logits, for selection only; within 128
        of 0.
    experts : :class:`int`, optional
        E, without a weight.
    top_k : :class:`int`
        k.
    **settings
        Of :class:`moeaccel.router.settings.RouterSettings`: ``score``, ``renormalize``, ``scale``,
        ``groups``, ``keep_groups``, ``group_score``, ``epsilon``, ``bias_logits``, ...

    Raises
    ------
    RouterError
        If a setting or a table does not fit; see there.
    """

    def __init__(self, weight: Tensor | None = None, *, top_k: int, experts: int | None = None,
                 bias: Tensor | None = None, selection_bias: Tensor | None = None,
                 **settings: Any) -> None:
        if weight is not None:
            rows, gates = shape_of("weight", weight, "E", "H")[0], settings.get("shared", 0)
            if isinstance(gates, int | np.integer) and 0 <= gates < rows:  # else settings refuse it
                rows -= int(gates)
            if experts not in (None, rows):
                raise RouterError(f"experts must be {rows}, the rows of weight, not {experts!r}")
            experts = rows
        if experts is None:
            raise RouterError("experts must be given where there is no weight")
        self.weight = weight
        try:
            self.settings = RouterSettings(experts=experts, top_k=top_k, **settings)
        except TypeError as error:
            raise RouterError(
                f"router must have settings that there are: {error}; see "
                "moeaccel.router.settings.RouterSettings") from None
        self.settings.check_given(selection_bias=selection_bias)
        self.bias = self._table("bias", bias)
        self.selection_bias = self._table("selection_bias", selection_bias, SELECTION_BIAS_MAX)

    def _table(self, name: str, values: Tensor | None, most: float | None = None
               ) -> NDArray[np.float32] | None:
        if values is None:
            return None
        if shape_of(name, values, "E") != (self.settings.experts,):
            raise RouterError(f"{name} must have the shape ({self.settings.experts},), not "
                              f"{tuple(values.shape)}")
        table = float32(name, values)
        good = np.isfinite(table) if most is None else np.abs(table) <= most
        if not good.all():
            expert = int(np.argmin(good))
            span = "finite" if most is None else f"from {-most:g} to {most:g}"
            raise RouterError(f"{name}[{expert}] must be {span}, not {table[expert]}")
        return table


def check_router(config: AcceleratorConfig, settings: RouterSettings) -> None:
    """Refuse what a device of this configuration does not do.

    Raises
    ------
    LimitExceeded
        Naming the setting, what the device has, and presets that do it.
    """
    found = _refusal(config, settings)
    if found is None:
        return
    fitting = [p.name for p in PRESETS.values() if _refusal(p, settings) is None]
    advice = (f"presets that can: {', '.join(fitting)}" if fitting
              else "make a configuration that does, or route on the host")
    raise LimitExceeded(f"{found} in config {config.name!r}; {advice}")


def _refusal(config: AcceleratorConfig, settings: RouterSettings) -> str | None:
    if not config.router:
        return "there is no router"
    if settings.score_kind not in config.router_scores:
        return f"score must be one of {', '.join(config.router)}, not {settings.score!r}"
    if settings.top_k > config.router_top_k:
        return f"top_k must be at most {config.router_top_k}, not {settings.top_k}"
    if settings.outputs > config.max_experts:
        what = "experts and gates" if settings.shared else "experts"
        return f"{what} must be at most {config.max_experts}, not {settings.outputs}"
    if settings.grouped and settings.keep_groups > config.router_top_k:
        return f"keep_groups must be at most {config.router_top_k}, not {settings.keep_groups}"
    if (settings.score_kind is Score.IDENTITY
            and settings.renormalize_kind is not Renormalize.SOFTMAX_TOP_K):
        return f"renormalize must be softmax_top_k with score identity, not {settings.renormalize}"
    for mode in MODES:
        for name in names_of_mode(mode):
            off = OFF.get(name)
            if mode not in config.router_modes and (value := getattr(settings, name)) != off:
                return f"{name} must be {off} without {mode!r} in router_modes, not {value!r}"
    return None


def check_tokens(settings: RouterSettings, tokens: int, most: int) -> None:
    """Refuse a call that takes several commands where its tokens depend on each other.

    Raises
    ------
    LimitExceeded
        Naming the tokens, and how many a command has.
    """
    if settings.capacity is not None and tokens > most:
        raise LimitExceeded(
            f"tokens must be at most {most}, those of one command, with a capacity, not {tokens}; "
            "split the call, or route on the host")


def settings_of(router: Router) -> RouterSettings:
    """Return the settings of what a caller takes for a router.

    Raises
    ------
    InvalidOption
        If it is none.
    """
    if not isinstance(router, Router):
        raise InvalidOption("router must be a moeaccel.host.Router, with or without a weight, not "
                            f"{type(router).__name__}")
    return router.settings


def route(device: Device, router: Router, logits: Tensor, *, resident: Tensor | None = None
          ) -> tuple[Any, Any]:
    """Route by logits; :meth:`moeaccel.host.Device.route`."""
    return submit(device, router, logits, resident=resident).only_result()


def submit(device: Device, router: Router, logits: Tensor, *, resident: Tensor | None = None
           ) -> Pending:
    """Send what :func:`route` waits for."""
    settings = settings_of(router)
    settings.check_given(resident=resident)
    check_router(device.config, settings)
    tokens, outputs = shape_of("logits", logits, "T", "E")
    if outputs != settings.outputs:
        raise InvalidTensor(f"logits must have the shape (T, {settings.outputs}) of this router, "
                            f"not {tuple(logits.shape)}")
    experts = settings.experts
    mask = None
    if resident is not None:
        if shape_of("resident", resident, "E") != (experts,):
            raise InvalidTensor(
                f"resident must have the shape ({experts},), not {tuple(resident.shape)}")
        mask = resident.detach().cpu().numpy() if is_torch(resident) else np.asarray(resident)
        if mask.dtype != bool:
            raise InvalidTensor("resident must be bool, True where an expert is resident, not "
                                f"{resident.dtype}; convert it")
    rows = np.zeros((tokens, whole_blocks(outputs)), np.float32)
    rows[:, :outputs] = float32("logits", logits)
    preferred = mask if settings.prior else None
    words = table_words(settings, router.bias, router.selection_bias,
                        None if settings.prior else mask)
    table = table_bytes(words if words.any() else None, preferred)
    fields = descriptor(settings, biased=router.selection_bias is not None,
                        tables=bool(words.any()), residents=preferred is not None, table_address=0)
    slots = settings.top_k + settings.shared
    ids = np.zeros((tokens, slots), np.int32)
    weights = np.zeros((tokens, slots), np.float32)
    most = min(device.config.max_tokens, device.config.max_assignments // slots)
    check_tokens(settings, tokens, most)

    def collect() -> tuple[Any, Any]:
        like = Like.of(logits)
        places: Any = ids.astype(np.int64)
        if is_torch(logits):
            import torch

            places = torch.from_numpy(places).to(logits.device)
        return places, like(weights)

    return Pending(device, router, collect).send(
        tokens, most, lambda part: _send(
            device, fields, table, rows[part], ids[part], weights[part], part.start),
        together=settings.capacity is not None)


def _send(device: Device, fields: dict[str, int], table: NDArray[np.uint8],
          rows: NDArray[np.float32], ids: NDArray[np.int32], weights: NDArray[np.float32],
          first: int) -> Sent:
    """Send the command of some tokens."""
    sizes = [ENTRY_BYTES, table.nbytes, rows.nbytes, ids.nbytes, weights.nbytes]
    *at, end = offsets(sizes)
    buffers = device.memory.allocate(end, top=True)
    base = buffers.address
    here = {"table_address": base + at[1] if table.size else 0}
    data = np.zeros(at[3], np.uint8)
    data[:ENTRY_BYTES] = np.frombuffer(encode(ROUTER, fields | here), np.uint8)
    for array, offset in ((table, at[1]), (rows, at[2])):
        data[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)

    def take() -> None:
        raw = device.transport.memory_read(base + at[3], end - at[3])
        ids[:] = raw[: ids.nbytes].view("<i4").reshape(ids.shape)
        start = at[4] - at[3]
        weights[:] = raw[start : start + weights.nbytes].view("<f4").reshape(weights.shape)

    return Sent(
        device, Opcode.ROUTE.name, {
            "opcode": int(Opcode.ROUTE), "tokens": len(rows), "top_k": ids.shape[1],
            "layer_address": base, "x_address": base + at[2], "ids_address": base + at[3],
            "weights_address": base + at[4]},
        buffers=buffers, inputs={base: data}, take=take, first_token=first)
