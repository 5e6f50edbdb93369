"""Install densecl from settings.ini, the one place that names its version and its requirements."""

import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
settings = ConfigParser(delimiters="=", interpolation=None)
settings.read(here / "settings.ini", encoding="utf-8")
get = settings["DEFAULT"].get
source = f"https://github.com/{get('user')}/{get('repo')}"
extras = {n: get(f"{n}_requirements").split() for n in ("transfer", "timm", "remote", "dev")}
CHAPTER_FILES = (
    "nbs/weights/gallery.safetensors",
    "benchmarks/results.jsonl",
    "benchmarks/position.jsonl",
    "benchmarks/demo.jsonl",
    "benchmarks/transfer.jsonl",
    "benchmarks/figures.jsonl",
)


class BuildWithChapterFiles(build_py):
    """Copy the files that chapters read into the wheel: `densecl.runtime.io.chapter_file`."""

    def run(self) -> None:
        super().run()
        folder = Path(self.build_lib, "densecl", "chapter_files")
        for name in () if self.editable_mode else CHAPTER_FILES:
            if (here / name).is_file():
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(here / name, folder)


setup(
    name=get("lib_name"),
    version=get("version"),
    description=get("description"),
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=get("author"),
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=get("keywords").split(),
    url=source,
    project_urls={
        "Documentation": f"https://{get('user')}.github.io/{get('repo')}",
        "Source": source,
        "Issues": f"{source}/issues",
        "Paper": "https://arxiv.org/abs/2011.09157",
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Framework :: Jupyter",
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["densecl", "densecl.*"]),
    package_data={"densecl": ["py.typed"]},
    cmdclass={"build_py": BuildWithChapterFiles},
    entry_points={"console_scripts": get("console_scripts").split()},
    python_requires=">=" + get("min_python"),
    install_requires=get("requirements").split(),
    extras_require=extras | {"dev": [name for names in extras.values() for name in names]},
)
