"""sample.py edit: sizes, masks, guidance, chains, the trees that scorers read, bad input."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
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

ROOT = Path(__file__).resolve().parent.parent
SIZES = [(91, 37), (128, 32), (50, 200), (16, 16), (300, 2)]  # width, height


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    """A folder with checkpoints (random weights), pictures and masks; nothing in it is written to."""
    root = tmp_path_factory.mktemp("edit")

    def save(name, net, **config):
        torch.manual_seed(0)
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.1)
        meta = {"arch": net.arch, "config": {"image_size": 16, "aspects": True} | config}
        checkpoint.write(root / name, 5, {"model": net.state_dict()}, meta)

    cfg = model.PRESETS["test"]
    for variant in model.VARIANTS:
        save(variant, model.EditNet(cfg, variant))
    save("cached", model.EditNet(cfg, cached=True))
    save("square", model.EditNet(cfg), aspects=False)
    save("inpainting", model.Editor(model.inpainting(cfg)))
    shutil.copytree(root / "concat", root / "mixed")  # the tensors of one variant, the manifest of another
    checkpoint.write(root / "mixed", 5, {"model": model.EditNet(cfg, "concat").state_dict()},
                            {"arch": model.EditNet(cfg).arch, "config": {"image_size": 16}})

    rng = np.random.default_rng(0)
    for w, h in [*SIZES, (80, 60)]:
        noise = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
        noise.resize((w, h), 2).save(root / f"{w}x{h}.png")
    mask = np.zeros((60, 80), np.uint8)
    mask[20:41, 30:55] = 255
    (root / "many").mkdir()
    Image.fromarray(mask).save(root / "m.png")
    Image.fromarray(mask[:, :60]).save(root / "m_square.png")
    Image.fromarray(np.where(mask > 0, 153, 0).astype(np.uint8)).save(root / "half.png")
    soft = np.where(mask > 0, 255, np.where(masks.dilate(mask > 0, 6), 128, 0))
    Image.fromarray(soft.astype(np.uint8)).save(root / "soft.png")
    shutil.copy(root / "80x60.png", root / "a.png")
    shutil.copy(root / "a.png", root / "many/x.png")
    shutil.copy(root / "m.png", root / "many/x.mask.png")
    (root / "many/x.txt").write_text("make it red\nmake it blue\n")
    Image.open(root / "91x37.png").save(root / "many/y.jpg")
    (root / "many/y.txt").write_text("remove the star")
    (root / "cut.jpg").write_bytes((root / "many/y.jpg").read_bytes()[:400])
    return root


def run(*args):
    """`python sample.py ...`"""
    return run_script(ROOT / "sample.py", *args)


def ask(at, out, **kw):
    """sample.py edit in this process -> {file: uint8 array} of the results."""
    kw = {"ckpt": at / "editnet", "steps": 2, "precision": "fp32", "device": "cpu", "out": out} | kw
    kw = {k: str(v) if isinstance(v, Path) else v for k, v in kw.items()}
    sample.main(sample.Config(task="edit", **kw))
    return {row["file"]: pixels(Path(out) / row["file"]) for row in rows(out)}


def rows(out):
    return [json.loads(line) for line in (Path(out) / "samples.jsonl").read_text().splitlines()]


def one(at, out, **kw):
    kw = {"image": at / "a.png", "instruction": ("make it red",)} | kw
    (picture,) = ask(at, out, **kw).values()
    return picture


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


# ---- one edit ------------------------------------------------------------------------------------


def test_command(at, tmp_path):
    done = run("edit", "--ckpt", at / "editnet", "--image", at / "a.png", "--mask", at / "m.png",
               "--instruction", "make it red (or not)", "and, then, blue", "--out", tmp_path, "--steps", 2,
               "--num_samples", 2, "--guidance", 4, "--image_guidance", 1.2, "--solver", "heun",
               "--blend", "alternate")
    assert done.returncode == 0, done.stderr
    assert "100%" in done.stderr and "4 result(s)" in done.stdout and "sheet.png" in done.stdout
    got = [(r["file"], r["turn"], r["sample"], r["instruction"]) for r in rows(tmp_path)]
    assert got == [("a_edit_turn1_0.png", 1, 0, "make it red (or not)"),
                   ("a_edit_turn1_1.png", 1, 1, "make it red (or not)"),
                   ("a_edit_turn2_0.png", 2, 0, "and, then, blue"),
                   ("a_edit_turn2_1.png", 2, 1, "and, then, blue")]
    row = rows(tmp_path)[0]
    assert (row["guidance"], row["image_guidance"], row["blend"]) == (4, 1.2, "alternate")
    assert row["mask_area"] < 0.12
    before, near = pixels(at / "a.png"), masks.dilate(pixels(at / "m.png")[..., 0] > 0, 2)
    for file, *_ in got:
        after = pixels(tmp_path / file)
        assert np.array_equal(after[~near], before[~near]) and not np.array_equal(after, before)
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.width > 4 * 80 and sheet.height > 2 * 60  # picture, mask, two turns; a row for each sample


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("ckpt", ["editnet", "square"])
def test_size_in_is_size_out(at, tmp_path, ckpt, size):
    w, h = size
    after = one(at, tmp_path, ckpt=at / ckpt, image=at / f"{w}x{h}.png")
    assert after.shape == (h, w, 3)
    work = rows(tmp_path)[0]["work"]
    assert work == [16, 16] if ckpt == "square" else 120 <= work[0] * work[1] <= 320
    if ckpt == "editnet" and 1 / 4 <= h / w <= 4:
        assert abs(np.log(work[0] * w / (work[1] * h))) < 0.35  # as near as 4 pixels at a side of 8 allow


@pytest.mark.parametrize("seam", [0, 3])
@pytest.mark.parametrize("mask", ["m.png", "soft.png"])
def test_paste(at, tmp_path, seam, mask):
    """Outside the mask and its seam the original, bit for bit; with paste=False the model's pixels."""
    before, region = pixels(at / "a.png"), pixels(at / mask)[..., 0]
    outside = ~masks.dilate(region > 127, seam) & (region == 0)
    after = one(at, tmp_path / "1", mask=at / mask, seam=seam, crop="none")
    bare = one(at, tmp_path / "2", mask=at / mask, seam=seam, paste=False)
    inside = region == 255
    assert np.array_equal(after[outside], before[outside])
    assert np.array_equal(after[inside], bare[inside]) and (after != before).any(-1)[inside].mean() > 0.9
    assert (bare != before).any(-1)[outside].mean() > 0.9
    assert rows(tmp_path / "1")[0]["mask_area"] == rows(tmp_path / "2")[0]["mask_area"] < 0.5


