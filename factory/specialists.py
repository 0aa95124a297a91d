"""The specialists of OmniEdit (Sec. 3.2, appendix A.1): seven kinds of edits, each made as it is made best.

    swap        an inpainting model, the object's mask, dilated, and a caption of what is to be there
    remove      the same, told what is behind the object
    add         a removal with its roles exchanged: the target is the real picture
    background  the same, the inverse mask
    attribute   Prompt-to-Prompt; outside the object's mask every step takes the source's picture
    environment Prompt-to-Prompt; the objects are held down to a noise level, then free, so that light reaches
                them
    style       an instruction editor (the paper: CosXL-Edit): train_omni.py --stage edit --variant concat on
                refined pairs, or an EditNet

Noise is a function of (seed, item, task, try) alone. Batches are of one shard and in its order, so neither
the number of ranks nor a restart changes what is drawn together.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

import common
import flow
import masks
import pipeline
from factory.requests import grown
from scenes.judge import to_float, to_uint8

INPAINTED, TWINNED, EDITED = ("swap", "remove", "background"), ("attribute", "environment"), ("style",)


def noise_for(seed: int, keys: list[tuple[str, int]], task: str, shape: tuple[int, ...]) -> Tensor:
    """keys: (item, try) each -> [len(keys), *shape]."""
    gens = []
    for key, attempt in keys:
        place = int.from_bytes(hashlib.sha256(f"{task} {key}".encode()).digest()[:6], "little")
        gens += common.generators(seed, attempt, [place], stream=21)
    return common.randn(gens, shape)


def hole(task: str, object_mask: np.ndarray, grow: float) -> np.ndarray:
    """What an inpainting model fills, bool [h, w]."""
    return object_mask < 0.5 if task == "background" else grown(object_mask, grow)


def fill(pipe: pipeline.Pipe, prompts: list[str], image: Tensor, mask: Tensor, noise: Tensor, steps: int,
         guidance: float, solver: str = "euler", bf16: bool = False) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] with mask [B, 1, H, W] filled; all else is what it was."""
    ts = flow.timesteps(steps, pipe.shift)
    x = pipeline.sample(pipe.net, pipe.space, prompts, mask, image, noise, ts, guidance, solver=solver,
                        bf16=bf16).cpu()
    return mask * x + (1 - mask) * image


@torch.inference_mode()
def prompt_to_prompt(pipe: pipeline.Pipe, before: list[str], after: list[str], noise: Tensor, ts: list[float],
                     guidance: float = 1.0, share_until: float = 0.8, image: Tensor | None = None,
                     mask: Tensor | None = None, blend_until: float = 0.0, bf16: bool = False) \
        -> tuple[Tensor, Tensor]:
    """A picture of each caption `before` and the same of `after` -> two [B, 3, H, W], not clamped.

    Both are drawn in one batch from one noise [B, C, h, w]. While t >= share_until the second row's image
    tokens ask with the queries and keys of the first (model.MMDiT.forward; 1.1 never, 0 always), the rows
    without text from those without text. mask [B, 1, H, W]: outside it the second row takes the first's
    x_t after every step that ends at t >= blend_until (0: to the end). image [B, 3, H, W]: the first row is
    this picture, noised to each t with the same noise; without it both are drawn (OmniEdit).
    """
    net, space, B = pipe.net, pipe.space, len(before)
    device = next(net.parameters()).device
    noise = noise.to(device)
    known = None if image is None else space.encode(image.to(device))
    m = None if mask is None else pipeline.shrink(mask.to(device), space.stride)
    weights = flow.text_weights(guidance)
    place = torch.arange(2 * B * len(weights), device=device)
    share = place // (2 * B) * (2 * B) + place % B
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        text, null = net.encode_text([*before, *after]), net.encode_text([""])
        null = tuple(x.expand(2 * B, *x.shape[1:]) for x in null)
        rows = [torch.cat(parts) for parts in zip(*({"both": text, "none": null}[k] for k in weights))]
        x = torch.cat([noise, noise])
        for t, t_next in zip(ts[:-1], ts[1:]):
            at = share if t >= share_until else None
            denoise = flow.guide(lambda y, s, at=at: net(y, s, *rows, share=at), weights)
            x = flow.euler_step(x, denoise(x, x.new_full((2 * B,), t)), t, t_next)
            first, second = x.chunk(2)
            if known is not None:
                first = flow.interpolate(known, noise, x.new_full((B,), t_next))
            if m is not None and t_next >= blend_until:
                second = m * second + (1 - m) * first
            x = torch.cat([first, second])
    return tuple(space.decode(z).float().cpu() for z in x.chunk(2))


