"""What must never break again.

    python -m pytest -q                     all but the slow ones, about a minute on two cores
    SLOW=1 python -m pytest -q              the slow ones too: speed, the built-in corpus, scale
    AN4_DIR=folder python -m pytest -q      real recordings too: a folder with AN4's manifests

Each test holds the code against something independent: arithmetic, brute force, a second way. The
sections follow the modules: model, data, monitor, train; real recordings come last.
"""
import contextlib
import copy
import functools
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from collections import Counter, OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

os.environ['OMP_NUM_THREADS'] = '1'  # the same bits whatever else the machine does

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from torch import nn

import data
import model
import monitor
import train

# Networks: FAST, the first blocks alone; LITERAL, the original's fixed one; BEFORE its fixes.
FAST = {'blocks': 3, 'frames_per_output': 4}
LITERAL = {'frames_per_output': 1, 'deep_path': 'alone'}
BEFORE = LITERAL | {'upsample': 'transpose', 'squeeze_excite': True, 'output_init': 'normal',
                    'weight_init': 0.01, 'forget_bias': False}
# Flags of a small network, where its size is not the point.
SMALL = ['--blocks=3', '--frames_per_output=4', '--hidden=16']
FIRST_RUN = ['--epochs=3', '--batch_size=2', '--learning_rate=1e-4']

AN4 = os.environ.get('AN4_DIR')
needs_an4 = pytest.mark.skipif(not AN4, reason='AN4_DIR is not set')
slow = pytest.mark.skipif('SLOW' not in os.environ, reason='slow: set SLOW=1')


# ---- helpers and fixtures ------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers in a test alone and among others."""
    torch.manual_seed(0)


def make_network(vocab_size=6, **config):
    """A recogniser with the weights of seed 0."""
    torch.manual_seed(0)
    return model.Recogniser(model.Config(vocab_size, **config))


def make_utterances(texts, duration=1.0):
    """Utterances of these texts, whose files do not exist."""
    return [data.Utterance(Path(f'{i}.wav'), data.normalise_text(text), duration, '', '')
            for i, text in enumerate(texts)]


def tones(text, rng):
    """A toy language -> wave (S,) at 16 kHz.

    Each letter is 90 ms of a square wave of its own pitch, a space is silence; a little noise.
    """
    t = np.arange(1440) / 16000
    pieces = []
    for letter in f' {text} ':
        if letter == ' ':
            pieces.append(np.zeros(1440))
            continue
        pitch = 150 * 1.35 ** (ord(letter) - ord('a'))
        pieces.append(np.hanning(1440) * np.sign(np.sin(2 * np.pi * pitch * t)))
    wave = np.concatenate(pieces)
    return 0.3 * wave + 0.002 * rng.standard_normal(len(wave))


def random_texts(n, seed):
    """Two to three words of two to four letters, no letter twice in a row."""
    rng = random.Random(seed)
    texts = []
    for _ in range(n):
        words = [rng.sample('abcdefgh', rng.randint(2, 4)) for _ in range(rng.randint(2, 3))]
        texts.append(' '.join(''.join(letters) for letters in words))
    return texts


def json_row(audio, text, **fields):
    """A line of a manifest."""
    return json.dumps({'audio_filepath': audio, 'text': text, **fields})


def write_corpus(folder, texts):
    """Write tones as wav files and a manifest -> the manifest's path."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows = []
    for i, text in enumerate(texts):
        soundfile.write(folder / f'{i}.wav', tones(text, rng), 16000)
        rows.append(json_row(f'{i}.wav', text))
    manifest = folder / 'manifest.jsonl'
    manifest.write_text('\n'.join(rows) + '\n')
    return manifest


def read_utterances(path):
    """The utterances of a corpus without faults."""
    utterances, faults = data.read_corpus(path)
    assert not faults
    return utterances


def read_log(folder):
    """The records of a run's epochs."""
    return [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]


def read_json(path):
    return json.loads(path.read_text())


def train_run(folder, *flags):
    """python train.py ... --run_dir folder -> the results."""
    return train.main([*flags, '--run_dir', str(folder)])


def exit_code(main, *argv):
    """What a module's main, which must end in sys.exit, hands to it: a message or a status."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in argv])
    return stop.value.code


class Corpus(NamedTuple):
    """Manifests for training and validation."""
    train: str
    valid: str

    @property
    def flags(self):
        return ['--train_data', self.train, '--valid_data', self.valid]


@pytest.fixture(scope='session')
def corpus(tmp_path_factory):
    """Twenty utterances of tones for training, six for validation."""
    folder = tmp_path_factory.mktemp('tones')
    return Corpus(train=str(write_corpus(folder / 'train', random_texts(20, 1))),
                  valid=str(write_corpus(folder / 'valid', random_texts(6, 2))))


class Run(NamedTuple):
    """A finished run."""
    folder: Path
    results: dict
    log: list


@pytest.fixture(scope='session')
def first_run(corpus, tmp_path_factory):
    """The real train.main: twenty samples, three epochs.

    Only thirty updates, so the peak of the learning rate comes after three: at the default's,
    losses that climb again for a while would say little.
    """
    folder = tmp_path_factory.mktemp('runs') / 'first'
    results = train_run(folder, *corpus.flags, *FIRST_RUN)
    return Run(folder, results, read_log(folder))


class ByHeart(NamedTuple):
    """A run that learnt two sentences of the synthesiser, and the wave of the first."""
    folder: Path
    checkpoint: Path
    text: str
    wave: torch.Tensor


@pytest.fixture(scope='session')
def by_heart(tmp_path_factory):
    """The real train.main --overfit 2."""
    folder = tmp_path_factory.mktemp('heart')
    texts = ['seven two nine', 'light go']
    rows = []
    for i, text in enumerate(texts):
        soundfile.write(folder / f'{i}.wav', data.synthesise(text, i)[0], 16000)
        rows.append(json_row(f'{i}.wav', text))
    manifest = folder / 'm.jsonl'
    manifest.write_text('\n'.join(rows))
    run = folder / 'run'
    train_run(run, '--train_data', str(manifest), '--valid_data=none', '--overfit=2',
              '--batch_size=2', '--blocks=3', '--frames_per_output=4', '--hidden=64',
              '--learning_rate=1e-3')
    wave, _ = data.synthesise(texts[0], 0)
    return ByHeart(run, run / 'best.pt', texts[0], torch.tensor(wave))


# ---- model: settings -----------------------------------------------------------------------------

@pytest.mark.parametrize('config,complaint', [
    ({'frames_per_output': 0}, 'frames_per_output must be 1, 2 or 4'),
    ({'frames_per_output': 3}, 'frames_per_output must be 1, 2 or 4'),
    ({'frames_per_output': 8}, 'frames_per_output must be 1, 2 or 4'),
    ({'blocks': 1}, 'blocks must be 2 to 11'),
    ({'blocks': 12}, 'blocks must be 2 to 11'),
    ({'dropout': -0.1}, 'dropout must be at least 0 and below 1'),
    ({'dropout': 1.0}, 'dropout must be at least 0 and below 1'),
    ({'deep_path': 'both'}, 'deep_path must be gated or alone'),
    ({'upsample': 'repeat'}, 'upsample must be interpolate or transpose'),
    ({'output_init': 'zero'}, 'output_init must be xavier or normal'),
    ({'layers': 0}, 'layers must be 1 or more'),
])
def test_config_rejects_what_is_out_of_range(config, complaint):
    with pytest.raises(ValueError, match=complaint):
        model.Config(vocab_size=6, **config)


# ---- model: alignment and lengths ----------------------------------------------------------------

NARROW = {'n_mels': 16, 'projection': 16, 'hidden': 8}  # bands say nothing about time


def zeros(frames, clips=1):
    """Mels of NARROW's bands, all zero."""
    return torch.zeros(clips, 1, frames, NARROW['n_mels'])


@pytest.mark.parametrize('frames_per_output', [1, 2, 4])
@torch.no_grad()
def test_output_length_is_exact(frames_per_output):
    """ceil(T / frames_per_output) outputs for every T from 1 to 300, alone and in a batch."""
    network = make_network(frames_per_output=frames_per_output, **NARROW).eval()
    lengths = torch.arange(1, 301)
    promised = [math.ceil(t / frames_per_output) for t in range(1, 301)]
    assert network.output_lengths(lengths).tolist() == promised
    for chunk in lengths.split(50):
        log_probs, n = network(zeros(int(chunk[-1]), clips=50), chunk)
        assert n.tolist() == promised[chunk[0] - 1:chunk[-1]]
        assert log_probs.shape[1] == n[-1]
    for t, outputs in enumerate(promised, 1):
        features = network.before_lstm(zeros(t), torch.tensor([t]))
        assert features.shape[1] == outputs


@pytest.mark.parametrize('deep_path,grid', [('alone', 8), ('gated', 4)])
@torch.no_grad()
def test_transposed_convolution_has_the_wrong_length(deep_path, grid):
    """Whole frames of the path that gives fewest: too many outputs for most clips."""
    network = make_network(**NARROW, upsample='transpose', frames_per_output=1,
                           deep_path=deep_path).eval()
    for t in range(1, 41):
        log_probs, _ = network(zeros(t), torch.tensor([t]))
        outputs = log_probs.shape[1]
        assert outputs == grid * math.ceil(t / grid)
        assert outputs == network.output_lengths(torch.tensor(t))
        assert (outputs == t) == (t % grid == 0)


def linearise(network):
    """Kernels of equal weights, batch norm as identity, no activations.

    What remains is where the network looks.
    """
    for module in list(network.modules()):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weights = module.weight[0].numel()
            nn.init.constant_(module.weight, 1 / weights)  # ones would overflow after 11 blocks
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
        for name, child in module.named_children():
            if isinstance(child, (nn.ReLU, nn.Hardswish)):
                setattr(module, name, nn.Identity())
    return network.eval()


@pytest.mark.parametrize('frames_per_output', [1, 2, 4])
@pytest.mark.parametrize('config', [{}, {'blocks': 3}, {'deep_path': 'alone'}])
@torch.no_grad()
def test_outputs_are_centred_on_their_input(frames_per_output, config):
    """A click at mel frame t changes the features around t.

    The centre of mass of the change, over 64 positions, lies within half an output frame. A
    stride-8 grid meets clicks of different phase with different weights, so that single positions
    scatter by up to 0.38 frames around it; at 2 and 4 frames an output each one stays within half
    an output.
    """
    network = linearise(make_network(frames_per_output=frames_per_output, **NARROW, **config))
    clicks = torch.arange(160, 224)
    mels = zeros(384, clips=64)
    mels[range(64), 0, clicks] = 1
    features = network.before_lstm(mels, torch.full((64,), 384))  # of silence they would be zero
    change = features.double().abs().sum(2)
    # The middle of the mel frames that each output stands for.
    middles = torch.arange(change.shape[1]) * frames_per_output + (frames_per_output - 1) / 2
    error = (change * middles).sum(1) / change.sum(1) - clicks
    assert error.mean().abs() <= frames_per_output / 2 + 1e-3
    assert error.abs().max() <= max(frames_per_output / 2, 0.5 + 0.38)


# ---- model: initialisation -----------------------------------------------------------------------

def test_the_head_is_xavier():
    """Glorot & Bengio 2010, equation 16."""
    head = make_network(vocab_size=28).head
    bound = math.sqrt(6 / (512 + 28))
    assert head.weight.abs().max() <= bound
    assert head.weight.abs().max() > 0.95 * bound
    assert head.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not head.bias.any()


@pytest.mark.parametrize('name', ['deep.projection', 'early.projection'])
def test_projections_have_a_deviation_of_two_per_cent(name):
    linear = make_network().get_submodule(name)
    assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not linear.bias.any()


@pytest.mark.parametrize('layer', [0, 1])
@pytest.mark.parametrize('direction', ['forward_lstm', 'backward_lstm'])
def test_lstms_are_orthogonal_and_begin_by_remembering(layer, direction):
    lstm = make_network().recurrent[layer].get_submodule(direction)
    biases = lstm.bias_ih_l0 + lstm.bias_hh_l0
    assert biases.tolist() == [0.0] * 256 + [1.0] * 256 + [0.0] * 512  # the second: forget gate
    for gate in lstm.weight_hh_l0.chunk(4):
        assert torch.allclose(gate @ gate.T, torch.eye(256), atol=1e-5)
    for gate in lstm.weight_ih_l0.chunk(4):
        assert gate.abs().max() <= math.sqrt(6 / (256 + gate.shape[1]))


def test_the_stem_is_he():
    """He et al. 2015: a variance of 2 / fan_out."""
    weight = make_network().stem[0].weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (16 * 9)), rel=0.2)


@torch.no_grad()
def test_the_gate_lets_a_tenth_of_the_deep_path_pass():
    """Without the gate, what is left is the early path; doubled, the deep path's share doubles."""
    network = make_network(**NARROW).eval()
    mels, lengths = torch.randn(1, 1, 40, 16), torch.tensor([40])
    both = network.before_lstm(mels, lengths)
    network.gate.mul_(2)
    doubled = network.before_lstm(mels, lengths)
    network.gate.zero_()
    early = network.before_lstm(mels, lengths)
    assert torch.allclose(doubled - early, 2 * (both - early), atol=1e-6)
    assert not torch.equal(both, early)
    assert make_network(**NARROW).gate.tolist() == pytest.approx([0.1] * 16)


@pytest.mark.parametrize('name', ['head', 'deep.projection'])
def test_linear_layers_before_the_fixes_were_small(name):
    linear = make_network(vocab_size=28, **BEFORE).get_submodule(name)
    assert linear.weight.std().item() == pytest.approx(0.01, rel=0.05)


def test_lstms_before_the_fixes_were_as_pytorch_makes_them():
    """Uniform within 1 / sqrt(hidden), the biases too."""
    lstm = make_network(**BEFORE).recurrent[0].forward_lstm
    largest = lstm.bias_ih_l0[256:512].abs().max()
    assert largest <= 1 / 16
    assert largest > 0.9 / 16


def test_running_statistics_serve_short_runs():
    """Plain average of the first ten batches, then momentum 0.1, written out."""
    norm = model.BatchNorm(1)
    means = []
    expected = 0.0
    for step in range(20):
        x = torch.randn(4, 1, 5, 5) + step
        norm(x)
        means.append(x.mean().item())
        expected = np.mean(means) if step < 10 else 0.9 * expected + 0.1 * means[-1]
        assert norm.running_mean.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


# ---- model: padding and masks --------------------------------------------------------------------

CONFIGS = [
    {},
    FAST,
    LITERAL,
    BEFORE,
    {'squeeze_excite': True},
    {'upsample': 'transpose'},
    {'frames_per_output': 1},
    {'frames_per_output': 4},
    {'blocks': 6},
]
LOOK_ALONG_TIME = ['zero_padding', 'mean_over_time', 'hold_last', 'reverse_time']


@torch.no_grad()
def shaken_network(config):
    """A network with random batch norm, its statistics those of random input, a loud head and gate.

    An untrained, near-uniform network hides leaks.
    """
    network = make_network(hidden=16, **config)
    if network.gate is not None:
        nn.init.uniform_(network.gate, 0.5, 1.5)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    nn.init.normal_(network.head.weight, 0, 0.5)
    # In training mode: sets the statistics.
    network(torch.randn(4, 1, 160, 80) + torch.randn(80), torch.full((4,), 160))
    return network.eval()


def noise_batch():
    """Clips of four lengths, noise behind their ends too -> (B, 1, T, 80), (B,)."""
    torch.manual_seed(1)
    return torch.randn(4, 1, 160, 80), torch.tensor([160, 77, 122, 33])


@torch.no_grad()
def outputs_alone(network, mels, lengths):
    """The log-probabilities (T', V) of each clip of a batch by itself, without padding."""
    alone = []
    for i, t in enumerate(lengths.tolist()):
        log_probs, n = network(mels[i:i + 1, :, :t], lengths[i:i + 1])
        assert log_probs.shape[1] == n[0]
        alone.append(log_probs[0])
    return alone


@torch.no_grad()
def largest_leak(network, mels, lengths, alone):
    """The largest difference between clips in a batch and those clips alone."""
    together, n = network(mels, lengths)
    differences = []
    for i, expected in enumerate(alone):
        assert n[i] == len(expected)
        differences.append((together[i, :n[i]] - expected).abs().max().item())
    return max(differences)


@pytest.mark.parametrize('config', CONFIGS)
def test_a_clip_alone_equals_itself_in_a_batch(config):
    network = shaken_network(config)
    mels, lengths = noise_batch()
    alone = outputs_alone(network, mels, lengths)
    assert largest_leak(network, mels, lengths, alone) < 1e-4


class MaskSkipper:
    """Stands before the functions that look along time, and deceives one call in a pass.

    That call, counted from 1, is told that all clips fill the batch.
    """

    def __init__(self):
        self.calls = 0
        self.skipped = None

    def wrap(self, function):
        def wrapped(x, lengths, *rest):
            self.calls += 1
            if self.calls == self.skipped:
                time_axis = 2 if x.dim() == 4 else 1
                lengths = torch.full_like(lengths, x.shape[time_axis])
            return function(x, lengths, *rest)
        return wrapped


@pytest.mark.parametrize('config', CONFIGS[:6])
def test_every_single_mask_is_needed(config, monkeypatch):
    """Each call, in turn, gets wrong lengths: each time the clips' output must change."""
    network = shaken_network(config)
    mels, lengths = noise_batch()
    alone = outputs_alone(network, mels, lengths)
    skipper = MaskSkipper()
    for name in LOOK_ALONG_TIME:
        monkeypatch.setattr(model, name, skipper.wrap(getattr(model, name)))
    assert largest_leak(network, mels, lengths, alone) < 1e-4
    masks = skipper.calls
    assert masks >= 1 + len(network.blocks) + 4  # stem, blocks, two layers' ways there and back
    for skipped in range(1, masks + 1):
        skipper.calls = 0
        skipper.skipped = skipped
        leak = largest_leak(network, mels, lengths, alone)
        assert leak >= 1e-4, f'call {skipped} of {masks} is needless'


# ---- model: CTC and decoding ---------------------------------------------------------------------

EXAMPLE = torch.tensor([[0.2, 0.7, 0.1],  # of the comment above model.collapse: P(-), P(a), P(b)
                        [0.3, 0.2, 0.5],
                        [0.6, 0.1, 0.3]])
EXAMPLE_PATHS = {'aab': 0.042, 'abb': 0.105, '-ab': 0.012, 'a-b': 0.063, 'ab-': 0.210}
TARGETS = [(1,), (1, 2), (1, 1), (2, 1, 2)]


def collapse(path):
    """A path's repeats merged and its blanks dropped, without the code under test."""
    return tuple(symbol for symbol, _ in itertools.groupby(path) if symbol)


def paths_of(target, outputs, vocab_size=3):
    """All paths that collapse to the target."""
    return [path for path in itertools.product(range(vocab_size), repeat=outputs)
            if collapse(path) == target]


def likelihood(path, probabilities):
    """Of one path under probabilities (T', V)."""
    return math.prod(float(probabilities[t][symbol]) for t, symbol in enumerate(path))


def ctc_loss(log_probs, lengths, targets, reduction='mean'):
    """PyTorch's, of log-probabilities (B, T', V) and targets of one length."""
    targets = torch.tensor(targets)
    target_lengths = torch.full((len(targets),), targets.shape[1])
    return F.ctc_loss(log_probs.transpose(0, 1), targets, lengths, target_lengths,
                      reduction=reduction)


@pytest.mark.parametrize('path,by_hand', EXAMPLE_PATHS.items())
def test_paths_of_the_worked_example(path, by_hand):
    symbols = ['-ab'.index(letter) for letter in path]
    assert likelihood(symbols, EXAMPLE) == pytest.approx(by_hand, abs=1e-6)


def test_the_worked_example_lists_all_paths():
    paths = {''.join('-ab'[symbol] for symbol in path) for path in paths_of((1, 2), outputs=3)}
    assert paths == set(EXAMPLE_PATHS)


def test_loss_of_the_worked_example():
    loss = ctc_loss(EXAMPLE.log()[None], torch.tensor([3]), [(1, 2)], reduction='sum')
    assert sum(EXAMPLE_PATHS.values()) == pytest.approx(0.432)
    assert loss.item() == pytest.approx(-math.log(0.432), abs=1e-5)
    assert loss.item() == pytest.approx(0.839, abs=5e-4)
    comment = Path(model.__file__).read_text()
    assert 'loss = -ln 0.432 = 0.839' in comment
    for path, by_hand in EXAMPLE_PATHS.items():
        assert re.search(rf' {path}    [\d. *]+ = {by_hand:.3f}', comment), path


@pytest.mark.parametrize('target', TARGETS)
@torch.no_grad()
def test_ctc_loss_against_all_paths(target):
    """The loss of the recogniser's own outputs is minus the log of the sum over all paths."""
    network = make_network(vocab_size=3, hidden=8, frames_per_output=4).eval()
    log_probs, n = network(torch.randn(1, 1, 20, 80), torch.tensor([20]))
    loss = ctc_loss(log_probs, n, [target])
    paths = paths_of(target, outputs=5)
    total = sum(likelihood(path, log_probs[0].exp()) for path in paths)
    assert n.tolist() == [5]
    assert loss.item() == pytest.approx(-math.log(total) / len(target), abs=1e-4)
    assert loss > -1e-4


def test_the_first_layer_can_be_read_by_itself():
    """Intermediate CTC: its loss reaches nothing above the first LSTM layer."""
    network = make_network(hidden=8).eval()
    mels, lengths = torch.randn(2, 1, 40, 80), torch.tensor([40, 31])
    layers, n = network(mels, lengths, every_layer=True)
    log_probs, _ = network(mels, lengths)
    assert len(layers) == 2
    assert torch.equal(layers[1], log_probs)
    ctc_loss(layers[0], n, [(1, 2), (3, 4)]).backward()
    assert network.stem[0].weight.grad.any()
    assert network.head.weight.grad.any()
    assert network.recurrent[0].backward_lstm.weight_ih_l0.grad.any()
    assert network.recurrent[1].backward_lstm.weight_ih_l0.grad is None


def test_collapse_as_its_docstring_says():
    emissions = model.collapse([0, 1, 1, 0, 1, 2])
    assert emissions == [(1, 1, 2), (1, 4, 4), (2, 5, 5)]
    assert [emission.symbol for emission in emissions] == [1, 1, 2]


def test_collapse_against_groupby():
    rng = random.Random(0)
    for _ in range(300):
        path = rng.choices(range(4), k=rng.randint(0, 20))
        expected = []
        first = 0
        for symbol, repeats in itertools.groupby(path):
            behind = first + len(list(repeats))
            if symbol:
                expected.append((symbol, first, behind - 1))
            first = behind
        assert model.collapse(path) == expected


def test_greedy_decoding_collapses_the_best_path():
    paths = torch.tensor([[0, 1, 1, 0, 1, 2, 2, 3],
                          [3, 3, 0, 0, 2, 1, 1, 1]])
    log_probs = F.one_hot(paths, 4).float().log_softmax(-1)
    assert model.greedy_decode(log_probs, torch.tensor([8, 5])) == [[1, 1, 2, 3], [3, 2]]


# ---- model: the character model, and beam search -------------------------------------------------

def test_the_character_model_counts_as_by_hand():
    """The example of its docstring, and contexts never seen, which say what shorter ones do."""
    language_model = model.CharacterModel.of_texts(['ab', 'aa'], order=2)
    assert language_model.counts[''] == {'a': 3, 'b': 1, model.END: 2}
    assert language_model.counts['a'] == {'b': 1, 'a': 1, model.END: 1}
    b = (1 + 3 / 4) / (6 + 3)
    assert language_model.log_prob('', 'b') == pytest.approx(math.log(b))
    b_after_a = (1 + 3 * b) / (3 + 3)
    assert language_model.log_prob('a', 'b') == pytest.approx(math.log(b_after_a))
    assert language_model.log_prob('ba', 'b') == pytest.approx(math.log(b_after_a))
    assert language_model.log_prob('x', 'b') == pytest.approx(math.log(b))
    assert language_model.log_prob('', 'x') == pytest.approx(math.log(3 / 4 / (6 + 3)))


