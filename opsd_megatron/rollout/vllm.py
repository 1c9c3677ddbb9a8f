"""The client of vLLM 0.32 to 0.33, started with VLLM_SERVER_DEV_MODE=1 for everything but generation."""

import logging
import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from opsd_megatron.rollout.backend import (
    Capabilities,
    GenerateRequest,
    GenerateResult,
    MalformedReply,
    Memory,
    PauseMode,
    ServerInfo,
    ServerRefused,
    TensorInfo,
    TransferGroup,
    Transport,
    Unsupported,
    WrongWeightVersion,
)
from opsd_megatron.rollout.client import UPDATE_S, Client
from opsd_megatron.rollout.http import Refused
from opsd_megatron.rollout.replies import (
    LogprobKind,
    get,
    parse_completions,
    parse_generate,
    parse_prompt_logprobs,
)
from opsd_megatron.rollout.vllm_wire import as_completion, as_score, as_wire
from opsd_megatron.transfer import nccl_unique_id

log = logging.getLogger(__name__)
GENERATE, COMPLETIONS = "/inference/v1/generate", "/v1/completions"
DISK_ROUTES = ("/collective_rpc", "/update_weight_version", "/reset_prefix_cache", "/pause", "/resume", "/is_paused")
GROUP_ROUTES = ("/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update")
SHARD_PREFIX = "dp0:pp0:pcp0:tp0:"
EMPTY_SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
"""What vLLM's checker reports for weights that it cannot see, as all linear layers on a CPU."""
FLUSH_S = 10.0


