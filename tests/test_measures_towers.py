"""Measures that look with published networks: equal to transformers, or to plain code, on random weights."""

import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

import measures
from measures import Towers, describe, features_of_set, measure, open_towers
from pretrained import perceptual
from pretrained import text as text_encoders

transformers = pytest.importorskip("transformers")
from test_towers import (  # noqa: E402
    BLIP_VISION,
    VOCAB,
    OpenClip,
    blip_peer,
    clip_peer,
    clip_vocabulary,
    dino_peer,
    image_features,
    imagereward_file,
    picture,
    published_dino,
    randomize,
    rename,
    save,
    small_imagereward,
    vocab,  # noqa: F401
)

MEAN, STD = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
BEFORE, AFTER = "a red car", "the lazy dog jumps"
SMALL = {"shortest_edge": 32}
CROP = {"height": 32, "width": 32}
F64 = torch.float64


def array(h, w, seed=0):
    return np.array(picture(h, w, seed))


ROW = dict(result=array(41, 66, 1), source=array(50, 50, 2), target=array(41, 66, 3), source_text=BEFORE,
           target_text=AFTER)


def normalised(x, mean=MEAN, std=STD):
    """uint8 [H, W, 3] -> float64 [1, 3, H, W]."""
    x = (x / 255 - np.array(mean)) / np.array(std)
    return torch.from_numpy(x).permute(2, 0, 1)[None]


def openai_pixels(x, short=32, side=32, mean=MEAN, std=STD):
    """torchvision's Resize and CenterCrop of a Pillow picture, ToTensor, Normalize."""
    h, w = x.shape[:2]
    size = (short, int(short * h / w)) if w <= h else (int(short * w / h), short)
    p = Image.fromarray(x).resize(size, Image.Resampling.BICUBIC)
    left, top = (int(round((n - side) / 2)) for n in p.size)
    return normalised(np.asarray(p.crop((left, top, left + side, top + side))), mean, std)


def hf_pixels(x):
    theirs = transformers.CLIPImageProcessorPil(size=SMALL, crop_size=CROP)
    return theirs(Image.fromarray(x), return_tensors="pt")["pixel_values"].double()


def clip_folder(tmp_path, peer, name="clip"):
    """As transformers saves it, with CLIP's tokenizer files beside the weights."""
    folder = tmp_path / name
    folder.mkdir()
    words = clip_vocabulary(folder)
    peer.save_pretrained(folder)
    for file in Path(words).iterdir():
        file.rename(folder / file.name)
    return str(folder)


@pytest.fixture
def clip(tmp_path):
    """-> a folder with a small CLIP, and functions for its embeddings of unit length, in float64."""
    peer = clip_peer()
    folder = clip_folder(tmp_path, peer)
    words = text_encoders.clip_tokenizer(folder, length=48)

    @torch.no_grad()
    def image(pixels):
        return F.normalize(image_features(peer)(pixels), dim=-1)[0]

    @torch.no_grad()
    def text(caption):
        ids = text_encoders.tokenize(words, [caption])
        return F.normalize(peer.text_projection(peer.text_model(ids).pooler_output), dim=-1)[0]

    return folder, image, text, peer


def test_clip_measures_equal_transformers(clip):
    folder, image, text, _ = clip
    towers = open_towers(clip=folder, clip_large=folder)
    names = ["clip_i", "clip_i_source", "clip_t", "clip_out", "clip_dir", "clip_score_hessel", "clip_cosine",
             "clip_score"]
    got = measure(names, towers, **ROW)
    result, source, target = (image(openai_pixels(ROW[k])) for k in ("result", "source", "target"))
    before, after = text(BEFORE), text(AFTER)
    expected = {
        "clip_i": result @ target, "clip_i_source": result @ source, "clip_t": result @ after,
        "clip_out": result @ after,
        "clip_dir": F.cosine_similarity(result - source, after - before, dim=0),
        "clip_score_hessel": 2.5 * (result @ text("A photo depicts " + AFTER)).clamp(min=0),
        "clip_cosine": result @ after,
        "clip_score": 100 * (image(hf_pixels(ROW["result"])) @ after).clamp(min=0)}
    assert got == pytest.approx({k: v.item() for k, v in expected.items()}, abs=2e-4)
    assert len({round(abs(v), 4) for k, v in got.items() if k in ("clip_i", "clip_i_source", "clip_t")}) == 3
    # half a pixel apart: torchvision rounds (51 - 32) / 2 to even, transformers down
    assert got["clip_score"] != pytest.approx(100 * max(got["clip_cosine"], 0), abs=1e-3)


