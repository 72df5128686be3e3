"""What must never break again.

    python -m pytest -q                     all but the slow ones, about a minute on two cores
    SLOW=1 python -m pytest -q              the slow ones too: killed runs, fuzz, planted faults
    AN4_DIR=folder python -m pytest -q      real recordings too: a folder with AN4's manifests

Each test holds the code against something independent: arithmetic, brute force, a second way; cases
that differ in their values stand in tables. The sections follow the modules: monitor, data, model,
train; the README and real recordings come last.
"""
import os

os.environ['OMP_NUM_THREADS'] = '1'  # the same bits whatever else the machine does

import contextlib
import functools
import itertools
import json
import math
import random
import re
import shlex
import signal
import subprocess
import sys
import time
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from numpy.random import default_rng
from pytest import approx
from torch import nn

import data
import model
import monitor
import train

# Networks: LITERAL, the original's fixed one; BEFORE, without its fixes.
LITERAL = {'frames_per_output': 1, 'deep_path': 'alone'}
BEFORE = LITERAL | {'upsample': 'transpose', 'squeeze_excite': True, 'output_init': 'normal',
                    'weight_init': 0.01, 'forget_bias': False}
# Flags of a small network, where its size is not the point.
SMALL = ['--blocks=3', '--hidden=16']

AN4 = os.environ.get('AN4_DIR')
slow = pytest.mark.skipif('SLOW' not in os.environ, reason='slow: set SLOW=1')
cases = pytest.mark.parametrize  # of a test: names of values, then a table of them
session = pytest.fixture(scope='session')


# ---- helpers and fixtures ------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers in a test alone and among others."""
    torch.manual_seed(0)


def make_network(vocab_size=6, **config):
    """A recogniser with the weights of seed 0."""
    torch.manual_seed(0)
    return model.Recogniser(model.Config(**config), vocab_size)


def make_utterances(texts, duration=1.0):
    """Utterances of these texts, a speaker to each text, whose files do not exist."""
    frames = math.ceil(100 * duration)
    return [data.Utterance(Path(f'{i}.wav'), text, duration, text, '', frames, '')
            for i, text in enumerate(texts)]


def tones(text, rng):
    """A toy language -> wave (S,) at 16 kHz.

    Each letter is 90 ms of a square wave of its own pitch, a space is silence; a little noise.
    """
    t = np.arange(1440) / 16000
    pieces = []
    for letter in f' {text} ':
        pitch = 150 * 1.35 ** (ord(letter) - ord('a'))
        square = np.hanning(1440) * np.sign(np.sin(2 * np.pi * pitch * t))
        pieces.append(square * (letter != ' '))
    wave = np.concatenate(pieces)
    return 0.3 * wave + 0.002 * rng.standard_normal(len(wave))


def random_texts(n, seed):
    """Two to three words of two to four letters, no letter twice in a row."""
    rng = random.Random(seed)
    texts = []
    for _ in range(n):
        words = [rng.sample('abcdefgh', rng.randint(2, 4)) for _ in range(rng.randint(2, 3))]
        texts.append(' '.join(map(''.join, words)))
    return texts


def json_row(audio, text, **fields):
    """A line of a manifest."""
    return json.dumps({'audio_filepath': audio, 'text': text, **fields})


@pytest.fixture
def printed(capsys):
    """A function: what was printed since it was called last."""
    return lambda: capsys.readouterr().out


def write_corpus(folder, texts, waves=None):
    """Write these waves, or tones, as wav files and a manifest -> the manifest's path."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = default_rng(0)
    rows = []
    for i, text in enumerate(texts):
        soundfile.write(folder / f'{i}.wav', waves[i] if waves else tones(text, rng), 16000)
        rows.append(json_row(f'{i}.wav', text))
    manifest = folder / 'manifest.jsonl'
    manifest.write_text('\n'.join(rows) + '\n')
    return str(manifest)


def read_log(folder):
    """The records of a run's epochs."""
    return monitor.read_run(folder)['log']


def read_results(folder):
    """{what a run scored: error rates}."""
    return monitor.read_run(folder)['results']


def flags_of(*flags):
    """All flags of train.py, where these are given."""
    args, _ = train.parse_flags(flags)
    return args


def trained(folder, *flags):
    """python train.py with these flags -> its run folder."""
    train.main([*map(str, flags), f'--run_dir={folder}'])
    return folder


def checkpoint_of(run):
    return model.load_checkpoint(run / 'best.pt')


def exit_code(main, *argv):
    """What a module's main, which must end in sys.exit, hands to it: a message or a status."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in argv])
    return stop.value.code


@session
def corpus(tmp_path_factory):
    """Flags: twenty utterances of tones for training, six for validation."""
    folder = tmp_path_factory.mktemp('tones')
    return ['--train_data', write_corpus(folder / 'train', random_texts(20, 1)),
            '--valid_data', write_corpus(folder / 'valid', random_texts(6, 2))]


@session
def whole_flags(corpus, tmp_path_factory):
    """Of a run of four epochs, tested on nine utterances, three of whose sentences are in
    training."""
    test = write_corpus(tmp_path_factory.mktemp('test'), random_texts(3, 1) + random_texts(6, 2))
    return [*corpus, '--test_data', test, '--epochs=4', '--batch_size=2', *SMALL]


@session
def whole(whole_flags, tmp_path_factory):
    """The folder of that run."""
    return trained(tmp_path_factory.mktemp('whole') / 'run', *whole_flags)


@session
def by_heart(tmp_path_factory):
    """The real train.main --overfit 2, of two sentences of the synthesiser -> the run folder,
    beside 0.wav ("seven two nine") and 1.wav ("light go")."""
    folder = tmp_path_factory.mktemp('heart')
    texts = ['seven two nine', 'light go']
    waves = [data.synthesise(text, i)[0] for i, text in enumerate(texts)]
    return trained(folder / 'run', '--train_data', write_corpus(folder, texts, waves),
                   '--overfit=2', '--batch_size=2', '--blocks=3', '--hidden=64',
                   '--learning_rate=1e-3')


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
    """Of words of a letter. The counts must add up: what was said is hit, substituted or deleted.
    """
    rng = random.Random(0)
    for _ in range(300):
        said, heard = [' '.join(rng.choices('xyz', k=rng.randint(1, 7))) for _ in range(2)]
        rates = monitor.error_rates([said], [heard])
        errors = rates['substitutions'] + rates['insertions'] + rates['deletions']
        assert errors == edit_distance(said[::2], heard[::2])
        assert 2 * (rates['insertions'] - rates['deletions']) == len(heard) - len(said)


def test_error_rates_by_hand():
    """x for b, a c too many with its space, and no d; a sample may be of e or of d alone."""
    rates = monitor.error_rates(['a b c', 'd', 'e'], ['a x c c', '', 'e'])
    assert rates.pop('interval') == [0, 100]
    assert rates == approx({'wer': 60, 'cer': 100 * 4 / 7, 'ser': 100 * 2 / 3, 'words': 5,
                            'substitutions': 1, 'insertions': 1, 'deletions': 1,
                            'utterances': 3})


@cases('text,words', [("it's no go", 3), ('今日は go', 4), ('ไป go', 3)])
def test_characters_are_words_where_there_are_no_spaces(text, words):
    assert monitor.error_rates([text], [''])['words'] == words


# ---- monitor: plateaus ---------------------------------------------------------------------------

def test_uniform_line_is_the_loss_of_a_uniform_output():
    """By counting the paths, of all 4 ** T, that collapse to five labels: T + 5, less a repeat for
    each equal neighbour, choose 10. Texts as tensors."""
    targets = torch.randint(1, 4, (9, 5))
    lengths = torch.arange(11, 20)
    repeats = (targets[:, 1:] == targets[:, :-1]).sum(1)
    losses = [(length * math.log(4) - math.log(math.comb(length + 5 - repeat, 10))) / 5
              for length, repeat in zip(lengths.tolist(), repeats.tolist())]
    uniform, _ = monitor.plateau_lines(list(targets), lengths, 4)
    assert uniform == approx(np.mean(losses), rel=1e-5)


@cases('outputs', [10, 200])
def test_constant_line_against_the_best_constant_output(outputs):
    """By gradient descent on one distribution, free to leave the letters' frequencies."""
    targets = torch.randint(1, 7, (8, 5)).clamp_max(5)
    lengths = torch.full((8,), outputs)
    _, constant = monitor.plateau_lines(targets.tolist(), lengths, 6)
    logits = torch.zeros(6, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.3)
    for _ in range(200):
        log_probs = logits.log_softmax(0).expand(outputs, 8, 6)
        loss = F.ctc_loss(log_probs, targets, lengths, torch.full((8,), 5))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert constant == approx(loss.item(), rel=0.02)


def test_lines_of_english_are_those_of_the_readme(printed):
    monitor.main(['--lines', '250', '12', '28'])
    assert ' and '.join(re.findall(r'(\S+) nats a label', printed())) in README


@cases('log', [
    '7 {}', 'step,train_loss,lr\n7,{},0.1', '{{"step": 1, "loss": {}}}',
    'epoch 3 loss: {} wer 100',
])
def test_losses_of_any_log_are_held_against_the_lines(log, tmp_path, printed):
    """Sums over two texts of twelve labels that are equally frequent: 3.4 a label is the constant
    line of 27 of them. The mean of six losses passes the middle of the lines with the third low
    one, and 0.9 of the constant line with the first that is lower."""
    losses = [24 * loss for loss in [50.0] * 10 + [3.4] * 30 + [1.0] * 10]
    header, _, row = log.rpartition('\n')
    path = tmp_path / 'log'
    path.write_text('\n'.join([header, *map(row.format, losses)]))
    monitor.main(['--lines', '250', '12', '28', '--equal', '--sum_over=2', f'--losses={path}'])
    out = printed()
    constant, = re.findall(r'(\S+) nats summed over 2 texts: the best', out)
    assert float(constant) == approx(24 * 3.4, rel=0.05)
    assert re.search('last of 50 losses lies 10[345]% of the way', out)
    assert 'the uniform plateau was left: 13, the constant one: 41 (' in out


@cases('command,message', [
    ('--lines 10 12 28', '--losses: cannot be used (12 labels with their repeats do not fit 10'),
    ('--lines 250 12 28 --losses log', '--losses: cannot be used (could not convert string'),
    ('no', 'no: cannot be used ([Errno 2]'),
])
def test_what_monitor_cannot_use_is_a_line(command, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('log').write_text('step three\n')
    assert message in exit_code(monitor.main, *command.split())


# ---- monitor: gradients and outputs --------------------------------------------------------------

def test_gradient_norms_of_the_children_of_any_network():
    """What has no gradient is passed over; 5 and 12 make 13."""
    network = nn.Sequential(nn.PReLU(), nn.ReLU(), nn.PReLU(), nn.PReLU())
    (5 * network[0].weight + 12 * network[3].weight).backward()
    norms = {'gradient.0': 5, 'gradient.3': 12, 'gradient': 13}
    assert monitor.gradient_norms(network) == norms


# Ten letters of 27, each in one output of seven.
@cases('probabilities,entropy,blank,sound', [
    (torch.ones(28) / 28, 1, 1, 0),                    # uniform
    (torch.eye(28)[0], 0, 1, 0),                       # constant, and certain
    (0.9 * torch.eye(28)[0] + 0.1 / 28, 0.191, 1, 0),  # constant
    (torch.eye(28), 0, 1 / 28, 1),                     # learnt
])
def test_outputs_are_recognised(probabilities, entropy, blank, sound):
    """Of 38 outputs, of which the last ten are padding."""
    log_probs = F.pad(probabilities.log().expand(1, 28, 28), (0, 0, 0, 10), value=math.nan)
    figures = monitor.output_figures(log_probs, torch.tensor([28]))
    expected = {'entropy': entropy, 'blank': blank, 'sound': sound}
    assert figures == approx(expected, abs=1e-3)


# ---- monitor: phases, advice ---------------------------------------------------------------------

HEALTHY = {'epoch': 1, 'seconds': 60.0, 'updates': 1000, 'train_loss': 1.0,
           'clipped': 0.1, 'gradient.head': 1.0, 'gradient': 1.7,
           'entropy': 0.2, 'blank': 0.6, 'sound': 1.0, 'weight_change': 0.3, 'left_uniform': 20,
           'left_constant': 300, 'phase': 'learning', 'warnings': []}
VALIDATED = HEALTHY | {'valid_loss': 1.2, 'wer': 20.0, 'cer': 5.0}
STUCK = {'phase': 'constant', 'left_constant': None}
CONFIG = {'plateaus': (8.0, 3.0), 'valid_plateaus': (8.0, 3.0), 'start': []}


def test_phases():
    phases = [monitor.name_phase(loss, (8.0, 3.0)) for loss in (5.6, 5.4, 2.8, 2.6, 0.35, 0.25)]
    assert phases == ['uniform', 'constant', 'constant', 'learning', 'learning', 'learnt']


@cases('last,words', [
    (STUCK, 'still on the plateau after 1000 updates'),
    (STUCK | {'updates': 100}, '100 updates are few'),
    (STUCK | {'weight_change': 1e-4}, 'the weights hardly move'),
    (STUCK | {'weight_change': 50.0}, 'the weights change too fast'),
    (STUCK | {'warnings': ['the gradient does not reach head']}, 'the gradient does not reach'),
    ({'phase': 'constant'}, 'the network fits the training utterances alone'),
    ({'wer': 97.6, 'cer': 17.4}, 'the letters are right and the words are not'),
    ({'wer': 0.0}, 'there are no errors left to learn from'),
    ({'valid_loss': 3.0}, 'training is learnt better than validation'),
    ({}, 'no warning applies'),
])
def test_advice_on_how_to_go_on(last, words):
    assert monitor.next_step([VALIDATED | last]).startswith(words)


def test_advice_without_validation(printed):
    monitor.print_run({'name': 'run', 'config': CONFIG, 'log': [HEALTHY], 'results': {}})
    out = printed()
    assert '\nphase: learning; ' in out
    assert '\nhow to go on: there is no validation data' in out


def test_the_best_epoch_is_the_last_of_equal_ones():
    log = [{'wer': wer, 'cer': cer} for wer, cer in ((10, 4), (10, 4), (10, 5), (20, 1))]
    assert monitor.best_epoch(log) is log[1]


# ---- monitor: anybody's network ------------------------------------------------------------------

class Images(nn.Module):
    """A CRNN: images (B, 1, 8, 96), all as wide -> (24, B, 11)."""
    normalise = nn.LogSoftmax(2)

    def __init__(self):
        super().__init__()
        self.cnn = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d((4, 2)))
        self.rnn = nn.LSTM(32, 48, bidirectional=True)
        self.head = nn.Linear(96, 11)
        self.columns = lambda x: x.squeeze(2).permute(2, 0, 1)

    def forward(self, x):
        return self.normalise(self.head(self.rnn(self.columns(self.cnn(x)))[0]))


