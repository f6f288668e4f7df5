"""The device as a model: same registers, rings, checks and bits as the hardware, only faster."""

from moeaccel.config import AcceleratorConfig
from moeaccel.host.transports.base import DeviceSpec, Scheme, Transport
from moeaccel.host.transports.golden.transport import GoldenTransport

__all__ = ["SCHEME", "GoldenTransport"]


def _open(spec: DeviceSpec) -> tuple[Transport, AcceleratorConfig]:
    size = spec.memory_bytes or min(1 << 32, 1 << spec.config.address_bits)
    return GoldenTransport(spec.config, memory_bytes=size, **spec.options), spec.config


SCHEME = Scheme(
    help="the golden model behind registers, rings and memory",
    time="with timing=True, cycles from the cycle model",
    options=(GoldenTransport,), open=_open)
