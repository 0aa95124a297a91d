"""The judge of instruction editors: true targets pass, untouched sources and wrong edits do not."""

import json
import math
import re
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from inprocess import run_script

import checkpoint
import evaluate as ev
import model
from scenes import dataset, draw, judge
from scenes import judge_edits as je
from scenes.dataset import EditScenes

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
SIZE, N = 32, 14
TASKS = EditScenes.tasks


@pytest.fixture(scope="module")
def net():
    if not (ROOT / "assets/parser/manifest.json").exists():
        pytest.skip("assets/parser is not there")
    return judge.load_parser(str(ROOT / "assets/parser"), torch.device("cpu"))


@pytest.fixture(scope="module", params=draw.LEVELS)
def source(request):
    return EditScenes("heldout", level=request.param)


@pytest.fixture(scope="module")
def cases(source):
    return {task: je.edit_cases(task, [7 * i + k for i in range(N)], SIZE, SIZE, source)
            for k, task in enumerate(TASKS)}


@pytest.fixture(scope="module")
def asked(cases, net):
    return {task: je.ask(c, net) for task, c in cases.items()}


def redrawn(c, source, change):
    """Pictures [N, 3, H, W] of each pair's target scene after change(before, edit)."""
    h, w = c.image.shape[2:]
    return judge.to_float(np.stack([draw.draw(change(*source.edit(i)), h, w) for i in c.indices]))


def with_object(s, k, **fields):
    return replace(s, objects=s.objects[:k] + (replace(s.objects[k], **fields),) + s.objects[k + 1:])


# ---- cases -----------------------------------------------------------------------------------------------


def test_cases(source, cases):
    for task, c in cases.items():
        again = je.edit_cases(task, c.indices[8:], SIZE, SIZE, source)
        assert torch.equal(again.truth, c.truth[8:]), "a pair does not depend on the others"
        assert torch.equal(again.boxes, c.boxes[c.which >= 8])
        outside = ~c.region.expand_as(c.image)
        assert torch.equal(c.image[outside], c.truth[outside]), "outside the region nothing changes"
        assert (c.image != c.truth).flatten(1).any(1).all()
        assert (c.which.diff() >= 0).all() and len(c.which) == len(c.boxes) == len(c.objects) == len(c.role)
        per_pair = torch.bincount(c.which[c.role == je.EDITED], minlength=N)
        whole = task in ("background", "environment", "style")
        assert (per_pair == (0 if whole else 1)).all()
        assert c.region.all() == (task in ("environment", "style"))
        assert (c.role == je.ELSEWHERE).any() == (task == "add")
        assert c.resized.any() == (task == "attribute")
    assert cases["swap"].caption[0] == source.load(0, 8, 8)["caption"]
    assert cases["swap"].target_caption[0] == source.load(0, 8, 8)["target_caption"]
    assert all(a != b for c in cases.values() for a, b in zip(c.source_caption, c.target_caption)
               if c.task in ("background", "environment", "style"))
    with pytest.raises(ValueError, match="of task remove, not swap"):
        je.edit_cases("swap", [1], SIZE, SIZE, source)


def test_free_places_hold_no_object(source, cases):
    for task, c in cases.items():
        for j, index in enumerate(c.indices):
            before, edit = source.edit(index)
            free = c.boxes[(c.which == j) & (c.objects[:, 0] == je.NOT_ASKED) & (c.role == je.KEPT)]
            centres = (free[:, :2] + free[:, 2:]) / 2
            for o in (*before.objects, *edit.target.objects):
                away = (centres - torch.tensor([o.x, o.y])).norm(dim=1)
                assert (away > draw.RADIUS[o.size]).all(), (task, index)


# ---- verdicts --------------------------------------------------------------------------------------------