class Attention(nn.Module):
    """A transformer with the batch first: (B, T, 6) -> (B, T, 6)."""
    normalise = nn.LogSoftmax(2)

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv1d(6, 32, 5, padding=2)
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 6)

    def forward(self, x):
        return self.normalise(self.head(self.encoder(self.embed(x.mT).mT)))


class Recurrent(nn.Module):
    """A GRU with the blank last: (T, B, 6) -> (T, B, 6)."""
    normalise = nn.LogSoftmax(2)

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(6, 48, bidirectional=True)
        self.head = nn.Linear(96, 6)

    def forward(self, x):
        return self.normalise(self.head(self.gru(x)[0]))


def image_batch():
    """Images that three to seven of ten glyphs fill."""
    glyphs = torch.randn(11, 8, 6, generator=torch.Generator().manual_seed(7))
    labels = torch.randint(3, 8, (8,))
    targets = torch.randint(1, 11, (8, 7))
    images = [F.interpolate(torch.cat([*glyphs[row[:n]]], 1)[None, None], (8, 96), mode='bilinear')
              for row, n in zip(targets, labels)]
    return torch.cat(images) + 0.3 * torch.randn(8, 1, 8, 96), targets, torch.full((8,), 24), labels


def sound_batch():
    """Texts of 3 to 8 symbols of five, each of four frames in seven; ten fit."""
    labels = torch.randint(3, 9, (8,))
    targets = torch.randint(1, 6, (8, 10))
    times = torch.arange(70)
    is_spoken = (times % 7 > 2) & (times // 7 < labels[:, None])              # (8, 70)
    symbols = targets.repeat_interleave(7, 1) * is_spoken
    x = 2 * F.one_hot(symbols, 6) + 0.3 * torch.randn(8, 70, 6)
    x = x * (times < 7 * labels[:, None] + 4)[..., None]
    return x[:, :7 * labels.max() + 4], targets, 7 * labels + 4, labels


def time_first_batch():
    x, targets, *lengths = sound_batch()
    return x.transpose(0, 1), targets - 1, *lengths


OTHERS = {  # of a kind: network, batches, what Watch and check_ctc are told of it, updates
    'images': (Images, image_batch, {}, 200),
    'attention': (Attention, sound_batch, {'batch_first': True}, 90),
    'recurrent': (Recurrent, time_first_batch, {'blank': 5}, 150),
}


def train_other(kind, network, updates, rate=3e-3, change=lambda *batch: batch, watch=None,
                every=1):
    """Train a network that is not ours, on batches that are changed -> what a watch finds at its
    looks, one line behind the other."""
    _, batches, told, _ = OTHERS[kind]
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate)
    network.train()
    found = []
    for update in range(updates):
        x, *rest = change(*batches())
        log_probs = network(x)
        time_first = log_probs.transpose(0, 1) if 'batch_first' in told else log_probs
        optimizer.zero_grad()
        F.ctc_loss(time_first, *rest, told.get('blank', 0)).backward()
        if watch and update % every == 0:
            found += watch(log_probs, *rest, x)
        optimizer.step()
    return found


@functools.cache
def learnt_weights(kind, seed):
    _, _, _, updates = OTHERS[kind]
    network = other_network(kind, False, seed)
    train_other(kind, network, updates)
    return network.state_dict()


def other_network(kind, learnt, seed):
    """With the same random numbers from here on, whether it has been trained before or now."""
    weights = learnt_weights(kind, seed) if learnt else {}
    torch.manual_seed(seed)
    network = OTHERS[kind][0]()
    network.load_state_dict(weights, strict=learnt)
    return network


def batch_of(kind, learnt, seed):
    """What check_ctc takes of a network in training mode."""
    _, batches, told, _ = OTHERS[kind]
    network = other_network(kind, learnt, seed)
    x, targets, input_lengths, target_lengths = batches()
    log_probs = network(x).detach()
    return {'log_probs': log_probs.transpose(0, 1) if 'batch_first' in told else log_probs,
            'targets': targets, 'input_lengths': input_lengths, 'target_lengths': target_lengths,
            'blank': told.get('blank', 0)}


others = cases('kind', OTHERS)
# Limits were chosen on seeds 0 to 2.
other_seeds = cases('seed', [0, *(pytest.param(seed, marks=slow) for seed in (3, 4, 5))])


@others
@other_seeds
def test_nothing_is_found_in_a_healthy_network_of_others(kind, seed):
    """Untrained, it hears the phase alone; learnt nothing, in any form that ctc_loss takes: labels
    in one line, lists and floats of lengths, another blank, half precision; nor in one clip."""
    finding, = monitor.check_ctc(**batch_of(kind, False, seed))
    assert finding.startswith('phase ')
    batch = batch_of(kind, True, seed)
    log_probs, targets, frames, lengths, blank = batch.values()
    line = torch.cat([row[:length] for row, length in zip(targets, lengths)])
    one_clip = {name: value[:1] for name, value in batch.items() if name != 'blank'}
    for change in (
            {},
            {'targets': line, 'input_lengths': frames.tolist(), 'target_lengths': lengths.float()},
            {'log_probs': log_probs.roll(1, 2), 'blank': (blank + 1) % log_probs.shape[2],
             'targets': (targets + 1) % log_probs.shape[2]},
            {'log_probs': log_probs.half()}, {'log_probs': log_probs.bfloat16()},
            one_clip | {'log_probs': log_probs[:frames[0], :1]}):
        assert monitor.check_ctc(**batch | change) == []


def test_many_symbols_in_half_precision_are_normalised():
    log_probs = torch.zeros(40, 1, 5000).log_softmax(2).bfloat16()
    assert monitor.check_ctc(log_probs, [[1, 2]], [40], [2], untrained=True) == []


def joined(log_probs):
    """What DataParallel makes of two halves of the batch."""
    return torch.cat(log_probs.chunk(2, 1))


