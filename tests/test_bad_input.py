"""What every script does with a checkpoint that cannot be used, and with a disk that is full.

Bad pictures, masks, captions and metadata: test_data.py, test_sample.py. Values and flags: with the scripts.
"""

import contextlib
import json
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import evaluate
import make_prefs
import model
import rewards
import sample
import train_omni
import train_pefl
import train_reward
from scenes import judge

pytestmark = pytest.mark.usefixtures("one_thread_and_own_signals")
TRAIN = dict(device="cpu", workers=0, wandb="off", precision="fp32")
SCRIPTS = {train_omni: TRAIN | dict(preset="test", batch_size=2, steps=1, sample_every=0),
           train_pefl: TRAIN | dict(phases="3/2/1x1", batch_size=2, sample_every=0),
           train_reward: TRAIN | dict(preset="test", batch_size=2, steps=1, val_fraction=0.0),
           sample: dict(task="t2i", prompt="a red star", device="cpu", steps=1),
           make_prefs: dict(n=2, steps="1", device="cpu"),
           evaluate: dict(task="scenes", n=2, steps="1", device="cpu")}
FLAGS = [(train_omni, "init", "editor"), (train_pefl, "base", "editor"), (train_pefl, "aesthetic", "reward"),
         (make_prefs, "ckpt", "editor"),
         (train_pefl, "alignment", "reward"), (train_pefl, "heldout_reward", "reward"),
         (train_reward, "init", "reward"), (sample, "ckpt", "editor"), (evaluate, "ckpt", "editor"),
         (evaluate, "parser", "parser")]
