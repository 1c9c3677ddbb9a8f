"""A server that answers as vLLM 0.32 was recorded to, with the numbers of a tiny engine put into the recorded bodies.

Every request is held against vLLM's OpenAPI document; what breaks it, or one of vLLM's unwritten rules, is a violation.
Run as a script; imports nothing of the package under test.
"""

import base64
import copy
import hashlib
import itertools
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
from fake_engine import VOCAB, Engine, Output, prompt_logprobs
from fake_http import Application, Failure, parser

RECORDED = Path(__file__).parents[1] / "fixtures" / "wire" / "vllm-0.32.0"
BODIES = {
    "/inference/v1/generate": "GenerateRequest",
    "/v1/completions": "CompletionRequest",
    "/init_weight_transfer_engine": "Body_init_weight_transfer_engine_init_weight_transfer_engine_post",
    "/update_weights": "Body_update_weights_update_weights_post",
    "/finish_weight_update": "Body_finish_weight_update_finish_weight_update_post",
    "/update_weight_version": "Body_update_weight_version_update_weight_version_post",
    "/weight_checker": "Body_weight_checker_weight_checker_post",
}
FREE_KEYS = {"/collective_rpc": {"method", "args", "kwargs", "timeout"}, "/abort_requests": {"request_ids"}}
"""Of bodies that have no schema."""
INIT_KEYS = {
    "nccl_unique_id_b64", "rank_offset", "world_size", "packed", "packed_buffer_size_bytes", "packed_num_buffers"
}  # fmt: skip


