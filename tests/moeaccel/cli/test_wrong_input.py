"""Every command and option with wrong input: one line that says what, exit status 2, no traceback;
figures as valid JSON; any encoding, any output.
"""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer
from typer.testing import CliRunner

from moeaccel.cli import COMMANDS, app, output
from moeaccel.config import PRESETS
from moeaccel.errors import CacheError, OutputError
from moeaccel.host.demo.tasks import check_prompt
from moeaccel.host.errors import InvalidOption

runner = CliRunner()

NO_PLACE = "/dev/null/file"
RUN = ["run", "--prompt", "1+1=", "--device", "golden"]
BITSTREAM = ["bitstream", "--folder", NO_PLACE]
SOAK = ["soak", "--config", "tiny", "--channels", "1", "--case"]
IMPORT = ["trace", "import", "/no/such/file", "--format", "sglang", "--out", "t"]
ROOT = Path(__file__).parents[3]
CHECKPOINT = ["import", str(ROOT / "host" / "demo" / "checkpoint")]
GENERATE = ["trace", "generate", "--out", "t"]

REFUSED = [
    # run
    (["run"], "give --prompt TEXT or --demo"),
    ([*RUN, "--prompt", "What is 2+2?"], "prompt must be made of digits"),
    ([*RUN, "--prompt", "1 + 1="], "which has ' '"),
    ([*RUN, "--prompt", "sosort rt ="], "which has ' '"),
    ([*RUN, "--prompt", "1+1=\n"], r"which has '\n'"),
    ([*RUN, "--prompt", "grüße="], "which has 'ß', 'ü'"),
    (["run", "--demo", "--per-task", "0"], "--per-task"),
    (["run", "--demo", "--per-task", "-3"], "--per-task"),
    (["run", "--demo", "--per-task", "1000000"], "--per-task"),
    (["run", "--demo", "--per-task", "many"], "--per-task"),
    ([*RUN, "--config", "huge"], "config must be one of"),
    ([*RUN, "--weight-format", ""], "weight"),
    ([*RUN, "--weight-format", "int3"], "int3"),
    ([*RUN, "--activation-bits", "12"], "activation_bits"),
    ([*RUN, "--device", "gold"], "device must be 'golden', 'replay:FILE'"),
    ([*RUN, "--device", ""], "device must be 'golden', 'replay:FILE'"),
    ([*RUN, "--device", "serial:/dev/no-such-port"], "there is no such port"),
    ([*RUN, "--device", "serial:/dev/null"], "serial port must be one that can be opened"),
    ([*RUN, "--device", "serial:"], "device must be"),
    ([*RUN, "--device", "xdma:77"], "/dev/xdma77_user"),
    ([*RUN, "--device", "xdma:x"], "device must be 'xdma:N'"),
    ([*RUN, "--device", "replay:/no/such/file"], "replay must name a recording"),
    ([*RUN, "--no-such-option"], "No such option"),
    ([*RUN, "--routes", "/nowhere"], "/nowhere"),
    (["run", "--model", "smollm2"], "give --prompt TEXT, and no --demo, --routes or --route, with"),
    (["run", "--model", "smollm2", "--prompt", "a", "--config", "huge"], "config must be one of"),
    (["run", "--model", "smollm2", "--prompt", "a", "--new-tokens", "0"], "--new-tokens"),
    (["run", "--model", "gpt", "--prompt", "a"], "model must be one of demo, smollm2, not 'gpt'"),
    # import
    (["import", "/no/such/file", "--output", NO_PLACE], "/no/such/file must be a file that can"),
    (["import", str(ROOT / "tests"), "--output", NO_PLACE], "must hold *.safetensors, but has no"),
    (["import", str(ROOT / "README.md"), "--output", NO_PLACE], "README.md must be at most"),
    ([*CHECKPOINT, "--output", NO_PLACE], f"not '{NO_PLACE}'"),
    ([*CHECKPOINT, "--output", ""], "output must be a file, or a place for one"),
    ([*CHECKPOINT, "--output", str(ROOT)], "which is a folder; name a file"),
    ([*CHECKPOINT, "--output", "t", "--weight-format", "int3"], "weight_format must be one of"),
    ([*CHECKPOINT, "--output", "t", "--quantiser", "gptq"], "must be search or amax, not 'gptq'"),
    ([*CHECKPOINT, "--output", "t", "--layer", "7"], "0, 1, 2, not 7"),
    ([*CHECKPOINT, "--output", "t", "--exact"], "must be integers and scales"),
    # compress
    (["compress", "--method", "squeeze"], "squeeze"),
    (["compress", "--method", "naee", "--option", "colour=1"], "colour"),
    (["compress", "--weight-format", "int3"], "int3"),
    (["compress", "--prompts", "0"], "--prompts"),
    (["compress", "--calibration-texts", "0"], "--calibration-texts"),
    (["compress", "--config", "huge"], "config must be one of"),
    (["compress", "--seed", "-1"], "--seed"),
    # models
    (["models", "a", "b"], "unexpected extra argument"),
    (["models", "--tree"], "No such option"),
    (["models", "nosuch"], "model must be one of `moeaccel models`, not 'nosuch'; did you mean"),
    (["models", "verify", "olmo-1b"], "did you mean olmoe-1b-7b"),
    (["models", "verify", "gpt-oss-20b", "--survey"], "model must be one of the survey's"),
    (["models", "verify", "dbrx", "--config", "huge"], "config must be one of"),
    (["models", "verify", "dbrx", "--seed", "-1"], "--seed"),
    # verilog
    (["verilog", "--config", "huge"], "config must be one of"),
    (["verilog", "--config", "tiny", "--output", NO_PLACE], f"not '{NO_PLACE}/moeaccel.v'"),
    (["verilog", "--config", "tiny", "--output", "/dev/null"], "not '/dev/null/moeaccel.v'"),
    (["verilog", "--config", "tiny", "--output", "/dev/null/a.v"], "not '/dev/null/a.v'"),
    (["verilog", "--core-mhz", "nan"], "core_mhz must"),
    (["verilog", "--board", "u55c", "--core-mhz", "nan"], "core_mhz must be from 10 to 500"),
    (["verilog", "--board", "foo"], "board must be one of u55c"),
    # bitstream
    ([*BITSTREAM, "--board", "foo"], "board must be one of ulx3s"),
    ([*BITSTREAM, "--config", "hbm32"], "to fit the board"),
    ([*BITSTREAM, "--config", "huge"], "config must be one of"),
    ([*BITSTREAM, "--clock", "0"], "clock must be"),
    ([*BITSTREAM, "--clock", "-10"], "clock must be"),
    ([*BITSTREAM, "--clock", "nan"], "clock must be a finite number of MHz"),
    ([*BITSTREAM, "--clock", "inf"], "clock must be a finite number of MHz"),
    ([*BITSTREAM, "--baud", "0"], "baud must be"),
    ([*BITSTREAM, "--baud", "-9600"], "baud must be"),
    ([*BITSTREAM, "--seed", "-1"], "--seed"),
    ([*BITSTREAM, "--seeds", "0"], "--seeds"),
    # board
    (["board", "--config", "huge"], "config must be one of"),
    (["board", "--config", "hbm32"], "config must have port_bytes 8 to fit the board"),
    (["board", "--cycles-per-bit", "3"], "--cycles-per-bit"),
    (["board", "--flip", "1"], "--flip"),
    (["board", "--lose", "nan"], "--lose"),
    (["board", "--repeat", "-0.5"], "--repeat"),
    # soak
    (["soak", "--minutes", "0"], "--minutes"),
    (["soak", "--minutes", "many"], "--minutes"),
    (["soak", "--config", "huge"], "config must be one of"),
    (["soak", "--config", "tiny", "--channels", "3"], "channels must be a power of two"),
    (["soak", "--channels", "0"], "--channels"),
    ([*SOAK, "{"], "case must be a line that `moeaccel soak` has printed, not '{'"),
    ([*SOAK, "[]"], "case must be a line"),
    *(([*SOAK, f'{{"calls":[{{{call}}}],"memories":[{{{memory}}}]{more}}}'], what)
      for call, memory, more, what in (
          ('"size":1', "", "", "unexpected keyword argument 'size'"),
          ("", "", ',"name":1', "unexpected keyword argument 'name'"),
          ("", '"name":1', "", "unexpected keyword argument 'name'"),
          ('"weight_format":"int3"', "", "", "weight_format must be one of"),
          ('"d_in":"a"', "", "", "d_in must be a whole number from 1"),
          ('"d_in":-32', "", "", "d_in must be a whole number from 1"),
          ('"d_in":1024', "", "", "d_in must be a whole number from 1 to 256, not 1024"),
          ('"experts":17', "", "", "experts must be a whole number from 0 to 16, not 17"),
          ('"ids":[["a"]]', "", "", "expert must be a whole number"),
          ('"nan":"x"', "", "", "nan must be a whole number"),
          ('"grid_exponent":1000', "", "", "grid_exponent must be a whole number"),
          ('"after":-5', "", "", "after must be a whole number"),
          ("", "", ',"seed":-1', "seed must be a whole number"),
          ("", "", ',"channels":"a"', "channels must be a whole number"),
          ("", '"stalls":{"ar":"x"}', "", "Stall probability ar must be in"))),
    # trace
    (["trace", "record", "x", "-o", "y", "--prompt", "a", "--new-tokens", "0"], "--new-tokens"),
    ([*IMPORT, "--layers", "-1", "--top-k", "2", "--experts", "8"], "--layers"),
    ([*IMPORT, "--layers", "2", "--top-k", "-2", "--experts", "8"], "--top-k"),
    ([*IMPORT, "--layers", "2", "--top-k", "2", "--experts", "-8"], "--experts"),
    ([*IMPORT, "--format", "nobody"], "'nobody' is not one of"),
    ([*IMPORT, "--layers", "2", "--top-k", "2", "--experts", "8"], "file that can be read"),
    ([*GENERATE, "--requests", "0"], "--requests"),
    ([*GENERATE, "--tokens", "0"], "--tokens"),
    ([*GENERATE, "--prompt", "-5"], "--prompt"),
    ([*GENERATE, "--batch", "0"], "--batch"),
    ([*GENERATE, "--seed", "-1"], "--seed"),
    ([*GENERATE, "--model-seed", "-1"], "--model-seed"),
    ([*GENERATE, "--model", "nobody"], "preset must be one of"),
    (["trace", "generate", "--requests", "1", "--tokens", "1", "--out", NO_PLACE],
     "must be a place that can be written"),
    (["trace", "stats", "--requests", "0"], "--requests"),
    (["trace", "stats", "--tokens", "0"], "--tokens"),
    # the application
    (["no-such-command"], "No such command"),
    (["bench", "no-such-command"], "No such command"),
    (["bench", "decode", "--model", "no-such-model-at-all"], "model must be one of"),
]


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("arguments", "what"), REFUSED, ids=lambda value: " ".join(value)
                         .encode("ascii", "replace").decode() if isinstance(value, list) else "")
