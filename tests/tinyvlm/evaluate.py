"""Exact match of the tiny model through transformers, with fake-quantised visual keys and values.

``python -m tests.tinyvlm.evaluate --count 100 --schemes fp 2 1:k0.5:v0.3``

A scheme is ``fp`` or ``BITS[:gN][:kX][:vX][:cal]``: per-channel ranges over groups of N consecutive
visual tokens (all of them by default), stretched by X for keys (after rotary positions) and values;
``cal`` maps the visual scores of each query from [min, max] to [min, max - 3].  In mode ``decode``
only generated tokens read codes, as in CalibQuant's code; in mode ``ctx`` the question reads them
too, as after a prefix hit.

This path shares no code with the plugin: it is the yardstick for the plugin's answers.
"""

import argparse
import os
from collections import Counter, defaultdict
from dataclasses import dataclass

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoProcessor, DynamicCache, LlavaForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .dataset import SPLITS, examples
from .generator import TASKS
from .unpack import model_path
from .world import BOS, EOS

VISUAL = slice(1, 577)  # positions of the visual tokens: they follow the begin token
MAX_NEW_TOKENS = 20
CALIBRATION = 3.0  # tau_max of the paper's code


@dataclass(frozen=True)
class Scheme:
    """A parsed scheme; see the module's docstring."""

    bits: int
    group: int = VISUAL.stop - VISUAL.start
    key_range: float = 1.0
    value_range: float = 1.0
    calibrated: bool = False

    @classmethod
    def parse(cls, text):
        """Parse e.g. ``1:g64:k0.5:v0.3:cal``; None for ``fp``."""
        if text == "fp":
            return None
        bits, *parts = text.split(":")
        options = {}
        for part in parts:
            if part == "cal":
                options["calibrated"] = True
            elif part[0] == "g":
                options["group"] = int(part[1:])
            else:
                options[{"k": "key_range", "v": "value_range"}[part[0]]] = float(part[1:])
        return cls(int(bits), **options)


def fake_quantise(x, bits, group, stretch):
    """Round [B, heads, tokens, channels] to 2**bits levels between stretched extremes."""
    levels = 2**bits - 1
    out = []
    for part in x.float().split(group, dim=2):
        low = part.amin(2, keepdim=True) * stretch
        high = part.amax(2, keepdim=True) * stretch
        step = ((high - low) / levels).clamp(min=1e-8)
        out.append(((part - low) / step).clamp(0, levels).round() * step + low)
    return torch.cat(out, 2).to(x.dtype)


class Attention:
    """Attention of the decoder that reads visual tokens as a scheme says."""

    name = "tinyvlm_fake_quantised"

    def __init__(self):
        self.begin(None)
        ALL_ATTENTION_FUNCTIONS.register(self.name, self)

    def begin(self, scheme):
        """Start a batch: forget the codes of the last one."""
        self.scheme, self.active, self.coded = scheme, False, {}

    def __call__(self, module, query, key, value, attention_mask=None, scaling=None, **_):
        """Attend causally; tensors are [B, heads, tokens, channels]."""
        scheme = self.scheme if self.active else None
        if scheme:
            if module not in self.coded:  # the image does not change between steps
                self.coded[module] = (
                    fake_quantise(key[:, :, VISUAL], scheme.bits, scheme.group, scheme.key_range),
                    fake_quantise(
                        value[:, :, VISUAL], scheme.bits, scheme.group, scheme.value_range
                    ),
                )
            key, value = key.clone(), value.clone()
            key[:, :, VISUAL], value[:, :, VISUAL] = self.coded[module]
        repeat = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(repeat, 1) for t in (key, value))
        score = (query @ key.mT).float() * scaling
        if scheme and scheme.calibrated:
            x = score[..., VISUAL]
            low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
            slope = (high - CALIBRATION - low) / (high - low + 1e-8)
            score[..., VISUAL] = low + (x - low) * slope
        queries, keys = score.shape[-2:]
        future = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
        weight = score.masked_fill(future, float("-inf")).softmax(-1).to(query.dtype)
        return (weight @ value).transpose(1, 2).contiguous(), None


