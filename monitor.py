"""What a run says about itself: error rates, CTC's two plateaus, gradients, outputs, and what is
wrong by name.

    python monitor.py RUN               a run by epochs, its warnings, its phase, what to try first
    python monitor.py RUN RUN ...       what differs between runs, their scores and spread
    python monitor.py RUN ... --plot p.png   their losses, errors and gradients as a picture
    python monitor.py --lines 250 12 28 the plateau lines of 250 outputs, 12 labels, 28 symbols

A stuck CTC model sits on one of two lines, both known before training, in nats per label:

    uniform    every symbol equally likely in every output; an untrained network starts here
    constant   the best output that ignores its input: mostly blank, the rest by letter frequency
               (about 2.9 for English); a falling loss that ends here has learnt nothing

Nothing here needs the other modules: check_ctc finds what is wrong with a batch of any CTC model;
Gradients, Outputs, plateau_lines and error_rates serve those whose blank is symbol 0.

References: Graves et al. 2006 (CTC); Levenshtein 1966 (edit distance); Bisani & Ney 2004
(bootstrap).
"""
import argparse
import contextlib
import itertools
import json
import math
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

UNIFORM_ENTROPY = 0.95   # of ln V, a batch's mean entropy: above, the batch counts as uniform
IGNORED = 0.05           # share of a healthy input dependence: below, the sound is ignored
LEARNT = 0.1             # of the constant line: learnt, where the validation loss is below this
FALLING = 0.01           # of the constant line: still falling, where an epoch lowers it by more
LEFT = 0.9               # of the constant line: the plateau is left, where the loss is below this
EARLY = 50               # updates; their median gradient norm is the reference for later ones
WINDOW = 20              # updates over which gradient norms and the mean loss are judged
VANISHED = 0.01          # of a part's early median gradient norm
EXPLODED = 10            # times a part's early median gradient norm
UNREACHED = 1e-3         # of the largest part's gradient norm: below, a part gets no gradient
SLOW_CHANGE = 0.05       # of the weights' norm in an epoch: below, they hardly move
FAST_CHANGE = 2.0        # above, they change too fast
FEW_UPDATES = 500        # fewer may not be enough to leave the plateau
CORRELATED = 0.3         # lengths of recordings and of their transcripts, at least
# The space and the letters, most frequent first, per 100 letters of English (Norvig 2013, "English
# letter frequency counts: Mayzner revisited").
ENGLISH = (20.9, 12.49, 9.28, 8.04, 7.64, 7.57, 7.23, 6.51, 6.28, 5.05, 4.07, 3.82, 3.34, 2.73,
           2.51, 2.40, 2.14, 1.87, 1.68, 1.66, 1.48, 1.05, 0.54, 0.23, 0.16, 0.12, 0.09)


# ---- the ends of programs ------------------------------------------------------------------------

@contextlib.contextmanager
def one_line_ends(program: str, next_step: Callable[[], str] | None = None) -> Iterator[None]:
    """End a program in one line where it is interrupted or cannot write.

    next_step: what to do then, in words. Characters that the terminal lacks are shown as numbers.
    """
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')
    try:
        try:
            yield
        finally:
            if sys.stderr is not None and sys.stderr.isatty():
                print('\r\x1b[K', end='', file=sys.stderr)  # clears a status line
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where a closed pipe is answered
    except KeyboardInterrupt:
        sys.exit(f'{program}: stopped' + (f'; {next_step()}' if next_step else ''))
    except OSError as error:
        reason = f'{error}; correct that'
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python says it too
            reason = 'stopped: the program that read its output has ended'
        sys.exit(f'{program}: {reason}' + (f'; then, {next_step()}' if next_step else ''))


# ---- error rates ---------------------------------------------------------------------------------

class Edits(NamedTuple):
    """What turns a reference into a hypothesis."""
    cost: int
    substitutions: int
    insertions: int
    deletions: int


def edit_counts(reference: Sequence, hypothesis: Sequence) -> Edits:
    """The edits of a cheapest alignment of two sequences (Levenshtein 1966).

    On a tie, the one with fewer substitutions.
    """
    # One number for both, compared from the left: cost, substitutions.
    base = 1 + len(reference)
    substitution, gap = base + 1, base
    symbols = {symbol: i for i, symbol in enumerate({*reference, *hypothesis})}
    heard = np.array([symbols[symbol] for symbol in hypothesis], dtype=np.int64)
    insertions = gap * np.arange(len(hypothesis) + 1)
    row = insertions  # of the empty reference
    for said in reference:
        best = row + gap  # a deletion
        same = row[:-1] + np.where(heard == symbols[said], 0, substitution)
        best[1:] = np.minimum(best[1:], same)
        # Insertions run along the row: the least of all that came before it, and as many of them.
        row = np.minimum.accumulate(best - insertions) + insertions
    cost, substitutions = divmod(int(row[-1]), base)
    longer = len(hypothesis) - len(reference)  # insertions less deletions
    inserted = (cost - substitutions + longer) // 2
    return Edits(cost, substitutions, inserted, inserted - longer)


