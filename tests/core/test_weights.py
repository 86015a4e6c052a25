"""Trained weights: from which place, the lock of the first use, what is imported, and models that load them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from saccade import create_model, load
from saccade.core import weights as store
from saccade.core.card import Weights
from saccade.core.errors import SaccadeError
from saccade.core.index import index, paper_module
from saccade.core.origin import of_model
from tests.core.test_download import CONTENT, HASH, Handler, server  # noqa: F401  a fixture

Publish = Callable[..., Weights]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SACCADE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def publish(monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Gives a model weights, as its card would."""

    def run(source: str, name: str = "swin_nano", **facts: Any) -> Weights:
        entry = {"source": source, "img_size": 32, **facts}
        monkeypatch.setitem(index()["papers"][index()["models"][name]]["weights"], name, entry)
        return store.published(name)

    return run


def error(name: str = "swin_nano") -> str:
    with pytest.raises(SaccadeError) as caught:
        store.weights_file(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def locks(cache: Path) -> Any:
    return json.loads((cache / store.LOCK).read_text())


def test_pretrained_loads_every_entry(publish: Publish, tmp_path: Path) -> None:
    torch.manual_seed(3)
    reference = create_model("swin_nano").eval()
    save_file(reference.state_dict(), tmp_path / "ours.safetensors")
    publish((tmp_path / "ours.safetensors").as_uri())
    model = create_model("swin_nano", pretrained=True).eval()
    assert model.load_report.loaded == model.load_report.of
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(image), reference(image))
    assert create_model("swin_nano", pretrained=True, num_classes=3, fresh=("head.*",)).load_report.fresh
    with pytest.raises(SaccadeError, match="fresh"):
        create_model("swin_nano", pretrained=True, num_classes=3)


