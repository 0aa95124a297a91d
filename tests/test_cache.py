"""make_cache.py: what is read is what the encoders gave, in the loaders' order; kills, damage, full disks.

Real code end to end, with a small autoencoder and three small text encoders in the published layout.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import test_data
import test_edits
import torch
import torch.nn.functional as F
from held import held
from inprocess import run_ranks
from PIL import Image
from safetensors.torch import load_file, save_file
from test_text_encoders import files as token_files  # noqa: F401
from test_vae import randomize

import data
import make_cache
import masks
import model
import pipeline
from kernels import dispatch
from make_cache import Config
from pretrained import text as text_encoders
from pretrained.files import PARTS, read_weights
from pretrained.text import ClipText, ClipTextConfig, T5Config, T5Encoder
from pretrained.vae import VAE, VAEConfig, load_vae
from readers.cached import open_cache
from readers.edits import open_edits
from readers.files import BadFile
from readers.pictures import open_source

ROOT = Path(__file__).resolve().parent.parent
SIZES = dict(image_size=64, text_shard=7, shard=5, batch_size=1, text_batch=4, workers=0, device="cpu")
pytestmark = pytest.mark.usefixtures("one_thread_and_own_signals")


@pytest.fixture(scope="module")
def base(token_files, tmp_path_factory):  # noqa: F811
    """-> (single file of random weights without transformer, folder of its tokenizers)."""
    folder = tmp_path_factory.mktemp("base")
    for name, kept in (("tokenizer", ("vocab.json", "merges.txt")), ("tokenizer_3", ("tokenizer.json",))):
        (folder / name).mkdir()
        for file in kept:
            shutil.copy(token_files / file, folder / name)
    shutil.copytree(folder / "tokenizer", folder / "tokenizer_2")
    words = len(json.loads((token_files / "vocab.json").read_text()))
    pieces = len(json.loads((token_files / "tokenizer.json").read_text())["model"]["vocab"]) + 100
    clip = dict(heads=1, layers=2, vocab=words, eos=words - 1)
    nets = {"clip_l": ClipText(ClipTextConfig(width=64, **clip)),
            "clip_g": ClipText(ClipTextConfig(**clip | dict(width=128, heads=2), quick_gelu=False,
                                              project=128)),
            "t5xxl": T5Encoder(T5Config(width=256, heads=4, layers=2, hidden=128, vocab=pieces))}
    state = {PARTS[name].prefix + key: value for name, net in nets.items()
             for key, value in randomize(net).state_dict().items() if key != "encoder.embed_tokens.weight"}
    vae = randomize(VAE(VAEConfig(width=32, channels=4))).state_dict()
    state |= {PARTS["vae"].prefix + key: value for key, value in vae.items()}
    save_file({key: value.float().contiguous() for key, value in state.items()}, folder / "sd3.safetensors")
    return str(folder / "sd3.safetensors"), str(folder)


def config(base, out, spec, **flags):
    return Config(base=base[0], tokenizers=base[1], data=str(spec), out=str(out), **SIZES | flags)


def make(base, out, spec, **flags):
    make_cache.main(config(base, out, spec, **flags))
    return str(out)


def argv(base, out, spec, **flags):
    cfg = vars(config(base, out, spec, **flags))
    return [str(ROOT / "make_cache.py"), *(f"--{k}={v}" for k, v in cfg.items() if v is not None)]


def pairs(root, n=12, **more):
    """Edit pairs of three shapes, with masks and tasks, the fourth with a source that is no picture."""
    shape = {0: (96, 96), 1: (64, 128), 2: (120, 70)}
    spec = test_edits.jsonl(root, n, lambda i: shape[i % 3], lambda i: ("swap", "add")[i % 2], True,
                            score=lambda i: i % 11, **more)
    (root / "3s.png").write_bytes(b"no picture")
    return spec


@pytest.fixture(scope="module")
def edits(base, tmp_path_factory):
    """-> (cache, spec) of edit pairs in buckets."""
    root = tmp_path_factory.mktemp("edits")
    spec = pairs(root)
    return make(base, root / "cache", spec, edits=True, split="all", aspects=True), str(spec)


def test_a_cache_names_no_user(base, tmp_path, monkeypatch):
    """Paths below the home folder or the current one lose them; hashes decide whether a cache fits, so that
    the same command with whole paths goes on in it, and it is found from elsewhere."""
    spec = pairs(tmp_path, 3)
    monkeypatch.setenv("HOME", str(Path(base[1]).parent))
    monkeypatch.chdir(tmp_path)
    out = make(base, tmp_path / "cache", spec, edits=True, split="all", latents=False)
    for file in ("plan.json", "manifest.json"):
        text = (Path(out) / file).read_text()
        assert str(tmp_path) not in text and str(Path(base[1]).parent) not in text
        assert Path(base[0]).name in text
    monkeypatch.undo()
    make(base, out, spec, edits=True, split="all", latents=False)
    assert open_cache(out, base=base[0]).text([""])[0].shape[1] > 77


def shas(path):
    files = json.loads((Path(path) / "manifest.json").read_text())["files"]
    return {name: told["sha256"] for name, told in files.items()}


def same(a, b):
    """Equal files, but that CPU kernels may round pictures and texts otherwise in another process."""
    assert shas(a).keys() == shas(b).keys() and len(shas(a)) > 4
    for name in shas(a):
        x, y = (load_file(Path(p) / name) for p in (a, b))
        assert x.keys() == y.keys()
        for key in x:
            if x[key].is_floating_point():
                assert (x[key].float() - y[key].float()).abs().max() <= 0.01 * y[key].abs().max().float()
            else:
                assert key == "crc" or torch.equal(x[key], y[key])
    return True


def one_line(error):
    text = str(error.value)
    assert text.startswith("error: ") and "\n" not in text
    return text


def flip(path, at):
    """Turn one bit of a file, `at` from its end if negative."""
    raw = bytearray(Path(path).read_bytes())
    raw[at] ^= 4
    Path(path).write_bytes(raw)


def offset(path, name):
    """Where a tensor's bytes begin in a safetensors file."""
    raw = Path(path).read_bytes()
    n = int.from_bytes(raw[:8], "little")
    return 8 + n + json.loads(raw[8:8 + n])[name]["data_offsets"][0]


