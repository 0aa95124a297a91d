"""Generative data refinement (Boesel & Rombach 2024): both pictures of a pair are noised and drawn again.

    1. upscale both pictures      2. noise them to one log-SNR with one noise      3. denoise them, told their
    captions, with a base and then a second model      4. keep the pair if CLIP says that it still shows the
    edit (InstructPix2Pix's filter)
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import flow
import pipeline
import rewards
from pretrained import towers


def lanczos(image: np.ndarray, h: int, w: int) -> np.ndarray:
    """uint8 [h', w', 3] -> [h, w, 3]."""
    return np.array(Image.fromarray(image).resize((w, h), Image.Resampling.LANCZOS))


def times(logsnr: float, steps: list[int], schedule: str, shift: float, sigma_min: float) \
        -> list[list[float]]:
    """Times of each model's part of the way from a log-SNR to the picture; each begins where the one before
    ends.

    schedule "edm": as Karras spaces them (flow.edm_times), the paper's; "linear": the sampler's own, even in
    t before the shift.
    """
    start, n = flow.t_from_logsnr(logsnr), sum(steps)
    if schedule == "edm":
        ts = flow.edm_times(n, start, sigma_min)
    else:
        u = flow.shift_t(start, 1 / shift)
        ts = [float(flow.shift_t(u * k / n, shift)) for k in range(n, -1, -1)]
    ends = np.concatenate([[0], np.cumsum(steps)]).tolist()
    return [ts[a:b + 1] for a, b in zip(ends, ends[1:])]


@torch.inference_mode()
def redraw(pipes: list[pipeline.Pipe], captions: list[str], image: Tensor, noise: Tensor,
           parts: list[list[float]], guidance: float, solver: str = "dpm", bf16: bool = False) -> Tensor:
    """image [B, 3, H, W], noised to parts[0][0] and denoised by pipes[i] over parts[i] -> [B, 3, H, W].

    The models must share a space. A model's solver starts anew: of first order in its first step.
    """
    space, device = pipes[0].space, next(pipes[0].net.parameters()).device
    x = space.encode(image.to(device))
    x = flow.interpolate(x, noise.to(device), x.new_full((len(x),), parts[0][0]))
    whole = torch.ones_like(image[:, :1])
    for pipe, ts in zip(pipes, parts):
        net = pipe.net
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            condition = pipeline.conditions(net, space, whole.to(device), torch.zeros_like(image).to(device))
            denoise = pipeline.denoiser(net, captions, condition, guidance)
            x = flow.sample(denoise, x, ts, solver)
    return space.decode(x).float().cpu()


def clip_filter(clip: towers.Clip, source: Tensor, image: Tensor, before: list[str], after: list[str],
                least: dict[str, float]) -> list[dict]:
    """Pairs [B, 3, H, W] in [-1, 1] -> dict(clip_sim_image, clip_sim_dir, cause) each; cause None: kept.

    As InstructPix2Pix: cos of the pictures' unit features, and cos of the differences of pictures' and of
    captions'. least: "image" and "dir"; thresholds of one CLIP are not another's.
    """
    same = rewards.clip_similarity(clip, source, image).tolist()
    turn = rewards.clip_direction(clip, source, image, before, after).tolist()
    out = []
    for a, b in zip(same, turn):
        cause = ("clip: captions alike" if b != b else "clip: pictures unlike" if a < least["image"]
                 else "clip: another direction" if b < least["dir"] else None)
        out.append({"clip_sim_image": a, "clip_sim_dir": None if b != b else b, "cause": cause})
    return out


def open_clip(spec: str, device: torch.device) -> towers.Clip:
    """"WEIGHTS,TOKENIZER,openai" or "...,laion" (quick GELU or not: no weight tells)."""
    parts = spec.split(",")
    if len(parts) != 3 or parts[2] not in ("openai", "laion"):
        raise SystemExit(f"error: --clip: {spec}: say WEIGHTS,TOKENIZER,openai or WEIGHTS,TOKENIZER,laion")
    return towers.load_clip(parts[0], parts[1], parts[2] == "openai", towers.IP2P_PREP, device=device)
