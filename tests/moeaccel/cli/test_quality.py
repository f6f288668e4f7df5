"""``moeaccel bench quality``: a table, valid JSON, a picture, errors of one line."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

from moeaccel.cli import app
from moeaccel.host.demo import CHECKPOINT

runner = CliRunner()
SMALL = ("bench", "quality", "--tokens", 48, "--calibration-tokens", 48, "--window", 24)


def run(*arguments):
    return runner.invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a model that reads bytes."""
    path = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    AutoModelForCausalLM.from_config(MixtralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)).save_pretrained(path)
    return path


def test_table_json_and_plot(folder, tmp_path):
    picture = tmp_path / "p.svg"
    formats = ("--weight-format", "int4_g32", "--weight-format", "mxint8+2:4")
    small = *SMALL, "--model", folder
    result = run(*small, *formats, "--activation-bits", 16, "--golden-tokens", 8, "--plot", picture,
                 "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    rows = {row["variant"]: row for row in found["results"]}
    assert list(rows) == ["float", "int4_g32 a16", "mxint8+2:4 a16 magnitude",
                          "mxint8+2:4 a16 activation"]
    assert rows["int4_g32 a16"]["golden_tokens"] == 8 and rows["float"]["kl"] == 0
    assert found["reference"] == "the checkpoint, in float32" and "pydoc_data" in found["text"]
    assert set(found["pareto_bytes"]) <= set(rows) and "int4_g32 a16" in found["pareto_bytes"]
    assert picture.read_text().startswith("<?xml")
    table = run(*small, *formats[:2], "--axis", "cycles").stdout
    assert "int4_g32 a8" in table and "24 at a time" in table and "fewer cycles" in table


@pytest.mark.parametrize(("arguments", "message"), [
    (("--weight-format", "int5"), "weight_format must be one of"),
    (("--activation-bits", "4"), "activation_bits must be 8 or 16"),
    (("--plot", "p.xyz"), "plot must end in"),
    (("--tokens", "50"), "tokens must be a multiple of the window"),
    (("--model", "nowhere"), "model must be smollm2, or the folder"),
    (("--model", CHECKPOINT), "model must have a tokenizer that knows English text"),
    (("--config", "huge"), "huge")])
def test_what_is_wrong_is_named(folder, arguments, message):
    result = run(*SMALL, "--model", folder, *arguments)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
