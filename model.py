"""The network: MobileNetV3-Small backbone, exact upsampling in time, BiLSTM, CTC head; and how its
output is read.

    python model.py CHECKPOINT                          what it is, what it was trained on, how well
    python model.py CHECKPOINT clip.wav ... [--times]   transcripts, with the time of every word
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

A *frame* is 10 ms of mels, an *output* what the network says for frames_per_output of them, a
*label* one character of the transcript. Every padded tensor travels with its lengths, and whatever
looks along time looks at valid frames only: in eval mode a clip alone and the same clip in a padded
batch give the same output. (In training, batch norm's statistics include the padding, of which
batches of nearly equal lengths have little.)

From Python:

    network, alphabet, _ = model.load_checkpoint('runs/.../best.pt')
    wave = data.read_wave('clip.wav')
    print(model.transcribe(network, alphabet, wave).text)

References: Howard et al. 2019, "Searching for MobileNetV3" (table 2: the blocks; section 6.4: two
paths, added); Touvron et al. 2021, "Going deeper with image transformers" (LayerScale: the gate);
Graves et al. 2006, "Connectionist Temporal Classification"; Jozefowicz et al. 2015 (forget bias 1);
Glorot & Bengio 2010 (Xavier initialisation); He et al. 2015 (of the convolutions).
"""
import argparse
import os
import sys
from collections.abc import Sequence
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
GATE = 0.1       # the deep path's share at first; at 1 its noise slows the learning of both


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
    weight_init: float = 0.02       # deviation of the projections' weights
    forget_bias: bool = True        # init_lstm; False: PyTorch's initialisation

    def __post_init__(self):
        if self.frames_per_output not in (1, 2, 4):
            raise ValueError('frames_per_output is 1, 2 or 4')
        if not 2 <= self.blocks <= len(BLOCKS):
            raise ValueError(f'blocks is 2 to {len(BLOCKS)}')
        if not 0 <= self.dropout < 1:
            raise ValueError('dropout is 0 to less than 1')
        for name in 'vocab_size', 'n_mels', 'projection', 'hidden', 'layers':
            if getattr(self, name) < 1:
                raise ValueError(f'{name} is 1 or more')
        if self.deep_path not in ('gated', 'alone'):
            raise ValueError('deep_path is gated or alone')
        if self.upsample not in ('interpolate', 'transpose'):
            raise ValueError('upsample is interpolate or transpose')
        if self.output_init not in ('xavier', 'normal'):
            raise ValueError('output_init is xavier or normal')


# ---- looking along time: each of these is told where the clips end -------------------------------

def valid_frames(frames: int, lengths: Tensor) -> Tensor:
    """The mask (B, frames) that is true within each clip's length (B,) and false in its padding."""
    return torch.arange(frames, device=lengths.device) < lengths[:, None]


def zero_padding(x: Tensor, lengths: Tensor) -> Tensor:
    """Zero x (B, C, T, F) behind each clip's end.

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

    Interpolation looks one frame ahead, and must see the same there whatever the clip was padded
    to.
    """
    index = torch.arange(x.shape[1] + 1, device=x.device).minimum(lengths[:, None] - 1)
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def reverse_time(x: Tensor, lengths: Tensor) -> Tensor:
    """Reverse each clip of x (B, T, C) within its own length; padding stays behind. Its own
    inverse."""
    batch, frames, _ = x.shape
    t = torch.arange(frames, device=x.device)
    source = torch.where(valid_frames(frames, lengths), lengths[:, None] - 1 - t, t)  # (B, T)
    rows = source + torch.arange(batch, device=x.device)[:, None] * frames
    # index_select copies whole rows, where gather picks single numbers: three times as fast.
    return x.flatten(0, 1).index_select(0, rows.flatten()).view_as(x)


# ---- the backbone --------------------------------------------------------------------------------