@cases('kind,name,change,words', [
    # deepspeech.pytorch#488, #121; pointnet.pytorch#27; deepspeech.pytorch#272
    ('images', 'log_probs', lambda x: 3 * x + 1, 'is not normalised'),
    ('images', 'log_probs', lambda x: x.exp(), 'holds probabilities'),
    ('recurrent', 'log_probs', lambda x: x.log_softmax(0), 'softmax is over time'),
    ('attention', 'log_probs', lambda x: x * math.nan, 'holds NaN'),
    # Wav2Letter of torchaudio; CRNN_Chinese_Characters_Rec#267
    ('attention', 'log_probs', lambda x: x.transpose(0, 1), 'take log_probs.transpose(0, 1)'),
    ('attention', 'log_probs', lambda x: x.permute(1, 2, 0), 'take log_probs.permute(2, 0, 1)'),
    ('images', 'log_probs', joined, 'where parts of it are joined along time'),
    ('recurrent', 'log_probs', lambda x: x[:, 0], 'take log_probs.unsqueeze(1)'),
    # CRNN-with-STN#7; deepspeech.pytorch#354; speechbrain#1410
    ('images', 'log_probs', lambda x: x[:, :1].expand_as(x), 'every utterance gets the same'),
    ('recurrent', 'blank', lambda x: 0, 'are the blank, symbol 0'),
    ('attention', 'log_probs', lambda x: x.roll(1, 2), "blank and alphabet are the network's own"),
    ('images', 'log_probs', lambda x: (99 * x).log_softmax(2).roll(1, 2), 'diverged: '),
    ('images', 'log_probs', lambda x: (1e-3 * x).log_softmax(2), 'phase uniform'),
    ('recurrent', 'log_probs', lambda x: (1e-3 * x + 3 * torch.eye(6)[5]).log_softmax(2),
     'phase constant'),
    # crnn-pytorch#3; speechbrain#1589; warp-ctc#111; crnn.pytorch#235; kaldi-tuda-de#15
    ('images', 'targets', lambda x: x - 1, 'are the blank, symbol 0'),
    ('images', 'targets', lambda x: x + 4, 'are not between 0 and 10'),
    ('images', 'targets', lambda x: x.clamp(3, 3), 'labels are symbol 3'),
    ('images', 'target_lengths', lambda x: x * (x > 3), 'texts have no label'),
    ('attention', 'targets', lambda x: x % 5 + 1, 'check that each text belongs'),
    # icefall#135; HierSpeechpp#29; NeMo#16224
    ('recurrent', 'input_lengths', lambda x: 0 * x + x.max(), 'every input length is the padded'),
    ('attention', 'input_lengths', lambda x: 4 * x, 'see whether they are divided by'),
    ('attention', 'input_lengths', lambda x: 0 * x, 'and not too often'),
    ('images', 'input_lengths', lambda x: x // 3, 'and not too often'),
    ('attention', 'input_lengths', lambda x: x.where(x > x.min(), 2),
     ' of 8 utterances have fewer outputs than labels and repeats, by up to '),
    ('recurrent', 'input_lengths', lambda x: x[:4], '4 input lengths and 8 target lengths'),
    ('recurrent', 'input_lengths', lambda x: x / 70, 'multiply them by its number of outputs'),
    # transformers#12270: padding of -100, counted; Holmeyoung/crnn-pytorch#62
    ('images', 'targets', lambda x: F.pad(x[:, :3], (0, 4), value=-100), 'padding is counted'),
    ('images', 'target_lengths', lambda x: x + 3, 'targets as (B, S), or all labels in one line'),
    ('recurrent', 'blank', lambda x: 6, 'blank is 6, and the symbols are 0 to 5'),
])
@other_seeds
def test_a_fault_in_a_batch_of_others_is_named_and_no_other(kind, name, change, words, seed):
    batch = batch_of(kind, True, seed)
    finding, = monitor.check_ctc(**batch | {name: change(batch[name])})
    assert words in finding
    assert re.search(r'[;,] \w+', finding)


def test_findings_that_do_not_hide_each_other_come_together():
    batch = batch_of('images', True, 0)
    batch['targets'] += 4
    assert len(monitor.check_ctc(**batch | {'log_probs': 2 * batch['log_probs']})) == 2


@others
@other_seeds
def test_a_healthy_training_hears_its_phases_and_ends_in_the_same_bits(kind, seed):
    """With Watch and without, drop-out and batch norm included."""
    _, _, told, updates = OTHERS[kind]
    network = other_network(kind, False, seed)
    watch = monitor.Watch(network, **told)
    found = train_other(kind, network, updates, watch=watch, every=10)
    assert {line.split()[0] for line in found} == {'phase'}
    assert 'phase learning: ' in ''.join(found)
    for name, weights in learnt_weights(kind, seed).items():
        assert torch.equal(network.state_dict()[name], weights)


def with_texts_of_others(wrong, x, targets, input_lengths, labels):
    """So many of the eight transcripts belong to other recordings."""
    order = torch.arange(8)
    order[:wrong] = order[:wrong].roll(1)
    return x, targets[order], input_lengths, labels[order]


# Of a kind, learnt or not: what part of the network is replaced, by what; how it is trained, where
# not as usual; what is said.
WATCHED = [
    # ctc#1; TorchLeet#5, video-classification#42
    ('images', False, 'columns', lambda x: x.squeeze(2).mT.reshape(24, 8, 32), {}, 'clips mix'),
    ('attention', False, 'encoder.layers.0.self_attn.batch_first', False, {}, 'clips mix'),
    ('recurrent', False, 'gru.batch_first', True, {}, 'clips mix'),
    # speechbrain#1077, #1396; HVPNeT#5; ProteomicsML#203
    ('images', False, 'columns', lambda x: x.detach().squeeze(2).permute(2, 0, 1), {},
     'the gradient does not reach cnn'),
    ('recurrent', False, 'normalise', lambda x: F.relu(x - 9).log_softmax(2), {},
     'the gradient does not reach gru (0e+00), head (0e+00)'),
    ('images', False, '', None, {'rate': 0.0}, 'the weights of cnn, rnn, head have not changed'),
    # CRNN-with-STN#7; deepspeech.pytorch#194; speechbrain#1410, DeepSpeech#238; crnn.pytorch#230
    ('attention', False, '', None, {'change': lambda x, *rest: (0 * x, *rest)},
     'every utterance gets the same outputs'),
    ('recurrent', False, 'normalise', lambda x: (50 * x).softmax(2).log_softmax(2), {'updates': 9},
     'softmax comes before log_softmax'),
    ('images', False, '', None, {'rate': 3.0, 'updates': 4}, 'diverged: '),
    ('images', True, 'cnn.1.running_var', torch.full((16,), 9.0), {'updates': 1},
     'training and eval mode differ'),
    # kaldi-tuda-de#15 is of the last two
    ('recurrent', False, '', None,
     {'rate': 1e-5, 'updates': 12, 'change': functools.partial(with_texts_of_others, 8)},
     'do not belong together'),
    ('attention', True, '', None,
     {'rate': 1e-5, 'updates': 12, 'change': functools.partial(with_texts_of_others, 3)},
     'of the utterances are not learnt at all'),
]


@cases('kind,learnt,part,value,training,words', WATCHED)
@other_seeds
def test_what_a_batch_cannot_show_is_named_and_no_other(kind, learnt, part, value, training, words,
                                                        seed, printed):
    network = other_network(kind, learnt, seed)
    owner, _, name = part.rpartition('.')
    if part:
        setattr(network.get_submodule(owner), name, value)
    watch = monitor.Watch(network, **OTHERS[kind][2])
    train_other(kind, network, watch=watch, **{'updates': 2} | training)
    assert watch.findings
    assert all(words.split(' cnn')[0] in line for line in watch.findings)
    assert words in watch.findings[0]
    assert f'    > {watch.findings[0]}\n' in printed()


def test_watch_leaves_all_as_it_was():
    """Gradients, buffers, modes and random numbers, in a network that draws some, and counts, in
    eval mode too."""
    def normalise(x):
        network.cnn[1].num_batches_tracked.add_(1)
        return F.dropout(x).log_softmax(2)

    def everything():
        return repr([*[p.grad.sum() for p in network.parameters()], network.state_dict(),
                     [module.training for module in network.modules()],
                     torch.get_rng_state().sum()])

    network = Images()
    network.cnn[1].eval()
    network.normalise = normalise
    x, *rest = image_batch()
    log_probs = network(x)
    F.ctc_loss(log_probs, *rest).backward()
    before = everything()
    monitor.Watch(nn.parallel.DataParallel(network))(log_probs, *rest, x)
    assert everything() == before


# ---- monitor: reading and comparing runs ---------------------------------------------------------

def test_a_run_describes_itself(whole, printed):
    monitor.main([str(whole)])
    out = printed()
    for words in (*map(monitor.epoch_line, read_log(whole)), 'best epoch 4 of 4',
                  'how to go on: ', 'valid, beam search: WER '):
        assert f'\n{words}' in out


def fake_run(folder, wrong=(), **flags):
    """A finished run that scored three sentences, those that are wrong as "no" -> its folder."""
    folder.mkdir()
    rows = [f'{i}.wav\t{text}\t{"no" if i in wrong else text}\t{text}\n'
            for i, text in enumerate(['go left', 'stop', 'go right now'])]
    (folder / 'test.tsv').write_text(''.join(['file\tsaid\theard\tbeam\n', *rows]))
    (folder / 'log.jsonl').write_text(json.dumps(VALIDATED))
    (folder / 'config.json').write_text(json.dumps(CONFIG | {'flags': flags}))
    (folder / 'results.json').write_text('{"test": {}}')
    return str(folder)


def test_runs_are_compared_by_a_paired_bootstrap(tmp_path, printed):
    """Three runs by their dropout: wrong are all six words, or all but one, or none; of three
    sentences, a sample may hold any one alone."""
    one = fake_run(tmp_path / 'one', [0, 1, 2], seed=0, dropout=0.3)
    two = fake_run(tmp_path / 'two', [0, 2], seed=1, dropout=0.3)
    monitor.main([one, two, fake_run(tmp_path / 'good', seed=0, dropout=0.1)])
    out = ' '.join(printed().split())
    assert ('first line 100.00 83.33 91.67 11.79 50.0 to 100.0 +0.00 to +0.00 dropout 0.3 '
            '0.00 0.00 0.0 to 0.0 -100.00 to -50.00 dropout 0.1 beam search' in out)


def test_runs_that_scored_other_sentences_are_not_compared(tmp_path):
    runs = [fake_run(tmp_path / folder) for folder in ('other', 'run')]
    (tmp_path / 'run/test.tsv').write_text('file\n')
    assert 'run: not finished, or other sentences were scored' in exit_code(monitor.main, *runs)


def test_runs_are_drawn(tmp_path, monkeypatch):
    """Texts too: plateaus, phases, parts, the last sentence."""
    pyplot = pytest.importorskip('matplotlib.pyplot')
    monkeypatch.setitem(pyplot.rcParams, 'svg.fonttype', 'none')
    picture = tmp_path / 'p.svg'
    drawing = [fake_run(tmp_path / 'a $1 run'), fake_run(tmp_path / 'b'), '--plot', str(picture)]
    monitor.main(drawing)
    for text in 'constant output', 'phase: ', 'gradient.head, ', 'a $1 run', 'go right now':
        assert text in picture.read_text()
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    assert 'pip install matplotlib' in exit_code(monitor.main, *drawing)


# ---- monitor: planted faults ---------------------------------------------------------------------

@session
def spoken_corpus(tmp_path_factory):
    """A folder with the built-in corpus, and with each text at the recording before."""
    folder = tmp_path_factory.mktemp('spoken')
    utterances, _ = data.read_corpus(data.builtin_corpus(folder / 'corpus')[0])
    rows = [f'{u.path}\t{other.text}\n' for u, other in zip(utterances, utterances[1:])]
    (folder / 'others.tsv').write_text(''.join(['path\ttext\n', *rows]))
    return folder


@pytest.fixture
def small_run(spoken_corpus, tmp_path, monkeypatch):
    """A function that trains a small network on the built-in corpus -> the run."""
    monkeypatch.chdir(spoken_corpus)
    return lambda *flags: monitor.read_run(trained(
        tmp_path / 'run', '--blocks=3', '--hidden=64', '--test_data=none', *flags))


def faint(layer, x, lengths, forward=model.BiLSTM.forward):
    """What the second LSTM layer hears is 1e-4 of what the first says, and so are gradients."""
    if x.shape[2] == 2 * layer.forward_lstm.hidden_size:
        x = 1e-4 * x
    return forward(layer, x, lengths)


def forgetful(layer, x):
    """Batch norm's running statistics keep what they began with."""
    layer.momentum = 1e-4
    return nn.BatchNorm2d.forward(layer, x)


seeds = cases('seed', [3, 4, 5])  # thresholds were chosen on 0 to 2


@slow
@seeds
@cases('flags,patch,words', [
    ('--learning_rate=3e-6', (), 'the weights hardly move'),
    ('--learning_rate=1e-1', (), 'lower the learning rate'),
    ('--epochs=1 --num_train_samples=200', (), 'updates are few'),
    ('--train_data=others.tsv --valid_data=corpus/valid.jsonl --skip_bad', (),
     'recordings and transcripts do not belong together'),
    ('--interctc_weight=0', (model.BiLSTM, 'forward', faint),
     'the gradient does not reach backbone'),
    ('', (model.BatchNorm, 'forward', forgetful), 'training and eval mode differ'),
])
def test_a_planted_fault_is_named_and_no_other(flags, patch, words, seed, small_run, monkeypatch,
                                               printed):
    if patch:
        monkeypatch.setattr(*patch)
    run = small_run('--epochs=4', f'--seed={seed}', *flags.split())
    assert words in printed() + monitor.next_step(run['log'])


@slow
@seeds
@cases('frames_per_output', [4, 2, 1])
def test_a_healthy_run_has_no_warning_after_its_first_fifth(frames_per_output, seed, small_run):
    log = small_run('--epochs=10', f'--frames_per_output={frames_per_output}',
                    f'--seed={seed}')['log']
    assert [record['warnings'] for record in log[2:]] == [[]] * 8
    assert log[-1]['phase'] in ('learning', 'learnt')


# ---- data: features ------------------------------------------------------------------------------

def test_log_mels_equal_a_naive_dft():
    """Frames, NumPy's Hann window, DFT as a sum and Slaney's mel scale (1998) by definition, in
    float64."""
    wave = 0.1 * default_rng(0).standard_normal(2080)
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(wave, 120), 400)[::160]
    hann = np.hanning(401)[:400]
    dft = np.exp(-2j * np.pi * np.outer(np.arange(400), np.arange(257)) / 512)
    power = np.abs(frames * hann @ dft) ** 2
    mels = (15 + 27 * math.log(8) / math.log(6.4)) * np.arange(82) / 81
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))
    low, peak, high = edges[:-2], edges[1:-1], edges[2:]
    hertz = 31.25 * np.arange(257)[:, None]
    triangles = np.minimum((hertz - low) / (peak - low), (high - hertz) / (high - peak))
    expected = np.log(power @ triangles.clip(0) + 1e-10)
    found = data.log_mels(torch.tensor(wave).float())
    assert found.numpy() == approx(expected, abs=1e-4)


def test_speech_is_normalised_over_itself():
    """Noise is speech from end to end: 20 frames of silence and a half-silent one are put on each
    side."""
    mels, start = data.features(0.1 * torch.randn(16000))
    speech = mels[21:-21]
    assert (len(speech), start) == (100, -21)
    assert speech.mean(0).abs().max() < 1e-3
    assert speech.std().item() == approx(1, abs=1e-2)