def bootstrap_interval(errors: Tensor, words: Tensor, samples: int = 1000) -> list[float]:
    """The middle 95 % of the word error rates of samples of as many utterances, in per cent.

    errors, words: (N,), by utterance (Bisani & Ney 2004).
    """
    generator = torch.Generator().manual_seed(0)
    rates = []
    for _ in range(samples):
        draw = torch.randint(len(words), (len(words),), generator=generator)
        rates.append(100 * errors[draw].sum() / words[draw].sum().clamp_min(1))
    return torch.stack(rates).quantile(torch.tensor([0.025, 0.975])).tolist()


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
    (letter shares that are free gain less than 2 % more). Up to 500 utterances count, fewer where
    they are long, of those that have labels and enough outputs for them; nan where none has.
    """
    step = max(1, math.ceil(len(targets) / 500), math.ceil(int(lengths.sum()) / 200_000))
    targets, lengths = targets[::step], lengths[::step]
    letters = Counter(symbol for target in targets for symbol in target)
    frequency = torch.tensor([letters[symbol] for symbol in range(vocab_size)], dtype=torch.float64)
    frequency /= frequency.sum()
    padded = nn.utils.rnn.pad_sequence([torch.tensor(t) for t in targets], batch_first=True)
    target_lengths = torch.tensor([len(t) for t in targets])

    def losses(distribution, chosen):
        log_probs = distribution.clamp_min(1e-30).log().float()
        log_probs = log_probs.expand(int(lengths.max()), len(lengths[chosen]), vocab_size)
        total = F.ctc_loss(log_probs, padded[chosen], lengths[chosen], target_lengths[chosen],
                           reduction='none')
        return total / target_lengths[chosen]

    uniform = losses(torch.full_like(frequency, 1 / vocab_size), slice(None))
    possible = uniform.isfinite().nonzero()[:, 0]
    if not len(possible):
        return math.nan, math.nan

    def constant(blank, chosen):
        distribution = frequency * (1 - blank)
        distribution[0] = blank
        return losses(distribution, chosen).mean().item()

    few = possible[::max(1, len(possible) // 16)]  # their best share is nearly that of all
    # The loss falls with the labels' share, 1 - blank, and rises again (where no text needs a blank
    # it only falls), so each step discards a third. On a log scale: with many outputs a label the
    # best share is far below a hundredth.
    low, high = math.log(1e-5), 0.0
    while high - low > 0.02:
        left, right = low + (high - low) / 3, high - (high - low) / 3
        if constant(1 - math.exp(left), few) < constant(1 - math.exp(right), few):
            high = right
        else:
            low = left
    best = constant(1 - math.exp((low + high) / 2), possible)
    return uniform[possible].mean().item(), min(best, constant(0, possible))


def plateau_fraction(loss: float, lines: tuple[float, float]) -> float:
    """How far a loss has come from the uniform line, 0, to the constant one, 1.

    Reaching 1 is not learning; passing it is.
    """
    uniform, constant = lines
    return (uniform - loss) / max(uniform - constant, 1e-9)  # they may be equal where V is 2


def lines_of_lengths(outputs: int, labels: int, vocab_size: int) -> tuple[float, float]:
    """plateau_lines without a corpus: of utterances of these numbers of outputs and labels.

    The symbols are as frequent as English letters and the space; where there are more symbols, the
    rest are as rare as the rarest. Raises ValueError where the labels do not fit the outputs.
    """
    if not 0 < labels <= outputs <= 100_000 or labels > 2000 or not 2 <= vocab_size <= 10_000:
        raise ValueError(f'{labels} labels of {vocab_size} symbols in {outputs} outputs: give 1 to '
                         '2,000 labels, an output a label or more, up to 100,000, and 2 to 10,000 '
                         'symbols, the blank included')
    shares = torch.tensor(ENGLISH[:vocab_size - 1])
    shares = F.pad(shares, (0, vocab_size - 1 - len(shares)), value=ENGLISH[-1])
    generator = torch.Generator().manual_seed(0)
    texts = max(1, min(50, 1_000_000 // (outputs * labels)))
    draws = torch.multinomial(shares, texts * labels, replacement=True, generator=generator) + 1
    targets = draws.view(texts, labels).tolist()
    lines = plateau_lines(targets, torch.full((texts,), outputs), vocab_size)
    if math.isnan(lines[0]):
        raise ValueError(f'{labels} labels with their repeats do not fit {outputs} outputs')
    return lines


class Departures:
    """The updates at which a run left each of the two plateaus; None until then.

    The uniform one is left when the mean loss of the last 20 updates is closer to the constant line
    than to the uniform one; the constant one when that mean is below 90 % of its line.
    """

    def __init__(self, lines: tuple[float, float]):
        uniform, constant = lines
        self.limits = {'left_uniform': (uniform + constant) / 2, 'left_constant': LEFT * constant}
        self.left = dict.fromkeys(self.limits)
        self.updates = 0
        self.recent = deque(maxlen=WINDOW)

    def add(self, loss: float) -> None:
        """The training loss of one update, in nats per label."""
        self.updates += 1
        self.recent.append(loss)
        if len(self.recent) < WINDOW:
            return
        mean = sum(self.recent) / WINDOW
        for line, limit in self.limits.items():
            if self.left[line] is None and mean < limit:
                self.left[line] = self.updates

    def state(self) -> dict:
        """As plain data, for a checkpoint."""
        return {'left': dict(self.left), 'updates': self.updates, 'recent': list(self.recent)}

    def restore(self, state: Mapping) -> None:
        """Go on from what state() gave."""
        self.left = dict(state['left'])
        self.updates = state['updates']
        self.recent.extend(state['recent'])


# ---- gradients and outputs -----------------------------------------------------------------------

class Gradients:
    """Gradient norms before clipping, in all and by part, over an epoch's updates.

    parts: {name: prefixes of its parameters' names}; without, each of the network's children is
    one. Raises ValueError where a parameter belongs to no part, or a part has none.

    Norms are judged against those of the run's own first 50 updates. Fixed norms, such as 10 to
    200, depend on the loss: summed over a batch and not averaged, ours of 0.1 to 10 would be as
    many times larger as the batch has utterances and each of them labels.
    """

    def __init__(self, network: nn.Module, parts: Mapping[str, Sequence[str]] | None = None):
        self.groups = {part: [] for part in parts or ()}
        for name, parameter in network.named_parameters():
            owners = [name.partition('.')[0]]  # a child, or a parameter of the network's own
            if parts is not None:
                owners = [part for part, prefixes in parts.items()
                          if name.startswith(tuple(prefixes))]
            if not owners:
                raise ValueError(f'{name} belongs to none of the parts {", ".join(parts)}; '
                                 'give its prefix to one')
            self.groups.setdefault(owners[0], []).append(parameter)
        empty = [part for part, group in self.groups.items() if not group]
        if empty:
            raise ValueError(f'no parameter has a prefix of {", ".join(empty)}; correct the prefix')
        self.first = {part: [] for part in self.groups}  # norms of the run's first updates
        self.recent = {part: deque(maxlen=WINDOW) for part in self.groups}  # and of its last
        self.reset()

    def reset(self) -> None:
        """Begin an epoch."""
        self.norms = {part: [] for part in self.groups}
        self.totals = []       # norms of all parts together
        self.vanished = set()  # parts
        self.exploded = set()
        self.clipped = 0
        self.nonfinite = 0
        self.updates = 0

    def compare(self, part: str, norm: float) -> None:
        """Hold a part's last norms against its early ones."""
        first, recent = self.first[part], self.recent[part]
        recent.append(norm)
        if len(first) < EARLY:
            first.append(norm)
            return
        early = median(first)
        if max(recent) < VANISHED * early:
            self.vanished.add(part)
        if median(recent) > EXPLODED * early:
            self.exploded.add(part)

    def state(self) -> dict:
        """What outlives an epoch, as plain data, for a checkpoint."""
        return {'first': self.first,
                'recent': {part: list(norms) for part, norms in self.recent.items()}}

    def restore(self, state: Mapping) -> None:
        """Go on from what state() gave."""
        self.first = {part: list(norms) for part, norms in state['first'].items()}
        for part, norms in state['recent'].items():
            self.recent[part].extend(norms)

    def clip(self, maximum: float) -> bool:
        """Record the norms, then scale all gradients to the total norm `maximum` if above (0:
        never).

        False where the norm is not finite: the update must be left out.
        """
        norms = {}
        for part, group in self.groups.items():
            gradients = [p.grad for p in group if p.grad is not None]
            norms[part] = nn.utils.get_total_norm(gradients).cpu()  # where that of none is
        total = torch.stack(list(norms.values())).norm()
        self.updates += 1
        if not torch.isfinite(total):
            self.nonfinite += 1
            return False
        for part, norm in norms.items():
            self.norms[part].append(norm.item())
            self.compare(part, norm.item())
        self.totals.append(total.item())
        if maximum and total > maximum:
            self.clipped += 1
            for group in self.groups.values():
                nn.utils.clip_grads_with_norm_(group, maximum, total)
        return True

    def summary(self) -> dict:
        """The keys of the log that say what the gradients are like.

        grad_norm              mean norm before clipping, of all parts together
        grad_norm_max          the largest
        grad_parts             {part: its mean norm}
        clipped, nonfinite     share of updates that were clipped, number of those left out
        vanished, exploded     parts whose norms of 20 updates were below a hundredth of their early
                               median, or had a median above ten times that
        """
        return {'grad_norm': sum(self.totals) / max(1, len(self.totals)),
                'grad_norm_max': max(self.totals, default=0),
                'grad_parts': {part: sum(norms) / max(1, len(norms))
                               for part, norms in self.norms.items()},
                'clipped': self.clipped / max(1, self.updates),
                'nonfinite': self.nonfinite,
                'vanished': sorted(self.vanished),
                'exploded': sorted(self.exploded)}


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
        entropy = torch.special.entr(probabilities).sum(1)                  # (N,)
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


# ---- phases --------------------------------------------------------------------------------------

def name_phase(record: Mapping, constant: float, before: Mapping | None = None) -> str:
    """Where a network stands after an epoch: 'uniform', 'constant', 'learning' or 'learnt'.

    record: of the log, by validation where it has some; constant: the constant line; before: the
    record of the epoch before, if there was one.

    uniform    all symbols are nearly equally likely, and the output does not depend on the sound
    constant   the output does not depend on the sound, as in blank collapse, or to no use: the
               loss is not a tenth below that of the best output that ignores the sound
    learning   it does, to some use
    learnt     ... and the loss, below a tenth of the constant line, falls by less than a hundredth
               of that line, or did so before
    """
    loss, entropy, dependence = judged_by(record)
    if dependence < IGNORED and entropy > UNIFORM_ENTROPY:
        return 'uniform'
    if dependence < IGNORED or loss > LEFT * constant:
        return 'constant'
    if loss > LEARNT * constant or before is None:
        return 'learning'
    falls = loss < judged_by(before)[0] - FALLING * constant
    return 'learning' if falls and before.get('phase') != 'learnt' else 'learnt'


def judged_by(record: Mapping) -> tuple[float, float, float]:
    """Loss, entropy and input dependence, by validation where there is some."""
    return (record.get('valid_loss', record['train_loss']),
            record.get('valid_entropy', record['entropy']),
            record.get('valid_dependence_share', record['dependence_share']))


def phase_evidence(record: Mapping) -> str:
    """The figures that name_phase went by, in words."""
    split = 'validation' if 'valid_loss' in record else 'training'
    fraction = record.get('valid_plateau_fraction', record['train_plateau_fraction'])
    _, entropy, dependence = judged_by(record)
    words = (f'the {split} loss has come {fraction:.0%} of the way from the uniform to the '
             f'constant line, the entropy is {entropy:.0%} of the largest, the output depends on '
             f'the sound {dependence:.0%} as much as if each label had exactly one output')
    if 'deletions' in record:
        words += f', {record["deletions"]:.0%} of the words are left out'
    return words


# ---- what is wrong -------------------------------------------------------------------------------

def parts_without_gradient(record: Mapping) -> list[str]:
    """The parts whose gradient vanished, or is below a thousandth of the largest part's."""
    norms = record['grad_parts']
    return [part for part, norm in norms.items()
            if part in record['vanished'] or norm < UNREACHED * max(norms.values())]


def gradient_warnings(record: Mapping) -> Iterator[str]:
    """What is wrong with an epoch's gradients, by part."""
    for part in record['exploded']:
        yield (f'exploding gradient in the {part}: norm {record["grad_parts"][part]:.1e}, over '
               f'{EXPLODED} times that of the first {EARLY} updates; lower --learning_rate')
    if record['phase'] not in ('uniform', 'constant'):
        return  # what has been learnt needs no gradient any more
    norms = record['grad_parts']
    strongest = max(norms, key=norms.get)
    for part in parts_without_gradient(record):
        evidence = f'norm {norms[part]:.1e}, that of the {strongest} {norms[strongest]:.1e}'
        if part in record['vanished']:
            evidence = f'for {WINDOW} updates below {VANISHED:.0%} of that of the first {EARLY}'
        yield (f'vanishing gradient in the {part}: {evidence}; check the initialisation of the '
               'layers above that part')


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
    batch_norm = batch_norm_warning(record)
    if batch_norm:
        warnings.append(batch_norm)
    elif record['phase'] == 'uniform':
        warnings.append('uniform output: every symbol is nearly equally likely; if it lasts beyond '
                        'the first epochs, raise --learning_rate')
    elif record['phase'] == 'constant':
        warnings.append(f"constant output: in training {record['blank']:.1%} of the outputs were "
                        f"blank, {record['emitted']:.0%} of the characters emitted; usual early "
                        'on. If it stays, see what python monitor.py says of the run')
    return warnings


def batch_norm_warning(record: Mapping) -> str | None:
    """What is wrong where a network that has begun to learn does worse on its training utterances
    in eval mode, else None."""
    in_training, in_eval = record['train_loss'], record['train_eval_loss']
    if record['left_constant'] is None or in_eval <= 1.5 * in_training + 0.1:
        return None
    return (f'the loss of training utterances is {in_eval:.3f} in eval mode, {in_training:.3f} in '
            "training: batch norm's running statistics are not those of its batches; give them a "
            'larger momentum, or make more updates')


def unrelated_lengths(correlation: float | None) -> str | None:
    """What is wrong where the lengths of recordings and transcripts hardly correlate, else None."""
    if correlation is None or correlation >= CORRELATED:
        return None
    return ('recordings and transcripts do not belong together: their lengths have a correlation '
            f'of {correlation:.2f}, in speech it is above 0.5; listen to five recordings and '
            'compare their texts')


def stuck_reason(log: Sequence[Mapping]) -> str:
    """Why a run has not left its plateau, and what to try first."""
    last = log[-1]
    updates = last['updates']
    moved = max(record['weight_change'] for record in log)
    if moved < SLOW_CHANGE:
        return (f'the weights hardly move: at most {moved:.1%} of their size in an epoch; raise '
                '--learning_rate tenfold')
    if moved > FAST_CHANGE:
        return (f'the weights change too fast: by {moved:.0%} of their size in an epoch; lower '
                '--learning_rate to a tenth')
    if parts_without_gradient(last):
        return ('the gradient does not reach every part of the network; see the warning, and '
                'what initialises the layers above that part')
    if updates < FEW_UPDATES:
        return (f'{updates} updates are few: a plateau may last {FEW_UPDATES} and more; raise '
                '--epochs, or lower --batch_size')
    return (f'still on the plateau after {updates} updates, though gradients and steps are of a '
            'healthy size; can it learn ten utterances (train.py --overfit 10)? If so, give it '
            'fewer outputs a label (--frames_per_output)')


def explain(log: Sequence[Mapping], config: Mapping) -> Iterator[str]:
    """The records of a log.jsonl, the contents of config.json -> the phase, why, what to try."""
    last = log[-1]
    yield f'phase: {last["phase"]}; {phase_evidence(last)}'
    for line in 'uniform', 'constant':
        update = last[f'left_{line}']
        yield f'left the {line} plateau: ' + (f'at update {update}' if update else 'never')
    if 'wer' in last:
        best = best_epoch(log)
        yield (f"best epoch {best['epoch']} of {len(log)}: WER {best['wer']:.2f} %, "
               f"CER {best['cer']:.2f} %")
    stuck = last['phase'] in ('uniform', 'constant')
    unrelated = unrelated_lengths(config.get('length_correlation'))
    batch_norm = batch_norm_warning(last)
    if batch_norm:
        step = batch_norm
    elif stuck and unrelated:
        step = unrelated
    elif stuck and last['left_constant'] is not None:
        step = ('the network fits the training utterances alone; get more of them, and check that '
                'each transcript belongs to its recording')
    elif stuck:
        step = stuck_reason(log)
    elif last['nonfinite'] or (last['clipped'] > 0.9 and last['train_plateau_fraction'] < 1.1):
        step = 'updates are skipped, or nearly all clipped; halve --learning_rate'
    elif 'wer' not in last:
        step = 'there is no validation data; give --valid_data'
    elif last['wer'] > 80 and last['cer'] < 25:
        step = ('the letters are right and the words are not; is the space a symbol of its own, '
                'and not the blank?')
    elif last['wer'] == 0:
        step = 'there are no errors left to learn from; take harder --valid_data'
    elif last['valid_loss'] > 2 * last['train_loss']:
        step = ('training is learnt better than validation; get more data, or give a higher '
                '--dropout and, with it, more --epochs')
    else:
        step = ('no warning applies; if the last epochs still improved, start a new run with more '
                '--epochs')
    yield 'how to go on: ' + step


def best_epoch(log: Sequence[Mapping]) -> Mapping:
    """The record of the lowest validation WER; of equal ones that of the lowest CER, of those the
    last; best.pt holds it."""
    return min(reversed(log), key=lambda record: (record['wer'], record['cer']))


# ---- a batch of anybody's network ----------------------------------------------------------------

@torch.no_grad()
def check_ctc(log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor,
              blank: int = 0, untrained: bool = False) -> list[str]:
    """What is wrong with a batch as F.ctc_loss takes it, in words, each with a next step.

    log_probs (T, B, V); targets (B, S), or (sum of target_lengths,); both lengths (B,). Shapes come
    first, then symbols, normalisation and lengths. Where all these are right, it is judged what the
    outputs have learnt, and [] means that the network has begun to; untrained: that is left out.
    """
    try:
        log_probs = plain_tensor('log_probs', log_probs, whole=False).float()
        targets = plain_tensor('targets', targets, whole=True).long()
        input_lengths, target_lengths = [
            plain_tensor(name, lengths, whole=True).long().reshape(-1)
            for name, lengths in (('input_lengths', input_lengths),
                                  ('target_lengths', target_lengths))]
    except ValueError as error:
        return [str(error)]
    shape_fault = wrong_shape(log_probs, targets, input_lengths, target_lengths)
    if shape_fault:
        return [shape_fault]
    if not isinstance(blank, (int, np.integer)) or not 0 <= blank < log_probs.shape[2]:
        return [f'blank is {blank}, and the symbols are 0 to {log_probs.shape[2] - 1}; give the '
                'one that the head has for it']
    texts = split_targets(targets, target_lengths)
    if not any(texts):
        return ['no utterance has a label; give the transcripts']
    findings = [*check_symbols(texts, log_probs.shape[2], blank),
                *check_normalisation(log_probs, input_lengths),
                *check_lengths(log_probs, texts, input_lengths)]
    if findings or untrained:
        return findings
    return list(check_outputs(log_probs, texts, input_lengths, blank))


def plain_tensor(name: str, value: object, whole: bool) -> Tensor:
    """An argument of F.ctc_loss as a dense tensor of real or of whole numbers. Raises ValueError
    that says what it is instead."""
    try:
        tensor = torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f'{name} cannot be a tensor ({error}); give that of F.ctc_loss') from None
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_complex():
        raise ValueError(f'{name} is not a dense tensor of real numbers; give that of F.ctc_loss')
    if whole and (tensor.is_floating_point() or tensor.dtype == torch.bool):
        raise ValueError(f'{name} are not whole numbers; where lengths are shares of the longest, '
                         'multiply them by its number of outputs, and round')
    if not whole and not tensor.is_floating_point():
        raise ValueError(f'{name} are whole numbers; give log-probabilities')
    return tensor


