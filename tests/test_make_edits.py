"""make_edits.py on scenes: the specialists, scores, regions, refinement, packing."""

import json
import os
import re
import shutil
import signal

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from inprocess import run_ranks, run_script
from PIL import Image
from staged import files_of, killed, rows_of, stage
from test_served import Judge

import checkpoint
import common
import flow
import make_edits
import masks
import pipeline
from factory import chat, refine, regions, requests, score, shards, specialists
from readers import served
from readers.edits import open_edits
from readers.served import Verdict
from scenes import draw
from scenes.dataset import EditScenes
from scenes.edits import edit_mask
from scenes.judge import load_parser
from tests.hostile import kills

PUBLISHED = ["omni_edit_id", "task", "src_img", "edited_img", "edited_prompt_list", "width", "height",
             "sc_score_1", "sc_score_2", "sc_reasoning", "pq_score", "pq_reasoning", "o_score"]


def test_a_rank_needs_no_other(base, tmp_path, monkeypatch):
    """A rank spared by a SIGKILL waited for the dead one to join it, at the start of a stage."""
    for name, value in dict(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1",
                            MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)
    cfg = make_edits.Specialist(str(tmp_path / "out"), n=2, tries=1, steps=1, shard=1, tasks="swap",
                                ckpt=base, precision="fp32", device="cpu")
    make_edits.main(cfg)
    assert "00001.parquet" in files_of(tmp_path / "out") and not (tmp_path / "out/00000.parquet").exists()


# ---- a tiny editor, and the stages on scenes -----------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return kills.base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def pipe(base):
    return pipeline.open_editor(base, torch.device("cpu"), ("fill",))


SMALL = dict(n=10, tries=2, steps=2, shard=4, batch_size=3, precision="fp32",
             tasks="swap,remove,add,background,attribute,environment")


@pytest.fixture(scope="module")
def specialist(base, tmp_path_factory):
    """A folder of the first stage, and what it printed."""
    out = tmp_path_factory.mktemp("made") / "made"
    return out, stage("specialist", ckpt=base, out=out, **SMALL)


def test_specialist(specialist):
    """Published columns first; what the mask keeps is the source bit for bit; an addition is its removal
    backwards, with a real picture as its target; tries differ."""
    out, said = specialist
    assert pq.read_schema(out / "00000.parquet").names[:13] == PUBLISHED
    shown = json.loads(pq.read_schema(out / "00000.parquet").metadata[b"huggingface"])["info"]["features"]
    assert shown == dict.fromkeys(shards.PICTURES, {"_type": "Image"})  # `datasets` decodes what says so
    assert "int64" == str(pq.read_schema(out / "00000.parquet").field("pq_score").type)
    rows = {row["omni_edit_id"]: row for row in rows_of(out)}
    assert len(rows) == 2 * 12 and "removal" not in said and "swap" in said  # ten requests, two of them twins
    pairs = EditScenes("train")
    for row in rows.values():
        a, b = (shards.pixels(row[k]) for k in ("src_img", "edited_img"))
        at = json.loads(row["source"])["pair"]
        before, edit = pairs.edit(at)
        real = draw.draw(before, 16, 16)
        assert row["width"] == 16 and row["o_score"] is None and row["edited_prompt_list"][0]
        assert np.array_equal(b if row["task"] == "addition" else a, real)
        if row["task"] == "addition":
            twin = rows[row["twin_of"]]
            assert (row["src_img"], row["edited_img"]) == (twin["edited_img"], twin["src_img"])
            assert row["family"] == twin["family"] and row["edited_prompt_list"] != twin["edited_prompt_list"]
        elif row["task"] == "env":
            assert row["mask_image"] is None
        else:
            mask = shards.area(row["mask_image"], 16, 16)
            assert np.array_equal(a[mask == 0], b[mask == 0])
            own = shards.area(row["object_mask"], 16, 16) > 0
            if row["task"] == "background":
                assert np.array_equal(mask == 0, own)
            else:
                assert mask[own].all() and mask.sum() > own.sum()
        if row["try"] == 0:
            other = rows[row["omni_edit_id"][:-1] + "1"]
            assert other["edited_img"] != row["edited_img"] or other["src_img"] != row["src_img"]


def test_a_lost_shard_comes_back(specialist, base):
    out, _ = specialist
    whole = files_of(out)
    for name in ("00001.json", "manifest.json", "sheet.png"):
        (out / name).unlink()
    stage("specialist", ckpt=base, out=out, **SMALL)
    assert files_of(out) == whole


