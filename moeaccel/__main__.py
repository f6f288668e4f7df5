"""``python -m moeaccel`` is the command line ``moeaccel``."""

from moeaccel.cli import main

main()
