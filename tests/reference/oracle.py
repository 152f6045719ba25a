"""The method in plain transformers: exact prefill, then decoding that reads quantised image tokens.

This is what the vLLM backend is checked against, so it shares no code with it and prefers the shape
of the equations to speed: keys and values are really dequantised, scores are really computed twice.

* :func:`visual_pages` says which tokens share ranges (the layout of the KV cache).
* :func:`fake_quantise` and :func:`calibrate` are the two equations of the method (CalibQuant, arXiv
  2502.14882; ranges per page unless they are asked for per request).
* :class:`Oracle` runs a transformers model with an attention function that applies them.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AttentionInterface, BatchFeature, PreTrainedModel, ProcessorMixin

BLOCK_SIZE = 16
# Largest disagreement between two float32 implementations on a number of K or V, as a fraction of
# its channel's range.  Transformers against itself in float64: 2e-7 (deviation), 1.5e-6 (largest).
NOISE = 2e-6
_ATTENTION_NAME = "calibquant_oracle"


@dataclass(frozen=True)
class Method:
    """Numbers of the method.

    Parameters
    ----------
    bits
        Bits of each number of K and V of image tokens; 0 leaves them alone.
    key_clip, value_clip
        The factors c that shrink the extremes of a channel to the range of its codes.
    calibrate
        Whether scores of image tokens are rescaled before the softmax.
    tau_min, tau_max
        Amounts by which calibration lowers the smallest and the largest score.
    quantile
        Which quantile of a channel, and its mirror image, stand for the extremes.
    about_midpoint
        Whether the factors draw the extremes towards their midpoint, and not towards zero.
    per_request
        Whether all pages of a prompt share their ranges.
    hadamard
        Whether K and V are coded after a Walsh-Hadamard transform.
    exact_layers
        Decoder layers that are left alone.
    profile
        File with bases, bits and factors of every layer, which then decides all these; ``bits``
        is any positive number, and ``slots`` the blocks in a page.
    slots
        Blocks in a page, where a profile changes them.
    """

    bits: int
    key_clip: float = 1.0
    value_clip: float = 1.0
    calibrate: bool = False
    tau_min: float = 0.0
    tau_max: float = 3.0
    quantile: float = 0.0
    about_midpoint: bool = False
    per_request: bool = False
    hadamard: bool = False
    exact_layers: tuple[int, ...] = ()
    profile: Path | None = None
    slots: int = 0

    @classmethod
    def default(cls, bits: int) -> "Method":
        """Return what a server does that is told nothing but the width."""
        clips = {1: (0.55, 0.55), 2: (1.0, 0.9)}.get(bits, (1.0, 1.0))
        return cls(bits, *clips, about_midpoint=True)

    @classmethod
    def paper(cls, bits: int) -> "Method":
        """Return the settings of the authors' code at this width."""
        if bits == 1:
            return cls(bits, key_clip=0.5, value_clip=0.3, calibrate=True)
        return cls(bits, calibrate=bits == 2)