####################################################################################################
# What is read is what was encoded
####################################################################################################


def computed_in(dtype):
    """What the encoders compute in for features stored in `dtype`."""
    return make_cache.DTYPES[dtype] if dispatch.has_bf16("cpu") else torch.float32


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_text_is_bit_for_bit_what_the_encoders_give(base, tmp_path, dtype):
    (tmp_path / "x").mkdir()
    spec = test_data.folder(tmp_path / "x", 9)
    path = make(base, tmp_path / "c", spec, split="all", latents=False, dtype=dtype)
    source = open_source(str(spec), "all")
    cached = open_cache(path, source, base[0], dtype=dtype, latents=False)
    text = text_encoders.load_text(*base, computed_in(dtype))
    captions = make_cache.all_captions(source, len(source), False)
    assert set(captions) == {"", masks.ERASE_PROMPT, *(f"caption {i}" for i in range(9))}
    for part in (captions[:4], captions[4:7], captions[7:]):                    # as the shards' batches were
        txt, vec = (x.to(make_cache.DTYPES[dtype]) for x in text.encode_text(part))
        for got, right in zip(cached.text(part[::-1]), (txt, vec)):
            assert got.dtype == make_cache.DTYPES[dtype] and torch.equal(got, right.flip(0))
        assert not torch.equal(cached.text(part)[0], cached.text(part[::-1])[0])     # the check can fail
    assert txt.shape[1:] == (154, 256) and txt[:, :77, :192].std() > 0.1 and (txt[:, :77, 192:] == 0).all()
    with pytest.raises(SystemExit, match="holds text only"):
        cached.source(source)
    with pytest.raises(SystemExit) as error:
        cached.text(["caption 3", "a caption\nof another set"])
    assert "'a caption\\nof another set'" in one_line(error)
    assert "python make_cache.py --base" in str(error.value)


