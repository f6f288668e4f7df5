"""Which device experts go to, and how they are stored there."""

from __future__ import annotations

import gc
import logging
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from moeaccel.config import PRESETS, AcceleratorConfig, preset
from moeaccel.errors import FormatError
from moeaccel.formats import ALL_FORMATS
from moeaccel.host.cluster import Cluster
from moeaccel.host.device import Device
from moeaccel.host.errors import (
    DeviceClosed,
    InvalidOption,
    OutOfDeviceMemory,
    UnsupportedExperts,
)
from moeaccel.host.hybrid import Hybrid, ResidentMath
from moeaccel.host.importers.coded import IMPORT_QUANTISERS
from moeaccel.host.limits import check_layer
from moeaccel.host.opening import open_device
from moeaccel.host.options import check_names, flag
from moeaccel.host.plugins.transformers.choice import (
    Choice,
    LayerDims,
    buffer_bytes,
    choose,
    memory_size,
)
from moeaccel.host.plugins.transformers.routes import Routes
from moeaccel.host.policies.systems import System
from moeaccel.host.process import Lock
from moeaccel.host.transports.base import Transport

__all__ = ["Session", "Unsupported", "Verify", "check_limits", "check_memory", "choice_for",
           "current_session", "lock", "open_session", "option", "session_for", "use_device",
           "whenever_set"]

logger = logging.getLogger(__name__)

Verify = Literal["sampled", "full"]
"""How much of the weights each call compares with what was uploaded."""

Unsupported = Literal["refuse", "eager"]
"""What happens to a layer that the device does not support."""

_SIMULATED = ("golden", "rtl")
_ENVIRONMENT = {"weight_format": "MOEACCEL_WEIGHT_FORMAT",
                "activation_bits": "MOEACCEL_ACTIVATION_BITS",
                "quantiser": "MOEACCEL_QUANTISER"}


@dataclass(frozen=True, kw_only=True)
class _Options:
    """How experts are stored and watched; validated on creation.

    Raises
    ------
    InvalidOption
        Naming the option, its value and what it must be.
    """

    weight_format: str = "int4_g32"
    activation_bits: int = 16
    grid_exponent: int | None = None
    verify: Verify = "sampled"
    unsupported: Unsupported = "refuse"
    quantiser: str = "search"
    keep_host_weights: bool = True
    # What is uploaded stays so, whoever computes it, and by which routes.
    hybrid: Hybrid | None = field(default=None, compare=False)
    routes: Routes | None = field(default=None, compare=False)
    route: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        choices: dict[str, Sequence[object]] = {
            "weight_format": list(ALL_FORMATS), "activation_bits": (8, 16),
            "verify": get_args(Verify), "unsupported": get_args(Unsupported),
            "quantiser": IMPORT_QUANTISERS, "keep_host_weights": (True, False)}
        for name, possible in choices.items():
            value = getattr(self, name)
            if not isinstance(value, str | int) or value not in possible:
                raise InvalidOption(
                    f"{name} must be one of {', '.join(map(str, possible))}, not {value!r}")
        grid: Any = self.grid_exponent
        if isinstance(grid, bool) or not isinstance(grid, int | None):
            raise InvalidOption(f"grid_exponent must be an integer, not {grid!r}")


@dataclass(frozen=True, kw_only=True)
class Session(_Options):
    """Where experts go, and how they are stored and watched there; see :func:`use_device`."""

    device: Device | Cluster

    @property
    def devices(self) -> tuple[Device, ...]:
        """The device, or those of a cluster that are open in this process."""
        return self.device.devices if isinstance(self.device, Cluster) else (self.device,)


lock = Lock()
"""Held while the session or what was uploaded is looked at or changed."""

whenever_set: list[Callable[[bool], None]] = []
"""Told ``route=`` whenever a device is set."""

_options: dict[str, Any] = {}  # as given to use_device
_session: Session | None = None
_chosen: frozenset[str] = frozenset()  # what the plug-in chose for it: "config", "memory"


