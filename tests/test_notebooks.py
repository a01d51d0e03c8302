"""The lessons are whole, small and clean as committed; every solution runs, and make.py proves every exercise."""

import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

from conftest import ROOT  # noqa: E402

sys.path.insert(0, str(ROOT / "notebooks"))
import make  # noqa: E402

LESSONS = make.lessons()


def committed(file):
    return nbformat.read(file, 4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(params=LESSONS, ids=lambda file: file.stem)
def solution(request):
    return request.param


def test_lessons_are_numbered_from_0():
    assert [file.name[:2] for file in LESSONS] == [f"{n}_" for n in range(len(LESSONS))]
    assert {file.name for file in LESSONS} == {file.name for file in (ROOT / "notebooks").glob("*.ipynb")}


def test_the_student_notebook_is_what_make_derives(solution):
    derived, student = make.student(committed(solution)), committed(ROOT / "notebooks" / solution.name)
    assert student == derived, f"run python notebooks/make.py --derive {solution.name[0]}"


def test_no_solution_is_left_in_the_student_notebook(solution):
    student = committed(ROOT / "notebooks" / solution.name)
    text = "\n".join(cell.source for cell in student.cells)
    assert "# solution" not in text and "<!-- solution" not in text and "# end" not in text
    blanks = [cell for cell in code(student) if "your turn" in cell.source]
    assert len(blanks) >= 3 and "*Your answer:*" in text and not [c for c in student.cells if c.cell_type == "raw"]
    for cell in code(student):
        if "your turn" in cell.source or cell.source.startswith(("# check", "# try")):
            assert not cell.outputs


def test_each_exercise_with_a_check_lists_other_right_answers_and_wrong_ones(solution):
    others, tried = [], 0
    for cell in committed(solution).cells:
        if make.CODE_BLANK.search(cell.source) and cell.cell_type == "code":
            others = []
        elif cell.cell_type == "raw":
            others.append(cell.source)
        elif cell.source.startswith("# check"):
            assert sum(answer.startswith(make.RIGHT) for answer in others) >= 1, cell.source
            assert sum(answer.startswith(make.WRONG) for answer in others) >= 2, cell.source
            tried += 1
    assert tried >= 3


def test_a_lesson_opens_and_ends_as_all_do(solution):
    cells = committed(solution).cells
    for words in ("**You will learn**", "**You need**", "**Time**", "two CPU cores", "on a GPU",
                  f"](../pictures/{solution.stem}.png)"):
        assert words in " ".join(cells[0].source.split())
    assert "lesson.start(minutes=" in cells[1].source
    assert (ROOT / "notebooks" / "pictures" / f"{solution.stem}.png").exists()
    assert "## Discuss" in cells[-1].source and "## Read" in cells[-1].source
    assert sum(cell.source.startswith("# check") for cell in cells) >= 3
    headings = [line for cell in cells for line in cell.source.splitlines() if re.match("##+ Exercise", line)]
    assert any("open" in line for line in headings)


def test_lines_are_at_most_120_characters_long(solution):
    long = [line for cell in committed(solution).cells for line in cell.source.splitlines() if len(line) > 120]
    assert not long


def test_outputs_are_there_small_and_without_traces_of_a_machine(solution):
    for file in (solution, ROOT / "notebooks" / solution.name):
        assert file.stat().st_size < 1e6
        text = file.read_text()
        for trace in ("/tmp/", "/home/", "/root/", "/work/", "/Users/", "Traceback", "Warning"):
            assert trace not in text, f"{trace} in {file.name}"
        assert all(not cell.metadata for cell in committed(file).cells)
    outputs = [output for cell in code(committed(solution)) for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]


def test_links_lead_somewhere(solution):
    for cell in committed(solution).cells:
        targets = re.findall(r"\]\(([^)\s]+)\)", cell.source) if cell.cell_type == "markdown" else []
        for target in targets:
            assert target.startswith("http") or (solution.parent / target).exists(), target


def test_no_cell_installs_downloads_or_logs_in(solution):
    for cell in code(committed(solution)):
        assert not re.search(r"pip install|\b(conda|apt|wget|curl|requests|urllib|login|snapshot_download"
                             r"|hf_hub_download)\b", cell.source)


@pytest.fixture(scope="module")
def proofs(request):
    """{lesson: a future}. Models as small as these gain little from a second thread: so the lessons that this run of
    the tests asks for are run side by side instead, each with one thread."""
    wanted = {item.callspec.params["solution"] for item in request.session.items if "proofs" in item.fixturenames}
    with ThreadPoolExecutor(min(os.cpu_count(), 4)) as pool:
        yield {file: pool.submit(prove, file) for file in sorted(wanted)}


def prove(file):
    """How many answers make.py tried in a lesson, and how many checks the lesson has."""
    notebook = committed(file)
    for cell in code(notebook):
        cell.outputs = []
    tried, _ = make.execute(notebook, OMP_NUM_THREADS="1")  # raises if an exercise does not hold what make.py promises
    return tried, sum(cell.source.startswith("# check") for cell in notebook.cells)


def test_the_solution_runs_and_its_exercises_are_proven(solution, proofs):
    """A cell may take 1,800 seconds, which is against hanging only: nothing here depends on the machine's speed."""
    tried, checks = proofs[solution].result()
    assert tried >= 5 * checks


def test_blanks_replace_what_stands_between_the_marks():
    source = ("def f(x):\n    # solution\n    y = x\n    return y\n    # end\n\n\n"
              "# solution\n# blank: a, b = ..., ...  # your turn: two numbers\na, b = 1, 2\n# end\nprint(a)")
    assert make.blank(source) == (
        'def f(x):\n    raise NotImplementedError("your turn")  # 2 lines in the solution\n\n\n'
        "a, b = ..., ...  # your turn: two numbers\nprint(a)")
    with pytest.raises(ValueError, match="needs `# blank: ` lines"):
        make.blank("# solution\na = 1\n# end")


EXERCISE = "# solution\n# blank: n = ...  # your turn: a number\nn = 4\n# end"
CHECK = "# check\nassert n is not ..., 'your turn'\nassert n == 4, 'two and two'\n"


@pytest.mark.parametrize("check, others, complaint", [
    ("# check\npass", [], "the blank passes the check"),
    ("# check\nassert n == 4", [], "does not say 'your turn'"),
    (CHECK, ["# wrong: two and two\nn = 4"], "passes the check"),
    (CHECK, ["# wrong: three\nn = 5"], "does not say 'three'"),
    (CHECK, ["# also right\nn = 5"], "should pass"),
    (CHECK, ["n = 4"], "a raw cell begins with"),
    (CHECK + "del n", [], "run a second time"),
])
def test_what_is_wrong_with_an_exercise_is_said(check, others, complaint):
    cells = [nbformat.v4.new_code_cell(EXERCISE), *map(nbformat.v4.new_raw_cell, others),
             nbformat.v4.new_code_cell(check)]
    with pytest.raises(ValueError, match=complaint):
        make.execute(nbformat.v4.new_notebook(cells=cells))


def test_a_sound_exercise_is_proven_and_its_outputs_are_those_of_the_solution():
    others = ["# wrong: two and two\nn = 5", "# wrong: two and two\nn = 22", "# also right\nn = 2 + 2.0"]
    cells = [nbformat.v4.new_code_cell(EXERCISE), *map(nbformat.v4.new_raw_cell, others),
             nbformat.v4.new_code_cell(CHECK + "print(n)")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    assert make.execute(notebook)[0] == 5
    assert notebook.cells[-1].outputs[0].text == "4\n"
