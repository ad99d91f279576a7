"""Impossible requests: one clear error each."""

import math

import numpy as np
import pytest

from phi4.errors import ConfigError
from phi4.model.generation_request import MAX_BIAS, MIN_TEMPERATURE
from phi4.sampling.checks import check_request
from phi4.sampling.protocol import ModelLimits, Request

LIMITS = ModelLimits(vocab_size=10, max_sequence_tokens=8)
GOOD = {"prompt": (1, 2, 3), "max_tokens": 5}


def refusal(**changes: object) -> str:
    with pytest.raises(ConfigError) as caught:
        check_request(Request(**GOOD | changes), LIMITS)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ()}, "the prompt has no token"),
        ({"n": 0}, "n=0; expected at least 1"),
        ({"n": -1}, "n=-1; expected at least 1"),
        ({"max_tokens": -1}, "max_tokens=-1; expected at least 1"),
        ({"max_tokens": 0}, "max_tokens=0; expected at least 1"),
        ({"max_tokens": 1, "forced": (1, 2)}, "2 forced tokens exceed max_tokens=1"),
        ({"max_tokens": 6}, "a prompt of 3 tokens and 6 new ones exceed the model's 8"),
        ({"prompt": (1, 10)}, "prompt contains the token id 10; expected 0 to 9"),
        ({"prompt": (1, -1)}, "prompt contains the token id -1"),
        ({"forced": (11,)}, "forced contains the token id 11"),
        ({"forbidden_first": frozenset((12,))}, "forbidden_first contains the token id 12"),
        ({"logit_bias": {13: 1.0}}, "logit_bias contains the token id 13"),
        ({"stop_ids": frozenset((14,))}, "stop_ids contains the token id 14"),
        (
            {"forced": (4, 5), "forbidden_first": frozenset((4,))},
            "token id 4 is both forced and forbidden",
        ),
        (
            {"forced": (4, 5), "stop_ids": frozenset((4,))},
            "forced token id 4 is a stop id with forced tokens after it",
        ),
        ({"forbidden_first": frozenset(range(10))}, "forbidden_first holds all 10 ids"),
        ({"temperature": math.nan}, "temperature=nan; expected 0, or 1e-06 and more"),
        ({"temperature": math.inf}, "temperature=inf; expected 0, or"),
        ({"temperature": -0.5}, "temperature=-0.5; expected 0, or"),
        ({"temperature": 1e-320}, "temperature=1e-320; expected 0, or"),
        ({"top_p": 0.0}, "top_p=0.0; expected above 0 and at most 1"),
        ({"top_p": 1.01}, "top_p=1.01; expected above 0 and at most 1"),
        ({"top_p": math.nan}, "top_p=nan; expected above 0 and at most 1"),
        ({"min_p": 1.01}, "min_p=1.01; expected 0 to 1"),
        ({"min_p": -0.1}, "min_p=-0.1; expected 0 to 1"),
        ({"min_p": math.nan}, "min_p=nan; expected 0 to 1"),
        ({"top_k": -1}, "top_k=-1; expected a count"),
        ({"seed": -1}, "seed=-1; expected a number of 64 bits"),
        ({"seed": 2**63}, "expected a number of 64 bits, 0 to 2^63 - 1"),
        ({"logit_bias": {1: math.inf}}, "logit_bias[1]=inf; expected -1000000 to 1000000"),
        ({"logit_bias": {1: math.nan}}, "logit_bias[1]=nan"),
        ({"logit_bias": {1: -1e300}}, "logit_bias[1]=-1e+300"),
        ({"stop_strings": (b"a", b"")}, "a stop string is empty"),
        ({"num_top_log_probs": -1}, "num_top_log_probs=-1; expected 0 to 10"),
        ({"num_top_log_probs": 11, "log_probs": True}, "num_top_log_probs=11; expected 0 to 10"),
        ({"num_top_log_probs": 1}, "num_top_log_probs=1 needs log_probs or prompt_log_probs"),
    ],
)
def test_impossible_request_is_refused_in_one_line(changes, message: str) -> None:
    text = refusal(**changes)
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_tokens": 0, "prompt_log_probs": True, "num_top_log_probs": 10},
        {"temperature": 0.0},
        {"temperature": MIN_TEMPERATURE, "top_k": 99, "min_p": 1.0, "top_p": 1e-9},
        {"forced": (4, 5), "forbidden_first": frozenset((5,)), "stop_ids": frozenset((5,))},
        {"logit_bias": {9: -MAX_BIAS, 0: MAX_BIAS}, "seed": 2**63 - 1},
    ],
)
def test_extremes_are_taken(changes) -> None:
    check_request(Request(**GOOD | changes), LIMITS)


def test_model_of_unknown_length_takes_any() -> None:
    check_request(Request(prompt=(1,), max_tokens=10**6), ModelLimits(vocab_size=10))


@pytest.mark.parametrize("bias", [-MAX_BIAS, MAX_BIAS])
def test_extremes_stay_finite_in_fp32(bias: float) -> None:
    logit = np.float32(math.copysign(1e6, bias))
    assert np.isfinite((logit + np.float32(bias)) / np.float32(MIN_TEMPERATURE))
