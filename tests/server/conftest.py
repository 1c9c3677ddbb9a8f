from pathlib import Path

import pytest

from opsd_megatron.rollout.process import ServerProcess
from tests.server.serving import NEW, OLD, load, served, server_for, write_models


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    return write_models(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="session")
def processes(root, tmp_path_factory):
    """One server per engine for the whole session, started together."""
    logs = tmp_path_factory.mktemp("logs")
    running = {engine: server_for(root, OLD, engine, logs) for engine in ("fast", "exact")}
    for server in running.values():
        server.launch()
    try:
        for server in running.values():
            server.wait_until_ready()
        yield running
    finally:
        for server in running.values():
            server.stop()


@pytest.fixture(params=["fast", "exact"])
def server(request, processes) -> ServerProcess:
    """Either engine, serving the old weights."""
    with served(processes[request.param], OLD) as ready:
        yield ready


@pytest.fixture
def exact(processes):
    with served(processes["exact"], OLD) as ready:
        yield ready


@pytest.fixture
def fast(processes):
    with served(processes["fast"], OLD) as ready:
        yield ready


@pytest.fixture(scope="session")
def old_model(root):
    return load(root / OLD)


@pytest.fixture(scope="session")
def new_model(root):
    return load(root / NEW)
