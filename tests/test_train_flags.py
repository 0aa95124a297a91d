"""Flags of the training scripts: what users get wrong, and what every flag says."""

import inspect
import re
import typing
from dataclasses import fields

import pytest
import tyro
from trained import call, refused

import data
import train_omni
import train_pefl
import train_reward

pytestmark = pytest.mark.usefixtures("one_thread_and_own_signals")


BOTH = [
    ("/no/such/place", dict(data="/no/such/place")),
    ("empty.*no pictures|empty", dict(data="empty")),
    ("--?image_size: 30: .*multiple", dict(image_size=30)),
    ("--image_size: 256: .*256x256 pixels, 64x64 tokens, .* has 32x32", dict(image_size=256)),
    ("--image_size: 112: .*, 3[78]x2[01] tokens, .* has 32x32", dict(image_size=112, aspects=True)),
    ("--?batch_size: 0", dict(batch_size=0)),
    ("--?accum: 0", dict(accum=0)),
    ("--?log_every: 0", dict(log_every=0)),
    ("--?save_every: 0", dict(save_every=0)),
    ("--device: tpu", dict(device="tpu")),
]
BAD = [(train_omni, *case) for case in BOTH] + [(train_pefl, *case) for case in BOTH] + [
    (train_omni, "--preset: huge: use one of", dict(preset="huge")),
    (train_omni, "--preset: sd3-medium: needs a VAE", dict(preset="sd3-medium")),
    (train_omni, "--steps: 0", dict(steps=0)),
    (train_omni, "--ema: 1.5", dict(ema=1.5)),
    (train_omni, "--muon_lr: -0.1", dict(muon_lr=-0.1)),
    (train_omni, "--muon_lr: 0.1: needs whole matrices", dict(muon_lr=0.1, fsdp=True)),
    (train_omni, "--init: .*missing: no such folder", dict(init="missing")),
    (train_omni, "--init: .*holds a .reward.*train_omni.py or", dict(init="aesthetic")),
    (train_omni, "--init: .*latent: .*give --sd3", dict(init="latent")),
    (train_omni, "damaged/model.safetensors: SHA-256", dict(init="damaged")),
    (train_pefl, "--base: .*missing: no such folder", dict(base="missing")),
    (train_pefl, "--alignment: clipscore:gone,words: gone: no such", dict(alignment="clipscore:gone,words")),
    (train_pefl, "empty: holds neither", dict(base="empty")),
    (train_pefl, "--base: .*t2i: .*--stage inpaint", dict(base="t2i")),
    (train_pefl, "--base: .*aesthetic: holds a 'reward'", dict(base="aesthetic")),
    (train_pefl, "--base: .*latent: .*give --sd3", dict(base="latent")),
    (train_pefl, "damaged/model.safetensors: SHA-256", dict(base="damaged")),
    (train_pefl, "--aesthetic: .*base: holds an 'editor', .*train_reward.py", dict(aesthetic="base")),
    (train_pefl, "--alignment: .*mute: .*tokenizer", dict(alignment="mute")),
    (train_pefl, "--heldout_reward: .*missing: no such folder", dict(heldout_reward="missing")),
    (train_pefl, "--vgg: .*missing", dict(vgg="missing")),
    (train_pefl, "--tasks: all zero: give one of t2i, inpaint", dict(tasks="t2i=0,erase=0")),
    (train_pefl, "--tasks: edit=-1.0: use numbers >= 0 for t2i, inpaint", dict(tasks="t2i=1,edit=-1")),
    (train_pefl, "--tasks: remove=1.0: .* for t2i, inpaint, edit, outpaint, erase", dict(tasks="remove=1")),
    (train_pefl, "--tasks: 'erase': use NAME=WEIGHT,... of t2i, inpaint", dict(tasks="t2i=1,erase")),
    (train_pefl, "--tasks: 'edit=2': use NAME=WEIGHT", dict(tasks="edit=1,edit=2")),
    (train_omni, "--tasks: remove=2.0: .* for t2i, inpaint", dict(tasks="remove=2")),
    (train_pefl, "--image_size: 20: .*multiple", dict(image_size=20)),
    (train_pefl, "--disc_init: .*base: holds an 'editor'", dict(disc_init="base")),
    (train_pefl, "--disc_updates: 0", dict(disc_updates=0)),
    (train_pefl, "--adversarial_from: 0", dict(adversarial_from=0)),
    (train_pefl, "--reward_noise: -1", dict(reward_noise=-1.0)),
    (train_pefl, "--guidance: 0.0", dict(guidance=0.0)),
    (train_pefl, "--lora: -1", dict(lora=-1)),
    *[(train_pefl, f"--{flag}: '': is empty: leave it out", {flag: ""})
      for flag in ("aesthetic", "vgg", "disc_init")],
    (train_omni, "--init: '': is empty: leave it out", dict(init="")),
    (train_pefl, "--aesthetic: ,: has nothing before", dict(aesthetic=",")),
    (train_pefl, "--disc_init: /nope: no such folder", dict(disc_init="/nope")),
    *[(script, f"--{flag}: /nope: --{begins}: .* draws pixels", {flag: "/nope"})
      for script, begins in ((train_omni, "preset"), (train_pefl, "base")) for flag in ("sd3", "tokenizers")],
    (train_omni, "--lora: 4: is of use with --stage edit", dict(lora=4)),
    (train_omni, "--p_region: 0.5: is of edit pairs", dict(p_region=0.5)),
    (train_omni, "--weighting: score: is of edit pairs", dict(weighting="score")),
    (train_omni, "--min_score: 7.0: is of use with --weighting threshold", dict(
        stage="edit", init="base", weighting="none", min_score=7.0)),
    (train_pefl, "--p_region: 0.5: is of pairs", dict(p_region=0.5)),
]


