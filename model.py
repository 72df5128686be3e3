"""The network: MobileNetV3-Small backbone, exact upsampling in time, BiLSTM, CTC head; and how its
output is read.

    python model.py CHECKPOINT                          what it is, what it was trained on, how well
    python model.py CHECKPOINT clip.wav ... [--times]   transcripts, with the time of every word
    python model.py CHECKPOINT clip.wav --beam 16       ... by beam search with a character model
    python model.py CHECKPOINT clip.wav --plot p.png    what it hears, and how sure it is, over time

    log-mels     (B, 1, T, 80)        100 frames a second, each clip with its true length
    backbone     (B, 24, T/4, 10)     MobileNetV3-Small's stem and first 3 blocks: the early path
                 (B, 576, T/8, 3)     all of it: the deep path
    projection   (B, T/4, 256)        bands and channels of each path flattened, one linear layer
                 (B, T/8, 256)
    upsampling   (B, T', 256)         each path, T' = ceil(T / frames_per_output), by interpolation;
                                      then early + gate * deep, the gate learnt and small at first
    BiLSTM x 2   (B, T', 512)
    head         (B, T', V)           linear, then log_softmax in float32; symbol 0 is CTC's blank

A *frame* is 10 ms of mels, an *output* the distribution over symbols for frames_per_output of
them, a *label* one character of the transcript. Every padded tensor travels with its lengths, and
every operation along time uses valid frames only: in eval mode a clip alone and the same clip in a
padded batch give the same output. (In training, batch norm's statistics include the padding, of
which batches of nearly equal lengths have little.)

From Python:

    checkpoint = model.load_checkpoint('runs/.../best.pt')
    wave = data.read_wave('clip.wav')
    print(model.transcribe(checkpoint, wave).text)

References: Howard et al. 2019, "Searching for MobileNetV3" (table 2: the blocks; section 6.4: two
paths, added); Touvron et al. 2021, "Going deeper with image transformers" (LayerScale: the gate);
Graves et al. 2006, "Connectionist Temporal Classification"; Jozefowicz et al. 2015 (forget bias 1);
Glorot & Bengio 2010 (Xavier initialisation); He et al. 2015 (initialisation of the convolutions);
Hannun et al. 2014, "First-pass large vocabulary continuous speech recognition using bi-directional
recurrent DNNs" (prefix beam search); Witten & Bell 1991 (the character model's smoothing); Zeyer et
al. 2021, "Why does CTC result in peaky behavior?".
"""
import argparse
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BlockSpec(NamedTuple):
    """One row of MobileNetV3-Small's table of blocks."""
    kernel: int
    expanded: int            # channels of the depthwise convolution
    channels: int            # channels that leave the block
    squeeze_excite: bool     # where Config.squeeze_excite allows it
    activation: type[nn.Module]
    time_stride: int         # ours: an image is as wide as it is high, speech is not
    frequency_stride: int    # the table's


STEM_CHANNELS, LAST_CHANNELS = 16, 576
STEM_STRIDE = (2, 2)  # in time, in frequency
BLOCKS = [  # Howard et al. 2019, table 2
    BlockSpec(3, 16, 16, True, nn.ReLU, 1, 2),        # 20 ms, as the stem left it
    BlockSpec(3, 72, 24, False, nn.ReLU, 2, 2),       # 40 ms
    BlockSpec(3, 88, 24, False, nn.ReLU, 1, 1),
    BlockSpec(5, 96, 40, True, nn.Hardswish, 2, 2),   # 80 ms
    BlockSpec(5, 240, 40, True, nn.Hardswish, 1, 1),
    BlockSpec(5, 240, 40, True, nn.Hardswish, 1, 1),
    BlockSpec(5, 120, 48, True, nn.Hardswish, 1, 1),
    BlockSpec(5, 144, 48, True, nn.Hardswish, 1, 1),
    BlockSpec(5, 288, 96, True, nn.Hardswish, 1, 2),
    BlockSpec(5, 576, 96, True, nn.Hardswish, 1, 1),
    BlockSpec(5, 576, 96, True, nn.Hardswish, 1, 1),
]
EARLY_BLOCK = 3  # the last block at 40 ms; the early path leaves from its output
GATE = 0.1       # initial weight of the deep path; starting at 1, both paths learn more slowly


@dataclass
class Config:
    """What a checkpoint needs to rebuild its network; the defaults are ours.

    Raises ValueError where a value is out of its range.
    """
    vocab_size: int                 # V: the alphabet and the blank
    n_mels: int = 80
    blocks: int = 11                # of the table; with all of them its last convolution too
    frames_per_output: int = 2      # frames of 10 ms that one output stands for: 1, 2 or 4
    deep_path: str = 'gated'        # early + gate * deep; or 'alone', without the early path
    upsample: str = 'interpolate'   # or 'transpose': ConvTranspose1d
    squeeze_excite: bool = False
    projection: int = 256
    hidden: int = 256               # LSTM units in each direction
    layers: int = 2
    dropout: float = 0.05           # before each LSTM layer and the head
    output_init: str = 'xavier'     # of the head; or 'normal', of deviation 0.01
    weight_init: float = 0.02       # standard deviation of the projections' initial weights
    forget_bias: bool = True        # init_lstm: forget bias 1, orthogonal; False: PyTorch's own

    def __post_init__(self):
        if self.frames_per_output not in (1, 2, 4):
            raise ValueError('frames_per_output must be 1, 2 or 4')
        if not 2 <= self.blocks <= len(BLOCKS):
            raise ValueError(f'blocks must be 2 to {len(BLOCKS)}')
        if not 0 <= self.dropout < 1:
            raise ValueError('dropout must be at least 0 and below 1')
        if min(self.vocab_size, self.n_mels, self.projection, self.hidden, self.layers) < 1:
            raise ValueError('vocab_size, n_mels, projection, hidden and layers must be 1 or more')
        if self.deep_path not in ('gated', 'alone'):
            raise ValueError('deep_path must be gated or alone')
        if self.upsample not in ('interpolate', 'transpose'):
            raise ValueError('upsample must be interpolate or transpose')
        if self.output_init not in ('xavier', 'normal'):
            raise ValueError('output_init must be xavier or normal')


