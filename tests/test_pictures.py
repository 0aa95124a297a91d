"""Pictures as people have them: colour profiles, modes, formats, animations, turned photos, odd names."""

import io
import itertools
import json
import os
import struct
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inprocess import run_script
from PIL import Image, features

from readers import files
from readers.edits import open_edits
from readers.files import BadFile, image_size, read_image, read_mask
from readers.pictures import open_source

ROOT = Path(__file__).resolve().parent.parent
ODD = ROOT.parent / "shared" / "data" / "odd"
odd = pytest.mark.skipif(not ODD.is_dir(), reason="needs shared/data/odd")
D50 = (0.9642, 1.0, 0.8249)
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
SRGB_XY, P3_XY = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06)), ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06))
ADOBE_XY = (0.64, 0.33), (0.21, 0.71), (0.15, 0.06)


def saved(im, kind="PNG", **kw):
    out = io.BytesIO()
    im.save(out, kind, **kw)
    return out.getvalue()


def noise(h=24, w=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)


# profiles and their values, worked out without LittleCMS


def to_d50(xy, white=(0.3127, 0.3290)):
    """Matrix from linear RGB of these primaries to XYZ at D50 (Bradford), as ICC profiles hold it."""
    xyz = np.array([[x / y, 1, (1 - x - y) / y] for x, y in (*xy, white)]).T
    m = xyz[:, :3] * np.linalg.solve(xyz[:, :3], xyz[:, 3])
    scale = (BRADFORD @ D50) / (BRADFORD @ xyz[:, 3])
    return np.linalg.inv(BRADFORD) @ (scale[:, None] * (BRADFORD @ m))


def encoded(linear):
    """Linear light -> 8 bits of sRGB (IEC 61966-2-1)."""
    v = np.clip(linear, 0, 1)
    return np.where(v <= 0.0031308, 12.92 * v, 1.055 * v ** (1 / 2.4) - 0.055) * 255


def profile(space, tags, pcs=b"XYZ "):
    """An ICC profile of version 2 with these tags."""
    at, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, value in tags.items():
        table += name + struct.pack(">II", at + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    head = struct.pack(">I4sI4s4s4s", at + len(body), bytes(4), 0x02400000, kind, space, pcs)
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">iii", *fixed(D50)) + bytes(48)
    return head + struct.pack(">I", len(tags)) + table + body


def fixed(values):
    return [round(v * 65536) for v in values]


def xyz(values):
    return b"XYZ " + bytes(4) + struct.pack(">iii", *fixed(values))


def gamma(g):
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(g * 256)) + bytes(2)


def described(text):
    return b"desc" + bytes(4) + struct.pack(">I", len(text) + 1) + text + bytes(1 + 11 + 67)


def matrix_profile(xy, g, name):
    m = to_d50(xy)
    columns = {c + b"XYZ": xyz(m[:, i]) for i, c in enumerate((b"r", b"g", b"b"))}
    curves = {c + b"TRC": gamma(g) for c in (b"r", b"g", b"b")}
    return profile(b"RGB ", {b"desc": described(name), b"wtpt": xyz(D50)} | columns | curves)


def through(rgb, xy, g):
    """uint8 of an RGB space -> 8 bits of sRGB."""
    linear = (rgb / 255.0) ** g @ (np.linalg.inv(to_d50(SRGB_XY)) @ to_d50(xy)).T
    return encoded(linear)


INKS = {(c, m, y, k): (100 * (1 - k) * (1 - 0.4 * c - 0.3 * m - 0.1 * y), 40.0 * (m - c) * (1 - k),
                       30.0 * (y - (c + m) / 2) * (1 - k))
        for c, m, y, k in itertools.product((0, 1), repeat=4)}


def cmyk_profile():
    """A printer of 16 known colours, INKS (L, a, b), linear in between."""
    labs = np.array([*INKS.values()]) * (2.55, 1, 1) + (0, 128, 128)
    grid = np.clip(np.round(labs), 0, 255).astype(np.uint8).tobytes()
    ramp = bytes(range(256))
    lut = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + struct.pack(">9i", *fixed(np.eye(3).ravel()))
    lut += ramp * 4 + grid + ramp * 3
    return profile(b"CMYK", {b"desc": described(b"Sixteen inks"), b"wtpt": xyz(D50), b"A2B0": lut}, b"Lab ")


