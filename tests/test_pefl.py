"""A step of train_pefl.py, main() with spies, tiny sizes: the stages, the losses, whom each one trains."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from trained import (
    ROOT,
    call,
    differ,
    newest,
    random_editor,
    refused,
    rows,
    settings,
    shipped,
    spied,
    tensors,
)

import checkpoint
import common
import model
import pipeline
import rewards
import train_pefl

pytestmark = pytest.mark.usefixtures("one_thread_and_own_signals")


def test_stages(made, tmp_path, monkeypatch):
    """T1 .. t' without gradient, one prediction at t' with it; t' in [1, T2]; phases change T, T1, T2."""
    calls, forward = [], model.Editor.forward

    def spy(self, x, t, *rest):
        assert (t == t[0]).all()
        calls.append((torch.is_grad_enabled(), round(t[0].item(), 5)))
        return forward(self, x, t, *rest)

    monkeypatch.setattr(model.Editor, "forward", spy)
    found = call(made, tmp_path, train_pefl, phases="9/7/4x5,6/5/3x1,4/4/1x3", batch_size=1)
    expected, phases = [], [(1, 9, 7, 4)] * 5 + [(2, 6, 5, 3)] + [(3, 4, 4, 1)] * 3
    for row, (number, T, T1, T2) in zip(found, phases, strict=True):
        last = row["t_prime"]
        assert (row["phase"], row["T"]) == (number, T) and 1 <= last <= T2
        expected += [(False, round(k / T, 5)) for k in range(T1, last, -1)] + [(True, round(last / T, 5))]
    assert calls == expected
    assert len({row["t_prime"] for row in found[:5]}) > 1


def test_t_prime_covers_its_range():
    drawn = {int(common.randint(common.generators(0, s, [0], stream=1), 1, 4 + 1)) for s in range(100)}
    assert drawn == {1, 2, 3, 4}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradient_reaches_every_weight(made, tmp_path, monkeypatch, precision):
    """bf16: weights that autocast casts in stage 2, without gradient, must not serve stage 3 from a cache."""
    editors, seen = [], []
    own = pipeline.open_editor
    monkeypatch.setattr(pipeline, "open_editor", lambda *a, **k: editors.append(own(*a, **k)) or editors[-1])

    def sums(params, world):  # of the gradients of the editor, then of the coherence model
        seen.extend(None if p.grad is None else p.grad.abs().sum().item() for p in params)

    monkeypatch.setattr(common, "average_gradients", sums)
    call(made, tmp_path, train_pefl, phases="5/4/2x1", precision=precision)
    names = [n for n, p in editors[0].net.named_parameters() if p.requires_grad]
    of_editor, of_coherence = seen[:len(names)], seen[len(names):]
    # the last block's text stream lends keys and values only, so its query's norm is never used (SD3)
    unused = "mmdit.joint_blocks.1.context_block.attn.ln_q.weight"
    assert [n for n, g in zip(names, of_editor) if not g] == [unused]
    assert of_coherence and all(of_coherence)


def test_each_loss_trains_its_own_model(made, tmp_path):
    """L^G leaves the coherence model alone, L^D the editor."""
    for weight in (0.0, 50.0):  # the editor stands still: the coherence model must learn alike
        call(made, tmp_path / str(weight), train_pefl, lr=0.0, w_coherence=weight)
    a, b = tensors(tmp_path / "0.0"), tensors(tmp_path / "50.0")
    base = load_file(Path(made["base"]) / "model.safetensors")
    assert not [k for k in a if k.startswith("coherence") and not torch.equal(a[k], b[k])]
    assert all(torch.equal(a[f"model/{k}"], v) for k, v in base.items())
    call(made, tmp_path / "D", train_pefl, w_aesthetic=0.0, w_alignment=0.0, w_coherence=0.0, eta=0.0)
    d = tensors(tmp_path / "D")
    assert all(torch.equal(d[f"model/{k}"], v) for k, v in base.items())  # with a learning rate now
    assert [k for k in d if k.startswith("coherence/") and not torch.equal(d[k], a[k])] == []
    call(made, tmp_path / "still", train_pefl, disc_lr=0.0)
    still = tensors(tmp_path / "still")
    assert [k for k in d if k.startswith("coherence/") and not torch.equal(d[k], still[k])]
    assert [k for k in base if not torch.equal(base[k], still[f"model/{k}"])]


