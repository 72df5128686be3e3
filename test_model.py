"""What must never break again. `pytest` runs it; with AN4_DIR set to a folder that holds AN4's manifests, on real
recordings too. Each test holds the code against something independent: arithmetic, brute force, a second way."""
import argparse
import functools
import itertools
import json
import math
import os
import random
import re
import shlex
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from pathlib import Path

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

FULL = {'blocks': 11}  # all of MobileNetV3-Small, with the early path
AN4 = os.environ.get('AN4_DIR')
slow = pytest.mark.skipif('SLOW' not in os.environ, reason='slow: set SLOW=1')
NO_DATA = ['--train_data=none', '--valid_data=none']
FIRST_RUN = ['--epochs=3', '--batch_size=2', '--learning_rate=1e-4']


def recogniser(preset='fixed', vocab_size=6, **config):
    torch.manual_seed(0)
    return model.Recogniser(model.Config(vocab_size, **model.PRESETS[preset] | config))


def tones(text, rng):
    """A toy language: each letter is 90 ms of a square wave of its own pitch, a space is silence; a little noise."""
    t = np.arange(1440) / 16000
    pieces = [np.hanning(1440) * np.sign(np.sin(2 * np.pi * 150 * 1.35 ** (ord(c) - 97) * t)) if c != ' '
              else np.zeros(1440) for c in f' {text} ']
    return 0.3 * np.concatenate(pieces) + 0.002 * rng.standard_normal(1440 * len(pieces))


def write_corpus(folder, texts, seed=0):
    """Tones as wav files and a manifest -> the manifest's path."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    with open(folder / 'manifest.jsonl', 'w') as manifest:
        for i, text in enumerate(texts):
            soundfile.write(folder / f'{i}.wav', tones(text, rng), 16000)
            print(json.dumps({'audio_filepath': f'{i}.wav', 'text': text}), file=manifest)
    return folder / 'manifest.jsonl'


def random_texts(n, seed):
    """Two to three words of two to four letters, no letter twice in a row."""
    rng = random.Random(seed)
    return [' '.join(''.join(rng.sample('abcdefgh', rng.randint(2, 4))) for _ in range(rng.randint(2, 3)))
            for _ in range(n)]


@pytest.fixture(scope='session')
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tones')
    return ['--train_data', str(write_corpus(folder / 'train', random_texts(20, 1))),
            '--valid_data', str(write_corpus(folder / 'valid', random_texts(6, 2)))]


@pytest.fixture(scope='session')
def first_run(corpus, tmp_path_factory):
    """The real train.main: twenty samples, three epochs. Only thirty updates, so the peak of the learning rate comes
    after three: at the default's, losses that climb again for a while would say little."""
    folder = tmp_path_factory.mktemp('runs') / 'first'
    results = train.main([*corpus, *FIRST_RUN, '--run_dir', str(folder)])
    return folder, results, [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]


# ---- 1. temporal alignment ----------------------------------------------------------------------------------------

@pytest.mark.parametrize('f', [1, 2, 4])
@torch.no_grad()
def test_output_length_is_exact(f):
    """ceil(T / f) outputs for every T from 1 to 300, alone and in a batch."""
    network = recogniser(frames_per_output=f, hidden=8, **FULL).eval()
    lengths = torch.arange(1, 301)
    promised = [math.ceil(t / f) for t in range(1, 301)]
    assert network.output_lengths(lengths).tolist() == promised
    for chunk in lengths.split(50):
        log_probs, n = network(torch.zeros(50, 1, int(chunk[-1]), 80), chunk)
        assert n.tolist() == promised[chunk[0] - 1:chunk[-1]] and log_probs.shape[1] == n[-1]
    for t in range(1, 301):
        assert network.features(torch.zeros(1, 1, t, 80), torch.tensor([t])).shape[1] == promised[t - 1]


@torch.no_grad()
def test_transposed_convolution_has_the_wrong_length():
    network = recogniser('before', hidden=8).eval()
    for t in range(1, 41):
        n = network(torch.zeros(1, 1, t, 80), torch.tensor([t]))[0].shape[1]
        assert n == network.output_lengths(torch.tensor(t)) == 8 * math.ceil(t / 8)
        assert (n == t) == (t % 8 == 0)


def linearise(network):
    """Kernels of equal weights, batch norm as identity, no activations: what remains is where the network looks."""
    for module in list(network.modules()):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.constant_(module.weight, 1 / module.weight[0].numel())  # ones would overflow after 11 blocks
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
        for name, child in module.named_children():
            if isinstance(child, (nn.ReLU, nn.Hardswish)):
                setattr(module, name, nn.Identity())
    return network.eval()


@pytest.mark.parametrize('f', [1, 2, 4])
@pytest.mark.parametrize('config', [{}, FULL, FULL | {'early_path': False}])
@torch.no_grad()
def test_outputs_are_centred_on_their_input(f, config):
    """A click at mel frame t changes the features around t: the centre of mass of the change, over 64 positions,
    lies within half an output frame. A stride-8 grid meets clicks of different phase with different weights, so that
    single positions scatter by up to 0.38 frames around it; at f = 2 and 4 each one stays within half an output."""
    network = linearise(recogniser(frames_per_output=f, **config))
    clicks = torch.arange(160, 224)
    mels = torch.zeros(64, 1, 384, 80)
    mels[range(64), 0, clicks] = 1
    change = network.features(mels, torch.full((64,), 384)).double().abs().sum(2)  # silence gives zero
    centre = torch.arange(change.shape[1]) * f + (f - 1) / 2  # of the mel frames that each output stands for
    error = (change * centre).sum(1) / change.sum(1) - clicks
    assert error.mean().abs() <= f / 2 + 1e-3
    assert error.abs().max() <= max(f / 2, 0.5 + 0.38)


# ---- 2. two-sample overfit ----------------------------------------------------------------------------------------

