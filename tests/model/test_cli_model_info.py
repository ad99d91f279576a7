"""`phi4 model info` prints the figures of the recipe that it was given."""

import pytest
from typer.testing import CliRunner

from phi4.cli.model import app
from phi4.errors import ConfigError


def _info(*arguments):
    return CliRunner().invoke(app, ["info", *arguments], env={"COLUMNS": "160"})


def test_without_recipe_it_shows_phi4():
    output = _info().output

    for figure in ("14,659,507,200", "89,904,906,240", "204,800 B/token", "27.3 GiB"):
        assert figure in output


def test_recipe_and_overrides_change_the_figures(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[model]\nnum_layers = 2\n[data]\nsequence_length = 16384\n")

    assert "1,709,204,480" in _info(str(recipe)).output
    assert "at 16,384 tokens" in _info(str(recipe)).output
    assert "1,368,407,040" in _info(str(recipe), "model.num_layers=1").output
    assert "1,368,407,040" in _info("model.num_layers=1").output


@pytest.mark.parametrize("argument", ["absent.toml", "model.layers=1", "model.hidden_size=5121"])
def test_wrong_input_is_one_of_our_errors(argument):
    assert isinstance(_info(argument).exception, ConfigError)