def test_pretrained_in_timm_names(publish: Publish, tmp_path: Path) -> None:
    """What a `timm:` source gives goes through the key map: stages are `layers` there, downsampling comes first."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False).eval()
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    publish((tmp_path / "model.safetensors").as_uri(), "swin_tiny", layout="timm", img_size=224)
    model = create_model("swin_tiny", pretrained=True).eval()
    assert model.load_report.format == "timm"
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(model(image), theirs(image), rtol=1e-4, atol=1e-5)


def test_no_source_is_an_error_and_never_random_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SaccadeError, match="convnext_nano: no address of trained weights is known"):
        create_model("convnext_nano", pretrained=True)


def test_a_checkpoint_that_lacks_an_entry_is_an_error(publish: Publish, tmp_path: Path) -> None:
    state = create_model("swin_nano").state_dict()
    del state["stem.proj.bias"]
    save_file(state, tmp_path / "less.safetensors")
    publish((tmp_path / "less.safetensors").as_uri())
    with pytest.raises(SaccadeError, match="stem.proj.bias"):
        create_model("swin_nano", pretrained=True)


@pytest.mark.parametrize("path", ["/model.pth", "/moved/model.pth", "/slow/model.pth", "/unknown/model.pth"])
def test_the_first_use_is_locked(server: str, publish: Publish, cache: Path, path: str) -> None:  # noqa: F811
    publish(server + path)
    assert store.cached_file("swin_nano") is None
    found = store.weights_file("swin_nano")
    assert found.read_bytes() == CONTENT and found == store.cached_file("swin_nano")
    lock = locks(cache)[server + path]
    assert (lock["sha256"], lock["bytes"]) == (HASH, len(CONTENT)) and len(lock["first_used"]) == 10
    asked = len(Handler.asked)
    assert store.weights_file("swin_nano") == found and len(Handler.asked) == asked


def test_another_file_at_the_same_address_is_an_error(publish: Publish, tmp_path: Path, cache: Path) -> None:
    source = tmp_path / "model.pth"
    source.write_bytes(CONTENT)
    publish(source.as_uri())
    found = store.weights_file("swin_nano")
    found.unlink()
    source.write_bytes(b"others put something else there")
    message = error()
    assert HASH in message and "at its first use on 20" in message and store.LOCK in message
    assert not found.exists() and locks(cache)[source.as_uri()]["sha256"] == HASH
    source.write_bytes(CONTENT)
    found = store.weights_file("swin_nano")
    found.write_bytes(b"spoiled in the cache")
    assert "removed" in error() and store.weights_file("swin_nano").read_bytes() == CONTENT


def test_hash_and_size_of_the_card(server: str, publish: Publish, cache: Path) -> None:  # noqa: F811
    publish(f"{server}/model.pth", sha256="0" * 64)
    assert "0" * 64 in error() and "first use" not in error() and not (cache / store.LOCK).exists()
    publish(f"{server}/model.pth", sha256=HASH.upper(), bytes=len(CONTENT) + 1)
    assert f"has {len(CONTENT)} bytes, not {len(CONTENT) + 1}" in error() and not (cache / store.LOCK).exists()
    publish(f"{server}/model.pth", sha256=HASH.upper(), bytes=len(CONTENT))
    assert store.weights_file("swin_nano").read_bytes() == CONTENT


def test_first_digits_of_a_hash(publish: Publish, tmp_path: Path, cache: Path) -> None:
    source = tmp_path / f"model-{HASH[:8]}.pth"
    source.write_bytes(b"other")
    publish(source.as_uri(), sha256=HASH[:8])
    assert f"not {HASH[:8]}" in error() and not (cache / store.LOCK).exists()
    source.write_bytes(CONTENT)
    assert store.weights_file("swin_nano").read_bytes() == CONTENT
    assert locks(cache)[source.as_uri()]["sha256"] == HASH
    store.weights_file("swin_nano").write_bytes(b"spoiled")
    assert HASH in error()  # from now on it must be the whole hash


def test_models_share_a_source_only_where_they_share_the_file() -> None:
    sources = [store.published(name).source for name in store.list_weights() if name != "ats_deit_small"]
    assert len(sources) == len(set(sources))


def test_mirrors_in_turn(server: str, publish: Publish, cache: Path) -> None:  # noqa: F811
    mirrors = (f"{server}/cut/model.pth", f"{server}/page/model.pth", f"{server}/model.pth")
    publish(f"{server}/absent.pth", mirrors=mirrors)
    assert store.weights_file("swin_nano").read_bytes() == CONTENT
    assert locks(cache)[f"{server}/absent.pth"]["sha256"] == HASH
    asked = len(Handler.asked)
    store.weights_file("swin_nano")
    assert len(Handler.asked) == asked  # what is here is not looked for elsewhere
    publish(f"{server}/lost.pth", mirrors=(f"{server}/page/model.pth.tar",))
    message = error()
    assert message.startswith("swin_nano: ") and "404" in message and "a page" in message


def test_a_wrong_mirror_is_not_passed_over(server: str, publish: Publish, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "model.pth").write_bytes(b"other")
    publish(f"{server}/absent.pth", sha256=HASH, mirrors=((tmp_path / "model.pth").as_uri(), f"{server}/model.pth"))
    assert "its sha256 is" in error()


def test_cut_off_and_gone_on_with(server: str, publish: Publish) -> None:  # noqa: F811
    publish(f"{server}/cut/model.pth")
    assert "cut off at 600000" in error()
    assert store.weights_file("swin_nano").read_bytes() == CONTENT
    assert Handler.asked[-1] == ("/cut/model.pth", "bytes=600000-")


def test_a_damaged_lock_is_told(publish: Publish, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "model.pth").write_bytes(CONTENT)
    publish((tmp_path / "model.pth").as_uri())
    cache.mkdir()
    for content in ("{", "[]", '{"a": 3}'):
        (cache / store.LOCK).write_text(content)
        assert "damaged" in error()


def test_import_takes_what_the_user_downloaded(publish: Publish, tmp_path: Path, cache: Path) -> None:
    torch.manual_seed(5)
    state = create_model("swin_nano").state_dict()
    file = tmp_path / "swin_nano_authors.pth"
    torch.save({"model": state}, file)
    publish("https://drive.google.com/file/d/1a2b3c/view")
    assert "is a page: download it in a browser" in error()
    with pytest.raises(SaccadeError, match="is the file of 0 models; say which with --model"):
        store.import_weights(file)
    name, path = store.import_weights(file, "swin_nano")
    file.unlink()
    assert name == "swin_nano" and path.is_relative_to(cache) and path == store.cached_file(name)
    model = create_model("swin_nano", pretrained=True)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    torch.save({"model": {key: value + 1 for key, value in state.items()}}, file)
    with pytest.raises(SaccadeError, match="its sha256 is .*, that of swin_nano is"):
        store.import_weights(file, "swin_nano")


def test_import_finds_the_model_and_refuses_what_does_not_load(publish: Publish, tmp_path: Path, cache: Path) -> None:
    publish("https://example.org/files/swin_nano_v1.pth")
    publish("hf:owner/name/folder/swin_nano_v2.pth@abc", "convnext_nano")
    file = tmp_path / "swin_nano_v1.pth"
    torch.save({"w": torch.ones(1)}, file)
    with pytest.raises(SaccadeError, match="not a checkpoint of swin_nano"):
        store.import_weights(file)
    assert not (cache / store.LOCK).exists()
    file.write_text("<!DOCTYPE html>")
    with pytest.raises(SaccadeError, match="get it again"):
        store.import_weights(file)
    torch.save(create_model("convnext_nano").state_dict(), tmp_path / "swin_nano_v2.pth")
    assert store.import_weights(tmp_path / "swin_nano_v2.pth")[0] == "convnext_nano"
    assert create_model("convnext_nano", pretrained=True).load_report.loaded
    with pytest.raises(SaccadeError, match="no such file"):
        store.import_weights(tmp_path / "absent.pth")


# --- the hub ---------------------------------------------------------------------------------------

COMMIT, NEWER = "c0ffee" * 6 + "beef", "decade" * 6 + "feed"
CHANGED = CONTENT[::-1]


class Hub(Handler):
    """Two repositories of one file, as the hub serves them; `branches` says at which commit they stand."""

    branches: dict[str, str] = {}
    files = ("/timm/swin_nano.test/resolve/{}/model.safetensors", "/owner/name/resolve/{}/weights/model.pth")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers["Range"]))
        revisions = {name: name for name in (COMMIT, NEWER)} | self.branches
        commit = {file.format(name): commit for name, commit in revisions.items() for file in self.files}.get(self.path)
        if commit is None:
            self.send_error(404)
            return
        content = {COMMIT: CONTENT, NEWER: CHANGED}[commit]
        self.answer(content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit,
                              "Content-Type": "application/binary"})


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(Handler, "asked", [])
    monkeypatch.setattr(Hub, "branches", {"main": COMMIT, "v1": COMMIT})
    running = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{running.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield tmp_path / "hub"
    running.shutdown()
    running.server_close()


def test_sources_on_the_hub_use_its_own_cache(hub: Path, publish: Publish, cache: Path) -> None:
    publish("timm:swin_nano.test", layout="timm")
    found = store.weights_file("swin_nano")
    assert found.is_relative_to(hub) and found.read_bytes() == CONTENT and COMMIT in found.parts
    assert locks(cache)["timm:swin_nano.test"] == {
        "sha256": HASH, "bytes": len(CONTENT), "first_used": locks(cache)["timm:swin_nano.test"]["first_used"],
        "revision": COMMIT,
    }
    assert os.listdir(cache) == [store.LOCK] or set(os.listdir(cache)) == {store.LOCK, f".{store.LOCK}.lock"}
    found.resolve().write_bytes(b"spoiled")
    assert "remove it and get it again" in error()


@pytest.mark.parametrize("source", ["timm:swin_nano.test", "hf:owner/name/weights/model.pth@v1"])
def test_the_commit_of_the_first_use_stays(
    hub: Path, publish: Publish, cache: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """Whatever a branch or a tag becomes: from the cache, and from the hub where the cache was cleared."""
    publish(source)
    assert store.pinned(source) == source
    found = store.weights_file("swin_nano")
    assert locks(cache)[source]["revision"] == COMMIT and locks(cache)[source]["sha256"] == HASH
    assert store.pinned(source) == f"{source.partition('@')[0]}@{COMMIT}"
    monkeypatch.setattr(Hub, "branches", {"main": NEWER, "v1": NEWER})
    assert store.weights_file("swin_nano") == store.cached_file("swin_nano") == found
    shutil.rmtree(hub)
    assert store.cached_file("swin_nano") is None
    found, asked = store.weights_file("swin_nano"), Handler.asked[-1][0]
    assert found.read_bytes() == CONTENT and f"/resolve/{COMMIT}/" in asked
    (cache / store.LOCK).unlink()  # how a person takes the new one
    assert store.weights_file("swin_nano").read_bytes() == CHANGED and locks(cache)[source]["revision"] == NEWER


def test_a_commit_on_the_card(hub: Path, publish: Publish, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = f"timm:swin_nano.test@{COMMIT}"
    monkeypatch.setattr(Hub, "branches", {"main": NEWER})
    publish(source, sha256=HASH, bytes=len(CONTENT))
    assert store.weights_file("swin_nano").read_bytes() == CONTENT
    assert locks(cache)[source]["revision"] == COMMIT and store.pinned(source) == source
    publish(f"timm:swin_nano.test@{NEWER}", sha256=HASH)
    assert f"not {HASH}" in error()


def test_a_mirror_has_no_commit_of_the_source(hub: Path, publish: Publish, cache: Path) -> None:
    publish("hf:owner/lost/model.pth", mirrors=("timm:swin_nano.test",))
    assert store.weights_file("swin_nano").read_bytes() == CONTENT
    assert "revision" not in locks(cache)["hf:owner/lost/model.pth"]


def test_what_the_hub_lacks(hub: Path, publish: Publish) -> None:
    publish("hf:owner/name/weights/model.pth@v2")
    assert error().startswith("swin_nano: hf:owner/name/weights/model.pth@v2: ")
    assert any("/owner/name/resolve/v2/weights/model.pth" in path for path, _ in Handler.asked)


def test_a_hub_that_does_not_answer_is_one_line(
    publish: Publish, hub: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    publish("timm:swin_nano.test")
    assert error().startswith("swin_nano: timm:swin_nano.test: ")
    assert capfd.readouterr() == ("", "") and not caplog.records


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("hf:owner/name/file.pth", store.Hub("owner/name", "file.pth", None)),
        ("hf:owner/name/folder/file.pth@v1.0", store.Hub("owner/name", "folder/file.pth", "v1.0")),
        ("timm:swin_tiny.ms_in1k@abc", store.Hub("timm/swin_tiny.ms_in1k", "model.safetensors", "abc")),
        ("https://example.org/model@2x.pth", None),
        ("hf:owner/name", None),
    ],
)
def test_sources(source: str, wanted: store.Hub | None) -> None:
    assert store.hub(source) == wanted


# --- the cards -------------------------------------------------------------------------------------


def test_status(publish: Publish) -> None:
    publish("https://example.org/a.pth")
    assert store.status("swin_nano") == "claimed"
    publish("https://example.org/a.pth", "swin_tiny", layout="authors")
    assert store.status("swin_tiny") == "layout proven by golden"
    publish("timm:swin_tiny.ms_in1k", "swin_tiny", layout="timm")
    assert store.status("swin_t") == "claimed"
    publish("https://example.org/a.pth", reproduced="Ada, 2026-05-01, 81.3")
    assert store.status("swin_nano") == "reproduced (Ada, 2026-05-01, 81.3)"


def test_obtainable(publish: Publish, tmp_path: Path) -> None:
    """What a comparison may start from: not what lies behind a button, until it was imported."""
    assert not store.is_obtainable("swin_nano") and not store.is_obtainable("moat_0")
    publish("https://pan.baidu.com/s/1uTSCuPqYRNmT4Zb4Je9BOw?pwd=vsyv")
    assert not store.is_obtainable("swin_nano")
    torch.save(create_model("swin_nano").state_dict(), tmp_path / "swin.pth")
    path = store.import_weights(tmp_path / "swin.pth", "swin_nano")[1]
    assert store.is_obtainable("swin_nano")
    path.write_bytes(b"spoiled")
    assert "removed" in error() and not store.is_obtainable("swin_nano")
    publish("https://drive.google.com/file/d/1a/view", mirrors=("https://example.org/a.pth",))
    assert store.is_obtainable("swin_nano")


def test_permissive(publish: Publish) -> None:
    """By the list's rule, of any case, which is that of the warning to users, too."""
    for licence, wanted in (("MIT", True), ("CC-BY-NC-4.0", False), ("unknown", False), ("Apache-2.0", True),
                            ("apache-2.0", True), ("mit", True), ("Mit-0", False), ("cc-by-nc-4.0", False)):
        publish("https://example.org/a.pth", licence=licence)
        assert store.is_permissive("swin_nano") is store.permits(licence) is wanted
        assert bool(of_model("swin_nano").warning) is not wanted
    assert not store.is_permissive("nat_nano")