@functools.cache
def spoken_wave():
    """Some words of the synthesiser, by a voice in a quiet room, in whole frames."""
    wave, _ = data.synthesise('seven two nine', 3)
    return wave[:len(wave) // 160 * 160]


def silence(seconds, decibels=-math.inf):
    """White noise of this level."""
    noise = default_rng(0).standard_normal(round(16000 * seconds))
    return np.float32(10 ** (decibels / 20) * noise)


def features_of(*waves):
    return data.features(torch.tensor(np.concatenate(waves)))


@cases('decibels', [-math.inf, -90, -70])
@cases('before,behind', [(0, 0.4), (0.1, 0.1), (2, 2)])
def test_silence_round_a_clip_leaves_no_trace(before, behind, decibels):
    """Zeros, dither and quiet noise: the same features, which begin where the speech does, at half
    the loudness too."""
    expected, start = features_of(spoken_wave())
    quieter = 0.5 * spoken_wave()
    mels, padded = features_of(silence(before, decibels), quieter, silence(behind, decibels))
    assert padded == start + round(100 * before)
    assert mels.shape == expected.shape
    assert (mels - expected).abs().mean() < 0.01


def test_a_gap_of_silence_in_the_midst_moves_the_rest_only():
    """A second of zeros between the clip and itself again: both as they are alone."""
    expected, _ = features_of(spoken_wave())
    mels, _ = features_of(spoken_wave(), silence(1), spoken_wave())
    for half in mels[:len(expected)], mels[-len(expected):]:
        assert (half - expected)[22:-22].abs().max() < 0.05


@cases('seconds', [0.2, 0.9])
def test_a_click_is_drawn_over(seconds):
    """Ten times as loud as the voice, before or within it: only frames that hold it may change."""
    wave = np.concatenate([silence(0.5), spoken_wave()])
    expected, start = features_of(wave)
    wave[round(16000 * seconds)] += 10 * wave.max()
    mels, clicked = features_of(wave)
    changed = (mels - expected).abs().max(1).values > 0.1
    assert clicked == start
    assert changed.sum() <= 5


# ---- data: audio ---------------------------------------------------------------------------------

@cases('rate', [8000, 11025, 22050, 44100, 48000])
def test_resampling_keeps_the_band_and_drops_the_rest(rate, tmp_path):
    """A 1 kHz tone comes out as itself, the channels' mean; what 16 kHz cannot hold disappears."""
    tones = np.sin(2 * np.pi * np.outer(np.arange(rate) / rate, [1000, 9000]))
    stereo = 0.5 * tones * [1, rate > 20000]
    soundfile.write(tmp_path / 'tone.flac', stereo, rate, subtype='PCM_24')
    wave = data.read_wave(tmp_path / 'tone.flac').numpy()
    expected = 0.25 * np.sin(2 * np.pi * np.arange(16000) / 16)
    assert len(wave) == 16000
    assert np.abs(wave - expected)[500:-500].max() < 2e-3


def write_noise(path, seconds=0.5, **form):
    """A recording of noise -> its bytes."""
    noise = 0.1 * default_rng(0).standard_normal(round(16000 * seconds))
    soundfile.write(path, noise, 16000, **form)
    return bytearray(path.read_bytes())


@cases('name,end,place,new,reason', [
    ('empty.wav', 0, 0, b'', 'Format not recognised'),
    ('half.wav', 8000, 0, b'', 'cut off'),
    ('half.aiff', 8000, 0, b'', 'cut off'),
    ('rate.wav', None, 26, b'\xff', '384 kHz'),
    ('hours.flac', None, 22, b'\x3f', 'over an hour'),
    ('nan.au', None, -400, b'\xff' * 200, 'not finite'),
])
def test_a_bad_recording_is_named(name, end, place, new, reason, tmp_path):
    """An hour and more by its header; cut off at `end`; other bytes at a place."""
    path = tmp_path / name
    content = write_noise(path, subtype='FLOAT' if name == 'nan.au' else 'PCM_16')[:end]
    content[place:place + len(new)] = new
    path.write_bytes(content)
    with pytest.raises(monitor.UserError, match=rf'^{path}: cannot be used \(.*{reason}'):
        data.read_wave(path)


# ---- data: text ----------------------------------------------------------------------------------

@cases('written,text', [
    ('Hello  World\n', 'hello world'),
    (unicodedata.normalize('NFD', 'Naïve'), 'naïve'),
    ('İYİ', 'iyi'),
    ("ПРИВЕТ 你好 it's", "привет 你好 it's"),
    ('\ufeffco\u00adope\u200brate don\u2019t don\u02bct', "cooperate don't don't"),
    ('of\ufb01ce Ａｂｃ', 'office abc'),
])
def test_alphabet_round_trip_in_any_script(written, text):
    alphabet = data.make_alphabet(make_utterances([text, 'z']), [''])
    symbols = data.encode(data.normalise_text(written) + '?', alphabet)
    assert alphabet[0] == ''
    assert 0 not in symbols
    assert ''.join(alphabet[symbol] for symbol in symbols) == text


@cases('symbols', [[1], [1, 2, 3], [1, 2, 2, 3], [1, 1, 1]])
def test_what_ctc_cannot_learn(symbols):
    """Where PyTorch's loss of the outputs for 20 frames is infinite."""
    for rate in range(1, 21):
        outputs = math.ceil(20 / rate)
        loss = F.ctc_loss(torch.zeros(outputs, 4), torch.tensor(symbols), [outputs], [len(symbols)])
        assert data.can_align(symbols, 20, rate) == loss.isfinite()


# ---- data: batches and augmentation --------------------------------------------------------------

DURATIONS = default_rng(0).uniform(1, 20, 101)


def batches_of(epoch, seed=0):
    """An epoch's batches of eight of a hundred and one utterances."""
    utterances = [make_utterances('a', duration)[0] for duration in DURATIONS]
    return train.training_batches(data.Speech(utterances, [''], seed=seed), 8, epoch)


def test_batches_repeat_by_seed_and_epoch():
    """And hold every utterance once an epoch."""
    batches, others = batches_of(0), batches_of(1)
    assert batches == batches_of(0)
    assert batches != batches_of(0, seed=1)
    assert batches != [[(0, i) for _, i in batch] for batch in others]
    assert sorted(sum(others, [])) == [(1, i) for i in range(101)]


def test_batches_hold_clips_of_nearly_equal_length():
    ratios = []
    for batch in batches_of(0):
        seconds = [DURATIONS[i] for _, i in batch]
        ratios.append(max(seconds) / min(seconds))
    assert np.median(ratios) < 1.5


@cases('ranks', [3, 8])
def test_processes_share_every_batch(ranks, monkeypatch):
    """The five utterances of the last batch are too few for eight processes: some come twice."""
    utterances = [make_utterances('a', duration)[0] for duration in DURATIONS]
    speech = data.Speech(utterances, [''])
    args, _ = train.parse_flags([])
    shares = []
    for rank in range(ranks):
        monkeypatch.setattr(train, 'RANK', rank)
        monkeypatch.setattr(train, 'RANKS', ranks)
        shares.append(train.epoch_loader(speech, 1, 1, args).batch_sampler)
    for whole, *parts in zip(batches_of(1), *shares, strict=True):
        assert set(sum(parts, [])) == set(whole)
        assert sum(map(len, parts)) == max(len(whole), ranks)


def test_long_utterances_are_scored_in_small_batches():
    utterances = make_utterances('aaa', 300) + make_utterances('a' * 20)
    batches = train.evaluation_batches(utterances, 16)
    assert [len(batch) for batch in batches] == [16, 4, 2, 1]


@pytest.fixture
def item_of(corpus):
    """A function of an epoch -> the sixth utterance's mels (T, 80), also without the first ones."""
    utterances, _ = data.read_corpus(corpus[1])

    def item(epoch, first=0, **settings):
        speech = data.Speech(utterances[first:], data.make_alphabet(utterances, ['']), **settings)
        return speech[epoch, 5 - first][0]

    return item


@cases('flag', ['spec_augment', 'speed_perturb'])
def test_augmentation_depends_on_seed_epoch_and_utterance(flag, item_of):
    item = functools.partial(item_of, **{flag: True})
    mels = item(3)
    assert torch.equal(mels, item(3, first=5))
    for other in item(4), item(3, seed=1):
        assert not torch.equal(mels[:50], other[:50])


def test_speed_perturbation_reaches_ten_per_cent(item_of):
    """Of the clip; the 20 frames of silence on each side stay as they are."""
    frames = len(item_of(3)) - 40
    lengths = [len(item_of(epoch, speed_perturb=True)) - 40 for epoch in range(40)]
    assert min(lengths) == approx(frames / 1.1, abs=3)
    assert max(lengths) == approx(frames / 0.9, abs=3)


def test_masks_are_zero_and_leave_the_rest(item_of):
    plain, masked = item_of(3), item_of(3, spec_augment=True)
    assert 0.4 < (masked == plain).float().mean() < 1
    assert not masked[masked != plain].any()


def test_concat_puts_an_utterance_of_the_speaker_behind():
    utterances = make_utterances('abc' * 7)
    speech = data.Speech(utterances, ['', *'abc'], concat=1)
    for u in utterances:
        (first, second), *_ = speech.draw(0, u)
        assert first is u
        assert second.speaker == u.speaker


# ---- data: corpora -------------------------------------------------------------------------------

# Corpora of every form: a line of each file; where recordings lie.
FORMS = {
    'nemo/train.jsonl': '{{"audio": "{id}.flac", "text": "{TEXT}", "speaker": "{u.speaker}"}}',
    'cv/train.tsv': '{u.speaker}\t{id}.wav\t{u.text}\t',
    'csv/train.csv': '../nemo/{id}.flac,"{TEXT}",{u.speaker}',
    'libri/{u.speaker}/1/a.trans.txt': '{id} {TEXT}',
    'an4/etc/x_train.fileids': '{u.speaker}/{id}',
    'an4/etc/x_train.transcription': '<s> <sil> {TEXT}(2) ++NOISE++ [COUGH] </s> ({id})',
}
RECORDINGS = {
    'nemo/{id}.flac': 'FLAC',
    'cv/clips/{id}.wav': 'WAV',
    'libri/{u.speaker}/1/{id}.flac': 'FLAC',
    'an4/wav/{u.speaker}/{id}.sph': 'NIST',
}


def write_forms(utterances, folder):
    """The same utterances as corpora of every form -> what names each."""
    def place(path):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        return folder / path

    lines = defaultdict(list, {'cv/train.tsv': ['client_id\tpath\tsentence\tgender'],
                               'csv/train.csv': ['file,transcript,speaker']})
    for u in utterances:
        wave, rate = soundfile.read(u.path)
        names = {'u': u, 'id': f'{u.speaker}-{u.path.stem}', 'TEXT': u.text.upper()}
        for path, form in RECORDINGS.items():
            soundfile.write(place(path.format(**names)), wave, rate, format=form)
        for path, line in FORMS.items():
            lines[path.format(**names)].append(line.format(**names))
    for path, content in lines.items():
        place(path).write_text('\n'.join(content))
    return [folder / name for name in ('nemo/train.jsonl', 'cv/train.tsv', 'csv/train.csv',
                                       'libri', 'an4')]


def first_batches(path):
    """An epoch of a corpus, as training gets it."""
    splits = data.read_splits((path, None, None), 1, 4)
    assert splits.valid
    alphabet = data.make_alphabet(splits.train, [''])
    speech = data.Speech(splits.train, alphabet, 4, speed_perturb=True)
    return list(train.load_batches(speech, train.training_batches(speech, 8, 0), 0))


def test_every_form_of_corpus_gives_the_same_batches(tmp_path, monkeypatch):
    """Of the built-in corpus, made small, which is spoken once."""
    monkeypatch.setattr(data, 'BUILTIN', {'train': (336, 11, 12)})
    manifest, = data.builtin_corpus(tmp_path / 'corpus')
    assert data.builtin_corpus(tmp_path / 'corpus') == [manifest]
    utterances, _ = data.read_corpus(manifest)
    expected, *others = map(first_batches, write_forms(utterances, tmp_path))
    for batches in others:
        for batch, same in zip(batches, expected, strict=True):
            assert all(map(torch.equal, batch, same))


@cases('sizes,fewest,most,whole', [
    ([6] * 20, 12, 12, True),
    ([60] + [4] * 15, 8, 8, True),  # none who has half of the recordings
    ([142] + [2] * 9, 2, 2, True),  # or 89 % of them
    ([24] * 5, 12, 24, False),      # of few speakers files, at random
])
@cases('seed', range(9))
def test_a_tenth_is_held_out(sizes, fewest, most, whole, seed):
    """Of speakers of these sizes; two by two, their recordings are of the same sound."""
    utterances = make_utterances(map(str, np.repeat(range(len(sizes)), sizes)))
    for i, u in enumerate(utterances):
        u.sound = f'{i // 2}'
    kept, valid = data.hold_out(utterances, seed)
    heard = {u.speaker for u in kept}
    assert fewest <= len(valid) <= most
    assert heard.isdisjoint(u.speaker for u in valid) == whole
    assert {u.sound for u in valid}.isdisjoint(u.sound for u in kept)


START = {  # of a corpus: the first line, and a good one
    'jsonl': ['', '{"audio": "0.wav", "text": "go"}'],
    'csv': ['path,sentence', '0.wav,go'],
    'tsv': ['path\tsentence', '0.wav\tgo'],
}


@cases('form,line,reason', [
    ('jsonl', '{"audio": "0.wav", "text": " "}', 'needs text and audio'),
    ('jsonl', '{"audio": "no.wav", "text": "a", "duration": 1}', 'no.wav is not a file'),
    ('jsonl', '{"audio": "0.wav", "text": "a", "duration": NaN}', 'its duration nan s'),
    ('jsonl', '{"audio": "0.wav", "text": "a", "duration": 5}', 'lasts 0.50 s, and not 5.00'),
    ('jsonl', '{"audio": "none.wav", "text": "a", "duration": 1}', 'holds no samples'),
    ('jsonl', '{"audio": "0.wav", "text": "a", "offset": 2}', 'its duration -1.5 s'),
    ('jsonl', '{"audio": "0.wav", "text": "a", "offset": -0.1}', 'its offset is -0.1 s'),
    ('jsonl', '{"audio": "phone.m4a", "text": "a"}', 'phone.m4a'),
    ('jsonl', '{"audio": "long.wav", "text": "a"}', 'up to 40 s'),
    ('jsonl', json_row('0.wav', 'abcdefgh' * 4), 'too short for its text'),
    ('jsonl', 'yes', 'Expecting value'),
    ('tsv', '0.wav', 'needs text and audio'),
    ('tsv', '0.wav\tzw\udcf6lf', 'utf-8'),
    ('csv', '0.wav,one,two', 'more columns than the header'),
])
def test_a_bad_row_is_named_and_the_others_are_read(form, line, reason, tmp_path):
    write_noise(tmp_path / '0.wav')
    write_noise(tmp_path / 'long.wav', 41)
    write_noise(tmp_path / 'none.wav', 0)
    (tmp_path / 'phone.m4a').write_bytes(b'\x00\x00\x00\x20ftypM4A ' + bytes(500))
    manifest = tmp_path / f'bad.{form}'
    lines = [*START[form], line, START[form][1]]
    manifest.write_text('\n'.join(lines), errors='surrogateescape')
    splits = data.read_splits((manifest, 'none', None), 0, 2)
    fault, = splits.faults
    assert [u.text for u in splits.train] == ['go', 'go']
    assert fault.startswith(f'{manifest}:3: ')
    assert reason in fault


def test_rows_of_other_systems_are_read(tmp_path):
    """An array for lines; a name with Windows' back-slash, and with an accent as a Mac writes it.
    """
    mac = unicodedata.normalize('NFD', 'é.wav')
    (tmp_path / 'clips').mkdir()
    write_noise(tmp_path / 'clips' / mac)
    rows = [{'path': 'clips\\é.wav', 'text': 'go'}, {'path': '2.wav', 'text': 'no'}]
    (tmp_path / 'm.json').write_text(json.dumps(rows, indent=1))
    [utterance], faults = data.read_corpus(tmp_path / 'm.json')
    assert utterance.path.name == mac
    fault, = faults
    assert fault.startswith(f'{tmp_path / "m.json"}: object 2: ')


def test_segments_are_cut_out_of_their_recording(tmp_path):
    """NeMo's offset and duration."""
    write_noise(tmp_path / 'u.wav', 1)
    manifest = tmp_path / 'm.jsonl'
    manifest.write_text(json_row('u.wav', 'left', offset=0.3, duration=0.6))
    [utterance], _ = data.read_corpus(manifest)
    segment, _ = data.load_utterance(utterance)
    assert torch.equal(segment, data.read_wave(tmp_path / 'u.wav')[4800:14400])


# ---- data: fuzz ----------------------------------------------------------------------------------

FUZZED = 2000 if 'SLOW' in os.environ else 60


def mutated(content, rng):
    """Some bytes cut out, doubled, or replaced by random ones."""
    for _ in range(rng.integers(1, 6)):
        place, size = rng.integers((len(content), 40))
        piece = content[place:place + size]
        other = [b'', piece + piece, rng.bytes(size)][rng.integers(3)]
        content = content[:place] + other + content[place + size:] or b'x'
    return content


def test_fuzzed_recordings_give_a_transcript_or_a_line(by_heart, tmp_path):
    rng = default_rng(0)
    checkpoint = checkpoint_of(by_heart)
    suffixes = ['wav', 'flac', 'ogg', 'mp3', 'aiff', 'au', 'caf']
    originals = [write_noise(tmp_path / f'a.{suffix}', 0.3) for suffix in suffixes]
    read = []
    for i in range(FUZZED):
        (tmp_path / 'fuzzed.wav').write_bytes(mutated(originals[i % 7], rng))
        with contextlib.suppress(monitor.UserError):
            wave = data.read_wave(tmp_path / 'fuzzed.wav')
            read.append(model.transcribe(checkpoint, wave))
    assert len(read) > FUZZED / 4


@cases('form', START)
def test_fuzzed_manifests_give_utterances_or_lines(form, tmp_path):
    rng = default_rng(0)
    write_noise(tmp_path / '0.wav', 0.1)
    manifest = tmp_path / f'm.{form}'
    for _ in range(FUZZED // 3):
        manifest.write_bytes(mutated('\n'.join(START[form] * 2).encode(), rng))
        with contextlib.suppress(monitor.UserError):
            splits = data.read_splits((manifest, 'none', None), 0, 2)
            assert '\n' not in ''.join(splits.faults)


# ---- data: inspection ----------------------------------------------------------------------------

def test_inspection_names_problems(tmp_path, printed):
    """Of ten good utterances, one with each problem, and one that is not there; each of the ten
    that are not good has the same text."""
    rng = default_rng(0)
    texts = random_texts(10, 3)
    voice = 0.5 * tones('abc', rng)
    problems = {
        'clipped, the peaks are flat': (16 * voice).clip(-1, 1),
        'near-silent, nowhere above': voice / 1000,
        'nothing above 4 kHz': np.sin(np.arange(16000) / 6),
        'of two channels that differ': np.array([voice, voice[::-1] / 9]).T,
        'of the same sound as another, and another text': voice / 2,
    }
    waves = [voice / 2, *(tones(text, rng) for text in texts[1:]), *problems.values(), voice]
    manifest = write_corpus(tmp_path, texts + ["ab'c!"] * 6, waves)
    (tmp_path / '15.wav').unlink()
    message = exit_code(data.main, manifest)
    out = printed()
    for i, problem in enumerate(problems, 10):
        assert re.search(f'files .*{problem}.* {i}.wav', out)
    assert 'not said    ! (' in out
    assert re.search('repeated    (4 .* 0|3 .* 1|2 .* 2) of validation', out)
    assert f'{manifest}:16: cannot be used' in message
    assert 'training    13 utt' in out
    assert 'validation  2 utt' in out


# ---- data: the built-in corpus -------------------------------------------------------------------

def test_a_sentence_is_said_into_a_file(tmp_path, printed):
    """At the times that are printed, louder than what lies before and behind."""
    data.main(['--say', 'Light  go', str(tmp_path / 'said.wav')])
    start, _, light, _, end, go = printed().split()
    wave = data.read_wave(tmp_path / 'said.wav')
    times = torch.arange(len(wave)) / 16000
    spoken = (times > float(start)) & (times < float(end) + 0.15)
    assert (light, go) == ('light', 'go')
    assert wave.numpy() == approx(data.synthesise('light go')[0], abs=1e-4)
    assert wave[spoken].std() > 3 * wave[~spoken].std()


def test_the_synthesiser_refuses_other_words():
    assert 'synthesiser says' in exit_code(data.main, '--say', 'seven elephants', 'said.wav')


def warping_distance(a, b):
    """Length-normalised dynamic time warping distance of two mel sequences (T, 80)."""
    cost = torch.cdist(a, b).numpy()
    total = np.full((len(a) + 1, len(b) + 1), np.inf)
    total[0, 0] = 0
    for i, j in np.ndindex(cost.shape):
        total[i + 1, j + 1] = cost[i, j] + total[i:i + 2, j:j + 2].min()
    return total[-1, -1] / sum(cost.shape)


def spoken_words(speaker, n):
    """n random words by a speaker, cut out by their known times -> [(word, mels (T, 80))]."""
    text = ' '.join(default_rng(speaker).permutation(list(data.WORDS))[:n])
    wave, words = data.synthesise(text, speaker)
    mels, first = data.features(torch.tensor(wave))
    return [(word, mels[int(100 * start) - first:int(100 * end) - first:2])
            for word, start, end in words]


@slow
def test_a_template_matcher_fails_on_the_built_in_corpus():
    """One speaker's words as templates for those of twelve of validation's, though cut out by their
    known times: the network has to find them."""
    templates = spoken_words(0, 20)
    wrong = 0
    for speaker in range(300, 312):
        for word, mels in spoken_words(speaker, 8):
            distances = [warping_distance(template, mels) for _, template in templates]
            wrong += templates[np.argmin(distances)][0] != word
    assert wrong / 96 >= 0.2


# ---- model: alignment and lengths ----------------------------------------------------------------

@cases('config,grid', [
    ({'frames_per_output': 1}, 1),
    ({'frames_per_output': 2}, 2),
    ({'frames_per_output': 4}, 4),
    pytest.param({'frames_per_output': 1, 'upsample': 'transpose'}, 4, id='wrong_length'),
    pytest.param(BEFORE, 8, id='wrong_length, deep path alone'),
])
@torch.no_grad()
def test_output_length_is_exact(config, grid):
    """ceil(T / frames_per_output) for every T from 1 to 40; but of a transposed convolution whole
    frames of the path that gives fewest."""
    backbone = make_network(**config).eval().backbone
    for t in range(1, 41):
        features, lengths = backbone(torch.zeros(1, 1, t, 80), torch.tensor([t]))
        assert features.shape[1] == lengths
        assert lengths == grid // config['frames_per_output'] * math.ceil(t / grid)


@cases('frames_per_output', [1, 2, 4])
@cases('config', [
    {},
    {'blocks': 3},
    {'deep_path': 'alone'},
])
@torch.no_grad()
def test_outputs_are_centred_on_their_input(frames_per_output, config):
    """A click at mel frame t changes the features around t.

    Kernels of equal weights and no activations: what remains is where the network looks. The centre
    of mass of the change, over 64 positions, lies within half an output.
    """
    network = make_network(frames_per_output=frames_per_output, **config).eval()
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):  # ones would overflow after 11 blocks
            nn.init.constant_(module.weight, 1 / module.weight[0].numel())
        if isinstance(module, model.ConvNorm):
            module[2] = nn.Identity()
    clicks = torch.arange(160, 224)
    mels = torch.zeros(64, 1, 384, 80)
    mels[range(64), 0, clicks] = 1
    # Features of silence would be zero.
    features, _ = network.backbone(mels, torch.full((64,), 384))
    change = features.abs().sum(2)
    # The middle of the mel frames that each output stands for.
    middles = torch.arange(0, 384, frames_per_output) + (frames_per_output - 1) / 2
    error = (change * middles).sum(1) / change.sum(1) - clicks
    assert error.mean().abs() <= frames_per_output / 2 + 1e-3


# ---- model: initialisation -----------------------------------------------------------------------

@cases('config,name,deviation', [
    ({}, 'head.weight', math.sqrt(2 / (512 + 6))),            # Glorot & Bengio 2010, equation 12
    ({}, 'backbone.early.projection.weight', 0.02),
    ({}, 'backbone.stem.0.weight', math.sqrt(2 / (16 * 9))),  # He et al. 2015: 2 / fan_out
    (BEFORE, 'head.weight', 0.01),
    (BEFORE, 'recurrent.0.forward_lstm.bias_ih_l0', 1 / 16 / math.sqrt(3)),  # uniform, to 1/16
])
def test_weights_begin_with_the_deviation_of_their_role(config, name, deviation):
    weights = make_network(**config).get_parameter(name)
    assert weights.std().item() == approx(deviation, rel=0.1)


def test_lstms_are_orthogonal_and_begin_by_remembering():
    lstm = make_network().recurrent[1].backward_lstm
    biases = lstm.bias_ih_l0 + lstm.bias_hh_l0
    assert biases.tolist() == [0.0] * 256 + [1.0] * 256 + [0.0] * 512  # the second: forget gate
    for gate in lstm.weight_hh_l0.chunk(4):
        assert torch.allclose(gate @ gate.T, torch.eye(256), atol=1e-5)


def test_the_gate_lets_a_tenth_of_the_deep_path_pass():
    backbone = make_network(hidden=8).eval().backbone
    backbone.early.forward = backbone.deep.forward = lambda *x: torch.ones(1, 10, 256)
    features, _ = backbone(torch.ones(1, 1, 40, 80), torch.tensor([40]))
    assert features.unique().item() == approx(1.1)


def test_running_statistics_serve_short_runs():
    """Plain average of the first three batches, then momentum 0.3, written out."""
    norm = model.BatchNorm(1)
    means = []
    expected = 0.0
    for step in range(20):
        x = torch.randn(4, 1, 5, 5) + step
        norm(x)
        means.append(x.mean().item())
        expected = np.mean(means) if step < 3 else 0.7 * expected + 0.3 * means[-1]
        assert norm.running_mean.item() == approx(expected, rel=1e-4, abs=1e-5)


# ---- model: padding and masks --------------------------------------------------------------------

@torch.no_grad()
def shaken_network(config):
    """A network with random batch norm, its statistics those of random input, a loud head and gate:
    an untrained, near-uniform network hides leaks."""
    network = make_network(hidden=16, **config)
    for name, parameter in network.named_parameters():
        if name.endswith('gate') or parameter.dim() == 1:
            parameter.add_(torch.rand(len(parameter)) - 0.5)
    nn.init.normal_(network.head.weight, 0, 0.5)
    # In training mode: sets the statistics.
    network(torch.randn(4, 1, 160, 80) + torch.randn(80), torch.full((4,), 160))
    return network.eval()


@cases('config', [
    {},
    {'blocks': 3},
    LITERAL,
    BEFORE,
    {'squeeze_excite': True, 'upsample': 'transpose', 'frames_per_output': 2},
])
@torch.no_grad()
def test_a_clip_alone_equals_itself_in_a_batch(config):
    """Of clips of four lengths, with noise behind their ends too."""
    network = shaken_network(config)
    mels, lengths = torch.randn(4, 1, 160, 80), torch.tensor([160, 77, 122, 33])
    together, outputs = network(mels, lengths)
    for i, (length, n) in enumerate(zip(lengths, outputs)):
        alone, _ = network(mels[i:i + 1, :, :length], lengths[i:i + 1])
        assert torch.allclose(alone[0, :n], together[i, :n], atol=1e-4)


# ---- model: CTC and decoding ---------------------------------------------------------------------

def all_paths(log_probs):
    """Every path of outputs (T', V): what it collapses to, itself, its log-likelihood."""
    outputs, symbols = log_probs.shape
    rows = log_probs.tolist()
    for path in itertools.product(range(symbols), repeat=outputs):
        text = tuple(symbol for symbol, _ in itertools.groupby(path) if symbol)
        yield text, path, sum(row[symbol] for row, symbol in zip(rows, path))


def ctc_loss(log_probs, text):
    """PyTorch's, of one clip's log-probabilities (T', V)."""
    return F.ctc_loss(log_probs, torch.tensor(text), (len(log_probs),), (len(text),),
                      reduction='sum').item()


def test_the_worked_example_of_ctc():
    """Of the comment in model.py: by all paths and by PyTorch."""
    comment = Path(model.__file__).read_text()
    log_probs = torch.tensor([[0.2, 0.7, 0.1],
                              [0.3, 0.2, 0.5],
                              [0.6, 0.1, 0.3]]).log()
    for text, path, score in all_paths(log_probs):
        letters = ''.join('-ab'[symbol] for symbol in path)
        by_hand = re.search(rf' {letters}    [\d. *]+ = {math.exp(score):.3f}', comment)
        assert bool(by_hand) == (text == (1, 2))
    assert f'loss = -ln 0.432 = {ctc_loss(log_probs, (1, 2)):.3f} ' in comment


@cases('text', [
    (1,),
    (1, 1),
    (2, 1, 2),
])
def test_ctc_loss_against_all_paths(text):
    """The loss is minus the log of the sum over all paths that collapse to the text."""
    log_probs = torch.randn(5, 3).log_softmax(1)
    total = sum(math.exp(score)
                for other, _, score in all_paths(log_probs)
                if other == text)
    assert ctc_loss(log_probs, text) == approx(-math.log(total), abs=1e-4)


def test_greedy_decoding_collapses_the_best_path():
    assert model.greedy_decode(torch.eye(3)[[0, 1, 1, 0, 1, 2]], ['', 'a', 'b']) == 'aab'


B = (1 + 3 / 4) / (6 + 3)   # P(b), of the example in CharacterModel's docstring


@cases('text,character,probability', [
    ('b', model.END, (1 + (2 + 3 / 4) / 9) / 2),
    ('a', 'b', (1 + 3 * B) / 6),
    ('ba', 'b', (1 + 3 * B) / 6),  # contexts never seen say what shorter ones do
    ('', 'x', 3 / 4 / 9),
])
def test_the_character_model_counts_as_by_hand(text, character, probability):
    language_model = model.CharacterModel.of_texts(['ab', 'aa'], order=2)
    assert language_model.log_prob(text, character) == approx(math.log(probability))


def test_the_character_models_probabilities_sum_to_one(monkeypatch):
    """Over all that was seen, and one more for what was not; without rare contexts."""
    monkeypatch.setattr(model, 'MOST_CONTEXTS', 1)
    language_model = model.CharacterModel.of_texts(['go left', 'go right', 'left'])
    assert 'lef' in language_model.counts
    assert 'rig' not in language_model.counts
    for context in '', 'go', 'lef', 'rig', 'zzz':
        total = sum(math.exp(language_model.log_prob(context, character))
                    for character in {*'go left right', model.END, 'never seen'})
        assert total == approx(1)


@cases('seed', range(6))
@cases('weight,bonus', [
    (0.0, 0.0),
    (0.6, 1.5),
    (2.0, 0.5),
])
def test_beam_search_finds_the_best_text_of_all(weight, bonus, seed, monkeypatch):
    """A beam as wide as there are texts, against all 4^6 paths."""
    def score(text):
        prior = sum(language_model.log_prob(text[:i], character)
                    for i, character in enumerate(text + model.END))
        return math.log(likelihood[text]) + weight * prior + bonus * len(text)

    monkeypatch.setattr(model, 'LM_WEIGHT', weight)
    monkeypatch.setattr(model, 'LABEL_BONUS', bonus)
    language_model = model.CharacterModel.of_texts(['ab a', 'aab', 'a b'], order=3)
    alphabet = ['', 'a', 'b', ' ']
    torch.manual_seed(seed)
    log_probs = (2 * torch.randn(6, 4)).log_softmax(1)
    likelihood = Counter()
    for symbols, _, log_likelihood in all_paths(log_probs):
        likelihood[''.join(alphabet[symbol] for symbol in symbols)] += math.exp(log_likelihood)
    heard = model.beam_decode(log_probs, alphabet, language_model, 10_000)
    assert heard == max(likelihood, key=score)


def test_beam_search_of_a_long_clip_neither_fades_nor_forgets():
    """4,000 outputs, whose probability as a number would be zero: every letter is found."""
    log_probs = (2.0 * F.one_hot(torch.tensor([0, 1, 0, 2] * 1000), 3)).log_softmax(1)
    language_model = model.CharacterModel.of_texts(['ab' * 9])
    text = model.beam_decode(log_probs, ['', 'a', 'b'], language_model, width=4)
    assert text == 'ab' * 1000


# ---- model: alignment and word times -------------------------------------------------------------

@cases('text', [
    (1, 2),
    (1, 1),
    (1, 2, 2),
])
def test_alignment_is_the_best_of_all_paths(text):
    log_probs = (torch.randn(6, 3) + torch.arange(3)).log_softmax(1)  # few blanks
    scores = {path: score
              for other, path, score in all_paths(log_probs)
              if other == text}
    which = model.align(log_probs, torch.tensor(text))
    path = torch.tensor([*text, 0])[which]  # -1, of a blank, picks the last
    assert tuple(path.tolist()) == max(scores, key=scores.get)


@cases('text,path,loud,expected', [
    # From where the sound begins; 0.3 s at most, not endlessly.
    ('a', '------aa--------------',
          '    ##################', [(4, 13)]),
    ('a', '--------------------------------------------aa--------------',
          '############################################################', [(14, 51)]),
    # 0.3 of the gap is the first one's; a word does not last over a pause.
    ('a a', '--aaaaaa-   ------aaaa--------',
            '##############################', [(0, 11), (11, 27)]),
    ('aaa', '-a-a----------------------------------------a-----',
            '####                                              ', [(0, 9)]),
])
def test_words_are_as_wide_as_their_sound(text, path, loud, expected):
    symbols = torch.tensor(['-a '.index(c) for c in path])
    log_probs = (9.0 * F.one_hot(symbols, 3)).log_softmax(1)
    mels = torch.tensor([[float(c == '#')] for c in loud]) - 0.5
    words = model.Transcript(text, mels, 0.5, log_probs, ['', 'a', ' '], 1).words
    times = np.array([(word.start, word.end) for word in words])
    assert times == approx(0.5 + np.array(expected) / 100)
    assert words[0].confidence == approx(log_probs.max().exp().item())


# ---- model: checkpoints and transcripts ----------------------------------------------------------

def test_a_checkpoint_describes_itself(whole, printed):
    model.main([str(whole / 'best.pt')])
    assert re.search("(?s)alphabet: ' abcdefgh'.trained on .*manifest.jsonl, 20 utterances, .* "
                     '4 epochs.valid: WER', printed())


@pytest.fixture
def hear(by_heart, monkeypatch, printed):
    """python model.py, with the words of a command line, beside a run's clips -> what it prints."""
    def run(command):
        model.main(command.split())
        return printed()

    monkeypatch.chdir(by_heart.parent)
    return run


def test_three_lines_of_python_give_what_main_prints(hear):
    """The lines of model.py's docstring."""
    checkpoint = model.load_checkpoint('run/best.pt')
    wave = data.read_wave('0.wav')
    heard = model.transcribe(checkpoint, wave, beam=8)
    lines = [f'{word.start:6.2f} {word.end:6.2f}  {word.confidence:.2f}  {word.text}'
             for word in heard.words]
    assert ' '.join(word.text for word in heard.words) == heard.text == 'seven two nine'
    assert hear('run/best.pt 0.wav --times --beam=8').splitlines() == [heard.text, *lines]
    later = model.transcribe(checkpoint, F.pad(wave, (16000, 0)))  # a second of silence before
    assert later.words[-1].end == approx(heard.words[-1].end + 1)


def test_lm_text_is_what_beam_search_expects(hear, monkeypatch, capsys):
    """Where the character model weighs most, the training transcripts' own and another's, whose
    sentences are counted on a terminal."""
    monkeypatch.setattr(model, 'LM_WEIGHT', 20)
    Path('text.txt').write_text('ZGOZ')
    assert hear('run/best.pt 1.wav --beam=8') == 'light go\n'
    assert hear('run/best.pt 1.wav --beam=8 --lm_text=text.txt') != 'light go\n'
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True)
    counts = model.read_character_model('text.txt', ['', 'g', 'o']).counts
    assert counts == model.CharacterModel.of_texts(['go']).counts
    assert ' 1/1' in capsys.readouterr().err