def follow(pipe: pipeline.Pipe, instructions: list[str], image: Tensor, noise: Tensor, steps: int,
           guidance: float, image_guidance: float, solver: str = "euler", bf16: bool = False) -> Tensor:
    """An instruction editor's pictures [B, 3, H, W]; the whole picture may change."""
    return pipeline.sample(pipe.net, pipe.space, instructions, torch.ones_like(image[:, :1]), image, noise,
                           flow.timesteps(steps, pipe.shift), guidance, image_guidance, solver,
                           bf16=bf16).cpu()


def make(task: str, pipe: pipeline.Pipe, editor: pipeline.Pipe | None, rows: list[dict],
         keys: list[tuple[str, int]], cfg, bf16: bool) -> list[dict]:
    """One try of each of the requests, of one task and shape; keys: (item, try). cfg: make_edits.py's.

    -> dict(source, image uint8 [h, w, 3]; mask float32 [h, w] or None; specialist; params; drawn: whether the
    source was) each."""
    if task in EDITED and editor is None:
        raise SystemExit(f"error: --editor: {task} needs an instruction editor: name one, such as "
                         "assets/editnet, or leave the task out of --tasks")
    image = to_float(np.stack([r["image"] for r in rows]))
    h, w = image.shape[-2:]
    of = editor if task in EDITED else pipe
    shape = (of.space.channels, h // of.space.stride, w // of.space.stride)
    noise = noise_for(cfg.seed, keys, task, shape)
    source, area = image, None
    if task in INPAINTED:
        area = np.stack([hole(task, r["object"], cfg.grow) for r in rows]).astype(np.float32)
        prompts = [r["prompt"] for r in rows]
        if task == "remove":
            prompts = [cfg.behind and prompt or masks.ERASE_PROMPT for prompt in prompts]
        guidance = cfg.remove_guidance if task == "remove" else cfg.guidance
        out = fill(pipe, prompts, image, torch.from_numpy(area)[:, None], noise, cfg.steps, guidance,
                   cfg.solver, bf16)
        params = {"guidance": guidance, "grow": cfg.grow, "prompts": prompts}
    elif task in TWINNED:
        real = cfg.anchor == "real"
        if task == "attribute":
            mask = np.stack([grown(r["object"], cfg.grow) for r in rows]).astype(np.float32)
            area = mask
        else:  # held: the objects
            mask = np.stack([r["object"] < 0.5 for r in rows]).astype(np.float32)
        # a picture that is drawn has no mask: the object is not where it was in the real one
        region = torch.from_numpy(mask)[:, None] if real else None
        area = area if real else None
        until = 0.0 if task == "attribute" else cfg.blend_until
        source, out = prompt_to_prompt(
            pipe, [r["source_caption"] for r in rows], [r["prompt"] for r in rows], noise,
            flow.timesteps(cfg.steps, pipe.shift), cfg.guidance, cfg.share_until, image if real else None,
            region, until, bf16)
        source = image if real else source
        if real and task == "attribute":  # the pixels too: a latent's neighbours are decoded with it
            out = region * out + (1 - region) * image
        params = {"guidance": cfg.guidance, "share_until": cfg.share_until, "anchor": cfg.anchor,
                  "blend_until": until}
    else:
        out = follow(editor, [r["instructions"][0] for r in rows], image, noise, cfg.steps,
                     cfg.edit_guidance, cfg.image_guidance, cfg.solver, bf16)
        params = {"guidance": cfg.edit_guidance, "image_guidance": cfg.image_guidance}
    sources, pictures = to_uint8(source).numpy(), to_uint8(out).numpy()
    prompts = params.pop("prompts", None)
    kind = "inpainting" if task in INPAINTED else "prompt-to-prompt" if task in TWINNED else "editor"
    return [dict(source=sources[j], image=pictures[j], mask=None if area is None else area[j],
                 specialist=kind, drawn=task in TWINNED and cfg.anchor != "real",
                 params=params | {"steps": cfg.steps, "solver": "euler" if task in TWINNED else cfg.solver}
                 | ({"prompt": prompts[j]} if prompts else {})) for j in range(len(rows))]
