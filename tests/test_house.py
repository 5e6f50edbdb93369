"""The rules of the house (CONTRIBUTING.md): what may import what, how long things get, what stays out of the repository."""
import ast
import configparser
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from densecl.encoder import Encoder
from densecl.model import DenseCL

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT/"nbs").glob("*.ipynb"))
MODULES = sorted(p for p in (ROOT/"densecl").glob("*.py") if not p.stem.startswith("_"))
by_name = dict(ids=lambda p: p.stem)


def cells(notebook): return json.loads(notebook.read_text())["cells"]


def step(name):
    """The step of the staircase that a notebook's name stands for: 03b_fast is (3, "b")."""
    number, letter = re.match(r"(\d+)([a-z]?)_", name).groups()
    return int(number), letter


def test_a_letter_makes_a_step_of_its_own():
    assert sorted(["03b_b", "10_d", "03_a", "04_c"], key=step) == ["03_a", "03b_b", "04_c", "10_d"]


def numbers():
    """Module -> (number, letter) of the notebook that exports it: 01_x comes before 01b_y, and that before 02_z."""
    found = {}
    for nb in NOTEBOOKS:
        for module in re.findall(r"^#\|\s*default_exp\s+(\w+)", "\n".join("".join(c["source"]) for c in cells(nb)), re.M):
            found[module] = step(nb.stem)
    return found


