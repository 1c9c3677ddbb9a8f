from pathlib import Path

import pytest

from opsd_megatron.rollout.process import ServerProcess
from tests.server.serving import NEW, OLD, load, served, shared_root, shared_servers


@pytest.fixture(scope="session")
def root() -> Path:
    return shared_root()


@pytest.fixture(params=["fast", "exact"])
def server(request) -> ServerProcess:
    """Either engine, serving the old weights."""
    with served(shared_servers()[request.param], OLD) as ready:
        yield ready


@pytest.fixture
def exact() -> ServerProcess:
    with served(shared_servers()["exact"], OLD) as ready:
        yield ready


@pytest.fixture
def fast() -> ServerProcess:
    with served(shared_servers()["fast"], OLD) as ready:
        yield ready


@pytest.fixture(scope="session")
def old_model():
    return load(shared_root() / OLD)


@pytest.fixture(scope="session")
def new_model():
    return load(shared_root() / NEW)
