"""Each script is killed in each of its phases and started again: the same command ends with the same bytes.

SIGKILL leaves no chance to clean up: just before a script touches a chosen file, in every phase of the work, and at
random times. How many kills there were is printed last."""

import dsd

import importlib
import multiprocessing
import os
import random
import re
import signal
import sys
import time
from multiprocessing import forkserver

import psutil
import pytest
from conftest import COUNTS, ROOT, critter, written

if not hasattr(os, "fork"):
    pytest.skip("this system cannot fork processes", allow_module_level=True)

PHASES = {  # script -> what the paths of each phase's files match, in the order of the work: how often they are touched
    "generate_grids": {
        r"settings\.json": 4,
        r"out/grids\.jsonl": 4,
        r"00000\d\.png\.part": 9,
        r"overview\.png": 4,
    },
    "curate": {
        r"images/\d+_\d\.png\.part": 40,
        r"transcripts/00000\d": 8,
        r"metadata\.jsonl": 4,
        r"summary\.json": 4,
        r"(accepted|rejected)\.png": 4,
    },
    "finetune": {
        r"cache/.*\.part": 4,
        r"pytorch_lora_weights": 4,
        r"log\.jsonl": 4,
        r"validation/step_000003": 4,
        r"training_state\.pt": 4,
        r"validation/step_000006": 4,
        r"loss\.png": 4,
    },
    "sample": {r"details\.json": 3, r"000\d\.png\.part": 12, r"contact_sheet\.png": 4},
    "evaluate": {
        r"rows/.*000\d\.png\.part": 4,
        r"rows/.*000\d\.json": 4,
        r"table\.md": 4,
        r"scores\.json": 4,
        r"scatter\.png": 4,
        r"contact_sheet\.png": 4,
    },
    "miniature.pretrain": {r"judge/log\.jsonl": 4, r"judge/checkpoint\.pt": 6, r"out/judge": 4},
}
SCRIPTS = {name: importlib.import_module(name) for name in PHASES}


# ---- processes: forked from one that has imported this file, which saves each the seconds of the imports -------------
def child(folder, script, args, signal=None, match=None, nth=0):
    """Run a script in `folder`, noting there what it does to files: "write" is an open that may change one."""
    seen = 0

    def watch(event, args):
        nonlocal seen
        if event not in ("open", "os.rename", "os.remove", "os.mkdir") or not isinstance(
            args[0], (str, os.PathLike)
        ):
            return
        path = str(args[1] if event == "os.rename" else args[0])
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
        os.write(touched, f"{'write' if writes else event} {path}\n".encode())
        if match and re.search(match, path):
            seen += 1
            if seen == nth:
                os.kill(os.getpid(), signal)

    os.chdir(folder)
    touched = os.open("touched", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    sys.argv = [f"{script}.py", *map(str, args), "--out", f"{folder}/out"]
    sys.addaudithook(watch)
    dsd.run_main(SCRIPTS[script].main)


def start(*args, **stop):
    """A process of a script. It sends itself `signal` just before the `nth` time that it touches a path of `match`."""
    process = multiprocessing.get_context("forkserver").Process(
        target=child, args=args, kwargs=stop
    )
    process.start()
    return process


def end(process, folder):
    """Wait for it: its exit code, -9 if it was killed, and what it did to files, in order."""
    process.join()
    return process.exitcode, (folder / "touched").read_text().splitlines()


# ---- what the steps draw is of no matter here: as little work as touches every kind of file --------------------------
@pytest.fixture(scope="session")
def whole(tmp_path_factory, flux, vlm, pairs):
    """Uninterrupted runs: {script: (arguments, the files of its output folder, seconds)}."""
    multiprocessing.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT / "tests"))
        patch.setenv("OMP_NUM_THREADS", "1")  # a process with threads cannot be forked safely
        forkserver.ensure_running()
    root, found = tmp_path_factory.mktemp("whole"), {}
    critters = [root / f"critter {i}.png" for i in (0, 1)]
    for i, file in enumerate(critters):
        critter(4000, [i, 0, 0]).save(file)
    arguments = {
        "generate_grids": ["--model", flux, "--count", 5, "--steps", 1, "--batch_size", 2]
        + ["--agreement", 1],
        "curate": [
            "--vlm",
            vlm,
            "--grids",
            root / "generate_grids" / "out",
            "--tolerance",
            9,
            "--batch_size",
            12,
        ],
        "finetune": [
            "--model",
            flux,
            "--pairs",
            pairs,
            "--steps",
            6,
            "--rank",
            2,
            "--batch_size",
            1,
            "--save_every",
            2,
            "--validate_every",
            3,
            "--image_guidance",
            1,
            "--text_guidance",
            1,
        ],
        "sample": [
            "--model",
            flux,
            "--adapter",
            root / "finetune" / "out",
            "--enhance",
            vlm,
            "--image",
            *critters,
            "--steps",
            1,
            "--prompt",
            "a critter in space",
            "a {name} in a cave",
            "--seed",
            0,
            1,
            "--batch_size",
            3,
        ],
        "evaluate": [
            "--model",
            flux,
            "--vlm",
            vlm,
            "--judge",
            ROOT / "miniature" / "judge",
            "--rows",
            "prompt alone",
            "reference copied",
            "--references",
            1,
            "--prompts",
            1,
            "--steps",
            1,
        ],
        "miniature.pretrain": [
            "judge",
            "--steps",
            6,
            "--batch_size",
            4,
            "--save_minutes",
            0,
            "--precision",  # else a stopwatch decides, which does not say the same in every run
            "no",
        ],
    }  # its checkpoints are in runs/
    for script, args in arguments.items():
        (folder := root / script).mkdir()
        process, begun = start(folder, script, args), time.time()
        code, touched = end(process, folder)
        assert code == 0 and not [
            line
            for line in touched
            if re.match(f"write {folder}/out/", line) and not re.search(r"\.lock$|\.part", line)
        ]  # files are written aside: they are whole or absent
        found[script] = args, written(folder / "out"), time.time() - begun
    return found


@pytest.mark.parametrize("script", PHASES)
def test_killed_twice_in_each_phase_the_same_command_ends_with_the_same_bytes(
    script, whole, tmp_path
):
    (args, wanted, _), draw = whole[script], random.Random(script)
    for match, times in PHASES[script].items():
        for nth in (
            draw.randint(1, (times + 1) // 2),
            1,
        ):  # the second time just where the work is taken up again
            process = start(tmp_path, script, args, signal=signal.SIGKILL, match=match, nth=nth)
            code, touched = end(process, tmp_path)
            assert code == -signal.SIGKILL and re.search(match, touched[-1]), match
            COUNTS["interruptions"] += 1
    assert written(tmp_path / "out") != wanted  # there was something left to do
    start(tmp_path, script, args).join()
    assert written(tmp_path / "out") == wanted


@pytest.mark.parametrize("script", PHASES)
def test_killed_at_random_times_the_same_command_ends_with_the_same_bytes(script, whole, tmp_path):
    """A kill may come while a file is being written, or after the end: then nothing may change any more."""
    (args, wanted, seconds), draw = whole[script], random.Random(script)
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
    script, whole, tmp_path, call, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (args, wanted, _), second_phase = whole[script], list(PHASES[script])[1]
    process = start(tmp_path, script, args, signal=signal.SIGSTOP, match=second_phase, nth=1)
    try:
        while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        code, _, err = call(SCRIPTS[script], *args, "--out", tmp_path / "out")
        assert code == 2 and "is in use by another process" in err
    finally:
        os.kill(process.pid, signal.SIGCONT)
    process.join()
    assert written(tmp_path / "out") == wanted