class Vllm(Application):
    def __init__(self, options: Any):
        self.options, self.violations = options, []
        self.engine = Engine(options.weights, options.logprobs)
        self.document = json.loads((RECORDED / "vllm-0.32.0-openapi.json").read_text())
        self.transcript = json.loads((RECORDED / "vllm-0.32.0-transcript.json").read_text())
        schemas, components = self.document["components"]["schemas"], {"components": self.document["components"]}
        self.validators = {
            path: jsonschema.Draft202012Validator(components | schemas[name]) for path, name in BODIES.items()
        }
        self.is_paused = self.is_sleeping = self.has_group = False
        self.update: str | None = None
        self.failing_flushes = 0
        self.pool, self.numbers = ThreadPoolExecutor(64), itertools.count()

    def recorded(self, path: str, status: int = 200) -> Any:
        found = (e for e in self.transcript if (e["path"].split("?")[0], e["status"]) == (path, status))
        return copy.deepcopy(next(found)["response"])

    def handle(self, method: str, path: str, query: dict, body: Any, bearer: str) -> Any:
        self.check_shape(method, path, query, body)
        guarded = path.startswith(("/v1", "/inference"))
        wanted = self.options.token if guarded else self.options.admin_token or bearer
        if guarded and bearer != wanted:
            raise Failure(401, self.recorded("/inference/v1/generate", 401))
        if not guarded and path not in ("/health", "/metrics", "/openapi.json") and bearer != wanted:
            self.violations.append(f"{method} {path} without the admin token")
        plain = {"/openapi.json": self.document, "/metrics": (RECORDED / "vllm-metrics.txt").read_text()}
        if path in plain:
            return plain[path]
        name = "do_" + path.strip("/").replace("/", "_").replace("inference_v1_", "").replace("v1_", "")
        if not hasattr(self, name):
            return self.recorded(path)
        return getattr(self, name)(body, query)

    def check_shape(self, method: str, path: str, query: dict, body: Any) -> None:
        if path == "/openapi.json":
            return
        operation = self.document["paths"].get(path, {}).get(method.lower())
        if operation is None:
            self.violations.append(f"{method} {path} is no route")
            raise Failure(404, {"detail": "Not Found"})
        unknown = set(query) - {parameter["name"] for parameter in operation.get("parameters", [])} - {"tags"}
        known = FREE_KEYS.get(path, set())
        if path in BODIES:
            schema = self.document["components"]["schemas"][BODIES[path]]
            errors = [error.message for error in self.validators[path].iter_errors(body)]
            known = set(schema["properties"])
            params = schema["properties"].get("sampling_params")
            unknown |= set((body or {}).get("sampling_params", {})) - set(params["properties"]) if params else set()
            self.violations += [f"{path}: {error}" for error in errors]
        unknown |= set(body or {}) - known
        if unknown:
            self.violations.append(f"{method} {path} with unknown {sorted(unknown)}")
            raise Failure(400, {"error": {"message": f"unknown {sorted(unknown)}", "code": 400}})

    # generation

    def run(self, name: str, prompt: list[int], sampling: dict) -> list[Output]:
        if any(not 0 <= token < VOCAB for token in prompt):
            raise Failure(400, self.recorded("/inference/v1/generate", 400))
        if self.is_paused or self.is_sleeping:
            self.violations.append("a request was sent to a paused server: 0.32 leaves it hanging")
        asked = [sampling | {"seed": None if sampling["seed"] is None else sampling["seed"] + i}
                 for i in range(sampling["n"])]  # fmt: skip
        number = next(self.numbers)  # the same external id may run twice
        return list(
            self.pool.map(lambda i: self.engine.run(f"{name}#{number}.{i}", prompt, asked[i]), range(len(asked)))
        )

    def prompt_entries(self, ids: list[int]) -> list:
        values = prompt_logprobs(self.engine.weights, ids)
        pairs = zip(ids[1:], values, strict=True)
        return [None, *({str(token): {"logprob": v, "rank": 1, "decoded_token": ""}} for token, v in pairs)]

    def do_generate(self, body: dict, _: dict) -> dict:
        if self.options.without_scale_out:
            raise Failure(403, {"error": {"message": "start with --enable-scale-out", "code": 403}})
        reply, sampling = self.recorded("/inference/v1/generate"), body["sampling_params"]
        template = reply["choices"][0]
        reply["request_id"] = "generate-tokens-" + body.get("request_id", "generated")
        outputs = self.run(reply["request_id"], body["token_ids"], sampling)
        if sampling.get("prompt_logprobs") is not None:
            reply["prompt_logprobs"] = self.prompt_entries(body["token_ids"])
        reply["choices"] = []
        for index, output in enumerate(outputs):
            content = [
                {"token_id": token, "logprob": logprob, "rank": 1, "top_logprobs": []}
                for token, logprob in zip(output.token_ids, output.logprobs, strict=True)
            ]
            reply["choices"].append(template | {
                "index": index, "finish_reason": output.finish, "stop_reason": output.stop_token,
                "token_ids": output.token_ids, "weight_versions": output.spans,
                "logprobs": None if sampling.get("logprobs") is None else {"content": content},
            })  # fmt: skip
        reply["usage"] |= {"prompt_tokens": len(body["token_ids"])}
        return reply

    def do_completions(self, body: dict, _: dict) -> dict:
        reply = self.recorded("/v1/completions")
        template = reply["choices"][0]
        outputs = self.run(f"cmpl-{body.get('request_id', 'generated')}-0", body["prompt"], body)
        reply["choices"] = []
        for index, output in enumerate(outputs):
            logprobs = {"token_logprobs": output.logprobs, "tokens": [""] * len(output.token_ids)}
            wants = body.get("prompt_logprobs") is not None
            reply["choices"].append(template | {
                "index": index, "text": "\ufffd", "finish_reason": output.finish, "stop_reason": output.stop_token,
                "token_ids": output.token_ids, "prompt_token_ids": body["prompt"], "logprobs": logprobs,
                "prompt_logprobs": self.prompt_entries(body["prompt"]) if wants else None,
            })  # fmt: skip
        reply["usage"] |= {"prompt_tokens": len(body["prompt"])}
        return reply

    # control

    def do_weight_info(self, *_) -> dict:
        return {"weight_version": self.engine.version}

    def do_is_paused(self, *_) -> dict:
        return {"is_paused": self.is_paused}

    def do_server_info(self, *_) -> dict:
        nccl = {"backend": "nccl"} if self.options.nccl else None
        model = {"enable_sleep_mode": self.options.nccl, "dtype": "torch.float32"}
        return {"vllm_config": {"model_config": model, "weight_transfer_config": nccl}, "vllm_env": {}}

    def do_pause(self, _, query: dict) -> dict:
        mode = query.get("mode", ["abort"])[0]
        self.is_paused = True
        if mode == "wait":
            self.engine.drain()
        self.engine.freeze(True)
        if mode == "abort":
            self.engine.abort("")
        return self.recorded("/pause")

    def do_resume(self, *_) -> dict:
        self.is_paused = False
        self.engine.freeze(False)
        return self.recorded("/resume")

    def do_abort_requests(self, body: dict, _: dict) -> dict:
        names = body.get("request_ids")
        count = sum(self.engine.abort(f"{name}#") for name in names) if names else self.engine.abort("")
        return {"status": "aborted", "aborted": count}

    def do_inference_v1_abort_requests(self, body: dict, query: dict) -> str:
        self.do_abort_requests(body, query)
        return ""

    def do_reset_prefix_cache(self, _, query: dict) -> dict:
        self.failing_flushes -= 1
        held = bool(self.engine.running) and query.get("reset_running_requests") != ["true"]
        return {"success": self.failing_flushes < 0 and not held}

    def do_collective_rpc(self, body: dict, _: dict) -> dict:
        if not self.is_paused:
            self.violations.append("weights were reloaded under running requests")
        name = Path(body["kwargs"]["weights_path"]).name
        if name not in ("old", "new"):
            self.engine.weights = "half old, half new"
            raise Failure(500, self.recorded("/init_weight_transfer_engine", 500))
        self.engine.weights, self.failing_flushes = name, 1
        return self.recorded("/collective_rpc")

    def do_update_weight_version(self, body: dict, _: dict) -> dict:
        self.engine.version = body["new_version"]
        return {"success": True, "new_version": body["new_version"]}

    def do_weight_checker(self, *_) -> dict:
        reply = self.recorded("/weight_checker")
        name = "dp0:pp0:pcp0:tp0:model.embed_tokens.weight"
        reply["checksums"][name] = hashlib.sha256(self.engine.weights.encode()).hexdigest()
        return reply

    def do_init_weight_transfer_engine(self, body: dict, _: dict) -> dict:
        info = body["init_info"]
        if not self.options.nccl:
            raise Failure(500, self.recorded("/init_weight_transfer_engine", 500))
        if set(info) != INIT_KEYS or len(base64.b64decode(info["nccl_unique_id_b64"])) != 128:
            self.violations.append(f"init_info {sorted(info)}")
        self.has_group = True
        return {"message": "Weight transfer initialized"}

    def do_shutdown_weight_transfer_engine(self, *_) -> dict:
        self.has_group = False
        return {"message": "Weight transfer shut down"}

    def do_start_weight_update(self, *_) -> dict:
        if not self.is_paused:
            self.violations.append("an update began under running requests")
        self.update = ""
        return {"message": "Weight update started"}

    def do_update_weights(self, body: dict, _: dict) -> dict:
        info = body["update_info"]
        if self.update is None or not self.has_group or set(info) != {"names", "dtype_names", "shapes"}:
            raise Failure(500, {"error": {"message": "no update, or no group", "code": 500}})
        assert len(info["names"]) == len(info["dtype_names"]) == len(info["shapes"])
        self.update = f"{sum(math.prod(shape) for shape in info['shapes'])} values"
        return {"message": "Weights updated"}

    def do_finish_weight_update(self, body: dict, _: dict) -> dict:
        if not self.update:
            raise Failure(500, {"error": {"message": "nothing to finish", "code": 500}})
        self.engine.weights, self.engine.version, self.update = "new", body["weight_version"], None
        return {"message": "Weight update finished"}

    def do_sleep(self, _, query: dict) -> dict:
        self.is_sleeping = True
        return self.recorded("/sleep") | {"level": int(query["level"][0])}

    def do_wake_up(self, _, query: dict) -> dict:
        self.is_sleeping = "kv_cache" not in query.get("tags", ["kv_cache"])
        return {"status": "sleeping" if self.is_sleeping else "awake", "tags": query.get("tags")}


if __name__ == "__main__":
    arguments = parser()
    arguments.add_argument("--without-scale-out", action="store_true")
    arguments.add_argument("--nccl", action="store_true", help="weight transfer and sleep mode were configured")
    options = arguments.parse_args()
    Vllm(options).serve(options.port)
