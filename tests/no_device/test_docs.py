"""README.md and docs/: every block runs, links lead somewhere, files that are named and quoted messages exist."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pipelines
import pytest
import torch

from pq_fx import cli

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
names = [page.relative_to(ROOT).as_posix() for page in PAGES]


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(line number, code) of a page's fenced blocks in one language."""
    text = page.read_text()
    found = re.finditer(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [(text[: m.start(2)].count("\n"), m.group(2)) for m in found if m.group(1) == language]


def readers_objects(page: Path) -> dict[str, object]:
    """What a page speaks of without making it: in the README, the reader's own pipeline and prompts."""
    if page.name != "README.md":
        return {}
    torch.manual_seed(0)
    pipe = pipelines.make("flux")
    from diffusers import FluxTransformer2DModel

    class Pipe:
        """A tiny FLUX pipeline; two steps do what 28 would."""

        transformer = pipe.transformer

        def __call__(self, prompts: list[str], num_inference_steps: int) -> None:
            assert num_inference_steps == 28
            pipelines.call(pipe)

    return {
        "pipe": Pipe(),
        "prompts": list(pipelines.PROMPTS),
        "model": pipelines.make("flux").transformer,
        "FluxTransformer2DModel": FluxTransformer2DModel,
    }


# test_reuse.py runs docs/reuse.md and asks more of it.
@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "reuse.md"], ids=lambda p: p.name)
def test_every_python_block_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {"__name__": page.stem, **readers_objects(page)}
    for line, code in blocks(page, "python"):
        # Empty lines in front, so that a traceback names the page's own line.
        exec(compile("\n" * line + code, str(page), "exec"), scope)


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def commands(program: str, pages: list[Path] = PAGES) -> list[list[str]]:
    """The command lines of the pages' shell blocks that start with `program`, without it, as words."""
    lines = [
        line.strip().removeprefix("$ ")
        for page in pages
        for language in ("", "sh", "bash")
        for _, code in blocks(page, language)
        for line in code.splitlines()
    ]
    words = [shlex.split(line, comments=True) for line in lines if line.startswith(f"{program} ")]
    return [line[1:] for line in words]


def test_commands_parse() -> None:
    assert len(commands("pq-fx")) >= 4
    for words in commands("pq-fx"):
        cli.parser().parse_args(words)  # SystemExit 2 where an option is unknown


def test_the_readmes_commands_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its words one after the other in a folder with `flux/` and `prompts.txt`; only small sizes are added."""
    monkeypatch.chdir(tmp_path)
    pipelines.make("flux").save_pretrained("flux")
    Path("prompts.txt").write_text("\n".join(pipelines.PROMPTS))
    picture = ["--steps", "2", "--height", "32", "--width", "32"]
    small = {
        "inspect": ["--config", '{"num_layers": 1, "num_single_layers": 1}', "--height", "8"],
        "quantize": picture,
        "compare": picture,
        "report": [],
    }
    ran = []
    for words in commands("pq-fx", [ROOT / "README.md"]):
        torch._dynamo.reset()  # each command is a process of its own
        assert cli.main([*words, *small[words[0]]]) == 0, capsys.readouterr().err
        ran.append(words[0])
    assert ran == ["inspect", "quantize", "compare", "report"]
    assert "41 of 48 linears quantized" in capsys.readouterr().out
    assert "a red cat" in Path("report.html").read_text()  # the pictures' page names their prompts


def test_make_targets_exist() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    named = {w for page in PAGES for w in re.findall(r"`make (\w+)", page.read_text())}
    named |= {words[0] for words in commands("make")}
    assert {"demo", "test"} <= named <= set(targets)


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_scripts_and_tests_that_are_named_exist(page: Path) -> None:
    named = re.findall(r"\b((?:bench|tests|pq_fx|passes|kernels)/[\w/]+\.py)", page.read_text())
    named += [
        f"tests/**/{name}" for name in re.findall(r"(?<![\w/])(test_\w+\.py)", page.read_text())
    ]
    for name in named:
        assert list(ROOT.glob(name)), f"{page.name} names {name}"


def string_constants(folder: Path) -> str:
    """Every string of the sources, implicit concatenation done, gaps where values are put in."""
    pieces = []
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                pieces.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                texts = [v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]
                pieces.append("".join(map(str, texts)))
    return "\n".join(pieces)


def test_quoted_messages_are_the_sources_own() -> None:
    sources = "\n".join(string_constants(ROOT / name) for name in ("pq_fx", "passes", "kernels"))
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    headings = re.findall(r"^### (.*)$", page, flags=re.MULTILINE)
    quotes = [q for h in headings for q in re.split(r"` and `", h.strip("`"))]
    assert len(quotes) > 15
    for quote in quotes:
        for part in quote.split("…"):
            assert part.strip() in sources, f"no error says {part!r}"
