"""make_pack.py and packed.py: real files, processes and damage."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

import data
from make_pack import pack
from readers.edits import open_edits
from readers.files import BadFile, EmptyPart, size_of
from readers.pictures import open_source


def same(a, b):
    """Two items of sources, however arrays of labels are kept."""
    assert a["caption"] == b["caption"] and a["image"].dtype == np.uint8
    for key in ("image", "source", "segments", "mask"):
        assert (a.get(key) is None) == (b.get(key) is None), key
        assert a.get(key) is None or np.array_equal(a[key], b[key]), key
    for key in ("task", "target_caption", "score"):
        assert a.get(key) == pytest.approx(b.get(key)), key


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "scenes"
    pack("scenes", str(out), limit=21, image_size=32, heldout=5, shard=8, workers=1)
    return out


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "pairs"
    pack("scenes:wrong=0.5", str(out), limit=21, image_size=32, heldout=4, shard=16, workers=2)
    return out


def photos(at):
    """Pictures of three shapes, some with label maps, one damaged."""
    at.mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        h, w = [(40, 40), (100, 50), (30, 70)][i % 3]
        small = Image.fromarray(rng.integers(0, 255, (5, 5, 3), dtype=np.uint8))
        small.resize((w, h), Image.Resampling.BICUBIC).save(at / f"{i}.png")
        (at / f"{i}.txt").write_text(f"picture {i}")
        if i % 2:
            Image.fromarray(np.full((h, w), 300 * (i == 3), np.uint16)).save(at / f"{i}.seg.png")
    (at / "broken.png").write_bytes(b"\x89PNG and no more")
    return at


def test_pictures_are_what_the_source_gives(scenes):
    for split, n in (("train", 21), ("heldout", 5)):
        source, plain = open_source(str(scenes), split), open_source("scenes", split)
        assert len(source) == n and source.size(0) == (32, 32)
        for i in range(n):
            same(source.load(i, 32, 32), plain.load(i, 32, 32))
    both = open_source(str(scenes), "all")
    assert len(both) == 26 and len(both.files) == 4
    same(both.load(21, 32, 32), source.load(0, 32, 32))


def test_pairs_are_what_the_source_gives(pairs):
    source, plain = open_edits(str(pairs)), open_edits("scenes:wrong=0.5")
    for i in range(21):
        same(source.load(i, 32, 32), plain.load(i, 32, 32))
        assert source.task(i) == plain.task(i) and source.score(i) == pytest.approx(plain.score(i))
    masks = [source.load(i, 32, 32)["mask"] for i in range(21)]
    soft = [bool(((m > 0) & (m < 1)).any()) for m in masks]
    assert any(soft) and not all(soft) and all(m.dtype == np.float32 for m in masks)  # both ways of keeping


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_read_it(scenes, pairs, workers):
    at = dict(image_size=32, batch_size=4, stride=4, workers=workers, seed=3)
    loader = data.make_loader(open_source(str(scenes)), tasks={"edit": 1.0}, **at)
    a = next(loader)
    plain = open_source("scenes")
    for image, i, segments in zip(a["image"], a["index"].tolist(), a["segments"]):
        item = plain.load(i, 32, 32)
        assert torch.equal(image, data.as_floats(torch.tensor(item["image"])[None])[0])
        assert np.array_equal(segments, item["segments"])
    loader.close()
    loader = data.make_edit_loader(open_edits(str(pairs)), min_score=9.0, balance={"remove": 1.0}, **at)
    b = next(loader)
    assert b["task"] == ["remove"] * 4 and (b["score"] >= 9).all() and b["source"].shape == (4, 3, 32, 32)
    loader.close()


def test_files_are_shrunk_no_further_than_to_cover(tmp_path, capsys):
    root, out = photos(tmp_path / "photos"), tmp_path / "out"
    pack(str(root), str(out), image_size=32, aspects=True, stride=8, heldout=0, shard=4, workers=1)
    text = capsys.readouterr()
    assert "1 left out as bad" in text.out and "skipped: " in text.err and "broken.png" in text.err
    source, plain = open_source(str(out)), open_source(str(root), "train")
    by_caption = {s["caption"]: s for s in (plain.load(i, 999, 999) for i in range(len(plain))
                                            if size_of(plain, i) != (1, 1))}
    assert len(source) == len(by_caption) and {(40, 40), (100, 50)} <= {x["image"].shape[:2] for x in
                                                                         by_caption.values()}
    for i in range(len(source)):
        item = source.load(i, 1, 1)
        whole, (h, w) = by_caption[item["caption"]], item["image"].shape[:2]
        H, W = data.bucket(*whole["image"].shape[:2], 32, 8, True)
        assert h >= H and w >= W and (h == H or w == W) and source.size(i) == (h, w)
        assert abs(item["image"].mean() - whole["image"].mean()) < 4
        assert (item["segments"] is None) == (whole["segments"] is None)
        if whole["segments"] is not None:
            assert set(np.unique(item["segments"])) == set(np.unique(whole["segments"]))
    with pytest.raises(EmptyPart, match="heldout part: pack it with --heldout"):
        open_source(str(out), "heldout")


def test_goes_on_and_mends(tmp_path, capsys):
    out = tmp_path / "out"

    def again(**flags):
        pack("scenes", str(out), **dict(limit=20, image_size=16, heldout=0, shard=8, workers=1) | flags)
        return capsys.readouterr().out

    assert "3 of 3 files to make" in again()
    written = {p.name: p.read_bytes() for p in out.iterdir()}
    assert "0 of 3 files to make" in again()

    # stopped: no packed.json, the second file half written and its index not yet there
    (out / "packed.json").rename(out / "packing.json")
    (out / "train_00001.bin").write_bytes(written["train_00001.bin"][:999])
    (out / "train_00001.npy").unlink()
    with pytest.raises(BadFile, match="packing was not finished: give the same `make_pack.py` command again"):
        open_source(str(out))
    assert "1 of 3 files to make" in again()
    assert {p.name: p.read_bytes() for p in out.iterdir()} == written

    # a flipped bit is found by its CRC; of a list the item is left out, packing again mends it
    raw = bytearray(written["train_00002.bin"])
    raw[5] ^= 1
    (out / "train_00002.bin").write_bytes(raw)
    source = open_source(str(out))
    with pytest.raises(BadFile, match=r"train_00002.bin item 16: damaged .*make_pack.py"):
        source.load(16, 16, 16)
    mix = "t2i=2,inpaint=6,edit=5,outpaint=5,erase=2"
    batches = list(data.make_eval_batches(source, range(20), 16, 4, mix, stride=4))
    assert sum([b["index"].tolist() for b in batches], []) == [i for i in range(20) if i != 16]
    assert "1 of 3 files to make" in again()
    assert {p.name: p.read_bytes() for p in out.iterdir()} == written
    with pytest.raises(SystemExit, match="image_size 16, not 32.*another folder"):
        again(image_size=32)


@pytest.mark.parametrize("harm, text", [
    (lambda p: (p / "train_00000.bin").write_bytes(b"x"), "train_00000.bin: 1 bytes instead of"),
    (lambda p: (p / "train_00000.npy").write_bytes(b"x"), "train_00000.npy: cannot be read"),
    (lambda p: np.save(p / "train_00000.npy", np.zeros(3)), "train_00000.npy: not an index"),
    (lambda p: (p / "packed.json").write_text("{}"), "packed.json: damaged"),
    (lambda p: (p / "train_00000.bin").unlink(), "train_00000.bin: 0 bytes instead of")])
def test_damage_is_named(tmp_path, harm, text):
    out = tmp_path / "out"
    pack("scenes", str(out), limit=3, image_size=16, heldout=0, shard=2, workers=1)
    harm(out)
    with pytest.raises(SystemExit, match=f"^error: [^\n]*{re.escape(text)}[^\n]*make_pack.py"):
        open_source(str(out))


def test_refusals(tmp_path, scenes, pairs):
    for call, text in (
            (lambda: pack("scenes", str(tmp_path / "a")), "say how many with --limit"),
            (lambda: pack("scenes", str(tmp_path / "a"), limit=9, aspects=True), "leave out --aspects"),
            (lambda: pack("scenes", str(tmp_path / "a"), limit=9, shard=0), "--shard: 0: must be at least 1"),
            (lambda: pack(str(tmp_path / "none"), str(tmp_path / "a")), "no such file or folder"),
            (lambda: open_edits(str(scenes)), "holds pictures, and edit pairs are asked for"),
            (lambda: open_source(str(pairs)), "holds edit pairs, and pictures are asked for")):
        with pytest.raises(SystemExit, match=f"^error: [^\n]*{re.escape(text)}[^\n]*$"):
            call()


def test_a_full_disk_is_noticed_first(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(SystemExit, match="--out: .*: needs about .* are free: lower --limit"):
        pack("scenes", str(tmp_path / "out"), limit=9, image_size=16, heldout=0, workers=1)
    assert not list((tmp_path / "out").glob("*.bin"))


def test_check_and_cache_know_it(tmp_path, scenes, pairs, capsys):
    for spec, text in ((scenes, "26 pictures"), (pairs, "25 pairs")):
        with pytest.raises(SystemExit) as done:
            data.check(str(spec), image_size=32, limit=5, out=str(tmp_path / "sheet.png"))
        assert not done.value.code and text in capsys.readouterr().out
    source = open_edits(str(pairs))
    assert len(list(source.texts(21))) == 21
    plain = open_edits("scenes:wrong=0.5")
    assert next(source.texts(21)) == [plain.load(0, 32, 32)["caption"]]
    assert source.fingerprint(21) != open_source(str(scenes)).fingerprint(21)


def test_other_pictures_of_the_same_names_are_noticed(tmp_path, capsys):
    """As many items from the same folder, but others: the old file would be trained on."""
    (tmp_path / "in").mkdir()
    for text in ("grey", "a longer text"):
        for i in range(4):
            Image.fromarray(np.full((20, 20, 3), 40 * i, np.uint8)).save(tmp_path / f"in/{i}.png")
            (tmp_path / f"in/{i}.txt").write_text(text)
        if text == "grey":
            pack(str(tmp_path / "in"), str(tmp_path / "out"), image_size=16, heldout=0, workers=1)
            pack(str(tmp_path / "in"), str(tmp_path / "out"), image_size=16, heldout=0, workers=1)
            assert "0 of 1 files to make" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds what was packed with fingerprint .*: give another folder"):
        pack(str(tmp_path / "in"), str(tmp_path / "out"), image_size=16, heldout=0, workers=1)