class BatchNorm(nn.BatchNorm2d):
    """Batch norm whose running statistics serve short runs too.

    MobileNetV3's own momentum, 0.01, leaves 37 % of the initial statistics after 100 updates; 0.1,
    used here, leaves 20 % after 15, and a network that has learnt looks ill in eval mode. So the
    statistics begin as the plain average of the first ten batches.
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


def strided_length(length, stride: int):
    """ceil(length / stride) of whole numbers or a tensor of them: what ConvNorm makes of a
    length."""
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

    def output_lengths(self, lengths):
        """The number of outputs for clips of these many mel frames: ceil(T / frames_per_output).

        ConvTranspose1d gives ceil(T / stride) features times its own stride, too many for most
        clips, and that is what it reports: labels may come to stand behind the end of the clip.
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

    def output_lengths(self, lengths):
        """The number of outputs for clips of these many mel frames, of the path that has fewest."""
        return (self.early or self.deep).output_lengths(lengths)

    def features(self, mels: Tensor, lengths: Tensor) -> Tensor:
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

    def forward(self, mels: Tensor, lengths: Tensor, every_layer: bool = False):
        """-> (log-probabilities, output lengths); every_layer: (a list of them, as the head reads
        each LSTM layer, the last one the output; output lengths)."""
        x, lengths = self.features(mels, lengths), self.output_lengths(lengths)
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

    The head's and the projections' must be large enough to pass a gradient down: normal(0, 0.01),
    the classifier's in MobileNetV3, makes each layer's too small.
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


class Word(NamedTuple):
    """A word and when it was said, in seconds from the clip's start."""
    text: str
    start: float
    end: float


class Transcript(NamedTuple):
    """What was heard in a clip."""
    text: str
    words: list[Word]


def word_times(path: Sequence[int], alphabet: list[str], seconds: float) -> list[Word]:
    """The words of one clip's path, from the first output of each to its last.

    seconds: what one output stands for; output t begins at t * seconds.
    """
    words = [[]]
    for emission in collapse(path):
        if alphabet[emission.symbol] == ' ':
            words.append([])
        else:
            words[-1].append(emission)
    return [Word(text=''.join(alphabet[emission.symbol] for emission in word),
                 start=word[0].first * seconds,
                 end=(word[-1].last + 1) * seconds) for word in words if word]


# ---- checkpoints, and python model.py ------------------------------------------------------------

FORMAT = 2  # of checkpoints


class CheckpointError(Exception):
    """A file is no checkpoint that this code can read; the message says why, in one line."""


def load_checkpoint(path: str | Path) -> tuple[Recogniser, list[str], dict]:
    """A checkpoint of train.py -> the recogniser in eval mode, its alphabet, what is known of its
    run.

    Raises CheckpointError.
    """
    try:
        checkpoint = torch.load(path, weights_only=True, map_location='cpu')
        number = checkpoint.get('format', 1) if 'config' in checkpoint else None
    except Exception as error:  # whatever a file that is no checkpoint may raise
        reason = 'no such file' if not os.path.exists(path) else type(error).__name__
        raise CheckpointError(f'{path}: is no checkpoint of train.py ({reason}); give the best.pt '
                              'or last.pt of a run') from None
    if number is None:
        raise CheckpointError(f'{path}: is no checkpoint of train.py; give the best.pt or last.pt '
                              'of a run')
    if number != FORMAT:
        raise CheckpointError(f'{path}: its format is number {number}, this code reads {FORMAT}; '
                              'use the code that wrote it, or train again')
    try:
        network = Recogniser(Config(**checkpoint['config']))
        network.load_state_dict(checkpoint['model'])
        alphabet, run = checkpoint['alphabet'], checkpoint['run']
        describe_checkpoint(network, alphabet, run)
        if len(alphabet) != network.config.vocab_size or set(map(type, alphabet)) != {str}:
            raise ValueError
        if not all(weight.isfinite().all() for weight in network.parameters()):
            raise ValueError
        return network.eval(), alphabet, run
    except Exception as error:
        raise CheckpointError(f'{path}: is a damaged checkpoint ({type(error).__name__}); give '
                              'another') from None


