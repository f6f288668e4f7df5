"""Files that hold named tensors, read without executing anything in them."""

from moeaccel.host.importers.files.gguf_file import read_gguf
from moeaccel.host.importers.files.safetensors_file import read_safetensors
from moeaccel.host.importers.files.stored import StoredTensor

__all__ = ["StoredTensor", "read_gguf", "read_safetensors"]
