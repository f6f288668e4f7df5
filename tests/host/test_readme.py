import re
from pathlib import Path

import moeaccel.host.transformers_plugin as plugin
from moeaccel.host import errors

README = Path(__file__).parents[2] / "host" / "README.md"


def test_the_examples_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 15
    names = {}
    try:
        for block in blocks:
            exec(compile(block, str(README), "exec"), names)
    finally:
        plugin.release()
        plugin.current_session().device.close()
        plugin.use_device(None)
    assert "tokens=10" in capsys.readouterr().out


def test_the_page_names_every_error():
    text = README.read_text(encoding="utf-8")
    bases = {errors.HostError, errors.CommandFailed}
    classes = {name for name in errors.__all__ if isinstance(getattr(errors, name), type)
               and getattr(errors, name) not in bases}
    assert {name for name in classes if f"`{name}`" not in text} == set()
