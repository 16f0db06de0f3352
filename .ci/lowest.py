"""Print the lowest version of each dependency that pyproject.toml admits, as constraints for pip."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
for requirement in [
    *project["dependencies"],
    *(r for extra in project["optional-dependencies"].values() for r in extra),
]:
    if found := re.fullmatch(r"([\w.-]+)(?:\[[\w,-]+\])?>=([\d.]+).*", requirement):
        print(f"{found[1]}=={found[2]}")
    elif not requirement.startswith(project["name"]):
        raise SystemExit(f"no lowest version in {requirement!r}")