@pytest.mark.slow
def test_two_ranks_make_the_same(specialist, base, tmp_path):
    flags = [f"--{k}={v}" for k, v in {**SMALL, "ckpt": base, "out": tmp_path / "two"}.items()]
    done = run_ranks(2, ["make_edits.py", "specialist", *flags])
    assert done.returncode == 0, done.stderr[-2000:]
    assert files_of(tmp_path / "two") == files_of(specialist[0])


def test_noise_is_of_item_task_and_try_alone():
    a = specialists.noise_for(0, [("k1", 0), ("k2", 1)], "swap", (2, 3))
    assert torch.equal(a[1:], specialists.noise_for(0, [("k2", 1)], "swap", (2, 3)))
    others = [specialists.noise_for(s, [(k, n)], t, (2, 3)) for s, k, n, t in (
        (1, "k1", 0, "swap"), (0, "k2", 0, "swap"), (0, "k1", 1, "swap"), (0, "k1", 0, "remove"))]
    assert all(not torch.equal(a[:1], x) for x in others)


def test_prompt_to_prompt(pipe):
    """Equal captions give equal pictures; sharing brings another caption's picture nearer; what a mask keeps
    is the source to the end, or down to a noise level; a real picture is the source itself."""
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    ts, a, b = flow.timesteps(4), ["a red star", "a blue ring"], ["a blue heart", "snow"]

    def run(before, after, **more):
        return specialists.prompt_to_prompt(pipe, before, after, noise, ts, **{"guidance": 3.0} | more)

    one, same = run(a, a, share_until=1.1)
    assert torch.allclose(one, same, atol=1e-5)
    alone = specialists.fill(pipe, a, torch.zeros_like(one), torch.ones(2, 1, 16, 16), noise, 4, 3.0)
    assert torch.allclose(one, alone, atol=1e-4)
    free, shared = (run(a, b, share_until=s) for s in (1.1, 0.0))
    assert torch.allclose(free[0], shared[0], atol=1e-5)  # the source row is never touched
    assert not torch.allclose(free[1], shared[1], atol=1e-3)
    assert torch.allclose(run(a, b, share_until=1.01)[1], free[1], atol=1e-5)  # t = 1 is below 1.01
    g = torch.Generator().manual_seed(1)
    image, mask = torch.rand(2, 3, 16, 16, generator=g) * 2 - 1, torch.zeros(2, 1, 16, 16)
    mask[..., 8:] = 1
    source, held = run(a, b, image=image, mask=mask)
    assert torch.allclose(source, image, atol=1e-5)
    assert torch.allclose(held[..., :8], image[..., :8], atol=1e-5)
    assert not torch.allclose(held[..., 8:], image[..., 8:], atol=1e-2)
    let_go = run(a, b, image=image, mask=mask, blend_until=0.5)[1]
    assert not torch.allclose(let_go[..., :8], image[..., :8], atol=1e-2)


def test_a_row_says_what_drew_it(pipe):
    """--solver is of inpainting; Prompt-to-Prompt takes Euler's steps, and its rows say so."""
    cfg = make_edits.Specialist("", steps=2, solver="dpm", precision="fp32")
    for task, solver in (("swap", "dpm"), ("environment", "euler")):
        row = requests.open_requests("scenes", "train", [task], 1).load(0, 16, 16)
        (made,) = specialists.make(task, pipe, None, [row], [("k", 0)], cfg, False)
        assert made["params"]["solver"] == solver


