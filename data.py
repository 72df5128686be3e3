"""Recordings and transcripts in, padded log-mel batches with true lengths and CTC targets out.

    python data.py PATH                               inspect a corpus before training
    python data.py --say "seven two nine" out.wav     the built-in corpus's voices, to a file

    audio file   any format libsndfile reads, any rate, any channels
    wave         (S,)            mono, 16 kHz, float32 in -1..1
    log-mels     (T, 80)         T = ceil(S / 160): 100 frames a second, normalised over the clip
    batch        (B, 1, T, 80)   with lengths (B,), targets (B, L) and their lengths (B,)

References: Slaney 1998 (mel scale); Park et al. 2019, 2020 (SpecAugment); Ko et al. 2015 (speed
perturbation); Lin et al. 2022 (utterance concatenation); Fant 1960 and Klatt 1980 (the built-in
corpus).
"""
import argparse
import concurrent.futures
import contextlib
import csv
import functools
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor

SAMPLE_RATE = 16000                  # samples a second
WINDOW = 400                         # samples: 25 ms
HOP = 160                            # samples: 10 ms
FRAME_SECONDS = HOP / SAMPLE_RATE
N_FFT = 512                          # bins of 31.25 Hz
N_MELS = 80
LOG_FLOOR = 1e-10                    # power: the rounding of 16 bits gives more
CLICK = 3.2                          # nats above the voice, mean over the bands: 14 dB
SPEECH_RANGE = 8.0                   # nats below the voice, in power: 35 dB
MARGIN = 20                          # frames kept before and after speech
LOWEST_RATE, HIGHEST_RATE = 4000, 384_000  # samples a second
LONGEST = 3600                       # seconds
BLOCK = 1 << 20                      # samples read at once, of all channels
SPEEDS = range(90, 111)              # per cent; speed perturbation draws one by utterance and epoch
EVALUATED_FRAMES = 64_000            # padding included, at once: sixteen clips of 40 s
PAD_TO = 16                          # frames: few different shapes are faster than exact ones


class DataError(Exception):
    """A user's data cannot be used; the message says what, where and how to fix it, in one line
    each."""


@dataclass
class Utterance:
    """A recording and what is said in it."""
    path: Path
    text: str        # normalised
    duration: float  # seconds
    speaker: str     # '' where it is not known
    where: str       # 'manifest.jsonl:12', for messages
    offset: float | None = None  # seconds; None: the whole recording, not a part of one
    frames: int = 0  # of its features; by its duration as long as it was not decoded

    def __post_init__(self):
        if not self.frames:
            self.frames = self.recorded_frames

    @property
    def recorded_frames(self) -> int:
        """Frames that the recording itself lasts."""
        return math.ceil(round(self.duration * SAMPLE_RATE) / HOP)


# ---- files and progress --------------------------------------------------------------------------