def wrong_shape(log_probs: Tensor, targets: Tensor, input_lengths: Tensor,
                target_lengths: Tensor) -> str | None:
    """What is wrong with the arguments' shapes."""
    batch = target_lengths.numel()
    shape = tuple(log_probs.shape)
    if log_probs.dim() == 2:
        return f'log_probs has the shape {shape}, not (T, B, V); take log_probs.unsqueeze(1)'
    if log_probs.dim() != 3 or log_probs.numel() == 0:
        return f'log_probs has the shape {shape}, not (T, B, V); give one batch of outputs'
    if shape[1] != batch:
        advice = 'see which dimension is the batch'
        if shape[0] == batch:
            advice = 'that looks like (B, T, V), so take log_probs.transpose(0, 1)'
        return f'log_probs has the shape {shape} for {batch} target lengths; {advice}'
    if input_lengths.numel() != batch:
        return (f'{input_lengths.numel()} input lengths and {batch} target lengths; give one of '
                'each for every utterance')
    if input_lengths.min() < 1 or target_lengths.min() < 0:
        return (f'lengths go down to {int(input_lengths.min())} outputs and '
                f'{int(target_lengths.min())} labels; leave empty utterances out')
    longest = int(target_lengths.max())
    in_rows = targets.dim() == 2 and targets.shape[0] == batch and targets.shape[1] >= longest
    in_line = targets.dim() == 1 and len(targets) == int(target_lengths.sum())
    if not in_rows and not in_line:
        return (f'targets has the shape {tuple(targets.shape)} for {batch} utterances of up to '
                f'{longest} labels; give (B, S), or all labels in one line')
    return None