def test_equal_captions_have_no_direction(clip):
    towers = open_towers(clip=clip[0])
    row = {**ROW, "source_text": AFTER}
    assert math.isnan(measure(["clip_dir"], towers, **row)["clip_dir"])
    row = {**ROW, "result": ROW["source"]}  # an edit that changed nothing is a bad one, not a missing one
    assert measure(["clip_dir"], towers, **row)["clip_dir"] == 0


def test_embeddings_are_made_once(clip):
    towers = open_towers(clip=clip[0])
    calls = []
    towers.clip.vision.register_forward_hook(lambda *args: calls.append("picture"))
    towers.clip.text_tower.register_forward_hook(lambda *args: calls.append("text"))
    measure(["clip_i", "clip_i_source", "clip_t", "clip_out", "clip_dir"], towers, **ROW)
    assert sorted(calls) == 3 * ["picture"] + 2 * ["text"]


def test_scales_of_clip_score(clip):
    """Cosines .3 and -.1: raw mean .1, Hessel .375, clipped for each picture 15.0."""
    towers = open_towers(clip=clip[0], clip_large=clip[0])
    got = {"clip_cosine": [], "clip_score_hessel": [], "clip_score": []}
    for cosine in (0.3, -0.1):
        row = measures.Row(towers, {"result": ROW["result"]}, {"target_text": AFTER}, None)
        picture, words = torch.tensor([1.0, 0]), torch.tensor([cosine, (1 - cosine**2) ** 0.5])
        for prep in (towers.clip.prep, measures.replace(towers.clip.prep, half_even=False)):
            row.made |= {(flag, "result", prep): picture for flag in ("clip", "clip_large")}
        row.made |= {("clip_large", "text", AFTER): words,
                     ("clip", "text", "A photo depicts " + AFTER): words}
        for name in got:
            got[name].append(measures.MEASURES[name].score(row))
    means = {k: np.mean(v) for k, v in got.items()}
    assert means == pytest.approx({"clip_cosine": 0.1, "clip_score_hessel": 0.375, "clip_score": 15.0})


def test_edited_part(clip):
    folder, image, text, _ = clip
    mask = np.zeros((41, 66), bool)
    mask[10:30, 5:50] = True
    towers = open_towers(clip_large=folder)
    got = measure(["clip_edited"], towers, **{**ROW, "mask": mask})["clip_edited"]
    black = np.uint8(ROW["result"] * mask[..., None])
    expected = 100 * (image(hf_pixels(black)) @ text(AFTER)).clamp(min=0)
    assert got == pytest.approx(expected.item(), abs=2e-4)
    got = measure(["clip_edited"], towers, **{**ROW, "mask": ~mask & mask})
    assert math.isnan(got["clip_edited"])


def test_activation_is_read_from_the_folder(clip, tmp_path):
    """OpenAI's have quick-GELU, LAION's GELU; a file without config.json is taken for what its flag says."""
    gelu = clip_folder(tmp_path, clip_peer(quick=False), "laion")
    towers = open_towers(clip=gelu, clip_large=clip[0], pick_score=clip[0])
    assert [towers.about[k]["backbone"].split(", ")[-1] for k in ("clip", "clip_large", "pick_score")] == [
        "GELU", "quick-GELU", "quick-GELU"]
    peer = image_features(clip_peer(quick=False))
    pair = [F.normalize(peer(openai_pixels(ROW[k])), dim=-1)[0] for k in ("result", "target")]
    got = measure(["clip_i"], towers, **ROW)["clip_i"]
    assert got == pytest.approx((pair[0] @ pair[1]).item(), abs=1e-5)
    file = f"{gelu}/model.safetensors,{gelu}"
    towers = open_towers(clip=file, pick_score=file)
    assert [towers.about[k]["backbone"].split(", ")[-1] for k in ("clip", "pick_score")] == [
        "quick-GELU", "GELU"]


