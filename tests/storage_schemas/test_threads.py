from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage_schemas.threads import map_ahead


@given(items=st.lists(st.integers()), ahead=st.integers(1, 9), threads=st.integers(1, 4))
def test_results_keep_the_order_of_items(items: list[int], ahead: int, threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        assert list(map_ahead(pool, lambda item: item * 2, items, ahead)) == [item * 2 for item in items]


def test_no_more_than_so_many_are_under_way() -> None:
    taken = given_back = 0
    lock = Lock()

    def items() -> Iterator[int]:
        nonlocal taken
        for item in range(50):
            with lock:
                taken += 1
                assert taken - given_back <= 4
            yield item

    with ThreadPoolExecutor(2) as pool:
        for _ in map_ahead(pool, lambda item: time.sleep(0.001), items(), ahead=3):
            with lock:
                given_back += 1
    assert taken == given_back == 50


def test_a_failure_surfaces_where_its_result_is_due() -> None:
    def fail_at_three(item: int) -> int:
        if item == 3:
            raise RuntimeError("three")
        return item

    with ThreadPoolExecutor(2) as pool:
        results = map_ahead(pool, fail_at_three, range(100), ahead=4)
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(RuntimeError, match="three"):
            next(results)