def test_rewards_stay_frozen(made, tmp_path, monkeypatch):
    nets, load = {}, train_pefl.open_reward

    def keep(path, *rest, **more):
        nets[path] = load(path, *rest, **more)
        return nets[path]

    monkeypatch.setattr(train_pefl, "open_reward", keep)
    call(made, tmp_path, train_pefl, heldout_reward=made["alignment"])
    assert set(nets) == {made["aesthetic"], made["alignment"]}
    for path, net in nets.items():
        state, before = net.state_dict(), load_file(Path(path) / "model.safetensors")
        assert all(torch.equal(state[k], v) for k, v in before.items())
        assert not any(m.training for m in net.modules())
        assert not any(p.requires_grad or p.grad is not None for p in net.parameters())


def test_coherence_learns_to_separate(made, tmp_path):
    found = call(made, tmp_path, train_pefl, phases="4/3/2x30", disc_lr=3e-3, lr=1e-5, eta=0.0)
    assert found[0]["coherence/accuracy"] < 0.8
    last = found[-1]
    assert last["coherence/accuracy"] > 0.9 and last["coherence/real"] > 0 > last["coherence/fake"]
    assert last["loss/D"] < 0.7 * found[0]["loss/D"]


def test_coherence_learns_alone_first(made, tmp_path):
    """--disc_first: the editor stands still and needs no gradient; the coherence model learns as it would."""
    found = call(made, tmp_path / "alone", train_pefl, phases="5/4/2x6", disc_first=4, save_every=3)
    assert [row["grad_norm/editor"] > 0 for row in found] == [False] * 4 + [True] * 2
    base = load_file(Path(made["base"]) / "model.safetensors")
    early = load_file(tmp_path / "alone" / "step_00000003" / "model.safetensors")
    assert all(torch.equal(early[k], v) for k, v in base.items())
    still = call(made, tmp_path / "still", train_pefl, phases="5/4/2x4", lr=0.0)
    assert [r["loss/D"] for r in found[:4]] == [r["loss/D"] for r in still]


def test_coherence_starts_from_a_tower_or_a_run(made, tmp_path):
    flags = dict(phases="5/4/2x1", lr=0.0, disc_lr=0.0)
    call(made, tmp_path / "tower", train_pefl, disc_init=made["aesthetic"], **flags)
    tower, got = load_file(Path(made["aesthetic"]) / "model.safetensors"), tensors(tmp_path / "tower")
    names = [k for k in tower if k.startswith("blip.visual_encoder.") and "patch_embed" not in k]
    assert names and all(torch.equal(got[f"coherence/vit.{k.removeprefix('blip.visual_encoder.')}"], tower[k])
                         for k in names)
    disc = rewards.open_coherence(made["aesthetic"], 32, 4, "x")
    reward = rewards.open_reward(made["aesthetic"])
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.allclose(disc.vit(x), reward.image_features(x)[0], atol=1e-5)
    assert torch.equal(disc.vit.patch_embed.proj.weight, got["coherence/vit.patch_embed.proj.weight"])
    call(made, tmp_path / "run", train_pefl, disc_init=str(tmp_path / "tower"), seed=1, **flags)
    again = tensors(tmp_path / "run")
    assert not [k for k in got if k.startswith("coherence/") and not torch.equal(got[k], again[k])]


def test_a_run_with_other_sizes_of_the_coherence_model_resumes(made, tmp_path):
    """As those do that began with --disc_width and the like, which are gone: --disc_init of its own --out."""
    flags = dict(save_every=1, phases="5/4/2x1", disc_init=made["aesthetic"])
    call(made, tmp_path / "run", train_pefl, **flags)
    flags["phases"] = "5/4/2x2"
    refused(made, tmp_path / "run", train_pefl, "run.*coherence", **flags | dict(disc_init=None))
    call(made, tmp_path / "run", train_pefl, **flags | dict(disc_init=str(tmp_path / "run")))
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]