def test_two_samples_are_learnt():
    """First loss on the uniform line, no loss below zero, final loss near zero, words right in eval mode."""
    start, rng = time.time(), np.random.default_rng(0)
    texts = ['bad cab', 'face a head']
    alphabet = data.make_alphabet([data.Utterance(None, text, 0, '', '') for text in texts])
    mels, lengths, targets, target_lengths, _ = train.collate(
        [(data.normalise(data.log_mels(torch.tensor(tones(text, rng), dtype=torch.float32))),
          torch.tensor(data.encode(text, alphabet)), i) for i, text in enumerate(texts)])
    network = recogniser(vocab_size=len(alphabet))
    uniform, _ = monitor.plateau_lines([data.encode(t, alphabet) for t in texts], network.output_lengths(lengths),
                                       len(alphabet))
    updates = 100
    optimizer, schedule = train.make_optimizer(network, train.parse_flags(NO_DATA), updates)
    gradients, losses = monitor.Gradients(network), []
    for _ in range(updates):
        log_probs, n = network(mels, lengths)
        loss = F.ctc_loss(log_probs.transpose(0, 1), targets, n, target_lengths)
        optimizer.zero_grad()
        loss.backward()
        gradients.clip(5.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    network.eval()
    with torch.no_grad():
        log_probs, n = network(mels, lengths)
    heard = [data.decode(symbols, alphabet) for symbols in model.greedy_decode(log_probs, n)]
    assert abs(losses[0] / uniform - 1) < 0.15, (losses[0], uniform)
    assert min(losses) > -1e-4
    assert F.ctc_loss(log_probs.transpose(0, 1), targets, n, target_lengths) < 0.05 and losses[-1] < 0.05
    assert monitor.error_rates(texts, heard)['wer'] == 0
    assert time.time() - start < 20


# ---- 3. twenty samples, three epochs ------------------------------------------------------------------------------

def test_loss_falls_every_epoch(first_run, corpus):
    """As fractions of the way from the uniform line (0) to the constant one (1, which is not yet learning)."""
    _, _, log = first_run
    valid = data.read_corpus(corpus[3])[0]
    untrained = recogniser(vocab_size=10)
    speech = data.Speech(valid, data.make_alphabet(data.read_corpus(corpus[1])[0]))
    loss, _, _ = train.evaluate(untrained, speech, argparse.Namespace(workers=0, device='cpu'))
    began = monitor.way(loss, train.plateau(valid, speech.alphabet, untrained))
    ways = [record['train_way'] for record in log]
    print(f'of the way from uniform to constant output: training {ways}, validation {began} to {log[-1]["valid_way"]}')
    assert 0 < ways[0] < ways[1] < ways[2]
    assert log[-1]['valid_way'] > began + 0.2


# ---- 4. initialisation, optimiser, schedule -----------------------------------------------------------------------

def test_initialisation_by_role():
    network = recogniser(vocab_size=28, zero_init_residual=True, **FULL)
    head, bound = network.head, math.sqrt(6 / (512 + 28))  # Glorot & Bengio 2010, equation 16
    assert 0.95 * bound < head.weight.abs().max() <= bound
    assert head.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not head.bias.any()
    for linear in (network.projection, network.early):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05) and not linear.bias.any()
    for layer in network.recurrent:
        for lstm in (layer.ahead, layer.back):
            assert (lstm.bias_ih_l0 + lstm.bias_hh_l0).tolist() == [0.0] * 256 + [1.0] * 256 + [0.0] * 512
            for recurrent, inputs in zip(lstm.weight_hh_l0.chunk(4), lstm.weight_ih_l0.chunk(4)):
                assert torch.allclose(recurrent @ recurrent.T, torch.eye(256), atol=1e-5)
                assert inputs.abs().max() <= math.sqrt(6 / (256 + inputs.shape[1]))
    stem = network.stem[0].weight  # He: variance 2 / fan_out
    assert stem.std().item() == pytest.approx(math.sqrt(2 / (16 * 9)), rel=0.2)
    for block in network.blocks:
        assert block.residual == (not block.project[1].weight.any())
    assert sum(block.residual for block in network.blocks) == 6


def test_running_statistics_serve_short_runs():
    """Plain average of the first ten batches, then momentum 0.1, written out."""
    norm, seen, expected = model.BatchNorm(1), [], None
    for step in range(20):
        x = torch.randn(4, 1, 5, 5) + step
        norm(x)
        seen.append(x.mean().item())
        expected = np.mean(seen) if step < 10 else 0.9 * expected + 0.1 * seen[-1]
        assert norm.running_mean.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_initialisation_before_the_fixes():
    network = recogniser('before', vocab_size=28)
    for linear in (network.head, network.projection):
        assert linear.weight.std().item() == pytest.approx(0.01, rel=0.05)
    lstm = network.recurrent[0].ahead  # PyTorch's own: uniform within 1 / sqrt(hidden), biases too
    assert 0.9 / 16 < lstm.bias_ih_l0[256:512].abs().max() <= 1 / 16


def test_optimiser_and_schedule():
    args = train.parse_flags(NO_DATA)
    optimizer, schedule = train.make_optimizer(nn.Linear(2, 2), args, 200)
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults['weight_decay'] == 1e-5
    rates = []
    for _ in range(200):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        schedule.step()
    assert max(rates) == pytest.approx(3e-3) and rates.index(max(rates)) == 19  # the 20th of 200: 10 %
    half_way_down = (19 + 199) / 2  # a cosine is half way at half time
    assert rates[int(half_way_down)] == pytest.approx(1.5e-3, rel=1e-3) and rates[-1] < 1e-7
    for updates in range(1, 30):
        train.make_optimizer(nn.Linear(2, 2), args, updates)


def test_gradients_are_clipped_and_counted():
    network = recogniser(hidden=8)
    gradients = monitor.Gradients(network)
    for size in (100.0, 1e-3, float('nan')):
        for p in network.parameters():
            p.grad = torch.full_like(p, size)
        before = math.sqrt(sum(p.grad.double().square().sum().item() for p in network.parameters()))
        assert gradients.clip(5.0) == (not math.isnan(size))
        after = math.sqrt(sum(p.grad.double().square().sum().item() for p in network.parameters()))
        if not math.isnan(size):
            assert after == pytest.approx(min(before, 5.0), rel=1e-3)
    report = gradients.report()
    assert report['nonfinite'] == 1 and report['clipped'] == pytest.approx(1 / 3)
    parts = math.sqrt(sum(report[f'grad_{part}'] ** 2 for part in ('backbone', 'recurrent', 'head')))
    assert parts == pytest.approx(report['grad_norm'], rel=1e-3)


# ---- padding invariance -------------------------------------------------------------------------------------------

CONFIGS = [('fixed', {}), ('fixed', FULL), ('literal', {}), ('before', {}), ('fixed', FULL | {'squeeze_excite': True}),
           ('fixed', {'frames_per_output': 1}), ('fixed', FULL | {'frames_per_output': 2}), ('fixed', {'blocks': 6})]
LOOK_ALONG_TIME = ['mask_time', 'mean_over_time', 'hold_last', 'reverse_time']


@torch.no_grad()
def shaken(preset, config):
    """Batch norm with random weights and the statistics of random input, and a loud head: an untrained,
    near-uniform network hides leaks."""
    network = recogniser(preset, **config)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    nn.init.normal_(network.head.weight, 0, 0.5)
    network(torch.randn(4, 1, 160, 80) + torch.randn(80), torch.full((4,), 160))  # in training mode: sets statistics
    return network.eval()


@torch.no_grad()
def leak(network):
    """Largest difference between clips alone and in a batch with a longer one, noise behind their ends."""
    torch.manual_seed(1)
    lengths = torch.tensor([160, 77, 122, 33])
    mels = torch.randn(4, 1, 160, 80)
    together, n = network(mels, lengths)
    worst = 0.0
    for i, t in enumerate(lengths.tolist()):
        alone, [m] = network(mels[i:i + 1, :, :t], lengths[i:i + 1])
        assert m == n[i] == alone.shape[1]
        worst = max(worst, (alone[0] - together[i, :m]).abs().max().item())
    return worst


@pytest.mark.parametrize('preset,config', CONFIGS)
def test_a_clip_alone_equals_itself_in_a_batch(preset, config):
    assert leak(shaken(preset, config)) < 1e-4


@pytest.mark.parametrize('preset,config', CONFIGS[:5])
def test_every_single_mask_is_needed(preset, config, monkeypatch):
    """Each call, in turn, is told that all clips fill the batch: each time the clip's output must change."""
    network, calls, skipped = shaken(preset, config), 0, None

    def counted(function, x, lengths, *rest):
        nonlocal calls
        calls += 1
        time_axis = 2 if x.dim() == 4 else 1
        return function(x, torch.full_like(lengths, x.shape[time_axis]) if calls == skipped else lengths, *rest)

    for name in LOOK_ALONG_TIME:
        monkeypatch.setattr(model, name, functools.partial(counted, getattr(model, name)))
    network(torch.zeros(1, 1, 40, 80), torch.tensor([40]))
    masks, needless = calls, []
    for skipped in range(1, masks + 1):  # in leak's first call of the network, the batch
        calls = 0
        if leak(network) < 1e-4:
            needless.append(skipped)
    assert masks >= 1 + len(network.blocks) + 4 and not needless