@pytest.mark.parametrize("name", store.list_weights())
def test_what_the_cards_say(name: str) -> None:
    """Sources that can be used, evaluations that make sense, the model's own size unless the card says another."""
    weights = store.published(name)
    assert store.hub(weights.source) or weights.source.startswith("https://")
    assert len(weights.mean) == len(weights.std) == 3 and 0.7 <= weights.crop <= 1.2
    assert weights.interpolation in ("bicubic", "bilinear")
    assert weights.layout in ("authors", "timm", "flax", "tensorflow")
    assert weights.sha256 == "unknown" or len(weights.sha256) in (8, 64)
    assert weights.source.startswith("timm:") <= (weights.layout == "timm" or not hasattr(_paper(name), "TIMM"))
    assert weights.top1 is None or 50 < weights.top1 < 95


TIMM = [name for name in store.list_weights() if store.published(name).source.startswith("timm:")]


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow if {"base", "large", "xlarge", "small"} & set(name.split("_")) else ())
    for name in TIMM
])
def test_what_timm_gives_fits(name: str) -> None:
    """Names and shapes of timm's model of that id are accounted for, every one, by our key map."""
    timm = pytest.importorskip("timm")
    if tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 20):
        pytest.skip("an older timm builds not all of its models on the meta device, and knows not all of these")
    weights = store.published(name)
    with torch.device("meta"):
        theirs = timm.create_model(weights.source.removeprefix("timm:").partition("@")[0], pretrained=False)
        ours = create_model(name)
    report = load(ours, theirs.state_dict())
    assert report.loaded == report.of and not report.left and not report.resized
    settings = theirs.pretrained_cfg
    assert (weights.mean, weights.std, weights.interpolation) == tuple(
        settings[key] for key in ("mean", "std", "interpolation"))
    assert (weights.img_size, weights.crop) == (settings["input_size"][1], settings["crop_pct"])