def test_a_missing_clip_does_not_stop_the_others(hear, printed):
    message = exit_code(model.main, 'run/best.pt', 'no.wav', '0.wav')
    assert message.startswith('model.py: no.wav: cannot be used')
    assert printed() == '0.wav: seven two nine\n'


def test_what_was_not_in_training_is_said(hear, capsys):
    """Speech from a telephone, and a letter; of two channels, one is transcribed by a flag."""
    wave = data.read_wave('0.wav')
    soundfile.write('phone.wav', data.resample(wave, 16000, 8000), 8000)
    model.main(['run/best.pt', 'phone.wav'])
    assert 'phone.wav: nothing above 4 kHz' in capsys.readouterr().err
    Path('phone.jsonl').write_text(json_row('phone.wav', 'zone'))
    trained('phone', '--evaluate=run/best.pt', '--test_data=phone.jsonl')
    out = capsys.readouterr().out
    assert '1 recordings: nothing above 4 kHz' in out
    assert 'characters that training lacks, each counted as an error: z\n' in out
    soundfile.write('call.wav', np.stack([0 * wave, wave], 1), 16000)
    assert hear('run/best.pt call.wav --channel=2') == hear('run/best.pt 0.wav')
    assert 'call.wav: cannot be used (it has no channel 3)' in exit_code(
        model.main, 'run/best.pt', 'call.wav', '--channel=3')


