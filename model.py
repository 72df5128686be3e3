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
    upsampling   (B, T', 256)         T' = ceil(T / frames_per_output); a path whose features are
                                      further apart (at the default the deep one) is interpolated;
                                      then early + gate * deep, the gate learnt and small at first
    BiLSTM x 2   (B, T', 512)
    head         (B, T', V)           linear, then log_softmax; symbol 0 is CTC's blank

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
Huang et al. 2016, "Deep networks with stochastic depth"; Graves et al. 2006, "Connectionist
Temporal Classification"; Jozefowicz et al. 2015 (forget bias 1);
Glorot & Bengio 2010 (Xavier initialisation); He et al. 2015 (initialisation of the convolutions);
Hannun et al. 2014, "First-pass large vocabulary continuous speech recognition using bi-directional
recurrent DNNs" (prefix beam search); Witten & Bell 1991 (the character model's smoothing); Zeyer et
al. 2021, "Why does CTC result in peaky behavior?".
"""
import functools
import itertools
import json
import math
import sys
from argparse import ArgumentParser, Namespace
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import init

import data
import monitor
from monitor import UserError, error_at

# MobileNetV3-Small's blocks (Howard et al. 2019, table 2). Those of the early path have 3 x 3
# convolutions and ReLU, the others 5 x 5 and hard swish. Strides in time are ours: an image is as
# wide as it is high, speech is not.
BLOCKS = [
    # expanded channels, channels, stride in time, in frequency
    (16, 16, 1, 2),      # 20 ms, as the stem left it
    (72, 24, 2, 2),      # 40 ms
    (88, 24, 1, 1),
    (96, 40, 2, 2),      # 80 ms
    (240, 40, 1, 1),
    (240, 40, 1, 1),
    (120, 48, 1, 1),
    (144, 48, 1, 1),
    (288, 96, 1, 2),
    (576, 96, 1, 1),
    (576, 96, 1, 1),
]
EARLY_BLOCK = 3  # the last block at 40 ms; the early path leaves from its output


@dataclass
class Config:
    """What a checkpoint needs to rebuild its network; the defaults are ours."""
    vocab_size: int                 # V: the alphabet and the blank
    n_mels: int = data.N_MELS
    blocks: int = 11                # of the table, 2 to 11; with all, its last 1x1 convolution too
    frames_per_output: int = data.FRAMES_PER_OUTPUT  # 10 ms frames an output is for: 1, 2 or 4
    deep_path: str = 'gated'        # early + gate * deep; or 'alone', without the early path
    upsample: str = 'interpolate'   # or 'transpose': ConvTranspose1d
    squeeze_excite: bool = False
    projection: int = 256
    hidden: int = 256               # LSTM units in each direction
    layers: int = 2
    dropout: float = 0.05           # before each LSTM layer and the head
    output_init: str = 'xavier'     # of the head; or 'normal', of deviation 0.01
    weight_init: float = 0.02       # standard deviation of the projections' initial weights
    forget_bias: bool = True        # LSTMs' forget bias 1, orthogonal; False: PyTorch's own


# ---- operations along time, which are given the clips' lengths -----------------------------------

def zero_padding(x: Tensor, lengths: Tensor) -> Tensor:
    """Set x (B, C, T, F) to zero after each clip's end.

    Before a convolution, padding must equal the zeros that the convolution itself pads a clip alone
    with; batch norm and activations make it non-zero again.
    """
    return x * monitor.valid_frames(x.shape[2], lengths)[:, None, :, None]


def take_frames(x: Tensor, frames: Tensor) -> Tensor:
    """Of each clip of x (B, T, C) the frames (B, N) -> (B, N, C)."""
    rows = frames + torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    # An embedding copies whole rows, where gather picks single numbers: three times as fast.
    return F.embedding(rows, x.flatten(0, 1))


# ---- the backbone --------------------------------------------------------------------------------

class BatchNorm(nn.BatchNorm2d):
    """Batch norm whose running statistics are usable after few updates.

    MobileNetV3's own momentum, 0.01, leaves 37 % of the initial statistics after 100 updates; 0.1,
    PyTorch's own, leaves 20 % after 15, so a network that has learnt would score badly in eval
    mode. Therefore the statistics begin as the plain average of the first batches, and go on with
    0.3: the deep path, which sees one batch in four, would with less lag behind a high learning
    rate.
    """

    def forward(self, x: Tensor) -> Tensor:
        self.momentum = max(0.3, 1 / (1 + self.num_batches_tracked.item()))  # not used in eval mode
        return super().forward(x)


class ConvNorm(nn.Sequential):
    """Convolution, batch norm, activation: (B, C, T, F) -> (B, C', ceil(T / stride), ceil(F /
    stride)).

    Symmetric padding centres output i on input i * stride.
    """

    def __init__(self, c_in, c_out, activation=nn.Identity, kernel=1, stride=1, groups=1):
        super().__init__(
            nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
            BatchNorm(c_out, eps=1e-3),
            activation())


class SqueezeExcite(nn.Module):
    """Channel gates from the clip's mean over time and bands (Howard et al. 2019, section 5.3).

    Of valid frames only: with the padding's, word error rates would depend on the batch.
    """

    def __init__(self, channels):
        super().__init__()
        # A quarter, rounded to a multiple of 8, as in the reference code.
        squeezed = (channels // 4 + 4) // 8 * 8
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        total = zero_padding(x, lengths).sum((2, 3), keepdim=True)          # (B, C, 1, 1)
        mean = total / (lengths * x.shape[3]).view(-1, 1, 1, 1)
        return x * F.hardsigmoid(self.expand(F.relu(self.reduce(mean))))


class Bottleneck(nn.Module):
    """A row of BLOCKS: 1x1 expansion, depthwise k x k, squeeze-excite, 1x1 projection, identity
    where it fits.

    x (B, C, T, F) and lengths (B,) -> the same, strided.
    """

    def __init__(self, number, c_in, squeeze_excite):
        super().__init__()
        expanded, c_out, *stride = BLOCKS[number - 1]
        activation, kernel = (nn.ReLU, 3) if number <= EARLY_BLOCK else (nn.Hardswish, 5)
        self.time_stride, _ = stride
        self.expand = nn.Identity()
        if expanded != c_in:
            self.expand = ConvNorm(c_in, expanded, activation)
        self.depthwise = ConvNorm(expanded, expanded, activation, kernel, stride, expanded)
        self.squeeze_excite = None
        if squeeze_excite and number not in (2, 3):  # which have none in the paper either
            self.squeeze_excite = SqueezeExcite(expanded)
        self.project = ConvNorm(expanded, c_out)  # the block's, not Config.projection

    def forward(self, x: Tensor, lengths: Tensor) -> tuple:
        y = self.depthwise(zero_padding(self.expand(x), lengths))
        lengths = -(-lengths // self.time_stride)  # rounded up
        if self.squeeze_excite:
            y = self.squeeze_excite(y, lengths)
        y = self.project(y)
        return (x + y if x.shape == y.shape else y), lengths


# ---- upsampling and recurrence -------------------------------------------------------------------

def upsample(x: Tensor, lengths: Tensor, stride: int, frames_per_output: int) -> Tensor:
    """Interpolate features on a coarse grid linearly to the grid of the outputs, aligned in time.

    x (B, T / stride, C), one feature every `stride` mel frames, with lengths (B,)
    -> (B, T' or some more, C), one every `frames_per_output` mel frames.

    The ratio is a whole number and the surplus is cropped: F.interpolate(size=outputs) would
    stretch a padded batch by its padded length, and a clip's features would depend on its
    neighbours. F.interpolate takes feature i for the middle of its `stride` frames, but the
    convolutions centred it on the first; so its result comes (stride - 1) / 2 mel frames late.
    Those are dropped, in whole outputs: at most half a mel frame of error is left. At 4 frames an
    output the early path is not interpolated, and a feature sits 1.5 frames before the output's
    middle.
    """
    if stride == frames_per_output:
        return x
    delay = round((stride - 1) / 2 / frames_per_output)
    # Interpolation looks one feature ahead, where it must not find padding: a clip's last is held.
    held = torch.arange(x.shape[1] + 1, device=x.device).minimum(lengths[:, None] - 1)
    x = take_frames(x, held).mT                                            # (B, C, T / stride + 1)
    x = F.interpolate(x, scale_factor=stride // frames_per_output, mode='linear')
    return x[:, :, delay:].mT  # aligned: output t, sound t


class BiLSTM(nn.Module):
    """One bidirectional layer (B, T, C) -> (B, T, 2 * hidden), made of two forward ones.

    Padding after the end never reaches a forward LSTM, so the backward one gets each clip reversed
    within its own length. Packed sequences do the same, 3 to 9 times slower on a CPU.
    """

    def __init__(self, c_in, hidden):
        super().__init__()
        self.forward_lstm = nn.LSTM(c_in, hidden, batch_first=True)
        self.backward_lstm = nn.LSTM(c_in, hidden, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        frames = x.shape[1]
        # Each clip's frames from its last to its first, then the padding's; twice, it is x again.
        reverse = (lengths[:, None] - 1 - torch.arange(frames, device=x.device)) % frames
        backward, _ = self.backward_lstm(take_frames(x, reverse))
        forward, _ = self.forward_lstm(x)
        return torch.cat([forward, take_frames(backward, reverse)], 2)


# ---- the recogniser ------------------------------------------------------------------------------

class Branch(nn.Module):
    """One path from the backbone to the outputs' grid: flatten, project, upsample.

    x (B, C, T / stride, F) and lengths (B,) -> (B, T' or some more, projection).
    """

    def __init__(self, channels, stride, bands, config):
        super().__init__()
        self.stride = stride  # mel frames per feature; bands: mel bands per feature
        self.config = config
        features = channels * math.ceil(config.n_mels / bands)
        self.projection = nn.Linear(features, config.projection)
        self.transposed_conv = None
        if config.upsample == 'transpose':
            ratio = stride // config.frames_per_output
            self.transposed_conv = nn.ConvTranspose1d(config.projection, config.projection,
                                                      ratio, ratio)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        x = self.projection(x.permute(0, 2, 3, 1).flatten(2))               # (B, T / stride, 256)
        if self.transposed_conv:
            return self.transposed_conv(x.mT).mT
        return upsample(x, lengths, self.stride, self.config.frames_per_output)


class Backbone(nn.Module):
    """log-mels (B, 1, T, n_mels), lengths (B,) in frames -> features (B, T', projection), lengths.

    MobileNetV3-Small's stem and blocks. What the first three blocks hear goes on by a short path,
    early, on which the gradient reaches them; the rest adds its share, gate * deep. In training it
    takes part in one update of four, the first, fifth, ninth ...: that is as good, and cheaper
    (after stochastic depth, Huang et al. 2016; which update it is, batch norm has counted).
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        channels = 16
        frames = bands = 2  # mel frames and mel bands per feature, after the stem
        self.stem = ConvNorm(1, channels, nn.Hardswish, 3, 2)
        self.blocks = nn.ModuleList()
        self.last = nn.Identity()
        self.early = None
        for number, row in enumerate(BLOCKS[:config.blocks], 1):
            self.blocks.append(Bottleneck(number, channels, config.squeeze_excite))
            _, channels, time_stride, band_stride = row
            frames *= time_stride
            bands *= band_stride
            if number == EARLY_BLOCK < config.blocks and config.deep_path == 'gated':
                self.early = Branch(channels, frames, bands, config)
                # Of the deep path. If it started at 1, both paths would learn more slowly.
                self.gate = nn.Parameter(torch.full((config.projection,), 0.1))
        if config.blocks == len(BLOCKS):
            self.last = ConvNorm(channels, 576, nn.Hardswish)
            channels = 576
        # With three blocks or fewer, the only path:
        self.deep = Branch(channels, frames, bands, config)

    def output_lengths(self, lengths: int | Tensor) -> int | Tensor:
        """The number of outputs for clips of these many mel frames: ceil(T / frames_per_output).

        ConvTranspose1d gives ceil(T / stride) features times its own stride, too many for most
        clips, and that is what it reports: labels may be emitted after the end of the clip.
        """
        grid = frames = self.config.frames_per_output
        if self.config.upsample == 'transpose':
            grid = (self.early or self.deep).stride
        return -(-lengths // grid) * (grid // frames)

    def forward(self, mels: Tensor, lengths: Tensor) -> tuple:
        outputs = self.output_lengths(mels.shape[2])
        output_lengths = self.output_lengths(lengths)
        x = self.stem(zero_padding(mels, lengths))
        lengths = -(-lengths // 2)  # rounded up
        for number, block in enumerate(self.blocks, 1):
            x, lengths = block(x, lengths)
            if self.early and number == EARLY_BLOCK:
                early = self.early(x, lengths)[:, :outputs]
                # The stem has just counted this batch: 1, 5, 9 ... take the deep path too.
                if self.training and self.stem[1].num_batches_tracked % 4 != 1:
                    return early, output_lengths
        deep = self.deep(self.last(x), lengths)[:, :outputs]
        return (early + self.gate * deep if self.early else deep), output_lengths


class Recogniser(nn.Module):
    """log-mels (B, 1, T, n_mels), lengths (B,) in frames -> log-probabilities (B, T', V), lengths
    (B,)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        sizes = [config.projection] + [2 * config.hidden] * (config.layers - 1)
        self.recurrent = nn.ModuleList(BiLSTM(size, config.hidden) for size in sizes)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(2 * config.hidden, config.vocab_size)
        init_weights(self)
        # Weights that are channels last make all that is computed with them so: depthwise
        # convolutions are twice as fast on a CPU.
        self.to(memory_format=torch.channels_last)

    def forward(self, mels: Tensor, lengths: Tensor, every_layer: bool = False) -> tuple:
        """-> log-probabilities, output lengths.

        every_layer: in place of the first, a list: the head applied to each LSTM layer, the last of
        which is the output.
        """
        x, lengths = self.backbone(mels, lengths)                                   # (B, T', 256)
        layers = []
        for layer in self.recurrent:
            x = layer(self.dropout(x), lengths)                                     # (B, T', 512)
            layers.append(F.log_softmax(self.head(self.dropout(x)), -1))            # (B, T', V)
        return (layers if every_layer else layers[-1]), lengths


# ---- initialisation ------------------------------------------------------------------------------

def init_weights(model: Recogniser) -> None:
    """Draw the weights of each layer by its role.

    The weights of the head and the projections must be large enough to pass the gradient on: with
    normal(0, 0.01), MobileNetV3's for its classifier, it shrinks at each of these layers. LSTMs
    get orthogonal recurrent and Xavier input weights, gate by gate, and forget gates that start
    open, which let gradients reach far back (Jozefowicz et al. 2015).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # He et al. 2015, as in torchvision's MobileNetV3
            init.kaiming_normal_(module.weight, mode='fan_out')
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, 0, model.config.weight_init)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LSTM) and model.config.forget_bias:
            for gate in module.weight_ih_l0.chunk(4):  # input, forget, cell, output
                init.xavier_uniform_(gate)
            for gate in module.weight_hh_l0.chunk(4):
                init.orthogonal_(gate)
            init.zeros_(module.bias_hh_l0)  # PyTorch adds two biases
            init.zeros_(module.bias_ih_l0)
            init.ones_(module.bias_ih_l0.chunk(4)[1])
    if model.config.output_init == 'xavier':
        init.xavier_uniform_(model.head.weight)
    else:
        init.normal_(model.head.weight, 0, 0.01)


# ---- CTC, and decoding ---------------------------------------------------------------------------
#
# CTC (Graves et al. 2006) trains on a text without knowing when each letter was said. Its symbols
# are the letters and a blank, "-". A path is one symbol for each output; it collapses to a text:
# repeats merge, then blanks are dropped. The likelihood of a text is the sum over all paths that
# collapse to it; the loss is minus the logarithm of that sum. By hand, for three outputs and "ab":
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

def greedy_decode(log_probs: Tensor, alphabet: list) -> str:
    """The text to which the path of each output's likeliest symbol collapses (Graves et al. 2006,
    section 3.2): -aa-ab says "aab".

    log_probs (T', V) of one clip, without padding. The blank stands for no character.
    """
    path = log_probs.argmax(1).tolist()
    return ''.join(alphabet[symbol] for symbol, _ in itertools.groupby(path))


def show_path(symbols: Iterable, alphabet: list) -> str:
    """The symbols of outputs for the eye: the space as _, the blank as -."""
    return ''.join(alphabet[symbol].replace(' ', '_') or '-' for symbol in symbols)


MOST_STEPS = 2_000_000_000  # of an alignment: a byte each


def align(log_probs: Tensor, symbols: Tensor) -> Tensor:
    """The likeliest of the paths that collapse to a text, by Viterbi's algorithm.

    log_probs (T', V), symbols (L,) -> (T',): which of the L symbols each output emits, and -1 for
    blanks. The states are blank, symbol, blank, ..., blank; a path stays, goes one state on, or
    skips the blank between two different symbols (Graves et al. 2006, figure 3). Raises ValueError
    where text and outputs are too long for memory.
    """
    states = torch.zeros(2 * len(symbols) + 1, dtype=torch.long)
    states[1::2] = symbols
    if len(states) * len(log_probs) > MOST_STEPS:
        raise ValueError('too long to find the times of its words; cut it into pieces')
    # Three ways into each state: from two states before, from one before, from itself.
    barred = torch.zeros(len(states), 3)
    barred[states == states.roll(2), 0] = -math.inf   # blanks, and the same symbol twice
    # The best score of each state, with two before the first; a path begins in the second of these.
    score = torch.full((len(states) + 2,), -math.inf)
    score[1] = 0
    steps = []
    for outputs in log_probs:
        best, step = (score.unfold(0, 3, 1) + barred).max(1)
        score[1] = -math.inf
        score[2:] = best + outputs[states]
        steps.append(step.byte())
    # The best path ends in the last symbol, or in the blank behind it. From there back:
    state = len(states) - 2 + int(score[-2:].argmax())
    path = []
    for step in reversed(steps):
        path.append(state // 2 if state % 2 else -1)
        state += int(step[state]) - 2
    return torch.tensor(path[::-1])


# ---- a character model, and beam search ----------------------------------------------------------

BEAM = 16                  # texts kept
# The weight of the character model's log-probability, and nats added for each character; chosen on
# dev of AN4 and of kathleen together (results/README.md).
LM_WEIGHT, LABEL_BONUS = 0.6, 1.5
END = '\n'                 # of a sentence, for the character model
MOST_CONTEXTS = 1_000_000  # of a character model that keeps what it met once

class CharacterModel:
    """How likely a text's next character is after the last few: an n-gram.

    counts: {context: {character: how often it followed}}, for contexts of no to order - 1
    characters. With N followers of a context, of T kinds, Witten & Bell (1991) take

        P(c | context) = (count(c) + T * P(c | context without its first character)) / (N + T)

    and at the empty context all kinds equally likely, with one more for what was never seen. Of
    the texts "ab" and "aa" (order 2; "|" ends a sentence): after a came b, a, | once each, so
    P(b | a) = (1 + 3 * P(b)) / (3 + 3), and P(b) = (1 + 3 / 4) / (6 + 3) = 0.194.
    """

    def __init__(self, counts: dict):
        self.counts = counts
        self.longest = max(map(len, counts))
        self.log_prob = functools.cache(self.log_prob)

    @classmethod
    def of_texts(cls, texts: Iterable, order: int = 6) -> 'CharacterModel':
        """Count the n-grams of texts, the ends of sentences included.

        Of more than a million contexts, those that were met once are dropped.
        """
        counts = defaultdict(Counter)
        for text in texts:
            text += END
            for i, character in enumerate(text):
                for length in range(min(order, i + 1)):
                    counts[text[i - length:i]][character] += 1
        if len(counts) > MOST_CONTEXTS:
            counts = {context: n for context, n in counts.items() if n.total() > 1}
        return cls(counts)

    def log_prob(self, text: str, character: str) -> float:
        """Of the character after the text, in nats, by the formula above.

        text: its last characters, `longest` at most; answers are cached, so more are a waste.
        """
        probability = 1 / (len(self.counts['']) + 1)
        for start in range(len(text), -1, -1):  # from the empty context to the longest known
            following = self.counts.get(text[start:])
            if not following:
                break
            kinds = len(following)
            probability = ((following.get(character, 0) + kinds * probability)
                           / (sum(following.values()) + kinds))
        return math.log(probability)


def beam_decode(log_probs: Tensor, alphabet: list, language_model: CharacterModel,
                width: int = BEAM) -> str:
    """The text of the highest score, by prefix beam search (Hannun et al. 2014, algorithm 1).

    log_probs (T', V) of one clip. A text's score, in nats, is that of all its paths together
    + LM_WEIGHT * the character model's + LABEL_BONUS * its length, which offsets the language
    model's preference for short texts. After each output the `width` best beginnings are kept.
    """
    def score(text):
        return math.log(total[text]) + prior[text]

    # Of each text the probability of its paths that end in a blank, and of those that end in its
    # last character: only after a blank does the same character begin anew.
    beam = {'': (1.0, 0.0)}
    prior = {'': 0.0}   # of a text: what is added to the logarithm of its paths' probability
    for probabilities in log_probs.exp().tolist():
        # Of the characters, those that are likely enough to be tried.
        heard = [(c, p) for c, p in zip(alphabet, probabilities) if c and p > 1.2e-4]
        blank, symbol = Counter(), Counter()
        for text, (ends_blank, ends_symbol) in beam.items():
            either = ends_blank + ends_symbol
            blank[text] = probabilities[0] * either
            context = text[-language_model.longest:]
            for character, p in heard:
                longer = text + character
                if longer not in prior:
                    prior[longer] = (prior[text] + LABEL_BONUS
                                     + LM_WEIGHT * language_model.log_prob(context, character))
                if character == text[-1:]:
                    symbol[text] += p * ends_symbol
                    symbol[longer] += p * ends_blank
                else:
                    symbol[longer] += p * either
        total = blank + symbol   # Counters leave out what has probability 0
        best = sorted(total, key=score, reverse=True)[:width]
        prior = {text: prior[text] for text in best}
        scale = total[best[0]]  # or they would fade to zero
        beam = {text: (blank[text] / scale, symbol[text] / scale) for text in best}
    return max(beam, key=lambda text: score(text) + LM_WEIGHT * language_model.log_prob(text, END))


# ---- words and their times -----------------------------------------------------------------------

@dataclass
class Word:
    """A word, when it was said, in seconds from the clip's start, and how sure that is.

    confidence: the geometric mean of its characters' probabilities in the outputs that emit them;
    1 is certain.
    """
    text: str
    start: float
    end: float
    confidence: float


@dataclass
class Transcript:
    """What was heard in a clip, and what it was read from."""
    text: str
    mels: Tensor       # (T, 80)
    start: float       # of their first frame in the clip, seconds
    log_probs: Tensor  # (T', V)
    alphabet: list
    frames_per_output: int

    @functools.cached_property
    def words(self) -> list:
        """Its words, with their times in the clip, sought when they are first asked for.

        CTC outputs are peaks inside a character (Zeyer et al. 2021), so a word's outputs span less
        time than its sound. Its start moves back to where the sound sets in, its end 50 ms on;
        words that would overlap split the gap between their outputs. The numbers were chosen with
        five checkpoints, on voices of the built-in corpus that are in none of its splits. Raises
        ValueError where the clip is too long to be aligned.
        """
        def seconds(frame):
            return max(0.0, self.start + frame * data.FRAME_SECONDS)

        frames = len(self.mels)
        loudness = self.mels.mean(1).tolist()
        symbols = torch.tensor(data.encode(self.text, self.alphabet))
        path = align(self.log_probs, symbols)
        words = []
        before = 0  # where the outputs of the word before end
        for match in monitor.WORD.finditer(self.text):
            outputs = torch.isin(path, torch.arange(*match.span())).nonzero()[:, 0]
            emitted = self.log_probs[outputs, symbols[path[outputs]]]
            # Where 400 ms without a letter split a word, its larger part is kept.
            side = (outputs.diff(prepend=outputs[:1]) >= 40 // self.frames_per_output).cumsum(0)
            outputs = outputs[side == side.mode().values]
            first, end = (outputs[[0, -1]] * self.frames_per_output).tolist()
            first = onset = min(first, frames)
            # Back through all that is loud, in mean normalised log-mel, 300 ms at most.
            while onset > max(before, first - 30) and loudness[onset - 1] > -0.4:
                onset -= 1
            if words and words[-1].end > seconds(onset):
                onset = round(before + 0.3 * (first - before))  # the word before gets 30 %
                words[-1].end = seconds(onset)
            before = end + self.frames_per_output
            words.append(Word(match.group(), seconds(onset), seconds(min(before + 5, frames)),
                              emitted.mean().exp().item()))
        return words


# ---- checkpoints and transcripts -----------------------------------------------------------------

FORMAT = 4  # of checkpoints


class Checkpoint(NamedTuple):
    """What a checkpoint of train.py holds."""
    network: Recogniser             # in eval mode
    alphabet: list                  # the characters of its symbols; the first is the blank
    run: dict                       # what is known of its training
    language_model: CharacterModel  # of the training transcripts


def load_checkpoint(path: str | Path) -> Checkpoint:
    """A checkpoint of train.py, from its file. Raises UserError."""
    with error_at(path):
        saved = torch.load(path, weights_only=True, map_location='cpu')
        if saved['format'] != FORMAT:
            raise ValueError(f'its format is {saved["format"]}, this code reads {FORMAT}')
        network = Recogniser(Config(**saved['config']))
        network.load_state_dict(saved['model'])
        return Checkpoint(network.eval(), saved['alphabet'], saved['run'],
                          CharacterModel(json.loads(saved['language_model'])))


def make_network(settings: dict, alphabet: list, start: Checkpoint | None = None) -> Recogniser:
    """A network of these settings (Config's are read), with the weights of a checkpoint to start
    from, whose alphabet comes first in the new one: a new character's row of the head is drawn, the
    others are taken over. Raises RuntimeError where the sizes differ otherwise."""
    own = {name: settings[name] for name in Config.__dataclass_fields__}
    network = Recogniser(Config(**own | {'vocab_size': len(alphabet)}))
    if start:
        weights = start.network.state_dict()
        for name, drawn in network.head.state_dict(prefix='head.').items():
            weights[name] = torch.cat([weights[name], drawn[len(start.alphabet):]])
        network.load_state_dict(weights)
    return network


@torch.no_grad()
def transcribe(checkpoint: Checkpoint, wave: Tensor, beam: int = 0) -> Transcript:
    """What is heard in a wave (S,) at 16 kHz, as data.read_wave gives it.

    beam: the width of the beam search, 0: greedy. Its words are found when they are asked for, by
    an alignment that takes memory which grows with the square of the clip's length.
    """
    network, alphabet, _, language_model = checkpoint
    mels, first_frame = data.features(wave)
    (log_probs,), _ = network(mels[None, None], torch.tensor([len(mels)]))        # (T', V)
    text = greedy_decode(log_probs, alphabet)
    if beam:
        text = beam_decode(log_probs, alphabet, language_model, beam)
    return Transcript(text, mels, first_frame * data.FRAME_SECONDS, log_probs, alphabet,
                      network.config.frames_per_output)


def describe_checkpoint(checkpoint: Checkpoint) -> None:
    """Print a checkpoint's settings, size, training and scores."""
    network, alphabet, run, _ = checkpoint
    parameters = sum(map(torch.numel, network.parameters()))
    print(network.config)
    print(f'{parameters:,} parameters; alphabet: {"".join(alphabet)!r}')
    print('trained on', run['flags']['train_data'] or 'the built-in corpus', end=', ')
    print('{utterances} utterances, {hours:.2f} hours, {epoch} epochs'.format(**run))
    monitor.print_scores(run['scores'])


def plot_clip(heard: Transcript, path: str) -> None:
    """Draw a clip's log-mels and words, and the outputs' probabilities, over time.

    Raises UserError where matplotlib is missing, and what savefig raises.
    """
    pyplot = monitor.load_pyplot()
    probabilities = heard.log_probs.exp()                                         # (T', V)
    outputs = torch.arange(0.5, len(probabilities))  # their middles
    times = heard.start + outputs * heard.frames_per_output * data.FRAME_SECONDS
    end = heard.start + len(heard.mels) * data.FRAME_SECONDS
    figure, (above, below) = pyplot.subplots(2, sharex=True, figsize=(10, 4.5),
                                             layout='constrained')
    above.imshow(heard.mels.T.numpy(), origin='lower', aspect='auto',
                 extent=(heard.start, end, 0, data.N_MELS))
    above.set_ylabel('mel band')
    for word in heard.words:
        above.text(word.start, data.N_MELS + 2, word.text)
        above.axvspan(word.start, word.end, 0.97, facecolor='white', edgecolor='black')
    below.fill_between(times, probabilities[:, 0], color='0.85')
    below.plot(times, probabilities[:, 1:])
    symbols = show_path(probabilities.argmax(1), heard.alphabet)
    for time, character, before in zip(times, symbols, ' ' + symbols):
        if character != before:
            below.text(time, 1.07, character, ha='center')
    below.set(ylabel='probability (grey: blank)', xlabel='seconds')
    figure.savefig(path, dpi=120)


# ---- python model.py -----------------------------------------------------------------------------

def read_character_model(path: str, alphabet: list) -> CharacterModel:
    """The character model of a text file, a sentence a line. Raises UserError.

    Characters that the alphabet lacks become spaces.
    """
    with error_at(path):
        texts = []
        for line in Path(path).read_text(encoding='utf-8').splitlines():
            known = [c if c in alphabet else ' ' for c in data.normalise_text(line)]
            words = ''.join(known).split()
            if words:
                texts.append(' '.join(words))
        if not texts:
            raise ValueError('it holds nothing in the characters of the training transcripts')
    return CharacterModel.of_texts(monitor.progress(texts, 'counting sentence'))


NARROW = ('nothing above 4 kHz, as from a telephone, and the model was trained on wider speech: '
          'expect many more errors')


def transcribe_clips(checkpoint: Checkpoint, args: Namespace) -> None:
    """Print, and draw, what the flags ask for of each clip. Raises UserError, when all that can be
    used are done, that lists the others."""
    faults = []
    for clip in args.clips:
        with monitor.listing(faults, clip):
            wave = data.read_wave(clip, args.channel)
            if data.is_narrow(wave) and not checkpoint.run['narrow']:
                print(f'{clip}: {NARROW}', file=sys.stderr)
            heard = transcribe(checkpoint, wave, args.beam)
            print(f'{clip}: {heard.text}' if len(args.clips) > 1 else heard.text)
            if args.times:
                for word in heard.words:
                    print('{start:6.2f} {end:6.2f}  {confidence:.2f}  {text}'.format(**vars(word)))
            if args.plot:
                with error_at(f'--plot {args.plot}'):
                    plot_clip(heard, args.plot)
    if faults:
        raise UserError('\n'.join(faults))


def main(argv: list | None = None) -> None:
    parser = ArgumentParser(
        description='Transcribe audio files, or describe a checkpoint.')
    add = parser.add_argument
    add('checkpoint', help='best.pt of a run')
    add('clips', nargs='*',
        help='audio files of any rate and channels; none: describe the checkpoint')
    add('--times', action='store_true',
        help="each word's start and end, in seconds, and its confidence")
    add('--beam', type=monitor.number(int, 0, 1000), default=0,
        help='texts kept by beam search with the character model; 0: greedy')
    add('--lm_text', help='text file, one sentence a line, to build the character model of beam '
                          f'search from (--beam {BEAM} unless given); unset: the training '
                          'transcripts')
    add('--channel', type=monitor.number(int, 0, 64), default=0,
        help='of a recording, as of a call with a person on each, from 1; 0: the mean of all')
    add('--plot', help='draw the (last) clip into this .png, .svg or .pdf file; needs matplotlib')
    args = parser.parse_args(argv)
    with monitor.one_line_ends('model.py'):
        checkpoint = load_checkpoint(args.checkpoint)
        if args.lm_text:
            args.beam = args.beam or BEAM
            other = read_character_model(args.lm_text, checkpoint.alphabet)
            checkpoint = checkpoint._replace(language_model=other)
        if not args.clips:
            describe_checkpoint(checkpoint)
        transcribe_clips(checkpoint, args)


if __name__ == '__main__':
    main()
