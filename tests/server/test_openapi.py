"""A server of its own for what no other test may see: requests of all kinds on every route, and two tokens."""

import contextlib

import pytest

from opsd_megatron.rollout.backend import ServerUnauthorized
from opsd_megatron.rollout.embedded import EmbeddedBackend
from opsd_megatron.server.guard import GENERATE_PATHS, OPEN_PATHS
from tests.server.serving import OLD, TOKEN, http, server_for

ADMIN_TOKEN = "admin-token-of-the-tests"
EXAMPLES = 4
"""Requests per route, and as many again that break its schema."""
WAITING = "/init_weight_transfer_engine"
"""Not asked at random: for any address it waits until its time is up for a trainer to meet there."""


@pytest.fixture(scope="module")
def guarded(root, tmp_path_factory):
    """Short sequences, so that no request takes long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPSD_TEST_ADMIN_TOKEN", ADMIN_TOKEN)
        flags = ("--admin-token-variable", "OPSD_TEST_ADMIN_TOKEN", "--max-model-len", "16")
        server = server_for(root, OLD, "fast", tmp_path_factory.mktemp("guarded"), *flags)
    with server:
        yield server


def test_the_generate_token_opens_no_control_route(guarded):
    admin, nobody = {"Authorization": f"Bearer {ADMIN_TOKEN}"}, {"Authorization": "Bearer nobody"}
    with http(guarded) as client:
        routes = [(m, path) for path, ways in client.get("/openapi.json").json()["paths"].items() for m in ways]
        control = [(method, path) for method, path in routes if path not in GENERATE_PATHS | OPEN_PATHS]
        assert {"/pause", "/resume", "/abort_requests", "/weights/{bucket}", "/finish_weight_update"} <= {
            path for _, path in control
        }
        for method, path in control:
            refused = client.request(method, path)
            assert refused.status_code == 403 and "wants the admin token" in refused.text, path
            assert client.request(method, path, headers=nobody).status_code == 401
        assert client.get("/is_paused").json() == {"is_paused": False}
        for headers in ({}, admin):
            assert client.post("/v1/completions", json={"prompt": [3], "max_tokens": 1}, headers=headers).is_success
        assert client.post("/weight_checker", json={"action": "checksum"}, headers=admin).is_success
    with EmbeddedBackend(guarded.url, TOKEN) as backend, pytest.raises(ServerUnauthorized):
        backend.pause("keep")
    assert TOKEN not in guarded.log_path.read_text() and ADMIN_TOKEN not in guarded.log_path.read_text()


def undo(server, path: str) -> None:
    """So that the next route meets a server that generates."""
    with EmbeddedBackend(server.url, TOKEN, admin_token=ADMIN_TOKEN) as backend:
        if path == "/pause":
            backend.resume()
        elif path == "/sleep":
            backend.wake(("weights",))
            backend.update_from_disk(OLD, OLD)
            backend.wake(("kv_cache",))


def test_no_request_makes_an_error_of_the_server_and_every_reply_is_as_documented(guarded):
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis.specs.openapi import checks as openapi

    checks = [
        schemathesis.checks.not_a_server_error,
        openapi.status_code_conformance,
        openapi.content_type_conformance,
        openapi.response_schema_conformance,
    ]
    few = settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    with http(guarded) as client:
        document = client.get("/openapi.json").json()
        operations = [found.ok() for found in schemathesis.openapi.from_dict(document).get_all_operations()]
        for operation in [one for one in operations if one.path != WAITING]:
            for mode in schemathesis.GenerationMode:

                @few
                @given(operation.as_strategy(generation_mode=mode))
                def answer(case):
                    case.call_and_validate(base_url=guarded.url, headers=headers, checks=checks)

                with contextlib.suppress(Unsatisfiable):  # a route without parameters cannot be asked wrongly
                    answer()
                undo(guarded, operation.path)
        assert client.get("/health").status_code == 200
        assert client.post("/v1/completions", json={"prompt": [3], "max_tokens": 1}).is_success
    assert len(operations) == sum(map(len, document["paths"].values()))
