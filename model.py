"""The fixed recogniser: MobileNetV3-Small backbone, exact upsampling in time, BiLSTM, CTC head.

    python model.py CHECKPOINT                          what it is, what it was trained on, how well
    python model.py CHECKPOINT clip.wav ... [--times]   transcripts, with the time of every word

    log-mels     (B, 1, T, 80)        100 frames a second, each clip with its true length
    backbone     (B, 24, T/4, 10)     MobileNetV3-Small's stem and first blocks; --blocks 11: (B, 576, T/8, 3)
    projection   (B, T/4, 256)        frequency bands and channels flattened, one linear layer
    upsampling   (B, T', 256)         T' = ceil(T / frames_per_output), by linear interpolation where that is finer
      + early path                    with blocks beyond the third: block 3's features, projected, brought to T', added
    BiLSTM x 2   (B, T', 512)
    head         (B, T', V)           linear, then log_softmax in float32; symbol 0 is CTC's blank

Every padded tensor travels with its lengths, and whatever looks along time looks at valid frames only: in eval mode
a clip alone and the same clip in a padded batch give the same output. (In training batch norm's statistics include the
padding, of which batches of nearly equal lengths have little.)
References: Howard et al. 2019, "Searching for MobileNetV3" (table 2: the blocks; section 6.4: the early path);
Graves et al. 2006, "Connectionist Temporal Classification"; Goyal et al. 2017, section 5.1 (zero_init_residual);
Jozefowicz et al. 2015 (forget bias 1); Glorot & Bengio 2010 (Xavier initialisation).
"""
import argparse
import sys
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

# MobileNetV3-Small, table 2: kernel, expansion, output channels, squeeze-excite, nonlinearity, stride in frequency.
# The strides in time are ours (an image is as wide as it is high, speech is not): see TIME_STRIDES.
STEM_CHANNELS, LAST_CHANNELS = 16, 576
TABLE_2 = [
    (3, 16, 16, True, nn.ReLU, 2),
    (3, 72, 24, False, nn.ReLU, 2),
    (3, 88, 24, False, nn.ReLU, 1),
    (5, 96, 40, True, nn.Hardswish, 2),
    (5, 240, 40, True, nn.Hardswish, 1),
    (5, 240, 40, True, nn.Hardswish, 1),
    (5, 120, 48, True, nn.Hardswish, 1),
    (5, 144, 48, True, nn.Hardswish, 1),
    (5, 288, 96, True, nn.Hardswish, 2),
    (5, 576, 96, True, nn.Hardswish, 1),
    (5, 576, 96, True, nn.Hardswish, 1),
]
STEM_TIME_STRIDE, TIME_STRIDES = 2, [1, 2, 1, 2, 1, 1, 1, 1, 1, 1, 1]  # 10 ms -> 20, 40 (block 2), 80 ms (block 4)
EARLY_BLOCK = 3  # the last block at 40 ms; the early path leaves from its output


@dataclass
class Config:
    """What a checkpoint needs to rebuild its network. The defaults are the fixed model; PRESETS holds the others."""
    vocab_size: int                  # V: the alphabet and the blank
    n_mels: int = 80
    blocks: int = 3                  # of MobileNetV3-Small's 11; with all of them its last 1x1 convolution too
    frames_per_output: int = 4       # mel frames (10 ms) that one output stands for: 1, 2 or 4
    zero_init_residual: bool = False  # residual blocks start as identities
    early_path: bool = True          # block 3's features added to deeper ones, if any, after these were interpolated
    squeeze_excite: bool = False
    upsample: str = 'interpolate'    # or 'transpose', ConvTranspose1d, as before the fixes
    projection: int = 256
    hidden: int = 256                # LSTM units in each direction
    layers: int = 2
    dropout: float = 0.05
    init: str = 'fixed'              # or 'before'

    def __post_init__(self):
        for good, mend in ((self.frames_per_output in (1, 2, 4), 'frames_per_output is 1, 2 or 4'),
                           (2 <= self.blocks <= len(TABLE_2), f'blocks is 2 to {len(TABLE_2)}'),
                           (0 <= self.dropout < 1, 'dropout is 0 to less than 1'),
                           (not self.early_path or self.upsample == 'interpolate', 'early_path needs interpolation')):
            if not good:
                raise ValueError(mend)


