"""What a training step needs in memory, before a weight is built: the step runs on tensors without data.

    python runs/memory.py omni --stage edit --init sd3.safetensors --image_size 1024 ...  # train_omni's flags
    python runs/memory.py pefl --base out/sd3_inpaint --aesthetic ... --ranks 8             # sharded over 8

    1. Live: bytes of live tensors, op by op; FLOP    2. Rank: what one rank holds    3. the scripts' steps
    4. the command

Nothing here is a formula of the architecture: the networks' own forward and backward passes run on fake
tensors (torch._subclasses), so that kernels, autocast's casts, checkpointing, the VAE's decoder and rewards
count as they are. Counted: weights, the optimiser's state, the average, gradients, activations and every
temporary that autograd or an operation makes as a tensor of its own. Not counted: workspace inside an
operation (cuDNN, oneDNN), the allocator's rounding, CUDA's context (0.5 to 1 GiB a GPU), NCCL's buffers, data
workers, text encoders, and the sample sheets, which run without gradients. On a machine without a GPU a step
is counted as the CPU runs it. The steps are written out here a second time: a fork that changes what a step
computes changes them too, or believes what the scripts measure and print after two steps.
"""

import argparse
import contextlib
import copy
import sys
import weakref
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
import flow  # noqa: E402
import model  # noqa: E402
import pipeline  # noqa: E402
import train_omni  # noqa: E402
import train_pefl  # noqa: E402
from pretrained.towers import load_vgg16  # noqa: E402
from pretrained.vae import VAE  # noqa: E402
from rewards import PreferenceReward, open_coherence  # noqa: E402

########################################## 1. live bytes #####################################################

for ours, theirs in (("_for_cpu", ""), ("_for_cpu_backward", "_backward")):  # what torch does not count
    name = "_scaled_dot_product_flash_attention"
    flop_registry.setdefault(getattr(torch.ops.aten, name + ours),
                             flop_registry[getattr(torch.ops.aten, name + theirs)])


