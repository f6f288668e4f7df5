"""The golden models: the device's exact bits, and how good they are."""

from moeaccel.golden.experts import DeviceResult, experts, gemm
from moeaccel.golden.reference import experts_float64

__all__ = ["DeviceResult", "experts", "experts_float64", "gemm"]