def split_targets(targets: Tensor, target_lengths: Tensor) -> list[list[int]]:
    """Targets in either form -> the symbols of each utterance."""
    if targets.dim() == 1:
        return [text.tolist() for text in targets.split(target_lengths.tolist())]
    return [row[:length].tolist() for row, length in zip(targets, target_lengths.tolist())]


def check_symbols(texts: Sequence[Sequence[int]], vocab_size: int, blank: int) -> Iterator[str]:
    """Targets that are not labels."""
    symbols = [symbol for text in texts for symbol in text]
    blanks = symbols.count(blank)
    if blanks:
        yield (f'{blanks} of {len(symbols)} labels are the blank, symbol {blank}; number the '
               'letters so that none has it, and leave padding out of target_lengths')
    outside = sum(not 0 <= symbol < vocab_size for symbol in symbols)
    if outside:
        yield (f'{outside} of {len(symbols)} labels are not between 0 and {vocab_size - 1}; make '
               'the head as large as the alphabet and the blank')


def check_normalisation(log_probs: Tensor, input_lengths: Tensor) -> Iterator[str]:
    """Outputs that are not logarithms of probabilities."""
    valid = valid_frames(log_probs.shape[0], input_lengths)            # (B, T)
    outputs = log_probs.transpose(0, 1)[valid]                         # (N, V)
    if outputs.isnan().any() or outputs.isposinf().any():
        yield 'log_probs holds NaN or infinity; look for the first layer whose output does'
        return

    def ones(totals):
        return bool((totals - 1).abs().max() < 0.02)

    if ones(outputs.exp().sum(1)):
        return
    if outputs.min() >= 0 and ones(outputs.sum(1)):
        yield 'log_probs holds probabilities, not their logarithms; use log_softmax for softmax'
    elif ones(log_probs.exp().sum(0)) or ones(log_probs.exp().sum(1)):
        yield ('log_probs is normalised over time or over the batch; take log_softmax over the '
               'symbols, the last dimension')
    else:
        yield ('log_probs is not normalised, as raw logits are not, and a loss of it may be '
               'negative; take log_softmax over the last dimension')


