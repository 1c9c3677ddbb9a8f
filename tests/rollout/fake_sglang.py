"""A server with the routes and rules of SGLang 0.5.23, over a tiny engine; written from its source, never recorded.

Every request is held against the contract in fixtures/wire/sglang-0.5.23-requests.json; SGLang itself ignores keys that
it does not know, here they are a violation. Run as a script; imports nothing of the package under test.
"""

import hashlib
import json
import math
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
from fake_engine import VOCAB, Engine, Output, prompt_logprobs
from fake_http import Application, Failure, parser

CONTRACT = Path(__file__).parents[1] / "fixtures" / "wire" / "sglang-0.5.23-requests.json"
OPEN = ("/health", "/ready", "/metrics")
NORMAL = ("/generate", "/model_info", "/server_info", "/openapi.json", "/v1/models")
GETS = (*OPEN, "/model_info", "/server_info", "/openapi.json", "/v1/models")


class Sglang(Application):
    def __init__(self, options: Any):
        self.options, self.violations = options, []
        self.contract = json.loads(CONTRACT.read_text())["requests"]
        self.engine = Engine(options.weights, options.logprobs)
        self.is_paused = self.is_asleep = self.has_session = False
        self.groups: set[str] = set()
        self.loaded = 0
        self.pool = ThreadPoolExecutor(64)

    def handle(self, method: str, path: str, query: dict, body: Any, bearer: str) -> Any:
        name = "do_" + path.strip("/").replace("/", "_").replace(".", "_")
        if not hasattr(self, name) or (path == "/openapi.json" and self.options.without_openapi):
            raise Failure(404, {"detail": "Not Found"})
        if method == "OPTIONS" or (method == "GET") != (path in GETS):
            raise Failure(405, {"detail": "Method Not Allowed"})
        self.check_key(path, bearer)
        if path in self.contract:
            self.violations += [
                f"{path}: {error.message}"
                for error in jsonschema.Draft202012Validator(self.contract[path]).iter_errors(body)
            ]
        return getattr(self, name)(body, query)

    def check_key(self, path: str, bearer: str) -> None:
        """With both keys set, routes that change the server open to the admin key alone."""
        wanted = self.options.token if path in NORMAL else self.options.admin_token or self.options.token
        if path not in OPEN and bearer != wanted:
            raise Failure(401, {"error": "Unauthorized"})

    # generation

    def do_generate(self, body: dict, _: dict) -> Any:
        is_batch = isinstance(body["input_ids"][0], list)
        prompts = body["input_ids"] if is_batch else [body["input_ids"]]
        params = body["sampling_params"] if is_batch else [body["sampling_params"]]
        ids = body.get("rid") or [uuid.uuid4().hex for _ in prompts]
        ids = ids if is_batch or isinstance(ids, list) else [ids]
        if any(not 0 <= token < VOCAB for prompt in prompts for token in prompt):
            raise Failure(400, {"error": {"message": "a token id is out of the vocabulary"}})
        if self.is_asleep:
            self.violations.append("a request was sent to a server without memory")
        # SGLang's own n: every sample is drawn from the same seed, under an id that nobody knows
        work = [(f"{rid}-hidden{k}" if one["n"] > 1 else rid, prompt, one)
                for rid, prompt, one in zip(ids, prompts, params, strict=True) for k in range(one["n"])]  # fmt: skip
        start = body["logprob_start_len"]
        try:
            replies = list(self.pool.map(lambda item: self.answer(*item, start), work))
        except ValueError as error:
            raise Failure(400, {"error": {"message": str(error)}}) from error
        return replies if is_batch or len(replies) > 1 else replies[0]

    def answer(self, rid: str, prompt: list[int], params: dict, start: int) -> dict:
        sampling = {
            "max_tokens": params["max_new_tokens"], "temperature": params["temperature"],
            "seed": params["sampling_seed"], "stop_token_ids": params["stop_token_ids"] or [],
            "ignore_eos": params["ignore_eos"],
        }  # fmt: skip
        never_ran = self.engine.is_frozen
        output = self.engine.run(rid, prompt, sampling)
        version = {"weight_version": self.engine.version}
        if output.finish == "abort" and never_ran and not output.token_ids:
            reason = {"type": "abort", "message": "Abort in waiting queue"}
            return {"text": "", "output_ids": [], "meta_info": {"id": rid, "finish_reason": reason, **version}}
        meta = {
            "id": rid,
            "finish_reason": finish_reason(output),
            "prompt_tokens": len(prompt),
            "completion_tokens": len(output.token_ids),
            "cached_tokens": 0,
            **version,
            "weight_versions": output.spans,
            "output_token_logprobs": [
                [logprob, token, None] for token, logprob in zip(output.token_ids, output.logprobs, strict=True)
            ],
        }
        if start == 0:
            values = [None, *prompt_logprobs(self.engine.weights, prompt)]
            meta["input_token_logprobs"] = [[v, token, None] for v, token in zip(values, prompt, strict=True)]
        return {"text": "\ufffd", "output_ids": output.token_ids, "meta_info": meta}

    # information

    def do_openapi_json(self, *_) -> dict:
        names = [name for name in dir(self) if name.startswith("do_") and name != "do_openapi_json"]
        return {"paths": {"/" + name.removeprefix("do_"): {} for name in names}}

    def do_health(self, *_) -> str:
        if self.is_paused:
            raise Failure(503, "")
        return ""

    def do_ready(self, *_) -> str:
        return self.do_health()

    def do_metrics(self, *_) -> str:
        return "process_start_time_seconds 1.79523475582e+09\n"

    def do_model_info(self, *_) -> dict:
        return {"model_path": "/models/student", "is_generation": True, "weight_version": self.engine.version}

    def do_server_info(self, *_) -> dict:
        return {"tp_size": 2, "dp_size": 1, "pp_size": 1, "dtype": "bfloat16", "context_length": 4096,
                "enable_memory_saver": True, "api_key": self.options.token, "version": "0.5.23"}  # fmt: skip

    # control

    def do_pause_generation(self, body: dict, _: dict) -> dict:
        self.is_paused = True
        self.engine.freeze(True)
        if body["mode"] == "abort":
            self.engine.abort("")
        return {"message": "Generation paused successfully.", "status": "ok"}

    def do_continue_generation(self, *_) -> dict:
        self.is_paused = False
        self.engine.freeze(False)
        return {"message": "Generation continued successfully.", "status": "ok"}

    def do_abort_request(self, body: dict, _: dict) -> str:
        """An id that no request has is ignored, although the scheduler would take it as a prefix."""
        if body.get("abort_all"):
            self.engine.abort("")
        elif body["rid"] in self.engine.running:
            self.engine.abort(body["rid"])
        return ""

    def do_flush_cache(self, *_) -> str:
        if self.engine.running and not self.is_paused:
            raise Failure(400, "Flush cache failed.\n")
        return "Cache flushed.\n"

    def do_begin_weight_update(self, *_) -> dict:
        if self.has_session:
            self.fail("a weight-update session is already open; call end_weight_update() first")
        if not self.is_paused:
            self.violations.append("an update began under running requests")
        self.has_session, self.loaded = True, 0
        return self.success()

    def do_end_weight_update(self, *_) -> dict:
        if not self.has_session:
            self.fail("no weight-update session is open; call begin_weight_update() first")
        self.has_session = False
        return self.success()

    def do_init_weights_update_group(self, body: dict, _: dict) -> dict:
        if body["backend"] != "nccl" or body["rank_offset"] < 1 or body["world_size"] < 3:
            self.fail("Failed to initialize custom process group")
        self.groups.add(body["group_name"])
        return self.success()

    def do_destroy_weights_update_group(self, body: dict, _: dict) -> dict:
        if body["group_name"] not in self.groups:
            self.fail("The group to be destroyed does not exist.")
        self.groups.discard(body["group_name"])
        return self.success()

    def do_update_weights_from_distributed(self, body: dict, _: dict) -> dict:
        if not self.has_session:
            self.fail("update_weights_from_distributed must run between begin_weight_update() and end_weight_update()")
        if body["group_name"] not in self.groups:
            self.fail(f"Failed to receive weights: Group {body['group_name']} not in {sorted(self.groups)}")
        assert len(body["names"]) == len(body["dtypes"]) == len(body["shapes"])
        self.loaded += sum(math.prod(shape) for shape in body["shapes"])
        self.engine.weights = "new"
        self.flush_after_update(body)
        return self.success()

    def do_update_weights_from_disk(self, body: dict, _: dict) -> dict:
        name = Path(body["model_path"]).name
        if not self.is_paused:
            self.violations.append("weights were loaded under running requests")
        if name not in ("old", "new"):
            self.engine.weights = "half old, half new"
            self.fail("Failed to update weights: the directory holds no model", num_paused_requests=0)
        self.engine.weights = name
        self.flush_after_update(body)
        return self.success(num_paused_requests=0)

    def flush_after_update(self, body: dict) -> None:
        if body.get("flush_cache", True) and self.engine.running:
            self.fail("Weights were updated, but the cache was not flushed because requests are still running")

    def do_update_weight_version(self, body: dict, _: dict) -> dict:
        if body.get("abort_all_requests", True):
            self.engine.abort("")
        self.engine.version = body["new_version"]
        return self.success(new_version=body["new_version"])

    def do_weights_checker(self, *_) -> dict:
        sums = {"model.embed_tokens.weight": hashlib.sha256(self.engine.weights.encode()).hexdigest()}
        rank = {"checksums": sums, "per_gpu_checksum": "0"}
        return self.success(ranks=[rank, rank])

    def do_release_memory_occupation(self, *_) -> None:
        if not self.is_paused:
            raise Failure(400, {"error": {"message": "should be called only when server is idle"}})
        self.is_asleep = True

    def do_resume_memory_occupation(self, body: dict, _: dict) -> None:
        self.is_asleep = "kv_cache" not in body["tags"]

    def success(self, **more) -> dict:
        return {"success": True, "message": "Success", **more}

    def fail(self, message: str, **more) -> None:
        raise Failure(400, {"success": False, "message": message, **more})


def finish_reason(output: Output) -> dict:
    if output.finish == "stop":
        return {"type": "stop", "matched": output.stop_token}
    if output.finish == "abort":
        return {"type": "abort", "message": "Aborted by AbortReq"}
    return {"type": "length", "length": len(output.token_ids)}


if __name__ == "__main__":
    arguments = parser()
    arguments.add_argument("--without-openapi", action="store_true")
    options = arguments.parse_args()
    Sglang(options).serve(options.port)