def test_free_form_and_mask_differ(at, tmp_path):
    free = one(at, tmp_path / "1", paste=False)
    ones = Image.new("L", (80, 60), 255)
    ones.save(tmp_path / "ones.png")
    assert np.array_equal(free, one(at, tmp_path / "2", mask=tmp_path / "ones.png"))
    assert not np.array_equal(free, one(at, tmp_path / "3", mask=at / "m.png", paste=False))
    beside = one(at, tmp_path / "4", image=at / "many/x.png")  # x.mask.png
    assert np.array_equal(beside, one(at, tmp_path / "5", mask=at / "m.png"))


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_blend(at, tmp_path, solver):
    """An even number of alternating steps ends on the source outside the mask, an odd number does not."""
    before = pixels(at / "16x16.png")
    mask = np.zeros((16, 16), np.uint8)
    mask[4:8, 4:12] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    got = {}
    for name, kw in {"none": {}, "even": dict(blend="alternate"), "odd": dict(blend="alternate", steps=3),
                     "always": dict(blend="every", steps=3)}.items():
        got[name] = one(at, tmp_path / name, image=at / "16x16.png", mask=tmp_path / "m.png", paste=False,
                        solver=solver, **kw)
    kept = {name: np.array_equal(x[mask == 0], before[mask == 0]) for name, x in got.items()}
    assert kept == {"none": False, "even": True, "odd": False, "always": True}