def test_requests_of_real_data(tmp_path, capsys):
    """Masks, label maps of another size and boxes; what is wrong is named, counted and left out."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8)).save(tmp_path / "a.png")
    labels = np.zeros((12, 16), np.uint8)
    labels[3:6, 4:8] = 7
    Image.fromarray(labels).save(tmp_path / "a.seg.png")
    Image.fromarray((labels > 0).astype(np.uint8) * 255).resize((32, 24), 0).save(tmp_path / "a.mask.png")
    row = {"source": "a.png", "task": "replace", "instruction": "swap it", "target_caption": "a cat"}
    rows = [row | {"mask": "a.mask.png"}, row | {"segments": "a.seg.png", "label": 7},
            row | {"task": "object_removal", "box": [8, 6, 16, 12], "behind": "grass",
                   "add_instruction": ["add it", "put it"]},
            row, row | {"box": "here"}, {"task": "swap", "instruction": "x"}, row | {"task": "dance"},
            row | {"segments": "a.seg.png", "label": 3},
            row | {"task": "add", "mask": "a.mask.png", "instruction": "add a cat"}]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    source = requests.open_requests(str(tmp_path / "r.jsonl"), "train", ["swap", "remove"], 0)
    said = capsys.readouterr().err
    assert len(source) == 4 and "needs mask" in said and "is none of" in said and "box is not" in said
    assert "an addition is a removal backwards: say task remove" in said
    got = [source.load(i, 24, 32) for i in range(3)]
    for g in got:
        assert g["object"].sum() == 48 and g["object"][6:12, 8:16].all() and g["family"] == got[0]["family"]
    assert got[2]["prompt"] == "grass" and got[2]["added"] == ["add it", "put it"]
    assert got[0]["prompt"] == "a cat"
    with pytest.raises(SystemExit, match="not in the picture"):
        source.load(3, 24, 32)
    grown = requests.grown(got[0]["object"], 0.25)
    assert grown.sum() == 12 * 10 and requests.grown(got[0]["object"], 0).sum() == 48
    assert len(requests.open_requests(str(tmp_path / "r.jsonl"), "train", ["swap"], 0)) == 3
    assert "1 of 4 requests are left out: --tasks does not name remove" in capsys.readouterr().out


def test_requests_lie_on_their_photo_as_it_is_shown_and_are_told_apart(tmp_path):
    """A phone's photo is turned by EXIF; what was painted on its stored pixels is turned with it."""
    photo, mask = np.zeros((64, 96, 3), np.uint8), np.zeros((64, 96), np.uint8)
    photo[5:13, 4:36, 0] = mask[5:13, 4:36] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(mask).save(tmp_path / "m.png")
    Image.fromarray(mask // 255 * 7).save(tmp_path / "s.png")
    Image.fromarray(mask[:, :32]).save(tmp_path / "other.png")
    row = {"source": "a.png", "task": "remove", "instruction": "remove the person"}
    rows = [row | {"mask": "m.png"}, row | {"segments": "s.png", "label": 7}, row | {"box": [51, 4, 59, 36]},
            row | {"mask": "other.png"}]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    source = requests.open_requests(str(tmp_path / "r.jsonl"), "train", ["remove"], 0)
    for i in range(3):
        got = source.load(i, 96, 64)
        assert np.array_equal(got["image"][..., 0] > 127, got["object"] > 0.5) and got["object"].sum() == 256
    with pytest.raises(SystemExit, match="other.png: 32x64, but its picture is 64x96"):
        source.load(3, 96, 64)
    assert len({source.key(i) for i in range(4)}) == 4
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:2] + rows[:1]))
    with pytest.raises(SystemExit, match=r"2 requests have the key \w+ \(remove in a.png\): remove all but"):
        requests.open_requests(str(tmp_path / "r.jsonl"), "train", ["remove"], 0)


def test_no_truth_is_known_of_photos(base, tmp_path):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    (tmp_path / "r.jsonl").write_text(json.dumps({
        "source": "a.png", "task": "swap", "instruction": "swap it", "target_caption": "a cat",
        "box": [2, 2, 9, 9]}))
    stage("specialist", data=tmp_path / "r.jsonl", out=tmp_path / "m", ckpt=base, tries=1, steps=1,
          tasks="swap", precision="fp32")
    done = run_script("make_edits.py", "score", f"--data={tmp_path / 'm'}", f"--out={tmp_path / 's'}")
    assert done.returncode == 1 and "error: --judge: truth: is known of scenes alone" in done.stderr


def test_published_words_of_tasks_are_ours():
    assert requests.tasks_of("removal,addition,env") == (["remove", "environment"], True, True)
    with pytest.raises(SystemExit, match="twice"):
        requests.tasks_of("remove,removal")


def test_stages_refuse_what_they_cannot_do(base, tmp_path, specialist):
    for name, flags, words in (
            ("specialist", {"out": tmp_path / "a", "tasks": "style", "ckpt": base}, "--editor"),
            ("specialist", {"out": tmp_path / "a", "tasks": "swap,jump"}, "jump"),
            ("region", {"out": tmp_path / "a", "tasks": "style"}, "a region is"),
            ("score", {"out": tmp_path / "a", "data": specialist[0], "judge": "me"}, "not a judge"),
            ("score", {"out": specialist[0], "data": specialist[0]}, "is what is read"),
            ("score", {"out": tmp_path / "a", "data": specialist[0], "judge": "http://127.0.0.1:9/v1"},
             "judge_model"),
            ("refine", {"out": tmp_path / "b", "data": specialist[0], "steps": "1,2,3"}, "--steps"),
            ("pack", {"out": tmp_path / "c", "data": tmp_path}, "not a folder of a stage")):
        done = run_script("make_edits.py", name, *(f"--{k}={v}" for k, v in flags.items()))
        assert done.returncode == 1 and words in done.stderr, (words, done.stderr)
        assert done.stderr.splitlines()[-1].startswith("error: "), done.stderr
        assert "Traceback" not in done.stderr


# ---- scores --------------------------------------------------------------------------------------


