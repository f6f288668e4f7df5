"""What a call and an expert cost on each side, and what moving one costs.

A layer's experts are computed on two sides at once: the *torch device*, where attention runs, and
the accelerator's *cards*, where the images are. With T tokens, D the experts on the cards, R the
residents and M the moved experts that the torch device computes, and n tokens of an expert::

    device = device_call + row min(T, sum n) + sum device(n) + contend |M|            over D
    link   = move_call + move |M| + up min(T, sum n)
    torch  = shared(T) + torch_call + sum torch(n)                                    over R
    torch  = max(torch, link) + torch_call + sum (decode + torch(n))                  over M, if any
    layer  = max(device, torch) + merge, if there are both

    torch(n)  = max(resident's bytes / torch memory, n * weights / torch MACs)
    device(n) = max(image / cards' memory, n * weights / cards' MACs)
    row       = x and y of a token, staged by the host and sent over the links;  up: y alone
    move      = image / link;  decode = image to bf16
    contend   = image / cards' memory where images come from the cards, else 0

The cards are asked first and awaited last. What moves is the quantised image, to the torch device:
from the host's memory, which keeps a copy until it is told to release it, or from the cards where
theirs is the only one. y goes the same way and goes first. Several cards share every expert: its
width is dealt to them, so that each reads its part and their y are added. ``device_call`` is the
driver's time and, where the torch device has a memory of its own, its copies down and up; then a
write of the memory of the card, a doorbell and a read: small DMAs of 6 to 12 microseconds each.
min(T, sum n) is at least the rows that are sent: those that have an expert on the device. The
policy's own time to decide is not in here.

Presets are published peaks times what is usually sustained; every number can be replaced by a
measured one.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from moeaccel.config import PRESETS, AcceleratorConfig
from moeaccel.errors import MoeAccelError
from moeaccel.formats import weight_format
from moeaccel.host.policies.errors import BudgetTooSmall
from moeaccel.host.policies.registry import lookup
from moeaccel.image import ExpertShape
from moeaccel.zoo import Model

__all__ = ["CARDS", "TORCH", "Cards", "LayerCosts", "Machine", "Rates", "TorchDevice", "machine"]

ELEMENT_BYTES = 2
"""Of x, y and of weights on the torch device: bfloat16."""

RESERVED = 0.05
"""Share of a card's memory that is not for images: buffers, rings, tables."""


@dataclass(frozen=True, kw_only=True)
class TorchDevice:
    """Where attention runs, and the experts that are resident.

    Parameters
    ----------
    name : :class:`str`
    memory_bytes_per_second, macs_per_second : :class:`float`
        Sustained, bf16.
    call_seconds : :class:`float`
        Of one grouped call beside its experts: gathering rows, three kernels, adding up.
    copy_seconds, link_bytes_per_second : :class:`float`
        Of starting a copy from or to the host's memory, and its rate; 0 and infinity where that is
        the device's own memory.
    """

    name: str
    memory_bytes_per_second: float
    macs_per_second: float
    call_seconds: float
    copy_seconds: float = 0.0
    link_bytes_per_second: float = math.inf


@dataclass(frozen=True, kw_only=True)
class Cards:
    """Accelerators of one kind, as many as hold the model.

    Parameters
    ----------
    name : :class:`str`
    config : :class:`AcceleratorConfig`
    clock_hz : :class:`float`
        With the configuration it says how many products a card computes.
    memory_bytes_per_second : :class:`float`
        Of one card, sustained.
    capacity_bytes : :class:`int`
        Of one card.
    link_bytes_per_second : :class:`float`
        Of one card's link to the host, a direction.
    dma_seconds : :class:`float`
        Of a small DMA: 6 to 7 microseconds when polling, 11 to 12 by interrupt.
    doorbell_seconds, driver_seconds, host_bytes_per_second : :class:`float`
        Of a register write; of the driver's own part of a call, and its rate of staging x and y.
    count : :class:`int`
    """

    name: str
    config: AcceleratorConfig
    clock_hz: float
    memory_bytes_per_second: float
    capacity_bytes: int
    link_bytes_per_second: float
    dma_seconds: float = 7e-6
    doorbell_seconds: float = 1e-6
    driver_seconds: float = 25e-6
    host_bytes_per_second: float = 12e9
    count: int = 1


