"""What a run says about itself: error rates, CTC's two plateaus, gradients, outputs, and what is
wrong by name.

    python monitor.py RUN           a run by epochs, its warnings, its best epoch, how to go on
    python monitor.py RUN RUN ...   what differs between runs, their scores and spread

A stuck CTC model sits on one of two lines, both known before training, in nats per label:

    uniform    every symbol equally likely in every output; an untrained network starts here
    constant   the best output that ignores its input: mostly blank, the rest by letter frequency
               (about 2.9 for English); a falling loss that ends here has learnt nothing

Nothing here needs the other modules: Gradients, Outputs, plateau_lines and error_rates serve any
CTC model whose blank is symbol 0.

References: Graves et al. 2006 (CTC); Levenshtein 1966 (edit distance); Bisani & Ney 2004
(bootstrap).
"""
import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

UNIFORM_ENTROPY = 0.95   # of ln V, a batch's mean entropy: above, the batch counts as uniform
IGNORED = 0.05           # share of a healthy input dependence: below, the sound is ignored
VANISHED = 1e-3          # a part's gradient norm, as a share of the largest part's
EXPLODED = 1e3           # a part's gradient norm
BLANKS = 0.99            # share of outputs that are blank: above, it is a collapse
CLEAR = '\x1b[K'         # ANSI escape: erase to the end of the line


# ---- error rates ---------------------------------------------------------------------------------

class Edits(NamedTuple):
    """What turns a reference into a hypothesis."""
    cost: int
    substitutions: int
    insertions: int
    deletions: int


def edit_counts(reference: Sequence, hypothesis: Sequence) -> Edits:
    """The edits of a cheapest alignment of two sequences (Levenshtein 1966).

    On a tie, the one with fewer substitutions, then insertions.
    """
    row = [Edits(j, 0, j, 0) for j in range(len(hypothesis) + 1)]  # of the empty reference
    for i, said in enumerate(reference, 1):
        above = row
        row = [Edits(i, 0, 0, i)]
        for j, heard in enumerate(hypothesis, 1):
            cost, s, n, d = above[j - 1]
            same = Edits(cost, s, n, d) if said == heard else Edits(cost + 1, s + 1, n, d)
            cost, s, n, d = row[j - 1]
            inserted = Edits(cost + 1, s, n + 1, d)
            cost, s, n, d = above[j]
            deleted = Edits(cost + 1, s, n, d + 1)
            row.append(min(same, inserted, deleted))
    return row[-1]


def bootstrap_interval(errors: Tensor, words: Tensor) -> list[float]:
    """The middle 95 % of the word error rates of 1,000 samples of as many utterances.

    errors, words: (N,), by utterance. In per cent (Bisani & Ney 2004).
    """
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(words), (1000, len(words)), generator=generator)
    rates = 100 * errors[draws].sum(1) / words[draws].sum(1)
    return rates.quantile(torch.tensor([0.025, 0.975])).tolist()


def error_rates(references: Sequence[str], hypotheses: Sequence[str]) -> dict:
    """Word, character and sentence error rates in per cent, with counts and the WER's interval.

    (S + I + D) / reference length; errors are pooled over all utterances. A sentence is wrong if a
    word of it is. Raises ValueError where there is no word to score.
    """
    edits = [edit_counts(r.split(), h.split()) for r, h in zip(references, hypotheses)]
    words = [len(r.split()) for r in references]
    if not any(words):
        raise ValueError('no words to score; give references that have some')
    characters = sum(len(r) for r in references)
    errors = sum(e.cost for e in edits)
    character_errors = sum(edit_counts(r, h).cost for r, h in zip(references, hypotheses))
    return {
        'wer': 100 * errors / sum(words),
        'interval': bootstrap_interval(torch.tensor([e.cost for e in edits]), torch.tensor(words)),
        'cer': 100 * character_errors / characters,
        'ser': 100 * sum(e.cost > 0 for e in edits) / len(references),
        'substitutions': sum(e.substitutions for e in edits),
        'insertions': sum(e.insertions for e in edits),
        'deletions': sum(e.deletions for e in edits),
        'words': sum(words),
        'utterances': len(references),
    }


# ---- the two plateaus ----------------------------------------------------------------------------