def test_rewards_look_through_noise(made, tmp_path):
    """It changes what they see and nothing else: L_reg and the first t' are those without it."""
    clear, veiled = (call(made, tmp_path / str(std), train_pefl, phases="5/4/2x1", reward_noise=std)[0]
                     for std in (0.0, 0.5))
    for key in ("reward/aesthetic", "reward/alignment", "loss/coherence", "loss/D"):
        assert clear[key] != veiled[key]
    assert clear["loss/reg"] == veiled["loss/reg"] and clear["t_prime"] == veiled["t_prime"]


def test_where_stage_2_begins(made, tmp_path, monkeypatch):
    """At T1 with the noised masked input, or like a sample: at T with noise alone."""
    for start, first in (("masked", 0.8), ("noise", 1.0)):
        _, seen = spied(made, tmp_path / start, monkeypatch, start=start)
        x, ts = seen["start"]
        batch = seen["batch"]
        masked = batch["image"] * (1 - batch["mask"])
        assert ts[0] == pytest.approx(first)
        torch.testing.assert_close(x, (1 - first) * masked + first * batch["noise"])


def test_guidance_of_stages_2_and_3(made, tmp_path, monkeypatch):
    """v(null) + g (v(text) - v(null)) with gradient through both; a call has every picture twice."""
    editor = pipeline.open_editor(made["base"], torch.device("cpu"), ("fill",)).net
    x, t, mask = torch.randn(2, 3, 32, 32), torch.full((2,), 0.7), torch.ones(2, 1, 32, 32)
    ids = editor.text.tokenize(["a red circle", "grass"])
    plain, none = (train_pefl.conditioned(editor, text, (mask, x))(x, t) for text in (ids, ["", ""]))
    guided = train_pefl.conditioned(editor, ids, (mask, x), 3.0)(x, t)
    torch.testing.assert_close(guided, none + 3 * (plain - none), rtol=1e-4, atol=1e-4)
    grads = [torch.autograd.grad(v.square().sum(), editor.mmdit.x_embedder.proj.weight)[0]
             for v in (guided, none + 3 * (plain - none))]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)
    seen, forward = [], model.Editor.forward
    monkeypatch.setattr(model.Editor, "forward", lambda self, x, *rest: (
        seen.append(len(x)), forward(self, x, *rest))[1])
    for guidance, times in ((3.0, 2), (1.0, 1)):
        seen.clear()
        call(made, tmp_path / str(guidance), train_pefl, phases="4/3/2x2", guidance=guidance)
        assert set(seen) == {4 * times}


def test_where_the_regularisers_hold(made, tmp_path, monkeypatch):
    """--hold known: L_reg and L_vgg know nothing of the hole."""
    (everywhere, a), (known, b) = (spied(made, tmp_path / hold, monkeypatch, hold=hold)
                                   for hold in ("all", "known"))
    x, x0, outside = a["batch"]["image"], a["image"], 1 - a["given"].hole
    assert everywhere["loss/reg"] == pytest.approx((x - x0).abs().mean().item(), rel=1e-5)
    assert known["loss/reg"] == pytest.approx(((x - x0).abs() * outside).mean().item(), rel=1e-5)
    torch.testing.assert_close(b["vgg"], x * (1 - outside) + x0 * outside)
    assert known["loss/vgg"] < everywhere["loss/vgg"]
    row, _ = spied(made, tmp_path / "global", monkeypatch, hold="known", tasks="t2i=1")  # all is hole
    assert row["loss/reg"] == row["loss/vgg"] == 0


def test_when_the_adversarial_loss_begins(made, tmp_path, capsys):
    """In the phase that is named, by default the paper's second, and never where there is none; the coherence
    model learns from the first step on."""
    def phases_with(out, **flags):
        return ["loss/coherence" in row for row in call(made, tmp_path / out, train_pefl, **flags)]

    two, default = dict(phases="5/4/2x1,3/2/1x1"), train_pefl.Config.adversarial_from
    assert phases_with("default", adversarial_from=default, **two) == [False, True]
    assert phases_with("all", adversarial_from=1, **two) == [True, True]
    assert "R_gamma learns and is logged, and is in no" not in capsys.readouterr().out
    assert phases_with("one", adversarial_from=default, phases="5/4/2x1") == [False]
    assert "R_gamma learns and is logged, and is in no phase's L_reward" in capsys.readouterr().out
    assert all("loss/D" in row for name in ("default", "one") for row in rows(tmp_path / name))