TORCH = {device.name: device for device in (
    # 3.35 TB/s and 989 TFLOPS; PCIe 5.0 x16
    TorchDevice(name="h100", memory_bytes_per_second=0.8 * 3.35e12, macs_per_second=0.5 * 495e12,
                call_seconds=20e-6, copy_seconds=6e-6, link_bytes_per_second=50e9),
    # 1.01 TB/s and 165 TFLOPS; PCIe 4.0 x16
    TorchDevice(name="rtx4090", memory_bytes_per_second=0.85 * 1.008e12,
                macs_per_second=0.6 * 82e12, call_seconds=20e-6, copy_seconds=6e-6,
                link_bytes_per_second=24e9),
    # One socket: eight channels of DDR5-4800 and AMX, as sustained in KTransformers (SOSP'25)
    TorchDevice(name="cpu", memory_bytes_per_second=0.75 * 307e9, macs_per_second=10.6e12,
                call_seconds=15e-6),
)}
"""Torch devices by name."""

CARDS = {cards.name: cards for cards in (
    # HBM2 of 460 GB/s peak; PCIe 3.0 x16. `hbm32` takes 1,024 bytes a cycle at the memory's rate.
    Cards(name="u55c", config=PRESETS["hbm32"], clock_hz=450e6,
          memory_bytes_per_second=0.9 * 460e9, capacity_bytes=16 << 30,
          link_bytes_per_second=12.5e9),
)}
"""Accelerator cards by name."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast the link, the device and the torch device are beside what is believed; 1 as
    believed.

    Parameters
    ----------
    link, device, torch : :class:`float`
    """

    link: float = 1.0
    device: float = 1.0
    torch: float = 1.0


