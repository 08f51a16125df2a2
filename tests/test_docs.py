"""Runs the examples of README.md and docs/*.md.

A fenced block whose info string is `python run` is executed as a script; one with `console run` gives its lines that start with `$ ` to
bash. The blocks of one document run in order, in one empty directory, and each must exit with status 0.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(python|console) run\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def examples(document: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(document.read_text(encoding="utf-8"))


def command(language: str, text: str) -> list[str]:
    if language == "python":
        return [sys.executable, "-c", text]
    lines = [line[2:] for line in text.splitlines() if line.startswith("$ ")]
    assert lines, "a `console run` block without a line that starts with '$ '"
    return ["bash", "-e", "-c", "\n".join(lines)]


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if examples(d)], ids=lambda d: d.name)
def test_examples_run(document, tmp_path):
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
    }
    for language, text in examples(document):
        done = subprocess.run(command(language, text), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{document.name}:\n{text}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_links_lead_to_files(document):
    missing = [target for target in LINK.findall(document.read_text(encoding="utf-8")) if not (document.parent / target).exists()]
    assert not missing


def test_the_readme_quotes_the_records_and_the_recipe_as_they_are():
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "tables.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, f"run python benchmarks/tables.py\n{done.stderr}"
