"""sample.py on large pictures, with alpha, in other colour spaces, under odd names; its windows."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_pictures import P3_XY, matrix_profile, turned

import checkpoint
import masks
import model
import sample
import windows
from runs import crops
from windows import Window, plan


def hole(shape, *boxes):
    m = np.zeros(shape, np.float32)
    for top, left, h, w in boxes:
        m[top:top + h, left:left + w] = 1
    return m


# windows


def test_a_small_hole_has_a_window_of_the_models_size_inside_the_picture():
    assert plan(hole((3000, 4000), (1400, 2000, 100, 100)), 512) == [Window(1194, 1794, 512, 512)]
    assert plan(hole((3000, 4000), (0, 3990, 10, 10)), 512) == [Window(0, 3488, 512, 512)]
    assert plan(hole((300, 4000), (0, 2000, 100, 100)), 512)[0][2:4] == (300, 512)  # as tall as there is
    assert plan(hole((3000, 4000), (1000, 2000, 400, 300)), 512) == [Window(800, 1750, 800, 800)]  # twice
    assert plan(np.ones((3000, 4000)), 512) == [Window(0, 0, 3000, 4000)]
    assert plan(hole((60, 64), (20, 20, 30, 30)), 64) == [Window(0, 0, 60, 64)]


def test_holes_far_apart_have_their_own_windows_and_near_ones_share():
    far = plan(hole((3000, 4000), (100, 100, 50, 50), (2800, 3800, 50, 50)), 256)
    assert far == [Window(0, 0, 256, 256), Window(2697, 3697, 256, 256)]
    assert len(plan(hole((3000, 4000), (100, 100, 50, 50), (150, 170, 50, 50)), 256)) == 1


@pytest.mark.parametrize("mask", [
    hole((900, 1200), (0, 0, 900, 150), (0, 1050, 900, 150)),  # the rim of an outpainting, two sides
    1 - hole((900, 1200), (100, 100, 700, 1000)),  # four sides
    hole((900, 1200), (300, 350, 300, 280)),  # larger than the model's size
    hole((900, 1200), (5, 5, 2, 1100))], ids=["rims", "frame", "large", "scratch"])
def test_large_and_long_holes_are_tiled_and_covered(mask):
    """Tiles with all of the trust somewhere; every one at a finer scale than the first pass, none empty."""
    found = plan(mask, 128)
    first, tiles = [w for w in found if not w.tile], [w for w in found if w.tile]
    assert first and tiles and found == first + tiles and len(found) < 60
    for group in (first, tiles):
        best = np.zeros(mask.shape, np.float32)
        for w in group:
            at = sample.cut(w)
            assert mask[at].any() and w.height >= 128 and w.width >= 128
            best[at] = np.maximum(best[at], windows.trust(w, mask.shape))
        assert best[mask > 0].min() == 1
    assert max(w.width for w in tiles) < min(w.width for w in first)


def test_trust_falls_only_where_the_picture_goes_on():
    t = windows.trust(Window(0, 10, 8, 16), (50, 100))
    assert t.shape == (8, 16) and t[0, 8] == 1 and t[7, 8] == 0.25 and t[0, 0] == 0.125 and t[0, 15] == 0.125
    assert (windows.trust(Window(0, 0, 8, 16), (8, 16)) == 1).all()


# sample.py


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    root = tmp_path_factory.mktemp("crop")
    for name, net in (("fill", model.Editor(model.inpainting(model.PRESETS["test"]))),
                      ("edit", model.EditNet(model.PRESETS["test"]))):
        torch.manual_seed(0)
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.1)
        meta = {"arch": net.arch, "config": {"image_size": 16}}
        checkpoint.write(root / name, 5, {"model": net.state_dict()}, meta)
    rng = np.random.default_rng(0)
    picture = np.asarray(Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).resize((300, 200), 2))
    Image.fromarray(picture).save(root / "a.png")
    Image.fromarray((hole((200, 300), (90, 140, 12, 12)) * 255).astype(np.uint8)).save(root / "m.png")
    two = hole((200, 300), (20, 20, 8, 8), (170, 260, 40, 30))
    Image.fromarray((two * 255).astype(np.uint8)).save(root / "two.png")
    return root


def ask(at, out, task="inpaint", **kw):
    kw = {"ckpt": at / ("edit" if task == "edit" else "fill"), "steps": 2, "precision": "fp32",
          "device": "cpu", "out": out, "image": at / "a.png"} | kw
    kw |= {"prompt": "a red star"} if task == "inpaint" else {}
    sample.main(sample.Config(task=task, **{k: str(v) if isinstance(v, Path) else v for k, v in kw.items()}))
    rows = [json.loads(line) for line in (Path(out) / "samples.jsonl").read_text().splitlines()]
    return rows, [np.asarray(Image.open(Path(out) / row["file"])) for row in rows]


@pytest.mark.parametrize("task", ["inpaint", "erase", "edit"])
@pytest.mark.parametrize("mask", ["m.png", "two.png"])
def test_windows_give_detail_and_leave_the_rest_alone(at, tmp_path, task, mask):
    kw = dict(mask=at / mask, seam=2) | ({"instruction": ("make it red",)} if task == "edit" else {})
    before, region = np.asarray(Image.open(at / "a.png")), np.asarray(Image.open(at / mask)) > 0
    got = {}
    for crop in ("none", "auto", "mask"):
        rows, (got[crop],) = ask(at, tmp_path / crop, task, crop=crop, **kw)
        outside = ~masks.dilate(region, 2)
        assert np.array_equal(got[crop][outside], before[outside])
        assert rows[0]["windows"] == (1 if crop == "none" else len(plan(region, 16)))
    assert np.array_equal(got["auto"], got["mask"]) and len(plan(region, 16)) > (mask == "two.png")

    def detail(x):
        return np.hypot(*np.gradient(x.astype(float).mean(2)))[region].mean()

    assert detail(got["auto"]) > 1.5 * detail(got["none"])


def test_the_rim_of_a_large_photo_is_tiled_and_the_photo_untouched(at, tmp_path):
    rows, (got,) = ask(at, tmp_path, "outpaint", left=40, right=40, seam=0)
    assert got.shape == (200, 380, 3) and rows[0]["windows"] > 5
    assert np.array_equal(got[:, 40:-40], np.asarray(Image.open(at / "a.png")))
    assert got[:, :40].std() > 1 and (got[:, :40] == 128).mean() < 0.1


def test_windows_do_not_depend_on_the_batch(at, tmp_path):
    many = tmp_path / "in"
    many.mkdir()
    for name, mask in (("x", "m"), ("y", "two")):
        for suffix, file in (("", "a"), (".mask", mask)):
            os.symlink(at / f"{file}.png", many / f"{name}{suffix}.png")
    both, one = (ask(at, tmp_path / str(n), image=many, batch_size=n, num_samples=2)[1] for n in (8, 1))
    assert len(both) == 4
    alone = ask(at, tmp_path / "alone", mask=at / "m.png")[1][0]
    rows = [json.loads(x) for x in (tmp_path / "1/samples.jsonl").read_text().splitlines()]
    by_name = {row["file"]: picture for row, picture in zip(rows, one)}
    assert np.array_equal(by_name["x_inpaint_0.png"], alone)
    rows = [json.loads(x) for x in (tmp_path / "8/samples.jsonl").read_text().splitlines()]
    for row, picture in zip(rows, both):
        assert np.abs(picture.astype(int) - by_name[row["file"]]).max() <= 3, row["file"]


def test_alpha_comes_back_untouched(at, tmp_path, capsys):
    rgb = np.asarray(Image.open(at / "a.png"))
    alpha = np.tile(np.arange(300) % 256, (200, 1)).astype(np.uint8)
    rgba = np.dstack([rgb, alpha])
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    far = ~masks.dilate(np.asarray(Image.open(at / "m.png")) > 0, 2)
    _, (got,) = ask(at, tmp_path / "1", image=tmp_path / "rgba.png", mask=at / "m.png")
    assert np.array_equal(got[..., 3], alpha) and np.array_equal(got[far], rgba[far])
    _, (got,) = ask(at, tmp_path / "2", "outpaint", image=tmp_path / "rgba.png", left=10, seam=0)
    assert (got[:, :10, 3] == 255).all() and np.array_equal(got[:, 10:], rgba)
    texts = ("make it red", "make it blue")
    rows, (_, got) = ask(at, tmp_path / "3", "edit", image=tmp_path / "rgba.png", instruction=texts)
    assert np.array_equal(got[..., 3], alpha) and [r["turn"] for r in rows] == [1, 2]
    clear = rgba.copy()
    clear[90:102, 140:152, 3] = 0
    Image.fromarray(clear).save(tmp_path / "clear.png")
    ask(at, tmp_path / "4", image=tmp_path / "clear.png", mask=at / "m.png")
    assert "100% of what is regenerated is transparent, and stays so" in capsys.readouterr().out


def test_a_wide_gamut_photo_gives_srgb_that_says_so(at, tmp_path, capsys):
    icc = matrix_profile(P3_XY, 2.2, b"Wide")
    Image.open(at / "a.png").save(tmp_path / "wide.png", icc_profile=icc)
    frames = [Image.open(at / "a.png")] * 2
    frames[0].save(tmp_path / "anim.tif", save_all=True, append_images=frames[1:])
    _, (got,) = ask(at, tmp_path / "1", image=tmp_path / "wide.png", mask=at / "m.png")
    file = Image.open(tmp_path / "1/wide_inpaint.png")
    assert "srgb" in file.info and "icc_profile" not in file.info
    right = sample.read_image(str(tmp_path / "wide.png"))
    assert np.array_equal(got[:80], right[:80]) and not np.array_equal(right, np.asarray(frames[0]))
    ask(at, tmp_path / "2", image=tmp_path / "anim.tif", mask=at / "m.png")
    said = capsys.readouterr().out
    assert "wide.png: converted from Wide to sRGB" in said and "anim.tif: 2 frames: the first is used" in said


def test_a_mask_of_stored_pixels_is_turned_with_its_photo(at, tmp_path):
    picture, mask = np.asarray(Image.open(at / "a.png")), np.asarray(Image.open(at / "two.png"))
    for turn, back in ((3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a))):
        (tmp_path / "x.png").write_bytes(turned(picture, turn))
        _, (got,) = ask(at, tmp_path / str(turn), image=tmp_path / "x.png", mask=at / "two.png")
        changed = (back(got) != picture).any(2)
        assert not changed[~masks.dilate(mask > 0, 2)].any() and changed[mask > 0].mean() > 0.9


@pytest.mark.parametrize("task", ["inpaint", "edit"])
def test_odd_names_are_one_line_each(at, tmp_path, capfd, task):
    names = "a\0b.png", "x" * 5000, "x" * 300 + ".png", "\ud800.png", "\x1b[31mred.png", "new\nline.png"
    row = {"image": str(at / "a.png"), "mask": str(at / "m.png"), "prompt": "x", "instruction": "go"}
    rows = [row, *(row | {key: name} for key in ("image", "mask") for name in names)]
    twice = json.dumps(row)[:-1] + ', "mask": "m.png"}'
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + twice)
    rows, _ = ask(at, tmp_path / "out", task, image=None, jsonl=tmp_path / "in.jsonl", steps=1)
    said = "".join(capfd.readouterr())
    assert len(rows) == 1 and "1 result(s)" in said and "13 input(s) skipped" in said
    assert said.count("skipped: ") == 13 and "two keys named mask" in said
    assert not set(said) & set("\x1b\0\ud800") and max(map(len, said.split("\n"))) < 1000


def test_crops_measures_both(at, tmp_path, capsys):
    small = dict(n=2, height=96, width=128, hole=12, rim=16, steps=1)
    crops.main(crops.Config(str(at / "fill"), str(tmp_path), **small))
    said = capsys.readouterr().out
    assert all(f"| {task} | {crop} |" in said for task in ("hole", "rim") for crop in ("none", "auto"))
    truth, got = (np.asarray(Image.open(tmp_path / f / "000.png")) for f in ("hole", "rim"))
    assert truth.shape == (96, 128, 3) and np.array_equal(got[:, -1], truth[:, -17])
    assert crops.gradient(np.tile(np.arange(0, 60, 3, dtype=np.uint8)[:, None, None], (1, 9, 3))).mean() == 3