def test_a_layout_that_is_not_read_is_told() -> None:
    assert "is a tensorflow checkpoint, which is not read" in error("moat_0")


def _paper(name: str) -> Any:
    return paper_module(index()["models"][name])


def test_the_index_leaves_nothing_out() -> None:
    """What a card does not say of its weights, the model and the card say."""
    card = paper_module("vit").CARD
    ours = store.published("deit_base_patch16_384")
    assert (ours.img_size, ours.top1, ours.licence) == (384, card.top1["deit_base_patch16_384"], card.weights_licence)
    assert dataclasses.replace(ours, img_size=None, top1=None) == card.weights["deit_base_patch16_384"]


def test_what_is_known_of_files_on_the_hub() -> None:
    """Each entry of weights.json is of a card's source, and is where the index sends a user."""
    known = json.loads(Path(store.__file__).parents[1].joinpath("weights.json").read_text(encoding="utf-8"))
    papers = {index()["models"][name] for name in store.list_weights()}
    written = {weights.source: name for paper in papers for name, weights in paper_module(paper).CARD.weights.items()}
    assert len(known) > 30 and known.keys() <= written.keys()
    for source, file in known.items():
        weights = store.published(written[source])
        found = store.hub(weights.source)
        assert found is not None and found.revision == file.get("revision")
        assert (weights.sha256, weights.bytes) == (file.get("sha256", "unknown"), file.get("bytes"))
        assert all(len(file.get(key, "0" * digits)) == digits for key, digits in (("revision", 40), ("sha256", 64)))
        assert set(file.get("revision", "") + file.get("sha256", "")) <= set("0123456789abcdef")