@pytest.mark.parametrize("ckpt", [*model.VARIANTS, "cached"])
def test_variants_depend_on_all_they_are_given(at, tmp_path, ckpt):
    base = one(at, tmp_path / "0", ckpt=at / ckpt)
    for n, kw in enumerate((dict(instruction=("turn it blue",)), dict(image=at / "91x37.png"), dict(seed=1),
                            dict(guidance=1.0), dict(image_guidance=1.0), dict(steps=3)), 1):
        assert not np.array_equal(base, one(at, tmp_path / str(n), ckpt=at / ckpt, **kw)), kw
    assert np.array_equal(base, one(at, tmp_path / "again", ckpt=at / ckpt))


def load(at, name):
    tensors, manifest = checkpoint.load(at / name)
    net = model.build_editnet(manifest["arch"], name)
    checkpoint.load_state(net, tensors["model"], name)
    return net.eval().requires_grad_(False)


@pytest.mark.parametrize("ckpt", ["editnet", "cached"])
@pytest.mark.parametrize("scales, rows", [((3.0, 1.5), 3), ((3.0, 1.0), 2), ((2.0, 2.0), 2), ((1.0, 1.0), 1)])
def test_guidance_is_the_formula(at, ckpt, scales, rows):
    """pipeline.sample against InstructPix2Pix's formula from three plain calls a step, and its rows."""
    net, g = load(at, ckpt), torch.Generator().manual_seed(0)
    source, region = torch.rand(2, 3, 16, 24, generator=g) * 2 - 1, torch.ones(2, 1, 16, 24)
    region[1, :, :8] = 0
    texts, sizes, ticks = ["make it red", "add a cube"], [], []
    net.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    noise = common.randn(common.generators(0, 0, [0, 1]), source.shape[1:])
    got = pipeline.sample(net, pipeline.PixelSpace(), texts, region, source, noise, flow.timesteps(3),
                          *scales, tick=lambda: ticks.append(0))
    assert sizes == [2 * rows] * 3 and len(ticks) == 3

    cond, null, ones = net.encode_text(texts), net.encode_text(["", ""]), torch.ones_like(region)

    def naive(x, t):
        both, image = net(x, t, *cond, source, region), net(x, t, *null, source, region)
        none = net(x, t, *null, 0 * source, ones)
        return none + scales[1] * (image - none) + scales[0] * (both - image)

    assert torch.allclose(got, flow.sample(naive, noise, flow.timesteps(3)), atol=1e-3, rtol=1e-3)


# ---- chains, folders, JSONL ----------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, "m.png"])
def test_chain_is_turn_by_turn(at, tmp_path, mask):
    """Every turn edits the picture that the turn before wrote."""
    texts = ("make it red", "add a cube", "make it snow")
    mask = mask and at / mask
    chain = ask(at, tmp_path / "chain", image=at / "a.png", mask=mask, instruction=texts)
    assert list(chain) == [f"a_edit_turn{n}.png" for n in (1, 2, 3)]
    image = at / "a.png"
    for n, (file, picture) in enumerate(chain.items()):
        single = one(at, tmp_path / str(n), image=image, mask=mask, instruction=texts[n:n + 1])
        assert np.array_equal(single, picture)
        image = tmp_path / "chain" / file
    assert not np.array_equal(chain["a_edit_turn1.png"], chain["a_edit_turn3.png"])


def test_folder(at, tmp_path):
    """Instructions and masks lie beside the pictures; chains of different length; any batch size."""
    got = ask(at, tmp_path / "1", image=at / "many")
    assert sorted(got) == ["x_edit_turn1.png", "x_edit_turn2.png", "y_edit.png"]
    assert got["y_edit.png"].shape == (37, 91, 3)
    for file, picture in ask(at, tmp_path / "2", image=at / "many", batch_size=1).items():
        assert np.abs(picture.astype(int) - got[file]).max() <= 2
    same = ask(at, tmp_path / "3", image=at / "many", instruction=("make it red",))
    assert sorted(same) == ["x_edit.png", "y_edit.png"]