@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """Write a file atomically: what is at `path` is replaced once everything has been written.

    Raises OSError.
    """
    part = Path(path).with_name(f'unfinished.{Path(path).name}')
    try:
        with open(part, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk names no file
            error.filename = str(path)
        raise


def save_wave(wave: np.ndarray, path: str | Path) -> None:
    """Write a wave (S,) at 16 kHz in the format of the path's suffix. Raises DataError,
    OSError."""
    buffer = io.BytesIO()
    try:
        soundfile.write(buffer, wave, SAMPLE_RATE, format=Path(path).suffix[1:])
    except (soundfile.LibsndfileError, TypeError, ValueError):
        raise DataError(f'{path}: its suffix names no audio format that can be written; '
                        'use .wav or .flac') from None
    with whole_file(path) as file:
        file.write(buffer.getbuffer())


def show_status(text: str = '') -> None:
    """Overwrite the status line where standard error is a terminal; '' clears it."""
    if sys.stderr is not None and sys.stderr.isatty():
        print(f'\r{text}\x1b[K', end='', file=sys.stderr, flush=True)


def progress(items: Iterable, total: int, what: str) -> Iterator:
    """Pass the items on, and show on a terminal how many of them are done."""
    shown = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if time.monotonic() - shown > 0.5:
            shown = time.monotonic()
            show_status(f'{what} {done}/{total}')
    show_status()


# ---- audio and features --------------------------------------------------------------------------

def resample(wave: Tensor, rate: int, new_rate: int) -> Tensor:
    """Band-limited resampling of wave (S,) -> (ceil(S * new_rate / rate),).

    Its spectrum is cut, or continued with zeros, at the lower of the two Nyquist frequencies. Rates
    are whole numbers of any unit.
    """
    if rate == new_rate:
        return wave
    divisor = math.gcd(rate, new_rate)
    up, down = new_rate // divisor, rate // divisor
    # Whole blocks keep the ratio exact, 32 at a time the transform fast; the zeros keep the end
    # from wrapping round to the start.
    blocks = math.ceil((len(wave) + 512) / down / 32) * 32
    spectrum = torch.fft.rfft(wave, n=blocks * down)
    resampled = torch.fft.irfft(spectrum, n=blocks * up)
    return resampled[:math.ceil(len(wave) * up / down)] * (up / down)


def is_standard_input(path: str | Path) -> bool:
    """Whether a path names what is piped into the program."""
    return str(path) in ('-', '/dev/stdin')


@contextlib.contextmanager
def open_audio(path: str | Path) -> Iterator[soundfile.SoundFile]:
    """A file that libsndfile reads, its header seen to be sane before a sample is. Raises
    DataError."""
    source = path
    if is_standard_input(path):
        if sys.stdin is None:
            raise DataError(f'{path}: standard input is closed; pipe a recording into it')
        source = io.BytesIO(sys.stdin.buffer.read())
    elif not os.path.isfile(path):
        reason = 'is not a regular file' if os.path.lexists(path) else 'no such file'
        raise DataError(f'{path}: cannot be read as audio ({reason}); correct the path')
    try:
        with soundfile.SoundFile(source) as file:
            fault = header_fault(file, first_bytes(source))
            if fault:
                raise DataError(f'{path}: {fault}')
            yield file
    except (soundfile.LibsndfileError, OSError, TypeError, ValueError, MemoryError) as error:
        reason = getattr(error, 'error_string', str(error))  # of libsndfile, without its source
        reason = ' '.join(reason.split())[-200:] or type(error).__name__
        raise DataError(f'{path}: cannot be read as audio ({reason}); '
                        'repair, convert or remove it') from None


def first_bytes(source: str | Path | io.BytesIO) -> bytes:
    """The beginning of a file, where headers are."""
    if isinstance(source, io.BytesIO):
        return source.getvalue()[:4096]
    with open(source, 'rb') as file:
        return file.read(4096)


def header_fault(file: soundfile.SoundFile, head: bytes) -> str | None:
    """What is wrong with an audio file by its header (head: its first bytes), and how to fix it.

    A wav, aiff or au that was cut off says how long it was, in what libsndfile reports, a sph in
    its header; sizes near 2^31 and 2^32 are those of programs that stream, and do not know. An ogg
    or an mp3 without a length cannot be seen to have been cut off.
    """
    rate = file.samplerate
    if not LOWEST_RATE <= rate <= HIGHEST_RATE:
        return (f'its header says {rate} samples a second, and not {LOWEST_RATE} to '
                f'{HIGHEST_RATE}; correct the header, or convert it')
    if file.frames > 2 ** 62:
        return 'its header does not say how long it is, as of a stream; convert it'
    if file.frames > LONGEST * min(rate, 48000):
        return (f'it lasts {file.frames / rate / 3600:.1f} hours at {rate} Hz; the limit is an '
                'hour at 48 kHz: cut it into pieces')
    for promised, found in re.findall(r'(?:data|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)',
                                      file.extra_info):
        if int(found) < int(promised) < 0x7FFF0000:
            return (f'is cut off: its header says {promised} bytes, it holds {found}; get it '
                    'whole, or remove it')
    counted = re.search(rb'sample_count -i (\d+)', head)
    if file.format == 'NIST' and counted and int(counted[1]) > file.frames:
        return (f'is cut off: its header says {int(counted[1])} samples, it holds {file.frames}; '
                'get it whole, or remove it')
    return None


def length_is_a_guess(path: str | Path, file: soundfile.SoundFile) -> bool:
    """Whether a file does not say how long it is: libsndfile guesses that of an mp3 without a
    Xing or Info mark, from its size and its first frames."""
    if file.format != 'MP3':
        return False
    head = b'' if is_standard_input(path) else first_bytes(path)
    return b'Xing' not in head and b'Info' not in head


def read_audio(path: str | Path, offset: float = 0.0,
               duration: float | None = None) -> tuple[Tensor, int]:
    """Any file that libsndfile reads -> wave (S,) float32, the channels' mean, and its rate in Hz.

    offset, duration: of a part of it, in seconds. Raises DataError.
    """
    blocks = [np.zeros(0, dtype=np.float32)]
    with open_audio(path) as file:
        rate = file.samplerate
        first = round(offset * rate)
        last = LONGEST * HIGHEST_RATE  # until its end
        if duration is not None:
            last = first + round(duration * rate)
        read = 0
        if file.format == 'WAV':  # elsewhere seeking is not exact
            read = file.seek(min(first, file.frames))
        while read < last:
            block = file.read(min(BLOCK, last - read), dtype='float32', always_2d=True)
            if not len(block):
                break
            if not np.abs(block).max() < 1e6:  # also where one is not a number
                raise DataError(f'{path}: some samples are not finite or out of all bounds; '
                                'remove it')
            blocks.append(block.mean(1)[max(0, first - read):])
            read += len(block)
        if read < 0.98 * min(last, file.frames) and not length_is_a_guess(path, file):
            raise DataError(f'{path}: is cut off: its header says {file.frames / rate:.2f} s, it '
                            f'holds {read / rate:.2f}; get it whole, or remove it')
    wave = np.concatenate(blocks)
    if not len(wave):
        part = f' from {offset:.2f} s on' if offset else ''
        part += f' for {duration:g} s' if duration is not None else ''
        raise DataError(f'{path}: holds no samples{part}; remove it')
    return torch.from_numpy(wave), rate


def read_wave(path: str | Path) -> Tensor:
    """Any file that libsndfile reads -> wave (S,) at 16 kHz. Raises DataError."""
    return resample(*read_audio(path), SAMPLE_RATE)


def mel_filters() -> Tensor:
    """The filter bank (257, 80): triangles of height 1, equally spaced on Slaney's mel scale.

    From 0 to 8 kHz; a mel is 200/3 Hz up to 1 kHz and logarithmic above. No area norm: normalising
    over the clip would cancel it.
    """
    log_step = math.log(6.4) / 27  # above 1 kHz, 27 mels lead from 1 to 6.4 kHz
    top = 15 + math.log(SAMPLE_RATE / 2 / 1000) / log_step
    mels = np.linspace(0, top, N_MELS + 2)
    logarithmic = 1000 * np.exp(log_step * (mels - 15))
    edges = np.where(mels < 15, mels * 200 / 3, logarithmic)
    hertz = np.arange(N_FFT // 2 + 1)[:, None] * SAMPLE_RATE / N_FFT
    low, peak, high = edges[:-2], edges[1:-1], edges[2:]
    rising = (hertz - low) / (peak - low)
    falling = (high - hertz) / (high - peak)
    triangles = np.maximum(0, np.minimum(rising, falling))
    return torch.tensor(triangles, dtype=torch.float32)


MEL_FILTERS = mel_filters()
HANN = torch.hann_window(WINDOW)


def log_mels(wave: Tensor) -> Tensor:
    """wave (S,) at 16 kHz -> natural logarithm of the mel power (T, 80), T = ceil(S / 160).

    Frame t is centred on sample 160 t + 80, the middle of the 10 ms it stands for.
    """
    frames = math.ceil(len(wave) / HOP)
    left = (WINDOW - HOP) // 2
    right = (frames - 1) * HOP + WINDOW - left - len(wave)
    windows = F.pad(wave, (left, right)).unfold(0, WINDOW, HOP)         # (T, 400)
    spectrum = torch.fft.rfft(windows * HANN, n=N_FFT)                  # (T, 257)
    power = spectrum.real ** 2 + spectrum.imag ** 2
    return (power @ MEL_FILTERS + LOG_FLOOR).log()


def moving_median(level: Tensor) -> Tensor:
    """The median over 70 ms around each frame of level (T,), which removes what is shorter than
    40 ms."""
    padded = F.pad(level, (3, 3), value=level.min().item())
    return padded.unfold(0, 7, 1).median(1).values


def voice_level(steady: Tensor) -> Tensor:
    """How loud the voice is, of steady levels (T,): the level that the loudest 0.2 s reach.

    In a short clip, that a quarter of its loud frames reach. Not the maximum, which a slammed door
    would set.
    """
    loudest = steady.sort(descending=True).values
    loud = int((loudest >= loudest[0] - 7).sum())  # within 7 nats of the loudest
    return loudest[min(20, loud // 4)]


def repair_clicks(mels: Tensor) -> Tensor:
    """Replace frames of (T, 80) far louder than the voice by interpolating between others."""
    level = mels.mean(1)
    loud = level > voice_level(moving_median(level)) + CLICK
    loud = F.max_pool1d(loud.float()[None], 3, stride=1, padding=1)[0] > 0  # and its neighbours
    good = (~loud).nonzero()[:, 0]
    if not loud.any() or not len(good):
        return mels
    t = torch.arange(len(mels))
    before = good[(torch.searchsorted(good, t, right=True) - 1).clamp(min=0)]
    after = good[torch.searchsorted(good, t).clamp(max=len(good) - 1)]
    share = ((t - before) / (after - before).clamp(min=1)).clamp(0, 1)[:, None]
    return torch.where(loud[:, None], mels[before].lerp(mels[after], share), mels)


class Features(NamedTuple):
    """What the network takes for a clip."""
    mels: Tensor  # (T, 80), normalised
    start: int    # the frame of the wave at which they begin; below 0, silence was put before it


def features(wave: Tensor) -> Features:
    """wave (S,) at 16 kHz -> normalised log-mels, from 0.2 s before the speech to 0.2 s after it.

    They hardly depend on silence around the speech, clicks or loudness. Raises ValueError for a
    wave without samples.
    """
    if not len(wave):
        raise ValueError('a wave without samples has no features; give a longer one')
    # With silence on both sides, a clip that has some and one that has none get the same features.
    silence = MARGIN + 2                                                 # frames
    mels = repair_clicks(log_mels(F.pad(wave, (silence * HOP, silence * HOP))))
    # Speech is what comes within 35 dB of the voice's level. Its first and last frame, half of
    # whose window may lie in silence, do not count for what follows.
    power = moving_median(mels.logsumexp(1))
    spoken = (power >= voice_level(power) - SPEECH_RANGE).nonzero()[:, 0]
    start, end = max(0, int(spoken[0]) - MARGIN), int(spoken[-1]) + 1 + MARGIN
    speech = mels[spoken[1:-1] if len(spoken) > 2 else spoken]           # (N, 80)
    # What is quieter is raised to the quietest that speech has in each band.
    mels = mels[start:end].maximum(speech.min(0).values)
    # Each band to mean 0 over the speech, which removes the microphone; all together to deviation
    # 1: scaling each by its own would amplify bands that hold mostly noise.
    mean = speech.mean(0)
    deviation = (speech - mean).std(correction=0)
    return Features((mels - mean) / (deviation + 1e-3), start - silence)


def spec_augment(mels: Tensor, rng: np.random.Generator) -> Tensor:
    """Mask bands and stretches of time of (T, 80) in place; 0 is each band's mean.

    After Park et al. 2019 and, for masks that grow with the clip, 2020: two masks of up to 15 mel
    bands, and for each second one of up to 250 ms, a quarter of the clip at most.
    """
    def mask(axis, widest):
        width = int(rng.integers(widest + 1))
        start = int(rng.integers(mels.shape[axis] - width + 1))
        mels.narrow(axis, start, width).zero_()

    for _ in range(2):
        mask(axis=1, widest=15)
    for _ in range(math.ceil(len(mels) / 100)):
        mask(axis=0, widest=min(25, len(mels) // 4))
    return mels


# ---- transcripts ---------------------------------------------------------------------------------

def normalise_text(text: str) -> str:
    """Lower case, NFC (one code point for a letter and its accent), single spaces."""
    lower = text.lower().replace('i\u0307', 'i')  # what Python makes of the Turkish capital
    return unicodedata.normalize('NFC', ' '.join(lower.split()))


def make_alphabet(utterances: Iterable[Utterance]) -> list[str]:
    """Every character of the transcripts; symbol 0 is CTC's blank and stands for no character."""
    return [''] + sorted({character for u in utterances for character in u.text})


def encode(text: str, alphabet: Sequence[str]) -> list[int]:
    """Text -> symbols, never the blank.

    A character that the alphabet lacks is left out: no output can say it.
    """
    symbol = {character: i for i, character in enumerate(alphabet) if i}
    return [symbol[character] for character in text if character in symbol]


def read_text(path: str | Path, alphabet: Sequence[str]) -> list[str]:
    """The lines of a text, normalised; characters that the alphabet lacks become spaces.

    Raises DataError.
    """
    try:
        lines = Path(path).read_text(encoding='utf-8').splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f'--lm_text {path}: cannot be read as text ({error}); give a UTF-8 text, a '
                        'sentence a line') from None
    known = set(alphabet)
    texts = [normalise_text(''.join(c if c in known else ' ' for c in normalise_text(line)))
             for line in lines]
    texts = [text for text in texts if text]
    if not texts:
        raise DataError(f'--lm_text {path}: holds no line in the characters of the training '
                        'transcripts; give another text')
    return texts


def decode(symbols: Iterable[int], alphabet: Sequence[str]) -> str:
    """Symbols -> text."""
    return ''.join(alphabet[symbol] for symbol in symbols)


def show_path(symbols: Iterable[int], alphabet: Sequence[str]) -> str:
    """The symbols of outputs for the eye: the space as _, the blank as -, or ~ where - is a
    letter."""
    blank = '~' if '-' in alphabet else '-'
    return ''.join(alphabet[symbol].replace(' ', '_') or blank for symbol in symbols)


def punctuation_note(alphabet: Iterable[str]) -> str | None:
    """What to know of characters that are written and not said, None without any."""
    written = [character for character in alphabet if character not in ('', '-', "'", '\u2019')]
    marks = [character for character in written if unicodedata.category(character)[0] in 'PS']
    if not marks:
        return None
    return (f'punctuation is learnt as letters are: {" ".join(map(repr, marks))}; '
            'remove from the transcripts what is not said')


def outputs_needed(symbols: Sequence) -> int:
    """The smallest number of outputs with which CTC can emit these symbols, or characters.

    One for each, and a blank between equal neighbours (Graves et al. 2006, section 3.1).
    """
    repeats = sum(a == b for a, b in zip(symbols, symbols[1:]))
    return len(symbols) + repeats


def too_short_message(u: Utterance) -> str:
    """What is wrong with an utterance that CTC cannot learn, and how to fix it."""
    return (f'{u.path} lasts {u.duration:.2f} s, too short for its {len(u.text)} characters; '
            'correct or remove it, leave it out with --skip_bad, or lower --frames_per_output')


def unlearnable(utterances: Iterable[Utterance], frames_per_output: int) -> list[Utterance]:
    """The utterances that last too short for CTC to say their text.

    The silence that features() puts round a clip does not count.
    """
    found = []
    for u in utterances:
        outputs = math.ceil(min(u.frames, u.recorded_frames) / frames_per_output)
        if outputs < outputs_needed(u.text):
            found.append(u)
    return found


# ---- utterances as the network takes them --------------------------------------------------------

def load_utterance(u: Utterance) -> tuple[Tensor, int]:
    """An utterance's wave (S,) and rate.

    Raises DataError, also where the recording does not last as long as its corpus says.
    """
    if u.offset is None:
        wave, rate = read_audio(u.path)
    else:
        wave, rate = read_audio(u.path, u.offset, u.duration)
    duration = len(wave) / rate
    if abs(duration - u.duration) > max(0.1, 0.1 * u.duration):
        raise DataError(f'{u.path} lasts {duration:.2f} s, not {u.duration:.2f} as its duration '
                        'says; correct one of them')
    return wave, rate


class Speech(torch.utils.data.Dataset):
    """Utterances as (log-mels (T, 80), target (L,), index), asked for by (epoch, index).

    Augmentation depends on seed, epoch and the utterance alone; what `concat` (the chance of it)
    puts behind it, on the corpus too. frames_per_output: above 0, an utterance that CTC cannot
    align raises DataError; 0 lets it pass, for evaluation.
    """

    def __init__(self, utterances: Sequence[Utterance], alphabet: Sequence[str],
                 frames_per_output: int = 0, seed: int = 0, spec_augment: bool = False,
                 speed_perturb: bool = False, concat: float = 0.0):
        self.utterances = utterances
        self.alphabet = alphabet
        self.frames_per_output = frames_per_output
        self.seed = seed
        self.spec_augment = spec_augment
        self.speed_perturb = speed_perturb
        self.concat = concat

    @functools.cached_property
    def of_speaker(self) -> dict[str, list[Utterance]]:
        """Each speaker's utterances; those of unknown speakers count as one's."""
        of_speaker = defaultdict(list)
        for u in self.utterances:
            of_speaker[u.speaker].append(u)
        return of_speaker

    def rng(self, epoch: int, index: int, *purpose: int) -> np.random.Generator:
        """The random numbers of an utterance in an epoch, others for each purpose.

        Seeded by name and text: it keeps its augmentation in a subset or in another order.
        """
        u = self.utterances[index]
        name = f'{u.path.stem} {u.text}'
        return np.random.default_rng([self.seed, epoch, zlib.crc32(name.encode()), *purpose])

    def speed(self, epoch: int, index: int) -> int:
        """The speed of an utterance in an epoch, in per cent of the recording's own."""
        return int(self.rng(epoch, index).choice(SPEEDS)) if self.speed_perturb else 100

    def parts(self, epoch: int, index: int) -> list[Utterance]:
        """What an item says: the utterance and, by the chance `concat`, one of its speaker's.

        The network so hears words in more contexts and clips of more lengths than the corpus has
        (random utterance concatenation, Lin et al. 2022). Recordings are joined as they are: of two
        that are 35 dB apart, the quieter one is taken for silence.
        """
        u = self.utterances[index]
        rng = self.rng(epoch, index, 2)
        if rng.random() >= self.concat:
            return [u]
        same_speaker = self.of_speaker[u.speaker]
        return [u, same_speaker[rng.integers(len(same_speaker))]]

    def frames(self, epoch: int, index: int) -> float:
        """About how many frames an item has in an epoch."""
        recorded = sum(u.frames for u in self.parts(epoch, index))
        return recorded / self.speed(epoch, index) * 100

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, Tensor, int]:
        epoch, index = item
        parts, drawn = self.parts(epoch, index), self.speed(epoch, index)
        waves = [resample(*load_utterance(u), SAMPLE_RATE) for u in parts]
        # Where CTC could not align what was drawn: the utterance alone, then as it was recorded.
        attempts = [(len(parts), drawn), (1, drawn), (1, 100)]
        for count, speed in dict.fromkeys(attempts):  # no attempt twice
            target = encode(' '.join(u.text for u in parts[:count]), self.alphabet)
            # At 110 %, 110 samples become 100: faster and higher.
            mels, _ = features(resample(torch.cat(waves[:count]), speed, 100))
            if len(mels) > (outputs_needed(target) - 1) * self.frames_per_output:
                break
        else:
            raise DataError(f'{parts[0].where}: {too_short_message(parts[0])}')
        if self.spec_augment:
            mels = spec_augment(mels, self.rng(epoch, index, 1))
        return mels, torch.tensor(target), index


class Batch(NamedTuple):
    """Utterances side by side; padding is zero."""
    mels: Tensor            # (B, 1, T, 80)
    lengths: Tensor         # (B,) in frames
    targets: Tensor         # (B, L)
    target_lengths: Tensor  # (B,)
    indices: tuple          # of the utterances, B whole numbers


def collate(items: Sequence[tuple[Tensor, Tensor, int]]) -> Batch:
    """Items of Speech -> a Batch."""
    mels, targets, indices = zip(*items)
    lengths = [len(m) for m in mels]
    frames = math.ceil(max(lengths) / PAD_TO) * PAD_TO
    padded = torch.zeros(len(mels), 1, frames, N_MELS)
    for clip, m in zip(padded, mels):
        clip[0, :len(m)] = m
    return Batch(mels=padded,
                 lengths=torch.tensor(lengths),
                 targets=torch.nn.utils.rnn.pad_sequence(targets, batch_first=True),
                 target_lengths=torch.tensor([len(t) for t in targets]),
                 indices=indices)


def training_batches(speech: Speech, batch_size: int, epoch: int, rank: int = 0,
                     ranks: int = 1) -> list[list[tuple[int, int]]]:
    """One epoch's batches of (epoch, index): every utterance once, the batches in random order.

    The items of a batch have nearly equal lengths, augmentation included; a jitter of 2 % varies
    which ones meet. Of several processes (ranks), each takes its share of every batch; one without
    a share repeats the batch's first utterance.
    """
    rng = np.random.default_rng([speech.seed, epoch])
    frames = [speech.frames(epoch, index) for index in range(len(speech.utterances))]
    jittered = frames * rng.uniform(0.98, 1.02, len(frames))
    order = np.argsort(jittered, kind='stable')
    batches = [[(epoch, int(i)) for i in order[start:start + batch_size]]
               for start in range(0, len(order), batch_size)]
    rng.shuffle(batches)
    return [batch[rank::ranks] or batch[:1] for batch in batches]


def evaluation_batches(utterances: Sequence[Utterance],
                       batch_size: int) -> list[list[tuple[int, int]]]:
    """Batches of (0, index): every utterance once, sorted by length; long ones in smaller batches
    or alone, for memory."""
    batches = []
    for i in sorted(range(len(utterances)), key=lambda i: utterances[i].frames):
        full = not batches or len(batches[-1]) == batch_size
        if full or (len(batches[-1]) + 1) * utterances[i].frames > EVALUATED_FRAMES:
            batches.append([])
        batches[-1].append((0, i))
    return batches


def init_worker(number: int = 0) -> None:
    """Prepare a process that loads or speaks: one thread, for those of several would wait for each
    other; of Ctrl-C and SIGTERM, which may reach all processes of a program, the first speaks."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


def collate_arrays(items: Sequence[tuple[Tensor, Tensor, int]]) -> Batch:
    """collate, but with NumPy arrays."""
    *tensors, indices = collate(items)
    return Batch(*[tensor.numpy() for tensor in tensors], indices)


class Loader(torch.utils.data.DataLoader):
    """Gets arrays from its processes and makes tensors of them here: tensors would come through
    shared memory, and where that is full, as it soon is in a container, be waited for for ever."""

    def __iter__(self) -> Iterator[Batch]:
        for *arrays, indices in super().__iter__():
            yield Batch(*map(torch.from_numpy, arrays), indices)


def loader(speech: Speech, batches: Iterable[list[tuple[int, int]]], workers: int = 0) -> Loader:
    """The batches as Batch, in the order given, whatever the number of worker processes."""
    # A generator of its own: a DataLoader draws from PyTorch's, which dropout uses, more often with
    # workers than without.
    return Loader(speech, batch_sampler=batches, collate_fn=collate_arrays, num_workers=workers,
                  generator=torch.Generator(), worker_init_fn=init_worker)


# ---- corpora -------------------------------------------------------------------------------------

FIELDS = {  # of a row, and the names that tables and manifests have for them
    'audio': ('audio_filepath', 'path', 'file', 'audio', 'file_name'),
    'text': ('text', 'sentence', 'transcript', 'transcription'),
    'duration': ('duration',),
    'offset': ('offset',),
    'speaker': ('speaker', 'client_id'),
}
SUFFIXES = ('.flac', '.wav', '.sph', '.mp3', '.ogg', '.opus', '.aiff', '.aif', '.au', '.caf')
SHORT = 200  # characters of a user's text in a message

# (where, a dict with names of FIELDS, or what is wrong with the row)
Rows = Iterator[tuple[str, dict | DataError]]


def readable_lines(path: Path) -> Iterator[str]:
    """A text file's lines as they are; invalid UTF-8 becomes lone surrogates."""
    with open(path, encoding='utf-8-sig', errors='surrogateescape', newline='') as file:
        for line in file:
            if '\0' in line:
                raise DataError(f'{path}: is not UTF-8 text (UTF-16, or no text at all); name a '
                                'manifest, or save it as UTF-8')
            yield line


def numbered_lines(path: Path) -> list[tuple[str, str]]:
    """A text file's lines that are not empty -> ('file:number', line)."""
    lines = enumerate(readable_lines(path), 1)
    return [(f'{path}:{number}', line.strip()) for number, line in lines if line.strip()]


def files_below(folder: Path, ending: str) -> list[Path]:
    """The files of a tree whose names end so, through links too, but not macOS's '._' ones.

    Raises OSError where a folder cannot be read.
    """
    def refuse(error):
        raise error

    found = []
    seen = set()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        inode = os.path.realpath(parent)
        if inode in seen:
            folders.clear()  # a loop of links
            continue
        seen.add(inode)
        found += [Path(parent, name) for name in names
                  if name.endswith(ending) and not name.startswith('._')]
    return sorted(found)


def json_rows(path: Path) -> Rows:
    """JSON lines, as NeMo has them: {"audio_filepath": "1.flac", "text": "go", "duration": 1.8}.

    With an "offset", in seconds, an utterance is that part of a longer recording.
    """
    for where, line in numbered_lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            row = DataError(f'is not a line of JSON: {error}; correct or remove it')
        if not isinstance(row, (dict, DataError)):
            row = DataError('is not a JSON object {...}; correct or remove it')
        yield where, row


def table_rows(path: Path) -> Rows:
    """A CSV or TSV table with a header, as Common Voice has it; its TSV does not quote."""
    form = {'strict': True}
    if path.suffix.lower() == '.tsv':
        form = {'delimiter': '\t', 'quoting': csv.QUOTE_NONE}
    csv.field_size_limit(2 ** 31 - 1)
    table = csv.DictReader(readable_lines(path), **form)
    read = 1  # lines
    try:
        names = set(table.fieldnames or ())
    except csv.Error as error:
        raise DataError(f'{path}:1: is not a header of a table ({error}); correct its '
                        'quotes') from None
    missing = [field for field in ('audio', 'text') if not names.intersection(FIELDS[field])]
    if missing:
        wanted = ', and none '.join(' or '.join(FIELDS[field]) for field in missing)
        raise DataError(f'{path}:1: no column is named {wanted}; rename those it has: '
                        f'{", ".join(map(str, table.fieldnames or ()))[:SHORT] or "none"}')
    while True:
        try:
            row = next(table)
        except StopIteration:
            return
        except csv.Error as error:
            row = DataError(f'is not a row of a table ({error}); correct its quotes')
        first, read = read + 1, table.reader.line_num
        if isinstance(row, dict):
            first = read - sum(str(text).count('\n') for text in row.values())
            fault = row_fault(row, first, read)
            row = DataError(fault) if fault else row
        yield f'{path}:{first}', row


def row_fault(row: dict, first: int, last: int) -> str | None:
    """What is wrong with a row of a table, read from these lines of it, and how to fix it."""
    if None in row:
        return 'has more columns than the header; put quotes round a text with a comma'
    if None in row.values():
        return ('has fewer columns than the header; a sentence broken over two lines, or a file '
                'cut off')
    if first < last:
        return (f'goes on to line {last}, by a quote that opens here; close it, or put the row on '
                'one line')
    return None


def librispeech_rows(folder: Path, transcripts: Iterable[Path]) -> Rows:
    """A LibriSpeech tree, speaker/chapter/*.trans.txt: "84-121123-0001 GO DO YOU HEAR"."""
    for path in transcripts:
        parents = path.relative_to(folder).parts[:-1]
        for where, line in numbered_lines(path):
            name, _, text = line.partition(' ')
            speaker, hyphen, _ = name.partition('-')
            if len(parents) > 1:
                speaker = parents[-2]
            elif not hyphen:
                speaker = ''
            audio = str((path.parent / name).absolute())
            yield where, {'audio': audio, 'text': text, 'speaker': speaker}


FILLER = re.compile(r'<[^<>\s]*>|\+\+[^+\s]*\+\+|\[[^\[\]\s]*\]')  # <sil>, ++NOISE++, [COUGH]
ALTERNATE = re.compile(r'\(\d+\)$')                                 # HELLO(2)


def sphinx_text(words: Iterable[str], fillers: Counter) -> str:
    """A Sphinx transcript's words without fillers, which are counted, and numbers of alternates."""
    spoken = []
    for word in words:
        if FILLER.fullmatch(word):
            fillers[word] += word.lower() not in ('<s>', '</s>')
        else:
            spoken.append(ALTERNATE.sub('', word))
    return ' '.join(spoken)


def sphinx_rows(path: Path) -> Rows:
    """CMU Sphinx's etc/*.transcription, "<s> GO </s> (an251-fash-b)", and its .fileids."""
    files = defaultdict(list)  # by full name, and by the name alone: first line, first file
    listed = numbered_lines(path.with_suffix('.fileids'))
    for entry in listed:
        for name in {entry[1], entry[1].rpartition('/')[2]}:
            files[name].append(entry)
    fillers = Counter()
    taken = set()
    nameless = 0
    for where, line in numbered_lines(path):
        text, bracket, name = line.rpartition('(')
        name = name.removesuffix(')')
        if not bracket or not line.endswith(')') or (name.isdigit() and name not in files):
            nameless += 1
            yield where, DataError('has no name of a file in brackets at its end; add it')
            continue
        free = [entry for entry in files.get(name, ()) if entry not in taken]
        if not free:
            yield where, DataError(f'names {name}, for which the .fileids has no line, or none '
                                   'left; correct one of them')
            continue
        taken.add(free[0])
        file = free[0][1]  # 'an4_clstk/fash/an251-fash-b'
        yield where, {'audio': str((path.parent.parent / 'wav' / file).absolute()),
                      'text': sphinx_text(text.split(), fillers),
                      'speaker': file.rpartition('/')[0].rpartition('/')[2]}
    left = [entry for entry in listed if entry not in taken]
    for where, _ in left[nameless:]:  # one for each nameless line is that line's
        yield where, DataError('has no line in the .transcription; add it, or remove this one')
    dropped = +fillers
    if dropped:
        print(f'{path}: left out of the transcripts:',
              ', '.join(f'{count} {filler}' for filler, count in dropped.items()))


def corpus_rows(path: Path, split: str) -> Rows:
    """The rows of a corpus, its form recognised by its path. Raises DataError, OSError."""
    if path.is_dir():
        trees = files_below(path, '.trans.txt')
        etc = [p for p in path.glob('etc/*.transcription')
               if split in p.name and not p.name.startswith('._')]
        if bool(trees) + len(etc) != 1:
            raise DataError(f'{path}: a folder needs either *.trans.txt or one '
                            f'etc/*{split}*.transcription; or name a file')
        if trees:
            return librispeech_rows(path, trees)
        path = etc[0]
    if path.suffix == '.transcription':
        return sphinx_rows(path)
    if path.suffix.lower() in ('.csv', '.tsv'):
        return table_rows(path)
    return json_rows(path)


def row_fields(row: dict | DataError) -> dict:
    """{field of FIELDS: what the row has for it, '' where nothing}. Raises DataError."""
    if isinstance(row, DataError):
        raise row
    fields = {}
    for field, names in FIELDS.items():
        given = [row[name] for name in names if row.get(name) is not None]
        fields[field] = given[0] if given else ''
    for field in 'audio', 'text':
        if not isinstance(fields[field], str) or not fields[field].strip():
            first, *others = FIELDS[field]
            raise DataError(f'has {repr(fields[field])[:SHORT]} for its {first} (or '
                            f'{", ".join(others)}); fill it in')
        try:
            fields[field].encode()
        except UnicodeEncodeError:
            raise DataError(f'its {field} is not UTF-8 text; save the file as UTF-8') from None
    return fields


def number_of(fields: dict, field: str) -> float | None:
    """A field's number; None where it has none. Raises DataError."""
    if fields[field] == '':
        return None
    try:
        if isinstance(fields[field], bool):
            raise ValueError
        return float(fields[field])
    except (ValueError, TypeError, OverflowError):
        raise DataError(f'has {repr(fields[field])[:SHORT]} for its {field}; give seconds as a '
                        'number') from None


def find_audio(name: str, folder: Path) -> Path:
    """The file of a name in a folder or in its clips/, as Common Voice has it, with its suffix or
    without. Raises DataError."""
    for place in folder / name, folder / 'clips' / name:
        for suffix in '', *SUFFIXES, *map(str.upper, SUFFIXES):
            audio = Path(f'{place}{suffix}')
            if audio.is_file():
                return audio
    raise DataError(f'{str(folder / name)[:SHORT]} is not a file, nor is one of that name in '
                    f'{folder / "clips"}; correct its path, from the folder of the table')


def parse_row(row: dict | DataError, folder: Path, where: str) -> Utterance:
    """One row of a corpus whose files lie in a folder, or in its clips/ -> an Utterance.

    Raises DataError, OSError, ValueError.
    """
    fields = row_fields(row)
    audio = find_audio(fields['audio'], folder)
    offset = number_of(fields, 'offset')
    if offset is not None and not 0 <= offset < LONGEST:
        raise DataError(f'{audio}: its offset is {offset} s; it is 0 to less than an hour')
    duration = number_of(fields, 'duration')
    if duration is None:
        with open_audio(audio) as file:
            end = file.frames / file.samplerate
        if offset is not None and offset >= end:
            raise DataError(f'{audio}: its offset is {offset} s, and it ends at {end:g} s; '
                            'correct it')
        duration = end - (offset or 0)
    if not 0 < duration < LONGEST:
        raise DataError(f'{audio}: its duration is {duration} s; '
                        'it needs more than 0 and less than an hour')
    return Utterance(audio, normalise_text(fields['text']), duration, str(fields['speaker']), where,
                     offset)


def read_corpus(path: str | Path,
                split: str = 'train') -> tuple[list[Utterance], dict[str, str]]:
    """A corpus -> its Utterances sorted by file name, and what is wrong with others {where:
    message}.

    The form is recognised by the path: JSON lines (NeMo), CSV or TSV with a header (Common Voice),
    a LibriSpeech tree, a CMU Sphinx folder or its etc/*.transcription (split chooses among
    several). Raises DataError where none can be read.
    """
    path = Path(path)
    utterances = []
    faults = {}
    try:
        for where, row in corpus_rows(path, split):
            try:
                utterances.append(parse_row(row, path.parent, where))
            except (ValueError, OSError, DataError) as error:
                faults[where] = f'{where}: {str(error)[:2 * SHORT]}'
    except OSError as error:
        raise DataError(f'{path}: cannot be read as a corpus ({error}); correct the path, or the '
                        'file at that place') from None
    if not utterances and not faults:
        raise DataError(f'{path}: holds no utterances; give another corpus')
    return sorted(utterances, key=lambda u: u.path.stem), faults


class HeldOut(NamedTuple):
    """Training data in two, and the choice in words."""
    train: list[Utterance]
    valid: list[Utterance]
    choice: str


def hold_out(utterances: Sequence[Utterance], seed: int = 0) -> HeldOut:
    """Keep a tenth for validation: whole speakers where all are known, and ten or more."""
    speakers = {u.speaker for u in utterances}
    stems = {u.path.stem for u in utterances}
    files = [os.path.realpath(u.path) for u in utterances]
    by_speaker = len(speakers) >= 10 and '' not in speakers
    if by_speaker:
        groups = [u.speaker for u in utterances]
    elif len(set(files)) == 1:
        groups = [u.where for u in utterances]      # segments of a single recording
    elif len(stems) == len(set(files)):
        groups = [u.path.stem for u in utterances]  # the same choice in any form of corpus
    else:
        groups = files                              # segments of one file stay together
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(sorted(set(groups))).tolist()
    held_out = set(shuffled[:math.ceil(len(shuffled) / 10)])
    train = [u for u, group in zip(utterances, groups) if group not in held_out]
    valid = [u for u, group in zip(utterances, groups) if group in held_out]
    who = 'at random: not all speakers are known, or under ten'
    if by_speaker:
        who = f'all of {", ".join(sorted(held_out))}'
    return HeldOut(train, valid, f'held out for validation: {len(valid)} of {len(utterances)} '
                                 f'utterances, {who}')


class Splits(NamedTuple):
    """What read_splits found."""
    train: list[Utterance]
    valid: list[Utterance]
    test: list[Utterance]
    choice: str                      # what was held out, '' where nothing was
    faults: dict[str, str]           # {where: message} of utterances that cannot be used
    problems: dict[str, list[str]]   # {what is wrong: names of files} of usable recordings


def check_recordings(utterances: Sequence[Utterance], problems: dict) -> dict[str, str]:
    """Decode every file, note its true duration and frames, and what is wrong with it in problems.

    -> faults, {where: message} of those that cannot be used.
    """
    faults = {}
    for u in progress(utterances, len(utterances), 'checking recordings'):
        try:
            wave, rate = load_utterance(u)
        except DataError as error:
            faults[u.where] = f'{u.where}: {error}'
            continue
        u.duration = len(wave) / rate
        u.frames = len(features(resample(wave, rate, SAMPLE_RATE)).mels)
        for problem in recording_problems(wave, rate):
            problems.setdefault(problem, []).append(u.path.name)
    return faults


def read_splits(train: str, valid: str | None, test: str | None, seed: int,
                frames_per_output: int, check_up_to: float = math.inf) -> Splits:
    """The corpora for training, validation (None: held out from training; 'none') and test.

    If there are at most check_up_to utterances, every file is decoded, and its true duration taken.
    Raises DataError where a corpus cannot be read at all.
    """
    sides = {}
    faults = {}
    problems = defaultdict(list)
    for split, path in ('train', train), ('valid', valid), ('test', test):
        sides[split] = []
        if path not in (None, 'none') or split == 'train':
            sides[split], new_faults = read_corpus(path, split)
            faults |= new_faults
    everything = [u for side in sides.values() for u in side]
    if len(everything) <= check_up_to:
        faults |= check_recordings(everything, problems)
    for u in unlearnable(sides['train'], frames_per_output):
        faults.setdefault(u.where, f'{u.where}: {too_short_message(u)}')
    for split, side in sides.items():
        sides[split] = [u for u in side if u.where not in faults]
    choice = ''
    if valid is None and len(sides['train']) > 1:
        sides['train'], sides['valid'], choice = hold_out(sides['train'], seed)
    return Splits(**sides, choice=choice, faults=faults, problems=problems)


# ---- inspection ----------------------------------------------------------------------------------

def recording_problems(wave: Tensor, rate: int) -> Iterator[str]:
    """What is wrong with a recording (S,) that can be read, in words.

    Training and transcription tolerate silence and clicks, which are still worth checking.
    """
    size = wave.abs()
    if rate < SAMPLE_RATE:
        yield (f'sampled at {rate} Hz: of the band up to 8000 Hz, all above {rate // 2} Hz '
               'is missing')
    if size.max() < 0.003:
        yield 'near-silent, nowhere above -50 dB of full scale'
        return
    at_peak = size >= 0.9999 * size.max()
    three_in_a_row = at_peak[2:] & at_peak[1:-1] & at_peak[:-2]
    if three_in_a_row.sum() >= 5:
        yield 'clipped, the peaks are flat'
    if (wave == 0).float().mean() > 0.2:
        yield 'digital silence for more than a fifth of it'
    mels = log_mels(resample(wave, rate, SAMPLE_RATE))
    if not torch.equal(repair_clicks(mels), mels):
        yield 'a click or a bang far louder than the voice'


def length_correlation(utterances: Sequence[Utterance]) -> float | None:
    """The correlation of durations and numbers of characters; None where it would say nothing.

    That is for fewer than 50 utterances, and for texts nearly equally long.
    """
    lengths = np.array([(u.duration, len(u.text)) for u in utterances], dtype=float)
    if len(lengths) < 50 or (lengths.std(0) < 0.1 * lengths.mean(0)).any():
        return None
    return float(np.corrcoef(lengths.T)[0, 1])


def describe_corpus(train: Sequence[Utterance], valid: Sequence[Utterance], alphabet: Sequence[str],
                    plateaus: tuple[float, float]) -> None:
    """Print what a corpus holds for training (at least one utterance) and for validation.

    plateaus: the losses of uniform and of constant output, in nats per label.
    """
    seconds = torch.tensor([u.duration for u in train])
    counts = Counter(''.join(u.text for u in train))
    rare = [f'{character!r} {n} times' for character, n in sorted(counts.items()) if n < 10]
    vocabulary = {word for u in train for word in u.text.split()}
    unseen = {word for u in valid for word in u.text.split()} - vocabulary
    speakers = len({u.speaker for u in train} - {''}) or 'unknown'
    print(f'training    {len(train)} utterances, {seconds.sum() / 3600:.2f} hours, '
          f'speakers: {speakers}')
    print('seconds    ', *(f'{q:.0%}: {seconds.quantile(q):.1f}' for q in (0, 0.1, 0.5, 0.9, 1)))
    print(f'alphabet    {len(alphabet) - 1} characters:', *map(repr, alphabet[1:]))
    print('rare        ', ', '.join(rare) or 'none')
    note = punctuation_note(alphabet)
    if note:
        print('           ', note)
    print(f'labels      {counts.total() / seconds.sum():.1f} a second')
    print(f'plateaus    in nats per label: uniform output {plateaus[0]:.2f}, '
          f'constant output {plateaus[1]:.2f}')
    print(f'validation  {len(valid)} utterances; {len(unseen)} of their words are not in training:',
          *sorted(unseen))


# ---- the built-in corpus: a source and a filter (Fant 1960), by rule (Klatt 1980) ----------------

WORDS = {
    'zero': 'z ih r ao uh', 'one': 'w ah n', 'two': 't uw', 'three': 'th r iy', 'four': 'f ao r',
    'five': 'f aa ih v', 'six': 's ih k s', 'seven': 's eh v ah n', 'eight': 'eh iy t',
    'nine': 'n aa ih n', 'ten': 't eh n', 'no': 'n ao uh', 'go': 'g ao uh', 'low': 'l ao uh',
    'stop': 's t aa p', 'start': 's t aa r t', 'right': 'r aa ih t', 'light': 'l aa ih t',
    'night': 'n aa ih t', 'line': 'l aa ih n',
}


class Phone(NamedTuple):
    """A speech sound, as the synthesiser makes it."""
    f1: float        # formants, Hz
    f2: float
    f3: float
    voice: float     # levels of voice and of hiss, dB
    hiss: float
    centre: float    # of the hiss, kHz
    width: float     # of the hiss, octaves
    duration: float  # ms


# Formants: Peterson & Barney 1952, table II, men; of consonants Klatt 1980, table III (n's first is
# its nasal one). Levels, hiss and durations are our own, by spectrogram and by what a recogniser of
# real speech made of them.
PHONES = {  #    F1    F2    F3  voice  hiss  centre  width   ms
    'iy': Phone(270, 2290, 3010,    0,  -99,    4,    1,  110),
    'uw': Phone(300,  870, 2240,    0,  -99,    4,    1,  140),
    'th': Phone(320, 1290, 2540,  -99,  -30,    6,  1.5,   90),
    'ih': Phone(390, 1990, 2550,    0,  -99,    4,    1,   80),
    'w':  Phone(290,  610, 2150,   -4,  -99,    4,    1,   60),
    's':  Phone(320, 1390, 2530,  -99,  -16,    6,  0.5,  105),
    'eh': Phone(530, 1840, 2480,    0,  -99,    4,    1,  100),
    'r':  Phone(310, 1060, 1380,   -4,  -99,    4,    1,   65),
    'z':  Phone(240, 1390, 2530,  -10,  -20,    6,  0.5,   75),
    'ah': Phone(640, 1190, 2390,    0,  -99,    4,    1,   90),
    'l':  Phone(310, 1050, 2880,   -4,  -99,    4,    1,   65),
    'p':  Phone(400, 1100, 2150,  -99,  -28,    1,    2,   30),
    'aa': Phone(730, 1090, 2440,    0,  -99,    4,    1,  110),
    'n':  Phone(270, 1340, 2470,  -10,  -99,    4,    1,   90),
    't':  Phone(400, 1600, 2600,  -99,  -19,  4.5,  0.7,   35),
    'ao': Phone(570,  840, 2410,    0,  -99,    4,    1,  110),
    'f':  Phone(340, 1100, 2080,  -99,  -28,    6,    2,   95),
    'k':  Phone(300, 1990, 2850,  -99,  -19,    2,  0.4,   35),
    'uh': Phone(440, 1020, 2240,    0,  -99,    4,    1,   80),
    'v':  Phone(220, 1100, 2080,  -10,  -32,    6,    2,   55),
    'g':  Phone(200, 1990, 2850,   -8,  -24,    2,  0.4,   25),
}
STOPS = ('p', 't', 'k', 'g')
STEP = 64  # samples, 4 ms: how often the filter moves
SPECTRUM = {'n_fft': 512, 'hop_length': STEP, 'win_length': 256, 'window': torch.hann_window(256)}
HERTZ = torch.linspace(0, SAMPLE_RATE / 2, 257)[:, None]


class BuiltinSplit(NamedTuple):
    """One part of the built-in corpus."""
    first_speaker: int
    speakers: int
    utterances: int


BUILTIN = {'train': BuiltinSplit(336, 500, 1000), 'valid': BuiltinSplit(300, 12, 60),
           'test': BuiltinSplit(312, 24, 120)}


class Voice(NamedTuple):
    """A speaker of the built-in corpus."""
    tract: float    # factor of all formants: a shorter tract has higher ones, and a higher pitch
    tempo: float    # factor of the speed
    breath: float   # dB
    corner: float   # of the source's slope, Hz
    pitch: float    # Hz
    accent: dict    # {phone: factors of its three formants}


def draw_voice(speaker: int) -> Voice:
    """The voice of a speaker."""
    rng = np.random.default_rng([0, speaker])
    low, high = [0.85, 0.65, -30, 800], [1.15, 1.1, -15, 2500]
    tract, tempo, breath, corner = rng.uniform(low, high)
    pitch = 140 * tract ** 3 * rng.uniform(0.8, 1.25)
    accents = rng.normal(1, 0.06, (len(PHONES), 3))
    return Voice(tract, tempo, breath, corner, pitch, dict(zip(PHONES, accents)))


class Track(NamedTuple):
    """The synthesis plan: for each segment, Phone's columns and how many steps it lasts."""
    rows: list                           # of arrays (8,)
    steps: list                          # of 4 ms each
    spans: list                          # of (word, the row before its first, its last)


def plan_phones(words: Sequence[str], voice: Voice, rng: np.random.Generator) -> Track:
    """The phones of the words in a voice, with closures, fades and gaps."""
    rows, steps, spans = [], [], []

    def add(row, ms, quieter=(0, 0)):  # dB, for voice and hiss
        rows.append(row - np.r_[0, 0, 0, quieter, 0, 0, 0])
        steps.append(max(1, round(ms * SAMPLE_RATE / 1000 / STEP)))

    for number, word in enumerate(words, 1):
        first = len(steps)
        for phone in WORDS[word].split():
            formants = voice.accent[phone] * voice.tract * rng.normal(1, 0.05, 3)
            row = np.array(PHONES[phone]) * np.r_[formants, 1, 1, voice.tract, 1, 1]
            if phone in STOPS:  # they begin with a closure
                add(row, 55 / voice.tempo * rng.uniform(0.7, 1.4), (17, 200))
            add(row, row[-1] / voice.tempo * rng.uniform(0.7, 1.4))
        spans.append((word, first, len(steps)))
        if rng.random() < 0.6 or number == len(words):  # the voice dies away, then a gap
            voiced = PHONES[phone].voice > -50
            for fade in 10, 20, 30:
                add(row, 40 if voiced else 1, (fade, fade))
            add(row, rng.uniform(30, 300), (200, 200))
    silence = rows[0] - np.r_[0, 0, 0, 200, 200, 0, 0, 0]
    silent_steps = rng.integers(40, 100)
    return Track([silence, *rows], [silent_steps, *steps], spans)


def smooth(values: np.ndarray, width: int) -> Tensor:
    """A moving average of values (n,) with a Hann window of this many steps."""
    kernel = np.hanning(width + 2) / np.hanning(width + 2).sum()
    padded = np.pad(values, width, 'edge')
    average = np.convolve(padded, kernel, 'same')[width:-width]
    return torch.tensor(average, dtype=torch.float32)


def spectrogram(wave: np.ndarray) -> Tensor:
    """The short-time Fourier transform (257, n) of a wave, a column each step."""
    return torch.stft(torch.tensor(wave, dtype=torch.float32), **SPECTRUM, return_complex=True)


def make_source(voice: Voice, n: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """The spectrograms (257, n) of a pulse train, all harmonics of a moving pitch, and of noise."""
    knots = 2 + n // 40  # every 160 ms
    contour = voice.pitch * np.linspace(1.1, 0.85, knots) * rng.normal(1, 0.07, knots)
    samples = (n - 1) * STEP
    pitch = np.interp(np.linspace(0, 1, samples), np.linspace(0, 1, knots), contour)
    half_phase = np.pi * np.cumsum(pitch) / SAMPLE_RATE
    harmonics = int(SAMPLE_RATE / 2 / pitch.max())
    # The sum of the cosines of all harmonics, in closed form.
    cosines = np.sin((2 * harmonics + 1) * half_phase) / np.sin(half_phase) - 1
    pulses = cosines / math.sqrt(2 * harmonics)
    return spectrogram(pulses), spectrogram(rng.standard_normal(samples))


def unit_power(response: Tensor) -> Tensor:
    """Filter responses (257, n) at a mean power of 1."""
    return response / response.abs().square().mean(0).sqrt()


def tube_response(voice: Voice, formants: Sequence[Tensor]) -> Tensor:
    """The vocal tract's (257, n): a resonance for each formant, the fourth and above fixed."""
    denominator = torch.ones(257, 1)
    upper = voice.tract * torch.arange(3500, 8000, 1000)
    for f in *upper, *formants:
        bandwidth = 50 + f / 20  # Hz
        resonance = 1 - (HERTZ / f) ** 2 + 1j * HERTZ * (bandwidth / f ** 2)
        denominator = denominator * resonance
    return 1 / denominator


def hiss_response(rows: Sequence[np.ndarray]) -> Tensor:
    """The hiss's (257, rows): a bell over the logarithm of frequency."""
    columns = torch.tensor(np.array(rows), dtype=torch.float32).T
    centres, octaves = columns[5:7]
    distance = (HERTZ.clamp(50) / 1000 / centres).log2() / octaves
    return unit_power((-(distance ** 2) / 2).exp())


def room_response(rng: np.random.Generator) -> Tensor:
    """The room's noise (257, 1), 10 to 35 dB below a vowel."""
    colour = 1 / (1 + HERTZ / 10 ** rng.uniform(2, 3.7))
    return unit_power(colour) * 10 ** (-rng.uniform(10, 35) / 20)


def synthesise(text: str, speaker: int = 0) -> tuple[np.ndarray, list[tuple[str, float, float]]]:
    """Say words of WORDS in the voice of a speaker, a whole number from 0.

    -> wave (S,) float32 at 16 kHz, and [(word, start, end)] in seconds. The same arguments give the
    same sound. A pulse train of moving pitch and noise (the source) pass through moving resonances
    (the filter). Raises DataError for another word.
    """
    words = text.split()
    if not words or set(words) - set(WORDS) or speaker < 0:
        raise DataError(f'{text!r}: the synthesiser says {", ".join(WORDS)}, in the voices of '
                        'speakers from 0 up')
    voice = draw_voice(speaker)
    rng = np.random.default_rng([0, speaker, zlib.crc32(text.encode())])
    track = plan_phones(words, voice, rng)
    ends = np.cumsum(track.steps) * STEP / SAMPLE_RATE
    spans = []
    for word, first, last in track.spans:
        spans.append((word, float(ends[first]), float(ends[last])))

    # Coarticulation: formants glide for 50 ms from phone to phone, voicing sets in over 56 ms,
    # noise within 16.
    columns = np.repeat(track.rows, track.steps, axis=0).T
    formants = [smooth(column, 13) for column in columns[:3]]
    voiced = smooth(10 ** (columns[3] / 20), 14)
    hissed = smooth(10 ** (columns[4] / 20), 4)

    pulses, noise = make_source(voice, sum(track.steps), rng)
    tube = tube_response(voice, formants)
    slope = 1 + HERTZ / voice.corner
    hiss = hiss_response(track.rows).repeat_interleave(torch.tensor(track.steps), 1)
    room = room_response(rng)
    breath = 10 ** (voice.breath / 20)
    noise_filter = unit_power(tube) * (0.3 * hissed + voiced * breath) + room + hiss * hissed
    spectrum = unit_power(tube / slope) * voiced * pulses + noise * noise_filter
    wave = torch.istft(spectrum, **SPECTRUM)
    loudness = rng.uniform(0.2, 0.9) / wave.abs().max()
    return (wave * loudness).numpy(), spans


class BuiltinUtterance(NamedTuple):
    """An utterance of the built-in corpus that is to be spoken."""
    file: str  # relative to the corpus
    text: str
    speaker: int


def builtin_utterances(split: str) -> list[BuiltinUtterance]:
    """The utterances of one part of the built-in corpus: one to six random words each."""
    first_speaker, speakers, utterances = BUILTIN[split]
    rng = np.random.default_rng(first_speaker)
    planned = []
    for i in range(utterances):
        text = ' '.join(rng.choice(list(WORDS), rng.integers(1, 7)))
        speaker = first_speaker + i % speakers
        planned.append(BuiltinUtterance(f'{split}/{i:04}.flac', text, speaker))
    return planned


def write_utterance(u: BuiltinUtterance, folder: Path) -> str:
    """Write one utterance of the built-in corpus -> its line of the manifest. Raises OSError."""
    wave, _ = synthesise(u.text, u.speaker)
    soundfile.write(folder / u.file, wave, SAMPLE_RATE)
    return json.dumps({'audio_filepath': u.file, 'text': u.text,
                       'duration': len(wave) / SAMPLE_RATE, 'speaker': f'{u.speaker}'})


def speak_corpus(folder: Path) -> None:
    """Speak the whole built-in corpus, in as many processes as there are cores. Raises OSError."""
    planned = [u for split in BUILTIN for u in builtin_utterances(split)]
    for split in BUILTIN:
        (folder / split).mkdir()
    pool = concurrent.futures.ProcessPoolExecutor(
        mp_context=multiprocessing.get_context('spawn'), initializer=init_worker)
    with pool:
        try:
            spoken = pool.map(write_utterance, planned, [folder] * len(planned), chunksize=10)
            rows = list(progress(spoken, len(planned), 'speaking'))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for split in BUILTIN:
        lines = [row for row, u in zip(rows, planned) if u.file.startswith(f'{split}/')]
        (folder / f'{split}.jsonl').write_text('\n'.join(lines) + '\n')


def builtin_corpus(folder: str | Path = 'corpus') -> dict[str, str]:
    """Speak the built-in corpus into a folder, once -> {'train': manifest, 'valid': ..., 'test':
    ...}.

    No speaker is in two of them. Raises OSError where the folder cannot be made, DataError where it
    holds something else.
    """
    folder = Path(folder)
    if not folder.exists():
        print(f'speaking the built-in corpus into {folder}, once', flush=True)
        # Another process may be at the same: each speaks into a folder of its own, the first one to
        # finish gives it the name.
        unfinished = Path(tempfile.mkdtemp(prefix=f'{folder.name}.unfinished.', dir=folder.parent))
        try:
            speak_corpus(unfinished)
            unfinished.chmod(0o755)
            with contextlib.suppress(OSError):
                unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    paths = {split: str(folder / f'{split}.jsonl') for split in BUILTIN}
    for path in paths.values():
        if not os.path.isfile(path):
            raise DataError(f'{path}: is missing, so {folder} is not the built-in corpus; rename '
                            'or delete that folder, and it will be spoken anew')
    return paths


# ---- python data.py ------------------------------------------------------------------------------

def inspect_corpus(path: str, valid_data: str | None) -> None:
    """Print what a corpus holds, and what is wrong with it. Raises DataError where training
    would."""
    import model
    import monitor
    frames_per_output = model.Config(vocab_size=1).frames_per_output
    splits = read_splits(path, valid_data, None, seed=0, frames_per_output=frames_per_output)
    if splits.train:
        alphabet = make_alphabet(splits.train)
        targets = [encode(u.text, alphabet) for u in splits.train]
        outputs = torch.tensor([math.ceil(u.frames / frames_per_output) for u in splits.train])
        describe_corpus(splits.train, splits.valid, alphabet,
                        monitor.plateau_lines(targets, outputs, len(alphabet)))
    if splits.choice:
        print(splits.choice)
    for problem, names in splits.problems.items():
        print(f'{len(names)} files {problem}: {" ".join(names)}')
    if splits.faults or not splits.train or not (splits.valid or valid_data):
        summary = f'{len(splits.faults)} faults, {len(splits.train)} utterances left for training'
        if splits.train and not splits.valid:
            summary += ', none for validation; give more, or --valid_data'
        raise DataError('\n'.join([*splits.faults.values(), summary]))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description='Inspect a corpus before training, or say a sentence.')
    parser.add_argument('path', help='corpus (.jsonl, .csv, .tsv, LibriSpeech or Sphinx folder) '
                                     'or audio file; with --say, the file to write')
    parser.add_argument('--valid_data', help='corpus for validation; unset: a tenth is held out, '
                                             'as with train.py')
    parser.add_argument('--say', metavar='TEXT',
                        help=f'speak words into the file PATH, any of: {" ".join(WORDS)}')
    parser.add_argument('--speaker', type=int,
                        help='with --say: whose voice, 0 or more; unset: 0')
    args = parser.parse_args(argv)
    import monitor
    try:
        with monitor.one_line_ends('data.py'):
            say_or_inspect(args)
    except DataError as error:
        sys.exit(f'data.py: {error}')


def say_or_inspect(args: argparse.Namespace) -> None:
    """What the flags ask for. Raises DataError, OSError."""
    is_audio = Path(args.path).suffix.lower() in SUFFIXES
    if args.valid_data is not None and (args.say is not None or is_audio):
        raise DataError('flags: --valid_data is for a corpus; remove it')
    if args.speaker is not None and args.say is None:
        raise DataError('flags: --speaker is for --say; remove it, or give both')
    if args.say is not None:
        wave, spans = synthesise(normalise_text(args.say), args.speaker or 0)
        save_wave(wave, args.path)
        for word, start, end in spans:
            print(f'{start:6.2f} {end:6.2f}  {word}')
    elif is_audio:
        wave, rate = read_audio(args.path)
        print(f'{args.path}: {len(wave) / rate:.2f} s at {rate} Hz',
              *recording_problems(wave, rate), sep='\n')
    else:
        inspect_corpus(args.path, args.valid_data)


if __name__ == '__main__':
    main()
