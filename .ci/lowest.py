"""Print the lowest version of each dependency that pyproject.toml admits, as constraints for pip."""

import re
import sys
import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
for requirement in [
    *PROJECT["dependencies"],
    *(r for extra in PROJECT["optional-dependencies"].values() for r in extra),
]:
    if found := re.fullmatch(r"([\w.-]+)(?:\[[\w,-]+\])?>=([\d.]+).*", requirement):
        sys.stdout.write(f"{found[1]}=={found[2]}\n")
    elif not requirement.startswith(PROJECT["name"]):
        raise SystemExit(f"no lowest version in {requirement!r}")