def test_jsonl(at, tmp_path, capsys):
    edit = {"source": "a.png", "instruction": "make it red"}
    lines = [edit | {"mask": "m.png", "key": "first"},
             {"image": "a.png", "instructions": ["make it red", "add"], "mask": ["m.png", None], "seed": 3},
             {"source_image": "a.png", "edit_prompt": "make it red", "mask_image": "NONE", "task": "style"},
             {"source": "a.png"}, edit | {"instruction": ""}, edit | {"instruction": 3},
             {"instruction": "make it red"}, edit | {"source": "gone.png"}, "x",
             edit | {"mask": ["m.png", "m.png"]}, edit | {"seed": "y"}, edit | {"mask": "m_square.png"}]
    for name in ("a.png", "m.png", "m_square.png"):
        shutil.copy(at / name, tmp_path / name)
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ask(at, tmp_path / "out", jsonl=tmp_path / "in.jsonl")
    said = capsys.readouterr().out
    for words in ("in.jsonl:4: instruction: missing", "in.jsonl:5: instruction: empty",
                  "in.jsonl:6: instruction: '3'", "in.jsonl:7: image: missing", "gone.png: no such file",
                  "in.jsonl:9: not a JSON object", "in.jsonl:10: mask: ", "in.jsonl:11: seed: 'y'",
                  "60x60, but", "4 result(s)", "9 input(s) skipped"):
        assert words in said, (words, said)
    got = {r["file"]: (r["seed"], r["edit_type"], bool(r["mask"])) for r in rows(tmp_path / "out")}
    assert got == {"first_edit.png": (0, "", True), "a-2_edit.png": (0, "style", False),
                   "a_edit_turn1.png": (3, "", True), "a_edit_turn2.png": (3, "", False)}


# ---- the trees of benchmarks ---------------------------------------------------------------------


def written(out):
    """The files under `out`, but for the list and the sheet."""
    files = {str(p.relative_to(out)) for p in Path(out).rglob("*") if p.is_file()}
    return files - {"samples.jsonl", "sheet.png"}


def gedit(at, file, drop=None, **more):
    raw = (at / "a.png").read_bytes()
    picture = {"bytes": raw, "path": None}
    table = dict(task_type=["style_change", "subject-add", "style_change"], key=["k1", "k2", "k1"],
                 instruction=["make it red", "add a cube", "变红"], instruction_language=["en", "en", "cn"],
                 input_image=[picture, {"bytes": (at / "91x37.png").read_bytes(), "path": None}, picture],
                 input_image_raw=[picture] * 3, Intersection_exist=[True, True, False]) | more
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({k: v for k, v in table.items() if k != drop}), file, row_group_size=2)
    return file


def test_gedit(at, tmp_path):
    gedit(at, tmp_path / "bench/data/train-00000.parquet")
    got = ask(at, tmp_path / "out", jsonl=tmp_path / "bench")
    assert written(tmp_path / "out") == {
        f"fullset/{name}{end}.png" for end in ("", "_SRCIMG")
        for name in ("style_change/en/k1", "style_change/cn/k1", "subject-add/en/k2")}
    assert got["fullset/subject-add/en/k2.png"].shape == (37, 91, 3)
    shown = tmp_path / "out/fullset/style_change/en/k1_SRCIMG.png"
    assert np.array_equal(pixels(shown), pixels(at / "a.png"))
    single = one(at, tmp_path / "single").astype(int)
    assert np.abs(got["fullset/style_change/en/k1.png"] - single).max() <= 2
    flat = ask(at, tmp_path / "flat", jsonl=tmp_path / "bench", layout="flat")
    assert list(flat) == ["k1_edit.png", "k1-2_edit.png", "k2_edit.png"]  # by shape


