import re
import subprocess

from laplace_debiased.comparison import environment as module
from laplace_debiased.comparison.environment import environment


def test_versions_and_commit_are_recorded():
    found = environment()
    assert re.fullmatch(r"[0-9a-f]{7,}(-dirty)?", found["commit"] or "0000000")
    assert found["torch"].startswith("2.") and found["threads"] >= 1


def test_there_is_no_commit_outside_a_clone(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_FOLDER", tmp_path)
    assert environment()["commit"] is None


def test_a_clone_of_something_else_is_not_ours(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    monkeypatch.setattr(module, "_FOLDER", tmp_path)
    assert environment()["commit"] is None
