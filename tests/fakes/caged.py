"""A process with cages: it makes calls that its standard input names, and prints what came of them, as JSON.

    python -m tests.fakes.caged UID FILTERED < [[{"name": code, ...}, SECONDS], ...]

Each entry is a call. Its codes are run one after another by `exec` in the caged process, and by a Python that this
starts. What raises nothing is "reached", or what it calls `said`; else the error's class. UID 0 stays root. With
FILTERED, unshare and mount are denied before, as Docker's filter does.

The data of each process is bounded by `DATA`.
"""

import ctypes
import inspect
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from node.processes.cage import PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, Cage
from node.processes.call_supervisor import CageError
from node.processes.confinement import CAP_DAC_READ_SEARCH, calls, deny_calls, renounce_privileges, set_capabilities
from node.processes.worker_process import Message

MOST = 1 << 16  # bytes of an answer
DATA = 1 << 30  # bytes


def become(uid: int) -> None:
    """Take another uid, with the one capability that reading Python may need."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    set_capabilities(libc, 1 << CAP_DAC_READ_SEARCH, inherited=True)
    libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_DAC_READ_SEARCH, 0, 0)
    libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # as if this uid had started the program


def run(codes: dict[str, str]) -> dict[str, object]:
    """Run texts; return what came of each."""
    found: dict[str, object] = {}
    for name, code in codes.items():
        names: dict[str, object] = {"__name__": "text"}
        try:
            exec(code, names)  # a text, in a cage
            found[name] = names.get("said", "reached")
        except BaseException as error:  # noqa: BLE001  # whatever it raises
            found[name] = type(error).__name__
    return found


def run_twice(codes: dict[str, str]) -> Message:
    """Run texts in this process and in another."""
    other = f"import json\n{inspect.getsource(run)}\nprint(json.dumps(run({codes!r})))"
    done = subprocess.run([sys.executable, "-I", "-c", other], capture_output=True, text=True, check=False)
    return {"here": run(codes), "program": json.loads(done.stdout.splitlines()[-1]) if done.stdout else done.stderr}


def main() -> None:
    uid, filtered = int(sys.argv[1]), sys.argv[2] == "True"
    if uid != 0 and os.geteuid() == 0:
        become(uid)
    if filtered:
        libc = ctypes.CDLL(None, use_errno=True)
        renounce_privileges(libc)
        deny_calls(libc, calls("unshare 272 97, mount 165 40, setns 308 268"))
    resource.setrlimit(resource.RLIMIT_DATA, (DATA, DATA))
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o711)
    cage = Cage(folder)
    found: dict[str, Any] = {"lacks": cage.lacks(), "calls": []}
    for codes, seconds in json.load(sys.stdin):
        try:
            found["calls"].append(cage.call(lambda codes=codes: run_twice(codes), seconds, MOST))
        except CageError as error:
            found["calls"].append(str(error))
    found["left"] = [str(path) for path in folder.iterdir()]
    print(json.dumps(found))  # its answer
    folder.rmdir()


if __name__ == "__main__":
    main()