@cases('command,words', [
    ('digits.txt', 'digits.txt: cannot be used'),
    ('old.pt', 'old.pt: cannot be used (its format is 2, this code reads'),
    ('run/best.pt 0.wav --times', '0.wav: cannot be used (too long'),
    ('run/best.pt 0.wav --lm_text=digits.txt', 'digits.txt: cannot be used (it holds'),
])
def test_what_model_cannot_use_is_a_line(command, words, hear, monkeypatch):
    monkeypatch.setattr(model, 'MOST_STEPS', 10)
    torch.save({'format': 2}, 'old.pt')
    Path('digits.txt').write_text('123')
    message = exit_code(model.main, *command.split())
    assert message.startswith(f'model.py: {words}')
    assert '\n' not in message


def test_a_clip_is_drawn(hear):
    pyplot = pytest.importorskip('matplotlib.pyplot')
    hear('run/best.pt 0.wav --plot=clip.png')
    assert pyplot.imread('clip.png').shape[1] == 1000


# ---- train: learning -----------------------------------------------------------------------------

def read_weights(run):
    """The weights of a run's best.pt: {name: their bytes}."""
    weights = torch.load(run / 'best.pt', weights_only=True)['model']
    return {name: weight.numpy().tobytes() for name, weight in weights.items()}