def check_lengths(log_probs: Tensor, texts: Sequence[Sequence[int]],
                  input_lengths: Tensor) -> Iterator[str]:
    """Numbers of outputs that cannot be right."""
    frames = log_probs.shape[0]
    longest = int(input_lengths.max())
    if longest > frames:
        yield (f'input_lengths go up to {longest} where there are {frames} outputs; divide them '
               "by the network's stride, as it does")
        return
    needed = torch.tensor([len(text) + sum(map(int.__eq__, text, text[1:])) for text in texts])
    missing = (needed - input_lengths).clamp_min(0)
    if missing.any():
        yield (f'{int((missing > 0).sum())} of {len(texts)} utterances have fewer outputs than '
               f'labels and repeats, by up to {int(missing.max())}, so their loss is infinite; '
               'make more outputs a second, or leave them out')
    labels = sorted(map(len, texts))
    last = log_probs[longest - 1].exp()                                # (B, V)
    shortest = texts.index(min(texts, key=len))
    alike = int(((last - last[shortest]).abs().amax(1) < 1e-3).sum())
    same = len(texts) > 1 and bool((input_lengths == longest).all())
    if same and longest == frames and (labels[-1] > 1.5 * labels[0] or 1 < alike < len(texts)):
        yield (f'every input length is {frames}, the padded one, for {labels[0]} to {labels[-1]} '
               f'labels, and {alike} of the last outputs are alike; give each clip its own '
               'length, unless all are equally long')


def check_outputs(log_probs: Tensor, texts: Sequence[Sequence[int]], input_lengths: Tensor,
                  blank: int) -> Iterator[str]:
    """Outputs that have learnt nothing, by the loss, its two lines and the phase."""
    vocab_size = log_probs.shape[2]
    order = list(range(vocab_size))  # the blank first
    order[0], order[blank] = blank, 0
    log_probs = log_probs[:, :, order].transpose(0, 1)                 # (B, T, V)
    texts = [[order[symbol] for symbol in text] for text in texts]
    target_lengths = torch.tensor([len(text) for text in texts])
    padded = nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
    losses = F.ctc_loss(log_probs.transpose(0, 1), padded, input_lengths, target_lengths,
                        reduction='none')
    loss = (losses / target_lengths)[target_lengths > 0].mean().item()
    lines = plateau_lines(texts, input_lengths, vocab_size)
    outputs = Outputs(vocab_size, letter_entropy(texts))
    outputs.add(log_probs, input_lengths, target_lengths)
    summary = outputs.summary()
    phase = name_phase(summary | {'train_loss': loss}, lines[1])
    uniform, constant = lines
    where = (f'the loss is {loss:.2f} nats a label, that of a uniform output {uniform:.2f}, of the '
             f'best constant one {constant:.2f}')
    shared = log_probs[:, :int(input_lengths.min())].exp()
    alike = len(texts) > 1 and bool((shared - shared[:1]).abs().max() < 1e-4)
    if alike and loss > LEFT * constant:
        yield (f'every utterance gets the same outputs; {where}; see whether the sound reaches the '
               'network: inputs that are all zero, a layer that is dead or cut off')
    elif summary['dependence_share'] > IGNORED and loss > constant:
        yield (f'the output depends on the sound, and yet {where}; check that each transcript '
               "belongs to its recording, and that blank and alphabet are the network's own")
    elif phase == 'uniform':
        yield (f'phase uniform: {where}; every network starts here; if it stays for hundreds of '
               'updates, raise the learning rate, or initialise the head with larger weights')
    elif phase == 'constant':
        yield (f'phase constant: the output makes no use of the sound ({where}); if it stays, '
               'see whether gradients reach the first layer and ten utterances can be learnt')


# ---- lines on the terminal -----------------------------------------------------------------------

def legend(lines: tuple[float, float]) -> str:
    """What the epochs' lines mean, for the first lines of a run."""
    uniform, constant = lines
    return (f'loss: CTC in nats per label; {uniform:.2f} if all symbols are equally likely, where '
            f'training starts;\n    {constant:.2f} for the best output that ignores the sound, '
            'where stuck models stay; below that it learns\n'
            'gradient: mean norm; blank: share of the outputs; sound: how much the outputs depend '
            'on it,\n    0 % if they ignore it, 100 % if each label has one output, more if '
            'several\n'
            'at the end of a line: uniform or constant output (a plateau), learning, or learnt\n'
            'beneath: what was said and heard, and the best symbol of every output; - is the '
            'blank (~ where - is a letter), _ a space')