def plateau_lines(targets: Sequence[Sequence[int]], lengths: Tensor,
                  vocab_size: int) -> tuple[float, float]:
    """The losses, in nats per label, of a uniform output and of the best constant one.

    targets: symbols by utterance; lengths: outputs by utterance, (N,). Both lines come from
    F.ctc_loss itself; the second is the best over the blank's share, the rest by letter frequency
    (letter shares that are free gain less than 2 % more). Up to 500 utterances count, those that
    have labels and outputs enough; nan where none has.
    """
    step = max(1, math.ceil(len(targets) / 500))
    targets, lengths = targets[::step], lengths[::step]
    letters = Counter(symbol for target in targets for symbol in target)
    frequency = torch.tensor([letters[symbol] for symbol in range(vocab_size)], dtype=torch.float64)
    frequency /= frequency.sum()
    padded = nn.utils.rnn.pad_sequence([torch.tensor(t) for t in targets], batch_first=True)
    target_lengths = torch.tensor([len(t) for t in targets])

    def loss(distribution):
        log_probs = distribution.clamp_min(1e-30).log()
        log_probs = log_probs.expand(int(lengths.max()), len(targets), vocab_size)
        losses = F.ctc_loss(log_probs, padded, lengths, target_lengths, reduction='none')
        losses = losses / target_lengths
        return losses[losses.isfinite()].mean().item()

    def constant(blank):
        distribution = frequency * (1 - blank)
        distribution[0] = blank
        return loss(distribution)

    uniform = loss(torch.full_like(frequency, 1 / vocab_size))
    return uniform, min(constant(share / 50) for share in range(50))


def plateau_fraction(loss: float, lines: tuple[float, float]) -> float:
    """How far a loss has come from the uniform line, 0, to the constant one, 1.

    Reaching 1 is not learning; passing it is.
    """
    uniform, constant = lines
    return (uniform - loss) / max(uniform - constant, 1e-9)  # equal for texts of one character


# ---- gradients and outputs -----------------------------------------------------------------------

class Gradients:
    """Gradient norms before clipping, in all and by part, over an epoch's updates.

    parts: {name: prefixes of its parameters' names}; without, each of the network's children is
    one. Raises ValueError where a parameter belongs to no part, or a part has none.
    """

    def __init__(self, network: nn.Module, parts: Mapping[str, Sequence[str]] | None = None):
        if parts is None:
            parts = {name: [f'{name}.'] for name, child in network.named_children()
                     if any(True for _ in child.parameters())}
        self.groups = {part: [] for part in parts}
        for name, parameter in network.named_parameters():
            owners = [part for part, prefixes in parts.items() if name.startswith(tuple(prefixes))]
            if not owners:
                raise ValueError(f'{name} belongs to none of the parts {", ".join(parts)}; '
                                 'give its prefix to one')
            self.groups[owners[0]].append(parameter)
        empty = [part for part, group in self.groups.items() if not group]
        if empty:
            raise ValueError(f'no parameter has a prefix of {", ".join(empty)}; correct the prefix')
        self.reset()

    def reset(self) -> None:
        """Begin an epoch."""
        self.norms = {part: [] for part in (*self.groups, 'norm')}  # 'norm': all parts together
        self.clipped = 0
        self.nonfinite = 0
        self.updates = 0

    def clip(self, maximum: float) -> bool:
        """Record the norms, then scale all gradients to the total norm `maximum` if above (0:
        never).

        False where the norm is not finite: the update must be left out.
        """
        norms = {part: nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
                 for part, group in self.groups.items()}
        total = torch.stack(list(norms.values())).norm()
        self.updates += 1
        if not torch.isfinite(total):
            self.nonfinite += 1
            return False
        for part, norm in norms.items():
            self.norms[part].append(norm.item())
        self.norms['norm'].append(total.item())
        if maximum and total > maximum:
            self.clipped += 1
            for group in self.groups.values():
                nn.utils.clip_grads_with_norm_(group, maximum, total)
        return True

    def summary(self) -> dict[str, float]:
        """Mean norms, in all and by part, the largest, the share of clipped and number of lost
        updates."""
        means = {f'grad_{part}': sum(norms) / max(1, len(norms))
                 for part, norms in self.norms.items()}
        return means | {'grad_norm_max': max(self.norms['norm'], default=0),
                        'nonfinite': self.nonfinite,
                        'clipped': self.clipped / max(1, self.updates)}


