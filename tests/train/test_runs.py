"""Whole runs in their own processes: resumed, killed, interrupted, left without a server, misconfigured."""

import json
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from opsd_megatron.rollout.process import ServerProcess
from tests.train.runs import TOKEN, make_world

CP2 = ("--parallel.cp", "2")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("world"))
    yield world
    world.server.stop()


@pytest.fixture(scope="module")
def uninterrupted(world) -> dict[int, float]:
    assert world.finish("whole", 2, *CP2, "--checkpoint.keep", "3") == 0, world.log("whole")
    losses = world.losses("whole")
    assert sorted(losses) == [1, 2, 3, 4, 5, 6]
    return losses


def kill_job(process) -> None:
    """SIGKILL to torchrun and to its ranks, as a node that loses power."""
    import psutil

    victims = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for victim in victims:
        victim.kill()
    psutil.wait_procs(victims, timeout=10)
    process.wait()


def test_a_run_killed_in_the_middle_resumes_to_the_same_losses_bit_for_bit(world, uninterrupted):
    process = world.start("killed", 2, *CP2)
    world.wait_for_step("killed", 3, process)
    kill_job(process)
    assert world.finish("killed", 2, *CP2) == 0, world.log("killed")
    assert world.losses("killed") == uninterrupted


def test_a_run_goes_on_under_another_layout(world, uninterrupted):
    shutil.copytree(world.directory / "whole" / "step_000002", world.directory / "moved" / "step_000002")
    assert world.finish("moved", 4, "--parallel.tp", "2", "--parallel.pp", "2") == 0, world.log("moved")
    losses = world.losses("moved")
    assert abs(losses[3] - uninterrupted[3]) <= 1e-6
    assert all(abs(losses[step] - uninterrupted[step]) <= 1e-4 for step in (4, 5, 6))


def test_a_signal_leaves_a_checkpoint_and_no_process(world, uninterrupted):
    for number in (signal.SIGTERM, signal.SIGINT):
        before = max(world.losses("signal"), default=0)
        process = world.start("signal", 2, *CP2, "--checkpoint.every-steps", "0")
        world.wait_for_step("signal", before + 1, process)
        process.send_signal(number)
        process.wait(60)
        reached = max(world.losses("signal"))
        assert (world.directory / "signal" / f"step_{reached:06d}" / "state.json").is_file(), world.log("signal")
    assert world.finish("signal", 2, *CP2) == 0
    assert world.losses("signal") == uninterrupted


def test_a_server_killed_during_the_run_is_waited_for_and_gets_the_weights_again(world, uninterrupted):
    world.outlive_server("fault", 2, *CP2)
    assert world.losses("fault") == uninterrupted


def test_a_server_that_never_comes_back_ends_the_run_with_a_checkpoint(world, uninterrupted, tmp_path):
    server = ServerProcess(world.directory / "model", TOKEN, tmp_path / "server.log", engine="exact", threads=1)
    server.start()
    flags = (*CP2, "--rollout.url", server.url, "--rollout.retry-s", "2", "--checkpoint.every-steps", "0")
    process = world.fork("gone", 2, *flags)
    world.wait_for_step("gone", 2, process)
    server.stop()
    assert process.wait(120) != 0
    assert "is the server running" in world.log("gone")
    losses = world.losses("gone")
    assert losses == {step: uninterrupted[step] for step in losses}
    assert (world.directory / "gone" / f"step_{max(losses):06d}" / "state.json").is_file()  # resumed from as above


def test_a_run_goes_on_when_one_of_two_servers_is_not_there(world, uninterrupted):
    urls = f"{world.server.url},http://127.0.0.1:9"
    assert world.finish("half", 2, *CP2, "--rollout.url", urls, "--rollout.retry-s", "2") == 0, world.log("half")
    assert world.losses("half") == uninterrupted
    rows = world.rows("half").values()
    assert all(row["rollout/tokens_per_s"] > 0 and row["rollout/stale_tokens"] == 0 for row in rows)


BAD_INPUT = {  # ranks, flags, what the message must say
    "wrong world size": (1, ("--parallel.tp", "4"), "world size 1 is not a multiple of tp*pp*cp"),
    "tp does not divide heads": (3, ("--parallel.tp", "3"), "parallel.tp=3 does not divide the model's 4"),
    "unknown flag": (1, ("--parallel.tpp", "2"), "tpp"),
    "prompts not divisible": (
        2,
        ("--batch.prompts-per-step", "3"),
        "batch.prompts_per_step=3 is not a multiple of dp=2",
    ),
    "no such data": (1, ("--data.path", "nowhere.jsonl"), "nowhere.jsonl"),
    "no such model": (1, ("--model.path", "nowhere"), "nowhere"),
    "server down at start": (2, ("--rollout.url", "http://127.0.0.1:9", "--rollout.retry-s", "1"), "127.0.0.1:9"),
    "evidence over the budget": (1, ("--data.teacher-tokens", "8"), "teacher"),
}


@pytest.fixture(scope="module")
def exit_codes(world):
    """Of a run for each case of BAD_INPUT, several at a time: waiting is most of what they do."""
    with ThreadPoolExecutor(4) as pool:
        wrong_token = {"token": pool.submit(world.finish, "bad token", 1, token="wrong")}
        yield wrong_token | {
            case: pool.submit(world.finish, "bad " + case, ranks, *flags)
            for case, (ranks, flags, _) in BAD_INPUT.items()
        }


def assert_refused(world, run: str, words: str) -> None:
    """An error that the user can mend, in one line, and nothing left behind."""
    log = world.log(run)
    assert words in log and "Traceback (most recent call last)" not in log.split("torch/distributed")[0], log
    assert not list((world.directory / run).glob("step_*"))


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_ends_with_a_clear_error_and_writes_nothing(world, exit_codes, case):
    assert exit_codes[case].result() != 0
    assert_refused(world, "bad " + case, words=BAD_INPUT[case][2])


def test_a_server_with_another_tokenizer_is_refused(world, tmp_path):
    shutil.copytree(world.directory / "model", tmp_path / "model")
    tokenizer = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with ServerProcess(tmp_path / "model", TOKEN, tmp_path / "server.log", engine="exact", threads=1) as server:
        assert world.finish("tokenizer", 1, "--rollout.url", server.url) != 0
    assert_refused(world, "tokenizer", f"the server at {server.url} has")


def test_a_wrong_token_is_refused(world, exit_codes):
    assert exit_codes["token"].result() != 0
    assert_refused(world, "bad token", "does not accept this bearer token")
