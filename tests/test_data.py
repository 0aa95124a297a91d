"""data.py: bad files, masks, buckets, and an order that must not depend on workers or ranks."""

import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from inprocess import run_script
from PIL import Image

import data
import masks
from data import Sampler, bucket, make_eval_batches, make_loader, pair_loader, permute, shuffled
from masks import make_mask
from readers import files
from readers.files import BadFile
from readers.pictures import open_source
from readers.preferences import open_pairs

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
RNG = np.random.default_rng(0)
MIX = "t2i=2,inpaint=6,edit=5,outpaint=5,erase=2"


def png(array, mode=None, **kw):
    out = io.BytesIO()
    Image.fromarray(array, mode).save(out, "PNG", **kw)
    return out.getvalue()


def noise(h=24, w=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)


def folder(root, n=10, sizes=((24, 32),), captions=True):
    """Image folder whose pictures are noise of the given sizes in turn."""
    rows = []
    for i in range(n):
        Image.fromarray(noise(*sizes[i % len(sizes)], seed=i)).save(root / f"{i:03d}.png")
        rows.append({"file_name": f"{i:03d}.png", "text": f"caption {i}"})
    if captions:
        (root / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return root


def loader(source, steps, **kw):
    at = dict(image_size=16, batch_size=4, tasks=MIX, stride=4, workers=0, seed=3)
    it = make_loader(source, **at | kw)
    batches = [next(it) for _ in range(steps)]
    stats = it.stats()
    it.close()
    return batches, stats


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)


# readers


