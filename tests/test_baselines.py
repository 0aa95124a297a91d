"""SDEdit, blended diffusion and DiffEdit: what each must keep, and what it turns into at its limits."""

import pytest
import torch

import flow
import pipeline
from model import PRESETS, Editor, inpainting

SPACE = pipeline.PixelSpace()
B, S, STEPS = 2, 16, 6


@pytest.fixture(scope="module", params=["text to image", "inpainting"])
def at(request):
    torch.manual_seed(0)
    cfg = PRESETS["test"]
    net = Editor(inpainting(cfg) if request.param == "inpainting" else cfg).eval()
    for p in net.parameters():  # the last layer starts at zero: nothing would depend on the text
        torch.nn.init.normal_(p, std=0.1)
    g = torch.Generator().manual_seed(1)
    image = torch.rand(B, 3, S, S, generator=g) * 2 - 1
    region = torch.zeros(B, 1, S, S)
    region[..., 4:12, 4:12] = 1
    return net, image, region, torch.randn(B, 3, S, S, generator=g)


AFTER, BEFORE = ["a red star", "snow"], ["a blue circle", "grass"]


def edit(at, method, **more):
    net, image, region, noise = at
    more = {"captions": AFTER, "region": region, **more}
    return pipeline.baseline(method, net, SPACE, image=image, noise=noise, steps=STEPS, **more)


def drawn(at, guidance=3.0, solver="euler"):
    net, image, _, noise = at
    nothing = torch.zeros_like(image)
    return pipeline.sample(net, SPACE, AFTER, torch.ones(B, 1, S, S), nothing, noise, flow.timesteps(STEPS),
                           guidance, solver=solver)


@pytest.mark.parametrize("method", ["sdedit", "blended"])
def test_with_nothing_to_keep_it_is_text_to_image(at, method):
    got = edit(at, method, region=torch.ones(B, 1, S, S), strength=1.0)
    torch.testing.assert_close(got, drawn(at))
    assert not torch.allclose(got, at[1], atol=0.1)
    for solver in ("heun", "dpm"):  # --solver is theirs, too
        other = edit(at, method, region=torch.ones(B, 1, S, S), strength=1.0, solver=solver)
        torch.testing.assert_close(other, drawn(at, solver=solver))
        assert not torch.allclose(other, got, atol=1e-4)


def test_diffedit_has_no_other_solver():
    assert pipeline.method_of("sdedit:out/a", "heun") == ("sdedit", "out/a")
    with pytest.raises(SystemExit, match="error: --solver: heun: diffedit:out/a goes up and down"):
        pipeline.method_of("diffedit:out/a", "heun")


def test_sdedit_is_nearer_to_the_picture_the_less_noise_there_is(at):
    off = [(edit(at, "sdedit", strength=s) - at[1]).abs().mean() for s in (1 / 6, 0.5, 1.0)]
    assert off[0] < off[1] < off[2]
    net, image, _, noise = at  # one step: noise to 1/6, then one call
    t = torch.full((B,), 1 / STEPS)
    x = flow.interpolate(image, noise, t)
    ones, nothing = torch.ones(B, 1, S, S), torch.zeros_like(image)
    with torch.no_grad():
        condition = (ones, nothing) if net.cfg.inpaint else ()
        v, null = (net(x, t, *net.encode_text(c), *condition) for c in (AFTER, [""] * B))
    torch.testing.assert_close(edit(at, "sdedit", strength=1 / 6), x - (null + 3 * (v - null)) / STEPS)


def test_blended_keeps_the_picture_outside_the_region(at):
    got, keep = edit(at, "blended"), (1 - at[2]).expand(-1, 3, -1, -1) > 0
    torch.testing.assert_close(got[keep], at[1][keep])
    assert not torch.allclose(got[~keep], at[1][~keep], atol=0.05)
    assert not torch.allclose(got[~keep], drawn(at)[~keep], atol=1e-3)  # the rest was seen on the way


def test_diffedit_between_equal_captions_gives_the_picture_back(at):
    torch.testing.assert_close(edit(at, "diffedit", before=AFTER, strength=0.5), at[1])
    assert not torch.allclose(edit(at, "diffedit", before=BEFORE, strength=0.5), at[1], atol=0.01)


def test_the_mask_of_diffedit_is_where_the_captions_disagree(at):
    z, noise, where = torch.zeros(1, 3, S, S), torch.randn(1, 3, S, S), torch.zeros(1, 1, S, S)
    where[..., 3:7, 5:9] = 1

    def one(x, t):
        assert (t == 0.5).all()
        return flow.Guided([x, where.expand_as(x) * 2], [1.0, 0.5])

    got = pipeline.disagreement(one, lambda x, t: x, z, noise)
    assert torch.equal(got, where)
    assert not pipeline.disagreement(one, one, z, noise).any()
    # a single extreme value does not hide the rest: it is cut at three times the mean
    peak = where.clone()
    peak[..., 0, 0] = 50
    got = pipeline.disagreement(lambda x, t: x + peak, lambda x, t: x, z, noise)
    assert got[..., 0, 0] == 1 and torch.equal(got, (peak > 0.5 * min(50, 3 * peak.mean().item())).float())


def test_an_unknown_method_is_named(at):
    with pytest.raises(SystemExit, match="error: --method: magic: use one of sdedit, blended, diffedit"):
        edit(at, "magic")
