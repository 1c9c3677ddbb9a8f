"""The client of SGLang 0.5.23."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from opsd_megatron.rollout.backend import (
    Capabilities,
    GenerateRequest,
    GenerateResult,
    Memory,
    PauseMode,
    ServerInfo,
    ServerRefused,
    TensorInfo,
    TransferGroup,
    Transport,
    Unsupported,
)
from opsd_megatron.rollout.client import UPDATE_S, Client
from opsd_megatron.rollout.http import Refused
from opsd_megatron.rollout.probe import ANY
from opsd_megatron.rollout.replies import LogprobKind, get
from opsd_megatron.rollout.sglang_wire import as_score, as_wire, parse_input_logprobs, parse_replies
from opsd_megatron.transfer import packed_buckets

GROUP_ROUTES = (
    "/init_weights_update_group", "/begin_weight_update", "/update_weights_from_distributed", "/end_weight_update"
)  # fmt: skip
PAUSE_ROUTES = ("/pause_generation", "/continue_generation")
FLUSH_S = 10.0


class SglangBackend(Client):
    """A RolloutBackend over one SGLang server.

    Weights are replaced in place inside of a session, on a paused server; a failed update leaves a mixture behind that
    only a whole update repairs. The admin token opens all routes that change the server.
    """

    def __init__(self, url: str, token: str, **options):
        """`options` are those of Client."""
        super().__init__(url, token, **options)
        self._group: TransferGroup | None = None
        self._open: dict[str, list[str]] = {}

    def info(self) -> ServerInfo:
        config = self._config
        return ServerInfo(
            server_id=self._ask_identity(),
            engine="sglang",
            seeded=config.get("enable_deterministic_inference") is True,
            dtype=str(config.get("dtype") or ""),
            vocab_size=0,
            max_model_len=int(config.get("max_req_input_len") or config.get("context_length") or 0),
            weight_version=self.weight_version(),
        )

    def weight_version(self) -> str:
        reply = self.http.object("GET", "/model_info")
        return get(reply, "weight_version", str, "reply of /model_info")

    def capabilities(self) -> Capabilities:
        routes, kind = self._routes, self._kind
        transports: set[Transport] = {"disk"} if "/update_weights_from_disk" in routes else set()
        if routes.has_all(*GROUP_ROUTES):
            transports.add("nccl")
        return Capabilities(
            logprob_kind=kind,
            seeded=self._config.get("enable_deterministic_inference") is True,
            has_spans=True,
            pause_modes=frozenset(("keep", "wait", "abort") if routes.has_all(*PAUSE_ROUTES) else ()),
            transports=frozenset(transports),
            has_atomic_updates=False,
            has_checksum=False,  # it sums fused shards under its own names
            can_score=True,
            can_sleep=self._config.get("enable_memory_saver") is True,
        )

    def pause(self, mode: PauseMode) -> None:
        """keep: requests go back to the queue and compute their keys and values again; wait: those of this client
        finish first."""
        self._gate.shut(drain=mode == "wait")
        try:
            theirs = "abort" if mode == "abort" else "retract"
            self.http.request("POST", "/pause_generation", admin=True, json={"mode": theirs}, timeout=UPDATE_S)
        except BaseException:
            self._gate.open()
            raise

    def resume(self) -> None:
        self.http.request("POST", "/continue_generation", admin=True, json={"torch_empty_cache": True})
        self._gate.open()

    def abort(self, request_ids: Sequence[str] | None = None) -> int:
        """0: SGLang does not say how many. It knows requests by the ids of their samples, so that those of other
        clients can only be ended all together."""
        bodies: list[dict] = [{"abort_all": True}]
        if request_ids is not None:
            bodies = [{"rid": rid} for name in request_ids for rid in self._open.get(name, ())]
        for body in bodies:
            self.http.request("POST", "/abort_request", admin=True, json=body)
        return 0

    def flush_cache(self) -> None:
        """ServerRefused while requests run."""
        self.http.request("POST", f"/flush_cache?timeout={FLUSH_S:.0f}", admin=True, timeout=FLUSH_S + 30)

    def begin_update(self, version: str) -> None:
        self._need_pause()
        try:
            self._update("/begin_weight_update", {"selector": "all"})
        except Refused as error:
            if "already open" not in error.body:
                raise
            self._update("/end_weight_update", {})  # of a trainer that died
            self._update("/begin_weight_update", {"selector": "all"})

    def world_size(self) -> int:
        """SGLang lets the tensor-parallel ranks of one replica join a group."""
        for name in ("dp_size", "pp_size"):
            if int(self._config.get(name) or 1) != 1:
                raise Unsupported(f"{self.url} has {name}={self._config[name]}; its groups want 1")
        return get(self._config, "tp_size", int, "reply of /server_info")

    def join_group(self, group: TransferGroup) -> None:
        body = {
            "master_address": group.host,
            "master_port": group.port,
            "rank_offset": group.rank_offset,
            "world_size": group.world_size,
            "group_name": group.name,
            "backend": group.kind,
        }
        self._update("/init_weights_update_group", body)
        self._group = group

    def receive(self, tensors: Sequence[TensorInfo]) -> None:
        if self._group is None:
            raise ServerRefused(f"{self.url} has joined no group; call join_group first")
        for numbers in packed_buckets([_num_bytes(tensor) for tensor in tensors], self._group.bucket_bytes):
            bucket = [tensors[number] for number in numbers]
            body = {
                "names": [tensor.name for tensor in bucket],
                "dtypes": [tensor.dtype for tensor in bucket],
                "shapes": [list(tensor.shape) for tensor in bucket],
                "group_name": self._group.name,
                "load_format": "flattened_bucket",
                "flush_cache": False,  # with requests in the queue it would fail after the weights have changed
                "abort_all_requests": False,
            }
            self._update("/update_weights_from_distributed", body)

    def leave_group(self) -> None:
        if self._group is not None:
            self._update("/destroy_weights_update_group", {"group_name": self._group.name})
            self._group = None

    def finish_update(self, version: str) -> None:
        self._update("/end_weight_update", {})
        self.flush_cache()
        self._name_version(version)

    def abort_update(self) -> None:
        """Closes the session; the server stays unusable until a whole update has gone through."""
        try:
            self._update("/end_weight_update", {})
        except Refused as error:
            if "no weight-update session" not in error.body:
                raise

    def update_from_disk(self, path: str, version: str) -> None:
        """A server that runs stands still meanwhile, and stays so if the update fails."""
        body = {"model_path": path, "abort_all_requests": False, "flush_cache": False, "keep_pause": True}
        with self._standing_still():
            self._update("/update_weights_from_disk", body)
            self.flush_cache()
            self._name_version(version)

    def checksum(self) -> dict[str, str]:
        """Checksums by SGLang's own names: fused layers; with several ranks each name begins with its rank."""
        reply = self.http.object("POST", "/weights_checker", admin=True, json={"action": "checksum"}, timeout=UPDATE_S)
        ranks = get(reply, "ranks", list, "reply of /weights_checker")
        sums = [get(rank, "checksums", dict, "reply of /weights_checker") for rank in ranks]
        if len(sums) == 1:
            return dict(sums[0])
        return {f"rank{number}:{name}": value for number, one in enumerate(sums) for name, value in one.items()}

    def sleep(self) -> None:
        """The server stays paused until `resume`."""
        if not self._is_paused():
            self.pause("abort")
        body = {"tags": ["kv_cache", "weights"]}
        self.http.request("POST", "/release_memory_occupation", admin=True, json=body, timeout=UPDATE_S)

    def wake(self, what: Sequence[Memory]) -> None:
        body = {"tags": list(what)}
        self.http.request("POST", "/resume_memory_occupation", admin=True, json=body, timeout=UPDATE_S)

    @cached_property
    def _config(self) -> dict[str, Any]:
        return self.http.object("GET", "/server_info")

    def _is_paused(self) -> bool:
        """/ready is 503 on a paused server, /health says whether it is up at all."""
        if "/ready" not in self._routes:
            return self._gate.is_shut
        return self.http.request("GET", "/ready", accept=ANY | {503}).status_code == 503

    def _name_version(self, version: str) -> None:
        self._update("/update_weight_version", {"new_version": version, "abort_all_requests": False})

    def _update(self, path: str, body: dict) -> None:
        """Sent once; ServerRefused with SGLang's message where it reports no success."""
        reply = self.http.object("POST", path, admin=True, json=body, repeat=False, timeout=UPDATE_S)
        if reply.get("success") is not True:
            raise Refused(f"POST {self.url}{path}: {reply.get('message')}", 200, str(reply.get("message")))

    def _check_kind(self, request: GenerateRequest) -> None:
        if request.temperature == 0:
            return
        if request.top_p < 1 or request.top_k > 0 or request.min_p > 0:
            raise Unsupported(
                f"{self.url} reports log-probs before top_p {request.top_p}, top_k {request.top_k} and min_p "
                f"{request.min_p}, which are not those of the samples; use top_p 1, top_k 0 and min_p 0 with SGLang"
            )
        if request.temperature != 1 and self._kind == "raw":
            raise Unsupported(
                f"{self.url} reports log-probs before temperature, which are not those of the samples at temperature "
                f"{request.temperature}; start SGLang without SGLANG_RETURN_ORIGINAL_LOGPROB"
            )

    def _ask(self, request: GenerateRequest, kind: LogprobKind) -> GenerateResult:
        def body_of(attempt: int) -> dict:
            wire = as_wire(request, attempt)
            self._open[request.request_id] = [wire["rid"]] if request.n == 1 else wire["rid"]
            return wire

        try:
            body = self.http.json("POST", "/generate", body_of=body_of, around=self._gate)
        finally:
            self._open.pop(request.request_id, None)
        return parse_replies(body, request, kind, self._server_id)

    def _score_one(self, sequence: Sequence[int]) -> list[float]:
        body = self.http.object("POST", "/generate", json=as_score(sequence), around=self._gate)
        return parse_input_logprobs(body, sequence)


def _num_bytes(tensor: TensorInfo) -> int:
    return torch.Size(tensor.shape).numel() * getattr(torch, tensor.dtype).itemsize
