"""runs/memory.py: its counts against real training runs of the scripts, and against sums that are known."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_sd3 import imagereward, sd3, vgg  # noqa: F401  (sd3: a fixture)
from test_text_encoders import files  # noqa: F401  (a fixture)
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import checkpoint
import common
import log
import model
import pipeline
import rewards
from kernels import attention, bench, dispatch, joint_attention
from runs import memory

ROOT = Path(memory.__file__).parents[1]

# A script's own main, twice: a small run that imports and allocates what stays, then the measured one. What
# counts is the peak of resident memory up to the checkpoint, less what was resident before.
MEASURE = """
import gc, importlib, json, sys
from pathlib import Path
import torch, checkpoint, pipeline
from runs import memory
torch.set_num_threads(1)
name, small, large, out = sys.argv[1], *map(json.loads, sys.argv[2:4]), sys.argv[4]
script, made = importlib.import_module(name), {}

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

def keep(noun):
    own = getattr(script, noun)
    def call(*args, **kwargs):
        made[noun] = own(*args, **kwargs)
        return made[noun]
    setattr(script, noun, call)

for noun in ("build", "open_reward", "open_coherence", "open_features"):
    if hasattr(script, noun):
        keep(noun)
own, opening = pipeline.surround, pipeline.open_editor
def surround(*args):
    made["space"] = own(*args)
    return made["space"]
def open_editor(*args, **kwargs):
    made["pipe"] = opening(*args, **kwargs)
    return made["pipe"]
