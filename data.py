"""Recordings and transcripts in, padded log-mel batches with true lengths and CTC targets out.

    python data.py PATH                               inspect a corpus before training
    python data.py --say "seven two nine" out.wav     the built-in corpus's voices, to a file

    audio file   any format libsndfile reads, any rate, any channels
    wave         (S,)            mono, 16 kHz, float32 in -1..1
    log-mels     (T, 80)         T = ceil(S / 160): 100 frames a second, normalised over the clip
    batch        (B, 1, T, 80)   with lengths (B,), targets (B, L) and their lengths (B,)
References: Slaney 1998 (mel scale); Park et al. 2019, 2020 (SpecAugment); Ko et al. 2015 (speed perturbation).
"""
import argparse
import csv
import json
import math
import re
import sys
import unicodedata
import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F

SAMPLE_RATE = 16000
WINDOW, HOP = 400, 160  # 25 and 10 ms
N_FFT, N_MELS = 512, 80  # bins of 31.25 Hz
LOG_FLOOR = 1e-6  # power: a sine 60 dB under full scale gives about 1e-2, the rounding of 16 bits below 1e-7
SPEEDS = range(90, 111)  # per cent; speed perturbation draws one for each utterance and epoch


class DataError(Exception):
    """A user's data cannot be used; the message says what, where and the mend, in one line each."""


@dataclass
class Utterance:
    path: Path
    text: str        # normalised
    duration: float  # seconds
    speaker: str
    where: str       # 'manifest.jsonl:12', for messages

    @property
    def frames(self):
        return math.ceil(round(self.duration * SAMPLE_RATE) / HOP)


# ---- audio --------------------------------------------------------------------------------------------------------