SAID = {"flipped": "SHA-256 differs", "cut": "bytes instead of", "lost": "cannot be read",
        "manifest": "was changed after it was written", "foreign": "holds a|SHA", "wide": "does not fit",
        "future": "unknown fields|other labels"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """ROOT/KIND-FLAW: checkpoints of each kind, whole ("ok") and with each flaw; ROOT/pairs.jsonl."""
    root = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    tokenizer = rewards.train_tokenizer(["a red star"], 300, 40)
    editor, reward = model.inpainting(model.PRESETS["test"]), rewards.REWARD_PRESETS["test"]
    reward = model.replace(reward, tokenizer=tokenizer)
    nets = {"editor": (model.Editor(editor), model.Editor(model.replace(editor, heads=3))),
            "reward": (rewards.PreferenceReward(reward),
                       rewards.PreferenceReward(model.replace(reward, txt_hidden=80))),
            "parser": (judge.Parser(), torch.nn.Linear(2, 2))}

    def save(name, weights, arch):
        meta = {"arch": arch, "config": {"image_size": 32, "shift": 1.0}}
        return checkpoint.write(root / name, 0, {"model": weights.state_dict()}, meta)

    for kind, (net, other) in nets.items():
        ok = save(f"{kind}-ok", net, net.arch)
        save(f"{kind}-wide", other, net.arch)
        save(f"{kind}-future", net, net.arch | {"colours": 4})
        save(f"{kind}-foreign", net, net.arch | {"kind": "coherence"})
        for flaw in ("flipped", "cut", "lost", "manifest"):
            file = shutil.copytree(ok, root / f"{kind}-{flaw}") / "model.safetensors"
            raw = bytearray(file.read_bytes())
            if flaw == "flipped":
                raw[len(raw) // 2] ^= 1
                file.write_bytes(raw)
            elif flaw == "cut":
                file.write_bytes(raw[:-1])
            elif flaw == "lost":
                file.unlink()
            else:
                manifest = json.loads((file.parent / "manifest.json").read_text())
                manifest["step"] += 1
                (file.parent / "manifest.json").write_text(json.dumps(manifest))
    rng, rows = np.random.default_rng(0), []
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(root / f"{i}.png")
        rows.append({"image": f"{i}.png", "better": "a red star", "worse": f"a blue star {i}"})
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def call(made, out, script, **flags):
    """main() with whole checkpoints, but for `flags`."""
    own = {train_omni: {}, train_pefl: {"base": made / "editor-ok"}, sample: {"ckpt": made / "editor-ok"},
           train_reward: {"pairs": made / "pairs.jsonl"}, make_prefs: {"ckpt": made / "editor-ok"},
           evaluate: {"ckpt": made / "editor-ok", "parser": made / "parser-ok"}}[script]
    flags = SCRIPTS[script] | own | {"out": out} | flags
    script.main(script.Config(**{k: str(v) if isinstance(v, Path) else v for k, v in flags.items()}))


def refused(made, out, script, **flags):
    """The line with which main() ends."""
    with pytest.raises(SystemExit) as e:
        call(made, out, script, **flags)
    line = str(e.value)
    assert line.startswith("error: ") and "\n" not in line, line
    return line


@pytest.mark.parametrize("flaw", SAID)
@pytest.mark.parametrize("script, flag, kind", FLAGS, ids=[f"{s.__name__}-{f}" for s, f, _ in FLAGS])
def test_unusable_checkpoint(made, tmp_path, script, flag, kind, flaw):
    """One byte flipped, a byte missing, a file lost, the manifest edited, another kind of model, another
    architecture, another version's: one line that names the folder, before anything is written."""
    folder = made / f"{kind}-{flaw}"
    line = refused(made, tmp_path / "out", script, **{flag: folder})
    assert str(folder) in line
    assert any(words in line for words in SAID[flaw].split("|")), line
    assert not list(tmp_path.glob("out/*.safetensors")) and not list(tmp_path.glob("out/step_*"))


@pytest.mark.parametrize("script", [train_omni, train_pefl, train_reward])
def test_out_holds_another_kind_of_run(made, tmp_path, script):
    kind = "editor" if script is train_reward else "reward"
    shutil.copytree(made / f"{kind}-ok", tmp_path / "step_00000001")
    assert str(tmp_path) in refused(made, tmp_path, script)
    assert [p.name for p in tmp_path.glob("step_*")] == ["step_00000001"]


@pytest.mark.parametrize("script", [train_omni, train_pefl, train_reward])
def test_only_checkpoint_of_a_run_is_damaged(made, tmp_path, script):
    """Starting from scratch would be a decision, and the user's."""
    shutil.copytree(made / "editor-flipped", tmp_path / "step_00000001")
    assert "none of 1 checkpoints verifies" in refused(made, tmp_path, script)


@pytest.mark.parametrize("script", [train_omni, train_pefl, train_reward])
def test_out_cannot_be_written(made, tmp_path, script):
    """Before step 0, not after the last one."""
    (tmp_path / "file").write_text("")
    line = refused(made, tmp_path / "file/out", script)
    assert f"--out: {tmp_path / 'file/out'}: cannot be written" in line


@contextlib.contextmanager
def small_files():
    """Files cannot grow, as on a full disk; only around the call, since pytest's log may be a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("script, flags", [
    (sample, {}), (evaluate, {}), (evaluate, {"save": "SAVE"}),
    (make_prefs, {"n": 1, "k": 2}), (evaluate, {"task": "compare", "ckpt": "TWICE"})])
def test_full_disk_while_writing_results(made, tmp_path, capsys, script, flags):
    flags = {k: {"SAVE": tmp_path / "save", "TWICE": f"{made / 'editor-ok'},{made / 'editor-ok'}"}.get(v, v)
             for k, v in flags.items()}
    with small_files():
        said = refused(made, tmp_path / "out", script, **flags)
    assert str(tmp_path) in said


def test_full_disk_while_saving_a_reward(made, tmp_path, monkeypatch, capsys):
    """The train scripts' other two: test_train.py."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "not saved" in refused(made, tmp_path, train_reward, steps=3, save_every=1)
    out = capsys.readouterr().out
    assert out.count("training goes on") == 3 and "MiB are free" in out and not list(tmp_path.glob("step_*"))