def as_row(task, pair, source, image):
    return {"task": shards.TASK_WORDS[task], "src_img": shards.picture(source),
            "edited_img": shards.picture(image), "width": image.shape[1], "height": image.shape[0],
            "edited_prompt_list": ["edit"],
            "source": json.dumps({"scenes": "easy", "split": "heldout", "pair": pair})}


def test_truth_judges(tmp_path):
    """Exact pairs get 10, the source itself 0 for what was asked, a picture that changed elsewhere less for
    what was kept, a noisy target less for its quality; without truth there is no score."""
    judge, pairs = score.truth(load_parser("assets/parser", torch.device("cpu"))), EditScenes("heldout")
    rows, kinds = [], []
    rng = np.random.default_rng(0)
    for task, pair in (("swap", 7), ("remove", 8), ("background", 11)):
        before, edit = pairs.edit(pair)
        a, b = draw.draw(before, 64, 64), draw.draw(edit.target, 64, 64)
        area = edit_mask(edit, before, 64, 64)[..., None] > 0
        noisy = np.where(area, rng.integers(0, 255, a.shape), b).astype(np.uint8)
        for kind, (x, y) in (("exact", (a, b)), ("source", (a, a)), ("noisy", (a, noisy)),
                             ("elsewhere", (a, np.where(area, b, 255 - b)))):
            rows.append(as_row(task, pair, x, y))
            kinds.append(kind)
        if task == "remove":
            spoilt = np.where(area, rng.integers(0, 255, a.shape), a).astype(np.uint8)
            rows += [as_row("add", pair, b, a), as_row("add", pair, a, a), as_row("add", pair, b, spoilt)]
            kinds += ["exact", "source", "noisy"]
    rows.append(rows[0] | {"source": None})
    rows.append(rows[0] | {"source": json.dumps(json.loads(rows[0]["source"]) | {"drawn": True})})
    told = score.scored(rows, judge, "truth")
    for kind, row in zip(kinds, told):
        assert row["judge_status"] == "ok", (kind, row["judge_status"])
        if kind == "exact":
            assert row["o_score"] > 9.99 and row["sc_score_1"] == row["sc_score_2"] == row["pq_score"] == 10
        elif kind == "source":
            assert row["sc_score_1"] == 0 and row["o_score"] == 0
        elif kind == "noisy":
            assert row["pq_score"] < 6
        else:
            assert row["sc_score_2"] < 6
    assert all(row["o_score"] is None and "no truth" in row["judge_status"] for row in told[-2:])


def test_a_judge_that_guesses_is_an_error():
    row = {"edited_prompt_list": ["x"]}
    for verdict in (Verdict(5.0, judge_status="unparsed"), Verdict(None), Verdict(11.0)):
        with pytest.raises(ValueError, match="status"):
            score.scored([row], lambda rows, v=verdict: [v], "judge")
    (got,) = score.scored([row], lambda rows: [Verdict(8.9, 9.4, 10, "", 8.4)], "judge")
    assert got["o_score"] == 8.9 and got["sc_score_1"] == 9 and got["pq_score"] == 8


def test_a_served_judge_is_asked(specialist, tmp_path):
    """The whole stage against a real server; its scores are in the columns, and a second run asks nothing."""
    server = Judge()
    flags = dict(data=specialist[0], out=tmp_path / "s", judge=f"http://127.0.0.1:{server.server_port}/v1",
                 judge_model="judge")
    stage("score", **flags)
    rows, asked = rows_of(tmp_path / "s"), len(server.asked)
    assert all(row["pq_score"] == 8 and row["sc_score_2"] == 10 and row["judge"] == "judge" for row in rows)
    assert "replies.jsonl" in os.listdir(tmp_path / "s")
    for p in (tmp_path / "s").glob("*.json"):
        p.unlink() if p.name != "plan.json" else None
    stage("score", **flags)
    assert len(server.asked) <= asked + 14  # the self-test alone
    # what may have passed is asked again by the same command, and nothing else is
    flags["out"], down = tmp_path / "u", lambda handler: handler.send(503, "{}", Retry_After="0")
    server.trick = lambda n, question: (  # the self-test is passed
        down if question.kind == "pq" and question.pictures[0].shape[0] == rows[0]["height"] else None)
    stage("score", **flags)
    failed = rows_of(tmp_path / "u")
    assert all(row["o_score"] is None and row["judge_status"].startswith("pq: http 503") for row in failed)
    server.trick, asked = (lambda n, question: None), len(server.asked)
    stage("score", **flags)
    assert {q.kind for q in server.asked[asked:] if q.pictures[0].shape[0] == rows[0]["height"]} == {"pq"}
    assert rows_of(tmp_path / "u") == rows
    asked = len(server.asked)
    stage("score", **flags)
    assert not any(q.pictures[0].shape[0] == rows[0]["height"] for q in server.asked[asked:])
    server.trick = lambda n, question: lambda handler: handler.send(401, "{}")
    flags["out"] = tmp_path / "t"
    done = run_script("make_edits.py", "score", *(f"--{k}={v}" for k, v in flags.items()))
    assert done.returncode == 1 and "error: --judge" in done.stderr
    assert not list((tmp_path / "t").glob("*.parquet"))
    server.shutdown()
    server.server_close()