def test_steps_of_the_coherence_model_alone(made, tmp_path):
    """--disc_updates 2: the editor moves in every second step, the coherence model in each."""
    base = load_file(Path(made["base"]) / "model.safetensors")
    moved, before = [], None
    for n in (1, 2, 3):
        call(made, tmp_path / str(n), train_pefl, phases=f"5/4/2x{n}", disc_updates=2, warmup=0, save_every=n)
        now = tensors(tmp_path / str(n))
        last = {k: now[f"model/{k}"] for k in base}
        coherence = {k: v for k, v in now.items() if k.startswith("coherence/")}
        assert before is None or any(not torch.equal(coherence[k], v) for k, v in before.items())
        moved.append(any(not torch.equal(last[k], v) for k, v in base.items()))
        base, before = last, coherence
    assert moved == [False, True, False]


def test_several_rewards_are_their_mean(made, tmp_path):
    of = made["aesthetic"], made["alignment"], f"{made['aesthetic']},{made['alignment']}"
    found = [call(made, tmp_path / str(i), train_pefl, phases="5/4/2x1", aesthetic=spec)[0]
             for i, spec in enumerate(of)]
    a, b, both = (row["reward/aesthetic"] for row in found)
    assert both == pytest.approx((a + b) / 2, abs=1e-6) and a != b
    assert train_pefl.members("out/a,imagereward:m.pt,vocab.txt,out/b") == [
        "out/a", "imagereward:m.pt,vocab.txt", "out/b"]


def test_a_published_reward_beside_ours(made, tmp_path, monkeypatch, capsys):
    """L_vgg finds ours behind it; a held-out reward that no sheet will ask is said."""
    load = train_pefl.open_reward
    monkeypatch.setattr(train_pefl, "open_reward", lambda spec, *a: (
        lambda x, c: x.mean((1, 2, 3))) if spec.startswith("clipscore:") else load(spec, *a))
    found = call(made, tmp_path / "a", train_pefl, aesthetic=f"clipscore:a,b,{made['aesthetic']}",
                 heldout_reward=made["alignment"], phases="5/4/2x1")
    assert found[0]["loss/vgg"] > 0
    said = capsys.readouterr().out
    assert "warning: --heldout_reward: is asked with the sample sheets" in said
    assert "warning: --vgg" not in said
    alone = dict(aesthetic="clipscore:a,b", alignment=None)
    found = call(made, tmp_path / "b", train_pefl, phases="5/4/2x1", **alone)
    assert found[0]["loss/vgg"] == 0 and "warning: --vgg: is not given" in capsys.readouterr().out


def test_a_base_without_a_size_asks_for_one(made, tmp_path):
    torch.manual_seed(0)
    base = shipped(tmp_path / "base", random_editor(model.inpainting(model.PRESETS["test"])))
    refused(made, tmp_path / "out", train_pefl, "does not say at what size.*--image_size", base=base)
    assert call(made, tmp_path / "out", train_pefl, base=base, image_size=16, phases="5/4/2x1")


def test_rewards_on_another_scale_are_named(monkeypatch, capsys):
    """-log sigmoid is flat where PickScore and LAION's aesthetic score lie; as alarms they are welcome."""
    monkeypatch.setattr(train_pefl, "open_reward", lambda spec, *rest: spec)
    train_pefl.open_rewards(train_pefl.Config(
        aesthetic="aesthetic:a,b", alignment="imagereward:a,b,pickscore:a,b", heldout_reward="pickscore:a,b"))
    warned = [line.split(" its scores")[0] for line in capsys.readouterr().out.splitlines()]
    assert warned == ["warning: --aesthetic: aesthetic:", "warning: --alignment: pickscore:"]
    for score, slope in train_pefl.FLAT.values():
        assert float(slope) == pytest.approx(torch.sigmoid(torch.tensor(-float(score))).item(), rel=0.1)
    train_pefl.open_rewards(train_pefl.Config(aesthetic="clipscore:a,b", alignment="out/alignment"))
    assert not capsys.readouterr().out