# ---- operations along time, which are given the clips' lengths -----------------------------------

def valid_frames(frames: int, lengths: Tensor) -> Tensor:
    """The mask (B, frames) that is true within each clip's length (B,) and false in its padding."""
    return torch.arange(frames, device=lengths.device) < lengths[:, None]


def zero_padding(x: Tensor, lengths: Tensor) -> Tensor:
    """Set x (B, C, T, F) to zero after each clip's end.

    Before a convolution, padding must equal the zeros that the convolution itself pads a clip alone
    with; batch norm and activations make it non-zero again.
    """
    return x * valid_frames(x.shape[2], lengths)[:, None, :, None]


def mean_over_time(x: Tensor, lengths: Tensor) -> Tensor:
    """Average x (B, C, T, F) over its valid frames and all bands -> (B, C, 1, 1).

    A plain average over padding makes word error rates depend on the batch size.
    """
    total = zero_padding(x, lengths).sum((2, 3), keepdim=True)
    count = lengths * x.shape[3]
    return total / count[:, None, None, None]


def hold_last(x: Tensor, lengths: Tensor) -> Tensor:
    """Repeat each clip's last valid frame to the end: x (B, T, C) -> (B, T + 1, C).

    Interpolation looks one frame ahead, and what it finds there must not depend on the padding.
    """
    index = torch.arange(x.shape[1] + 1, device=x.device).minimum(lengths[:, None] - 1)
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def reverse_time(x: Tensor, lengths: Tensor) -> Tensor:
    """Reverse each clip of x (B, T, C) within its own length; padding stays after it. Its own
    inverse."""
    batch, frames, _ = x.shape
    t = torch.arange(frames, device=x.device)
    source = torch.where(valid_frames(frames, lengths), lengths[:, None] - 1 - t, t)  # (B, T)
    rows = source + torch.arange(batch, device=x.device)[:, None] * frames
    # index_select copies whole rows, where gather picks single numbers: three times as fast.
    return x.flatten(0, 1).index_select(0, rows.flatten()).view_as(x)


# ---- the backbone --------------------------------------------------------------------------------

class BatchNorm(nn.BatchNorm2d):
    """Batch norm whose running statistics are usable after few updates.

    MobileNetV3's own momentum, 0.01, leaves 37 % of the initial statistics after 100 updates; 0.1,
    used here, leaves 20 % after 15, so a network that has learnt would score badly in eval mode.
    Therefore the statistics begin as the plain average of the first ten batches.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.momentum = max(0.1, 1 / (1 + self.num_batches_tracked.item()))
        return super().forward(x)


class ConvNorm(nn.Sequential):
    """Convolution, batch norm, activation: (B, C, T, F) -> (B, C', ceil(T / stride), ceil(F /
    stride)).

    Symmetric padding centres output i on input i * stride.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int = 1, stride: tuple[int, int] = (1, 1),
                 groups: int = 1, activation: type[nn.Module] = nn.Identity):
        super().__init__(
            nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
            BatchNorm(c_out, eps=1e-3),
            activation())


def strided_length(length: int | Tensor, stride: int) -> int | Tensor:
    """ceil(length / stride) of whole numbers: what ConvNorm makes of a length."""
    return (length + stride - 1) // stride


