import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from opsd_megatron.errors import ServerError
from opsd_megatron.rollout.backend import GenerateRequest, MalformedReply, ServerRefused, ServerUnreachable
from opsd_megatron.rollout.embedded import EmbeddedBackend
from opsd_megatron.rollout.process import reserve_port
from tests.rollout.misbehaving import NONSENSE, RAW, misbehaving_servers

REQUEST = GenerateRequest("r", [1, 2], max_tokens=3)


@pytest.fixture(scope="module")
def urls():
    with misbehaving_servers(["good", "slow", "400", "409", "500", "503", *NONSENSE, *RAW]) as found:
        with EmbeddedBackend(found["good"], "some-token") as backend:
            backend.wait_until_healthy(30)
        yield found


@pytest.mark.parametrize("way", [*NONSENSE, *RAW])
def test_nonsense_is_an_error_and_never_a_rollout(urls, way):
    with EmbeddedBackend(urls[way], "some-token", retry_s=30) as backend:
        started = time.monotonic()
        with pytest.raises(MalformedReply):
            backend.generate([REQUEST])
        assert time.monotonic() - started < 10  # it is not asked again


def test_a_good_reply_passes(urls):
    with EmbeddedBackend(urls["good"], "some-token") as backend:
        (result,) = backend.generate([REQUEST])
    assert result.samples[0].token_ids == (7, 7, 7) and result.server_id == "s1"


@pytest.mark.parametrize("status", ["400", "409", "500"])
def test_a_refusal_is_final_and_tells_the_servers_reason(urls, status):
    backend = EmbeddedBackend(urls[status], "some-token", retry_s=60)
    with backend, pytest.raises(ServerRefused, match=f"status {status}: status {status}"):
        backend.generate([REQUEST])


@pytest.mark.parametrize("way", ["503", "slow"])
def test_a_server_that_stays_away_is_given_up_after_retry_s(urls, way):
    backend = EmbeddedBackend(urls[way], "some-token", retry_s=0.5, timeout_s=0.3)
    with backend, pytest.raises(ServerUnreachable, match=r"rollout\.url"):
        backend.generate([REQUEST])


def test_a_closed_client_tries_no_longer(urls):
    backend = EmbeddedBackend(urls["503"], "some-token", retry_s=600)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(backend.generate, [REQUEST])
        time.sleep(0.5)
        backend.close()
        with pytest.raises(ServerUnreachable, match="503"):
            running.result(10)


def test_nobody_at_the_address_is_a_server_error():
    with (
        reserve_port() as nobody,
        EmbeddedBackend(f"http://127.0.0.1:{nobody.getsockname()[1]}", "some-token", retry_s=0.2) as backend,
    ):
        assert not backend.health()
        with pytest.raises(ServerError, match="is the server running"):
            backend.weight_version()
        with pytest.raises(ServerUnreachable):
            backend.wait_until_healthy(0.2)
