"""The rules of the house (CONTRIBUTING.md): imports, sizes, what stays out of the repository."""

import ast
import configparser
import functools
import importlib
import inspect
import io
import json
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
import torch
from torch import nn

from densecl.encoder import Encoder
from densecl.model import DenseCL

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(
    p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
)
# From the bottom to the top: a module may import modules of its own layer and of lower ones.
LAYERS = [
    ["runtime"],
    ["config", "augment", "encoder", "correspondence", "queue", "loss", "model", "variants"]
    + ["optimizers", "recommend", "hooks"],
    ["data"],
    ["weights"],
    ["visualize"],
    ["evaluate"],
    ["resume", "run_files", "doctor"],
    ["measurements", "accumulate", "memory", "trainer", "cost", "train"],
    ["transfer"],
    ["segment", "detect", "show", "__init__", "__main__"],
]


def name_of(path):
    """densecl/data/lmdb.py -> data.lmdb; a wing's __init__.py is the wing."""
    name = ".".join(path.relative_to(ROOT / "densecl").with_suffix("").parts)
    return name.removesuffix(".__init__")


def default_exp(notebook):
    """The module that a notebook exports, or None."""
    source = "\n".join("".join(c["source"]) for c in cells(notebook))
    found = re.search(r"^#\|\s*default_exp\s+([\w.]+)", source, re.MULTILINE)
    return found[1].removesuffix(".__init__") if found else None


def cells(notebook):
    return json.loads(notebook.read_text())["cells"]


SOURCES = {default_exp(p): p for p in NOTEBOOKS if default_exp(p)}  # module -> notebook
PATHS = {name_of(p): p for p in (ROOT / "densecl").rglob("*.py") if p.name != "_modidx.py"}
MODULES = sorted(name for name, path in PATHS.items() if name in SOURCES)


def imported(path):
    """The package's modules that a module imports anywhere, functions included."""
    package = (
        name_of(path).split(".") if path.name == "__init__.py" else name_of(path).split(".")[:-1]
    )
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names if a.name.split(".")[0] == "densecl"]
            yield from (name.removeprefix("densecl").lstrip(".") for name in names)
        if isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".") if node.module else []
            if node.level:
                base = [p for p in package if p]
                base = base[: len(base) - node.level + 1]
            elif module[:1] == ["densecl"]:
                base, module = [], module[1:]
            else:
                continue
            for alias in node.names:
                name = ".".join([*base, *module, alias.name])
                yield name if name in PATHS else ".".join([*base, *module])


def layer(name):
    return next(i for i, names in enumerate(LAYERS) if name.split(".")[0] in names)


@functools.cache
def graph():
    return {
        name: {m for m in imported(path) if m in SOURCES and m != name}
        for name, path in PATHS.items()
        if name in SOURCES
    }


def test_imports_anywhere_in_a_module_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    text = """from . import signals
from .io import UsageError
from ..config import Config
from ..data import lmdb
import densecl.loss
import os.path
from torch import nn
def f():
    from densecl.data.sources import ImageSource
"""
    path = tmp_path / "densecl" / "runtime" / "checkpoint.py"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert list(imported(path)) == [
        "runtime.signals",
        "runtime.io",
        "config",
        "data.lmdb",
        "loss",
        "data.sources",
    ]


def test_modules_mirror_their_notebooks():
    for module, notebook in SOURCES.items():
        folder = notebook.parent.relative_to(ROOT / "nbs").parts
        path = PATHS[module]
        assert path.parent.relative_to(ROOT / "densecl").parts == folder, f"{notebook}: {path}"
    files = {name for name, path in PATHS.items() if path.read_text().count("\n") > 3}
    assert files == set(SOURCES), "a module without a notebook, or a notebook that was not exported"


def test_no_room_is_called_utils_or_core():
    assert not [name for name in PATHS if {"utils", "core", "common"} & set(name.split("."))]


@pytest.mark.parametrize("module", [m for m in MODULES if m])
def test_a_module_imports_its_own_layer_and_lower_ones_only(module):
    for other in graph()[module]:
        assert layer(other) <= layer(module), f"{module} imports {other}, which is above it"


@pytest.mark.parametrize("module", [m for m in MODULES if "." in m])
def test_inside_a_wing_a_module_imports_earlier_rooms_only(module):
    wing = module.split(".")[0]
    for other in graph()[module]:
        if other.split(".")[0] == wing and other != wing:
            assert SOURCES[other].name < SOURCES[module].name, f"{module} imports {other}"


