"""The judge: statistics against closed forms, exact truths, wrong pictures found by the right metric."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from inprocess import run_script
from PIL import Image

import checkpoint
import common
import data
import evaluate as ev
import log
import make_prefs
import masks
import model
from readers import preferences
from readers.pictures import open_source
from scenes import dataset, draw, judge, judge_holes, results

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
SIZE = 32


# ---- statistics ------------------------------------------------------------------------------------------


def test_frechet_interval_holds_the_value_and_narrows():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(1, 1600, 4)), rng.normal(size=(1, 1600, 4)) + 0.5
    few, many = log.frechet_interval(a[:, :100], b[:, :100]), log.frechet_interval(a, b)
    assert many["low"] < many["mean"] < many["high"] and many["n"] == 1600
    assert many["low"] < 1.0 < many["high"]
    assert many["high"] - many["low"] < 0.5 * (few["high"] - few["low"])


def test_bootstrap():
    x = np.random.default_rng(0).normal(3, 2, 400)
    got = log.bootstrap(x)
    assert got["mean"] == pytest.approx(x.mean()) and got["n"] == 400
    assert (got["high"] - got["low"]) / 2 == pytest.approx(1.96 * 2 / 20, rel=0.15)
    assert log.bootstrap(np.append(x, np.nan))["mean"] == got["mean"]
    assert log.bootstrap(np.full(5, 0.5)) == {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 5}
    assert log.bootstrap(np.array([np.nan]))["n"] == 0
    of_two = log.bootstrap(np.zeros(100), np.append(x, np.nan), np.full(3, np.nan))
    assert of_two["mean"] == pytest.approx(x.mean() / 2) and of_two["n"] == 500
    assert of_two["high"] - of_two["low"] == pytest.approx((got["high"] - got["low"]) / 2, rel=0.15)


def test_sign_test():
    assert log.sign_test(10, 0) == pytest.approx(2 / 1024)
    assert log.sign_test(0, 0) == log.sign_test(5, 5) == 1
    assert log.sign_test(600, 400) == pytest.approx(2.7e-10, rel=0.1)


def test_verdicts_and_gsb():
    nan = np.nan
    a = {"attributes": [[1, 0.5, 1, 1, nan]], "exact": [[0.2, 0.1, 0.1, 0.100, nan]], "seam": [[0.1] * 5]}
    b = {"attributes": [[0.5, 1, 1, 1, nan]], "exact": [[0.1, 0.2, 0.2, 0.103, nan]],
         "seam": [[0.1] * 4 + [0.3]]}
    a["texture"], b["texture"] = [[0.2, 0.1, 0.1, 0.100, 0.1]], [[0.1, 0.2, 0.2, 0.103, 0.3]]
    a, b = ({k: np.array(v) for k, v in x.items()} for x in (a, b))
    got = results.compare(a, b, tie=0.05)
    # attributes decide 1 and 2, the texture 3 and 5, 4 ties
    assert [got["overall"][k] for k in ("good", "same", "bad")] == [3, 1, 1]
    # of the fifth the exact error is not asked: it counts for nobody
    assert [got["exact"][k] for k in ("good", "same", "bad")] == [2, 1, 1] and got["exact"]["net"]["n"] == 4
    nothing = results.gsb(np.full((2, 3), np.nan))
    assert nothing["net"]["n"] == nothing["same"] == 0 and np.isnan(nothing["superiority"])
    assert got["overall"]["superiority"] == pytest.approx(100 * 4 / 2)
    assert results.compare(b, a, 0.05)["overall"]["good"] == 1
    assert results.gsb(np.ones((1, 4)))["superiority"] == np.inf  # nothing to divide by: no number is made up


# ---- cases and metrics -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=draw.LEVELS)
def source(request):
    return dataset.Scenes("heldout", request.param)


@pytest.fixture(scope="module")
def cases(source):
    return {t: judge_holes.make_cases(t, list(range(40)), SIZE, source) for t in judge_holes.TASKS}


@pytest.fixture(scope="module")
def judge_net():
    """The shipped parser, else one trained for a moment, of which only the plainest verdicts are asked."""
    if (ROOT / "assets/parser/manifest.json").exists():
        return judge.load_parser(str(ROOT / "assets/parser"), torch.device("cpu")), True
    return judge.train_parser(60, 32, 2e-3, torch.device("cpu"), False), False


def test_cases(source, cases):
    again = judge_holes.make_cases("outpaint", list(range(20, 40)), SIZE, source)
    assert torch.equal(again.mask, cases["outpaint"].mask[20:]), "a mask depends on its scene alone"
    for task, c in cases.items():
        assert ((c.mask == 0) | (c.mask == 1)).all() and (c.mask.flatten(1).sum(1) > 0).all()
        assert torch.equal(c.image * (1 - c.mask), c.truth * (1 - c.mask)), "known pixels are true"
        assert (c.certain <= c.mask).all()
        assert (c.image.shape, c.mask.shape) == ((40, 3, SIZE, SIZE), (40, 1, SIZE, SIZE))
    assert cases["erase"].caption[0] == masks.ERASE_PROMPT
    assert cases["edit"].caption[0] == source.load(0, 8, 8)["caption"]
    assert not torch.equal(cases["erase"].truth, cases["erase"].image)
    s = source.scene(0)
    labels = draw.instances(s, SIZE, SIZE)
    for task in ("edit", "erase"):  # a whole object is covered
        mask = cases[task].mask[0, 0].numpy()
        assert any((mask[labels == k] == 1).all() for k in range(1, len(s.objects) + 1))


def test_truth_has_no_error(cases):
    for c in cases.values():
        got = judge_holes.judge(c.truth, c, judge.Parser().eval())
        assert np.nanmax(got["exact"]) == np.nanmax(got["hole"]) == np.nanmax(got["seam"]) == 0
        assert np.nanmax(got["texture"]) == 0
        assert np.nanmax(got["outside"]) == 0 and np.allclose(got["sharpness"], 1)
        a, b = judge_holes.frechet_features(c.truth, c, judge.Parser().eval())
        assert a.shape == b.shape == (40, 128)


def test_errors_are_in_units_of_one(cases):
    c, net = cases["erase"], judge.Parser().eval()
    got = judge_holes.judge(c.truth * 0 + 1, replace(c, image=c.image * 0, truth=c.truth * 0 - 1), net)
    assert np.allclose(got["exact"], 1) and np.allclose(got["outside_raw"], 0.5)
    assert np.allclose(got["outside"], 0)
    flat = replace(c, image=c.image * 0, truth=c.truth * 0)
    got = judge_holes.judge(c.mask.expand(-1, 3, -1, -1) * 0.5, flat, net)
    assert np.allclose(got["seam"], 0.25) and np.allclose(got["outside_raw"], 0)


def test_blur_and_noise_are_seen(cases):
    rng = np.random.default_rng(0)
    for c in cases.values():
        net = judge.Parser().eval()
        blurred = torch.stack([make_prefs._blur(make_prefs._blur(x, rng), rng) for x in c.truth])
        noise = torch.randn(c.truth.shape, generator=torch.Generator().manual_seed(0))
        noisy = (c.truth + 0.4 * noise).clamp(-1, 1)
        of_blur, of_noise = judge_holes.judge(blurred, c, net), judge_holes.judge(noisy, c, net)
        assert of_blur["sharpness"].mean() < 0.75 and of_noise["sharpness"].mean() > 1.25
        assert min(np.nanmean(of_blur["hole"]), np.nanmean(of_noise["hole"])) > 0.01
        far = judge.truth_distance(blurred, c.truth, c.mask)
        assert (far > 0).all() and (judge.truth_distance(c.truth, c.truth, c.mask) == 0).all()


@pytest.mark.parametrize("source", ["easy"], indirect=True)
def test_what_blur_wins_is_no_headline(source, cases, judge_net):
    """Sharp pictures that are not the true ones: the same scenes, their textures fallen otherwise. Blurred,
    they are nearer to the truth pixel by pixel, and farther by texture."""
    c, (net, _) = cases["outpaint"], judge_net
    other = torch.stack([judge.to_float(draw.draw(replace(s, seed=s.seed + 1), SIZE, SIZE))
                         for s in map(source.scene, c.indices)])
    of = {name: judge_holes.judge_result(judge.to_uint8(x)[None].numpy(), c, net)
          for name, x in (("base", other), ("blur", judge_holes.blurred(other, c)), ("truth", c.truth))}
    less = {k: (of["blur"][0][k] - v).mean(0) for k, v in of["base"][0].items()}
    assert np.nanmean(less["hole"]) < 0 < np.nanmean(less["texture"])
    got = judge_holes.headlines(*(of[k][1] for k in ("truth", "base", "blur")), less)
    assert {"texture", "textures"} <= set(got) and not {"hole", "seam"} & set(got)
    # nothing that the truth itself does not win
    assert judge_holes.headlines(*(of[k][1] for k in ("base", "base", "blur")), less) == []


def test_a_blurred_hole_is_a_mean_of_nine(cases):
    c = cases["edit"]
    x = judge_holes.blurred(c.truth, c)
    assert torch.equal(x * (1 - c.mask), c.image * (1 - c.mask))
    ys, xs = (c.mask[0, 0, 1:-1, 1:-1] > 0).nonzero().T + 1
    for y, k in zip(ys[:5].tolist(), xs[:5].tolist()):
        torch.testing.assert_close(x[0, :, y, k], c.truth[0, :, y - 1:y + 2, k - 1:k + 2].mean((1, 2)))


def test_only_what_must_be_so_is_certain(source):
    """Every empty scene with other textures agrees there with the true one, but for its tone."""
    for task in judge_holes.TASKS:
        c = judge_holes.make_cases(task, list(range(12)), SIZE, source)
        assert 0.02 < c.certain.sum() / c.mask.sum() < 0.95
        for i, s in enumerate(map(source.scene, c.indices)):
            a, b = (draw.draw(replace(s, objects=(), seed=s.seed + k), SIZE, SIZE) / 255 for k in (0, 1))
            apart = np.abs(a - a.mean((0, 1)) - b + b.mean((0, 1))).max(-1)
            assert (apart[c.certain[i, 0].numpy() > 0] < 0.2).all()  # 4 draws' deviation is at most 0.05


def test_energy_distance_and_its_test():
    """Against the definition, on few rows; and the test finds a shift, and finds none where there is none."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 3, generator=g), torch.randn(4, 3, generator=g) + 1

    def mean(x, y):
        return np.mean([math.dist(p, q) for p in x.tolist() for q in y.tolist()])

    want = 2 * mean(a, b) - mean(a, a) - mean(b, b)
    assert judge_holes.energy_distance(a, b) == pytest.approx(want, abs=1e-5)
    assert judge_holes.energy_distance(a, a) == pytest.approx(0, abs=1e-6)
    x, y = torch.randn(60, 4, generator=g), torch.randn(60, 4, generator=g)
    (same, _, p), (far, half, q) = judge_holes.texture_test(x, y), judge_holes.texture_test(x + 0.7, y)
    assert p > 0.05 and q < 0.01 and far > same and 0 < half < far
    assert judge_holes.texture_test(y, y) == (pytest.approx(0, abs=1e-6), pytest.approx(0, abs=1e-6), 1.0)


