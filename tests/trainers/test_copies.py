"""Copies of checkpoints at fsspec URLs: a folder, and an S3 server of this machine."""

import os
import socket
import subprocess
import sys

import fsspec
import pytest

from rlattn.config import ConfigError
from rlattn.trainers.checkpoint import Checkpoints
from rlattn.trainers.copies import Copies
from tests.nodes import wait_for


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """A bucket of a real S3 server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-P", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with open(tmp_path_factory.mktemp("s3") / "log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = dict(os.environ)
    os.environ |= settings
    try:
        wait_for(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, "the S3 server")
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket"
    finally:
        os.environ.clear()
        os.environ |= before
        server.terminate()
        server.wait(timeout=20)


@pytest.fixture(params=["file", "s3"])
def url(request, tmp_path):
    if request.param == "file":
        return f"file://{tmp_path}/copies"
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}"


def write(step):
    def inside(folder):
        (folder / "model").mkdir()
        (folder / "model/weights").write_bytes(bytes([step]) * 1000)
        (folder / "empty").touch()

    return inside


def run(folder, url, limit=2):
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text("seed: 0\n")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    return Checkpoints(folder / "checkpoints", limit, Copies(url))


def test_what_is_kept_here_is_kept_there_and_comes_back_whole(tmp_path, url):
    checkpoints = run(tmp_path / "run", url)
    for step in (1, 2, 3):
        checkpoints.save(step, {}, write(step))
    checkpoints.copies.finish()
    there = Copies(url)
    assert there.steps() == [2, 3]
    for step, name in ((None, "step-3"), (2, "step-2")):
        empty = tmp_path / f"back-{name}"
        assert there.restore(empty, step)
        back = Checkpoints(empty / "checkpoints", 2)
        assert back.verified(back.latest(), "--resume-from").name == name
        assert (empty / "checkpoints" / name / "model/weights").read_bytes() == bytes([int(name[-1])]) * 1000
        assert (empty / "config.yaml").read_text() == "seed: 0\n"
        assert (empty / "metrics.jsonl").read_text() == '{"step": 1}\n'
    with pytest.raises(ConfigError, match=r"has no step-1; there are: 2, 3"):
        there.restore(tmp_path / "none", 1)


def test_a_copy_without_its_manifest_does_not_count(tmp_path, url):
    checkpoints = run(tmp_path / "run", url)
    for step in (1, 2):
        checkpoints.save(step, {}, write(step))
    checkpoints.copies.finish()
    files, root = fsspec.core.url_to_fs(url)
    files.rm_file(f"{root}/step-2/manifest.json")
    files.invalidate_cache()
    assert Copies(url).steps() == [1]
    checkpoints.save(2, {}, write(7))  # an attempt that was cut short is begun anew
    checkpoints.copies.finish()
    assert Copies(url).restore(tmp_path / "back", 2)
    assert (tmp_path / "back/checkpoints/step-2/model/weights").read_bytes()[:1] == b"\7"


def test_a_damaged_copy_is_not_taken(tmp_path, url):
    checkpoints = run(tmp_path / "run", url)
    checkpoints.save(1, {}, write(1))
    checkpoints.copies.finish()
    files, root = fsspec.core.url_to_fs(url)
    files.pipe_file(f"{root}/step-1/model/weights", b"x" * 1000)
    with pytest.raises(OSError, match=r"step-1 at .* is damaged: model/weights has another SHA-256"):
        Copies(url).restore(tmp_path / "back", None)
    assert not (tmp_path / "back/config.yaml").exists()
    assert not list((tmp_path / "back/checkpoints").iterdir())


def test_forgetting_leaves_what_is_not_ours(tmp_path, url):
    checkpoints = run(tmp_path / "run", url)
    checkpoints.save(1, {}, write(1))
    checkpoints.copies.finish()
    files, root = fsspec.core.url_to_fs(url)
    files.pipe_file(f"{root}/notes.txt", b"mine")
    there = Copies(url)
    assert there.holds_run()
    there.forget()
    assert not there.holds_run()
    assert there.steps() == []
    assert files.cat_file(f"{root}/notes.txt") == b"mine"


def test_a_copy_that_fails_is_told_and_tried_again(tmp_path, monkeypatch):
    said = []
    folder = tmp_path / "run"
    checkpoints = run(folder, f"file://{tmp_path}/copies")
    checkpoints.copies._note = said.append
    files = checkpoints.copies._fs
    whole = files.put_file
    monkeypatch.setattr(files, "put_file", lambda *args: (_ for _ in ()).throw(OSError("no route to the bucket")))
    checkpoints.save(1, {}, write(1))
    with pytest.raises(OSError, match=r"the last checkpoint was not copied to file:.*: no route to the bucket"):
        checkpoints.copies.finish()
    monkeypatch.setattr(files, "put_file", whole)
    checkpoints.save(2, {}, write(2))
    assert "no route to the bucket; trying again with step-2" in said[0]
    checkpoints.copies.finish()
    assert checkpoints.copies.steps() == [2]


@pytest.mark.parametrize("url", ["nothing://here", "file:///proc/nowhere/run", "s3://no-such-bucket-here/run"])
def test_what_cannot_be_written_is_refused_at_the_door(url, s3):
    with pytest.raises(ConfigError, match=r"`trainer\.checkpoint_url` = .*: cannot be written to: .*\w"):
        Copies(url)
