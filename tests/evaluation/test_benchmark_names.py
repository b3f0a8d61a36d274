"""benchmarks/: a command's name says what it answers, and an old name leads to the new one."""

import re

ANSWERS = ("speed_", "quality_", "claims_", "reading_")
DOOR = re.compile(
    r'"""Moved: benchmarks/(\w+)\.py\."""\n\nfrom parts\.moved import run_as\n\n.*\n    run_as\("(\w+)"\)\n'
)


def test_every_name_says_what_it_answers_or_leads_there(repo_root):
    folder = repo_root / "benchmarks"
    for path in folder.glob("*.py"):
        door = DOOR.fullmatch(path.read_text())
        assert path.name.startswith(ANSWERS) != bool(door), path.name
        if door:
            assert door[1] == door[2] and (folder / f"{door[1]}.py").is_file(), path.name
        else:
            assert '\nif __name__ == "__main__":\n' in path.read_text(), f"{path.name} is no command"
    for path in (folder / "parts").glob("*.py"):
        assert "__main__" not in path.read_text().replace('run_name="__main__"', ""), f"{path.name} is a command"


def test_no_table_has_a_column_of_goals(repo_root):
    """Goals are the project's own affair: a table says what was reached."""
    files = [*(repo_root / "benchmarks").rglob("*.py"), *(repo_root / "docs").glob("*.md"), repo_root / "README.md"]
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\|\s*(wanted|goal|target)s?\s*\|", text, flags=re.I), path.name


def test_an_old_name_runs_the_new_one(repo_root, warm_python):
    result = warm_python.run(str(repo_root / "benchmarks" / "versatile_parameters.py"), "--help")
    assert result.returncode == 0
    assert result.stderr.startswith("versatile_parameters.py is now benchmarks/claims_versatile_parameters.py")
    assert result.stdout.startswith("usage: claims_versatile_parameters.py")


def test_every_command_is_in_the_table_once(repo_root):
    """The README names the question and the minutes of each; its lines are tried by tests/test_readme.py's rule."""
    folder = repo_root / "benchmarks"
    text = (folder / "README.md").read_text()
    rows = [
        line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ") and "benchmarks/" in line
    ]
    assert all(len(row) == 3 for row in rows)
    listed = [re.search(r"benchmarks/(\w+)\.py", command)[1] for _, command, _ in rows]
    assert sorted(listed) == sorted(path.stem for path in folder.glob("*.py") if path.name.startswith(ANSWERS))
    for _, command, minutes in rows:
        name, options = re.search(r"benchmarks/(\w+\.py)", command)[1], re.findall(r" (--\w+)", command)
        source = (folder / name).read_text() + "".join(path.read_text() for path in (folder / "parts").glob("*.py"))
        assert all(f'"{option}"' in source for option in options), (name, options)
        assert re.search(r"\d", minutes), (name, minutes)
