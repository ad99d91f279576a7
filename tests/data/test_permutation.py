import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from phi4.data.permutation import permutation_key, permute


@given(size=st.integers(1, 5000), key=st.text(max_size=8))
def test_every_size_is_a_bijection(size: int, key: str) -> None:
    image = permute(np.arange(size), size, permutation_key(key))
    assert np.array_equal(np.sort(image), np.arange(size))


@given(size=st.integers(1, 1 << 62), data=st.data())
@settings(max_examples=50)
def test_large_sizes_stay_inside_and_never_collide(size: int, data: st.DataObject) -> None:
    index = data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=64))
    image = permute(np.array(sorted(index)), size, permutation_key(size))
    assert image.min() >= 0 and image.max() < size
    assert np.unique(image).size == len(index)


def test_an_element_does_not_depend_on_its_neighbours() -> None:
    key = permutation_key("alone")
    together = permute(np.arange(1000), 1000, key)
    apart = [int(permute(np.array([i]), 1000, key)[0]) for i in range(1000)]
    assert together.tolist() == apart


def test_order_is_frozen_because_checkpoints_rely_on_it() -> None:
    key = permutation_key(1234, "code", 0)
    assert permute(np.arange(12), 12, key).tolist() == [9, 7, 4, 0, 8, 6, 1, 3, 10, 11, 2, 5]
    assert permute(np.array([0, 1, 10**12 - 1]), 10**12, key).tolist() == [
        405638161006,
        620128463325,
        237083800208,
    ]


def test_epochs_seeds_and_names_give_unrelated_orders() -> None:
    size = 4096
    keys = [(1, "a", 0), (1, "a", 1), (2, "a", 0), (1, "b", 0), (1, "a0", 0)]
    images = [permute(np.arange(size), size, permutation_key(*key)) for key in keys]
    for i, one in enumerate(images):
        for other in images[:i]:
            # Unrelated permutations agree in one place on average.
            assert np.count_nonzero(one == other) < 10


def test_order_looks_random() -> None:
    size = 100_000
    image = permute(np.arange(size), size, permutation_key("looks"))
    assert abs(np.corrcoef(np.arange(size), image)[0, 1]) < 0.02
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.02
    # Where the first tenth lands, in tenths: binomial, 30 is its standard deviation.
    counts = np.bincount(image[: size // 10] * 10 // size, minlength=10)
    assert np.abs(counts - 1000).max() < 150