def use_device(device: Device | Cluster | None, *, weight_format: str | None = None,
               activation_bits: int | None = None, grid_exponent: int | None = None,
               verify: Verify = "sampled", unsupported: Unsupported = "refuse",
               quantiser: str | None = None, keep_host_weights: bool = True,
               policy: str | System | None = None, gpu_bytes: int | str = 0,
               resident_math: ResidentMath = "bf16", routes: Any = None, route: bool = False,
               **hybrid: Any) -> None:
    """Set the device for every model from now on; layers move to it on their next call.

    Parameters
    ----------
    device : :class:`Device` or :class:`moeaccel.host.cluster.Cluster`, optional
        It stays yours to close. None: what the environment says, opened when it is needed. The
        experts of a cluster's layers are dealt to its devices evenly; policies, whose costs are of
        one device, and ``keep_host_weights=False`` are for one.
    weight_format, activation_bits, grid_exponent
        See :meth:`Device.load_experts`; what is left out is taken from the environment.
    verify : ``"sampled"`` or ``"full"``
        How much of a layer's weights each call compares with what was uploaded: a part, another one
        each time (see :mod:`moeaccel.host.plugins.transformers.watch` for what is seen when), or
        all of them.
    unsupported : ``"refuse"`` or ``"eager"``
        What happens to a layer that the device does not support: an error, or transformers' own
        code and one warning.
    quantiser : :class:`str`, optional
        ``"search"`` or ``"amax"``, see :meth:`Device.load_experts`; left out: of the environment.
    keep_host_weights : :class:`bool`
        False: once a layer is in device memory its parameters give up their memory; what is left
        of them are shapes, and NaN. Such a model runs on this device only, and cannot be saved or
        moved to another device or format, until :func:`release` gives it back what the device has:
        its weights as they were quantised. Parameters that accelerate loads for each call stay.
    policy : :class:`str` or :class:`System`, optional
        Which experts are computed where the rest of the model is: see
        :class:`moeaccel.host.hybrid.Hybrid`. When left out, all on the device. What is uploaded
        stays where it is when only the policy changes.
    gpu_bytes : :class:`int` or :class:`str`
        Memory there for experts: bytes, as ``"2GiB"``, or ``"25%"`` of what all take there.
    resident_math : ``"bf16"`` or ``"exact"``
    routes : :class:`moeaccel.host.traces.RoutingTrace`, path of one, or pair (ids, weights)
        Take the place of the routers' own, pass by pass, in every layer; see
        :class:`moeaccel.host.plugins.transformers.routes.Routes`. Given again, they begin again.
    route : :class:`bool`
        Whole MoE blocks, whose router the device has, are computed there: x goes in, y comes out.
        The others' experts are, as ever, by the host's routes. Which is which, and why, says
        :func:`moeaccel.host.plugins.transformers.routing`. With a policy, which has to know the
        routes, it is two calls: the device routes, and computes what is left to it; shared experts
        are the torch device's. So it is on a cluster: one device routes a layer, and those that
        have its experts compute what was chosen. Not with routes.
    **hybrid
        Further options of :class:`moeaccel.host.hybrid.Hybrid`.

    Raises
    ------
    InvalidOption
        If an argument is not among the possible values.
    DeviceClosed
        If the device is closed.
    PolicyError
        If there is no such policy, or none that a model can run with.
    TraceError
        If routes are no trace.
    """
    global _session, _options, _chosen
    if not isinstance(device, Device | Cluster | None):
        raise InvalidOption("device must be a Device, from open_device(), a Cluster of some, or "
                            f"None, not {type(device).__name__}")
    if device is not None and device.closed:
        if isinstance(device, Device):
            _ = device.transport  # raises, and knows why
        raise DeviceClosed("cluster must be open, but was closed; make another one")
    given = {"weight_format": weight_format, "activation_bits": activation_bits,
             "quantiser": quantiser}
    options = {name: value for name, value in given.items() if value is not None}
    options |= {"grid_exponent": grid_exponent, "verify": verify, "unsupported": unsupported,
                "keep_host_weights": keep_host_weights}
    check_names("use_device", hybrid, use_device, Hybrid)
    if policy is not None:
        options["hybrid"] = Hybrid(
            policy, gpu_bytes=gpu_bytes, resident_math=resident_math, **hybrid)
    elif needless := [*(["gpu_bytes"] if gpu_bytes else []),
                      *(["resident_math"] if resident_math != "bf16" else []), *hybrid]:
        raise InvalidOption(f"policy must be given with {', '.join(needless)}, not None")
    if routes is not None:
        if unsupported == "eager":
            raise InvalidOption("unsupported must be 'refuse' with routes, not 'eager': layers on "
                                "the host would keep their routers' own")
        options["routes"] = Routes(routes)
    if isinstance(device, Cluster):
        for name, chosen, why in (
                ("policy", policy is not None, "the costs that it knows are those of one"),
                ("keep_host_weights=False", not keep_host_weights,
                 "what a lost one had is loaded from the host")):
            if chosen:
                raise InvalidOption(f"device must be one Device with {name}, not a Cluster: {why}")
    if flag("route", route):
        if routes is not None:
            raise InvalidOption("route must be False with routes, which take the place of a "
                                "router's own, not True")
        options["route"] = True
    _Options(**options)
    with lock.held:
        _options, _chosen = options, frozenset()
        _session = None if device is None else Session(device=device, **_with_environment())
        for tell in whenever_set:
            tell("route" in options)


