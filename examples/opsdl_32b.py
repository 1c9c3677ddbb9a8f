"""OPSDL for a 32B instruction model at 128k tokens: Qwen2.5-32B-Instruct or Qwen3-32B, on one node or four.

On one 8-GPU node, with an inference server on other GPUs or another node:

    export OPSD_SERVER_TOKEN=...            # the server's bearer token; never on a command line
    torchrun --nproc-per-node 8 examples/opsdl_32b.py \
        --model.path /models/Qwen3-32B --data.path triplets.jsonl --rollout.url http://10.0.0.2:8000

On any machine without a GPU, what it needs, and the same recipe and layout at small widths, to see that it holds
together:

    python examples/opsdl_32b.py --plan --machine h100-80gb
    torchrun --nproc-per-node 8 examples/opsdl_32b.py --rehearse --layout four-nodes
"""

from pathlib import Path

from opsd_megatron.config import (
    BatchConfig,
    ChatTemplate,
    CheckpointConfig,
    DataConfig,
    Distill,
    LiveTeacher,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
)
from opsd_megatron.launch.command import choose, exit_with, parse_fields, show_plan, start, take_flag
from opsd_megatron.launch.plan import machine, shapes

CONTEXT_TOKENS = 131_072
RESPONSE_TOKENS = 1_024

LAYOUTS = {
    # 32.8 G parameters. With the optimizer offloaded each still takes 10 bytes on the device (bf16 weight, float32
    # gradient and main weight): 41 GB at tp8. At tp4 with cp2 weights and activations need 85 GB.
    "one-node": ParallelConfig(tp=8, pp=1, cp=1, sequence_parallel=True),
    # 25 GB of weights and gradients, 12 GB of optimizer cut over cp x dp: fits 80 GB without offload.
    "four-nodes": ParallelConfig(tp=4, pp=2, cp=4, sequence_parallel=True),
}
NODES = {"one-node": 1, "four-nodes": 4}


def recipe(
    model: str = "qwen3-32b",
    layout: str = "one-node",
) -> RunConfig:
    """The paper's setting: live teacher, 16k to 30k extracts out of 128k contexts, 1024 response tokens, T = 1.

    The paper names neither learning rate nor batch size; these are what its neighbours use.
    Both models are native at 32k and need YaRN with factor 4 for 128k; it scales the teacher's short prompts too, so
    both passes and the server must run with it.
    """
    return RunConfig(
        model=ModelConfig(
            path=Path("Qwen3-32B" if model == "qwen3-32b" else "Qwen2.5-32B-Instruct"),
            dtype="bfloat16",
            recompute="full",
            yarn_factor=4.0,
            yarn_original_positions=32_768,
        ),
        parallel=LAYOUTS[layout],
        data=DataConfig(
            path=Path("triplets.jsonl"),
            template=ChatTemplate(enable_thinking=False),
            student_tokens=CONTEXT_TOKENS - RESPONSE_TOKENS,
            teacher_tokens=32_768,
        ),
        rollout=RolloutConfig(
            url="http://127.0.0.1:8000",
            max_response_tokens=RESPONSE_TOKENS,
            request_timeout_s=1_800.0,
            retry_s=1_800.0,
        ),
        objective=Distill(estimator="full", direction="reverse", chunk_tokens=1_024),
        teacher=LiveTeacher(),
        optimizer=OptimizerConfig(lr=1e-6, warmup_steps=5, weight_decay=0.01, cpu_offload=layout == "one-node"),
        batch=BatchConfig(
            prompts_per_step=64,
            student_microbatch_tokens=CONTEXT_TOKENS,
            teacher_microbatch_tokens=32_768 + RESPONSE_TOKENS,
            min_shared_tokens=256,
        ),
        checkpoint=CheckpointConfig(directory=Path(f"runs/opsdl-{model}"), every_steps=10),
        steps=100,
    )


SHAPES = {name: shapes.SHAPES[name] for name in ("qwen3-32b", "qwen2.5-32b")}


def main() -> None:
    model = choose("--recipe", list(SHAPES), "qwen3-32b")
    layout = choose("--layout", list(LAYOUTS), "one-node")
    device = choose("--machine", list(machine.MACHINES), "h100-80gb")
    is_rehearsal, is_plan = take_flag("--rehearse"), take_flag("--plan")
    notes = [
        f"--recipe {{{', '.join(SHAPES)}}} picks the model, --layout {{{', '.join(LAYOUTS)}}} the parallel layout.",
        "--rehearse walks through recipe and layout on CPU ranks with a tiny random model.",
        f"--plan prints memory, FLOPs, traffic and time; --machine {{{', '.join(machine.MACHINES)}}}.",
        "",
        "The inference server runs elsewhere: on other GPUs of the node, or on another node. Start it first, with the",
        "same model and the token in OPSD_SERVER_TOKEN on both sides:",
        "  python -m opsd_megatron.server --model /models/Qwen3-32B --dtype bfloat16 --port 8000 \\",
        "      --yarn-factor 4 --yarn-original-positions 32768",
    ]
    config = parse_fields(recipe(model, layout), notes)
    if is_plan:
        exit_with(lambda: show_plan(config, device, NODES[layout], f"{model}, {layout}"))
    else:
        exit_with(lambda: start(config, SHAPES[model], is_rehearsal))


if __name__ == "__main__":
    main()
