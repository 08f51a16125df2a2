"""What do compatibility suites of others say of the server?

    python benchmarks/server_suites.py RUN [--compatcanary BIN] [--schemathesis BIN] [--langchain PYTHON] [--examples 10]

Starts `plinth serve RUN` and runs those suites whose commands are given; each lives in an environment of its own (npm: compatcanary;
PyPI: schemathesis; langchain-openai, with its Python). Writes benchmarks/records/server_suites.json, the rows of suites that were not run
as they were. Exit status 1 when one found a fault.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import RECORDS, write_record

NAME = "server_suites"
CHECKS = "not_a_server_error,content_type_conformance,status_code_conformance"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--compatcanary", type=absolute)
    parser.add_argument("--schemathesis", type=absolute)
    parser.add_argument("--langchain", type=absolute)
    parser.add_argument("--examples", type=int, default=10, help="of schemathesis, for each operation")
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "plinth", "serve", str(arguments.run), "--port", "0", "--json", "--name", "suite"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = json.loads(server.stdout.readline())["url"].rstrip("/")
        try:
            rows = list(run_suites(arguments, url))
        finally:
            server.terminate()
    print(json.dumps(rows, indent=2))
    ran = {row["suite"] for row in rows}
    path = RECORDS / f"{NAME}.json"
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    write_record(NAME, __doc__.splitlines()[0], [row for row in kept if row["suite"] not in ran] + rows)
    return int(not all(row["passed"] for row in rows))


def run_suites(arguments: argparse.Namespace, url: str):
    """Yield a row for each suite whose command is given."""
    if arguments.compatcanary:
        yield compatcanary(arguments.compatcanary, url)
    if arguments.langchain:
        side = Path(__file__).resolve().with_name("langchain_side.py")
        found = json.loads(output([arguments.langchain, side, f"{url}/v1", "suite"])[0])
        yield {"suite": "langchain-openai", "passed": set(found.values()) == {"ok"}, "found": found}
    if arguments.schemathesis:
        yield schemathesis(arguments.schemathesis, url, arguments.examples)


def absolute(path: str) -> Path:
    """Return the path of a command from the root on: suites run in a folder of their own."""
    return Path(path).absolute()


def compatcanary(command: Path, url: str) -> dict[str, Any]:
    text, status = output([command, "scan", "--base-url", f"{url}/v1", "--model", "suite", "--profile", "chat"])
    found = {name.strip(): verdict for verdict, name in re.findall(r"^(PASS|WARN|FAIL)  (.{24})", text, re.MULTILINE)}
    score = re.search(r"Score: (\d+/\d+)", text)
    return {"suite": "CompatCanary, profile chat", "passed": status == 0, "score": score[1] if score else None, "found": found}


def schemathesis(command: Path, url: str, examples: int) -> dict[str, Any]:
    options = ["--phases", "coverage,fuzzing", "--max-examples", str(examples), "--checks", CHECKS, "--request-timeout", "60", "--no-color"]
    text, status = output([command, "run", f"{url}/openapi.json", *options])
    found = [line.strip() for line in text.splitlines() if re.search(r"\d+ generated, ", line)]
    return {"suite": "schemathesis", "passed": status == 0, "checks": CHECKS, "found": found}


def output(command: list[Any]) -> tuple[str, int]:
    with tempfile.TemporaryDirectory() as folder:  # where a suite may leave what it likes
        done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, cwd=folder)
    return done.stdout, done.returncode


if __name__ == "__main__":
    sys.exit(main())
