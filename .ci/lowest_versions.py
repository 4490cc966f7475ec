"""The lower bounds of pyproject.toml as constraints for pip."""

import tomllib
from pathlib import Path


project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
requirements = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
for requirement in requirements:
    if ">=" in requirement:
        print(requirement.replace(">=", "=="))