def test_without_t5_its_tokens_are_zeros_and_never_silently(base, tmp_path):
    (tmp_path / "x").mkdir()
    spec = test_data.folder(tmp_path / "x", 3)
    path = make(base, tmp_path / "c", spec, split="all", latents=False, t5=False, t5_length=20, text_batch=9)
    captions = make_cache.all_captions(open_source(str(spec), "all"), 3, False)
    right = text_encoders.load_text(*base, computed_in("bf16"), t5=False, t5_length=20).encode_text(captions)
    got = open_cache(path).text(captions)
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(got, right)) and (got[0][:, 77:] == 0).all()
    bare = {k: v for k, v in read_weights(base[0]).items() if "t5xxl" not in k}
    save_file(bare, tmp_path / "bare.safetensors")
    with pytest.raises(SystemExit) as error:
        make((str(tmp_path / "bare.safetensors"), base[1]), tmp_path / "d", spec, split="all", latents=False)
    assert "holds no T5" in one_line(error)
    fixed = config((str(tmp_path / "bare.safetensors"), base[1]), tmp_path / "d", spec, split="all",
                   latents=False, text=base[0])
    make_cache.main(fixed)                  # nothing was made before, so the folder may be of another plan
    assert open_cache(tmp_path / "d").text([""])[0][:, 77:].std() > 0.1
    with pytest.raises(SystemExit) as error:
        make(base, tmp_path / "d", spec, split="all", latents=False)
    assert f"text {base[0]}, not None" in one_line(error)
    with pytest.raises(SystemExit, match="tokenizers: .*holds no tokenizer/"):
        make((base[0], str(tmp_path)), tmp_path / "e", spec, split="all", latents=False)


def test_who_learned_without_t5_is_sampled_without(base, tmp_path, capsys):
    """What training on such a cache leaves in meta.stack gives the encoders' zeros, too; else T5, if it is
    there, would say what the model has never read."""
    (tmp_path / "x").mkdir()
    spec = test_data.folder(tmp_path / "x", 3)
    whole = read_weights(base[0]) | {"model.diffusion_model.context_embedder.weight": torch.zeros(8, 256)}
    save_file(whole, tmp_path / "sd3.safetensors")  # the transformer says how wide the zeros are
    sd3 = str(tmp_path / "sd3.safetensors")
    path, full = (make((sd3, base[1]), tmp_path / name, spec, split="all", latents=False,
                       dtype="fp32", **more)
                  for name, more in (("c", dict(t5=False, t5_length=20)), ("d", {})))
    cfg = replace(model.PRESETS["test"], channels=4, txt_bytes=0, txt_dim=256, vec_dim=192)
    at = torch.device("cpu")
    trained, sampled = model.Editor(cfg), model.Editor(cfg)
    _, known, _ = pipeline.surround(trained, {"sd3": sd3}, at, "--init: a", base[1], path)
    pipeline.surround(sampled, known, at, "--ckpt: b")
    got, right = (net.encode_text(["caption 1"])[0] for net in (sampled, trained))
    assert got.shape == right.shape == (1, 97, 256) and (got[:, 77:] == 0).all()
    assert torch.allclose(got, right, atol=1e-4) and got[:, :77].std() > 0.1
    assert "until now" not in capsys.readouterr().out
    pipeline.surround(trained, known, at, "--init: a", None, full)
    assert "--init: a read other text until now: t5 True, not False, t5_length 77, not 20" in \
        capsys.readouterr().out