def test_gedit_from_jsonl(at, tmp_path):
    lines = [{"source": str(at / "a.png"), "instruction": "make it red", "task": "style_change", "key": "k"},
             {"source": str(at / "a.png"), "instruction": "make it red", "key": "k"},
             {"source": str(at / "a.png"), "instruction": "make it red", "task": "..", "key": "../../k"},
             {"source": str(at / "a.png"), "instruction": "x", "task": "style_change", "key": "K"},
             {"source": str(at / "a.png"), "instruction": "x", "task": "add", "key": "n", "turn": "../2"}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ask(at, tmp_path / "out", jsonl=tmp_path / "in.jsonl", layout="gedit")
    assert written(tmp_path / "out") == {f"fullset/style_change/en/k{end}.png" for end in ("", "_SRCIMG")}


def test_imgedit(at, tmp_path):
    (tmp_path / "pictures/animal").mkdir(parents=True)
    shutil.copy(at / "91x37.png", tmp_path / "pictures/animal/1.png")
    shutil.copy(at / "a.png", tmp_path / "pictures/2.png")
    bench = {"1082": {"id": "animal/1.png", "prompt": "make it red", "edit_type": "adjust"},
             "673": {"id": "2.png", "prompt": "add a cube", "edit_type": "add"}}
    (tmp_path / "basic_edit.json").write_text(json.dumps(bench))
    got = ask(at, tmp_path / "out", jsonl=tmp_path / "basic_edit.json", image=tmp_path / "pictures")
    assert written(tmp_path / "out") == {"1082.png", "673.png", "basic_edit.json"}
    assert got["1082.png"].shape == (37, 91, 3)
    assert json.loads((tmp_path / "out/basic_edit.json").read_text()) == bench
    many = {"1": {"id": "2.png", "turn1": "make it red", "turn2": "add a cube"}}
    (tmp_path / "pictures/content.json").write_text(json.dumps(many))
    ask(at, tmp_path / "turns", jsonl=tmp_path / "pictures/content.json")
    assert written(tmp_path / "turns") == {"1_turn1.png", "1.png", "basic_edit.json"}


def test_magicbrush(at, tmp_path):
    """Chains as KEY_1, KEY_iter_2, ...; further edits from their own inputs as KEY_inde_2, ..."""
    folder = tmp_path / "dev/images/139306"
    folder.mkdir(parents=True)
    for name, file in (("input", "a.png"), ("output1", "91x37.png"), ("output2", "16x16.png")):
        shutil.copy(at / file, folder / f"139306-{name}.png")
    turns = ["make it red", "add a cube", "make it snow"]
    session = [{"input": f"139306-{name}.png", "mask": f"139306-mask{n}.png", "instruction": text}
               for n, (name, text) in enumerate(zip(("input", "output1", "output2"), turns), 1)]
    (tmp_path / "dev/edit_sessions.json").write_text(json.dumps({"139306": session, "7": ["x"]}))
    got = ask(at, tmp_path / "out", jsonl=tmp_path / "dev/edit_sessions.json")
    assert written(tmp_path / "out") == {
        f"139306/139306_{name}.png" for name in ("1", "iter_2", "iter_3", "inde_2", "inde_3")}
    chain = ask(at, tmp_path / "chain", image=at / "a.png", instruction=tuple(turns))
    assert np.abs(got["139306/139306_iter_3.png"].astype(int) - chain["a_edit_turn3.png"]).max() <= 2
    assert got["139306/139306_inde_2.png"].shape == (37, 91, 3)


# ---- bad input: one line, exit code not zero -----------------------------------------------------

BAD = {  # name -> (flags, words of the line)
    "empty instruction": ({"instruction": ("",)}, "--instruction: empty"),
    "blank instruction": ({"instruction": ("make it red", " \n")}, "--instruction: empty"),
    "no instruction": ({"instruction": ()}, "--instruction: missing for"),
    "prompt": ({"prompt": "red"}, "--prompt: red: not used by edit"),
    "missing image": ({"image": "gone.png"}, "gone.png: no such file"),
    "no image": ({"image": None}, "--image: missing"),
    "truncated": ({"image": "cut.jpg"}, "cut.jpg: "),
    "missing mask": ({"mask": "gone.png"}, "gone.png: no such mask"),
    "mask of another picture": ({"mask": "m_square.png"}, "m_square.png: 60x60, but"),
    "image and jsonl": ({"jsonl": "in.jsonl"}, "not together with --image"),
    "missing jsonl": ({"image": None, "jsonl": "gone.jsonl"}, "gone.jsonl: no such file"),
    "missing json": ({"image": None, "jsonl": "gone.json"}, "gone.json: No such file"),
    "missing parquet": ({"image": None, "jsonl": "gone.parquet"}, "gone.parquet: no parquet"),
    "no parquet": ({"image": None, "jsonl": "not.parquet"}, "not.parquet: not parquet"),
    "columns": ({"image": None, "jsonl": "other.parquet"}, "other.parquet: no column input_image"),
    "no benchmark": ({"image": None, "jsonl": "list.json"}, "list.json: not a JSON object"),
    "several samples in a tree": ({"layout": "imgedit", "num_samples": 2}, "--num_samples: 2"),
    "task for the tree": ({"layout": "gedit"}, "--task: ''"),
    "blend of nothing": ({"blend": "every"}, "give --mask, or leave it out"),
    "guidance": ({"guidance": -1.0}, "--guidance: -1.0"),
    "image guidance": ({"image_guidance": float("inf")}, "--image_guidance: inf"),
    "size": ({"size": 4000}, "--size: 4000"),
    "inpainting model": ({"ckpt": "inpainting"}, "inpainting: is an inpainting model; instructions"),
    "another variant": ({"ckpt": "mixed"}, "mixed: does not fit"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(at, tmp_path, name):
    flags, words = BAD[name]
    if flags.get("jsonl"):
        (tmp_path / "not.parquet").write_text("x")
        (tmp_path / "list.json").write_text("[]")
        gedit(at, tmp_path / "other.parquet", drop="input_image")
        flags = flags | {"jsonl": tmp_path / flags["jsonl"]}
    flags = {"image": "a.png", "instruction": ("make it red",)} | flags
    flags = {k: at / v if k in ("image", "mask", "ckpt") and v else v for k, v in flags.items()}
    with pytest.raises(SystemExit) as e:
        ask(at, tmp_path / "out", **flags)
    line = str(e.value.code)
    assert line.startswith("error: ") and words in line and "\n" not in line, line


@pytest.mark.parametrize("task", ["inpaint", "t2i"])
def test_editnet_is_not_an_editor(at, tmp_path, task):
    config = dict(prompt="a red star", ckpt=str(at / "editnet"), device="cpu", out=str(tmp_path))
    if task == "inpaint":
        config |= dict(image=str(at / "a.png"), mask=str(at / "m.png"))
    with pytest.raises(SystemExit, match="editnet: is an instruction editor; "):
        sample.main(sample.Config(task, **config))


@pytest.mark.parametrize("flag", ["instruction", "image_guidance", "paste", "layout"])
def test_flags_of_edit_alone(at, tmp_path, flag):
    value = dict(instruction=("x",), image_guidance=2.0, paste=False, layout="flat")[flag]
    with pytest.raises(SystemExit, match=f"--{flag}: .*: not used by erase"):
        sample.main(sample.Config("erase", str(at / "inpainting"), image=str(at / "a.png"), **{flag: value}))


def test_long_instruction(at, tmp_path, capsys):
    one(at, tmp_path, instruction=("make it red " * 8_500,))  # 100 kB
    assert "the model reads 128 bytes of the prompt" in capsys.readouterr().out


def test_input_is_not_overwritten(at, tmp_path):
    shutil.copy(at / "a.png", tmp_path / "a.png")
    with pytest.raises(SystemExit, match="would overwrite the input a.png"):
        one(at, tmp_path, image=tmp_path / "a.png", layout="imgedit")
