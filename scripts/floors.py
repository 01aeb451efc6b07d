"""Constraints for pip, on standard output: each dependency at the oldest release that pyproject.toml allows.

python scripts/floors.py > floors.txt; pip install --constraint floors.txt '.[test]'
"""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
for requirement in project["dependencies"] + extras["audit"] + extras["all"] + extras["parity"]:
    if found := re.match(r"([\w-]+)(?:>=|==)([\d.]+)", requirement):
        print(f"{found[1]}=={found[2]}")
