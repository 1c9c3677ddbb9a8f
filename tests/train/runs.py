"""Training runs in their own processes, against a real inference server: by torchrun, as users start them, or by ranks
forked from a process that has imported everything, where it is not the launcher that is tested."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from opsd_megatron.launch.tiny_world import write_tiny_world
from opsd_megatron.rollout.process import ServerProcess
from tests.ranks import Job

TOKEN = "a-token-for-tests"
SHAPE = {
    "model_type": "qwen3",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 384,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
SCRIPT = Path(__file__).parent / "train_script.py"


@dataclass
class World:
    """A tiny model, its records and a server for it."""

    directory: Path
    server: ServerProcess

    def start(self, run: str, ranks: int, *flags: str) -> subprocess.Popen:
        """By torchrun."""
        launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(ranks), str(SCRIPT)]
        with open(self._log_file(run), "ab") as log:
            return subprocess.Popen(
                [*launcher, *self._flags(run), *flags],
                env=self._environment(TOKEN), stdout=log, stderr=subprocess.STDOUT, cwd=self.directory,
            )  # fmt: skip

    def fork(self, run: str, ranks: int, *flags: str, token: str = TOKEN) -> Job:
        return Job(SCRIPT, ranks, [*self._flags(run), *flags], self._log_file(run), self._environment(token))

    def finish(self, run: str, ranks: int, *flags: str, token: str = TOKEN, timeout_s: float = 240) -> int:
        """Exit code of a whole forked job."""
        return self.fork(run, ranks, *flags, token=token).wait(timeout_s)

    def _flags(self, run: str) -> list[str]:
        paths = ["--model.path", str(self.directory / "model"), "--data.path", str(self.directory / "records.jsonl")]
        return [*paths, "--rollout.url", self.server.url, "--checkpoint.directory", str(self.directory / run)]

    def _environment(self, token: str) -> dict[str, str]:
        return os.environ | {"OPSD_SERVER_TOKEN": token, "OMP_NUM_THREADS": "1"}

    def _log_file(self, run: str) -> Path:
        return self.directory / f"{run}.log"

    def log(self, run: str) -> str:
        return self._log_file(run).read_text(errors="replace")

    def losses(self, run: str) -> dict[int, float]:
        """Loss by step."""
        return {step: row["loss/per_token"] for step, row in self.rows(run).items()}

    def rows(self, run: str) -> dict[int, dict[str, float]]:
        """All metrics by step."""
        path = self.directory / run / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return {row["step"]: row for row in rows}

    def wait_for_step(self, run: str, step: int, process, timeout_s: float = 180.0) -> None:
        deadline = time.monotonic() + timeout_s
        while step not in self.losses(run):
            assert process.poll() is None, self.log(run)
            assert time.monotonic() < deadline, self.log(run)
            time.sleep(0.05)

    def outlive_server(self, run: str, ranks: int, *flags: str) -> None:
        """A whole run against a server of its own, which is killed and started again behind its second step."""
        log = self.directory / f"server of {run}.log"
        server = ServerProcess(self.directory / "model", TOKEN, log, engine="exact", threads=1)
        server.start()
        process = self.fork(run, ranks, *flags, "--rollout.url", server.url)
        try:
            self.wait_for_step(run, 2, process)
            server.kill()
            server.start()
            assert process.wait(180) == 0, self.log(run)
        finally:
            process.kill()
            server.stop()


def make_world(directory: Path) -> World:
    """Started, with the exact engine: equal seeds and weights give equal rollouts."""
    write_tiny_world(directory, SHAPE, records=24, student_tokens=200)
    server = ServerProcess(directory / "model", TOKEN, directory / "server.log", engine="exact", threads=1)
    server.start()
    return World(directory, server)