def test_yields():
    rows = [{"task": "swap", "item": i, "try": k, "o_score": o} for i, scores in enumerate(
        [(9.5, 1, 1, None), (0, 9, 0, 0), (0, 0, 0, 9.9), (1, 1, 1, 1)]) for k, o in enumerate(scores)]
    (got,) = score.yields(rows, 9)
    assert got["yield"] == {1: 0.25, 2: 0.5, 4: 0.75} and got["unscored"] == 1
    assert got["precision"] == 3 / 15 and got["items"] == 4 and got["tries"] == 16
    assert "75.0" in score.yield_table([got], 9)


def test_a_folder_is_of_its_weights(base, specialist, tmp_path):
    """A name, a step and a path are not enough: weights are retrained where they were. A command that cannot
    be binds no folder; one line names the one flag that differs."""
    out, first, second = tmp_path / "o", tmp_path / "a/final", kills.base(tmp_path / "b/final", 1)
    shutil.copytree(base, first)
    flags = dict(n=2, shard=1, tries=1, steps=1, tasks="swap", precision="fp32", out=out)
    for wrong in (dict(ckpt=tmp_path / "gone"), dict(ckpt=first, editor=tmp_path / "gone")):
        done = run_script("make_edits.py", "specialist", *(f"--{k}={v}" for k, v in (flags | wrong).items()))
        assert done.returncode == 1 and "gone: no such folder or file" in done.stderr
    stage("specialist", **flags, ckpt=first)
    before = files_of(out)
    for name in ("00001.json", "manifest.json"):
        (out / name).unlink()
    flags["ckpt"] = second
    done = run_script("make_edits.py", "specialist", *(f"--{k}={v}" for k, v in flags.items()))
    assert done.returncode == 1 and "was begun with ckpt 'final@" in done.stderr
    assert "steps" not in done.stderr
    shutil.copytree(first, moved := tmp_path / "c/final")
    stage("specialist", **flags | {"ckpt": moved})  # the same weights somewhere else
    assert files_of(out) == before
    (tmp_path / "clip").mkdir()  # public weights in torch's own form
    names = []
    for text in (b"one", b"two"):
        (tmp_path / "clip/pytorch_model.bin").write_bytes(text)
        names.append(checkpoint.identity(tmp_path / "clip"))
    assert names[0] != names[1] and all(re.fullmatch("clip@[0-9a-f]{12}", name) for name in names)
    wrong = run_script("make_edits.py", "score", f"--data={out}", f"--out={tmp_path / 's'}", "--judge=me")
    assert wrong.returncode == 1 and not (tmp_path / "s/plan.json").exists()


# ---- regions -------------------------------------------------------------------------------------


def test_masks_of_regions():
    m = np.zeros((20, 20), bool)
    m[2:5, 2:5] = m[5, 5] = True  # corners touch
    m[10:12, 3:15] = True
    m[12:16, 14] = True
    parts = masks.pieces(m)
    assert sorted(map(len, parts)) == [10, 28] and sum(map(len, parts)) == m.sum()
    full = regions.hulls(parts, m.shape)
    assert full[m].all() and full[13, 11] and not full[15, 4] and full.sum() > m.sum()
    assert regions.box(m).sum() == 14 * 13
    dots = (np.indices((80, 80)) % 3 == 0).all(0)
    for mask, verdict in ((np.ones((20, 20)), "too large"), (np.zeros((20, 20)), "too small"), (m, "fine"),
                          (np.indices((80, 80)).sum(0) % 4 == 0, "fine"), (dots, "fragmented")):
        assert regions.grade(mask > 0)[0] == verdict, verdict
    seen = set()
    for k in range(60):
        soft, ring = regions.soft_mask(m, parts, np.random.default_rng(k))
        assert (soft[m] == 1).all() and (soft[~full] == 0).all()
        assert np.allclose(soft[full & ~m], ring)
        seen.add(ring)
    assert seen == set(regions.SOFT)
    assert regions.soft_mask(m, parts, np.random.default_rng(0), 0.0)[1] == 0


