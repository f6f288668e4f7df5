"""Files that are cut off, damaged or made to do harm: typed errors, and memory of their size."""

import json
import struct
import tracemalloc
from functools import cache

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import save

from moeaccel.errors import MoeAccelError
from moeaccel.host.importers import (
    DamagedCheckpoint,
    ForeignCheckpoint,
    import_checkpoint,
    open_checkpoint,
    open_quantised,
)
from tests.support.checkpoints import expert_stems, float_experts, shapes, write_gguf

E, H, I = 1, 64, 32
KINDS = ("bf16", "fp8", "gptq", "awq", "packed", "mxfp4", "nvfp4", "Q8_0", "Q4_0", "Q4_1", "MXFP4",
         "Q4_K", "quantised")
BYTES_A_BYTE = 60  # memory for a byte of a file: 4-bit weights as float64, a few times
BYTES_IN_ALL = 4 << 20  # chunks that are worked on, whatever the size


def tensors_of(kind):
    rng = np.random.default_rng(0)
    found = {}

    def numbers(dtype, *shape):
        info = np.iinfo(dtype)
        return torch.from_numpy(rng.integers(info.min, info.max, shape, dtype=dtype))

    for part, _, stem in expert_stems(E):
        n, k = shapes(H, I)[part]
        halves = torch.from_numpy(rng.random((k // 32, n)).astype(np.float16))
        match kind:
            case "bf16":
                found[f"{stem}.weight"] = torch.randn(n, k).bfloat16()
            case "fp8":
                found |= {f"{stem}.weight": torch.randn(n, k).to(torch.float8_e4m3fn),
                          f"{stem}.weight_scale_inv": torch.ones(1, 1)}
            case "gptq":
                found |= {f"{stem}.qweight": numbers(np.int32, k // 8, n),
                          f"{stem}.qzeros": numbers(np.int32, k // 32, n // 8),
                          f"{stem}.scales": halves,
                          f"{stem}.g_idx": torch.arange(k, dtype=torch.int32) // 32}
            case "awq":
                found |= {f"{stem}.qweight": numbers(np.int32, k, n // 8),
                          f"{stem}.qzeros": numbers(np.int32, k // 32, n // 8),
                          f"{stem}.scales": halves}
            case "packed":
                found |= {f"{stem}.weight_packed": numbers(np.int32, n, k // 8),
                          f"{stem}.weight_scale": halves.T.contiguous(),
                          f"{stem}.weight_zero_point": numbers(np.int32, n // 8, k // 32),
                          f"{stem}.weight_shape": torch.tensor([n, k])}
            case "nvfp4":
                found |= {f"{stem}.weight": numbers(np.uint8, n, k // 2),
                          f"{stem}.weight_scale": torch.ones(n, k // 16).to(torch.float8_e4m3fn),
                          f"{stem}.weight_scale_2": torch.tensor(0.5)}
    if kind == "mxfp4":
        for part, n, k in (("gate_up", 2 * I, H), ("down", H, I)):
            stem = f"model.layers.0.mlp.experts.{part}_proj"
            found |= {f"{stem}_blocks": numbers(np.uint8, E, n, k // 32, 16),
                      f"{stem}_scales": torch.full((E, n, k // 32), 120, dtype=torch.uint8)}
    return found


@cache
def whole_file(kind, folder):
    """Return a file's name and bytes."""
    if kind == "quantised":
        source, path = folder / "source.safetensors", folder / "experts"
        source.write_bytes(save(tensors_of("bf16")))
        with open_checkpoint(source) as checkpoint:
            import_checkpoint(checkpoint, path)
        return "experts", path.read_bytes()
    if kind in KINDS[:7]:
        return "model.safetensors", save(tensors_of(kind))
    stacks = float_experts(E, H, I)
    path = folder / f"{kind}.gguf"
    if kind == "Q4_K":
        stacks = float_experts(E, 256, 256)
        writer = gguf.GGUFWriter(path, "x")
        for part, stack in stacks.items():
            blocks = np.zeros((*stack.shape[:2], stack.shape[2] // 256 * 144), np.uint8)
            writer.add_tensor(f"blk.0.ffn_{part}_exps.weight", blocks, raw_dtype=Kind.Q4_K)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    else:
        write_gguf(path, stacks, Kind[kind])
    return f"{kind}.gguf", path.read_bytes()


def read_all(path):
    """Read everything that a file holds."""
    if path.name == "experts":
        with open_quantised(path) as file:
            for layer in file.layers.values():
                list(layer)
        return
    with open_checkpoint(path) as checkpoint:
        for layer in checkpoint.layers:
            for _ in checkpoint.experts(layer, "int4_g32", drop_biases=True):
                pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


@pytest.mark.parametrize("kind", KINDS)
def test_whole_files_are_read(folder, kind):
    name, data = whole_file(kind, folder)
    (folder / name).write_bytes(data)
    read_all(folder / name)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_an_error_that_says_where_or_other_weights(folder, kind, data):
    name, original = whole_file(kind, folder)
    damaged = bytearray(original)
    end = len(damaged)
    header = min(1600, end)  # where damage does most
    for _ in range(data.draw(st.integers(0, 4), "changes")):
        at = data.draw(st.integers(0, header - 1) | st.integers(0, end - 1), "at")
        new = data.draw(st.sampled_from(
            [b"\0", b"\xff", b"9", b'"', b"\xff" * 8, struct.pack("<Q", 1 << 40), b"[[[["])
            | st.binary(min_size=1, max_size=2), "new")
        damaged[at : at + len(new)] = new
    damaged = damaged[: data.draw(st.integers(0, end) | st.just(end), "size")]
    path = folder / name
    path.write_bytes(damaged)
    message = ""
    tracemalloc.start()
    try:
        read_all(path)
    except (DamagedCheckpoint, ForeignCheckpoint) as error:
        message = str(error)
    except MoeAccelError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert not message or name in message
    assert peak < BYTES_A_BYTE * end + BYTES_IN_ALL


@pytest.mark.parametrize(("header", "message"), [
    (b"", "length of the header must be 8 bytes at byte 0 of .*, which ends at 0; it is truncated"),
    ((1 << 60, b"{}"), "header at byte 8 of .* must be at most 2 bytes, not 1152921504606846976"),
    (b"[]", "must be a JSON object, not a list"),
    (b"[" * 100_000, "header at byte 8 of .* must be JSON, but"),
    ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 9]}},
     r"tensor 'a' must lie between byte \d+ and the end of .*, \d+, not from \d+ to \d+; the file"),
    ({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 8]}},
     r"tensor 'a' at byte \d+ of .* must have 4398046511104 bytes for F32 .*, not 8"),
    ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}},
     "tensor 'a' in the header of .* must have a dtype, a shape and two data_offsets"),
    ({"a": 3}, "tensor 'a' in the header of .* must have a dtype"),
])
def test_headers_of_safetensors_that_promise_too_much(tmp_path, header, message):
    if isinstance(header, dict):
        header = json.dumps(header).encode()
    size, text = header if isinstance(header, tuple) else (len(header), header)
    path = tmp_path / "model.safetensors"
    path.write_bytes(size.to_bytes(8, "little") + text + b"12345678" if text else b"")
    if isinstance(header, tuple):
        path.write_bytes(size.to_bytes(8, "little") + text)
    with pytest.raises(DamagedCheckpoint, match=message):
        open_checkpoint(path)


def gguf_bytes(tensors=0, pairs=0, rest=b"", version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + rest


def text(value):
    return struct.pack("<Q", len(value)) + value


@pytest.mark.parametrize(("data", "error", "message"), [
    (b"", ForeignCheckpoint, "must start with 'GGUF'"),
    (b"GGUF", DamagedCheckpoint, "version must be 4 bytes at byte 4 of .*, which ends at 4"),
    (gguf_bytes(version=1), ForeignCheckpoint, "must be of GGUF version 2 or 3, .* not 1"),
    (gguf_bytes(pairs=1 << 60), DamagedCheckpoint, "length of a key of the metadata must be 8"),
    (gguf_bytes(pairs=1, rest=text(b"k") + struct.pack("<IIQ", 9, 0, 1 << 62)), DamagedCheckpoint,
     "value of 'k' must be 4611686018427387904 bytes at byte 49"),
    (gguf_bytes(pairs=1, rest=text(b"k") + struct.pack("<IIQ", 9, 9, 1) + struct.pack(
        "<IQ", 9, 1) * 9), DamagedCheckpoint, "must be of a type from 0 to 12, arrays at most 4"),
    (gguf_bytes(pairs=1, rest=text(b"\xff") + struct.pack("<IB", 0, 0)), DamagedCheckpoint,
     "must be UTF-8"),
    (gguf_bytes(tensors=1, rest=text(b"t") + struct.pack("<I", 5)), DamagedCheckpoint,
     "tensor 't', described at byte 24 of .*, must have 1 to 4 dimensions, not 5"),
    (gguf_bytes(tensors=1, rest=text(b"t") + struct.pack("<IQIQ", 1, 32, 999, 0)),
     DamagedCheckpoint, "tensor 't', described at .* must be of a type .* gguf knows, not 999"),
    (gguf_bytes(tensors=1, rest=text(b"t") + struct.pack("<IQIQ", 1, 33, 2, 0)),
     DamagedCheckpoint, "must have rows of whole blocks of 32 for Q4_0, not of 33"),
    (gguf_bytes(tensors=1, rest=text(b"t") + struct.pack("<IQIQ", 1, 1 << 62, 2, 0)),
     DamagedCheckpoint, r"tensor 't' must be \d+ bytes at byte 64 of .*, which ends at 57"),
    (gguf_bytes(tensors=2, rest=(text(b"t") + struct.pack("<IQIQ", 1, 0, 2, 0)) * 2 + b"\0" * 32),
     DamagedCheckpoint, "tensor 't', described at byte 57 of .*, must not be there twice"),
    (gguf_bytes(pairs=1, rest=text(b"general.alignment") + struct.pack("<II", 4, 3)),
     DamagedCheckpoint, "general.alignment of .* must be a power of two, not 3"),
])
def test_headers_of_gguf_that_promise_too_much(tmp_path, data, error, message):
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(error, match=message):
        open_checkpoint(path)
