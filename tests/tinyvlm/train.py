"""Train the tiny model from scratch.

``python -m tests.tinyvlm.train OUT.safetensors --steps 5000`` is the first stage (ten minutes on
one H100). The second, which teaches bar charts, goes on from it: ``--steps 1700 --init
OUT.safetensors --mix 0.4 0.2 0.4 --curriculum 0 --lr 1.5e-3 --adam-lr 1e-3 --warmup 60 --seed
4321``.
"""

import argparse
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from .generator import QUESTIONS, TASKS, Generator
from .network import TinyVLM
from .phrases import SEGMENT

EVAL_SEED = 777
NOISE = 0.06
COOLDOWN = 0.6  # share of the steps over which the learning rate falls to zero
LABEL_FREE_WEIGHT = 0.1  # of patches without a glyph in the auxiliary loss


class Muon(torch.optim.Optimizer):
    """Momentum with Newton-Schulz orthogonalisation, batched over equal shapes.

    Updates are scaled to the root mean square of AdamW's.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.02):
        super().__init__(list(params), {"lr": lr})
        self.momentum, self.weight_decay = momentum, weight_decay
        self.by_shape = {}
        for p in self.param_groups[0]["params"]:
            self.by_shape.setdefault(tuple(p.shape), []).append(p)
        self.buffers = {
            shape: torch.zeros(len(params), *shape, device=params[0].device)
            for shape, params in self.by_shape.items()
        }

    @staticmethod
    def orthogonalise(g):
        """Push the singular values of each matrix of [n, rows, columns] towards 1."""
        x = g.bfloat16() if g.is_cuda else g
        tall = x.shape[-2] > x.shape[-1]
        if tall:
            x = x.mT
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(5):
            a = x @ x.mT
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return (x.mT if tall else x).float()

    @torch.no_grad()
    def step(self):
        """Update all parameters from their gradients."""
        lr = self.param_groups[0]["lr"]
        for shape, params in self.by_shape.items():
            gradient = torch.stack([p.grad for p in params])
            buffer = self.buffers[shape]
            buffer.lerp_(gradient, 1 - self.momentum)
            update = self.orthogonalise(gradient.lerp(buffer, self.momentum))
            update *= 0.2 * math.sqrt(max(shape))
            torch._foreach_mul_(params, 1 - lr * self.weight_decay)
            torch._foreach_add_(params, list(update.unbind(0)), alpha=-lr)


class Trainer:
    """Model, optimisers and source of data."""

    def __init__(self, args, device, config=None):
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high")
        self.args, self.device = args, device
        self.model = TinyVLM(config)
        if args.init:
            state = {name: t.float() for name, t in load_file(args.init).items()}
            self.model.load_state_dict(state)
        self.model.to(device)
        if device == "cuda":
            for layer in [*self.model.tower.layers, *self.model.layers]:
                layer.compile(dynamic=False)
        named = list(self.model.named_parameters())
        hidden = [p for name, p in named if p.ndim == 2 and ".layers." in f".{name}"]
        chosen = {id(p) for p in hidden}
        self.rest = [p for _, p in named if id(p) not in chosen]
        self.muon = Muon(hidden, args.lr)
        self.adam = torch.optim.AdamW(
            self.rest, args.adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=device == "cuda"
        )
        grids, charts = (int(args.batch * share) for share in args.mix[1:])
        self.scenes = (args.batch - grids - charts, grids, charts)
        # Grids of shapes have no glyphs: the auxiliary loss is of documents and charts.
        index = torch.arange(args.batch)
        has_glyphs = (index < self.scenes[0]) | (index >= self.scenes[0] + grids)
        self.with_glyphs = index[has_glyphs].to(device)
        self.generator = Generator(args.seed, device)

    def losses(self, batch):
        """Return both losses and, per segment, whether each answer token is the most likely one."""
        cuda = self.device == "cuda"
        with torch.autocast(self.device, torch.bfloat16, enabled=cuda):
            images = batch.images.float() / 127.5 - 1
            images = images.to(torch.bfloat16 if cuda else torch.float32)
            hidden, features = self.model(images, batch.segments)
            logits = self.model.lm_head(hidden[:, :-1])
            target = batch.segments.flatten(1)[:, 1:]
            counts = batch.is_answer.flatten(1)[:, 1:]
            loss = F.cross_entropy(
                logits.flatten(0, 1).float(), target.flatten(), reduction="none"
            ).view_as(target)
            loss = (loss * counts).sum() / counts.sum()

            label = batch.labels[self.with_glyphs].flatten()
            guess = self.model.aux(features[self.with_glyphs])
            aux = F.cross_entropy(guess.view(len(label), -1).float(), label, reduction="none")
            weight = torch.where(label > 0, 1.0, LABEL_FREE_WEIGHT)
            aux = (aux * weight).sum() / weight.sum()
        right = (logits.argmax(-1) == target) | ~counts
        right = F.pad(right, (1, 0), value=True).view(-1, QUESTIONS, SEGMENT).all(-1)
        return loss, aux, right

    def train(self):
        """Run all steps; print a line every hundred and the exact match at the end."""
        args = self.args
        for step in range(args.steps):
            done = step / args.steps
            rate = min(1.0, (step + 1) / args.warmup) * min(1.0, (1 - done) / COOLDOWN)
            self.muon.param_groups[0]["lr"] = args.lr * rate + 1e-6
            self.adam.param_groups[0]["lr"] = args.adam_lr * rate + 1e-6
            ease = min(1.0, done / args.curriculum) if args.curriculum else 1.0
            batch = self.generator.batch(
                *self.scenes,
                noise=NOISE,
                max_lines=3 + int(5 * ease + 1e-6),
                max_length=max(5, min(8, 5 + int(4 * ease))),
            )
            loss, aux, _ = self.losses(batch)
            (loss + (1 - 0.8 * done) * aux).backward()
            torch.nn.utils.clip_grad_norm_(self.rest, 1.0)
            self.muon.step()
            self.adam.step()
            self.model.zero_grad(set_to_none=True)
            if step % 100 == 0:
                print(f"{step} loss {loss.item():.4f} aux {aux.item():.4f}", flush=True)
        print("exact match", {k: round(v, 4) for k, v in self.exact_match().items()})

    @torch.no_grad()
    def exact_match(self, batches=4):
        """Return the share of segments of each task whose answer tokens are all right."""
        generator = Generator(EVAL_SEED, self.device)
        right = {task: [] for task in TASKS}
        for _ in range(batches):
            batch = generator.batch(*self.scenes)
            is_right = self.losses(batch)[2]
            for index, task in enumerate(TASKS):
                right[task].append(is_right[batch.task == index].float())
        return {task: torch.cat(parts).mean().item() for task, parts in right.items()}


def parse_args(argv=None):
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--init", type=Path, help="start from this checkpoint")
    parser.add_argument("--lr", type=float, default=2e-3, help="of Muon, for hidden matrices")
    parser.add_argument("--adam-lr", type=float, default=2e-3, help="of AdamW, for the rest")
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument(
        "--curriculum", type=float, default=0.12, help="share of the steps with shorter documents"
    )
    parser.add_argument(
        "--mix", type=float, nargs=3, default=(0.6, 0.25, 0.15), help="documents, grids, charts"
    )
    parser.add_argument("--seed", type=int, default=1234)
    return parser.parse_args(argv)


def main():
    """Command line."""
    args = parse_args()
    trainer = Trainer(args, "cuda" if torch.cuda.is_available() else "cpu")
    trainer.train()
    state = trainer.model.state_dict()
    save_file({k: v.bfloat16().cpu().contiguous() for k, v in state.items()}, args.out)


if __name__ == "__main__":
    main()
