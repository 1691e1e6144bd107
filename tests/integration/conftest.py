"""Fixtures of several files of these tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from helpers import postgres


@pytest.fixture(scope="module")
def postgres_url() -> Iterator[str]:
    given = os.environ.get("CIFAR_POSTGRES", "")
    if given:
        yield given
    elif postgres.binaries():
        with postgres.server() as started:
            yield started
    else:
        pytest.skip("NO POSTGRESQL HERE (apt-get install postgresql, or CIFAR_POSTGRES=URL): nothing was shown of it")
