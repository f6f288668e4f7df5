"""The golden models: the device's exact bits, and how good they are.

One file a block of the hardware; ``experts`` joins them.
"""

from moeaccel.golden.experts import DeviceResult, combined, experts, gemm
from moeaccel.golden.reference import experts_float64

__all__ = ["DeviceResult", "combined", "experts", "experts_float64", "gemm"]