@dataclass(frozen=True)
class LayerCosts:
    """Seconds and bytes of one layer of a model on a machine; the formulas are the module's.

    Parameters
    ----------
    n_experts : :class:`int`
    image_bytes, resident_bytes : :class:`int`
        Of an expert: its image; its weights in the torch device's memory.
    device_call, torch_call, move_call, merge : :class:`float`
    row, up, move, decode, contend : :class:`float`
    between_call, between_read, between_product : :class:`float`
        Between two layers of experts: calls of attention; its weights read once; its products for
        one token.
    device_read, device_product, torch_read, torch_product : :class:`float`
        Of an expert's weights: read once; multiplied for one token.
    n_shared : :class:`int`
        Shared experts, torch work of every token.
    """

    n_experts: int
    image_bytes: int
    resident_bytes: int
    device_call: float
    torch_call: float
    move_call: float
    merge: float
    row: float
    up: float
    move: float
    decode: float
    contend: float
    between_call: float
    between_read: float
    between_product: float
    device_read: float
    device_product: float
    torch_read: float
    torch_product: float
    n_shared: int = 0
    _tables: list[np.ndarray] = field(default_factory=list, repr=False, compare=False)

    def at(self, rates: Rates) -> LayerCosts:
        """Return the costs with other rates; what is no rate (a call) stays as it is."""
        return dataclasses.replace(
            self, _tables=[], move=self.move / rates.link,
            device_read=self.device_read / rates.device,
            device_product=self.device_product / rates.device,
            contend=self.contend / rates.device,
            torch_read=self.torch_read / rates.torch,
            torch_product=self.torch_product / rates.torch, decode=self.decode / rates.torch)

    def tables(self, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the seconds of an expert with 0, 1, ... tokens, at least as many as asked for.

        Returns
        -------
        device, torch : float64
        """
        if not self._tables or len(self._tables[0]) <= tokens:
            n = np.arange(max(64, 2 * tokens) + 1)
            self._tables[:] = (
                np.where(n > 0, np.maximum(self.device_read, n * self.device_product), 0),
                np.where(n > 0, np.maximum(self.torch_read, n * self.torch_product), 0))
        return self._tables[0], self._tables[1]

    @cached_property
    def single(self) -> tuple[float, float]:
        """Seconds of an expert with one token, on the device and on the torch device."""
        return (max(self.device_read, self.device_product),
                max(self.torch_read, self.torch_product))

    def shared(self, tokens: int) -> float:
        """Return the seconds of the shared experts."""
        if not self.n_shared:
            return 0.0
        return self.torch_call + self.n_shared * max(self.torch_read, tokens * self.torch_product)

    def between(self, tokens: int) -> float:
        """Return the seconds between two layers of experts, in which the link has nothing to do."""
        return self.between_call + max(self.between_read, tokens * self.between_product)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A torch device and cards.

    Parameters
    ----------
    torch : :class:`TorchDevice`
    cards : :class:`Cards`
    """

    torch: TorchDevice
    cards: Cards

    @property
    def name(self) -> str:
        """Both, for tables."""
        return f"{self.torch.name} + {self.cards.count} x {self.cards.name}"

    def holding(self, model: Model, weight_format_name: str) -> Machine:
        """Return the machine with as many cards as hold the model's experts.

        Raises
        ------
        BudgetTooSmall
            If the zoo does not know the model's size.
        """
        need = (_known(model, "n_moe_layers") * _known(model, "n_experts")
                * self.image_bytes(model, weight_format_name))
        room = self.cards.capacity_bytes * (1 - RESERVED)
        cards = dataclasses.replace(self.cards, count=max(1, math.ceil(need / room)))
        return dataclasses.replace(self, cards=cards)

    def image_bytes(self, model: Model, weight_format_name: str) -> int:
        """Return the bytes of one expert's weights, scales and row exponents."""
        return ExpertShape(weight_format(weight_format_name), _known(model, "d_model"),
                           _known(model, "d_expert"), self.cards.config.row_multipliers,
                           self.cards.config.channels).stored_bytes

    def layer(self, model: Model, *, weight_format_name: str = "int4_g32",
              activation_bits: int = 16, single_copy: bool = False,
              fused: bool = False) -> LayerCosts:
        """Return the costs of one layer of a model.

        Parameters
        ----------
        model : :class:`Model`
        weight_format_name : :class:`str`
            Of the images.
        activation_bits : :class:`int`
            8 or 16; 16 are two planes, and half the products.
        single_copy : :class:`bool`
            Whether images are on the cards alone; always where the torch device is the host itself.
        fused : :class:`bool`
            Whether the torch device multiplies images as they are, by a kernel that decodes as it
            reads, and residents are images; else both are bf16.

        Raises
        ------
        BudgetTooSmall
            If the zoo does not know the model's size, or the cards do not hold it.
        """
        torch, cards = self.torch, self.cards
        image, fmt = self.image_bytes(model, weight_format_name), weight_format(weight_format_name)
        need = _known(model, "n_moe_layers") * _known(model, "n_experts") * image
        if need > cards.count * cards.capacity_bytes * (1 - RESERVED):
            raise BudgetTooSmall(
                f"cards must hold {model.name}, {need:,} bytes as {fmt.name}, but {cards.count} x "
                f"{cards.name} have {cards.count * cards.capacity_bytes:,} and "
                f"{RESERVED:.0%} of that for buffers; use Machine.holding(), or a smaller format")
        d_model = _known(model, "d_model")
        weights, row = model.expert_weights, d_model * ELEMENT_BYTES
        memory = cards.count * cards.memory_bytes_per_second
        macs = (cards.count * cards.clock_hz * cards.config.multipliers
                * (2 if fmt.packed else 1) / (activation_bits // 8))
        from_cards = single_copy or math.isinf(torch.link_bytes_per_second)
        link = torch.link_bytes_per_second
        if from_cards:
            link = min(cards.count * cards.link_bytes_per_second, link)
        # x goes once from the torch device, then to every card; each card has a y of its own.
        staged = row * (1 + cards.count) / cards.host_bytes_per_second
        down = row / torch.link_bytes_per_second + row / cards.link_bytes_per_second
        up = row / torch.link_bytes_per_second + row / cards.link_bytes_per_second
        resident = image if fused else weights * ELEMENT_BYTES
        attention = 4 * d_model**2
        return LayerCosts(
            n_experts=_known(model, "n_experts"), image_bytes=image,
            resident_bytes=resident,
            device_call=(cards.driver_seconds + 2 * cards.dma_seconds + cards.doorbell_seconds
                         + 2 * torch.copy_seconds),
            torch_call=torch.call_seconds,
            move_call=torch.copy_seconds + (cards.dma_seconds if from_cards else 0.0),
            merge=torch.call_seconds / 4, row=staged + down + up, up=up, move=image / link,
            decode=0.0 if fused else (image + resident) / torch.memory_bytes_per_second,
            contend=image / memory if from_cards else 0.0, between_call=2 * torch.call_seconds,
            between_read=attention * ELEMENT_BYTES / torch.memory_bytes_per_second,
            between_product=attention / torch.macs_per_second,
            device_read=image / memory, device_product=weights / macs,
            torch_read=resident / torch.memory_bytes_per_second,
            torch_product=weights / torch.macs_per_second, n_shared=model.n_shared or 0)


def machine(torch: str = "h100", cards: str = "u55c") -> Machine:
    """Return a machine of presets.

    Raises
    ------
    UnknownPolicy
        If there is no such preset.
    """
    return Machine(torch=lookup("torch device", TORCH, torch), cards=lookup("cards", CARDS, cards))


class UnsizedModel(MoeAccelError, ValueError):
    """A model of the zoo whose sizes were not published."""


def _known(model: Model, name: str) -> int:
    value = getattr(model, name)
    if not value:
        raise UnsizedModel(f"{name} of {model.name} must be known, but was not published; use "
                           "another model of `moeaccel models`")
    return value
