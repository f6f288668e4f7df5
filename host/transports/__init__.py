"""Ways to a device: the golden model, the RTL, and later wires.

The classes are imported where they are used, so that a driver of hardware needs no torch and one
of the golden model no simulator.
"""

from moeaccel.host.transports.base import Transport

__all__ = ["Transport"]
