"""Each script is killed in each of its phases and started again: the same command ends with the
same bytes. How many kills there were is printed last.

SIGKILL leaves no chance to clean up: it comes just before a script touches a chosen file, and at
random times. What is drawn is of no matter here: as little as touches every kind of file. The
processes are forked from one that has imported everything, which saves each of them seconds."""

import dsd

import importlib
import multiprocessing
import os
import random
import re
import shlex
import signal
import sys
import time
from multiprocessing import forkserver

import psutil
import pytest
from conftest import COUNTS, ROOT, words, written

if not hasattr(os, "fork"):
    pytest.skip("this system cannot fork processes", allow_module_level=True)

COMMANDS = {  # {pairs} and {grids} are folders
    "generate_grids": "--count 5 --steps 1 --batch_size 2",
    "curate": "--grids {grids} --tolerance 9 --batch_size 12",
    "finetune": "--pairs {pairs} --steps 6 --rank 2 --batch_size 1 --save_every 2 "
    "--validate_every 3 --image_guidance 1 --text_guidance 1",
    "sample": f"--enhance '{dsd.MINIATURE}/vlm' --steps 1 --batch_size 3 --seed 0 1 "
    "--image {pairs}/images/000000_0.png {pairs}/images/000001_0.png --prompt 'a fox' 'a critter'",
    "evaluate": "--rows 'prompt alone' 'reference copied' --references 1 --prompts 1 --steps 1",
    "miniature.pretrain": "judge --steps 6 --batch_size 4 --save_minutes 0 --precision no",
}
PHASES = {  # script: patterns of the files that its phases write, in the order of the work
    "generate_grids": r"settings\.json out/grids\.jsonl 00000[2-4]\.png\.part overview\.png",
    "curate": r"images/00000[2-4]_\d\.png\.part transcripts/00000[2-4] metadata\.jsonl "
    r"summary\.json (accepted|rejected)\.png",
    "finetune": r"cache/.*\.part pytorch_lora_weights log\.jsonl validation/step_000003 "
    r"training_state\.pt validation/step_000006 loss\.png",
    "sample": r"details\.json 000[2-7]\.png\.part contact_sheet\.png",
    "evaluate": r"rows/.*000\d\.png\.part rows/.*000\d\.json table\.md scores\.json scatter\.png "
    r"contact_sheet\.png",
    "miniature.pretrain": r"judge/log\.jsonl judge/checkpoint\.pt out/judge",
}
SCRIPTS = {name: importlib.import_module(name) for name in COMMANDS}
NOT_ASIDE = 99  # an exit code


# ---- processes -----------------------------------------------------------------------------------
def child(folder, script, args, pattern, nth, signal_number):
    """Run a script in `folder`. A signal comes just before the nth time that it touches a file
    like `pattern`. Files must be written aside: a whole one that is opened to write ends it."""
    seen = 0

    def watch(event, args):
        nonlocal seen
        if event not in ("open", "os.rename", "os.remove", "os.mkdir"):
            return
        path = str(args[1] if event == "os.rename" else args[0])
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
        aside = re.search(r"\.part|\.lock$", path)
        if writes and path.startswith(f"{folder}/out/") and not aside:
            os._exit(NOT_ASIDE)
        if pattern and re.search(pattern, path):
            seen += 1
            if seen == nth:
                os.kill(os.getpid(), signal_number)

    os.chdir(folder)
    sys.argv = [script, *args]
    sys.addaudithook(watch)
    dsd.run_main(SCRIPTS[script].main)


def start(folder, script, args, pattern=None, nth=1, signal_number=signal.SIGKILL):
    """The process of `child`."""
    context = multiprocessing.get_context("forkserver")
    args = folder, script, args, pattern, nth, signal_number
    process = context.Process(target=child, args=args)
    process.start()
    return process


@pytest.fixture(scope="session")
def fork_server():
    multiprocessing.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT / "tests"))
        patch.setenv("OMP_NUM_THREADS", "1")  # a process with threads cannot be forked safely
        forkserver.ensure_running()


@pytest.fixture(scope="session")
def whole(fork_server, tmp_path_factory, pairs):
    """Uninterrupted runs: {script: (arguments, the files of its output folder, seconds)}."""
    root, found = tmp_path_factory.mktemp("whole"), {}
    for script, command in COMMANDS.items():
        command = command.format(pairs=pairs, grids=root / "generate_grids" / "out")
        folder, begun = root / script, time.time()
        folder.mkdir()
        process = start(folder, script, [*words(command), "--out", f"{folder}/out"])
        process.join()
        assert process.exitcode == 0
        found[script] = words(command), written(folder / "out"), time.time() - begun
    return found


@pytest.mark.parametrize("script", PHASES)
def test_killed_twice_in_each_phase_it_ends_with_the_same_bytes(script, whole, tmp_path):
    args, wanted, _ = whole[script]
    args = [*args, "--out", f"{tmp_path}/out"]
    for pattern in PHASES[script].split():
        # while such a file is written, then just where the work is taken up again
        for nth in (2, 1):
            process = start(tmp_path, script, args, pattern, nth)
            process.join()
            assert process.exitcode == -signal.SIGKILL, pattern
            COUNTS["interruptions"] += 1
    assert written(tmp_path / "out") != wanted  # there was something left to do
    start(tmp_path, script, args).join()
    assert written(tmp_path / "out") == wanted


@pytest.mark.parametrize("script", PHASES)
def test_killed_at_random_times_it_ends_with_the_same_bytes(script, whole, tmp_path):
    """A kill may come while a file is written, or after the end: then nothing may change."""
    args, wanted, seconds = whole[script]
    args, draw = [*args, "--out", f"{tmp_path}/out"], random.Random(script)
    for _ in range(3):
        process = start(tmp_path, script, args)
        time.sleep(draw.uniform(0, seconds))
        process.kill()
        process.join()
        COUNTS["interruptions"] += process.exitcode == -signal.SIGKILL
    start(tmp_path, script, args).join()
    assert written(tmp_path / "out") == wanted


@pytest.mark.parametrize("script", PHASES)
def test_a_second_process_is_refused_and_the_first_goes_on(
    script, whole, tmp_path, refused, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    args, wanted, _ = whole[script]
    args, second_phase = [*args, "--out", f"{tmp_path}/out"], PHASES[script].split()[1]
    process = start(tmp_path, script, args, second_phase, 1, signal.SIGSTOP)
    try:
        while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        assert "is in use by another process" in refused(SCRIPTS[script], shlex.join(args))
    finally:
        os.kill(process.pid, signal.SIGCONT)
    process.join()
    assert written(tmp_path / "out") == wanted
