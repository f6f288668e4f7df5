"""The device as a model: same registers, rings, checks and bits as the hardware, only faster."""

from moeaccel.host.transports.golden.transport import GoldenTransport

__all__ = ["GoldenTransport"]
