"""Find the packages; everything else about the distribution is in pyproject.toml.

``[tool.setuptools.package-dir]`` maps the import names onto the top-level folders. Setuptools can
find packages by itself, but not below such a mapping (``packages.find`` would name them ``hdl`` and
``host``), and a list written by hand forgets new sub-packages. So this file walks the mapping.
"""

import tomllib
from pathlib import Path

from setuptools import find_packages, setup

PROJECT = tomllib.loads(Path(__file__).with_name("pyproject.toml").read_text(encoding="utf-8"))

packages = []
for name, folder in PROJECT["tool"]["setuptools"]["package-dir"].items():
    packages.append(name)
    packages.extend(f"{name}.{below}" for below in find_packages(folder))

setup(packages=packages)