def test_an_alignment_that_is_never_asked_is_said(made, tmp_path, capsys):
    """Once, after the first interval: without a caption its term of the loss is 0 for every picture."""
    for name, flags, times in (("none", dict(tasks="erase=1"), 1), ("some", dict(tasks="edit=1"), 0),
                               ("weightless", dict(tasks="erase=1", w_alignment=0.0), 0)):
        call(made, tmp_path / name, train_pefl, phases="4/3/2x4", log_every=2, **flags)
        said = capsys.readouterr().out
        assert said.count("warning: --alignment") == times, said
        assert said.count("none of 8 pictures so far has a caption") == times


def test_alignment_is_logged_of_pictures_with_a_caption(made, tmp_path, monkeypatch):
    """As it weighs in the loss, the judge's too; where no picture has one, there is no number."""
    def score(image, captions):
        return 0 * image.mean((1, 2, 3)) + torch.tensor([1.0 if c else -100.0 for c in captions])

    monkeypatch.setattr(train_pefl, "mean_score", lambda nets: score)
    found = call(made, tmp_path / "some", train_pefl, tasks="erase=1,edit=1", sample_every=4)
    assert {row.get("reward/alignment", 1) for row in found} == {1}
    assert any("reward/alignment" in row and row["reward/aesthetic"] < 0 for row in found)  # some of a batch
    last = found[-1]
    assert last["judge/alignment_tuned"] == last["judge/alignment_base"] == 1
    assert -100 < last["judge/aesthetic_tuned"] < 1
    found = call(made, tmp_path / "none", train_pefl, tasks="erase=1", sample_every=4)
    assert all("reward/alignment" not in row and row["reward/aesthetic"] == -100 for row in found)
    assert all(row["loss/alignment"] == 0 and row["loss/aesthetic"] == pytest.approx(100) for row in found)
    assert "judge/alignment_tuned" not in found[-1] and found[-1]["judge/aesthetic_tuned"] == -100


def test_reward_rises(made, tmp_path):
    """Feedback through one frozen reward: its score on what the editor predicts goes up, step by step."""
    found = call(made, tmp_path, train_pefl, phases="4/3/2x30", w_aesthetic=1.0, w_alignment=0.0,
                 w_coherence=0.0, eta=0.0, lr=2e-3)
    scores = [row["reward/aesthetic"] for row in found]
    assert min(scores[-5:]) > max(scores[:5])
    assert "reward/alignment" not in found[0]


def test_an_own_reward_as_the_readme_says(made, tmp_path):
    """Its two lines, put where it says: the reward is trained on, logged and judged."""
    text, script = (ROOT / "README.md").read_text(), Path(train_pefl.__file__).read_text()
    for after, start in (("    w_alignment", "w_green"), ("    scores = {name: mean_score", "scores[")):
        new, = ("    " + line for line in text.splitlines() if line.startswith(start))
        lines = script.splitlines()
        at, = (i for i, x in enumerate(lines) if x.startswith(after))
        script = "\n".join(lines[:at + 1] + [new] + lines[at + 1:])
    own = tmp_path / "train_mine.py"
    own.write_text(script)
    flags = settings(made, tmp_path / "out", train_pefl, sample_every=4, w_green=0.5)
    done = subprocess.run([sys.executable, str(own), *(f"--{k}={v}" for k, v in flags.items())],
                          capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-2000:]
    last = rows(tmp_path / "out")[-1]
    assert {"loss/green", "reward/green", "judge/green_tuned", "loss/aesthetic"} <= set(last)


def test_a_reward_at_chance_is_named(made, tmp_path, capsys):
    weights, manifest = checkpoint.load(made["aesthetic"])
    val = {"val/score_mean": 0.0, "val/score_std": 1.0, "val/acc": 0.5, "val/high": 0.7, "val/pairs": 18}
    for low in (0.3, 0.51):
        meta = {"arch": manifest["arch"], "val": val | {"val/low": low}}
        rewards.open_reward(str(checkpoint.write(tmp_path / str(low), 0, weights, meta)))
        named = "is right in 50% of 18 held-out pairs, 30% to 70%: no better than chance"
        assert (named in capsys.readouterr().out) == (low < 0.5)


def test_the_editor_gets_no_step(made, tmp_path, capsys):
    call(made, tmp_path, train_pefl, phases="5/4/2x2", disc_first=2)
    assert "warning: --disc_first: 2, with --disc_updates 1: of the 2 steps" in capsys.readouterr().out