class Live(TorchDispatchMode):
    """In the block: `now`, bytes of storages that were made in it (or added) and live, and their `peak`;
    `flops`, those of products, convolutions and attention, recomputed ones too."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.flops = 0
        self.known = {}

    def add(self, tensor, counted=True):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known[storage._cdata] = size = storage.nbytes() if counted else 0
            self.move(size)
            weakref.finalize(storage, self.drop, storage._cdata)

    def drop(self, key):
        self.now -= self.known.pop(key)

    def move(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if count := flop_registry.get(op._overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.add(t)
        return out


########################################## 2. a rank #########################################################


class Rank:
    """One rank's share of a run without data: `hold` modules, run a step in `stepping`, read `report`.

    device: that of the run. ranks: over which common.shard splits the blocks, 0 if it is not used.
    """

    def __init__(self, device, bf16, ranks=0):
        self.device, self.bf16, self.ranks = torch.device(device), bf16, ranks
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.live, self.rows, self.still, self.unit, self.booked = Live(), {}, 0, 0, 0
        self.call_flops = 0  # of one call of the editor in PeFL's stage 2, of which a step has several

    def hold(self, name, module, average=None):
        """A copy of the module (which may be on the meta device) without data, its memory in the books.

        average: None for what is frozen, else whether what trains has an EMA. Of a sharded module the blocks
        that train are what their units gather; each is let go when it has its gradient, as FSDP2 does.
        """
        trains = average is not None
        split = {id(p) for m in common.blocks(module) for p in m.parameters() if p.requires_grad} \
            if trains and average and self.ranks else set()
        memo = {}
        with self.mode:
            for p in module.parameters():
                narrow = split and self.bf16 and (id(p) in split or not p.requires_grad)
                dtype = torch.bfloat16 if narrow else p.dtype
                memo[id(p)] = fake = nn.Parameter(torch.empty(p.shape, dtype=dtype, device=self.device),
                                                  trains and p.requires_grad)
                self.live.add(fake, counted=False)
                if id(p) in split:
                    fake.register_post_accumulate_grad_hook(self.reduce)
                    self.live.move(fake.nbytes)
            for b in module.buffers():
                memo[id(b)] = fake = torch.empty(b.shape, dtype=b.dtype, device=self.device)
                self.live.add(fake, counted=False)
            fake = copy.deepcopy(module, memo)
        whole = [p for p in module.parameters() if id(p) not in split]
        shards = sum(p.numel() for p in module.parameters() if id(p) in split) / max(self.ranks, 1)
        self.book(f"weights of {name}", sum(memo[id(p)].nbytes for p in whole) + 4 * shards
                  + sum(b.nbytes for b in module.buffers()))
        if trains:
            n = sum(p.numel() for p in whole if p.requires_grad) + shards
            self.book(f"Adam of {name}", 8 * n)
            self.book(f"average of {name}", 4 * n * average)
            self.rows[f"gradients of {name}"] = 4 * n
        if split:
            units = [sum(p.numel() for p in m.parameters() if id(p) in split) for m in common.blocks(module)]
            self.rows["gathered blocks"] = self.booked = sum(units) * (2 if self.bf16 else 4)
            self.unit = (6 if self.bf16 else 8) * max(units)  # one's gradients, and in fp32 to be reduced
        return fake

    def hold_reward(self, name, reward):
        """The same for a reward: a PreferenceReward, or a function that holds modules. -> a function of
        pictures and captions."""
        if isinstance(reward, PreferenceReward):
            net = self.hold(name, reward)
            return lambda image, captions: net.normalised(image, *net.tokenize(captions, image.device))
        cells = [c.cell_contents for c in getattr(reward, "__closure__", None) or ()]
        held = [m for m in (*cells, *getattr(reward, "args", ())) if isinstance(m, nn.Module)]
        tensors = [t for m in held for t in (*m.parameters(), *m.buffers())]
        for t in tensors:
            self.live.add(self.mode.from_tensor(t), counted=False)
        self.book(f"weights of {name}", sum(t.nbytes for t in tensors))
        return reward

    def book(self, name, size):
        self.still += size
        if size:
            self.rows[name] = size

    def reduce(self, p):
        """A gathered parameter has its gradient: both go, the shard's gradient in fp32 stays."""
        self.live.move(-p.nbytes + 4 * p.numel() / self.ranks)
        p.grad = None

    @contextlib.contextmanager
    def stepping(self):
        with self.mode, self.live, torch.device(self.device):
            yield

    def kept(self, name):
        """Book as a row what has come alive since the last one, or since the blocks were gathered."""
        self.rows[name] = self.live.now - self.booked
        self.booked = self.live.now

    @property
    def flops(self):
        """Of the step of this rank, all that was run so far."""
        return self.live.flops

    @property
    def peak(self):
        return self.still + self.live.peak + self.unit

    def report(self):
        """Lines for people; the rows do not all stand at once, the peak is that of the whole step."""
        width = max(map(len, self.rows))
        lines = [f"  {name:{width}} {size / 2**30:8.3f} GiB" for name, size in self.rows.items()]
        over = f" of {self.ranks}, sharded" if self.ranks else ""
        return "\n".join([f"memory of a rank{over}, counted:", *lines,
                          f"peak of a training step: {self.peak / 2**30:.3f} GiB"])


########################################## 3. the steps ######################################################

# What the scripts compute in a step, up to the gradients, on random inputs: here without data, in
# runs/bench_sd3.py with them. kept(name) is told when a part has done its forward pass.


def omni(editor, latents, device, bf16, ranks=0, words=154):
    """A step of train_omni.py -> Rank.

    editor: as it will train (what is frozen, low-rank updates, checkpointing), before common.shard; on the
    meta device nothing is built. latents: [B, C, h, w] of a micro-batch. words: text tokens from outside.
    """
    rank = Rank(device, bf16, ranks)
    net = rank.hold("the editor", editor, average=True)
    with rank.stepping():
        omni_step(net, latents, rank.device, bf16, words, rank.kept)
    return rank