def ctc_loss_of(network, batch):
    """-> the loss of a batch, the log-probabilities, their lengths."""
    mels, lengths, targets, target_lengths = batch
    log_probs, lengths = network(mels, lengths)
    loss = F.ctc_loss(log_probs.transpose(0, 1), targets, lengths, target_lengths)
    return loss, log_probs, lengths


def test_two_samples_are_learnt(tmp_path):
    """First loss on the uniform line, none below zero, the last near zero, words right; with the
    loop written out."""
    texts = ['bad cab', 'face a head']
    utterances, _ = data.read_corpus(write_corpus(tmp_path, texts))
    alphabet = data.make_alphabet(utterances, [''])
    batch, = train.load_batches(data.Speech(utterances, alphabet), [[(0, 0), (0, 1)]], 0)
    network = make_network(len(alphabet))
    optimizer, schedule = train.make_optimizer(network, flags_of(), 45)
    losses = []
    for _ in range(45):
        loss, _, lengths = ctc_loss_of(network, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    targets = [data.encode(text, alphabet) for text in texts]
    uniform, _ = monitor.plateau_lines(targets, lengths, len(alphabet))
    loss, log_probs, lengths = ctc_loss_of(network.eval(), batch)
    heard = [model.greedy_decode(clip[:length], alphabet)
             for clip, length in zip(log_probs, lengths)]
    assert losses[0] == approx(uniform, rel=0.15)
    assert min(losses) > -1e-4
    assert loss < 0.05
    assert heard == texts


def learning_rates(updates, *flags):
    """The learning rate of each update."""
    optimizer, schedule = train.make_optimizer(nn.Linear(2, 2), flags_of(*flags), updates)
    rates = []
    for _ in range(updates):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        schedule.step()
    return rates


def test_the_learning_rate_climbs_and_falls():
    rates = learning_rates(200)
    assert max(rates) == approx(3e-3)
    assert rates.index(max(rates)) == 19               # the 20th of 200: 10 %
    assert rates[109] == approx(1.5e-3, 1e-3)   # a cosine is half way down at half time
    assert rates[-1] < 1e-7


def test_a_schedule_for_any_number_of_updates():
    for updates in range(1, 30):
        assert len(learning_rates(updates)) == updates
    assert set(learning_rates(20, '--schedule=constant')) == {3e-4}


# ---- train: flags --------------------------------------------------------------------------------

@session
def tiny(tmp_path_factory):
    """A function of flags -> the folder of a run, of an epoch on four utterances."""
    folder = tmp_path_factory.mktemp('tiny')
    manifest = write_corpus(folder, ['ab', 'cd', 'ba', 'dc'])
    return functools.cache(lambda *flags: trained(
        tmp_path_factory.mktemp('tiny') / 'run', f'--train_data={manifest}',
        f'--valid_data={manifest}', '--epochs=1', '--batch_size=4', *SMALL, *flags))


@cases('flags', [
    '--num_train_samples=3', '--spec_augment', '--batch_size=1', '--seed=1', '--blocks=5',
    '--hidden=8', '--concat=1',
    *(f'--blocks=5 --batch_size=1 --undo={name}' for name in train.FIXES)])
def test_each_flag_changes_the_trained_weights(flags, tiny):
    """The last of them, where there are several."""
    *others, _ = flags = flags.split()
    assert read_weights(tiny(*flags)) != read_weights(tiny(*others))


def test_a_run_repeats_from_its_seed(tiny):
    """In spite of dropout, whoever loads its recordings."""
    weights = read_weights(tiny('--dropout=0.5'))
    assert read_weights(tiny('--dropout=0.5', '--workers=1')) == weights


@cases('flag,words', [
    ('--batch_size=0', '--batch_size: invalid int from 1'),
    ('--frames_per_output=3', '(choose from 1, 2, 4)'),
    ('--undo=luck', 'forget_bias'), ('--device=abacus', 'abacus'),
    ('--undo=all --only=dropout', 'not allowed with'), ('--init_from=none.pt', 'none.pt'),
    ('--evaluate=none.pt', 'none.pt'), ('--train_data=no.tsv', 'no.tsv'),
    ('--resume=runs/it', 'it takes --resume, --device, ')])
def test_bad_flags_end_in_a_message(flag, words, corpus, tmp_path, capsys):
    message = exit_code(train.main, *corpus, '--run_dir', tmp_path / 'run', *flag.split())
    if message == 2:  # argparse prints, and exits with a number
        message = capsys.readouterr().err.strip().split('\n')[-1]
    assert words in message
    assert '\n' not in message
    assert not (tmp_path / 'run').exists()


def test_help_lists_the_fixes(printed):
    assert exit_code(train.main, '--help') == 0
    assert 'forget_bias: forget_bias False' in printed()


# ---- train: the freeze ---------------------------------------------------------------------------

def fingerprint(tensors):
    """One number for many: rounding on another machine moves it by far less than a thousandth."""
    row = torch.cat([tensor.flatten() for tensor in tensors]).double()
    return float(row @ torch.linspace(1, 2, len(row)).double().cos())


def test_features_and_weights_are_frozen(corpus, tmp_path):
    """Whoever changes one of these numbers makes all that was measured before hold no longer."""
    waves = [torch.tensor(data.synthesise('seven stop two', speaker)[0]) for speaker in range(20)]
    run = trained(tmp_path / 'run', *corpus, *SMALL, '--epochs=1')
    weights = checkpoint_of(run).network.state_dict().values()
    assert fingerprint(data.features(wave)[0] for wave in waves) == approx(
        -1213.7, rel=1e-3)
    assert fingerprint(weights) == approx(299.93, rel=1e-3)


# ---- train: the fixes ----------------------------------------------------------------------------

@cases('flags,undone', [
    ('--undo all', {*train.FIXES}), ('--undo ours', {'deep_path', 'interctc', 'output_rate'}),
    ('--undo dropout upsample', {'dropout', 'upsample'}), ('--undo dropout --dropout=0.05', ()),
    ('--only dropout', {*train.FIXES} - {'dropout'})])
def test_fixes_are_taken_back(flags, undone):
    """By groups, one by one, or all but some; a flag that is given is heard."""
    args, today = flags_of(*flags.split()), flags_of()
    for name, (setting, before, _) in train.FIXES.items():
        expected = before if name in undone else getattr(today, setting)
        assert getattr(args, setting) == expected, name


@slow
@cases('flag', [
    '--undo=all', '--undo=ours', *(f'--undo={name}' for name in train.FIXES),
    *(f'--only={name}' for name in train.FIXES)])
def test_every_choice_of_fixes_trains(flag, corpus, tmp_path):
    run = trained(tmp_path / 'run', *corpus, '--epochs=1', flag)
    assert read_log(run)[0]['updates'] == 3


# ---- train: what a run leaves --------------------------------------------------------------------

def test_what_a_run_leaves(whole):
    """best.pt is of the last of the best epochs, as all are here."""
    results, log = read_results(whole), read_log(whole)
    assert sorted(path.name for path in whole.iterdir()) == [
        'best.pt', 'clip.wav', 'config.json', 'log.jsonl', 'results.json', 'test.tsv', 'valid.tsv']
    assert [record['updates'] for record in log] == [10, 20, 30, 40]
    assert checkpoint_of(whole).run['epoch'] == 4
    assert results['valid']['wer'] == log[-1]['wer']
    assert results['test']['utterances'] == 9
    assert results['test, sentences new to training, beam search']['utterances'] == 6


def test_a_run_is_not_overwritten(whole, corpus):
    assert '--run_dir: ' in exit_code(train.main, *corpus, '--run_dir', whole)


def test_bad_utterances_end_a_run_or_are_left_out(tmp_path):
    """A missing file, a text too long. In validation a text too long for its clip, and one in
    letters that training lacks, are errors, and have no loss."""
    bad = Path(write_corpus(tmp_path, ['ab', 'cd']))
    run, valid = tmp_path / 'run', tmp_path / 'valid.json'
    valid.write_text('\n'.join(json_row('0.wav', text) for text in ('ab', 'abcd ' * 30, 'xyz')))
    rows = [bad.read_text(), json_row('gone.wav', 'ab'), json_row('0.wav', 'ab' * 400)]
    bad.write_text('\n'.join(rows))
    flags = ['--train_data', bad, '--valid_data', valid, *SMALL, '--epochs=1']
    gone, long, advice = exit_code(train.main, *flags, '--run_dir', run).split('\n')
    assert f'{bad}:4' in gone
    assert f'{bad}:5' in long
    assert advice == '2 utterances cannot be used; --skip_bad leaves them out'
    trained(run, *flags, '--skip_bad')
    assert read_results(run)['valid']['words'] == 32
    assert 0 < read_log(run)[0]['valid_loss'] < math.inf


def test_a_broken_recording_that_training_meets_is_a_line(tmp_path, monkeypatch):
    """Those of large corpora are not decoded beforehand."""
    monkeypatch.setattr(train, 'CHECK_UP_TO', 0)
    manifest = write_corpus(tmp_path, ['ab', 'cd', 'ba'])
    os.truncate(tmp_path / '2.wav', 5000)
    message = exit_code(train.main, '--train_data', manifest, '--valid_data=none', *SMALL,
                        '--workers=1', '--run_dir', tmp_path / 'run')
    assert re.fullmatch(f'train.py: {manifest}:3: .*2.wav.*', message)


def test_an_update_without_finite_gradient_ends_in_a_line(corpus, tmp_path):
    message = exit_code(train.main, *corpus, *SMALL, '--learning_rate=1e9', '--run_dir',
                        tmp_path / 'run')
    assert re.fullmatch('train.py: update 2: the loss is .* lower --learning_rate.*', message)


# ---- train: runs survive -------------------------------------------------------------------------

def outcome(folder):
    """{file: content} of a finished run, without its seconds and its name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()} | {
        'log.jsonl': [record | {'seconds': 0} for record in read_log(folder)],
        'best.pt': read_weights(folder), 'config.json': None}


def kill(command, folder, kill_signal, rng):
    """Start python train.py in a process and end it at a random moment, often while it writes a
    file -> what it said of that."""
    process = subprocess.Popen([sys.executable, '-u', train.__file__, *map(str, command)],
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()  # Ctrl-C while Python imports is Python's own to answer
    while process.poll() is None and not (folder / 'config.json').exists():
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 2))
    for _ in range(rng.choice([0, 1, 4])):
        while process.poll() is None and not [*folder.glob('unfinished.*')]:
            pass
        time.sleep(rng.uniform(0, 0.003))
    process.send_signal(kill_signal)
    return process.communicate()[1]


def survive(flags, uninterrupted, folder, kill_signal, rng, kills):
    """Kill a run this often and let it finish; it must leave what the uninterrupted one leaves."""
    command = [*flags, '--run_dir', folder]
    for _ in range(kills):
        err = kill(command, folder, kill_signal, rng)
        assert err.count('\n') <= 1, err
        command = ['--resume', folder]
    with contextlib.suppress(SystemExit):  # by which it says that it was finished
        train.main([f'--resume={folder}'])
    assert outcome(folder) == outcome(uninterrupted)


def test_a_killed_run_goes_on_as_if_nothing_had_been(whole_flags, whole, tmp_path):
    survive(whole_flags, whole, tmp_path / 'run', signal.SIGKILL, random.Random(9), kills=1)


@slow
def test_forty_killed_runs_go_on_as_if_nothing_had_been(whole_flags, whole, tmp_path):
    signals = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
    for i in range(40):
        survive(whole_flags, whole, tmp_path / f'{i}', signals[i % 3], random.Random(i), kills=2)


def interrupt(*arguments):
    """Ctrl-C."""
    raise KeyboardInterrupt


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run of three epochs that was stopped after the first -> its folder, beside its corpus."""
    manifest = write_corpus(tmp_path / 'corpus', ['ab', 'cd', 'ba', 'dc'])
    epochs = iter([train.train_epoch, interrupt])
    with monkeypatch.context() as context:
        context.setattr(train, 'train_epoch', lambda *arguments: next(epochs)(*arguments))
        message = exit_code(train.main, f'--train_data={manifest}', '--valid_data=none',
                            '--epochs=3', *SMALL, '--run_dir', tmp_path / 'run')
    command = f'{sys.orig_argv[0]} train.py --resume {tmp_path / "run"}'
    assert message == f'train.py: stopped; to go on: {command}'
    return tmp_path / 'run'


def test_a_resumed_run_trains_what_is_left_and_says_that_it_is_finished(stopped, tiny, capsys):
    """With the weights of an uninterrupted run, on the same utterances."""
    train.main([f'--resume={stopped}', '--workers=1'])
    assert 'epoch   1' not in capsys.readouterr().out
    assert read_weights(stopped) == read_weights(tiny('--epochs=3', '--valid_data=none'))
    (stopped.parent / 'corpus/manifest.jsonl').unlink()  # it needs no data any more
    assert exit_code(train.main, '--resume', stopped) == 0
    assert 'is finished: nothing is left to do' in capsys.readouterr().err


def test_a_resumed_run_finds_its_data_where_it_lies_now(stopped):
    moved = (stopped.parent / 'corpus').rename(stopped.parent / 'moved')
    train.main([f'--resume={stopped}', f'--train_data={moved}/manifest.jsonl'])
    assert len(read_log(stopped)) == 3


def test_a_resumed_run_is_the_one_that_was_stopped(stopped):
    """With the same data, and a state that can be read."""
    manifest = stopped.parent / 'corpus/manifest.jsonl'
    rows = manifest.read_text()
    manifest.write_text(rows.replace('dc', 'dcc'))
    message = exit_code(train.main, '--resume', stopped)
    assert 'the texts or durations of its data have changed' in message
    manifest.write_text(rows)
    (stopped / 'state.pt').write_bytes(b'x')
    assert f'{stopped / "state.pt"}: cannot be used' in exit_code(train.main, '--resume', stopped)
    assert 'nowhere/state.pt: cannot be used' in exit_code(train.main, '--resume=nowhere')


# ---- train: weights of another run, scoring, --overfit -------------------------------------------

def test_a_run_can_start_from_anothers_weights(tiny, corpus, tmp_path, printed):
    """New characters alone are drawn; not in a network of another size."""
    flags = [*corpus, '--epochs=1', *SMALL, '--init_from', tiny() / 'best.pt', '--learning_rate=0']
    run = tmp_path / 'run'
    assert '--init_from' in exit_code(train.main, *flags, '--hidden=8', '--run_dir', run)
    before, after = checkpoint_of(tiny()), checkpoint_of(trained(run, *flags))
    assert 'epoch   0: WER ' in printed()
    letters = len(before.alphabet)
    assert before.alphabet == after.alphabet[:letters] != after.alphabet
    for name, weights in before.network.named_parameters():
        assert torch.equal(after.network.get_parameter(name)[:len(weights)], weights)


def test_best_pt_is_never_worse_than_what_a_run_starts_from(by_heart, tmp_path):
    manifest = by_heart.parent / 'manifest.jsonl'
    run = trained(tmp_path / 'run', '--train_data', manifest, '--valid_data', manifest,
                  '--init_from', by_heart / 'best.pt', '--epochs=2', '--learning_rate=1')
    assert read_log(run)[-1]['wer'] > 0
    assert checkpoint_of(run).run['epoch'] == 0


def test_overfit_learns_by_heart_and_a_checkpoint_is_scored(by_heart, tmp_path):
    """Training stops once all is learnt; --evaluate hears what the run heard."""
    flags = ['--evaluate', by_heart / 'best.pt']
    assert 'by --test_data' in exit_code(train.main, *flags, '--run_dir', tmp_path / 'score')
    run = trained(tmp_path / 'score', *flags, '--test_data', by_heart.parent / 'manifest.jsonl')
    assert 50 <= read_log(by_heart)[-1]['updates'] < 7 * 50
    assert read_results(run)['test, beam search']['wer'] == 0
    heard = [(row['file'], row['heard']) for row in monitor.read_run(run)['sentences']]
    assert heard == [('0.wav', 'seven two nine'), ('1.wav', 'light go')]


def test_overfit_says_what_was_not_learnt():
    record = {'cer': 6.6, 'updates': 350}
    with pytest.raises(monitor.UserError, match='NOT LEARNT.*CER 6.6 %.*monitor.py runs/it'):
        train.report_overfit(record, flags_of('--run_dir=runs/it'))


# ---- train: two processes, and speed -------------------------------------------------------------

@slow
def test_two_processes_train_as_one(tmp_path):
    """torchrun's two processes average their gradients.

    All utterances have the same sound, so that batch norm has nearly the same statistics in both,
    and differ in their texts, so that each has gradients of its own. Without dropout, both take
    nearly the steps of one process: their weights end an eighth of the way off, and half of it
    where nothing is averaged.
    """
    manifest = write_corpus(tmp_path, random_texts(8, 4), [tones('abc def gh', default_rng(0))] * 8)
    flags = ['--train_data', manifest, '--valid_data=none', '--epochs=6', '--dropout=0',
             '--learning_rate=1e-6', *SMALL]
    two = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2',
                          train.__file__, *flags, '--run_dir', tmp_path / 'two'],
                         capture_output=True, text=True)
    assert two.stdout.count('epoch   1') == 1, two.stderr
    trained(tmp_path / 'one', *flags)
    trained(tmp_path / 'none', *flags, '--learning_rate=0')
    weights = [checkpoint_of(tmp_path / run).network.parameters() for run in ('one', 'two', 'none')]
    one, two, none = map(nn.utils.parameters_to_vector, weights)
    assert (two - one).norm() < 0.25 * (one - none).norm()