def edit_batches(source, steps, **flags):
    at = dict(image_size=64, batch_size=3, stride=16, seed=5, workers=0, p_region=0.5, aspects=True)
    loader = data.make_edit_loader(source, **at | flags)
    got = [next(loader) for _ in range(steps)]
    stats = loader.stats()
    loader.close()
    return got, stats


@pytest.mark.parametrize("flags", [{}, dict(workers=2, rank=1, world=2, start_step=3), dict(balance=False),
                                   dict(min_score=4.0)])
def test_edit_loaders_give_latents_in_the_order_of_pictures(base, edits, flags, capsys):
    path, spec = edits
    source, vae = open_edits(spec, "all"), load_vae(base[0])
    cached = open_cache(path, source, base[0], edits=True, image_size=64, aspects=True, stride=16)
    pixels, was = edit_batches(source, 9, **flags)
    said = capsys.readouterr().err
    latents, stats = edit_batches(cached.source(source), 9, **flags)
    assert stats == was and capsys.readouterr().err == said and ("3s.png" in said) == (stats["skipped"] > 0)
    shown = 0
    for a, b in zip(pixels, latents):
        for key in a.keys() - {"image", "source", "mask", "score"}:
            assert torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key]
        assert torch.equal(a["score"], b["score"])
        h, w = a["image"].shape[2:]
        assert b["image"].shape == b["source"].shape == (3, 4, h // 8, w // 8)
        for k, i in enumerate(a["index"].tolist()):
            item = source.load(i, h, w)
            *pictures, mask = data.fit_pair(item["source"], item["image"], item["mask"], h, w)
            for key, picture in zip(("source", "image"), pictures):
                picture = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
                right = vae.encode(picture)[0]
                assert (b[key][k] - right).abs().max() < 2e-3 * right.abs().max()
                assert (b[key][k] - right.flip(-1)).abs().max() > 0.1
            if (a["mask"][k] == 1).all():
                assert (b["mask"][k] == 1).all()
            else:
                assert torch.equal(b["mask"][k], F.max_pool2d(torch.from_numpy(mask)[None], 8))
                shown += 1
    assert 0 < shown < 27
    txt, vec = cached.text(latents[0]["caption"])
    assert txt.shape == (3, 154, 256) and vec.shape == (3, 192)


def test_latents_are_the_vaes_but_for_fp16(base, edits):
    path, spec = edits
    source, vae = open_edits(spec, "all"), load_vae(base[0])
    items = open_cache(path).source(source)
    h, w = data.bucket(*source.size(5), 64, 16, True)
    got, right = (s.load(5, h, w) for s in (items, source))
    pictures = data.fit_pair(right["source"], right["image"], right["mask"], h, w)
    for key, picture in zip(("source", "image"), pictures):
        picture = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
        z = vae.encode(picture / 127.5 - 1)[0].numpy()
        assert got[key].dtype == np.float32
        assert (np.abs(got[key] - z) <= 2**-10 * np.abs(z) + 1e-5).all()
        assert np.abs(got[key] - z[::-1]).max() > 0.1
    with pytest.raises(BadFile, match="asked for 64x64"):
        items.load(5, 64, 64)
    with pytest.raises(BadFile, match="3s.png"):
        items.size(3)


def test_pictures_and_the_tasks_that_latents_allow(base, tmp_path):
    (tmp_path / "x").mkdir()
    spec = test_data.folder(tmp_path / "x", 14, ((70, 90), (64, 200)))
    path = make(base, tmp_path / "c", spec, split="all", aspects=True, batch_size=3)
    source = open_source(str(spec), "all")
    items = open_cache(path, source).source(source)
    at = dict(image_size=64, batch_size=3, seed=1, workers=0, aspects=True, stride=16, tasks={"t2i": 1.0})
    loaders = [data.make_loader(s, **at) for s in (source, items)]
    vae = load_vae(base[0])
    for _ in range(6):
        a, b = map(next, loaders)
        assert torch.equal(a["index"], b["index"]) and a["caption"] == b["caption"] and a["task"] == b["task"]
        h, w = a["image"].shape[2:]
        assert b["image"].shape == (3, 4, h // 8, w // 8) and (b["mask"] == 1).all() and b["segments"] is None
        i = int(a["index"][0])
        picture = torch.from_numpy(data.fit(source.load(i, h, w)["image"], h, w)[0]).permute(2, 0, 1)[None]
        right = vae.encode(picture / 127.5 - 1)[0]
        assert (b["image"][0] - right).abs().max() < 2e-3 * right.abs().max()
    with pytest.raises(SystemExit, match="latents cannot be"):
        data.make_loader(items, **at | dict(tasks={"t2i": 1.0, "inpaint": 1.0}))


@pytest.mark.parametrize("kind", ["omniedit", "ip2p", "parquet", "scenes", "scene edits"])
def test_other_sources(base, tmp_path, kind):
    """Every wording that a loader draws is there, and its order is kept, whatever the layout."""
    flags, at = dict(edits=kind not in ("parquet", "scenes"), split="all"), {}
    if kind == "omniedit":
        test_edits.omniedit(tmp_path)
        spec = f"omniedit:{tmp_path}"
    elif kind == "ip2p":
        (tmp_path / "seeds.json").write_text(json.dumps([["0", [str(i) for i in range(9)]]]))
        (tmp_path / "0").mkdir()
        (tmp_path / "0" / "prompt.json").write_text(json.dumps({"edit": "do", "output": "done"}))
        for i in range(9):
            for k in (0, 1):
                Image.fromarray(test_edits.pair(i)[k]).save(tmp_path / "0" / f"{i}_{k}.jpg")
        spec = f"ip2p:{tmp_path}"
    elif kind == "parquet":
        texts = [[f"a {i}", "other"] for i in range(8)] + [None]
        spec = test_edits.parquet(tmp_path / "p.parquet",
                                  {"image": test_edits.pictures_of(9, 0), "caption": texts})
        at = dict(tasks={"t2i": 1.0})
    else:
        spec, flags["split"], flags["limit"] = "scenes", "train", 11
        at = {} if flags["edits"] else dict(tasks={"t2i": 1.0})
    opened = open_edits if flags["edits"] else open_source
    source = opened(str(spec), flags["split"])
    cached = open_cache(make(base, tmp_path / "c", spec, **flags), source)
    load = data.make_edit_loader if flags["edits"] else data.make_loader
    loader = load(cached.source(source), 64, 4, stride=16, workers=0, **at)
    inner = cached.source(source).inner
    seen = set()
    for batch in (next(loader) for _ in range(8)):
        assert batch["image"].shape == (4, 4, 8, 8)
        assert cached.text(batch["caption"])[0].shape == (4, 154, 256)
        seen |= set(batch["index"].tolist())
        for i, caption, task in zip(batch["index"].tolist(), batch["caption"], batch["task"]):
            item = inner.load(i, 64, 64)
            assert caption in (item.get("captions") or [item["caption"]])
            assert task == (item.get("task", "t2i") or "")
    assert len(seen) >= 9 and max(seen) < len(cached.source(source))


####################################################################################################
# Kills, ranks, damage
####################################################################################################


def environment():
    return os.environ | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.parametrize("stage", [pytest.param("text", marks=pytest.mark.slow), "latents"])
def test_kill_and_resume(base, edits, tmp_path, stage, capsys):
    path, spec = edits
    flags = dict(edits=True, split="all", aspects=True)
    before = len(list(Path(path).glob("text_*.json"))) if stage == "latents" else 0
    command = held("safetensors.torch", "save_file", before + 2, tmp_path / "gate",
                   argv(base, tmp_path / "c", spec, **flags))  # before the second shard of its kind
    run = subprocess.Popen([sys.executable, *command], env=environment(), stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL)
    while not (tmp_path / "c" / f"{stage}_00000.json").exists():
        assert run.poll() is None
        time.sleep(0.002)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "c").glob("*_*.safetensors")
            if p.with_suffix(".json").exists()}
    assert kept and not (tmp_path / "c" / "manifest.json").exists()
    with pytest.raises(SystemExit, match="not a finished one"):
        open_cache(tmp_path / "c")
    make(base, tmp_path / "c", spec, **flags)
    assert {p: p.stat().st_mtime_ns for p in kept} == kept and same(tmp_path / "c", path)
    assert not list((tmp_path / "c").glob("*.tmp"))
    assert "free" in capsys.readouterr().out


