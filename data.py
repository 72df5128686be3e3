"""Recordings and transcripts in, padded log-mel batches with true lengths and CTC targets out.

    audio file   any format libsndfile reads, any rate, any channels
    wave         (S,)            mono, 16 kHz, float32 in -1..1
    log-mels     (T, 80)         T = ceil(S / 160): 100 frames a second, normalised over the clip
    batch        (B, 1, T, 80)   with lengths (B,), targets (B, L) and their lengths (B,)

References: Slaney 1998, Auditory Toolbox (mel scale); Park et al. 2019 and 2020, SpecAugment; Ko et al. 2015 (speed
perturbation); Graves et al. 2006 (what CTC can align).
"""
import json
import math
import unicodedata
import zlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F

SAMPLE_RATE = 16000
WINDOW = 400     # 25 ms
HOP = 160        # 10 ms
N_FFT = 512      # bins of 31.25 Hz
N_MELS = 80
LOG_FLOOR = 1e-6     # power: a sine 60 dB under full scale gives about 1e-2, the rounding of 16 bits below 1e-7
PAD_TO = 32          # frames; few different shapes are faster than exact ones
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
    divisor = math.gcd(rate, new_rate)
    up, down = new_rate // divisor, rate // divisor
    # Whole blocks keep the ratio exact; the transform is circular, and the zeros keep the end off the beginning.
    blocks = math.ceil((len(wave) + 512) / down)
    spectrum = torch.fft.rfft(wave, n=blocks * down)
    return torch.fft.irfft(spectrum, n=blocks * up)[:math.ceil(len(wave) * up / down)] * (up / down)


def load_audio(path):
    """Any file that libsndfile reads -> (S,) float32, mono (the channels' mean), 16 kHz. Raises DataError."""
    try:
        wave, rate = soundfile.read(path, dtype='float32', always_2d=True)
    except (soundfile.LibsndfileError, OSError, TypeError) as error:
        raise DataError(f'{path}: cannot be read as audio ({error}); it is damaged, or of a kind to convert') from None
    if not len(wave) or not np.abs(wave).max() < 1e6:
        raise DataError(f'{path}: holds no samples, or some that are no sound (not finite, or above a million times '
                        'full scale); remove it from the manifest')
    return resample(torch.from_numpy(wave.mean(1)), rate, SAMPLE_RATE)


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
    """Each mel band to mean 0, deviation 1 over the clip's own frames: microphone and loudness drop out."""
    return (mels - mels.mean(0)) / (mels.std(0, correction=0) + 1e-3)


def spec_augment(mels, rng):
    """After Park et al. 2019 and, for masks that grow with the clip, 2020: two masks of up to 15 mel bands, one of up
    to 250 ms (a quarter of the clip at most) for each second. In place; 0 is each band's mean."""
    for _ in range(2):
        width = rng.integers(16)
        start = rng.integers(N_MELS - width + 1)
        mels[:, start:start + width] = 0
    for _ in range(math.ceil(len(mels) / 100)):
        width = min(rng.integers(26), len(mels) // 4)
        start = rng.integers(len(mels) - width + 1)
        mels[start:start + width] = 0
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
    return len(symbols) + sum(a == b for a, b in pairwise(symbols))


# ---- manifests ----------------------------------------------------------------------------------------------------

def read_manifest(path):
    """JSON lines with audio_filepath (absolute, or relative to the manifest), text, and optional duration in seconds
    and speaker -> Utterances. Raises DataError that lists every bad line."""
    path, utterances, faults = Path(path), [], []
    try:
        lines = path.read_text(encoding='utf-8-sig').split('\n')
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f'{path}: cannot be read as a UTF-8 manifest ({error})') from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f'{path}:{number}'
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise DataError('is no JSON object')
            for key in 'audio_filepath', 'text':
                if not isinstance(row[key], str) or not row[key].strip():
                    raise DataError(f'{key} must be a string that is not empty, not {row[key]!r}')
            audio, text = path.parent / row['audio_filepath'], normalise_text(row['text'])
            text.encode()  # half of a surrogate pair is a ValueError
            if not audio.is_file():
                raise DataError(f'{audio} is no file')
            duration = float(row.get('duration') or seconds(audio))
            if not 0 < duration < 3600:
                raise DataError(f'{audio}: its duration is {duration} s; more than 0 and less than an hour will do')
            utterances.append(Utterance(audio, text, duration, str(row.get('speaker', '')), where))
        except json.JSONDecodeError as error:
            faults.append(f'{where}: is not a line of JSON ({error.msg})')
        except KeyError as error:
            faults.append(f'{where}: has no {error} key')
        except (ValueError, TypeError, OSError, OverflowError, RecursionError, DataError) as error:
            faults.append(f'{where}: {error}')
    if faults:
        raise DataError('\n'.join(faults))
    if not utterances:
        raise DataError(f'{path}: holds no utterances')
    return utterances