def test_parser_judges_true_and_wrong_pictures(source, cases, judge_net):
    net, shipped = judge_net
    kept = judge_holes.judge(cases["erase"].image, cases["erase"], net)["empty"].mean()
    gone = judge_holes.judge(cases["erase"].truth, cases["erase"], net)["empty"].mean()
    assert kept + 0.2 < gone, "an object that is still there"
    if not shipped:
        return
    for c in cases.values():
        assert judge_holes.judge(c.truth, c, net)["attributes"].mean() > 0.85
    # the object in another colour: its colour is wrong and its shape right
    c = cases["edit"]
    recoloured, reshaped = [], []
    for index in c.indices:
        s, labels = source.scene(index), draw.instances(source.scene(index), SIZE, SIZE)
        k = int(np.argmax([(labels == k).sum() for k in range(1, len(s.objects) + 1)]))
        o = s.objects[k]
        for out, new in ((recoloured, replace(o, colour="red" if o.colour != "red" else "blue")),
                         (reshaped, replace(o, shape="star" if o.shape != "star" else "square"))):
            changed = replace(s, objects=s.objects[:k] + (new,) + s.objects[k + 1:])
            out.append(draw.draw(changed, SIZE, SIZE))
    true = judge_holes.judge(c.truth, c, net)
    of_colour = judge_holes.judge(judge.to_float(np.stack(recoloured)), c, net)
    of_shape = judge_holes.judge(judge.to_float(np.stack(reshaped)), c, net)
    assert of_colour["colour"].mean() < 0.3 and of_colour["shape"].mean() > true["shape"].mean() - 0.2
    assert of_shape["shape"].mean() < 0.4 and of_shape["colour"].mean() > true["colour"].mean() - 0.2
    # named: all that the caption says of the object in the hole, at once
    assert true["named"].mean() > 0.7 and set(true["named"]) <= {0, 1}
    assert of_colour["named"].mean() < 0.2 and of_shape["named"].mean() < 0.3
    for got in (true, of_colour, of_shape):
        every = (got["shape"] == 1) & (got["colour"] == 1) & (np.nan_to_num(got["material"], nan=1) == 1)
        assert (got["named"] == every).all()
    assert np.isnan(true["material"]).any() and not np.isnan(true["material"]).all()
    assert not any("named" in judge_holes.judge(cases[t].truth, cases[t], net) for t in ("erase", "outpaint"))