def epoch_line(record: Mapping) -> str:
    """An epoch's record of the log -> a line, its warnings beneath."""
    parts = ['epoch {epoch:3d}', '{train_seconds:4.0f} s', 'loss {train_loss:.3f}']
    if 'wer' in record:
        parts += ['valid {valid_loss:.3f}', 'WER {wer:.1f} %', 'CER {cer:.1f} %']
    blank, sound = 100 * record['blank'], 100 * record['dependence_share']
    parts += ['gradient {grad_norm:.2f}', f'blank {blank:.0f} %', f'sound {sound:.0f} %',
              '{phase}']
    line = '  '.join(parts).format(**record)
    return '\n    ! '.join([line, *record['warnings']])


def print_epoch(record: Mapping, sentence: tuple[str, str, str] | None) -> None:
    """Print an epoch's lines; sentence: (said, heard, symbols of its outputs), None without any."""
    print(epoch_line(record), flush=True)
    if sentence:
        said, heard, path = sentence
        print(f'     said {said}\n    heard {heard}\n          {path}', flush=True)


# ---- reading and comparing runs ------------------------------------------------------------------

# Of config.json: keys that are not settings, or follow from others.
NO_SETTINGS = ('run_dir', 'resume', 'data', 'plateaus', 'valid_plateaus', 'length_correlation',
               'vocab_size', 'workers', 'threads', 'device', 'undo', 'only')


class RunError(Exception):
    """A folder holds no run that can be read; the message says why, in one line."""


class Run(NamedTuple):
    """What a run folder holds; empty what it lacks."""
    name: str
    config: dict                          # config.json
    log: list[dict]                       # log.jsonl
    results: dict                         # results.json
    split: str                            # 'test' or 'valid', whichever was scored last
    sentences: list[list[str]]            # of it: [file, said, heard, heard by beam search]

    @property
    def settings(self) -> dict:
        """What tells how the run was made."""
        return {key: value for key, value in self.config.items() if key not in NO_SETTINGS}

    @property
    def rates(self) -> dict:
        """Error rates of greedy decoding; empty of a run that is not finished."""
        return self.results.get(self.split) or {}


def read_log(path: Path) -> list[dict]:
    """The records of a log.jsonl. Raises RunError."""
    log = []
    for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1):
        try:
            log.append(json.loads(line))
        except ValueError:
            raise RunError(f'{path}:{number}: is not JSON; remove that line') from None
    return log


def read_sentences(path: Path) -> list[list[str]]:
    """A valid.tsv or test.tsv, [file, said, heard, heard by beam search] by utterance."""
    lines = path.read_text(encoding='utf-8').split('\n')
    return [line.split('\t') for line in lines[1:] if line]


def read_run(folder: str | Path) -> Run:
    """A run folder of train.py, of a run at work too. Raises RunError."""
    folder = Path(folder)
    try:
        config, log, results = {}, [], {}
        if (folder / 'config.json').exists():
            config = json.loads((folder / 'config.json').read_text())
        if (folder / 'log.jsonl').exists():
            log = read_log(folder / 'log.jsonl')
        if (folder / 'results.json').exists():
            results = json.loads((folder / 'results.json').read_text())
        if not isinstance(config, dict) or not isinstance(results, dict):
            raise RunError(f'{folder}: config.json or results.json is not a JSON object; name a '
                           'run folder')
        if config and not log:
            raise RunError(f'{folder}: has no whole epoch yet; wait for the first')
        if not log and not results:
            raise RunError(f'{folder}: holds neither log.jsonl nor results.json of train.py; '
                           'name a run folder')
        split = 'test' if results.get('test') else 'valid'
        sentences = []
        if results.get(split):
            sentences = read_sentences(folder / f'{split}.tsv')
        return Run(str(folder), config, log, results, split, sentences)
    except (OSError, ValueError) as error:
        raise RunError(f'{folder}: holds no whole run of train.py ({error}); name a run '
                       'folder') from None


def print_run(run: Run) -> None:
    """Print a run by epochs, and how to go on."""
    print(run.name)
    for record in run.log:
        print(epoch_line(record))
    if run.log:
        print(*explain(run.log, run.config), sep='\n')
    if run.rates:
        print(table([SCORES, score_row(run)]))


def table(rows: Sequence[Sequence]) -> str:
    """Rows of cells, the first row their names -> lines with columns of one width."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*cells)]
    lines = ['  '.join(cell.ljust(width) for cell, width in zip(row, widths)) for row in cells]
    return '\n'.join(line.rstrip() for line in lines)


SCORES = ['run', 'scored', 'WER %', 'S', 'I', 'D', 'CER %', 'SER %', 'best epoch', 'minutes']


def score_row(run: Run) -> list:
    """A run's scores as cells of a table."""
    epochs = [record for record in run.log if 'wer' in record]
    best = best_epoch(epochs)['epoch'] if epochs else ''
    minutes = f'{run.log[-1]["train_seconds"] / 60:.1f}' if run.log else ''
    if not run.rates:
        return [run.name, 'not finished', '', '', '', '', '', '', best, minutes]
    rates = run.rates
    return [run.name, run.split, f'{rates["wer"]:.2f}', rates['substitutions'], rates['insertions'],
            rates['deletions'], f'{rates["cer"]:.2f}', f'{rates["ser"]:.1f}', best, minutes]


def seed_groups(runs: Iterable[Run]) -> list[list[Run]]:
    """The runs that have scores, those together that differ by their seed alone."""
    groups = {}
    for run in runs:
        settings = {key: value for key, value in run.settings.items() if key != 'seed'}
        if run.rates and run.log:
            key = json.dumps([settings or run.name, run.split], sort_keys=True)
            groups.setdefault(key, []).append(run)
    return list(groups.values())


def group_name(group: Sequence[Run]) -> str:
    """What the names of a group's runs have in common, or all of them."""
    names = [Path(run.name).name for run in group]
    return os.path.commonprefix(names).rstrip('_-') or ' '.join(run.name for run in group)


def same_sentences(runs: Sequence[Run]) -> bool:
    """Whether runs scored the same utterances."""
    said = [[sentence[:2] for sentence in run.sentences] for run in runs]
    return bool(said[0]) and all(other == said[0] for other in said)


def word_errors(group: Sequence[Run], column: int) -> tuple[Tensor, Tensor]:
    """Word errors and words (N,) of the utterances that runs scored, means over the runs.

    column: of Run.sentences, what was heard.
    """
    errors = []
    for run in group:
        errors.append([edit_counts(sentence[1].split(), sentence[column].split()).cost
                       for sentence in run.sentences])
    words = [len(said.split()) for _, said, *_ in group[0].sentences]
    return torch.tensor(errors).float().mean(0), torch.tensor(words)


SPREAD = ['runs that differ by their seed', 'runs', 'loss', 'plateau %', 'left it at update',
          'decoding', 'WER %', '+-', '95 %', 'SER %']
DECODINGS = {  # in a table: what follows the split's name in results.json, and the column of heard
    'greedy': ('', 2),
    'beam': ('_beam', 3),
    'greedy, new sentences': ('_new', None),  # which are not among the training transcripts
    'beam, new sentences': ('_new_beam', None),
}


