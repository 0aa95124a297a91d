"""Measures without a network: published vectors, and every formula against an independent computation.

What needs towers is in test_measures_towers.py.
"""

import math
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import log
import measures
import rewards
from measures import Towers, measure
from pretrained import perceptual, towers

V1 = (np.array([[[0, 0, 0], [255, 255, 255]], [[10, 20, 30], [40, 50, 60]]], np.uint8),
      np.array([[[0, 0, 51], [204, 255, 255]], [[10, 20, 30], [91, 50, 60]]], np.uint8))


def noise(h, w, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def grey(value, h=4, w=4):
    return np.full((h, w, 3), value, np.uint8)


def smooth(h, w, seed=0):
    """A picture with edges and flat places, and a distorted copy."""
    coarse = noise(max(h // 8, 2), max(w // 8, 2), seed)
    a = np.asarray(Image.fromarray(coarse).resize((w, h), Image.Resampling.NEAREST))
    b = np.clip(a + np.random.default_rng(seed + 1).normal(0, 12, a.shape), 0, 255).astype(np.uint8)
    return a, b


####################################################################################################
# Pixels
####################################################################################################


def test_l1_and_l2_vector():
    """L2 has no root (.1)."""
    a, b = V1
    got = measure(["l1", "l2", "l1_source", "psnr"], Towers(), result=a, target=b, source=a)
    assert got == pytest.approx({"l1": 0.05, "l2": 0.01, "l1_source": 0.0, "psnr": 20.0})
    x, y = noise(37, 23), noise(37, 23, 1)
    f, g = x / 255, y / 255
    got = measure(["l1", "l2"], Towers(), result=x, target=y)
    assert got["l1"] == pytest.approx(np.abs(f - g).mean(), rel=1e-12)
    assert got["l2"] == pytest.approx(((f - g) ** 2).mean(), rel=1e-12)


def test_resizing_vector():
    """Pillow's bicubic, antialiased, in 8 bits for L1; the same in float, cut to 0..255, for FID."""
    row = np.array([0, 0, 0, 255, 255, 0, 0, 255], np.uint8)
    x = np.repeat(np.repeat(row[None, :, None], 8, 0), 3, 2)
    small = measures.resized(x, np.empty((4, 4)))
    assert small[:, :, 1].tolist() == [[0, 138, 129, 106]] * 4
    clean = measures.clean_resized(x, 4)
    assert clean.dtype == np.float32
    assert np.allclose(clean[2, :, 0], [0, 137.8378, 128.9768, 105.6276], atol=1e-3)  # 0 was -12.8
    peer = F.interpolate(torch.from_numpy(x).permute(2, 0, 1)[None].double(), (4, 4), mode="bicubic",
                         antialias=True)
    assert np.allclose(clean[..., 0], peer[0, 0].clamp(0, 255), atol=1e-3)
    assert measures.resized(x, x) is x


def test_result_is_resized_to_what_it_is_held_against():
    big, small = noise(40, 60), noise(20, 30, 1)
    got = measure(["l1", "l1_source"], Towers(), result=big, target=small, source=big)
    resized = np.asarray(Image.fromarray(big).resize((30, 20)))  # MagicBrush's call
    assert got["l1"] == pytest.approx(np.abs(resized / 255 - small / 255).mean())
    assert got["l1_source"] == 0


def test_psnr_outside_of_a_mask():
    """PIE-Bench's divides by all pixels: 23.01 where the kept pixels alone have 20."""
    a = np.full((4, 4, 3), 0.5)
    b, mask = a.copy(), np.zeros((4, 4), bool)
    mask[2:] = True
    b[:2] += 0.1
    b[2:] += 0.3
    keep = (~mask)[..., None]
    assert measures.error(a * keep, b * keep, 2) == pytest.approx(0.005)
    assert measures.decibels(0.005) == pytest.approx(23.0103, abs=1e-4)
    assert measures.decibels(measures.error(a, b, 2, ~mask)) == pytest.approx(20.0)
    assert measures.decibels(measures.error(a, b, 2)) == pytest.approx(13.0103, abs=1e-4)
    assert np.mean([measures.decibels(x) for x in (0.01, 0.0001)]) == pytest.approx(30.0)

    source, result = grey(100), grey(100)  # the same by name, in 8 bits
    result[:2] += 51
    result[2:] += 102
    names = ["psnr_unedited", "l2_unedited", "psnr_outside", "psnr_inside_source", "l1_inside_source",
             "l1_outside", "l2_outside", "l2_inside_source"]
    got = measure(names, Towers(), result=result, source=source, mask=mask)
    assert got == pytest.approx({
        "psnr_unedited": -10 * math.log10(0.02), "l2_unedited": 0.02, "psnr_outside": -10 * math.log10(0.04),
        "psnr_inside_source": -10 * math.log10(0.16), "l1_inside_source": 0.4, "l1_outside": 0.2,
        "l2_outside": 0.04, "l2_inside_source": 0.16})
    got = measure(["l1_inside", "l1_outside_target"], Towers(), result=result, target=source, mask=mask)
    assert got == pytest.approx({"l1_inside": 0.4, "l1_outside_target": 0.2})


def test_what_is_not_defined_is_not_a_number():
    a, b = noise(8, 8), noise(8, 8, 1)
    every, none = np.ones((8, 8), bool), np.zeros((8, 8), bool)
    outside = ["psnr_unedited", "l2_unedited", "ssim_unedited", "psnr_outside", "l1_outside", "l2_outside"]
    inside = ["psnr_inside_source", "l1_inside_source", "l2_inside_source"]
    for mask, undefined in ((every, outside), (none, inside)):
        got = measure(outside + inside, Towers(), result=a, source=b, mask=mask)
        assert [k for k, v in got.items() if math.isnan(v)] == undefined
    assert measure(["psnr"], Towers(), result=a, target=a) == {"psnr": math.inf}


def square():
    i, j = np.mgrid[:16, :16]
    a = (16 * i + j) / 255
    b = a.copy()
    b[4:8, 4:8] = 0
    return a, b


def test_ssim_vector():
    a, b = (np.repeat(x[..., None], 3, 2) for x in square())
    assert measures.ssim(a, b) == pytest.approx(0.833228, abs=1e-6)
    assert measures.ssim(a, b, border=5) == pytest.approx(0.578552, abs=1e-6)  # torchmetrics < 1.4.2


def plain_ssim(a, b, border=0):
    """By the definition: a dense window at each pixel, in float64, of channels apart."""
    k = np.exp(-((np.arange(-5, 6) / 1.5) ** 2) / 2)
    window = np.outer(k, k) / k.sum() ** 2
    maps = []
    for x, y in zip(np.moveaxis(a / 255, 2, 0), np.moveaxis(b / 255, 2, 0)):
        x, y = np.pad(x, 5, "reflect"), np.pad(y, 5, "reflect")
        x, y = (np.lib.stride_tricks.sliding_window_view(v, (11, 11)) for v in (x, y))

        def mean(v):
            return (v * window).sum((2, 3))

        mx, my = mean(x), mean(y)
        vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
        maps.append((2 * mx * my + 1e-4) * (2 * cov + 9e-4)
                    / ((mx * mx + my * my + 1e-4) * (vx + vy + 9e-4)))
    maps = np.stack(maps)
    return maps[:, border:maps.shape[1] - border, border:maps.shape[2] - border].mean()


@pytest.mark.parametrize("size", [(6, 7), (64, 48), (33, 90)])
def test_ssim_equals_the_definition(size):
    a, b = smooth(*size)
    assert measures.ssim(a, b) == pytest.approx(plain_ssim(a, b), abs=1e-6)
    assert measures.ssim(a, a) == 1.0
    white = np.full_like(a, 255)  # bright and flat: the digits of variances are lost first here
    assert measures.ssim(white, white - 1) == pytest.approx(plain_ssim(white, white - 1), abs=1e-5)
    keep = np.zeros(size, bool)
    keep[1:4] = True
    got = measure(["ssim", "ssim_unedited"], Towers(), result=a, source=b, target=b, mask=~keep)
    assert got["ssim"] == measures.ssim(a, b)
    expected = plain_ssim(a * keep[..., None], b * keep[..., None])
    assert got["ssim_unedited"] == pytest.approx(expected, abs=1e-5)


def test_ssim_and_psnr_equal_torchmetrics():
    tm = pytest.importorskip("torchmetrics.functional.image")
    a, b = smooth(70, 50)
    x, y = (torch.from_numpy(v).permute(2, 0, 1)[None].double() / 255 for v in (a, b))
    expected = tm.structural_similarity_index_measure(x, y, data_range=1.0)
    assert measures.ssim(a, b) == pytest.approx(expected.item(), abs=1e-6)
    got = measure(["psnr"], Towers(), result=a, target=b)["psnr"]
    assert got == pytest.approx(tm.peak_signal_noise_ratio(x, y, data_range=1.0).item(), rel=1e-6)


def test_ssim_equals_scikit_image():
    """Which leaves the border out."""
    sk = pytest.importorskip("skimage.metrics")
    a, b = smooth(70, 50)
    expected = sk.structural_similarity(a, b, channel_axis=2, data_range=255, gaussian_weights=True,
                                        sigma=1.5, use_sample_covariance=False)
    assert measures.ssim(a, b, border=5) == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_a_thousand_pairs_in_a_minute():
    """L1, L2, PSNR and SSIM of 1,000 pairs of 512x512 pixels: at most 60 s on two cores, 120 s of both."""
    pairs = [smooth(512, 512, seed) for seed in range(3)]
    names = ["l1", "l2", "psnr", "ssim"]
    measure(names, Towers(), result=pairs[0][0], target=pairs[0][1])
    before = time.process_time()
    for a, b in 4 * pairs:
        measure(names, Towers(), result=a, target=b)
    each = (time.process_time() - before) / 12
    print(f"{1000 * each:.1f} ms of a core for each pair")
    assert each < 0.12


####################################################################################################
# Sets
####################################################################################################


def test_frechet_closed_forms():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(300, 6)) @ rng.normal(size=(6, 6))
    b = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6)) + 1
    shift = np.arange(6.0)
    assert log.frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert log.frechet(a, a + shift) == pytest.approx((shift**2).sum())
    (m, c), (mb, cb) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    assert log.frechet(a, 3 * a) == pytest.approx(4 * (m @ m) + 4 * np.trace(c))  # (1 - 3)^2 tr C
    general = ((m - mb) ** 2).sum() + np.trace(c + cb) - 2 * np.sqrt(np.linalg.eigvals(c @ cb).real).sum()
    assert log.frechet(a, b) == pytest.approx(general) == pytest.approx(log.frechet(b, a))


