"""Instruction editors: train_omni.py --stage edit, and train_pefl.py on what it makes."""

import json
import re
from dataclasses import asdict

import numpy as np
import pytest
import torch
from inprocess import NATIVE
from PIL import Image
from trained import (
    OMNI_FILES,
    PEFL_FILES,
    call,
    differ,
    newest,
    random_editor,
    refused,
    resumes,
    shipped,
    spied,
    tensors,
    two_ranks_agree,
)

import checkpoint
import common
import data
import flow
import model
import pipeline
import rewards
import train_omni
import train_pefl
from readers.edits import open_edits

pytestmark = pytest.mark.usefixtures("one_thread_and_own_signals")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders: a base, an EditNet and a concat model on it, rewards."""
    root = tmp_path_factory.mktemp("edit")
    torch.manual_seed(0)
    test, size = model.PRESETS["test"], {"config": {"image_size": 32, "shift": 1.0}}
    base = random_editor(model.inpainting(test))
    out = {"base": shipped(root / "base", base, **size)}
    for variant in ("editnet", "concat"):
        net = model.EditNet(base.cfg, variant)
        net.attach(base.state_dict())
        for n, p in net.named_parameters():
            if not n.startswith("base."):
                p.data.add_(torch.randn(p.shape), alpha=0.05)
        out[variant] = shipped(root / variant, net, **size)
    latent = model.inpainting(model.replace(test, channels=16, txt_bytes=0))
    out["latent"] = shipped(root / "latent", model.Editor(latent), **size)
    tokenizer = rewards.train_tokenizer(["a red circle", "a blue square on grass"], 300, 40)
    for seed, name in ((1, "aesthetic"), (2, "alignment")):
        torch.manual_seed(seed)
        net = rewards.PreferenceReward(model.replace(rewards.REWARD_PRESETS["test"], tokenizer=tokenizer))
        out[name] = shipped(root / name, net)
    return out


def edit(made, **flags):
    return {"stage": "edit", "init": made["base"]} | flags


@pytest.mark.slow
def test_edit_resumes(made, tmp_path):
    resumes(made, tmp_path, train_omni, OMNI_FILES, **edit(made, data="scenes:wrong=0.3", workers=1))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    dict(tune_base="lora", lora=2, fixed_source=True, precision=NATIVE),
    dict(variant="concat", aspects=True)])
def test_variants_resume(made, tmp_path, flags):
    files = OMNI_FILES | ({"lora", "lora_ema"} if "lora" in flags else set())
    resumes(made, tmp_path, train_omni, files, **edit(made, **flags))


@pytest.mark.slow
def test_pefl_resumes(made, tmp_path):
    resumes(made, tmp_path, train_pefl, PEFL_FILES, base=made["editnet"])


def test_pefl_with_guidance(made, tmp_path, monkeypatch):
    """Of the instruction alone: with and without it, both with the source."""
    seen, forward = [], model.EditNet.forward
    monkeypatch.setattr(model.EditNet, "forward", lambda self, x, *rest: (
        seen.append(len(x)), forward(self, x, *rest))[1])
    row, = call(made, tmp_path, train_pefl, base=made["editnet"], guidance=3.0, phases="4/3/2x1")
    assert set(seen) == {8} and row["grad_norm/editor"] > 0 and np.isfinite(row["loss/G"])


@pytest.mark.slow  # sharded and quicker in test_sharded_scripts.py
@pytest.mark.parametrize("script", [train_omni, train_pefl])
def test_two_ranks(made, tmp_path, script):
    flags = edit(made) if script is train_omni else {"base": made["editnet"]}
    two_ranks_agree(made, tmp_path, script, flags)


@pytest.mark.parametrize("flags, moves, stays", [
    ({}, ("branch.", "text.", "img_out.", "src_out.", "src_embedder."), ("base.",)),
    ({"variant": "attend", "source_start": "masked"}, ("branch.", "img_out.", "txt_out.", "src_embedder."),
     ("base.",)),
    ({"variant": "controlnet"}, ("branch.", "img_out."), ("base.",)),
    ({"variant": "concat"}, ("base.mmdit.", "src_embedder.", "text."), ("base.text.",)),
    ({"tune_base": "full"}, ("base.mmdit.", "branch."), ("base.text.",)),
])
def test_what_trains(made, tmp_path, flags, moves, stays):
    call(made, tmp_path, train_omni, **edit(made, lr=1e-2, **flags))
    got, base = tensors(tmp_path), tensors_of(made["base"])
    start = {f"base.{k}": v for k, v in base.items()}
    for k, v in start.items():
        if k.startswith(stays):
            assert torch.equal(got[f"model/{k}"], v), k
    fresh = train_omni.build(train_omni.Config(**edit(made, **flags)))[0].state_dict()
    for prefix in moves:
        keys = [k for k in fresh if k.startswith(prefix) and not k.startswith(stays)]
        assert keys and any(not torch.equal(got[f"model/{k}"], fresh[k]) for k in keys), prefix


def tensors_of(folder):
    return checkpoint.load(folder, "model")[0]["model"]


def test_condition_dropout(monkeypatch):
    """One draw decides, as in InstructPix2Pix: text alone, both, source alone, 5 % each. Draws are functions
    of seed, step and position, whatever else is in a batch."""
    cfg = train_omni.Config(stage="edit", drop_caption=0.2, seed=3)
    batch = {"image": torch.zeros(4, 8, 8, 3, dtype=torch.uint8), "caption": list("abcd"), "step": 5,
             "position": [0, 1, 2, 3], "score": torch.ones(4)}
    drawn = train_omni.draws(cfg, 16, 4, 0, batch)
    gens = common.generators(3, 5, range(4))
    t, u = common.rand(gens), common.rand(gens)
    assert torch.equal(drawn["t"], flow.sample_t(t, cfg.t_density, cfg.t_shift)) and len(set(u.tolist())) == 4
    assert torch.equal(drawn["noise"], common.randn(gens, (16, 2, 2))) and drawn["weight"].tolist() == [1] * 4
    one = {k: v[2:3] if k != "step" else v for k, v in batch.items()}
    assert torch.equal(train_omni.draws(cfg, 16, 4, 0, one)["noise"][0], drawn["noise"][2])

    monkeypatch.setattr(common, "rand", lambda gens: torch.tensor([0.05, 0.15, 0.25, 0.35]))
    drawn = train_omni.draws(cfg, 3, 1, 0, batch)
    assert drawn["text"] == ["", "", "c", "d"] and drawn["null"].tolist() == [False, True, True, False]
    ids = train_omni.draws(cfg, 3, 1, 8, batch)["text"]
    assert torch.equal(ids, model.byte_ids(["", "", "c", "d"], 8))
    seen = {"source": torch.ones(4, 3, 8, 8), "mask": torch.full((4, 1, 8, 8), 0.5), "null": drawn["null"]}
    with torch.device("meta"):
        net = model.EditNet(model.PRESETS["test"])
    src, region = train_omni.conditions(cfg, net, pipeline.PixelSpace(), seen)
    assert src.flatten(1).sum(1).tolist() == [192, 0, 0, 192]
    assert region.flatten(1).mean(1).tolist() == [0.5, 1, 1, 0.5]  # a null picture may change everywhere


def test_what_an_edit_is_compared_with(made, tmp_path, monkeypatch):
    """L_reg holds it to its source where nothing changes, and L_vgg all of it to the target."""
    row, seen = spied(made, tmp_path, monkeypatch, base=made["editnet"])
    x, source, x0, same = seen["batch"]["image"], seen["batch"]["source"], seen["image"], seen["given"].kept
    assert torch.equal(seen["vgg_of"], x) and not torch.equal(x, source)
    assert row["loss/reg"] == pytest.approx(((source - x0).abs() * same).mean().item(), rel=1e-5)


def test_draws_of_feedback():
    """t' is one for all ranks and in [1, T2] of the step's phase; workers that run ahead of the end stay in
    the last one; rewards are told what the target shows, and nothing of what is erased."""
    cfg = train_pefl.Config(seed=3, accum=2, reward_noise=0.1)
    phases = train_pefl.parse_phases("9/8/7x2,5/4/1x1")

    def at(step, positions, **more):
        batch = {"image": torch.zeros(2, 8, 8, 3, dtype=torch.uint8), "caption": ["a", "b"], "step": step,
                 "position": positions, "task": ["erase", "edit"]}
        return train_pefl.draws(cfg, phases, 16, 4, 0, batch | more)

    first = [at(step, [0, 1])["t_prime"] for step in range(4)]
    assert first == [at(step, [2, 3])["t_prime"] for step in range(4)]
    assert all(1 <= t <= 7 for t in first) and len(set(first)) > 1
    assert [at(step, [0, 1])["t_prime"] for step in (4, 5, 6, 99)] == [1] * 4
    drawn, gens = at(0, [4, 5]), common.generators(3, 0, [4, 5])
    assert torch.equal(drawn["noise"], common.randn(gens, (16, 2, 2)))
    assert torch.equal(drawn["reward_noise"], 0.1 * common.randn(gens, (3, 8, 8)))
    assert drawn["c"] == ["", "b"] and drawn["has_c"].tolist() == [0, 1] and drawn["text"] == ["a", "b"]
    told = at(0, [4, 5], target_caption=["c", ""])
    assert told["c"] == ["c", ""] and told["has_c"].tolist() == [1, 0]


def test_importance():
    batch = {"caption": list("abcd"), "score": torch.tensor([9.0, 8.9, float("nan"), 10.0])}
    for flags, expected in (({}, [1] * 4), ({"weighting": "score"}, [0.9, 0.89, 1, 1]),
                            ({"weighting": "none"}, [1] * 4)):
        got = train_omni.importance(train_omni.Config(stage="edit", **flags), batch)
        assert got.tolist() == pytest.approx(expected)
    assert train_omni.importance(train_omni.Config(), {"caption": list("ab")}).tolist() == [1, 1]


@pytest.mark.parametrize("flags, least", [({}, 9.0), (dict(min_score=9.5), 9.5), (dict(weighting="none"), 0)])
def test_pairs_without_weight_are_not_loaded(flags, least):
    """Eq. 6: what would weigh nothing is left out and counted, and costs nothing."""
    cfg = train_omni.Config(stage="edit", **flags)
    source = open_edits("scenes:wrong=0.9", "train")
    loader = data.make_edit_loader(source, 16, 32, workers=0, min_score=train_omni.least_score(cfg))
    scores = torch.cat([next(loader)["score"] for _ in range(3)])
    assert scores.min() >= least and (scores.min() < 9) == (least == 0)
    left_out = re.search(r"left out: ([\d,]+) by score", loader.summary)
    share = int(left_out[1].replace(",", "")) / data.DRAWN if left_out else 0
    assert share == pytest.approx({0: 0, 9.0: 0.9, 9.5: 0.95}[least], abs=0.01)


def test_nothing_left_to_learn_from(made, tmp_path):
    refused(made, tmp_path, train_omni, "--min_score, --tasks: 9.0, .*none of the 1,000,000 pairs",
            **edit(made, data="scenes:wrong=1"))


def small_set(folder, n):
    rng = np.random.default_rng(0)
    for i in range(n):
        for k in "ab":
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{i}{k}.png")
    rows = [{"source": f"{i}a.png", "edited": f"{i}b.png", "instruction": "make it snow"} for i in range(n)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "pairs.jsonl")


@pytest.mark.parametrize("script", [train_omni, train_pefl])
def test_a_set_too_small_to_hold_pairs_out(made, tmp_path, capsys, script):
    flags = edit(made, steps=1) if script is train_omni else dict(base=made["editnet"], phases="3/2/1x1")
    call(made, tmp_path / "out", script, data=small_set(tmp_path, 3), sample_every=1, **flags)
    assert "nothing is held out: sample sheets show what is trained on" in capsys.readouterr().err
    assert list((tmp_path / "out/images").glob("*.png"))


def test_task_weights(made, tmp_path):
    """--tasks reaches the order of the pairs: only what has weight is drawn."""
    for tasks, allowed in (("style=1", {"style"}), ("removal=2, add=1", {"remove", "add"}), ("as_is", None)):
        loader = data.make_edit_loader(open_edits("scenes"), 32, 16, workers=0, stride=4,
                                       balance=train_omni.edit_tasks(tasks))
        drawn = {t for _ in range(3) for t in next(loader)["task"]}
        assert drawn == allowed if allowed else len(drawn) == 7
        loader.close()
    call(made, tmp_path / "out", train_omni, **edit(made, tasks="style=1", steps=1))


def test_goes_on_from_an_editor(made, tmp_path):
    call(made, tmp_path / "a", train_omni, **edit(made, init=made["editnet"], lr=0.0, steps=1, ema=0.0))
    got, before = tensors(tmp_path / "a"), tensors_of(made["editnet"])
    assert not differ({k: got[f"model/{k}"] for k in before}, before)


def test_chain(made, tmp_path):
    """EditNet, then feedback on it, with sheets and alarms."""
    call(made, tmp_path / "edit", train_omni, **edit(made, steps=2, sample_every=2, save_every=2))
    rows = call(made, tmp_path / "pefl", train_pefl, base=str(tmp_path / "edit"), phases="4/3/2x3,3/2/1x1",
                sample_every=4, lora=2)
    assert {"judge/aesthetic_tuned", "alarm/change_outside_mask", "coherence/seam"} <= rows[-1].keys()
    assert "reward/alignment" in rows[-1]
    got, start = tensors(tmp_path / "pefl"), tensors_of(str(newest(tmp_path / "edit")))
    assert all(torch.equal(got[f"model/{k}"], v) for k, v in start.items() if k.startswith("base."))
    assert all(re.search(r"branch\..*\.weight\.0\.[AB]$", k) for k in got if k.startswith("lora/"))
    arch = json.loads((newest(tmp_path / "pefl") / "manifest.json").read_text())["arch"]
    assert arch["kind"] == "editnet" and arch["base"] == {"kind": "editor", **asdict(
        model.inpainting(model.PRESETS["test"]))}
    assert all(list((tmp_path / n / "images").glob("*.png")) for n in ("edit", "pefl"))


@pytest.mark.parametrize("text, flags", [
    ("--stage: edit: .*--init", dict(init=None)),
    ("--variant: controlnet: .*--fixed_source", dict(variant="controlnet", fixed_source=True)),
    ("--source_start: masked: concerns --variant", dict(variant="controlnet", source_start="masked")),
    ("--source_start: masked: .*editnet has begun already", dict(init="editnet", source_start="masked")),
    ("--drop_caption: 0.7: must be up to 2/3", dict(drop_caption=0.7)),
    ("--min_score: 11", dict(min_score=11.0)),
    ("--p_region: 2", dict(p_region=2.0)),
    ("--lora: 0", dict(tune_base="lora", lora=0)),
    ("holds --variant concat: give the same", dict(init="concat")),
    ("--init: .*aesthetic: holds a 'reward'", dict(init="aesthetic")),
    ("--init: .*latent: .*give --sd3", dict(init="latent")),
    ("--tasks: 'style': use NAME=WEIGHT,... of the data's tasks; or balanced, or as_is", dict(tasks="style")),
    ("--tasks: paint=1.0: use numbers >= 0 for swap", dict(tasks="paint=1")),
    ("wrong=2", dict(data="scenes:wrong=2")),
    ("pictures: not a set of edit pairs", dict(data="pictures")),
    ("--stage: inpaint: --variant", dict(stage="inpaint", init=None, fixed_source=True)),
    ("--tasks: style=1.0: use numbers >= 0 for t2i", dict(stage="inpaint", init=None, tasks="style=1")),
])
def test_bad_values(made, tmp_path, text, flags):
    refused(made, tmp_path / "out", train_omni, text, **edit(made) | flags)


def test_feedback_on_pairs_knows_no_holes(made, tmp_path):
    refused(made, tmp_path, train_pefl, "--tasks: erase=1: are kinds of holes, and an instruction editor",
            base=made["editnet"], tasks="erase=1")


def test_feedback_cannot_update_a_branch_that_is_not_there(made, tmp_path):
    refused(made, tmp_path, train_pefl, "--lora: 2: .* is a concat, which has no branch",
            base=made["concat"], lora=2)


def test_another_variant_in_the_run_folder(made, tmp_path):
    call(made, tmp_path, train_omni, **edit(made, steps=1))
    refused(made, tmp_path, train_omni, "another architecture", **edit(made, variant="textcontrol"))
