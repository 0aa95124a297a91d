"""sample.py as a user runs it: every task as a command, untouched pixels, determinism, bad input."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from inprocess import run_script
from PIL import Image

import checkpoint
import common
import flow
import masks
import model
import pipeline
import sample
import windows

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    """A folder with checkpoints (random weights), pictures and masks; nothing in it is written to."""
    root = tmp_path_factory.mktemp("sample")

    def save(name, inpaint, groups, **arch):
        torch.manual_seed(0)
        cfg = model.PRESETS["test"]
        editor = model.Editor(model.inpainting(cfg) if inpaint else cfg)
        tensors = {}
        for group in groups:
            for p in editor.parameters():
                torch.nn.init.normal_(p, std=0.1)
            tensors[group] = {k: v.clone() for k, v in editor.state_dict().items()}
        meta = {"arch": editor.arch | arch, "config": {"image_size": 16}}
        checkpoint.write(root / name, 5, tensors, meta)

    save("run/step_00000005", True, ("model", "ema"))  # as a train script leaves it
    save("shipped", True, ("model",))  # as assets/ have it
    save("t2i_only", False, ("model",))
    save("other_kind", True, ("model",), kind="reward", vit_width=8, txt_width=8, vocab=8)
    shutil.copytree(root / "shipped", root / "flipped")
    raw = bytearray((root / "flipped/model.safetensors").read_bytes())
    raw[-5] ^= 1
    (root / "flipped/model.safetensors").write_bytes(raw)

    rng = np.random.default_rng(0)
    picture = np.asarray(Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((80, 60), 2))
    mask = np.zeros((60, 80), np.uint8)
    mask[20:41, 30:55] = 255
    (root / "many").mkdir()
    Image.fromarray(picture).save(root / "a.png")
    Image.fromarray(mask).save(root / "m.png")
    Image.fromarray(mask).resize((40, 30), 0).save(root / "m_half.png")
    Image.fromarray(mask[:, :60]).save(root / "m_square.png")
    Image.fromarray(mask * 0).save(root / "m_zero.png")
    Image.fromarray(picture).save(root / "many/x.png")
    Image.fromarray(picture[:40]).save(root / "many/y.jpg")
    Image.fromarray(mask).save(root / "many/x.mask.png")
    Image.fromarray(mask[:40]).save(root / "many/y.mask.png")
    (root / "many/z.jpg").write_bytes((root / "many/y.jpg").read_bytes()[:400])  # truncated
    shutil.copy(root / "many/z.jpg", root / "cut.jpg")
    Image.fromarray(picture[..., 0].astype(np.uint16) * 257).save(root / "deep.png")
    hidden = np.dstack([picture, np.where(mask > 0, 255, 0)]).astype(np.uint8)
    Image.fromarray(hidden).save(root / "rgba.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture).save(root / "turned.jpg", exif=exif)
    Image.fromarray(mask.T.copy()).save(root / "turned.mask.png")
    return root


@pytest.mark.parametrize("kind", ["inpaint", "refined", "sd3.5", "editnet", "cached"])
def test_frozen_weights_in_16_bits_give_the_same_pictures(kind):
    """Of every layer that autocast casts, and no other: bit for bit, in half the memory."""
    cfg = model.replace(model.PRESETS["test"], **{
        "inpaint": dict(inpaint=True), "refined": dict(refine=8, qk_norm=False, inpaint=True),
        "sd3.5": dict(dual=1, txt_bytes=0, predict="v"), "editnet": {}, "cached": {}}[kind])
    edits = kind in ("editnet", "cached")
    net = model.EditNet(cfg, cached=kind == "cached") if edits else model.Editor(cfg)
    torch.manual_seed(0)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    net.eval().requires_grad_(False)
    if kind == "sd3.5":
        words, pooled = torch.randn(1, 5, cfg.txt_dim), torch.randn(1, cfg.vec_dim)
        net.read = lambda captions: (words.repeat(len(captions), 1, 1), pooled.repeat(len(captions), 1))
    picture, mask = torch.rand(2, 3, 16, 16) * 2 - 1, torch.ones(2, 1, 16, 16)
    mask[:, :, :5] = 0

    def draw():
        noise = common.randn(common.generators(7, 0, range(2)), picture.shape[1:])
        return pipeline.sample(net, pipeline.PixelSpace(), ["a red star", "snow"], mask, picture, noise,
                               flow.timesteps(3), 2.0, 1.5, bf16=True)

    whole, size = draw(), sum(p.nbytes for p in net.parameters())
    model.half_linears(net)
    assert torch.equal(draw(), whole) and whole.isfinite().all()
    assert sum(p.nbytes for p in net.parameters()) < 0.75 * size


def run(*args):
    """`python sample.py ...`"""
    return run_script(ROOT / "sample.py", *args)


def ask(at, out, task="inpaint", **kw):
    """The same in this process -> {file: uint8 array} of the results."""
    kw = {"ckpt": at / "run", "steps": 2, "precision": "fp32", "device": "cpu", "out": out} | kw
    kw = {k: str(v) if isinstance(v, Path) else v for k, v in kw.items()}
    sample.main(sample.Config(task=task, **kw))
    files = [json.loads(line)["file"] for line in (Path(out) / "samples.jsonl").read_text().splitlines()]
    return {file: np.asarray(Image.open(Path(out) / file)) for file in files}


def edit(at, **kw):
    return {"image": at / "a.png", "mask": at / "m.png", "prompt": "a red star"} | kw


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


# ---- tasks ---------------------------------------------------------------------------------------


def test_inpaint_command(at, tmp_path):
    done = run("inpaint", "--ckpt", at / "run", "--image", at / "a.png", "--mask", at / "m.png", "--prompt",
               "a red star", "--out", tmp_path, "--steps", 3, "--num_samples", 2, "--guidance", 2,
               "--solver", "heun")
    assert done.returncode == 0, done.stderr
    assert f"contact sheet: {tmp_path / 'sheet.png'}" in done.stdout and "regenerates 10.9%" in done.stdout
    assert "100%" in done.stderr  # the progress bar
    before, mask = pixels(at / "a.png"), pixels(at / "m.png")[..., 0] > 0
    results = [pixels(tmp_path / f"a_inpaint_{k}.png") for k in (0, 1)]
    near = masks.dilate(mask, 2)  # --seam 2
    for after in results:
        assert after.shape == before.shape
        assert np.array_equal(after[~near], before[~near])
        assert np.abs(after[mask].astype(int) - before[mask]).mean() > 5
    assert not np.array_equal(*results)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(r["file"], r["seed"], r["sample"], r["prompt"], r["step"]) for r in rows] == [
        ("a_inpaint_0.png", 0, 0, "a red star", 5), ("a_inpaint_1.png", 0, 1, "a red star", 5)]
    assert Image.open(tmp_path / "sheet.png").width > 4 * 80


@pytest.mark.parametrize("seam", [0, 1, 7])
def test_seam(at, tmp_path, seam):
    (after,) = ask(at, tmp_path, **edit(at, seam=seam)).values()
    before, mask = pixels(at / "a.png"), pixels(at / "m.png")[..., 0] > 0
    near = masks.dilate(mask, seam)
    assert np.array_equal(after[~near], before[~near])
    changed = (after != before).any(-1)
    assert changed[mask].mean() > 0.9
    assert not seam or changed[near & ~mask].mean() > 0.5


def test_outpaint_command(at, tmp_path):
    done = run("outpaint", "--ckpt", at / "shipped", "--image", at / "a.png", "--aspect", "2:1", "--seam", 0,
               "--out", tmp_path, "--steps", 2)
    assert done.returncode == 0, done.stderr
    after = pixels(tmp_path / "a_outpaint.png")
    assert after.shape == (60, 120, 3)
    assert np.array_equal(after[:, 20:100], pixels(at / "a.png"))
    assert after[:, :20].std() > 1 and after[:, 100:].std() > 1


def test_outpaint_sides(at, tmp_path):
    (after,) = ask(at, tmp_path, "outpaint", image=at / "a.png", left=7, bottom=30, seam=3).values()
    assert after.shape == (90, 87, 3)
    assert np.array_equal(after[:57, 10:], pixels(at / "a.png")[:57, 3:])


def test_erase_command(at, tmp_path):
    done = run("erase", "--ckpt", at / "run", "--image", at / "many", "--out", tmp_path, "--steps", 2)
    assert done.returncode == 0, done.stderr
    assert "2 result(s)" in done.stdout and "1 input(s) skipped" in done.stdout and "z.jpg" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert {r["prompt"] for r in rows} == {masks.ERASE_PROMPT}
    assert pixels(tmp_path / "y_erase.png").shape == (40, 80, 3)


def test_t2i_command(at, tmp_path):
    done = run("t2i", "--ckpt", at / "t2i_only", "--prompt", "../A red/blue\ncube", "--height", 40,
               "--width", 70, "--out", tmp_path, "--steps", 2)
    assert done.returncode == 0, done.stderr
    assert pixels(tmp_path / "A_red_blue_cube_t2i.png").shape == (40, 70, 3)


def test_t2i_own_size(at, tmp_path):
    (picture,) = ask(at, tmp_path, "t2i", prompt="").values()
    assert picture.shape == (16, 16, 3)


def test_jsonl(at, tmp_path):
    pair = {"image": "a.png", "mask": "m.png"}
    lines = [pair | {"prompt": "one", "id": 7}, pair, None, pair | {"image": "gone.png"},
             pair | {"seed": "x"}, pair | {"seed": 3}]
    for name in ("a.png", "m.png"):
        shutil.copy(at / name, tmp_path / name)
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps(x) if x else "{not json" for x in lines))
    done = run("inpaint", "--ckpt", at / "run", "--jsonl", tmp_path / "in.jsonl", "--prompt", "two", "--out",
               tmp_path / "out", "--steps", 1)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert "in.jsonl:3: not JSON" in said and "in.jsonl:5: seed: 'x'" in said
    assert "gone.png: no such file" in said
    assert "3 result(s)" in said and "3 input(s) skipped" in said
    rows = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert [(r["file"], r["prompt"], r["seed"]) for r in rows] == [
        ("a_inpaint.png", "one", 0), ("a-2_inpaint.png", "two", 0), ("a-3_inpaint.png", "two", 3)]


# ---- what a result depends on --------------------------------------------------------------------


def test_seed_and_batch(at, tmp_path):
    image = Path(shutil.copytree(at / "many", tmp_path / "in"))
    (image / "z.jpg").unlink()
    kw = dict(image=image, prompt="a red star", num_samples=3)
    one = ask(at, tmp_path / "1", batch_size=1, **kw)
    again = ask(at, tmp_path / "2", batch_size=1, **kw)
    large = ask(at, tmp_path / "3", batch_size=16, **kw)
    seeded = ask(at, tmp_path / "4", batch_size=1, seed=1, **kw)
    alone = ask(at, tmp_path / "5", batch_size=1, **kw | {"image": image / "y.jpg", "num_samples": 1})
    assert one.keys() == large.keys() and len(one) == 6
    for file in one:
        assert np.array_equal(one[file], again[file])
        assert np.abs(one[file].astype(int) - large[file]).max() <= 2  # other matrix shapes, other rounding
        assert not np.array_equal(one[file], seeded[file])
    assert np.array_equal(alone["y_inpaint.png"], one["y_inpaint_0.png"])


def test_weights(at, tmp_path):
    got = {w: ask(at, tmp_path / w, weights=w, **edit(at))["a_inpaint.png"] for w in ("auto", "ema", "model")}
    assert np.array_equal(got["auto"], got["ema"]) and not np.array_equal(got["ema"], got["model"])


def test_prompt_and_guidance(at, tmp_path):
    plain = ask(at, tmp_path / "1", **edit(at))["a_inpaint.png"]
    other = ask(at, tmp_path / "2", **edit(at, prompt="a blue cube"))["a_inpaint.png"]
    guided = ask(at, tmp_path / "3", **edit(at, guidance=4.0))["a_inpaint.png"]
    free = [ask(at, tmp_path / "4", **edit(at, prompt="", guidance=g))["a_inpaint.png"].astype(int)
            for g in (1.0, 4.0)]
    assert not np.array_equal(plain, other) and not np.array_equal(plain, guided)
    assert np.abs(free[0] - free[1]).max() <= 2  # without a prompt there is nothing to guide towards


def test_blend_every_step(at, tmp_path):
    kept = ask(at, tmp_path, **edit(at, blend="every"))["a_inpaint.png"]
    assert np.array_equal(kept[:18], pixels(at / "a.png")[:18])


def test_hidden_pixels_do_not_leak(at, tmp_path):
    """What lies under the mask must not reach the model: the result inside is the same whatever was there."""
    picture, mask = pixels(at / "a.png").copy(), pixels(at / "m.png")[..., 0] > 0
    results = []
    for colour in (0, 255):
        picture[mask] = colour
        Image.fromarray(picture).save(tmp_path / "b.png")
        results += ask(at, tmp_path / "out", **edit(at, image=tmp_path / "b.png", seam=0)).values()
    assert np.array_equal(*results)


def test_to_work_geometry():
    """No squashing, the rest reflected; known pixels hold only known colours, the mask covers every hole."""
    canvas = np.full((60, 30, 3), 255, np.uint8)
    mask = np.zeros((60, 30), np.float32)
    mask[13, 5] = 1  # smaller than a working pixel
    canvas[13, 5] = 0
    (top, left, h, w), hole, masked = sample.to_work(canvas, mask, 16, 16)
    assert (top, left, h, w) == (0, 4, 16, 8) and hole.shape == (1, 16, 16) and masked.shape == (3, 16, 16)
    assert hole[0, :, 4:12].sum() == 1 and hole[0, 3, 5] == 1
    assert torch.allclose(masked, (1 - hole).expand(3, -1, -1), atol=1e-5)
    assert torch.equal(masked[:, :, :4], masked[:, :, 4:8].flip(2))


def test_same_size_is_not_resampled():
    rng = np.random.default_rng(0)
    canvas = rng.integers(0, 256, (16, 16, 3), np.uint8)
    box, hole, masked = sample.to_work(canvas, np.zeros((16, 16), np.float32), 16, 16)
    mask, window = np.ones((16, 16), np.float32), windows.Window(0, 0, 16, 16)
    job = sample.Job("a", "", 0, canvas, canvas, mask, True, [], window, canvas * 0, mask * 0, mask * 0, {},
                     None, box=box)
    assert np.array_equal(sample.finish(sample.place(masked, job), 0), canvas)


# ---- unusual but fine ----------------------------------------------------------------------------


def test_formats(at, tmp_path):
    (deep,) = ask(at, tmp_path, **edit(at, image=at / "deep.png")).values()
    grey = pixels(at / "a.png")[:18, :, :1]
    assert np.array_equal(deep[:18], np.repeat(grey, 3, 2))  # scaled, not saturated
    (rgba,) = ask(at, tmp_path, **edit(at, image=at / "rgba.png")).values()
    before = np.asarray(Image.open(at / "rgba.png"))
    assert np.array_equal(rgba[..., 3], before[..., 3]) and np.array_equal(rgba[:18], before[:18])
    (turned,) = ask(at, tmp_path, image=at / "turned.jpg", prompt="").values()
    assert turned.shape == (80, 60, 3)


def test_mask_of_half_size(at, tmp_path, capsys):
    (after,) = ask(at, tmp_path, **edit(at, mask=at / "m_half.png")).values()
    assert "40x30 stretched to 80x60" in capsys.readouterr().out
    assert np.array_equal(after[:17], pixels(at / "a.png")[:17])


@pytest.mark.parametrize("values", ["0 and 1", "16 bit", "1 bit", "palette", "alpha"])
def test_mask_values(at, tmp_path, values):
    """However a mask is stored, it selects the same pixels."""
    m = (pixels(at / "m.png")[..., 0] > 0).astype(np.uint8)
    palette = Image.fromarray(m).convert("P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    white = np.dstack([np.full((*m.shape, 3), 255, np.uint8), m * 255])
    stored = {"0 and 1": Image.fromarray(m), "16 bit": Image.fromarray(m.astype(np.uint16) * 65535),
              "1 bit": Image.fromarray(m * 255).convert("1"), "palette": palette,
              "alpha": Image.fromarray(white)}
    stored[values].save(tmp_path / "m.png")
    (got,), (expected,) = (ask(at, tmp_path / str(i), **edit(at, mask=f)).values()
                           for i, f in enumerate((tmp_path / "m.png", at / "m.png")))
    assert np.array_equal(got, expected)


def test_long_prompt(at, tmp_path, capsys):
    ask(at, tmp_path, **edit(at, prompt="é" * 50_000))
    assert "the model reads 128 bytes of the prompt" in capsys.readouterr().out


def test_extreme_shape(at, tmp_path):
    Image.new("RGB", (300, 2)).save(tmp_path / "thin.png")
    Image.new("L", (300, 2), 255).save(tmp_path / "thin.mask.png")
    (after,) = ask(at, tmp_path, "erase", image=tmp_path / "thin.png").values()
    assert after.shape == (2, 300, 3)


@pytest.mark.slow
def test_two_ranks(at, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               ROOT / "sample.py", "erase", "--ckpt", at / "run", "--image", at / "many", "--out", tmp_path,
               "--steps", "1", "--device", "cpu"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "2 result(s)" in done.stdout and "1 input(s) skipped" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert {r["file"] for r in rows} == {"x_erase.png", "y_erase.png"}


# ---- bad input: one line, exit code not zero -----------------------------------------------------

BAD = {  # name -> (task, flags, words of the line)
    "missing image": ("inpaint", {"image": "gone.png"}, "gone.png: no such file"),
    "no image": ("inpaint", {"image": None}, "--image: missing"),
    "missing mask": ("inpaint", {"mask": "gone.png"}, "gone.png: no such mask"),
    "no mask": ("inpaint", {"mask": None}, "a.mask.png: no such mask"),
    "mask of another aspect": ("inpaint", {"mask": "m_square.png"}, "60x60, but"),
    "zero mask": ("inpaint", {"mask": "m_zero.png"}, "selects nothing"),
    "truncated": ("inpaint", {"image": "cut.jpg"}, "cut.jpg: "),
    "not a picture": ("inpaint", {"image": "run/step_00000005/manifest.json"}, "not a readable picture"),
    "no prompt": ("inpaint", {"prompt": None}, "--prompt: missing"),
    "missing jsonl": ("inpaint", {"image": None, "jsonl": "gone.jsonl"}, "gone.jsonl: no such file"),
    "image and jsonl": ("inpaint", {"jsonl": "in.jsonl"}, "not together with --image"),
    "mask with t2i": ("t2i", {"image": None}, "--mask: "),
    "mask with outpaint": ("outpaint", {"left": 4}, "--mask: "),
    "prompt with erase": ("erase", {}, "--prompt: a red star: not used by erase"),
    "size with inpaint": ("inpaint", {"width": 40}, "--width: 40"),
    "nothing to add": ("outpaint", {"mask": None}, "--aspect: missing"),
    "zero to add": ("outpaint", {"mask": None, "left": 0}, "--aspect: missing"),
    "aspect and side": ("outpaint", {"mask": None, "aspect": "2:1", "left": 3}, "--aspect: 2:1: not toge"),
    "odd aspect": ("outpaint", {"mask": None, "aspect": "wide"}, "--aspect: wide"),
    "zero aspect": ("outpaint", {"mask": None, "aspect": "0:1"}, "--aspect: 0:1"),
    "aspect already": ("outpaint", {"mask": None, "aspect": "4:3"}, "4:3 already"),
    "too large": ("outpaint", {"mask": None, "aspect": "900000:1"}, "over the cap"),
    "negative side": ("outpaint", {"mask": None, "left": -4}, "--left: -4"),
    "blend with t2i": ("t2i", {"image": None, "mask": None, "blend": "every"}, "--blend"),
    "steps": ("inpaint", {"steps": 0}, "--steps: 0"),
    "guidance": ("inpaint", {"guidance": float("nan")}, "--guidance: nan"),
    "shift": ("inpaint", {"shift": 0.0}, "--shift: 0.0"),
    "size off the patch": ("inpaint", {"size": 18}, "--size: 18"),
    "size too large": ("inpaint", {"size": 4000}, "--size: 4000"),
    "device": ("inpaint", {"device": "tpu9"}, "--device: tpu9"),
    "no picture": ("inpaint", {"image": "gone.png", "prompt": None}, "gone.png: no such file"),
    "no checkpoint": ("inpaint", {"ckpt": "gone"}, "gone: no such"),
    "flipped byte": ("inpaint", {"ckpt": "flipped"}, "flipped/model.safetensors: SHA-256"),
    "other kind": ("inpaint", {"ckpt": "other_kind"}, "other_kind: holds a 'reward'"),
    "no inpainting model": ("inpaint", {"ckpt": "t2i_only"}, "--stage inpaint"),
    "no ema": ("inpaint", {"ckpt": "shipped", "weights": "ema"}, "no file named ema"),
    "out is a file": ("inpaint", {"out": "a.png"}, "--out: "),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(at, tmp_path, name):
    task, flags, words = BAD[name]
    paths = ("image", "mask", "jsonl", "ckpt", "out")
    flags = {k: at / v if k in paths and v else v for k, v in (edit(at) | flags).items()}
    with pytest.raises(SystemExit) as e:
        ask(at, flags.pop("out", tmp_path), task, **flags)
    line = str(e.value.code)
    assert line.startswith("error: ") and words in line and "\n" not in line, line


def test_input_is_not_overwritten(at, tmp_path):
    for name in ("a_inpaint.png", "a.png"):
        shutil.copy(at / "a.png", tmp_path / name)
    rows = [{"image": "a.png", "mask": "a_inpaint.png"}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(SystemExit, match="would overwrite the input a_inpaint.png"):
        ask(at, tmp_path, jsonl=tmp_path / "in.jsonl", prompt="")


def test_nothing_usable(at, tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(SystemExit, match="nothing to do"):
        ask(at, tmp_path / "out", image=tmp_path / "in", prompt="")
    shutil.copy(at / "cut.jpg", tmp_path / "in")
    with pytest.raises(SystemExit, match="all 1 inputs skipped"):
        ask(at, tmp_path / "out", image=tmp_path / "in", prompt="")


def test_exit_code(tmp_path):
    """Of a process, too."""
    args = "inpaint", "--ckpt", "gone", "--image", "gone.png", "--prompt", "", "--out", tmp_path
    command = [sys.executable, ROOT / "sample.py", *args]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: --image: gone.png: no such file")
    wrong = run("inpaint", "--ckpt", "gone", "--imgae", "a.png", "--out", tmp_path)
    assert wrong.returncode == 1 and "--imgae: there is no such flag: use --image" in wrong.stderr


def test_one_line(at, tmp_path):
    done = run("erase", "--ckpt", at / "run", "--image", at / "cut.jpg", "--out", tmp_path)
    said = done.stderr.replace("\r", "\n").splitlines()
    assert done.returncode == 1 and said[-1].startswith("error: ") and "cut.jpg" in said[-1]
    assert not [line for line in said[:-1] if line.strip() and "erase steps" not in line]


def test_help():
    done = run("--help")
    flags = [f"--{k.replace('_', '-')} " for k in sample.Config.__annotations__ if k != "task"]
    assert done.returncode == 0 and not [f for f in flags if f not in done.stdout]