def spread_rows(group: Sequence[Run]) -> list[list]:
    """What runs that differ by their seed alone come to, as rows of a table, one a decoding.

    Loss, and how far it has come from the uniform (0 %) to the constant line (100 %): means of the
    last epoch, by validation if there is one; the updates at which the constant plateau was left.
    WER: mean, which is that of all their words together, standard deviation, and bootstrap interval
    over utterances; SER: mean.
    """
    last = [run.log[-1] for run in group]
    losses = [record.get('valid_loss', record['train_loss']) for record in last]
    fractions = [record.get('valid_plateau_fraction', record['train_plateau_fraction'])
                 for record in last]
    left = [str(record.get('left_constant') or 'never') for record in last]
    learnt = [group_name(group), len(group), f'{mean(losses):.3f}', f'{100 * mean(fractions):.0f}',
              ' '.join(left)]
    rows = []
    for decoding, (ending, column) in DECODINGS.items():
        rates = [run.results.get(run.split + ending) for run in group]
        if not all(rates):
            continue
        wers = [rate['wer'] for rate in rates]
        spread = f'{stdev(wers):.2f}' if len(group) > 1 else ''
        interval = ''
        if column and same_sentences(group):
            low, high = bootstrap_interval(*word_errors(group, column))
            interval = f'{low:.1f} to {high:.1f}'
        rows.append([*learnt, decoding, f'{mean(wers):.2f}', spread, interval,
                     f'{mean(rate["ser"] for rate in rates):.1f}'])
        learnt = [''] * len(learnt)  # once is enough
    return rows


def paired_bootstrap(one: Sequence[Run], two: Sequence[Run],
                     column: int = 2) -> tuple[float, list[float]]:
    """How much higher the second group's WER is, in points, and the middle 95 % of its samples.

    10,000 samples of the utterances that both scored, the same for both (Bisani & Ney 2004).
    column: of Run.sentences, what was heard.
    """
    errors, words = word_errors(one, column)
    more = word_errors(two, column)[0] - errors
    return (100 * more.sum() / words.sum()).item(), bootstrap_interval(more, words, 10_000)


def print_comparison(runs: Sequence[Run]) -> None:
    """Print the settings that differ, scores and spread; of two groups, or runs, the better one."""
    keys = sorted({key for run in runs for key in run.settings})
    differ = [key for key in keys if len({str(run.settings.get(key)) for run in runs}) > 1]
    if differ:
        rows = [['run', *differ]]
        rows += [[run.name, *(run.settings.get(key) for key in differ)] for run in runs]
        print(table(rows), end='\n\n')
    print(table([SCORES, *map(score_row, runs)]))
    groups = seed_groups(runs)
    if len(groups) < len(runs):
        print('', table([SPREAD, *itertools.chain(*map(spread_rows, groups))]), sep='\n')
    sides = [[run] for run in runs] if len(runs) == 2 else groups
    compared = list(itertools.chain(*sides))
    if len(sides) != 2 or not same_sentences(compared):
        return
    names = [group_name(side) for side in sides]
    if names[0] == names[1]:
        names = [' '.join(run.name for run in side) for side in sides]
    for decoding in 'greedy', 'beam':
        ending, column = DECODINGS[decoding]
        if not all(run.results.get(run.split + ending) for run in compared):
            continue
        more, (low, high) = paired_bootstrap(*sides, column)
        verdict = 'no significant difference'
        if low > 0 or high < 0:
            verdict = f'{names[0] if low > 0 else names[1]} is better'
        print(f'paired bootstrap, {decoding}: {names[1]} has {more:+.2f} points of WER '
              f'(95 %: {low:+.2f} to {high:+.2f}): {verdict}')


# ---- pictures ------------------------------------------------------------------------------------

# Colours that colour-blind readers tell apart (Okabe & Ito 2008).
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
PHASE_COLOURS = {'uniform': '#999999', 'constant': '#E69F00', 'learning': '#56B4E9',
                 'learnt': '#009E73'}
LINE_STYLES = ('-', '--', ':', '-.')


def load_pyplot():
    """matplotlib.pyplot, which draws into files only. Raises RunError where it is not
    installed."""
    try:
        import matplotlib
    except ImportError:
        raise RunError('--plot needs matplotlib, which is not installed; install it with '
                       'python -m pip install matplotlib') from None
    matplotlib.use('agg')
    from matplotlib import pyplot
    pyplot.rcParams.update({'font.size': 9, 'axes.spines.top': False, 'axes.spines.right': False,
                            'axes.prop_cycle': pyplot.cycler(color=COLOURS),
                            'legend.frameon': False,
                            'text.parse_math': False})  # a $ in a text or a name is a $
    return pyplot


def save_picture(figure, path: str) -> None:
    """Write a figure in the format of the path's suffix. Raises RunError."""
    if not Path(path).suffix:
        raise RunError(f'--plot {path}: has no suffix; name a .png, .svg or .pdf file')
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise RunError(f'--plot {path}: cannot be written ({error}); name a .png, .svg or .pdf '
                       'file in a folder that exists') from None


def logarithmic(axes) -> None:
    """A logarithmic axis whose ticks are plain numbers."""
    axes.set_yscale('log')
    axes.yaxis.set_major_formatter('{x:g}')
    axes.yaxis.get_minor_locator().set_params(subs=(2, 5))
    axes.yaxis.set_minor_formatter('{x:g}')
    axes.tick_params(axis='y', which='minor', labelsize=7)


def short_name(run: Run) -> str:
    """A run's name in a picture."""
    return Path(run.name).resolve().name


def plot_losses(axes, runs: Sequence[Run]) -> None:
    """Training and validation losses, and the two plateau lines of the first run's data."""
    for run, colour in zip(runs, itertools.cycle(COLOURS)):
        epochs = [record['epoch'] for record in run.log]
        axes.plot(epochs, [record['train_loss'] for record in run.log], '--', color=colour,
                  label=f'{short_name(run)}, training')
        if 'valid_loss' in run.log[0]:
            axes.plot(epochs, [record['valid_loss'] for record in run.log], color=colour,
                      label=f'{short_name(run)}, validation')
    names = 'uniform: all symbols equally likely', 'constant: best output that ignores the sound'
    for name, loss in zip(names, runs[0].config['plateaus']):
        axes.axhline(loss, color='0.5', linestyle=':', linewidth=1)
        axes.annotate(f'{name}, {loss:.2f}', (1, loss), (-2, 3), ha='right',
                      xycoords=('axes fraction', 'data'), textcoords='offset points')
    logarithmic(axes)
    axes.set_ylabel('CTC loss (nats per label)')
    axes.legend(loc='lower left')