def test_clip_fid_features_are_not_of_unit_length(clip):
    folder, _, _, peer = clip
    towers = open_towers(clip=folder)
    pictures = [ROW["result"], ROW["source"], ROW["target"]]
    got = features_of_set("clip_fid", iter(pictures), towers, batch_size=2)
    with torch.no_grad():
        expected = torch.cat([image_features(peer)(openai_pixels(x)) for x in pictures])
    assert got.shape == (3, 24) and np.allclose(got, expected, atol=1e-4)
    assert abs(np.linalg.norm(got, axis=1) - 1).min() > 0.05
    assert measures.fid(got, got) == pytest.approx(0, abs=1e-4)


####################################################################################################
# DINO
####################################################################################################

IMAGENET = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])


def old_names(weights):
    """The names of the published folders of DINO, which transformers wrote until version 5."""
    out = {}
    for k, v in weights.items():
        k = re.sub(r"^layers\.", "encoder.layer.", k)
        k = re.sub(r"attention\.([qkv])_proj",
                   lambda m: "attention.attention." + {"q": "query", "k": "key", "v": "value"}[m[1]], k)
        k = k.replace("attention.o_proj", "attention.output.dense").replace("mlp.fc1", "intermediate.dense")
        out[k.replace("mlp.fc2", "output.dense")] = v
    return {**out, "pooler.dense.weight": torch.ones(128, 128), "pooler.dense.bias": torch.ones(128)}


def test_dino_under_three_kinds_of_names(tmp_path):
    """The hub's, those of the published folders of transformers, and those of its version 5."""
    peer, names = dino_peer("v1")
    hub = published_dino(peer, names)
    for weights in (hub, old_names(peer.state_dict()), peer.state_dict()):
        net = open_towers(dino=save(tmp_path, weights)).dino
        assert net.state_dict().keys() == hub.keys()
        assert all(torch.equal(v, hub[k].float()) for k, v in net.state_dict().items())
    broken = old_names(peer.state_dict())
    del broken["encoder.layer.1.attention.attention.key.bias"]
    with pytest.raises(SystemExit, match="^error: --dino: .*missing .blocks.1.attn.qkv.bias"):
        open_towers(dino=save(tmp_path, broken))


def test_dino_measures_equal_transformers(tmp_path):
    """[CLS] cosines and distance of key matrices."""
    peer, names = dino_peer("v1")
    path = save(tmp_path, published_dino(peer, names))
    towers = open_towers(dino=path, dino_keys=path)
    towers.dino.offset = towers.dino_keys.offset = 0.0  # transformers resizes positions to the exact size
    got = measure(["dino", "dino_source", "structure"], towers, **ROW)

    keys = []
    peer.layers[-1].attention.k_proj.register_forward_hook(lambda m, args, y: keys.append(y[0]))

    @torch.no_grad()
    def cls(x):
        pixels = openai_pixels(x, 256, 224, **IMAGENET)
        return peer(pixels, interpolate_pos_encoding=True).last_hidden_state[0, 0]

    result, source, target = (cls(ROW[k]) for k in ("result", "source", "target"))
    assert got["dino"] == pytest.approx(F.cosine_similarity(result, target, dim=0).item(), abs=1e-5)
    assert got["dino_source"] == pytest.approx(F.cosine_similarity(result, source, dim=0).item(), abs=1e-5)

    keys.clear()
    moved = np.array(Image.fromarray(ROW["result"]).resize((50, 50), Image.Resampling.BICUBIC))
    for x in (moved, ROW["source"]):
        x = torch.from_numpy(x).permute(2, 0, 1)[None].double()
        x = F.interpolate(x, (224, 224), mode="bilinear", antialias=True)
        mean, std = (torch.tensor(v, dtype=F64)[:, None, None] for v in IMAGENET.values())
        with torch.no_grad():
            peer((x - mean) / std, interpolate_pos_encoding=True)
    a, b = (F.normalize(k, dim=1) @ F.normalize(k, dim=1).T for k in keys)
    assert a.shape == (785, 785)  # all tokens, [CLS] too
    assert got["structure"] == pytest.approx(((a - b) ** 2).mean().item(), rel=1e-3)
    assert got["structure"] > 1e-4