def seconds(path):
    """Duration of an audio file from its header. Raises DataError."""
    try:
        return soundfile.info(path).duration
    except (soundfile.LibsndfileError, OSError) as error:
        raise DataError(f'{path}: cannot be read as audio ({error})') from None


def unlearnable(utterances, alphabet, mel_frames):
    """The utterances that have fewer frames than CTC needs, where one frame stands for mel_frames mel frames."""
    return [u for u in utterances if math.ceil(u.frames / mel_frames) < frames_needed(encode(u.text, alphabet))]


# ---- batches ------------------------------------------------------------------------------------------------------

class Speech(torch.utils.data.Dataset):
    """Utterances as (log-mels (T, 80), target (L,), index). Items are asked for by (epoch, index): augmentation
    depends on seed, epoch and the utterance alone, whichever worker makes it and whatever came before.
    frames_per_output: for training, where an utterance without a CTC alignment is an error; 0: for evaluation."""

    def __init__(self, utterances, alphabet, frames_per_output=0, seed=0, spec_augment=False, speed_perturb=False):
        self.utterances, self.alphabet, self.frames_per_output = utterances, alphabet, frames_per_output
        self.seed, self.spec_augment, self.speed_perturb = seed, spec_augment, speed_perturb

    def __len__(self):
        return len(self.utterances)

    def __getitem__(self, item):
        epoch, index = item
        u = self.utterances[index]
        target = encode(u.text, self.alphabet)
        # Name and text, not the index: an utterance keeps its augmentation in a subset or in another order.
        rng = np.random.default_rng([self.seed, epoch, zlib.crc32(f'{u.path.name} {u.text}'.encode())])
        wave = load_audio(u.path)
        if abs(len(wave) / SAMPLE_RATE - u.duration) > max(0.1, 0.1 * u.duration):
            raise DataError(f'{u.where}: {u.path} lasts {len(wave) / SAMPLE_RATE:.2f} s, not {u.duration:.2f} as its '
                            'duration says; mend that, or leave it out')
        shortest = (frames_needed(target) - 1) * self.frames_per_output * HOP  # samples that CTC needs more than
        if len(wave) <= shortest:
            raise DataError(f'{u.where}: {u.path} lasts {len(wave) / SAMPLE_RATE:.2f} s, too short for its '
                            f'{len(target)} labels; mend its text or its duration, or remove it')
        speed = int(rng.choice(SPEEDS))
        if self.speed_perturb and len(wave) * 100 / speed > shortest:
            wave = resample(wave, speed, 100)  # from 110 to 100 samples, say: tempo and pitch both rise by 10 %
        mels = normalise(log_mels(wave))
        if self.spec_augment:
            mels = spec_augment(mels, rng)
        return mels, torch.tensor(target), index


def collate(items):
    """-> mels (B, 1, T, 80), lengths (B,), targets (B, L), target lengths (B,), indices; padding is zero."""
    mels, targets, indices = zip(*items)
    longest = math.ceil(max(map(len, mels)) / PAD_TO) * PAD_TO
    batch = torch.stack([F.pad(m, (0, 0, 0, longest - len(m))) for m in mels])[:, None]
    return (batch, torch.tensor([len(m) for m in mels]),
            torch.nn.utils.rnn.pad_sequence(targets, batch_first=True), torch.tensor([len(t) for t in targets]),
            indices)


def epoch_batches(utterances, batch_size, seed, epoch):
    """Batches of (epoch, index), every utterance once, of nearly equal lengths, in random order. Durations are
    jittered by 10 % before sorting, so that an utterance meets others every epoch."""
    rng = np.random.default_rng([seed, epoch])
    order = np.argsort([u.duration for u in utterances] * rng.uniform(0.9, 1.1, len(utterances)), kind='stable')
    batches = [[(epoch, int(i)) for i in order[k:k + batch_size]] for k in range(0, len(order), batch_size)]
    rng.shuffle(batches)
    return batches


def training_batches(utterances, batch_size, seed, epochs):
    for epoch in range(epochs):
        yield from epoch_batches(utterances, batch_size, seed, epoch)


def length_batches(utterances, batch_size):
    """For evaluation: every utterance once, sorted by length."""
    order = sorted(range(len(utterances)), key=lambda i: utterances[i].duration)
    return [[(0, i) for i in order[k:k + batch_size]] for k in range(0, len(order), batch_size)]


def loader(speech, batches, workers=0):
    """The batches (lists of (epoch, index)), loaded in the order given, whatever the number of worker processes."""
    # A generator of its own: a DataLoader draws from PyTorch's, which dropout uses, more often with workers.
    return torch.utils.data.DataLoader(speech, batch_sampler=batches, collate_fn=collate, num_workers=workers,
                                       generator=torch.Generator())