def test_region_keeps_what_the_mask_keeps(pipe):
    """An even number of steps ends with the blend: what the mask keeps is the source; a ring is between."""
    torch.manual_seed(0)
    image = torch.rand(8, 3, 16, 16) * 2 - 1
    noise, mask = torch.randn(8, 3, 16, 16), torch.zeros(8, 1, 16, 16)
    mask[..., 8:], mask[..., 6:8] = 1, 0.5

    def run(steps, blend, strength=1.0):
        return regions.draw(pipe, ["a red star"] * 8, image, mask, noise, steps, strength, 1.0, blend)

    even, odd, every, none = run(4, "alternate"), run(3, "alternate"), run(3, "every"), run(4, "none")
    assert torch.allclose(even[..., :6], image[..., :6], atol=1e-5)
    assert torch.allclose(every[..., :6], image[..., :6], atol=1e-5)
    for free in (odd, none):
        assert not torch.allclose(free[..., :6], image[..., :6], atol=1e-3)
    assert not torch.allclose(even[..., 8:], image[..., 8:], atol=1e-2)
    weak = run(10, "alternate", 0.2)  # two steps, from t = .2
    assert torch.allclose(weak[..., :6], image[..., :6], atol=1e-5)
    assert not torch.allclose(weak[..., 8:], run(10, "alternate")[..., 8:], atol=1e-2)


def test_region_stage(base, tmp_path):
    out = tmp_path / "r"
    flags = dict(ckpt=base, out=out, n=4, tries=2, steps=2, shard=2, precision="fp32",
                 tasks="swap,background")
    stage("region", **flags)
    rows = rows_of(out)
    assert len(rows) == 8 and {row["specialist"] for row in rows} == {"region"}
    for row in rows:
        mask = shards.area(row["mask_image"], 16, 16)
        a, b = (shards.pixels(row[k]) for k in ("src_img", "edited_img"))
        assert np.array_equal(a[mask == 0], b[mask == 0])
    stage("region", **flags | {"out": tmp_path / "soft", "tasks": "background", "tries": 6, "p_soft": 1})
    rings = set()
    for row in rows_of(tmp_path / "soft"):  # a ring lies around the object that stays, and not in it
        mask, its = (shards.area(row[k], 16, 16) for k in ("mask_image", "object_mask"))
        assert (mask[its > 0.5] == 0).all() and mask.max() == 1
        rings |= set(np.unique(mask)) - {0, 1}
    assert len(rings) > 1 and max(rings) <= 0.91  # 1 - 0.1
    stage("region", **flags | {"out": tmp_path / "drawn", "anchor": "none"})
    drawn = rows_of(tmp_path / "drawn")
    assert all(json.loads(row["source"])["drawn"] for row in drawn)
    assert all(a["src_img"] != b["src_img"] for a, b in zip(rows, drawn))


@pytest.mark.slow
def test_regions_compares_masks_and_blends(tmp_path, capsys):
    from runs import regions as comparison

    comparison.main(comparison.Config(str(tmp_path), n=6, steps=2, seeds=1))
    table = json.loads((tmp_path / "results.json").read_text())["table"]
    assert table["truth"]["done"] == [1] and table["source"]["done"] == [0] == table["source"]["outside"]
    assert table["truth"]["seam"] == [0] and len(table) == 11
    assert table["hard alternate - hard none"]["outside"][0] < 0
    for mask in ("hard", "soft"):  # after a blend what the mask keeps is the source's
        assert table[f"{mask} every"]["outside"][0] < 0.005 < table[f"{mask} none"]["outside"][0]
    assert "| soft alternate |" in capsys.readouterr().out


# ---- refinement ----------------------------------------------------------------------------------


def test_times_of_refinement():
    base, second = refine.times(-4.649, [18, 15], "edm", 1.0, 0.03)
    assert len(base) == 19 and len(second) == 16 and base[-1] == second[0] and second[-1] == 0
    assert abs(base[0] - 0.9109) < 1e-4
    whole = [*base, *second[1:]]
    assert all(a > b for a, b in zip(whole, whole[1:]))
    only, none = refine.times(-4.649, [9, 0], "linear", 3.0, 0.03)
    assert none == [0.0] and abs(only[0] - base[0]) < 1e-9
    assert np.allclose(np.diff([flow.shift_t(t, 1 / 3) for t in only]), np.diff(only := [
        flow.shift_t(t, 1 / 3) for t in only])[0])


