from __future__ import annotations

import pytest
from headrace.errors import ConfigError
from headrace.lifecycle.policy import select_versions


@pytest.mark.parametrize(
    ("available", "policy", "wanted"),
    [
        ([1, 2, 10], "latest:1", [10]),
        ([10, 1, 2], "latest:2", [2, 10]),
        ([1, 2], "latest:5", [1, 2]),
        ([], "latest:1", []),
        ([3, 1, 2], "all", [1, 2, 3]),
        ([1, 2, 3], "1,3", [1, 3]),
        ([1, 2, 3], " 3 , 1 ,3", [1, 3]),
        ([1, 2], "2,7", [2]),
        ([1, 2], "7", []),
    ],
)
def test_wanted_versions_ascend(available: list[int], policy: str, wanted: list[int]) -> None:
    assert select_versions(available, policy) == wanted


@pytest.mark.parametrize("policy", ["", "latest", "latest:", "latest:0", "latest:-1", "latest:²", "1,", "1.5", "newest", "²"])
def test_other_policies_are_errors_that_quote_them(policy: str) -> None:
    with pytest.raises(ConfigError, match="expected 'latest:N', 'all' or version numbers") as caught:
        select_versions([1], policy)
    assert repr(policy) in str(caught.value)