pipeline.surround, pipeline.open_editor = surround, open_editor
checkpoint.save = lambda *a, **k: made.update(peak=status("VmHWM")) or "not saved"
script.main(script.Config(**small, out=out + "/small"))
made.clear()
gc.collect()
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
cfg = script.Config(**large, out=out + "/large")
script.main(cfg)
B, side, on, space = cfg.batch_size, cfg.image_size, ("cpu", cfg.precision == "bf16"), made["space"][0]
if name == "train_omni":
    net = made["build"][0]
    rank = memory.omni(net, (B, net.cfg.channels, side // space.stride, side // space.stride), *on)
else:
    nets = made["pipe"].net, space, {"alignment": made["open_reward"]}, made["open_coherence"]
    nets += (made["open_features"][0],)
    rows = script.rows_of(cfg)
    rank = memory.pefl(*nets, (B, 3, side, side), *on, recompute=cfg.checkpointing, rows=rows)
print(rank.report())
print(json.dumps({"counted": rank.peak, "measured": made["peak"] - before}))
"""

SMALL = model.EditorConfig(depth=3, heads=4, patch=2, txt_dim=128, vec_dim=128)


def editnet(checkpointing=False, cfg=SMALL):
    with torch.device("meta"):
        net = model.EditNet(cfg)
    net.base.requires_grad_(False)
    net.base.mmdit.checkpoint = checkpointing
    return net


def measured(name, small, large, out):
    """{"counted": bytes, "measured": bytes}; large blocks are mapped one by one: freed ones are gone."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
           "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
    runs = json.dumps(small), json.dumps(small | large)
    done = subprocess.run([sys.executable, "-c", MEASURE, name, *runs, str(out)], cwd=ROOT, env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    return json.loads(done.stdout.splitlines()[-1])


linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak in /proc")


@linux
@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_editnet_as_measured(tmp_path, checkpointing):
    base = model.Editor(SMALL)
    arch = {"arch": base.arch, "config": {}}
    checkpoint.write(tmp_path / "base", 0, {"model": base.state_dict()}, arch)
    flags = dict(init=str(tmp_path / "base"), stage="edit", steps=2, workers=0, device="cpu", wandb="off",
                 sample_every=0, checkpointing=checkpointing, precision="fp32", batch_size=1, image_size=16)
    got = measured("train_omni", flags, dict(batch_size=2, image_size=64), tmp_path)
    assert got["measured"] > 1e8 and got["counted"] == pytest.approx(got["measured"], rel=0.15)
    other = memory.omni(editnet(not checkpointing), (2, 3, 64, 64), "cpu", False).peak
    assert other != pytest.approx(got["measured"], rel=0.3)  # so that agreement means something


@linux
@pytest.mark.slow
@pytest.mark.parametrize("checkpointing, guidance", [(False, 1.0), (True, 3.0)])
def test_pefl_with_vae_as_measured(sd3, tmp_path, checkpointing, guidance):  # noqa: F811
    flags = dict(base=sd3["sd3"], tokenizers=sd3["tokenizers"], phases="3/2/1x2", adversarial_from=1,
                 guidance=guidance,
                 alignment=imagereward(tmp_path), vgg=vgg(tmp_path), workers=0, device="cpu", wandb="off",
                 sample_every=0, checkpointing=checkpointing, precision="fp32", batch_size=1, image_size=32)
    got = measured("train_pefl", flags, dict(batch_size=2, image_size=128), tmp_path)
    assert got["measured"] > 1e8 and got["counted"] == pytest.approx(got["measured"], rel=0.15)


# known sums


def test_live_counts_storages_once_and_frees_them():
    with memory.FakeTensorMode(), memory.Live() as live:
        a = torch.empty(1000)
        b = a.view(10, 100).t()[1:]  # no memory of its own
        assert live.now == live.peak == 4000
        c = a + 1
        assert live.now == 8000
        del a, c
        assert live.now == 4000 and live.peak == 8000  # b still holds a's
        del b
        assert live.now == 0


def test_a_step_of_known_size():
    """x [B, n] and y = x W stand after the forward pass; the backward pass adds little but W's gradient."""
    B, n = 512, 64
    net = torch.nn.Linear(n, n, bias=False)
    rank = memory.Rank("cpu", False)
    fake = rank.hold("net", net, average=True)
    with rank.stepping():
        y = fake(torch.empty(B, n))
        kept = rank.live.now
        y.sum().backward()
    map_, weight = 4 * B * n, 4 * n * n
    assert rank.still == weight * (1 + 2 + 1) and rank.rows["gradients of net"] == weight
    assert kept == 2 * map_ and kept + weight < rank.live.peak <= 3 * map_ + 2 * weight + 8
    assert net.weight.grad is None and fake.weight.grad.nbytes == weight
    assert rank.live.flops == 2 * 2 * B * n * n  # x W, and the gradient of W


@pytest.mark.parametrize("mode", ["reference", "triton"])
def test_attention_is_counted_as_the_formulas_need(mode, monkeypatch):
    """4 FLOP per score and channel forward, of pairs that see each other alone; backward 8, which is what a
    gradient needs, whether the scores were kept or are computed again."""
    monkeypatch.setattr(attention, "CPU_MATH_TOKENS", {torch.float32: 64})
    shape = bench.Attention(2, (5, 16, 16), 2, 64, attends=bench.CACHED)
    forward, backward = bench.attention_problem(shape, torch.float32, torch.device("cpu")).work
    rank = memory.Rank("cpu", False)
    with rank.stepping(), dispatch.force(mode):
        qkv = [torch.randn(2, n, 3, 2, 64, requires_grad=True) for n in shape.streams]
        q, k, v = zip(*(x.unbind(2) for x in qkv))
        out = joint_attention(list(q), list(k), list(v), attends=shape.attends)
        assert rank.live.flops == forward
        sum(x.sum() for x in out).backward()
    assert rank.live.flops == forward + 0.8 * backward  # bench.py counts what flash kernels do: 10


def test_flops_are_those_of_a_real_step():
    torch.manual_seed(0)
    net = model.EditNet(model.PRESETS["test"])
    net.base.requires_grad_(False)
    counted = memory.omni(net, (2, 3, 32, 32), "cpu", False).flops
    x, ids = torch.randn(2, 3, 32, 32), torch.zeros(2, 128, dtype=torch.uint8)
    with FlopCounterMode(display=False) as real:
        net(x, torch.rand(2), *net.text(ids), x, x[:, :1]).square().mean().backward()
    assert counted == real.get_total_flops() > 5e7


def test_flops_of_the_attention_kernels():
    """Queries and keys of 5 and 7 tokens: forward two products, backward four; a mask leaves some out."""
    q = [torch.empty(2, n, 3, 64, device="meta") for n in (5, 7)]
    forward, backward = (flop_registry[op] for op in (torch.ops.kernels.joint_attention,
                                                      torch.ops.kernels.joint_attention_backward))
    each = 2 * 2 * 3 * 64
    assert forward(q, q, q, None, None, None, 0, 0, -1, 1e-6, out_val=q) == 2 * each * 12 * 12
    assert forward(q, q, q, None, None, None, 0, 0, 0b1011, 1e-6, out_val=q) == 2 * each * (5 * 12 + 7 * 7)
    stats = (q[0],) * 3
    assert backward(q, q, q, q, q, *stats, None, None, None, 0, 0, -1, out_val=q) == 4 * each * 12 * 12


@pytest.mark.slow
def test_sharding_divides_what_trains():
    net = editnet()
    one, two, eight = (memory.omni(net, (2, 3, 32, 32), "cpu", True, ranks) for ranks in (0, 2, 8))
    for name in ("Adam of the editor", "average of the editor", "gradients of the editor"):
        inside = sum(p.numel() for n, p in net.named_parameters()
                     if n.startswith(("branch", "img_out", "src_out", "txt_out")))
        size = {"Adam": 8}.get(name.split()[0], 4)
        outside = one.rows[name] - size * inside
        assert 0 < outside < 0.2 * one.rows[name]
        assert two.rows[name] == outside + size * inside / 2
        assert eight.rows[name] == outside + size * inside / 8
    frozen = sum(p.numel() for p in net.parameters() if not p.requires_grad)
    assert one.rows["weights of the editor"] - eight.rows["weights of the editor"] == (
        2 * frozen + 4 * inside * 7 / 8)  # the base in bf16, an eighth of the masters
    assert two.rows["gathered blocks"] == 2 * inside and eight.peak < two.peak


@pytest.mark.slow
def test_every_second_block_recomputed_lies_between():
    nets = [editnet(n, model.replace(SMALL, depth=4)) for n in (0, 2, 1)]
    peaks = [memory.omni(net, (4, 3, 64, 64), "cpu", False).peak for net in nets]
    assert peaks[0] > 1.2 * peaks[1] > 1.2 * 1.2 * peaks[2]


@pytest.mark.slow
def test_sd3_is_counted_without_being_built():
    """8 GB of weights and 17 of optimiser, in a process whose memory stays as it is. What trains: 24 blocks,
    24 + 24 + 23 projections (2 176 470 528), the embedding of the source (99 840) and the region."""
    before = log.peak_bytes()
    net = editnet(True, model.PRESETS["sd3-medium"])
    rank = memory.omni(net, (1, 16, 128, 128), "cpu", True, 8)
    trained = 2_176_470_528 + 99_840 + 4 * 1536
    assert common.n_params(net, trained=True) == trained
    assert rank.rows["gradients of the editor"] == 4 * (99_840 + 4 * 1536) + 4 * 2_176_470_528 / 8
    assert log.peak_bytes() - before < 0.3 * 2**30 < 8 * 2**30 < rank.peak
    assert "peak of a training step" in rank.report()


@pytest.mark.slow
def test_the_command_reads_no_weights(tmp_path, monkeypatch, capsys):
    """SD3-medium at its real size, as a file without a byte of data behind its header."""
    with torch.device("meta"):
        state = model.MMDiT(model.PRESETS["sd3-medium"]).state_dict()
    header, end = {}, 0
    for key, t in state.items():
        header["model.diffusion_model." + key] = {"dtype": "F16", "shape": list(t.shape),
                                                  "data_offsets": [end, end + 2 * t.numel()]}
        end += 2 * t.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(tmp_path / "sd3.safetensors", "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + end)
    flags = ["--stage=edit", f"--init={tmp_path / 'sd3.safetensors'}", "--image_size=512", "--batch_size=1",
             "--checkpointing=1", "--device=cpu"]
    monkeypatch.setattr(sys, "argv", ["memory.py", "omni", *flags])
    memory.main()
    out = capsys.readouterr().out
    assert "4261.5 M parameters, 2176.6 M trained" in out  # 2,176,470,528 + 99,840
    assert "base 1024 image + 154 text, branch 1024 image + 1024 source + 154 text" in out
    assert "peak of a training step" in out
    monkeypatch.setattr(sys, "argv", ["memory.py", "omni", *flags, "--ranks=8"])
    memory.main()
    assert "memory of a rank of 8, sharded" in capsys.readouterr().out


def test_the_command_counts_feedback(tmp_path, monkeypatch, capsys):
    """An EditNet with its coherence model; what it trains is its branch."""
    net = model.EditNet(model.PRESETS["test"])
    meta = {"arch": net.arch, "config": {"image_size": 32}}
    checkpoint.write(tmp_path, 0, {"model": net.state_dict()}, meta)
    monkeypatch.setattr(sys, "argv", ["memory.py", "pefl", f"--base={tmp_path}", "--device=cpu"])
    memory.main()
    said = capsys.readouterr().out
    assert "weights of the coherence model" in said and "activations of the editor" in said


def test_a_heldout_reward_has_no_part_in_a_step():
    """It is asked with the sample sheets: what it adds to a step's memory is its weights."""
    arch = model.replace(rewards.REWARD_PRESETS["test"], tokenizer=rewards.train_tokenizer(["a"], 300, 40))
    nets = {"alignment": rewards.PreferenceReward(arch), "heldout": rewards.PreferenceReward(arch)}
    disc, editor = rewards.open_coherence(None, 32, 4, "--disc_init"), model.Editor(SMALL)
    counted = [memory.pefl(editor, pipeline.PixelSpace(), {k: nets[k] for k in names}, disc, None,
                           (4, 3, 32, 32), "cpu", False) for names in (["alignment"], nets)]
    size = sum(t.nbytes for t in (*nets["heldout"].parameters(), *nets["heldout"].buffers()))
    assert counted[1].peak - counted[0].peak == size and counted[0].flops == counted[1].flops


def test_flops_of_a_formula_are_those_that_are_counted(monkeypatch):
    """model.flops, for perf/mfu, leaves out embeddings and what acts on one vector a picture: less than 3 %
    of what runs beside encoders of text."""
    monkeypatch.setattr(attention, "CPU_MATH_TOKENS", {torch.float32: 10**6})  # flash counts 10, not 8
    cfg = model.replace(SMALL, txt_bytes=0)
    for net in (model.Editor(cfg), editnet(cfg=cfg), editnet(cfg=model.replace(cfg, dual=1))):
        wide = memory.omni(net, (4, 3, 64, 64), "cpu", False, words=50).flops
        formula = model.flops(net, 4, 32 * 32, 50)
        assert 0.97 * wide < formula < 1.01 * wide, (formula, wide)