####################################################################################################
# LPIPS
####################################################################################################


def random_weights(net, seed=0):
    """Of He's scale, so that features neither vanish nor explode."""
    g = torch.Generator().manual_seed(seed)
    for name, p in net.named_parameters():
        scale = (2 / p[0].numel()) ** 0.5 if p.ndim == 4 and p.shape[0] > 1 else 0.1
        p.data = torch.randn(p.shape, generator=g) * scale
        if name.startswith("lins"):
            p.data.abs_()
    return net


def plain_features(kind, w, x):
    """torchvision's forward written out, on its names of weights."""
    conv = lambda i, x, s=1, p=1: F.relu(F.conv2d(  # noqa: E731
        x, w[f"features.{i}.weight"], w[f"features.{i}.bias"], stride=s, padding=p))
    if kind == "alex":
        a = conv(0, x, 4, 2)
        b = conv(3, F.max_pool2d(a, 3, 2), 1, 2)
        c = conv(6, F.max_pool2d(b, 3, 2))
        d = conv(8, c)
        return a, b, c, d, conv(10, d)
    if kind == "vgg":
        a = conv(2, conv(0, x))
        b = conv(7, conv(5, F.max_pool2d(a, 2)))
        c = conv(14, conv(12, conv(10, F.max_pool2d(b, 2))))
        d = conv(21, conv(19, conv(17, F.max_pool2d(c, 2))))
        return a, b, c, d, conv(28, conv(26, conv(24, F.max_pool2d(d, 2))))

    def fire(i, x):
        x = conv(f"{i}.squeeze", x, p=0)
        return torch.cat([conv(f"{i}.expand1x1", x, p=0), conv(f"{i}.expand3x3", x)], 1)

    def pool(x):
        return F.max_pool2d(x, 3, 2, ceil_mode=True)

    a = conv(0, x, 2, 0)
    b = fire(4, fire(3, pool(a)))
    c = fire(7, fire(6, pool(b)))
    d = fire(9, pool(c))
    e = fire(10, d)
    f = fire(11, e)
    return a, b, c, d, e, f, fire(12, f)


def published_lpips(tmp_path, kind, seed=0):
    """-> torchvision's file with its classifier, the package's file of linear layers, all weights."""
    net = random_weights(perceptual.Lpips(kind), seed)
    weights = {k: v.clone() for k, v in net.state_dict().items()}
    backbone = {k: v for k, v in weights.items() if k.startswith("features.")}
    heads = {f"lin{k.split('.')[1]}.model.1.weight": v for k, v in weights.items() if k.startswith("lins.")}
    torch.save({**backbone, "classifier.1.weight": torch.ones(2, 2)}, tmp_path / f"{kind}net.pth")
    torch.save(heads, tmp_path / f"{kind}.pth")
    return f"{tmp_path}/{kind}net.pth,{tmp_path}/{kind}.pth", {**backbone, **heads}


