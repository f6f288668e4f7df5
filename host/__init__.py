"""Driver and runtime: transports, devices, queues, memory and hybrid inference.

>>> from moeaccel.host import open_device
>>> with open_device("golden", config="tiny") as device:
...     device.counters()["commands"]
0
"""

from moeaccel.host.device import Device
from moeaccel.host.errors import HostError
from moeaccel.host.layers import CallStatistics, Experts, Handle, Linear
from moeaccel.host.moe import Moe
from moeaccel.host.opening import open_device
from moeaccel.host.routing import Router

__all__ = [
    "CallStatistics", "Device", "Experts", "Handle", "HostError", "Linear", "Moe", "Router",
    "open_device"]
