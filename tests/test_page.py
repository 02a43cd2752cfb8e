"""The page over HTTP: who sees what, whatever is called; and its handlers as plain functions."""

from __future__ import annotations

import io
import json
import socket
import stat
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lab.errors import LabError
from lab.methods import METHODS
from lab.runs import Store
from lab.ui import choices, comparison, discover, examples, limits, owner, rendering, runs, settings, setup, subject
from lab.ui.drafts import Drafts
from tests.page_server import Visitor, finish, form, pictures, served, ticked

MARKUP = "<img src=x onerror=alert(1)>"
SPEC = {
    "class_word": "fox",
    "steps": 3,
    "seeds": [0, 1],
    "sample_seeds": [0],
    "prompts": ["a {subject} in the snow", "a {subject}"],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="module")
def page(home: Path) -> Iterator[str]:
    patch = pytest.MonkeyPatch()
    patch.setenv("LAB_MIN_FREE_MB", "0")
    for module in (subject, runs):  # nothing is trained here
        patch.setattr(module, "ensure_worker", lambda _: 0)
    with served(home) as address:
        yield address
    patch.undo()


@pytest.fixture
def store(home: Path, page: str) -> Store:
    return Store(home)


@pytest.fixture
def alice(page: str, home: Path) -> Visitor:
    return Visitor(page, home)


@pytest.fixture
def bob(page: str, home: Path) -> Visitor:
    return Visitor(page, home)


def submitted(store: Store, visitor: Visitor, done: bool = True, **spec: Any) -> str:
    cid = store.submit(visitor.owner, "subject", SPEC | spec, pictures())
    for run in store.comparison(visitor.owner, cid).runs if done else ():
        finish(run, store)
    return cid


def files(store: Store, visitor: Visitor, cid: str) -> list[str]:
    """Every kind of address that a finished comparison has."""
    run = store.comparison(visitor.owner, cid).runs[1]
    made = [f"/files/comparisons/{cid}/{kind}" for kind in ("grid", "table", "report", "inputs/0")]
    return made + [f"/files/runs/{run.id}/{kind}" for kind in ("preview", "adapter", "log", "samples/0/0")]


# -- owners --------------------------------------------------------------------------------------------
def test_page_gives_one_signed_cookie_that_scripts_cannot_read(page: str, home: Path, alice: Visitor) -> None:
    given = alice.http.get("/", cookies=None).headers.get("set-cookie")
    assert given is None  # alice has hers already
    fresh = Visitor(page, home, cookie=None).http.get("/").headers["set-cookie"]
    assert "HttpOnly" in fresh
    assert "SameSite=Lax" in fresh
    assert stat.S_IMODE((home / "secret").stat().st_mode) == 0o600


def test_secure_cookie_behind_https_and_partitioned_in_a_frame() -> None:
    middleware = owner.OwnerCookie(None, owner.Owners(b"key"), framed=True)
    assert "SameSite=None; Secure; Partitioned" in middleware._cookie(secure=True)
    assert "SameSite=Lax" in middleware._cookie(secure=False)
    assert middleware._secure({"scheme": "http"}, {"x-forwarded-proto": "https, http"})


def test_owners_are_unguessable_and_tokens_cannot_be_made_up() -> None:
    owners = owner.Owners(b"key")
    tokens = [owners.new() for _ in range(50)]
    names = {owners.check(token) for token in tokens}
    assert len(names) == 50
    assert None not in names
    for forged in ("", None, "a", "a.b", tokens[0][:-1], "x" + tokens[0], owner.Owners(b"other").new(), "ä.ß"):
        assert owners.check(forged) is None


def test_handler_without_a_cookie_does_nothing(page: str, home: Path, store: Store) -> None:
    for cookie in (None, "somebody.signature"):
        stranger = Visitor(page, home, cookie=cookie)
        answer = stranger.call("list_runs", ["", "", "", None])
        assert not answer["success"]
        assert "cookie" in answer["output"]["error"]


