"""The scripts on SD3's weights: a shrunken transformer with the real VAE, three text encoders and rewards."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_text_encoders import CLIPS, SMALL_T5, files  # noqa: F401  (a fixture)
from trained import rows, tensors

import checkpoint
import evaluate
import make_cache
import model
import pipeline
import rewards
import sample
import train_omni
import train_pefl
from pretrained import text as text_encoders
from pretrained import towers
from pretrained.vae import VAE, VAEConfig

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ROOT.parent / "shared" / "data" / "photos"
TINY = model.EditorConfig(depth=2, heads=2, patch=2, channels=16, pos_max=24, learn_pos=False, txt_dim=192,
                          vec_dim=160, qk_norm=False, txt_bytes=0)
SMALL_VAE = VAEConfig(width=32)


@torch.no_grad()
def random_state(net, seed):
    """A state dict of a trained network's scale, from `seed` alone; tied weights stay equal."""
    g = torch.Generator().manual_seed(seed)
    for name, p in net.named_parameters():
        r = torch.randn(p.shape, generator=g)
        norm = p.ndim == 1 and name.endswith("weight")
        p.copy_(1 + 0.1 * r if norm else 0.1 * r if p.ndim == 1 else r * p[0].numel() ** -0.5)
    return net.state_dict()


def write_sd3(path, files, vae=SMALL_VAE):  # noqa: F811
    """A single-file SD3 with everything in it, random and small -> its path, and its tokenizers beside it."""
    vocab = len(json.loads((files / "vocab.json").read_text()))
    t5 = replace(SMALL_T5, width=TINY.txt_dim, vocab=384)
    clips = {k: replace(c, vocab=vocab, eos=vocab - 1) for k, c in CLIPS.items()}
    parts = {"model.diffusion_model.": model.MMDiT(TINY), "first_stage_model.": VAE(vae),
             "text_encoders.clip_l.transformer.": text_encoders.ClipText(clips["clip_l"]),
             "text_encoders.clip_g.transformer.": text_encoders.ClipText(clips["clip_g"]),
             "text_encoders.t5xxl.transformer.": text_encoders.T5Encoder(t5)}
    state = {prefix + k: v for seed, (prefix, net) in enumerate(parts.items())
             for k, v in random_state(net, seed).items()}
    save_file({k: v.contiguous().clone() for k, v in state.items()}, path)
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        folder = Path(path).parent / "tokenizers" / name
        folder.mkdir(parents=True)
        for file in ("tokenizer.json",) if name[-1] == "3" else ("vocab.json", "merges.txt"):
            (folder / file).write_bytes((files / file).read_bytes())
    return str(path)


@pytest.fixture(scope="module")
def sd3(tmp_path_factory, files):  # noqa: F811
    root = tmp_path_factory.mktemp("sd3")
    return {"sd3": write_sd3(root / "sd3.safetensors", files), "tokenizers": str(root / "tokenizers")}


def flags_of(sd3, out, **flags):
    return dict(tokenizers=sd3["tokenizers"], out=str(out), device="cpu", wandb="off", workers=0, log_every=1,
                sample_every=0, precision="fp32") | flags


def omni(sd3, out, **flags):
    own = dict(init=sd3["sd3"], stage="edit", image_size=32, batch_size=2, lr=1e-3, warmup=2, ema=0.9,
               steps=4, save_every=4, lr_schedule="constant")
    train_omni.main(train_omni.Config(**flags_of(sd3, out, **own | flags)))
    return rows(out)


