"""What an objective is given: checked on the host, and summed as it says."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phi4.data.stream.batch import build_batch
from phi4.engine.model.host_batch import check_host_batches, work_of
from phi4.engine.objective import LossInputs, make_segment_sum
from phi4.errors import ConfigError, DataError
from phi4.model.shape import Work
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


@given(
    eods=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 15)), max_size=12),
    document_mask=st.booleans(),
)
def test_work_is_the_tokens_and_the_squares_of_what_attends_to_itself(eods, document_mask):
    tokens = np.ones((3, 16), dtype=np.int64)
    for place in eods:
        tokens[place] = 0
    mask = np.ones((3, 16), dtype=np.float32)
    batch = build_batch(tokens, tokens, mask, eod_id=0, document_mask=document_mask)
    # Pairs of tokens of one document: each sees its document alone.
    document = np.zeros((3, 16), dtype=int)
    if document_mask:
        document[:, 1:] = np.cumsum(tokens[:, :-1] == 0, axis=1)
    squares = int((document[:, :, None] == document[:, None, :]).sum())
    assert work_of([batch]) == Work(48, squares)
    assert work_of([batch, batch]) == Work(96, 2 * squares)


def test_work_counts_second_labels():
    batch = pairs(0, 0)
    second = int((batch.alternative_labels >= 0).sum())
    assert second == 2 and work_of([batch]).num_second_labels == second


@pytest.mark.parametrize("method", ["token_total", "segment_total"])
def test_a_total_of_something_else_is_refused(method):
    inputs = LossInputs(torch.zeros(2, 4), torch.ones(2, 4))
    with pytest.raises(ConfigError, match=f"{method} got values of shape"):
        getattr(inputs, method)(torch.ones(()))


@pytest.mark.parametrize("has_ids", [True, False])
def test_a_segment_sum_leaves_out_tokens_of_no_segment(has_ids):
    batch = pairs(0, 0)
    count = batch.num_segments + 1 if has_ids else 0
    values_BS = torch.rand(NUM_ROWS, LENGTH, requires_grad=True)
    ids_BS = torch.from_numpy(batch.segment_ids) if has_ids else None
    alone = SimpleNamespace(size=lambda: 1)
    sums_N = make_segment_sum(ids_BS, count, alone)(values_BS)

    exact = [float(values_BS.detach().double()[batch.segment_ids == i].sum()) for i in range(count)]
    np.testing.assert_allclose(sums_N.detach(), exact, rtol=1e-14)
    assert sums_N.dtype is torch.float64
    sums_N.sum().backward()
    expected = batch.segment_ids >= 0 if has_ids else np.zeros((NUM_ROWS, LENGTH))
    np.testing.assert_array_equal(values_BS.grad, expected)