def test_benchmark_prints_one_object(corpus, printed):
    train.main([*corpus, '--benchmark', *SMALL])
    speeds = json.loads(printed().splitlines()[-1])
    assert len(speeds) == 4
    assert min(speeds.values()) > 0


class PackedLSTM(nn.LSTM):
    """A bidirectional layer as in textbooks, on packed sequences, with the weights of a BiLSTM."""

    def __init__(self, layer):
        lstm = layer.forward_lstm
        super().__init__(lstm.input_size, lstm.hidden_size, batch_first=True, bidirectional=True)
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(layer.parameters()),
                                      self.parameters())

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, True, enforce_sorted=False)
        padded, _ = nn.utils.rnn.pad_packed_sequence(super().forward(packed)[0], True,
                                                     total_length=x.shape[1])
        return padded


def timed_passes(network, batch):
    """-> (the loss of a batch, the seconds of ten passes forward and back)."""
    for count in range(11):
        loss, *_ = ctc_loss_of(network, batch)
        loss.backward()
        if count == 0:  # the first time is slower
            start = time.perf_counter()
    return loss.item(), time.perf_counter() - start


@slow
@cases('frames_per_output,times', [(4, 1.5), (2, 1.7), (1, 3)])
def test_an_update_is_faster_than_in_textbook_form(frames_per_output, times, monkeypatch):
    """The same network with packed sequences and PyTorch's default memory format has the same loss,
    later."""
    config = {'vocab_size': 18, 'frames_per_output': frames_per_output, 'dropout': 0.0}
    batch = (torch.randn(8, 1, 240, 80), torch.arange(226, 241, 2),
             torch.randint(1, 18, (8, 20)), torch.full((8,), 20))
    loss, seconds = timed_passes(make_network(**config), batch)
    textbook = make_network(**config)
    textbook.recurrent = nn.ModuleList(map(PackedLSTM, textbook.recurrent))
    textbook.to(memory_format=torch.contiguous_format)
    monkeypatch.setattr(torch, 'channels_last', torch.contiguous_format)
    textbook_loss, textbook_seconds = timed_passes(textbook, batch)
    assert textbook_loss == approx(loss, rel=1e-4)
    assert textbook_seconds > times * seconds


@slow
def test_100_000_utterances_start_within_20_seconds(tmp_path, monkeypatch):
    """With durations in the manifest no file is opened before it is needed."""
    wave, _ = data.synthesise('one two three')
    soundfile.write(tmp_path / 'one.wav', wave, 16000)
    row = json_row('one.wav', 'one two three', duration=len(wave) / 16000)
    (tmp_path / 'm.jsonl').write_text('\n'.join([row] * 100_000))
    monkeypatch.setattr(train, 'train_epoch', interrupt)
    start = time.process_time()
    assert 'stopped' in exit_code(train.main, '--train_data', tmp_path / 'm.jsonl',
                                  '--valid_data=none', '--run_dir', tmp_path / 'run')
    assert time.process_time() - start < 20


@slow
def test_the_first_command_and_word_times(tmp_path, monkeypatch, printed):
    """python train.py and the command it prints. Then word times of new sentences by unseen
    speakers, against the synthesiser's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'orig_argv', [sys.executable])  # .venv/bin/python is not found here
    train.main(['--run_dir=run'])
    promise, command = printed().strip().splitlines()[-2:]
    heard = subprocess.getoutput(command)
    checkpoint = model.load_checkpoint('run/best.pt')
    rng = default_rng(0)
    errors = []
    for speaker in range(900, 950):
        wave, spans = data.synthesise(' '.join(rng.choice(list(data.WORDS), 5)), speaker)
        words = model.transcribe(checkpoint, torch.tensor(wave)).words
        for word, (text, start, end) in zip(words, spans):
            if word.text == text:
                errors += [abs(word.start - start), abs(word.end - end)]
    wer = read_results('run')['test']['wer']
    assert f'("{heard}")' in promise
    assert wer <= 3
    assert len(errors) > 400
    assert np.median(errors) <= 0.03


# ---- the README ----------------------------------------------------------------------------------

FOLDER = Path(__file__).parent
README = (FOLDER / 'README.md').read_text(encoding='utf-8')
RESULTS = (FOLDER / 'results/README.md').read_text(encoding='utf-8')


def test_the_example_of_the_readme_runs_as_it_is_written(printed):
    _, example, rest, *_ = re.split('```(?:python)?\n', README)
    exec(example, {})
    assert printed().strip() == rest.strip().split('\n')[0].strip()


@slow
def test_every_command_of_the_readme_runs(whole_flags, whole, tmp_path, monkeypatch):
    """On tones, with a small network and an epoch; what a name stands for is put in its place."""
    pytest.importorskip('matplotlib')
    monkeypatch.chdir(tmp_path)
    _, manifest, *_ = whole_flags
    Path('book.txt').write_text('abc de\n')
    for name in 'clip.wav', 'clip.mp3':
        soundfile.write(name, tones('abc de', default_rng(0)), 16000)
    lines = re.sub(r'\\\n|\n(?=\S)', ' ', README)  # those of a command, and of a paragraph
    commands = re.findall(r'python (\w+\.py[^`#\n]*)', re.sub(r'[][]', '', lines))
    assert len(commands) > 20
    for number, command in enumerate(commands):
        command = re.sub(r'runs/\.\.\.|RUN', str(whole), command)
        command = re.sub(r'\S+\.(tsv|jsonl|transcription)|(?<= )an4|CORPUS', manifest, command)
        program, *words = shlex.split(command)
        if program == 'train.py' and '--resume' not in words:
            words = ['--train_data', manifest, *words, *SMALL, '--epochs=1', f'--run_dir={number}']
        done = subprocess.run([sys.executable, FOLDER / program, *words],
                              capture_output=True, text=True)
        learnt_nothing = '--overfit' in words and 'NOT LEARNT' in done.stderr
        assert done.returncode == 0 or learnt_nothing, (command, done.stderr)


def test_every_test_that_a_readme_names_exists():
    names = re.findall(r' -k "?([\w ]+)', ' '.join((README + RESULTS).split()))
    assert len(names) > 15
    source = Path(__file__).read_text()
    for name in ' or '.join(names).split(' or '):
        assert re.search(rf"(def test_\w*|id=')({name})", source), name


def test_every_figure_of_the_readme_is_in_the_results():
    """Every number with a decimal point, code and settings apart."""
    text = re.sub(r'(?s)```.*?```|`[^`]*`|\n    [^\n]*', '', README)
    figures = set(re.findall(r'(?<![\w.])\d+\.\d+(?![\w.])', text))
    assert len(figures) > 10
    assert figures <= set(re.findall(r'\d+\.\d+', RESULTS))


# ---- real recordings -----------------------------------------------------------------------------

@pytest.mark.skipif(not AN4, reason='AN4_DIR is not set')
def test_an4_is_read_whole():
    """Counts of the corpus's own documentation, letters alone in the alphabet."""
    utterances, _ = data.read_corpus(Path(AN4) / 'train.jsonl')
    assert len(utterances) == 948
    assert ''.join(data.make_alphabet(utterances, [''])) == ' abcdefghijklmnopqrstuvwxyz'