def imagereward(folder):
    """NAME:PATH,PATH of a small ImageReward under its published names."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    cfg = rewards.RewardConfig(32, 8, 128, 2, 2, 64, 2, 1, 96, len(words) + 2)
    torch.save(random_state(rewards.PreferenceReward(cfg), 5), folder / "ImageReward.pt")
    return f"imagereward:{folder}/ImageReward.pt,{folder}/vocab.txt"


def vgg(tmp_path):
    net = towers.VGG16()
    save_file(random_state(net, 9), tmp_path / "vgg16.safetensors")
    return str(tmp_path / "vgg16.safetensors")


def picture(folder):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (33, 40, 3), np.uint8)).save(folder / "a.png")
    return str(folder / "a.png")


def pefl(sd3, tmp_path, out="pefl", **flags):
    own = dict(base=sd3["sd3"], image_size=32, phases="3/2/1x20", adversarial_from=1, batch_size=1, lr=1e-4,
               warmup=2, ema=0.9, alignment=imagereward(tmp_path), vgg=vgg(tmp_path), save_every=20)
    train_pefl.main(train_pefl.Config(**flags_of(sd3, tmp_path / out, **own | flags)))
    return rows(tmp_path / out)


def check_pefl(found, out, sd3):
    """Finite losses, a gradient in every step, a transformer that moves, memory that does not grow."""
    names = (*(f"loss/{k}" for k in ("G", "D", "reg", "vgg", "alignment", "coherence")), "grad_norm/editor")
    assert len(found) == 20 and all(math.isfinite(row[k]) for row in found for k in names)
    assert all(row["grad_norm/editor"] > 0 for row in found)
    assert found[-1]["perf/host_rss_gib"] < 1.1 * found[9]["perf/host_rss_gib"]
    got, before = tensors(out), load_file(sd3["sd3"])
    own = {k.removeprefix("model.diffusion_model."): v for k, v in before.items() if "diffusion_model" in k}
    own.pop("x_embedder.proj.weight")
    moved = [k for k, v in own.items() if not torch.equal(v, got[f"model/mmdit.{k}"])]
    assert any("joint_blocks.0.x_block.attn.qkv.weight" in k for k in moved) and len(moved) > 20
    assert not any("pos_embed" in k for k in moved)
    wide = got["model/mmdit.x_embedder.proj.weight"]
    assert wide.shape[1] == 33 and wide[:, 16:].abs().max() > 0  # the mask's columns begin to be used


@pytest.mark.slow
def test_pefl_on_sd3(sd3, tmp_path, capsys):
    check_pefl(pefl(sd3, tmp_path, sample_every=10), tmp_path / "pefl", sd3)
    assert "has no mask input" in capsys.readouterr().out
    assert len(list((tmp_path / "pefl" / "images").glob("*.png"))) == 2


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOS.is_dir(), reason="no photos here")
def test_pefl_on_photos_with_the_real_vae(tmp_path, files):  # noqa: F811
    """The published VAE's size (84 M parameters, random), on real photos, a recomputed decoder."""
    stack_files = {"sd3": write_sd3(tmp_path / "sd3.safetensors", files, VAEConfig()),
                   "tokenizers": str(tmp_path / "tokenizers")}
    found = pefl(stack_files, tmp_path, data=str(PHOTOS), image_size=64, checkpointing=True)
    check_pefl(found, tmp_path / "pefl", stack_files)


@pytest.mark.slow
def test_editnet_on_sd3(sd3, tmp_path):
    """It begins as SD3, trains, remembers where its surroundings are, and sample.py edits with it."""
    found = omni(sd3, tmp_path / "net", sample_every=4)
    assert all(math.isfinite(r["loss/flow"]) and r["grad_norm/editor"] > 0 for r in found)
    meta = checkpoint.load(tmp_path / "net", ("ema",))[1]
    assert meta["meta"]["stack"] == {"sd3": sd3["sd3"], "tokenizers": sd3["tokenizers"]}
    assert meta["config"]["shift"] == 3.0
    sample.main(sample.Config("edit", str(tmp_path / "net"), out=str(tmp_path / "made"),
                              image=picture(tmp_path), instruction=("make it night", "add a cat"), steps=2,
                              device="cpu"))
    assert len(list((tmp_path / "made").glob("a*.png"))) == 2