def test_the_losses_and_their_sum(made, tmp_path):
    """-log sigmoid of a reward (Eq. 2); L^G is L_reward + eta (L_reg + L_vgg) (Eq. 8)."""
    row, c = call(made, tmp_path, train_pefl, phases="4/3/2x1")[0], train_pefl.Config
    for name in ("aesthetic", "alignment"):
        low = F.softplus(torch.tensor(-row[f"reward/{name}"])).item()  # of the mean: a lower bound
        assert low - 1e-6 <= row[f"loss/{name}"] < low + 0.1
    total = sum(row[f"loss/{k}"] * getattr(c, f"w_{k}") for k in ("aesthetic", "alignment", "coherence"))
    assert row["loss/G"] == pytest.approx(total + c.eta * (row["loss/reg"] + row["loss/vgg"]), rel=1e-5)


def test_checkpointing_changes_nothing(made, tmp_path):
    for name in (False, True):
        call(made, tmp_path / str(name), train_pefl, phases="5/4/2x2", checkpointing=name, save_every=2)
    assert not differ(tensors(tmp_path / "False"), tensors(tmp_path / "True"))


def test_lora(made, tmp_path):
    """Only A and B train; `model` and `ema` load plainly and differ from the base by matrices of low rank."""
    call(made, tmp_path, train_pefl, lora=2, phases="4/3/2x3", save_every=3)
    got, base = tensors(tmp_path), load_file(Path(made["base"]) / "model.safetensors")
    factors = [k for k in got if k.startswith("lora/")]
    assert factors and all(re.search(r"joint_blocks\..*\.weight\.0\.[AB]$", k) for k in factors)
    arch = json.loads((newest(tmp_path) / "manifest.json").read_text())["arch"]
    for name in ("model", "ema"):
        state = load_file(newest(tmp_path) / f"{name}.safetensors")
        checkpoint.load_state(model.build_editor(arch), state, name)
        moved = {k: state[k] - base[k] for k in base if not torch.equal(state[k], base[k])}
        assert len(moved) == len(factors) // 2 and all(k.endswith("weight") for k in moved)
        assert all(torch.linalg.matrix_rank(d.double(), rtol=1e-4) <= 2 for d in moved.values())
    editor = pipeline.open_editor(str(tmp_path), torch.device("cpu"), ("fill",)).net  # and can be tuned on
    assert torch.equal(editor.state_dict()["mmdit.pos_embed"], base["mmdit.pos_embed"])


def test_lora_learns_to_see_the_hole(made, tmp_path, capsys):
    """Of a base with an empty mask input the input layer trains beside the blocks, is resumed and averaged
    with them: else two masks would give one and the same picture for ever."""
    torch.manual_seed(0)
    editor = random_editor(model.inpainting(model.PRESETS["test"]))
    editor.mmdit.x_embedder.proj.weight.data[:, 3:] = 0
    base = shipped(tmp_path / "base", editor, config={"image_size": 32, "shift": 1.0})
    flags = dict(base=base, lora=2, save_every=1, keep=9)
    call(made, tmp_path / "whole", train_pefl, phases="4/3/2x2", **flags)
    assert "the input layer trains too" in capsys.readouterr().out
    whole, layer = tensors(tmp_path / "whole"), "mmdit.x_embedder.proj.weight"
    assert whole[f"model/{layer}"][:, 3:].any() and whole[f"ema/{layer}"][:, 3:].any()
    assert f"lora/{layer}" in whole
    (tmp_path / "cut").mkdir()
    shutil.copytree(tmp_path / "whole/step_00000001", tmp_path / "cut/step_00000001")
    call(made, tmp_path / "cut", train_pefl, phases="4/3/2x2", **flags)
    assert not differ(whole, tensors(tmp_path / "cut"))


def test_lora_is_seeded(made, tmp_path):
    """LoRA's A comes from --seed alone, wherever the generator of this process (or rank) stands."""
    for name, seed in (("0", 0), ("again", 0), ("1", 1)):
        torch.seed()
        call(made, tmp_path / name, train_pefl, lora=2, lr=0.0, phases="4/3/2x1", seed=seed)
    a, again, b = (tensors(tmp_path / n) for n in ("0", "again", "1"))
    assert not differ(a, again)
    assert all(not torch.equal(a[k], b[k]) for k in a if k.startswith("lora/") and k.endswith("A"))