def test_post_from_another_site_is_refused(alice: Visitor) -> None:
    body = {"data": [], "fn_index": 0, "session_hash": "x"}
    refused = alice.http.post("/gradio_api/queue/join", json=body, headers={"Sec-Fetch-Site": "cross-site"})
    assert refused.status_code == 403


def test_uploads_need_an_owner_and_have_a_size_an_hour(page: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = Visitor(page, home, cookie=None)
    assert nobody.http.post("/gradio_api/upload", files={"files": b"x"}).status_code == 403
    monkeypatch.setenv("LAB_MAX_HOURLY_UPLOADS_MB", "1")
    now = [0.0]
    limit = limits.UploadLimits(None, owner.Owners(b"key"), clock=lambda: now[0])
    assert limit._judge("erin", "600000") == (0, "")
    assert limit._judge("erin", "600000")[0] == 429
    assert limit._judge("frank", "600000") == (0, "")
    assert limit._judge("erin", "")[0] == 411
    now[0] = 3601.0
    assert limit._judge("erin", "600000") == (0, "")
    assert set(limit.sent) == {"erin"}  # who has not sent for an hour is forgotten


# -- isolation -----------------------------------------------------------------------------------------
def test_files_are_their_owners_alone(page: str, home: Path, store: Store, alice: Visitor, bob: Visitor) -> None:
    cid = submitted(store, alice)
    missing = bob.http.get("/files/comparisons/0123456789abcdef01234567/grid")
    for address in files(store, alice, cid):
        assert alice.http.get(address).status_code == 200, address
        for stranger in (bob, Visitor(page, home, cookie=None), Visitor(page, home, cookie=f"{alice.owner}.forged")):
            assert stranger.http.get(address).status_code == 404, address
        if address.startswith("/files/comparisons"):
            assert bob.http.get(address).text == missing.text  # no telling that it exists


def test_files_are_what_they_say(store: Store, alice: Visitor) -> None:
    cid = submitted(store, alice)
    grid, table, report, _, _, adapter, log, _ = (alice.http.get(a) for a in files(store, alice, cid))
    assert Image.open(io.BytesIO(grid.content)).format == "PNG"
    assert "trainable_parameters" in table.text.splitlines()[0]
    assert "sandbox" in report.headers["content-security-policy"]
    names = zipfile.ZipFile(io.BytesIO(adapter.content)).namelist()
    assert sorted(n.rsplit("/", 1)[1] for n in names) == ["adapter_config.json", "adapter_model.safetensors"]
    assert "step 2" in log.text


@pytest.mark.parametrize(
    "address",
    [
        "/files/runs/..%2f..%2fsecret/preview",
        "/files/comparisons/..%2f..%2f/grid",
        "/files/drafts/..%2f..%2fsecret.png",
        "/files/examples/..%2f..%2f/0",
        "/files/examples/fox/-1",
        "/files/runs/x/samples/..%2f/0",
        "/gradio_api/file=lab.db",
        "/gradio_api/file={home}/secret",
        "/gradio_api/file={home}/lab.db",
        "/gradio_api/file={root}/lab/ui/owner.py",
    ],
)
def test_no_address_leads_out(address: str, home: Path, alice: Visitor) -> None:
    root = Path(__file__).resolve().parents[1]
    answer = alice.http.get(address.format(home=home, root=root))
    assert answer.status_code in (403, 404, 422), answer.text[:100]


def test_comparison_opens_for_its_owner_only(store: Store, alice: Visitor, bob: Visitor) -> None:
    cid = submitted(store, alice)
    for visitor, sees in ((alice, True), (bob, False)):
        visitor.call("land", [], query=f"?tab=subject&comparison={cid}")
        answer = json.dumps(visitor.call("show", [None])["output"]["data"])
        assert ("sks fox" in answer) is sees
        assert (cid in answer) is sees
        assert ("not found" in answer) is not sees


def test_strangers_cannot_cancel_retry_delete_or_read_logs(store: Store, alice: Visitor, bob: Visitor) -> None:
    cid = submitted(store, alice, done=False)
    run = store.comparison(alice.owner, cid).runs[1]
    bob.call("land", [], query=f"?comparison={cid}")
    attempts = [
        bob.call("act", [None], {"do": "cancel-all"}),
        bob.call("act_1", [None], {"do": "cancel", "id": run.id}),
        bob.call("clicked", [None], {"do": "cancel", "id": run.id}),
        bob.call("clicked", [None], {"do": "delete", "id": cid}),
        bob.call("clicked", [None], {"do": "open", "id": cid}),
    ]
    for answer in attempts:
        assert not answer["success"]
        assert "not found" in answer["output"]["error"]
    assert {r.state for r in store.comparison(alice.owner, cid).runs} == {"queued"}
    bob.call("clicked", [None], {"do": "log", "id": run.id})
    listing = bob.call("list_runs", ["", "", "", None])["output"]["data"]
    assert run.id not in json.dumps(listing)
    assert alice.call("clicked", [None], {"do": "delete", "id": cid})["success"]
    assert cid not in [c.id for c in store.comparisons(alice.owner)]


def test_drafts_are_their_owners_alone(home: Path, alice: Visitor, bob: Visitor) -> None:
    kept = Drafts(home, alice.owner).add(pictures()[0])
    assert alice.http.get(f"/files/drafts/{kept['id']}.png").status_code == 200
    assert bob.http.get(f"/files/drafts/{kept['id']}.png").status_code == 404
    with pytest.raises(LabError, match="not there any more"):
        setup.submit(Store(home), bob.owner, form(pictures=[kept] * 3))


def test_a_typed_path_is_not_an_upload(home: Path, alice: Visitor) -> None:
    outside = ["/etc/passwd", home / "secret", examples.FOLDER / "fox" / "0.png", examples.FOLDER / "fox" / "0.txt"]
    for path in [*map(str, outside), "http://127.0.0.1:9/x.png", "https://example.org/x.png"]:
        typed = {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "x.png"}
        answer = alice.call("added", [[typed], []])
        assert not answer["success"], path


def test_an_upload_becomes_a_picture_of_the_draft(alice: Visitor) -> None:
    buffer = io.BytesIO()
    pictures()[0].save(buffer, "PNG")
    (path,) = alice.http.post("/gradio_api/upload", files={"files": ("owl.png", buffer.getvalue())}).json()
    sent = {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "owl.png"}
    kept, notice, _ = alice.call("added", [[sent], []])["output"]["data"]
    assert notice == ""
    assert alice.http.get(f"/files/drafts/{kept[0]['id']}.png").status_code == 200


def test_train_over_http(store: Store, home: Path, alice: Visitor) -> None:
    drafts = Drafts(home, alice.owner)
    values = form(pictures=[drafts.add(picture) for picture in pictures()])
    answer = alice.call("train", list(values.values()))
    assert answer["success"]
    found = store.comparisons(alice.owner)[0]
    assert [r.method for r in found.runs] == ["base", "lora", "nora", "lora", "nora"]
    shown = json.dumps(alice.call("show", [None])["output"]["data"])
    assert found.id in shown
    assert "number " in shown  # its place in the queue


def test_taken_port_is_one_sentence(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [sys.executable, "app.py", "--host", "127.0.0.1", "--port", str(taken.getsockname()[1])]
        root = Path(__file__).resolve().parents[1]
        ended = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert "cannot be used" in ended.stderr
    assert ended.stderr.count("\n") == 1


# -- markup --------------------------------------------------------------------------------------------
def test_what_a_visitor_types_is_never_markup(store: Store, alice: Visitor) -> None:
    words = {"class_word": MARKUP[:60], "trigger": MARKUP[:40], "prompts": [MARKUP, "a {subject}"]}
    cid = submitted(store, alice, **words)
    found = store.comparison(alice.owner, cid)
    shown = comparison.contents(store, alice.owner, found, comparison.chosen(found, {}))
    text = "".join(v for v in shown.values() if isinstance(v, str))
    text += runs.list_html(store, alice.owner, MARKUP, "", "")[0]
    text += runs.list_html(store, alice.owner, "", "", "")[0] + setup.notices([MARKUP])
    text += setup.summarise(form(class_word=MARKUP, picker=ticked(MARKUP)))
    assert "&lt;img src=x" in text
    assert "<img src=x" not in text
    answer = alice.call("clicked_1", [], {"id": MARKUP})
    assert "<img" not in answer["output"]["error"]


# -- what is shown ---------------------------------------------------------------------------------------
def test_only_what_changed_is_sent(store: Store, alice: Visitor) -> None:
    found = store.comparison(alice.owner, submitted(store, alice))
    pick = comparison.chosen(found, {"left": "nothing", "picture_seed": 99})
    assert (pick["left"], pick["picture_seed"], pick["right"]) == ("base", 0, "nora")
    now = comparison.contents(store, alice.owner, found, pick)
    first, marks = comparison.updates(now, {})
    again, _ = comparison.updates(now, marks)
    assert all(update == {"__type__": "update"} for update in again)
    assert not any(update == {"__type__": "update"} for update in first)


def test_failed_run_shows_its_sentence_and_its_log(store: Store, alice: Visitor) -> None:
    cid = submitted(store, alice, done=False)
    run = store.comparison(alice.owner, cid).runs[1]
    run.folder.mkdir(parents=True)
    (run.folder / "log.txt").write_text("the last <line>\n")
    store._table.write("UPDATE runs SET state = 'failed', message = 'The loss became NaN.' WHERE id = ?", run.id)
    found = store.comparison(alice.owner, cid)
    text = comparison.contents(store, alice.owner, found, comparison.chosen(found, {}))["failures"]
    assert "LoRA, seed 0, failed: The loss became NaN." in text
    assert "the last &lt;line&gt;" in text


def test_grid_has_a_cell_for_every_column_and_prompt(store: Store, alice: Visitor) -> None:
    found = store.comparison(alice.owner, submitted(store, alice))
    html = rendering.grid(found, 1, 0)
    assert html.count("data-zoom ") == 2 * 3
    assert html.count('alt="Base model: a fox in the snow, picture seed 0"') == 1  # without the trigger
    assert "training seed 1" in html
    assert rendering.over(found, "lora", "nora", 1, 0, 0).count("<img") == 2


def test_runs_are_filtered(store: Store, alice: Visitor) -> None:
    submitted(store, alice, class_word="heron")
    submitted(store, alice, done=False, class_word="otter")
    assert "sks heron" not in runs.list_html(store, alice.owner, "otter", "", "")[0]
    assert "sks otter" not in runs.list_html(store, alice.owner, "", "done", "")[0]
    assert "Nothing matches" in runs.list_html(store, alice.owner, "no such words", "", "")[0]
    assert "No runs yet" in runs.list_html(store, "nobody", "", "", "")[0]


def test_counts_follow_the_settings() -> None:
    base, targets = settings.DEFAULT_BASE, "attn"
    small, large = (choices.counts(base, targets, ticked(nora={"r_inner": r}))["nora"]["n"] for r in (2, 4))
    assert large == 2 * small
    wrong = choices.counts(base, targets, ticked(nora={"r_outer": 10**6}))["nora"]
    assert wrong["n"] is None
    assert "r_outer" in wrong["error"]


def test_every_method_has_a_card_and_a_drawing() -> None:
    from lab.ui import methods

    for method in METHODS:
        assert "<svg" in methods.full(method.id)[2]
        assert method.equation in methods.latex(method)
    assert "Nothing matches" in methods.table("zzzz", "")
    with pytest.raises(LabError, match="Unknown method"):
        methods.full("zzzz")


def test_tabs_are_found() -> None:
    assert {"subject", "runs", "methods"} <= {tab.id for tab in discover()}
