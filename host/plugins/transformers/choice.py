"""Which configuration, and how much memory, a model needs: for where nobody chose them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

from moeaccel.config import DIM_MAX, EXPERTS_MAX, PRESETS, AcceleratorConfig
from moeaccel.formats import BLOCK, weight_format, whole_blocks
from moeaccel.host.errors import InvalidOption, LimitExceeded
from moeaccel.host.moe import router_bytes
from moeaccel.host.sizes import size_of
from moeaccel.image import ExpertShape
from moeaccel.interface.commands import ENTRY_BYTES
from moeaccel.router.choices import MODES

__all__ = ["SMALLEST_MEMORY", "Choice", "LayerDims", "buffer_bytes", "choose", "memory_size"]

# One channel and no board among them: what a user who did not ask wants to wait for and to read.
_CANDIDATES = ("small", "wide512")

SMALLEST_MEMORY = 1 << 32
"""Bytes of memory that the plug-in chooses at least."""

_MOST_ADDRESS_BITS = 47
_PAGE = 4096
_COMMANDS_IN_FLIGHT = 16


class LayerDims(NamedTuple):
    """Number of experts in a layer, the dimensions as the device has them, in whole blocks, what
    its experts are, and what modes its router needs; how many outputs this has, 0 on the host."""

    experts: int
    d_model: int
    d_expert: int
    gated: bool = True
    activation: str = "silu"
    biased: bool = False
    router_modes: tuple[str, ...] = ()
    router_outputs: int = 0

    @classmethod
    def padded(cls, experts: int, d_model: int, d_expert: int, *, gated: bool = True,
               activation: str = "silu", biased: bool = False) -> Self:
        """Round the dimensions up to whole blocks of 32."""
        return cls(experts, whole_blocks(d_model), whole_blocks(d_expert), gated, activation,
                   biased)

    @property
    def possible(self) -> bool:
        """Whether the hardware can be made large enough."""
        return (self.experts <= EXPERTS_MAX
                and max(self.d_model, self.d_expert) <= DIM_MAX)

    def fits(self, config: AcceleratorConfig) -> bool:
        """Return whether a configuration's limits allow the layer."""
        return (self.activation in config.activations and self.biased <= config.bias
                and self.experts <= config.max_experts
                and max(self.d_model, self.d_expert) <= config.max_dim
                and set(self.router_modes) <= set(config.router_modes))

    def shape(self, config: AcceleratorConfig, format_name: str) -> ExpertShape:
        """Return the shape of each expert."""
        return ExpertShape(weight_format(format_name), self.d_model, self.d_expert,
                           config.row_multipliers, config.channels, gated=self.gated,
                           activation=self.activation, gate_up_biased=self.biased,
                           down_biased=self.biased)

    def image_bytes(self, config: AcceleratorConfig, format_name: str) -> int:
        """Return how many bytes of each channel's memory the layer's images, descriptor and table
        take, with those of its router, where there is one."""
        experts = self.experts * (self.shape(config, format_name).memory_bytes + ENTRY_BYTES)
        router = (router_bytes(config, self.router_outputs, self.d_model)
                  if self.router_outputs else 0)
        return ENTRY_BYTES + experts + router


class Choice(NamedTuple):
    """A configuration, and bytes of memory on each channel."""

    config: AcceleratorConfig
    memory_bytes: int


def buffer_bytes(config: AcceleratorConfig, layers: Sequence[LayerDims]) -> int:
    """Return how much memory the buffers of the largest command take (x, y, workspace; ids and
    weights)."""
    d_model = max((layer.d_model for layer in layers), default=0)
    return 16 * config.max_tokens * d_model + 8 * config.max_assignments


def _memory_bytes(config: AcceleratorConfig, layers: Sequence[LayerDims], format_name: str,
                  least: Choice | None) -> int:
    """Return the power of two that holds all layers, one of them twice, and full rings."""
    images = [layer.image_bytes(config, format_name) for layer in layers]
    # A layer whose weights change is uploaded while calls of the old one may be under way.
    need = (sum(images) + max(images, default=0)
            + _COMMANDS_IN_FLIGHT * buffer_bytes(config, layers))
    need = max(need, SMALLEST_MEMORY, 2 * least.memory_bytes if least else 0)
    return 1 << (need - 1).bit_length()


def choose(layers: Sequence[LayerDims], format_name: str, *,
           config: AcceleratorConfig | None = None, least: Choice | None = None) -> Choice:
    """Return the first configuration that fits, and memory for all layers.

    Memory of a model of the hardware costs only what is used, so it is ample.

    Parameters
    ----------
    layers : sequence of :class:`LayerDims`
        One for each layer that has to fit.
    format_name : :class:`str`
        Of the weights.
    config : :class:`AcceleratorConfig`, optional
        Where it is chosen already; then it need not fit.
    least : :class:`Choice`, optional
        What was too small: limits are not below its, memory is at least twice as much.

    Raises
    ------
    LimitExceeded
        If the hardware cannot be made large enough.
    """
    limits = [*layers]
    if least is not None:
        limits.append(LayerDims(least.config.max_experts, least.config.max_dim, BLOCK,
                                router_modes=least.config.router_modes))
    modes = tuple(mode for mode in MODES if any(mode in layer.router_modes for layer in limits))
    candidates = [_with_modes(PRESETS[name], modes) for name in _CANDIDATES]
    for candidate in [config] if config else candidates:
        memory = _memory_bytes(candidate, layers, format_name, least)
        most = 1 << candidate.address_bits
        if config or (memory <= most and all(layer.fits(candidate) for layer in limits)):
            return Choice(candidate, min(memory, most))
    memory = _memory_bytes(PRESETS[_CANDIDATES[-1]], layers, format_name, least)
    return _enlarged(candidates[-1], limits, memory)


def _with_modes(config: AcceleratorConfig, modes: tuple[str, ...]) -> AcceleratorConfig:
    """Return a configuration whose router has modes as well."""
    return config.replace(name=f"{config.name} with {' and '.join(modes)}",
                          router_modes=modes) if modes else config


def _enlarged(base: AcceleratorConfig, limits: Sequence[LayerDims], memory: int) -> Choice:
    """Return the largest candidate with its limits raised as far as is asked for."""
    dim = max(max(layer.d_model, layer.d_expert) for layer in limits)
    experts = max(layer.experts for layer in limits)
    if not all(layer.possible for layer in limits):
        raise LimitExceeded(
            f"dimensions must be at most {DIM_MAX} and experts at most {EXPERTS_MAX} in any "
            f"configuration, not {dim} and {experts}; use experts_implementation=\"eager\" for "
            "this model")
    return Choice(base.replace(
        name=f"{base.name}-enlarged", max_dim=max(dim, base.max_dim),
        max_experts=max(1 << (experts - 1).bit_length(), base.max_experts),
        address_bits=max(memory.bit_length() - 1, base.address_bits)), memory)


def memory_size(name: str, text: Any) -> int:
    """Return the bytes that a text such as ``"64GiB"`` stands for, in whole pages; units are those
    of :func:`moeaccel.host.sizes.size_of`.

    Raises
    ------
    InvalidOption
        If it is something else.
    """
    try:
        found = size_of(name, text)
        size = 0 if found.share else int(found.number)
    except InvalidOption:
        size = 0
    # A device keeps the first page to itself.
    if not _PAGE < size <= 1 << _MOST_ADDRESS_BITS:
        raise InvalidOption(f"{name} must be a size such as 64GiB or 512MiB, above 4KiB and up to "
                            f"128TiB, not {text!r}")
    return -(-size // _PAGE) * _PAGE
