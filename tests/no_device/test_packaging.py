"""What gets installed, and which words the sources may not contain."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("pq_fx", "passes", "kernels")
PRIVATE_TORCH = re.compile(
    r"torch\._dynamo|torch\._inductor|torch\._guards|torch\.fx\.experimental|torch\._subclasses"
    r"|from torch import .*\b(_dynamo|_inductor|_guards|_subclasses)\b"
)
# Modules and functions that read bytes which may hold code to run.
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {
    "torch.load",
    "torch.save",
    "torch.hub.load",
    "numpy.load",
    "np.load",
    "eval",
    "exec",
}


def sources(*folders: str) -> list[Path]:
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    assert files
    return files


def code_lines(file: Path) -> list[tuple[int, str]]:
    """Lines without comments; docstrings may still name a module, so only statements count."""
    lines = enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
    return [(number, line.split("#")[0]) for number, line in lines]


def test_hugging_face_does_not_find_our_folder_as_the_package_kernels():
    """Some Hugging Face libraries import a package of that name and would get ours."""
    spec = importlib.util.find_spec("kernels")
    if spec is not None:
        places = [spec.origin, *(spec.submodule_search_locations or [])]
        assert not [p for p in places if p and Path(p).resolve().is_relative_to(ROOT / "kernels")]


def test_the_backend_is_an_entry_point():
    points = importlib.metadata.entry_points(group="torch_dynamo_backends")
    (ours,) = (point for point in points if point.name == "permuquant")
    assert ours.value == "pq_fx.backend:permuquant"


def test_torch_knows_the_backend_without_an_import_of_pq_fx():
    code = (
        "import sys, torch; names = torch._dynamo.list_backends(exclude_tags=());"
        "assert 'permuquant' in names, names; assert 'pq_fx' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_package_is_listed():
    """setuptools takes explicit names because passes/ and kernels/ are mapped into pq_fx."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(settings["tool"]["setuptools"]["packages"])
    found = set()
    for file in sources(*SOURCES):
        package = ".".join(file.parent.relative_to(ROOT).parts)
        found.add(package if package.startswith("pq_fx") else f"pq_fx.{package}")
    assert listed == found


def test_everything_imports_as_installed():
    import pq_fx.kernels
    import pq_fx.passes

    assert Path(pq_fx.kernels.__file__).resolve().parent == ROOT / "kernels"
    assert Path(pq_fx.passes.__file__).resolve().parent == ROOT / "passes"
    assert importlib.util.find_spec("passes") is None or not Path(
        str(importlib.util.find_spec("passes").origin)
    ).is_relative_to(ROOT)


def _without_documented_settings(file: Path, line: str) -> str:
    """Benches may set what PyTorch's manual tells users to set."""
    return line.replace("torch._inductor.config.", "") if "bench" in file.parts else line


def test_private_torch_names_are_in_one_file():
    """passes/_torch.py is where a new PyTorch release may break us; nowhere else."""
    allowed = ROOT / "passes" / "_torch.py"
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in sources(*SOURCES, "bench")
        for number, line in code_lines(file)
        if file != allowed and PRIVATE_TORCH.search(_without_documented_settings(file, line))
    ]
    assert not found, "\n".join(found)
    assert PRIVATE_TORCH.search(allowed.read_text(encoding="utf-8"))  # the pattern does match


def unsafe(tree: ast.AST) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in UNSAFE_CALLS:
            found.append((node.lineno, ast.unparse(node.func)))
        bad = [name for name in names if name.partition(".")[0] in UNSAFE_MODULES]
        found += [(node.lineno, name) for name in bad]
    return found


def test_nothing_reads_pickle():
    """A checkpoint from a stranger must not run code."""
    found = [
        f"{file.relative_to(ROOT)}:{number}: {what}"
        for file in sources(*SOURCES)
        for number, what in unsafe(ast.parse(file.read_text(encoding="utf-8")))
    ]
    assert not found, "\n".join(found)
    assert len(unsafe(ast.parse("import pickle\nfrom dill import load\ntorch.load(f)"))) == 3


def test_floors_are_kept():
    """Imports go downward: pq_fx -> passes, kernels; passes -> formats, reference; kernels -> -."""
    allowed = {
        "kernels": ("pq_fx.errors", "pq_fx.kernels"),
        "passes": (
            "pq_fx.errors", "pq_fx.passes", "pq_fx.kernels.carriers", "pq_fx.kernels.formats",
            "pq_fx.kernels.pack", "pq_fx.kernels.reference", "pq_fx.kernels.values",
        ),
    }  # fmt: skip
    pattern = re.compile(r"^\s*(?:from|import)\s+(pq_fx[\w.]*)")
    found = []
    for folder, prefixes in allowed.items():
        for file in sources(folder):
            for number, line in code_lines(file):
                match = pattern.match(line)
                if match and not any(
                    match[1] == prefix or match[1].startswith(f"{prefix}.") for prefix in prefixes
                ):
                    found.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found, "\n".join(found)


def test_what_a_wheel_carries():
    """The files beside the modules that setuptools is told to copy."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    files = {
        f"{package}/{file.name}"
        for package, patterns in settings["tool"]["setuptools"]["package-data"].items()
        for pattern in patterns
        for file in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    for wanted in ("flux.safetensors", "flux.json", "prompts.safetensors", "ATTRIBUTION.md"):
        assert f"pq_fx.demo/{wanted}" in files, files
    assert "pq_fx/py.typed" in files
    assert not [file for file in files if "zimage" in file]


def test_embedded_weights_are_small():
    weights = sum(file.stat().st_size for file in (ROOT / "pq_fx" / "demo").glob("*.safetensors"))
    assert weights < 24e6
