"""Recordings and transcripts in, padded log-mel batches with true lengths and CTC targets out.

    python data.py PATH                               inspect a corpus before training
    python data.py --say "seven two nine" out.wav     the built-in corpus's voices, to a file

    audio file   any format libsndfile reads, any rate, any channels
    wave         (S,)            mono, 16 kHz, float32 in -1..1
    log-mels     (T, 80)         100 frames a second, of the speech and 0.2 s round it, normalised
    batch        (B, 1, T, 80)   with lengths (B,), targets (B, L) and their lengths (B,)

References: Slaney 1998 (mel scale); Park et al. 2019, 2020 (SpecAugment); Ko et al. 2015 (speed
perturbation); Lin et al. 2022 (utterance concatenation); Fant 1960 and Klatt 1980 (the built-in
corpus).
"""
import argparse
import csv
import json
import os
import re
from collections import Counter, defaultdict, namedtuple
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from hashlib import sha256
from math import ceil, log, prod
from pathlib import Path
from tempfile import TemporaryDirectory
from unicodedata import category, normalize
from zlib import crc32

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from numpy.random import Generator, default_rng
from torch import Tensor
from torch.fft import irfft, rfft
from torch.nn.utils.rnn import pad_sequence

import monitor
from monitor import UserError, error_at, listing, progress, whole_file

SAMPLE_RATE = 16000                  # samples a second
WINDOW = 400                         # samples: 25 ms
HOP = 160                            # samples: 10 ms
FRAME_SECONDS = HOP / SAMPLE_RATE
HERTZ = torch.linspace(0, 8000, 257)[:, None]  # of a spectrum's bins: (257, 1)
N_MELS = 80
MARGIN = 20                          # frames kept before and after speech
FRAMES_PER_OUTPUT = 4                # the default: 25 outputs a second


# ---- from a recording to features ----------------------------------------------------------------

def resample(wave: Tensor, rate: int, new_rate: int = SAMPLE_RATE) -> Tensor:
    """Band-limited resampling of wave (S,) -> (ceil(S * new_rate / rate),).

    Its spectrum is cut, or continued with zeros, at the lower of the two Nyquist frequencies. Rates
    are whole numbers of any unit.
    """
    if rate == new_rate:
        return wave
    up, down = Fraction(new_rate, rate).as_integer_ratio()
    # Whole blocks keep the ratio exact, 32 at a time the transform fast; the zeros keep the end
    # from wrapping round to the start.
    blocks = ceil((len(wave) + 512) / down / 32) * 32
    resampled = irfft(rfft(wave, blocks * down), blocks * up)
    return resampled[:ceil(len(wave) * up / down)] * (up / down)


def read_audio(path: str | Path, channel: int) -> tuple:
    """Any file that libsndfile reads -> wave (S,) float32, and its rate in Hz: of one channel,
    counted from 1, or of 0 the channels' mean.

    Raises UserError, also where a wav, aiff or au is shorter than its header says (sizes
    near 2^31 and 2^32 are those of programs that stream, and do not know).
    """
    with error_at(path):
        os.stat(path)  # whose errors tell more than libsndfile's
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            if rate > 384_000 or file.frames > 3600 * rate:
                raise ValueError('it lasts over an hour, or its rate is over 384 kHz')
            for said, found in re.findall(r': (\d+) \(should be (\d+)\)', file.extra_info):
                if int(found) < int(said) < 0x7FFF0000:
                    raise ValueError('cut off: it is shorter than its header says')
            if channel > file.channels:
                raise ValueError(f'it has no channel {channel}')
            channels = file.read(dtype='float32', always_2d=True)
        wave = channels[:, channel - 1] if channel else channels.mean(1)
        if not 0 <= np.abs(wave).max(initial=-1) < 1e6:  # also where one is not a number
            raise ValueError('it holds no samples, or some are not finite')
    return torch.from_numpy(wave), rate


def read_wave(path: str | Path, channel: int = 0) -> Tensor:
    """read_audio at 16 kHz -> wave (S,). Raises UserError."""
    return resample(*read_audio(path, channel))


