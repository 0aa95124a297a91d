"""A whole sample from SD3's weights, against diffusers' pipeline from the same noise."""

import copy

import pytest
import test_text_encoders as texts
import torch
from test_pretrained import F64, TOLERANCE, both, error, folders, peers, states, tokenizers, words  # noqa: F401

import common
import flow
from model import Editor
from pipeline import denoiser, open_editor, sample
from pretrained import sd3
from pretrained import text as text_encoders
from pretrained.vae import VAE, load_vae

diffusers = pytest.importorskip("diffusers")
PROMPTS, STEPS, GUIDANCE = ["a photo of the red cat", "two dogs"], 4, 5.0
# Of N steps ours are shift(k / N). diffusers shifts twice by default, so that its last step begins at 0.009:
# here it is told the times. Tests in float64 take its scheduler's casts to fp32 away.
SIGMAS = [1.0, 0.75, 0.5, 0.25]


class Exact(diffusers.FlowMatchEulerDiscreteScheduler):
    def set_timesteps(self, sigmas=None, device=None, **rest):
        super().set_timesteps(sigmas=sigmas, device=device, **rest)
        s = torch.tensor([*sigmas, 0.0], dtype=F64)
        self.sigmas = self.shift * s / (1 + (self.shift - 1) * s)
        self.timesteps = 1000 * self.sigmas[:-1]

    def step(self, v, t, x, return_dict=False, **rest):
        i = int((self.timesteps == t).nonzero())
        return (x + (self.sigmas[i + 1] - self.sigmas[i]) * v,)


def pipeline(peers, words, kind, dtype):  # noqa: F811
    readers = [texts.theirs_clip(words, pad) for pad in (text_encoders.CLIP_EOS, "!")]
    for reader in readers:
        reader.model_max_length = 77
    scheduler = (Exact if dtype == F64 else diffusers.FlowMatchEulerDiscreteScheduler)(shift=3.0)
    net, vae, clip_l, clip_g, t5 = (copy.deepcopy(peers[k]).to(dtype)
                                    for k in (kind, "vae", "clip_l", "clip_g", "t5xxl"))
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=net, vae=vae, scheduler=scheduler, text_encoder=clip_l, tokenizer=readers[0],
        text_encoder_2=clip_g, tokenizer_2=readers[1], text_encoder_3=t5, tokenizer_3=texts.theirs_t5(words))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(pipe, noise, size, **change):
    asked = dict(prompt=PROMPTS, negative_prompt=["", ""], num_inference_steps=STEPS, sigmas=list(SIGMAS),
                 guidance_scale=GUIDANCE, height=size[0], width=size[1], max_sequence_length=77)
    made = pipe(**asked | change, latents=noise, output_type="pt").images
    return 2 * made - 1


def ours(folder, noise, shift=3.0, steps=STEPS):
    cfg, state = sd3.load_mmdit(folder, F64)
    net = Editor(cfg).double().requires_grad_(False)
    net.mmdit.load_state_dict(state)
    text, vae = text_encoders.load_text(folder, dtype=F64), load_vae(folder, F64)
    net.encode_text = text.encode_text
    denoise = denoiser(net, PROMPTS, (), GUIDANCE)
    return vae.decode(flow.sample(denoise, noise, flow.timesteps(steps, shift))).clamp(-1, 1)


def draw(h, w, dtype):
    return torch.randn(2, 4, h, w, generator=torch.Generator().manual_seed(3), dtype=F64).to(dtype)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd3", "sd3.5"])
def test_four_steps_equal_diffusers(kind, peers, folders, words):  # noqa: F811
    """Tokens, text encoders, transformer, guidance, steps and decoder in float64, in 9:16 and square."""
    pipe = pipeline(peers, words, kind, F64)
    for h, w in ((16, 9), (8, 8)) if kind == "sd3" else ((12, 20),):
        w += w % 2
        noise = draw(h, w, F64)
        right = theirs(pipe, noise, (8 * h, 8 * w))
        assert error(ours(folders[kind], noise), right) < TOLERANCE
    # what must not pass: another shift, another schedule
    assert error(ours(folders[kind], noise, shift=1.0), right) > 1e-3
    assert error(ours(folders[kind], noise), theirs(pipe, noise, (8 * h, 8 * w), guidance_scale=4.9)) > 1e-4


def test_sample_py_equals_diffusers(peers, folders, words):  # noqa: F811
    """pipeline.sample as sample.py calls it, in fp32, against diffusers' pipeline as it is."""
    pipe = pipeline(peers, words, "sd3", torch.float32)
    folder, (h, w) = folders["sd3"], (8, 12)
    opened = open_editor(folder, torch.device("cpu"), ("draw",))
    assert isinstance(opened.space, VAE) and opened.shift == 3.0
    noise = common.randn(common.generators(0, 0, [0, 1]), (4, h, w))
    ones, zeros = torch.ones(2, 1, 8 * h, 8 * w), torch.zeros(2, 3, 8 * h, 8 * w)
    got = sample(opened.net.eval(), opened.space, PROMPTS, ones, zeros, noise, flow.timesteps(STEPS, 3.0),
                 GUIDANCE)
    assert error(got.clamp(-1, 1), theirs(pipe, noise, (8 * h, 8 * w))) < 1e-4
