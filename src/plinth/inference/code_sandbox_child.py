"""What runs inside the sandbox's process: limits first, then the program, then its tests. Imports nothing of the project.

Run as a script; reads a job as JSON on standard input, and writes its secret, or what went wrong, on standard output.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import struct
import sys
import threading
import types

REFUSED = (
    "os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.kill", "os.killpg", "subprocess.Popen",
    "socket.", "ctypes.", "pty.spawn", "gc.get_objects", "gc.get_referrers", "gc.get_referents", "sys._current_frames",
    "sys._current_exceptions", "sys.setprofile", "sys.settrace", "os.chmod", "os.chown", "os.setxattr", "os.removexattr", "os.utime",
    "signal.pthread_kill", "webbrowser.open",
)  # fmt: skip
PLACES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate")  # audit events that name a path first
FRAMES = ("tb_frame", "gi_frame", "cr_frame", "ag_frame")  # ways from the program to the frames below it

# System calls that are refused: the network, processes, signals to others, owners and modes of files, ways around these.
X86_64 = (
    41, 42, 49, 53, 57, 58, 59, 62, 90, 91, 92, 93, 94, 101, 105, 106, 113, 114, 117, 119, 129, 133, 161, 165, 166, 169, 175, 176, 188,
    189, 190, 197, 198, 199, 200, 234, 235, 246, 248, 250, 259, 260, 261, 268, 272, 280, 297, 298, 304, 308, 310, 311, 313, 321, 322,
    323, 424, 425, 434, 452,
)  # fmt: skip
AARCH64 = (
    5, 6, 7, 14, 15, 16, 33, 39, 40, 51, 52, 53, 54, 55, 88, 97, 104, 105, 106, 117, 129, 130, 131, 138, 142, 144, 146, 147, 149, 198,
    199, 200, 203, 217, 219, 221, 240, 241, 265, 268, 270, 271, 273, 280, 281, 282, 424, 425, 434, 452,
)  # fmt: skip
MACHINES = {"x86_64": (0xC000003E, X86_64, 56), "aarch64": (0xC00000B7, AARCH64, 220)}  # audit architecture, refused, clone
CLONE3, CLONE_THREAD, X32 = 435, 0x10000, 0x40000000
ALLOW, EPERM, ENOSYS, KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # of the kernel's filter language
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, FILTER = 38, 22, 2
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT, O_PATH = 444, 445, 446, 0o10000000
WRITE_FILE, MAKE_SPECIAL = 1 << 1, 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 12
WRITING = WRITE_FILE | sum(1 << bit for bit in range(4, 13))


def main() -> None:
    """Run one job. The secret stays in this frame; the program runs in a thread, whose frames do not lead here."""
    job = json.loads(sys.stdin.buffer.read())
    report = os.dup(1)
    os.set_inheritable(report, False)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    program, tests = job.pop("program"), job.pop("tests")
    bound(job["time_s"], job["memory_bytes"], job["file_bytes"])
    confine(job["folder"])
    sys.addaudithook(hook(os.path.realpath(job["folder"])))
    said: list[str] = []
    thread = threading.Thread(target=run, args=(program, tests, said.append), daemon=True)
    thread.start()
    thread.join()
    text = job["secret"] if said == [""] else said[0] if said else "ended before its tests did"
    os.write(report, text.encode("utf-8", "replace")[:1000])
    os._exit(0)


def run(program: str, tests: str, say) -> None:
    """Run program and tests; say nothing wrong as an empty text."""
    try:
        sys.modules["program"] = module = types.ModuleType("program")
        namespace = module.__dict__
        exec(compile(program, "program", "exec"), namespace)
        exec(compile(tests, "tests", "exec"), namespace)
    except BaseException as error:
        try:
            say(f"{type(error).__name__}: {str(error)[:300]}")
        except BaseException:
            say("an exception that can't be shown")
        return
    say("")


def bound(time_s: int, memory_bytes: int, file_bytes: int) -> None:
    """Set the limits that the system keeps for a process."""
    resource.setrlimit(resource.RLIMIT_CPU, (time_s, time_s + 1))
    for name, value in (("AS", memory_bytes), ("FSIZE", file_bytes), ("CORE", 0), ("NOFILE", 64), ("NPROC", 64)):
        limit = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(limit, (value, value))
        except (ValueError, OSError):  # macOS refuses some
            pass


def confine(folder: str) -> list[str]:
    """Let the kernel refuse what it can; return what is in force."""
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        return []
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return []
    files, calls = _confine_files(libc, folder), _confine_calls(libc)
    return ["files"] * files + ["calls"] * calls


def _confine_files(libc, folder: str) -> bool:
    """Allow writing below a folder, and to /dev/null, alone (Landlock)."""
    version = libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    handled = WRITING | (1 << 13 if version >= 2 else 0) | (1 << 14 if version >= 3 else 0)
    ruleset = libc.syscall(LANDLOCK_CREATE, ctypes.create_string_buffer(struct.pack("Q", handled), 8), ctypes.c_size_t(8), 0)
    if ruleset < 0:
        return False
    for path, allowed in ((folder, handled & ~MAKE_SPECIAL), (os.devnull, handled & (WRITE_FILE | 1 << 14))):
        place = os.open(path, O_PATH | os.O_CLOEXEC)
        rule = ctypes.create_string_buffer(struct.pack("<Qi", allowed, place), 12)
        if libc.syscall(LANDLOCK_ADD, ruleset, 1, rule, 0):
            return False
        os.close(place)
    done = libc.syscall(LANDLOCK_RESTRICT, ruleset, 0) == 0
    os.close(ruleset)
    return done


def _confine_calls(libc) -> bool:
    """Refuse the system calls of the list, and processes but not threads (seccomp)."""
    machine, refused, clone = MACHINES[platform.machine()]
    steps = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, machine), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    steps += [(AT_LEAST, 0, 1, X32), (RETURN, 0, 0, EPERM), (EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, ENOSYS)]
    for number in refused:
        steps += [(EQUAL, 0, 1, number), (RETURN, 0, 0, EPERM)]
    steps += [(EQUAL, 0, 3, clone), (LOAD, 0, 0, 16), (ANY_BIT, 1, 0, CLONE_THREAD), (RETURN, 0, 0, EPERM), (RETURN, 0, 0, ALLOW)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps), 8 * len(steps))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code)), 16)
    return libc.prctl(PR_SET_SECCOMP, FILTER, program, 0, 0) == 0


def hook(folder: str):
    """Return an audit hook that refuses what the kernel should, for systems where it can't, and the ways to this module's frames."""

    def inside(path) -> bool:
        if isinstance(path, int):
            return True
        whole = os.path.realpath(os.fsdecode(path))
        return whole in (os.devnull, folder) or whole.startswith(folder + os.sep)

    def check(event: str, args) -> None:
        if event.startswith(REFUSED):
            raise PermissionError(f"{event} is refused")
        if event == "sys._getframe" or (event == "object.__getattr__" and args[1] in FRAMES):
            raise ValueError("frames are not shown")  # which the standard library expects of systems without them
        if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND) and not inside(args[0]):
            raise PermissionError(f"writing {args[0]!r} is refused")
        if event in PLACES and not all(inside(place) for place in args[:2] if isinstance(place, (str, bytes, os.PathLike))):
            raise PermissionError(f"{event} outside of its folder is refused")

    return check


if __name__ == "__main__":
    main()