@pytest.mark.slow
def test_two_ranks_make_the_same_files(base, edits, tmp_path):
    path, spec = edits
    run = run_ranks(2, argv(base, tmp_path / "c", spec, edits=True, split="all", aspects=True))
    assert run.returncode == 0, run.stderr
    assert same(tmp_path / "c", path) and "1 skipped" in run.stdout


def test_a_cache_of_something_else_is_refused_by_name(base, edits, tmp_path):
    path, spec = edits
    source = open_edits(spec, "all")
    for asked, what in ((dict(image_size=128), "image_size 64, not 128"),
                        (dict(t5_length=256), "t5_length 77, not"), (dict(edits=False), "edits True, not"),
                        (dict(aspects=False, dtype="fp32"), "aspects True, not False; dtype bf16, not fp32")):
        with pytest.raises(SystemExit) as error:
            open_cache(path, source, base[0], **asked)
        assert what in one_line(error)
    other = tmp_path / "other.safetensors"
    shutil.copy(base[0], other)
    open_cache(path, source, str(other))                                         # the name may change
    tensors = read_weights(base[0])
    save_file({k: v * 2 if "conv_in" in k else v.clone() for k, v in tensors.items()}, other)
    with pytest.raises(SystemExit) as error:
        open_cache(path, source, str(other))
    assert f"base {base[0]}, not {other}" in one_line(error)
    folder = tmp_path / "data"
    shutil.copytree(Path(spec).parent, folder, ignore=shutil.ignore_patterns("cache"))
    open_cache(path, open_edits(str(folder / "pairs.jsonl"), "all"))
    test_edits.add_line(folder / "pairs.jsonl", instruction="one more")
    with pytest.raises(SystemExit) as error:
        open_cache(path, open_edits(str(folder / "pairs.jsonl"), "all"))
    assert "source" in one_line(error)
    with pytest.raises(SystemExit) as error:
        make(base, path, spec, edits=True, split="all", aspects=True, image_size=128)
    assert "image_size 64, not 128" in one_line(error)