@pytest.mark.parametrize("kind", ["alex", pytest.param("vgg", marks=pytest.mark.slow), "squeeze"])
def test_lpips_equals_plain_code(kind, tmp_path):
    spec, w = published_lpips(tmp_path, kind)
    towers = open_towers(lpips=spec)
    row = dict(result=array(45, 52, 1), target=array(45, 52, 2))
    got = measure(["lpips"], towers, **row)["lpips"]

    def unit_features(x):
        x = torch.from_numpy(x).permute(2, 0, 1)[None].float() / 127.5 - 1
        x = (x - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor(
            [0.458, 0.448, 0.450]).view(3, 1, 1)
        return [f / (f.norm(dim=1, keepdim=True) + 1e-10) for f in plain_features(kind, w, x)]

    a, b = unit_features(row["result"]), unit_features(row["target"])
    assert len(a) == (7 if kind == "squeeze" else 5)
    expected = sum(F.conv2d((x - y) ** 2, w[f"lin{i}.model.1.weight"]).mean()
                   for i, (x, y) in enumerate(zip(a, b)))
    assert got == pytest.approx(expected.item(), rel=1e-4) and got > 0.01
    assert measure(["lpips"], towers, result=row["target"], target=row["target"])["lpips"] == 0

    keep = np.zeros((45, 52), bool)
    keep[:20] = True
    got = measure(["lpips_unedited"], towers, result=row["result"], source=row["target"], mask=~keep)
    black = [x * keep[..., None] for x in row.values()]
    assert got["lpips_unedited"] == measure(["lpips"], towers, result=black[0], target=black[1])["lpips"]
    got = measure(["lpips_unedited"], towers, result=row["result"], source=row["target"], mask=keep | ~keep)
    assert math.isnan(got["lpips_unedited"])
    with pytest.raises(ValueError, match="lpips: pictures of 40x31 pixels: both sides need at least 32"):
        measure(["lpips"], towers, result=array(31, 40), target=array(31, 40, 1))
    said = towers.about["lpips"]["backbone"]
    assert {"alex": "AlexNet", "vgg": "VGG16", "squeeze": "SqueezeNet"}[kind] in said


def test_lpips_from_one_file(tmp_path):
    """Whole state dicts of the lpips package and of torchmetrics."""
    spec, w = published_lpips(tmp_path, "squeeze")
    row = dict(result=array(45, 52, 1), target=array(45, 52, 2))
    expected = measure(["lpips"], open_towers(lpips=spec), **row)
    ends = (1, 4, 7, 9, 10, 11, 12)

    def sliced(stem, first):
        out = {}
        for k, v in w.items():
            if k.startswith("features."):
                at = next(i for i, end in enumerate(ends) if int(k.split(".")[1]) <= end)
                k = k.replace("features", stem.format(first + at))
            out[k] = v
        return {**out, "scaling_layer.shift": torch.ones(1, 3, 1, 1),
                **{f"lins.{k[3]}.{k[5:]}": v for k, v in w.items() if k.startswith("lin")}}

    for stem, first in (("net.slice{}", 1), ("net.slices.{}", 0)):
        path = save(tmp_path, sliced(stem, first))
        assert measure(["lpips"], open_towers(lpips=path), **row) == expected


def test_lpips_equals_the_package(tmp_path):
    pytest.importorskip("torchvision")
    lpips = pytest.importorskip("lpips")
    for kind in ("alex", "squeeze"):
        spec, w = published_lpips(tmp_path, kind)
        theirs = lpips.LPIPS(net=kind, pretrained=False, pnet_rand=True, verbose=False)
        ours = {k: re.sub(r"^lins\.(\d)", r"lin\1", re.sub(r"^net\.slice\d", "features", k))
                for k in theirs.state_dict()}
        assert set(ours.values()) >= w.keys()
        theirs.load_state_dict({k: w.get(ours[k], v) for k, v in theirs.state_dict().items()})
        a, b = array(45, 52, 1), array(45, 52, 2)
        x, y = (torch.from_numpy(v).permute(2, 0, 1)[None].float() / 127.5 - 1 for v in (a, b))
        got = measure(["lpips"], open_towers(lpips=spec), result=a, target=b)["lpips"]
        assert got == pytest.approx(theirs(x, y).item(), rel=1e-4)


####################################################################################################
# Inception
####################################################################################################


def test_inception_has_the_published_size():
    with torch.device("meta"):
        net = perceptual.Inception()
    trained = sum(p.numel() for k, p in net.named_parameters() if "running" not in k)
    assert trained == 21_785_568  # torchvision's inception_v3 without auxiliary head and classifier
    assert sum(p.numel() for k, p in net.named_parameters() if "running" in k) == 34_432


def inception_file(tmp_path):
    g = torch.Generator().manual_seed(0)
    net = perceptual.Inception()
    for name, p in net.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        p.data = noise * (2 / p[0].numel()) ** 0.5 if p.ndim == 4 else (
            1 + 0.1 * noise.abs() if name.endswith(("weight", "var")) else 0.1 * noise)
    weights = {**net.state_dict(), "fc.weight": torch.ones(1008, 2048), "fc.bias": torch.ones(1008)}
    weights |= {k.replace("running_mean", "num_batches_tracked"): torch.tensor(0) for k in net.state_dict()
                if k.endswith("running_mean")}
    path = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(weights, path)
    return str(path), weights


@pytest.mark.slow
def test_inception_equals_torchvision(tmp_path):
    """With the means and the maximum of FID's network."""
    inception = pytest.importorskip("torchvision.models.inception")
    path, weights = inception_file(tmp_path)
    theirs = inception.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    theirs.load_state_dict(weights)
    theirs.eval().fc = torch.nn.Identity()
    x = torch.rand(1, 3, 107, 139, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        padded = theirs(x)
        for name, block in theirs.named_children():
            if name.startswith("Mixed") and hasattr(block, "branch_pool"):
                block.forward = pooled(block, "max" if name == "Mixed_7c" else "avg")
        expected, got = theirs(x), perceptual.load_inception(path)(x)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4) and got.shape == (1, 2048)
    assert (padded - expected).abs().max() > 0.01  # the means matter


def pooled(block, how):
    """The block's own forward with another pool before its branch_pool."""
    def forward(x):
        *others, _ = block._forward(x)
        y = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) if how == "avg" else F.max_pool2d(x, 3, 1, 1)
        return torch.cat([*others, block.branch_pool(y)], 1)

    return forward


