"""Every command of README.md runs, in order, in a folder of links to this checkout, with small sizes."""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from inprocess import run_script
from PIL import Image
from test_benchmarks import MAKE, PLACES
from test_sd3 import imagereward, random_state, write_sd3
from test_text_encoders import small_tokenizers

import checkpoint
import model
from pretrained import towers

ROOT = Path(__file__).resolve().parents[1]
SMALL = {  # appended to a command: the last value of a flag wins
    "train_omni.py": "--steps 2 --batch_size 4 --warmup 1 --sample_every 0 --wandb off --image_size 32",
    "train_reward.py": "--steps 2 --batch_size 4 --wandb off --eval_pairs 8",
    "train_scorer.py": "--steps 2 --batch_size 4 --wandb off --eval_pairs 8 --workers 0",
    "train_pefl.py": "--phases 20/15/10x1,8/6/3x1 --batch_size 2 --sample_every 0 --wandb off "
                     "--image_size 32",
    "make_prefs.py": "--n 12 --captions 60 --steps 2",
    "evaluate.py scenes": "--n 4 --steps 2,2",
    "evaluate.py edits": "--n 2 --steps 1 --image_size 32",
    "evaluate.py t2i": "--n 2 --steps 1",
    "evaluate.py study": "",
    "evaluate.py bench": "--partial True --steps 1 --image_size 32",
    "evaluate.py report": "",
    "make_edits.py specialist": "--n 14 --tries 1 --steps 4 --image_size 32",
    "make_edits.py region": "--n 3 --tries 1 --steps 2 --image_size 32",
    "make_edits.py score": "",
    "make_edits.py refine": "--steps 1,1",
    "make_edits.py pack": "--min_score 0",
    "data.py check": "--limit 5",
    "make_pack.py": "--limit 5 --image_size 16 --heldout 2 --workers 1",
    "sample.py": "--steps 2 --size 32",
    "make_cache.py": "--image_size 32 --workers 0",
    "kernels/bench.py": "--shapes test --ms 1 --only eager,ours",
    "-m pretrained": "",
    "runs/claims.py": "",
    "runs/memory.py omni": "--image_size 32 --device cpu",
}
# in test_run_gpu.py, and in test_rating.py, which has raters
ELSEWHERE = ("python -m kernels.selftest", "python runs/bench_sd3.py", "python runs/gpu.py",
             "python evaluate.py study --answers")


