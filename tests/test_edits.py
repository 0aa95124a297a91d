"""edits.py and the edit loader of data.py: published layouts, bad rows, order, augmentation."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from inprocess import run_script
from PIL import Image

import data
from data import EditSampler, bucket, make_edit_loader
from readers.edits import joined, open_edits
from readers.files import BadFile

pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
HF = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(array):
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


def noise(h=24, w=32, seed=0):
    """A smooth picture: resizing it is harmless."""
    small = np.random.default_rng(seed).integers(30, 200, (4, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((w, h), Image.Resampling.BICUBIC))


def pair(i, h=24, w=32):
    """Source and target = source + 40."""
    return noise(h, w, i), np.minimum(noise(h, w, i).astype(int) + 40, 255).astype(np.uint8)


def region(h=24, w=32):
    m = np.zeros((h, w), np.uint8)
    m[4:12, 6:20] = 255
    return m


def parquet(path, columns, group=3):
    """columns: name -> list; bytes become Hugging Face picture structs."""
    arrays = {}
    for name, values in columns.items():
        hf = any(isinstance(v, bytes) for v in values)
        cells = [{"bytes": v, "path": None} if hf and v else v for v in values]
        arrays[name] = pa.array(cells, HF if hf else None)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(arrays), path, row_group_size=group)
    return path


def pictures_of(n, k):
    return [png(pair(i)[k]) for i in range(n)]


def omniedit(root, n=14, name="data/train-00000-of-00001.parquet", **changes):
    tasks = ("addition", "removal", "swap", "attribute_modification", "env", "style")
    cells = {
        "omni_edit_id": [f"task_{'background' if i % 7 == 6 else 'x'}_{i}" for i in range(n)],
        "task": [tasks[i % 7 % 6] for i in range(n)],
        "src_img": pictures_of(n, 0), "edited_img": pictures_of(n, 1),
        "edited_prompt_list": [[f"short {i}", f"a long wording {i}"] for i in range(n)],
        "width": [32] * n, "height": [24] * n, "o_score": [float(i % 11) for i in range(n)]}
    return parquet(root / name, cells | changes)


def jsonl(root, n=20, size=lambda i: (24, 32), task=None, mask=False, **more):
    """PATH.jsonl beside its pictures."""
    rows = []
    for i in range(n):
        for name, im in zip("st", pair(i, *size(i))):
            Image.fromarray(im).save(root / f"{i}{name}.png")
        row = dict(source=f"{i}s.png", edited=f"{i}t.png", instruction=f"do {i}")
        if mask:
            Image.fromarray(region(*size(i))).save(root / f"{i}m.png")
            row["mask"] = f"{i}m.png"
        rows.append(row | ({"task": task(i)} if task else {}) | {k: v(i) for k, v in more.items()})
    path = root / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def add_line(path, **row):
    with open(path, "a") as f:
        f.write(json.dumps(dict(source="0s.png", edited="0t.png", instruction="x") | row) + "\n")


def batches(source, n, **kw):
    it = make_edit_loader(source, **dict(image_size=16, batch_size=4, stride=4, workers=0, seed=3) | kw)
    got = [next(it) for _ in range(n)]
    stats = it.stats()
    it.close()
    return got, stats


def same(a, b):
    def equal(x, y):
        return torch.equal(x.nan_to_num(-1), y.nan_to_num(-1)) if torch.is_tensor(x) else x == y
    return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)


def is_offset(b):
    """Target = source + 40 in every pixel that did not saturate."""
    a, c = (b[k] * 127.5 + 127.5 for k in ("source", "image"))
    fine = c < 240
    return (c - a - 40)[fine].abs().max() <= 2.5 and fine.float().mean() > 0.5


# layouts


def test_omniedit(tmp_path):
    omniedit(tmp_path)
    source = open_edits(f"omniedit:{tmp_path}", "all")
    tasks = [source.task(i) for i in range(7)]
    assert tasks == ["add", "remove", "swap", "attribute", "environment", "style", "background"]
    assert source.score(3) == 3.0 and source.size(0) == (24, 32) and len(source) == 14
    item = source.load(5, 16, 16)
    assert item["caption"] == "short 5" and item["captions"] == ["short 5", "a long wording 5"]
    assert np.array_equal(item["source"], pair(5)[0]) and np.array_equal(item["image"], pair(5)[1])
    assert item["mask"] is None and item["task"] == "style" and item["score"] == 5.0
    got, _ = batches(source, 20)
    said = {c for b in got for c in b["caption"]}
    assert {f"short {i}" for i in range(14)} & said and {f"a long wording {i}" for i in range(14)} & said
    assert all(is_offset(b) and b["mask"].min() == 1 for b in got)
    dev = omniedit(tmp_path, 3, "data/dev-00000-of-00001.parquet")
    assert len(open_edits(f"omniedit:{tmp_path}", "heldout")) == 3 and dev.exists()
    assert len(open_edits(f"omniedit:{tmp_path}")) == 14
    (tmp_path / "lines/val").mkdir(parents=True)
    jsonl(tmp_path / "lines", 6), jsonl(tmp_path / "lines/val", 2)
    assert [len(open_edits(f"jsonl:{tmp_path}/lines", s)) for s in ("train", "heldout", "all")] == [6, 2, 8]


@pytest.mark.parametrize("said", ["input", "caption"])
def test_instruct_pix2pix_on_disk_with_missing_folders(tmp_path, said, capsys):
    seeds = [[f"{d:07d}", [str(10 * d + s) for s in range(2)]] for d in range(5)]
    (tmp_path / "seeds.json").write_text(json.dumps(seeds))
    for d, (folder, names) in enumerate(seeds[:4]):
        (tmp_path / folder).mkdir()
        prompt = {said: "a", "edit": f"edit {d}", "output": "b"}
        (tmp_path / folder / "prompt.json").write_text(json.dumps(prompt))
        for name in names:
            for k in (0, 1):
                Image.fromarray(pair(int(name))[k]).save(tmp_path / folder / f"{name}_{k}.jpg", quality=100)
    source = open_edits(f"ip2p:{tmp_path}", "all")
    assert len(source) == 8 and source.missing == 2 and "1 of the folders" in capsys.readouterr().err
    item = source.load(3, 16, 16)
    assert item["caption"] == "edit 1" and item["task"] is item["score"] is item["mask"] is None
    assert np.abs(item["source"].astype(int) - pair(11)[0]).mean() < 4 and source.size(3) == (24, 32)
    (tmp_path / "0000002" / "20_1.jpg").unlink()
    with pytest.raises(BadFile, match="target 0000002/20_1.jpg: no such file"):
        source.load(4, 16, 16)
    (tmp_path / "0000000" / "prompt.json").write_text("{")
    with pytest.raises(BadFile, match="0000000/prompt.json: not a prompt"):
        source.load(0, 16, 16)
    (tmp_path / "seeds.json").write_text('{"a": 1}')
    with pytest.raises(SystemExit, match="seeds.json: not a list of"):
        open_edits(f"ip2p:{tmp_path}")


@pytest.mark.parametrize("first", ["original_image", "input_image"])
def test_instruct_pix2pix_parquet(tmp_path, first):
    words = [f"e{i}" for i in range(6)]
    cells = {first: pictures_of(6, 0), "edit_prompt": words, "edited_image": pictures_of(6, 1)}
    parquet(tmp_path / "a.parquet", cells)
    source = open_edits(f"ip2p:{tmp_path / 'a.parquet'}", "all")
    assert source.load(4, 8, 8)["caption"] == "e4" and source.size(4) == (24, 32) and source.task(0) is None
    for b in batches(source, 3)[0]:
        assert is_offset(b) and b["score"].isnan().all() and b["task"] == [""] * 4


def test_magicbrush_mask_is_the_hole(tmp_path):
    hole = [png(np.dstack([pair(i)[0], 255 - region()])) for i in range(6)]
    hole[1] = png(np.dstack([np.full((24, 32, 3), 255, np.uint8), 255 - region()]))  # looks like UltraEdit's
    hole[2] = png(region())                                                          # no alpha at all
    parquet(tmp_path / "data/train-0.parquet", {
        "img_id": ["a", "a", "b", "b", "c", "c"], "turn_index": [1, 2] * 3, "source_img": pictures_of(6, 0),
        "mask_img": hole, "instruction": [f"e{i}" for i in range(6)], "target_img": pictures_of(6, 1)})
    source = open_edits(f"magicbrush:{tmp_path}", "all")
    for i in (0, 1):
        assert np.array_equal(source.load(i, 24, 32)["mask"], region() / 255)
    with pytest.raises(BadFile, match="row 2, mask: a mask without an alpha channel"):
        source.load(2, 24, 32)
    kept = open_edits(f"magicbrush:{tmp_path}").rows.tolist()
    assert all(r ^ 1 in kept for r in kept)                               # turns of a picture stay together


def test_ultraedit_masks_and_free_form(tmp_path):
    white = np.dstack([np.full((24, 32, 3), 255, np.uint8), region()])  # RGB all white, the region in alpha
    photo = np.dstack([pair(0)[0], region()])                             # looks like MagicBrush's
    large = np.asarray(Image.fromarray(region()).resize((64, 48), Image.Resampling.NEAREST))
    masks = [png(region()), png(white), png(photo), None, png(large)]
    cells = {"source_image": pictures_of(5, 0), "edited_image": pictures_of(5, 1),
             "edit_prompt": [f"e{i}" for i in range(5)], "source_caption": list("abcde"), "mask_image": masks}
    parquet(tmp_path / "region/a.parquet", cells)
    source = open_edits(f"ultraedit:{tmp_path / 'region'}", "all")
    for i in (0, 1, 2, 4):
        assert np.array_equal(source.load(i, 24, 32)["mask"], region() / 255), i
    assert source.load(3, 24, 32)["mask"] is None
    parquet(tmp_path / "free/a.parquet", {k: v for k, v in cells.items() if k != "mask_image"})
    assert open_edits(f"ultraedit:{tmp_path / 'free'}", "all").load(0, 8, 8)["mask"] is None
    parquet(tmp_path / "null/a.parquet", cells | {"mask_image": [None] * 5})
    assert open_edits(f"ultraedit:{tmp_path / 'null'}", "all").load(0, 8, 8)["mask"] is None
    for i in range(2):
        for name, data_ in (("s", pair(i)[0]), ("t", pair(i)[1]), ("m", white)):
            (tmp_path / f"{i}{name}.png").write_bytes(png(data_))
    rows = [dict(source_image="0s.png", edited_image="0t.png", edit_prompt="p", mask_image="0m.png"),
            dict(source_image="1s.png", edited_image="1t.png", edit_prompt="q", mask_image="NONE")]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_edits(f"ultraedit:{tmp_path / 'train.jsonl'}", "all")
    assert np.array_equal(source.load(0, 24, 32)["mask"], region() / 255)
    assert source.load(1, 8, 8)["mask"] is None


def test_plain_json_lines_and_paths_in_parquet(tmp_path):
    names = "removal", "attr_mod", "bg", "dance"
    path = jsonl(tmp_path, 4, task=lambda i: names[i], mask=True, score=lambda i: i)
    for spec in (str(path), f"jsonl:{path}", f"jsonl:{tmp_path}"):
        source = open_edits(spec, "all")
        assert [source.task(i) for i in range(4)] == ["remove", "attribute", "background", None]
        assert source.score(2) == 2 and source.load(1, 8, 8)["caption"] == "do 1"
    (tmp_path / "background").mkdir()
    for name in ("0s.png", "0t.png"):
        shutil.copy(tmp_path / name, tmp_path / "background")
    add_line(path, source="background/0s.png", task="style")
    add_line(path, omni_edit_id="attr_bg_7", task="attribute_modification")
    source = open_edits(str(path), "all")
    assert source.task(4) == "style" and source.task(5) == "background"
    (tmp_path / "alias.jsonl").write_text(json.dumps(
        dict(src_img="0s.png", edited_img="0t.png", edited_prompt_list=["", "two"], o_score=9.5)))
    source = open_edits(str(tmp_path / "alias.jsonl"), "all")
    assert source.load(0, 8, 8)["captions"] == ["two"] and source.score(0) == 9.5
    parquet(tmp_path / "p.parquet", {"source_image": ["0s.png", "../0s.png"], "edited_image": ["0t.png"] * 2,
                                     "edit_prompt": ["x", "y"]})
    source = open_edits(f"ultraedit:{tmp_path / 'p.parquet'}", "all")
    assert np.array_equal(source.load(0, 24, 32)["image"], pair(0)[1])
    with pytest.raises(BadFile, match="leaves the data folder"):
        source.load(1, 8, 8)


def test_specs_and_columns_that_do_not_fit(tmp_path):
    parquet(tmp_path / "a.parquet", {"image": ["x"], "prompt": ["y"]})
    for spec, words in (("omniedit", "not a set"), ("omni:x", "not a set"), ("omniedit:", "not a set"),
                        (f"omniedit:{tmp_path / 'none'}", "no such file"), (str(tmp_path), "not a set"),
                        ("scenes:wrong=2", "use a share from 0 to 1"), ("scenes:much", "wrong=SHARE"),
                        ("scenes:unknown", "the levels of scenes are easy, hard"),
                        (f"omniedit:{tmp_path / 'a.parquet'}",
                         r"no column src_img, edited_img, edited_prompt_list \(preset omniedit\) among i"),
                        (f"ip2p:{tmp_path / 'a.parquet'}", "no column original_image or input_image, ")):
        with pytest.raises(SystemExit, match=f"^error: .*{words}") as e:
            open_edits(spec)
        assert "\n" not in str(e.value)
    (tmp_path / "b.jsonl").write_text('{"picture": "a.png"}\n')
    with pytest.raises(SystemExit, match="no usable pairs"):
        open_edits(str(tmp_path / "b.jsonl"))


# bad rows


def test_bad_lines_are_named_counted_and_limited(tmp_path, capsys):
    path = jsonl(tmp_path, 10)
    for row in (dict(score=float("nan")), dict(score=11), dict(score="9"), dict(instruction="  \n"),
                dict(source=None), dict(instruction=None), dict(edited=3), dict(mask=["m"])):
        add_line(path, **row)
    with open(path, "a") as f:
        f.write("{broken\n")
    source = open_edits(str(path), "all")
    err = capsys.readouterr().err
    assert len(source) == 10 and source.bad_lines == 9
    for words in ("line 11: score 'nan' is not a number from 0 to 10", "line 12: score '11'",
                  "line 13: score '9'", "line 14: an empty instruction", "line 17: no target",
                  "line 15: no source (source, source_image", "among source, edited", "line 18: the mask",
                  "line 19: not JSON"):
        assert words in err, words
    for _ in range(4):
        add_line(path, score=-1)
    with pytest.raises(SystemExit, match="line 21: score '-1'"):
        open_edits(str(path), "all")


@pytest.mark.parametrize("more", [0, 1 << 20])  # ends at, and within, a block of the reader
def test_a_line_that_is_too_long_is_one_bad_line(tmp_path, capsys, more):
    path = jsonl(tmp_path, 3)
    add_line(path, instruction="a" * (1 << 20) + "b" * more)
    add_line(path, instruction="after it")
    with open(path, "ab") as f:
        f.write('{"instruction": "café"}\n'.encode("latin-1"))
    source = open_edits(str(path), "all")
    err = capsys.readouterr().err
    assert len(source) == 4 and source.bad_lines == 2 and source.load(3, 8, 8)["caption"] == "after it"
    assert "line 4: longer than 1 MiB" in err and "line 6: not JSON in UTF-8" in err


def test_a_picture_outside_is_named_with_its_line(tmp_path):
    path = jsonl(tmp_path, 3)
    add_line(path, source="/etc/passwd")
    with pytest.raises(BadFile, match="line 4, source: /etc/passwd: leaves the data folder"):
        open_edits(str(path), "all").load(3, 8, 8)


def test_bad_scores_and_instructions_in_parquet(tmp_path, capsys):
    scores = [9.0, float("nan"), None, 11.0, 10.0, 0.0]
    words = [["a"], ["b"], ["c"], ["d"], [" ", ""], []]
    path = omniedit(tmp_path, 6, o_score=scores, edited_prompt_list=words)
    source = open_edits(f"omniedit:{path}", "all")
    err = capsys.readouterr().err
    assert [source.score(i) for i in range(4)] == [9.0, None, 10.0, 0.0] and source.bad_lines == 2
    assert "row 1: score 'nan'" in err and "row 3: score '11.0'" in err
    for i in (2, 3):
        with pytest.raises(BadFile, match=f"row {i + 2}: an empty instruction"):
            source.load(i, 8, 8)
    omniedit(tmp_path, 20, o_score=[12.0] * 20)
    with pytest.raises(SystemExit, match="row 10: score '12.0'.*bad so far: 11"):
        open_edits(f"omniedit:{path}", "all")


def test_pairs_that_do_not_belong_together_are_skipped_and_counted(tmp_path, capsys):
    path = jsonl(tmp_path, 20, mask=True)
    Image.fromarray(noise(12, 16, 3)).save(tmp_path / "3t.png")                     # half the size: resized
    Image.fromarray(noise(24, 33, 4)).save(tmp_path / "4t.png")                   # 3 % wider: another picture
    Image.fromarray(region(48, 48)).save(tmp_path / "5m.png")
    Image.fromarray(region(48, 64)).save(tmp_path / "6m.png")                       # twice the size: fits
    (tmp_path / "7t.png").unlink()
    Image.fromarray(region() * 0).save(tmp_path / "8m.png")
    source = open_edits(str(path), "all")
    assert source.load(3, 24, 32)["image"].shape == (24, 32, 3)
    assert source.load(6, 24, 32)["mask"].shape == (24, 32)
    for i, words in ((4, "the target is 33x24, its source 32x24"), (5, "48x48, but its picture is 32x24"),
                     (7, "target 7t.png: no such file"), (8, "the mask selects nothing")):
        with pytest.raises(BadFile, match=f"line {i + 1}, .*{words}"):
            source.load(i, 24, 32)
    got, stats = batches(source, 10)
    assert stats["skipped"] == 4 and not {4, 5, 7, 8} & {int(i) for b in got for i in b["index"]}
    assert capsys.readouterr().err.count("skipped: ") == 4
    again, _ = batches(source, 10, workers=2)
    assert all(same(a, b) for a, b in zip(got, again))
    for i in range(9, 20):
        (tmp_path / f"{i}s.png").unlink()
    with pytest.raises(SystemExit, match="too many to go on"):
        batches(source, 10, workers=1)


def test_a_huge_instruction_is_cut_and_counted(tmp_path):
    path = jsonl(tmp_path, 1)
    path.write_text(json.dumps(dict(source="0s.png", edited="0t.png", instruction="ab " * 33_000)))
    (b,), stats = batches(open_edits(str(path), "all"), 1)
    assert len(b["caption"][0]) <= 2000 and stats["captions cut"] == 4


# augmentation


def test_source_target_and_mask_are_cropped_and_flipped_together(tmp_path):
    path = jsonl(tmp_path, 16, size=lambda i: (24 + i, 40), mask=True)
    for i in range(16):  # the region is where the source is dark: another crop or flip of the mask would show
        h, w = 24 + i, 40
        m = region(h, w) > 0
        before = np.where(m[..., None], 60, noise(h, w, i) // 3 + 120).astype(np.uint8)
        Image.fromarray(before).save(tmp_path / f"{i}s.png")
        Image.fromarray(before + 40).save(tmp_path / f"{i}t.png")
    got, _ = batches(open_edits(str(path), "all"), 12, p_region=1.0, image_size=24)
    centres = []
    for b in got:
        assert ((b["image"] - b["source"]) * 127.5 - 40).abs().max() < 3
        dark = b["source"].mean(1, keepdim=True) * 127.5 + 127.5 < 95
        assert (dark == (b["mask"] > 0.5)).float().mean() > 0.97
        assert b["mask"].mean((1, 2, 3)).min() > 0.05                     # the crop holds the region
        centres += [(m[0].nonzero().float().mean(0)[1] / m.shape[2]).item() for m in b["mask"]]
    assert min(centres) < 0.45 and max(centres) > 0.55                    # some are flipped


def test_no_flip_where_the_words_have_sides(tmp_path):
    ramp = np.tile(np.linspace(20, 200, 16).astype(np.uint8)[None, :, None], (16, 1, 3))
    for words, flips in (("make it red", True), ("put a bright hat on it", True), ("the LEFT one", False),
                         ("to the right of it", False), ('write "HI"', False), ("the leftmost cat", False)):
        Image.fromarray(ramp).save(tmp_path / "s.png")
        (tmp_path / "p.jsonl").write_text(json.dumps(dict(source="s.png", edited="s.png", instruction=words)))
        got, _ = batches(open_edits(str(tmp_path / "p.jsonl"), "all"), 6)
        up = torch.cat([b["source"][:, 0, 0, -1] > b["source"][:, 0, 0, 0] for b in got])
        assert up.any() and bool((~up).any()) == flips, words


def test_p_region_is_a_share_of_the_pairs_with_a_mask(tmp_path):
    source = open_edits(str(jsonl(tmp_path, 12, mask=True)), "all")
    for p, low, high in ((0.0, 0, 0), (0.3, 0.15, 0.45), (1.0, 1, 1)):
        got, stats = batches(source, 30, p_region=p)
        shown = torch.cat([b["mask"].mean((1, 2, 3)) < 1 for b in got]).float().mean()
        assert low <= shown <= high and stats.get("regions shown", 0) == round(float(shown) * 120)


def test_fit_pair_holds_the_region():
    rng = np.random.default_rng(0)
    for _ in range(50):
        h, w = rng.integers(20, 90, 2)
        m = np.zeros((h, w), np.float32)
        a, b = rng.integers(0, h - 12), rng.integers(0, w - 12)
        m[a:a + 12, b:b + 12] = 1
        im = np.dstack([m * 255] * 3).astype(np.uint8)
        s, t, out = data.fit_pair(im, im, m, 40, 40, *rng.random(2))
        scale = max(40 / h, 40 / w) ** 2
        assert s.shape == t.shape == (40, 40, 3) and out.shape == (40, 40)
        assert abs(out.sum() / (144 * scale) - 1) < 0.35 and set(np.unique(out)) <= {0, 1}
        assert np.abs(s[..., 0] / 255 - out).mean() < 0.05
    soft = np.tile(np.linspace(0, 1, 64, dtype=np.float32), (64, 1))
    assert len(np.unique(data.fit_pair(im := np.zeros((64, 64, 3), np.uint8), im, soft, 16, 16)[2])) > 8


# order


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """40 pairs of every shape from 1:4 to 4:1; tasks of 24, 12 and 4 pairs; scores 0 to 9."""
    root = tmp_path_factory.mktemp("mixed")
    sizes = ((24, 24), (16, 64), (64, 16), (24, 48), (48, 24), (27, 48))
    return open_edits(str(jsonl(root, 40, size=lambda i: sizes[i % 6],
                                task=lambda i: "add" if i >= 36 else "swap" if i % 3 else "remove",
                                score=lambda i: i % 10, mask=True)), "all")


@pytest.mark.parametrize("aspects", [False, True])
def test_same_batches_for_any_number_of_workers_ranks_and_after_a_restart(mixed, aspects):
    kw = dict(aspects=aspects, batch_size=4)
    whole, _ = batches(mixed, 12, **kw)
    state = torch.get_rng_state()
    for workers, start in ((2, 0), (0, 7), (1, 5)):
        part, _ = batches(mixed, 12 - start, workers=workers, start_step=start, **kw)
        assert all(same(a, b) for a, b in zip(whole[start:], part)), (workers, start)
    assert torch.equal(state, torch.get_rng_state())
    ranks = [batches(mixed, 12, **kw | dict(batch_size=2, rank=r, world=2))[0] for r in (0, 1)]
    for g, a, b in zip(whole, *ranks):
        assert a["image"].shape[2:] == b["image"].shape[2:]
        for key in ("image", "source", "mask", "index", "score"):
            assert torch.equal(g[key], torch.cat([a[key], b[key]]))
        for key in ("caption", "task", "position"):
            assert g[key] == a[key] + b[key]
    assert not same(whole[0], batches(mixed, 1, seed=4, **kw)[0][0])


def test_batch_format_and_buckets(mixed):
    got, _ = batches(mixed, 40, aspects=True, p_region=1.0)
    shapes = {tuple(b["image"].shape[2:]) for b in got}
    assert {(8, 32), (32, 8)} <= shapes and len(shapes) >= 5
    for b in got:
        h, w = b["image"].shape[2:]
        assert b["source"].shape == b["image"].shape == (4, 3, h, w) and b["mask"].shape == (4, 1, h, w)
        assert b["score"].dtype == b["mask"].dtype == torch.float32 and b["score"].shape == (4,)
        assert b["position"] == [0, 1, 2, 3] and set(b["task"]) <= {"swap", "remove", "add"} and is_offset(b)
        assert all(bucket(*mixed.size(int(i)), 16, 4, True) == (h, w) for i in b["index"])
        assert [mixed.score(int(i)) for i in b["index"]] == b["score"].tolist()


def drawn(source, epochs, **kw):
    order = EditSampler(source, 16, 4, 0, 0, 1, kw.pop("aspects", False), 4, **kw)
    index, copies = [], set()
    for step in range(epochs * len(order)):
        r = order.request(step)
        one = [order.index(r.bucket, s) for s in r.slot]
        copies |= {(r.epoch, i, int(c)) for i, c in zip(one, r.copy)}
        index += one
    assert len(copies) == len(index)  # every copy has an augmentation of its own
    return order, index


@pytest.mark.parametrize("aspects", [False, True])
def test_tasks_come_equally_often_and_nothing_is_dropped(mixed, aspects):
    even = dict.fromkeys((*mixed.tasks, ""), 1.0)
    order, index = drawn(mixed, 2, weights=even, aspects=aspects)
    tasks = [mixed.task(i) for i in index]
    assert set(index) == set(range(40))
    for t in ("swap", "add", "remove"):
        assert abs(tasks.count(t) / len(tasks) - 1 / 3) < (0.12 if aspects else 0.03)
    each = [index.count(i) for i in range(40) if mixed.task(i) == "swap"]
    assert aspects or max(each) - min(each) <= 1                      # a pair comes again after all others
    assert "add 4 x 6.00" in order.summary() and "swap 24 x 1.00" in order.summary()
    order, index = drawn(mixed, 1, aspects=aspects)                         # as they are
    assert set(index) == set(range(40)) and len(index) == len(order) * 4


def test_weights_and_min_score(mixed):
    order, index = drawn(mixed, 4, weights={"swap": 1, "add": 3})
    tasks = [mixed.task(i) for i in index]
    assert "remove" not in tasks and abs(tasks.count("add") / len(tasks) - 0.75) < 0.03
    assert "left out: 0 by score, 12 by task" in order.summary()
    order, index = drawn(mixed, 1, min_score=5, aspects=True)
    assert set(index) == {i for i in range(40) if i % 10 >= 5} and "left out: 20 by score" in order.summary()
    with pytest.raises(SystemExit, match="^error: --min_score, --tasks: 9.5"):
        drawn(mixed, 1, min_score=9.5)
    for balance in ({"paint": 1}, {"swap": -1}, {"swap": float("nan")}):
        with pytest.raises(SystemExit, match="^error: --tasks: "):
            batches(mixed, 1, balance=balance)
    with pytest.raises(SystemExit, match="none of the 40"):
        batches(mixed, 1, balance={"style": 1})


def test_row_groups_are_read_together(tmp_path):
    source = open_edits(f"omniedit:{omniedit(tmp_path, 30, task=['swap', 'env'] * 15)}", "all")
    source.window = 1
    order = EditSampler(source, 16, 5, 0, 0, 1, False, 4)
    groups = [order.index(0, s) // 3 for k in range(6) for s in order.request(k).slot]
    assert (np.diff(groups) != 0).sum() == 9                                # ten groups, each read once
    got, _ = batches(source, 6, batch_size=5, workers=1, balance=False)
    assert sorted(torch.cat([b["index"] for b in got]).tolist()) == list(range(30))


def test_held_out_pairs_are_stable_and_keep_a_picture_together(tmp_path):
    path = jsonl(tmp_path, 1)
    rows = [dict(source=f"{i % 80}.png", edited=f"{i}t.png", instruction=f"{i}") for i in range(400)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    parts = [set(open_edits(str(path), s).rows.tolist()) for s in ("train", "heldout", "all")]
    assert parts[0] | parts[1] == parts[2] and not parts[0] & parts[1] and 0 < len(parts[1]) < 60
    assert not {r % 80 for r in parts[0]} & {r % 80 for r in parts[1]}
    shutil.move(path, tmp_path / "other.jsonl")
    assert set(open_edits(str(tmp_path / "other.jsonl"), "heldout").rows.tolist()) == parts[1]


def test_twins_and_chains_without_a_key_are_on_one_side(tmp_path):
    """A removal and its addition exchange their pictures; an edit of an edit begins where it ended."""
    path = jsonl(tmp_path, 1)
    rows = [dict(source=f"{a}.png", edited=f"{b}.png", instruction="x") for i in range(300)
            for a, b in ((f"a{i}", f"b{i}"), (f"b{i}", f"a{i}"), (f"b{i}", f"c{i}"))]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "deeper").mkdir()  # pictures of the same names there are others
    shutil.copy(path, tmp_path / "deeper/pairs.jsonl")
    train, held = (open_edits(f"jsonl:{tmp_path}", s).rows for s in ("train", "heldout"))
    assert not set(train // 3) & set(held // 3) and len(train) + len(held) == 1800
    assert 15 < len(set(held // 3)) < 50
    assert set(held[held < 900]) != set(held[held >= 900] - 900)
    assert joined(np.array([[1, 2], [3, 2], [7, 8], [4, 3], [8, 8]])).tolist() == [1, 1, 7, 1, 7]


def test_eval_batches_are_centre_crops_in_order(mixed):
    a = list(data.make_edit_eval_batches(mixed, [5, 2, 9, 0, 7], 16, 3, stride=4))
    assert [b["index"].tolist() for b in a] == [[5, 2, 9], [0, 7]] and a[0]["caption"][0] == "do 5"
    assert a[0]["mask"].min() == 1 and a[1]["position"] == [3, 4]
    b = list(data.make_edit_eval_batches(mixed, [5, 2, 9, 0, 7], 16, 5, stride=4, workers=1))
    assert torch.equal(torch.cat([x["source"] for x in a]), b[0]["source"])


def test_levels_of_scenes():
    for spec, level, wrong in (("scenes", "easy", 0), ("scenes:hard", "hard", 0),
                               ("scenes:wrong=0.5", "easy", 0.5), ("scenes:hard,wrong=0.25", "hard", 0.25)):
        for split in ("train", "all", "heldout"):
            source = open_edits(spec, split)
            assert source.scenes.level == level and source.wrong == (0 if split == "heldout" else wrong)
            assert source.name == ("scenes" if level == "easy" else "scenes:hard")


@pytest.mark.parametrize("aspects, level", [(False, "hard,"), (True, "")])
def test_scenes(aspects, level):
    source = open_edits(f"scenes:{level}wrong=0.5")
    kw = dict(image_size=32, aspects=aspects, batch_size=4)
    a, _ = batches(source, 4, p_region=1.0, **kw)
    b, _ = batches(source, 2, p_region=1.0, start_step=2, workers=1, **kw)
    assert same(a[2], b[0]) and same(a[3], b[1]) and set(a[0]["task"]) <= set(source.tasks)
    assert all((x["score"] >= 0).all() and all(x["caption"]) for x in a)
    got, _ = batches(source, 6, balance={"remove": 3, "style": 1}, min_score=9, **kw)
    tasks = [t for x in got for t in x["task"]]
    assert 15 <= tasks.count("remove") <= 20 and set(tasks) == {"remove", "style"}
    assert min(float(x["score"].min()) for x in got) >= 9
    assert batches(open_edits("scenes", "heldout"), 1, **kw)[0][0]["score"].tolist() == [10] * 4


# the command


def test_check_command(tmp_path):
    sizes, tasks = ((24, 32), (32, 24)), ("swap", "style")
    path = jsonl(tmp_path, 8, lambda i: sizes[i % 2], lambda i: tasks[i % 2], True, score=lambda i: i + 2)
    (tmp_path / "3t.png").unlink()
    r = run_script(data.__file__, "check", path, "--image-size", 32, "--out", tmp_path / "s.png")
    assert r.returncode == 1 and "Traceback" not in r.stderr, r.stderr
    for words in ("8 pairs, 8 looked at, 1 cannot be used", "3t.png: no such file", "swap 4", "style 4",
                  "9 to 10", "mask area", "shape 40x24"):
        assert words in r.stdout, (words, r.stdout)
    assert Image.open(tmp_path / "s.png").width > 200


def test_the_family_of_a_picture_names_no_task(tmp_path):
    """Published rows say a background in their id alone; ours have a column for it, and families of any name
    (of requests: whatever people call their pictures)."""
    omniedit(tmp_path / "ours", 6, family=[f"background-{i}" for i in range(6)])
    ours = open_edits(f"omniedit:{tmp_path / 'ours'}", "all")
    assert [ours.task(i) for i in range(6)] == ["add", "remove", "swap", "attribute", "environment", "style"]
    omniedit(tmp_path / "theirs", 7)
    assert open_edits(f"omniedit:{tmp_path / 'theirs'}", "all").task(6) == "background"
