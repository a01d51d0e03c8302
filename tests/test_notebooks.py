"""The lessons: whole, small and clean as committed; every solution runs; every check fails on a blank and passes on its solution."""

import re
import sys

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

from conftest import ROOT  # noqa: E402

sys.path.insert(0, str(ROOT / "notebooks"))
import make  # noqa: E402

LESSONS = make.lessons()
SECONDS = 150  # the limit of one lesson, in processor time: other work on the machine does not count


def committed(file):
    return nbformat.read(file, 4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(params=LESSONS, ids=lambda file: file.stem)
def solution(request):
    return request.param


def test_there_are_six_lessons_numbered_from_0():
    assert [file.name[:2] for file in LESSONS] == [f"{n}_" for n in range(6)]
    assert {file.name for file in LESSONS} == {file.name for file in (ROOT / "notebooks").glob("*.ipynb")}


def test_the_student_notebook_is_what_make_derives(solution):
    derived, student = make.student(committed(solution)), committed(ROOT / "notebooks" / solution.name)
    assert student == derived, f"run python notebooks/make.py --derive {solution.name[0]}"


def test_no_solution_is_left_in_the_student_notebook(solution):
    student = committed(ROOT / "notebooks" / solution.name)
    text = "\n".join(cell.source for cell in student.cells)
    assert "# solution" not in text and "<!-- solution" not in text and "# end" not in text
    blanks = sum(cell.source.count("raise NotImplementedError") for cell in code(student))
    assert blanks >= 3 and "*Your answer:*" in text
    for cell in code(student):
        if "raise NotImplementedError" in cell.source or cell.source.startswith("# check"):
            assert not cell.outputs


def test_a_lesson_opens_and_ends_as_all_do(solution):
    cells = committed(solution).cells
    for words in ("**You will learn**", "**You need**", "**Time**", "two CPU cores", "on a GPU", f"](../pictures/{solution.stem}.png)"):
        assert words in cells[0].source
    assert (ROOT / "notebooks" / "pictures" / f"{solution.stem}.png").exists()
    assert "## Discuss" in cells[-1].source and "## Read" in cells[-1].source
    assert sum(cell.source.startswith("# check") for cell in cells) >= 3
    assert sum("open" in line for cell in cells for line in cell.source.splitlines() if re.match("##+ Exercise", line)) >= 1


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
        for target in re.findall(r"\]\(([^)\s]+)\)", cell.source) if cell.cell_type == "markdown" else []:
            assert target.startswith("http") or (solution.parent / target).exists(), target


def test_no_cell_installs_downloads_or_logs_in(solution):
    for cell in code(committed(solution)):
        assert not re.search(r"pip install|\b(conda|apt|wget|curl|requests|urllib|login|snapshot_download|hf_hub_download)\b", cell.source)


def test_the_solution_runs_each_check_passes_and_each_blank_fails(solution):
    notebook = committed(solution)
    for cell in code(notebook):
        cell.outputs = []
    tried, seconds = make.execute(notebook)  # raises if a cell or a solution fails, or if a blank passes
    assert tried == sum(cell.source.startswith("# check") for cell in notebook.cells) >= 3
    assert seconds < SECONDS


def test_blanks_replace_what_stands_between_the_marks():
    source = "def f(x):\n    # solution\n    y = x\n    return y\n    # end\n\n\n# solution\na, b = 1, 2\n# end\nprint(a)"
    blank = make.blank(source)
    assert blank == ('def f(x):\n    raise NotImplementedError("your turn")  # 2 lines in the solution\n\n\n'
                     'raise NotImplementedError("your turn")  # 1 line in the solution\nprint(a)')
    assert make.assigned(source) == ["a", "b"]


@pytest.mark.parametrize("check", ["# check\npass", "# check\nassert 'n' in globals() or True"])
def test_a_check_that_a_blank_passes_is_refused(check):
    cells = [nbformat.v4.new_code_cell("# solution\nn = 1\n# end"), nbformat.v4.new_code_cell(check)]
    with pytest.raises(ValueError, match="passes without a solution"):
        make.execute(nbformat.v4.new_notebook(cells=cells))