def lab_to_srgb(lab):
    fy = (lab[0] + 16) / 116
    f = np.array([fy + lab[1] / 500, fy, fy - lab[2] / 200])
    xyz = np.where(f > 6 / 29, f**3, (f - 4 / 29) * 3 * (6 / 29) ** 2) * D50
    return encoded(np.linalg.inv(to_d50(SRGB_XY)) @ xyz)


@odd
def test_display_p3_comes_in_as_srgb():
    right = np.asarray(Image.open(ODD / "p3_as_srgb.png"))
    assert np.abs(read_image(ODD / "p3.png").astype(int) - right).max() <= 1
    assert np.array_equal(read_image(ODD / "p3_as_srgb.png"), right)  # is sRGB: not a byte changes


@pytest.mark.parametrize("xy, g, name", [(P3_XY, 2.2, b"P3 of 2.2"),
                                         (ADOBE_XY, 2.19921875, b"Adobe RGB (1998)")])
def test_rgb_profiles_give_the_values_of_the_matrices(xy, g, name):
    rgb, icc, lines = noise(), matrix_profile(xy, g, name), []
    out = read_image(saved(Image.fromarray(rgb), icc_profile=icc), "x.png", log=lines.append)
    assert np.abs(out - through(rgb, xy, g)).max() <= 2 and np.abs(out - through(rgb, xy, g)).mean() < 0.5
    assert lines == [f"x.png: converted from {name.decode()} to sRGB"]
    assert np.abs(out.astype(int) - rgb).max() > 20
    alpha = np.dstack([rgb, np.full((24, 32), 77, np.uint8)])
    both = read_image(saved(Image.fromarray(alpha), icc_profile=icc), alpha=True)
    assert np.array_equal(both[..., :3], out) and (both[..., 3] == 77).all()
    palette = Image.fromarray(rgb).quantize(16)
    out = read_image(saved(palette, icc_profile=icc))
    assert np.abs(out - through(np.asarray(palette.convert("RGB")), xy, g)).max() <= 2


def test_grey_profiles():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    linear = profile(b"GRAY", {b"desc": described(b"Linear grey"), b"wtpt": xyz(D50), b"kTRC": gamma(1)})
    out = read_image(saved(Image.fromarray(ramp), icc_profile=linear))
    assert np.abs(out - encoded(ramp / 255.0)[..., None]).max() <= 1.5 and out[0, 8, 0] > 40
    grey = np.dstack([ramp, np.full_like(ramp, 9)])
    both = read_image(saved(Image.fromarray(grey, "LA"), icc_profile=linear), alpha=True)
    assert np.array_equal(both[..., :3], out) and (both[..., 3] == 9).all()
    deep = Image.fromarray(ramp.astype(np.uint16) * 257)
    assert np.array_equal(read_image(saved(deep, icc_profile=linear)), out)
    kept = read_image(saved(Image.fromarray(ramp), icc_profile=matrix_profile(SRGB_XY, 1.0, b"Linear RGB")))
    assert np.abs(kept.astype(int) - out).max() <= 1  # a grey copy of a colour picture keeps its profile


def test_cmyk_by_its_own_profile_and_without_one():
    icc = cmyk_profile()
    for ink, lab in INKS.items():
        im = Image.new("CMYK", (8, 8), tuple(255 * i for i in ink))
        for kind in ("TIFF", "JPEG"):
            raw = saved(im, kind, icc_profile=icc, **{"quality": 100} if kind == "JPEG" else {})
            assert np.abs(read_image(raw)[4, 4] - lab_to_srgb(lab)).max() <= 3, (ink, kind)
    c, m, y, k = 200, 100, 30, 50
    out = read_image(saved(Image.new("CMYK", (8, 8), (c, m, y, k)), "TIFF"))
    assert np.abs(out[4, 4] - [(255 - v) * (255 - k) / 255 for v in (c, m, y)]).max() <= 1


def test_ycck_jpeg():
    """As Photoshop writes it, which stores 255 - ink: YCC of 255 - (255 - C), ..., then 255 - K."""
    stored = 180, 110, 150, 200  # Y, Cb, Cr, K
    raw = saved(Image.new("CMYK", (16, 16), tuple(255 - v for v in stored)), "JPEG", quality=100)
    at = raw.index(b"Adobe")
    raw = raw[:at + 11] + b"\2" + raw[at + 12:]  # transform 0 -> 2, YCCK
    y, cb, cr, k = stored
    cb, cr = cb - 128, cr - 128
    inks = np.array([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb])
    assert np.abs(read_image(raw)[8, 8] - (255 - inks) * k / 255).max() <= 2