# ---- mels, audio --------------------------------------------------------------------------------------------------

def test_log_mels_equal_a_naive_dft():
    """Every step again in float64 by its definition: frames, Hann window, DFT as a sum, Slaney's mel scale."""
    rng = np.random.default_rng(0)
    wave = rng.standard_normal(2000) * 0.1
    mels = data.log_mels(torch.tensor(wave, dtype=torch.float32))
    assert mels.shape == (math.ceil(2000 / 160), 80)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    dft = np.exp(-2j * np.pi * np.outer(np.arange(257), np.arange(400)) / 512)

    def hertz(mel):
        return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)

    def mel(f):
        return f * 3 / 200 if f < 1000 else 15 + 27 * math.log(f / 1000) / math.log(6.4)

    edges = [hertz(mel(8000) * i / 81) for i in range(82)]
    for t, frame in enumerate(mels):
        centre = 160 * t + 80
        samples = np.array([wave[s] if 0 <= s < 2000 else 0 for s in range(centre - 200, centre + 200)])
        power = np.abs(dft @ (samples * hann)) ** 2
        for b in range(80):
            low, peak, high = edges[b:b + 3]
            energy = sum(p * max(0, min((f - low) / (peak - low), (high - f) / (high - peak)))
                         for f, p in zip(np.arange(257) * 31.25, power))
            assert frame[b].item() == pytest.approx(math.log(energy + 1e-6), abs=1e-4)


def test_clips_are_normalised_over_their_own_frames():
    mels = data.log_mels(0.1 * torch.randn(16000))
    mels[:, 40:] *= 2
    normal = data.normalise(mels)
    assert normal.mean(0).abs().max() < 1e-4 and abs(normal.std(correction=0).item() - 1) < 1e-2
    scales = mels.std(0) / normal.std(0)
    assert scales.max().item() == pytest.approx(scales.min().item(), rel=1e-4)  # one for all bands
    assert data.normalise(data.log_mels(torch.zeros(1600))).abs().max() < 1e-2  # digital silence


@pytest.mark.parametrize('rate', [8000, 11025, 22050, 44100, 48000])
def test_resampling_keeps_the_band_and_drops_the_rest(rate, tmp_path):
    """A 1 kHz tone comes out as itself, 160 samples a cycle later too; what 16 kHz cannot hold disappears."""
    t = np.arange(rate) / rate
    stereo = np.stack([0.5 * np.sin(2 * np.pi * 1000 * t), 0.3 * np.sin(2 * np.pi * 1000 * t)], 1)
    if rate > 20000:
        stereo += 0.5 * np.sin(2 * np.pi * 9000 * t)[:, None]
    soundfile.write(tmp_path / 'tone.flac', stereo, rate, subtype='PCM_24')
    wave = data.resample(*data.read_audio(tmp_path / 'tone.flac'), data.SAMPLE_RATE).numpy()
    assert len(wave) == 16000
    expected = 0.4 * np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000)
    assert np.abs(wave - expected)[500:-500].max() < 2e-3


# ---- CTC ----------------------------------------------------------------------------------------------------------

def collapse(path):
    return tuple(s for s, _ in itertools.groupby(path) if s)


@pytest.mark.parametrize('target', [(1,), (1, 2), (1, 1), (2, 1, 2)])
def test_ctc_loss_against_all_paths(target):
    """The loss of the recogniser's own outputs is minus the log of the sum over every path that collapses to the
    target, per label; with the uniform distribution that is the uniform line, in closed form too."""
    network = recogniser(vocab_size=3, hidden=8).eval()
    log_probs, n = network(torch.randn(1, 1, 20, 80), torch.tensor([20]))
    loss = F.ctc_loss(log_probs.transpose(0, 1), torch.tensor([target]), n, torch.tensor([len(target)]))
    p = log_probs[0].exp().tolist()
    paths = [path for path in itertools.product(range(3), repeat=5) if collapse(path) == target]
    total = sum(math.prod(p[t][s] for t, s in enumerate(path)) for path in paths)
    assert loss.item() == pytest.approx(-math.log(total) / len(target), abs=1e-4)
    uniform, _ = monitor.plateau_lines([target], torch.tensor([5]), 3)
    repeats = data.frames_needed(target) - len(target)
    assert len(paths) == math.comb(5 + len(target) - repeats, 2 * len(target))
    assert uniform == pytest.approx((5 * math.log(3) - math.log(len(paths))) / len(target), abs=1e-5)
    assert loss > -1e-4


def test_constant_line_is_the_best_constant_output():
    """Against gradient descent on one distribution for all frames, which is free to leave letter frequencies."""
    rng = random.Random(0)
    targets = [[rng.choice([1, 1, 1, 2, 2, 3]) for _ in range(5)] for _ in range(20)]
    lengths = torch.tensor([rng.randint(10, 30) for _ in targets])
    uniform, constant = monitor.plateau_lines(targets, lengths, 4)
    logits = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(300):
        log_probs = logits.log_softmax(0).expand(int(lengths.max()), 20, 4)
        loss = F.ctc_loss(log_probs, torch.tensor(targets), lengths, torch.full((20,), 5))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() <= constant + 1e-4 < uniform and constant == pytest.approx(loss.item(), rel=0.02)


def test_the_first_layer_can_be_read_by_itself():
    """Intermediate CTC: its loss reaches nothing above the first LSTM layer; the last layer's is the output."""
    network = recogniser(hidden=8).eval()
    mels, lengths = torch.randn(2, 1, 40, 80), torch.tensor([40, 31])
    layers, n = network(mels, lengths, every_layer=True)
    assert len(layers) == 2 and torch.equal(layers[1], network(mels, lengths)[0])
    F.ctc_loss(layers[0].transpose(0, 1), torch.tensor([[1, 2], [3, 4]]), n, torch.tensor([2, 2])).backward()
    assert network.stem[0].weight.grad.any() and network.head.weight.grad.any()
    assert network.recurrent[0].back.weight_ih_l0.grad.any() and network.recurrent[1].back.weight_ih_l0.grad is None


def test_greedy_decoding_collapses_the_best_path():
    paths = torch.tensor([[0, 1, 1, 0, 1, 2, 2, 3], [3, 3, 0, 0, 2, 1, 1, 1]])
    log_probs = F.one_hot(paths, 4).float().log_softmax(-1)
    assert model.greedy_decode(log_probs, torch.tensor([8, 5])) == [[1, 1, 2, 3], [3, 2]]


# ---- text, manifests, batches -------------------------------------------------------------------------------------

def utterances(texts, seconds=1.0):
    return [data.Utterance(Path(f'{i}.wav'), data.normalise_text(t), seconds, '', '') for i, t in enumerate(texts)]


def test_alphabet_round_trip_in_any_script():
    texts = ['Hello  World', 'ÅNGSTRÖM', unicodedata.normalize('NFD', 'naïve'), 'привет мир', '你好', 'it\'s']
    corpus = utterances(texts)
    alphabet = data.make_alphabet(corpus)
    for u in corpus:
        symbols = data.encode(u.text, alphabet)
        assert 0 not in symbols and data.decode(symbols, alphabet) == u.text
    assert corpus[0].text == 'hello world' and corpus[2].text == 'naïve' and alphabet[0] == ''
    assert data.encode('zebra', ['', 'a', 'b']) == [2, 1]  # unknown characters have no symbol