@pytest.mark.slow
def test_features_of_fid(tmp_path):
    path, _ = inception_file(tmp_path)
    towers = open_towers(inception=path)
    pictures = [array(50, 70, 1), array(299, 299, 2), array(64, 64, 3)]
    got = features_of_set("fid", iter(pictures), towers, batch_size=2)
    assert got.shape == (3, 2048) and got.dtype == np.float32
    channels = [Image.fromarray(pictures[0][..., k].astype(np.float32)) for k in range(3)]
    channels = [c.resize((299, 299), Image.Resampling.BICUBIC) for c in channels]
    x = torch.from_numpy(np.stack([np.asarray(c) for c in channels]))[None].clamp(0, 255)
    with torch.no_grad():
        expected = towers.inception((x - 128) / 128)
    assert np.allclose(got[:1], expected, rtol=1e-4, atol=1e-4)
    assert measures.fid(got[:2], got[1:]) > 0
    for name in ("fid", "kid"):
        assert "299x299" in describe([name], towers)[name]["preprocessing"]


@torch.no_grad()
def test_pools_of_fid():
    """Means leave the padding out; a layer's batch norm uses the file's statistics."""
    x = torch.ones(1, 1, 4, 4)
    assert torch.equal(perceptual.POOLS["avg"](x), x)
    assert perceptual.POOLS["half"](torch.ones(1, 1, 35, 35)).shape[-1] == 17
    norm = perceptual.Norm(1)
    norm.running_mean.data, norm.running_var.data = torch.tensor([2.0]), torch.tensor([4.0])
    norm.weight.data, norm.bias.data = torch.tensor([3.0]), torch.tensor([0.5])
    assert norm(x)[0, 0, 0, 0].item() == pytest.approx(3 * (1 - 2) / (4 + 1e-3) ** 0.5 + 0.5)


####################################################################################################
# BLIP, ImageReward, PickScore, HPSv2
####################################################################################################


def blip_retrieval(words):
    vision = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2,
                  image_size=32, patch_size=8, layer_norm_eps=1e-6)
    text = dict(vocab_size=words + 2, hidden_size=64, encoder_hidden_size=128, intermediate_size=96,
                num_hidden_layers=2, num_attention_heads=1, max_position_embeddings=512, layer_norm_eps=1e-12)
    cfg = transformers.BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=20)
    return randomize(transformers.BlipForImageTextRetrieval(cfg)).eval()