def valid_frames(frames: int, lengths: Tensor) -> Tensor:
    """The mask (B, frames) that is true within each clip's length (B,), false in its padding."""
    return torch.arange(frames, device=lengths.device) < lengths[:, None]


def letter_entropy(targets: Iterable[Sequence[int]]) -> float:
    """Entropy of the targets' symbols in nats: 2.8 for English letters and the space."""
    counts = Counter(symbol for target in targets for symbol in target)
    shares = [count / counts.total() for count in counts.values()]
    return -sum(share * math.log(share) for share in shares)


class Outputs:
    """Statistics of log-probabilities over an epoch's valid outputs.

    letters: letter_entropy of the transcripts, in nats.
    """

    def __init__(self, vocab_size: int, letters: float):
        self.vocab_size = vocab_size
        self.letters = letters
        self.reset()

    def reset(self) -> None:
        """Begin an epoch."""
        self.outputs = 0
        self.entropy = 0.0
        self.dependence = 0.0
        self.blanks = 0
        self.emitted = 0
        self.characters = 0
        self.uniform = 0

    @torch.no_grad()
    def add(self, log_probs: Tensor, lengths: Tensor, target_lengths: Tensor) -> None:
        """log_probs (B, T', V) with their lengths (B,), and the transcripts' in characters (B,)."""
        valid = valid_frames(log_probs.shape[1], lengths)                   # (B, T')
        outputs = log_probs[valid]                                          # (N, V)
        probabilities = outputs.exp()
        entropy = -(probabilities * outputs).sum(1)                         # (N,)
        best = log_probs.argmax(2).masked_fill(~valid, 0)                   # (B, T')
        previous = F.pad(best[:, :-1], (1, 0))
        self.outputs += len(outputs)
        self.entropy += entropy.sum().item()
        self.uniform += int(entropy.mean() > UNIFORM_ENTROPY * math.log(self.vocab_size))
        self.blanks += (best[valid] == 0).sum().item()
        self.emitted += ((best != previous) & (best != 0)).sum().item()
        self.characters += int(target_lengths.sum())
        # H(mean p) - mean H(p), the mutual information of output and symbol; in the batch, for over
        # an epoch a constant output that drifts would not score 0.
        mean = probabilities.mean(0)
        marginal = -(mean * mean.clamp_min(1e-30).log()).sum()
        self.dependence += len(outputs) * (marginal - entropy.mean()).item()

    def summary(self) -> dict[str, float]:
        """The keys of the log that say what the outputs are like.

        entropy             mean over outputs, as a share of ln V
        blank               share of outputs whose best symbol is the blank
        input_dependence    H(mean p) - mean H(p) by batch, in nats; 0 if the input is ignored
        dependence_share    the same, as a share of h(r) + r * H(letters), which giving each label
                            one output would show; r: labels an output, h: the binary entropy,
                            up to its top at r = 0.5
        emitted             symbols decoded per character of the transcripts
        uniform_batches     batches with a mean entropy above 0.95 ln V
        """
        n = max(1, self.outputs)
        r = min(0.5, max(1e-6, self.characters / n))
        healthy = r * (self.letters - math.log(r)) - (1 - r) * math.log(1 - r)
        dependence = self.dependence / n
        return {'entropy': self.entropy / n / math.log(self.vocab_size),
                'blank': self.blanks / n,
                'input_dependence': dependence,
                'dependence_share': dependence / healthy,
                'emitted': self.emitted / max(1, self.characters),
                'uniform_batches': self.uniform}


# ---- what is wrong -------------------------------------------------------------------------------

def gradient_warnings(record: Mapping) -> Iterator[str]:
    """What is wrong with an epoch's gradients, by part."""
    norms = {key.removeprefix('grad_'): norm for key, norm in record.items()
             if key.startswith('grad_') and key not in ('grad_norm', 'grad_norm_max')}
    strongest = max(norms, key=norms.get)
    for part, norm in norms.items():
        if norm < VANISHED * norms[strongest]:
            yield (f'vanishing gradient in the {part}: norm {norm:.1e}, in the {strongest} '
                   f'{norms[strongest]:.1e}; look at the initialisation of the layers between them')
        elif norm > EXPLODED:
            yield f'exploding gradient in the {part}: norm {norm:.1e}; lower --learning_rate'