def test_no_circle():
    edges, done = graph(), set()
    while True:
        free = {m for m in edges if m not in done and edges[m] <= done | {m}}
        if not free:
            break
        done |= free
    assert not set(edges) - done, "modules that import each other in a circle"


def lines_of_code(text):
    """Numbers of the lines that hold code: no blank lines, comments and docstrings."""
    found = set()
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skip and token.type != tokenize.ENDMARKER:
            found.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            for statement in body:
                value = getattr(statement, "value", None)
                if isinstance(statement, ast.Expr) and isinstance(value, ast.Constant):
                    found -= set(range(statement.lineno, statement.end_lineno + 1))
    return found


def test_lines_of_code_are_counted():
    text = '"""Doc."""\n\n# comment\nx = 1\n\n\n'
    text += 'def f():\n    """Doc.\n\n    More.\n    """\n    return x\n'
    assert lines_of_code(text) == {4, 7, 12}


# longer than 30 lines today, and not to grow: a function that is split leaves this list
LONG_FUNCTIONS = {
    "evaluate.classification.linear_probe": 31,
    "trainer.run_steps": 38,
}


@pytest.mark.parametrize("module", MODULES)
def test_modules_and_functions_stay_short(module):
    text = PATHS[module].read_text()
    code = lines_of_code(text)
    assert len(code) <= 320, f"{module}: {len(code)} lines of code"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            end = LONG_FUNCTIONS.get(f"{module}.{node.name}", 30)
            size = len(code & set(range(node.lineno, node.end_lineno + 1)))
            assert size <= end, f"{module}.{node.name}: {size} lines of code"


@pytest.mark.parametrize("module", MODULES)
def test_lines_stay_short(module):
    """100 characters; 120 in the lists that nbdev writes, and in tables."""
    for number, line in enumerate(PATHS[module].read_text().splitlines(), 1):
        generated = line.startswith(("__all__ = ", "           '", "# AUTOGENERATED"))
        assert len(line) <= (140 if generated else 100), f"{module}:{number}"


@pytest.mark.parametrize("module", MODULES)
def test_what_is_public_has_a_docstring(module):
    name = f"densecl.{module}".rstrip(".")
    if module == "__main__" or module.endswith(".__main__"):
        pytest.importorskip("torchmetrics")
    loaded, bare = importlib.import_module(name), []
    assert loaded.__doc__
    for key, thing in vars(loaded).items():
        if key.startswith("_") or getattr(thing, "__module__", None) != name or not callable(thing):
            continue
        # a dataclass writes its own
        if not thing.__doc__ or thing.__doc__.startswith(f"{key}("):
            bare.append(key)
        if inspect.isclass(thing):
            methods = [
                k for k, v in vars(thing).items() if not k.startswith("_") and inspect.isroutine(v)
            ]
            bare += [f"{key}.{k}" for k in methods if not inspect.getdoc(getattr(thing, k))]
    assert not bare


@pytest.mark.parametrize("module", MODULES)
def test_public_functions_have_types(module):
    """Every parameter of a public function or method, and its result."""
    missing = []
    for node in ast.parse(PATHS[module].read_text()).body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        for f in members:
            if (
                not isinstance(f, ast.FunctionDef)
                or f.name.startswith("_")
                and f.name != "__init__"
            ):
                continue
            args = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs]
            bare = [
                a.arg for a in args if a.annotation is None and a.arg not in ("self", "cls", "ctx")
            ]
            if bare or f.returns is None and f.name != "__init__":
                missing.append(f"{getattr(node, 'name', '')}.{f.name}({', '.join(bare)})")
    assert not missing


def repository_files():
    """Every file that git keeps or would keep."""
    try:
        got = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if got.returncode:
        pytest.skip("this copy is not a git repository")
    return [p for p in (ROOT / name for name in got.stdout.split("\0") if name) if p.is_file()]


MACHINE = re.compile(r"(?<![\w.}])/(?:home|root|work|Users|tmp)/[\w.-]")


def test_paths_of_a_machine_are_recognized():
    for text in ("/ho" + "me/me/x.py", 'File "/ro' + 'ot/a"', "at /wo" + "rk/main"):
        assert MACHINE.search(text), text
    for text in ("https://example.org/home/x", "data/home/x", "the/tmp/x", "../Users/x"):
        assert not MACHINE.search(text), text