def test_fid_vector():
    """One dimension: covariances over n - 1 (over n it would be 1.171573)."""
    a, b = np.array([[0.0], [2]]), np.array([[1.0], [1], [4]])
    assert measures.fid(a, b) == pytest.approx(1.101021, abs=1e-6)


def test_fid_of_fewer_pictures_than_features():
    """Singular covariances: against the matrix root of clean-fid, by eigenvalues of the product."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(9, 30)), rng.normal(size=(7, 30)) + 0.3
    (m, c), (mb, cb) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    root = np.sqrt(np.linalg.eigvals(c @ cb).astype(complex)).real.sum()
    expected = ((m - mb) ** 2).sum() + np.trace(c) + np.trace(cb) - 2 * root
    assert measures.fid(a, b) == pytest.approx(expected, rel=1e-5)
    assert measures.fid(a, a) == pytest.approx(0, abs=1e-12)


def test_kid_vector():
    a, b = np.array([[0.0, 0], [1, 0], [0, 2]]), np.array([[1.0, 1], [2, 0], [0, 1]])
    assert measures.kid(a, b) == pytest.approx(-2.069444, abs=1e-6)  # unbiased; with the diagonal 3.972222
    assert np.allclose(measures.kid_subsets(a, b, 5), -2.069444, atol=1e-6)  # each subset is all of it


def test_kid_subsets_are_seeded_and_unbiased():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(60, 4)), rng.normal(size=(50, 4)) + 0.5
    one, again, other = (measures.kid_subsets(a, b, 20, 30, seed) for seed in (0, 0, 1))
    assert one.tolist() == again.tolist() != other.tolist() and one.std() > 0
    whole = measures.kid(a, b[:50], 1, 10**6)

    def plain(x, y):
        k = lambda u, v: (u @ v / 4 + 1) ** 3  # noqa: E731
        n = len(x)
        off = sum(k(x[i], x[j]) + k(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
        return off - 2 * np.mean([[k(u, v) for v in y] for u in x])

    rows = np.random.default_rng(0)
    x, y = (s[rows.choice(len(s), 50, replace=False)] for s in (a, b))
    assert whole == pytest.approx(plain(x, y))


def test_sets_equal_clean_fid():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(60, 4)), rng.normal(size=(50, 4)) + 0.5
    clean = pytest.importorskip("cleanfid.fid")
    assert measures.kid(a[:50], b, 1, 50) == pytest.approx(clean.kernel_distance(a[:50], b, 1, 50))
    assert measures.fid(a, b) == pytest.approx(clean.fid_from_feats(a, b))
    x = smooth(123, 77)[0]  # whose edges overshoot
    assert np.array_equal(measures.clean_resized(x), clean.build_resizer("clean")(x))


####################################################################################################
# Vectors of embeddings
####################################################################################################


def unit(*v):
    return F.normalize(torch.tensor([v], dtype=torch.float64), dim=-1)


def test_direction_vector():
    """Unit length before the difference; raw features would give .774597."""
    source, edited, before, after = unit(3, 4, 0), unit(1, 2, 2), unit(1, 0, 0), unit(0, 0, 2)
    assert rewards.direction(source, edited, before, after).item() == pytest.approx(0.903696, abs=1e-6)
    assert (source @ edited.T).item() == pytest.approx(0.733333, abs=1e-6)
    assert (edited @ after.T).item() == pytest.approx(0.666667, abs=1e-6)
    assert rewards.direction(source, edited, after, after).isnan().all()  # F.cosine_similarity says 0
    assert rewards.direction(source, source, before, after).item() == 0  # nothing was done: a bad edit


def test_structure_vector():
    """Values of 0 to 255 enter (556.834, not .074065)."""
    red = measures.structure_prepared(np.full((224, 224, 3), 128, np.uint8), "cpu")
    assert red[0, 0, 5, 5].item() == pytest.approx(556.834, abs=1e-3)
    a, b = torch.tensor([[1.0, 0], [0, 1], [1, 1]]), torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    assert measures.structure_distance(a, b) == pytest.approx(0.444444, abs=1e-6)
    assert measures.structure_distance(a, 3 * a) == pytest.approx(0, abs=1e-12)
    assert measures.structure_distance(torch.zeros(3, 2), a) == pytest.approx(
        (3 + 4 * 0.5) / 9, abs=1e-6)  # no length: cosines 0
    shapes = {(512, 512): (224, 224), (512, 768): (224, 336), (900, 300): (480, 160)}
    for size, expected in shapes.items():
        got = measures.structure_prepared(np.zeros((*size, 3), np.uint8), "cpu").shape[-2:]
        assert tuple(got) == expected


def test_lpips_vector():
    """One layer of two channels and two places; a place without features is zeros, not not-a-number."""
    a, b = torch.tensor([[[[3.0, 0]], [[0, 4]]]]), torch.tensor([[[[0.0, 3]], [[0, 4]]]])
    assert perceptual.lpips_layer(a, b, torch.tensor([1, 0.5])).item() == pytest.approx(0.69, abs=1e-6)
    shift, scale = perceptual.LPIPS_SHIFT[0], perceptual.LPIPS_SCALE[0]
    assert (2 * 0.5 - 1 - shift) / scale == pytest.approx(0.065502, abs=1e-6)


def test_crops_of_the_tables():
    """640x480: CLIP's columns 37..260 of 298, DINO's 58..281 of 341 and rows 16..239; HPSv2's 768x512."""
    assert towers.placed(towers.CLIP_PREP, 480, 640) == (224, 298, 0, 37)
    assert towers.placed(towers.DINO_PREP, 480, 640) == (256, 341, 16, 58)
    assert towers.placed(towers.HPS_PREP, 512, 768) == (149, 224, -37, 0)