def omni_step(net, latents, device, bf16, words=154, kept=lambda name: None):
    with torch.device(device):
        x0, noise, t = torch.randn(latents), torch.randn(latents), torch.rand(latents[0])
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            txt, vec = text(net, latents[0], words)
            v = net(flow.interpolate(x0, noise, t), t, txt, vec, *condition(net, x0))
        loss = (t * (v.float() - flow.velocity(x0, noise)).square().flatten(1).mean(1)).mean()
        kept("activations, kept by the forward pass")
        loss.backward()
    return loss.detach()


def text(net, batch, words):
    """encode_text without captions -> txt, vec."""
    if net.cfg.txt_bytes:
        return net.text(torch.randint(0, 256, (batch, net.cfg.txt_bytes), dtype=torch.uint8))
    return torch.randn(batch, words, net.cfg.txt_dim), torch.randn(batch, net.cfg.vec_dim)


def condition(net, x):
    """Source and region, or mask and masked picture, as large as the latents x."""
    mask = torch.rand_like(x[:, :1])
    if isinstance(net, model.EditNet):
        return torch.randn_like(x), mask
    return (mask, torch.randn_like(x)) if net.cfg.inpaint else ()


def pefl(editor, space, rewards, disc, vgg, pictures, device, bf16, ranks=0, words=154, recompute=False,
         rows=1):
    """A step of train_pefl.py -> Rank. editor, ranks, words: as for `omni`; it is held twice, tuned and as
    it was.

    space: pipeline.PixelSpace or VAE. rewards: name -> what open_reward gives; a heldout one has
    its weights in memory and no part in the step. vgg: VGG16 or None: then the first reward of ours gives
    features, if there is one. pictures: [B, 3, H, W]. recompute: --checkpointing, which concerns rewards and
    coherence model; editor and VAE know their own. rows: of train_pefl.rows_of.
    """
    rank = Rank(device, bf16, ranks)
    net = rank.hold("the editor", editor, average=True)
    rank.hold("the editor as it was", editor)
    space = rank.hold("the VAE", space) if isinstance(space, nn.Module) else space
    scores = {name: rank.hold_reward(f"reward {name}", r) for name, r in rewards.items()}
    asked = {name: r for name, r in rewards.items() if not name.startswith("heldout")}
    scores = {name: scores[name] for name in asked}
    features = rank.hold("VGG16", vgg) if vgg else next(
        (s for s in (getattr(r, "image_features", None) for r in asked.values()) if s), lambda image: [])
    disc = rank.hold("the coherence model", disc, average=False)
    flops = {}

    def kept(name):
        rank.kept(name)
        flops[name] = rank.flops

    with rank.stepping():
        pefl_step(net, space, scores, disc, features, pictures, rank.device, bf16, words, recompute,
                  rows=rows, kept=kept)
    rank.call_flops = flops["stage 2"] - flops["pictures, latents"]
    return rank


def pefl_step(net, space, scores, disc, features, pictures, device, bf16, words=154, recompute=False, calls=1,
              rows=1, kept=lambda name: None):
    """calls: of the editor in stage 2, without gradient; rows: how often each has a picture. scores:
    functions of pictures and captions."""
    def many(x):
        return x if rows == 1 else torch.cat([x] * rows)

    def maybe_checkpoint(fn, *inputs):
        return checkpoint(fn, *inputs, use_reentrant=False) if recompute else fn(*inputs)

    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    with torch.device(device):
        x, where, B = torch.rand(pictures), torch.rand(pictures[0], 1, *pictures[2:]), pictures[0]
        with torch.no_grad():
            start = space.encode(x)
        given, t = condition(net, start), torch.rand(B)
        with autocast:
            txt, vec = text(net, B, words)
            beside = [many(y) for y in (t, txt, vec, *given)]

            def velocity(x_t):
                v, *rest = net(many(x_t), *beside).chunk(rows)
                return sum(rest, v)

            with torch.no_grad():
                x_t = flow.interpolate(start, torch.randn_like(start), t)
                kept("pictures, latents")
                for _ in range(calls):
                    x_t = x_t - 0.05 * velocity(x_t)
        kept("stage 2")
        with autocast:
            z0 = flow.x0_from_v(x_t, velocity(x_t), t)
            kept("activations of the editor")
            fake = maybe_checkpoint(space.decode, z0)
            kept("activations of the decoder")
            seen = fake + torch.randn_like(fake)
            losses = [-F.logsigmoid(maybe_checkpoint(score, seen, ["a few words"] * B)).mean()
                      for score in scores.values()]
            kept("activations of the rewards")
            losses.append(-F.logsigmoid(maybe_checkpoint(disc, seen)).mean())
            losses.append(((x - fake).abs() * where).mean())
            with torch.no_grad():
                real = features(x)
            losses += [(a - b).abs().mean() for a, b in zip(real, features(fake))]
            kept("activations of the coherence model and L_vgg")
        sum(losses).backward(inputs=[p for p in net.parameters() if p.requires_grad])
        with autocast:
            logits = disc(x + torch.randn_like(x)), disc(seen.detach())
        (F.softplus(-logits[0]) + F.softplus(logits[1])).mean().backward()
    return sum(losses).detach()


