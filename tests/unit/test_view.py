"""`avatar view` without a browser: who may see what, and runs in every state of repair."""

from __future__ import annotations

import io
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from starlette.testclient import TestClient

from avatar_rl.cluster.cli import main
from avatar_rl.cluster.view.export import export, on_disk
from avatar_rl.cluster.view.media import MediaShelf, MissingMediaError, clip_of
from avatar_rl.cluster.view.resources import NoSuchResourceError, Resources
from avatar_rl.cluster.view.server import application, listen, new_token
from avatar_rl.cluster.view.terminal import show, spark
from avatar_rl.common.errors import ConfigError, DataError, ResourceError
from tests.view_runs import HOSTILE, make_run, sample, write_lines

TOKEN = "t" * 40
PLACE = "http://127.0.0.1:1"


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    file = tmp_path / "media" / "a.mp4"
    file.parent.mkdir()
    file.write_bytes(bytes(range(256)) * 8)
    return file


@pytest.fixture
def run(tmp_path: Path, clip: Path) -> Path:
    return make_run(tmp_path / "runs", steps=1, media=[{"kind": "video", "uri": str(clip)}])


@pytest.fixture
def resources(run: Path) -> Resources:
    return Resources(run.parent)


@pytest.fixture
def client(resources: Resources) -> Iterator[TestClient]:
    app = application(resources, token=TOKEN, host="127.0.0.1", cookie="c")
    with TestClient(app, base_url=PLACE, follow_redirects=False) as client:
        yield client


def signed_in(client: TestClient) -> TestClient:
    client.cookies.set("c", TOKEN)
    return client


# -- who may see it


def test_without_the_token_nothing_is_shown(client: TestClient) -> None:
    for path in ("/", "/data/runs.json", "/static/core.js", "/media/demo-1/x/file", "/report/x"):
        answer = client.get(path)
        assert answer.status_code == 401 and "token is missing" in answer.text
    assert client.get("/?token=wrong").status_code == 403
    client.cookies.set("c", "wrong")
    assert client.get("/").status_code == 401


def test_the_token_becomes_a_cookie_that_scripts_cannot_read(client: TestClient) -> None:
    answer = client.get(f"/?token={TOKEN}&a=b")
    assert (answer.status_code, answer.headers["location"]) == (303, "/?a=b")
    assert (
        "HttpOnly" in answer.headers["set-cookie"]
        and "SameSite=lax" in (answer.headers["set-cookie"])
    )
    page = client.get("/")
    assert page.status_code == 200 and TOKEN not in page.text
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy


def test_another_name_of_this_machine_is_refused(client: TestClient) -> None:
    signed_in(client)
    for host in ("evil.example", "evil.example:1", "127.0.0.1.evil.example", ""):
        assert client.get("/", headers={"host": host}).status_code == 421
    for host in ("localhost:9000", "[::1]:1", "127.0.0.1"):
        assert client.get("/", headers={"host": host}).status_code == 200


def test_nothing_can_be_changed_and_no_other_host_is_led_to(client: TestClient) -> None:
    assert client.post("/", headers={"cookie": f"c={TOKEN}"}).status_code == 405
    answer = client.get(f"{PLACE}//evil.example/x?token={TOKEN}")
    assert answer.headers["location"] == "/evil.example/x"


def test_a_token_of_ones_own_has_to_be_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AVATAR_VIEW_TOKEN", raising=False)
    assert len(new_token()) >= 40 and new_token() != new_token()
    monkeypatch.setenv("AVATAR_VIEW_TOKEN", "short")
    with pytest.raises(ConfigError, match="at least 16"):
        new_token()
    monkeypatch.setenv("AVATAR_VIEW_TOKEN", "long enough to be one")
    assert new_token() == "long enough to be one"


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=rf"127.0.0.1:{port}.*--port 0"):
            listen("127.0.0.1", port)


# -- what is given out


def test_only_runs_of_the_folder_have_a_name(client: TestClient, tmp_path: Path) -> None:
    make_run(tmp_path, "outside")
    signed_in(client)
    for name in ("run/../outside", "run/..", "run/%2e%2e", "run/nothing", "run/demo-1/group/a/0"):
        assert client.get(f"/data/{name}.json").status_code == 404
    resources = Resources(tmp_path / "runs")
    for name in ("../outside", "..", ".", "", "a/b", "\0"):
        with pytest.raises(NoSuchResourceError):
            resources.folder(name)
    assert client.get("/static/../server.py").status_code == 404