def diagnose(record: Mapping) -> list[str]:
    """One epoch's record of the log -> what is wrong in words, each with a next step; [] if
    healthy."""
    warnings = []
    if record['nonfinite']:
        warnings.append(f"{record['nonfinite']} updates left out, their gradients were not finite; "
                        'lower --learning_rate')
    if record['train_loss'] < -1e-4:
        warnings.append('negative CTC loss, which no probabilities give; apply log_softmax to the '
                        'outputs, and keep the blank out of the targets')
    warnings += gradient_warnings(record)
    if record['uniform_batches']:
        warnings.append(f"uniform output in {record['uniform_batches']} batches: nothing is learnt "
                        'there yet; if it lasts beyond the first epoch, raise --learning_rate')
    if record['dependence_share'] < IGNORED and record['entropy'] < UNIFORM_ENTROPY:
        way = record['train_way']
        warnings.append(f'the output ignores the sound: the loss has come {way:.0%} of the way to '
                        'the constant line, the second plateau; if it stays, see whether ten '
                        'utterances can be learnt (train.py --overfit 10)')
    if record['blank'] > BLANKS:
        warnings.append(f"blank collapse: {record['blank']:.1%} of the outputs are blank, "
                        f"{record['emitted']:.0%} of the characters emitted; usual early on. If it "
                        'stays, make more updates: lower --batch_size or raise --epochs')
    return warnings


def advice(log: Sequence[Mapping]) -> Iterator[str]:
    """The records of a log.jsonl -> where it ended and how to go on, in words."""
    last = log[-1]
    if 'wer' in last:
        best = min(reversed(log), key=lambda record: (record['wer'], record['cer']))
        yield (f"best epoch {best['epoch']} of {len(log)}: WER {best['wer']:.2f} %, "
               f"CER {best['cer']:.2f} %")
    if last['dependence_share'] < IGNORED:
        step = 'the plateau was never left. Can it learn ten utterances (train.py --overfit 10)?'
    elif last['nonfinite'] or (last['clipped'] > 0.9 and last['train_way'] < 1.1):
        step = 'updates are lost or cut; halve --learning_rate'
    elif 'wer' not in last:
        step = 'nothing was validated; give --valid_data to learn more'
    elif last['wer'] == 0:
        step = 'there are no errors left to learn from; take harder --valid_data'
    elif last['valid_loss'] > 2 * last['train_loss']:
        step = ('training is learnt better than validation; more data, a higher --dropout, '
                'more --epochs')
    else:
        step = ('no warning applies; if the last epochs still improved, start a new run with more '
                '--epochs')
    yield 'how to go on: ' + step


# ---- lines on the terminal -----------------------------------------------------------------------

def on_terminal() -> bool:
    """Whether someone sees live lines; standard error may be closed."""
    return sys.stderr is not None and sys.stderr.isatty()


def legend(lines: tuple[float, float]) -> str:
    """What the epochs' lines mean, for the first lines of a run."""
    uniform, constant = lines
    return (f'loss: CTC in nats per label; {uniform:.2f} if all symbols are equally likely, where '
            f'training starts;\n    {constant:.2f} for the best guess without listening, where '
            'stuck models stay; below that it learns\n'
            'gradient: mean norm; blank: outputs that say nothing; sound: how much the outputs '
            'depend on it,\n    0 % if they ignore it, about 100 % once each label has its output')


def epoch_line(record: Mapping) -> str:
    """An epoch's record of the log -> a line, its warnings beneath."""
    parts = ['epoch {epoch:3d}', '{train_seconds:4.0f} s', 'loss {train_loss:.3f}']
    if 'wer' in record:
        parts += ['valid {valid_loss:.3f}', 'WER {wer:.1f} %', 'CER {cer:.1f} %']
    blank, sound = 100 * record['blank'], 100 * record['dependence_share']
    parts += ['gradient {grad_norm:.2f}', f'blank {blank:.0f} %', f'sound {sound:.0f} %']
    line = '  '.join(parts).format(**record)
    return '\n    ! '.join([line, *record['warnings']])


def print_epoch(record: Mapping, sentence: tuple[str, str, str] | None) -> None:
    """Print an epoch's lines; sentence: (said, heard, symbols of its outputs), None without any."""
    start = '\r' + CLEAR if on_terminal() else ''
    print(start + epoch_line(record))
    if sentence:
        said, heard, strip = sentence
        print(f'     said {said}\n    heard {heard}\n          {strip}', flush=True)


