"""Work that is interrupted: what is finished stays, what is not is made again, and nothing half made has its name."""

import json

import pytest

from opsd_megatron.checkpoint.manifest import MANIFEST, manifest_problems, manifest_text
from opsd_megatron.checkpoint.staging import Staging
from opsd_megatron.errors import CheckpointError

JOB = {"what": "a test"}


def interrupted(target, job=None):
    """Two files finished, the third broken off."""

    def breaks():
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Staging(target, job or JOB) as staging:
        staging.write("one", [b"first ", b"file"])
        staging.write("two", [b"second"])
        staging.write("three", breaks())


def never():
    raise AssertionError("this file was finished and is not made again")
    yield b""


def test_a_second_process_takes_up_what_is_finished(tmp_path):
    target = tmp_path / "out"
    interrupted(target)
    assert not target.exists()
    with Staging(target, JOB) as staging:
        assert sorted(staging.records) == ["one", "two"]
        staging.write("one", never())
        staging.write("three", [b"third"])
        staging.finish()
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {
        "one": b"first file", "two": b"second", "three": b"third"
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_that_changed_meanwhile_is_made_again(tmp_path):
    interrupted(tmp_path / "out")
    (tmp_path / ".out.partial/files/two").write_bytes(b"secont")
    with Staging(tmp_path / "out", JOB) as staging:
        assert sorted(staging.records) == ["one"]
        assert sorted(path.name for path in staging.files.iterdir()) == ["one"]


def test_work_for_another_job_is_thrown_away(tmp_path):
    interrupted(tmp_path / "out")
    with Staging(tmp_path / "out", {"what": "another"}) as staging:
        assert not staging.records and not list(staging.files.iterdir())


def test_a_record_that_was_cut_in_the_middle_is_no_record(tmp_path):
    interrupted(tmp_path / "out")
    done = tmp_path / ".out.partial/done.jsonl"
    done.write_text(done.read_text()[:-20])
    with Staging(tmp_path / "out", JOB) as staging:
        assert sorted(staging.records) == ["one"]


def test_two_processes_do_not_write_the_same_target(tmp_path):
    with Staging(tmp_path / "out", JOB), pytest.raises(CheckpointError, match="another process is writing"):
        Staging(tmp_path / "out", JOB).__enter__()


@pytest.fixture
def release(tmp_path):
    with Staging(tmp_path / "out", JOB) as staging:
        for name in ("a", "b", "nested/c"):
            staging.write(name, [name.encode() * 1000])
        staging.write(MANIFEST, [manifest_text(staging.records.values(), {"method": "OPSDL"}).encode()])
        return staging.finish()


def test_a_manifest_lists_every_file_and_says_what_it_was_told(release):
    manifest = json.loads((release / MANIFEST).read_text())
    assert [record["file"] for record in manifest["files"]] == ["a", "b", "nested/c"]
    assert manifest["method"] == "OPSDL" and "torch" in manifest["versions"]
    assert manifest_problems(release) == []


def test_what_is_wrong_with_a_release_is_named(release):
    (release / "a").write_bytes(b"b" + b"a" * 999)
    (release / "b").write_bytes(b"b" * 999)
    (release / "nested/c").unlink()
    (release / "spare").write_text("")
    assert manifest_problems(release) == [
        "a differs from what was written: its sha256 is another",
        "b has 999 bytes, the manifest says 1000",
        "nested/c is missing",
        "spare is not in the manifest",
    ]
    (release / MANIFEST).write_text("{")
    with pytest.raises(CheckpointError, match="is no finished release"):
        manifest_problems(release)
