"""The training program: runs, repeats with its seed, and says what it wants."""

import json

import pytest
import torch
from typer.testing import CliRunner

from moeaccel.host.demo import train as program

OPTIONS = {
    "steps": 2,
    "batch_size": 8,
    "learning_rate": 3e-3,
    "weight_decay": 0.05,
    "balance": 0.01,
}


def test_training_repeats_with_the_seed() -> None:
    first, _, shares = program.train(seed=5, **OPTIONS)
    again, _, _ = program.train(seed=5, **OPTIONS)
    other, _, _ = program.train(seed=6, **OPTIONS)
    weights = [
        m.state_dict()["model.layers.0.mlp.experts.down_proj"] for m in (first, again, other)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert shares.shape == (first.config.num_hidden_layers, first.config.num_experts)


def test_batch_size_must_be_shared_equally() -> None:
    with pytest.raises(ValueError, match="Batch size must be a multiple of 4, not 6"):
        program.train(seed=1, **(OPTIONS | {"batch_size": 6}))


def test_command_writes_a_checkpoint(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(program, "TEST_PROMPTS_PER_TASK", 2)
    threads = torch.get_num_threads()
    try:
        result = CliRunner().invoke(
            program.app, ["--output", str(tmp_path), "--steps", "1", "--batch-size", "4"]
        )
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["steps"] == 1
    assert str(tmp_path) not in json.dumps(record)
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= {
        path.name for path in tmp_path.iterdir()
    }


def test_help(monkeypatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    result = CliRunner().invoke(program.app, ["--help"])
    assert result.exit_code == 0
    assert "--steps" in result.output