def test_parser_boxes_and_labels():
    levels = [dataset.Scenes("train", level) for level in draw.LEVELS]
    batch = judge.ParserBatches(levels, 0, 16, 1, [(judge.SIDE, judge.SIDE)], jitter=False)[0]
    images, pictures, which, boxes, objects = batch
    assert images.shape == (16, judge.SIDE, judge.SIDE, 3) and len(which) == len(boxes) == len(objects)
    for j in range(16):  # the sources take turns
        s = levels[j % 2].scene(j)
        assert (images[j].numpy() == draw.draw(s, judge.SIDE, judge.SIDE)).all()
        assert pictures[j].tolist() == judge.picture_labels(s)
        assert (objects[which == j][:, 3] == 1).sum() == len(s.objects)
    s = levels[0].scene(0)
    first = objects[0].tolist()
    assert [list(v)[i] for v, i in zip(judge.OBJECT_HEADS.values(), first)] == [
        s.objects[0].shape, s.objects[0].colour, s.objects[0].material, "yes"]
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    x = judge.to_float(images[:1])
    assert torch.allclose(judge.crops(x, torch.tensor([0]), whole), x, atol=1e-4)
    assert common.n_params(judge.Parser()) <= 600_000


# ---- preferences -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", ["look", "all"])
def test_degradations_are_worse_and_stay_in_the_hole(cases, kinds):
    c, seen, names = cases["outpaint"], set(), make_prefs.KINDS[kinds]
    assert kinds == "all" or not {"colour", "shift"} & set(names)
    for i in range(40):
        y, name = make_prefs.degrade(c.truth[i], c.truth[i], c.mask[i], np.random.default_rng(i), names)
        seen.add(name)
        assert torch.equal(y * (1 - c.mask[i]), c.truth[i] * (1 - c.mask[i]))
        assert judge.truth_distance(y[None], c.truth[i:i + 1], c.mask[i:i + 1]) > 0.01
    assert seen == set(names)


