"""``moeaccel trace``: each sub-command, valid JSON, and errors of one line."""

import json

import numpy as np
import pytest
from transformers import MixtralConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

from moeaccel.cli import app
from moeaccel.host.traces import PopularityProfile, RoutingTrace
from tests.support.models import BASE, FOUR, make

runner = CliRunner()


def run(*arguments):
    return runner.invoke(app, ["trace", *map(str, arguments)])


def json_of(*arguments):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def fails(message, *arguments):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "t.safetensors"
    run("generate", "--model", "mixtral-8x7b", "--requests", 6, "--tokens", 40, "-o", path)
    return path


def test_generate(tmp_path):
    path = tmp_path / "t.safetensors"
    found = json_of("generate", "--model", "olmoe-1b-7b", "--requests", 4, "--tokens", 20,
                    "--prompt", 8, "--batch", 2, "--seed", 3, "-o", path)
    assert found["file"] == str(path)
    assert (found["layers"], found["experts"], found["top_k"]) == (16, 64, 8)
    assert (found["requests"], found["tokens"], found["steps"]) == (4, 80, 26)
    trace = RoutingTrace.load(path)
    assert trace.model == "OLMoE-1B-7B" and "seed 3" in trace.source
    fails("did you mean mixtral-8x7b?", "generate", "--model", "mixtral", "-o", path)
    fails("must be a place that can be written", "generate", "--requests", 1, "--tokens", 2,
          "-o", tmp_path / "no" / "t")


def test_presets():
    keys = {row["key"] for row in json_of("presets")}
    assert {"deepseek-v2-lite", "olmoe-1b-7b", "qwen3-30b-a3b", "mixtral-8x7b"} <= keys
    assert "fitted to" in run("presets").stdout


def test_stats_of_a_file(trace):
    found = json_of("stats", trace, "--model", "mixtral-8x7b")
    rows = {row["statistic"]: row for row in found["statistics"]}
    assert rows["segment/LRU@1"]["found"] is None  # requests are shorter than a segment
    assert rows["cache/LRU, 2 slots"]["real"] == 0.302
    assert rows["cache/LRU, 2 slots"]["difference"] == pytest.approx(
        rows["cache/LRU, 2 slots"]["found"] - 0.302)
    assert rows["reuse/lag 1"]["real"] is None and 0.2 < rows["reuse/lag 1"]["found"] < 0.6
    assert found["compared_with"] == "mixtral-8x7b" and found["requests"] == 6
    table = run("stats", trace).stdout
    assert "reuse/lag 1" in table and "not published" in table
    fails("must be of a model with 16 layers of 64 experts, top-8, but Mixtral-8x7B has 32 of 8",
          "stats", trace, "--model", "olmoe-1b-7b")
    fails("preset must be one of", "stats", trace, "--model", "nothing")
    trace.write_bytes(trace.read_bytes()[:-5])
    fails("must be a whole safetensors file", "stats", trace)


def test_stats_of_generated_routes():
    found = json_of("stats", "--model", "mixtral-8x7b", "--requests", 4, "--tokens", 64)
    assert found["source"].startswith("generated, preset mixtral-8x7b")


def test_import(tmp_path):
    array, out = tmp_path / "r.npy", tmp_path / "t.safetensors"
    np.save(array, np.argsort(np.random.default_rng(0).random((5, 16, 64)))[..., :8])
    found = json_of("import", array, "--format", "vllm", "--model", "olmoe-1b-7b", "-o", out)
    assert (found["tokens"], found["experts"], found["kind"]) == (5, 64, "trace")
    assert RoutingTrace.load(out).model == "olmoe-1b-7b"
    json_of("import", array, "--format", "trtllm", "--experts", 70, "-o", out)
    other = ["import", array, "--format", "vllm", "--model", "qwen3-30b-a3b"]
    fails("must be of a model with 48 layers of 128 experts, top-8, but qwen3-30b-a3b has 16",
          *other, "-o", out)
    assert json_of(*other, "--experts", 128, "-o", out)["layers"] == 16  # as told
    fails("vllm files need --experts, or --model with a name", "import", array, "--format",
          "vllm", "-o", out)
    fails("sglang files need --layers", "import", array, "--format", "sglang", "--experts", 4,
          "-o", out)
    fails("must be GGUF", "import", array, "--format", "imatrix", "-o", out)
    fails("must be UTF-8", "import", array, "--format", "megatron", "--experts", 8, "-o", out)


def test_plot(trace, tmp_path):
    picture = tmp_path / "p.png"
    assert json_of("plot", trace, "-o", picture) == {"plot": str(picture)}
    assert picture.read_bytes().startswith(b"\x89PNG")
    profile = tmp_path / "profile.safetensors"
    RoutingTrace.load(trace).popularity().save(profile)
    assert isinstance(PopularityProfile.load(profile), PopularityProfile)
    assert run("plot", profile, "-o", tmp_path / "p.svg").exit_code == 0
    assert (tmp_path / "p.svg").read_text().startswith("<?xml")
    fails("plot must end in one of", "plot", trace, "-o", tmp_path / "p.xyz")
    fails("must be a place that can be written", "plot", trace, "-o", tmp_path / "no" / "p.png")
    fails("must be a file that can be read", "plot", tmp_path / "nothing", "-o", picture)


def test_record(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<unk>": 0, "one": 5, "two": 6}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    folder, out = tmp_path / "model", tmp_path / "t.safetensors"
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    make(MixtralConfig(**(BASE | FOUR))).save_pretrained(folder)
    found = json_of("record", folder, "--prompt", "one two one", "--prompt", "two",
                    "--new-tokens", 1, "-o", out)
    assert (found["requests"], found["tokens"], found["layers"], found["experts"]) == (2, 4, 2, 4)
    trace = RoutingTrace.load(out)
    assert trace.model == str(folder) and trace.weights is not None
    fails("model must be a checkpoint of transformers", "record", tmp_path / "no", "--prompt",
          "one", "-o", out)
