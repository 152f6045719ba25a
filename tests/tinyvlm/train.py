"""Train the tiny model.

``python -m tests.tinyvlm.train OUT --init packed --seconds 470`` goes on from the weights that the
repository holds; without ``--init`` it starts from nothing.  OUT gets the checkpoint in two halves
every minute, and at the end ``training.json`` and the packed weights.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from .checkpoint import Writer, load_checkpoint
from .generator import TASKS, Generator
from .network import TinyVLM
from .packing import KINDS, pack

EVAL_SEED = 777
NOISE = 0.06
COOLDOWN = 0.6  # share of the steps over which the learning rate falls to zero
LABEL_FREE_WEIGHT = 0.1  # of patches without a glyph in the auxiliary loss
VALUE_WEIGHT = 0.3  # of the auxiliary loss on the value of a bar that is asked for
SAVE_EVERY = 60  # seconds
PRINT_EVERY = 20  # steps


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
            load_checkpoint(self.model, args.init)
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
        self.with_glyphs = has_glyphs.to(device)
        self.generator = Generator(args.seed, device)

    def losses(self, batch, generator=None):
        """Return the losses (answers, glyphs, bars), and which answers are right, of which tasks.

        The last two are [n, answers]; an answer is right if each of its tokens is the most likely
        one behind the true ones before it.
        """
        cuda = self.device == "cuda"
        order, packed = pack(batch, generator or self.generator)
        with torch.autocast(self.device, torch.bfloat16, enabled=cuda):
            images = batch.images[order].float() / 127.5 - 1
            images = images.to(torch.bfloat16 if cuda else torch.float32)
            hidden, features = self.model(images, packed.tokens)
            logits = self.model.lm_head(hidden[:, :-1])
            target, answer = packed.tokens[:, 1:], packed.answer[:, 1:]
            counts = answer >= 0
            loss = F.cross_entropy(
                logits.flatten(0, 1).float(), target.flatten(), reduction="none"
            ).view_as(target)
            loss = (loss * counts).sum() / counts.sum()

            labelled = self.with_glyphs[order].nonzero().flatten()
            label = batch.labels[order[labelled]].flatten()
            guess = self.model.aux(features[labelled])
            glyphs = F.cross_entropy(guess.view(len(label), -1).float(), label, reduction="none")
            weight = torch.where(label > 0, 1.0, LABEL_FREE_WEIGHT)
            glyphs = (glyphs * weight).sum() / weight.sum()

            guess = self.model.aux_value(hidden).flatten(0, 1).float()
            value = packed.value.flatten()
            bars = F.cross_entropy(guess, value, ignore_index=0, reduction="sum")
            bars = bars / (value > 0).sum().clamp(min=1)
        wrong = torch.zeros_like(packed.task)
        missed = ((logits.argmax(-1) != target) & counts).long()
        wrong.scatter_add_(1, answer.clamp(min=0), missed)
        return (loss, glyphs, bars), wrong == 0, packed.task

    def train(self):
        """Run until the steps or the seconds are used up; save, print, and test at the end."""
        args, begin, log = self.args, time.monotonic(), []
        writer = Writer(args.out, SAVE_EVERY)
        step, done = 0, 0.0
        while done < 1:
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
            losses, right, task = self.losses(batch)
            loss, glyphs, bars = losses
            (loss + (1 - 0.8 * done) * (glyphs + VALUE_WEIGHT * bars)).backward()
            torch.nn.utils.clip_grad_norm_(self.rest, 1.0)
            self.muon.step()
            self.adam.step()
            self.model.zero_grad(set_to_none=True)
            if step % PRINT_EVERY == 0:
                seconds = time.monotonic() - begin
                values = {
                    "step": step,
                    "seconds": round(seconds, 1),
                    **{
                        name: round(value.item(), 4)
                        for name, value in zip(("loss", "glyphs", "bars"), losses, strict=True)
                    },
                    **{
                        name: round(right[task == TASKS.index(name)].float().mean().item(), 3)
                        for name in ("field", "count", "bar", "value")
                    },
                }
                if not math.isfinite(values["loss"]):
                    raise RuntimeError(f"training diverged: {values}")
                log.append(values)
                print(*(f"{k} {v}" for k, v in values.items()), flush=True)
                writer.save(self.model)
            step += 1
            # Of a GPU, this is the time at which a step is queued; printing waits for it.
            passed = (time.monotonic() - begin) / args.seconds if args.seconds else 0.0
            done = max(step / args.steps, passed)
        writer.save(self.model, now=True)
        writer.pack(self.model)
        report = {"steps": step, "seconds": time.monotonic() - begin, "log": log}
        report |= {"arguments": vars(args), "exact_match": self.exact_match()}
        print_table(report["exact_match"])
        writer.report(report)

    @torch.no_grad()
    def exact_match(self, batches=6):
        """Return the share of right answers in percent, by kind of prompt and task."""
        generator = Generator(EVAL_SEED, self.device)
        kinds = sorted(set(KINDS), key=KINDS.index)
        of_kind = torch.tensor([kinds.index(kind) for kind in KINDS], device=self.device)
        right = torch.zeros(len(kinds), len(TASKS), device=self.device)
        total = torch.zeros_like(right)
        for _ in range(batches):
            _, is_right, task = self.losses(generator.batch(*self.scenes), generator)
            cell = (of_kind * len(TASKS) + task).flatten()
            right.view(-1).scatter_add_(0, cell, is_right.flatten().float())
            total.view(-1).scatter_add_(0, cell, torch.ones_like(cell, dtype=torch.float))
        share = (100 * right / total.clamp(min=1)).tolist()
        return {
            kind: {task: round(share[i][j], 2) for j, task in enumerate(TASKS)}
            for i, kind in enumerate(kinds)
        }


def print_table(table):
    """Print exact match, a row for each kind of prompt."""
    print(f"| {'exact match, %':<26} | {' | '.join(f'{task:>6}' for task in TASKS)} |")
    for kind, row in table.items():
        print(f"| {kind:<26} | {' | '.join(f'{row[task]:6.2f}' for task in TASKS)} |", flush=True)


def parse_args(argv=None):
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--seconds", type=float, help="train for at most this long")
    parser.add_argument("--batch", type=int, default=256, help="pictures")
    parser.add_argument("--init", help='"packed", or the folder of a checkpoint')
    parser.add_argument("--lr", type=float, default=1.5e-3, help="of Muon, for hidden matrices")
    parser.add_argument("--adam-lr", type=float, default=1e-3, help="of AdamW, for the rest")
    parser.add_argument("--warmup", type=int, default=60, help="steps")
    parser.add_argument(
        "--curriculum", type=float, default=0.0, help="share of the steps with shorter documents"
    )
    parser.add_argument(
        "--mix", type=float, nargs=3, default=(0.38, 0.22, 0.4), help="documents, grids, charts"
    )
    parser.add_argument("--seed", type=int, default=1234)
    return parser.parse_args(argv)


def main():
    """Command line."""
    Trainer(parse_args(), "cuda" if torch.cuda.is_available() else "cpu").train()


if __name__ == "__main__":
    main()