def resample(wave, rate, new_rate):
    """Band-limited resampling of wave (S,) -> (ceil(S * new_rate / rate),): its spectrum is cut, or continued with
    zeros, at the lower of the two Nyquist frequencies. Rates are whole numbers of any unit."""
    if rate == new_rate:
        return wave
    up, down = (r // math.gcd(rate, new_rate) for r in (new_rate, rate))
    # Whole blocks keep the ratio exact, 32 at a time the transform fast; the zeros keep the end off the beginning.
    blocks = math.ceil((len(wave) + 512) / down / 32) * 32
    spectrum = torch.fft.rfft(wave, n=blocks * down)
    return torch.fft.irfft(spectrum, n=blocks * up)[:math.ceil(len(wave) * up / down)] * (up / down)


def read_audio(path):
    """Any file that libsndfile reads -> (S,) float32, the channels' mean, and its rate. Raises DataError."""
    try:
        wave, rate = soundfile.read(path, dtype='float32', always_2d=True)
    except (soundfile.LibsndfileError, OSError, TypeError) as error:
        reason = error if Path(path).is_file() else 'no such file'
        raise DataError(f'{path}: cannot be read as audio ({reason}); mend, convert or remove it') from None
    if not len(wave) or not np.abs(wave).max() < 1e6:
        raise DataError(f'{path}: holds no samples, or some that are not finite or out of all bounds; remove it')
    return torch.from_numpy(wave.mean(1)), rate


def mel_filters():
    """(257, 80): triangles of height 1, equally spaced on Slaney's mel scale from 0 to 8 kHz, where a mel is
    200/3 Hz up to 1 kHz and logarithmic above. No area norm: normalising over the clip would cancel it."""
    log_step = math.log(6.4) / 27  # above 1 kHz, 27 mels lead from 1 to 6.4 kHz
    top = 15 + math.log(SAMPLE_RATE / 2 / 1000) / log_step
    mels = np.linspace(0, top, N_MELS + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp(log_step * (mels - 15)))
    hertz = np.arange(N_FFT // 2 + 1)[:, None] * SAMPLE_RATE / N_FFT
    rising = (hertz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - hertz) / (edges[2:] - edges[1:-1])
    return torch.tensor(np.maximum(0, np.minimum(rising, falling)), dtype=torch.float32)


MEL_FILTERS, HANN = mel_filters(), torch.hann_window(WINDOW)


def log_mels(wave):
    """wave (S,) at 16 kHz -> (T, 80), T = ceil(S / 160); natural logarithm of the mel power. Frame t is centred
    on sample 160 t + 80, the middle of the 10 ms it stands for."""
    frames = math.ceil(len(wave) / HOP)
    left = (WINDOW - HOP) // 2
    wave = F.pad(wave, (left, (frames - 1) * HOP + WINDOW - left - len(wave)))
    spectrum = torch.fft.rfft(wave.unfold(0, WINDOW, HOP) * HANN, n=N_FFT)  # (T, 257)
    return ((spectrum.real ** 2 + spectrum.imag ** 2) @ MEL_FILTERS + LOG_FLOOR).log()


def normalise(mels):
    """Each mel band to mean 0 over the clip, which removes microphone and loudness; all together to deviation 1."""
    mels = mels - mels.mean(0)
    return mels / (mels.std(correction=0) + 1e-3)  # not by band: those that hold mostly noise would become loud


def spec_augment(mels, rng):
    """After Park et al. 2019 and, for masks that grow with the clip, 2020: two masks of up to 15 mel bands, one of up
    to 250 ms (a quarter of the clip at most) for each second. In place; 0 is each band's mean."""
    for axis, count, widest in (1, 2, 15), (0, math.ceil(len(mels) / 100), min(25, len(mels) // 4)):
        for _ in range(count):
            width = int(rng.integers(widest + 1))
            mels.narrow(axis, int(rng.integers(mels.shape[axis] - width + 1)), width).zero_()
    return mels


# ---- transcripts --------------------------------------------------------------------------------------------------

def normalise_text(text):
    """Lower case, NFC (one code point for a letter and its accent), single spaces."""
    return unicodedata.normalize('NFC', ' '.join(text.lower().split()))


def make_alphabet(utterances):
    """Every character of the transcripts; symbol 0 is CTC's blank and stands for no character."""
    return [''] + sorted({character for u in utterances for character in u.text})


def encode(text, alphabet):
    """Text -> symbols, never the blank. A character that the alphabet lacks is left out: no output can say it."""
    symbol = {character: i for i, character in enumerate(alphabet) if i}
    return [symbol[character] for character in text if character in symbol]


def decode(symbols, alphabet):
    return ''.join(alphabet[s] for s in symbols)


def frames_needed(symbols):
    """CTC needs a frame for each label and a blank between equal neighbours (Graves et al. 2006, section 3.1)."""
    return len(symbols) + sum(a == b for a, b in zip(symbols, symbols[1:]))


# ---- corpora on disk ----------------------------------------------------------------------------------------------

KEYS = {'audio': ('audio_filepath', 'path', 'file', 'audio', 'file_name'), 'speaker': ('speaker', 'client_id'),
        'text': ('text', 'sentence', 'transcript', 'transcription'), 'duration': ('duration',)}
SUFFIXES = ('.flac', '.wav', '.sph', '.mp3', '.ogg', '.opus', '.aiff', '.aif', '.au', '.caf')


def corpus_rows(path, split):
    """What a corpus lists -> (where, row) for each utterance: a dict with one of each of KEYS, or a line of JSON."""
    def lines(file):
        text = enumerate(file.read_text(encoding='utf-8-sig').split('\n'), 1)
        return [(f'{file}:{number}', line.strip()) for number, line in text if line.strip()]

    def find(file):  # with whatever suffix
        return str(next((f for s in SUFFIXES if (f := Path(f'{file}{s}')).is_file()), file).absolute())

    trees = sorted(path.rglob('*.trans.txt')) if path.is_dir() else []
    for tree in trees:  # LibriSpeech: 84-121123-0001 GO DO YOU HEAR
        for where, line in lines(tree):
            name, _, text = line.partition(' ')
            speaker = [name.split('-')[0], *tree.relative_to(path).parts[-3:-2]][-1]  # speaker/chapter/*.trans.txt
            yield where, {'audio': find(tree.parent / name), 'text': text, 'speaker': speaker}
    etc = [p for p in path.glob('etc/*.transcription') if split in p.name] if path.is_dir() else []
    if path.is_dir() and len(trees[:1] + etc) != 1:
        raise DataError(f'{path}: a folder needs either *.trans.txt or one etc/*{split}*.transcription; or name a file')
    path = etc[0] if etc else path
    if path.suffix == '.transcription':  # CMU Sphinx: <s> GO </s> (an251-fash-b)
        files = defaultdict(list)  # two folders may hold files of one name: the first line is the first one's
        for where, name in lines(path.with_suffix('.fileids')):
            files[Path(name).name].append((where, path.parent.parent / 'wav' / name))
        for where, line in lines(path):
            text, name = re.fullmatch(r'(?:<s>)?(.*?)(?:</s>)?\s*(?:\(([^()]+)\))?', line, re.IGNORECASE).groups()
            file = files[name].pop(0)[1] if files.get(name) else Path(f'{name}, which the .fileids lacks,')
            yield where, {'audio': find(file), 'text': text, 'speaker': file.parent.name}
        for where, file in sum(files.values(), []):
            yield where, {'audio': str(file), 'text': None}
    elif path.suffix.lower() in ('.csv', '.tsv'):
        tsv = {'delimiter': '\t', 'quoting': csv.QUOTE_NONE}
        with open(path, encoding='utf-8-sig', newline='') as file:
            table = csv.DictReader(file, **tsv if path.suffix.lower() == '.tsv' else {'strict': True})
            for key in 'audio', 'text':
                if not set(KEYS[key]) & set(table.fieldnames or ()):
                    raise DataError(f'{path}:1: no column of the header is named {" or ".join(KEYS[key])}')
            for row in table:
                yield f'{path}:{table.line_num}', row
    elif not trees:
        yield from lines(path)


def read_corpus(path, split='train'):
    """A corpus, recognised by its path: JSON lines (NeMo), CSV or TSV with a header (Common Voice), LibriSpeech tree,
    CMU Sphinx folder or its etc/*.transcription (split chooses) -> Utterances sorted by file name, and what is wrong
    with others {where: line}. Files lie beside the manifest or in clips/. DataError where none can be read."""
    path, utterances, faults = Path(path), [], {}
    try:
        for where, row in corpus_rows(path, split):
            try:
                row = json.loads(row) if isinstance(row, str) else row
                if not isinstance(row, dict) or None in row:
                    raise DataError('is no JSON object, or has more fields than the header: quote its text')
                value = {key: next((row[n] for n in names if row.get(n) is not None), '')
                         for key, names in KEYS.items()}
                for key in 'audio', 'text':
                    if not isinstance(value[key], str) or not value[key].strip():
                        raise DataError(f'has {value[key]!r} for its {KEYS[key][0]} (or {", ".join(KEYS[key][1:])})')
                audio, text = path.parent / value['audio'], normalise_text(value['text'])
                text.encode()  # half of a surrogate pair is a ValueError
                clip = path.parent / 'clips' / value['audio']  # Common Voice
                if not audio.is_file() and not (audio := clip).is_file():
                    raise DataError(f'{path.parent / value["audio"]} is no file')
                duration = float(value['duration'] or soundfile.info(audio).duration)
                if not 0 < duration < 3600:
                    raise DataError(f'{audio}: its duration is {duration} s; it needs more than 0, less than an hour')
                utterances.append(Utterance(audio, text, duration, str(value['speaker']), where))
            except (ValueError, TypeError, OSError, OverflowError, RuntimeError, DataError) as error:
                kind = 'is not a line of JSON: ' if isinstance(error, json.JSONDecodeError) else ''
                faults[where] = f'{where}: {kind}{error}'
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f'{path}: cannot be read as a corpus ({error})') from None
    if not utterances and not faults:
        raise DataError(f'{path}: holds no utterances')
    return sorted(utterances, key=lambda u: u.path.stem), faults


def hold_out(utterances, seed=0):
    """Keep a tenth for validation, by speaker where ten are known -> training, validation, the choice in words."""
    speakers, stems = {u.speaker for u in utterances}, {u.path.stem for u in utterances}
    known, distinct = len(speakers) >= 10 and '' not in speakers, len(stems) == len(utterances)
    groups = [u.speaker if known else u.path.stem if distinct else u.where for u in utterances]
    kept = set(np.random.default_rng(seed).permutation(sorted(set(groups)))[:math.ceil(len(set(groups)) / 10)].tolist())
    train, valid = ([u for u, group in zip(utterances, groups) if (group in kept) == out] for out in (False, True))
    choice = f'all of {", ".join(sorted(kept))}' if known else 'at random: not all speakers are known, or under ten'
    return train, valid, f'held out for validation: {len(valid)} of {len(utterances)} utterances, {choice}'


def load(u):
    """An utterance's wave (S,) and rate. Raises DataError, also where the duration is not what its corpus says."""
    wave, rate = read_audio(u.path)
    if abs(len(wave) / rate - u.duration) > max(0.1, 0.1 * u.duration):
        raise DataError(f'{u.path} lasts {len(wave) / rate:.2f} s, not {u.duration:.2f} as its duration says')
    return wave, rate


def unlearnable(utterances, alphabet, mel_frames):
    """The utterances that have fewer frames than CTC needs, where one frame stands for mel_frames mel frames."""
    return [u for u in utterances if math.ceil(u.frames / mel_frames) < frames_needed(encode(u.text, alphabet))]


def gather(train, valid=None, test=None, seed=0, frames_per_output=4, most=math.inf, remarks=lambda wave, rate: ()):
    """Paths of corpora (valid: None holds out from training, 'none' is none) -> a list of Utterances for each, what was
    held out, a line for each broken one that was left out {where: line}, and {remark: file names}. If there are at most
    `most`, every file is decoded, and its true duration taken."""
    sides, faults, found, choice = [], {}, defaultdict(list), ''
    for path, split in (train, 'train'), (valid, 'valid'), (test, 'test'):
        utterances, more = read_corpus(path, split) if split == 'train' or path not in (None, 'none') else ([], {})
        sides, faults = sides + [utterances], faults | more
    for u in sum(sides, []) if sum(map(len, sides)) <= most else ():
        try:
            wave, rate = load(u)
            u.duration = len(wave) / rate
            for remark in remarks(wave, rate):
                found[remark].append(u.path.name)
        except DataError as error:
            faults[u.where] = f'{u.where}: {error}'
    for u in unlearnable(sides[0], make_alphabet(sides[0]), frames_per_output):
        faults.setdefault(u.where, f'{u.where}: {u.path} has fewer outputs than labels and repeats; mend or remove it, '
                          'or lower --frames_per_output')
    sides = [[u for u in side if u.where not in faults] for side in sides]
    if valid is None and len(sides[0]) > 1:
        sides[0], sides[1], choice = hold_out(sides[0], seed)
    return sides, choice, faults, found


# ---- the built-in corpus: a source and a filter (Fant 1960), by rule (Klatt 1980) -----------------------------------

WORDS = dict(re.findall(r'(\w+): ([\w ]+)', (
    'zero: z ih r ao uh, one: w ah n, two: t uw, three: th r iy, four: f ao r, five: f aa ih v, six: s ih k s, '
    'seven: s eh v ah n, eight: eh iy t, nine: n aa ih n, ten: t eh n, no: n ao uh, go: g ao uh, low: l ao uh, '
    'stop: s t aa p, start: s t aa r t, right: r aa ih t, light: l aa ih t, night: n aa ih t, line: l aa ih n')))
# Formants in Hz (Peterson & Barney 1952, table II, men; consonants Klatt 1980, table III, n's first is its nasal one);
# levels of voice and hiss in dB, the hiss's centre in kHz and width in octaves, and duration in ms (these are our own,
# by spectrogram and by what a recogniser of real speech made of them):  F1 F2 F3, voice hiss, centre width, duration
PHONES = {name: np.array(row, float) for name, *row in map(str.split, re.split(r'[\n|]', '''\
  iy 270 2290 3010   0 -99   4   1 110 |uw 300  870 2240   0 -99   4   1 140 |th 320 1290 2540 -99 -30   6 1.5  90
  ih 390 1990 2550   0 -99   4   1  80 |w  290  610 2150  -4 -99   4   1  60 |s  320 1390 2530 -99 -16   6 0.5 105
  eh 530 1840 2480   0 -99   4   1 100 |r  310 1060 1380  -4 -99   4   1  65 |z  240 1390 2530 -10 -20   6 0.5  75
  ah 640 1190 2390   0 -99   4   1  90 |l  310 1050 2880  -4 -99   4   1  65 |p  400 1100 2150 -99 -28   1   2  30
  aa 730 1090 2440   0 -99   4   1 110 |n  270 1340 2470 -10 -99   4   1  90 |t  400 1600 2600 -99 -19 4.5 0.7  35
  ao 570  840 2410   0 -99   4   1 110 |f  340 1100 2080 -99 -28   6   2  95 |k  300 1990 2850 -99 -19   2 0.4  35
  uh 440 1020 2240   0 -99   4   1  80 |v  220 1100 2080 -10 -32   6   2  55 |g  200 1990 2850  -8 -24   2 0.4  25'''))}
STEP = 64  # samples, 4 ms: how often the filter moves
SPLITS = {'train': (336, 500, 1000), 'valid': (300, 12, 60), 'test': (312, 24, 120)}  # first speaker, speakers, clips


def synthesise(text, speaker=0, seed=0):
    """Say words of WORDS in the voice of a speaker (a whole number from 0) -> wave (S,) float32 at 16 kHz, and
    [(word, start, end)] in seconds. The same arguments give the same sound. Raises DataError for another word."""
    words = text.split()
    if not words or set(words) - set(WORDS) or speaker < 0:
        raise DataError(f'{text!r}: the synthesiser says {", ".join(WORDS)}, in the voices of speakers from 0 up')
    voice = np.random.default_rng([seed, speaker])
    # A shorter tract has higher formants and pitch; breath is in dB, the corner of the source's slope in Hz.
    scale, rate, breath, corner = voice.uniform([0.85, 0.65, -30, 800], [1.15, 1.1, -15, 2500])
    pitch = 140 * scale ** 3 * voice.uniform(0.8, 1.25)
    accent = dict(zip(PHONES, voice.normal(1, 0.06, (len(PHONES), 3))))
    rng = np.random.default_rng([seed, speaker, zlib.crc32(text.encode())])
    rows, steps, spans = [], [], []

    def add(row, ms, quieter=(0, 0)):  # dB, for voice and hiss
        rows.append(row - np.r_[0, 0, 0, quieter, 0, 0, 0])
        steps.append(max(1, round(ms * SAMPLE_RATE / 1000 / STEP)))

    for i, word in enumerate(words, 1):
        first = len(steps)
        for phone in WORDS[word].split():
            row = PHONES[phone] * np.r_[accent[phone] * scale * rng.normal(1, 0.05, 3), 1, 1, scale, 1, 1]
            if phone in 'ptkg':  # a stop begins with a closure
                add(row, 55 / rate * rng.uniform(0.7, 1.4), (17, 200))
            add(row, row[7] / rate * rng.uniform(0.7, 1.4))
        spans.append((word, first, len(steps)))
        if rng.random() < 0.6 or i == len(words):  # the voice dies away, then a gap
            for fade in 10, 20, 30:
                add(row, 40 if row[3] > -50 else 1, (fade, fade))
            add(row, rng.uniform(30, 300), (200, 200))
    rows, steps = [rows[0] - np.r_[0, 0, 0, 200, 200, 0, 0, 0], *rows], [rng.integers(40, 100), *steps]  # silence first
    ends = np.cumsum(steps) * STEP / SAMPLE_RATE
    spans = [(word, float(ends[a]), float(ends[b])) for word, a, b in spans]

    def smooth(values, width):
        kernel = np.hanning(width + 2) / np.hanning(width + 2).sum()
        return torch.tensor(np.convolve(np.pad(values, width, 'edge'), kernel, 'same')[width:-width].astype(np.float32))

    # Coarticulation: formants glide for 50 ms from phone to phone, voicing sets in over 56 ms, noise within 16.
    track, n = np.repeat(rows, steps, axis=0).T, sum(steps)
    track[3:5] = 10 ** (track[3:5] / 20)
    f1, f2, f3, voiced, hissed = map(smooth, track, (13, 13, 13, 14, 4))
    # The source: a pulse train, all harmonics of a pitch that falls and wavers, and noise.
    knots = pitch * np.linspace(1.1, 0.85, 2 + n // 40) * rng.normal(1, 0.07, 2 + n // 40)  # every 160 ms
    pitch = np.interp(np.linspace(0, 1, (n - 1) * STEP), np.linspace(0, 1, len(knots)), knots)
    half, harmonics = np.pi * np.cumsum(pitch) / SAMPLE_RATE, int(SAMPLE_RATE / 2 / pitch.max())
    pulses = (np.sin((2 * harmonics + 1) * half) / np.sin(half) - 1) / math.sqrt(2 * harmonics)  # a sum of cosines
    frames = {'n_fft': 512, 'hop_length': STEP, 'win_length': 256, 'window': torch.hann_window(256)}
    pulses, noise = (torch.stft(torch.tensor(x, dtype=torch.float32), **frames, return_complex=True)  # (257, n)
                     for x in (pulses, rng.standard_normal(len(pulses))))
    # The filter: a resonance for each formant, the fourth and above fixed; every response has unit power.
    def unit(response):
        return response / response.abs().square().mean(0).sqrt()

    hertz, tube = torch.linspace(0, SAMPLE_RATE / 2, 257)[:, None], torch.ones(257, 1)
    for f in *(scale * torch.arange(3500, 8000, 1000)), f1, f2, f3:
        tube = tube * (1 - (hertz / f) ** 2 + 1j * hertz * ((50 + f / 20) / f ** 2))  # 50 Hz and 5 % wide
    centres, octaves = torch.tensor(np.array(rows)[:, 5:7].T, dtype=torch.float32)
    hiss = unit((-((hertz.clamp(50) / 1000 / centres).log2() / octaves) ** 2 / 2).exp())
    room = unit(1 / (1 + hertz / 10 ** rng.uniform(2, 3.7))) * 10 ** (-rng.uniform(10, 35) / 20)  # dB below a vowel
    wave = torch.istft(unit(1 / tube / (1 + hertz / corner)) * voiced * pulses + noise * (
        unit(1 / tube) * (0.3 * hissed + voiced * 10 ** (breath / 20)) + room  # some hiss passes through the tube too
        + hiss.repeat_interleave(torch.tensor(steps), 1) * hissed), **frames)
    return (wave * (rng.uniform(0.2, 0.9) / wave.abs().max())).numpy(), spans


def builtin_corpus(folder='corpus'):
    """Speak the built-in corpus into a folder, once -> {'train': manifest, 'valid': ..., 'test': ...}; no speaker is in
    two of them. One to six random words an utterance. Raises OSError where the folder cannot be made."""
    folder, unfinished = Path(folder), Path(f'{folder}.unfinished')  # an interrupted one is no corpus
    if not (folder / 'test.jsonl').exists():
        print(f'speaking the built-in corpus into {folder}, once', flush=True)
        for split, (first, speakers, utterances) in SPLITS.items():
            rng, rows = np.random.default_rng(first), []
            (unfinished / split).mkdir(parents=True, exist_ok=True)
            for i in range(utterances):
                text, speaker = ' '.join(rng.choice(list(WORDS), rng.integers(1, 7))), first + i % speakers
                wave, _ = synthesise(text, speaker)
                soundfile.write(unfinished / split / f'{i:04}.flac', wave, SAMPLE_RATE)
                rows.append(json.dumps({'audio_filepath': f'{split}/{i:04}.flac', 'text': text,
                                        'duration': len(wave) / SAMPLE_RATE, 'speaker': f'{speaker}'}) + '\n')
            (unfinished / f'{split}.jsonl').write_text(''.join(rows))
        unfinished.rename(folder)
    return {split: str(folder / f'{split}.jsonl') for split in SPLITS}


# ---- utterances as the network takes them -------------------------------------------------------------------------

class Speech(torch.utils.data.Dataset):
    """Utterances as (log-mels (T, 80), target (L,), index), asked for by (epoch, index): augmentation depends on seed,
    epoch and the utterance alone. frames_per_output: 0 lets utterances pass that CTC cannot align (evaluation)."""

    def __init__(self, utterances, alphabet, frames_per_output=0, seed=0, spec_augment=False, speed_perturb=False):
        self.utterances, self.alphabet, self.frames_per_output = utterances, alphabet, frames_per_output
        self.seed, self.spec_augment, self.speed_perturb = seed, spec_augment, speed_perturb

    def rng(self, epoch, index):
        u = self.utterances[index]  # name and text: an utterance keeps its augmentation in a subset or in another order
        return np.random.default_rng([self.seed, epoch, zlib.crc32(f'{u.path.stem} {u.text}'.encode())])

    def speed(self, epoch, index):
        """In per cent of the recording's own; batches are made of utterances that are then of nearly equal lengths."""
        return int(self.rng(epoch, index).choice(SPEEDS)) if self.speed_perturb else 100

    def __getitem__(self, item):
        u, speed = self.utterances[item[1]], self.speed(*item)
        target, wave = encode(u.text, self.alphabet), resample(*load(u), SAMPLE_RATE)
        shortest = (frames_needed(target) - 1) * self.frames_per_output * HOP  # samples that CTC needs more than
        if len(wave) <= shortest:
            raise DataError(f'{u.where}: {u.path} is too short for its {len(target)} labels; mend or remove it')
        if len(wave) * 100 / speed > shortest:
            wave = resample(wave, speed, 100)  # from 110 to 100 samples, say: tempo and pitch both rise by 10 %
        mels = normalise(log_mels(wave))
        return spec_augment(mels, self.rng(*item)) if self.spec_augment else mels, torch.tensor(target), item[1]


def main(argv=None):
    parser = argparse.ArgumentParser(description='Inspect a corpus before training, or say a sentence.')
    parser.add_argument('path', help='corpus (see read_corpus) or audio file; with --say, the file to write')
    parser.add_argument('--valid_data', help='corpus for validation; unset: a tenth is held out, as with train.py')
    parser.add_argument('--say', metavar='TEXT', help=f'any of: {" ".join(WORDS)}')
    parser.add_argument('--speaker', type=int, default=0, help='with --say: whose voice, 0 or more')
    args = parser.parse_args(argv)
    import monitor
    try:
        if args.say is not None:
            wave, spans = synthesise(normalise_text(args.say), args.speaker)
            soundfile.write(args.path, wave, SAMPLE_RATE)
            print(*(f'{start:6.2f} {end:6.2f}  {word}' for word, start, end in spans), sep='\n')
        elif Path(args.path).suffix.lower() in SUFFIXES:
            wave, rate = read_audio(args.path)
            print(f'{args.path}: {len(wave) / rate:.2f} s at {rate} Hz', *monitor.remarks(wave, rate), sep='\n')
        else:
            (train, valid, _), choice, faults, found = gather(args.path, args.valid_data, remarks=monitor.remarks)
            alphabet = make_alphabet(train)
            if train:
                monitor.describe(train, valid, [encode(u.text, alphabet) for u in train], alphabet,
                                 torch.tensor([math.ceil(u.frames / 4) for u in train]))
            found['too short before upsampling by --blocks 11'] = [u.path.name for u in unlearnable(train, alphabet, 8)]
            print(choice, *(f'{len(v)} files {key}: {" ".join(v)}' for key, v in found.items() if v), sep='\n')
            if faults or not train or not (valid or args.valid_data):
                raise DataError('\n'.join([f'{len(faults)} faults, {len(train)} utterances left', *faults.values()]))
    except (DataError, soundfile.LibsndfileError, OSError, ValueError, TypeError) as error:
        sys.exit(f'data.py: {error}')


if __name__ == '__main__':
    main()
