"""The command line as a user calls it."""

import json
import os
import subprocess
import sys

SMALL = ("--plan.hidden-size", "64", "--plan.num-layers", "2", "--plan.vocab-size", "512", "--plan.seq-len", "64", "--plan.min-steps", "10")


def plinth(*arguments, check=0, cwd=None, env=None, timeout=300):
    """Run the command and return (standard output, standard error); the exit code must be `check`."""
    done = subprocess.run(
        [sys.executable, "-m", "plinth", *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd, timeout=timeout, env={**os.environ, **(env or {})},
    )  # fmt: skip
    assert done.returncode == check, f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout, done.stderr


def last_json(output):
    return json.loads(output.strip().splitlines()[-1])


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