# The original's fixed network taken literally: one output for every mel frame, no early path.
LITERAL = {'blocks': 11, 'frames_per_output': 1, 'early_path': False}
# Its network before the fixes, a month at 93 % word error rate (then with another training loop too).
BEFORE = LITERAL | {'squeeze_excite': True, 'upsample': 'transpose', 'dropout': 0.3, 'init': 'before'}
PRESETS = {'fixed': {}, 'literal': LITERAL, 'before': BEFORE}


# ---- four functions look along time, and each is told where the clip ends -----------------------------------------

def mask_time(x, lengths):
    """Zero x (B, C, T, F) from each clip's length on: before a convolution, padding must equal the zeros
    that the convolution itself pads a clip alone with. Batch norm and activations make it non-zero again."""
    return x * (torch.arange(x.shape[2], device=x.device) < lengths[:, None])[:, None, :, None]


def mean_over_time(x, lengths):
    """Average x (B, C, T, F) over its valid frames and all bands -> (B, C, 1, 1). The plain average over padding
    makes word error rates depend on the batch size."""
    return mask_time(x, lengths).sum((2, 3), keepdim=True) / (lengths * x.shape[3])[:, None, None, None]


def hold_last(x, lengths):
    """x (B, T, C) -> (B, T + 1, C), each clip's last valid frame repeated to the end: interpolation looks
    one frame ahead, and must see the same there whatever the clip was padded to."""
    index = torch.arange(x.shape[1] + 1, device=x.device).minimum(lengths[:, None] - 1)
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def reverse_time(x, lengths):
    """Reverse each clip of x (B, T, C) within its own length; padding stays behind. Its own inverse."""
    t, first = (torch.arange(n, device=x.device) for n in (x.shape[1], len(x)))
    index = torch.where(t < lengths[:, None], lengths[:, None] - 1 - t, t) + first[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, index.flatten()).view_as(x)  # copies whole rows, where gather picks numbers


# ---- the backbone -------------------------------------------------------------------------------------------------

class BatchNorm(nn.BatchNorm2d):
    """Batch norm with momentum 0.1 (MobileNetV3's own 0.01 leaves 37 % of the initial statistics after 100 updates),
    whose running statistics begin as the plain average of the first ten batches: even after 15 updates, 0.1 leaves
    20 % of the initial ones, and a network that has learnt looks ill in eval mode."""

    def forward(self, x):
        if self.training:
            self.momentum = max(0.1, 1 / (1 + self.num_batches_tracked.item()))
        return super().forward(x)


class ConvNorm(nn.Sequential):
    """Convolution, batch norm, activation. Symmetric padding centres output i on input i * stride;
    the number of frames becomes ceil(T / stride), which is strided_length below."""

    def __init__(self, c_in, c_out, kernel=1, stride=(1, 1), groups=1, activation=nn.Identity):
        super().__init__(nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False),
                         BatchNorm(c_out, eps=1e-3), activation())


def strided_length(lengths, stride):
    return (lengths + stride - 1) // stride