class Reader:
    """The model in transformers, asked in batches of questions of one length."""

    def __init__(self, path, dtype=torch.float32):
        self.attention = Attention()
        self.model = LlavaForConditionalGeneration.from_pretrained(path, dtype=dtype).eval()
        self.decoder = self.model.model.language_model
        self.decoder.config._attn_implementation = Attention.name
        self.processor = AutoProcessor.from_pretrained(path)

    @torch.no_grad()
    def answer(self, rows, schemes, mode="decode", batch_size=50):
        """Answer all examples under every scheme.

        Parameters
        ----------
        rows : list of Example
        schemes : list of str
        mode : {"decode", "ctx"}
        batch_size : int

        Returns
        -------
        dict of str to list of str
            The answers of each scheme, in the order of `rows`.
        """
        tokens = [
            self.processor.tokenizer(f"{row.question}\n", add_special_tokens=False)["input_ids"]
            for row in rows
        ]
        same_length = defaultdict(list)
        for i, ids in enumerate(tokens):
            same_length[len(ids)].append(i)
        answers = {scheme: [""] * len(rows) for scheme in schemes}
        for indices in same_length.values():
            for start in range(0, len(indices), batch_size):
                chosen = indices[start : start + batch_size]
                cache = self._prefill_images([rows[i].image for i in chosen])
                question = torch.tensor([tokens[i] for i in chosen])
                for scheme in schemes:
                    texts = self._decode(question, cache, Scheme.parse(scheme), mode)
                    for i, text in zip(chosen, texts, strict=True):
                        answers[scheme][i] = text
        return answers

    def _prefill_images(self, images):
        """Return a cache that holds the begin token and the image of each row, exactly."""
        self.attention.begin(None)
        pixels = self.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
        features = self.model.model.get_image_features(pixels.to(self.model.dtype)).pooler_output
        begin = self._embed(torch.full((len(images), 1), BOS))
        cache = DynamicCache()
        self._step(torch.cat([begin, torch.stack(list(features)).to(begin.dtype)], 1), cache)
        return cache

    def _embed(self, tokens):
        return self.model.get_input_embeddings()(tokens)

    def _step(self, embeddings, cache):
        out = self.decoder(inputs_embeds=embeddings, past_key_values=cache, use_cache=True)
        return out.last_hidden_state[:, -1]

    def _decode(self, question, cache, scheme, mode):
        """Decode greedily behind the images in `cache`, and take the cache back to them."""
        self.attention.begin(scheme)
        self.attention.active = mode == "ctx"
        state = self._step(self._embed(question), cache)
        self.attention.active = True
        steps, done = [], torch.zeros(len(question), dtype=torch.bool)
        for _ in range(MAX_NEW_TOKENS):
            token = self.model.lm_head(state).float().argmax(-1).masked_fill(done, EOS)
            steps.append(token)
            done |= token == EOS
            if done.all():
                break
            state = self._step(self._embed(token[:, None]), cache)
        cache.crop(VISUAL.stop - cache.get_seq_length())
        rows = torch.stack(steps, 1).tolist()
        return [self.processor.tokenizer.decode([t for t in row if t != EOS]) for row in rows]


def exact_match(rows, answers):
    """Return the share of right answers of each task, in percent."""
    right, total = Counter(), Counter()
    for row, answer in zip(rows, answers, strict=True):
        right[row.task] += answer == row.answer
        total[row.task] += 1
    return {task: 100 * right[task] / total[task] for task in total}


def main():
    """Command line: print a table of exact match, a row for each scheme."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="an unpacked or other directory; default: the packed model")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=100, help="of each task")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--schemes", nargs="+", default=["fp"])
    parser.add_argument("--mode", choices=("decode", "ctx"), default="decode")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    rows = list(examples(args.split, args.seed, args.count, args.tasks))
    reader = Reader(args.model or model_path(), getattr(torch, args.dtype))
    answers = reader.answer(rows, args.schemes, args.mode)
    print(f"| scheme | {' | '.join(args.tasks)} | mean |")
    print("|---" * (len(args.tasks) + 2) + "|")
    for scheme in args.schemes:
        score = exact_match(rows, answers[scheme])
        cells = " | ".join(f"{score[task]:.1f}" for task in args.tasks)
        print(f"| {scheme} | {cells} | {sum(score.values()) / len(score):.1f} |")


if __name__ == "__main__":
    main()