def test_float_and_deep_pictures(tmp_path):
    v = np.linspace(-0.2, 1.3, 64, dtype=np.float32).reshape(8, 8)
    out = read_image(saved(Image.fromarray(v), "TIFF"))
    assert np.array_equal(out[..., 1], (np.clip(v, 0, 1) * 255 + 0.5).astype(np.uint8))
    for bad in (v * 200, np.full_like(v, np.nan)):
        with pytest.raises(BadFile, match="float pixels from"):
            read_image(saved(Image.fromarray(bad), "TIFF"))
    with pytest.raises(BadFile, match="32-bit integer"):
        read_image(saved(Image.fromarray(np.ones((8, 8), np.int32)), "TIFF"))
    deep = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for kind in ("TIFF", "PNG"):
        assert np.array_equal(read_image(saved(Image.fromarray(deep), kind))[..., 0], np.round(deep / 257))
    assert np.allclose(read_mask(saved(Image.fromarray(np.clip(v, 0, 1)), "TIFF")), np.clip(v, 0, 1))


def test_damaged_and_foreign_profiles_are_ignored_and_said(capsys):
    rgb, lines = noise(), []
    for icc, words in ((b"nonsense" * 30, "damaged"), (cmyk_profile(), "CMYK colour profile Sixteen inks")):
        raw = saved(Image.fromarray(rgb), icc_profile=icc)
        assert np.array_equal(read_image(raw, "x.png", log=lines.append), rgb) and words in lines[-1]
    files.say_once.__defaults__[0].clear()
    for _ in range(2):
        read_image(raw, "x.png")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "ignored" in said


# formats


def formats():
    kinds = {"a.jfif": "JPEG", "b.tif": "TIFF", "c.tiff": "TIFF", "d.gif": "GIF", "e.bmp": "BMP",
             "f.webp": "WEBP", "g.PNG": "PNG", "h.jpe": "JPEG", "i.jp2": "JPEG2000", "j.tga": "TGA",
             "k.ppm": "PPM", "l": "PNG", "m.dat": "WEBP"}
    return kinds | ({"n.avif": "AVIF"} if features.check("avif") else {})


def test_every_format_is_taken_and_the_rest_is_counted(tmp_path, capsys):
    im = Image.fromarray(noise(48, 64)).resize((64, 48), 2)
    for name, kind in formats().items():
        im.save(tmp_path / name, kind)
    (tmp_path / "a.txt").write_text("a caption")
    heic, psd = b"\0\0\0\x20ftypheic" + bytes(40), b"8BPS" + bytes(60)
    for name in ("x.heic", "y.heic", "z.heic", "p.psd", "q.psd"):
        if "HEIF" not in files.BY_CONTENT or name.endswith("psd"):
            (tmp_path / name).write_bytes(heic if name.endswith("heic") else psd)
    source = open_source(str(tmp_path), "all")
    assert len(source) == len(formats())
    for i in range(len(source)):
        assert source.size(i) == (48, 64) and source.load(i, 48, 64)["image"].shape == (48, 64, 3)
    heic = "5 files skipped: 3 .heic (install pillow-heif), "
    heic = "2 files skipped: " if "HEIF" in files.BY_CONTENT else heic
    assert f"{heic}2 .psd" in capsys.readouterr().err


@odd
def test_check_of_the_odd_files(tmp_path):
    done = run_script(ROOT / "data.py", "check", ODD, "--out", tmp_path / "sheet.png", "--image-size", 64)
    assert done.returncode == 0, done.stderr
    assert "9 pictures, 9 looked at, 0 cannot be used" in done.stdout
    assert "3 animated" in done.stdout and "1 with alpha" in done.stdout


def test_a_rare_decoder_runs_on_files_of_its_name_alone(tmp_path):
    im = Image.fromarray(noise())
    for kind, suffix in (("JPEG2000", ".jp2"), ("TGA", ".tga"), ("PPM", ".ppm")):
        raw = saved(im, kind)
        (tmp_path / f"x{suffix}").write_bytes(raw)
        (tmp_path / "x.jpg").write_bytes(raw)
        assert read_image(tmp_path / f"x{suffix}").shape == (24, 32, 3)
        with pytest.raises(BadFile, match="rename it to .*" + suffix if kind != "TGA" else "not a readable"):
            read_image(tmp_path / "x.jpg")
        with pytest.raises(BadFile):
            read_image(raw, "x.parquet row 3")
    heic = b"\0\0\0\x20ftypheic" + bytes(40)
    for name, raw, words in (("x.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n", "EPS inside, which starts"),
                             ("x.jpg", b"8BPS\0\1" + bytes(40), "PSD inside, which is layers"),
                             ("y.jpg", heic, "HEIF inside: install pillow-heif")):
        (tmp_path / name).write_bytes(raw)
        if "HEIF" not in words or "HEIF" not in files.BY_CONTENT:
            with pytest.raises(BadFile, match=words):
                read_image(tmp_path / name)
    (tmp_path / "really.jpg").write_bytes(saved(im, "PNG"))
    assert np.array_equal(read_image(tmp_path / "really.jpg"), np.asarray(im))