def _with_environment() -> dict[str, Any]:
    """Return the options, those that were left out from the environment.

    Raises
    ------
    InvalidOption
        Naming the variable.
    """
    options = dict(_options)
    for option, variable in _ENVIRONMENT.items():
        text = os.environ.get(variable)
        if option in options or text is None:
            continue
        value: Any = int(text) if option == "activation_bits" and text.isdecimal() else text
        try:
            _Options(**{option: value})
        except InvalidOption as error:
            raise InvalidOption(str(error).replace(option, variable, 1)) from None
        options[option] = value
    return options


def current_session() -> Session:
    """Return where experts go, opening the device that the environment names if there is none.

    Raises
    ------
    InvalidOption
        If an environment variable makes no sense.
    """
    return session_for([])


def open_session() -> Session | None:
    """Return where experts go, if that is known yet."""
    return _session


def session_for(layers: Sequence[LayerDims], uploading: Sequence[LayerDims] = ()) -> Session:
    """Return where layers go, opening a device for them if there is none.

    A device that the plug-in chose itself gives way to a larger one when they do not fit it; others
    that were on it move on their next calls.

    Parameters
    ----------
    layers : sequence of :class:`LayerDims`
        Those that it has to be able to run.
    uploading : sequence of :class:`LayerDims`
        Of these, the ones that need memory now.
    """
    global _session
    with lock.held:
        if _session is None:
            _session = _open(layers)
        elif not _has_room(_session, layers, uploading):
            small = _session.device
            assert isinstance(small, Device)  # the plug-in chooses no cluster
            _session = _open(layers, Choice(small.config, small.transport.memory_bytes))
            logger.warning("layers on the device of config %r before it move on their next calls",
                           small.config.name)
        return _session


def _has_room(session: Session, layers: Sequence[LayerDims],
              uploading: Sequence[LayerDims]) -> bool:
    """Return whether layers fit, or have to because the user chose what they do not fit."""
    if not _chosen or isinstance(session.device, Cluster) or session.device.closed:
        return True
    config, memory = session.device.config, session.device.memory
    if "config" in _chosen and not all(layer.fits(config) for layer in layers):
        return False
    if "memory" not in _chosen or not uploading:
        return True
    need = _bytes_of(config, session.weight_format, uploading)
    if need > memory.largest_free_block:
        gc.collect()  # a model that is gone may wait for it
    return need <= memory.largest_free_block


