"""A batch that disagrees with itself is refused on the host, a total of no such values too."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from phi4.engine.model.host_batch import check_host_batches
from phi4.engine.objective import LossInputs
from phi4.errors import ConfigError, DataError
from tests.support.preference import LENGTH, NUM_ROWS, VOCABULARY, pairs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.zeros((NUM_ROWS, 8))}, "tokens has shape (2, 8); expected (2, 32)"),
        ({"labels": np.zeros((NUM_ROWS, 8))}, "labels has shape (2, 8)"),
        ({"loss_mask": np.zeros(3)}, "loss_mask has shape (3,)"),
        ({"num_segments": 1}, "segment_ids spans -1 to"),
        ({"segment_ids": np.zeros((1, LENGTH), int)}, "segment_ids has shape (1, 32)"),
        ({"segment_ids": np.zeros((NUM_ROWS, LENGTH))}, "segment_ids is float64"),
        ({"segment_ids": None}, "in a batch without segment_ids"),
        ({"alternative_labels": np.full((NUM_ROWS, LENGTH), 96)}, "alternative_labels spans 96"),
        ({"token_extras": {"share": np.zeros(3)}}, "token_extras['share'] has shape (3,)"),
        ({"segment_extras": {"r": np.zeros((1, 2))}}, "segment_extras['r'] has shape (1, 2)"),
        ({"segment_extras": {"r": np.zeros(())}}, "segment_extras['r'] has shape ()"),
    ],
)
def test_a_batch_that_disagrees_with_itself_is_refused(change, message):
    good = pairs(0, 0)
    check_host_batches([good, pairs(0, 1)], VOCABULARY)
    with pytest.raises(DataError) as caught:
        check_host_batches([good, replace(good, **change)], VOCABULARY)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["token_total", "segment_total"])
def test_a_total_of_something_else_is_refused(method):
    inputs = LossInputs(torch.zeros(2, 4), torch.ones(2, 4))
    with pytest.raises(ConfigError, match=f"{method} got values of shape"):
        getattr(inputs, method)(torch.ones(()))