def test_clear_pairs_and_kinds_of_false_captions():
    assert make_prefs.clear(0.1, 0.126, 0.25) and not make_prefs.clear(0.1, 0.124, 0.25)
    assert make_prefs.clear(0.0, 0.01, 0.25) and not make_prefs.clear(0.1, 0.1, 0.0)
    all_, none = (make_prefs.draw_kinds(0, 5, share, 200) for share in (1.0, 0.0))
    assert set(all_) == {"scene"} and "scene" not in none and len(set(none)) == 10
    assert make_prefs.draw_kinds(0, 5, 0.5) == make_prefs.draw_kinds(0, 5, 0.5, 200)[:3]
    share = np.mean([k == "scene" for k in make_prefs.draw_kinds(0, 6, 0.67, 1000)])
    assert share == pytest.approx(0.67, abs=0.05)


# ---- end to end ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A random editor, its text-to-image sibling and a random parser, as checkpoint folders."""
    at = tmp_path_factory.mktemp("ckpt")
    torch.manual_seed(0)
    for name, cfg in (("editor", model.inpainting(model.PRESETS["test"])), ("base", model.PRESETS["test"])):
        net = model.Editor(cfg)
        torch.nn.init.normal_(net.mmdit.final_layer.linear.weight, std=0.05)
        meta = {"arch": net.arch, "config": {"image_size": SIZE}}
        checkpoint.write(at / name, 1, {"model": net.state_dict()}, meta)
    net = judge.Parser()
    checkpoint.write(at / "parser", 1, {"model": net.state_dict()}, {"arch": net.arch})
    return at