def imported_from_densecl(tree):
    """The package's modules that a parsed module imports anywhere, functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("densecl."))
        if isinstance(node, ast.ImportFrom):
            path = (node.module or "").split(".")
            if node.level == 0 and path[0] != "densecl": continue
            inside = path if node.level else path[1:]
            yield from [inside[0]] if inside and inside[0] else (a.name for a in node.names)


def test_imports_anywhere_in_a_module_are_seen():
    text = "from . import a\nfrom .b import x\nfrom densecl import c\nimport densecl.d\nimport os.e\nfrom torch import f\ndef g():\n    from densecl.h import y"
    assert sorted(imported_from_densecl(ast.parse(text))) == ["a", "b", "c", "d", "h"]


@pytest.mark.parametrize("module", MODULES, **by_name)
def test_a_module_imports_only_modules_of_a_lower_number(module):
    number = numbers()
    for other in imported_from_densecl(ast.parse(module.read_text())):
        assert other in number, f"{module.stem} imports {other}, which no notebook exports"
        assert number[other] < number[module.stem], f"{module.stem} ({number[module.stem]}) imports {other} ({number[other]})"


def test_every_module_has_its_notebook_and_every_number_one_notebook():
    number = numbers()
    assert sorted(number) == [m.stem for m in MODULES]
    assert len(set(number.values())) == len(number)


@pytest.mark.parametrize("module", MODULES, **by_name)
def test_modules_and_functions_stay_short(module):
    text = module.read_text()
    assert len(text.splitlines()) <= 320
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            end = 45 if node.name == "train" else 30
            assert node.end_lineno - node.lineno + 1 <= end, f"{node.name} is longer than {end} lines"


@pytest.mark.parametrize("module", MODULES, **by_name)
def test_what_is_public_has_a_docstring(module):
    loaded, bare = importlib.import_module(f"densecl.{module.stem}"), []
    assert loaded.__doc__
    for name, thing in vars(loaded).items():
        if name.startswith("_") or getattr(thing, "__module__", None) != loaded.__name__ or not callable(thing): continue
        if not thing.__doc__ or thing.__doc__.startswith(f"{name}("): bare.append(name)          # a dataclass writes its own
        if not inspect.isclass(thing): continue
        methods = [k for k, v in vars(thing).items() if not k.startswith("_") and inspect.isroutine(v)]
        bare += [f"{name}.{k}" for k in methods if not inspect.getdoc(getattr(thing, k))]
    assert not bare


def repository_files():
    """Every file that git keeps or would keep."""
    try: got = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError: pytest.skip("git is not installed")
    if got.returncode: pytest.skip("this copy is not a git repository")
    return [p for p in (ROOT/name for name in got.stdout.split("\0") if name) if p.is_file()]


MACHINE = re.compile(r"(?<![\w.}])/(?:home|root|work|Users|tmp)/[\w.-]")


def test_paths_of_a_machine_are_recognised():
    for text in ("/ho" + "me/me/x.py", 'File "/ro' + 'ot/a"', "at /wo" + "rk/main"): assert MACHINE.search(text), text
    for text in ("https://example.org/home/x", "data/wo" "rk/x", "the/tmp/x", "../ro" "ot/x"): assert not MACHINE.search(text), text


def test_no_file_names_a_path_of_somebodys_machine():
    found = []
    for path in repository_files():
        try: text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError: continue
        if path.suffix == ".ipynb": text = re.sub(r'"image/\w+": "[^"]*"', "", text)
        found += [f"{path.relative_to(ROOT)}: {m.group()}" for m in MACHINE.finditer(text)]
    assert not found


@pytest.mark.parametrize("notebook", NOTEBOOKS, **by_name)
def test_notebooks_hold_no_errors_and_stay_small(notebook):
    outputs = [o for c in cells(notebook) for o in c.get("outputs", [])]
    assert not [o["ename"] for o in outputs if o["output_type"] == "error"]
    assert notebook.stat().st_size <= (1_000_000 if notebook.stem.startswith("30") else 300_000)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_clean(notebook):
    for cell in cells(notebook):
        assert not cell["metadata"], f"{cell['id']}: {cell['metadata']}; run nbdev_clean"
        assert cell.get("execution_count") is None, f"{cell['id']} has an execution count; run nbdev_clean"
        assert all(o.get("execution_count") is None for o in cell.get("outputs", [])), f"{cell['id']}; run nbdev_clean"


def test_the_readme_is_the_index_notebook():
    tools = Path(sys.executable).parent
    if not (tools/"jupyter-nbconvert").exists(): pytest.skip("nbconvert is not installed")
    got = subprocess.run(["sh", "tests/readme.sh", str(tools)], cwd=ROOT, capture_output=True, text=True)
    assert got.returncode == 0, got.stderr
    assert len(got.stdout.splitlines()) > 20, got.stderr
    assert (ROOT/"README.md").read_text(encoding="utf-8") == got.stdout, "run `make readme`"


def test_requirements_leave_torch_free_and_the_notebook_tools_out():
    settings = configparser.ConfigParser()
    settings.read(ROOT/"settings.ini")
    needs = settings["DEFAULT"]["requirements"].split()
    names = [re.match(r"[\w-]+", n).group().lower() for n in needs]
    assert {"torch", "torchvision"} <= set(names)
    assert not {"nbdev", "fastcore", "execnb"} & set(names)
    for need, name in zip(needs, names):
        if name in ("torch", "torchvision"): assert not re.search(r"<|==|~=", need)


def loaded_by(statement, *modules):
    """Which of the modules a fresh process has loaded after the statement."""
    ask = f"{statement}\nimport sys\nprint([m for m in {modules!r} if m in sys.modules])"
    got = subprocess.run([sys.executable, "-c", ask], env=os.environ | dict(PYTHONPATH=str(ROOT)), capture_output=True, text=True)
    assert got.returncode == 0, got.stderr
    return ast.literal_eval(got.stdout)


def test_the_model_stands_apart_from_pictures_and_augmentation():
    assert loaded_by("import densecl.model", "densecl.model", "densecl.augment", "densecl.data", "PIL") == ["densecl.model"]


def test_config_and_data_do_without_torch():
    assert loaded_by("import densecl.config, densecl.data", "densecl.data", "torch", "torchvision") == ["densecl.data"]


def test_the_keys_come_from_the_key_encoder():
    def keys(perturbed):
        torch.manual_seed(0)
        model = DenseCL(Encoder(nn.Conv2d(3, 8, 3), 8, hidden=16, dim=8), queue_len=16)
        with torch.no_grad():
            for p in getattr(model, perturbed).parameters() if perturbed else (): p.add_(torch.randn(p.shape, generator=generator))
        out = model(*torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
        return out["q"], out["k"], model.queue2.keys[:, :4]
    generator = torch.Generator().manual_seed(2)
    plain, key, query = keys(None), keys("encoder_k"), keys("encoder_q")
    assert torch.equal(plain[0], key[0])
    assert not torch.allclose(plain[1], key[1], atol=.1)
    assert not torch.allclose(plain[2], key[2], atol=.1)
    assert not torch.allclose(plain[0], query[0], atol=.1)
    torch.testing.assert_close(plain[1], query[1], atol=.05, rtol=0)       # the query encoder reaches them through the average only