def _bytes_of(config: AcceleratorConfig, weight_format: str, layers: Sequence[LayerDims]) -> int:
    """Return how much memory the images of layers and one command's buffers take."""
    return buffer_bytes(config, layers) + sum(
        layer.image_bytes(config, weight_format) for layer in layers)


def _fixed() -> tuple[AcceleratorConfig | None, int | None]:
    """Return the configuration and the bytes of memory that the environment fixes."""
    name, size = os.environ.get("MOEACCEL_CONFIG"), os.environ.get("MOEACCEL_MEMORY")
    return (None if name is None else preset(name),
            None if size is None else memory_size("MOEACCEL_MEMORY", size))


def choice_for(layers: Sequence[LayerDims], *, weight_format: str | None = None,
               least: Choice | None = None) -> Choice:
    """Return what the environment fixes, and what is chosen for the rest; see :func:`choose`."""
    config, memory = _fixed()
    choice = choose(layers, weight_format or _Options(**_with_environment()).weight_format,
                    config=config, least=least)
    return choice if memory is None else choice._replace(memory_bytes=memory)


def _open(layers: Sequence[LayerDims], least: Choice | None = None) -> Session:
    """Open the device that the environment names."""
    global _chosen
    options = _with_environment()
    spec = os.environ.get("MOEACCEL_DEVICE", "golden")
    config, memory = _fixed()
    chosen = {what for what, value in (("config", config), ("memory", memory)) if value is None}
    if spec in _SIMULATED:
        config, memory = choice_for(layers, least=least)
    else:
        chosen = set()  # a board or a recording is what it is
    device = open_device(spec, config=config, memory_bytes=memory)
    # Nobody else closes it: it goes when the last layer that lives in it has gone.
    weakref.finalize(device, _close_own, device.transport, os.getpid())
    _chosen = frozenset(chosen)
    if chosen:
        # What figures stand for is said aloud where it is not what the documents name.
        usual = config is PRESETS["small"] and least is None
        logger.log(logging.INFO if usual else logging.WARNING,
                   "%s chosen to fit the model: config %r with %d MiB of memory; MOEACCEL_CONFIG, "
                   "MOEACCEL_MEMORY or use_device() choose others", " and ".join(sorted(chosen)),
                   device.config.name, device.transport.memory_bytes >> 20)
    return Session(device=device, **options)


def _close_own(transport: Transport, process: int) -> None:
    """Close a transport, unless this is a fork of the process that opened it."""
    if os.getpid() == process:
        transport.close()


def option(name: str) -> Any:
    """Return an option of :func:`use_device` without opening a device."""
    return _options.get(name, getattr(_Options, name))


def check_limits(session: Session, layer: LayerDims) -> None:
    """Raise :class:`LimitExceeded`, :class:`UnsupportedExperts` for the activation or
    :class:`FormatError` if the configuration of a device does not take a layer, or its part."""
    for device in session.devices:
        config = device.config
        shapes = [layer.shape(config, session.weight_format)] * _part(session, layer)
        try:
            check_layer(config, shapes)
        except FormatError as error:
            if layer.activation in config.activations:
                raise
            raise UnsupportedExperts(str(error)) from error


def _part(session: Session, layer: LayerDims) -> int:
    """Return the most experts of a layer that a device has."""
    return -(-layer.experts // len(session.device)) if isinstance(
        session.device, Cluster) else layer.experts


def check_memory(session: Session, layers: Sequence[LayerDims]) -> None:
    """Raise :class:`OutOfDeviceMemory` if layers do not fit free memory together."""
    parts = [layer._replace(experts=_part(session, layer)) for layer in layers]
    for device in session.devices:
        need = _bytes_of(device.config, session.weight_format, parts)
        if need > device.memory.free_bytes:
            gc.collect()
        if need > (free := device.memory.free_bytes):
            raise OutOfDeviceMemory(
                f"{len(layers)} layers of experts and one command's buffers must fit each "
                f"channel's memory, but take {need:,} bytes of {free:,} that are free; open the "
                "device with more memory_bytes, or set MOEACCEL_MEMORY")