def run(*args):
    return run_script(ROOT / "evaluate.py", *args, "--device=cpu")


@pytest.mark.slow
def test_scenes_then_compare_with_the_saved_pictures(folders, tmp_path):
    done = run("scenes", "--ckpt", folders / "editor", "--steps=2", "--out", tmp_path / "o",
               "--save", tmp_path / "s", "--parser", folders / "parser", "--n=6", "--batch_size=4",
               "--seeds=0,1")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "o/results.json").read_text())
    name = f"{folders / 'editor'}@2"
    assert results["command"].startswith("python evaluate.py scenes") and results["date"]
    for task in judge_holes.TASKS:
        got = results["tasks"][task][name]
        assert {"exact", "seam", "frechet", "frechet_hole", "outside_raw", "attributes"} <= set(got)
        assert got["hole"]["low"] <= got["hole"]["mean"] <= got["hole"]["high"]
        assert results["tasks"][task]["truth"]["exact"]["mean"] == 0 and got["outside"]["mean"] == 0
        assert list(results["tasks"][task]) == [name, f"{name}, blurred", "truth"]
        assert results["controls"][task]["headlines"] is not None
    assert (tmp_path / "o/sheet.png").stat().st_size > 1000
    (saved,) = (tmp_path / "s").iterdir()
    # the same checkpoint again, other batches: noise and masks are functions of the scene, so nothing differs
    cfg = ev.Config("compare", ckpt=f"{saved},{folders / 'editor'}", steps="2", n=6, batch_size=5,
                    seeds="0,1", parser=str(folders / "parser"), out=str(tmp_path / "c"), device="cpu")
    ev.main(cfg)
    for task in json.loads((tmp_path / "c/results.json").read_text())["tasks"].values():
        assert task["gsb"]["overall"]["same"] == 12 and task["gsb"]["exact"]["net"]["mean"] == 0
        assert set(task["control"]) == set(task["gsb"])


def test_prefs_are_read_by_data(folders, tmp_path):
    done = run_script(make_prefs.__file__, "--ckpt", folders / "editor", "--steps=1,2", "--k=2", "--n=12",
               "--margin=0.02", "--out", tmp_path / "p")
    assert done.returncode == 0, done.stderr
    items = json.loads((tmp_path / "p/aesthetic.json").read_text())
    kinds = [x["kind"] for x in items if " over " in x["kind"]]
    assert kinds.count("truth over best") == kinds.count("truth over worst") == 12
    assert 0 < kinds.count("best over worst") <= 12 and len(items) == len(kinds) + 24
    assert all(x["ranking"] == [1, 2] for x in items)
    for x in items:
        a, over, b = x["kind"].partition(" over ")
        assert not over or (f"_{a}.png" in x["generations"][0] and f"_{b}.png" in x["generations"][1])
    pairs = preferences.open_pairs(tmp_path / "p/aesthetic.json")
    assert len(pairs) >= 48 and not any("truth.png" in p.image_worse for p in pairs)
    texts = preferences.open_pairs(tmp_path / "p/alignment.jsonl")
    assert len(texts) == 4 * 12 and all(p.caption_better != p.caption_worse for p in texts)
    for opened in (pairs, texts):  # a scene has pairs of its own picture and of its refilled copy
        assert len({p.family for p in opened}) == 12 == len({p.image_better[:15] for p in opened})
    for opened in (pairs, texts):
        batch = next(iter(data.pair_loader(opened, SIZE, 4, workers=0)))
        assert batch["better"].shape == batch["worse"].shape == (4, 3, SIZE, SIZE)