def test_no_file_contains_a_path_of_a_machine():
    found = []
    for path in repository_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if path.suffix == ".ipynb":
            text = re.sub(r'"image/\w+": "[^"]*"', "", text)
        found += [f"{path.relative_to(ROOT)}: {m.group()}" for m in MACHINE.finditer(text)]
    assert not found


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_hold_no_errors_and_stay_small(notebook):
    outputs = [o for c in cells(notebook) for o in c.get("outputs", [])]
    assert not [o["ename"] for o in outputs if o["output_type"] == "error"]
    assert notebook.stat().st_size <= (1_500_000 if notebook.stem == "gallery" else 600_000)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_clean(notebook):
    for cell in cells(notebook):
        assert not cell["metadata"], f"{cell['id']}: {cell['metadata']}; run nbdev_clean"
        assert cell.get("execution_count") is None, (
            f"{cell['id']} has an execution count; run nbdev_clean"
        )
        assert all(o.get("execution_count") is None for o in cell.get("outputs", [])), (
            f"{cell['id']}; run nbdev_clean"
        )


def test_the_readme_is_the_index_notebook():
    tools = Path(sys.executable).parent
    if not (tools / "jupyter-nbconvert").exists():
        pytest.skip("nbconvert is not installed")
    got = subprocess.run(
        ["sh", "tests/readme.sh", str(tools)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert got.returncode == 0, got.stderr
    assert len(got.stdout.splitlines()) > 20, got.stderr
    assert (ROOT / "README.md").read_text(encoding="utf-8") == got.stdout, "run `make readme`"


def test_requirements_leave_torch_free_and_the_notebook_tools_out():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    needs = settings["DEFAULT"]["requirements"].split()
    names = [re.match(r"[\w-]+", n).group().lower() for n in needs]
    assert {"torch", "torchvision"} <= set(names)
    assert not {"nbdev", "fastcore", "execnb"} & set(names)
    for need, name in zip(needs, names):
        if name in ("torch", "torchvision"):
            assert not re.search(r"<|==|~=", need)


def loaded_by(statement, *modules):
    """Which of the modules a fresh process has loaded after the statement."""
    ask = f"{statement}\nimport sys\nprint([m for m in {modules!r} if m in sys.modules])"
    got = subprocess.run(
        [sys.executable, "-c", ask],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert got.returncode == 0, got.stderr
    return ast.literal_eval(got.stdout)


def test_the_model_imports_no_images_and_no_augmentation():
    assert loaded_by(
        "import densecl.model", "densecl.model", "densecl.augment", "densecl.data", "PIL"
    ) == ["densecl.model"]


def test_config_and_data_do_without_torch():
    assert loaded_by(
        "import densecl.config, densecl.data.dataset", "densecl.data", "torch", "torchvision"
    ) == ["densecl.data"]


def test_the_keys_come_from_the_key_encoder():
    def keys(perturbed):
        torch.manual_seed(0)
        model = DenseCL(Encoder(nn.Conv2d(3, 8, 3), 8, hidden=16, dim=8), queue_len=16)
        with torch.no_grad():
            for p in getattr(model, perturbed).parameters() if perturbed else ():
                p.add_(torch.randn(p.shape, generator=generator))
        out = model(*torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
        return out["q"], out["k"], model.queue2.keys[:, :4]

    generator = torch.Generator().manual_seed(2)
    plain, key, query = keys(None), keys("encoder_k"), keys("encoder_q")
    assert torch.equal(plain[0], key[0])
    assert not torch.allclose(plain[1], key[1], atol=0.1)
    assert not torch.allclose(plain[2], key[2], atol=0.1)
    assert not torch.allclose(plain[0], query[0], atol=0.1)
    torch.testing.assert_close(
        plain[1], query[1], atol=0.05, rtol=0
    )  # the query encoder reaches them through the average only


def test_git_keeps_every_module():
    """No rule of .gitignore hides a module or a chapter (`data/` once hid densecl/data)."""
    paths = [*ROOT.glob("densecl/**/*.py"), *ROOT.glob("nbs/**/*.ipynb")]
    names = [str(p.relative_to(ROOT)) for p in paths if ".ipynb_checkpoints" not in p.parts]
    kept = {str(name) for name in repository_files()}
    kept |= {name.removeprefix(f"{ROOT}/") for name in kept}
    assert names and not [name for name in names if name not in kept]