def test_a_folder_without_a_caption_says_so(tmp_path, capsys):
    for i in range(3):
        Image.fromarray(np.full((16, 16, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    open_source(str(tmp_path), "all")
    assert "no picture has a caption" in capsys.readouterr().err
    (tmp_path / "1.txt").write_text("one")
    open_source(str(tmp_path), "all")
    assert capsys.readouterr().err == ""


def test_missing_truncated_and_foreign_files_are_named(tmp_path):
    jpeg = io.BytesIO()
    Image.fromarray(noise(200, 200)).save(jpeg, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(jpeg.getvalue()[:-3000])
    (tmp_path / "text.png").write_text("not a picture")
    for name, what in (("none.png", "no such file"), ("cut.jpg", "damaged"), ("text.png", "not a readable")):
        with pytest.raises(BadFile, match=f"{name}.*{what}") as e:
            files.read_image(tmp_path / name)
        assert isinstance(e.value, SystemExit) and "\n" not in str(e.value)


def test_16_bit_grey_is_scaled_not_saturated():
    a = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    out = files.read_image(png(a))
    assert out.shape == (16, 16, 3) and np.abs(out[..., 0] - a / 257.0).max() <= 1


def test_palette_and_transparency(tmp_path):
    im = Image.fromarray(noise(8, 8)).quantize(4)
    buf = io.BytesIO()
    im.save(buf, "PNG")
    assert np.array_equal(files.read_image(buf.getvalue()), np.asarray(im.convert("RGB")))
    buf = io.BytesIO()
    im.save(buf, "PNG", transparency=int(np.asarray(im)[0, 0]))
    assert (files.read_image(buf.getvalue())[0, 0] == 255).all()


def test_rgba_with_hidden_colours_shows_white():
    a = np.full((4, 4, 4), (200, 10, 10, 0), np.uint8)
    a[0, 0, 3] = 255
    out = files.read_image(png(a))
    assert (out[1:] == 255).all() and tuple(out[0, 0]) == (200, 10, 10)


def test_other_modes_and_exif():
    for mode in ("L", "LA", "CMYK", "1"):
        buf = io.BytesIO()
        Image.fromarray(noise()).convert(mode).save(buf, "JPEG" if mode == "CMYK" else "PNG")
        assert files.read_image(buf.getvalue()).shape == (24, 32, 3)
    exif, buf = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(noise(24, 32)).save(buf, "JPEG", exif=exif)
    assert files.read_image(buf.getvalue()).shape == (32, 24, 3)
    assert files.image_size(buf.getvalue()) == (32, 24)


def test_decompression_bomb_is_refused_before_decoding():
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    for side in (9_000, 60_000):
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
        bomb = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
        with pytest.raises(BadFile, match="pixels"):
            files.read_image(bomb, "bomb.png")


def test_jpeg_is_decoded_small_when_that_suffices():
    buf = io.BytesIO()
    Image.fromarray(noise(800, 1200)).save(buf, "JPEG")
    assert files.read_image(buf.getvalue(), cover=(100, 100)).shape == (200, 300, 3)
    assert files.read_image(buf.getvalue(), cover=(64, 128)).shape[1] >= 256


# masks from files


def test_mask_conventions():
    m = np.zeros((10, 12), np.uint8)
    m[2:5, 3:9] = 1
    expect = m.astype(np.float32)
    assert np.array_equal(files.read_mask(png(m)), expect)                       # 0/1
    assert np.array_equal(files.read_mask(png(m * 255)), expect)                 # 0/255
    assert np.array_equal(files.read_mask(png(m * 255), invert=True), 1 - expect)
    assert np.array_equal(files.read_mask(png(m.astype(np.uint16) * 65535)), expect)
    white = np.dstack([np.full((10, 12, 3), 255, np.uint8), m * 255])           # UltraEdit: alpha = region
    assert np.array_equal(files.read_mask(png(white)), expect)
    hole = np.dstack([noise(10, 12), 255 - m * 255])                            # MagicBrush: a hole
    assert np.array_equal(files.read_mask(png(hole)), expect)
    palette = Image.fromarray(m).convert("P")
    palette.putpalette([0, 0, 0, 128, 0, 0])                                    # VOC: dark red is label 1
    buf = io.BytesIO()
    palette.save(buf, "PNG")
    assert np.array_equal(files.read_mask(buf.getvalue()), expect)
    soft = np.tile(np.linspace(0, 255, 12).astype(np.uint8), (10, 1))
    assert np.allclose(files.read_mask(png(soft)), soft / 255)


def test_mask_of_another_size_is_stretched_and_its_area_said():
    m = np.zeros((20, 20), np.uint8)
    m[:10] = 255
    lines = []
    out = files.read_mask(png(m), 30, 50, name="m.png", log=lines.append)
    assert out.shape == (30, 50) and set(np.unique(out)) == {0, 1} and out[:15].all() and not out[15:].any()
    assert "m.png: 20x20 stretched to 50x30" in lines[0] and "50.0%" in lines[0]


def test_all_zero_mask_is_an_error():
    with pytest.raises(BadFile, match="m.png: the mask selects nothing"):
        files.read_mask(png(np.zeros((8, 8), np.uint8)), name="m.png")
    with pytest.raises(BadFile, match="nothing"):
        files.read_mask(png(np.full((8, 8), 255, np.uint8)), invert=True)


# sources


def test_captions_are_cleaned_and_cut():
    assert files.clean_caption(" a\x00b\x1b[31m\n c\u202e ") == ("a b [31m c", False)
    text, cut = files.clean_caption("é" * 50_000)
    assert cut and len(text.encode()) == 2000
    assert files.clean_caption("x\ud800y")[0] == "xy"


def test_long_caption_in_a_folder_is_cut_and_counted(tmp_path):
    folder(tmp_path, 4)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "000.png", "text": "x" * 100_000}))
    (batch,), stats = loader(open_source(str(tmp_path), "all"), 1, tasks={"inpaint": 1}, prompt_free=0)
    assert [len(c) for c in batch["caption"]] == [2000] * 4 and stats["captions cut"] == 4


def test_bad_metadata_lines_are_named_and_limited(tmp_path, capsys):
    meta = folder(tmp_path, 5) / "metadata.jsonl"
    good = meta.read_text()
    meta.write_text("{broken\n[1]\n" + good + '{"text": "no file"}\n{"file_name": "000.png", "text": 3}\n')
    source = open_source(str(tmp_path), "all")
    err = capsys.readouterr().err
    assert len(source) == 5 and source.bad_lines == 4
    for what in ("jsonl line 1: not JSON", "line 2: not a JSON object", "no file_name", "not a string"):
        assert what in err
    meta.write_text("{broken\n" * 50 + good)
    with pytest.raises(SystemExit, match="line 11: not JSON"):
        open_source(str(tmp_path), "all")


def test_paths_that_leave_the_root_are_refused(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "secret.png"
    root.mkdir()
    Image.fromarray(noise()).save(outside)
    os.symlink(outside, root / "link.png")
    names = ("../secret.png", str(outside), "link.png", "a/../../secret.png", "x\0.png")
    folder(root, 5)
    with open(root / "metadata.jsonl", "a") as f:
        f.writelines(json.dumps({"file_name": n, "text": "leaves"}) + "\n" for n in names)
    source = open_source(str(root), "all")
    for i in range(5, 10):
        with pytest.raises(BadFile, match="leaves the data folder|not a file name"):
            source.load(i, 16, 16)
    batches, stats = loader(source, 3, prompt_free=0)
    assert stats["skipped"] == 5 and not any("leaves" in c for b in batches for c in b["caption"])


def test_sources_that_do_not_exist_or_hold_nothing(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    for name, split in (("none", "train"), ("", "train"), ("a.txt", "all"), ("", "x")):
        with pytest.raises(SystemExit, match="^error: "):
            open_source(str(tmp_path / name), split)


def test_folder_with_txt_captions_label_maps_and_none(tmp_path):
    folder(tmp_path, 3, captions=False)
    (tmp_path / "sub").mkdir()
    Image.fromarray(noise()).save(tmp_path / "sub" / "b.jpg")
    (tmp_path / "001.txt").write_text("a tree\n")
    Image.fromarray(np.ones((24, 32), np.uint8)).save(tmp_path / "001.seg.png")
    source = open_source(str(tmp_path), "all")
    items = [source.load(i, 8, 8) for i in range(len(source))]
    assert [i["caption"].strip() for i in items] == ["", "a tree", "", ""]
    assert [i["segments"] is not None for i in items] == [False, True, False, False]


def test_a_mask_column_becomes_an_instance(tmp_path):
    folder(tmp_path, 1)
    m = np.zeros((24, 32), np.uint8)
    m[8:16, 8:16] = 1
    Image.fromarray(m).save(tmp_path / "m.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "000.png", "mask": "m.png"}\n')
    (b,), _ = loader(open_source(str(tmp_path), "all"), 1, tasks={"edit": 1})
    assert b["task"] == ["edit"] * 4 and (b["mask"][:, 0][b["segments"] == 1] == 1).all()


def test_splits_are_disjoint_complete_and_prefer_a_held_out_folder(tmp_path):
    root = tmp_path / "flat"
    root.mkdir()
    folder(root, 60)
    parts = [{r.file for r in open_source(str(root), s).rows} for s in ("train", "heldout", "all")]
    assert parts[0] | parts[1] == parts[2] and not parts[0] & parts[1] and 0 < len(parts[1]) < 15
    for name, n in (("train", 3), ("val", 2)):
        (tmp_path / name).mkdir()
        folder(tmp_path / name, n)
    assert len(open_source(str(tmp_path), "train")) == 3 and len(open_source(str(tmp_path), "heldout")) == 2


@pytest.mark.parametrize("form", ["struct", "bytes", "path", "hf_path"])
def test_parquet_picture_columns(tmp_path, form):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder(tmp_path, 10)
    raw = [(tmp_path / f"{i:03d}.png").read_bytes() for i in range(10)]
    names = [f"{i:03d}.png" for i in range(10)]
    column = {"struct": [{"bytes": b, "path": None} for b in raw], "bytes": raw, "path": names,
              "hf_path": [{"bytes": None, "path": n} for n in names]}[form]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    kind = struct if form in ("struct", "hf_path") else None
    table = pa.table({"image": pa.array(column, kind), "prompt": [f"p{i}" for i in range(10)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    source = open_source(str(tmp_path / "a.parquet"), "all")
    items = [source.load(i, 16, 16) for i in (9, 0, 4)]
    assert [i["caption"] for i in items] == ["p9", "p0", "p4"] and source.size(3) == (24, 32)
    assert np.array_equal(items[2]["image"], noise(seed=4)) and list(source.runs) == [3, 3, 3, 1]
    source.window = 1
    batches, _ = loader(source, 5, batch_size=2, workers=1)
    assert sorted(torch.cat([b["index"] for b in batches]).tolist()) == list(range(10))


def test_parquet_without_a_picture_column_names_what_it_found(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"url": ["x"], "caption": ["y"]}), tmp_path / "a.parquet")
    with pytest.raises(SystemExit, match="a.parquet: no picture column among url, caption"):
        open_source(str(tmp_path))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 garbage")
    with pytest.raises(SystemExit, match="not parquet"):
        open_source(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("column", ["segments", "mask"])
def test_label_maps_and_masks_must_not_leave_the_root(tmp_path, column):
    (tmp_path / "root").mkdir()
    root = folder(tmp_path / "root", 1)
    Image.fromarray(np.ones((24, 32), np.uint8)).save(tmp_path / "secret.png")
    (root / "metadata.jsonl").write_text(json.dumps({"file_name": "000.png", column: "../secret.png"}))
    with pytest.raises(BadFile, match="leaves the data folder"):
        open_source(str(root), "all").load(0, 16, 16)


def test_parquet_paths_must_not_leave_the_root(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "root").mkdir()
    folder(tmp_path, 1)
    table = pa.table({"image": ["../000.png", str(tmp_path / "000.png")]})
    pq.write_table(table, tmp_path / "root/a.parquet")
    source = open_source(str(tmp_path / "root/a.parquet"), "all")
    for i in (0, 1):
        with pytest.raises(BadFile, match="leaves the data folder"):
            source.load(i, 16, 16)


# bad files while loading


def test_unusual_pictures_train_as_they_look(tmp_path):
    """One grey, stored in every way, is one grey in the batch; a decompression bomb is skipped, counted."""
    grey = np.full((16, 16), 100, np.uint8)
    Image.fromarray(grey).save(tmp_path / "8bit.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16bit.png")
    indexed = Image.fromarray(grey * 0).convert("P")
    indexed.putpalette([100, 100, 100, 255, 0, 0])
    indexed.save(tmp_path / "palette.png")
    hidden = np.dstack([grey, grey, grey, np.full_like(grey, 255)])
    Image.fromarray(hidden).save(tmp_path / "rgba.png")
    hidden[..., :3], hidden[..., 3] = 7, 0
    Image.fromarray(hidden).save(tmp_path / "transparent.png")
    bomb = bytearray((tmp_path / "8bit.png").read_bytes())
    bomb[16:24] = struct.pack(">II", 60_000, 60_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    (tmp_path / "bomb.png").write_bytes(bomb)
    source = open_source(str(tmp_path), "all")
    names = [row.file for row in source.rows]
    batches, stats = loader(source, 3, batch_size=6, workers=1)
    seen = {}
    for b in batches:
        seen |= {names[i]: x for i, x in zip(b["index"].tolist(), b["image"])}
    assert seen.keys() == set(names) - {"bomb.png"} and stats["skipped"] == 1
    for name, x in seen.items():
        assert torch.allclose(x, torch.tensor((255 if name == "transparent.png" else 100) / 127.5 - 1)), name


def test_bad_files_are_replaced_counted_and_deterministic(tmp_path, capsys):
    folder(tmp_path, 30)
    for i in (3, 4, 17):
        (tmp_path / f"{i:03d}.png").write_bytes((tmp_path / f"{i:03d}.png").read_bytes()[:200])
    (tmp_path / "020.png").unlink()
    source = open_source(str(tmp_path), "all")
    a, stats = loader(source, 10)
    b, _ = loader(source, 10, workers=2)
    assert all(same(x, y) for x, y in zip(a, b)) and stats["skipped"] == 4
    index = torch.cat([x["index"] for x in a[:8]]).tolist()
    assert not {3, 4, 17, 20} & set(index) and index.count(5) >= 3       # 3 and 4 became 5
    assert capsys.readouterr().err.count("020.png: no such file") == 2   # once per loader


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_files_end_the_run_in_the_main_process(tmp_path, workers):
    folder(tmp_path, 40)
    for i in range(30):
        (tmp_path / f"{i:03d}.png").write_bytes(b"x")
    with pytest.raises(SystemExit, match=r"0\d\d.png: .*too many to go on"):
        loader(open_source(str(tmp_path), "all"), 20, workers=workers)
    for i in range(30, 40):
        (tmp_path / f"{i:03d}.png").write_bytes(b"x")
    for aspects in (False, True):
        with pytest.raises(SystemExit, match="too many to go on"):
            loader(open_source(str(tmp_path), "all"), 1, workers=workers, max_bad=5, aspects=aspects)


# geometry


def test_buckets():
    seen = set()
    for h, w in RNG.integers(1, 5000, (500, 2)).tolist():
        b = bucket(h, w, 256, 16, True)
        seen.add(b)
        assert b[0] % 16 == b[1] % 16 == 0 and 0.85 < b[0] * b[1] / 256**2 < 1.15
        assert bucket(*b, 256, 16, True) == b and bucket(w, h, 256, 16, True) == b[::-1]
        assert bucket(h, w, 256, 16, False) == (256, 256)
        r = np.log(h * b[1] / (w * b[0]))
        assert abs(r) < 0.21 or max(h / w, w / h) > 3.4         # half the widest step; beyond 4:1 cropped
    assert len(seen) == 13
    with pytest.raises(SystemExit, match="multiple of 16"):
        bucket(1, 1, 250, 16, True)


def test_fit_covers_without_squashing_and_labels_follow():
    y, x = np.mgrid[0:60, 0:120].astype(np.float32)
    image = np.stack([x * 2, y * 4, 0 * x], -1).astype(np.uint8)
    labels = (x >= 60).astype(np.int32) + 2 * (y >= 30)
    for at in (0.0, 0.3, 1.0):
        out, seg = data.fit(image, 30, 30, at, at, labels)
        assert out.shape == (30, 30, 3) and seg.shape == (30, 30)
        steps = np.diff(out[15, 3:-3, 0].astype(int)).mean(), np.diff(out[3:-3, 15, 1].astype(int)).mean()
        assert abs(steps[0] - 4) < 0.2 and abs(steps[1] - 8) < 0.2        # both axes scaled by two
        assert abs(((out[..., 0] >= 120) == (seg % 2 == 1)).mean() - 1) < 0.05
    assert data.fit(noise(1, 500), 16, 16)[0].shape == (16, 16, 3)
    small = data.fit(image, 30, 30, 0.5, 0.5, labels[::2, ::2])[1]        # label map of half the size
    assert (small == data.fit(image, 30, 30, 0.5, 0.5, labels)[1]).mean() > 0.9


# masks


def segments(h=64, w=64):
    s = np.zeros((h, w), np.int32)
    s[8:28, 10:30], s[40:56, 30:60] = 1, 2
    return s


def test_mask_areas_and_shapes():
    for h, w in ((64, 64), (40, 104), (8, 8), (33, 17)):
        for kind in ("irregular", "square", "outward", "background"):
            areas = []
            for k in range(40):
                m = make_mask(kind, h, w, np.random.default_rng(k))
                assert m.shape == (h, w) and m.dtype == np.float32 and set(np.unique(m)) <= {0, 1}
                areas.append(m.mean())
            assert 0 < min(areas) and max(areas) < 0.95 and np.std(areas) > 0.02, (kind, h, w)
    assert make_mask("global", 8, 9, RNG).min() == 1
    with pytest.raises(ValueError):
        make_mask("round", 8, 8, RNG)


def test_outward_keeps_a_window_and_touches_borders():
    sides = set()
    for k in range(200):
        m = make_mask("outward", 48, 64, np.random.default_rng(k)).astype(bool)
        ys, xs = np.flatnonzero(~m.all(1)), np.flatnonzero(~m.all(0))
        assert not m[ys[0]:ys[-1] + 1, xs[0]:xs[-1] + 1].any() and (~m).sum() == len(ys) * len(xs)
        edges = (m[0].all(), m[-1].all(), m[:, 0].all(), m[:, -1].all())
        assert any(edges) and 0.1 < (~m).mean() < 0.9
        sides.add(sum(edges))
    assert sides == {1, 2, 3, 4}


def test_instance_masks_cover_one_instance_and_more():
    s = segments()
    for k in range(50):
        m = make_mask("instance", 64, 64, np.random.default_rng(k), s).astype(bool)
        covered = [m[s == i].all() for i in (1, 2)]
        assert any(covered) and m.sum() > min((s == 1).sum(), (s == 2).sum()) and m.mean() < 0.6
    assert make_mask("instance", 64, 64, RNG, np.zeros((64, 64), int)) is None
    assert make_mask("instance", 64, 64, RNG) is None


def test_erase_masks_avoid_every_instance():
    s = segments()
    for k in range(100):
        m = make_mask("background", 64, 64, np.random.default_rng(k), s)
        assert m.any() and not m[s != 0].any()
    small = np.zeros((64, 64), np.int32)  # each of them below 0.2 % of the picture, which is none to erase
    for i, (y, x) in enumerate(np.ndindex(6, 6)):
        small[10 * y + 4, 10 * x + 4] = i + 1
    beside = masks.dilate(small != 0, 1)
    assert not any(make_mask("background", 64, 64, np.random.default_rng(k), small)[beside].any()
                   for k in range(20))
    full = np.ones((64, 64), np.int32)
    full[0, 0] = 0
    assert make_mask("background", 64, 64, RNG, full) is None
    assert masks.task_mask("erase", 64, 64, RNG, full)[1] == "inpaint"


def test_label_maps_without_background():
    s = np.repeat(np.arange(1, 5), 16)[None].repeat(64, 0)  # four equal regions: one counts as background
    ids, solid = masks.instances(s)
    assert list(ids) == [1, 2, 3, 4] and not solid[:, :16].any() and solid[:, 16:].all()
    s = np.ones((64, 64), np.int32)
    s[:20, :20], s[40, 40] = 2, 3        # 1 covers 90%, 3 is a speck: only 2 is an instance
    assert list(masks.instances(s)[0]) == [2] and masks.instances(s)[1].sum() == 400


def test_dilation():
    m = np.zeros((9, 9), bool)
    m[5, 5] = m[0, 0] = True
    assert masks.dilate(m, 2).sum() == 25 + 9 and masks.dilate(m, 0).sum() == 2


# order


def test_permute_is_a_bijection_and_mixes():
    for n in (1, 2, 5, 64, 1000, 4097):
        assert sorted(permute(np.arange(n), n, (1, 2))) == list(range(n))
    a = permute(np.arange(10_000), 10_000_000, (7,))
    assert len(set(a.tolist())) == 10_000 and abs(np.corrcoef(np.arange(10_000), a)[0, 1]) < 0.05
    assert not np.array_equal(a, permute(np.arange(10_000), 10_000_000, (8,)))


def test_shuffled_keeps_windows_of_runs_together():
    runs, n = [5, 0, 7, 3, 9, 1, 4], 29
    group = np.repeat(np.arange(7), runs)
    for window in (1, 2, 7):
        order = shuffled(np.arange(n), runs, window, (1,), (2,))
        assert sorted(order) == list(range(n))
        assert [shuffled([i], runs, window, (1,), (2,))[0] for i in range(n)] == list(order)
    assert (np.diff(group[shuffled(np.arange(n), runs, 1, (1,), (2,))]) != 0).sum() == 5


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixed")
    return open_source(str(folder(root, 30, ((24, 32), (32, 24), (20, 20), (12, 40)))), "all")


def test_batch_format(mixed):
    (b,), _ = loader(mixed, 1)
    assert b["image"].shape == (4, 3, 16, 16) and b["image"].is_contiguous()
    assert b["image"].dtype == torch.float32
    assert -1 <= b["image"].min() < -0.5 < 0.5 < b["image"].max() <= 1
    assert b["mask"].shape == (4, 1, 16, 16) and b["mask"].dtype == torch.float32 and b["segments"] is None
    assert b["index"].dtype == torch.int64 and b["position"] == [0, 1, 2, 3] and b["step"] == b["epoch"] == 0
    assert len(b["caption"]) == len(b["task"]) == 4 and set(b["task"]) <= set(masks.TASKS)


@pytest.mark.parametrize("aspects", [False, True])
def test_same_batches_for_any_number_of_workers_and_after_a_restart(mixed, aspects):
    whole, _ = loader(mixed, 12, aspects=aspects)
    state = torch.get_rng_state()
    for workers, start in ((1, 0), (2, 0), (0, 7), (2, 5)):
        part, _ = loader(mixed, 12 - start, aspects=aspects, workers=workers, start_step=start)
        assert all(same(a, b) for a, b in zip(whole[start:], part)), (workers, start)
    assert torch.equal(state, torch.get_rng_state())                     # starting workers drew nothing
    assert not same(whole[0], loader(mixed, 1, aspects=aspects, seed=4)[0][0])


@pytest.mark.parametrize("aspects", [False, True])
def test_ranks_joined_are_the_global_batch(mixed, aspects):
    one, _ = loader(mixed, 9, aspects=aspects, batch_size=6)
    ranks = [loader(mixed, 9, aspects=aspects, batch_size=3, rank=r, world=2)[0] for r in (0, 1)]
    for g, a, b in zip(one, *ranks):
        for key in ("image", "mask", "index"):
            assert torch.equal(g[key], torch.cat([a[key], b[key]]))
        for key in ("caption", "task", "position"):
            assert g[key] == a[key] + b[key]


def test_an_epoch_drops_nothing_and_counts_what_it_repeats(mixed):
    for aspects in (False, True):
        order = Sampler(mixed, 16, 4, 0, 0, 1, aspects, 4)
        for epoch in (0, 3):
            seen, repeated = [], 0
            for k in range(len(order)):
                r = order.request(epoch * len(order) + k)
                index = [order.index(r.bucket, s) for s in r.slot]
                repeated += r.wrapped
                seen += index
                if aspects:
                    assert {bucket(*mixed.size(i), 16, 4, True) for i in index} == {r.shape}
                assert len({(i, c) for i, c in zip(index, r.copy)}) == 4
            assert set(seen) == set(range(30)) and len(seen) - 30 == repeated
        a, b = (tuple(order.request(e * len(order)).slot) for e in (0, 1))
        assert a != b
    assert "30 items, 8 steps an epoch, 2 repeated" in order.summary()


def test_mixture_prompt_free_and_bad_values(mixed):
    batches, stats = loader(mixed, 60, tasks={"outpaint": 1, "inpaint": 1, "erase": 2}, prompt_free=0.5)
    tasks = [t for b in batches for t in b["task"]]
    share = {t: tasks.count(t) / len(tasks) for t in set(tasks)}
    assert set(share) == {"outpaint", "inpaint", "erase"} and abs(share["erase"] - 0.5) < 0.12
    captions = [(t, c) for b in batches for t, c in zip(b["task"], b["caption"])]
    assert all((c == masks.ERASE_PROMPT) == (t == "erase") for t, c in captions)
    free = [c == "" for t, c in captions if t != "erase"]
    assert 0.35 < np.mean(free) < 0.65
    assert loader(mixed, 1, tasks={"edit": 1})[1]["edit turned into inpaint"] == 4
    for tasks in ({"paint": 1}, {"t2i": -1}, {"t2i": 0.0}, {"t2i": float("nan")}):
        with pytest.raises(SystemExit, match="^error: --tasks: "):
            loader(mixed, 1, tasks=tasks)
    with pytest.raises(SystemExit, match="multiple of"):
        loader(mixed, 1, image_size=18)


def test_eval_batches_are_listed_pictures_in_order(mixed):
    def run(**kw):
        return list(make_eval_batches(mixed, [5, 2, 9, 9, 0, 7, 1], 16, stride=4, tasks={"inpaint": 1}, **kw))
    a, b = run(batch_size=3), run(batch_size=7, workers=1)
    assert [len(x["caption"]) for x in a] == [3, 3, 1] and b[0]["index"].tolist() == [5, 2, 9, 9, 0, 7, 1]
    assert torch.equal(torch.cat([x["mask"] for x in a]), b[0]["mask"]) and a[1]["position"] == [3, 4, 5]
    assert b[0]["caption"][0] == "caption 5" and b[0]["step"] == 0
    ranks = [x["index"] for r in (0, 1) for x in run(batch_size=2, rank=r, world=2)]
    assert torch.equal(torch.cat(ranks), b[0]["index"])
    shapes = [tuple(x["image"].shape[2:]) for x in run(batch_size=4, aspects=True)]
    assert len(set(shapes)) > 1
    with pytest.raises(SystemExit, match="30"):
        make_eval_batches(mixed, [30], 16, 1, MIX, stride=4)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_of_a_list_what_cannot_be_read_is_left_out(tmp_path, capsys, size):
    """In the place of a bad picture its neighbour, which is in the list too, would count twice."""
    folder(tmp_path, 6)
    source = open_source(str(tmp_path), "all")
    for bad in (2, 3):
        (tmp_path / f"{bad:03d}.png").write_bytes(b"no picture")
    batches = make_eval_batches(source, range(6), 16, size, stride=4, tasks={"inpaint": 1})
    seen = list(batches)
    assert [i for b in seen for i in b["index"].tolist()] == [0, 1, 4, 5]
    assert [p for b in seen for p in b["position"]] == [0, 1, 4, 5]  # noise is drawn by position
    assert [c for b in seen for c in b["caption"]] == [f"caption {i}" for i in (0, 1, 4, 5)]
    assert all(len(b["image"]) == len(b["index"]) for b in seen)
    assert batches.stats() == {"read": 6, "skipped": 2} and capsys.readouterr().err.count("skipped: ") == 2
    with pytest.raises(SystemExit, match="none of the 2 listed can be read: repair"):
        next(make_eval_batches(source, [2, 3], 16, size, MIX, stride=4))


# preferences


@pytest.fixture
def prefs(tmp_path):
    return folder(tmp_path, 6, captions=False)


def test_imagereward_json(prefs, capsys):
    three = ["000.png", "001.png", "002.png"]
    items = [{"id": "a", "prompt": "p", "generations": three, "ranking": [2, 1, 2]},
             {"id": "b", "prompt": "q", "generations": ["003.png"], "ranking": [1, 2]}, "junk",
             {"id": "c", "prompt": "r", "generations": ["003.png", "004.png"], "ranking": [1, float("nan")]}]
    (prefs / "p.json").write_text(json.dumps(items))
    pairs = open_pairs(prefs / "p.json")
    assert [p[:4] for p in pairs] == [("001.png", "p", "000.png", "p"), ("001.png", "p", "002.png", "p")]
    err = capsys.readouterr().err
    assert pairs.bad_rows == 3 and "item 1: needs prompt" in err and "item 2: not a JSON object" in err
    (prefs / "p.json").write_text("[{")
    with pytest.raises(SystemExit, match="p.json: not JSON"):
        open_pairs(prefs / "p.json")


def test_flat_pairs_and_their_loader(prefs, capsys):
    rows = [{"caption": "c", "better": "000.png", "worse": "001.png"},
            {"image": "002.png", "better": "yes", "worse": "no"},
            {"caption": "c", "better": "000.png"}, {"better": "a", "worse": "b"}]
    (prefs / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + "nonsense\n")
    pairs = open_pairs(prefs / "p.jsonl")
    assert [p[:4] for p in pairs] == [("000.png", "c", "001.png", "c"), ("002.png", "yes", "002.png", "no")]
    assert pairs.bad_rows == 3 and "line 5: not JSON" in capsys.readouterr().err
    (b,) = pair_loader(pairs, 16, 4, stride=4, workers=0, once=True)
    assert b["better"].shape == (2, 3, 16, 16) and not torch.equal(b["better"][0], b["worse"][0])
    assert torch.equal(b["better"][1], b["worse"][1]) and b["caption_better"] == ["c", "yes"]
    runs = []
    for workers, start in ((0, 0), (1, 0), (0, 2)):
        it = pair_loader(pairs, 16, 2, stride=4, workers=workers, start_step=start)
        runs.append([next(it) for _ in range(4 - start)])
        it.close()
    assert all(same(x, y) for x, y in zip(runs[0], runs[1])) and same(runs[0][2], runs[2][0])


def test_pairs_split_by_prompt_and_by_picture(prefs):
    rows = [{"caption": f"c{i % 50}", "better": f"a{i}.png", "worse": f"b{i}.png"} for i in range(400)]
    (prefs / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    parts = [open_pairs(prefs / "p.jsonl", s, fraction=0.3) for s in ("train", "heldout")]
    prompts = [{p.caption_better for p in part} for part in parts]
    assert sum(map(len, parts)) == 400 and not prompts[0] & prompts[1] and 3 < len(prompts[1]) < 30
    rows = [{"image": f"{i % 40}.png", "better": f"b{i}", "worse": "w"} for i in range(200)]
    (prefs / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    parts = [open_pairs(prefs / "p.jsonl", s, fraction=0.3) for s in ("train", "heldout")]
    assert not {p.image_better for p in parts[0]} & {p.image_better for p in parts[1]}
    # without a prompt: as make_prefs.py writes them, several pairs of the pictures of a prompt
    rows = [{"caption": "", "better": f"{i}_{a}.png", "worse": f"{i}_{b}.png"} for i in range(100)
            for a, b in (("truth", "best"), ("truth", "worst"), ("best", "worst"), ("best", "bad"))]
    (prefs / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    parts = [open_pairs(prefs / "p.jsonl", s, fraction=0.3) for s in ("train", "heldout")]
    shown = [{x for p in part for x in (p.image_better, p.image_worse)} for part in parts]
    assert sum(map(len, parts)) == 400 and not shown[0] & shown[1] and 60 < len(parts[1]) < 180
    # two prompts of the same pictures, and pictures of one family, as a scene and its refilled copy
    rows = [{"caption": f"{word} {i}", "better": f"{i}_a.png", "worse": f"{i}_b.png"} for i in range(100)
            for word in ("good", "fine")]
    texts = [{"image": f"{i}_{k}.png", "better": f"b{i}{k}", "worse": "w", "family": i} for i in range(100)
             for k in "tb"]
    for some in (rows, texts):
        (prefs / "q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some))
        parts = [open_pairs(prefs / "q.jsonl", s, fraction=0.3) for s in ("train", "heldout")]
        shown = [{p.image_better.split("_")[0] for p in part} for part in parts]
        assert sum(map(len, parts)) == 200 and not shown[0] & shown[1] and 15 < len(shown[1]) < 45
    rows = [{"caption": "", "better": f"{i // 4}_a.png", "worse": f"{i // 4}_b.png"} for i in range(8)]
    (prefs / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))  # of two families one
    assert [len(open_pairs(prefs / "p.jsonl", s, fraction=0.01)) for s in ("train", "heldout")] == [4, 4]
    assert len(open_pairs(prefs / "p.jsonl", "train", fraction=0.0)) == 8
    chain = [{"caption": f"c{i}", "better": f"{i}.png", "worse": f"{i + 1}.png"} for i in range(9)]
    (prefs / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in chain))
    assert len(open_pairs(prefs / "p.jsonl", "train")) == 9
    with pytest.raises(SystemExit, match="its 9 pairs share pictures or prompts.*: give --val_pairs"):
        open_pairs(prefs / "p.jsonl", "heldout")
    with pytest.raises(SystemExit, match="no such file"):
        open_pairs(prefs / "none.jsonl")


# the command, scenes, real pictures


def check(*argv):
    return run_script(data.__file__, "check", *argv)


def test_check_command(tmp_path):
    pytest.importorskip("common")
    folder(tmp_path, 4)
    (tmp_path / "002.png").write_bytes(b"x")
    r = check(tmp_path, "--image-size", 32, "--out", tmp_path / "sheet.png")
    assert r.returncode == 1 and "002.png: not a readable picture" in r.stdout and "Traceback" not in r.stderr
    assert "mask area, outpaint" in r.stdout and Image.open(tmp_path / "sheet.png").width > 100
    for flags, words in ((("--limit", 0), "--limit: 0"), (("--out", tmp_path / "x.xyz"), "--out: "),
                         (("--colour", 3), "--colour")):
        r = check(tmp_path, "--image-size", 32, *flags)
        assert r.returncode and words in r.stderr and "Traceback" not in r.stderr
    r = check(tmp_path / "none")
    assert r.returncode == 1 and r.stderr.startswith("error: ") and len(r.stderr.splitlines()) == 1


def test_check_of_scenes(tmp_path, capsys):
    for spec, words in (("scenes:hard", "pictures"), ("scenes:easy", "pictures"), ("scenes", "pictures"),
                        ("scenes:wrong=0.5", "pairs"), ("scenes:hard,wrong=0.5", "pairs")):
        with pytest.raises(SystemExit) as e:
            data.check(spec, image_size=32, limit=7, out=str(tmp_path / "sheet.png"))
        said = capsys.readouterr().out
        assert e.value.code == 0 and f"10,000,000 {words}, 7 looked at, 0 cannot" in said
        assert ("outpaint" in said) == ("wrong" not in spec), (spec, said)
        assert Image.open(tmp_path / "sheet.png").width > 100
    for spec, words in (("scenes:unknown", "the levels of scenes are easy, hard"), ("scenes:wrong", "levels"),
                        ("scenes:wrong=2", "0 to 1"), ("scenes:", "levels"), ("scenes_none", "no such file")):
        with pytest.raises(SystemExit, match=words) as e:
            data.check(spec, image_size=32, limit=7, out=str(tmp_path / "sheet.png"))
        assert str(e.value).startswith("error: ") and "\n" not in str(e.value)


def test_levels_of_scenes():
    for spec, level in (("scenes", "easy"), ("scenes:easy", "easy"), ("scenes:hard", "hard")):
        for split in ("train", "all", "heldout"):
            source = open_source(spec, split)
            assert source.level == level and len(source) == (100_000 if split == "heldout" else 10_000_000)
    for spec, words in (("scenes:wrong=0.5", "only edit pairs can be wrong"), ("scenes:wrong=0", "only edit"),
                        ("scenes:unknown", "the levels of scenes are easy, hard")):
        with pytest.raises(SystemExit, match=f"^error: {spec}: .*{words}") as e:
            open_source(spec)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("spec", ["scenes", "scenes:hard"])
def test_scenes(spec):
    pytest.importorskip("scenes")
    source = open_source(spec)
    a, _ = loader(source, 4, image_size=32, aspects=True, batch_size=2)
    b, _ = loader(source, 2, image_size=32, aspects=True, batch_size=2, workers=1, start_step=2)
    assert same(a[2], b[0]) and same(a[3], b[1]) and len({x["image"].shape for x in a}) > 1
    batches, _ = loader(source, 5, image_size=64, tasks={"erase": 1, "edit": 1}, prompt_free=0)
    for x in batches:
        for mask, seg, task, caption in zip(x["mask"][:, 0], x["segments"], x["task"], x["caption"]):
            assert task in ("edit", "erase") and caption
            assert mask[seg != 0].any() == (task == "edit")


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real pictures")
@pytest.mark.parametrize("spec", ["cifar10/train.parquet", "cifar10", "photos", "bsds500"])
def test_real_pictures(spec):
    source = open_source(str(REAL / spec))
    cifar = spec.startswith("cifar10")
    (a, b), stats = loader(source, 2, image_size=32 if cifar else 64, aspects=not cifar, batch_size=8)
    assert stats["skipped"] == 0 and a["image"].std() > 0.1
    assert len(open_source(str(REAL / spec), "heldout")) > 20
    if spec == "bsds500":
        assert a["segments"] is not None and set(a["caption"] + b["caption"]) <= {"", masks.ERASE_PROMPT}
    else:
        assert any(c.startswith("a photo of") for c in a["caption"] + b["caption"])


@pytest.mark.parametrize("train, held", [("", "val"), ("train", "val"), ("training", "validation"),
                                         ("", "test")])
def test_a_part_of_its_own_is_held_out_and_never_trained_on(tmp_path, train, held):
    """With a train/ beside it or without; a nested folder of such a name is a subject, not a part."""
    for at, n in ((train, 12), (held, 4), (Path(train, "trip/test"), 2)):
        (tmp_path / at).mkdir(parents=True, exist_ok=True)
        folder(tmp_path / at, n, captions=False)
    source = {split: open_source(str(tmp_path), split) for split in ("train", "heldout")}
    files = {k: {str((Path(s.root) / r.file).relative_to(tmp_path)) for r in s.rows}
             for k, s in source.items()}
    assert files["heldout"] == {f"{held}/{i:03d}.png" for i in range(4)}
    assert len(files["train"]) == 14 and not any(f.startswith(held) for f in files["train"])