####################################################################################################
# Names and errors
####################################################################################################

ASKED = ("l1 l2 psnr ssim lpips clip_i clip_t clip_score clip_dir clip_out dino structure blip_itc blip_itm "
         "image_reward pick_score hps_v2 fid clip_fid kid psnr_unedited ssim_unedited l2_unedited "
         "lpips_unedited clip_edited l1_inside l1_outside l2_inside l2_outside psnr_inside psnr_outside "
         "l1_source l2_source clip_i_source dino_source").split()


def test_names_are_there_with_one_line_each():
    assert set(ASKED) <= set(measures.NAMES)
    assert all("\n" not in v and len(v) > 20 for v in measures.NAMES.values())
    assert len(set(measures.NAMES.values())) == len(measures.NAMES)  # no two names for one thing
    assert {m.tower for m in measures.MEASURES.values()} - {None} == set(measures.WANTED)
    assert set(measures.WANTED) == set(measures.OPENERS) <= set(Towers().__dict__)


def test_what_is_described():
    got = measures.describe(["l1", "ssim", "psnr_unedited", "l1_outside"], Towers())
    keys = {"definition", "backbone", "weights", "preprocessing", "against", "range"}
    assert all(v.keys() == keys and all(v.values()) for v in got.values())
    assert [v["against"] for v in got.values()] == ["target", "target", "source", "source"]
    assert got["l1"]["backbone"] == got["l1"]["weights"] == "none"
    assert "Pillow" in got["l1"]["preprocessing"] and "lower is better" in got["l1"]["range"]


