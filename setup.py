"""The settings are in setup.cfg. A wheel brings the folders that `resdpo-trl` runs and reads, inside the package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:
            for folder in ("recipes", "accelerate_configs"):
                target = Path(self.build_lib, "resdpo_trl", folder)
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(folder, target, ignore=shutil.ignore_patterns("__pycache__"))


setup(cmdclass={"build_py": BuildWithRecipes})
