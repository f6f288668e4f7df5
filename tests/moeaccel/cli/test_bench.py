"""``moeaccel bench``: what its options allow, and what it prints."""

import json

import pytest
from typer.testing import CliRunner

from moeaccel.cli import app
from moeaccel.formats import FORMATS

runner = CliRunner()
DECODE = ["bench", "decode", "--device", "golden", "--model", "granite-3.x-3b-a800m",
          "--config", "peer256"]
GEMM = ["bench", "gemm", "--device", "golden"]


def said(result):
    """Return what a command wrote, without the frame and the line breaks of an error."""
    return " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(("arguments", "message"), [
    ([*DECODE, "--memory", "foo"], "'foo' is not one of 'ideal', 'dram'"),
    ([*DECODE, "--memory", "dram"], "memory must be 'ideal' on 'golden', not 'dram'"),
    ([*DECODE, "--latency", "-1000"], "Invalid value for '--latency'"),
    ([*DECODE, "--latency", "0"], "Invalid value for '--latency'"),
    ([*DECODE, "--activation-bits", "12"], "'12' is not one of '16', '8'"),
    ([*DECODE, "--device", "fpga"], "'fpga' is not one of 'rtl', 'golden'"),
    ([*DECODE, "--weight-format", "int3"], "weight_format must be one of mxint8, int4_g32"),
    ([*DECODE, "--tokens", "0"], "Invalid value for '--tokens'"),
    ([*DECODE, "--layers", "-1"], "Invalid value for '--layers'"),
    ([*DECODE, "--channels", "-1"], "Invalid value for '--channels'"),
    ([*DECODE, "--seed", "-1"], "Invalid value for '--seed'"),
    ([*GEMM, "--m", "0", "--k", "32", "--n", "32"], "Invalid value for '--m'"),
    ([*GEMM, "--m", "1", "--k", "-32", "--n", "32"], "Invalid value for '--k'"),
    (["bench", "prefill", *DECODE[2:], "--routing", "zipf:nan"], "a number S from 0 to 100"),
    (["bench", "prefill", *DECODE[2:], "--routing", "zipf:-1"], "a number S from 0 to 100"),
    ([*DECODE, "--model", "aria"], "layers of one known size, but those of aria were not publ"),
    ([*DECODE, "--model", "qwen4-exp"], "those of qwen4-exp were not published"),
    ([*DECODE, "--model", "swin-moe-s-32e"], "those of swin-moe-s-32e are of several kinds"),
    ([*DECODE, "--model", "deepseek-v3-r1"], "number of experts must be from 1 to 64"),
    ([*DECODE, "--router", "--model", "yuan2-m32", "--config", "wide512"],
     "a router that is a matrix, not 'Yuan2"),
    ([*DECODE, "--tokens", "1000000000"], "tokens must be such that x take at most 4 GiB"),
    ([*GEMM, "--m", "1", "--k", "1000000", "--n", "1"],
     "d_in must be a multiple of 32 from 32 to 4096 in config"),
    ([*GEMM, "--m", "1000000000", "--k", "4096", "--n", "1"], "m must be such that x take at most"),
    (["bench", "edge-moe", "--device", "golden", "--tasks", "2"],
     "tasks must be 1 without --router, not 2"),
    (["bench", "edge-moe", "--router", "--tasks", "0"], "Invalid value for '--tasks'"),
    (["bench", "board", "--tokens", "0"], "Invalid value for '--tokens'"),
    (["bench", "board", "--d-model", "4096"], "must be at most max_dim = 2048 of config 'ulx3s'"),
    (["bench", "simulators", "--tokens", "0"], "Invalid value for '--tokens'"),
])
def test_what_is_refused(arguments, message):
    result = runner.invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert message in said(result)
    assert "Traceback" not in result.output


def test_dimensions_of_a_product_are_free():
    result = runner.invoke(app, [*GEMM, "--m", "3", "--k", "40", "--n", "100", "--latency", "7",
                                 "--activation-bits", "16", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["matches_golden"] and report["memory"] == "ideal, latency 7"
    assert report["activation_bits"] == 16
    assert report["stored_bytes"] == 100 * (40 + 2 + 2)


def test_help_names_every_format():
    result = runner.invoke(app, ["bench", "decode", "--help"], env={"COLUMNS": "200"})
    assert ", ".join(FORMATS) in said(result)