def test_a_picture_of_another_size_in_bytes_is_another_data_set(base, edits, tmp_path):
    path, spec = edits
    folder = tmp_path / "data"
    shutil.copytree(Path(spec).parent, folder, ignore=shutil.ignore_patterns("cache"))
    with open(folder / "7t.png", "ab") as f:
        f.write(b"\0")
    with pytest.raises(SystemExit, match="source"):
        open_cache(path, open_edits(str(folder / "pairs.jsonl"), "all"))


@pytest.fixture
def copied(edits, tmp_path):
    """A copy of the cache to damage."""
    shutil.copytree(edits[0], tmp_path / "c")
    return tmp_path / "c"


@pytest.mark.parametrize("name", ["text_00000.safetensors", "latents_00001.safetensors", "index.safetensors"])
def test_truncated_and_missing_files(base, edits, copied, name):
    raw = (copied / name).read_bytes()
    (copied / name).write_bytes(raw[:-9])
    with pytest.raises(SystemExit) as error:
        open_cache(copied)
    assert f"{name}: {len(raw) - 9} bytes instead of {len(raw)}: run again: python" in one_line(error)
    (copied / name).unlink()
    with pytest.raises(SystemExit, match=f"{name}: missing"):
        open_cache(copied)
    make(base, copied, edits[1], edits=True, split="all", aspects=True)
    assert same(copied, edits[0]) and open_cache(copied)