def slots_per_page(head_size: int, bits: int) -> int:
    """Return how many blocks of 16 image tokens fit the page that holds 16 tokens at 16 bits.

    Of the 64 D bytes of a page and KV head, 8 D hold scale and offset of every channel of K and V.
    Codes are bit planes, padded to a multiple of 32 for K and for V; planes that are no multiple of
    64 are stored for pairs of blocks.
    """
    planes = -(-bits * head_size // 32) * 32
    slots = 448 * head_size // (2 * planes) // BLOCK_SIZE
    return slots - slots % 2 if planes % 64 else slots


def visual_pages(is_visual: Sequence[bool], slots: int) -> list[list[int]]:
    """Lay out the visual blocks of a prompt that is prefilled in one step.

    Block i holds positions 16 i to 16 i + 15.  It is visual if all of them are image tokens.
    Visual blocks fill pages in order of position, whatever text or other images lie between them; a
    page that would hold a single block saves nothing, so that block stays at full precision.

    Parameters
    ----------
    is_visual
        For each position of the prompt, whether it is an image token.
    slots
        Blocks in a page.

    Returns
    -------
    list of list of int
        Block indices of each visual page.
    """
    blocks = [
        i
        for i in range(len(is_visual) // BLOCK_SIZE)
        if all(is_visual[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE])
    ]
    pages = [blocks[i : i + slots] for i in range(0, len(blocks), slots)]
    return [page for page in pages if len(page) > 1]


def quantise(
    x: torch.Tensor,
    bits: int | torch.Tensor,
    clip: float | torch.Tensor,
    quantile: float = 0.0,
    about_midpoint: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Express numbers in steps of the range that they share per channel.

    Parameters
    ----------
    x
        ``[..., tokens, channels]``, of the model's dtype, in which scale and offset are stored too.
    bits
        Bits of a code; one number or one for each channel.  A channel of none keeps its mean.
    clip
        Factor c on both ends of the range of each channel, likewise.
    quantile
        The ends are this quantile and its mirror image; 0 for minimum and maximum.
    about_midpoint
        Whether the factor draws the ends towards their midpoint, and not towards zero.

    Returns
    -------
    steps, scale, low : torch.Tensor
        float32.  Steps have the shape of ``x`` and lie in 0..2^bits - 1, not rounded yet; scale and
        offset are ``[..., 1, channels]``.  A code k stands for ``low + scale * k``.
    """
    levels = torch.as_tensor(2**bits - 1)
    low = x.float().quantile(quantile, -2, keepdim=True)
    high = x.float().quantile(1 - quantile, -2, keepdim=True)
    origin = (low + high) / 2 if about_midpoint else torch.zeros_like(low)
    low, high = (origin + clip * (end - origin) for end in (low, high))
    low = torch.where(levels > 0, low, x.float().mean(-2, keepdim=True))
    scale = torch.where(levels > 0, (high - low) / levels, 0).to(x.dtype).float()
    low = low.to(x.dtype).float()
    # A channel that is constant over the page has scale 0: its offset says all.
    steps = torch.where(scale > 0, (x.float() - low) / scale, 0)
    return steps.clamp(min=0).minimum(levels), scale, low


def fake_quantise(x: torch.Tensor, bits: int, clip: float) -> torch.Tensor:
    """Quantise and dequantise: what the codes say of ``x`` (see :func:`quantise`), in float32."""
    steps, scale, low = quantise(x, bits, clip)
    return low + scale * steps.round()


def _walsh_hadamard(size: int) -> torch.Tensor:
    """Return the matrix of (-1)^(number of bits that i and j share) over the root of its size."""
    shared = [[(i & j).bit_count() for j in range(size)] for i in range(size)]
    return (-1.0) ** torch.tensor(shared) / size**0.5


def calibrate(scores: torch.Tensor, tau_min: float, tau_max: float) -> torch.Tensor:
    """Move the smallest score of each row down by ``tau_min``, the largest by ``tau_max``.

    Parameters
    ----------
    scores
        ``[..., visual tokens]``, q k / sqrt(D).
    tau_min, tau_max
        Shifts of the two ends; what lies between moves linearly.

    Returns
    -------
    torch.Tensor
        The shape of ``scores``.
    """
    low = scores.amin(-1, keepdim=True)
    high = scores.amax(-1, keepdim=True)
    width = high - low
    # A negative slope (range smaller than the shift) would reverse the order of the tokens.
    slope = ((high - tau_max) - (low - tau_min)).clamp(min=0) / width
    slope = torch.where(width > 0, slope, 0)
    return low - tau_min + (scores - low) * slope


@dataclass(frozen=True)
class Generation:
    """A prompt and what follows it.

    Parameters
    ----------
    prompt_token_ids
        The prompt with image tokens expanded.
    pages
        Visual pages of the prompt, as lists of block indices.
    token_ids
        The tokens after the prompt.
    logprobs
        float32 ``[len(token_ids), vocabulary]``: row i is the distribution of token i.
    close_calls
        Numbers that could just as well have been rounded the other way, the closest first.
    """

    prompt_token_ids: list[int]
    pages: list[list[int]]
    token_ids: list[int]
    logprobs: torch.Tensor = field(repr=False)
    close_calls: "list[CloseCall]" = field(repr=False)

    @property
    def margin(self) -> float:
        """Smallest difference between the two best log-probabilities of a step."""
        best = self.logprobs.topk(2).values
        return (best[:, 0] - best[:, 1]).min().item()


@dataclass(frozen=True, order=True)
class CloseCall:
    """A number so close to the middle between two codes that float32 noise decides.

    Parameters
    ----------
    distance
        From the middle, as a fraction of the channel's unclipped range.
    layer, part, head, index, channel
        Where: decoder layer, 0 for K or 1 for V, KV head, index among the tokens in visual pages.
    other
        What the other code stands for.
    """

    distance: float
    layer: int
    part: int
    head: int
    index: int
    channel: int
    other: float


class Oracle:
    """A transformers model whose decoding reads image tokens through the equations.

    Parameters
    ----------
    model
        A vision-language model; the attention function of its text layers is replaced.
    processor
        The processor of the same checkpoint.
    method
        What happens to image tokens.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, method: Method) -> None:
        self.model = model.eval()
        self.processor = processor
        self.method = method
        text = model.config.text_config
        self.head_size = getattr(text, "head_dim", None) or (
            text.hidden_size // text.num_attention_heads
        )
        self._prompt: list[int] = []
        self._pages: list[list[int]] = []
        self._visual = torch.zeros(0, dtype=torch.int64)  # positions that live in visual pages
        self._dequantised: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._close_calls: list[CloseCall] = []
        self._flips: Collection[CloseCall] = ()
        self._profile = load_file(method.profile) if method.profile else {}

    @torch.inference_mode()
    def generate(self, text: str, images: Sequence[Image.Image], num_tokens: int) -> Generation:
        """Prefill a prompt exactly and in one chunk, then decode greedily without stopping.

        Parameters
        ----------
        text
            The prompt with one placeholder for each image.
        images
            The images, in order.
        num_tokens
            Number of tokens to generate; an end-of-sequence token is a token like others.

        Returns
        -------
        Generation
        """
        inputs = self._begin(text, images)
        output = self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=num_tokens,
            eos_token_id=[],
            output_logits=True,
            return_dict_in_generate=True,
        )
        token_ids = output.sequences[0, len(self._prompt) :].tolist()
        return self._result(token_ids, torch.cat(output.logits))

    @torch.inference_mode()
    def score(
        self,
        text: str,
        images: Sequence[Image.Image],
        token_ids: Sequence[int],
        flips: Collection[CloseCall] = (),
        hit: int = 0,
    ) -> Generation:
        """Compute the distributions from which given tokens were decoded, all tokens at once.

        If each token is the most probable of its row, they are what greedy decoding generates.

        Parameters
        ----------
        text, images
            The prompt, as for :meth:`generate`.
        token_ids
            The tokens after it.
        flips
            Close calls of an earlier result for the same prompt that shall go the other way.
        hit
            Tokens of the prompt, all images among them, that are in the prefix cache: what follows
            reads codes.

        Returns
        -------
        Generation
        """
        inputs = self._begin(text, images)
        self._flips = flips
        following = torch.tensor([token_ids])
        if hit:
            following = torch.cat([inputs["input_ids"][:, hit:], following], 1)
            for name in ("input_ids", "attention_mask"):
                inputs[name] = inputs[name][:, :hit]
        prefill = self.model(**inputs, use_cache=True)
        decode = self.model(input_ids=following, past_key_values=prefill.past_key_values)
        logits = torch.cat([prefill.logits[0], decode.logits[0]])
        logits = logits[-len(token_ids) - 1 : -1]
        return self._result(list(token_ids), logits)

    def _begin(self, text: str, images: Sequence[Image.Image]) -> BatchFeature:
        """Forget the last prompt, lay out the pages of this one and return the model's inputs."""
        inputs = self.processor(text=[text], images=list(images) or None, return_tensors="pt")
        self._prompt = inputs["input_ids"][0].tolist()
        slots = self.method.slots
        if self.method.bits and not slots:
            slots = slots_per_page(self.head_size, self.method.bits)
        image_token = self.model.config.image_token_id
        self._pages = visual_pages([t == image_token for t in self._prompt], slots) if slots else []
        blocks = torch.tensor([b for page in self._pages for b in page], dtype=torch.int64)
        self._visual = (blocks[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten()
        self._dequantised = {}
        self._close_calls = []
        self._flips = ()
        AttentionInterface.register(_ATTENTION_NAME, self._attention)
        self.model.set_attn_implementation({"text_config": _ATTENTION_NAME})
        return inputs.to(self.model.dtype)  # converts what is floating point only

    def _result(self, token_ids: list[int], logits: torch.Tensor) -> Generation:
        logprobs = logits.float().log_softmax(-1)
        calls = sorted(self._close_calls)
        return Generation(self._prompt, self._pages, token_ids, logprobs, calls)

    def _attention(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        **_: object,
    ) -> tuple[torch.Tensor, None]:
        """Attend exactly from the prompt, and through the codes from tokens after it.

        Parameters
        ----------
        module
            The attention layer.
        query
            ``[1, query heads, query tokens, D]`` after RoPE.
        key, value
            ``[1, KV heads, tokens, D]``, of all tokens so far, after RoPE.
        attention_mask
            Ignored: there is one sequence and no padding, and attention is causal.
        scaling
            Factor on scores.

        Returns
        -------
        tuple
            ``[1, query tokens, query heads, D]`` and no attention weights.
        """
        query, key, value = query[0].float(), key[0], value[0]
        first = key.shape[1] - query.shape[1]  # position of the first query
        layer = module.layer_idx
        is_exact = first == 0 or layer in self.method.exact_layers
        visual = self._visual[:0] if is_exact else self._visual
        if len(visual):
            if layer not in self._dequantised:
                self._dequantised[layer] = (
                    self._dequantise(key, layer, 0, self.method.key_clip),
                    self._dequantise(value, layer, 1, self.method.value_clip),
                )
            key, value = key.clone(), value.clone()
            key[:, visual], value[:, visual] = self._dequantised[layer]

        group = query.shape[0] // key.shape[0]
        key = key.float().repeat_interleave(group, 0)
        value_dtype, value = value.dtype, value.float().repeat_interleave(group, 0)
        scores = query @ key.transpose(1, 2) * scaling
        if self.method.calibrate and len(visual):
            scores[..., visual] = calibrate(
                scores[..., visual], self.method.tau_min, self.method.tau_max
            )
        positions = first + torch.arange(query.shape[1])
        future = torch.arange(key.shape[1]) > positions[:, None]
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        return (weights @ value).transpose(0, 1)[None].to(value_dtype), None

    def _dequantise(self, x: torch.Tensor, layer: int, part: int, clip: float) -> torch.Tensor:
        """Return what the codes say of the tokens in visual pages, and note the close calls.

        Parameters
        ----------
        x
            K after RoPE or V, ``[KV heads, tokens, D]``.
        layer, part
            Where ``x`` comes from, see :class:`CloseCall`.
        clip
            Factor c of the range.

        Returns
        -------
        torch.Tensor
            ``[KV heads, tokens in visual pages, D]`` in the order of positions, dtype of ``x``.
        """
        sizes = [len(page) * BLOCK_SIZE for page in self._pages]
        if self.method.per_request:
            sizes = [sum(sizes)]
        dtype, x, bits, basis, mean = x.dtype, x[:, self._visual], self.method.bits, None, None
        if self._profile:
            found = {
                name: self._profile[f"layers.{layer}.{('key', 'value')[part]}.{name}"]
                for name in ("basis", "mean", "bits", "factors")
            }
            basis, mean, bits, clip = found["basis"].float(), *list(found.values())[1:]
            x = torch.einsum("htd,hed->hte", x - mean[:, None], basis)
            bits = bits.long()
        elif self.method.hadamard:
            basis = _walsh_hadamard(x.shape[-1])
            mean = torch.zeros(x.shape[0], x.shape[-1])
            x = x.float() @ basis
        pages = []
        for page in x.split(sizes, dim=1):
            steps, scale, low = quantise(
                page, bits, clip, self.method.quantile, self.method.about_midpoint
            )
            codes = steps.round()
            # From steps to fractions of the range before clipping.
            levels = torch.as_tensor(2**bits - 1).clamp(min=1)
            distance = (steps - steps.floor() - 0.5).abs() * clip / levels
            distance = distance.masked_fill(scale == 0, 1.0)
            other = low + scale * (2 * steps.floor() + 1 - codes)
            start = sum(p.shape[1] for p in pages)
            self._close_calls += [
                CloseCall(
                    distance[h, i, c].item(), layer, part, h, start + i, c, other[h, i, c].item()
                )
                for h, i, c in (distance < NOISE).nonzero().tolist()
            ]
            pages.append(low + scale * codes)
        dequantised = torch.cat(pages, 1)
        for flip in self._flips:
            if (flip.layer, flip.part) == (layer, part):
                dequantised[flip.head, flip.index, flip.channel] = flip.other
        if basis is not None:
            dequantised = torch.linalg.solve(basis, dequantised.mT).mT + mean[:, None]
        return dequantised.to(dtype)
