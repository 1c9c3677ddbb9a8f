import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from opsd_megatron.errors import ConfigError
from opsd_megatron.rollout.process import ServerProcess, reserve_port
from opsd_megatron.server.__main__ import listen
from opsd_megatron.server.options import ServerOptions
from opsd_megatron.server.process import load_model
from tests.server.serving import OLD, TOKEN, largest_gap, load, requests, server_for
from tests.tiny_models import YARN, write_tiny_model


def run_server(root, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "opsd_megatron.server", "--model", str(root / OLD), *arguments]
    clean = {name: value for name, value in os.environ.items() if name != "OPSD_SERVER_TOKEN"}
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=120)


def test_a_taken_port_ends_with_exit_code_2_and_says_so(exact, root, tmp_path):
    second = ServerProcess(root / OLD, TOKEN, tmp_path / "second.log", port=exact.port)
    second.launch()
    assert second._process is not None and second._process.wait(timeout=120) == 2
    assert f"--port {exact.port} is in use" in (tmp_path / "second.log").read_text()
    second.stop()


def test_a_reserved_port_is_the_servers_and_nobody_elses():
    with reserve_port() as reservation, socket.socket() as somebody:
        port = reservation.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            somebody.bind(("127.0.0.1", port))
        listen("127.0.0.1", port).close()


def test_no_reply_waits_for_the_clients_acknowledgement():
    async def is_sent_at_once() -> bool:
        accepted = asyncio.get_running_loop().create_future()
        listener = listen("127.0.0.1", 0)
        async with await asyncio.start_server(lambda _, writer: accepted.set_result(writer), sock=listener):
            _, ours = await asyncio.open_connection(*listener.getsockname())
            theirs = await accepted
            nodelay = theirs.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            ours.close()
            theirs.close()
        return bool(nodelay)

    assert asyncio.run(is_sent_at_once())


def test_no_token_ends_with_exit_code_2(root):
    result = run_server(root, "--port", "1")
    assert result.returncode == 2 and "OPSD_SERVER_TOKEN must hold a bearer token" in result.stderr


def test_help_names_and_explains_every_option(root):
    text = run_server(root, "--help").stdout
    for option in ("--model", "--port", "--engine", "--token-variable", "--weights-root", "--stop-with-parent"):
        assert option in text
    assert "TOKEN" in text and "--token " not in text


def test_a_directory_without_a_model_is_a_config_error(tmp_path):
    server = ServerProcess(tmp_path, TOKEN, tmp_path / "server.log", engine="exact")
    with pytest.raises(ConfigError, match=r"no config\.json there"):
        server.start()


def test_yarn_from_the_command_line_serves_the_model_that_a_config_with_yarn_describes(root, tmp_path):
    stretched = tmp_path / "yarn"
    shutil.copytree(root / OLD, stretched)
    config = json.loads((stretched / "config.json").read_text())
    config |= {"rope_parameters": YARN, "max_position_embeddings": 1024}
    (stretched / "config.json").write_text(json.dumps(config))
    flags = ("--yarn-factor", str(YARN["factor"]), "--yarn-original-positions", "32")
    with server_for(root, OLD, "exact", tmp_path, *flags) as server, server.backend() as backend:
        request = requests(1)[0]
        sample = backend.generate([request])[0].samples[0]
    assert largest_gap(load(stretched), request, sample) <= 1e-5
    assert largest_gap(load(root / OLD), request, sample) > 1e-2


def test_yarn_over_a_stretched_model_is_refused(tmp_path):
    write_tiny_model(tmp_path, "llama")
    with pytest.raises(ConfigError, match="rope_type=llama3; leave --yarn-factor out"):
        load_model(ServerOptions(tmp_path, yarn_factor=4.0))


@pytest.mark.parametrize("how", ["SIGTERM", "parent"])
def test_the_server_stops_gracefully(root, tmp_path, how):
    server = server_for(root, OLD, "fast", tmp_path)
    server.start()
    process = server._process
    assert process is not None and process.stdin is not None
    if how == "SIGTERM":
        process.send_signal(signal.SIGTERM)
    else:
        process.stdin.close()  # what happens when the parent dies
    assert process.wait(timeout=60) == 0