class SqueezeExcite(nn.Module):
    """Channel gates from the clip's mean (Howard et al. 2019, section 5.3)."""

    def __init__(self, channels: int):
        super().__init__()
        # A quarter, rounded to a multiple of 8, as in the reference code.
        squeezed = max(8, (channels // 4 + 4) // 8 * 8)
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        gates = self.expand(F.relu(self.reduce(mean_over_time(x, lengths))))
        return x * F.hardsigmoid(gates)


class Bottleneck(nn.Module):
    """MobileNetV3's block: 1x1 expansion, depthwise k x k, squeeze-excite, 1x1 projection, identity
    where it fits.

    x (B, C, T, F) and lengths (B,) -> the same, strided as the spec says.
    """

    def __init__(self, c_in: int, spec: BlockSpec, squeeze_excite: bool):
        super().__init__()
        stride = (spec.time_stride, spec.frequency_stride)
        self.time_stride = spec.time_stride
        self.expand = nn.Identity()
        if spec.expanded != c_in:
            self.expand = ConvNorm(c_in, spec.expanded, activation=spec.activation)
        self.depthwise = ConvNorm(spec.expanded, spec.expanded, spec.kernel, stride,
                                  groups=spec.expanded, activation=spec.activation)
        self.squeeze_excite = None
        if spec.squeeze_excite and squeeze_excite:
            self.squeeze_excite = SqueezeExcite(spec.expanded)
        self.project = ConvNorm(spec.expanded, spec.channels)  # the block's, not Config.projection
        self.residual = c_in == spec.channels and stride == (1, 1)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        y = self.depthwise(zero_padding(self.expand(x), lengths))
        lengths = strided_length(lengths, self.time_stride)
        if self.squeeze_excite is not None:
            y = self.squeeze_excite(y, lengths)
        y = self.project(y)
        return (x + y if self.residual else y), lengths


# ---- upsampling and recurrence -------------------------------------------------------------------

def upsample(x: Tensor, lengths: Tensor, stride: int, frames_per_output: int,
             outputs: int) -> Tensor:
    """Interpolate features on a coarse grid linearly to the grid of the outputs, aligned in time.

    x (B, T / stride, C), one feature every `stride` mel frames, with lengths (B,)
    -> (B, outputs, C), one every `frames_per_output` mel frames.

    The ratio is a whole number and the surplus is cropped: F.interpolate(size=outputs) would
    stretch a padded batch by its padded length, and a clip's features would depend on its
    neighbours. F.interpolate takes feature i for the middle of its `stride` frames, but the
    convolutions centred it on the first; so its result comes (stride - 1) / 2 mel frames late.
    Those are dropped, in whole outputs: at most half a mel frame of error is left. Where there is
    nothing to interpolate, nothing is dropped, and at 4 frames an output a feature sits 1.5 frames
    before the output's middle.
    """
    ratio = stride // frames_per_output
    if ratio == 1:
        return x[:, :outputs]
    delay = round((stride - 1) / 2 / frames_per_output)
    x = hold_last(x, lengths).transpose(1, 2)  # (B, C, T / stride + 1)
    x = F.interpolate(x, size=x.shape[2] * ratio, mode='linear', align_corners=False)
    return x[:, :, delay:delay + outputs].transpose(1, 2)  # aligned: output t, sound t


class BiLSTM(nn.Module):
    """One bidirectional layer (B, T, C) -> (B, T, 2 * hidden), made of two forward ones.

    Padding after the end never reaches a forward LSTM, so the backward one gets each clip reversed
    within its own length. Packed sequences do the same, 3 to 9 times slower on a CPU.
    """

    def __init__(self, c_in: int, hidden: int):
        super().__init__()
        self.forward_lstm = nn.LSTM(c_in, hidden, batch_first=True)
        self.backward_lstm = nn.LSTM(c_in, hidden, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        backward, _ = self.backward_lstm(reverse_time(x, lengths))
        forward, _ = self.forward_lstm(x)
        return torch.cat([forward, reverse_time(backward, lengths)], 2)


# ---- the recogniser ------------------------------------------------------------------------------

class Branch(nn.Module):
    """One path from the backbone to the outputs' grid: flatten, project, upsample.

    x (B, C, T / stride, F) and lengths (B,) -> (B, outputs, projection).
    """

    def __init__(self, size: int, stride: int, config: Config):
        super().__init__()
        self.stride = stride  # mel frames per feature
        self.frames_per_output = config.frames_per_output
        self.projection = nn.Linear(size, config.projection)
        self.transposed_conv = None
        if config.upsample == 'transpose':
            ratio = stride // config.frames_per_output
            self.transposed_conv = nn.ConvTranspose1d(config.projection, config.projection,
                                                      kernel_size=ratio, stride=ratio)

    def output_lengths(self, lengths: int | Tensor) -> int | Tensor:
        """The number of outputs for clips of these many mel frames: ceil(T / frames_per_output).

        ConvTranspose1d gives ceil(T / stride) features times its own stride, too many for most
        clips, and that is what it reports: labels may be emitted after the end of the clip.
        """
        if self.transposed_conv is None:
            return strided_length(lengths, self.frames_per_output)
        return strided_length(lengths, self.stride) * (self.stride // self.frames_per_output)

    def forward(self, x: Tensor, lengths: Tensor, outputs: int) -> Tensor:
        x = self.projection(x.permute(0, 2, 3, 1).flatten(2))               # (B, T / stride, 256)
        if self.transposed_conv is not None:
            return self.transposed_conv(x.transpose(1, 2)).transpose(1, 2)[:, :outputs]
        return upsample(x, lengths, self.stride, self.frames_per_output, outputs)


class Recogniser(nn.Module):
    """log-mels (B, 1, T, n_mels), lengths (B,) in frames -> log-probabilities (B, T', V), lengths
    (B,)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.stem = ConvNorm(1, STEM_CHANNELS, 3, STEM_STRIDE, activation=nn.Hardswish)
        self.blocks = nn.ModuleList()
        self.last = nn.Identity()
        self.early = None
        self.gate = None
        channels, bands = STEM_CHANNELS, strided_length(config.n_mels, STEM_STRIDE[1])
        stride = STEM_STRIDE[0]
        for number, spec in enumerate(BLOCKS[:config.blocks], 1):
            self.blocks.append(Bottleneck(channels, spec, config.squeeze_excite))
            channels, bands = spec.channels, strided_length(bands, spec.frequency_stride)
            stride *= spec.time_stride
            if number == EARLY_BLOCK and number < config.blocks and config.deep_path == 'gated':
                self.early = Branch(channels * bands, stride, config)
                self.gate = nn.Parameter(torch.full((config.projection,), GATE))
        if config.blocks == len(BLOCKS):
            self.last = ConvNorm(channels, LAST_CHANNELS, activation=nn.Hardswish)
            channels = LAST_CHANNELS
        self.deep = Branch(channels * bands, stride, config)
        sizes = [config.projection] + [2 * config.hidden] * (config.layers - 1)
        self.recurrent = nn.ModuleList(BiLSTM(size, config.hidden) for size in sizes)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(2 * config.hidden, config.vocab_size)
        init_weights(self)
        self.to(memory_format=torch.channels_last)  # depthwise convolutions: twice as fast on a CPU

    def output_lengths(self, lengths: int | Tensor) -> int | Tensor:
        """The number of outputs for clips of these many mel frames, of the path that has fewest."""
        return (self.early or self.deep).output_lengths(lengths)

    def before_lstm(self, mels: Tensor, lengths: Tensor) -> Tensor:
        """All that comes before the LSTM: (B, 1, T, n_mels), (B,) -> (B, T', projection)."""
        outputs = self.output_lengths(mels.shape[2])
        x = mels.to(memory_format=torch.channels_last)
        x = self.stem(zero_padding(x, lengths))
        lengths = strided_length(lengths, STEM_STRIDE[0])
        for number, block in enumerate(self.blocks, 1):
            x, lengths = block(x, lengths)
            if number == EARLY_BLOCK and self.early is not None:
                early = self.early(x, lengths, outputs)
        deep = self.deep(self.last(x), lengths, outputs)
        return deep if self.early is None else early + self.gate * deep

    def forward(self, mels: Tensor, lengths: Tensor,
                every_layer: bool = False) -> tuple[Tensor | list[Tensor], Tensor]:
        """-> (log-probabilities, output lengths).

        every_layer: in place of the first, a list: the head applied to each LSTM layer, the last of
        which is the output.
        """
        x, lengths = self.before_lstm(mels, lengths), self.output_lengths(lengths)
        layers = []
        for layer in self.recurrent:
            x = layer(self.dropout(x), lengths)
            if every_layer or layer is self.recurrent[-1]:
                layers.append(F.log_softmax(self.head(self.dropout(x)).float(), -1))  # (B, T', V)
        return (layers if every_layer else layers[-1]), lengths


# ---- initialisation ------------------------------------------------------------------------------

def init_lstm(lstm: nn.LSTM) -> None:
    """Orthogonal recurrent and Xavier input weights, gate by gate; biases 0, the forget gate's 1.

    Forget gates that start open let gradients reach far back (Jozefowicz et al. 2015).
    """
    for name, tensor in lstm.named_parameters():
        if 'bias' in name:
            nn.init.zeros_(tensor)
            continue
        for gate in tensor.chunk(4):  # input, forget, cell, output
            if 'hh' in name:
                nn.init.orthogonal_(gate)
            else:
                nn.init.xavier_uniform_(gate)
    # PyTorch adds two biases: 1 in total.
    lstm.bias_ih_l0.data[lstm.hidden_size:2 * lstm.hidden_size] = 1


def init_weights(model: Recogniser) -> None:
    """Draw the weights of each layer by its role.

    The weights of the head and the projections must be large enough to pass the gradient on: with
    normal(0, 0.01), MobileNetV3's for its classifier, it shrinks at each of these layers.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # He et al. 2015, as in torchvision's MobileNetV3
            nn.init.kaiming_normal_(module.weight, mode='fan_out')
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, model.config.weight_init)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LSTM) and model.config.forget_bias:
            init_lstm(module)
    if model.config.output_init == 'xavier':
        nn.init.xavier_uniform_(model.head.weight)
    else:
        nn.init.normal_(model.head.weight, 0, 0.01)


# ---- CTC, and decoding ---------------------------------------------------------------------------
#
# CTC (Graves et al. 2006) trains on a text without knowing when each letter was said. Its symbols
# are the letters and a blank, "-". A path is one symbol for each output; it collapses to a text:
# repeats merge, then blanks are dropped. The likelihood of a text is the sum over all paths that
# collapse to it, the loss minus the logarithm of that sum. By hand, for three outputs and "ab":
#
#     output         1    2    3          path   likelihood
#     P(-)          0.2  0.3  0.6         aab    0.7 * 0.2 * 0.3 = 0.042
#     P(a)          0.7  0.2  0.1         abb    0.7 * 0.5 * 0.3 = 0.105
#     P(b)          0.1  0.5  0.3         -ab    0.2 * 0.2 * 0.3 = 0.012
#                                         a-b    0.7 * 0.3 * 0.3 = 0.063
#     loss = -ln 0.432 = 0.839            ab-    0.7 * 0.5 * 0.6 = 0.210    sum 0.432
#
# "aa" needs the path a-a: without the blank, the two would merge. F.ctc_loss sums over all paths by
# dynamic programming; test_ctc_loss_against_all_paths lists them instead, and finds the same loss.

class Emission(NamedTuple):
    """A symbol that a path emits, and the first and the last output that hold it."""
    symbol: int
    first: int
    last: int


def collapse(path: Sequence[int]) -> list[Emission]:
    """Merge a path's repeats and drop its blanks.

    [0, 1, 1, 0, 1, 2] -> [(1, 1, 2), (1, 4, 4), (2, 5, 5)]: the symbols 1, 1, 2.
    """
    emissions = []
    first = 0
    for t, symbol in enumerate(path):
        if t + 1 < len(path) and path[t + 1] == symbol:
            continue
        if symbol != 0:
            emissions.append(Emission(symbol, first, t))
        first = t + 1
    return emissions


def greedy_decode(log_probs: Tensor, lengths: Tensor) -> list[list[int]]:
    """Collapse the path of each output's likeliest symbol (Graves et al. 2006, section 3.2).

    log_probs (B, T', V), lengths (B,) -> B lists of symbols.
    """
    paths = log_probs.argmax(2).tolist()
    return [[emission.symbol for emission in collapse(path[:length])]
            for path, length in zip(paths, lengths.tolist())]


MOST_STEPS = 2_000_000_000  # of an alignment: a byte each


def align(log_probs: Tensor, symbols: Sequence[int]) -> list[Emission]:
    """When each symbol of a text is emitted, on the likeliest of the paths that collapse to it.

    log_probs (T', V). The states are blank, symbol, blank, ..., blank; a path stays, goes one state
    on, or skips the blank between two different symbols (Viterbi's algorithm on the lattice of
    Graves et al. 2006, figure 3). Raises ValueError where the text is too long for the outputs, or
    both are too long for memory.
    """
    states = [0]
    for symbol in symbols:
        states += [symbol, 0]
    if len(states) * len(log_probs) > MOST_STEPS:
        raise ValueError(f'{len(symbols)} symbols in {len(log_probs)} outputs are too many to '
                         'align')
    never = -math.inf
    skips = torch.tensor([k > 1 and s != 0 and s != states[k - 2] for k, s in enumerate(states)])
    score = torch.full((len(states),), never)
    score[:2] = log_probs[0, states[:2]]
    steps = []
    for t in range(1, len(log_probs)):
        one = F.pad(score[:-1], (1, 0), value=never)
        two = F.pad(score[:-2], (2, 0), value=never)[:len(states)].masked_fill(~skips, never)
        best, step = torch.stack([score, one, two]).max(0)
        score = best + log_probs[t, states]                            # (2L + 1,)
        steps.append(step.to(torch.uint8))
    state = len(states) - 1
    if state and score[state - 1] >= score[state]:
        state -= 1
    if score[state] == never:
        raise ValueError(f'{len(symbols)} symbols do not fit {len(log_probs)} outputs')
    path = [state]
    for step in reversed(steps):
        state -= int(step[state])
        path.append(state)
    path.reverse()
    return [Emission(symbol, path.index(2 * i + 1), len(path) - 1 - path[::-1].index(2 * i + 1))
            for i, symbol in enumerate(symbols)]


# ---- a character model, and beam search ----------------------------------------------------------

END = '\n'                 # of a sentence, for the character model
UNHEARD = math.exp(-9)     # probability below which a symbol is not tried
LM_BYTES = 20_000_000      # of a character model in a checkpoint


class CharacterModel:
    """How likely a text's next character is after the last few: an n-gram.

    counts: {context: {character: how often it followed}}, for contexts of no to order - 1
    characters. With N followers of a context, of T kinds, Witten & Bell (1991) take

        P(c | context) = (count(c) + T * P(c | context without its first character)) / (N + T)

    and at the empty context all kinds equally likely, with one more for what was never seen. Of
    the texts "ab" and "aa" (order 2; "|" ends a sentence): after a came b, a, | once each, so
    P(b | a) = (1 + 3 * P(b)) / (3 + 3), and P(b) = (1 + 3 / 4) / (6 + 3) = 0.194.
    """

    def __init__(self, counts: Mapping[str, Mapping[str, int]]):
        self.counts = counts
        self.totals = {context: sum(following.values()) for context, following in counts.items()}
        self.longest = max(map(len, counts), default=0)
        self.known = {}

    @classmethod
    def of_texts(cls, texts: Iterable[str], order: int = 6) -> 'CharacterModel':
        """Count the n-grams of texts, the ends of sentences included."""
        counts = {'': Counter()}
        for text, times in Counter(texts).items():
            text += END
            for i, character in enumerate(text):
                for start in range(max(0, i - order + 1), i + 1):
                    counts.setdefault(text[start:i], Counter())[character] += times
        return cls(counts)

    def pruned(self, most_bytes: int = LM_BYTES) -> 'CharacterModel':
        """The same without its rarest contexts, of equally rare ones the longest first, so that its
        counts take at most so many bytes as JSON."""
        sizes = {context: len(json.dumps({context: following}))
                 for context, following in self.counts.items()}
        excess = sum(sizes.values()) - most_bytes
        kept = dict(self.counts)
        for context in sorted(kept, key=lambda context: (self.totals[context], -len(context))):
            if excess <= 0:
                break
            excess -= sizes[context]
            del kept[context]
        return CharacterModel(kept)

    def log_prob(self, text: str, character: str) -> float:
        """Of the character after the text, in nats."""
        context = text[len(text) - min(self.longest, len(text)):]
        key = context + character
        if key not in self.known:
            self.known[key] = math.log(self.probability(context, character))
        return self.known[key]

    def probability(self, context: str, character: str) -> float:
        """Of the character after a context of at most order - 1 characters."""
        probability = 1 / (len(self.counts.get('', ())) + 1)
        for start in range(len(context), -1, -1):
            following = self.counts.get(context[start:])
            if following is None:
                break
            kinds = len(following)
            probability = ((following.get(character, 0) + kinds * probability)
                           / (self.totals[context[start:]] + kinds))
        return probability


class Decoding(NamedTuple):
    """How outputs become a text: greedily at width 0, else by beam search.

    The weights were chosen on dev of AN4 and of kathleen together (results/README.md).
    """
    width: int = 16
    lm_weight: float = 0.6
    label_bonus: float = 1.5


GREEDY = Decoding(width=0)


def grow(beam: Mapping[str, tuple[float, float]], probabilities: Sequence[float],
         alphabet: Sequence[str]) -> dict[str, tuple[float, float]]:
    """The texts that those of a beam become with one output more, the same ones included.

    Each has the probability of its paths that end in a blank and of those that end in its last
    symbol: only after a blank does the same symbol begin anew.
    """
    heard = [(alphabet[symbol], p) for symbol, p in enumerate(probabilities)
             if symbol and p > UNHEARD]
    grown = {}
    for text, (ends_blank, ends_symbol) in beam.items():
        total = ends_blank + ends_symbol
        repeated = 0.0
        for character, p in heard:
            begins = p * total
            if character == text[-1:]:
                repeated = p * ends_symbol
                begins = p * ends_blank
            longer = text + character
            after_blank, after_symbol = grown.get(longer, (0.0, 0.0))
            grown[longer] = (after_blank, after_symbol + begins)
        after_blank, after_symbol = grown.get(text, (0.0, 0.0))
        grown[text] = (after_blank + probabilities[0] * total, after_symbol + repeated)
    return {text: ends for text, ends in grown.items() if sum(ends)}


def beam_decode(log_probs: Tensor, alphabet: Sequence[str],
                language_model: CharacterModel | None, decoding: Decoding) -> str:
    """The text of the highest score, by prefix beam search (Hannun et al. 2014, algorithm 1).

    log_probs (T', V) of one clip. A text's score, in nats, is that of all its paths together
    + lm_weight * the character model's + label_bonus * its length, which offsets the language
    model's preference for short texts; without a model, or at weight 0, it is that of the paths
    alone. After each output the `width` best beginnings are kept.
    """
    width, lm_weight, label_bonus = decoding
    weighs = language_model is not None and lm_weight != 0
    bonus = label_bonus if weighs else 0.0

    def gain(text, character):
        return lm_weight * language_model.log_prob(text, character) if weighs else 0.0

    def score(text):
        return math.log(sum(beam[text])) + prior[text]

    beam = {'': (1.0, 0.0)}
    prior = {'': 0.0}   # of a text: what is added to the logarithm of its paths' probability
    for probabilities in log_probs.exp().tolist():
        beam = grow(beam, probabilities, alphabet)
        for text in beam:
            if text not in prior:
                prior[text] = prior[text[:-1]] + bonus + gain(text[:-1], text[-1])
        best = sorted(beam, key=score, reverse=True)[:width]
        prior = {text: prior[text] for text in best}
        scale = max(sum(beam[text]) for text in best)  # or they would fade to zero
        beam = {text: (beam[text][0] / scale, beam[text][1] / scale) for text in best}
    return max(beam, key=lambda text: score(text) + gain(text, END))


# ---- words and their times -----------------------------------------------------------------------

# Chosen with five checkpoints, on voices of the built-in corpus that are in none of its splits.
MAX_ONSET = 30         # frames of 10 ms that a word may last before its first output
SILENCE_LEVEL = -0.4   # mean normalised log-mel of a frame: below, no word has begun
RELEASE = 5            # frames that a word lasts after its last output
GAP_SHARE = 0.3        # of the gap between two words that would overlap: the first one's


class Word(NamedTuple):
    """A word, when it was said, in seconds from the clip's start, and how sure that is.

    confidence: the geometric mean of its characters' probabilities in the outputs that emit them;
    1 is certain.
    """
    text: str
    start: float
    end: float
    confidence: float


def split_words(emissions: Sequence[Emission], alphabet: Sequence[str]) -> list[list[Emission]]:
    """A text's emissions, word by word."""
    words = [[]]
    for emission in emissions:
        if alphabet[emission.symbol] == ' ':
            words.append([])
        else:
            words[-1].append(emission)
    return [word for word in words if word]


def widen(edges: Sequence[tuple[int, int]], loudness: Sequence[float]) -> list[tuple[int, int]]:
    """Words' edges (start, end) by their outputs, in frames -> by their sound.

    CTC outputs are peaks inside a character (Zeyer et al. 2021), so a word's outputs span less time
    than its sound. Its start moves back to where the sound sets in, its end RELEASE frames on;
    words that would overlap split the gap between their outputs.
    """
    widened = []
    for i, (start, end) in enumerate(edges):
        before = edges[i - 1][1] if i else 0
        first = start
        while first > max(before, start - MAX_ONSET) and loudness[first - 1] > SILENCE_LEVEL:
            first -= 1
        widened.append([first, min(end + RELEASE, len(loudness))])
    for i in range(len(edges) - 1):
        end, start = edges[i][1], edges[i + 1][0]
        if widened[i][1] > widened[i + 1][0]:
            widened[i][1] = widened[i + 1][0] = round(end + GAP_SHARE * (start - end))
    return [(start, end) for start, end in widened]


# ---- checkpoints, and python model.py ------------------------------------------------------------

FORMAT = 3  # of checkpoints


class CheckpointError(Exception):
    """A file is not a checkpoint that this code can read; the message says why, in one line."""


class Checkpoint(NamedTuple):
    """What a checkpoint of train.py holds."""
    network: Recogniser             # in eval mode
    alphabet: list[str]             # of symbols; the first is the blank
    run: dict                       # what is known of its training
    language_model: CharacterModel  # of the training transcripts, or of train.py's --lm_text


def load_checkpoint(path: str | Path) -> Checkpoint:
    """A checkpoint of train.py, from its file. Raises CheckpointError."""
    if not os.path.isfile(path):
        reason = 'is not a regular file' if os.path.lexists(path) else 'no such file'
        raise CheckpointError(f'{path}: {reason}; give the best.pt or last.pt of a run')
    try:
        checkpoint = torch.load(path, weights_only=True, map_location='cpu')
        number = checkpoint['format']
    except Exception as error:  # whatever a file that is not a checkpoint may raise
        raise CheckpointError(f'{path}: is not a checkpoint of train.py ({type(error).__name__}); '
                              'give the best.pt or last.pt of a run') from None
    if number != FORMAT:
        raise CheckpointError(f'{path}: its format is number {number}, this code reads {FORMAT}; '
                              'use the code that wrote it, or train again')
    try:
        with torch.device('meta'):  # shapes alone, to compare before memory is taken
            network = Recogniser(Config(**checkpoint['config']))
        network.load_state_dict(checkpoint['model'], assign=True)
        network.to(memory_format=torch.channels_last)
        alphabet, run = checkpoint['alphabet'], checkpoint['run']
        language_model = CharacterModel(json.loads(checkpoint['language_model']))
        loaded = Checkpoint(network.eval(), alphabet, run, language_model)
        describe_checkpoint(loaded)  # raises where what is known of the run is not whole
        if len(alphabet) != network.config.vocab_size or set(map(type, alphabet)) != {str}:
            raise ValueError
        if not all(tensor.isfinite().all() for tensor in network.state_dict().values()):
            raise ValueError
        return loaded
    except Exception as error:
        raise CheckpointError(f'{path}: is a damaged checkpoint ({type(error).__name__}); give '
                              'another') from None


def timed_words(text: str, log_probs: Tensor, loudness: Sequence[float], checkpoint: Checkpoint,
                start: float, duration: float) -> list[Word]:
    """The words of a text that was decoded from outputs (T', V), with their times in the clip.

    loudness: of each frame; start of the first frame in the clip and its duration, in seconds.
    """
    import data
    frames = checkpoint.network.config.frames_per_output
    emissions = align(log_probs, data.encode(text, checkpoint.alphabet))
    words = split_words(emissions, checkpoint.alphabet)
    edges = [(min(frames * word[0].first, len(loudness)),
              min(frames * (word[-1].last + 1), len(loudness))) for word in words]
    timed = []
    for word, edge in zip(words, widen(edges, loudness)):
        begin, end = [min(max(0.0, start + t * data.FRAME_SECONDS), duration) for t in edge]
        emitted = torch.cat([log_probs[e.first:e.last + 1, e.symbol] for e in word])
        spelling = data.decode([e.symbol for e in word], checkpoint.alphabet)
        timed.append(Word(spelling, begin, end, confidence=emitted.mean().exp().item()))
    return timed


class Transcript(NamedTuple):
    """What was heard in a clip, and what it was read from."""
    text: str
    words: list[Word]
    mels: Tensor       # (T, 80)
    start: float       # of their first frame in the clip, seconds
    log_probs: Tensor  # (T', V)


@torch.no_grad()
def transcribe(checkpoint: Checkpoint, wave: Tensor, decoding: Decoding = GREEDY,
               times: bool = True) -> Transcript:
    """What is heard in a wave (S,) at 16 kHz, as data.read_wave gives it.

    times: with its words, whose alignment takes memory that grows with the square of the clip's
    length; raises ValueError where that is too much.
    """
    import data  # here, so that the network can be used without
    network, alphabet, _, language_model = checkpoint
    mels, first_frame = data.features(wave)
    start = first_frame * data.FRAME_SECONDS
    log_probs, lengths = network(mels[None, None], torch.tensor([len(mels)]))
    if decoding.width:
        text = beam_decode(log_probs[0], alphabet, language_model, decoding)
    else:
        text = data.decode(greedy_decode(log_probs, lengths)[0], alphabet)
    words = []
    if times:
        words = timed_words(text, log_probs[0], mels.mean(1).tolist(), checkpoint, start,
                            len(wave) / data.SAMPLE_RATE)
    return Transcript(text, words, mels, start, log_probs[0])


def plot_clip(transcript: Transcript, checkpoint: Checkpoint, path: str) -> None:
    """Draw a clip's log-mels and words, and the outputs' probabilities, over time.

    Raises monitor.RunError where matplotlib is missing or the file cannot be written.
    """
    import data
    import monitor
    pyplot = monitor.load_pyplot()
    _, words, mels, begin, log_probs = transcript
    probabilities = log_probs.exp()                                               # (T', V)
    end = begin + len(mels) * data.FRAME_SECONDS
    output_seconds = checkpoint.network.config.frames_per_output * data.FRAME_SECONDS
    times = begin + output_seconds * (torch.arange(len(probabilities)) + 0.5)
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(10, 4.5),
                                             layout='constrained')
    above.imshow(mels.T.numpy(), origin='lower', aspect='auto', cmap='magma',
                 extent=(begin, end, 0, mels.shape[1]))
    above.set_ylabel('mel band')
    below.fill_between(times, probabilities[:, 0], color='0.85', step='mid', label='blank')
    path_symbols = probabilities.argmax(1).tolist()
    for symbol in sorted(set(path_symbols) - {0}):
        below.plot(times, probabilities[:, symbol])
    for emission in collapse(path_symbols):
        name = checkpoint.alphabet[emission.symbol].replace(' ', '_')
        middle = (times[emission.first] + times[emission.last]) / 2
        below.text(middle, 1.03, name, ha='center')
    for word in words:
        above.text((word.start + word.end) / 2, mels.shape[1] + 2, word.text, ha='center')
        above.axvspan(word.start, word.end, ymin=0.97, facecolor='white', edgecolor='black')
    below.set_ylim(0, 1.15)
    below.set_ylabel('probability')
    below.set_xlabel('seconds')
    below.legend(loc='center right')
    monitor.save_picture(figure, path)


def describe_checkpoint(checkpoint: Checkpoint) -> str:
    """A checkpoint in words: its settings, its size, its training, its scores."""
    network, alphabet, run, _ = checkpoint
    scores = [f'{split}: WER {run[split]["wer"]:.2f} %'
              for split in ('valid', 'test') if run[split]]
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return (f'{asdict(network.config)}\n'
            f'{parameters:,} parameters; alphabet: {"".join(alphabet)!r}\n'
            f'trained on {run["train_data"]}, {run["utterances"]} utterances, '
            f'{run["hours"]:.2f} hours, {run["epoch"]} epochs; {", ".join(scores) or "not scored"}')


def in_range(kind: type, low: float, high: float = 2 ** 53) -> Callable[[str], float]:
    """An argparse type: int or float, from low to high (beyond 2^53 a float cannot count)."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f'{text} is not between {low} and {high}')
        return value
    parse.__name__ = kind.__name__
    return parse


def add_decoding_flags(add: Callable, width: int) -> None:
    """Give a parser (by its add_argument) the flags of beam search; width: of --beam unset."""
    add('--beam', type=in_range(int, 0, 1000), default=width, metavar='WIDTH',
        help='texts kept by beam search with the character model; 0: greedy decoding')
    add('--lm_weight', type=in_range(float, 0, 100), default=Decoding().lm_weight,
        help="weight of the character model's log-probability; 0: beam search without it")
    add('--label_bonus', type=in_range(float, -100, 100), default=Decoding().label_bonus,
        help='nats added for each character where the character model has a weight')
    add('--lm_text', metavar='FILE',
        help='text file, one sentence a line, to build the character model from; unset: the '
             'training transcripts, or what the checkpoint was given in their place')


def read_decoding(args: argparse.Namespace) -> Decoding:
    """How to decode, by the flags."""
    return Decoding(args.beam, args.lm_weight, args.label_bonus)


def read_character_model(path: str, alphabet: Sequence[str]) -> CharacterModel:
    """The character model of --lm_text. Raises data.DataError."""
    import data
    return CharacterModel.of_texts(data.read_text(path, alphabet)).pruned()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description='Transcribe audio files, or describe a checkpoint.')
    parser.add_argument('checkpoint', help='best.pt or last.pt of a run')
    parser.add_argument('clips', nargs='*',
                        help='audio files of any rate and channels; none: describe the checkpoint')
    parser.add_argument('--times', action='store_true',
                        help="each word's start and end, in seconds, and its confidence")
    add_decoding_flags(parser.add_argument, width=0)
    parser.add_argument('--plot', metavar='FILE',
                        help='draw one clip into a .png, .svg or .pdf file; needs matplotlib')
    args = parser.parse_args(argv)
    if args.plot is not None and len(args.clips) != 1:
        sys.exit('model.py: --plot draws one clip; name one')
    of_beam_search = {'lm_text': None, 'lm_weight': Decoding().lm_weight,
                      'label_bonus': Decoding().label_bonus}
    changed = [name for name, default in of_beam_search.items() if getattr(args, name) != default]
    if changed and not args.beam:
        sys.exit(f'model.py: --{changed[0]} is for beam search; give --beam 16 too')
    import monitor
    with monitor.one_line_ends('model.py'):
        sys.exit(transcribe_clips(args))


def transcribe_clips(args: argparse.Namespace) -> bool:
    """Print what the flags ask for -> whether a clip could not be transcribed."""
    import data
    import monitor
    try:
        checkpoint = load_checkpoint(args.checkpoint)
        if args.lm_text is not None:
            other = read_character_model(args.lm_text, checkpoint.alphabet)
            checkpoint = checkpoint._replace(language_model=other)
    except (CheckpointError, data.DataError) as error:
        sys.exit(f'model.py: {error}')
    if not args.clips:
        print(describe_checkpoint(checkpoint))
    decoding = read_decoding(args)
    failed = False
    for number, clip in enumerate(args.clips, 1):
        data.show_status(f'transcribing {number}/{len(args.clips)}: {clip}')
        fault = None
        try:
            wave = data.read_wave(clip)
            transcript = transcribe(checkpoint, wave, decoding,
                                    times=args.times or args.plot is not None)
        except data.DataError as error:
            fault = error
        except ValueError as error:  # of align
            fault = f'{clip}: {error}; cut it into pieces, or leave --times and --plot out'
        data.show_status()
        if fault:
            print(f'model.py: {fault}', file=sys.stderr)
            failed = True
            continue
        print(f'{clip}: {transcript.text}' if len(args.clips) > 1 else transcript.text)
        if args.times:
            for word in transcript.words:
                print(f'{word.start:6.2f} {word.end:6.2f}  {word.confidence:.2f}  {word.text}')
        if args.plot is not None:
            try:
                plot_clip(transcript, checkpoint, args.plot)
            except monitor.RunError as error:
                sys.exit(f'model.py: {error}')
    return failed


if __name__ == '__main__':
    main()