class SqueezeExcite(nn.Module):
    """Channel gates from the clip's mean (Howard et al. 2019, section 5.3)."""

    def __init__(self, channels):
        super().__init__()
        squeezed = max(8, (channels // 4 + 4) // 8 * 8)  # a quarter, to a multiple of 8, as in the reference code
        self.reduce, self.expand = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x, lengths):
        return x * F.hardsigmoid(self.expand(F.relu(self.reduce(mean_over_time(x, lengths)))))


class Bottleneck(nn.Module):
    """MobileNetV3's block: 1x1 expansion, depthwise k x k, squeeze-excite, 1x1 projection, identity where it fits."""

    def __init__(self, c_in, row, time_stride, squeeze_excite):
        super().__init__()
        kernel, expanded, c_out, se, activation, frequency_stride = row
        self.time_stride = time_stride
        self.expand = ConvNorm(c_in, expanded, activation=activation) if expanded != c_in else nn.Identity()
        self.depthwise = ConvNorm(expanded, expanded, kernel, (time_stride, frequency_stride), expanded, activation)
        self.squeeze_excite = SqueezeExcite(expanded) if se and squeeze_excite else None
        self.project = ConvNorm(expanded, c_out)
        self.residual = c_in == c_out and time_stride == frequency_stride == 1

    def forward(self, x, lengths):
        y = self.depthwise(mask_time(self.expand(x), lengths))
        lengths = strided_length(lengths, self.time_stride)
        if self.squeeze_excite is not None:
            y = self.squeeze_excite(y, lengths)
        y = self.project(y)
        return (x + y if self.residual else y), lengths


# ---- upsampling and recurrence ------------------------------------------------------------------------------------

def upsample(x, lengths, stride, frames_per_output, frames_out):
    """Linear interpolation of x (B, T', C), one frame every `stride` mel frames, to frames_out outputs (B, T'', C),
    one every frames_per_output mel frames.

    The ratio is a whole number and the surplus is cropped: F.interpolate(size=frames_out) would stretch a padded
    batch by its padded length, and a clip's features would depend on its neighbours.
    Frame i of x is centred on mel frame i * stride, while align_corners=False puts it at i * stride + (stride - 1) / 2;
    so the crop starts that delay later, in whole outputs: at most half a mel frame is left of it, and 1.5 of the 4 that
    an output stands for where there is nothing to interpolate."""
    ratio, delay = stride // frames_per_output, round((stride - 1) / 2 / frames_per_output)
    if ratio == 1:
        return x[:, :frames_out]
    x = hold_last(x, lengths).transpose(1, 2)  # (B, C, T' + 1)
    x = F.interpolate(x, size=x.shape[2] * ratio, mode='linear', align_corners=False)
    return x[:, :, delay:delay + frames_out].transpose(1, 2)


class BiLSTM(nn.Module):
    """One bidirectional layer (B, T, C) -> (B, T, 2 * hidden), made of two forward ones.

    Padding after the end never reaches a forward LSTM, so the backward one gets each clip reversed within its own
    length. Packed sequences do the same, 3 to 9 times slower on a CPU."""

    def __init__(self, c_in, hidden):
        super().__init__()
        self.ahead, self.back = nn.LSTM(c_in, hidden, batch_first=True), nn.LSTM(c_in, hidden, batch_first=True)

    def forward(self, x, lengths):
        back = reverse_time(self.back(reverse_time(x, lengths))[0], lengths)
        return torch.cat([self.ahead(x)[0], back], 2)


# ---- the recogniser -----------------------------------------------------------------------------------------------

class Recogniser(nn.Module):
    """log-mels (B, 1, T, n_mels) and lengths (B,) in frames -> log-probabilities (B, T', V) and their lengths (B,);
    every_layer: a list of them, as the head reads each LSTM layer; the last is the output."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.stem = ConvNorm(1, STEM_CHANNELS, 3, (STEM_TIME_STRIDE, 2), activation=nn.Hardswish)
        self.blocks, self.last, self.early = nn.ModuleList(), nn.Identity(), None
        channels, bands, self.stride = STEM_CHANNELS, strided_length(c.n_mels, 2), STEM_TIME_STRIDE
        for i, (row, time_stride) in enumerate(zip(TABLE_2[:c.blocks], TIME_STRIDES), 1):
            self.blocks.append(Bottleneck(channels, row, time_stride, c.squeeze_excite))
            channels, bands, self.stride = row[2], strided_length(bands, row[5]), self.stride * time_stride
            if c.early_path and i == EARLY_BLOCK < c.blocks:
                self.early, self.early_stride = nn.Linear(channels * bands, c.projection), self.stride
        if c.blocks == len(TABLE_2):
            self.last, channels = ConvNorm(channels, LAST_CHANNELS, activation=nn.Hardswish), LAST_CHANNELS
        self.projection = nn.Linear(channels * bands, c.projection)
        ratio = self.stride // c.frames_per_output  # self.stride: mel frames per deep feature, the coarsest grid
        self.transpose = (nn.ConvTranspose1d(c.projection, c.projection, ratio, ratio) if c.upsample == 'transpose'
                          else None)
        self.recurrent = nn.ModuleList(BiLSTM(size, c.hidden)
                                       for size in [c.projection] + [2 * c.hidden] * (c.layers - 1))
        self.dropout = nn.Dropout(c.dropout)
        self.head = nn.Linear(2 * c.hidden, c.vocab_size)
        init_weights(self)
        self.to(memory_format=torch.channels_last)  # twice as fast for depthwise convolutions on a CPU

    def output_lengths(self, lengths):
        """Outputs for clips of these many mel frames: exactly ceil(T / frames_per_output), by interpolation.
        ConvTranspose1d gives the backbone's ceil(T / 8) frames times its stride, up to 7 too many, and that
        is what it reports: labels may come to stand behind the end of the clip."""
        if self.transpose is None:
            return strided_length(lengths, self.config.frames_per_output)
        return strided_length(lengths, self.stride) * (self.stride // self.config.frames_per_output)

    def features(self, mels, lengths):
        """(B, 1, T, n_mels), (B,) -> (B, T', projection): backbone, projections, upsampling; all before the LSTM."""
        c = self.config
        frames_out = self.output_lengths(mels.shape[2])
        x = mels.to(memory_format=torch.channels_last)
        x, n = self.stem(mask_time(x, lengths)), strided_length(lengths, STEM_TIME_STRIDE)
        for i, block in enumerate(self.blocks, 1):
            x, n = block(x, n)
            if i == EARLY_BLOCK:
                early, n_early = x, n
        x = self.projection(self.last(x).permute(0, 2, 3, 1).flatten(2))  # (B, T/stride, 256)
        if self.transpose is not None:
            return self.transpose(x.transpose(1, 2)).transpose(1, 2)
        x = upsample(x, n, self.stride, c.frames_per_output, frames_out)
        if self.early is not None:
            early = self.early(early.permute(0, 2, 3, 1).flatten(2))
            x = x + upsample(early, n_early, self.early_stride, c.frames_per_output, frames_out)
        return x

    def forward(self, mels, lengths, every_layer=False):
        x, lengths, layers = self.features(mels, lengths), self.output_lengths(lengths), []
        for layer in self.recurrent:
            x = layer(self.dropout(x), lengths)
            if every_layer or layer is self.recurrent[-1]:
                layers.append(F.log_softmax(self.head(self.dropout(x)).float(), -1))
        return layers if every_layer else layers[-1], lengths


def init_weights(model):
    """The initialisation, layer by role. The head's and projections' weights must be large enough to pass a gradient
    down: normal(0, 0.01), the classifier's in MobileNetV3 (kept by init='before'), makes each layer's too small."""
    fixed = model.config.init == 'fixed'
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # He et al. 2015, as in torchvision's MobileNetV3
            nn.init.kaiming_normal_(module.weight, mode='fan_out')
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.02 if fixed else 0.01)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LSTM) and fixed:
            for name, tensor in module.named_parameters():
                if 'bias' in name:
                    nn.init.zeros_(tensor)
                for gate in tensor.chunk(4) if 'weight' in name else ():  # input, forget, cell, output
                    (nn.init.orthogonal_ if 'hh' in name else nn.init.xavier_uniform_)(gate)
            # Forget gates start open, so gradients reach far back. PyTorch adds two biases: 1 in total.
            module.bias_ih_l0.data[module.hidden_size:2 * module.hidden_size] = 1
    if fixed:
        nn.init.xavier_uniform_(model.head.weight)
    for block in model.blocks if model.config.zero_init_residual else ():
        if block.residual:
            nn.init.zeros_(block.project[1].weight)