def is_narrow(wave: Tensor) -> bool:
    """Whether a wave (S,) at 16 kHz has nothing above 4.2 kHz, as speech from a telephone."""
    power = rfft(wave).abs().square()
    return bool(power[len(power) * 42 // 80:].sum() < 1e-5 * power.sum())


def mel_filters() -> Tensor:
    """The filter bank (257, 80): triangles of height 1, equally spaced on Slaney's mel scale.

    From 0 to 8 kHz; a mel is 200/3 Hz up to 1 kHz and logarithmic above. No area norm: normalising
    over the clip would cancel it.
    """
    # 15 mels lead from 0 to 1 kHz, 27 more from 1 to 6.4 kHz.
    mels = np.linspace(0, 15 + 27 * log(8, 6.4), N_MELS + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))
    # A triangle is 1 at its own peak and 0 at all others.
    triangles = [np.interp(HERTZ, edges, peaks) for peaks in np.eye(N_MELS + 2)[1:-1]]
    return torch.tensor(np.hstack(triangles)).float()


MEL_FILTERS = mel_filters()


def log_mels(wave: Tensor) -> Tensor:
    """wave (S,) at 16 kHz -> natural logarithm of the mel power (T, 80), T = ceil(S / 160).

    Frame t is centred on sample 160 t + 80, the middle of the 10 ms it stands for.
    """
    margin = (WINDOW - HOP) // 2
    padded = F.pad(wave, (margin, margin + -len(wave) % HOP))           # to whole frames
    windows = padded.unfold(0, WINDOW, HOP)                             # (T, 400)
    spectrum = rfft(windows * torch.hann_window(WINDOW), n=512)         # (T, 257)
    power = spectrum.real ** 2 + spectrum.imag ** 2
    return (power @ MEL_FILTERS + 1e-10).log()  # 16 bits' rounding gives more


def moving_median(level: Tensor) -> Tensor:
    """The median over 70 ms around each frame of level (T,), which removes what is shorter than
    40 ms."""
    padded = F.pad(level, (3, 3), value=level.min())
    return padded.unfold(0, 7, 1).median(1).values


def voice_level(steady: Tensor) -> Tensor:
    """How loud the voice is, of steady levels (T,): the level that the loudest 0.2 s reach.

    In a short clip, that a quarter of its loud frames reach. Not the maximum, which a slammed door
    would set.
    """
    loudest = steady.sort(descending=True).values
    loud = (loudest >= loudest[0] - 7).sum()  # within 7 nats of the loudest
    return loudest[min(20, loud // 4)]


def repair_clicks(mels: Tensor) -> Tensor:
    """Replace frames of (T, 80) far louder than the voice by the last one before that is not."""
    level = mels.mean(1)
    loud = level > voice_level(moving_median(level)) + 3.2  # nats: 14 dB
    loud = F.pad(loud, (1, 1)).unfold(0, 3, 1).any(1)  # and its neighbours
    return mels[(torch.arange(len(mels)) * ~loud).cummax(0).values]


def features(wave: Tensor) -> tuple:
    """wave (S,) at 16 kHz -> normalised log-mels (T, 80), the frame of the wave that comes
    first.

    They begin 0.2 s before the speech and end 0.2 s after it; where the wave has no such silence
    it is put there, and the first frame is below 0. They hardly depend on silence around the
    speech, clicks or loudness.
    """
    # With silence on both sides, a clip that has some and one that has none get the same features.
    silence = MARGIN + 2                                                 # frames
    mels = repair_clicks(log_mels(F.pad(wave, [silence * HOP] * 2)))
    # Speech is what comes within 35 dB, 8 nats of power, of the voice's level. Its first and last
    # frame, half of whose window may lie in silence, do not count for what follows.
    power = moving_median(mels.logsumexp(1))
    spoken = np.flatnonzero(power >= voice_level(power) - 8).tolist()    # the frames' numbers
    start = max(0, spoken[0] - MARGIN)
    end = spoken[-1] + 1 + MARGIN
    inner = spoken[1:-1] or spoken
    speech, level = mels[inner], power[inner]                            # (N, 80), (N,)
    # All else is raised to what the room sounds like in the quietest tenth of the speech, so that
    # a pause of zeros, or of a cleaner recording, is like one of the clip's own.
    mels = mels.maximum(speech[level <= level.quantile(0.1)].median(0).values)
    mels[inner] = speech
    # Each band to mean 0 over the speech, which removes the microphone; all together to deviation
    # 1: scaling each by its own would amplify bands that hold mostly noise.
    mean = speech.mean(0)
    deviation = (speech - mean).std(correction=0)
    return (mels[start:end] - mean) / (deviation + 1e-3), start - silence


def spec_augment(mels: Tensor, rng: Generator) -> None:
    """Mask bands and stretches of time of (T, 80) in place; 0 is each band's mean.

    After Park et al. 2019 and, for masks that grow with the clip, 2020: two masks of up to 15 mel
    bands, and for each second one of up to 250 ms, a quarter of the clip at most.
    """
    stretches = [(0, min(25, len(mels) // 4))] * ceil(len(mels) / 100)
    for axis, widest in [(1, 15)] * 2 + stretches:
        width = rng.integers(widest + 1)
        start = rng.integers(mels.shape[axis] - width + 1)
        mels.narrow(axis, start, width).zero_()


# ---- utterances and batches ----------------------------------------------------------------------

@dataclass
class Utterance:
    """A recording and what is said in it."""
    path: Path
    text: str        # normalised
    duration: float  # seconds
    speaker: str     # '' where it is not known
    where: str       # 'manifest.jsonl:12', for messages
    frames: int      # of its features; of the recording, as long as it was not decoded
    sound: str       # a digest of it; what no other one has, as long as it was not decoded
    offset: float = None  # seconds; None: the whole recording, not a part of one
    narrow: bool = False  # is_narrow, where it was decoded


def load_utterance(u: Utterance, channel: int = 0) -> tuple:
    """An utterance's wave (S,) and rate. Raises UserError, and ValueError where the
    recording does not last as long as its corpus says."""
    wave, rate = read_audio(u.path, channel)
    if u.offset is not None:
        wave = wave[round(u.offset * rate):][:round(u.duration * rate)]
    seconds = len(wave) / rate
    if abs(seconds - u.duration) > 0.1 * max(1, u.duration):
        raise ValueError(f'it lasts {seconds:.2f} s, and not {u.duration:.2f}: {u.path}')
    return wave, rate


@dataclass
class Speech:
    """Utterances as (log-mels (T, 80), target (L,)), asked for by (epoch, index).

    Augmentation depends on seed, epoch and the utterance alone; what `concat` (the chance of it)
    puts behind it, on the corpus too. frames_per_output: above 0, an utterance that CTC cannot
    align raises UserError; 0 lets it pass, for evaluation.
    """
    utterances: list
    alphabet: list
    frames_per_output: int = 0
    seed: int = 0
    spec_augment: bool = False
    speed_perturb: bool = False
    concat: float = 0.0

    def draw(self, epoch: int, u: Utterance) -> tuple:
        """What an item is in an epoch: the utterance and, by the chance `concat`, one more of its
        speaker's; its speed, from 90 to 110 per cent of the recording's own; and the seeds of its
        masks. Drawn by name and text: it stays so in a subset or in another order.

        The network so hears words in more contexts and clips of more lengths than the corpus has
        (random utterance concatenation, Lin et al. 2022). Recordings are joined as they are: of two
        that are 35 dB apart, the quieter one is taken for silence.
        """
        seeds = [self.seed, epoch, crc32(f'{u.path.stem} {u.text}'.encode())]
        parts, speed = [u], 100
        if self.speed_perturb:
            speed = default_rng([*seeds, 0]).integers(90, 111)
        rng = default_rng([*seeds, 2])
        if rng.random() < self.concat:
            same_speaker = [other for other in self.utterances if other.speaker == u.speaker]
            parts.append(same_speaker[rng.integers(len(same_speaker))])
        return parts, speed, [*seeds, 1]

    def __getitem__(self, item: tuple) -> tuple:
        epoch, index = item
        u = self.utterances[index]
        with error_at(u.where):
            *drawn, seeds = self.draw(epoch, u)
            # Where CTC could not align what was drawn: the utterance alone, as it was recorded.
            for parts, speed in drawn, ([u], 100):
                waves = [resample(*load_utterance(part)) for part in parts]
                # At 110 %, 110 samples become 100: faster and higher.
                mels, _ = features(resample(torch.cat(waves), speed, 100))
                target = encode(' '.join(part.text for part in parts), self.alphabet)
                if can_align(target, len(mels), self.frames_per_output):
                    break
            else:
                raise ValueError(TOO_SHORT)
        if self.spec_augment:
            spec_augment(mels, default_rng(seeds))
        return mels, torch.tensor(target)


def collate(items: list) -> tuple:
    """Items of Speech -> a batch: log-mels (B, 1, T, 80), zero in the padding, their lengths (B,)
    in frames, targets (B, L), their lengths (B,)."""
    mels, targets = zip(*items)
    lengths, target_lengths = [torch.tensor([*map(len, part)]) for part in (mels, targets)]
    padded = pad_sequence(mels, batch_first=True)
    # To a multiple of 16 frames: few different shapes are faster than exact ones.
    padded = F.pad(padded, (0, 0, 0, -padded.shape[1] % 16))
    return padded[:, None], lengths, pad_sequence(targets, batch_first=True), target_lengths


# ---- transcripts ---------------------------------------------------------------------------------

def normalise_text(text: str) -> str:
    """Lower case, NFKC (one code point for a letter and its accent; ligatures, full-width letters
    and the like as their plain ones), one apostrophe, single spaces, nothing invisible."""
    plain = normalize('NFKC', text).lower().replace('i\u0307', 'i')  # of a Turkish I
    plain = re.sub("[\u2018\u2019\u02bc]", "'", plain)
    visible = ''.join(c for c in plain if category(c) != 'Cf')
    return normalize('NFC', ' '.join(visible.split()))


def make_alphabet(utterances: list, known: list) -> list:
    """The known characters, and then every other one of the transcripts; symbol 0 is CTC's blank
    and stands for no character."""
    return [*known, *sorted({*''.join(u.text for u in utterances)} - {*known})]


def encode(text: str, alphabet: list) -> list:
    """Text -> symbols, never the blank.

    A character that the alphabet lacks is left out: no output can say it.
    """
    symbols = {character: symbol for symbol, character in enumerate(alphabet)}
    return [symbols[character] for character in text if character in symbols]


TOO_SHORT = 'too short for its text; correct or remove it, or lower --frames_per_output'


def can_align(symbols: list, frames: float, frames_per_output: int) -> bool:
    """Whether CTC can emit these symbols, or characters, with the outputs for so many frames."""
    return frames > (monitor.outputs_needed(symbols) - 1) * frames_per_output


# ---- corpora: what reads their rows --------------------------------------------------------------

# What tables and manifests call the fields of a row -> what they are called here.
NAMES = {
    'file_name': 'audio',
    'file': 'audio',
    'path': 'audio',
    'audio_filepath': 'audio',
    'sentence': 'text',
    'transcript': 'text',
    'transcription': 'text',
    'client_id': 'speaker',
}


# The readers of corpora yield for each row where it stands, and its fields as a dict or as JSON.

def numbered_lines(path: Path) -> Iterator:
    """A text file's lines that are not empty, or a JSON array's objects -> ('file:number', line).

    Which reads JSON as NeMo has it: {"audio_filepath": "1.flac", "text": "go", "duration": 1.8}.
    With an "offset", in seconds, an utterance is that part of a longer recording. What is not UTF-8
    becomes lone surrogates, which are refused in the row that has them.
    """
    text = path.read_text(encoding='utf-8-sig', errors='surrogateescape')
    unit, lines = '', text.split('\n')
    if re.match(r'\s*\[\s*\{', text):
        unit, lines = ' object ', map(json.dumps, json.loads(text))
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f'{path}:{unit}{number}', line.strip(' \r\n')


def table_rows(path: Path) -> Iterator:
    """A CSV or TSV table with a header, and a row a line. A TSV, as Common Voice has it, does not
    quote."""
    form = {'delimiter': '\t', 'quoting': csv.QUOTE_NONE} if path.suffix == '.tsv' else {}
    lines = numbered_lines(path)
    _, header = next(lines, ('', ''))
    for where, line in lines:
        yield where, next(csv.DictReader([header, line], **form), {})


def librispeech_rows(path: Path) -> Iterator:
    """A LibriSpeech speaker/chapter/*.trans.txt: "84-121123-0001 GO DO YOU HEAR", of speaker 84."""
    for where, line in numbered_lines(path):
        yield where, re.match(r'(?P<audio>(?P<speaker>[^- ]*)\S*)(?P<text>.*)', line).groupdict()


def sphinx_rows(path: Path) -> Iterator:
    """CMU Sphinx's etc/*.transcription, "<s> GO </s> (an251-fash-b)", and its .fileids, line by
    line, "fash/an251-fash-b", which tells the folder.

    Fillers (<sil>, ++NOISE++, [COUGH]) and the numbers of alternates, HELLO(2), are dropped.
    """
    files = numbered_lines(path.with_suffix('.fileids'))
    for (where, line), (_, file) in zip(numbered_lines(path), files, strict=True):
        text, _, name = line.removesuffix(')').rpartition('(')
        text = re.sub(r'<\S*>|\+\+\S*\+\+|\[\S*\]|\(\d+\)', ' ', text)
        folder = Path(file).parent
        audio = f'../wav/{folder}/{Path(name).name}'
        yield where, {'audio': audio, 'text': text, 'speaker': folder.name}


# Of corpora, by how the files of their transcripts end: the reader.
FORMS = {
    '.jsonl': numbered_lines,
    '.json': numbered_lines,
    '.csv': table_rows,
    '.tsv': table_rows,
    '.txt': librispeech_rows,
    '.transcription': sphinx_rows,
}


# ---- corpora: utterances, hold-out, faults -------------------------------------------------------

def find_audio(name: str, folder: Path) -> Path:
    """The file of a name in a folder or in its clips/, as Common Voice has it, with its suffix or
    without. Raises ValueError."""
    for form in 'NFC', 'NFD':  # letters with their accents, and apart from them as on a Mac
        for place in folder, folder / 'clips':
            for suffix in '', '.flac', '.wav', '.sph', '.mp3':
                audio = place / normalize(form, name.replace('\\', '/') + suffix)  # of Windows
                if audio.is_file():
                    return audio
    raise ValueError(f'{folder / name} is not a file, nor is one of that name in clips/')


def make_utterance(row: object, where: str) -> Utterance:
    """One row of a corpus, a dict or JSON -> an Utterance. Raises what Python raises where the row
    is wrong."""
    if isinstance(row, str):
        row = json.loads(row)
    if None in row:
        raise ValueError('it has more columns than the header')
    row = {name: value for name, value in row.items() if value not in (None, '')}
    row |= {own: row[name] for name, own in NAMES.items() if name in row}
    text = normalise_text(row.get('text', ''))
    text.encode()  # which fails where it is not UTF-8
    if not text or 'audio' not in row:
        raise ValueError(f'it needs text and audio, or other names of theirs; it has {list(row)}')
    path = find_audio(row['audio'], Path(where).parent)
    start = float(row.get('offset', 0))
    duration = float(row.get('duration') or soundfile.info(path).duration - start)
    if not 0 <= start < start + duration:
        raise ValueError(f'its offset is {start} s, its duration {duration} s')
    frames = ceil(round(duration * SAMPLE_RATE) / HOP)
    return Utterance(path, text, duration, str(row.get('speaker', '')), where, frames, where,
                     start if 'offset' in row else None)


def read_corpus(path: str | Path, split: str = 'train') -> tuple:
    """A corpus -> its Utterances sorted by file name, and what is wrong with others, a line each.

    The form is recognised by the path (FORMS; split chooses among several files of a folder).
    Raises UserError where no row can be used, with one fault for all: it is mostly the
    same in each, as where a table's header is wrong or the recordings lie elsewhere.
    """
    utterances, faults = [], []
    with error_at(path):
        os.stat(path)
        folder = Path(path)
        files = sorted([
            *folder.rglob('[!.]*.trans.txt'),
            *folder.glob(f'etc/*{split}*.transcription'),
        ]) or [folder]
        if files[0].suffix not in FORMS:
            raise ValueError('it should be a file that ends in .jsonl, .json, .csv or .tsv, or a '
                             'folder with *.trans.txt or etc/*.transcription')
        for file in files:
            for where, row in FORMS[file.suffix](file):
                with listing(faults, where):
                    utterances.append(make_utterance(row, where))
        if not utterances:
            first, *_ = *faults, 'it is empty'
            raise UserError(f'none of {len(faults)} rows is right; {first}')
    return sorted(utterances, key=lambda u: u.path.stem), faults


# Utterances, and a line for each one that cannot be used.
Splits = namedtuple('Splits', 'train valid test faults')


def hold_out(train: list, seed: int) -> tuple:
    """Training without a tenth, and that tenth for validation: whole speakers (where one is not
    known, recordings), but none who has more than a tenth of the utterances; where fewer than nine
    are left so, utterances at random. Recordings of the same sound stay together."""
    groups = [u.speaker or str(u.path) for u in train]
    sizes = Counter(groups)
    small = [group for group in sizes if sizes[group] <= len(train) / 10]
    if len(small) < 9:
        groups = [f'{u.path} {u.offset}' for u in train]
        small = sizes = set(groups)
    held_out = set(default_rng(seed).permutation(sorted(small))[:ceil(len(sizes) / 10)])
    sounds = {u.sound for u, group in zip(train, groups) if group in held_out}
    parts = [], []
    for u in train:
        parts[u.sound in sounds].append(u)
    return parts


def read_splits(
    paths: list,
    seed: int,
    frames_per_output: int,
    decode_up_to: float = 1e9,
) -> Splits:
    """The corpora for training, validation (None: held out from training; 'none') and test.

    Of a corpus of at most decode_up_to utterances, every file is decoded. Raises UserError where a
    corpus cannot be read at all.
    """
    splits = Splits([], [], [], [])
    for name, path, usable in zip(Splits._fields, paths, splits):
        if path in (None, 'none'):
            continue
        utterances, faults = read_corpus(path, name)
        for u in progress(utterances, 'checking recordings'):
            with listing(faults, u.where):
                if len(utterances) <= decode_up_to:
                    measure(u)
                if name == 'train':
                    # The silence that features() puts round a clip does not count.
                    frames = min(u.frames, u.duration / FRAME_SECONDS)
                    if not can_align(u.text, frames, frames_per_output):
                        raise ValueError(TOO_SHORT)
                    if u.duration > 40:
                        raise ValueError('training takes up to 40 s; cut or remove it')
                usable.append(u)
        splits.faults.extend(faults)
    if paths[1] is None and len(splits.train) > 1:
        splits.train[:], splits.valid[:] = hold_out(splits.train, seed)
    return splits


# ---- inspection ----------------------------------------------------------------------------------

def measure(u: Utterance) -> None:
    """Decode a recording, and note its true duration, frames, sound and whether it is narrow-band.
    Raises what load_utterance raises."""
    wave, rate = load_utterance(u)
    at_16_khz = resample(wave, rate)
    u.duration = len(wave) / rate
    u.frames = len(features(at_16_khz)[0])
    u.narrow = is_narrow(at_16_khz)
    u.sound = sha256(wave.numpy()).hexdigest()


def print_problems(utterances: list) -> None:
    """Print what may be wrong with recordings that can be used, with the names of their files."""
    problems, twins = defaultdict(list), {}
    for u in progress(utterances, 'looking for problems'):
        wave, _ = load_utterance(u)
        first, _ = load_utterance(u, 1)  # its first channel
        twin = twins.setdefault(u.sound, u)
        size = wave.abs()
        at_peak = F.pad(size > 0.9999 * size.max(), (1, 1))
        checks = {
            'near-silent, nowhere above -50 dB of full scale': size.max() < 0.003,
            'clipped, the peaks are flat':  # five times, three samples in a row
                at_peak.unfold(0, 3, 1).all(1).sum() >= 5,
            'narrow-band, as from a telephone: nothing above 4 kHz': u.narrow,
            'of two channels that differ, of which the mean is taken':  # as of a person on each
                (first - wave).norm() > 0.3 * wave.norm(),
            'of the same sound as another': twin is not u,
            'of the same sound as another, and another text': twin.text != u.text,
        }
        for problem, found in checks.items():
            if found:
                problems[problem].append(u.path.name)
    for problem, names in problems.items():
        print(f'{len(names)} files {problem}:', *names)


def describe_corpus(splits: Splits, frames_per_output: int, known: list) -> dict:
    """Print what a corpus holds for training (at least one utterance) and validation -> what is to
    be remembered of it: alphabet (the known characters first), utterances, hours, narrow (whether
    some are narrow-band), plateaus (losses in nats per label of uniform and of constant output),
    and digest, by which a change of texts or durations is seen.
    """
    train, valid, test, _ = splits
    alphabet = make_alphabet(train, known)

    def plateaus(utterances):
        outputs = [ceil(u.frames / frames_per_output) for u in utterances]
        targets = [encode(u.text, alphabet) for u in utterances]
        return monitor.plateau_lines(targets, outputs, len(alphabet))

    texts = [u.text for u in train]
    durations = [u.duration for u in train]
    hours = sum(durations) / 3600
    speakers = {u.speaker for u in train}
    sentences = set(texts)
    counts = Counter(''.join(texts))
    marks = [c for c in counts if c not in "-'" and category(c)[0] in 'PSN']
    print(f'training    {len(train)} utterances, {hours:.2f} hours, {len(speakers)} speakers (all '
          'that are unknown count as one)\n'
          f'validation  {len(valid)} utterances, {sum(u.speaker in speakers for u in valid)} of '
          'them by speakers who are in training too\n'
          f'repeated    {len(train) - len(sentences)} sentences within training, '
          f'{sum(u.text in sentences for u in valid)} of validation in training\n'
          f'characters  {dict(counts.most_common())}\n'
          f'not said    {" ".join(marks) or "none"} (punctuation and digits are learnt as letters '
          'are; remove what is not said, and write numbers as they are said)\n'
          f'outputs     {sum(u.frames for u in train) / frames_per_output / counts.total():.1f} a '
          'label (under 2: fast speech, try a lower --frames_per_output)',
          *monitor.unrelated_lengths(durations, list(map(len, texts))), sep='\n')
    said = [f'{u.text} {u.duration}' for u in train + valid + test]
    return {
        'alphabet': alphabet,
        'utterances': len(train),
        'hours': hours,
        'narrow': any(u.narrow for u in train),
        'digest': sha256('\n'.join(said).encode()).hexdigest(),
        'plateaus': plateaus(train),
        'valid_plateaus': plateaus(valid),
    }


# ---- the built-in corpus: a source and a filter (Fant 1960), by rule (Klatt 1980) ----------------

WORDS = {
    'zero': 'z ih r ao uh',
    'one': 'w ah n',
    'two': 't uw',
    'three': 'th r iy',
    'four': 'f ao r',
    'five': 'f aa ih v',
    'six': 's ih k s',
    'seven': 's eh v ah n',
    'eight': 'eh iy t',
    'nine': 'n aa ih n',
    'ten': 't eh n',
    'no': 'n ao uh',
    'go': 'g ao uh',
    'low': 'l ao uh',
    'stop': 's t aa p',
    'start': 's t aa r t',
    'right': 'r aa ih t',
    'light': 'l aa ih t',
    'night': 'n aa ih t',
    'line': 'l aa ih n',
}


# Formants: Peterson & Barney 1952, table II, men; of consonants Klatt 1980, table III (n's first is
# its nasal one). Levels, hiss and durations are our own, by spectrogram and by what a recogniser of
# real speech made of them.
#         ms    formants, Hz  voice hiss  centre  width
#               F1   F2    F3   dB   dB   kHz  octaves
TABLE = '''\
    iy   110  270 2290  3010
    uw   140  300  870  2240
    th    90  320 1290  2540  -99  -30     6     1.5
    ih    80  390 1990  2550
    w     60  290  610  2150   -4
    s    105  320 1390  2530  -99  -16     6     0.5
    eh   100  530 1840  2480
    r     65  310 1060  1380   -4
    z     75  240 1390  2530  -10  -20     6     0.5
    ah    90  640 1190  2390
    l     65  310 1050  2880   -4
    p     30  400 1100  2150  -99  -28     1       2
    aa   110  730 1090  2440
    n     90  270 1340  2470  -10
    t     35  400 1600  2600  -99  -19   4.5     0.7
    ao   110  570  840  2410
    f     95  340 1100  2080  -99  -28     6       2
    k     35  300 1990  2850  -99  -19     2     0.4
    uh    80  440 1020  2240
    v     55  220 1100  2080  -10  -32     6       2
    g     25  200 1990  2850   -8  -24     2     0.4
'''
SOUNDED = [0, -99, 4, 1]  # what a row lacks that ends early: voiced as a vowel, without hiss
PHONES = {name: np.array([*columns, *SOUNDED[len(columns) - 4:]], float)
          for name, *columns in map(str.split, TABLE.splitlines())}
STEP = 64  # samples, 4 ms: how often the filter moves
SPECTRUM = {
    'n_fft': 512,
    'hop_length': STEP,
    'win_length': 256,
    'window': torch.hann_window(256),
}

# Of each split: the first speaker, how many speakers, how many utterances.
BUILTIN = {
    'train': (336, 625, 1250),
    'valid': (300, 12, 60),
    'test': (312, 24, 120),
}


def plan_phones(words: list, tract: float, accent: dict, tempo: float, rng: Generator) -> tuple:
    """The phones of the words, with closures, fades and gaps, as n segments.

    tract, accent: factors of the hiss's centre and of each phone's formants; tempo: of the speed.
    -> PHONES' columns of each segment (8, n), its duration in steps of 4 ms; and [(word, the
    segment before its first, its last)].
    """
    segments, spans = [], []

    def add(phone, ms, voice=0, hiss=0):  # dB less
        segment = phone - [0, 0, 0, 0, voice, hiss, 0, 0]
        segment[0] = max(1, round(ms / 4))
        segments.append(segment)

    for word in words:
        first = len(segments)
        for name in WORDS[word].split():
            phone = PHONES[name] * np.r_[1, accent[name] * rng.normal(1, 0.05, 3), 1, 1, tract, 1]
            ms, *_ = phone / tempo
            if name in 'ptkg':  # stops begin with a closure
                add(phone, 55 / tempo * rng.uniform(0.7, 1.4), 17, 200)
            add(phone, ms * rng.uniform(0.7, 1.4))
        spans.append((word, first, len(segments)))
        chance = rng.random()
        if len(spans) == len(words):
            chance = 0.5  # behind the last word a gap, and no pause
        if chance < 0.6:  # the voice dies away, then a gap
            for fade in 10, 20, 30:
                add(phone, 1 if name in 'ptkfsth' else 40, fade, fade)
            # A quarter of the gaps are pauses.
            add(phone, rng.uniform(30, 1500 if chance < 0.15 else 300), 200, 200)
    add(segments[0], 4 * rng.integers(40, 100), 200, 200)
    return np.roll(segments, 1, 0).T, spans  # the last added comes first


def glide(values: np.ndarray, width: int) -> Tensor:
    """The moving average of values (n,) with a Hann window of `width`."""
    kernel = np.hanning(width + 2)
    padded = np.pad(values, width, 'edge')
    average = np.convolve(padded, kernel / kernel.sum(), 'same')[width:-width]
    return torch.tensor(average).float()


def make_source(pitch: float, steps: int, rng: Generator) -> Tensor:
    """The spectrograms (2, 257, steps) of a pulse train, all harmonics of a pitch in Hz that moves,
    and of noise."""
    knots = 2 + steps // 40  # every 160 ms
    samples = (steps - 1) * STEP
    contour = pitch * np.linspace(1.1, 0.85, knots) * rng.normal(1, 0.07, knots)
    hertz = np.interp(np.linspace(0, 1, samples), np.linspace(0, 1, knots), contour)
    half_phase = np.pi * np.cumsum(hertz) / SAMPLE_RATE
    harmonics = 8000 // hertz.max()
    # The sum of the cosines of all harmonics, in closed form.
    cosines = np.sin((2 * harmonics + 1) * half_phase) / np.sin(half_phase) - 1
    waves = np.array([cosines / np.sqrt(2 * harmonics), rng.standard_normal(samples)], 'float32')
    return torch.stft(torch.tensor(waves), **SPECTRUM, return_complex=True)


def unit_power(response: Tensor) -> Tensor:
    """Filter responses (257, n) at a mean power of 1."""
    return response / response.abs().square().mean(0).sqrt()


def tube_response(tract: float, formants: list) -> Tensor:
    """The vocal tract's (257, n): a resonance for each formant, the fourth and above fixed."""
    upper = tract * torch.arange(3500, 8000, 1000)
    resonances = [1 - (HERTZ / f) ** 2 + 1j * HERTZ * ((50 + f / 20) / f ** 2)  # 50 + f / 20 wide
                  for f in (*upper, *formants)]
    return 1 / prod(resonances)


def synthesise(text: str, speaker: int = 0) -> tuple:
    """Say words of WORDS in the voice of a speaker, a whole number from 0.

    -> wave (S,) float32 at 16 kHz, and [(word, start, end)] in seconds. The same arguments give the
    same sound. A pulse train of moving pitch and noise (the source) pass through moving resonances
    (the filter). Raises ValueError for another word.
    """
    words = text.split()
    if not words or not set(words) <= set(WORDS):
        raise ValueError(f'{text!r}: the synthesiser says {", ".join(WORDS)}')
    # The voice: factors of its formants (a shorter tract has higher ones, and a higher pitch) and
    # of its speed, the level of its breath in dB, where its source's slope begins in Hz.
    rng = default_rng([0, speaker])
    tract, tempo, breath, corner = rng.uniform(
        [0.85, 0.65, -30, 800],  # the lowest of each
        [1.15, 1.1, -15, 2500],  # the highest
    )
    pitch = 140 * tract ** 3 * rng.uniform(0.8, 1.25)
    accent = dict(zip(PHONES, tract * rng.normal(1, 0.06, (len(PHONES), 3))))

    rng = default_rng([0, speaker, crc32(text.encode())])
    planned, spans = plan_phones(words, tract, accent, tempo, rng)
    steps = planned[0].astype(int)
    ends = np.cumsum(steps) / 250  # seconds
    centres, octaves = torch.tensor(planned[6:]).float()
    *formants, voiced, hissed = planned[1:6].repeat(steps, 1)           # of every step

    # Coarticulation: formants glide for 50 ms from phone to phone, voicing sets in over 56 ms,
    # noise within 16.
    formants = [glide(formant, 13) for formant in formants]
    voiced = glide(10 ** (voiced / 20), 14)
    hissed = glide(10 ** (hissed / 20), 4)

    pulses, noise = make_source(pitch, len(voiced), rng)
    tube = tube_response(tract, formants)
    # The hiss is a bell over the logarithm of frequency, the room 10 to 35 dB below a vowel.
    distance = (HERTZ.clamp(50) / 1000 / centres).log2() / octaves
    bell = unit_power((distance ** 2 / -2).exp())                        # of every segment
    bell = bell.repeat_interleave(torch.tensor(steps), 1)
    room = (unit_power(1 / (1 + HERTZ / 10 ** rng.uniform(2, 3.7)))
            * 10 ** (rng.uniform(10, 35) / -20))
    breathed = 0.3 * hissed + voiced * 10 ** (breath / 20)
    voice = unit_power(tube / (1 + HERTZ / corner)) * voiced * pulses
    rest = noise * (unit_power(tube) * breathed + room + bell * hissed)
    wave = torch.istft(voice + rest, **SPECTRUM)
    wave = wave * (rng.uniform(0.2, 0.9) / wave.abs().max())
    return wave.numpy(), [(word, ends[first], ends[last]) for word, first, last in spans]


def speak_corpus(folder: Path) -> None:
    """Speak the built-in corpus into a folder: texts of one to six random words. Raises OSError."""
    for split, (first_speaker, speakers, utterances) in BUILTIN.items():
        rng = default_rng(first_speaker)
        os.makedirs(folder / split)
        with open(folder / f'{split}.jsonl', 'w') as manifest:
            for i in progress(range(utterances), 'speaking the built-in corpus, once:'):
                path = f'{split}/{i:04}.flac'
                text = ' '.join(rng.choice(list(WORDS), rng.integers(1, 7)))
                speaker = first_speaker + i % speakers
                wave, _ = synthesise(text, speaker)
                soundfile.write(folder / path, wave, SAMPLE_RATE)
                row = {'path': path, 'text': text, 'speaker': speaker}
                print(json.dumps(row), file=manifest)


def builtin_corpus(folder: str = 'corpus') -> list:
    """Speak the built-in corpus into a folder, once -> its manifests, for training, validation and
    test.

    No speaker is in two of them. Raises UserError where the folder cannot be made.
    """
    if not os.path.exists(folder):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # of many small operations, threads would wait for each other
        with error_at(folder), TemporaryDirectory(prefix='unfinished.',
                                                  dir=Path(folder).parent) as parent:
            spoken = Path(parent, 'corpus')
            speak_corpus(spoken)
            with suppress(OSError):  # another process was at it too, and faster
                spoken.rename(folder)
        torch.set_num_threads(threads)
    return [f'{folder}/{split}.jsonl' for split in BUILTIN]


# ---- python data.py ------------------------------------------------------------------------------

@monitor.one_line_ends('data.py')
def main(argv: list = None) -> None:
    parser = argparse.ArgumentParser(description='Inspect a corpus, or say a sentence.')
    parser.add_argument('path', help='corpus (.jsonl, .csv, .tsv, LibriSpeech or Sphinx folder); '
                                     'with --say, the audio file to write')
    parser.add_argument('--say', help='a text, of numbers and the like, to speak into the file')
    args = parser.parse_args(argv)
    if args.say:
        with whole_file(args.path) as part:
            wave, spans = synthesise(normalise_text(args.say))
            soundfile.write(part, wave, SAMPLE_RATE)
        for word, start, end in spans:
            print(f'{start:6.2f} {end:6.2f}  {word}')
        return
    splits = read_splits((args.path, None, None), 0, FRAMES_PER_OUTPUT)
    if splits.train:
        describe_corpus(splits, FRAMES_PER_OUTPUT, [''])
    print_problems(splits.train + splits.valid)
    if splits.faults:  # which end training too
        raise UserError('\n'.join(splits.faults))


if __name__ == '__main__':
    main()
