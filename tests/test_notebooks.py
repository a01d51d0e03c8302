"""The lessons are whole, small and clean as committed; solutions run, and exercises are proven."""

import importlib
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import nbformat
import pytest
from conftest import ROOT

NOTEBOOKS = ROOT / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))
make = importlib.import_module("make")

LESSONS = make.lessons()


def cells(file, kind=""):
    """The cells of a committed notebook, all or those of a kind."""
    return [cell for cell in nbformat.read(file, 4).cells if kind in cell.cell_type]


def text(file, kind=""):
    return "\n".join(cell.source for cell in cells(file, kind))


@pytest.fixture(params=LESSONS, ids=lambda file: file.stem)
def solution(request):
    return request.param


@pytest.fixture
def student(solution):
    return NOTEBOOKS / solution.name


def test_lessons_are_numbered_from_0():
    assert [file.name[:2] for file in LESSONS] == [f"{n}_" for n in range(len(LESSONS))]
    assert {file.name for file in LESSONS} == {file.name for file in NOTEBOOKS.glob("*.ipynb")}


def test_the_student_notebook_is_what_make_derives(solution, student):
    derived = make.student(nbformat.read(solution, 4))
    assert nbformat.read(student, 4) == derived, (
        f"run python notebooks/make.py --derive {solution.name[0]}"
    )


def test_a_lesson_holds_no_solutions_long_lines_downloads_or_traces_of_a_machine(solution, student):
    downloads = r"pip install|\b(conda|apt|wget|curl|requests|urllib|login|\w+_download)\b"
    traces = "/tmp/|/home/|/root/|/work/|/Users/|Traceback|Warning"
    assert not re.findall("# solution|<!-- solution|# end", text(student))
    assert not re.findall(".{121}", text(solution))
    assert not re.findall(downloads, text(solution, "code"))
    assert not re.findall(traces, solution.read_text() + student.read_text())


def test_exercises_are_blank_in_the_student_notebook(student):
    blanks = [cell for cell in cells(student, "code") if "your turn" in cell.source]
    assert len(blanks) >= 3 and "*Your answer:*" in text(student) and not cells(student, "raw")
    for cell in cells(student, "code"):
        depends_on_the_student = cell.source.startswith(("# check", "# try"))
        if "your turn" in cell.source or depends_on_the_student:
            assert not cell.outputs


def test_each_exercise_with_a_check_lists_other_right_answers_and_wrong_ones(solution):
    others, tried = [], 0
    for cell in cells(solution):
        if make.CODE_BLANK.search(cell.source) and cell.cell_type == "code":
            others = []
        elif cell.cell_type == "raw":
            others.append(cell.source)
        elif cell.source.startswith("# check"):
            for mark, least in ((make.RIGHT, 1), (make.WRONG, 2)):
                assert sum(answer.startswith(mark) for answer in others) >= least, cell.source
            tried += 1
    assert tried >= 3


def test_a_lesson_opens_and_ends_as_all_do(solution):
    first, second, *_, last = (cell.source for cell in cells(solution))
    first, picture = " ".join(first.split()), f"pictures/{solution.stem}.png"
    for words in ("**You will learn**", "**You need**", "**Time**", "two CPU cores", "on a GPU"):
        assert words in first
    assert f"](../{picture})" in first
    assert "lesson.start(minutes=" in second and (NOTEBOOKS / picture).exists()
    assert "## Discuss" in last and "## Read" in last
    assert re.search("^##+ Exercise.*open", text(solution), re.MULTILINE)


def test_outputs_are_there_and_small(solution, student):
    for file in (solution, student):
        assert file.stat().st_size < 1e6 and not any(cell.metadata for cell in cells(file))
    outputs = [output for cell in cells(solution, "code") for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert all(output.output_type != "error" for output in outputs)
    assert all(output.get("name") != "stderr" for output in outputs)


def test_links_lead_somewhere(solution):
    for target in re.findall(r"\]\(([^)\s]+)\)", text(solution, "markdown")):
        assert target.startswith("http") or (solution.parent / target).exists(), target


@pytest.fixture(scope="module")
def proofs(request):
    """{lesson: a future of what make.execute returns}, of the lessons that this run asks for.

    Models this small gain little from a second thread: so lessons run side by side."""
    asked = [item for item in request.session.items if "proofs" in item.fixturenames]
    proofs = {}
    with ThreadPoolExecutor(min(os.cpu_count(), 4)) as pool:
        for file in sorted({item.callspec.params["solution"] for item in asked}):
            notebook = nbformat.read(file, 4)
            proofs[file] = pool.submit(make.execute, notebook, OMP_NUM_THREADS="1")
        yield proofs


def test_the_solution_runs_and_its_exercises_are_proven(solution, proofs):
    """A cell may take 1,800 seconds, which only ends what hangs. Speed is of no matter here."""
    tried, _ = proofs[solution].result()  # an error if an exercise is not as make.py promises
    assert tried >= 5 * sum(cell.source.startswith("# check") for cell in cells(solution))


def test_blanks_replace_what_stands_between_the_marks():
    source = "def f(x):\n    # solution\n    y = x\n    return y\n    # end\n\n\n# solution\n"
    source += "# blank: a, b = ..., ...  # your turn: two numbers\na, b = 1, 2\n# end\nprint(a)"
    assert make.blank(source) == (
        'def f(x):\n    raise NotImplementedError("your turn")  # 2 lines in the solution\n\n\n'
        "a, b = ..., ...  # your turn: two numbers\nprint(a)"
    )
    with pytest.raises(ValueError, match="needs `# blank: ` lines"):
        make.blank("# solution\na = 1\n# end")


EXERCISE = "# solution\n# blank: n = ...  # your turn: a number\nn = 4\n# end"
CHECK = "# check\nassert n is not ..., 'your turn'\nassert n == 4, 'two and two'\n"


def exercise(check, others):
    """A notebook of EXERCISE, other answers to it, and its check."""
    code, raw = nbformat.v4.new_code_cell, nbformat.v4.new_raw_cell
    return nbformat.v4.new_notebook(cells=[code(EXERCISE), *map(raw, others), code(check)])


@pytest.mark.parametrize(
    "check, others, complaint",
    [
        ("# check\npass", [], "the blank passes the check"),
        ("# check\nassert n == 4", [], "does not say 'your turn'"),
        (CHECK, ["# wrong: two and two\nn = 4"], "passes the check"),
        (CHECK, ["# wrong: three\nn = 5"], "does not say 'three'"),
        (CHECK, ["# also right\nn = 5"], "should pass"),
        (CHECK, ["n = 4"], "a raw cell begins with"),
        (CHECK + "del n", [], "run a second time"),
        (CHECK + "import warnings\nwarnings.warn('old')", [], "prints a warning"),
    ],
)
def test_what_is_wrong_with_an_exercise_is_said(check, others, complaint):
    with pytest.raises(ValueError, match=complaint):
        make.execute(exercise(check, others))


def test_a_sound_exercise_is_proven_and_its_outputs_are_those_of_the_solution():
    others = [
        "# wrong: two and two\nn = 5",
        "# wrong: two and two\nn = 22",
        "# also right\nn = 2 + 2.0",
    ]
    notebook = exercise(CHECK + "print(n)", others)
    assert make.execute(notebook)[0] == 5 and notebook.cells[-1].outputs[0].text == "4\n"