def test_prefs_skip_bad_pictures(folders, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for i in range(6):
        Image.fromarray(np.full((40, 50, 3), 40 * i, np.uint8)).save(tmp_path / f"in/{i}.png")
        (tmp_path / f"in/{i}.txt").write_text(f"grey number {i}")
    (tmp_path / "in/2.png").write_bytes((tmp_path / "in/2.png").read_bytes()[:60])
    n = len(open_source(str(tmp_path / "in")))
    make_prefs.main(make_prefs.Config(str(folders / "editor"), str(tmp_path / "p"), str(tmp_path / "in"), n=n,
                                      k=2, steps="1", device="cpu"))
    said = capsys.readouterr().out
    assert "skipped: " in said and "2.png: damaged" in said and "1 picture(s) skipped" in said
    kinds = [x["kind"] for x in json.loads((tmp_path / "p/aesthetic.json").read_text())]
    assert kinds.count("truth over best") == n - 1 and sum(" over " not in k for k in kinds) == 2 * (n - 1)
    assert (tmp_path / "p/alignment.jsonl").is_file()
    for i in range(6):  # again, of pictures without captions: what was said of the old ones is gone
        (tmp_path / f"in/{i}.txt").unlink()
    make_prefs.main(make_prefs.Config(str(folders / "editor"), str(tmp_path / "p"), str(tmp_path / "in"), n=n,
                                      k=2, steps="1", device="cpu"))
    assert not (tmp_path / "p/alignment.jsonl").exists() and (tmp_path / "p/aesthetic.json").is_file()


@pytest.mark.parametrize("change, words", [
    ({"ckpt": ""}, "--ckpt"), ({"ckpt": "nowhere"}, "nowhere"), ({"ckpt": "PARSER"}, "an 'editor' is needed"),
    ({"ckpt": "BASE"}, "without mask input"), ({"parser": "nowhere"}, "train the judge"),
    ({"parser": "EDITOR"}, "'editor'"), ({"steps": "many"}, "whole numbers"), ({"steps": "0"}, "at least 1"),
    ({"steps": "1,2,3"}, "--steps"), ({"n": 0}, "--n"), ({"task": "compare"}, "exactly two"),
    ({"batch_size": 0}, "--batch_size: 0"),
    ({"out": "/dev/null/x"}, "--out")])
def test_mistakes_give_one_line(folders, tmp_path, change, words):
    args = {"task": "scenes", "ckpt": "EDITOR", "parser": "PARSER", "out": str(tmp_path), "n": 2,
            "device": "cpu"}
    args |= change
    args = {k: str(folders / v.lower()) if v in ("EDITOR", "BASE", "PARSER") else v for k, v in args.items()}
    with pytest.raises(SystemExit) as stop:
        ev.main(ev.Config(**args))
    text = str(stop.value)
    assert text.startswith("error: ") and "\n" not in text and words in text


@pytest.mark.parametrize("change, words", [
    ({"k": 1}, "--k"), ({"margin": -1.0}, "--margin: -1"), ({"mismatched": 2.0}, "0 to 1"),
    ({"n": -1}, "--n"), ({"ckpt": "a,b"}, "a,b: no such folder"), ({"ckpt": "BASE"}, "without mask input"),
    ({"steps": "x"}, "--steps"),
    ({"batch_size": 0}, "--batch_size: 0"), ({"out": "/dev/null/x", "ckpt": "EDITOR"}, "--out")])
def test_mistakes_in_prefs_give_one_line(folders, tmp_path, change, words):
    args = {"ckpt": "EDITOR", "out": str(tmp_path), "n": 2, "device": "cpu"} | change
    args = {k: str(folders / v.lower()) if v in ("EDITOR", "BASE") else v for k, v in args.items()}
    with pytest.raises(SystemExit) as stop:
        make_prefs.main(make_prefs.Config(**args))
    assert str(stop.value).startswith("error: ") and words in str(stop.value) and "\n" not in str(stop.value)



def test_torchrun_is_refused(monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="error: torchrun: "):
        ev.main(ev.Config("scenes"))


def test_unknown_flag_and_missing_checkpoint_from_the_shell(folders):
    done = run("scenes", "--chekpoint", "x")
    assert done.returncode == 1 and "--chekpoint: there is no such flag: use --ckpt" in done.stderr
    done = run("judge")
    assert done.returncode == 1 and done.stderr.endswith(
        "judge: use one of parser, scenes, edits, t2i, compare, bench, study, report\n")
    command = ["scenes", "--ckpt", "/no/such/folder", "--parser", folders / "parser"]  # a process of its own
    done = subprocess.run([sys.executable, ROOT / "evaluate.py", *command], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "/no/such/folder" in done.stderr
