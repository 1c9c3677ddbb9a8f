import json

import numpy as np

from opsd_megatron.data import row_files
from opsd_megatron.data.contexts import context_numbers, runs_of_context
from opsd_megatron.data.records import read_records
from opsd_megatron.data.stream import RecordStream


def write(path, contexts: list[str]):
    rows = [
        {"id": str(n), "question": f"q{n}", "long_context": text, "short_context": text[:3]}
        for n, text in enumerate(contexts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_records_of_one_context_are_found_and_a_system_prompt_is_part_of_it(tmp_path):
    path = write(tmp_path / "r.jsonl", ["alpha", "beta", "alpha", "gamma", "beta"])
    with path.open("a") as file:
        row = {"id": "s", "question": "q", "system": "be brief", "long_context": "alpha", "short_context": "al"}
        file.write(json.dumps(row) + "\n")
    assert context_numbers(read_records(path)).tolist() == [0, 1, 0, 2, 1, 3]


def test_of_a_large_file_the_answer_is_kept_until_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setattr("opsd_megatron.data.contexts.INDEX_FILE_FROM_BYTES", 1)
    path = write(tmp_path / "r.jsonl", ["alpha", "beta", "alpha"])
    assert context_numbers(read_records(path)).tolist() == [0, 1, 0]
    kept = tmp_path / "r.jsonl.contexts"
    changed = np.load(kept)
    changed[-1] = 7
    row_files._replace_file(kept, changed)
    assert context_numbers(read_records(path)).tolist() == [0, 1, 7]  # read, not computed
    write(path, ["alpha", "beta", "alpha", "beta"])
    assert context_numbers(read_records(path)).tolist() == [0, 1, 0, 1]


def test_a_shuffled_epoch_keeps_up_to_so_many_records_of_a_context_together():
    contexts = np.asarray([number % 6 for number in range(60)])
    runs = runs_of_context(contexts, together=4)
    stream = RecordStream(range(60), seed=3, shuffle=True, dp_rank=0, dp_size=1, runs=runs)
    order = list(stream.next_batch(60))
    assert sorted(order) == list(range(60)) and order != list(range(60))
    lengths = [len(list(run)) for run in np.split(order, np.flatnonzero(np.diff(runs[order])) + 1)]
    assert sorted(lengths) == [2] * 6 + [4] * 12
    for run in np.split(np.asarray(order), np.flatnonzero(np.diff(runs[order])) + 1):
        assert len(set(contexts[run])) == 1 and sorted(run) == list(run)