########################################## 4. the command ####################################################


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("script", choices=["omni", "pefl"], help="whose step; its own flags follow")
    parser.add_argument("--ranks", type=int, default=0, help="over how many --fsdp shards; 0: not sharded")
    own, flags = parser.parse_known_args()
    script = {"omni": train_omni, "pefl": train_pefl}[own.script]
    cfg = common.parse(script.Config, args=flags, prog=f"memory.py {own.script}",
                   config=(tyro.conf.FlagConversionOff, tyro.conf.UsePythonSyntaxForLiteralCollections))
    script.check(cfg)
    dist = common.setup(cfg.device)
    count = (count_omni if own.script == "omni" else count_pefl)(cfg, dist, own.ranks)
    print(count.report())


def count_omni(cfg: train_omni.Config, dist: common.Dist, ranks: int = 0) -> Rank:
    """Nothing is built and of public weights only the headers are read."""
    with torch.device("meta"):
        editor, known = train_omni.build(cfg, "meta")
        stride = 1 if editor.cfg.txt_bytes else VAE().stride
    base = editor.base if cfg.stage == "edit" else editor
    base.mmdit.checkpoint = cfg.checkpointing
    words, side = pipeline.text_tokens(editor, known), cfg.image_size // stride
    trained = common.n_params(editor, True) / 1e6
    print(f"{cfg.stage}: {common.n_params(editor) / 1e6:.1f} M parameters, {trained:.1f} M trained")
    img = (side // editor.cfg.patch) ** 2
    branch = ""
    if cfg.stage == "edit" and editor.variant != "concat":
        source = f" + {img} source" * (editor.variant in model.SOURCE_TOKENS)
        branch = f", branch {img} image{source} + {words} text"
    print(f"tokens a block: base {img} image + {words} text{branch}")
    latents = cfg.batch_size, editor.cfg.channels, side, side
    return omni(editor, latents, dist.device, common.use_bf16(cfg.precision, dist), ranks, words)


def count_pefl(cfg: train_pefl.Config, dist: common.Dist, ranks: int = 0) -> Rank:
    pipe = pipeline.open_editor(cfg.base, torch.device("cpu"), ("fill", "follow"), "--base", sd3=cfg.sd3,
                                tokenizers=cfg.tokenizers, cache=cfg.cache, mask_input=True)
    train_pefl.prepare_editor(cfg, pipe)
    opened = {f"{name} {i + 1}" if i else name: net for name, nets in train_pefl.open_rewards(cfg).items()
              for i, net in enumerate(nets)}
    vgg = load_vgg16(cfg.vgg) if cfg.vgg else None
    size, patch = train_pefl.side_of(cfg, pipe), pipe.net.cfg.patch * pipe.space.stride
    disc = open_coherence(cfg.disc_init, size, patch, "--disc_init")
    bf16 = common.use_bf16(cfg.precision, dist)
    return pefl(pipe.net, pipe.space, opened, disc, vgg, (cfg.batch_size, 3, size, size), dist.device, bf16,
                ranks, pipeline.text_tokens(pipe.net, pipe.stack), bool(cfg.checkpointing),
                train_pefl.rows_of(cfg))


if __name__ == "__main__":
    main()
