"""benchmarks/reading_hops.py counts what a reader passes."""

import runpy
import sys


def test_a_prompt_is_followed_to_the_network(repo_root):
    script = runpy.run_path(str(repo_root / "benchmarks" / "reading_hops.py"))
    walk, frames = script["walk_prompt"]("checkpoints/ldm-text-scenes-64")
    names = [code.co_name for code in walk.functions]
    assert names[0] == "__call__" and "classifier_free_guidance" in names and "decode_first_stage" in names
    assert frames >= 2  # `__call__`, and at least what calls the network
    assert sys.getprofile() is None


def test_blanks_comments_and_docstrings_are_no_code(repo_root):
    script = runpy.run_path(str(repo_root / "benchmarks" / "reading_hops.py"))
    lines = ['"""A module."""', "", "x = (  # one", "    1,", ")", "", "def f():", '    """Two', '    lines."""']
    lines += ["    # why", '    return "text"']
    assert sorted(script["code_lines"]("\n".join(lines))) == [3, 4, 5, 7, 11]
