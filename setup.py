"""Install densecl from settings.ini, the one place that names its version and its requirements."""
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

here = Path(__file__).parent
config = ConfigParser(delimiters="=", interpolation=None)
config.read(here / "settings.ini", encoding="utf-8")
get = config["DEFAULT"].get

setup(
    name=get("lib_name"), version=get("version"), description=get("description"), license="Apache-2.0",
    author=get("author"), keywords=get("keywords").split(), packages=[get("lib_path")],
    python_requires=">=" + get("min_python"), install_requires=get("requirements").split(),
    extras_require={"transfer": get("transfer_requirements").split(),
                    "dev": (get("dev_requirements") + " " + get("transfer_requirements")).split()},
    long_description=(here / "README.md").read_text(encoding="utf-8") if (here / "README.md").exists() else "",
    long_description_content_type="text/markdown",
)