def test_a_run_moves_with_its_weights(sd3, tmp_path, monkeypatch):
    """Its manifest names no folder above the start, and is understood wherever both are moved to."""
    before, after = tmp_path / "someone", tmp_path / "archive/2026"
    shutil.copytree(Path(sd3["sd3"]).parent, before / "w")
    monkeypatch.chdir(before)
    omni({"sd3": "w/sd3.safetensors", "tokenizers": str(before / "w/tokenizers")}, "out/net", steps=1)
    text = Path("out/net/step_00000001/manifest.json").read_text()
    assert json.loads(text)["meta"]["stack"] == {"sd3": "../../w/sd3.safetensors",
                                                 "tokenizers": "../../w/tokenizers"}
    assert "someone" not in text
    monkeypatch.chdir("/")
    after.parent.mkdir()
    before.rename(after)
    cpu, net = torch.device("cpu"), str(after / "out/net")
    pipe = pipeline.open_editor(net, cpu, ("follow",))
    assert pipe.space.channels == 16 and pipe.stack["sd3"] == str(after / "w/sd3.safetensors")
    (after / "w").rename(after / "weights")
    with pytest.raises(SystemExit, match=f"^error: --ckpt: .*{after}/w/sd3.safetensors: no such .* --sd3"):
        pipeline.open_editor(net, cpu)
    found = dict(sd3=str(after / "weights/sd3.safetensors"))
    with pytest.raises(SystemExit, match=f"{after}/w/tokenizers: no such .* --tokenizers") as e:
        pipeline.open_editor(net, cpu, **found)
    assert "\n" not in str(e.value)
    pipeline.open_editor(net, cpu, tokenizers=str(after / "weights/tokenizers"), **found)


@pytest.mark.slow
def test_inpainting_on_sd3(sd3, tmp_path):
    """Text to image first; then a mask input, which PeFL and sample.py take without a word."""
    omni(sd3, tmp_path / "base", stage="base", steps=2)
    omni(sd3, tmp_path / "inpaint", stage="inpaint", init=str(tmp_path / "base"), steps=2, sample_every=2)
    pefl(sd3, tmp_path, base=str(tmp_path / "inpaint"), phases="3/2/1x1")
    sample.main(sample.Config("outpaint", str(tmp_path / "pefl"), out=str(tmp_path / "made"), aspect="2:1",
                              image=picture(tmp_path), prompt="a cat", steps=2, device="cpu", sd3=sd3["sd3"]))
    evaluate.main(evaluate.Config("scenes", str(tmp_path / "inpaint"), str(tmp_path / "judged"), n=2,
                                  steps="1", parser=str(ROOT / "assets/parser"), device="cpu"))
    found = json.loads((tmp_path / "judged/results.json").read_text())["tasks"]["edit"]
    assert found["truth"]["named"]["mean"] > found[f"{tmp_path}/inpaint@1"]["named"]["mean"]


def test_text_to_image_from_the_public_file(sd3, tmp_path):
    sample.main(sample.Config("t2i", sd3["sd3"], out=str(tmp_path), prompt="a cat", size=64, height=64,
                              width=96, steps=2, guidance=5.0, tokenizers=sd3["tokenizers"], device="cpu"))
    (made,) = (p for p in tmp_path.glob("*.png") if p.name != "sheet.png")
    assert Image.open(made).size == (96, 64)


def test_training_from_the_cache(sd3, tmp_path, capsys):
    """Text features and latents from make_cache.py train as the encoders and the VAE do."""
    made = dict(base=sd3["sd3"], data="scenes", edits=True, tokenizers=sd3["tokenizers"], limit=32,
                dtype="fp32", image_size=32, out=str(tmp_path / "cache"), workers=0, device="cpu")
    make_cache.main(make_cache.Config(**made))
    found = omni(sd3, tmp_path / "cached", cache=str(tmp_path / "cache"), sample_every=4)
    assert all(math.isfinite(r["loss/flow"]) for r in found)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="^error: .*cache: a cache of .*image_size"):
        omni(sd3, tmp_path / "other", cache=str(tmp_path / "cache"), image_size=48)
    with pytest.raises(SystemExit, match="^error: --cache: .*--latents False"):
        omni(sd3, tmp_path / "other", cache=str(tmp_path / "cache"), stage="inpaint")


@pytest.mark.parametrize("text, change", [
    ("tokenizers", {"tokenizers": None}),
    ("no_such", {"init": "no_such.safetensors"}),
    ("--image_size: 40: must be a multiple of 16", {"image_size": 40}),
])
def test_bad_values(sd3, tmp_path, text, change):
    with pytest.raises(SystemExit, match=f"^error: .*{text}") as e:
        omni(sd3, tmp_path, **change)
    assert "\n" not in str(e.value)