def test_blip_measures_equal_transformers(vocab, tmp_path):  # noqa: F811
    words = len(Path(vocab).read_text(encoding="utf-8").splitlines())
    peer = blip_retrieval(words)
    folder = tmp_path / "blip"
    peer.save_pretrained(folder)
    (folder / "vocab.txt").write_bytes(Path(vocab).read_bytes())
    caption = "a photo of the lazy dog"
    row = {**ROW, "target_text": caption}
    towers = open_towers(blip=str(folder))
    got = measure(["blip_itc", "blip_itm"], towers, **row)

    pixels = np.asarray(Image.fromarray(ROW["result"]).resize((32, 32), Image.Resampling.BICUBIC))
    ids, attend = towers.blip.tokenize([caption])
    peer = peer.double()
    with torch.no_grad():
        ask = dict(input_ids=ids, attention_mask=attend, pixel_values=normalised(pixels))
        itm = peer(**ask).itm_score.softmax(-1)[0, 1]
        itc = peer(**ask, use_itm_head=False).itm_score[0, 0]
    assert got == pytest.approx({"blip_itc": itc.item(), "blip_itm": itm.item()}, abs=1e-5)
    assert 0.001 < got["blip_itm"] < 0.999
    assert ids[0, 0].item() == towers.blip.tokenizer.token_to_id("[CLS]")  # not [ENC]

    # BLIP's own file: the same names as ImageReward's towers, momentum copies and queues beside them
    state = peer.float().state_dict()
    image = {k.removeprefix("vision_model."): v for k, v in state.items() if k.startswith("vision_model.")}
    image = rename(image, [(b, a) for a, b in BLIP_VISION])
    own = {f"visual_encoder.{re.sub('^post_layernorm', 'norm', k)}": v for k, v in image.items()}
    own |= {k: v for k, v in state.items() if not k.startswith("vision_model.")}
    rest = {f"{k.split('.', 1)[0]}_m.x": torch.ones(2) for k in own} | {
        "temp": torch.ones(()), "image_queue": torch.ones(2, 2), "ptr_queue": torch.tensor([7]),
        "text_encoder.embeddings.position_ids": torch.arange(9)[None]}
    file = tmp_path / "model_base_retrieval_coco.pth"
    torch.save({"model": {**own, **rest}}, file)
    again = open_towers(blip=f"{file},{vocab}")
    assert measure(["blip_itc", "blip_itm"], again, **row) == got
    torch.save({"model": {**own, "itm_head.more": torch.ones(2)}}, file)
    with pytest.raises(SystemExit, match="^error: --blip: .*1 not of BLIP for retrieval .itm_head.more"):
        open_towers(blip=f"{file},{vocab}")
    with pytest.raises(SystemExit, match="^error: --blip: .*no vocab.txt with it: give BLIP"):
        open_towers(blip=str(file))


def test_image_reward_equals_transformers(vocab, tmp_path):  # noqa: F811
    path, _ = imagereward_file(small_imagereward(vocab), tmp_path)
    towers = open_towers(image_reward=f"{path},{vocab}")
    got = measure(["image_reward"], towers, **ROW)["image_reward"]
    peer = blip_peer(towers.image_reward)
    ids, attend = towers.image_reward.tokenize([AFTER])
    with torch.no_grad():
        expected = peer(openai_pixels(ROW["result"]), ids, attend)
    assert got == pytest.approx(expected.item(), rel=1e-4)


def test_pick_score_equals_transformers(tmp_path):
    peer = clip_peer(quick=False)
    folder = clip_folder(tmp_path, peer)
    towers = open_towers(pick_score=folder)
    ids = text_encoders.tokenize(towers.pick_score.tokenizer, [AFTER])
    with torch.no_grad():
        expected = peer(input_ids=ids, pixel_values=hf_pixels(ROW["result"])).logits_per_image
    got = measure(["pick_score"], towers, **ROW)["pick_score"]
    assert got == pytest.approx(expected.item(), rel=1e-4)