def test_what_ctc_cannot_learn():
    short = utterances(['hello', 'abc'], 0.2)  # 20 frames; hello needs 6
    alphabet = data.make_alphabet(short)
    assert [len(data.unlearnable(short, alphabet, grid)) for grid in (2, 4, 5, 8, 20)] == [0, 1, 1, 1, 2]


def test_every_utterance_once_an_epoch_in_batches_of_like_length():
    rng = random.Random(0)
    corpus = [data.Utterance(Path(f'{i}.wav'), 'a', rng.uniform(1, 20), '', '') for i in range(101)]

    def batches(*share, seed=0):
        return list(train.training_batches(data.Speech(corpus, [''], seed=seed), 8, 2, *share))

    one, two = batches()[:13], batches()[13:]
    assert one + two == batches() and [[i for _, i in b] for b in one] != [[i for _, i in b] for b in two]
    assert all(sorted(batch for b in epoch for batch in b) == [(n, i) for i in range(101)]
               for n, epoch in enumerate((one, two)))
    padding = [max(corpus[i].duration for _, i in batch) / min(corpus[i].duration for _, i in batch) for batch in one]
    assert np.median(padding) < 1.5
    assert batches(seed=1)[:13] != one
    # Three processes have the same number of batches, and together what one has; where it is too few, some do twice.
    shares = [batches(rank, 3) for rank in range(3)]
    assert all(set(whole) == set(sum(parts, [])) and all(parts) for whole, *parts in zip(one + two, *shares))


def test_augmentation_depends_on_seed_epoch_and_utterance(corpus):
    all_of_them = data.read_corpus(corpus[1])[0]
    alphabet = data.make_alphabet(all_of_them)

    def item(epoch, index, of=all_of_them, seed=0, **flags):
        return data.Speech(of, alphabet, 4, seed, **flags)[epoch, index][0]

    for flags in ({'spec_augment': True}, {'speed_perturb': True}):
        assert torch.equal(item(3, 5, **flags), item(3, 0, all_of_them[5:], **flags))
        assert not torch.equal(item(3, 5, **flags)[:50], item(4, 5, **flags)[:50])
        assert not torch.equal(item(3, 5, **flags)[:50], item(3, 5, seed=1, **flags)[:50])
    plain, lengths = item(3, 5), {len(item(epoch, 5, speed_perturb=True)) for epoch in range(40)}
    assert min(lengths) == math.ceil(len(plain) / 1.1) and max(lengths) > 1.08 * len(plain)
    masked = item(3, 5, spec_augment=True)
    assert 0.4 < (masked == plain).float().mean() < 1 and not masked[masked != plain].any()


@pytest.mark.parametrize('line,complaint', [
    ('{"audio_filepath": "0.wav"}', "manifest.jsonl:2: has '' for its text (or sentence, transcript"),
    ('{"audio_filepath": "no.wav", "text": "a"}', 'no.wav'),
    ('{"audio_filepath": "no.wav", "text": "a", "duration": 1}', 'is no file'),
    ('{"audio_filepath": "0.wav", "text": " "}', "has ' ' for its text"),
    ('{"audio_filepath": "0.wav", "text": 5}', 'has 5 for its text'),
    ('{"audio_filepath": 3, "text": "a"}', 'has 3 for its audio_filepath'),
    ('{"audio_filepath": "0.wav", "text": "a", "duration": NaN}', 'its duration is nan'),
    ('{"audio_filepath": "0.wav", "text": "a", "duration": "long"}', 'manifest.jsonl:2'),
    ('{"audio_filepath": "manifest.jsonl", "text": "a"}', 'Error opening'),
    ('[1]', 'manifest.jsonl:2: is no JSON object'),
    ('{"audio_filepath": "0.wav", "text": "a", "duration": 5}', 'not 5.00 as its duration says'),
    ('{"audio_filepath": "0.wav", "text": "\\ud800"}', 'surrogates not allowed'),
    ('yes', 'manifest.jsonl:2: is not a line of JSON'),
    ('{"audio_filepath": "0.wav", "text": "a b c d e f g h a b c d e f g h a b c d e f g h a b c d e f g h"}', '0.wav'),
])
def test_bad_data_ends_in_one_line(line, complaint, tmp_path, capsys):
    manifest = write_corpus(tmp_path / 'c', ['ab'])
    with open(manifest, 'a') as file:
        print(line, file=file)
    with pytest.raises(SystemExit) as stop:
        train.main(['--train_data', str(manifest), '--valid_data', str(manifest), '--run_dir', str(tmp_path / 'run')])
    fault, count = stop.value.code.split('\n')
    assert complaint in fault and count == '1 broken; --skip_bad trains without them'
    assert not (tmp_path / 'run' / 'last.pt').exists()


# ---- errors and monitors ------------------------------------------------------------------------------------------