class VllmBackend(Client):
    """A RolloutBackend over one vLLM server.

    Nothing is sent to a paused server: vLLM 0.32 leaves such requests hanging. vLLM replaces weights in place, so that
    an update wants a paused server, and a failed one leaves a mixture behind that only a whole update repairs.
    """

    def __init__(self, url: str, token: str, **options):
        """`options` are those of Client."""
        super().__init__(url, token, **options)
        self._has_generate = True

    def info(self) -> ServerInfo:
        models = self._models()
        environment = self._config.get("vllm_env") or {}
        return ServerInfo(
            server_id=self._ask_identity(),
            engine="vllm",
            seeded=str(environment.get("VLLM_BATCH_INVARIANT", "")) in ("1", "True"),
            dtype=str(self._section("model_config").get("dtype", "")).removeprefix("torch."),
            vocab_size=0,
            max_model_len=int(models[0].get("max_model_len") or 0),
            weight_version=self.weight_version() if "/weight_info" in self._routes else "",
        )

    def weight_version(self) -> str:
        self._need("/weight_info")
        return get(self.http.object("GET", "/weight_info", admin=True), "weight_version", str, "reply of /weight_info")

    def capabilities(self) -> Capabilities:
        routes, kind = self._routes, self._kind
        transports: set[Transport] = {"disk"} if routes.has_all(*DISK_ROUTES) else set()
        if routes.has_all(*GROUP_ROUTES) and self._section("weight_transfer_config").get("backend") == "nccl":
            transports.add("nccl")
        has_sleep = self._section("model_config").get("enable_sleep_mode") is True
        return Capabilities(
            logprob_kind=kind,
            seeded=self.info().seeded,
            has_spans=self._has_generate or self._has_completion_spans,
            pause_modes=frozenset(("keep", "wait", "abort") if "/pause" in routes else ()),
            transports=frozenset(transports),
            has_atomic_updates=False,
            has_checksum=False,  # it sums fused shards under its own names
            can_score=True,
            can_sleep=has_sleep and routes.has_all("/sleep", "/wake_up"),
        )

    def pause(self, mode: PauseMode) -> None:
        self._need("/pause")
        self._gate.shut()
        try:
            self.http.object("POST", f"/pause?mode={mode}", admin=True, timeout=UPDATE_S)
        except BaseException:
            self._gate.open()
            raise

    def resume(self) -> None:
        self.http.object("POST", "/resume", admin=True)
        self._gate.open()

    def abort(self, request_ids: Sequence[str] | None = None) -> int:
        own = [name.removeprefix("generate-tokens-") for name in request_ids or ()]
        names = [known for name in own for known in (f"generate-tokens-{name}", f"cmpl-{name}-0")]
        if request_ids is not None and not names:
            return 0
        if "/abort_requests" not in self._routes and request_ids is not None:
            self.http.request("POST", "/inference/v1/abort_requests", json={"request_ids": names})
            return 0
        self._need("/abort_requests")
        body = {} if request_ids is None else {"request_ids": names}
        reply = self.http.request("POST", "/abort_requests", admin=True, json=body)
        count = reply.json()["aborted"] if reply.content else 0
        return count if request_ids is None else min(count, len(request_ids))

    def flush_cache(self) -> None:
        """Running requests compute theirs again; ServerRefused where blocks stay held."""
        self._need("/reset_prefix_cache")
        deadline = time.monotonic() + FLUSH_S
        while True:
            reply = self.http.object("POST", "/reset_prefix_cache?reset_running_requests=true", admin=True)
            if reply.get("success") is True:
                return
            if time.monotonic() > deadline:
                raise ServerRefused(f"{self.url} did not empty its prefix cache within {FLUSH_S:.0f} s")
            time.sleep(0.2)

    def begin_update(self, version: str) -> None:
        self._need_pause()
        self._update("/start_weight_update")

    def world_size(self) -> int:
        return get(self.http.object("GET", "/get_world_size?include_dp=true", admin=True), "world_size", int, "reply")

    def join_group(self, group: TransferGroup) -> None:
        if group.kind != "nccl":
            raise Unsupported(f"{self.url} joins NCCL groups only, not {group.kind}")
        made = group.nccl_unique_id or nccl_unique_id(group.host, group.port, group.name, UPDATE_S)
        init = {
            "nccl_unique_id_b64": made,
            "rank_offset": group.rank_offset,
            "world_size": group.world_size,
            "packed": True,
            "packed_buffer_size_bytes": group.bucket_bytes,
            "packed_num_buffers": 2,
        }
        self._update("/init_weight_transfer_engine", {"init_info": init})

    def receive(self, tensors: Sequence[TensorInfo]) -> None:
        info = {
            "names": [tensor.name for tensor in tensors],
            "dtype_names": [tensor.dtype for tensor in tensors],
            "shapes": [list(tensor.shape) for tensor in tensors],
        }
        self._update("/update_weights", {"update_info": info})

    def leave_group(self) -> None:
        self._update("/shutdown_weight_transfer_engine")

    def finish_update(self, version: str) -> None:
        self._update("/finish_weight_update", {"weight_version": version})
        self.flush_cache()

    def abort_update(self) -> None:
        """vLLM keeps what it has received; the server stays unusable until a whole update has gone through."""

    def update_from_disk(self, path: str, version: str) -> None:
        """A server that runs stands still meanwhile, and stays so if the update fails."""
        arguments = {"weights_path": path, "is_checkpoint_format": True}
        with self._standing_still():
            self._update("/collective_rpc", {"method": "reload_weights", "kwargs": arguments})
            self.flush_cache()
            self._update("/update_weight_version", {"new_version": version})

    def checksum(self) -> dict[str, str]:
        """sha256 by vLLM's own names: fused layers, and shards unless there is one; without what it cannot see."""
        self._need("/weight_checker")
        reply = self.http.object("POST", "/weight_checker", admin=True, json={"action": "checksum"}, timeout=UPDATE_S)
        sums = get(reply, "checksums", dict, "reply of /weight_checker")
        seen = {name.removeprefix(SHARD_PREFIX): value for name, value in sums.items() if value != EMPTY_SHA256}
        if not seen:
            raise Unsupported(f"{self.url} sums no weights on this device")
        return seen

    def sleep(self) -> None:
        self._need("/sleep")
        self._gate.shut()
        self.http.object("POST", "/sleep?level=2", admin=True, timeout=UPDATE_S)

    def wake(self, what: Sequence[Memory]) -> None:
        tags = "&".join(f"tags={name}" for name in what)
        reply = self.http.object("POST", f"/wake_up?{tags}", admin=True, timeout=UPDATE_S)
        if reply.get("status") == "awake":
            self._gate.open()

    @cached_property
    def _config(self) -> dict:
        """What the server was started with; empty where it does not say."""
        if "/server_info" not in self._routes:
            return {}
        try:
            return self.http.object("GET", "/server_info?config_format=json", admin=True, timeout=UPDATE_S)
        except (Refused, MalformedReply):
            return {}

    @cached_property
    def _model(self) -> str:
        return str(self._models()[0].get("id", ""))

    @property
    def _has_completion_spans(self) -> bool:
        return "return_weight_versions" in self._routes.fields("CompletionRequest")

    def _models(self) -> list[dict]:
        models = get(self.http.object("GET", "/v1/models"), "data", list, "reply of /v1/models")
        if not models or not isinstance(models[0], dict):
            raise MalformedReply(f"{self.url} lists no model under /v1/models")
        return models

    def _section(self, name: str) -> dict[str, Any]:
        config = self._config.get("vllm_config")
        section = config.get(name) if isinstance(config, dict) else None
        return section if isinstance(section, dict) else {}

    def _is_paused(self) -> bool:
        if "/is_paused" not in self._routes:
            return False
        return get(self.http.object("GET", "/is_paused", admin=True), "is_paused", bool, "reply of /is_paused")

    def _need(self, path: str) -> None:
        if path not in self._routes:
            raise Unsupported(f"{self.url} has no route {path}; start vLLM with VLLM_SERVER_DEV_MODE=1")

    def _update(self, path: str, body: dict | None = None) -> None:
        """Sent once: a repeated half of a transfer would wait for a sender that has gone on."""
        self.http.request("POST", path, admin=True, json=body, repeat=False, timeout=UPDATE_S)

    def _check_kind(self, request: GenerateRequest) -> None:
        is_plain = (request.temperature, request.top_p, request.min_p) == (1, 1, 0) and request.top_k <= 0
        if self._kind == "raw" and not is_plain and request.temperature > 0:
            raise Unsupported(
                f"{self.url} reports log-probs before temperature and filters, which are not those of the samples at "
                f"temperature {request.temperature}, top_p {request.top_p}, top_k {request.top_k}, min_p "
                f"{request.min_p}; start vLLM with --logprobs-mode processed_logprobs"
            )

    def _ask(self, request: GenerateRequest, kind: LogprobKind) -> GenerateResult:
        body = self._try_generate(as_wire(request))
        if body is not None:
            return parse_generate(body, request, 0, kind, self._server_id)
        has_spans = self._has_completion_spans
        before = None if has_spans else self.weight_version()
        wire = as_completion(request, self._model, has_spans)
        body = self.http.object("POST", COMPLETIONS, json=wire, around=self._gate)
        if before is not None and (after := self.weight_version()) != before:
            raise WrongWeightVersion(
                f"{self.url} went from weights {before} to {after} during request {request.request_id} and does not "
                "say which tokens came from which; sample it again, or start vLLM with --enable-scale-out"
            )
        return parse_completions(body, request, kind, self._server_id, before)

    def _score_one(self, sequence: Sequence[int]) -> list[float]:
        body = self._try_generate(as_score(sequence))
        if body is not None:
            return parse_prompt_logprobs(body.get("prompt_logprobs"), sequence, "reply to a score")
        wire = as_score(sequence)["sampling_params"] | {"model": self._model, "prompt": list(sequence)}
        choices = get(self.http.object("POST", COMPLETIONS, json=wire, around=self._gate), "choices", list, "reply")
        return parse_prompt_logprobs(choices[0].get("prompt_logprobs"), sequence, "reply to a score")

    def _try_generate(self, wire: dict) -> dict | None:
        """The reply of /inference/v1/generate; None where the server was started without it."""
        if self._has_generate:
            try:
                return self.http.object("POST", GENERATE, json=wire, around=self._gate)
            except Refused as error:
                if error.status not in (403, 404):
                    raise
                log.warning(
                    "%s has no %s (start it with --enable-scale-out); using %s", self.url, GENERATE, COMPLETIONS
                )
                self._has_generate = False
        return None