@torch.no_grad()
def transcribe(network: Recogniser, alphabet: list[str], wave: Tensor) -> Transcript:
    """What a recogniser in eval mode hears in a wave (S,) at 16 kHz, as data.read_wave gives it."""
    import data  # here, so that the network can be used without
    mels, start = data.features(wave)
    log_probs, _ = network(mels[None, None], torch.tensor([len(mels)]))
    path = log_probs[0].argmax(1).tolist()
    text = ''.join(alphabet[emission.symbol] for emission in collapse(path))
    words = word_times(path, alphabet, network.config.frames_per_output * data.FRAME_SECONDS)
    offset = start * data.FRAME_SECONDS
    duration = len(wave) / data.SAMPLE_RATE
    in_clip = [Word(word.text, start=min(max(0, word.start + offset), duration),
                    end=min(max(0, word.end + offset), duration)) for word in words]
    return Transcript(text, in_clip)


@torch.no_grad()
def plot_clip(network: Recogniser, alphabet: list[str], wave: Tensor, path: str) -> None:
    """Draw a clip's log-mels, the outputs' probabilities and the words, over time.

    Raises monitor.RunError where matplotlib is missing or the file cannot be written.
    """
    import data
    import monitor
    pyplot = monitor.load_pyplot()
    mels, start = data.features(wave)
    log_probs, _ = network(mels[None, None], torch.tensor([len(mels)]))
    probabilities = log_probs[0].exp()                                            # (T', V)
    begin = start * data.FRAME_SECONDS
    end = begin + len(mels) * data.FRAME_SECONDS
    output_seconds = network.config.frames_per_output * data.FRAME_SECONDS
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
        name = alphabet[emission.symbol].replace(' ', '_')
        middle = (times[emission.first] + times[emission.last]) / 2
        below.text(middle, 1.03, name, ha='center')
    for word in transcribe(network, alphabet, wave).words:
        above.text((word.start + word.end) / 2, mels.shape[1] + 2, word.text, ha='center')
        above.axvspan(word.start, word.end, ymin=0.97, color='white')
    below.set_ylim(0, 1.15)
    below.set_ylabel('probability')
    below.set_xlabel('seconds')
    below.legend(loc='center right')
    monitor.save_picture(figure, path)


def describe_checkpoint(network: Recogniser, alphabet: list[str], run: dict) -> str:
    """A checkpoint in words: its settings, its size, its training, its scores."""
    scores = [f'{split}: WER {run[split]["wer"]:.2f} %'
              for split in ('valid', 'test') if run[split]]
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return (f'{asdict(network.config)}\n'
            f'{parameters:,} parameters; alphabet: {"".join(alphabet)!r}\n'
            f'trained on {run["train_data"]}, {run["utterances"]} utterances, '
            f'{run["hours"]:.2f} hours, {run["epoch"]} epochs; {", ".join(scores) or "not scored"}')


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description='Transcribe audio files, or describe a checkpoint.')
    parser.add_argument('checkpoint', help='best.pt or last.pt of a run')
    parser.add_argument('clips', nargs='*',
                        help='audio files of any rate and channels; none: describe the checkpoint')
    parser.add_argument('--times', action='store_true',
                        help="each word's start and end, in seconds")
    parser.add_argument('--plot', metavar='FILE',
                        help='draw one clip into a .png, .svg or .pdf file; needs matplotlib')
    args = parser.parse_args(argv)
    import data
    import monitor
    if args.plot and len(args.clips) != 1:
        sys.exit('model.py: --plot draws one clip; name one')
    try:
        network, alphabet, run = load_checkpoint(args.checkpoint)
    except CheckpointError as error:
        sys.exit(f'model.py: {error}')
    if not args.clips:
        print(describe_checkpoint(network, alphabet, run))
    failed = False
    for number, clip in enumerate(args.clips, 1):
        data.show_status(f'transcribing {number}/{len(args.clips)}: {clip}')
        try:
            wave = data.read_wave(clip)
            transcript = transcribe(network, alphabet, wave)
            if args.plot:
                plot_clip(network, alphabet, wave, args.plot)
        except (data.DataError, monitor.RunError) as error:
            data.show_status()
            print(f'model.py: {error}', file=sys.stderr)
            failed = True
            continue
        data.show_status()
        print(f'{clip}: {transcript.text}' if len(args.clips) > 1 else transcript.text)
        if args.times:
            for word in transcript.words:
                print(f'{word.start:6.2f} {word.end:6.2f}  {word.text}')
    sys.exit(failed)


if __name__ == '__main__':
    main()
