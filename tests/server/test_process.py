import os
import signal
import subprocess
import sys

import pytest

from opsd_megatron.errors import ConfigError
from opsd_megatron.rollout.process import ServerProcess
from tests.server.serving import OLD, TOKEN, server_for


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
