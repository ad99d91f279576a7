"""What an attempt tells of itself: the checkout it runs from, and of a real run everything."""

import subprocess
import sys
from pathlib import Path

import pytest

from phi4.config import recipe_from_toml
from phi4.rundir.about import About, read_abouts
from phi4.track import recipe_params
from phi4.train.about_run import source_tree
from tests.support.in_process import phi4, write_recipe
from tests.support.ranks import pool_fixture


def git(directory: Path, *words: str) -> str:
    identity = ("-c", "user.name=n", "-c", "user.email=e")
    command = ["git", "-C", str(directory), *identity, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


pool = pool_fixture(1)


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A commit that holds the package `planted_package`."""
    package = tmp_path / "planted_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return tmp_path


def test_commit_of_the_package_and_whether_files_differ(checkout):
    commit = git(checkout, "rev-parse", "HEAD")
    found = source_tree("planted_package")
    assert (found.commit, found.is_dirty) == (commit, False)
    (checkout / "untracked").write_text("")
    assert not source_tree("planted_package").is_dirty
    (checkout / "planted_package/__init__.py").write_text("x = 1\n")
    assert source_tree("planted_package").is_dirty


def test_package_that_git_does_not_track_has_no_commit(checkout, monkeypatch):
    """As one that is installed in an environment below another project's checkout."""
    other = checkout / "untracked_package"
    other.mkdir()
    (other / "__init__.py").write_text("")
    assert source_tree("untracked_package") is None
    assert source_tree("no_such_package") is None
    monkeypatch.setenv("PATH", "")
    assert source_tree("planted_package") is None


def test_checkout_without_a_commit_has_none(checkout):
    git(checkout, "update-ref", "-d", "HEAD")
    assert source_tree("planted_package") is None


def train_twice(rank: int, world_size: int, root: Path) -> list[About]:
    for steps in (1, 2):
        words = ["train", "recipe.toml", f"run.steps={steps}", "--change"]
        code, text = phi4(rank, world_size, root, words)
        assert code == 0, text
    return read_abouts(root / "run")


def train_beside_a_file(rank: int, world_size: int, root: Path) -> tuple[int, str]:
    (root / "run").mkdir()
    (root / "run/about").write_text("a file where the directory should be")
    return phi4(rank, world_size, root, ["train", "recipe.toml"])


def test_run_whose_facts_cannot_be_written_trains(tmp_path, pool):
    write_recipe(tmp_path)
    [(code, text)] = pool.run(train_beside_a_file, tmp_path)
    assert code == 0 and "the facts of this attempt (commit, user, data) are not recorded" in text


def test_every_attempt_of_a_run_tells_what_it_was(tmp_path, pool):
    write_recipe(tmp_path, "data.held_out=[{name='h',path='tokens'}]")
    [(first, second)] = pool.run(train_twice, tmp_path)
    assert (first.attempt, first.step, second.attempt, second.step) == (1, 0, 2, 1)
    assert first.uid == second.uid
    recipe = recipe_from_toml((tmp_path / "run/config.toml").read_text(), where="config.toml")
    assert second.recipe == recipe_params(recipe)
    assert (first.recipe["run.steps"], second.recipe["run.steps"]) == (1, 2)
    assert second.directory == str(tmp_path) and second.source_tree == source_tree()
    assert second.packages["torch"] and second.kernels.keys() == second.kernel_reasons.keys()
    assert second.kernels["attention"] == "torch" and second.platform == "cpu"
    assert set(second.degrees.values()) == {1} and second.world_size == 1
    (trained,), (held_out,) = second.sources, second.held_out
    assert (trained.name, held_out.name) == ("a", "h")
    assert trained.sha256 == held_out.sha256 and len(trained.sha256) == 64
    assert (trained.path, trained.num_tokens) == (str(tmp_path / "tokens"), 2000)
