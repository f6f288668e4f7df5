import subprocess
import sys

from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
from transformers.integrations.moe import ExpertsInterface

import moeaccel.host.transformers_plugin as plugin


def test_importing_the_driver_imports_no_transformers():
    code = "import sys, moeaccel.host; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_registering_twice_changes_nothing():
    plugin.register()
    assert ExpertsInterface._global_mapping["moeaccel"] is plugin.experts_forward
    assert FP8ExpertsInterface._global_mapping["moeaccel"] is plugin.experts_forward