def test_truth_and_source(cases, asked, net):
    for task, c in cases.items():
        truth, source = (je.judge_edit(x, c, asked[task], net) for x in (c.truth, c.image))
        assert asked[task].judged.float().mean() > 0.7, task
        for k in ("edit", "success"):
            assert np.nanmin(truth[k]) == 1 and np.nanmax(source[k]) == 0, task
        assert truth["kept"].min() == source["kept"].min() == truth["kept_share"].min() == 1
        assert np.nanmax(truth["exact"]) == truth["error"].max() == 0 and source["exact"].min() > 0
        if task in ("environment", "style"):
            assert np.isnan(truth["over"]).all(), "nothing is outside"
        else:
            assert np.nanmax(truth["over"]) == np.nanmax(source["over"]) == 0
        limits = je.bounds(c, asked[task], net)
        assert limits["truth_read"].mean() > 0.7 and limits["source_read"].mean() < 0.2, task
        assert limits["kept_asked"].mean() > 0.7 and (limits["judged"] == asked[task].judged.numpy()).all()


def test_wrong_edits_fail(source, cases, asked, net):
    def verdict(task, change):
        return je.judge_edit(redrawn(cases[task], source, change), cases[task], asked[task], net)

    for task in ("swap", "add", "attribute"):  # the right object in a wrong colour
        def recolour(before, edit):
            k = edit.ids[0] - 1
            known = {s.objects[k].colour for s in (before, edit.target) if k < len(s.objects)}
            colour = next(x for x in ("red", "blue", "yellow", "purple") if x not in known)
            return with_object(edit.target, k, colour=colour)
        assert np.nanmean(verdict(task, recolour)["edit"]) < 0.2, task
    for task, names in judge.PICTURE_HEADS.items():  # another background, environment or style
        def another(before, edit):
            known = {getattr(s, task) for s in (before, edit.target)}
            return replace(edit.target, **{task: next(x for x in names if x not in known)})
        assert np.nanmean(verdict(task, another)["edit"]) < 0.2, task
    # no change of size
    before_size = verdict("attribute", lambda before, edit: before)
    resized = cases["attribute"].resized.numpy() & asked["attribute"].judged.numpy()
    assert resized.any() and (before_size["edit"][resized] == 0).all()


def test_over_editing_is_not_keeping(source, cases, asked, net):
    for task in ("swap", "add", "background", "style"):
        def without_another(before, edit):
            k = -1 if edit.ids is None else edit.ids[0] - 1
            rest = [i for i in range(len(edit.target.objects)) if i != k]
            gone = rest[0] if rest else None
            left = [o for i, o in enumerate(edit.target.objects) if i != gone]
            return replace(edit.target, objects=tuple(left))

        c = cases[task]
        has_other = np.array([len(source.edit(i)[1].target.objects) > (c.task in ("swap", "add"))
                              for i in c.indices])
        got = je.judge_edit(redrawn(c, source, without_another), c, asked[task], net)
        assert got["kept"][has_other].mean() < 0.3, task
        assert np.nanmean(got["success"][has_other]) <= got["kept"][has_other].mean() + 1e-9
        if task in ("swap", "add"):
            assert np.nanmean(got["edit"]) > 0.9, "what was asked is there"
            assert 0.3 < got["kept_share"][has_other].mean() < 0.95
            assert got["over"][has_other].min() > 0
    c = cases["remove"]  # another style is not kept, nor is a new object on free ground
    restyled = je.judge_edit(redrawn(c, source, lambda before, edit: replace(
        edit.target, style="sketch" if before.style != "sketch" else "photo")), c, asked["remove"], net)
    assert restyled["kept"].mean() < 0.35

    kept = []
    for j, index in enumerate(c.indices):  # at the first place that the judge looks at
        before, edit = source.edit(index)
        place = je.free_places(source.seed, index, before, edit.target, None)[:1]
        new = tuple(replace(o, shape="square", colour="red", material="matte") for o in place)
        extra = replace(edit.target, objects=(*edit.target.objects, *new))
        x = c.truth.clone()
        x[j] = judge.to_float(draw.draw(extra, SIZE, SIZE))
        kept += [je.judge_edit(x, c, asked["remove"], net)["kept"][j]] if new else []
    assert np.mean(kept) < 0.3


