"""Runs the scripts in processes of their own without paying seconds of imports for each: imports once, then forks.

Reads requests from stdin, a JSON line each: {"script", "args", "folder", "err"} and, if the process is to be stopped,
{"signal", "match", "nth"}: it sends itself this signal just before the nth time that it opens, renames, makes or
deletes a file whose path matches the regular expression. Answers with {"pid"} when it has started and
{"code", "touched"} when it has ended: the exit code (-9 if killed) and what it did to files, in order."""

import importlib
import json
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "miniature")]
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")  # a process with threads cannot be forked safely
import dsd  # noqa: E402

SCRIPTS = {name: importlib.import_module(name) for name in (
    "generate_grids", "curate", "finetune", "sample", "evaluate", "pretrain")}


def watch(trace, signal=None, match=None, nth=0, **request):
    """Note on `trace` what is done to files ("write" is an open that may change one), and send the signal in time."""
    seen = 0

    def hook(event, args):
        nonlocal seen
        if event not in ("open", "os.rename", "os.remove", "os.mkdir") or not isinstance(args[0], (str, os.PathLike)):
            return
        path = str(args[1] if event == "os.rename" else args[0])
        if "/lib/python" in path or path.startswith(("/dev", "/proc", "/sys")):
            return
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
        os.write(trace, f"{'write' if writes else event} {path}\n".encode())
        if match and re.search(match, path):
            seen += 1
            if seen == nth:
                os.kill(os.getpid(), signal)
    sys.addaudithook(hook)


def child(request, trace):
    os.chdir(request["folder"])
    err = os.open(request["err"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(err, 1), os.dup2(err, 2)
    sys.argv = [request["script"] + ".py", *request["args"]]
    watch(trace, **request)
    try:
        dsd.run_main(SCRIPTS[request["script"]].main)
    except SystemExit as stop:
        os._exit(stop.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


for line in sys.stdin:
    request = json.loads(line)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        child(request, writing)
    os.close(writing)
    print(json.dumps({"pid": pid}), flush=True)
    with open(reading, encoding="utf-8") as file:
        touched = file.read().splitlines()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(json.dumps({"code": code, "touched": touched}), flush=True)