def commands() -> list[str]:
    """Lines of the README's bash blocks, continued lines joined, comments dropped."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A folder that looks like the checkout; whatever a command writes stays in it."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in os.listdir(ROOT):
        if not name.startswith(".") and name != "out":
            (folder / name).symlink_to(ROOT / name)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (48, 40, 3), np.uint8)).save(folder / "photo.png")
    mask = np.zeros((48, 40), np.uint8)
    mask[10:30, 10:30] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return public_files(folder)


def public_files(folder: Path) -> Path:
    """What the README takes from elsewhere, random and small: SD3, tokenizers, rewards, pictures, pairs."""
    photos(folder / "photos")
    for name, place in PLACES.items():
        MAKE[name](folder / place)
    (folder / "others").mkdir()
    for name in ("1082", "673"):
        shutil.copy(folder / "photo.png", folder / f"others/{name}.png")
    rows = [{"source": f"photos/{i}.png", "edited": f"photos/{i + 3}.png", "instruction": "move it"}
            for i in range(20)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"caption": f"a picture {i}", "better": f"photos/{i}.png", "worse": f"photos/{i + 1}.png"}
             for i in range(0, 20, 2) for _ in range(2)]
    (folder / "prefs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    texts = [f"a {c} {s} on {b}" for c in ("red", "blue") for s in ("star", "box", "cross")
             for b in ("grass", "sand", "snow")]
    (folder / "prompts.txt").write_text("\n".join(texts))
    write_sd3(folder / "sd3.safetensors", small_tokenizers(folder / "words"))
    imagereward(folder)
    torch.save(random_state(towers.VGG16(), 9), folder / "vgg16.pth")
    return folder


def run(command: list[str], folder: Path, **env: str) -> str:
    if command[0] == sys.executable and command[1] != "-m":
        with contextlib.chdir(folder):
            done = run_script(*command[1:])
    else:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **env})
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done.stdout


def photos(folder: Path, n: int = 24) -> Path:
    rng = np.random.default_rng(1)
    folder.mkdir()
    for i in range(n):
        colour = ("red", "green", "blue")[i % 3]
        picture = rng.integers(0, 60, (40, 56, 3), np.uint8)
        picture[..., i % 3] += 150
        Image.fromarray(picture).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {colour} picture")
    return folder


@pytest.mark.slow
def test_commands(checkout):
    python = [c for c in commands() if c.startswith("python ") and not c.startswith(ELSEWHERE)]
    assert len(python) >= 10
    for command in python:
        words = shlex.split(command)
        small = SMALL[words[1] if words[1] in SMALL else " ".join(words[1:3])]
        run([sys.executable, *words[1:], *shlex.split(small)], checkout)


@pytest.mark.slow
def test_demo(checkout):
    """Every stage once; again, and only what is missing is made; other settings do not mix with the old."""
    command = [sys.executable, "runs/demo.py", "--fast", "True", "--out", "out/demo"]
    at = checkout / "out/demo"
    table = run(command, checkout)
    assert "PeFL, 8 steps" in table and "an object out of a hole" in table
    sizes = [Image.open(at / name).size for name in ("showcase.png", "judge/sheet.png")]
    assert min(min(size) for size in sizes) > 400
    logs = {p.name: p.stat().st_mtime_ns for p in at.glob("*.log")}
    names = ("showcase", "prefs", "aesthetic", "alignment", "pefl", "judge", "report")
    assert (at / "report.html").stat().st_size > 50_000
    assert logs.keys() == {f"{name}.log" for name in names}
    (at / "judge.done").unlink()
    assert run(command, checkout).splitlines()[:3] == table.splitlines()[:3]
    again = {p.name: p.stat().st_mtime_ns for p in at.glob("*.log")}
    assert {name for name in logs if again[name] != logs[name]} == {"judge.log", "report.log"}
    with contextlib.chdir(checkout):
        other = run_script("runs/demo.py", "--out", "out/demo", "--judged", "5")
    assert other.returncode != 0 and "error: --out: out/demo: was begun with other settings" in other.stderr


@pytest.mark.slow
def test_photos(checkout):
    small = {"STEPS": "2", "REWARD_STEPS": "2", "PEFL": "20/15/10x1", "N": "12"}
    run(["bash", "runs/photos.sh", "photos", "out/photos"], checkout, **small)
    assert list((checkout / "out/photos/pefl/images").glob("*.png"))


@pytest.mark.slow
def test_ship_editnet(checkout):
    """A shipped EditNet, trained in two stages, leaves its base's weights in assets/base, and loads whole."""
    run(["bash", "runs/editnet.sh", "ship"], checkout, STEPS="1 2", OUT="out/e", SHIP="out/edit", RANKS="1")
    tensors, manifest = checkpoint.load(checkout / "out/edit")
    stages = manifest["meta"]["provenance"]["stages"]
    assert [(s["steps"], s["seed"], s["warmup"]) for s in stages] == [(1, 0, 50), (2, 1, 20)]
    assert manifest["samples"] == 3 * 64
    stored = checkpoint.load_file(checkout / "out/edit/model.safetensors")
    assert not any(k.startswith("base.") for k in stored)
    net = model.build_editnet(manifest["arch"])
    checkpoint.load_state(net, tensors["model"], "shipped")
    base = checkpoint.load(checkout / "assets/base")[0]["model"]
    assert all(torch.equal(tensors["model"][f"base.{k}"], v) for k, v in base.items())
    run([sys.executable, "runs/ship.py", "out/edit", "bash y.sh", "out/edit", "out/e/ship2"], checkout)
    told = checkpoint.load(checkout / "out/edit")[1]
    assert told["samples"] == 5 * 64 and len(told["meta"]["provenance"]["stages"]) == 3
    assert told["meta"]["shared"] == manifest["meta"]["shared"]


def test_ship(checkout):
    """runs/ship.py: the last stage's averaged weights in bf16, and what was seen in all stages."""
    flags = ["--preset", "test", "--log_every", "1", *SMALL["train_omni.py"].split()]
    for stage in ("base", "inpaint"):
        run([sys.executable, "train_omni.py", "--stage", stage, "--out", f"out/s/{stage}", *flags], checkout)
    run([sys.executable, "runs/ship.py", "out/shipped", "bash x.sh", "out/s/base", "out/s/inpaint"],
        checkout)
    tensors, manifest = checkpoint.load(checkout / "out/shipped")
    assert manifest["samples"] == 16 and manifest["meta"]["provenance"]["command"] == "bash x.sh"
    assert all(t.dtype == torch.bfloat16 for t in tensors["model"].values())
    editor = model.build_editor(manifest["arch"])
    checkpoint.load_state(editor, tensors["model"], "shipped")
    assert editor.cfg.inpaint


def test_every_other_command_exists():
    """make targets and scripts; the long ones are only read by bash."""
    makefile = (ROOT / "Makefile").read_text()
    for command in commands():
        words = shlex.split(command)
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.M), command
        elif words[0] == ".":
            assert words[1] == ".venv/bin/activate" and "VENV ?= .venv" in makefile
        elif words[0] == "bash":
            assert (ROOT / words[1]).is_file(), command
        else:
            module = words[2].replace(".", "/") if words[1] == "-m" else ""
            paths = [f"{module}.py", f"{module}/__main__.py"] if module else [words[1]]
            assert words[0] == "python" and any((ROOT / path).is_file() for path in paths), command
    for script in (ROOT / "runs").glob("*.sh"):
        subprocess.run(["bash", "-n", script], check=True)