@pytest.mark.parametrize("tensor", ["t5", "clip", "pooled", "crc", None])
def test_a_turned_bit_in_text_is_noticed_and_repaired(base, edits, copied, tensor, capsys):
    file = copied / "text_00000.safetensors"
    flip(file, 30 if tensor is None else offset(file, tensor) + 5 * (tensor != "crc"))
    captions = make_cache.all_captions(open_edits(edits[1], "all"), 12, True)
    with pytest.raises(SystemExit) as error:
        open_cache(copied).text(captions[:1])
    assert "text_00000.safetensors: damaged" in one_line(error)
    make(base, copied, edits[1], edits=True, split="all", aspects=True)
    assert "damaged: " in capsys.readouterr().err and same(copied, edits[0])
    open_cache(copied).text(captions)


@pytest.mark.parametrize("tensor", ["64x64.image", "64x64.source", "64x64.mask", "record", "at", "end",
                                    "size"])
def test_a_turned_bit_in_latents_is_noticed(edits, copied, tensor):
    file = copied / "latents_00000.safetensors"
    source = open_edits(edits[1], "all")
    open_cache(copied).source(source).load(0, 64, 64)
    flip(file, offset(file, tensor) + (tensor == "record"))
    with pytest.raises(BadFile, match="latents_00000.safetensors: damaged .*item 0"):
        open_cache(copied).source(source).load(0, 64, 64)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.parametrize("check", [True, False])
def test_full_disk(base, edits, tmp_path, monkeypatch, check):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mount is not allowed here")
    flags = dict(edits=True, split="all", aspects=True)
    try:
        with pytest.raises(SystemExit) as error:
            if not check:  # the disk fills up while a shard is being written
                monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 10**12))
            make(base, disk / "c", edits[1], **flags)
        text = one_line(error)
        assert ("GiB are free" if check else "cannot be written") in text
        assert not list((disk / "c").glob("*.tmp"))
        made = len(list((disk / "c").glob("text_*.json")))
        assert (made == 0) == check
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        monkeypatch.undo()
        make(base, disk / "c", edits[1], **flags)
        assert same(disk / "c", edits[0])
    finally:
        subprocess.run(["umount", disk])


@pytest.mark.parametrize("flags, what", [
    (dict(image_size=60), "image_size: 60: use a multiple of --stride"), (dict(shard=0), "shard: 0"),
    (dict(stride=4), "stride: 4: use a multiple of the VAE's, 8"), (dict(limit=5), "cached whole"),
    (dict(data="scenes", split="train"), "say how many"),
    (dict(data="/none"), "no such file"),
    (dict(data="scenes", split="train", limit=5, aspects=True), "another shape for every batch")])
def test_wrong_flags(base, tmp_path, flags, what):
    (tmp_path / "x").mkdir()
    flags = dict(data=str(test_data.folder(tmp_path / "x", 3)), split="all") | flags
    with pytest.raises(SystemExit) as error:
        make_cache.main(Config(base=base[0], tokenizers=base[1], out=str(tmp_path / "c"), **SIZES | flags))
    assert what in one_line(error)


def test_too_many_bad_pictures_end_it(base, tmp_path):
    (tmp_path / "x").mkdir()
    spec = test_data.folder(tmp_path / "x", 14)
    for k in range(12):
        (tmp_path / "x" / f"{k:03d}.png").write_bytes(b"?")
    with pytest.raises(SystemExit) as error:
        make(base, tmp_path / "c", spec, split="all", shard=20)
    assert "the last of 11 bad files among 11 read" in one_line(error)
