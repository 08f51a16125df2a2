"""Ctrl-C at any moment of a command: the exit code is the documented one. Each case is a process whose verb sends itself the signal."""

import os
import signal
import subprocess
import sys

import pytest

START = """
import atexit, os, signal, sys, threading, time
from plinth.cli import main as cli

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):  # the handler is called between two of these
        pass

class Verb:
    @staticmethod
    def main(argv):
{body}

sys.modules["the_verb"] = Verb
cli.VERBS["verb"] = ("the_verb", "")
cli.entry()
"""
MODULES = {
    "interrupted_import": "print('imported', flush=True)",
    "twice_interrupted_import": "interrupt(); print('imported', flush=True)",
    "handling_import": "import signal, sys; signal.signal(signal.SIGINT, lambda *_: sys.exit(75))",
}
LINE = "plinth: stopped by Ctrl-C.\n"
CASES = {  # of each the verb's body, the exit code, and what is printed on standard output and standard error
    "anywhere": ("interrupt()", 130, "", LINE),
    "within the exec of a text, as in dataclasses": ("exec('interrupt()', globals())", 130, "", LINE),
    "within an import, which ends first": ("import interrupted_import; time.sleep(60)", 130, "imported\n", LINE),
    "twice within an import": ("import twice_interrupted_import", 130, "", LINE),
    "within an import, behind which another handler waits": ("import handling_import; time.sleep(60)", 75, "", ""),
    "again while it ends": ("try: interrupt()\n        finally: interrupt()", 130, "", LINE),
    "behind the end, where a thread still works": (
        "print('done'); work = lambda: (time.sleep(0.3), interrupt(), time.sleep(60)); threading.Thread(target=work).start(); return 0",
        0, "done\n", "",
    ),
    "behind the end, in what is called at exit": ("atexit.register(interrupt); return 1", 1, "", ""),
    "behind help and wrong usage": ("atexit.register(interrupt); sys.exit(2)", 2, "", ""),
}  # fmt: skip


def run(folder, body, way, **options):
    """Run a verb with a body of its own, as a script or as a module."""
    (folder / "command.py").write_text(START.format(body=f"        {body}"))
    for name, rest in MODULES.items():
        (folder / f"{name}.py").write_text(f"from __main__ import interrupt\ninterrupt()\n{rest}\n")
    paths = os.pathsep.join([str(folder), *filter(None, sys.path)])
    words = [sys.executable, *(["-m", "command"] if way == "module" else [str(folder / "command.py")]), "verb"]
    return subprocess.run(words, capture_output=True, text=True, timeout=30, env={**os.environ, "PYTHONPATH": paths}, **options)


@pytest.mark.parametrize("way", ["module", "script"])
@pytest.mark.parametrize("case", CASES)
def test_the_exit_code_is_the_documented_one(tmp_path, case, way):
    body, *expected = CASES[case]
    done = run(tmp_path, body, way)
    assert [done.returncode, done.stdout, done.stderr] == expected


def test_where_ctrl_c_is_ignored_it_stays_so(tmp_path):
    """As under nohup."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a child inherits it
    try:
        done = run(tmp_path, "interrupt(); return 0", "module")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (done.returncode, done.stderr) == (0, "")