@pytest.mark.skipif("HEIF" not in files.BY_CONTENT, reason="needs pillow-heif")
def test_heic(tmp_path):
    im = Image.fromarray(noise(6, 8)).resize((64, 48), 2)
    im.save(tmp_path / "x.heic", quality=95)
    (tmp_path / "x.jpg").write_bytes((tmp_path / "x.heic").read_bytes())
    for name in ("x.heic", "x.jpg"):
        assert np.abs(read_image(tmp_path / name).astype(int) - np.asarray(im)).mean() < 12


def test_bombs_and_odd_exif_are_not_on_the_screen(recwarn, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head = b"GIF89a" + struct.pack("<HH", 12_000, 9_000) + bytes(3)  # 108 million pixels: Pillow warns
        for name in ("x.gif", "x.jpg"):
            (tmp_path / name).write_bytes(head + b"," + bytes(40))
            with pytest.raises(BadFile, match="12000x9000 is over 64,000,000 pixels"):
                read_image(tmp_path / name)
        raw = saved(Image.fromarray(noise()), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09" + b"\xff" * 20)
        assert read_image(raw).shape == (24, 32, 3)


# animations, alpha


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_is_its_first_frame_with_a_line(kind, capsys):
    frames = [Image.new("RGB", (32, 24), c) for c in ((250, 0, 0), (0, 0, 250))]
    raw, lines = saved(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True), []
    out = read_image(raw, "x", log=lines.append)
    assert (np.abs(out.astype(int) - [250, 0, 0]) <= 2).all() and lines == ["x: 2 frames: the first is used"]
    files.say_once.__defaults__[0].clear()
    read_image(raw, "x"), read_image(raw, "x")
    said = "note: x: 2 frames: the first is used (of further ones nothing is said)\n"
    assert capsys.readouterr().err == said


def test_alpha_comes_apart():
    rgba = np.dstack([noise(), (np.arange(24 * 32) // 3).astype(np.uint8).reshape(24, 32)])
    for kind in ("PNG", "TIFF", "WEBP"):
        raw = saved(Image.fromarray(rgba), kind, lossless=True, exact=True)
        assert np.array_equal(read_image(raw, alpha=True), rgba), kind
        a = rgba[..., 3:] / 255
        assert np.abs(read_image(raw) - (rgba[..., :3] * a + 255 * (1 - a))).max() <= 1
    opaque = Image.fromarray(rgba[..., :3])
    assert read_image(saved(opaque), alpha=True).shape == (24, 32, 3)


# photos that EXIF turns, and their masks

SHOWN = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
         5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1),
         7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
         8: lambda a: np.rot90(a)}


def turned(array, turn, kind="PNG"):
    exif = Image.Exif()
    exif[0x0112] = turn
    return saved(Image.fromarray(np.ascontiguousarray(array)), kind, exif=exif)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_every_orientation(kind):
    a = noise(24, 32)
    for turn, shown in SHOWN.items():
        raw = turned(a, turn, kind) if kind != "WEBP" else turned(a // 128 * 128, turn, kind)
        assert image_size(raw) == read_image(raw).shape[:2] == shown(a).shape[:2], turn
        if kind != "WEBP":
            assert np.array_equal(read_image(raw), shown(a)), turn


@pytest.mark.parametrize("turn", SHOWN)
def test_masks_and_label_maps_of_stored_pixels_are_turned_with_their_photo(tmp_path, turn, capsys):
    """The object is the red part of the photo; wherever the mask comes in, it is on the red part."""
    photo, mask = np.zeros((24, 40, 3), np.uint8), np.zeros((24, 40), np.uint8)
    photo[2:9, 5:30, 0] = mask[2:9, 5:30] = 255
    (tmp_path / "x.png").write_bytes(turned(photo, turn))
    Image.fromarray(mask).save(tmp_path / "m.png")
    Image.fromarray(mask // 255).save(tmp_path / "x.seg.png")
    (tmp_path / "own.png").write_bytes(turned(mask, turn))  # says itself how it is turned
    Image.fromarray(np.ascontiguousarray(SHOWN[turn](mask))).save(tmp_path / "shown.png")
    names = ["m.png", "own.png"] + ["shown.png"] * (turn >= 5)
    for name in names:
        for key in ("mask", "segments"):
            (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "x.png", key: name}))
            item = open_source(str(tmp_path), "all").load(0, 24, 40)
            assert np.array_equal(item["segments"] > 0, item["image"][..., 0] > 0), (name, key)
        row = {"source": "x.png", "edited": "x.png", "instruction": "go", "mask": name}
        (tmp_path / "e.jsonl").write_text(json.dumps(row))
        item = open_edits(str(tmp_path / "e.jsonl"), "all").load(0, 24, 40)
        assert np.array_equal(item["mask"] > 0, item["source"][..., 0] > 0), name
    Image.fromarray(mask[:, :24]).save(tmp_path / "m.png")  # another picture's: not stretched
    for key in ("mask", "segments"):
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "x.png", key: "m.png"}))
        with pytest.raises(BadFile, match="24x24, but its picture is"):
            open_source(str(tmp_path), "all").load(0, 24, 40)


