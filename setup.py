"""Puts the notebooks and the profiles into the package that is built; everything else stands in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

BROUGHT_ALONG = ("Data Prep/*.ipynb", "Finetuning/*.ipynb", "Inference/*.ipynb", "profiles/*.yaml")


class BuildWithNotebooks(build_py):
    """Builds the package with what stands beside it in a checkout, in llm_finetuning/notebooks."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # it runs from the checkout
            return
        for file in (file for pattern in BROUGHT_ALONG for file in Path().glob(pattern)):
            target = Path(self.build_lib, "llm_finetuning", "notebooks", file)
            self.mkpath(str(target.parent))
            self.copy_file(str(file), str(target))


setup(cmdclass={"build_py": BuildWithNotebooks})