def test_redraw_runs_both_models_over_their_parts(pipe, tmp_path):
    """One noise for equal pictures gives equal pictures; the second model has its part, and less noise leaves
    more of the picture."""
    other = pipeline.open_editor(kills.base(tmp_path / "other", 1), torch.device("cpu"))
    image = (torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1).repeat(2, 1, 1, 1)
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(2)).repeat(2, 1, 1, 1)

    def run(pipes, steps=(3, 2), logsnr=-4.649):
        parts = refine.times(logsnr, list(steps), "edm", 1.0, 0.03)
        return refine.redraw(pipes, ["a", "a"], image, noise, parts, 1.0)

    a, b = run([pipe, pipe]), run([pipe, other])
    assert torch.equal(a[0], a[1]) and not torch.allclose(a, b, atol=1e-3)
    assert not torch.allclose(run([other, pipe]), b, atol=1e-3)
    assert (run([pipe, pipe], logsnr=6.0) - image).abs().mean() < (a - image).abs().mean()


def test_refine_stage(specialist, base, tmp_path):
    """Both pictures of a pair larger, the mask with them; scores are gone, families are as before."""
    flags = dict(data=specialist[0], ckpt=base, steps="2,1", upscale=2, precision="fp32")
    said = stage("refine", out=tmp_path / "a", **flags)
    rows, before = rows_of(tmp_path / "a"), {r["omni_edit_id"]: r for r in rows_of(specialist[0])}
    assert "nothing is filtered" in said and len(rows) == len(before)
    for row in rows:
        old = before[row["refined_from"]]
        assert (row["width"], row["height"]) == (32, 32) and row["o_score"] is None
        assert shards.pixels(row["src_img"]).shape == shards.pixels(row["edited_img"]).shape == (32, 32, 3)
        assert (row["family"], row["item"], row["task"]) == (old["family"], old["item"], old["task"])
        if old["mask_image"]:
            mask, own = shards.area(row["mask_image"], 32, 32), shards.area(old["mask_image"], 16, 16)
            assert np.array_equal(mask, np.kron(own, np.ones((2, 2))))
    stage("refine", out=tmp_path / "b", same_noise=False, **flags)
    other = rows_of(tmp_path / "b")
    assert all(a["src_img"] == b["src_img"] for a, b in zip(rows, other))
    assert all(a["edited_img"] != b["edited_img"] for a, b in zip(rows, other))


