"""Process groups that stay for the whole session, because each takes seconds to start."""

import pytest

from tests.support.ranks import Ranks


@pytest.fixture(scope="session")
def started():
    groups = {}
    yield groups
    for group in groups.values():
        group.stop()


@pytest.fixture
def ranks(started):
    """Run a function on so many ranks: `ranks(2, function, **arguments)`."""

    def run(size, function, **arguments):
        if size not in started or not all(process.is_alive() for process in started[size].processes):
            started[size] = Ranks(size)
        return started[size](function, **arguments)

    return run