def greedy_decode(log_probs, lengths):
    """Best path: the likeliest symbol of each valid frame, repeats merged, blanks dropped (Graves et al. 2006,
    section 3.2). (B, T', V), (B,) -> a list of B lists of symbols."""
    paths = [path[:n] for path, n in zip(log_probs.argmax(2).tolist(), lengths.tolist())]
    return [[s for s, before in zip(path, [0] + path) if s != before and s != 0] for path in paths]


def word_times(path, alphabet, seconds):
    """The labels of one clip's outputs -> [(word, start, end)] in seconds, from the first output that emits the word's
    first character to the last that emits its last. Output t stands for the `seconds` around t * seconds: the strided
    convolutions are centred on their first frame."""
    words, before = [['', 0, 0]], 0
    for t, s in enumerate(path):
        word = words[-1]
        if s and alphabet[s] == ' ':
            words.append(['', 0, 0])
        elif s:
            word[1] = word[1] if word[0] else max(0, t - 0.5) * seconds
            word[0] += alphabet[s] if s != before else ''
            word[2] = (t + 0.5) * seconds
        before = s
    return [tuple(word) for word in words if word[0]]


# ---- python model.py ----------------------------------------------------------------------------------------------

def load_checkpoint(path):
    """A checkpoint of train.py -> the recogniser in eval mode, its alphabet, what is known of its run."""
    checkpoint = torch.load(path, weights_only=True, map_location='cpu')
    network = Recogniser(Config(**checkpoint['config']))
    network.load_state_dict(checkpoint['model'])
    return network.eval(), checkpoint['alphabet'], checkpoint['run']