@pytest.mark.parametrize('context', ['', 'a', 'go', 'zzzz', 'left'])
def test_the_character_models_probabilities_sum_to_one(context):
    """Over all that was seen, and one more kind for what was not."""
    texts = ['go left', 'go right', 'left']
    language_model = model.CharacterModel.of_texts(texts)
    kinds = {*''.join(texts), model.END, 'never seen'}
    total = sum(math.exp(language_model.log_prob(context, kind)) for kind in kinds)
    assert total == pytest.approx(1)


def test_a_character_model_is_pruned_from_its_rarest_contexts():
    texts = ['go left', 'go right', 'stop here', 'go left'] * 3 + ['quiz']
    whole = model.CharacterModel.of_texts(texts)
    size = len(json.dumps(whole.counts))
    pruned = whole.pruned(size // 2)
    assert len(json.dumps(pruned.counts)) <= size // 2
    assert whole.pruned(size).counts == whole.counts
    kept = min(pruned.totals.values())
    for context in set(whole.counts) - set(pruned.counts):
        assert whole.totals[context] <= kept
    for context in pruned.counts:  # a context's own ending is there too
        assert context[1:] in pruned.counts
    assert model.CharacterModel(json.loads(json.dumps(whole.counts))).totals == whole.totals


def best_text(log_probs, alphabet, language_model, lm_weight, label_bonus):
    """The text of the highest score, by listing all paths."""
    outputs, symbols = log_probs.shape
    rows = log_probs.tolist()
    likelihood = Counter()
    for path in itertools.product(range(symbols), repeat=outputs):
        text = ''.join(alphabet[emission.symbol] for emission in model.collapse(path))
        likelihood[text] += math.exp(sum(rows[t][s] for t, s in enumerate(path)))
    scores = {}
    for text, probability in likelihood.items():
        scores[text] = math.log(probability)
        if lm_weight:
            scores[text] += label_bonus * len(text)
            for i, character in enumerate(text + model.END):
                scores[text] += lm_weight * language_model.log_prob(text[:i], character)
    return max(scores, key=scores.get)


@pytest.mark.parametrize('lm_weight,label_bonus', [(0.0, 1.0), (0.6, 1.5), (2.0, 0.5)])
def test_beam_search_finds_the_best_text_of_all(lm_weight, label_bonus):
    """A beam as wide as there are texts, against all 4^6 paths."""
    alphabet = ['', 'a', 'b', ' ']
    language_model = model.CharacterModel.of_texts(['ab a', 'aab', 'a b'], order=3)
    found = set()
    for _ in range(6):
        log_probs = (2 * torch.randn(6, 4)).log_softmax(1)
        expected = best_text(log_probs, alphabet, language_model, lm_weight, label_bonus)
        text = model.beam_decode(log_probs, alphabet, language_model,
                                 model.Decoding(10_000, lm_weight, label_bonus))
        assert text == expected
        found.add(text)
    assert len(found) > 2


def test_beam_search_of_a_long_clip_neither_fades_nor_forgets():
    """8,000 outputs, whose probability as a number would be zero: every letter is found."""
    paths = torch.tensor([0, 1, 0, 2] * 2000)
    log_probs = (3.0 * F.one_hot(paths, 3)).log_softmax(1)
    text = model.beam_decode(log_probs, ['', 'a', 'b'], None, model.Decoding(width=4))
    assert text == 'ab' * 2000


@pytest.mark.parametrize('flags,lm_weight,lm_texts', [
    ([], 0.6, ['seven two nine', 'light go']),        # the training transcripts' own
    (['--lm_text=text.txt', '--lm_weight=0.1'], 0.1, ['t n']),  # no u, no r were trained
    (['--lm_weight=0'], 0.0, ['seven two nine', 'light go']),
])
def test_clips_are_decoded_by_beam_search(flags, lm_weight, lm_texts, by_heart, tmp_path,
                                          monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path('text.txt').write_text('zzz\nTURN\n')
    calls = []
    beam_decode = model.beam_decode

    def recorded(log_probs, alphabet, language_model, decoding):
        calls.append((decoding.width, decoding.lm_weight, language_model.counts))
        return beam_decode(log_probs, alphabet, language_model, decoding)

    monkeypatch.setattr(model, 'beam_decode', recorded)
    clip = by_heart.folder / 'clip.wav'
    assert exit_code(model.main, by_heart.checkpoint, clip, '--beam=8', *flags) is False
    assert capsys.readouterr().out.strip() == by_heart.text
    assert calls == [(8, lm_weight, model.CharacterModel.of_texts(lm_texts).counts)]


def test_evaluation_scores_what_beam_search_hears(corpus):
    utterances = read_utterances(corpus.valid)
    alphabet = data.make_alphabet(utterances)
    speech = data.Speech(utterances, alphabet)
    network = make_network(vocab_size=len(alphabet), hidden=8, **FAST)
    evaluation = train.evaluate(network, speech, beam=lambda log_probs: f'{len(log_probs)} x')
    outputs = [network.output_lengths(len(speech[0, i][0])) for i in range(len(utterances))]
    assert [sentence.beam for sentence in evaluation.sentences] == [f'{n} x' for n in outputs]
    assert evaluation.beam_rates != evaluation.rates


@pytest.mark.parametrize('flags,words', [
    (['--lm_weight=0.1'], '--lm_weight is for beam search'),
    (['--beam=4', '--lm_text=no.txt'], '--lm_text no.txt: cannot be read as text'),
    (['--beam=4', '--lm_text=digits.txt'], 'digits.txt: holds no line in the characters'),
    (['--lm_text=digits.txt'], '--lm_text is for beam search'),
])
def test_decoding_flags_that_cannot_be(flags, words, by_heart, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('digits.txt').write_text('123\n')
    message = exit_code(model.main, by_heart.checkpoint, by_heart.folder / 'clip.wav', *flags)
    assert words in message
    assert '\n' not in message


# ---- model: alignment and word times -------------------------------------------------------------

def test_alignment_is_the_best_of_all_paths():
    """Against all paths of six outputs and three symbols that collapse to the text."""
    for symbols in ([1, 2], [1, 1], [2], [], [1, 2, 2]):
        log_probs = torch.randn(6, 3).log_softmax(1)
        scores = {}
        for path in itertools.product(range(3), repeat=6):
            emissions = model.collapse(path)
            if [emission.symbol for emission in emissions] == symbols:
                scores[path] = sum(log_probs[t, s].item() for t, s in enumerate(path))
        best = max(scores, key=scores.get)
        assert model.align(log_probs, symbols) == model.collapse(best)


def test_a_greedy_text_is_aligned_as_it_was_heard():
    log_probs = torch.randn(50, 5).log_softmax(1)
    emissions = model.collapse(log_probs.argmax(1).tolist())
    assert model.align(log_probs, [emission.symbol for emission in emissions]) == emissions


def test_a_text_too_long_to_align_is_an_error():
    with pytest.raises(ValueError, match='3 symbols do not fit 4 outputs'):
        model.align(torch.zeros(4, 3), [1, 1, 1])


def test_a_clip_too_long_for_its_words_times_is_a_line(by_heart, monkeypatch, capsys):
    monkeypatch.setattr(model, 'MOST_STEPS', 10)
    clip = by_heart.folder / 'clip.wav'
    assert exit_code(model.main, by_heart.folder / 'best.pt', clip, '--times') is True
    message = capsys.readouterr().err
    assert message.startswith(f'model.py: {clip}: ')
    assert 'are too many to align; cut it into pieces, or leave --times and --plot out' in message
    assert message.count('\n') == 1


def test_words_are_split_at_spaces():
    path = [0, 1, 1, 0, 2, 3, 0, 0, 1, 0, 1, 3, 3, 0]
    words = model.split_words(model.collapse(path), ['', 'a', 'b', ' '])
    assert [[word[0].first, word[-1].last] for word in words] == [[1, 4], [8, 10]]


@pytest.mark.parametrize('loudness,edges,expected', [
    ([-2] * 4 + [0] * 20, [(6, 8)], [(4, 8 + model.RELEASE)]),            # where the sound begins
    ([0] * 60, [(44, 46)], [(44 - model.MAX_ONSET, 46 + model.RELEASE)]),  # not endlessly
    ([0] * 30, [(2, 8), (18, 22)], [(0, 11), (11, 27)]),                  # 0.3 of the gap
    ([0] * 10, [(0, 5), (5, 10)], [(0, 5), (5, 10)]),                     # nothing between
    ([-2] * 30, [(2, 3), (18, 25)], [(2, 8), (18, 30)]),
    ([], [], []),
])
def test_words_are_as_wide_as_their_sound(loudness, edges, expected):
    assert model.widen(edges, loudness) == expected


def test_a_words_times_are_those_of_its_outputs():
    """Outputs 20 to 22 say "a", of 4 frames each, in loud sound from frame 77 on."""
    network = make_network(vocab_size=3, hidden=8, **FAST)
    checkpoint = model.Checkpoint(network, ['', 'a', ' '], {}, None)
    symbols = torch.tensor([0] * 20 + [1] * 3 + [0] * 27)
    log_probs = (9.0 * F.one_hot(symbols, 3)).log_softmax(1)
    loudness = [-2.0] * 77 + [1.0] * 123
    word, = model.timed_words('a', log_probs, loudness, checkpoint, start=0.5, duration=9.0)
    assert word.start == pytest.approx(0.5 + 0.77)
    assert word.end == pytest.approx(0.5 + 0.92 + 0.01 * model.RELEASE)
    assert word.confidence == pytest.approx(log_probs[20, 1].exp().item())


def test_words_are_printed_with_their_times(by_heart, capsys):
    exit_code(model.main, by_heart.checkpoint, by_heart.folder / 'clip.wav', '--times')
    text, *lines = capsys.readouterr().out.strip().splitlines()
    rows = [line.split() for line in lines]
    assert [word for _, _, _, word in rows] == text.split()
    assert all(0.5 < float(confidence) <= 1 for _, _, confidence, _ in rows)
    edges = [[float(start), float(end)] for start, end, _, _ in rows]
    times = sum(edges, [])
    assert times == sorted(times)
    assert times[-1] <= len(by_heart.wave) / 16000 + 0.005  # as printed


# ---- model: checkpoints and transcribing ---------------------------------------------------------

@pytest.mark.parametrize('name,rate,channels', [
    ('a.wav', 44100, 2),
    ('b.flac', 24000, 1),
    ('c.mp3', 16000, 1),
    ('d.ogg', 16000, 1),
])
def test_any_file_format_gives_the_same_transcript(name, rate, channels, by_heart, tmp_path,
                                                   capsys):
    copy = data.resample(by_heart.wave, 16000, rate).numpy()
    soundfile.write(tmp_path / name, np.stack([copy] * channels, 1), rate)
    code = exit_code(model.main, by_heart.checkpoint, tmp_path / name)
    assert capsys.readouterr().out.strip() == by_heart.text
    assert code is False


def test_narrow_band_is_transcribed(by_heart, tmp_path, capsys):
    narrow = data.resample(by_heart.wave, 16000, 8000)
    soundfile.write(tmp_path / 'e.wav', narrow.numpy(), 8000)
    assert exit_code(model.main, by_heart.checkpoint, tmp_path / 'e.wav') is False
    assert capsys.readouterr().out.strip().endswith('two nine')  # the s of seven is above 4 kHz


def test_the_three_lines_from_python_give_what_main_prints(by_heart, capsys):
    """The lines of model.py's docstring."""
    clip = by_heart.folder / 'clip.wav'
    checkpoint = model.load_checkpoint(by_heart.checkpoint)
    wave = data.read_wave(clip)
    text = model.transcribe(checkpoint, wave).text
    exit_code(model.main, by_heart.checkpoint, clip)
    assert text == capsys.readouterr().out.strip()
    assert text == by_heart.text


def test_a_missing_clip_does_not_stop_the_others(by_heart, tmp_path, capsys):
    clip = by_heart.folder / 'clip.wav'
    code = exit_code(model.main, by_heart.checkpoint, tmp_path / 'no.wav', clip)
    captured = capsys.readouterr()
    assert code
    assert captured.out.strip().endswith(by_heart.text)
    assert 'no.wav' in captured.err
    assert captured.err.count('\n') == 1


@pytest.mark.parametrize('part', ['valid: WER 0.00 %', 'm.jsonl', 'parameters'])
def test_a_checkpoint_describes_itself(part, by_heart, capsys):
    exit_code(model.main, by_heart.checkpoint)
    assert part in capsys.readouterr().out


def test_another_file_is_no_checkpoint(tmp_path):
    (tmp_path / 'x.pt').write_text('x')
    assert 'is not a checkpoint' in exit_code(model.main, tmp_path / 'x.pt', 'a.wav')


def test_checkpoints_load_and_decode_alike(first_run, corpus):
    """By PyTorch alone, and not by load_checkpoint."""
    checkpoint = torch.load(first_run.folder / 'best.pt', weights_only=True)
    network = model.Recogniser(model.Config(**checkpoint['config']))
    network.load_state_dict(checkpoint['model'])
    speech = data.Speech(read_utterances(corpus.valid), checkpoint['alphabet'])
    evaluation = train.evaluate(network, speech)
    assert evaluation.rates == first_run.results['valid']
    assert evaluation.rates == checkpoint['run']['valid']
    best = monitor.best_epoch(first_run.log)
    assert evaluation.loss == pytest.approx(best['valid_loss'], rel=1e-5)
    assert [sentence.index for sentence in evaluation.sentences] == list(range(6))


# ---- data: features ------------------------------------------------------------------------------

def hertz_to_mel(hertz):
    """Slaney 1998."""
    if hertz < 1000:
        return hertz * 3 / 200
    return 15 + 27 * math.log(hertz / 1000) / math.log(6.4)


def mel_to_hertz(mel):
    if mel < 15:
        return mel * 200 / 3
    return 1000 * 6.4 ** ((mel - 15) / 27)


def test_log_mels_equal_a_naive_dft():
    """Every step again in float64 by its definition.

    Frames, Hann window, DFT as a sum, Slaney's mel scale.
    """
    wave = np.random.default_rng(0).standard_normal(2000) * 0.1
    mels = data.log_mels(torch.tensor(wave, dtype=torch.float32))
    assert mels.shape == (math.ceil(2000 / 160), 80)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    dft = np.exp(-2j * np.pi * np.outer(np.arange(257), np.arange(400)) / 512)
    edges = [mel_to_hertz(hertz_to_mel(8000) * i / 81) for i in range(82)]
    for t, frame in enumerate(mels):
        centre = 160 * t + 80
        positions = range(centre - 200, centre + 200)
        samples = np.array([wave[s] if 0 <= s < 2000 else 0 for s in positions])
        power = np.abs(dft @ (samples * hann)) ** 2
        for band in range(80):
            low, peak, high = edges[band:band + 3]
            energy = 0
            for k, p in enumerate(power):
                hertz = 31.25 * k
                rising = (hertz - low) / (peak - low)
                falling = (high - hertz) / (high - peak)
                energy += p * max(0, min(rising, falling))
            assert frame[band].item() == pytest.approx(math.log(energy + 1e-10), abs=1e-4)


def test_speech_is_normalised_over_itself():
    """Noise is speech from end to end: 20 frames of silence and a half-silent one are put on each
    side."""
    wave = 0.1 * torch.randn(16000)
    mels, start = data.features(wave)
    speech = mels[21:-21]
    assert start == -21
    assert speech.shape == (100, 80)
    assert speech.mean(0).abs().max() < 1e-3
    assert speech.std(correction=0).item() == pytest.approx(1, abs=1e-2)
    scales = data.log_mels(wave).std(0) / speech.std(0)  # one for all bands
    assert scales.max().item() == pytest.approx(scales.min().item(), rel=1e-2)


def test_a_recording_of_zeros_stays_silent():
    """Common Voice has some, and deepspeech.pytorch's loss was nan for them (issue 272)."""
    assert data.features(torch.zeros(1600)).mels.abs().max() < 1e-2


def test_features_do_not_depend_on_loudness():
    wave = torch.tensor(spoken_wave())
    expected, _ = data.features(wave)
    for factor in 0.1, 0.5, 3:
        mels, _ = data.features(factor * wave)
        assert torch.allclose(mels, expected, atol=1e-3)


@functools.cache
def spoken_wave():
    """Some words of the synthesiser, by a voice in a quiet room, in whole frames."""
    return data.synthesise('seven two nine', 3)[0][:25600]


def silence(seconds, level=0.0):
    """White noise of this level, in full scales."""
    rng = np.random.default_rng(0)
    return (level * rng.standard_normal(round(16000 * seconds))).astype(np.float32)


@pytest.mark.parametrize('level', [0, 10 ** (-90 / 20), 10 ** (-70 / 20)])
@pytest.mark.parametrize('before,behind', [(0, 0.4), (0.1, 0.1), (1, 1), (2, 2)])
def test_silence_round_a_clip_leaves_no_trace(before, behind, level):
    """Zeros, dither and quiet noise: the same features, which begin where the speech does."""
    wave = spoken_wave()
    expected, start = data.features(torch.tensor(wave))
    padded = np.concatenate([silence(before, level), wave, silence(behind, level)])
    mels, padded_start = data.features(torch.tensor(padded))
    assert padded_start == start + round(100 * before)
    assert mels.shape == expected.shape
    assert (mels - expected).abs().mean() < 0.005


@pytest.mark.parametrize('level_below_voice', [10, 20, 40])
def test_zeros_round_a_noisy_clip_change_nothing_at_all(level_below_voice):
    """Where the noise is loud enough to count as speech to its very ends."""
    wave = spoken_wave()
    noisy = wave + silence(len(wave) / 16000, np.abs(wave).max() * 10 ** (-level_below_voice / 20))
    expected, start = data.features(torch.tensor(noisy))
    padded = np.concatenate([silence(0.1), noisy, silence(1)])
    mels, padded_start = data.features(torch.tensor(padded))
    assert padded_start == start + 10
    assert torch.equal(mels, expected)


def test_a_gap_of_silence_in_the_midst_moves_the_rest_only():
    """A second of zeros between the clip and itself again: both as they are alone."""
    wave = spoken_wave()
    expected, _ = data.features(torch.tensor(wave))
    mels, _ = data.features(torch.tensor(np.concatenate([wave, silence(1), wave])))
    inner = expected[22:-22]
    assert (mels[22:len(expected) - 22] - inner).abs().max() < 0.05
    assert (mels[-len(expected) + 22:-22] - inner).abs().max() < 0.05


@pytest.mark.parametrize('seconds', [0.2, 0.9])
def test_a_click_is_drawn_over(seconds):
    """Ten times as loud as the voice, before or within it: only frames that hold it may change."""
    wave = np.concatenate([silence(0.5), spoken_wave()])
    expected, start = data.features(torch.tensor(wave))
    clicked = wave.copy()
    clicked[round(16000 * seconds)] += 10 * abs(wave).max()
    mels, clicked_start = data.features(torch.tensor(clicked))
    difference = (mels - expected).abs().max(1).values
    assert clicked_start == start
    assert (difference > 0.1).sum() <= 5
    assert mels.max() < expected.max() + 0.5


def test_a_click_in_a_clip_without_a_voice_is_borne():
    wave = torch.zeros(1600)
    wave[800] = 1.0
    assert data.features(wave).mels.isfinite().all()


# ---- data: audio ---------------------------------------------------------------------------------

@pytest.mark.parametrize('rate', [8000, 11025, 22050, 44100, 48000])
def test_resampling_keeps_the_band_and_drops_the_rest(rate, tmp_path):
    """A 1 kHz tone comes out as itself; what 16 kHz cannot hold disappears."""
    t = np.arange(rate) / rate
    tone = np.sin(2 * np.pi * 1000 * t)
    stereo = np.stack([0.5 * tone, 0.3 * tone], 1)
    if rate > 20000:
        stereo += 0.5 * np.sin(2 * np.pi * 9000 * t)[:, None]
    soundfile.write(tmp_path / 'tone.flac', stereo, rate, subtype='PCM_24')
    wave = data.read_wave(tmp_path / 'tone.flac').numpy()
    assert len(wave) == 16000
    expected = 0.4 * np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000)
    assert np.abs(wave - expected)[500:-500].max() < 2e-3


# ---- data: text ----------------------------------------------------------------------------------

TEXTS = ['Hello  World', 'ÅNGSTRÖM', unicodedata.normalize('NFD', 'naïve'),
         'привет мир', '你好', "it's"]


def test_alphabet_round_trip_in_any_script():
    utterances = make_utterances(TEXTS)
    alphabet = data.make_alphabet(utterances)
    for u in utterances:
        symbols = data.encode(u.text, alphabet)
        assert 0 not in symbols
        assert data.decode(symbols, alphabet) == u.text
    assert alphabet[0] == ''


def test_texts_are_normalised():
    assert data.normalise_text(TEXTS[0]) == 'hello world'
    assert data.normalise_text(TEXTS[2]) == 'naïve'


def test_outputs_are_shown_by_their_symbols():
    assert data.show_path([0, 1, 2, 2, 0], ['', ' ', 'a']) == '-_aa-'
    assert data.show_path([0, 1, 2, 2, 0], ['', '-', 'a']) == '~-aa~'


def test_punctuation_is_noticed():
    note = data.punctuation_note(['', ' ', "'", '-', '.', '?', 'é'])
    assert note.startswith("punctuation is learnt as letters are: '.' '?'; remove")
    assert data.punctuation_note(['', ' ', "'", 'é']) is None


def test_unknown_characters_have_no_symbol():
    assert data.encode('zebra', ['', 'a', 'b']) == [2, 1]


@pytest.mark.parametrize('frames_per_output,unlearnable', [
    (2, 0),
    (4, 1),
    (5, 1),
    (8, 1),
    (20, 2),
])
def test_what_ctc_cannot_learn(frames_per_output, unlearnable):
    """Of 20 frames; "hello" needs 6 outputs, "abc" 3."""
    utterances = make_utterances(['hello', 'abc'], duration=0.2)
    assert len(data.unlearnable(utterances, frames_per_output)) == unlearnable


# ---- data: batches and augmentation --------------------------------------------------------------

@pytest.fixture
def durations():
    """A hundred and one, from 1 to 20 seconds."""
    rng = random.Random(0)
    return [rng.uniform(1, 20) for _ in range(101)]


@pytest.fixture
def batches_of(durations):
    """A function of an epoch -> its batches of eight of these durations."""
    utterances = [data.Utterance(Path(f'{i}.wav'), 'a', duration, '', '')
                  for i, duration in enumerate(durations)]

    def batches(epoch, rank=0, ranks=1, seed=0):
        speech = data.Speech(utterances, [''], seed=seed)
        return data.training_batches(speech, 8, epoch, rank, ranks)

    return batches


def indices(batches):
    return [[i for _, i in batch] for batch in batches]


@pytest.mark.parametrize('epoch', [0, 1])
def test_every_utterance_comes_once_an_epoch(epoch, batches_of):
    batches = batches_of(epoch)
    assert len(batches) == 13
    assert sorted(sum(batches, [])) == [(epoch, i) for i in range(101)]


def test_batches_repeat_themselves(batches_of):
    assert batches_of(0) == batches_of(0)


def test_batches_are_others_in_another_epoch(batches_of):
    assert indices(batches_of(0)) != indices(batches_of(1))


def test_batches_are_others_with_another_seed(batches_of):
    assert batches_of(0, seed=1) != batches_of(0)


def test_batches_hold_clips_of_nearly_equal_length(batches_of, durations):
    ratios = []
    for batch in indices(batches_of(0)):
        seconds = [durations[i] for i in batch]
        ratios.append(max(seconds) / min(seconds))
    assert np.median(ratios) < 1.5


@pytest.mark.parametrize('epoch', [0, 1])
@pytest.mark.parametrize('ranks', [3, 8])
def test_processes_share_every_batch(ranks, epoch, batches_of):
    """They have as many batches as one, none of them empty, and together what one has.

    Where it is too few, as the five utterances of the last batch are for eight processes, some do
    it twice.
    """
    whole = batches_of(epoch)
    shares = [batches_of(epoch, rank, ranks) for rank in range(ranks)]
    for share in shares:
        assert len(share) == len(whole)
        assert all(share)
    for i, batch in enumerate(whole):
        together = sum([share[i] for share in shares], [])
        assert set(together) == set(batch)
        assert len(together) == max(len(batch), ranks)


@pytest.fixture
def mels_of(corpus):
    """A function -> the mels (T, 80) of an utterance of the training data in an epoch.

    first: how many utterances are left out before it.
    """
    utterances = read_utterances(corpus.train)
    alphabet = data.make_alphabet(utterances)

    def mels(epoch, index, first=0, seed=0, **flags):
        speech = data.Speech(utterances[first:], alphabet, 4, seed, **flags)
        return speech[epoch, index - first][0]

    return mels


@pytest.mark.parametrize('flag', ['spec_augment', 'speed_perturb'])
def test_augmentation_depends_on_seed_epoch_and_utterance(flag, mels_of):
    augmented = mels_of(3, 5, **{flag: True})
    in_a_subset = mels_of(3, 5, first=5, **{flag: True})
    other_epoch = mels_of(4, 5, **{flag: True})
    other_seed = mels_of(3, 5, seed=1, **{flag: True})
    assert torch.equal(augmented, in_a_subset)
    assert not torch.equal(augmented[:50], other_epoch[:50])
    assert not torch.equal(augmented[:50], other_seed[:50])


def test_speed_perturbation_reaches_ten_per_cent(mels_of):
    """Of the clip; the 20 frames of silence on each side stay as they are."""
    frames = len(mels_of(3, 5)) - 40
    lengths = [len(mels_of(epoch, 5, speed_perturb=True)) - 40 for epoch in range(40)]
    assert min(lengths) == pytest.approx(frames / 1.1, abs=3)
    assert max(lengths) == pytest.approx(frames / 0.9, abs=3)


@pytest.fixture
def joined(corpus):
    """A function -> each utterance of the training data with its item in an epoch."""
    utterances = read_utterances(corpus.train)
    alphabet = data.make_alphabet(utterances)

    def items(epoch, concat, frames_per_output=4):
        speech = data.Speech(utterances, alphabet, frames_per_output, concat=concat)
        for index, u in enumerate(utterances):
            mels, target, _ = speech[epoch, index]
            yield u, len(mels), data.decode(target.tolist(), alphabet)

    return items


def test_concat_puts_an_utterance_of_the_speaker_behind():
    utterances = make_utterances(random_texts(20, 1))
    for i, u in enumerate(utterances):
        u.speaker = 'abc'[i % 3]
    speech = data.Speech(utterances, data.make_alphabet(utterances), concat=1)
    drawn = []
    for i, u in enumerate(utterances):
        first, second = speech.parts(0, i)
        assert first is u
        assert second.speaker == u.speaker
        drawn.append(second.text)
    assert len(set(drawn)) > 5


def test_concat_says_both_texts(joined, corpus):
    texts = {u.text for u in read_utterances(corpus.train)}
    for u, _, text in joined(0, concat=1):
        assert text.startswith(u.text + ' ')
        assert text.removeprefix(u.text + ' ') in texts


def test_concat_is_a_chance_and_lengthens_clips(joined):
    plain = list(joined(0, concat=0))
    half = list(joined(0, concat=0.5))
    longer = [frames / alone > 1.2 for (_, frames, _), (_, alone, _) in zip(half, plain)]
    said_more = [text != u.text for u, _, text in half]
    assert longer == said_more
    assert np.mean(said_more) == pytest.approx(0.5, abs=0.2)
    assert half != list(joined(1, concat=0.5))


def test_concat_leaves_alone_what_ctc_could_not_align(joined):
    """At the fewest outputs with which every utterance fits, some pairs do not."""
    rate = min((frames - 1) // (data.outputs_needed(u.text) - 1)
               for u, frames, _ in joined(0, concat=0, frames_per_output=0))
    alone = [text == u.text for u, _, text in joined(0, concat=1, frames_per_output=rate)]
    assert any(alone)
    assert not all(alone)


def test_masks_are_zero_and_leave_the_rest(mels_of):
    plain = mels_of(3, 5)
    masked = mels_of(3, 5, spec_augment=True)
    kept = (masked == plain).float().mean()
    assert kept > 0.4
    assert kept < 1
    assert not masked[masked != plain].any()


# ---- data: corpora -------------------------------------------------------------------------------

@pytest.mark.parametrize('line,complaint', [
    ('{"audio_filepath": "0.wav"}', "manifest.jsonl:2: has '' for its text (or sentence, transcri"),
    ('{"audio_filepath": "no.wav", "text": "a"}', 'no.wav'),
    ('{"audio_filepath": "no.wav", "text": "a", "duration": 1}', 'is not a file'),
    ('{"audio_filepath": "0.wav", "text": " "}', "has ' ' for its text"),
    ('{"audio_filepath": "0.wav", "text": 5}', 'has 5 for its text'),
    ('{"audio_filepath": 3, "text": "a"}', 'has 3 for its audio_filepath'),
    ('{"audio_filepath": "0.wav", "text": "a", "duration": NaN}', 'its duration is nan'),
    ('{"audio_filepath": "0.wav", "text": "a", "duration": "long"}', 'manifest.jsonl:2'),
    ('{"audio_filepath": "0.wav", "text": "a", "duration": true}', 'has True for its duration'),
    ('{"audio_filepath": "manifest.jsonl", "text": "a"}', 'cannot be read as audio (Format'),
    ('[1]', 'manifest.jsonl:2: is not a JSON object'),
    ('{"audio_filepath": "0.wav", "text": "a", "duration": 5}', 'not 5.00 as its duration says'),
    ('{"audio_filepath": "0.wav", "text": "\\ud800"}', 'not UTF-8 text'),
    ('yes', 'manifest.jsonl:2: is not a line of JSON'),
    (json_row('0.wav', ' '.join('abcdefgh' * 4)), '0.wav'),
])
def test_bad_data_ends_in_one_line(line, complaint, tmp_path):
    manifest = write_corpus(tmp_path / 'c', ['ab'])
    with open(manifest, 'a') as file:
        print(line, file=file)
    run = tmp_path / 'run'
    message = exit_code(train.main, '--train_data', manifest, '--valid_data', manifest,
                        '--run_dir', run)
    fault, count = message.split('\n')
    assert complaint in fault
    assert count == 'utterances that cannot be used: 1; --skip_bad leaves them out'
    assert not (run / 'last.pt').exists()


def copy_audio(utterance, path, form):
    """Write an utterance's recording at a path, in one of libsndfile's forms."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wave, rate = soundfile.read(utterance.path, dtype='int16')
    soundfile.write(path, wave, rate, format=form, subtype='PCM_16')


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(f'{line}\n' for line in lines))


def write_json_lines(utterances, folder):
    """FLAC files and a manifest, as NeMo has it -> the manifest."""
    rows = []
    for u in utterances:
        name = f'{u.path.stem}.flac'
        copy_audio(u, folder / name, 'FLAC')
        rows.append(json_row(name, u.text, speaker=u.speaker))
    write_lines(folder / 'train.jsonl', rows)
    return folder / 'train.jsonl'


def write_common_voice(utterances, folder):
    """WAV files in clips/ and a table -> the table."""
    rows = ['client_id\tpath\tsentence\tup_votes']
    for u in utterances:
        name = f'{u.path.stem}.wav'
        copy_audio(u, folder / 'clips' / name, 'WAV')
        rows.append(f'{u.speaker}\t{name}\t{u.text.capitalize()}\t2')
    write_lines(folder / 'train.tsv', rows)
    return folder / 'train.tsv'


def write_librispeech(utterances, folder):
    """FLAC files and transcripts by speaker and chapter -> the folder."""
    for speaker in {u.speaker for u in utterances}:
        chapter = folder / speaker / '1'
        rows = []
        for u in utterances:
            if u.speaker == speaker:
                copy_audio(u, chapter / f'{u.path.stem}.flac', 'FLAC')
                rows.append(f'{u.path.stem} {u.text.upper()}')
        write_lines(chapter / f'{speaker}-1.trans.txt', rows)
    return folder


def write_sphinx(utterances, folder):
    """SPH files, transcripts with and without their marks, a test split too -> the folder."""
    names = []
    rows = []
    for i, u in enumerate(utterances):
        name = u.path.stem
        file = f'clstk/{u.speaker}/{name}'
        copy_audio(u, folder / 'wav' / f'{file}.sph', 'NIST')
        names.append(file)
        text = u.text.upper()
        rows.append(f'<s> {text} </s> ({name})' if i % 2 else f'{text} ({name})')
    write_lines(folder / 'etc' / 'an4_train.fileids', names)
    write_lines(folder / 'etc' / 'an4_train.transcription', rows)
    write_lines(folder / 'etc' / 'an4_test.transcription', [])
    return folder


def first_batches(path):
    """Two epochs of a corpus, as training gets them."""
    splits = data.read_splits(path, None, None, seed=1, frames_per_output=4)
    assert not splits.faults
    assert splits.valid
    speech = data.Speech(splits.train, data.make_alphabet(splits.train), 4, speed_perturb=True)
    batches = data.training_batches(speech, 8, 0) + data.training_batches(speech, 8, 1)
    return list(data.loader(speech, batches))


def assert_same_batches(utterances, folder):
    """Utterances give the same batches in every form of corpus."""
    expected = first_batches(write_json_lines(utterances, folder / 'jsonl'))
    for path in (write_common_voice(utterances, folder / 'cv'),
                 write_librispeech(utterances, folder / 'libri'),
                 write_sphinx(utterances, folder / 'an4')):
        batches = first_batches(path)
        assert len(batches) == len(expected)
        for batch, same in zip(batches, expected):
            for field in 'mels', 'lengths', 'targets', 'target_lengths':
                assert torch.equal(getattr(batch, field), getattr(same, field)), (path, field)


@pytest.fixture
def spoken(tmp_path):
    """24 utterances of the synthesiser, by 12 speakers."""
    (tmp_path / 'made').mkdir()
    utterances = []
    for i in range(24):
        text = ' '.join(random.Random(i).sample(sorted(data.WORDS), 2))
        speaker = f's{i % 12}'
        path = tmp_path / 'made' / f'{speaker}-1-{i:04}.wav'
        soundfile.write(path, data.synthesise(text, i % 12)[0], 16000)
        utterances.append(data.Utterance(path, text, 1, speaker, ''))
    return utterances


def test_every_form_of_corpus_gives_the_same_batches(spoken, tmp_path):
    assert_same_batches(spoken, tmp_path)


def test_a_quoted_table_holds_the_same_utterances(spoken, tmp_path):
    for u in spoken:
        copy_audio(u, tmp_path / 'csv' / f'{u.path.stem}.flac', 'FLAC')
    rows = [f'{u.path.stem}.flac,"{u.text}"' for u in spoken]
    write_lines(tmp_path / 'csv' / 'table.csv', ['file,transcript', *rows])
    table = read_utterances(tmp_path / 'csv' / 'table.csv')
    sphinx = read_utterances(write_sphinx(spoken, tmp_path / 'an4'))
    assert [u.path.stem for u in table] == [u.path.stem for u in sphinx]
    assert [u.text for u in table] == [u.text for u in sphinx]


def hundred_utterances(speaker):
    """speaker: a function of the number of an utterance."""
    return [data.Utterance(Path(f'{i}.wav'), 'a', 1, speaker(i), f'm:{i}') for i in range(100)]


def test_whole_speakers_are_held_out():
    utterances = hundred_utterances(lambda i: f's{i % 20}')
    held_out = data.hold_out(utterances)
    speakers = {u.speaker for u in held_out.valid}
    assert len(held_out.valid) == 10
    assert len(held_out.train) == 90
    assert not speakers & {u.speaker for u in held_out.train}
    for speaker in speakers:
        assert speaker in held_out.choice
    assert data.hold_out(utterances).valid == held_out.valid


def test_utterances_of_unknown_speakers_are_held_out_at_random():
    held_out = data.hold_out(hundred_utterances(lambda i: ''))
    assert len(held_out.train) == 90
    assert len(held_out.valid) == 10
    assert 'at random' in held_out.choice


# ---- data: recordings and transcripts as people have them ----------------------------------------

def write_noise(path, seconds=0.5, rate=16000, **form):
    """A recording of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = 0.1 * np.random.default_rng(0).standard_normal(round(seconds * rate))
    soundfile.write(path, noise, rate, **form)
    return path


def reading_error(path):
    """What read_wave says of a file, which must be one line of no great length."""
    with pytest.raises(data.DataError) as error:
        data.read_wave(path)
    message = str(error.value)
    assert '\n' not in message
    assert len(message) < 600
    assert str(path) in message
    return message


def test_a_flac_of_a_stream_is_named_and_can_be_skipped(tmp_path, capsys):
    """Low nibble of byte 21 and bytes 22 to 25 are zero: the number of samples is not known."""
    content = bytearray(write_noise(tmp_path / 'whole.flac').read_bytes())
    content[21] &= 0xf0
    content[22:26] = bytes(4)
    (tmp_path / 'stream.flac').write_bytes(content)
    assert 'does not say how long it is' in reading_error(tmp_path / 'stream.flac')
    rows = [json_row(f'{name}.flac', 'a') for name in ('stream', 'whole')]
    write_lines(tmp_path / 'm.jsonl', rows)
    utterances, faults = data.read_corpus(tmp_path / 'm.jsonl')
    assert [u.path.name for u in utterances] == ['whole.flac']
    assert list(faults) == [f'{tmp_path / "m.jsonl"}:1']


@pytest.mark.parametrize('name,form', [
    ('a.wav', {}), ('a.aiff', {}), ('a.au', {}), ('a.sph', {'format': 'NIST'}), ('a.mp3', {}),
    ('a.flac', {}),
])
def test_a_recording_cut_off_in_the_middle_is_refused(name, form, tmp_path):
    whole = write_noise(tmp_path / name, **form)
    assert len(data.read_wave(whole)) == 8000
    content = whole.read_bytes()
    (tmp_path / f'cut_{name}').write_bytes(content[:len(content) // 2])
    assert re.search('is cut off|cannot be read', reading_error(tmp_path / f'cut_{name}'))


def test_a_wav_of_a_header_alone_is_named(tmp_path):
    """What a failed conversion leaves (NeMo's issue 5468)."""
    soundfile.write(tmp_path / 'a.wav', np.zeros(0), 16000)
    assert 'holds no samples' in reading_error(tmp_path / 'a.wav')


def test_channels_are_averaged(tmp_path):
    """Where NeMo's training ended at two channels, and did not name the file (issue 2783)."""
    soundfile.write(tmp_path / 'a.wav', np.stack([np.full(800, 0.5), np.zeros(800)], 1), 16000)
    assert data.read_wave(tmp_path / 'a.wav').numpy() == pytest.approx(0.25, abs=1e-3)


def test_a_wav_that_a_program_streamed_is_read(tmp_path):
    """Its sizes are 2^32 - 1, for they were not known when it began."""
    content = bytearray(write_noise(tmp_path / 'a.wav').read_bytes())
    for name in b'RIFF', b'data':
        size = content.index(name) + 4
        content[size:size + 4] = b'\xff' * 4
    (tmp_path / 'b.wav').write_bytes(content)
    assert torch.equal(data.read_wave(tmp_path / 'a.wav'), data.read_wave(tmp_path / 'b.wav'))


@pytest.mark.parametrize('rate', [3, 3999, 384_001, 50_000_017])
def test_rates_of_the_header_are_not_believed(rate, tmp_path):
    """Resampling 52 kB at 3 Hz to 16 kHz would take 6 GB."""
    content = bytearray(write_noise(tmp_path / 'a.wav').read_bytes())
    content[24:28] = rate.to_bytes(4, 'little')
    (tmp_path / 'a.wav').write_bytes(content)
    assert f'{rate} samples a second' in reading_error(tmp_path / 'a.wav')


def test_a_day_of_silence_is_refused_by_its_header(tmp_path):
    """72 million samples in the STREAMINFO of a FLAC of a second."""
    content = bytearray(write_noise(tmp_path / 'a.flac', 1).read_bytes())
    content[22:26] = (20 * 3600 * 16000).to_bytes(4, 'big')
    (tmp_path / 'a.flac').write_bytes(content)
    assert 'lasts 20.0 hours' in reading_error(tmp_path / 'a.flac')


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    assert 'is not a regular file' in reading_error(tmp_path / 'pipe')
    assert 'is not a regular file' in reading_error('/dev/zero')
    assert 'is not a regular file' in exit_code(model.main, tmp_path / 'pipe')


@pytest.mark.parametrize('name', ['-', '/dev/stdin'])
def test_a_recording_is_read_from_standard_input(name, by_heart, monkeypatch, capsys):
    with open(by_heart.folder / 'clip.wav', encoding='latin-1') as file:
        monkeypatch.setattr(sys, 'stdin', file)
        assert exit_code(model.main, by_heart.checkpoint, name) is False
    assert capsys.readouterr().out.strip() == by_heart.text
    monkeypatch.setattr(sys, 'stdin', None)
    assert exit_code(model.main, by_heart.checkpoint, name) is True
    assert 'standard input is closed' in capsys.readouterr().err


@pytest.mark.parametrize('name,speaker', [('84-121123-0001', '84'), ('rec10', '')])
def test_speakers_of_librispeech_files_in_one_folder(name, speaker, tmp_path):
    """By their names' first part, where they have several."""
    write_noise(tmp_path / f'{name}.wav')
    write_lines(tmp_path / 'all.trans.txt', [f'{name} GO'])
    utterance, = read_utterances(tmp_path)
    assert utterance.speaker == speaker


def test_links_in_a_librispeech_tree_are_followed_and_loops_are_not(tmp_path):
    for speaker in '1', '2':
        chapter = tmp_path / f'disk{speaker}' / speaker / '5'
        write_noise(chapter / f'{speaker}-5-0.WAV')
        write_lines(chapter / f'{speaker}-5.trans.txt', [f'{speaker}-5-0 GO'])
        write_lines(chapter / f'._{speaker}-5.trans.txt', ['\0\5\x16'])  # macOS
    tree = tmp_path / 'tree'
    tree.mkdir()
    for speaker in '1', '2':
        (tree / speaker).symlink_to(tmp_path / f'disk{speaker}' / speaker)
    (tree / '1' / 'loop').symlink_to(tree)
    utterances = read_utterances(tree)
    assert sorted(u.speaker for u in utterances) == ['1', '2']


def test_the_same_file_by_another_path_is_known(tmp_path, capsys):
    manifest = write_corpus(tmp_path / 'c', ['ab', 'ba'])
    (tmp_path / 'link').symlink_to(tmp_path / 'c')
    args = train.parse_flags(['--train_data', str(manifest), '--valid_data',
                              str(tmp_path / 'link' / 'manifest.jsonl')])
    train.load_splits(args, 4)
    assert '2 files of validation or test are in training too' in capsys.readouterr().out


def test_a_file_listed_twice_is_held_out_whole(tmp_path):
    for i in range(10):
        write_noise(tmp_path / f'{i}.wav')
    rows = [json_row(f'{i}.wav', text) for i in range(10) for text in ('a', 'b')]
    write_lines(tmp_path / 'm.jsonl', rows)
    held = data.hold_out(read_utterances(tmp_path / 'm.jsonl'))
    assert len(held.valid) == 2
    assert not {u.path for u in held.train} & {u.path for u in held.valid}


def test_of_a_single_recording_segments_are_held_out(tmp_path):
    write_noise(tmp_path / 'u.wav', seconds=10)
    rows = [json_row('u.wav', 'a', offset=i, duration=1) for i in range(10)]
    write_lines(tmp_path / 'm.jsonl', rows)
    held = data.hold_out(read_utterances(tmp_path / 'm.jsonl'))
    assert len(held.valid) == 1
    assert len(held.train) == 9


@pytest.mark.parametrize('name', ['u.wav', 'u.flac', 'u.mp3'])
def test_segments_are_cut_out_of_their_recording(name, tmp_path):
    """NeMo's offset and duration: 0.6 to 1.2 s of three tones."""
    t = np.arange(9600) / 16000
    tones_in_turn = [0.3 * np.sin(2 * np.pi * hertz * t) for hertz in (300, 600, 1200)]
    soundfile.write(tmp_path / name, np.concatenate(tones_in_turn), 16000)
    row = json_row(name, 'left', offset=0.6, duration=0.6)
    write_lines(tmp_path / 'm.jsonl', [row])
    utterance, = read_utterances(tmp_path / 'm.jsonl')
    wave, rate = data.load_utterance(utterance)
    assert (len(wave), rate) == (9600, 16000)
    spectrum = np.abs(np.fft.rfft(wave.numpy()))
    assert spectrum.argmax() * 16000 / 9600 == pytest.approx(600, abs=5)
    assert data.check_recordings([utterance], {}) == {}
    assert utterance.duration == 0.6


def test_a_segment_beyond_its_recording_is_a_fault(tmp_path):
    write_noise(tmp_path / 'u.wav')
    rows = [json_row('u.wav', 'a', offset=offset, duration=0.3) for offset in (0.35, 2, -1)]
    write_lines(tmp_path / 'm.jsonl', rows)
    utterances, faults = data.read_corpus(tmp_path / 'm.jsonl')
    assert 'its offset is -1.0 s' in faults[f'{tmp_path / "m.jsonl"}:3']
    write_lines(tmp_path / 'n.jsonl', [json_row('u.wav', 'a', offset=2)])
    _, unread = data.read_corpus(tmp_path / 'n.jsonl')
    assert 'its offset is 2.0 s, and it ends at 0.5 s' in unread[f'{tmp_path / "n.jsonl"}:1']
    found = list(data.check_recordings(utterances, {}).values())
    assert 'lasts 0.15 s, not 0.30' in found[0]
    assert 'holds no samples from 2.00 s on' in found[1]


@pytest.mark.parametrize('name,lines,fault', [
    ('t.tsv', [b'path\tsentence', b'a.wav\tone', b'a.wav'], 'fewer columns than the header'),
    ('t.csv', [b'path,sentence', b'a.wav,one', b'a.wav,one,two'], 'more columns than the header'),
    ('t.csv', [b'path,sentence', b'a.wav,one', b'a.wav,"tw"o'], 'is not a row of a table'),
    ('t.csv', [b'path,sentence', b'a.wav,one', b'a.wav,"two\na.wav,three"'], 'goes on to line 4'),
    ('t.tsv', [b'path\tsentence', b'a.wav\tone', b'a.wav\tzw\xf6lf'], 'not UTF-8 text'),
    ('t.jsonl', [b'', b'{"audio": "a.wav", "text": "one"}', b'{"audio": "a.wav", "text": "\xf6"}'],
     'not UTF-8 text'),
    ('t.tsv', [b'path\tsentence', b'a.wav\tone', b'a' * 300 + b'.wav\tone'], 't.tsv:3: '),
    ('t.csv', [b'path,sentence', b'a.wav,one', b'a' * 140_000 + b',one'], 't.csv:3: '),
])
def test_a_bad_row_is_named_and_the_others_are_read(name, lines, fault, tmp_path):
    write_noise(tmp_path / 'a.wav')
    (tmp_path / name).write_bytes(b'\n'.join([*lines, lines[1], b'']))
    utterances, faults = data.read_corpus(tmp_path / name)
    assert [u.text for u in utterances] == ['one', 'one']
    message, = faults.values()
    assert f'{name}:3: ' in message
    assert fault in message
    assert len(message) < 1000


def test_all_columns_that_a_table_lacks_are_named_at_once(tmp_path):
    write_lines(tmp_path / 't.csv', ['recording,what was said', 'a.wav,one'])
    with pytest.raises(data.DataError) as refused:
        data.read_corpus(tmp_path / 't.csv')
    message = str(refused.value)
    assert 't.csv:1: no column is named audio_filepath or path' in message
    assert 'none text or sentence' in message
    assert message.endswith('rename those it has: recording, what was said')


def test_a_tables_rows_are_counted_with_its_blank_lines(tmp_path):
    write_lines(tmp_path / 't.tsv', ['path\tsentence', '', '', 'a.wav\tone'])
    _, faults = data.read_corpus(tmp_path / 't.tsv')
    assert list(faults) == [f'{tmp_path / "t.tsv"}:4']


def test_sphinx_fillers_and_alternates_are_no_words(tmp_path, capsys):
    write_noise(tmp_path / 'wav' / 'speaker_1' / 'file_1.wav')
    write_noise(tmp_path / 'wav' / 'speaker_2' / 'file_1.wav')
    write_lines(tmp_path / 'etc' / 'x_train.fileids', ['speaker_1/file_1', 'speaker_2/file_1'])
    write_lines(tmp_path / 'etc' / 'x_train.transcription',
                ['<s> <sil> HELLO(2) ++NOISE++ WORLD </s> (speaker_2/file_1)',
                 '<s> GO [COUGH] <sil> </s> (speaker_1/file_1)'])
    utterances = read_utterances(tmp_path)
    assert {u.speaker: u.text for u in utterances} == {'speaker_2': 'hello world',
                                                       'speaker_1': 'go'}
    assert 'left out of the transcripts: 2 <sil>, 1 ++NOISE++, 1 [COUGH]' in capsys.readouterr().out


def test_a_sphinx_line_without_a_name_is_one_fault(tmp_path):
    write_noise(tmp_path / 'wav' / 'a.wav')
    write_lines(tmp_path / 'etc' / 'x_train.fileids', ['a', 'b'])
    blanks = ' ' * 100_000
    write_lines(tmp_path / 'etc' / 'x_train.transcription', ['GO (a)', f'STOP{blanks}X'])
    start = time.perf_counter()
    utterances, faults = data.read_corpus(tmp_path)
    assert time.perf_counter() - start < 1
    assert [u.text for u in utterances] == ['go']
    fault, = faults.values()
    assert 'has no name of a file' in fault


def test_turkish_capitals_and_suffixes_that_are_missing(tmp_path):
    write_noise(tmp_path / 'a.FLAC')
    write_lines(tmp_path / 't.tsv', ['path\tsentence', 'a\tİyi'])
    utterance, = read_utterances(tmp_path / 't.tsv')
    assert utterance.text == 'iyi'
    assert utterance.path.name == 'a.FLAC'


@pytest.mark.parametrize('module,flags', [
    (data, ['--valid_data=m.jsonl']),
    (train, ['--valid_data=none', '--epochs=1', *SMALL, '--run_dir=run', '--train_data']),
])
def test_text_that_a_terminal_cannot_show_ends_nothing(module, flags, tmp_path, monkeypatch):
    """Arabic transcripts where the encoding has Western letters alone."""
    monkeypatch.chdir(tmp_path)
    write_noise(tmp_path / 'a.wav')
    write_lines(tmp_path / 'm.jsonl', [json_row('a.wav', 'سلام')])
    terminal = io.TextIOWrapper(io.BytesIO(), encoding='cp1252')
    monkeypatch.setattr(sys, 'stdout', terminal)
    module.main([*flags, 'm.jsonl'])
    assert rb'\u0633' in terminal.buffer.getvalue()


@pytest.mark.parametrize('error,words', [
    (KeyboardInterrupt(), ': stopped'),
    (OSError(28, 'No space left on device', 'out'), "No space left on device: 'out'; correct that"),
])
@pytest.mark.parametrize('module,work', [(model, 'transcribe_clips'), (data, 'say_or_inspect'),
                                         (monitor, 'report')])
def test_ctrl_c_and_a_full_disk_end_every_program_in_a_line(module, work, error, words,
                                                            monkeypatch):
    def fail(args):
        raise error

    monkeypatch.setattr(module, work, fail)
    message = exit_code(module.main, 'a')
    assert message.startswith(f'{module.__name__}.py: ')
    assert words in message
    assert '\n' not in message


def test_a_status_line_is_cleared_before_the_last_words(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, 'stderr', terminal)
    with pytest.raises(data.DataError), monitor.one_line_ends('train.py'):
        data.show_status('update 12/875')
        raise data.DataError('x.flac is cut off')
    assert terminal.getvalue().endswith('update 12/875\x1b[K\r\x1b[K')


def test_a_closed_pipe_ends_a_program_without_a_traceback():
    command = f'{shlex.join([sys.executable, monitor.__file__])} --lines 250 12 28 | true'
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert 'Traceback' not in done.stderr
    assert 'Exception ignored' not in done.stderr


def test_long_training_utterances_are_left_out_by_name(tmp_path, capsys):
    for i, seconds in enumerate([1, 3, 1]):
        write_noise(tmp_path / f'{i}.wav', seconds)
    write_lines(tmp_path / 'm.jsonl', [json_row(f'{i}.wav', 'ab') for i in range(3)])
    path = str(tmp_path / 'm.jsonl')
    args = train.parse_flags(['--train_data', path, '--valid_data', path, '--max_seconds=2'])
    splits = train.load_splits(args, 2)
    assert len(splits.train) == 2
    assert len(splits.valid) == 3
    assert 'longer than 2 s and are left out (--max_seconds): 1.wav' in capsys.readouterr().out
    args = train.parse_flags(['--train_data', path, '--valid_data', path, '--max_seconds=0'])
    assert len(train.load_splits(args, 2).train) == 3


def test_long_utterances_are_scored_in_small_batches():
    seconds = [1] * 20 + [300] * 3 + [3000]
    utterances = [data.Utterance(Path(f'{i}.wav'), 'a', s, '', '') for i, s in enumerate(seconds)]
    batches = data.evaluation_batches(utterances, 16)
    assert [len(batch) for batch in batches] == [16, 4, 2, 1, 1]


@pytest.mark.parametrize('program,flags,words', [
    (train, ['--hidden=1000000'], '1000000 is not between 1 and 4096'),
    (train, ['--workers=9007199254740992'], 'is not between 0 and 256'),
    (model, ['best.pt', '--beam=-1'], '--beam: -1 is not between 0 and 1000'),
    (model, ['best.pt', '--lm_weight=nan'], '--lm_weight: nan is not between 0 and 100'),
])
def test_flags_out_of_their_range(program, flags, words, capsys):
    assert exit_code(program.main, *flags) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize('device', ['meta', 'mps', 'toaster'])
def test_a_device_that_cannot_do_ctc_is_a_line(device):
    message = exit_code(train.main, '--device', device)
    assert message.startswith(f'train.py: flags: --device {device}: there is no such device')
    assert '\n' not in message


def test_a_checkpoint_of_another_size_than_it_says_takes_no_memory(by_heart, tmp_path,
                                                                      monkeypatch):
    places = []

    class Placed(model.Recogniser):
        def __init__(self, config):
            super().__init__(config)
            places.append(self.head.weight.device.type)

    monkeypatch.setattr(model, 'Recogniser', Placed)
    checkpoint = torch.load(by_heart.checkpoint, weights_only=True)
    checkpoint['config']['hidden'] = 200_000
    torch.save(checkpoint, tmp_path / 'big.pt')
    assert 'is a damaged checkpoint' in exit_code(model.main, tmp_path / 'big.pt')
    assert places == ['meta']


def test_a_checkpoint_of_another_format_is_a_line(by_heart, tmp_path):
    checkpoint = torch.load(by_heart.checkpoint, weights_only=True)
    torch.save(checkpoint | {'format': 2}, tmp_path / 'old.pt')
    message = exit_code(model.main, tmp_path / 'old.pt')
    assert f'its format is number 2, this code reads {model.FORMAT}' in message


@pytest.mark.parametrize('change', [{'alphabet': [1, 2]}, {'run': {}}, {'language_model': '[]'},
                                    {'language_model': '{"a": 1}'}])
def test_a_damaged_checkpoint_is_a_line(change, by_heart, tmp_path):
    checkpoint = torch.load(by_heart.checkpoint, weights_only=True)
    torch.save(checkpoint | change, tmp_path / 'x.pt')
    message = exit_code(model.main, tmp_path / 'x.pt', by_heart.folder / 'clip.wav')
    assert 'is a damaged checkpoint' in message
    assert '\n' not in message


# ---- data: fuzz ----------------------------------------------------------------------------------

def mutated(content, rng):
    """Some bytes changed, cut out, doubled, or the end cut off."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 6)):
        place = int(rng.integers(len(content)))
        size = int(rng.integers(1, 40))
        kind = rng.integers(4)
        if kind == 0:
            content[place] = int(rng.integers(256))
        elif kind == 1:
            del content[place:place + size]
        elif kind == 2:
            content[place:place] = content[place:place + size]
        else:
            content[place:place + size] = rng.integers(256, size=size, dtype=np.uint8).tobytes()
        content = content or bytearray(b'x')
    return bytes(content)


FUZZED = 2000 if 'SLOW' in os.environ else 70


def test_fuzzed_recordings_give_a_transcript_or_a_line(by_heart, tmp_path):
    """No other exception, none over 5 s."""
    rng = np.random.default_rng(0)
    checkpoint = model.load_checkpoint(by_heart.checkpoint)
    originals = [write_noise(tmp_path / f'a.{suffix}', 0.3).read_bytes()
                 for suffix in ('wav', 'flac', 'ogg', 'mp3', 'aiff', 'au', 'caf')]
    path = tmp_path / 'fuzzed.wav'
    read = 0
    memory = train.peak_memory()
    for i in range(FUZZED):
        path.write_bytes(mutated(originals[i % len(originals)], rng))
        start = time.perf_counter()
        with contextlib.suppress(data.DataError):
            wave, rate = data.read_audio(path)
            list(data.recording_problems(wave, rate))
            model.transcribe(checkpoint, data.read_wave(path))
            read += 1
        assert time.perf_counter() - start < 5
    assert read > FUZZED / 4
    assert train.peak_memory() < memory + 1000  # MB


def test_fuzzed_manifests_are_read_or_named_row_by_row(tmp_path):
    """Every line is an utterance or a fault, unless the corpus is refused as a whole."""
    rng = np.random.default_rng(0)
    for i in range(3):
        write_noise(tmp_path / f'{i}.wav', 0.1)
    forms = {
        'm.jsonl': '\n'.join(json_row(f'{i}.wav', 'go on', duration=0.1) for i in range(3)),
        'm.tsv': 'path\tsentence\n0.wav\tgo\n1.wav\tstop\n2.wav\tgo on',
        'm.csv': 'path,sentence\n0.wav,go\n1.wav,"stop, now"\n2.wav,go on',
    }
    for i in range(FUZZED):
        name = list(forms)[i % 3]
        content = mutated(forms[name].encode(), rng)
        (tmp_path / name).write_bytes(content)
        start = time.perf_counter()
        with contextlib.suppress(data.DataError):
            utterances, faults = data.read_corpus(tmp_path / name)
            data.check_recordings(utterances, {})
            lines = [line for line in content.split(b'\n') if line.strip()]
            if name != 'm.csv':  # where a row may have lines
                assert len(utterances) + len(faults) >= len(lines) - (name == 'm.tsv')
            for fault in faults.values():
                assert '\n' not in fault
        assert time.perf_counter() - start < 5


# ---- data: inspection ----------------------------------------------------------------------------

UNUSABLE = ['short.wav', 'empty.mp3', 'cut.flac', 'gone.wav']
PROBLEMS = {
    'clipped.wav': 'clipped, the peaks are flat',
    'silent.wav': 'near-silent, nowhere above',
    'narrow.wav': 'above 4000 Hz is missing',
    'gap.wav': 'digital silence for more than a fifth of it',
    'click.wav': 'a click or a bang far louder than the voice',
}


@pytest.fixture
def broken(tmp_path):
    """Six good utterances of tones, and one of each problem -> the manifest."""
    folder = tmp_path / 'c'
    manifest = write_corpus(folder, random_texts(6, 3))
    loud = np.clip(8 * tones('abc', np.random.default_rng(0)), -1, 1)
    soundfile.write(folder / 'clipped.wav', loud, 16000)
    soundfile.write(folder / 'silent.wav', loud * 1e-4, 16000)
    soundfile.write(folder / 'narrow.wav', loud[::2] * 0.3, 8000)
    gap = np.concatenate([loud * 0.3, np.zeros(8000)])
    soundfile.write(folder / 'gap.wav', gap, 16000)
    click = loud * 0.05
    click[3000] = 0.9
    soundfile.write(folder / 'click.wav', click, 16000)
    soundfile.write(folder / 'short.wav', loud[:100], 16000)
    (folder / 'empty.mp3').write_bytes(b'')
    soundfile.write(folder / 'cut.flac', loud, 16000)
    whole = (folder / 'cut.flac').read_bytes()
    (folder / 'cut.flac').write_bytes(whole[:-3000])
    with open(manifest, 'a') as file:
        for name in [*PROBLEMS, *UNUSABLE]:
            print(json_row(name, 'abc abc'), file=file)
    return manifest


def test_inspection_names_problems(broken, corpus, capsys):
    message = exit_code(data.main, broken, '--valid_data', corpus.valid)
    out = capsys.readouterr().out
    for name, problem in PROBLEMS.items():
        [line] = [line for line in out.splitlines() if problem in line]
        assert name in line
    for name in UNUSABLE:
        assert name in message
    assert '4 faults, 11 utterances' in message
    assert 'words are not in training' in out


def test_inspection_of_a_corpus_without_problems(corpus, capsys):
    data.main([corpus.train, '--valid_data', corpus.valid])
    out = capsys.readouterr().out
    lines = re.search(r'uniform output ([\d.]+), constant output ([\d.]+)', out)
    uniform, constant = map(float, lines.groups())
    assert uniform > constant
    assert constant > 1


def test_inspection_of_a_recording(tmp_path, capsys):
    narrow = tones('abc', np.random.default_rng(0))[::2]
    soundfile.write(tmp_path / 'e.wav', narrow, 8000)
    data.main([str(tmp_path / 'e.wav')])
    assert 'above 4000 Hz is missing' in capsys.readouterr().out


# ---- data: the built-in corpus -------------------------------------------------------------------

def test_the_synthesiser_repeats_itself():
    wave, _ = data.synthesise('seven two nine', 3)
    again, _ = data.synthesise('seven two nine', 3)
    other, _ = data.synthesise('seven two nine', 4)
    assert np.array_equal(wave, again)
    assert len(wave) != len(other)
    assert abs(wave).max() > 0.1
    assert abs(wave).max() <= 0.9


def test_the_synthesiser_knows_when_it_says_its_words():
    wave, spans = data.synthesise('seven two nine', 3)
    assert [word for word, _, _ in spans] == ['seven', 'two', 'nine']
    edges = sum([[start, end] for _, start, end in spans], [])
    assert edges == sorted(edges)
    assert edges[0] > 0.1
    assert edges[-1] < len(wave) / 16000


def test_the_synthesiser_refuses_other_words():
    with pytest.raises(data.DataError, match='synthesiser says'):
        data.synthesise('seven elephants')


@pytest.mark.parametrize('word,name', [('three', 'iy'), ('start', 'aa')])
def test_vowels_have_the_formants_of_the_table(word, name):
    """The strongest bands of a long vowel, by an FFT: Peterson & Barney's, times the tract's."""
    tract = data.draw_voice(1).tract
    wave, [(_, start, end)] = data.synthesise(word, 1)
    middle = int(16000 * (end - 0.06 if name == 'iy' else (start + end) / 2))
    piece = wave[middle - 400:middle + 400] * np.hanning(800)
    power = np.convolve(np.abs(np.fft.rfft(piece, 4096)) ** 2, np.hanning(40), 'same')
    hertz = np.arange(2049) * 16000 / 4096
    phone = data.PHONES[name]
    for formant, low, high in (phone.f1, 150, 900), (phone.f2, 1050, 3000):
        band = (hertz > low) & (hertz < high)
        strongest = hertz[band][power[band].argmax()]
        assert strongest == pytest.approx(formant * tract, rel=0.25)


def test_a_sentence_is_said_into_a_file(tmp_path, capsys):
    data.main(['--say', 'Light  go', '--speaker=7', str(tmp_path / 'said.wav')])
    words = [line.split()[2] for line in capsys.readouterr().out.splitlines()]
    said, _ = data.synthesise('light go', 7)
    assert words == ['light', 'go']
    assert data.read_wave(tmp_path / 'said.wav').numpy() == pytest.approx(said, abs=1e-4)


def warping_distance(a, b):
    """Length-normalised dynamic time warping distance of two mel sequences (T, 80)."""
    cost = torch.cdist(a, b).numpy()
    total = np.full((len(a) + 1, len(b) + 1), np.inf)
    total[0, 0] = 0
    for i in range(len(a)):
        for j in range(len(b)):
            before = min(total[i, j], total[i, j + 1], total[i + 1, j])
            total[i + 1, j + 1] = cost[i, j] + before
    return total[-1, -1] / (len(a) + len(b))


def spoken_words(speakers, n):
    """n random words by each speaker, cut out by their known times -> [(word, mels (T, 80))]."""
    rng = np.random.default_rng(speakers[0])
    cut = []
    for speaker in speakers:
        text = ' '.join(rng.permutation(list(data.WORDS))[:n])
        wave, spans = data.synthesise(text, speaker)
        mels, first = data.features(torch.tensor(wave))
        for word, start, end in spans:
            frames = slice(int(100 * start) - first, int(100 * end) - first)
            cut.append((word, mels[frames][::2]))
    return cut


@slow
def test_a_template_matcher_fails_on_the_built_in_corpus():
    """One speaker's words as templates for those of twelve of validation's.

    All are cut out by their known times, which helps the matcher: the network has to find them.
    """
    templates = spoken_words([0], 20)
    spoken = spoken_words(range(300, 312), 8)
    wrong = 0
    for word, mels in spoken:
        distances = [warping_distance(template, mels) for _, template in templates]
        nearest, _ = templates[int(np.argmin(distances))]
        wrong += nearest != word
    print(f'template matcher: {wrong} of {len(spoken)} words wrong')
    assert wrong / len(spoken) >= 0.2


# ---- monitor: error rates ------------------------------------------------------------------------

@functools.cache
def edit_distance(a, b):
    """By recursion over suffixes."""
    if not a or not b:
        return len(a) + len(b)
    return min(edit_distance(a[1:], b[1:]) + (a[0] != b[0]),
               edit_distance(a[1:], b) + 1,
               edit_distance(a, b[1:]) + 1)


def test_edits_against_a_second_implementation():
    """The counts must add up: reference words are hit, substituted or deleted."""
    rng = random.Random(0)
    for _ in range(300):
        said = tuple(rng.choices('xyz', k=rng.randint(0, 7)))
        heard = tuple(rng.choices('xyz', k=rng.randint(0, 7)))
        edits = monitor.edit_counts(said, heard)
        assert edits.cost == edit_distance(said, heard)
        assert edits.substitutions + edits.insertions + edits.deletions == edits.cost
        assert len(said) - edits.deletions + edits.insertions == len(heard)
        assert edits.substitutions <= min(len(said), len(heard))


def test_error_rates_by_hand():
    rates = monitor.error_rates(['a b c', 'd'], ['a x c c', ''])
    assert rates['wer'] == 75
    assert rates['cer'] == pytest.approx(100 * 4 / 6)  # x for b, ' c' too many, no d
    assert rates['substitutions'] == 1
    assert rates['insertions'] == 1
    assert rates['deletions'] == 1
    assert rates['words'] == 4
    assert rates['utterances'] == 2


@pytest.mark.parametrize('said,heard', [('a b ' * 20_000, 'a'), ('a', 'a b ' * 20_000)])
def test_errors_of_texts_of_any_length_are_counted(said, heard):
    edits = monitor.edit_counts(said, heard)
    assert edits.substitutions == 0
    assert edits.insertions + edits.deletions == edits.cost == 79_999


@slow
def test_error_rates_of_a_long_row_take_seconds():
    """14,000 characters, of which every tenth is heard as another."""
    said = 'the quick brown fox jumps over the lazy dog ' * 318
    heard = ''.join('x' if i % 10 == 0 else character for i, character in enumerate(said))
    start = time.perf_counter()
    edits = monitor.edit_counts(said, heard)
    assert time.perf_counter() - start < 5
    assert edits.cost == sum(a != b for a, b in zip(said, heard))


@slow
def test_plateau_lines_of_long_utterances_take_seconds():
    """500 of 12.7 s, 50 outputs a second; the constant line of 40 as when all shares are tried."""
    letters = torch.Generator().manual_seed(0)
    targets = [torch.randint(1, 28, (150 + i % 40,), generator=letters).tolist()
               for i in range(500)]
    lengths = torch.full((500,), 635)
    start = time.perf_counter()
    monitor.plateau_lines(targets, lengths, 28)
    print(f'{time.perf_counter() - start:.1f} s')
    assert time.perf_counter() - start < 3
    targets, lengths = targets[:40], lengths[:40]
    target_lengths = torch.tensor([len(target) for target in targets])
    line = torch.tensor(sum(targets, []))
    letter_shares = torch.bincount(line, minlength=28) / len(line)
    losses = []
    for blank in torch.arange(50) / 50:
        log_probs = (letter_shares * (1 - blank)).clamp_min(1e-30).log()
        log_probs[0] = blank.clamp_min(1e-30).log()
        losses.append(F.ctc_loss(log_probs.expand(635, 40, 28), line, lengths, target_lengths))
    _, constant = monitor.plateau_lines(targets, lengths, 28)
    assert constant == pytest.approx(min(losses).item(), rel=0.01)


# ---- monitor: plateau lines ----------------------------------------------------------------------

@pytest.mark.parametrize('target', TARGETS)
def test_uniform_line_in_closed_form(target):
    """All paths are equally likely, so that their number is all it takes."""
    paths = len(paths_of(target, outputs=5))
    repeats = data.outputs_needed(target) - len(target)
    assert paths == math.comb(5 + len(target) - repeats, 2 * len(target))
    uniform, _ = monitor.plateau_lines([target], torch.tensor([5]), 3)
    expected = (5 * math.log(3) - math.log(paths)) / len(target)
    assert uniform == pytest.approx(expected, abs=1e-5)


def test_constant_line_is_the_best_constant_output():
    """Against gradient descent on one distribution for all outputs.

    It is free to leave the letters' frequencies.
    """
    rng = random.Random(0)
    targets = [rng.choices([1, 2, 3], [3, 2, 1], k=5) for _ in range(20)]
    lengths = torch.tensor([rng.randint(10, 30) for _ in targets])
    uniform, constant = monitor.plateau_lines(targets, lengths, 4)
    logits = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(300):
        log_probs = logits.log_softmax(0).expand(20, int(lengths.max()), 4)
        loss = ctc_loss(log_probs, lengths, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() <= constant + 1e-4
    assert constant + 1e-4 < uniform
    assert constant == pytest.approx(loss.item(), rel=0.02)


def test_constant_line_where_outputs_are_many():
    """The best of all shares of the blank on a fine grid: one symbol in 200 outputs is rare."""
    target, outputs = [1, 2, 1], 600
    shares = torch.logspace(-4, 0, 500)[:-1, None]                         # of the labels
    log_probs = torch.cat([1 - shares, shares * 2 / 3, shares / 3], 1).log()
    log_probs = log_probs.expand(outputs, -1, -1)                          # (T, shares, 3)
    lengths = torch.full((499,), outputs)
    losses = F.ctc_loss(log_probs, torch.tensor([target] * 499), lengths, torch.full((499,), 3),
                        reduction='none') / 3
    _, constant = monitor.plateau_lines([target], torch.tensor([outputs]), 3)
    assert constant == pytest.approx(losses.min().item(), rel=1e-3)


@pytest.mark.parametrize('loss,fraction', [
    (8.0, 0),
    (5.5, 0.5),
    (3.0, 1),
    (0.5, 1.5),
])
def test_plateau_fraction(loss, fraction):
    assert monitor.plateau_fraction(loss, (8.0, 3.0)) == pytest.approx(fraction)


# ---- monitor: gradients --------------------------------------------------------------------------

def gradient_norm(module):
    """Of all parameters together, in float64."""
    squares = [p.grad.double().square().sum().item() for p in module.parameters()]
    return math.sqrt(sum(squares))


def fill_gradients(network, value):
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, value)


@pytest.mark.parametrize('size', [100.0, 1e-3])
def test_gradients_are_clipped(size):
    network = make_network(hidden=8)
    gradients = monitor.Gradients(network, train.PARTS)
    fill_gradients(network, size)
    before = gradient_norm(network)
    assert gradients.clip(5.0)
    assert gradient_norm(network) == pytest.approx(min(before, 5.0), rel=1e-3)


def test_gradients_are_left_alone_without_a_limit():
    network = make_network(hidden=8)
    fill_gradients(network, 100.0)
    before = gradient_norm(network)
    assert monitor.Gradients(network, train.PARTS).clip(0)
    assert gradient_norm(network) == before


def test_gradients_are_counted():
    network = make_network(hidden=8)
    gradients = monitor.Gradients(network, train.PARTS)
    for size in 100.0, 1e-3:
        fill_gradients(network, size)
        assert gradients.clip(5.0)
    fill_gradients(network, float('nan'))
    assert not gradients.clip(5.0)
    summary = gradients.summary()
    assert summary['nonfinite'] == 1
    assert summary['clipped'] == pytest.approx(1 / 3)
    squares = [norm ** 2 for norm in summary['grad_parts'].values()]
    assert math.sqrt(sum(squares)) == pytest.approx(summary['grad_norm'], rel=1e-3)


class SomebodysNetwork(nn.Module):
    """A classifier of sequences (T, B, 4), with names of its own."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.GRU(4, 8)
        self.activation = nn.ReLU()
        self.classifier = nn.Linear(8, 3)

    def forward(self, x):
        states, _ = self.encoder(x)
        return self.classifier(self.activation(states))


@pytest.mark.parametrize('network,names', [
    (SomebodysNetwork(), ['encoder', 'classifier']),
    (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), ['0', '2']),
    (nn.Sequential(OrderedDict(inner=nn.Linear(4, 3), norm=nn.LayerNorm(3))), ['inner', 'norm']),
])
def test_gradients_of_somebody_elses_network(network, names):
    """Without parts, each child that has parameters is one."""
    gradients = monitor.Gradients(network)
    network(torch.randn(5, 2, 4)).square().sum().backward()
    norms = {name: gradient_norm(network.get_submodule(name)) for name in names}
    assert gradients.clip(1e-3)
    assert gradients.summary()['grad_parts'] == pytest.approx(norms, rel=1e-5)
    assert gradient_norm(network) == pytest.approx(1e-3, rel=1e-2)


def test_parameters_without_a_gradient_are_passed_over():
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    network[0].requires_grad_(False)
    network(torch.ones(1, 2)).sum().backward()
    gradients = monitor.Gradients(network)
    assert gradients.clip(1.0)
    assert gradients.summary()['grad_parts']['0'] == 0
    assert gradients.summary()['grad_parts']['1'] > 0


def test_a_parameter_of_no_part_is_named():
    with pytest.raises(ValueError, match='encoder.weight_ih_l0'):
        monitor.Gradients(SomebodysNetwork(), {'head': ['classifier.']})


def test_a_part_without_parameters_is_named():
    parts = {'all': ['encoder.', 'classifier.'], 'decoder': ['decoder.']}
    with pytest.raises(ValueError, match='no parameter has a prefix of decoder'):
        monitor.Gradients(SomebodysNetwork(), parts)


# ---- monitor: outputs ----------------------------------------------------------------------------

def test_both_masks_of_valid_frames_are_the_same():
    """monitor has one of its own, so that it serves other models without model.py."""
    for _ in range(20):
        frames = int(torch.randint(1, 50, ()))
        lengths = torch.randint(0, frames + 1, (7,))
        mask = monitor.valid_frames(frames, lengths)
        assert mask.sum(1).tolist() == lengths.tolist()
        assert torch.equal(mask, model.valid_frames(frames, lengths))


VOCAB_SIZE = 28


def output_summary(probabilities):
    """Of probabilities (2, 80, 28), of which 70 outputs are valid, for ten characters each."""
    outputs = monitor.Outputs(VOCAB_SIZE, math.log(27))
    outputs.add(probabilities.log(), torch.tensor([70, 70]), torch.tensor([10, 10]))
    return outputs.summary()


def test_uniform_output_is_recognised():
    summary = output_summary(torch.full((2, 80, VOCAB_SIZE), 1 / VOCAB_SIZE))
    assert summary['entropy'] == pytest.approx(1)
    assert summary['uniform_batches'] == 1
    assert summary['input_dependence'] == pytest.approx(0, abs=1e-5)


def test_constant_output_is_recognised():
    distribution = torch.full((VOCAB_SIZE,), 0.3 / 27)
    distribution[0] = 0.7
    summary = output_summary(distribution.expand(2, 80, VOCAB_SIZE))
    assert summary['blank'] == 1
    assert summary['emitted'] == 0
    assert summary['uniform_batches'] == 0
    assert summary['input_dependence'] == pytest.approx(0, abs=1e-5)


def test_learnt_output_is_recognised():
    """Ten letters of 27, each in one output of seven: h(1/7) + (1/7) ln 27 nats."""
    letters = torch.tensor([range(1, 11), range(9, 19)])
    symbols = torch.zeros(2, 80, dtype=torch.long)
    symbols[:, 0:70:7] = letters
    summary = output_summary(F.one_hot(symbols, VOCAB_SIZE).float().clamp_min(1e-9))
    shares = [count / 140 for count in Counter(letters.flatten().tolist()).values()]
    shares.append(6 / 7)
    expected = -sum(share * math.log(share) for share in shares)
    assert summary['input_dependence'] == pytest.approx(expected, abs=1e-3)
    assert summary['dependence_share'] > 0.9
    assert summary['dependence_share'] < 1
    assert summary['emitted'] == 1
    assert summary['blank'] == pytest.approx(6 / 7)


# ---- monitor: warnings ---------------------------------------------------------------------------

HEALTHY = {'epoch': 1, 'train_seconds': 60.0, 'nonfinite': 0, 'clipped': 0.1, 'train_loss': 1.0,
           'train_plateau_fraction': 1.3, 'grad_norm': 1.7, 'grad_norm_max': 2.0,
           'grad_parts': {'backbone': 1.0, 'recurrent': 1.0, 'head': 1.0},
           'uniform_batches': 0, 'entropy': 0.2,
           'dependence_share': 1.0, 'blank': 0.6, 'emitted': 1.0, 'warnings': [],
           'train_eval_loss': 0.9, 'updates': 1000, 'weight_change': 0.3, 'left_uniform': 20,
           'left_constant': 300, 'vanished': [], 'exploded': [], 'phase': 'learning'}
VALIDATED = HEALTHY | {'valid_loss': 1.2, 'valid_plateau_fraction': 1.2, 'valid_entropy': 0.1,
                       'valid_dependence_share': 0.9, 'deletions': 0.02, 'wer': 20.0, 'cer': 5.0}
SYMPTOMS = [
    ({'nonfinite': 2}, 'not finite'),
    ({'train_loss': -0.24, 'train_eval_loss': -0.5}, 'negative CTC loss'),
    ({'exploded': ['head']}, 'exploding gradient in the head'),
    ({'phase': 'uniform'}, 'uniform output'),
    ({'phase': 'constant', 'blank': 0.999, 'emitted': 0.01}, 'constant output'),
    ({'train_eval_loss': 2.0}, "batch norm's running statistics"),
]


def test_a_healthy_epoch_has_no_warnings():
    assert monitor.diagnose(HEALTHY) == []


@pytest.mark.parametrize('symptom,words', SYMPTOMS)
def test_warnings_say_what_is_wrong_and_the_next_step(symptom, words):
    warning, = monitor.diagnose(HEALTHY | symptom)
    assert words in warning
    assert re.search(r'; \w+', warning)


@pytest.mark.parametrize('symptom', [
    {'vanished': ['backbone']},
    {'grad_parts': {'backbone': 1e-6, 'recurrent': 1.0, 'head': 1.0}},
])
def test_a_gradient_vanishes_on_a_plateau_alone(symptom):
    """What has been learnt needs no gradient any more."""
    assert monitor.diagnose(HEALTHY | symptom) == []
    plateau, vanishing = sorted(monitor.diagnose(HEALTHY | symptom | {'phase': 'constant'}))
    assert plateau.startswith('constant output')
    assert vanishing.startswith('vanishing gradient in the backbone')


def part_warnings(norms):
    """-> the parts that vanish and those that explode where the head has gradients of these
    norms."""
    network = SomebodysNetwork()
    gradients = monitor.Gradients(network)
    for norm in norms:
        fill_gradients(network.encoder, 1.0)
        fill_gradients(network.classifier, norm)
        gradients.clip(0)
    summary = gradients.summary()
    return summary['vanished'], summary['exploded']


@pytest.mark.parametrize('norms,warnings', [
    ([1.0] * 100, ([], [])),
    ([1.0] * 50 + [0.009] * 20, (['classifier'], [])),
    ([1.0] * 50 + [0.009] * 19, ([], [])),
    ([1.0] * 50 + [0.011] * 50, ([], [])),
    ([0.009] * 100, ([], [])),                      # as it was from the start
    ([1.0] * 50 + [11.0] * 11, ([], ['classifier'])),
    ([1.0] * 50 + [9.0] * 50, ([], [])),
    ([1.0] * 60 + [1000.0] * 9, ([], [])),          # peaks, which are clipped
])
def test_gradients_are_held_against_those_of_the_first_updates(norms, warnings):
    assert part_warnings(norms) == warnings


def test_gradients_and_departures_go_on_where_they_were(tmp_path):
    """As a resumed run needs it, for which every state is plain data."""
    network = SomebodysNetwork()
    whole, first, second = [monitor.Gradients(network) for _ in range(3)]
    watches = [monitor.Departures((10.0, 3.0)) for _ in range(3)]
    for update in range(90):
        fill_gradients(network, 1.0 if update < 50 else 1e-3)
        for gradients in (whole, first if update < 60 else second):
            gradients.clip(0)
        for watch in (watches[0], watches[1] if update < 60 else watches[2]):
            watch.add(10.0 - update / 10)
        if update == 59:
            second.restore(json.loads(json.dumps(first.state())))
            watches[2].restore(json.loads(json.dumps(watches[1].state())))
    assert second.state() == whole.state()
    assert second.vanished == whole.vanished == {'encoder', 'classifier'}
    assert watches[2].state() == watches[0].state()


def test_a_run_leaves_its_plateaus_where_the_mean_of_20_updates_does():
    """A loss that falls by 0.1 an update: the mean of the last 20 is 0.95 above it."""
    watch = monitor.Departures((10.0, 3.0))
    for update in range(1, 101):
        watch.add(10.0 - update / 10)
    # 10 - u / 10 + 0.95 < 6.5 and < 2.7
    assert watch.left == {'left_uniform': 45, 'left_constant': 83}


@pytest.mark.parametrize('change,before,phase', [
    ({'valid_dependence_share': 0.01, 'valid_entropy': 0.99}, 2.0, 'uniform'),
    ({'valid_dependence_share': 0.01, 'valid_entropy': 0.3}, 2.0, 'constant'),
    ({'valid_loss': 2.8}, 3.0, 'constant'),         # depends on the sound, to no use
    ({}, 2.0, 'learning'),
    ({'valid_loss': 0.2}, 0.3, 'learning'),         # still falls
    ({'valid_loss': 0.2}, None, 'learning'),
    ({'valid_loss': 0.2}, 0.205, 'learnt'),
    ({'valid_loss': 0.35}, 0.35, 'learning'),       # above a tenth of the constant line
])
def test_phases_by_validation(change, before, phase):
    before = VALIDATED | {'valid_loss': before} if before else None
    assert monitor.name_phase(VALIDATED | change, 3.0, before) == phase


def test_a_phase_without_validation():
    assert monitor.name_phase(HEALTHY | {'dependence_share': 0.01}, 3.0) == 'constant'


@pytest.mark.parametrize('outputs,labels', [(60, 30), (250, 12)])
def test_lines_without_a_run(outputs, labels, capsys):
    """The uniform one by counting paths: T outputs, L labels without repeats, (T+L choose 2L)."""
    assert exit_code(monitor.main, '--lines', outputs, labels, 300) is False
    out = capsys.readouterr().out
    paths = math.lgamma(outputs + labels + 1) - math.lgamma(2 * labels + 1)
    paths -= math.lgamma(outputs - labels + 1)
    uniform = (outputs * math.log(300) - paths) / labels
    assert float(out.split()[0]) == pytest.approx(uniform, rel=0.02)  # repeats, of letters
    uniform, constant = monitor.lines_of_lengths(outputs, labels, 28)
    assert 2.5 < constant < 3.3 < uniform


def test_the_constant_line_of_texts_of_one_letter():
    """They need no blank: the letter in every output says each of them."""
    assert monitor.lines_of_lengths(50, 1, 2)[1] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize('words', ['10 12 28', '10 0 28', '10 5 1', '5 5 2', '100000000 12 28',
                                   '20000 10000 28', '250 12 20000000'])
def test_lines_that_cannot_be(words, capsys):
    assert '--lines: ' in exit_code(monitor.main, '--lines', *words.split())


# ---- monitor: a batch of anybody's network -------------------------------------------------------

class SomebodysGRU(nn.Module):
    """(T, B, 8), lengths -> log-probabilities (T, B, 6)."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(8, 32, bidirectional=True)
        self.head = nn.Linear(64, 6)

    def forward(self, x):
        return self.head(self.gru(x)[0]).log_softmax(2)


class SomebodysTransformer(nn.Module):
    """The same by attention; the position is the last two features."""

    def __init__(self):
        super().__init__()
        self.inputs = nn.Linear(8, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 6)

    def forward(self, x):
        return self.head(self.encoder(self.inputs(x))).log_softmax(2)


class CTCBatch(NamedTuple):
    """Arguments of F.ctc_loss."""
    log_probs: torch.Tensor
    targets: torch.Tensor
    input_lengths: torch.Tensor
    target_lengths: torch.Tensor


def toy_batch(seed, size=8):
    """Texts of 3 to 8 symbols of five, each of four frames -> (x, the other arguments)."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (size,), generator=rng)
    targets = torch.randint(1, 6, (size, 8), generator=rng)
    x = 0.3 * torch.randn(70, size, 8, generator=rng)
    x[:, :, 6:] = 0
    frames = 7 * lengths + 4
    for row in range(size):
        for i in range(int(lengths[row])):
            x[7 * i + 3:7 * i + 7, row, targets[row, i] - 1] += 2
        x[frames[row]:, row] = 0  # padding
    position = torch.arange(70) / 10
    x[:, :, 6] = position.sin()[:, None]
    x[:, :, 7] = position.cos()[:, None]
    return x, (targets, frames, lengths)


@functools.cache
def learnt_network(kind):
    """A network that is not ours, after a few hundred updates."""
    torch.manual_seed(0)
    network = kind()
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    for update in range(150):
        x, rest = toy_batch(update)
        loss = F.ctc_loss(network(x), *rest)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


NETWORKS_OF_OTHERS = [SomebodysGRU, SomebodysTransformer]
CTC_FAULTS = {
    'raw logits': (lambda b: b._replace(log_probs=3 * b.log_probs + 1), 'is not normalised'),
    'probabilities': (lambda b: b._replace(log_probs=b.log_probs.exp()), 'holds probabilities'),
    'wrong dimension': (lambda b: b._replace(log_probs=b.log_probs.log_softmax(0)),
                        'normalised over time'),
    'not a number': (lambda b: b._replace(log_probs=b.log_probs * float('nan')), 'holds NaN'),
    'blank': (lambda b: b._replace(targets=b.targets - 1), 'are the blank, symbol 0'),
    'outside': (lambda b: b._replace(targets=b.targets + 2), 'are not between 0 and 5'),
    'batch first': (lambda b: b._replace(log_probs=b.log_probs.transpose(0, 1)),
                    'looks like (B, T, V)'),
    'padded lengths': (lambda b: b._replace(input_lengths=torch.full((8,), 70)),
                       'every input length is 70, the padded one'),
    'lengths of the input': (lambda b: b._replace(input_lengths=4 * b.input_lengths),
                             'where there are 70 outputs'),
    'too few outputs': (lambda b: b._replace(input_lengths=b.input_lengths // 8 + 1),
                        'fewer outputs than labels and repeats'),
    'one output for all': (lambda b: b._replace(log_probs=b.log_probs[:, :1].expand(-1, 8, -1)),
                           'every utterance gets the same outputs'),
    'other texts': (lambda b: b._replace(targets=b.targets % 5 + 1),
                    'check that each transcript belongs to its recording'),
    'blank elsewhere': (lambda b: b._replace(log_probs=b.log_probs.roll(1, 2)),
                        "blank and alphabet are the network's own"),
    'lengths of another batch': (lambda b: b._replace(input_lengths=b.input_lengths[:4]),
                                 '4 input lengths and 8 target lengths'),
}


@pytest.mark.parametrize('kind', NETWORKS_OF_OTHERS)
def test_nothing_is_found_in_a_healthy_network_of_others(kind):
    for seed in range(1003, 1006):
        x, rest = toy_batch(seed)
        assert monitor.check_ctc(learnt_network(kind)(x), *rest) == []


def test_whole_numbers_of_any_type_are_lengths():
    x, (targets, *lengths) = toy_batch(1003)
    unsigned = [targets.to(torch.uint8), *[n.to(torch.uint16) for n in lengths]]
    assert monitor.check_ctc(learnt_network(SomebodysGRU)(x), *unsigned) == []


@pytest.mark.parametrize('kind', NETWORKS_OF_OTHERS)
@pytest.mark.parametrize('fault', CTC_FAULTS)
def test_a_fault_in_a_network_of_others_is_named_and_no_other(kind, fault):
    plant, words = CTC_FAULTS[fault]
    for seed in range(1003, 1006):
        x, rest = toy_batch(seed)
        finding, = monitor.check_ctc(*plant(CTCBatch(learnt_network(kind)(x), *rest)))
        assert words in finding
        assert re.search(r'[;,] \w+', finding)


def test_the_plateaus_of_a_batch_are_named():
    """An output of equal symbols, and one of mostly blank, with little noise."""
    x, rest = toy_batch(1)
    logits = 1e-2 * torch.randn(70, 8, 6)
    finding, = monitor.check_ctc(logits.log_softmax(2), *rest)
    assert finding.startswith('phase uniform')
    assert monitor.check_ctc(logits.log_softmax(2), *rest, untrained=True) == []
    logits[:, :, 0] += 3
    finding, = monitor.check_ctc(logits.log_softmax(2), *rest)
    assert finding.startswith('phase constant')


@pytest.mark.parametrize('change,words', [
    ({'log_probs': torch.zeros(70, 6)}, 'take log_probs.unsqueeze(1)'),
    ({'log_probs': torch.zeros(70, 0, 6)}, 'give one batch of outputs'),
    ({'input_lengths': torch.linspace(0.1, 1, 8)}, 'multiply them by its number of outputs'),
    ({'input_lengths': torch.full((8,), -3)}, 'lengths go down to -3 outputs'),
    ({'target_lengths': torch.full((8,), -1)}, 'and -1 labels'),
    ({'target_lengths': torch.zeros(8, dtype=torch.long)}, 'no utterance has a label'),
    ({'targets': None}, 'targets cannot be a tensor'),
    ({'targets': torch.ones(8, 12, dtype=torch.bool)}, 'targets are not whole numbers'),
    ({'input_lengths': torch.full((8,), 70j)}, 'input_lengths is not a dense tensor'),
    ({'log_probs': torch.zeros(70, 8, 6).to_sparse()}, 'log_probs is not a dense tensor'),
    ({'log_probs': torch.zeros(70, 8, 6, dtype=torch.long)}, 'log_probs are whole numbers'),
    ({'blank': 6}, 'blank is 6, and the symbols are 0 to 5'),
    ({'blank': None}, 'blank is None, and the symbols are 0 to 5'),
])
def test_arguments_that_cannot_be_are_findings_too(change, words):
    _, rest = toy_batch(0)
    batch = CTCBatch(torch.zeros(70, 8, 6).log_softmax(2), *rest)._asdict() | change
    finding, = monitor.check_ctc(**batch)
    assert words in finding


def test_a_clip_that_fills_a_batch_is_no_fault():
    x, rest = toy_batch(1003)
    same = [torch.cat([tensor[:1]] * 8) for tensor in rest]
    assert monitor.check_ctc(learnt_network(SomebodysGRU)(x[:, :1].expand(-1, 8, -1)), *same) == []


def test_a_batch_is_checked_in_any_form_that_ctc_loss_takes():
    """Another blank, labels in one line, lists of lengths: the healthy network stays healthy."""
    x, (targets, frames, lengths) = toy_batch(1003)
    log_probs = learnt_network(SomebodysGRU)(x)
    line = torch.cat([row[:length] for row, length in zip(targets, lengths)])
    assert monitor.check_ctc(log_probs, line, frames.tolist(), lengths.tolist()) == []
    assert monitor.check_ctc(log_probs.roll(-1, 2), targets - 1, frames, lengths, blank=5) == []


# ---- monitor: reading of runs --------------------------------------------------------------------

def test_an_epoch_line_has_its_warnings_beneath():
    record = VALIDATED | {'warnings': ['one; do', 'two; do']}
    first, *others = monitor.epoch_line(record).splitlines()
    assert 'WER 20.0 %' in first
    assert others == ['    ! one; do', '    ! two; do']


def test_an_epoch_line_without_validation():
    line = monitor.epoch_line(HEALTHY)
    assert 'loss 1.000' in line
    assert 'WER' not in line


STUCK = VALIDATED | {'phase': 'constant', 'valid_plateau_fraction': 0.99,
                     'train_plateau_fraction': 0.99, 'left_constant': None}


@pytest.mark.parametrize('last,step', [
    (STUCK, 'still on the plateau after 1000 updates'),
    (STUCK | {'updates': 100}, '100 updates are few'),
    (STUCK | {'weight_change': 1e-4}, 'the weights hardly move'),
    (STUCK | {'weight_change': 50.0}, 'the weights change too fast'),
    (STUCK | {'vanished': ['backbone']}, 'the gradient does not reach every part'),
    (STUCK | {'left_constant': 300}, 'the network fits the training utterances alone'),
    (VALIDATED | {'train_eval_loss': 2.0}, 'the loss of training utterances is 2.000 in eval mode'),
    (VALIDATED | {'nonfinite': 1}, 'updates are skipped, or nearly all clipped'),
    (VALIDATED | {'clipped': 1.0, 'train_plateau_fraction': 1.0},
     'updates are skipped, or nearly all clipped'),
    (HEALTHY, 'there is no validation data'),
    (VALIDATED | {'wer': 97.6, 'cer': 17.4}, 'the letters are right and the words are not'),
    (VALIDATED | {'wer': 0.0, 'cer': 0.0}, 'there are no errors left to learn from'),
    (VALIDATED | {'valid_loss': 3.0}, 'training is learnt better than validation'),
    (VALIDATED, 'no warning applies'),
])
def test_advice_on_how_to_go_on(last, step):
    *_, advice = monitor.explain([last], {'length_correlation': 0.8})
    assert advice.startswith(f'how to go on: {step}')


def test_transcripts_of_other_recordings_are_known_by_their_lengths():
    for last in STUCK, STUCK | {'left_constant': 300}:  # learnt by heart or not
        *_, advice = monitor.explain([last], {'length_correlation': 0.03})
        assert 'do not belong together' in advice


def test_advice_names_the_best_epoch():
    """Of equal ones, in CER too, the last, which is the one that best.pt holds."""
    log = [VALIDATED | {'epoch': i, 'wer': wer} for i, wer in enumerate([30, 10, 10, 20], 1)]
    assert 'best epoch 3 of 4: WER 10.00 %, CER 5.00 %' in monitor.explain(log, {})
    log[1]['cer'] = 4.0
    assert 'best epoch 2 of 4: WER 10.00 %, CER 4.00 %' in monitor.explain(log, {})


def test_a_run_describes_itself(first_run, capsys):
    assert exit_code(monitor.main, first_run.folder) is False
    out = capsys.readouterr().out
    assert 'best epoch' in out
    assert 'how to go on' in out
    assert 'phase: ' in out
    assert len(out.splitlines()) >= 1 + 3 + 5  # its name, epochs, advice
    for record in first_run.log:
        assert monitor.epoch_line(record) in out


def test_folders_that_hold_no_run_are_named(first_run, tmp_path, capsys):
    (tmp_path / 'damaged').mkdir()
    log = (first_run.folder / 'log.jsonl').read_text()
    (tmp_path / 'damaged' / 'log.jsonl').write_text(log[:100] + '\n' + log)
    assert exit_code(monitor.main, tmp_path / 'none', tmp_path / 'damaged') is True
    err = capsys.readouterr().err
    assert 'none: holds neither log.jsonl nor results.json' in err
    assert 'log.jsonl:1: is not JSON' in err
    assert err.count('\n') == 2


def fake_run(folder, seed, wer, errors=(), **settings):
    """A finished run that scored three sentences, those in `errors` wrongly."""
    folder.mkdir()
    said = ['go left', 'stop', 'go right now']
    rows = [f'{i}.wav\t{text}\t{"no" if i in errors else text}\t{text}'
            for i, text in enumerate(said)]
    write_lines(folder / 'test.tsv', ['file\tsaid\theard\tbeam', *rows])
    write_lines(folder / 'log.jsonl', [json.dumps(VALIDATED)])
    (folder / 'config.json').write_text(json.dumps({'seed': seed, 'epochs': 4, **settings}))
    rates = monitor.error_rates(['a'], ['b']) | {'wer': wer}
    results = {'valid': None, 'test': rates, 'test_beam': rates | {'wer': wer / 2}}
    (folder / 'results.json').write_text(json.dumps(results))
    return folder


def test_runs_are_compared(tmp_path, capsys):
    runs = [fake_run(tmp_path / f'same_{seed}', seed, wer, dropout=0.1)
            for seed, wer in enumerate([2.0, 4.0, 6.0])]
    other = fake_run(tmp_path / 'other', 0, 9.0, dropout=0.3)
    assert exit_code(monitor.main, *runs, other) is False
    settings, scores, spread = capsys.readouterr().out.split('\n\n')
    assert settings.splitlines()[0].split() == ['run', 'dropout', 'seed']
    assert '9.00' in scores
    assert [' '.join(line.split()) for line in spread.splitlines()[1:5]] == [
        'same 3 1.200 120 300 300 300 greedy 4.00 2.00 0.0 to 0.0 100.0',
        'beam 2.00 1.00 0.0 to 0.0 100.0',
        'other 1 1.200 120 300 greedy 9.00 0.0 to 0.0 100.0',
        'beam 4.50 0.0 to 0.0 100.0']


def test_groups_of_runs_are_compared_by_a_paired_bootstrap(tmp_path, capsys):
    """The mean errors of each group: two runs wrong in all sentences, one wrong in one."""
    bad = [fake_run(tmp_path / f'bad_{seed}', seed, 50.0, errors=[0, 1, 2], dropout=0.3)
           for seed in (0, 1)]
    good = fake_run(tmp_path / 'good_0', 0, 0.0, dropout=0.1)
    assert exit_code(monitor.main, *bad, good) is False
    greedy, beam = capsys.readouterr().out.splitlines()[-2:]
    assert greedy.startswith('paired bootstrap, greedy: good_0 has -100.00 points of WER')
    assert greedy.endswith('good_0 is better')
    assert beam.endswith('+0.00 points of WER (95 %: +0.00 to +0.00): no significant difference')


def test_the_better_of_two_runs_of_one_name_is_named_in_full(tmp_path, capsys):
    runs = []
    for name, errors in ('ours', []), ('before', [0, 1, 2]):
        (tmp_path / name).mkdir()
        runs.append(fake_run(tmp_path / name / 'seed_0', 0, 0.0, errors))
    assert exit_code(monitor.main, *runs) is False
    greedy = capsys.readouterr().out.splitlines()[-2]
    assert f'{runs[1]} has +100.00 points' in greedy
    assert greedy.endswith(f'{runs[0]} is better')


class FakeAxes:
    """Keeps the texts that are drawn."""

    def __init__(self):
        self.texts = []

    def axis(self, switch):
        pass

    def text(self, x, y, text, **style):
        self.texts.append(text.strip())


def test_a_picture_shows_one_sentence_as_each_of_eight_runs_heard_it(tmp_path):
    runs = [monitor.read_run(fake_run(tmp_path / f'{i}', i, 0.0, [2] if i else []))
            for i in range(8)]
    axes = FakeAxes()
    monitor.plot_words(axes, runs)
    assert axes.texts == ['one sentence, said: go right now', 'heard, 0: go right now',
                          *(f'heard, {i}: no' for i in range(1, 8))]


def test_a_picture_shows_no_sentence_where_files_of_one_name_say_others(tmp_path):
    one, two = [monitor.read_run(fake_run(tmp_path / name, 0, 0.0)) for name in ('one', 'two')]
    two = two._replace(sentences=[[file, 'stop it', 'stop it', '']
                                  for file, *_ in two.sentences])
    axes = FakeAxes()
    monitor.plot_words(axes, [one, two])
    assert axes.texts == []


def test_two_runs_are_compared_by_a_paired_bootstrap(tmp_path, capsys):
    """Three errors more in six words are 50 points; of three sentences one sample may hold any."""
    one = monitor.read_run(fake_run(tmp_path / 'one', 0, 0.0))
    two = monitor.read_run(fake_run(tmp_path / 'two', 1, 50.0, errors=[2]))
    more, (low, high) = monitor.paired_bootstrap([one], [two])
    assert more == pytest.approx(50)
    assert low == 0
    assert high == pytest.approx(100)
    assert exit_code(monitor.main, tmp_path / 'one', tmp_path / 'two') is False
    assert 'no significant difference' in capsys.readouterr().out


# ---- monitor: pictures ---------------------------------------------------------------------------

def png_size(path):
    """-> (width, height) of a picture."""
    content = path.read_bytes()
    assert content.startswith(b'\x89PNG')
    return int.from_bytes(content[16:20]), int.from_bytes(content[20:24])


def test_runs_and_clips_are_drawn(first_run, by_heart, tmp_path, capsys):
    pytest.importorskip('matplotlib')
    one, two, clip = [tmp_path / f'{name}.png' for name in ('one', 'two', 'clip')]
    assert exit_code(monitor.main, first_run.folder, '--plot', one) is False
    again = shutil.copytree(first_run.folder, tmp_path / 'again')
    assert exit_code(monitor.main, first_run.folder, again, '--plot', two) is False
    assert 'of 2 runs' in capsys.readouterr().out
    heard = by_heart.folder / 'clip.wav'
    assert exit_code(model.main, by_heart.checkpoint, heard, '--plot', clip) is False
    for picture in one, two, clip:
        assert png_size(picture)[0] == 1200


def test_a_picture_that_cannot_be_drawn_is_a_line(first_run, tmp_path, monkeypatch):
    clip = first_run.folder / 'clip.wav'
    assert 'name one' in exit_code(model.main, first_run.folder / 'best.pt', '--plot', 'p.png')
    if 'matplotlib' in sys.modules:
        message = exit_code(monitor.main, first_run.folder, '--plot', tmp_path / 'picture.txt')
        assert 'cannot be written' in message
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    message = exit_code(monitor.main, first_run.folder, '--plot', tmp_path / 'picture.png')
    assert 'needs matplotlib, which is not installed; install it with' in message
    message = exit_code(model.main, first_run.folder / 'best.pt', clip, '--plot', 'p.png')
    assert 'needs matplotlib' in message


def test_only_runs_that_trained_are_drawn(tmp_path):
    assert 'draws runs; name one' in exit_code(monitor.main, '--lines', 9, 4, 3, '--plot', 'p.png')
    run = fake_run(tmp_path / 'scored', 0, 10.0)
    (run / 'log.jsonl').unlink()
    (run / 'config.json').unlink()
    message = exit_code(monitor.main, run, '--plot', tmp_path / 'picture.png')
    assert f'{run} has no epochs to draw' in message


def test_a_run_named_twice_is_one(tmp_path, capsys):
    run = fake_run(tmp_path / 'run', 0, 10.0)
    assert exit_code(monitor.main, run, f'{run}/../run') is False
    assert 'differ by their seed' not in capsys.readouterr().out


def test_what_a_run_lacks_is_named(tmp_path, capsys):
    run = fake_run(tmp_path / 'run', 0, 10.0)
    (run / 'test.tsv').unlink()
    assert exit_code(monitor.main, run) is True
    assert 'test.tsv' in capsys.readouterr().err
    write_lines(run / 'test.tsv', ['file'])
    write_lines(run / 'log.jsonl', ['{"epoch": 1}'])
    assert f'{run} lacks what train.py writes' in exit_code(monitor.main, run)


# ---- monitor: planted faults ---------------------------------------------------------------------

def shuffle_transcripts(folder):
    """The built-in training corpus with each text at another recording -> its manifest."""
    manifest = Path(data.builtin_corpus()['train'])
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    texts = [row['text'] for row in rows]
    random.Random(0).shuffle(texts)
    for row, text in zip(rows, texts):
        row['text'] = text
    shuffled = manifest.with_name('shuffled.jsonl')
    write_lines(shuffled, map(json.dumps, rows))
    return ['--train_data', shuffled, '--skip_bad', '--valid_data', data.builtin_corpus()['valid']]


def scale_the_second_layer_down(monkeypatch):
    """What the second LSTM layer hears is 1e-4 of what the first says, and so are gradients."""
    forward = model.BiLSTM.forward

    def faint(layer, x, lengths):
        is_second = layer.forward_lstm.input_size == 2 * layer.forward_lstm.hidden_size
        return forward(layer, 1e-4 * x if is_second else x, lengths)

    monkeypatch.setattr(model.BiLSTM, 'forward', faint)


def forget_batch_norm(monkeypatch):
    """Batch norm's running statistics keep what they began with."""

    def forward(layer, x):
        layer.momentum = 1e-4
        return nn.BatchNorm2d.forward(layer, x)

    monkeypatch.setattr(model.BatchNorm, 'forward', forward)


PLANTED = {
    'learning rate too low': (['--learning_rate=3e-6'], 'the weights hardly move'),
    'learning rate too high': (['--learning_rate=1e-1'], 'the weights change too fast'),
    'too few updates': (['--epochs=1', '--num_train_samples=200'], 'updates are few'),
    'shuffled transcripts': (shuffle_transcripts, 'recordings and transcripts do not belong'),
    'vanishing gradient': (scale_the_second_layer_down, 'the gradient does not reach every part'),
    'statistics of batch norm': (forget_batch_norm, "batch norm's running statistics"),
}


@pytest.fixture(scope='module')
def spoken_corpus(tmp_path_factory):
    """A folder with the built-in corpus."""
    folder = tmp_path_factory.mktemp('spoken')
    with contextlib.chdir(folder):
        data.builtin_corpus()
    return folder


@slow
@pytest.mark.parametrize('seed', [3, 4, 5])
@pytest.mark.parametrize('fault', PLANTED)
def test_a_planted_fault_is_named_and_no_other(fault, seed, spoken_corpus, tmp_path, monkeypatch):
    """Thresholds were chosen on seeds 0 to 2."""
    monkeypatch.chdir(spoken_corpus)
    plant, words = PLANTED[fault]
    flags = ['--interctc_weight=0'] if plant is scale_the_second_layer_down else []
    if isinstance(plant, list):
        flags += plant
    elif plant is shuffle_transcripts:
        flags += plant(spoken_corpus)
    else:
        plant(monkeypatch)
    if '--epochs=1' not in flags:
        flags.append('--epochs=4')
    train.main([*map(str, flags), '--blocks=3', '--frames_per_output=4', '--hidden=64',
                f'--seed={seed}', '--test_data=none', f'--run_dir={tmp_path / "run"}'])
    run = monitor.read_run(tmp_path / 'run')
    *_, step = monitor.explain(run.log, run.config)
    assert words in step


@slow
@pytest.mark.parametrize('seed', [3, 4, 5])
@pytest.mark.parametrize('frames_per_output', [4, 2, 1])
def test_a_healthy_run_has_no_warning_after_its_first_fifth(frames_per_output, seed, spoken_corpus,
                                                            tmp_path, monkeypatch):
    monkeypatch.chdir(spoken_corpus)
    train.main(['--blocks=3', f'--frames_per_output={frames_per_output}', '--hidden=64',
                '--epochs=10', f'--seed={seed}', '--test_data=none',
                f'--run_dir={tmp_path / "run"}'])
    log = monitor.read_run(tmp_path / 'run').log
    assert [warning for record in log[2:] for warning in record['warnings']] == []
    assert log[-1]['phase'] in ('learning', 'learnt')


# ---- train: two samples --------------------------------------------------------------------------

def learn_by_heart(network, batch, updates):
    """Train on one batch, with the loop written out -> the losses."""
    args = train.parse_flags([])
    optimizer, schedule = train.make_optimizer(network, args, updates)
    gradients = monitor.Gradients(network, train.PARTS)
    losses = []
    for _ in range(updates):
        log_probs, n = network(batch.mels, batch.lengths)
        loss = F.ctc_loss(log_probs.transpose(0, 1), batch.targets, n, batch.target_lengths)
        optimizer.zero_grad()
        loss.backward()
        gradients.clip(5.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def test_two_samples_are_learnt():
    """First loss on the uniform line, none below zero, the last near zero, words right."""
    start = time.time()
    texts = ['bad cab', 'face a head']
    alphabet = data.make_alphabet(make_utterances(texts))
    targets = [data.encode(text, alphabet) for text in texts]
    rng = np.random.default_rng(0)
    items = []
    for i, text in enumerate(texts):
        wave = torch.tensor(tones(text, rng), dtype=torch.float32)
        items.append((data.features(wave).mels, torch.tensor(targets[i]), i))
    batch = data.collate(items)
    network = make_network(vocab_size=len(alphabet))
    outputs = network.output_lengths(batch.lengths)
    uniform, _ = monitor.plateau_lines(targets, outputs, len(alphabet))
    losses = learn_by_heart(network, batch, updates=45)
    network.eval()
    with torch.no_grad():
        log_probs, n = network(batch.mels, batch.lengths)
    loss = F.ctc_loss(log_probs.transpose(0, 1), batch.targets, n, batch.target_lengths)
    heard = [data.decode(symbols, alphabet) for symbols in model.greedy_decode(log_probs, n)]
    assert losses[0] == pytest.approx(uniform, rel=0.15)
    assert min(losses) > -1e-4
    assert losses[-1] < 0.05
    assert loss < 0.05  # in eval mode
    assert heard == texts
    assert monitor.error_rates(texts, heard)['wer'] == 0
    assert time.time() - start < 20


# ---- train: twenty samples, three epochs ---------------------------------------------------------

def test_loss_falls_every_epoch(first_run):
    """As fractions of the way from the uniform line, 0, to the constant one, 1."""
    first, second, third = [record['train_plateau_fraction'] for record in first_run.log]
    assert first > 0
    assert second > first
    assert third > second


def test_validation_loss_falls_too(first_run, corpus):
    utterances = read_utterances(corpus.valid)
    alphabet = data.make_alphabet(read_utterances(corpus.train))
    untrained = make_network(vocab_size=len(alphabet))
    loss = train.evaluate(untrained, data.Speech(utterances, alphabet)).loss
    began = monitor.plateau_fraction(loss, train.plateaus(utterances, alphabet, untrained))
    assert first_run.log[-1]['valid_plateau_fraction'] > began + 0.2


# ---- train: optimiser and schedule ---------------------------------------------------------------

def test_the_optimiser_is_adamw():
    optimizer, _ = train.make_optimizer(nn.Linear(2, 2), train.parse_flags([]), 200)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults['weight_decay'] == 1e-5


def test_the_learning_rate_climbs_and_falls():
    optimizer, schedule = train.make_optimizer(nn.Linear(2, 2), train.parse_flags([]), 200)
    rates = []
    for _ in range(200):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        schedule.step()
    assert max(rates) == pytest.approx(3e-3)
    assert rates.index(max(rates)) == 19  # the 20th of 200: 10 %
    half_way_down = (19 + 199) // 2  # a cosine is half way at half time
    assert rates[half_way_down] == pytest.approx(1.5e-3, rel=1e-3)
    assert rates[-1] < 1e-7


def test_a_constant_schedule_is_constant():
    args = train.parse_flags(['--schedule=constant'])
    optimizer, schedule = train.make_optimizer(nn.Linear(2, 2), args, 20)
    for _ in range(20):
        assert optimizer.param_groups[0]['lr'] == 3e-4
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize('updates', range(1, 30))
def test_a_schedule_for_any_number_of_updates(updates):
    train.make_optimizer(nn.Linear(2, 2), train.parse_flags([]), updates)


# ---- train: flags --------------------------------------------------------------------------------

@pytest.fixture(scope='session')
def fingerprint(tmp_path_factory):
    """A function of flags -> what the weights are after an epoch on four utterances."""
    folder = tmp_path_factory.mktemp('tiny')
    manifest = str(write_corpus(folder, ['ab', 'cd', 'ba', 'dc']))

    @functools.cache
    def weights_of(*flags):
        run = folder / ('run' + ''.join(flags))
        train_run(run, '--train_data', manifest, '--valid_data', manifest, '--epochs=1',
                  '--batch_size=4', *SMALL, *flags)
        weights = torch.load(run / 'last.pt', weights_only=True)['model']
        return [(name, weight.shape, weight.double().sum().item())
                for name, weight in weights.items()]

    return weights_of


@pytest.mark.parametrize('flags', [
    '--num_train_samples=3', '--spec_augment', '--no-speed_perturb', '--epochs=2',
    '--batch_size=2', '--learning_rate=1e-3', '--weight_decay=0.1', '--grad_clip=0.01',
    '--interctc_weight=0', '--seed=1', '--blocks=5', '--frames_per_output=2', '--hidden=8',
    '--dropout=0.5', '--squeeze_excite', '--schedule=constant', '--concat=1',
    '--blocks=5 --undo deep_path', '--undo forget_bias'])
def test_each_flag_changes_the_trained_weights(flags, fingerprint):
    """Those that begin with the last '--', where there are several."""
    others, _, last = flags.rpartition('--')
    assert fingerprint(*others.split(), *f'--{last}'.split()) != fingerprint(*others.split())


@pytest.mark.parametrize('flag', [
    '--epochs=0', '--batch_size=x', '--learning_rate=-1', '--frames_per_output=3', '--blocks=12',
    '--dropout=1', '--device=abacus', '--epoch=1', '--init_from=none.pt', '--resume=nowhere'])
def test_bad_flags_end_in_a_message(flag, corpus, tmp_path, capsys):
    code = exit_code(train.main, *corpus.flags, '--test_data', corpus.valid, '--run_dir',
                     tmp_path / 'run', flag)
    message = code
    if not isinstance(code, str):  # argparse prints, and exits with a number
        message = capsys.readouterr().err.splitlines()[-1]
    name, _, _ = flag.partition('=')
    assert code != 0
    assert name.lstrip('-') in message
    assert '\n' not in message


def test_help_shows_no_default_of_none(capsys):
    assert exit_code(train.parse_flags, '--help') == 0
    out = capsys.readouterr().out
    assert '--learning_rate' in out
    assert '(default: None)' not in out
    assert 'SUPPRESS' not in out


# ---- train: the run folder -----------------------------------------------------------------------

def test_results_are_written_down(first_run):
    results = first_run.results
    assert read_json(first_run.folder / 'results.json') == results
    assert set(results) == {'valid', 'valid_beam', 'test', 'test_beam', 'updates', 'train_seconds',
                            'parameters', 'seed'}
    assert results['test'] is None
    assert results['valid_beam']['words'] == results['valid']['words']
    assert results['valid']['wer'] == min(record['wer'] for record in first_run.log)
    assert results['valid']['utterances'] == 6
    assert results['updates'] == 30


def test_the_log_has_a_record_an_epoch(first_run):
    assert [record['epoch'] for record in first_run.log] == [1, 2, 3]
    for record in first_run.log:
        assert record['clipped'] >= 0
        assert record['clipped'] <= 1


def test_config_json_holds_flags_and_network(first_run):
    config = read_json(first_run.folder / 'config.json')
    assert config['batch_size'] == 2
    assert config['frames_per_output'] == model.Config(1).frames_per_output


@pytest.mark.parametrize('key,split', [('plateaus', 'train'), ('valid_plateaus', 'valid')])
def test_config_json_holds_the_plateaus(key, split, first_run, corpus):
    network, alphabet, *_ = model.load_checkpoint(first_run.folder / 'best.pt')
    utterances = read_utterances(getattr(corpus, split))
    data.check_recordings(utterances, {})
    expected = train.plateaus(utterances, alphabet, network)
    assert read_json(first_run.folder / 'config.json')[key] == pytest.approx(expected, rel=1e-6)


def test_best_pt_is_the_last_of_the_best_epochs(corpus, tmp_path, monkeypatch):
    """WERs of 50, 30, 30, 40 %: the third epoch's."""
    wers = iter([50.0, 30.0, 30.0, 40.0, 30.0])  # and of the one that is kept
    rates = monitor.error_rates(['a'], ['b'])
    outputs = {'entropy': 0.1, 'dependence_share': 1.0}
    scored = {}  # the weights that each split was last scored with

    def evaluate(task, utterances, beam=None):
        sentence = train.Sentence(0, 'a', 'b', '.', 'b')
        wer = next(wers) if utterances is task.splits.valid else 0.0
        for split in 'valid', 'test':
            if utterances is getattr(task.splits, split):
                scored[split] = copy.deepcopy(task.network.state_dict())
        return train.Evaluation(1.0, rates | {'wer': wer}, rates, outputs, [sentence])

    monkeypatch.setattr(train.Task, 'evaluate', evaluate)
    results = train_run(tmp_path, *corpus.flags, '--test_data', corpus.valid, '--epochs=4',
                        '--num_train_samples=2', *SMALL)
    best = torch.load(tmp_path / 'best.pt', weights_only=True)
    last = torch.load(tmp_path / 'last.pt', weights_only=True)
    assert best['run']['epoch'] == 3
    assert last['run']['epoch'] == 4
    assert results['valid']['wer'] == 30
    for split in 'valid', 'test':
        assert weight_distance(scored[split], best['model']) == 0  # the end scores what it keeps
        assert weight_distance(scored[split], last['model']) > 0
    assert [record['epoch'] for record in read_log(tmp_path)] == [1, 2, 3, 4]


def test_a_run_is_not_overwritten(first_run):
    """And that is said before data is read."""
    message = exit_code(train.main, '--train_data=missing.tsv', '--run_dir', first_run.folder)
    assert 'is not empty' in message


@pytest.mark.parametrize('workers,tolerance', [(0, 0), (1, 1e-3)])
def test_a_run_repeats_from_its_seed(workers, tolerance, corpus, tmp_path):
    """Bit for bit in the same process, of which another one may get other last bits.

    Dropout is large, so that other random numbers would show.
    """
    flags = [*corpus.flags, *SMALL, '--epochs=1', '--batch_size=2', '--num_train_samples=8',
             '--dropout=0.5']
    train_run(tmp_path / 'once', *flags)
    train_run(tmp_path / 'again', *flags, f'--workers={workers}')
    losses = [record['train_loss'] for record in read_log(tmp_path / 'once')]
    again = [record['train_loss'] for record in read_log(tmp_path / 'again')]
    assert again == pytest.approx(losses, rel=tolerance, abs=0)


def test_sentences_new_to_training_are_scored_by_themselves(corpus, tmp_path):
    rows = []
    for manifest in corpus.train, corpus.valid:
        for line in Path(manifest).read_text().splitlines():
            row = json.loads(line)
            rows.append(json_row(str(Path(manifest).parent / row['audio_filepath']), row['text']))
    test = tmp_path / 'both.jsonl'
    write_lines(test, rows)
    results = train_run(tmp_path / 'run', *corpus.flags, '--test_data', str(test), '--epochs=1',
                        *SMALL)
    assert results['test']['utterances'] == 26
    assert results['test_new'] == results['valid']
    assert results['test_new_beam'] == results['valid_beam']


def test_training_on_everything_keeps_the_last_checkpoint(corpus, tmp_path):
    run = tmp_path / 'run'
    results = train_run(run, '--train_data', corpus.train, '--valid_data=none', '--test_data',
                        corpus.valid, '--epochs=1', *SMALL)
    files = ['clip.wav', 'config.json', 'last.pt', 'log.jsonl', 'results.json', 'test.tsv']
    checkpoint = torch.load(run / 'last.pt', weights_only=True)
    assert results['valid'] is None
    assert results['test']['utterances'] == 6
    assert sorted(path.name for path in run.iterdir()) == files
    assert checkpoint['run']['test'] == results['test']
    assert read_json(run / 'config.json')['valid_plateaus'] is None


def test_bad_utterances_end_a_run(broken, corpus, tmp_path):
    run = tmp_path / 'run'
    message = exit_code(train.main, '--train_data', broken, '--valid_data', corpus.valid,
                        '--run_dir', run)
    for name in UNUSABLE:
        assert name in message
    assert not run.exists()


def test_bad_utterances_are_left_out(broken, corpus, tmp_path, capsys):
    train_run(tmp_path / 'run', '--train_data', str(broken), '--valid_data', corpus.valid,
              '--epochs=1', '--skip_bad', *SMALL)
    out = capsys.readouterr().out
    assert '4 broken utterances are left out' in out
    assert '11 utterances, ' in out


# ---- train: the fixes ----------------------------------------------------------------------------

@functools.cache
def effect(*flags):
    """What a fix may change, at the default settings: weights, lengths, optimiser, loop."""
    args = train.parse_flags(list(flags))
    torch.manual_seed(0)
    network = model.Recogniser(train.make_config(args))
    optimizer, schedule = train.make_optimizer(network, args, 100)
    weights = dict(network.named_parameters())
    lstm = network.recurrent[0].forward_lstm
    return {
        'output_init': network.head.weight.std().item(),
        'weight_init': network.deep.projection.weight.std().item(),
        'upsample': network.output_lengths(torch.arange(1, 9)).tolist(),
        'dropout': network.dropout.p,
        'squeeze_excite': 'blocks.0.squeeze_excite.reduce.weight' in weights,
        'forget_bias': (lstm.bias_ih_l0 + lstm.bias_hh_l0)[256:512].mean().item(),
        'learning_rate': optimizer.param_groups[0]['lr'],
        'schedule': type(schedule).__name__,
        'grad_clip': args.grad_clip,
        'weight_decay': optimizer.param_groups[0]['weight_decay'],
        'deep_path': 'early.projection.weight' in weights,
        'interctc': args.interctc_weight,
        'output_rate': network.output_lengths(100),
    }


@pytest.mark.parametrize('name', train.FIXES)
def test_undoing_a_fix_changes_what_it_is_about(name):
    assert effect('--undo', name)[name] != effect()[name]


@pytest.mark.parametrize('share,trained', [(1, False), (0.3, True)])
def test_a_share_of_the_loss_is_the_first_layers(share, trained, corpus, tmp_path):
    """Where it is all of the loss, the second layer is never trained."""
    train_run(tmp_path / 'run', *corpus.flags, '--epochs=1', '--weight_decay=0', *SMALL,
              f'--interctc_weight={share}')
    checkpoint = torch.load(tmp_path / 'run' / 'last.pt', weights_only=True)
    untrained = make_network(len(checkpoint['alphabet']), hidden=16, **FAST).state_dict()
    for name in 'recurrent.1.forward_lstm.weight_ih_l0', 'recurrent.0.forward_lstm.weight_ih_l0':
        same = torch.equal(checkpoint['model'][name], untrained[name])
        assert same == ('.1.' in name and not trained), name


def test_undo_all_is_everything_before():
    args = train.parse_flags(['--undo', 'all'])
    for fix in train.FIXES.values():
        assert getattr(args, fix.setting) == fix.before


def test_undo_ours_leaves_the_fixes_of_the_original():
    args, today = train.parse_flags(['--undo', 'ours']), train.parse_flags([])
    config, config_today = train.make_config(args), train.make_config(today)
    assert config.deep_path == 'alone'
    assert config.frames_per_output == 1
    assert args.interctc_weight == 0
    assert args.learning_rate == today.learning_rate
    assert config.output_init == config_today.output_init


def test_only_takes_back_all_the_others():
    args = train.parse_flags(['--only', 'dropout', 'schedule'])
    assert train.make_config(args).dropout == model.Config(1).dropout
    assert args.schedule == 'onecycle'
    assert args.grad_clip == 1.0
    assert train.make_config(args).squeeze_excite


def test_a_flag_and_an_undone_fix_must_not_set_the_same():
    with pytest.raises(data.DataError, match='--dropout sets what undoing dropout sets too'):
        train.parse_flags(['--undo', 'dropout', '--dropout', '0.1'])
    with pytest.raises(data.DataError, match='exclude each other'):
        train.parse_flags(['--undo', 'dropout', '--only', 'dropout'])


def test_an_unknown_fix_is_answered_with_the_list(capsys):
    assert exit_code(train.main, '--undo', 'luck') == 2
    err = capsys.readouterr().err
    for name in train.FIXES:
        assert name in err


@slow
@pytest.mark.parametrize('flags', [*(f'--undo {name}' for name in [*train.FIXES, 'all', 'ours']),
                                   *(f'--only {name}' for name in train.FIXES)])
def test_every_choice_of_fixes_trains(flags, corpus, tmp_path):
    results = train_run(tmp_path, *corpus.flags, '--epochs=1', *flags.split())
    assert results['updates'] == 3
    assert json.loads((tmp_path / 'log.jsonl').read_text())['nonfinite'] == 0


# ---- train: runs survive -------------------------------------------------------------------------

SURVIVOR = ['--epochs=4', '--batch_size=2', '--learning_rate=1e-4', *SMALL]


def outcome(folder):
    """All that a finished run leaves, without the seconds and its name."""
    def timeless(record):
        return {key: value for key, value in record.items() if not key.endswith('seconds')}

    weights = {}
    for file in 'best.pt', 'last.pt':
        for name, weight in torch.load(folder / file, weights_only=True)['model'].items():
            weights[f'{file} {name}'] = weight.numpy().tobytes()
    return {
        'log': [timeless(record) for record in read_log(folder)],
        'results': timeless(read_json(folder / 'results.json')),
        'weights': weights,
        'sentences': [(folder / file).read_text() for file in ('valid.tsv', 'test.tsv')],
        'clip': (folder / 'clip.wav').read_bytes(),
        'files': sorted(path.name for path in folder.iterdir()),
    }


def start_training(*flags, **options):
    """python train.py ... in a process of its own, with one thread."""
    return subprocess.Popen([sys.executable, train.__file__, *map(str, flags)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1'},
                            **options)


@pytest.fixture(scope='session')
def uninterrupted(corpus, tmp_path_factory):
    """A run that nobody ends, while others are killed -> (its flags, its folder, its process)."""
    folder = tmp_path_factory.mktemp('whole') / 'run'
    flags = [*corpus.flags, '--test_data', corpus.valid, *SURVIVOR]
    return flags, folder, start_training(*flags, '--run_dir', folder)


def kill_at(process, folder, kill_signal, rng):
    """End a run: half of the times at a random moment, else while it writes a file.

    Not before its first words: Ctrl-C while Python imports is Python's own to answer.
    """
    process.stdout.readline()
    while process.poll() is None and not (folder / 'config.json').exists():
        time.sleep(0.01)
    if rng.random() < 0.5:
        time.sleep(rng.uniform(0, 2))
    else:
        files = rng.randint(1, 10)
        written = set()
        while process.poll() is None and len(written) < files:
            for path in folder.glob('unfinished.*'):
                with contextlib.suppress(OSError):  # it may be in its place by now
                    written.add((path.name, path.stat().st_ino))
        time.sleep(rng.uniform(0, 0.003))
    process.send_signal(kill_signal)
    return process.communicate()[1]


def survive(uninterrupted, folder, kill_signal, rng, kills):
    """Kill a run this often and let it finish; it must leave what the uninterrupted one leaves."""
    flags, whole, whole_process = uninterrupted
    command = [*flags, '--run_dir', folder]
    for _ in range(kills):
        err = kill_at(start_training(*command), folder, kill_signal, rng)
        assert err.count('\n') <= 1, err
        command = ['--resume', folder]
    process = start_training(*command)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert whole_process.wait() == 0, whole_process.stderr.read()
    expected = outcome(whole)
    for key, value in outcome(folder).items():
        assert value == expected[key], key


def test_a_killed_run_goes_on_as_if_nothing_had_been(uninterrupted, tmp_path):
    survive(uninterrupted, tmp_path / 'run', signal.SIGKILL, random.Random(9), kills=1)


@slow
def test_forty_killed_runs_go_on_as_if_nothing_had_been(uninterrupted, tmp_path):
    signals = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
    for i in range(40):
        survive(uninterrupted, tmp_path / f'{i}', signals[i % 3], random.Random(i), kills=2)


def stop_after(epochs, monkeypatch):
    """Have training in this process stop, as by Ctrl-C, when this many epochs are done."""
    whole_epoch = train.Learner.train

    def stopping(learner, epoch):
        if epoch > epochs:
            raise KeyboardInterrupt
        return whole_epoch(learner, epoch)

    monkeypatch.setattr(train.Learner, 'train', stopping)


@pytest.fixture(scope='session')
def stopped_run(corpus, tmp_path_factory):
    """The folder of a run that was stopped after the second of three epochs."""
    folder = tmp_path_factory.mktemp('stopped') / 'run'
    with pytest.MonkeyPatch.context() as context:
        stop_after(2, context)
        message = exit_code(train.main, *corpus.flags, '--epochs=3', '--dropout=0.2', *SMALL,
                            '--run_dir', folder)
    assert message == f'train.py: stopped; to go on: python train.py --resume {folder}'
    return folder


@pytest.fixture
def stopped(stopped_run, tmp_path):
    """A copy of it, to be changed."""
    return Path(shutil.copytree(stopped_run, tmp_path / 'run'))


def test_a_resumed_run_has_its_own_settings(stopped):
    assert 'config.json' in [path.name for path in stopped.iterdir()]
    assert exit_code(train.main, '--resume', stopped, '--dropout=0.3').endswith(
        '--dropout 0.3 contradicts the run, which has 0.2; remove this flag')
    message = exit_code(train.main, '--resume', stopped, '--epochs=5')
    assert f'--init_from {stopped}/last.pt starts a new run' in message
    results = train.main(['--resume', str(stopped), '--dropout=0.2'])
    assert results['updates'] == 9


def test_a_resumed_run_trains_what_is_left_and_ends_alike(stopped, corpus, tmp_path, monkeypatch):
    train_run(tmp_path / 'whole', *corpus.flags, '--epochs=3', '--dropout=0.2', *SMALL)
    epochs = []
    whole_epoch = train.Learner.train

    def recorded(learner, epoch):
        epochs.append(epoch)
        return whole_epoch(learner, epoch)

    monkeypatch.setattr(train.Learner, 'train', recorded)
    train.main(['--resume', str(stopped)])
    whole, resumed = [torch.load(folder / 'last.pt', weights_only=True)['model']
                      for folder in (tmp_path / 'whole', stopped)]
    assert epochs == [3]
    assert weight_distance(whole, resumed) == 0


def test_a_finished_run_says_so(stopped, capsys):
    train.main(['--resume', str(stopped)])
    train.main(['--resume', str(stopped)])
    assert 'is finished: nothing is left to do' in capsys.readouterr().out
    (stopped / 'results.json').write_text('[]')
    assert 'results.json: is damaged' in exit_code(train.main, '--resume', stopped)


def test_a_run_is_resumed_where_its_paths_lead(tmp_path, monkeypatch):
    """Those of its data are kept as they were typed."""
    write_corpus(tmp_path / 'c', ['ab', 'ba'])
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as context:
        stop_after(0, context)
        exit_code(train.main, '--train_data=c/manifest.jsonl', '--valid_data=none', '--epochs=1',
                  *SMALL, '--run_dir=run')
    monkeypatch.chdir(tmp_path / 'c')
    message = exit_code(train.main, '--resume=../run')
    assert 'its --train_data c/manifest.jsonl is not found from here; go to the folder' in message


def test_a_finished_run_needs_no_data(stopped, capsys):
    train.main(['--resume', str(stopped)])
    config = read_json(stopped / 'config.json') | {'train_data': 'gone.jsonl'}
    (stopped / 'config.json').write_text(json.dumps(config))
    train.main(['--resume', str(stopped)])
    assert 'is finished: nothing is left to do' in capsys.readouterr().out


def test_data_that_changed_is_named(stopped, corpus, monkeypatch):
    """The validation texts, all but one of them: another corpus."""
    whole = data.read_corpus

    def shorter(path, split='train'):
        utterances, faults = whole(path, split)
        return (utterances[1:] if split == 'valid' else utterances), faults

    monkeypatch.setattr(data, 'read_corpus', shorter)
    message = exit_code(train.main, '--resume', stopped)
    assert 'the texts or recordings of valid are no longer those of the run' in message


def test_a_run_stopped_in_its_first_epoch_begins_anew(corpus, tmp_path, monkeypatch):
    with monkeypatch.context() as context:
        stop_after(0, context)
        exit_code(train.main, *corpus.flags, '--epochs=1', *SMALL, '--run_dir', tmp_path / 'run')
    assert train.main(['--resume', str(tmp_path / 'run')])['updates'] == 3


def test_a_damaged_state_is_named(stopped):
    (stopped / 'state.pt').write_bytes(b'x')
    message = exit_code(train.main, '--resume', stopped)
    assert 'state.pt: cannot be resumed from' in message


def test_a_lost_state_is_named(stopped):
    (stopped / 'state.pt').unlink()
    message = exit_code(train.main, '--resume', stopped)
    assert 'state.pt: is missing' in message


def test_a_lost_checkpoint_comes_back(stopped):
    """best.pt too, where an earlier epoch is the best: the state holds it."""
    (stopped / 'best.pt').unlink()
    (stopped / 'log.jsonl').unlink()
    train.main(['--resume', str(stopped)])
    assert (stopped / 'best.pt').exists()
    assert [record['epoch'] for record in read_log(stopped)] == [1, 2, 3]


@pytest.mark.parametrize('change,complaint', [
    (lambda config: config | {'learning_rate': 0.1}, 'is not what the run began with'),
    (lambda config: {key: config[key] for key in config if key != 'seed'}, 'it lacks seed'),
    (lambda config: [], 'config.json is damaged')])
def test_settings_that_changed_are_named(change, complaint, stopped):
    config = read_json(stopped / 'config.json')
    (stopped / 'config.json').write_text(json.dumps(change(config)))
    assert complaint in exit_code(train.main, '--resume', stopped)


def test_a_text_of_the_character_model_that_changed_is_named(corpus, tmp_path, monkeypatch):
    text = tmp_path / 'book.txt'
    text.write_text('go left\n')
    with monkeypatch.context() as context:
        stop_after(1, context)
        exit_code(train.main, *corpus.flags, '--epochs=2', *SMALL, '--lm_text', text, '--run_dir',
                  tmp_path / 'run')
    text.write_text('go right\n')
    message = exit_code(train.main, '--resume', tmp_path / 'run')
    assert 'the texts or recordings of --lm_text are no longer those of the run' in message


def test_recordings_that_changed_are_named(stopped, corpus, monkeypatch):
    """The same number of samples, other ones."""
    read = Path.read_bytes
    monkeypatch.setattr(Path, 'read_bytes', lambda path: read(path)[::-1])
    message = exit_code(train.main, '--resume', stopped)
    assert 'the texts or recordings of train are no longer those of the run' in message


def test_weights_to_start_from_are_not_forgotten(first_run, corpus, tmp_path, monkeypatch):
    """By a run that was stopped in its first epoch."""
    with monkeypatch.context() as context:
        stop_after(0, context)
        exit_code(train.main, *corpus.flags, '--epochs=1', '--learning_rate=0', '--init_from',
                  first_run.folder / 'best.pt', '--run_dir', tmp_path / 'run')
    train.main(['--resume', str(tmp_path / 'run')])
    before = torch.load(first_run.folder / 'best.pt', weights_only=True)['model']
    after = torch.load(tmp_path / 'run' / 'last.pt', weights_only=True)['model']
    assert torch.equal(before['head.weight'], after['head.weight'])


def test_two_runs_cannot_share_a_folder(corpus, tmp_path):
    """The second is told, while the first holds its lock, and may begin once that has ended."""
    flags = [*corpus.flags, '--epochs=1', *SMALL, '--run_dir', tmp_path]
    with contextlib.ExitStack() as held:
        train.lock(tmp_path, held)
        assert 'another run is at work there' in exit_code(train.main, *flags)
    train.main([str(flag) for flag in flags])


def test_default_folders_have_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, 'strftime', lambda form: 'runs/now')
    with contextlib.ExitStack() as held:
        names = [train.make_folder(None, held).name for _ in range(3)]
    assert names == ['now', 'now-2', 'now-3']


@slow
def test_a_full_disk_ends_a_run_in_a_line(corpus, tmp_path):
    """Files of 200 kB at most: state.pt has no room; what was there before it stays."""
    resource = pytest.importorskip('resource')

    def small_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    folder = tmp_path / 'run'
    run = start_training(*corpus.flags, '--epochs=1', *SMALL, '--run_dir', folder,
                         preexec_fn=small_disk)
    _, err = run.communicate()
    assert run.returncode == 1
    assert err.count('\n') == 1
    assert 'state.pt' in err
    assert f'--resume {folder}' in err
    assert [path.name for path in folder.iterdir()] == ['config.json']
    assert train.main(['--resume', str(folder)])['updates'] == 3


@slow
def test_a_closed_pipe_ends_a_run_in_a_line(corpus, tmp_path):
    run = start_training(*corpus.flags, '--epochs=1', *SMALL, '--run_dir', tmp_path / 'run')
    run.stdout.close()
    err = run.stderr.read()
    assert run.wait() == 1
    assert err.count('\n') == 1
    assert 'the program that read its output has ended' in err


def test_a_file_is_whole_or_as_it_was(tmp_path):
    (tmp_path / 'file').write_text('before')
    with pytest.raises(ZeroDivisionError), data.whole_file(tmp_path / 'file') as file:
        file.write(b'half of wh')
        raise ZeroDivisionError
    assert (tmp_path / 'file').read_text() == 'before'
    with data.whole_file(tmp_path / 'file') as file:
        file.write(b'after')
    assert (tmp_path / 'file').read_text() == 'after'
    assert [path.name for path in tmp_path.iterdir()] == ['file']


@pytest.mark.parametrize('samples,first_lost,complaint', [
    (20, 2, '10 updates in a row had gradients that are not finite'),
    (4, 0, 'no update of the epoch had finite gradients')])
def test_lost_updates_end_a_run(samples, first_lost, complaint, corpus, tmp_path, monkeypatch):
    clip = monitor.Gradients.clip

    def losing(gradients, maximum):
        clip(gradients, maximum)
        return gradients.updates <= first_lost

    monkeypatch.setattr(monitor.Gradients, 'clip', losing)
    message = exit_code(train.main, *corpus.flags, f'--num_train_samples={samples}',
                        '--batch_size=1', '--epochs=1', *SMALL, '--run_dir', tmp_path / 'run')
    assert complaint in message
    assert '.wav' in message
    assert 'lower --learning_rate' in message


def test_an_update_without_finite_gradients_is_left_out(corpus, tmp_path, monkeypatch):
    clip = monitor.Gradients.clip

    def poisoned(gradients, maximum):
        if gradients.updates == 1:
            gradients.groups['head'][0].grad.fill_(math.nan)
        return clip(gradients, maximum)

    monkeypatch.setattr(monitor.Gradients, 'clip', poisoned)
    train_run(tmp_path / 'run', *corpus.flags, '--epochs=1', *SMALL)
    record, = read_log(tmp_path / 'run')
    assert record['nonfinite'] == 1
    assert record['updates'] == 3


@pytest.mark.parametrize('workers', [0, 1])
def test_a_broken_recording_that_training_meets_is_a_line(workers, tmp_path, monkeypatch):
    """Those of large corpora are not decoded beforehand."""
    monkeypatch.setattr(train, 'CHECK_UP_TO', 0)
    texts = ['ab', 'cd', 'ba', 'dc']
    manifest = write_corpus(tmp_path, texts)
    duration = soundfile.info(tmp_path / '0.wav').duration
    write_lines(manifest, [json_row(f'{i}.wav', text, duration=duration)
                           for i, text in enumerate(texts)])
    content = (tmp_path / '2.wav').read_bytes()
    (tmp_path / '2.wav').write_bytes(content[:len(content) // 2])
    message = exit_code(train.main, '--train_data', manifest, '--valid_data=none', '--epochs=1',
                        f'--workers={workers}', *SMALL, '--run_dir', tmp_path / 'run')
    assert message.startswith(f'train.py: {tmp_path / "2.wav"}: is cut off')
    assert message.count('\n') == 0
    assert multiprocessing.active_children() == []


def send_to_loaders(number, monkeypatch):
    """Have each process that loads recordings get this signal at its first."""
    trained = data.Speech.__getitem__
    first = os.getpid()

    def signalled(speech, key):
        if os.getpid() != first:
            os.kill(os.getpid(), number)
        return trained(speech, key)

    monkeypatch.setattr(data.Speech, '__getitem__', signalled)


def test_a_killed_loader_is_a_line(corpus, tmp_path, monkeypatch):
    """As the system kills it where memory is short."""
    send_to_loaders(signal.SIGKILL, monkeypatch)
    message = exit_code(train.main, *corpus.flags, '--workers=1', *SMALL, '--run_dir', tmp_path)
    assert message.startswith('train.py: a process that loads recordings has ended')
    assert message.endswith(f'with --workers 0; to go on: python train.py --resume {tmp_path}')
    assert message.count('\n') == 0


def test_loaders_take_no_shared_memory(corpus):
    """Of which a container has little, and PyTorch waits for ever where there is none."""
    speech = data.Speech(read_utterances(corpus.valid), ['', *'abcdefgh '])
    one, = data.loader(speech, [[(0, 0), (0, 1)]], workers=1)
    other, = data.loader(speech, [[(0, 0), (0, 1)]])
    for a, b in zip(one, other):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    assert not one.mels.is_shared()


def test_an_impatient_second_interrupt_changes_nothing(monkeypatch):
    monkeypatch.setattr(train.stop, 'asked', None)
    with pytest.raises(KeyboardInterrupt):
        train.stop(signal.SIGINT, None)
    train.stop(signal.SIGINT, None)
    monkeypatch.setattr(train.stop, 'asked', time.monotonic() - 3)
    with pytest.raises(KeyboardInterrupt):
        train.stop(signal.SIGTERM, None)


def test_an_interrupt_that_python_could_not_raise_ends_a_run(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(train.stop, 'asked', time.monotonic())
    message = exit_code(train.main, *corpus.flags, '--epochs=1', *SMALL, '--run_dir', tmp_path)
    assert message.startswith('train.py: stopped; to go on')


def test_loaders_leave_the_interrupt_to_the_run(corpus, tmp_path, monkeypatch):
    """Of Ctrl-C, which a terminal sends to all of them, the run makes its line."""
    send_to_loaders(signal.SIGINT, monkeypatch)
    results = train_run(tmp_path, *corpus.flags, '--workers=1', '--epochs=1', *SMALL)
    assert results['updates'] == 3


def test_weights_that_no_longer_give_a_loss_end_a_run(corpus, tmp_path, monkeypatch):
    """As one update of --learning_rate=1e10 leaves them; nothing is saved."""
    lost = train.Evaluation(math.nan, {}, None, {}, [])
    monkeypatch.setattr(train, 'evaluate', lambda *args, **flags: lost)
    message = exit_code(train.main, *corpus.flags, '--valid_data=none', '--num_train_samples=4',
                        *SMALL, '--run_dir', tmp_path / 'run')
    assert 'training diverged in epoch 1: the train_eval_loss is nan' in message
    assert [path.name for path in (tmp_path / 'run').iterdir()] == ['config.json']


# ---- train: weights of another run ---------------------------------------------------------------

def test_a_run_can_start_from_anothers_weights(first_run, corpus, tmp_path):
    train_run(tmp_path / 'run', *corpus.flags, '--epochs=1', '--learning_rate=0', '--init_from',
              str(first_run.folder / 'best.pt'))
    before = torch.load(first_run.folder / 'best.pt', weights_only=True)['model']
    after = torch.load(tmp_path / 'run' / 'last.pt', weights_only=True)['model']
    for name in 'head.weight', 'gate', 'recurrent.1.forward_lstm.weight_hh_l0':
        assert torch.equal(before[name], after[name]), name


def test_another_alphabet_gets_a_new_head(first_run, tmp_path, capsys):
    manifest = str(write_corpus(tmp_path / 'c', ['ab', 'ba']))
    train_run(tmp_path / 'run', '--train_data', manifest, '--valid_data', manifest, '--epochs=1',
              '--learning_rate=0', '--init_from', str(first_run.folder / 'best.pt'))
    before = torch.load(first_run.folder / 'best.pt', weights_only=True)['model']
    after = torch.load(tmp_path / 'run' / 'last.pt', weights_only=True)['model']
    assert 'the head is new' in capsys.readouterr().out
    assert torch.equal(before['gate'], after['gate'])
    assert before['head.weight'].shape != after['head.weight'].shape


def test_weights_of_another_network_are_refused(first_run, corpus):
    message = exit_code(train.main, *corpus.flags, '--hidden=8', '--init_from',
                        first_run.folder / 'best.pt')
    assert message.endswith('it has hidden 256; give it the same')


# ---- train: scoring ------------------------------------------------------------------------------

def test_what_was_said_and_heard_is_left(by_heart):
    """Of two sentences that were learnt by heart."""
    header, *lines = (by_heart.folder / 'valid.tsv').read_text().splitlines()
    assert header == 'file\tsaid\theard\tbeam'
    assert sorted(lines) == ['0.wav\tseven two nine\tseven two nine\tseven two nine',
                             '1.wav\tlight go\tlight go\tlight go']


def test_a_checkpoint_is_scored_on_any_corpus(by_heart, tmp_path):
    results = train_run(tmp_path / 'score', '--evaluate', str(by_heart.checkpoint),
                        '--test_data', str(by_heart.folder.parent / 'm.jsonl'))
    assert results['test']['wer'] == results['test_beam']['wer'] == 0
    assert results['test']['words'] == 5
    rows, rows_of_the_run = [sorted((folder / file).read_text().splitlines()) for folder, file in (
        (tmp_path / 'score', 'test.tsv'), (by_heart.folder, 'valid.tsv'))]
    assert rows == rows_of_the_run


def test_a_checkpoint_to_score_that_is_missing_is_named(corpus):
    message = exit_code(train.main, '--evaluate=none.pt', '--test_data', corpus.valid)
    assert message.startswith('train.py: --evaluate none.pt: no such file')


def test_utterances_that_ctc_cannot_align_are_scored(tmp_path):
    """A text too long for its clip, one in letters that training lacks: errors, no loss."""
    manifest = write_corpus(tmp_path / 'c', ['ab', 'cd', 'ba', 'dc'])
    valid = tmp_path / 'c' / 'valid.jsonl'
    write_lines(valid, [json_row('0.wav', text) for text in ('ab', 'abcd ' * 30, 'xyz')])
    results = train_run(tmp_path / 'run', '--train_data', str(manifest), '--valid_data', str(valid),
                        '--epochs=1', *SMALL)
    assert results['valid']['utterances'] == 3
    assert results['valid']['words'] == 32
    record, = read_log(tmp_path / 'run')
    assert 0 < record['valid_loss'] < math.inf


def test_scoring_refuses_flags_of_training(first_run, corpus):
    message = exit_code(train.main, '--evaluate', first_run.folder / 'best.pt', '--test_data',
                        corpus.valid, '--epochs=3')
    assert message.endswith('so --epochs has no effect; remove it')


@pytest.mark.parametrize('flags,name', [
    ('--overfit=2 --valid_data=nowhere', 'valid_data'),
    ('--overfit=2 --concat=0.5', 'concat'),
    ('--beam=0 --lm_weight=1', 'lm_weight'),
    ('--json', 'json'),
])
def test_flags_without_effect_are_named(flags, name):
    message = exit_code(train.main, *flags.split())
    assert message.endswith(f'so --{name} has no effect; remove it')


@pytest.mark.parametrize('argv,words', [
    (['clip.wav', '--valid_data=v.jsonl'], '--valid_data is for a corpus'),
    (['corpus', '--speaker=3'], '--speaker is for --say'),
])
def test_flags_of_data_without_effect_are_named(argv, words):
    assert words in exit_code(data.main, *argv)


def test_another_folder_of_the_built_in_corpuss_name_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('corpus').mkdir()
    message = exit_code(train.main)
    assert 'corpus is not the built-in corpus; rename or delete that folder' in message


def test_a_clusters_own_ranks_are_not_torchruns(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert train_run(tmp_path, *corpus.flags, '--epochs=1', *SMALL)['updates'] == 3


def test_a_flag_without_a_name_is_refused():
    assert '--resume is given without a name' in exit_code(train.main, '--resume', '')


def test_scoring_needs_a_corpus(first_run):
    message = exit_code(train.main, '--evaluate', first_run.folder / 'best.pt')
    assert '--evaluate needs --test_data' in message


# ---- train: the verdict of --overfit -------------------------------------------------------------

def test_overfit_stops_when_all_is_learnt(by_heart):
    log = read_log(by_heart.folder)
    assert log[-1]['cer'] == 0
    assert len(log) < 7


def test_overfit_says_what_was_not_learnt(corpus, tmp_path):
    message = exit_code(train.main, '--train_data', corpus.train, '--valid_data=none',
                        '--overfit=3', '--epochs=1', '--learning_rate=1e-9', '--batch_size=2',
                        '--run_dir', tmp_path / 'run', *SMALL)
    assert 'NOT LEARNT' in message
    assert f'python monitor.py {tmp_path / "run"} says' in message


def test_overfit_says_that_learning_takes_longer(tmp_path):
    """Epochs that were too few are no fault of the data."""
    task = SimpleNamespace(updates_an_epoch=50, splits=SimpleNamespace(train=[1, 2, 3]))
    best = {'run': {'valid': {'cer': 6.6}}}
    state = train.RunState(epoch=7, records=[{'phase': 'learning'}], best=best)
    with pytest.raises(data.DataError, match='still learning, so give it more, as by --epochs 14'):
        train.print_verdict(task, tmp_path, state)


# ---- train: two processes ------------------------------------------------------------------------

def weight_distance(a, b):
    """Between two state dicts, over all that is no count of batches."""
    distances = [(a[name] - b[name]).norm() for name in a if 'num_batches' not in name]
    return sum(distances).item()


def test_two_processes_train_as_one(corpus, tmp_path):
    """torchrun's two processes average their gradients.

    All utterances share one recording, so that batch norm has the same statistics in both, and
    differ in their texts, so that each has gradients of its own. Without dropout, both take the
    steps of one process.
    """
    recording = Path(corpus.train).parent / '0.wav'
    manifest = tmp_path / 'manifest.jsonl'
    write_lines(manifest, [json_row(str(recording), text) for text in random_texts(8, 4)])
    flags = ['--train_data', str(manifest), '--valid_data', corpus.valid, '--epochs=2',
             '--batch_size=8', '--dropout=0', '--no-speed_perturb', *SMALL]
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
               train.__file__, *flags, '--run_dir', str(tmp_path / 'two')]
    two = subprocess.run(command, capture_output=True, text=True)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count('epoch   2') == 1
    results = train_run(tmp_path / 'one', *flags)
    assert results['updates'] == 2
    assert read_json(tmp_path / 'two' / 'results.json')['updates'] == 2
    by_one = torch.load(tmp_path / 'one' / 'last.pt', weights_only=True)
    by_two = torch.load(tmp_path / 'two' / 'last.pt', weights_only=True)
    untrained = make_network(vocab_size=len(by_one['alphabet']), hidden=16, **FAST)
    change = weight_distance(by_one['model'], untrained.state_dict())
    assert weight_distance(by_one['model'], by_two['model']) < 0.01 * change


@slow
def test_two_processes_resume_and_end_together(corpus, tmp_path):
    """One killed ends both within ten seconds; the run then goes on as one that was not ended."""
    flags = [*corpus.flags, '--test_data', corpus.valid, *SURVIVOR]
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                train.__file__]
    options = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True,
               'env': os.environ | {'OMP_NUM_THREADS': '1'}}
    whole = subprocess.run([*torchrun, *flags, '--run_dir', tmp_path / 'whole'], **options)
    assert whole.returncode == 0, whole.stderr
    run = subprocess.Popen([*torchrun, *flags, '--run_dir', tmp_path / 'run'], **options)
    while not (tmp_path / 'run' / 'state.pt').exists():
        time.sleep(0.01)
    children = subprocess.run(['pgrep', '-P', str(run.pid)], capture_output=True, text=True)
    victim = int(children.stdout.split()[-1])
    start = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    run.communicate()
    assert time.monotonic() - start < 10
    resumed = subprocess.run([*torchrun, '--resume', tmp_path / 'run'], **options)
    assert resumed.returncode == 0, resumed.stderr
    expected = outcome(tmp_path / 'whole')
    for key, value in outcome(tmp_path / 'run').items():
        assert value == expected[key], key


@slow
def test_an_error_in_the_data_is_said_once(corpus):
    run = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone',
                          '--nproc_per_node=2', train.__file__, '--train_data=nowhere.jsonl'],
                         capture_output=True, text=True)
    assert run.stderr.count('nowhere.jsonl: cannot be read as a corpus') == 1


# ---- train: speed --------------------------------------------------------------------------------

def test_benchmark_prints_one_object(corpus, tmp_path, capsys):
    run = tmp_path / 'run'
    result = train_run(run, *corpus.flags, '--benchmark', '--json', *SMALL)
    assert json.loads(capsys.readouterr().out) == result
    assert not run.exists()
    for key, value in result.items():
        assert value > 0, key
    assert result['padding in training, %'] < 30


def test_benchmark_prints_a_table(corpus, capsys):
    train.main([*corpus.flags, '--benchmark', '--num_train_samples=8', *SMALL])
    assert 'inference, batch 16' in capsys.readouterr().out


class PackedLSTM(nn.LSTM):
    """A bidirectional layer as in textbooks, on packed sequences."""

    def __init__(self, layer):
        """layer: the BiLSTM whose weights it takes."""
        lstm = layer.forward_lstm
        super().__init__(lstm.input_size, lstm.hidden_size, batch_first=True, bidirectional=True)
        weights = layer.forward_lstm.state_dict()
        for name, weight in layer.backward_lstm.state_dict().items():
            weights[f'{name}_reverse'] = weight
        self.load_state_dict(weights)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True,
                                                   enforce_sorted=False)
        states, _ = super().forward(packed)
        padded, _ = nn.utils.rnn.pad_packed_sequence(states, batch_first=True,
                                                     total_length=x.shape[1])
        return padded


def timed_epoch(network, batches):
    """-> (the loss of the first batch, the seconds of a pass over all)."""
    args = train.parse_flags([])
    optimizer, schedule = train.make_optimizer(network, args, 100)
    gradients = monitor.Gradients(network, train.PARTS)
    outputs = monitor.Outputs(18, 1)

    def update(batches):
        return train.train_epoch(network, batches, optimizer, schedule, gradients, outputs, args)

    loss = update(batches[:1])
    start = time.perf_counter()
    update(batches)
    return loss, time.perf_counter() - start


@slow
@pytest.mark.parametrize('frames_per_output,times', [(4, 1.5), (2, 1.7), (1, 3)])
def test_an_update_is_faster_than_in_textbook_form(frames_per_output, times, tmp_path, monkeypatch):
    """The same network with packed sequences and PyTorch's default memory format.

    On the same batches of the built-in corpus both get the same gradients, one gets them later.
    """
    monkeypatch.chdir(tmp_path)
    speech = data.Speech(read_utterances(data.builtin_corpus()['train']),
                         ['', ' ', *'efghilnorstuvwxz'])
    batches = list(data.loader(speech, data.training_batches(speech, 8, 0)[:12]))
    config = {'vocab_size': 18, 'frames_per_output': frames_per_output, 'dropout': 0.0}
    textbook = make_network(**config)
    textbook.recurrent = nn.ModuleList(PackedLSTM(layer) for layer in textbook.recurrent)
    textbook.to(memory_format=torch.contiguous_format)
    loss, seconds = timed_epoch(make_network(**config), batches)
    monkeypatch.setattr(torch, 'channels_last', torch.contiguous_format)
    textbook_loss, textbook_seconds = timed_epoch(textbook, batches)
    print(f'textbook form {textbook_seconds:.1f} s, ours {seconds:.1f} s')
    assert textbook_loss == pytest.approx(loss, rel=1e-4)
    assert textbook_seconds > times * seconds


def start_benchmark(manifest):
    """-> (the first line it prints, when training could start; seconds until then; its result)."""
    command = [sys.executable, '-u', train.__file__, '--train_data', str(manifest),
               '--valid_data=none', '--benchmark', '--json']
    start = time.perf_counter()
    # From a shell: Linux gives a process the peak memory of the one that it was forked from.
    process = subprocess.Popen(f'{shlex.join(command)}; true', shell=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    first = process.stdout.readline()
    seconds = time.perf_counter() - start
    rest, _ = process.communicate()
    return first, seconds, json.loads(rest.splitlines()[-1])


@slow
def test_100_000_utterances_start_within_20_seconds(tmp_path):
    """With durations in the manifest no file is opened before it is needed."""
    text = 'one two three four five six seven'
    wave, _ = data.synthesise(text)
    soundfile.write(tmp_path / 'one.wav', wave, 16000)
    row = json_row('one.wav', text, duration=len(wave) / 16000)
    peaks = []
    for n in 100, 100_000:
        write_lines(tmp_path / f'{n}.jsonl', [row] * n)
        first, seconds, result = start_benchmark(tmp_path / f'{n}.jsonl')
        assert first.startswith(f'{n} utterances')
        peaks.append(result['peak memory, MB'])
    print(f'{seconds:.0f} s; {peaks[0]} MB for 100 utterances, {peaks[1]} MB for 100,000')
    assert seconds < 20
    assert peaks[1] < peaks[0] + 300


# ---- train: the first command --------------------------------------------------------------------

def word_edge_errors(checkpoint, speaker, text):
    """Seconds between the words' edges as heard and as spoken, [] where other words were heard."""
    wave, spans = data.synthesise(text, speaker)
    words = model.transcribe(checkpoint, torch.tensor(wave)).words
    errors = []
    if [word.text for word in words] == text.split():
        for word, (_, start, end) in zip(words, spans):
            errors += [abs(word.start - start), abs(word.end - end)]
    return errors


@slow
def test_the_first_command_and_word_times(tmp_path, monkeypatch, capsys):
    """python train.py and the command it prints.

    Then word times of new sentences by unseen speakers, against the synthesiser's own.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'orig_argv', [sys.executable])  # .venv/bin/python is not found here
    results = train.main([])
    promise, command = capsys.readouterr().out.strip().splitlines()[-2:]
    heard = subprocess.run(command, shell=True, capture_output=True, text=True).stdout.strip()
    assert f'("{heard}")' in promise
    _, _, best, *_ = shlex.split(command)
    checkpoint = model.load_checkpoint(best)
    untrained = model.Recogniser(checkpoint.network.config)
    test = data.Speech(read_utterances('corpus/test.jsonl'), checkpoint.alphabet)
    untrained_wer = train.evaluate(untrained, test).rates['wer']
    rng = np.random.default_rng(0)
    errors = []
    for speaker in range(900, 950):
        text = ' '.join(rng.choice(list(data.WORDS), 5))
        errors += word_edge_errors(checkpoint, speaker, text)
    print(f'{results}\nuntrained: WER {untrained_wer:.0f} %; median error of {len(errors)} edges '
          f'{1000 * np.median(errors):.0f} ms')
    assert results['test']['wer'] <= 3
    assert results['train_seconds'] <= 400
    assert untrained_wer >= 99
    assert len(errors) > 400
    assert np.median(errors) <= 0.03


# ---- the README ----------------------------------------------------------------------------------

README = Path(__file__).with_name('README.md')


def test_the_example_of_the_readme_runs_as_it_is_written(capsys):
    _, example, rest = re.split('```(?:python)?\n', README.read_text(encoding='utf-8'))
    exec(example, {})
    assert capsys.readouterr().out.strip() == rest.strip().split('\n')[0].strip()


def readme_commands():
    """Every command of the README that begins with python, optional parts included."""
    text = README.read_text()
    indented = re.findall(r'^    (python (?:.*\\\n)*.*)', text, flags=re.M)
    inline = re.findall(r'`(python [^`]*)`', re.sub(r'```.*?```', '', text, flags=re.S))
    commands = []
    for command in indented + inline:
        command = re.sub(r'\s+#.*', '', command.replace('\\\n', ' '))
        commands.append(' '.join(re.sub(r'[][]', '', command).split()))
    return commands


@slow
def test_every_command_of_the_readme_runs(corpus, tmp_path, monkeypatch):
    """On tones, with a small network and few epochs; what a name stands for is put in its place."""
    monkeypatch.chdir(tmp_path)
    utterances = read_utterances(corpus.train)
    for name in 'my/train.tsv', 'my/test.tsv', 'other.tsv':
        write_lines(Path(name), ['path\tsentence', *(f'{u.path}\t{u.text}' for u in utterances)])
    for name in 'corpus/train', 'corpus/valid', 'corpus/test', 'kathleen/fit', 'kathleen/dev':
        write_lines(Path(f'{name}.jsonl'), [json_row(str(u.path), u.text) for u in utterances])
    etc = write_sphinx(utterances, Path('an4')) / 'etc'
    for ending in 'transcription', 'fileids':
        shutil.copy(etc / f'an4_train.{ending}', etc / f'an4_test.{ending}')
    Path('book.txt').write_text('abc de\n')
    soundfile.write('clip.wav', tones('abc de', np.random.default_rng(0)), 16000)
    soundfile.write('clip.mp3', tones('abc de', np.random.default_rng(0)), 16000)
    small = ['--blocks=3', '--hidden=16', '--epochs=1']
    train_run(Path('runs/first'), '--train_data', 'my/train.tsv', *small)
    folder = Path(train.__file__).parent
    commands = readme_commands()
    assert len(commands) > 20
    for command in commands:
        if '--plot' in command and not importlib.util.find_spec('matplotlib'):
            continue
        for name, stands_for in [('runs/...', 'runs/first'), ('CORPUS', 'my/train.tsv'),
                                 ('RUN', 'runs/first')]:
            command = command.replace(name, stands_for)
        _, program, *flags = shlex.split(command)
        if program == '-m':  # pytest: its tests are these
            continue
        if program == 'train.py' and not {'--resume', '--evaluate', '--overfit'} & set(flags):
            flags += small
        done = subprocess.run([sys.executable, folder / program, *flags], capture_output=True,
                              text=True)
        learnt_nothing = '--overfit' in flags and 'NOT LEARNT' in done.stderr
        assert done.returncode == 0 or learnt_nothing, (command, done.stderr)


def test_every_test_that_the_readme_names_exists():
    text = README.read_text()
    names = re.findall(r'pytest (?:-q )?-k "?([\w ]+)', text)
    assert len(names) > 5
    source = Path(__file__).read_text()
    for name in ' or '.join(names).split(' or '):
        assert re.search(rf'def test_\w*{name}', source), name


def test_every_figure_of_the_readme_is_in_the_results():
    """Every number with a decimal point, code and settings apart."""
    text = re.sub(r'```.*?```|`[^`]*`', '', README.read_text(), flags=re.S)
    text = re.sub(r'^    .*$', '', text, flags=re.M)
    figures = set(re.findall(r'(?<![\w.])\d+\.\d+(?![\w.])', text))
    assert len(figures) > 10
    results = README.with_name('results').joinpath('README.md').read_text()
    assert figures - set(re.findall(r'\d+\.\d+', results)) == set()


# ---- real recordings -----------------------------------------------------------------------------

@needs_an4
def test_an4_is_read_whole():
    """Counts of the corpus's own documentation, letters alone in the alphabet."""
    utterances = read_utterances(Path(AN4) / 'train.jsonl')
    alphabet = data.make_alphabet(utterances)
    assert len(utterances) == 948
    assert ''.join(alphabet) == ' abcdefghijklmnopqrstuvwxyz'
    assert not data.unlearnable(utterances, 4)
    assert len(data.unlearnable(utterances, 8)) > 40
    for u in utterances[::100]:
        assert math.ceil(len(data.read_wave(u.path)) / 160) == u.frames  # not decoded yet
    data.check_recordings(utterances[::100], {})
    for u in utterances[::100]:
        assert len(data.features(data.read_wave(u.path)).mels) == u.frames


@needs_an4
def test_an4_has_its_plateaus_where_english_has_them():
    utterances = read_utterances(Path(AN4) / 'train.jsonl')
    alphabet = data.make_alphabet(utterances)
    targets = [data.encode(u.text, alphabet) for u in utterances[::5]]
    outputs = torch.tensor([math.ceil(u.frames / 4) for u in utterances[::5]])
    uniform, constant = monitor.plateau_lines(targets, outputs, len(alphabet))
    assert uniform > 8
    assert constant == pytest.approx(2.9, abs=0.2)


@slow
@needs_an4
def test_an4_in_every_form_gives_the_same_batches(tmp_path):
    assert_same_batches(read_utterances(Path(AN4) / 'dev.jsonl')[::2], tmp_path)


@needs_an4
@torch.no_grad()
def test_an4_a_clip_alone_equals_itself_in_a_batch():
    utterances = read_utterances(Path(AN4) / 'dev.jsonl')[:4]
    speech = data.Speech(utterances, data.make_alphabet(utterances))
    network = shaken_network({})
    batch = data.collate([speech[0, i] for i in range(4)])
    together, n = network(batch.mels, batch.lengths)
    for i in range(4):
        single = data.collate([speech[0, i]])
        alone, _ = network(single.mels, single.lengths)
        assert torch.allclose(alone[0, :n[i]], together[i, :n[i]], atol=1e-4)