def test_word_errors_against_a_second_implementation():
    """Recursion over prefixes; and the counts must add up: reference words are hit, substituted or deleted."""
    @functools.cache
    def distance(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(distance(a[1:], b[1:]) + (a[0] != b[0]), distance(a[1:], b) + 1, distance(a, b[1:]) + 1)

    rng = random.Random(0)
    for _ in range(300):
        a, b = (tuple(rng.choices('xyz', k=rng.randint(0, 7))) for _ in range(2))
        s, i, d = monitor.edit_counts(a, b)
        assert s + i + d == distance(a, b) and len(a) - d + i == len(b) and s <= min(len(a), len(b))
    rates = monitor.error_rates(['a b c', 'd'], ['a x c c', ''])
    assert rates['wer'] == 75 and (rates['substitutions'], rates['insertions'], rates['deletions']) == (1, 1, 1)


def test_output_monitors_tell_the_plateaus_from_learning():
    v, lengths, characters = 28, torch.tensor([70, 70]), torch.tensor([10, 10])

    def report(probabilities):
        outputs = monitor.Outputs(v, math.log(27))
        outputs.add(probabilities.log(), lengths, characters)
        return outputs.report()

    uniform = report(torch.full((2, 80, v), 1 / v))
    assert uniform['entropy'] == pytest.approx(1) and uniform['uniform_batches'] == 1
    assert uniform['input_dependence'] == pytest.approx(0, abs=1e-5)
    constant = report((0.3 / 27 * torch.ones(v)).index_fill(0, torch.tensor(0), 0.7).expand(2, 80, v))
    assert constant['blank'] == 1 and constant['emitted'] == 0 and constant['uniform_batches'] == 0
    assert constant['input_dependence'] == pytest.approx(0, abs=1e-5)
    # Ten letters of 27, each in one frame of seven: h(1/7) + (1/7) ln 27 nats, emitted 10 of 10.
    spikes = torch.zeros(2, 80, v)
    spikes[:, :, 0] = 1
    letters = torch.arange(70).view(2, 35) % 27
    for b in range(2):
        for k in range(10):
            spikes[b, 7 * k] = F.one_hot(letters[b, k] + 1, v)
    learnt = report(spikes.clamp_min(1e-9))
    n = Counter(letters[:, :10].flatten().tolist()).values()
    expected = -(6 / 7 * math.log(6 / 7) + sum(c / 140 * math.log(c / 140) for c in n))
    assert learnt['input_dependence'] == pytest.approx(expected, abs=1e-3)
    assert 0.9 < learnt['dependence_share'] < 1
    assert learnt['emitted'] == 1 and learnt['blank'] == pytest.approx(6 / 7)


HEALTHY = {'nonfinite': 0, 'train_loss': 1.0, 'train_way': 1.3, 'grad_backbone': 1.0, 'grad_recurrent': 1.0,
           'grad_head': 1.0, 'uniform_batches': 0, 'entropy': 0.2, 'dependence_share': 1.0, 'blank': 0.6,
           'emitted': 1.0}


@pytest.mark.parametrize('symptom,word', [
    ({'nonfinite': 2}, 'not finite'), ({'train_loss': -0.24}, 'negative CTC loss'),
    ({'grad_backbone': 1e-6}, 'vanishing'), ({'grad_head': 1e5}, 'exploding'),
    ({'uniform_batches': 3}, 'uniform'), ({'dependence_share': 0.0}, 'ignores the input'),
    ({'blank': 0.999, 'emitted': 0.01}, 'blank collapse')])
def test_diseases_have_names(symptom, word):
    assert monitor.diagnose(HEALTHY) == []
    assert any(word in warning for warning in monitor.diagnose(HEALTHY | symptom))


# ---- train.py -----------------------------------------------------------------------------------------------------

def test_run_folder(first_run):
    folder, results, log = first_run
    assert json.loads((folder / 'results.json').read_text()) == results
    assert results['test'] is None and results['valid']['wer'] == min(record['wer'] for record in log)
    assert set(results) == {'valid', 'test', 'updates', 'train_seconds', 'parameters', 'seed'}
    assert results['updates'] == 30 and results['valid']['utterances'] == 6
    assert [record['epoch'] for record in log] == [1, 2, 3] and all(0 <= r['clipped'] <= 1 for r in log)
    config = json.loads((folder / 'config.json').read_text())
    assert config['batch_size'] == 2 and config['frames_per_output'] == model.Config(1).frames_per_output


def test_checkpoints_load_and_decode_alike(first_run, corpus):
    folder, results, _ = first_run
    checkpoint = torch.load(folder / 'best.pt', weights_only=True)
    network = model.Recogniser(model.Config(**checkpoint['config']))
    network.load_state_dict(checkpoint['model'])
    speech = data.Speech(data.read_corpus(corpus[3])[0], checkpoint['alphabet'])
    _, rates, _ = train.evaluate(network, speech, argparse.Namespace(workers=0, device='cpu'))
    assert rates == results['valid'] == checkpoint['run']['valid']


def test_a_run_is_not_overwritten_and_repeats_from_its_seed(first_run, corpus, tmp_path):
    folder, _, log = first_run
    with pytest.raises(SystemExit, match='is not empty'):
        train.main([*corpus, '--run_dir', str(folder)])
    for workers in '0', '1':
        run = tmp_path / workers
        train.main([*corpus, *FIRST_RUN, '--run_dir', str(run), '--workers', workers])
        again = [json.loads(line)['train_loss'] for line in (run / 'log.jsonl').read_text().splitlines()]
        # Another process may get other last bits from the Fourier transform, and training makes more of them.
        assert again == pytest.approx([r['train_loss'] for r in log], rel=1e-2 if workers == '1' else 0)


FLAGS = ['--num_train_samples=3', '--spec_augment', '--no-speed_perturb', '--epochs=2', '--batch_size=2',
         '--learning_rate=1e-3', '--weight_decay=0.1', '--grad_clip=0.01', '--interctc_weight=0', '--seed=1',
         '--model=literal', '--blocks=5', '--frames_per_output=2', '--dropout=0.5', '--zero_init_residual',
         '--squeeze_excite', '--blocks=4 --no-early_path']


@pytest.fixture(scope='session')
def tiny(tmp_path_factory):
    """(Training loss, weights) of one epoch on four utterances, by flags."""
    folder = tmp_path_factory.mktemp('tiny')
    manifest = str(write_corpus(folder, ['ab', 'cd', 'ba', 'dc']))

    def fingerprint(*flags):
        run = folder / ('run' + ''.join(flags))
        train.main(['--train_data', manifest, '--valid_data', manifest, '--epochs=1', '--batch_size=4',
                    '--run_dir', str(run), *flags])
        weights = torch.load(run / 'last.pt', weights_only=True)['model']
        return [(name, tuple(w.shape), w.double().sum().item()) for name, w in weights.items()]

    return fingerprint, fingerprint()


@pytest.mark.parametrize('flag', FLAGS)
def test_each_flag_changes_the_trained_weights(flag, tiny):
    fingerprint, base = tiny
    *others, last = flag.split()
    assert fingerprint(*flag.split()) != (fingerprint(*others) if others else base)


@pytest.mark.parametrize('flag', ['--epochs=0', '--batch_size=x', '--learning_rate=-1', '--frames_per_output=3',
                                  '--blocks=12', '--dropout=1', '--device=abacus', '--model=none', '--epoch=1'])
def test_bad_flags_end_in_a_message(flag, corpus, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main([*corpus, '--run_dir', str(tmp_path / 'run'), flag])
    message = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code != 0 and flag.split('=')[0].lstrip('-') in message and '\n' not in message


def test_test_data_is_scored_with_the_best_checkpoint(corpus, tmp_path):
    results = train.main([*corpus, '--test_data', corpus[3], '--epochs', '2', '--num_train_samples', '8',
                          '--run_dir', str(tmp_path)])
    assert results['test'] == results['valid']


# ---- the built-in corpus ------------------------------------------------------------------------------------------

def test_the_synthesiser_repeats_itself_and_knows_its_words():
    wave, spans = data.synthesise('seven two nine', 3)
    assert np.array_equal(wave, data.synthesise('seven two nine', 3)[0])
    assert len(wave) != len(data.synthesise('seven two nine', 4)[0]) and 0.1 < abs(wave).max() <= 0.9
    assert [word for word, _, _ in spans] == ['seven', 'two', 'nine']
    edges = [t for _, start, end in spans for t in (start, end)]
    assert edges == sorted(edges)
    assert edges[0] > 0.1 and edges[-1] < len(wave) / 16000
    with pytest.raises(data.DataError, match='synthesiser says'):
        data.synthesise('seven elephants')


def test_vowels_have_the_formants_of_the_table():
    """The strongest bands of a long 'iy' and 'aa', by an FFT: Peterson & Barney's, times the tract's scale."""
    voice = np.random.default_rng([0, 1])
    tract = voice.uniform([0.85, 0.65, -30, 800], [1.15, 1.1, -15, 2500])[0]
    for word, phone in ('three', 'iy'), ('start', 'aa'):
        wave, [(_, start, end)] = data.synthesise(word, 1)
        middle = end - 0.06 if phone == 'iy' else (start + end) / 2
        piece = wave[int(16000 * middle) - 400:int(16000 * middle) + 400] * np.hanning(800)
        power = np.convolve(np.abs(np.fft.rfft(piece, 4096)) ** 2, np.hanning(40), 'same')
        hertz = np.arange(2049) * 16000 / 4096
        for formant, low, high in zip(data.PHONES[phone][:2] * tract, (150, 1050), (900, 3000)):
            band = (hertz > low) & (hertz < high)
            assert abs(hertz[band][power[band].argmax()] / formant - 1) < 0.25


def dtw(a, b):
    """Length-normalised dynamic time warping distance of two mel sequences (T, 80)."""
    cost = torch.cdist(a, b).numpy()
    total = np.full((len(a) + 1, len(b) + 1), np.inf)
    total[0, 0] = 0
    for i in range(len(a)):
        for j in range(len(b)):
            total[i + 1, j + 1] = cost[i, j] + min(total[i, j], total[i, j + 1], total[i + 1, j])
    return total[-1, -1] / (len(a) + len(b))


@slow
def test_a_template_matcher_fails_on_the_built_in_corpus():
    """One speaker's words as templates for those of twelve of validation's, all cut out by their known times,
    which helps the matcher: the network has to find them."""
    def words(speakers, n):
        rng, cut = np.random.default_rng(speakers[0]), []
        for speaker in speakers:
            wave, spans = data.synthesise(' '.join(rng.permutation(list(data.WORDS))[:n]), speaker)
            mels = data.normalise(data.log_mels(torch.tensor(wave)))
            cut += [(word, mels[int(100 * start):int(100 * end)][::2]) for word, start, end in spans]
        return cut

    templates, spoken = words([0], 20), words(range(300, 312), 8)
    wrong = sum(min(templates, key=lambda t: dtw(t[1], mels))[0] != word for word, mels in spoken)
    print(f'template matcher: {100 * wrong / len(spoken):.0f} % of {len(spoken)} words wrong')
    assert wrong / len(spoken) >= 0.2


@slow
def test_the_first_command_and_word_times(tmp_path, monkeypatch, capsys):
    """python train.py and the command it prints; then word times of new sentences by unseen speakers, against the
    synthesiser's own."""
    monkeypatch.chdir(tmp_path)
    results = train.main([])
    _, checkpoint, clip = capsys.readouterr().out.strip().splitlines()[-1].split()[-3:]
    network, alphabet, run = model.load_checkpoint(checkpoint)
    untrained = model.Recogniser(network.config).eval()
    test = data.read_corpus('corpus/test.jsonl')[0]
    rates = train.evaluate(untrained, data.Speech(test, alphabet), train.parse_flags([]))[1]
    errors, rng = [], np.random.default_rng(0)
    for speaker in range(900, 950):
        wave, spans = data.synthesise(' '.join(rng.choice(list(data.WORDS), 5)), speaker)
        mels = data.normalise(data.log_mels(torch.tensor(wave)))
        log_probs, _ = network(mels[None, None], torch.tensor([len(mels)]))
        heard = model.word_times(log_probs[0].argmax(1).tolist(), alphabet, 0.04)
        if [word for word, _, _ in heard] == [word for word, _, _ in spans]:
            errors += [abs(a - b) for h, s in zip(heard, spans) for a, b in zip(h[1:], s[1:])]
    print(f'{results}\nuntrained WER {rates["wer"]:.0f} %; word times: median error {1000 * np.median(errors):.0f} ms '
          f'of {len(errors)} edges')
    assert results['test']['wer'] <= 3 and results['train_seconds'] <= 180 and rates['wer'] >= 99
    assert len(errors) > 400 and np.median(errors) <= 0.08


# ---- corpora of other forms ---------------------------------------------------------------------------------------

def write_forms(us, folder):
    """Utterances as JSON lines (flac), Common Voice (wav), LibriSpeech (flac) and CMU Sphinx (sph) -> four paths."""
    rows = {'jsonl': [], 'tsv': ['client_id\tpath\tsentence\tup_votes'], 'trans': {}, 'ids': [], 'sphinx': []}
    for i, u in enumerate(us):
        wave, rate = soundfile.read(u.path, dtype='int16')
        name, speaker = u.path.stem, u.speaker
        for path, kind in ((f'jsonl/{name}.flac', 'FLAC'), (f'cv/clips/{name}.wav', 'WAV'),
                           (f'libri/{speaker}/1/{name}.flac', 'FLAC'), (f'an4/wav/clstk/{speaker}/{name}.sph', 'NIST')):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(folder / path, wave, rate, format=kind, subtype='PCM_16')
        rows['jsonl'].append(json.dumps({'audio_filepath': f'{name}.flac', 'text': u.text, 'speaker': speaker}))
        rows['tsv'].append(f'{speaker}\t{name}.wav\t{u.text.capitalize()}\t2')
        rows['trans'].setdefault(speaker, []).append(f'{name} {u.text.upper()}')
        rows['ids'].append(f'clstk/{speaker}/{name}')
        rows['sphinx'].append(f'<s> {u.text.upper()} </s> ({name})' if i % 2 else f'{u.text.upper()} ({name})')
    (folder / 'an4/etc').mkdir()
    for path, lines in {'jsonl/train.jsonl': rows['jsonl'], 'cv/train.tsv': rows['tsv'],
                        'an4/etc/an4_train.fileids': rows['ids'], 'an4/etc/an4_train.transcription': rows['sphinx'],
                        'an4/etc/an4_test.transcription': [],
                        **{f'libri/{s}/1/{s}-1.trans.txt': lines for s, lines in rows['trans'].items()}}.items():
        (folder / path).write_text('\n'.join(lines) + '\n')
    return [folder / path for path in ('jsonl/train.jsonl', 'cv/train.tsv', 'libri', 'an4')]


def assert_same_batches(paths):
    seen = []
    for path in paths:
        (us, valid, _), _, faults, _ = data.gather(path, seed=1)
        assert not faults and valid
        speech = data.Speech(us, data.make_alphabet(us), 4, speed_perturb=True)
        seen.append(list(train.loader(speech, train.training_batches(speech, 8, 2))))
    for other in seen[1:]:
        assert len(other) == len(seen[0])
        for batch, same in zip(seen[0], other):
            assert all(torch.equal(a, b) for a, b in zip(batch[:4], same[:4]))


def test_every_form_of_corpus_gives_the_same_batches(tmp_path):
    (tmp_path / 'made').mkdir()
    us = []
    for i in range(24):
        text = ' '.join(random.Random(i).sample(sorted(data.WORDS), 2))
        path = tmp_path / 'made' / f's{i % 12}-1-{i:04}.wav'
        soundfile.write(path, data.synthesise(text, i % 12)[0], 16000)
        us.append(data.Utterance(path, text, 1, f's{i % 12}', ''))
    assert_same_batches(write_forms(us, tmp_path))
    table = tmp_path / 'jsonl' / 'table.csv'
    table.write_text('file,transcript\n' + ''.join(f'{u.path.stem}.flac,"{u.text}"\n' for u in us))
    assert [(u.path.stem, u.text) for u in data.read_corpus(table)[0]] == [
        (u.path.stem, u.text) for u in data.read_corpus(tmp_path / 'an4')[0]]


@pytest.mark.skipif(not AN4, reason='AN4_DIR is not set')
def test_an4_in_every_form_gives_the_same_batches(tmp_path):
    assert_same_batches(write_forms(data.read_corpus(Path(AN4) / 'dev.jsonl')[0], tmp_path))


def test_whole_speakers_are_held_out():
    us = [data.Utterance(Path(f'{i}.wav'), 'a', 1, f's{i % 20}', f'm:{i}') for i in range(100)]
    rest, kept, choice = data.hold_out(us)
    assert len(kept) == 10 and not {u.speaker for u in kept} & {u.speaker for u in rest} and len(rest) == 90
    assert all(u.speaker in choice for u in kept) and data.hold_out(us)[1] == kept
    anonymous = [data.Utterance(u.path, 'a', 1, '', u.where) for u in us]
    rest, kept, choice = data.hold_out(anonymous)
    assert (len(rest), len(kept)) == (90, 10) and 'at random' in choice


@pytest.fixture
def broken(tmp_path):
    """Six good utterances of tones, and one of each ailment."""
    manifest = write_corpus(tmp_path / 'c', random_texts(6, 3))
    loud = np.clip(8 * tones('abc', np.random.default_rng(0)), -1, 1)
    soundfile.write(tmp_path / 'c' / 'clipped.wav', loud, 16000)
    soundfile.write(tmp_path / 'c' / 'silent.wav', loud * 1e-4, 16000)
    soundfile.write(tmp_path / 'c' / 'narrow.wav', loud[::2] * 0.3, 8000)
    soundfile.write(tmp_path / 'c' / 'short.wav', loud[:1000], 16000)
    (tmp_path / 'c' / 'empty.wav').write_bytes(b'')
    soundfile.write(tmp_path / 'c' / 'cut.flac', loud, 16000)
    (tmp_path / 'c' / 'cut.flac').write_bytes((tmp_path / 'c' / 'cut.flac').read_bytes()[:-3000])
    with open(manifest, 'a') as file:
        for name in 'clipped.wav', 'silent.wav', 'narrow.wav', 'short.wav', 'empty.wav', 'cut.flac', 'gone.wav':
            print(json.dumps({'audio_filepath': name, 'text': 'abc abc'}), file=file)
    return manifest


def test_inspection_names_what_ails(broken, corpus, capsys):
    with pytest.raises(SystemExit) as stop:
        data.main([str(broken), '--valid_data', corpus[3]])
    out = capsys.readouterr().out
    for remark, name in ('clipped', 'clipped.wav'), ('near-silent', 'silent.wav'), ('above 4000 Hz', 'narrow.wav'):
        assert any(remark in line and name in line for line in out.splitlines())
    for name in 'short.wav', 'empty.wav', 'cut.flac', 'gone.wav':
        assert name in stop.value.code
    assert '4 faults, 9 utterances' in stop.value.code and 'words are not in training' in out
    data.main([corpus[1], '--valid_data', corpus[3]])
    lines = re.search(r'uniform output ([\d.]+), constant output ([\d.]+)', capsys.readouterr().out)
    assert float(lines[1]) > float(lines[2]) > 1


def test_bad_utterances_end_a_run_or_are_left_out(broken, corpus, tmp_path, capsys):
    flags = ['--train_data', str(broken), '--valid_data', corpus[3], '--epochs=1', '--run_dir', str(tmp_path / 'run')]
    with pytest.raises(SystemExit) as stop:
        train.main(flags)
    assert all(name in stop.value.code for name in ('short.wav', 'empty.wav', 'cut.flac', 'gone.wav'))
    assert not (tmp_path / 'run').exists()
    train.main([*flags, '--skip_bad'])
    out = capsys.readouterr().out
    assert '4 broken utterances are left out' in out and '9 utterances, ' in out


# ---- using what was learnt ----------------------------------------------------------------------------------------

@pytest.fixture(scope='session')
def by_heart(tmp_path_factory):
    """Two sentences of the synthesiser, learnt by --overfit -> run folder, wave of the first."""
    folder = tmp_path_factory.mktemp('heart')
    rows = []
    for i, text in enumerate(['seven two nine', 'light go']):
        soundfile.write(folder / f'{i}.wav', data.synthesise(text, i)[0], 16000)
        rows.append(json.dumps({'audio_filepath': f'{i}.wav', 'text': text}))
    (folder / 'm.jsonl').write_text('\n'.join(rows))
    train.main(['--train_data', str(folder / 'm.jsonl'), '--valid_data', 'none', '--overfit', '2', '--batch_size', '2',
                '--run_dir', str(folder / 'run')])
    return folder / 'run', data.synthesise('seven two nine', 0)[0]


def transcribe(capsys, *args):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        model.main(list(map(str, args)))
    captured = capsys.readouterr()
    return stop.value.code, captured.out.strip(), captured.err


def test_any_file_format_gives_the_same_transcript(by_heart, tmp_path, capsys):
    run, wave = by_heart
    wave, clips = torch.tensor(wave), []
    for name, rate, channels in ('a.wav', 44100, 2), ('b.flac', 24000, 1), ('c.mp3', 16000, 1), ('d.ogg', 16000, 1):
        clips.append(tmp_path / name)
        copy = data.resample(wave, 16000, rate).numpy()
        soundfile.write(clips[-1], np.stack([copy] * channels, 1), rate)
    for clip in clips:
        assert transcribe(capsys, run / 'best.pt', clip)[:2] == (False, 'seven two nine')
    soundfile.write(tmp_path / 'e.wav', data.resample(wave, 16000, 8000).numpy(), 8000)
    assert transcribe(capsys, run / 'best.pt', tmp_path / 'e.wav')[0] is False
    data.main([str(tmp_path / 'e.wav')])
    assert 'above 4000 Hz is missing' in capsys.readouterr().out
    code, out, err = transcribe(capsys, run / 'best.pt', tmp_path / 'no.wav', clips[0])
    assert code and out.endswith('seven two nine') and 'no.wav' in err and err.count('\n') == 1


def test_words_have_times(by_heart, capsys):
    path = [0, 1, 1, 0, 2, 3, 0, 0, 1, 0, 1, 3, 3, 0]
    assert model.word_times(path, ['', 'a', 'b', ' '], 0.1) == [
        ('ab', pytest.approx(0.05), pytest.approx(0.45)), ('aa', pytest.approx(0.75), pytest.approx(1.05))]
    run, wave = by_heart
    _, out, _ = transcribe(capsys, run / 'best.pt', run / 'clip.wav', '--times')
    first, *lines = out.splitlines()
    assert [line.split()[2] for line in lines] == first.split()
    times = [float(t) for line in lines for t in line.split()[:2]]
    assert times == sorted(times) and times[-1] <= len(wave) / 16000 + 0.04


def test_checkpoints_and_runs_describe_themselves(by_heart, first_run, tmp_path, capsys):
    _, out, _ = transcribe(capsys, by_heart[0] / 'best.pt')
    assert 'valid: WER 0.00 %' in out and 'm.jsonl' in out and 'parameters' in out
    with pytest.raises(SystemExit, match='False'):
        monitor.main([str(first_run[0])])
    out = capsys.readouterr().out
    assert 'best epoch' in out and 'how to go on' in out and len(out.splitlines()) >= 7
    (tmp_path / 'x.pt').write_text('x')
    assert 'is no checkpoint' in transcribe(capsys, tmp_path / 'x.pt', 'a.wav')[0]
    (tmp_path / 'log.jsonl').write_text((first_run[0] / 'log.jsonl').read_text()[:-100])
    with pytest.raises(SystemExit, match='True'):
        monitor.main([str(tmp_path / 'none'), str(tmp_path)])
    captured = capsys.readouterr()
    assert captured.err.count('holds no whole log.jsonl') == 2


def test_overfit_gives_a_verdict(by_heart, tmp_path, corpus, capsys):
    log = (by_heart[0] / 'log.jsonl').read_text().splitlines()
    assert json.loads(log[-1])['cer'] == 0 and len(log) < 20
    with pytest.raises(SystemExit, match='NOT LEARNT'):
        train.main([*corpus[:2], '--valid_data=none', '--overfit=3', '--epochs=1', '--learning_rate=1e-9',
                    '--batch_size=2', '--run_dir', str(tmp_path / 'run')])


def test_training_on_everything_keeps_the_last_checkpoint(corpus, tmp_path):
    results = train.main([*corpus[:2], '--valid_data=none', '--test_data', corpus[3], '--epochs=1',
                          '--run_dir', str(tmp_path / 'run')])
    assert results['valid'] is None and results['test']['utterances'] == 6
    assert sorted(path.name for path in (tmp_path / 'run').iterdir()) == [
        'clip.wav', 'config.json', 'last.pt', 'log.jsonl', 'results.json']
    assert torch.load(tmp_path / 'run' / 'last.pt', weights_only=True)['run']['test'] == results['test']


# ---- speed ----------------------------------------------------------------------------------------------------------

def test_two_processes_train_as_one(corpus, tmp_path):
    """torchrun's two processes average their gradients: without dropout and with batch norm's statistics of the whole
    batch in both (every utterance twice), they take the steps of one process."""
    rows = Path(corpus[1]).read_text().splitlines()
    doubled = Path(corpus[1]).parent / 'doubled.jsonl'
    doubled.write_text('\n'.join(row for row in rows[:4] for _ in range(2)))
    flags = ['--train_data', str(doubled), '--valid_data', corpus[3], '--epochs=2', '--batch_size=8', '--dropout=0',
             '--no-speed_perturb', '--run_dir', str(tmp_path / 'two')]
    run = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                          train.__file__, *flags], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.count('epoch   2') == 1, run.stderr
    results = train.main([*flags[:-1], str(tmp_path / 'one')])
    assert json.loads((tmp_path / 'two' / 'results.json').read_text())['updates'] == results['updates'] == 2
    one, two = (torch.load(tmp_path / name / 'last.pt', weights_only=True)['model'] for name in ('one', 'two'))
    change = sum((one[name] - parameter).norm() for name, parameter in recogniser().named_parameters()
                 if one[name].shape == parameter.shape)
    assert sum((one[name] - two[name]).norm() for name in one if 'num_batches' not in name) < 0.01 * change


def test_benchmark_prints_one_object(corpus, tmp_path, capsys):
    result = train.main([*corpus, '--benchmark', '--json', '--run_dir', str(tmp_path / 'run')])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result and not (tmp_path / 'run').exists()
    assert all(value > 0 for value in result.values()) and result['padding in training, %'] < 30
    train.main([*corpus, '--benchmark'])
    assert 'inference, batch 16' in capsys.readouterr().out


class PackedLSTM(nn.LSTM):
    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(super().forward(packed)[0], True, total_length=x.shape[1])[0]


@slow
@pytest.mark.parametrize('frames_per_output,times', [(4, 2), (1, 4)])
def test_an_update_is_faster_than_in_textbook_form(frames_per_output, times, tmp_path, monkeypatch):
    """The same network with nn.LSTM(bidirectional=True) on packed sequences and PyTorch's default memory format, on
    the same batches of the built-in corpus: both get the same gradients, one gets them later."""
    monkeypatch.chdir(tmp_path)
    speech = data.Speech(data.read_corpus(data.builtin_corpus()['train'])[0], ['', ' ', *'efghilnorstuvwxz'])
    batches = list(train.loader(speech, list(train.training_batches(speech, 8, 1))[:12]))
    ours, textbook = (recogniser(vocab_size=18, frames_per_output=frames_per_output, dropout=0.0) for _ in range(2))
    textbook.recurrent = nn.ModuleList(PackedLSTM(size, 256, batch_first=True, bidirectional=True)
                                       for size in (256, 512))
    for layer, packed in zip(ours.recurrent, textbook.recurrent):
        packed.load_state_dict({name + suffix: weight for part, suffix in ((layer.ahead, ''), (layer.back, '_reverse'))
                                for name, weight in part.state_dict().items()})
    seconds = []
    for network in ours, textbook:
        if network is textbook:
            network.to(memory_format=torch.contiguous_format)
            monkeypatch.setattr(torch, 'channels_last', torch.contiguous_format)
        tools = (*train.make_optimizer(network, train.parse_flags([]), 100), train.parse_flags([]),
                 monitor.Gradients(network), monitor.Outputs(18, 1), lambda *_: None)
        loss = train.train_epoch(network, batches[:1], *tools)
        start = time.perf_counter()
        train.train_epoch(network, batches, *tools)
        seconds.append((time.perf_counter() - start, loss))
    (ours, loss), (textbook, same) = seconds
    print(f'textbook form {textbook:.1f} s, ours {ours:.1f} s: {textbook / ours:.1f} times')
    assert same == pytest.approx(loss, rel=1e-4) and textbook > times * ours


@slow
def test_100_000_utterances_start_within_20_seconds(tmp_path, capsys):
    """With durations in the manifest no file is opened before it is needed."""
    text = 'one two three four five six seven'
    wave, _ = data.synthesise(text)
    soundfile.write(tmp_path / 'one.wav', wave, 16000)
    row, sizes = json.dumps({'audio_filepath': 'one.wav', 'duration': len(wave) / 16000, 'text': text}), []
    for n in 100, 100_000:
        (tmp_path / f'{n}.jsonl').write_text(f'{row}\n' * n)
        start = time.perf_counter()
        command = [sys.executable, '-u', train.__file__, '--train_data', str(tmp_path / f'{n}.jsonl'), '--benchmark',
                   '--valid_data=none', '--json']
        # From a shell: Linux gives a process the peak memory of the one that it was forked from.
        run = subprocess.Popen(f'{shlex.join(command)}; true', shell=True, stdout=subprocess.PIPE, text=True)
        assert run.stdout.readline().startswith(f'{n} utterances')  # printed when training could start
        seconds = time.perf_counter() - start
        sizes.append(json.loads(run.communicate()[0].splitlines()[-1])['peak memory, MB'])
    print(f'{seconds:.0f} s; peak memory {sizes[0]} MB for 100 utterances, {sizes[1]} MB for 100,000')
    assert seconds < 20 and sizes[1] < sizes[0] + 300


# ---- real recordings ----------------------------------------------------------------------------------------------

@pytest.mark.skipif(not AN4, reason='AN4_DIR is not set')
def test_an4_is_read_whole():
    """Counts of the corpus's own documentation, letters alone in the alphabet, CTC's lines where English has them."""
    fit = data.read_corpus(Path(AN4) / 'train.jsonl')[0]
    alphabet = data.make_alphabet(fit)
    assert len(fit) == 948 and ''.join(alphabet) == ' abcdefghijklmnopqrstuvwxyz'
    assert not data.unlearnable(fit, alphabet, 4) and len(data.unlearnable(fit, alphabet, 8)) > 40
    for u in fit[::100]:
        assert math.ceil(len(data.resample(*data.read_audio(u.path), data.SAMPLE_RATE)) / 160) == u.frames
    lines = monitor.plateau_lines([data.encode(u.text, alphabet) for u in fit[::5]],
                                  torch.tensor([math.ceil(u.frames / 4) for u in fit[::5]]), len(alphabet))
    assert lines[0] > 8 and lines[1] == pytest.approx(2.9, abs=0.2)


@pytest.mark.skipif(not AN4, reason='AN4_DIR is not set')
def test_an4_a_clip_alone_equals_itself_in_a_batch():
    us = data.read_corpus(Path(AN4) / 'dev.jsonl')[0][:4]
    speech = data.Speech(us, data.make_alphabet(us))
    network = shaken('fixed', FULL)
    with torch.no_grad():
        mels, lengths, *_ = train.collate([speech[0, i] for i in range(4)])
        together, n = network(mels, lengths)
        for i in range(4):
            mels, lengths, *_ = train.collate([speech[0, i]])
            alone, _ = network(mels, lengths)
            assert torch.allclose(alone[0, :n[i]], together[i, :n[i]], atol=1e-4)
