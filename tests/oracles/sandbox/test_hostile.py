"""Every hostile program ends as it has to, for root and for an ordinary user."""

import json
import os

import pytest

from phi4.oracles.sandbox import Tools
from phi4.oracles.sandbox.hostile import ATTACKS, Attack, attacks, is_held, run_attack, told
from tests.support.ordinary_user import run_as_user

AS_USER = """
import json, os
from phi4.oracles.sandbox import find_tools
from phi4.oracles.sandbox.hostile import attacks, run_attack, told
tools = find_tools()
seen = {attack.name: told(run_attack(attack, tools)) for attack in attacks(tools.machine)}
print(json.dumps([os.geteuid(), seen]))
"""


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_attack_ends_as_it_has_to(
    attack: Attack, tools: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHI4_SECRET", "s3cret")
    if attack in attacks(tools.machine):
        ended = run_attack(attack, tools)
        assert is_held(attack, ended), (told(ended), ended.stderr)


@pytest.fixture(scope="module")
def seen_by_user(tools: Tools) -> dict[str, str]:
    user, seen = json.loads(run_as_user(AS_USER))
    assert user != 0
    return seen


@pytest.mark.skipif(os.geteuid() != 0, reason="the test above ran as an ordinary user")
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_attack_ends_as_it_has_to_for_a_user(
    attack: Attack, tools: Tools, seen_by_user: dict[str, str]
) -> None:
    if attack in attacks(tools.machine):
        assert seen_by_user[attack.name].startswith(attack.expected)