def show_progress(update: int, updates: int, loss: float, seconds: float) -> None:
    """A live line on a terminal, and nothing elsewhere.

    Updates done and to do in all, the epoch's mean loss so far, the time left at `seconds` an
    update.
    """
    if on_terminal():
        minutes, rest = divmod(int(seconds * (updates - update)), 60)
        print(f'\rupdate {update}/{updates}  loss {loss:.3f}  {minutes} min {rest:02d} s left',
              end=CLEAR, file=sys.stderr, flush=True)


# ---- reading and comparing runs ------------------------------------------------------------------

# Of config.json: what tells nothing about how a run was made, or follows from the rest.
NO_SETTINGS = ('run_dir', 'resume', 'data', 'plateaus', 'valid_plateaus', 'vocab_size', 'workers',
               'threads', 'device', 'begun', 'undo', 'only')


class RunError(Exception):
    """A folder holds no run that can be read; the message says why, in one line."""


class Run(NamedTuple):
    """What a run folder holds; empty what it lacks."""
    name: str
    settings: dict
    log: list[dict]                       # of whole lines
    torn: bool                            # whether the log's last line was cut off
    split: str                            # 'test' or 'valid', whichever was scored last
    rates: dict                           # error rates on it
    sentences: list[list[str]]            # on it: [file, said, heard]


def read_log(path: Path) -> tuple[list[dict], bool]:
    """The whole lines of a log.jsonl, and whether its last one was cut off. Raises RunError."""
    lines = path.read_text(encoding='utf-8').splitlines()
    log = []
    for number, line in enumerate(lines, 1):
        try:
            log.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise RunError(f'{path}:{number}: is no JSON; the log is damaged') from None
            return log, True
    return log, False


def read_sentences(path: Path) -> list[list[str]]:
    """A valid.tsv or test.tsv, [file, said, heard] by utterance."""
    lines = path.read_text(encoding='utf-8').split('\n')
    return [line.split('\t') for line in lines[1:] if line]


def read_run(folder: str | Path) -> Run:
    """A run folder of train.py, of a run at work too. Raises RunError."""
    folder = Path(folder)
    try:
        config, log, torn, results = {}, [], False, {}
        if (folder / 'config.json').exists():
            config = json.loads((folder / 'config.json').read_text())
        if (folder / 'log.jsonl').exists():
            log, torn = read_log(folder / 'log.jsonl')
        if (folder / 'results.json').exists():
            results = json.loads((folder / 'results.json').read_text())
        if config and not log:
            raise RunError(f'{folder}: has no whole epoch yet; wait for the first')
        if not log and not results:
            raise RunError(f'{folder}: holds neither log.jsonl nor results.json of train.py; '
                           'name a run folder')
        split = 'test' if results.get('test') else 'valid'
        sentences = []
        if results.get(split):
            sentences = read_sentences(folder / f'{split}.tsv')
        settings = {key: value for key, value in config.items() if key not in NO_SETTINGS}
        return Run(str(folder), settings, log, torn, split, results.get(split) or {}, sentences)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RunError(f'{folder}: holds no whole run of train.py ({error!r}); name a run '
                       'folder') from None


def print_run(run: Run) -> None:
    """Print a run by epochs, and how to go on. Raises RunError."""
    print(run.name)
    try:
        for record in run.log:
            print(epoch_line(record))
        if run.torn:
            print('the last line of the log is cut off, and left out here')
        if run.log:
            print(*advice(run.log), sep='\n')
        if run.rates:
            print(table([SCORES, score_row(run)]))
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f'{run.name}: log.jsonl lacks what train.py writes ({error!r})') from None