@pytest.mark.parametrize("script, text, flags", BAD, ids=[f"{s.__name__}-{f}" for s, _, f in BAD])
def test_bad_values(made, tmp_path, script, text, flags):
    refused(made, tmp_path / "out", script, text, **flags)


@pytest.mark.parametrize("text", [
    "", "20/15/10", "20/15/10x0", "20/21/10x5", "20/15/15x5", "20/15/0x5", "20/-15/10x5", "20/15/10x5,",
    "20/15x5", "a/b/cxd", "20/15/10x5;8/6/3x5"])
def test_bad_phases(text):
    with pytest.raises(SystemExit, match="^error: --phases: [^\n]*T >= T1 > T2 >= 1"):
        train_pefl.parse_phases(text)


def test_phases():
    phases = train_pefl.parse_phases("20/15/10x2, 8/6/3x3")
    assert phases == [(20, 15, 10, 2), (8, 6, 3, 3)]
    assert [train_pefl.phase_at(phases, s)[0] for s in range(5)] == [1, 1, 2, 2, 2]
    assert train_pefl.phase_at(phases, 2) == (2, (8, 6, 3))
    paper = [phase[:3] for phase in train_pefl.parse_phases(train_pefl.Config.phases)]
    assert paper == [(20, 15, 10), (8, 6, 3)]  # Sec. 4.1


#### knobs ###################################################################################################


def plain_type(annotation):
    """T of T, of T | None and of what tyro is told beside it."""
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    inner = [a for a in typing.get_args(annotation) if a is not type(None)]
    return inner[0] if type(None) in typing.get_args(annotation) else annotation


def test_shared_knobs_have_one_type():
    types = {}
    for script in (train_omni, train_pefl, train_reward):
        for f in fields(script.Config):
            first = types.setdefault(f.name, (script.__name__, plain_type(f.type)))
            assert first[1] == plain_type(f.type), (f.name, script.__name__, first)


def test_tasks_of_the_paper():
    """The four kinds of masks and the instances (Sec. 4.1), as often by default as they always were here."""
    pefl = {"t2i": 1 / 11, "outpaint": 3.5 / 11, "edit": 3.5 / 11, "inpaint": 1.5 / 11, "erase": 1.5 / 11}
    omni = {"t2i": 1 / 4, "inpaint": 1 / 4, "edit": 5 / 24, "outpaint": 5 / 24, "erase": 1 / 12}
    for text, right in ((train_pefl.Config.tasks, pefl), (train_omni.TASKS["inpaint"], omni),
                        (train_omni.TASKS["base"], {"t2i": 1})):
        assert data.mixture(text) == pytest.approx(right) and list(data.mixture(text)) == list(right)
    assert list(data.mixture("erase=3, t2i=1,edit=0")) == ["erase", "t2i"]


def test_whole_pictures_know_no_tasks():
    with pytest.raises(SystemExit, match="^error: --tasks: t2i=1: --stage base draws whole pictures"):
        train_omni.check(train_omni.Config(stage="base", tasks="t2i=1"))


@pytest.mark.parametrize("script, flags", [(train_omni, dict(steps=1)), (train_pefl, dict(phases="5/4/2x1"))])
def test_tasks_reach_the_data(made, tmp_path, monkeypatch, script, flags):
    asked, own = [], data.task_mask
    monkeypatch.setattr(data, "task_mask", lambda task, *rest: (asked.append(task), own(task, *rest))[1])
    call(made, tmp_path, script, tasks="erase=1,outpaint=2", batch_size=32, sample_every=1, **flags)
    assert set(asked) == {"erase", "outpaint"} and 0.4 < asked.count("outpaint") / len(asked) < 0.9


@pytest.mark.parametrize("script", [train_omni, train_pefl, train_reward])
def test_help_explains_every_knob(script, capsys):
    with pytest.raises(SystemExit) as e:
        tyro.cli(script.Config, args=["--help"], config=(tyro.conf.FlagConversionOff,))
    text, source = capsys.readouterr().out, inspect.getsource(script.Config)
    assert e.value.code == 0
    for f in fields(script.Config):
        assert f"--{f.name.replace('_', '-')}" in text
        comment = re.search(rf"^    {f.name}: .*  # (\S.*)", source, re.M)
        assert comment, f"{script.__name__}: {f.name} has no comment"
        assert comment[1].split()[0] in text
