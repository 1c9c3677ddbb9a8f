"""The client of `opsd_megatron.server`, which speaks a part of vLLM's dialect and stages whole updates."""

import hashlib
from collections.abc import Mapping, Sequence

from torch import Tensor

from opsd_megatron.rollout.backend import (
    Capabilities,
    GenerateRequest,
    GenerateResult,
    ServerInfo,
    TensorInfo,
    TransferGroup,
    UpdateLost,
)
from opsd_megatron.rollout.client import UPDATE_S, NoGate
from opsd_megatron.rollout.http import Refused
from opsd_megatron.rollout.replies import LogprobKind, parse_generate, parse_info
from opsd_megatron.rollout.vllm import GENERATE, SHARD_PREFIX, VllmBackend
from opsd_megatron.rollout.vllm_wire import as_wire
from opsd_megatron.safetensors_header import make_header
from opsd_megatron.transfer import as_bytes

JOIN_S = 120.0
PIECE_BYTES = 1 << 20
RECEIVE_S = 3600.0
"""Each of the broadcasts has a limit of its own."""


class EmbeddedBackend(VllmBackend):
    """A RolloutBackend over one embedded server; a failed update leaves its old weights whole."""

    def __init__(self, url: str, token: str, **options):
        """`options` are those of Client."""
        super().__init__(url, token, **options)
        self._gate = NoGate()  # a paused server answers: 503, or later
        self._bucket = 0
        self._vocab_size: int | None = None

    def info(self) -> ServerInfo:
        return parse_info(self.http.object("GET", "/server_info"))

    def weight_version(self) -> str:
        return self.info().weight_version

    def tokenizer_info(self) -> dict:
        return self.http.object("GET", "/tokenizer_info")

    def capabilities(self) -> Capabilities:
        info = self.http.object("GET", "/server_info")
        return Capabilities(
            logprob_kind="processed",
            seeded=parse_info(info).seeded,
            has_spans=True,
            pause_modes=frozenset(("keep", "wait", "abort")),
            transports=frozenset(info.get("transports", ("http",))),
            has_atomic_updates=True,
            has_checksum=True,
            can_score="prompt_logprobs" in self._routes.fields("SamplingParams"),
            can_sleep=self._routes.has_all("/sleep", "/wake_up"),
        )

    def generate(self, requests: Sequence[GenerateRequest]) -> list[GenerateResult]:
        if requests and self._vocab_size is None:
            self._vocab_size = self.info().vocab_size
        return self._each(lambda request: self._ask(request, "processed"), requests)

    def _ask(self, request: GenerateRequest, kind: LogprobKind) -> GenerateResult:
        body = self.http.object("POST", GENERATE, json=as_wire(request))
        return parse_generate(body, request, self._vocab_size or 0, kind, "")

    def world_size(self) -> int:
        return int(self._change("GET", "/get_world_size")["world_size"])

    def join_group(self, group: TransferGroup) -> None:
        info = {
            "backend": group.kind,
            "master_address": group.host,
            "master_port": group.port,
            "rank_offset": group.rank_offset,
            "world_size": group.world_size,
            "group_name": group.name,
            "packed": True,
            "packed_buffer_size_bytes": group.bucket_bytes,
            "timeout_s": JOIN_S,
        }
        arguments = {"json": {"init_info": info}, "timeout": JOIN_S + 30, "repeat": False}
        self._change("POST", "/init_weight_transfer_engine", **arguments)

    def receive(self, tensors: Sequence[TensorInfo]) -> None:
        info = {
            "names": [tensor.name for tensor in tensors],
            "dtype_names": [tensor.dtype for tensor in tensors],
            "shapes": [list(tensor.shape) for tensor in tensors],
        }
        self._change("POST", "/update_weights", json={"update_info": info}, timeout=RECEIVE_S, repeat=False)

    def leave_group(self) -> None:
        self._change("POST", "/shutdown_weight_transfer_engine", repeat=False)

    def begin_update(self, version: str) -> None:
        self._bucket = 0
        self._change("POST", "/start_weight_update", json={"weight_version": version})

    def push(self, bucket: Mapping[str, Tensor]) -> None:
        """In pieces: given one large body, httpcore copies all that is left of it after each packet."""
        header = make_header((name, tensor.dtype, tensor.shape) for name, tensor in bucket.items())
        values = [as_bytes(tensor.cpu()).numpy().data for tensor in bucket.values()]
        body = [header, *(one[at : at + PIECE_BYTES] for one in values for at in range(0, len(one), PIECE_BYTES))]
        digest = hashlib.sha256()
        for piece in body:
            digest.update(piece)
        headers = {"X-Content-SHA256": digest.hexdigest(), "Content-Length": str(sum(map(len, body)))}
        self._change("PUT", f"/weights/{self._bucket}", content=body, headers=headers)
        self._bucket += 1

    def finish_update(self, version: str) -> None:
        """A repetition after a lost reply finds its work done."""
        self._change("POST", "/finish_weight_update", json={"weight_version": version})

    def abort_update(self) -> None:
        """Tried once: the next update begins with nothing staged in any case."""
        self._change("POST", "/abort_weight_update", repeat=False)

    def update_from_disk(self, path: str, version: str) -> None:
        self.begin_update(version)
        self._change("POST", "/update_weights", json={"update_info": {"path": path}})
        self.finish_update(version)

    def checksum(self) -> dict[str, str]:
        sums = self._change("POST", "/weight_checker", json={"action": "checksum"})["checksums"]
        return {name.removeprefix(SHARD_PREFIX): value for name, value in sums.items()}

    def _change(self, method: str, path: str, **arguments) -> dict:
        """Every step of an update but those of a group may be repeated."""
        try:
            return self.http.object(method, path, admin=True, **{"timeout": UPDATE_S} | arguments)
        except Refused as error:
            if error.status == 409 and any(
                f'"{name}"' in error.body for name in ("NoUpdateOpenError", "NoTransferGroupError")
            ):
                raise UpdateLost(f"{error}; did the server restart? Then publish again") from error
            raise