# names

NAMES = {"NUL": "a\0b.png", "long": "x" * 5000 + ".png", "long part": "x" * 300 + ".png",
         "surrogate": "\ud800.png", "newline": "a\nb.png", "escape": "\x1b[31mred\x1b[0m.png", "number": 7,
         "empty": ""}


@pytest.mark.parametrize("name", NAMES)
def test_odd_names_in_rows_are_skipped_with_one_line(tmp_path, name, capfd):
    """In metadata, in edit pairs: named in one line without control characters, and counted."""
    Image.fromarray(noise()).save(tmp_path / "ok.png")
    rows = [{"file_name": "ok.png"}] * 12 + [{"file_name": NAMES[name]}]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    done = run_script(ROOT / "data.py", "check", tmp_path, "--out", tmp_path / "s.png", "--image-size", 16)
    said = done.stdout + done.stderr + "".join(capfd.readouterr())
    assert "1 cannot be used" in said or "1 bad metadata lines" in said, said
    (tmp_path / "metadata.jsonl").unlink()
    rows = [{"source": r["file_name"], "edited": "ok.png", "instruction": "go"} for r in rows]
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    flags = "--out", tmp_path / "s.png", "--image-size", 16
    done = run_script(ROOT / "data.py", "check", tmp_path / "e.jsonl", *flags)
    said += done.stdout + done.stderr + "".join(capfd.readouterr())
    assert "1 cannot be used" in done.stdout or "1 bad rows" in done.stdout, said
    assert said.isprintable() or not set(said) & set("\x1b\0\ud800"), said
    said.encode()


def test_names_that_are_not_utf8(tmp_path):
    for name in (b"caf\xe9.png", b"ok.png", b"esc\x1b[31m.png", b"new\nline.png"):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as f:
            f.write(saved(Image.fromarray(noise())) if name != b"caf\xe9.png" else b"cut")
    done = run_script(ROOT / "data.py", "check", tmp_path, "--out", tmp_path / "s.png", "--image-size", 16)
    assert done.returncode == 1 and "4 pictures, 4 looked at, 1 cannot be used" in done.stdout, done.stderr
    assert "caf\\udce9.png" in done.stdout and "\x1b" not in done.stdout + done.stderr


def test_two_columns_or_keys_of_one_name(tmp_path):
    picture = pa.array([saved(Image.fromarray(noise()))])
    pq.write_table(pa.table([picture, picture], names=["image", "image"]), tmp_path / "x.parquet")
    with pytest.raises(BadFile, match="2 columns named image"):
        open_source(str(tmp_path / "x.parquet"), "all")
    names, text = ["source_img", "target_img", "instruction", "mask_img", "img_id", "img_id"], pa.array(["x"])
    pq.write_table(pa.table([picture, picture, text, picture, text, text], names=names),
                   tmp_path / "e.parquet")
    with pytest.raises(BadFile, match="2 columns named img_id"):
        open_edits(f"magicbrush:{tmp_path / 'e.parquet'}", "all")
    Image.fromarray(noise()).save(tmp_path / "ok.png")
    ok = '{"file_name": "ok.png"}\n'
    (tmp_path / "metadata.jsonl").write_text(ok * 12 + '{"file_name": "a.png", "file_name": "ok.png"}\n')
    assert open_source(str(tmp_path), "all").bad_lines == 1