def test_media_come_in_ranges_and_only_those_that_samples_name(
    client: TestClient, clip: Path
) -> None:
    signed_in(client)
    document = client.get("/data/run/demo-1/group/step_000001/0.json").json()
    key = document["media"][0]["key"]
    whole = client.get(f"/media/demo-1/{key}/file")
    assert whole.content == clip.read_bytes() and whole.headers["content-type"] == "video/mp4"
    part = client.get(f"/media/demo-1/{key}/file", headers={"range": "bytes=300-303"})
    assert (part.status_code, part.content) == (206, clip.read_bytes()[300:304])
    assert part.headers["content-range"] == f"bytes 300-303/{clip.stat().st_size}"
    assert client.get(f"/media/demo-1/{'0' * 20}/file").status_code == 404
    broken = client.get(f"/media/demo-1/{key}/frame-0.jpg")  # it is no video at all
    assert broken.status_code == 404 and str(clip) in broken.text


def test_a_server_that_has_just_begun_knows_the_media_too(
    client: TestClient, resources: Resources
) -> None:
    [found] = resources.all_clips(resources.folder("demo-1"))
    assert signed_in(client).get(f"/media/demo-1/{found.key}/file").status_code == 200


def test_a_sample_cannot_have_any_file_given_out(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    link = tmp_path / "link.mp4"
    link.symlink_to(secret)
    os.mkfifo(tmp_path / "pipe.mp4")
    for uri in (secret, link, tmp_path / "pipe.mp4", "/etc/passwd", tmp_path):
        clip = clip_of({"kind": "video", "uri": str(uri)})
        assert clip is not None
        with pytest.raises(MissingMediaError):
            MediaShelf().find(clip)
    assert clip_of({"kind": "video"}) is None and clip_of("x") is None
    remote = clip_of({"kind": "video", "uri": "https://example.org/a.mp4"})
    assert remote is not None and "path only" in str(MediaShelf().describe(remote)["error"])


def test_a_playlist_under_the_name_of_a_clip_opens_nothing(tmp_path: Path) -> None:
    file = tmp_path / "list.mp4"
    file.write_text("#EXTM3U\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n")
    clip = clip_of({"kind": "video", "uri": str(file)})
    assert clip is not None
    assert "is a playlist (HLS)" in str(MediaShelf().describe(clip)["error"])


def test_the_roots_of_the_recipe_hold_here_too(run: Path, clip: Path) -> None:
    (run / "config.yaml").write_text(f"data: {{media: {{roots: [{run}]}}}}\n")
    group = Resources(run.parent).get("run/demo-1/group/step_000001/0")
    assert isinstance(group, dict)
    assert "lies outside data.media.roots" in str(group["media"])
    (run / "config.yaml").write_text(f"data: {{media: {{roots: [{clip.parent}]}}}}\n")
    group = Resources(run.parent).get("run/demo-1/group/step_000001/0")
    assert "lies outside" not in str(group)


def test_media_that_moved_are_looked_for_and_the_places_named(run: Path, clip: Path) -> None:
    moved = run.parent.parent / "elsewhere" / "media" / clip.name
    moved.parent.mkdir(parents=True)
    clip.rename(moved)
    item = clip_of({"kind": "video", "uri": str(clip)})
    assert item is not None
    assert MediaShelf([moved.parents[1]]).find(item) == moved.resolve()
    other = run.parent
    with pytest.raises(MissingMediaError) as caught:
        MediaShelf([other]).find(item)
    said = str(caught.value)
    assert str(clip) in said and str(other / "media" / clip.name) in said and "--media" in said


# -- what is read


def table_of(resources: Resources) -> dict[str, list[object]]:
    found = resources.get("run/demo-1/rollouts")
    assert isinstance(found, dict)
    return found  # type: ignore[return-value]


def test_the_table_has_every_completion_with_its_marks(resources: Resources) -> None:
    table = table_of(resources)
    columns = [str(name) for name in table["columns"]]
    rows = [dict(zip(columns, row, strict=True)) for row in table["rows"]]  # type: ignore[call-overload]
    assert len(rows) == 5 * 8 + 3
    training = [row for row in rows if not row["flags"] & 128]
    for row in training:
        group = row["group"]
        wanted = sample(int(table["files"][row["file"]][1]), group, row["row"])  # type: ignore[index]
        assert row["reward"] == wanted["reward"] and row["tier"] == wanted["tier"]
        assert bool(row["flags"] & 1) == (group == 3)
        assert bool(row["flags"] & 2) == (row["row"] >= 4)
        assert bool(row["flags"] & 8) == (group == 2)
        assert bool(row["flags"] & 16) == (group == 4)
        assert bool(row["flags"] & 64) == (row["row"] == 7)
        assert wanted["text"].startswith(row["snippet"])  # type: ignore[attr-defined]
    texts = resources.get("run/demo-1/texts")
    assert isinstance(texts, list) and len(texts) == len(rows)
    steps = resources.get("run/demo-1/steps")
    assert isinstance(steps, list) and len(steps) == 2


def test_samples_of_an_older_release_still_show(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", steps=1)
    keys = ("prompt_id", "category", "needs", "question", "answer", "text", "reward", "accuracy")
    rows = [
        {key: sample(1, group, member)[key] for key in keys} | {"reward": float(group and member)}
        for group in range(2)
        for member in range(3)
    ]
    write_lines(run / "samples" / "step_000001.jsonl", rows)
    resources = Resources(run.parent)
    table = table_of(resources)
    shown = [row for row in table["rows"] if not int(row[7]) & 128]  # type: ignore[index]
    assert [(row[1], row[2]) for row in shown] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]  # type: ignore[index]
    assert [bool(row[7] & 16) for row in shown] == [True] * 3 + [False] * 3  # type: ignore[index]
    group = resources.get("run/demo-1/group/step_000001/1")
    assert isinstance(group, dict) and group["media"] == []


def test_a_torn_or_foreign_folder_shows_what_is_whole(run: Path) -> None:
    whole = len(table_of(Resources(run.parent))["rows"])
    file = run / "samples" / "step_000001.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    lines[3], lines[5] = b"{torn\n", b"[1, 2]\n"
    lines[6] = b'{"text": "\xff\xfe", "reward": 1}\n'
    lines[7] = b'{"reward": {"not": "a number"}}\n'
    file.write_bytes(b"".join(lines) + b'{"text": "being wri')
    with (run / "metrics.jsonl").open("ab") as metrics:
        metrics.write(b'no json\n7\n{"reward/mean": 1}\n{"step": 2, "rew')
    (run / "events.jsonl").write_bytes(b"\xff\n")
    (run / "config.yaml").write_bytes(b"a: [unclosed")
    (run / "samples" / "step_x.jsonl").write_text("")
    resources = Resources(run.parent)
    assert len(table_of(resources)["rows"]) == whole - 4
    document = resources.get("run/demo-1")
    assert isinstance(document, dict)
    said = "\n".join(str(fault) for fault in document["faults"])  # type: ignore[union-attr]
    for words in (
        "line 4",
        "line 6",
        "metrics.jsonl: line 3 is not JSON",
        "events.jsonl",
        "config.yaml",
    ):
        assert words in said
    assert "being wri" not in said
    (run / "status.json").write_text("{")
    listed = resources.get("runs")
    assert isinstance(listed, dict)
    assert listed["runs"] == [] and "status.json is not a run's status" in str(listed["damaged"])


def test_fields_of_another_type_are_left_out(run: Path) -> None:
    whole = sample(1, 0, 0, tokens=3)
    bad: dict[str, object] = {
        "text": whole["text"],
        "options": "ABC",
        "media": {"kind": "video"},
        "details": [1],
        "versions": 3,
        "hint": None,
        "token_ends": [1, 99_999, 2],
        "logprobs": [1],
    }
    rows = [whole, {**whole, **bad}, {"text": "x", "token_ends": ["1"]}, {"hinted": False}]
    write_lines(run / "samples" / "step_000001.jsonl", [{**row, "group": "g"} for row in rows])
    document = Resources(run.parent).get("run/demo-1/group/step_000001/0")
    assert isinstance(document, dict)
    first, second, third, last = document["rows"]  # type: ignore[misc]
    assert first == {**whole, "group": "g"}
    assert second.keys() == first.keys() - bad.keys() - {"log_ratio", "entropy", "weight"} | {
        "text"
    }  # type: ignore[union-attr]
    assert third == {"text": "x", "group": "g"}
    assert last == {"text": "", "group": "g", "hinted": False}
    assert show(run, Console(file=io.StringIO())) == 0


def test_a_run_without_any_file_yet_is_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", steps=0, state="setting up")
    for file in [*run.glob("samples/*"), run / "metrics.jsonl", run / "config.yaml"]:
        file.unlink()
    (run / "events.jsonl").unlink()
    (run / "samples").rmdir()
    resources = Resources(run.parent)
    assert table_of(resources)["rows"] == []
    document = resources.get("run/demo-1")
    assert isinstance(document, dict) and document["faults"] == [] and document["curves"] == {}


def test_a_document_is_sent_again_only_when_it_has_changed(client: TestClient, run: Path) -> None:
    signed_in(client)
    first = client.get("/data/run/demo-1.json")
    again = {"if-none-match": first.headers["etag"]}
    assert client.get("/data/run/demo-1.json", headers=again).status_code == 304
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 5, "reward/mean": NaN}\n')
    changed = client.get("/data/run/demo-1.json", headers=again)
    assert changed.status_code == 200
    assert changed.json()["curves"]["reward/mean"][-1] == [5, None]


def test_a_long_curve_is_thinned_to_its_ends(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", steps=1)
    write_lines(run / "metrics.jsonl", [{"step": i, "loss/total": i * 0.5} for i in range(5000)])
    document = Resources(run.parent).get("run/demo-1")
    assert isinstance(document, dict)
    points = document["curves"]["loss/total"]  # type: ignore[index,call-overload]
    assert len(points) == 600 and points[0] == [0, 0] and points[-1] == [4999, 2499.5]


# -- terminal and export


def test_a_terminal_is_told_and_not_ruled_by_what_it_shows(run: Path) -> None:
    rows = [sample(9, 0, member) for member in range(2)]
    rows[0] |= {"text": HOSTILE, "question": HOSTILE, "hint": HOSTILE, "answer": HOSTILE}
    del rows[0]["token_ends"]
    ends = [len(HOSTILE) // 2, len(HOSTILE)]
    rows[1] |= {"text": HOSTILE, "token_ends": ends, "weight": [1.0, 1.3], "advantage": 0.5}
    write_lines(run / "samples" / "step_000009.jsonl", rows)
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="truecolor", width=160)
    assert show(run, console) == 0
    said = out.getvalue()
    assert "\x1b[2J" not in said and "\x1b]0" not in said and "\u202e" not in said
    assert "\\x1b[2J" in said and "[red]" in said and "step 9" in said


def test_a_curve_in_letters() -> None:
    assert spark([0.0, 0.5, 1.0]) == "▁▅█" or spark([0.0, 0.5, 1.0]) == "▁▄█"
    assert spark([2.0, 2.0]) == "▁▁" and len(spark([float(i) for i in range(999)])) == 40


def test_an_export_holds_each_document_and_clip(run: Path, clip: Path, tmp_path: Path) -> None:
    odd = run.rename(run.parent / "odd 'name' %41 é")
    page = export(Resources(run.parent), tmp_path / "out", say=lambda _: None)
    assert 'data-mode="files"' in page.read_text()
    stem = tmp_path / "out" / "data" / "run" / on_disk(odd.name)
    text = (stem / "group" / "step_000001" / "0.js").read_text()
    name, document = json.loads("[" + text.removeprefix("AV.deliver(").removesuffix(");\n") + "]")
    assert name == f"run/{odd.name}/group/step_000001/0"
    key = document["media"][0]["key"]
    assert (tmp_path / "out" / "media" / key / "file.mp4").read_bytes() == clip.read_bytes()
    with pytest.raises(DataError, match="already holds something"):
        export(Resources(run.parent), tmp_path / "out", say=lambda _: None)
    with pytest.raises(ConfigError, match="no run"):
        export(Resources(tmp_path / "media"), tmp_path / "more", say=lambda _: None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing"], "nothing does not exist; newest below"),
        (["--folder", "no/such"], "there is no folder no/such"),
        (["--terminal"], "takes one run"),
    ],
)
def test_the_command_says_what_it_lacks(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["view", *words]) == 1
    assert said in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["view", str(tmp_path)]) == 1
    assert "is no run: it has no status.json" in capsys.readouterr().err
