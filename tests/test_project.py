"""What the project promises as a whole: its import, its docstrings, its docs, its wheel."""

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"))
    if page.exists()
)


# Importing ----------------------------------------------------------------------------------------

# Prints what `import unisono` changed. torch comes first: what it changes is its own affair.
IMPORT = """
import json, logging, random, sys, warnings
import numpy, torch

def state():
    return {
        "handlers of the root logger": [str(h) for h in logging.root.handlers],
        "level of the root logger": logging.root.level,
        "level of torch's logger": logging.getLogger("torch").level,
        "warnings filters": [str(f) for f in warnings.filters],
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "grad mode": torch.is_grad_enabled(),
        "number of threads": torch.get_num_threads(),
        "torch's generator": torch.get_rng_state().tolist(),
        "Python's generator": str(random.getstate()),
        "kernels": sorted(torch._C._dispatch_get_registrations_for_dispatch_key("")),
    } | {
        f"kernels at {key}": sorted(torch._C._dispatch_get_registrations_for_dispatch_key(key))
        for key in ("FuncTorchDynamicLayerFrontMode", "FuncTorchBatched", "FuncTorchVmapMode")
    }

before, modules = state(), set(sys.modules)
import unisono
after = state()
print(json.dumps({
    "changed": [name for name in before if before[name] != after[name]],
    "imported": sorted({name.partition(".")[0] for name in set(sys.modules) - modules}),
}))
"""


def test_importing_changes_nothing():
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", IMPORT],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert report["changed"] == []
    optional = {"matplotlib", "mlxtend", "pandas", "pyarrow", "rich", "scipy", "sklearn", "skops"}
    optional |= {"torchmetrics", "typer"}
    assert optional & set(report["imported"]) == set()


# Docstrings ---------------------------------------------------------------------------------------


PUBLIC_MODULES = (
    "unisono",
    "unisono.batch_prediction",
    "unisono.calibration",
    "unisono.combine",
    "unisono.distributed",
    "unisono.estimators",
    "unisono.export",
    "unisono.hub",
    "unisono.optim",
    "unisono.plans",
    "unisono.plots",
    "unisono.report",
    "unisono.selection",
    "unisono.training.sampling",
    "unisono.uncertainty",
)


def public_names():
    """Every public function and class, by dotted name; the classes' public methods too."""
    for module_name in PUBLIC_MODULES:
        module = importlib.import_module(module_name)
        # Not vars: what is imported on first use isn't there yet.
        for name in getattr(module, "__all__", dir(module)):
            obj = getattr(module, name)
            ours = getattr(obj, "__module__", "").partition(".")[0] == "unisono"
            if name.startswith("_") or not ours or not callable(obj):
                continue
            yield f"{module_name}.{name}", obj
            if inspect.isclass(obj):
                for method_name, method in vars(obj).items():
                    method = getattr(method, "__func__", method)  # of a class or static method
                    # What overrides a method of nn.Module is documented by torch.
                    overrides = any(hasattr(base, method_name) for base in obj.__bases__)
                    if method_name.startswith("_") or overrides or not inspect.isfunction(method):
                        continue
                    yield f"{module_name}.{name}.{method_name}", method


PUBLIC = dict(public_names())


def is_top_level(obj):
    return obj.__qualname__.isidentifier()


def is_exception(obj):
    return inspect.isclass(obj) and issubclass(obj, BaseException)


def documented_args(docstring):
    """The names in the Args section: `x`, `x, y` and `**kwargs` are names."""
    section = re.search(r"^Args:\n((?: .*\n?|\n)+)", inspect.cleandoc(docstring), re.MULTILINE)
    lines = re.findall(r"^    (\*{0,2}\w[\w*, ]*):", section[1], re.MULTILINE) if section else []
    return [name.strip().lstrip("*") for line in lines for name in line.split(",")]


def test_args_are_found():
    docstring = """Do it.

    Args:
        x, y: Two things:
            of which one is long.

        **options: The rest.

    Returns:
        z: Nothing.
    """
    assert documented_args(docstring) == ["x", "y", "options"]


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_tells_the_truth(name):
    obj = PUBLIC[name]
    docstring = vars(obj).get("__doc__") if inspect.isclass(obj) else obj.__doc__
    assert docstring, "has no docstring"
    documented = documented_args(docstring)
    if is_exception(obj) and not documented:
        return  # made by unisono, caught by the user: the message is all there is to say
    parameters = [name for name in inspect.signature(obj).parameters if name != "self"]
    parameters = [name for name in parameters if name != "cls"]
    assert documented == parameters


@pytest.mark.parametrize(
    "name",
    [name for name, obj in PUBLIC.items() if is_top_level(obj) and not is_exception(obj)],
)
def test_docstring_has_an_example(name):
    docstring = inspect.getdoc(PUBLIC[name])
    assert re.search(r"^Examples?:\n(?:\n| .*\n)*? +>>> ", docstring, re.MULTILINE)


def test_every_public_name_is_in_the_api_reference():
    api = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    modules = re.findall(r"automodule:: (\S+)", api)  # with all that is in them
    names = {name for name, obj in PUBLIC.items() if is_top_level(obj)}
    names -= {name for name in names if name.rpartition(".")[0] in modules}
    assert names - set(re.findall(r"auto\w+:: (\S+)", api)) == set()


# Metadata and docs --------------------------------------------------------------------------------


def test_changelog_begins_with_this_version():
    unisono = importlib.import_module("unisono")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (.*)", changelog, re.MULTILINE)[1]
    assert unisono.__version__ in newest


def commands(text, program):
    """What follows `program` wherever a page shows it being run: in a shell block or as code."""
    shell = re.findall(r"```(?:console|bash|sh|shell)\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(shell).replace("\\\n", " ").splitlines() + re.findall(r"`([^`\n]+)`", text)
    called = rf"(?:\$ )?(?:\S*/)?{program} (.+)"
    return [found[1] for line in lines if (found := re.fullmatch(called, line.strip()))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_make_targets_in_the_docs_exist(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = {
        word
        for line in commands(page.read_text(encoding="utf-8"), "make")
        for word in line.split("#")[0].split()
        if "=" not in word
    }
    assert named <= targets


def documented_cli_calls():
    texts = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
    calls = [(page, call) for page, text in texts.items() for call in commands(text, "unisono")]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    calls += [("Makefile", call) for call in re.findall(r"/unisono ([^,)]+)", makefile)]
    return sorted(set(calls))


@pytest.mark.parametrize(("page", "call"), documented_cli_calls())
def test_cli_calls_in_the_docs_exist(page, call, monkeypatch, capsys):
    pytest.importorskip("typer", reason="needs unisono[cli]")
    cli = importlib.import_module("unisono.cli")
    words = call.split("#")[0].split()
    command = [word for word in words[:1] if not word.startswith("-")]
    monkeypatch.setenv("COLUMNS", "200")  # narrower help cuts long option names
    assert cli.main([*command, "--help"]) == 0
    options = {word.partition("=")[0] for word in words if word.startswith("-")}
    shown = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)  # without colours
    assert {option for option in options if not re.search(rf"{option}\b", shown)} == set()


# The wheel ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_wheel_is_complete(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--wheel-dir", tmp_path]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("unisono-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "unisono/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    kinds = ("*.py", "*.html", "*.css")
    sources = {p.relative_to(ROOT / "src") for kind in kinds for p in (ROOT / "src").rglob(kind)}
    assert {source.as_posix() for source in sources} <= names
