"""Importers: what engines write down about their routes, one file a format."""

from moeaccel.host.traces.importers.imatrix import import_imatrix
from moeaccel.host.traces.importers.megatron import import_megatron
from moeaccel.host.traces.importers.routed_experts import import_routed_experts
from moeaccel.host.traces.importers.sglang import import_sglang

__all__ = ["import_imatrix", "import_megatron", "import_routed_experts", "import_sglang"]