@pytest.mark.slow
def test_clip_filter(tmp_path):
    """The numbers are rewards.clip_similarity's and clip_direction's; each threshold rejects by its name, and
    captions that are alike have no direction."""
    pytest.importorskip("transformers")
    from test_towers import CAPTIONS, TINY, clip_peer, clip_vocabulary, save

    import rewards
    from pretrained import towers

    words = clip_vocabulary(tmp_path)
    clip = towers.load_clip(save(tmp_path, clip_peer().state_dict()), words, True, TINY)
    a, b = torch.rand(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before, after = list(CAPTIONS[:3]), [*CAPTIONS[1:3], CAPTIONS[2]]
    got = refine.clip_filter(clip, a, b, before, after, {"image": -1.0, "dir": -1.0})
    same = rewards.clip_similarity(clip, a, b).tolist()
    assert [g["clip_sim_image"] for g in got] == same and [g["cause"] for g in got] == [
        None, None, "clip: captions alike"]
    assert got[2]["clip_sim_dir"] is None and abs(got[0]["clip_sim_dir"]) <= 1
    strict = refine.clip_filter(clip, a, b, before, after, {"image": 1.1, "dir": -1.0})
    assert {g["cause"] for g in strict[:2]} == {"clip: pictures unlike"}
    turn = refine.clip_filter(clip, a, b, before, after, {"image": -1.0, "dir": 1.1})
    assert {g["cause"] for g in turn[:2]} == {"clip: another direction"}
    with pytest.raises(SystemExit, match="--clip"):
        refine.open_clip("weights", torch.device("cpu"))


# ---- pack ----------------------------------------------------------------------------------------


def test_score_and_pack_make_a_data_set(specialist, tmp_path):
    """The reader of OmniEdit's rows reads it: tasks, scores, masks, captions; no family on both sides."""
    stage("score", data=specialist[0], out=tmp_path / "s")
    said = stage("pack", data=tmp_path / "s", out=tmp_path / "p", min_score=0, dev=0.4, shard=3, group=2)
    names = sorted(p.name for p in (tmp_path / "p").glob("*.parquet"))
    assert names[0].startswith("dev-00000-of-") and names[-1].startswith("train-") and "a better try" in said
    parts = {split: open_edits(f"omniedit:{tmp_path / 'p'}", split)
             for split in ("train", "heldout", "all")}
    assert len(parts["train"]) + len(parts["heldout"]) == len(parts["all"]) > 5
    rows = rows_of(tmp_path / "p")
    side = {name: {r["family"] for p in (tmp_path / "p").glob(f"{name}-*.parquet")
                   for r in pq.read_table(p).to_pylist()} for name in ("train", "dev")}
    assert side["train"] and side["dev"] and not side["train"] & side["dev"]
    pair = {json.dumps(r["edited_prompt_list"]): r for r in rows}
    tasks = set()
    for i in range(len(parts["all"])):
        got = parts["all"].load(i, 16, 16)
        row = pair[json.dumps(got["captions"])]
        tasks.add(got["task"])
        assert np.array_equal(got["image"], shards.pixels(row["edited_img"]))
        assert got["score"] == pytest.approx(row["o_score"])
        assert got["target_caption"] == row["target_caption"]
        assert (got["mask"] is None) == (row["mask_image"] is None)
    assert {"swap", "background", "environment"} <= tasks
    with pytest.raises(SystemExit, match="twice"):
        twice = f"{tmp_path / 's'},{tmp_path / 's'}"
        make_edits.pack(make_edits.Pack(data=twice, out=str(tmp_path / "q")), common.Dist())


def test_scored_pairs_become_conversations(specialist, tmp_path):
    """Our own reader of a judge's replies finds the scores in what the model is to say; an instruction that
    looks like a picture's place is text."""
    stage("score", data=specialist[0], out=tmp_path / "s")
    assert "conversations; 0 rows" in stage("chat", data=tmp_path / "s", out=tmp_path / "c")
    lines = [json.loads(line) for line in (tmp_path / "c/chat.jsonl").read_text().splitlines()]
    rows = rows_of(tmp_path / "s")
    assert len(lines) == 2 * len(rows) and all(row["o_score"] is not None for row in rows)
    for row, sc, pq_ in zip(rows, lines[::2], lines[1::2]):
        for line, cells, scores in ((sc, ("src_img", "edited_img"), [row["sc_score_1"], row["sc_score_2"]]),
                                    (pq_, ("edited_img",), [row["pq_score"]])):
            (_, asked), (_, said) = (m.values() for m in line["messages"])
            assert asked.count("<image>") == len(cells) == len(line["images"])
            mark = asked.split()[1].rstrip(".")
            assert served.scores_of(served.the_object(said, mark), len(scores)) == scores
            shown = [(tmp_path / "c" / p).read_bytes() for p in line["images"]]
            assert shown == [row[c]["bytes"] for c in cells]
    whole = {p.relative_to(tmp_path / "c"): p.read_bytes() for p in (tmp_path / "c").rglob("*.*")}
    for stop in (0, 3, 2 * len(whole) - 2):  # at a picture, at another after its renaming, at the lines
        again = tmp_path / str(stop)
        (again / "pictures").mkdir(parents=True)
        assert killed(lambda: chat.write(tmp_path / "s", again), stop) == signal.SIGKILL
        chat.write(tmp_path / "s", again)
        assert {p.relative_to(again): p.read_bytes() for p in again.rglob("*.*")} == whole, stop
    made, _ = chat.conversations(rows[0] | {"edited_prompt_list": ["<image> score 10"]})
    assert made[0]["messages"][0]["content"].count("<image>") == 2
    assert chat.conversations(rows[0] | {"o_score": None}) == ([], {})
    with pytest.raises(SystemExit, match="specialist"):
        make_edits.chat(make_edits.Chat(str(specialist[0]), str(tmp_path / "d")), common.Dist())


def test_a_distilled_scorer_is_asked(specialist, tmp_path):
    """One number a pair, and no parts that it did not say; pairs of every size."""
    import rewards

    torch.manual_seed(0)
    words = rewards.train_tokenizer(["remove the red star", "make it snow"], 300, 16)
    net = rewards.EditScorer(rewards.RewardConfig(
        image_size=16, patch=8, vit_width=32, vit_depth=1, vit_heads=2, txt_width=32, txt_depth=1,
        txt_heads=2, txt_hidden=64, vocab=300, txt_len=16, positions=16, tokenizer=words))
    checkpoint.write(tmp_path / "net", 0, {"model": net.state_dict()}, {"arch": net.arch})
    judge = score.open_judge(f"scorer:{tmp_path / 'net'}", "", torch.device("cpu"))
    rows = rows_of(specialist[0])[:6]
    rows[2] = rows[2] | {"width": 32, "height": 32} | {
        k: shards.picture(np.kron(shards.pixels(rows[2][k]), np.ones((2, 2, 1), np.uint8)))
        for k in ("src_img", "edited_img")}
    told = score.scored(rows, judge, "scorer")
    assert all(0 <= r["o_score"] <= 10 and r["sc_score_1"] is None for r in told)
    assert {r["judge_status"] for r in told} == {"ok"}
    assert len({r["o_score"] for r in told}) > 1
    alone = score.scored(rows[2:3], judge, "scorer")[0]["o_score"]
    assert abs(alone - told[2]["o_score"]) < 1e-4
