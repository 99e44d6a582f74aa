"""The CPU tests under other versions of torch, triton and diffusers; prints a table and saves it.

    python bench/versions.py --out bench/results/versions.json            # the combinations below
    python bench/versions.py --only diffusers=0.36.0 --whole              # one, with every CPU test

An environment is the running one with one package of another version before it on the path, installed without its
dependencies (a torch wheel names several GB of CUDA libraries, which the CPU tests do not need; where its libraries
must be found all the same, --libraries names a folder). By default the tests of what the package touches are run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COMBINATIONS = (
    "", "torch=2.11.0", "torch=2.12.1", "triton=3.7.1", "triton=3.9.0", "diffusers=0.36.0", "diffusers=0.39.0",
)  # fmt: skip
TOUCHES = {
    "torch": ("test_lower", "test_observe"),
    "triton": ("test_triton_interpreter", "test_devices"),
    "diffusers": ("test_diffusers",),
}
# Newer than what is supported: tried all the same, by a plugin that leaves the check of versions out.
_UNCHECKED = (
    "import sys, types; sys.modules['pq_fx.requirements'] = types.ModuleType('requirements')"
)


def environment(combination: str, folder: Path, libraries: str | None) -> dict[str, str]:
    """Install the package that differs into a folder of its own and put that first on the path."""
    own = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONSAFEPATH": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    if not combination:
        return own
    overlay = folder / combination
    if not overlay.exists():
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--target",
            str(overlay),
        ]
        subprocess.run([*command, combination.replace("=", "==")], check=True)
    (overlay / "pq_fx_unchecked.py").write_text(_UNCHECKED + "\n")
    own["PYTHONPATH"] = str(overlay)
    if libraries and combination.startswith("torch"):
        own["LD_LIBRARY_PATH"] = libraries.replace("*", combination)
    return own


def run(
    combination: str, env: dict[str, str], whole: bool, unchecked: bool, extra: list[str]
) -> dict[str, Any]:
    """Versions found, tests passed and failed, and the names of those that failed."""
    names = ("torch", "triton", "diffusers", "transformers")
    script = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names}}}))"
    found = json.loads(subprocess.check_output([sys.executable, "-c", script], env=env, text=True))
    tests = TOUCHES[combination.split("=")[0]] if combination else sum(TOUCHES.values(), ())
    paths = [] if whole else [f"tests/no_device/{name}.py" for name in tests]
    command = [sys.executable, "-m", "pytest", "--show-capture=no", "-rf", *paths, *extra]
    if unchecked:
        command += ["-p", "pq_fx_unchecked", "--deselect", "tests/no_device/test_requirements.py"]
    start = time.monotonic()
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    counts = {
        word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)
    }
    if not counts:
        print(done.stdout[-1500:], done.stderr[-1500:])
    failed = re.findall(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
    return {
        "versions": found, "passed": counts.get("passed", 0),
        "failed": counts.get("failed", 0) + counts.get("error", 0),
        "skipped": counts.get("skipped", 0), "names": failed, "pytest": extra,
        "tests": "all" if whole else list(tests),
        "exit": done.returncode, "seconds": round(time.monotonic() - start),
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    lines = [
        "| torch | triton | diffusers | tests | passed | failed |",
        "|---|---|---|---|---|---|",
    ]
    for row in results.values():
        v, tests = row["versions"], row["tests"]
        what = tests if tests == "all" else ", ".join(t.removeprefix("test_") for t in tests)
        lines.append(
            f"| {v['torch']} | {v['triton']} | {v['diffusers']} | {what} | {row['passed']} | {row['failed']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", help="combinations such as torch=2.12.1; default: all")
    parser.add_argument(
        "--whole", action="store_true", help="every CPU test, not those that the package touches"
    )
    parser.add_argument("--unchecked", action="store_true", help="try a version that pq_fx refuses")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "versions")
    parser.add_argument(
        "--libraries", help="LD_LIBRARY_PATH for torch; * stands for the combination"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("pytest", nargs="*", help="further arguments of pytest, after --")
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    for combination in COMBINATIONS if args.only is None else args.only:
        env = environment(combination, args.folder, args.libraries)
        row = run(combination, env, args.whole, args.unchecked, args.pytest)
        results[combination or "as installed"] = row | {
            "python": sys.version.split()[0],
            "pq_fx": version("pq-fx"),
        }
        print(
            combination or "as installed",
            {k: row[k] for k in ("passed", "failed", "names", "seconds")},
            flush=True,
        )
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
