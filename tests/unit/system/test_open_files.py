"""An agent that cannot open its files says so before it starts; where it may, it raises its own limit."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest

from cifar.errors import UserError
from cifar.system.open_files import require_open_files


@pytest.fixture
def limit() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_limit_is_raised_as_far_as_is_needed(limit: None) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (30, most))
    require_open_files(1)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (32, most)
    require_open_files(3)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (44, most)
    require_open_files(2)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (44, most)


def test_more_workers_than_the_system_has_files_for_are_one_sentence(limit: None) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY:
        pytest.skip("this system sets no limit")
    with pytest.raises(UserError, match=f"with {most} workers needs {26 + 6 * most}; .*fewer --workers"):
        require_open_files(most)