@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(description='Transcribe audio files, or describe a checkpoint.')
    parser.add_argument('checkpoint', help='best.pt or last.pt of a run')
    parser.add_argument('clips', nargs='*', help='audio files of any rate and number of channels; none: describe')
    parser.add_argument('--times', action='store_true', help="each word's start and end, in seconds")
    args = parser.parse_args(argv)
    import data
    try:
        network, alphabet, run = load_checkpoint(args.checkpoint)
        scores = [f'{part}: WER {run[part]["wer"]:.2f} %' for part in ('valid', 'test') if run[part]] or ['not scored']
    except Exception as error:  # whatever a file that is no checkpoint may raise
        sys.exit(f'model.py: {args.checkpoint}: is no checkpoint of train.py ({type(error).__name__})')
    seconds, failed = network.config.frames_per_output * data.HOP / data.SAMPLE_RATE, False
    for clip in args.clips:
        try:
            wave = data.resample(*data.read_audio(clip), data.SAMPLE_RATE)
        except data.DataError as error:
            print(f'model.py: {error}', file=sys.stderr)
            failed = True
            continue
        mels = data.normalise(data.log_mels(wave))
        log_probs, lengths = network(mels[None, None], torch.tensor([len(mels)]))
        text = data.decode(greedy_decode(log_probs, lengths)[0], alphabet)
        print(f'{clip}: {text}' if len(args.clips) > 1 else text)
        for word, start, end in word_times(log_probs[0].argmax(1).tolist(), alphabet, seconds) if args.times else []:
            print(f'{start:6.2f} {min(end, len(wave) / data.SAMPLE_RATE):6.2f}  {word}')
    if not args.clips:
        print(f'{asdict(network.config)}\n{sum(p.numel() for p in network.parameters()):,} parameters; alphabet: '
              f'{"".join(alphabet)!r}\ntrained on {run["train_data"]}, {run["utterances"]} utterances, '
              f'{run["hours"]:.2f} hours, {run["epoch"]} epochs; ' + ', '.join(scores))
    sys.exit(failed)


if __name__ == '__main__':
    main()