def plot_phases(axes, runs: Sequence[Run]) -> None:
    """A bar for each run, coloured by its phases."""
    for row, run in enumerate(runs):
        for record in run.log:
            axes.barh(row, 1, left=record['epoch'] - 0.5, height=0.8,
                      color=PHASE_COLOURS[record['phase']])
    axes.set_yticks(range(len(runs)), [short_name(run) for run in runs])
    axes.set_ylim(len(runs) - 0.5, -0.5)
    for phase, colour in PHASE_COLOURS.items():
        axes.barh(0, 0, color=colour, label=phase)
    axes.legend(ncols=4, loc='lower center', bbox_to_anchor=(0.5, 1), columnspacing=1,
                title='phase of each epoch')
    axes.spines[:].set_visible(False)


def plot_error_rates(axes, runs: Sequence[Run]) -> None:
    """Validation WER by epoch."""
    for run, colour in zip(runs, itertools.cycle(COLOURS)):
        scored = [record for record in run.log if 'wer' in record]
        axes.plot([record['epoch'] for record in scored], [record['wer'] for record in scored],
                  color=colour)
        if scored:
            last = scored[-1]
            axes.annotate(f'{short_name(run)}: {last["wer"]:.1f} %', (last['epoch'], last['wer']),
                          (0, 6), textcoords='offset points', ha='right', color=colour)
    axes.set_ylim(bottom=0)
    axes.set_ylabel('validation WER (%)')


def plot_gradients(axes, runs: Sequence[Run]) -> None:
    """Mean gradient norms by part of the network."""
    for run, colour in zip(runs, itertools.cycle(COLOURS)):
        for part, style in zip(run.log[0]['grad_parts'], itertools.cycle(LINE_STYLES)):
            axes.plot([record['epoch'] for record in run.log],
                      [max(record['grad_parts'][part], 1e-9) for record in run.log], style,
                      color=colour)
    for part, style in zip(runs[0].log[0]['grad_parts'], itertools.cycle(LINE_STYLES)):
        axes.plot([], [], style, color='black', label=part)
    logarithmic(axes)
    axes.set_ylabel('gradient norm (nats per label)')
    axes.legend()


def plot_words(axes, runs: Sequence[Run]) -> None:
    """What was said and heard in the longest sentence that all runs scored, if there is one."""
    axes.axis('off')
    texts = [{(file, said): heard for file, said, heard, *_ in run.sentences} for run in runs]
    shared = set(texts[0]).intersection(*texts)
    if not shared:
        return
    longest = max(sorted(shared), key=lambda sentence: len(sentence[1]))
    lines = [('one sentence, said', longest[1])]
    lines += [(f'heard, {short_name(run)}', heard[longest] or '(nothing)')
              for run, heard in zip(runs, texts)]
    width = max(len(name) for name, _ in lines)
    colours = itertools.chain(['black'], itertools.cycle(COLOURS))
    for row, ((name, text), colour) in enumerate(zip(lines, colours)):
        axes.text(0, 1 - row / len(lines), f'{name:>{width}}: {text[:100]}', color=colour,
                  family='monospace', va='top')


def plot_runs(runs: Sequence[Run], path: str) -> None:
    """Draw runs on the same axes: losses, phases, WER, gradient norms. Raises RunError."""
    for run in runs:
        if not run.log:
            raise RunError(f'--plot: {run.name} has no epochs to draw, for nothing was trained '
                           'there; leave it out')
    pyplot = load_pyplot()
    bars = 0.2 * len(runs)
    figure, axes = pyplot.subplot_mosaic(
        [['loss', 'wer'], ['loss', 'gradients'], ['phases', 'gradients'], ['words', 'words']],
        figsize=(10, 5.5 + bars), height_ratios=[3, 2, 0.5 + bars, 0.3 + bars],
        layout='constrained')
    plot_losses(axes['loss'], runs)
    plot_phases(axes['phases'], runs)
    plot_error_rates(axes['wer'], runs)
    plot_gradients(axes['gradients'], runs)
    plot_words(axes.pop('words'), runs)
    epochs = max(record['epoch'] for run in runs for record in run.log)
    for panel in axes.values():
        panel.set_xlim(0.5, epochs + 0.5)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_xlabel('epoch')
    save_picture(figure, path)
    print(f'{path}: losses, phases, error rates and gradients of {len(runs)} runs')


# ---- python monitor.py ---------------------------------------------------------------------------

def print_lines(outputs: int, labels: int, vocab_size: int) -> None:
    """Print both plateau lines without a run. Raises RunError."""
    try:
        uniform, constant = lines_of_lengths(outputs, labels, vocab_size)
    except ValueError as error:
        raise RunError(f'--lines: {error}') from None
    print(f'{uniform:.2f} nats a label: every symbol equally likely, where training starts\n'
          f'{constant:.2f} nats a label: the best output that ignores the sound; a loss that stays '
          'near it has learnt nothing\n'
          f'of {labels} labels in {outputs} outputs, {vocab_size} symbols with the blank, as '
          'frequent as the letters of English;\nwhere the loss is a sum over labels, as '
          f"reduction='none' gives it: {uniform * labels:.1f} and {constant * labels:.1f} an "
          'utterance')


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description='Read a run: a table by epoch, warnings, its phase, how to go on. Or compare '
                    'several: settings that differ, scores, their spread; for two, a paired '
                    'bootstrap.')
    parser.add_argument('run', nargs='*', help='run folder of train.py')
    parser.add_argument('--lines', nargs=3, type=int, metavar=('T', 'L', 'V'),
                        help='the plateau lines of T outputs, L labels, V symbols with the blank')
    parser.add_argument('--plot', metavar='FILE',
                        help='draw the runs into a .png, .svg or .pdf file; needs matplotlib')
    args = parser.parse_args(argv)
    if not args.run and not args.lines:
        parser.error('name run folders of train.py, or give --lines T L V')
    with one_line_ends('monitor.py'):
        sys.exit(report(args))


def report(args: argparse.Namespace) -> bool:
    """Print what the flags ask for -> whether a run could not be read."""
    runs = []
    folders = {os.path.realpath(folder): folder for folder in args.run}  # each once
    for folder in folders.values():
        try:
            runs.append(read_run(folder))
        except RunError as error:
            print(f'monitor.py: {error}', file=sys.stderr)
    try:
        if args.plot is not None and not args.run:
            raise RunError('--plot draws runs; name one')
        if args.lines:
            print_lines(*args.lines)
        if len(runs) > 1:
            print_comparison(runs)
        elif runs:
            print_run(runs[0])
        if args.plot is not None and runs:
            plot_runs(runs, args.plot)
    except RunError as error:
        sys.exit(f'monitor.py: {error}')
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        names = ' or '.join(run.name for run in runs)
        sys.exit(f'monitor.py: {names} lacks what train.py writes ({error!r}); leave it out')
    return len(runs) < len(folders)


if __name__ == '__main__':
    main()