def test_added_object_may_stand_elsewhere_in_its_part(source, cases, asked, net):
    c, rng = cases["add"], np.random.default_rng(0)

    def moved(before, edit, other_part=False):
        new = edit.target.objects[-1]
        spots = je.as_good(new, before.objects, SIZE, SIZE)
        o = spots[rng.integers(len(spots))] if spots else new
        if other_part:
            o = replace(new, x=1 - new.x if abs(new.x - 0.5) > 0.2 else new.x / 2.5, y=new.y)
        return replace(edit.target, objects=(*before.objects, o))

    near = je.judge_edit(redrawn(c, source, moved), c, asked["add"], net)
    far = je.judge_edit(redrawn(c, source, lambda *x: moved(*x, other_part=True)), c, asked["add"], net)
    assert np.nanmean(near["edit"]) > 0.75 and np.nanmean(far["edit"]) < 0.25


def test_nothing_is_told_by_noise(cases, asked, net):
    for task, c in cases.items():
        noise = torch.rand(c.image.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        got = je.judge_edit(noise, c, asked[task], net)
        assert np.nanmean(got["success"]) == 0 and got["error"].min() > 0.1, task


@pytest.mark.slow
@pytest.mark.parametrize("level", ["easy", "hard"])
def test_text_to_image(level, net):
    source = dataset.Scenes("heldout", level)
    p = je.prompts(list(range(12)), SIZE, source)
    assert (p.objects[:, :2] >= 0).all() and (p.pictures[:, 0] >= 0).all()
    assert (p.pictures[:, 1:] == je.NOT_ASKED).any(), "a clear day is rarely named"
    right, wrong = (je.judge_t2i(x, p, net) for x in (p.truth, p.truth.roll(1, 0)))
    assert right["attributes"].mean() > 0.8 and wrong["attributes"].mean() < 0.35
    assert np.nanmean(right["objects"]) > 0.6 and np.nanmean(wrong["objects"]) < 0.2
    single = np.array([len(source.scene(i).objects) == 1 for i in p.indices])
    assert (np.isnan(right["drawn"]) == ~single).all() and 1 < single.sum() < 12
    assert np.nanmean(right["drawn"]) > (0.6 if level == "easy" else 0.3) and np.nanmean(wrong["drawn"]) < 0.2
    grid, of = je.places(SIZE, level, 0.6), draw.LEVELS[level]
    assert ((grid[:, 2:] - grid[:, :2] > 0).all() and grid.shape[1] == 4)
    sides = ((grid[:, 2] - grid[:, 0]) / 2 / judge.CONTEXT).tolist()
    assert {round(r, 3) for r in sides} == {draw.RADIUS[size] for size in of.sizes}
    # every place an object of the level may have is near a box of its size
    for size in of.sizes:
        own = grid[np.isclose((grid[:, 2] - grid[:, 0]) / 2 / judge.CONTEXT, draw.RADIUS[size])]
        centres = ((own[:, :2] + own[:, 2:]) / 2).unique(dim=0)
        for i in range(40):
            for o in (o for o in source.scene(i).objects if o.size == size):
                away = (centres - torch.tensor([o.x, o.y])).abs().amax(1).min()
                assert away <= 0.3 * draw.RADIUS[size] + 1e-4


@pytest.mark.slow
def test_what_is_drawn_needs_no_place(net):
    """The one object counts wherever it stands, and not in another shape or colour."""
    source = dataset.Scenes("heldout")
    p = je.prompts([i for i in range(8) if len(source.scene(i).objects) == 1], SIZE, source)
    of = [source.scene(i) for i in p.indices]

    def drawn(change):
        pictures = [draw.draw(replace(s, objects=(change(s.objects[0]),)), SIZE, SIZE) for s in of]
        return je.judge_t2i(judge.to_float(np.stack(pictures)), p, net)["drawn"].mean()

    assert drawn(lambda o: o) > 0.6
    assert drawn(lambda o: replace(o, size="large", x=0.3, y=0.7)) > 0.6
    assert drawn(lambda o: replace(o, colour="red" if o.colour != "red" else "blue")) < 0.15
    assert drawn(lambda o: replace(o, shape="star" if o.shape != "star" else "square")) < 0.15


# ---- end to end ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Random weights: two instruction editors, their base, an inpainting editor, a parser."""
    at = tmp_path_factory.mktemp("ckpt")
    torch.manual_seed(0)
    base = model.Editor(model.PRESETS["test"])
    torch.nn.init.normal_(base.mmdit.final_layer.linear.weight, std=0.05)
    nets = {"base": base, "inpaint": model.Editor(model.inpainting(model.PRESETS["test"]))}
    for variant in ("editnet", "concat"):
        nets[variant] = model.EditNet(model.PRESETS["test"], variant)
        nets[variant].attach(base.state_dict())
        torch.nn.init.normal_(nets[variant].src_embedder.proj.weight, std=0.05)
    for name, n in nets.items():
        meta = {"arch": n.arch, "config": {"image_size": SIZE, "shift": 1.5}}
        checkpoint.write(at / name, 1, {"model": n.state_dict()}, meta)
    n = judge.Parser()
    checkpoint.write(at / "parser", 1, {"model": n.state_dict()}, {"arch": n.arch})
    return at


def call(folders, out, task="edits", **flags):
    flags = dict(ckpt="editnet", parser="parser", n=3, steps="2", device="cpu", precision="fp32",
                 rows=1) | flags
    names = {p.name: str(p) for p in folders.iterdir()} | {"edit/net": str(folders / "edit/net")}
    flags = {k: ",".join(names.get(x, x) for x in v.split(",")) if isinstance(v, str) else v
             for k, v in flags.items()}
    ev.main(ev.Config(task, out=str(out), **flags))
    return json.loads((out / "results.json").read_text())


@pytest.mark.usefixtures("one_thread_and_own_signals")
def test_baselines_stand_in_the_same_table(folders, tmp_path):
    """Bases that draw, beside an editor: what blended may not change stays."""
    base = [f"{method}:{folders / name}" for method, name in (("blended", "base"), ("sdedit", "inpaint"),
                                                              ("diffedit", "base"))]
    got = call(folders, tmp_path, ckpt=",".join(["editnet", *base]), n=2, strength=0.5)
    got = got["aspects"]["1x1"]["tasks"]
    names = list(got["mean"])
    assert names == [f"{folders / 'editnet'}@2", *(f"{b}@2" for b in base), "source", "truth"]
    over = {name: got["swap"][name]["over"]["mean"] for name in names}
    assert over[names[1]] < 0.003 < min(over[names[0]], over[names[2]])  # 8 bits
    with pytest.raises(SystemExit, match="error: --ckpt: .*editnet: .*captions are to be drawn"):
        call(folders, tmp_path, ckpt=f"sdedit:{folders / 'editnet'}")
    with pytest.raises(SystemExit, match="--strength: 2"):
        call(folders, tmp_path, strength=2.0)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread_and_own_signals")
def test_edits_then_compare_with_the_saved_pictures(folders, tmp_path):
    flags = dict(ckpt="editnet,concat", aspects="1:1,16:9", save=str(tmp_path / "s"), guidance=2.0,
                 image_guidance=1.5, seeds="0,1")
    results = call(folders, tmp_path / "o", **flags)
    assert {"command", "commit", "machine", "date", "seconds", "config", "aspects"} <= set(results)
    assert list(results["aspects"]) == ["1x1", "16x9"]
    h, w = results["aspects"]["16x9"]["size"]
    assert h % 4 == w % 4 == 0 and 1.4 < w / h < 2.1 and 0.8 < h * w / SIZE**2 < 1.25
    names = [f"{folders / name}@2" for name in ("editnet", "concat")]
    for aspect in results["aspects"].values():
        assert set(aspect["tasks"]) == {*TASKS, "mean"} and set(aspect["parser"]) == {*TASKS}
        for columns in aspect["tasks"].values():
            assert list(columns) == [*names, "source", "truth"]
            for metrics in columns.values():
                assert set(metrics) == {"success", "edit", "kept", "kept_share", "over", "exact", "error",
                                        "frechet"}
            assert columns["truth"]["error"]["mean"] == 0 < columns[names[0]]["error"]["mean"]
    assert (tmp_path / "o/sheet.png").stat().st_size > 1000
    saved = sorted((tmp_path / "s").iterdir())
    assert len(saved) == 2 and json.loads((saved[0] / "judge.json").read_text())["kind"] == "edits"
    # the same again in other batches, against its saved pictures: a function of the pair, nothing differs
    flags |= dict(save="", batch_size=2, ckpt=f"editnet,{next(p for p in saved if 'editnet' in p.name)}")
    report = call(folders, tmp_path / "c", task="compare", **flags)["tasks"]
    assert set(report) == {f"{a}/{t}" for a in ("1x1", "16x9") for t in (*TASKS, "all")}
    for task in report.values():
        found = task["gsb"]  # where success is not asked the error decides
        assert found["overall"]["same"] == found["error"]["same"] >= found["success"]["same"]
        assert found["overall"]["good"] == found["error"]["bad"] == 0
        assert task["difference"]["error"]["mean"] == 0
    assert report["1x1/all"]["gsb"]["overall"]["same"] == 7 * 3 * 2


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread_and_own_signals")
def test_seeds_as_one_row(folders, tmp_path, capsys):
    for name, variant in (("one0", "editnet"), ("one1", "editnet"), ("two0", "concat"), ("two1", "editnet")):
        (tmp_path / name).symlink_to(folders / variant)
    names = [str(tmp_path / name) for name in ("one0", "one1", "two0", "two1")]
    results = call(folders, tmp_path / "o", ckpt=",".join(names))["aspects"]["1x1"]["tasks"]
    table = runpy.run_path(str(ROOT / "runs/table.py"))
    capsys.readouterr()
    table["main"](str(tmp_path / "o"), ["error", "edit"])
    rows = dict(re.findall(r"^\| ([\w@ -]+) \| (.*) \|$", capsys.readouterr().out.split("edit 1x1")[0], re.M))
    assert list(rows) == ["one@2", "two@2", "two@2 - one@2"]
    for i, task in enumerate((*TASKS, "mean")):
        one, _, two, _ = (results[task][f"{name}@2"]["error"]["mean"] for name in names)
        got = [float(rows[k].split(" | ")[i].split(" ± ")[0]) for k in rows]
        assert got == pytest.approx([one, (one + two) / 2, (two - one) / 2], abs=1e-4)
    # by hand: the seeds' mean of two scenes is 1.5 and 3.5, variance 2; the seeds' 2 and 3, variance 0.5
    values = np.array([[1.0, 3.0, math.nan], [2.0, 4.0, math.nan]])
    def cell(*args):
        return [float(x) for x in table["cell"](*args).split(" ± ")]

    alone = [2.5, 2.0595 * math.sqrt(2 / 2 + 0.5 / 2)]  # Student's t at 1 (1.25 / 0.25)^2 = 25
    for tasks in ([values], [values, values]):  # the same scenes in both
        assert cell(tasks, False, True) == pytest.approx(alone, abs=1e-3)
    twice = [2.5, 2.2622 * math.sqrt(2 / 4 + 0.5 / 2)]  # other scenes for each task; 9 degrees of freedom
    assert cell([values, values], False, False) == pytest.approx(twice, abs=1e-3)
    assert table["cell"]([np.full((2, 3), math.nan)], True, False) == "-"
    for freedom, t in ((2, 4.303), (4, 2.776), (10, 2.228), (1e9, 1.960)):
        assert table["quantile"](freedom) == pytest.approx(t, rel=0.035)
    with pytest.raises(SystemExit, match="no metric 'edits': use one of edit, kept"):
        table["main"](str(tmp_path / "o"), ["edits"])
    with pytest.raises(SystemExit, match="scores.npz: missing or damaged"):
        table["main"](str(tmp_path), ["edit"])


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread_and_own_signals")
def test_region_and_level(folders, tmp_path):
    flags = dict(ckpt="concat", n=2, steps="1")
    plain = call(folders, tmp_path / "a", **flags)
    region = call(folders, tmp_path / "b", region=True, **flags)
    name = f"{folders / 'concat'}@1"
    swap, style = ([x["aspects"]["1x1"]["tasks"][task][name]["error"]["mean"] for x in (plain, region)]
                   for task in ("swap", "style"))
    assert swap[0] != swap[1] and style[0] == style[1], "a style's region is the whole picture"
    for kind in ("scenes", "edits"):  # --data chooses whose scenes are judged
        for data, level in (("scenes", "easy"), ("scenes:hard", "hard")):
            found = ev.gather_cases(ev.Config("edits", n=2, data=data), kind, SIZE, 4)
            image = next(iter(found.values())).image[0]
            want = draw.draw(dataset.Scenes("heldout", level).scene(0), SIZE, SIZE)
            assert torch.equal(image, judge.to_float(want)), (kind, data)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread_and_own_signals")
def test_text_to_image_from_checkpoints(folders, tmp_path, capsys):
    flags = dict(task="t2i", ckpt="base,concat,inpaint", steps="2,2,1", n=5, batch_size=4, seeds="0,1")
    results = call(folders, tmp_path / "a", **flags)
    said, t2i = capsys.readouterr().out, results["t2i"]
    assert {"command", "commit", "machine", "date", "seconds", "config", "t2i"} <= set(results)
    base, concat, inpaint = (f"{folders / x}" for x in ("base@2", "concat@2", "inpaint@1"))
    assert list(t2i) == [base, f"{concat}, branch off", f"{concat}, null picture", inpaint,
                         "another's picture", "truth"]
    assert t2i[base] == t2i[f"{concat}, branch off"], "only its new columns differ from the base"
    assert t2i[base]["frechet"] != t2i[f"{concat}, null picture"]["frechet"]
    for row in t2i.values():
        assert set(row) == {"drawn", "attributes", "background", "environment", "style", "objects", "frechet"}
    singles = sum(len(dataset.Scenes("heldout").scene(i).objects) == 1 for i in range(5))
    assert t2i[base]["drawn"]["n"] == singles and t2i[base]["background"]["n"] == 5
    assert t2i["truth"]["frechet"]["mean"] == pytest.approx(0, abs=1e-3)
    assert "text to image: 5 held-out captions, 2 seed(s)" in said and "drawn" in said
    assert (tmp_path / "a/sheet.png").stat().st_size > 1000
    flags = dict(task="t2i", ckpt="base", steps="2", n=2, data="scenes:hard")
    hard = call(folders, tmp_path / "b", **flags)["t2i"]
    assert hard["truth"]["drawn"]["n"] == 0, "the first two scenes have several objects"


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread_and_own_signals")
def test_controls_of_text_to_image(folders, net, tmp_path):
    """By the shipped judge: the scene itself shows what its caption says, another's does not."""
    found = call(folders, tmp_path, task="t2i", ckpt="base", steps="1", n=20,
                 parser=str(ROOT / "assets/parser"))["t2i"]
    truth, other = found["truth"], found["another's picture"]
    assert truth["drawn"]["mean"] > 0.7 and other["drawn"]["mean"] < 0.2
    assert truth["attributes"]["mean"] > 0.8 and other["attributes"]["mean"] < 0.45


@pytest.mark.parametrize("change, words", [
    ({"ckpt": "inpaint"}, "--stage edit"),
    ({"ckpt": "editnet", "task": "scenes"}, "is an instruction editor"),
    ({"ckpt": "editnet,inpaint", "task": "compare"}, "is an inpainting model"),
    ({"ckpt": "saved"}, "pictures of `evaluate.py scenes`"), ({"ckpt": "damaged"}, "judge.json: damaged"),
    ({"ckpt": "easy", "data": "scenes:hard"}, "easy: holds pictures of easy scenes, not of hard ones"),
    ({"ckpt": "edit_net,edit/net", "save": "s"}, "would both be saved as"),
    ({"aspects": "9"}, "--aspects: '9'"), ({"aspects": "9:1"}, "from 1:4 to 4:1"),
    ({"aspects": "1:0"}, "--aspects"), ({"task": "t2i", "ckpt": ""}, "--ckpt: ''"),
    ({"task": "t2i", "ckpt": "parser"}, "an 'editor' is needed"),
    ({"task": "t2i", "ckpt": "nowhere"}, "nowhere"),
    ({"task": "t2i", "ckpt": "saved"}, "saved"), ({"task": "t2i", "steps": "1,2"}, "one number or one"),
    ({"task": "t2i", "n": 1}, "--n: 1: use 2 to 100000"),
    ({"task": "t2i", "offset": -1}, "--offset: -1: must not be negative"),
    ({"task": "t2i", "data": "scenes:wrong=0.5"}, "--data: scenes:wrong=0.5: the judge knows the truth"),
    ({"task": "t2i", "data": "pictures"}, "--data: pictures: the judge knows"),
    ({"data": "pictures/train.parquet"}, "use scenes or scenes:hard"),
    ({"data": "scenes:unknown"}, "the levels of scenes are easy, hard"),
    ({"data": "scenes:wrong=0"}, "use scenes or scenes:hard"),
    ({"ckpt": "inpaint", "task": "scenes", "data": "ip2p:x"}, "use scenes or scenes:hard"),
    ({"ckpt": "base,inpaint", "task": "compare"}, "without mask input"),
    ({"n": 20_000}, "use 2 to 14285"), ({"image_size": 33}, "multiple of"),
    ({"ckpt": ""}, "--ckpt: is empty")])
@pytest.mark.usefixtures("one_thread_and_own_signals")
def test_mistakes_give_one_line(folders, tmp_path, change, words):
    for name in ("edit_net", "edit/net"):
        (folders / "edit").mkdir(exist_ok=True)
        if not (folders / name).exists():
            (folders / name).symlink_to(folders / "editnet")
    for name, text in (("saved", '{"name": "x", "size": 32}'), ("damaged", "[]"),
                       ("easy", '{"name": "x", "size": 32, "kind": "edits"}')):
        (folders / name).mkdir(exist_ok=True)
        (folders / name / "judge.json").write_text(text)
    with pytest.raises(SystemExit) as stop:
        call(folders, tmp_path, **change)
    text = str(stop.value)
    assert text.startswith("error: ") and "\n" not in text and words in text


def test_from_the_shell(folders, tmp_path):
    done = run_script(ROOT / "evaluate.py", "edits", "--ckpt", folders / "concat", "--steps=1", "--n=2",
                      "--image_size=32", "--parser", folders / "parser", "--out", tmp_path, "--device=cpu")
    assert done.returncode == 0, done.stderr
    assert "success" in done.stdout and "the parser" in done.stdout and (tmp_path / "sheet.png").is_file()