def test_refused(arguments, what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert what in result.stderr
    assert result.stdout == ""
    message = result.stderr.removeprefix("error: ")
    if message != result.stderr:
        assert message.count("\n") == 1 and message.endswith("\n")
    assert not list(tmp_path.iterdir())


def commands(group=None, path=()):
    group = group or typer.main.get_command(app)
    for name, command in group.commands.items():
        if isinstance(command, click.Group) or hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def test_every_command_and_number_is_walked_through():
    """Options of `bench` are walked through in its own test."""
    tried = {name for arguments, _ in REFUSED for name in arguments if name.startswith("--")}
    for path, command in commands():
        if path[0] in ("bench", "doctor"):
            continue
        for parameter in command.params:
            named = parameter.opts[0]
            if named.startswith("--") and not getattr(parameter, "is_flag", False):
                assert named in tried | {"--help", "--family"}, (path, named)
    assert {path[0] for path, _ in commands()} == set(COMMANDS)


def test_the_prompts_of_every_task_are_known():
    from moeaccel.host.demo.run import demo_prompts

    for prompt in demo_prompts(20)[0]:
        check_prompt(prompt)
    check_prompt("")
    with pytest.raises(InvalidOption, match="which has 'Z'"):
        check_prompt("sort Z=")


# -- progress, JSON --------------------------------------------------------------------------------
class Terminal:
    """Standard error as a terminal."""

    encoding = "utf-8"

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


def test_progress_needs_a_terminal_and_no_json(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal's colours, but no terminal
    for as_json in (False, True):
        with output.Status(as_json) as status:
            status("working")
    assert capsys.readouterr() == ("", "")
    for as_json in (False, True):  # but for what takes long
        with output.Status(as_json, lines=True) as status:
            status("working")
            status("more")
    found = [line.split(" s  ") for line in capsys.readouterr().err.splitlines()]
    assert [text for _, text in found] == ["working", "more"]
    assert all(float(seconds) >= 0 for seconds, _ in found)
    for as_json in (False, True):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        with output.Status(as_json) as status:
            status("working")
        assert bool(terminal.text) is not as_json


def test_run_is_quiet_but_for_its_result(capfd):
    """transformers' own progress bars included."""
    result = runner.invoke(app, [*RUN, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["logits_equal"]
    assert result.stderr == ""
    assert capfd.readouterr().err == ""


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")
    return json.loads(text, parse_constant=refuse)


def test_json_has_no_numbers_that_json_lacks(capsys):
    value = {"a": [1.5, float("nan"), (float("inf"), -float("inf"))], "b": {"c": float("nan")},
             "d": "NaN", "e": 3, "f": None, "g": True}
    output.print_json(value)
    assert strict(capsys.readouterr().out) == {
        "a": [1.5, None, [None, None]], "b": {"c": None}, "d": "NaN", "e": 3, "f": None, "g": True}


@pytest.mark.parametrize("arguments", [["models", "--json"], ["models", "olmoe", "--json"],
                                       ["doctor", "--json"]], ids=" ".join)
def test_json_is_valid(arguments):
    result = runner.invoke(app, arguments)
    strict(result.stdout)
    assert result.stdout.count("\n") == 1


def test_every_command_prints_json_by_one_function():
    """Which is the one that keeps it valid."""
    for path in Path(output.__file__).parent.glob("*.py"):
        if path.name != "output.py":
            assert "json.dumps" not in path.read_text(encoding="utf-8"), path


# -- encodings and outputs -------------------------------------------------------------------------
def moeaccel(*arguments, stdout=subprocess.PIPE, **environment):
    return subprocess.run(
        [sys.executable, "-m", "moeaccel", *arguments], stdout=stdout, stderr=subprocess.PIPE,
        env={**os.environ, **environment}, check=False, timeout=300)


ENCODINGS = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "latin-1": {"PYTHONIOENCODING": "latin-1:strict"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""},
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("arguments", [["models"], ["--help"], ["verilog", "--help"]], ids=" ".join)
def test_any_encoding(encoding, arguments):
    done = moeaccel(*arguments, COLUMNS="60", **ENCODINGS[encoding])
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    assert len(done.stdout) > 500


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize("arguments", [["models"], ["models", "--json"]], ids=" ".join)
def test_output_without_room(arguments):
    with open("/dev/full", "wb") as full:
        done = moeaccel(*arguments, stdout=full)
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: files and output must be accessible")
    assert done.stderr.count(b"\n") == 1


def test_a_place_that_cannot_be_written():
    with pytest.raises(OutputError, match="must go to a place that can be written, not 'x'"), \
            output.writing(Path("x")):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    with pytest.raises(CacheError, match="mine"), output.writing(Path("x")):
        raise CacheError("mine")


def test_a_reader_that_leaves_is_no_error():
    read, write = os.pipe()
    os.close(read)
    done = moeaccel("models", stdout=write)
    os.close(write)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr


def test_presets_are_named_where_one_is_wrong():
    result = runner.invoke(app, ["verilog", "--config", "huge"])
    assert all(name in result.stderr for name in PRESETS)