def table(rows: Sequence[Sequence]) -> str:
    """Rows of cells, the first row their names -> lines with columns of one width."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*cells)]
    lines = ['  '.join(cell.ljust(width) for cell, width in zip(row, widths)) for row in cells]
    return '\n'.join(line.rstrip() for line in lines)


SCORES = ['run', 'scored', 'WER %', 'S', 'I', 'D', 'CER %', 'wrong sentences %', 'best epoch',
          'minutes']


def score_row(run: Run) -> list:
    """A run's scores as cells of a table."""
    epochs = [record for record in run.log if 'wer' in record]
    best = min(reversed(epochs), key=lambda r: (r['wer'], r['cer']))['epoch'] if epochs else ''
    minutes = f'{run.log[-1]["train_seconds"] / 60:.1f}' if run.log else ''
    if not run.rates:
        return [run.name, 'not finished', '', '', '', '', '', '', best, minutes]
    rates = run.rates
    return [run.name, run.split, f'{rates["wer"]:.2f}', rates['substitutions'], rates['insertions'],
            rates['deletions'], f'{rates["cer"]:.2f}', f'{rates.get("ser", math.nan):.1f}', best,
            minutes]


def print_spread(runs: Sequence[Run]) -> None:
    """Print mean and standard deviation of the WERs of runs that differ by their seed alone."""
    groups = {}
    for run in runs:
        settings = {key: value for key, value in run.settings.items() if key != 'seed'}
        if run.rates and settings:
            key = json.dumps([settings, run.split], sort_keys=True)
            groups.setdefault(key, []).append(run)
    for group in groups.values():
        if len(group) > 1:
            rates = torch.tensor([run.rates['wer'] for run in group], dtype=torch.float64)
            print(f'{", ".join(run.name for run in group)}: the same but for the seed: '
                  f'WER {rates.mean():.2f} % on average, standard deviation {rates.std():.2f}')


def paired_bootstrap(one: Run, two: Run) -> tuple[float, list[float]]:
    """How much higher the second run's WER is, in points, and the middle 95 % of its samples.

    10,000 samples of the utterances that both scored, the same for both (Bisani & Ney 2004).
    """
    words = torch.tensor([len(said.split()) for _, said, _ in one.sentences])
    errors = []
    for run in one, two:
        errors.append(torch.tensor([edit_counts(said.split(), heard.split()).cost
                                    for _, said, heard in run.sentences]))
    more = errors[1] - errors[0]
    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(10_000):
        draw = torch.randint(len(words), (len(words),), generator=generator)
        samples.append(100 * more[draw].sum() / words[draw].sum())
    interval = torch.stack(samples).quantile(torch.tensor([0.025, 0.975])).tolist()
    return (100 * more.sum() / words.sum()).item(), interval


def print_comparison(runs: Sequence[Run]) -> None:
    """Print the settings that differ, the scores, their spread; for two, whether they differ."""
    keys = sorted({key for run in runs for key in run.settings})
    differ = [key for key in keys if len({str(run.settings.get(key)) for run in runs}) > 1]
    if differ:
        rows = [['run', *differ]]
        rows += [[run.name, *(run.settings.get(key) for key in differ)] for run in runs]
        print(table(rows), end='\n\n')
    print(table([SCORES, *map(score_row, runs)]))
    print_spread(runs)
    if len(runs) == 2 and all(run.sentences for run in runs):
        one, two = runs
        said = [[sentence[:2] for sentence in run.sentences] for run in runs]
        if said[0] == said[1]:
            more, (low, high) = paired_bootstrap(one, two)
            verdict = 'no difference that this test can show'
            if low > 0 or high < 0:
                verdict = f'{(one if low > 0 else two).name} is better'
            print(f'paired bootstrap: the second has {more:+.2f} points of WER '
                  f'(95 %: {low:+.2f} to {high:+.2f}): {verdict}')


# ---- python monitor.py ---------------------------------------------------------------------------

def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description='Read a run: a table by epoch, warnings, the best epoch, how to go on. Or '
                    'compare several: settings that differ, scores, their spread; for two, a '
                    'paired bootstrap.')
    parser.add_argument('run', nargs='+', help='run folder of train.py')
    folders = parser.parse_args(argv).run
    runs = []
    failed = False
    for folder in folders:
        try:
            run = read_run(folder)
            if len(folders) == 1:
                print_run(run)
            runs.append(run)
        except RunError as error:
            print(f'monitor.py: {error}', file=sys.stderr)
            failed = True
    try:
        if len(runs) > 1:
            print_comparison(runs)
    except (KeyError, TypeError, ValueError) as error:
        sys.exit(f'monitor.py: a run lacks what train.py writes ({error!r}); look at each alone')
    sys.exit(failed)


if __name__ == '__main__':
    main()