def one_line(match, names, **row):
    with pytest.raises(ValueError, match=match) as e:
        measure(names, Towers(), **{"result": noise(8, 8), **row})
    assert "\n" not in str(e.value)


def test_errors_are_one_line():
    a, mask = noise(8, 8), np.zeros((8, 8), bool)
    one_line("'fidd' is no measure: use names of l1, ", ["fidd"])
    for name, m in measures.MEASURES.items():  # a missing network is named by its flag, for every measure
        if m.tower:
            one_line(f"^--{m.tower}: {name} needs it: give ", [name])
    one_line("l1: needs target", ["l1"], source=a)
    one_line("psnr_unedited: needs mask", ["psnr_unedited"], source=a)
    one_line("psnr_unedited: needs source and mask", ["psnr_unedited"])
    one_line(r"result: float64 \[8, 8, 3\]: give uint8", ["l1"], result=a / 255, target=a)
    one_line(r"target: uint8 \[8, 8\]: give uint8", ["l1"], target=a[..., 0])
    one_line(r"result: uint8 \[3, 8, 8\]: give uint8", ["l1"], result=a.transpose(2, 0, 1), target=a)
    one_line(r"mask: uint8 \[8, 8\]: give bool", ["l1_outside"], source=a, mask=mask.astype(np.uint8))
    one_line("mask: 8x8 pixels, but the source has 6x9", ["l1_outside"], source=noise(9, 6), mask=mask)
    one_line("ssim: pictures of 9x5 pixels: both sides need at least 6", ["ssim"], target=noise(5, 9))
    sets = Towers(inception=torch.nn.Identity())
    with pytest.raises(ValueError, match="fid is of sets of pictures: use features_of_set"):
        measure(["fid"], sets, result=a)
    with pytest.raises(ValueError, match="l1 is of single pictures: use measure"):
        measures.features_of_set("l1", [a], sets)
    with pytest.raises(ValueError, match="fid: no pictures"):
        measures.features_of_set("fid", [], sets)
    with pytest.raises(ValueError, match=r"fid: features \[1, 4\] and \[5, 4\]: both sets need at least 2"):
        measures.fid(np.ones((1, 4)), np.ones((5, 4)))
    with pytest.raises(ValueError, match="kid: 0 subsets of 5: use"):
        measures.kid(np.ones((3, 4)), np.ones((5, 4)), 0, 5)


def test_no_feature_of_ours_has_a_published_name():
    """Without files every measure that looks with a network is refused; nothing stands in for it."""
    for name, m in measures.MEASURES.items():
        if m.tower:
            with pytest.raises(ValueError):
                measures.describe([name], measures.open_towers())