def test_hps_from_its_own_file(tmp_path):
    """open_clip's names; the tensor is resized to the long side and padded with black before normalising."""
    peer = randomize(OpenClip()).eval()
    torch.save({"epoch": 1, "state_dict": peer.state_dict()}, tmp_path / "HPS_v2.1_compressed.pt")
    words = clip_vocabulary(tmp_path)
    towers = open_towers(hps=f"{tmp_path}/HPS_v2.1_compressed.pt,{words}")
    got = measure(["hps_v2"], towers, **ROW)["hps_v2"]
    x = torch.from_numpy(ROW["result"]).permute(2, 0, 1)[None].float() / 255
    x = F.interpolate(x, (round(41 * 32 / 66), 32), mode="bicubic", antialias=True)
    top = (32 - x.shape[2]) // 2
    x = F.pad(x, (0, 0, top, 32 - x.shape[2] - top))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    ids = text_encoders.tokenize(text_encoders.clip_tokenizer(words, length=48), [AFTER])
    ids[:, 1:][(ids == VOCAB - 1)[:, :-1]] = 0
    with torch.no_grad():
        a, b = peer.encode_image((x - mean) / std), peer.encode_text(ids)
    assert got == pytest.approx(F.cosine_similarity(a, b).item(), abs=1e-5)


####################################################################################################
# Descriptions and errors
####################################################################################################


def test_what_is_described_of_towers(clip, tmp_path):
    folder = clip[0]
    spec, _ = published_lpips(tmp_path, "squeeze")
    towers = open_towers(clip=folder, clip_large=folder, lpips=spec)
    names = ["clip_i", "clip_i_source", "clip_dir", "clip_score", "lpips_unedited", "l1"]
    got = json.loads(json.dumps(describe(names, towers)))
    assert list(got) == names
    whole = hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest()[:12]
    assert got["clip_i"]["weights"] == f"clip/model.safetensors {whole}"
    pattern = r"squeezenet.pth [0-9a-f]{12}, squeeze.pth [0-9a-f]{12}"
    assert re.fullmatch(pattern, got["lpips_unedited"]["weights"])
    assert "SqueezeNet" in got["lpips_unedited"]["backbone"]
    assert got["clip_i"]["backbone"] == "CLIP ViT of width 128, patches of 8, quick-GELU"
    assert "short side to 32, centre 32x32" in got["clip_i"]["preprocessing"]
    assert "48 tokens" in got["clip_dir"]["preprocessing"]
    assert [v["against"] for v in got.values()] == [
        "target", "source", "source, source_text, target_text", "target_text", "source", "target"]
    assert str(tmp_path) not in json.dumps(got)


def test_backbones_have_their_published_names():
    assert measures.CLIPS[768, 32] == "ViT-B/32" and measures.CLIPS[1024, 14] == "ViT-L/14"
    assert measures.DINOS[384, 16] == "dino_vits16" and measures.DINOS[768, 8] == "dino_vitb8"


def test_errors_of_files(clip, tmp_path):
    pictures_only = open_towers(clip=f"{clip[0]}/model.safetensors")
    assert -1 <= measure(["clip_i"], pictures_only, **ROW)["clip_i"] <= 1
    with pytest.raises(ValueError, match="^--clip: clip_t reads captions, and no tokenizer is there: ") as e:
        measure(["clip_t"], pictures_only, **ROW)
    assert "\n" not in str(e.value)
    save_file({"x": torch.ones(2)}, tmp_path / "other.safetensors")
    for flag in measures.WANTED:
        for name in ("absent.pth", "other.safetensors"):
            with pytest.raises(SystemExit) as e:
                open_towers(**{flag: f"{tmp_path}/{name},{tmp_path}"})
            line = str(e.value)
            assert line.startswith(f"error: --{flag}: ") and "\n" not in line, line
            assert str(tmp_path) in line and ("give" in line or "download" in line), line
    assert open_towers() == Towers()
