"""The CPU tests under other versions of torch, triton and diffusers; prints a table and saves it.

    python bench/versions.py --out bench/results/versions.json       # all combinations below
    python bench/versions.py --only torch=2.12.1 --whole -- -n auto  # one, every CPU test, arguments for pytest

Each combination gets a virtual environment of its own: the version asked for, with what it depends on, before the
packages of the running environment (which needs `pip install -e '.[test]'`). By default those tests run that the
package touches. PyPI's torch for Linux carries several GB of CUDA libraries; PIP_INDEX_URL can name another index.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
AS_INSTALLED = "as installed"
COMBINATIONS = (
    AS_INSTALLED,
    "torch=2.11.0",
    "torch=2.12.1",
    "triton=3.7.1",
    "triton=3.8.0",
    "triton=3.9.0",
    "diffusers=0.41.0",
)
# Tests of what each package touches: our use of torch's insides, Triton's compiler and interpreter, diffusers' classes.
TOUCHES = {
    "torch": "lower observe quantizer exported silent_wrongness many_graphs determinism snapshots inductor "
    "first_calls seen graphs shapes reuse ops offload diffusers models packaging",
    "triton": "triton_interpreter devices inductor targets carriers unpack_ptx round_columns",
    "diffusers": "diffusers models around offload fused_projections inspect cli_quantize parallel",
}
REPORTED = ("torch", "triton", "diffusers", "transformers", "pq_fx")


def environment(combination: str, folder: Path, unchecked: bool) -> str:
    """The Python of a virtual environment with this combination, made where it is missing."""
    if combination == AS_INSTALLED:
        return sys.executable
    home = folder / combination
    python = str(home / "bin" / "python")
    if not (home / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
        install = [python, "-m", "pip", "install", "-q", combination.replace("=", "==")]
        subprocess.run(install, check=True)
        (home / "ready").touch()
    site = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    )
    # Lines of a .pth file run when Python starts: here after the environment's own packages.
    lines = [f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})"]
    if unchecked:
        lines.append("import sys, types; sys.modules['pq_fx.requirements'] = types.ModuleType('')")
    (Path(site.strip()) / "zz_running_environment.pth").write_text("\n".join(lines) + "\n")
    return python


def tests_of(combination: str) -> list[str]:
    """Paths of the test files that the combination's package touches."""
    names = TOUCHES[combination.split("=")[0]].split()
    found = [sorted((ROOT / "tests").glob(f"[!g]*/test_{name}.py")) for name in names]
    return [str(path.relative_to(ROOT)) for paths in found for path in paths]


def run(python: str, paths: list[str], extra: list[str], log: Path) -> dict[str, Any]:
    """Versions found, tests passed, failed and skipped, and the names of those that failed."""
    threads = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    env = os.environ | threads | {"PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}
    script = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {REPORTED}}}))"
    found = json.loads(subprocess.check_output([python, "-c", script], env=env, text=True))
    command = [python, "-m", "pytest", "--tb=short", "--show-capture=no", "-rfE", *paths, *extra]
    start = time.monotonic()
    with log.open("w") as file:
        done = subprocess.run(command, env=env, cwd=ROOT, stdout=file, stderr=file, check=False)
    text = log.read_text(errors="replace")
    counts = {
        w: int(n) for n, w in re.findall(r"(\d+) (passed|failed|skipped|error)", text[-4000:])
    }
    return {
        "versions": found | {"python": sys.version.split()[0]},
        "tests": [Path(p).stem for p in paths] or "all",
        "passed": counts.get("passed", 0),
        "failed": counts.get("failed", 0) + counts.get("error", 0),
        "skipped": counts.get("skipped", 0),
        "names": re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE),
        "pytest": extra,
        "exit": done.returncode,
        "seconds": round(time.monotonic() - start),
    }


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = [
        "| torch | triton | diffusers | tests | passed | failed |",
        "|---|---|---|---|---|---|",
    ]
    for row in results.values():
        v, tests = row["versions"], row["tests"]
        what = tests if tests == "all" else ", ".join(t.removeprefix("test_") for t in tests)
        cells = v["torch"], v["triton"], v["diffusers"], what, row["passed"], row["failed"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", help="combinations such as torch=2.12.1; default: all")
    parser.add_argument("--whole", action="store_true", help="every CPU test")
    parser.add_argument("--unchecked", action="store_true", help="try a version that pq_fx refuses")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "versions")
    parser.add_argument(
        "--out", type=Path, help="JSON whose rows of these combinations are replaced"
    )
    parser.add_argument("pytest", nargs="*", help="further arguments of pytest, after --")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    results = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    for combination in args.only or COMBINATIONS:
        python = environment(combination, args.folder, args.unchecked)
        paths = [] if args.whole or combination == AS_INSTALLED else tests_of(combination)
        row = run(python, paths, args.pytest, args.folder / f"{combination}.log")
        results[combination] = row
        print(
            combination, {k: row[k] for k in ("passed", "failed", "names", "seconds")}, flush=True
        )
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
