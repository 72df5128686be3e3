"""What a run says about itself: gradients, outputs, the two plateaus of CTC, word error rate, and its diseases by name.

A stuck CTC model sits on one of two lines, both known before training, in nats per label:
    uniform    every symbol equally likely in every frame; an untrained network starts here
    constant   the best output that ignores its input: mostly blank, the rest by letter frequency (about 2.9 for
               English); a falling loss that ends here has learnt nothing from the sound
Reference: Graves et al. 2006 (CTC). Input dependence is the mutual information between frame and output.
"""
import argparse
import json
import math
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F

UNIFORM_ENTROPY = 0.95   # of ln V, a batch's mean entropy: above, the batch counts as uniform
IGNORED = 0.05           # share of a healthy input dependence
PARTS = ('backbone', 'recurrent', 'head')
VANISHED = 1e-3          # a part's gradient norm, as a share of the largest part's
EXPLODED = 1e3           # a part's gradient norm
CLEAR = '\x1b[K'  # ANSI escape: erase to the end of the line


# ---- errors -------------------------------------------------------------------------------------------------------

def edit_counts(reference, hypothesis):
    """Substitutions, insertions, deletions of a cheapest alignment of two sequences (Levenshtein 1966)."""
    row = [(j, 0, j, 0) for j in range(len(hypothesis) + 1)]  # (cost, S, I, D) of turning reference[:i] into [:j]
    for i, r in enumerate(reference, 1):
        previous, row = row, [(i, 0, 0, i)]
        for j, h in enumerate(hypothesis, 1):
            c, s, n, d = previous[j - 1]
            best = (c, s, n, d) if r == h else (c + 1, s + 1, n, d)
            c, s, n, d = row[j - 1]
            best = min(best, (c + 1, s, n + 1, d))
            c, s, n, d = previous[j]
            row.append(min(best, (c + 1, s, n, d + 1)))
    return row[-1][1:]


def error_rates(references, hypotheses):
    """Word and character error rates in per cent, errors pooled over all utterances: (S + I + D) / reference length.
    interval: the middle 95 % of the WERs of 1,000 bootstrap samples of as many utterances (Bisani & Ney 2004)."""
    pairs = list(zip(references, hypotheses))
    counts = torch.tensor([(*edit_counts(r.split(), h.split()), len(r.split())) for r, h in pairs])
    s, i, d, words = counts.sum(0).tolist()
    characters = sum(sum(edit_counts(r, h)) for r, h in pairs)
    draws = torch.randint(len(counts), (1000, len(counts)), generator=torch.Generator().manual_seed(0))
    rates = torch.stack([100 * sample[:3].sum() / sample[3] for sample in (counts[draw].sum(0) for draw in draws)])
    return {'wer': 100 * (s + i + d) / words, 'interval': rates.quantile(torch.tensor([0.025, 0.975])).tolist(),
            'cer': 100 * characters / sum(map(len, references)), 'substitutions': s, 'insertions': i, 'deletions': d,
            'words': words, 'utterances': len(references)}


# ---- the two plateaus ---------------------------------------------------------------------------------------------

def plateau_lines(targets, lengths, vocab_size):
    """The losses, in nats per label, of a uniform output and of the best constant one, by F.ctc_loss itself; best
    over the blank's share, the rest by letter frequency (free letter shares gain less than 2 % more).
    targets: lists of symbols; lengths: their output frames, (N,). Of up to 500 utterances, those count that have labels
    and frames enough; nan where none has."""
    some = slice(None, None, math.ceil(len(targets) / 500))
    targets, lengths = targets[some], lengths[some]
    letters = Counter(s for target in targets for s in target)
    frequency = torch.tensor([letters[s] for s in range(vocab_size)], dtype=torch.float64)
    frequency /= frequency.sum()
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(t) for t in targets], batch_first=True)
    target_lengths = torch.tensor([len(t) for t in targets])

    def loss(distribution):
        frames = distribution.clamp_min(1e-30).log().expand(int(lengths.max()), len(targets), vocab_size)
        losses = F.ctc_loss(frames, padded, lengths, target_lengths, reduction='none') / target_lengths
        return losses[losses.isfinite()].mean().item()

    def constant(blank):
        return loss(torch.cat([torch.tensor([blank], dtype=torch.float64), frequency[1:] * (1 - blank)]))

    return loss(torch.full_like(frequency, 1 / vocab_size)), min(constant(share / 50) for share in range(50))


def way(loss, lines):
    """Share of the way from the uniform line (0) to the constant one (1). Reaching 1 is not learning; passing it is."""
    return (lines[0] - loss) / (lines[0] - lines[1])


# ---- gradients and outputs ----------------------------------------------------------------------------------------

class Gradients:
    """Norms before clipping, in all and by part, over an epoch's updates."""

    def __init__(self, network):
        self.groups = {part: [] for part in PARTS}  # the backbone has all that is before the LSTM
        for name, parameter in network.named_parameters():
            part = name.split('.')[0]
            self.groups[part if part in self.groups else 'backbone'].append(parameter)
        self.reset()

    def reset(self):
        self.norms = {part: [] for part in (*self.groups, 'norm')}  # 'norm': of all parts together
        self.clipped, self.nonfinite, self.updates = 0, 0, 0

    def clip(self, maximum):
        """Record the norms, then scale all gradients to the total norm `maximum` if above (0: leave them).
        False where the norm is not finite: the update must be left out."""
        norms = {part: torch.nn.utils.get_total_norm([p.grad for p in group]) for part, group in self.groups.items()}
        total = torch.stack(list(norms.values())).norm()
        self.updates += 1
        if not torch.isfinite(total):
            self.nonfinite += 1
            return False
        for part, norm in (norms | {'norm': total}).items():
            self.norms[part].append(norm.item())
        if maximum and total > maximum:
            self.clipped += 1
            torch.nn.utils.clip_grads_with_norm_(sum(self.groups.values(), []), maximum, total)
        return True

    def report(self):
        """Mean norm in all and by part, share of clipped updates, number of non-finite ones."""
        mean = {f'grad_{part}': sum(norms) / max(1, len(norms)) for part, norms in self.norms.items()}
        return mean | {'grad_norm_max': max(self.norms['norm'], default=0), 'nonfinite': self.nonfinite,
                       'clipped': self.clipped / max(1, self.updates)}


def letter_entropy(targets):
    """Entropy of the targets' symbols in nats: 2.8 for English letters and the space."""
    counts = Counter(s for target in targets for s in target)
    return -sum(c / counts.total() * math.log(c / counts.total()) for c in counts.values())


class Outputs:
    """Statistics of log-probabilities over an epoch's valid frames."""

    def __init__(self, vocab_size, letters):
        self.vocab_size, self.letters = vocab_size, letters  # letters: letter_entropy of the transcripts
        self.reset()

    def reset(self):
        self.frames = self.entropy = self.dependence = self.blanks = self.emitted = self.characters = self.uniform = 0

    @torch.no_grad()
    def add(self, log_probs, lengths, target_lengths):
        """log_probs (B, T', V) with their lengths (B,), and the references' lengths in characters (B,)."""
        valid = torch.arange(log_probs.shape[1], device=lengths.device) < lengths[:, None]  # (B, T')
        frames = log_probs[valid]  # (N, V)
        probabilities = frames.exp()
        entropy, mean = -(probabilities * frames).sum(1), probabilities.mean(0)
        best = log_probs.argmax(2).masked_fill(~valid, 0)
        self.frames += len(frames)
        self.entropy += entropy.sum().item()
        self.uniform += int(entropy.mean() > UNIFORM_ENTROPY * math.log(self.vocab_size))
        self.blanks += (frames.argmax(1) == 0).sum().item()
        self.emitted += ((best != F.pad(best[:, :-1], (1, 0))) & (best != 0)).sum().item()
        self.characters += int(target_lengths.sum())
        # H(mean p) - mean H(p) in the batch: over an epoch, a constant output that drifts would not score 0.
        marginal = -(mean * mean.clamp_min(1e-30).log()).sum()
        self.dependence += len(frames) * (marginal - entropy.mean()).item()

    def report(self):
        """entropy: mean over frames, as a share of ln V. blank: share of frames whose best symbol is the blank.
        input_dependence: H(mean p) - mean H(p) by batch, in nats, 0 for an output that ignores its input;
        dependence_share: the same as a share of h(L/T) + L/T * H(letters), what giving each label one frame would
        show, h the binary entropy (up to its top at L/T = 0.5). emitted: symbols decoded per reference character.
        uniform_batches: those with a mean entropy above 0.95 ln V."""
        n = max(1, self.frames)
        dependence, rate = self.dependence / n, min(0.5, max(1e-6, self.characters / n))
        healthy = rate * (self.letters - math.log(rate)) - (1 - rate) * math.log(1 - rate)
        return {'entropy': self.entropy / n / math.log(self.vocab_size), 'blank': self.blanks / n,
                'input_dependence': dependence, 'dependence_share': dependence / healthy,
                'emitted': self.emitted / max(1, self.characters), 'uniform_batches': self.uniform}


def diagnose(record):
    """One epoch's record of the log -> its diseases in words, none for a healthy epoch."""
    warnings = []
    if record['nonfinite']:
        warnings.append(f"{record['nonfinite']} updates left out: gradients not finite; lower --learning_rate")
    if record['train_loss'] < -1e-4:
        warnings.append('negative CTC loss: the outputs are no log-probabilities, or the blank is among the targets')
    largest = max(record[f'grad_{part}'] for part in PARTS)
    for part in PARTS:
        norm = record[f'grad_{part}']
        if norm < VANISHED * largest:
            warnings.append(f'vanishing gradient in the {part}: norm {norm:.1e}, elsewhere {largest:.1e}; '
                            'look at the initialisation')
        elif norm > EXPLODED:
            warnings.append(f'exploding gradient in the {part}: norm {norm:.1e}; lower --learning_rate')
    if record['uniform_batches']:
        warnings.append(f"uniform output in {record['uniform_batches']} batches: nothing learnt there yet")
    if record['dependence_share'] < IGNORED and record['entropy'] < UNIFORM_ENTROPY:
        warnings.append(f"output ignores the input: {record['train_way']:.0%} of the way from uniform to constant "
                        'output, the second plateau')
    if record['blank'] > 0.99:
        warnings.append(f"blank collapse: {record['blank']:.1%} of the frames are blank, {record['emitted']:.0%} of "
                        'the characters emitted')
    return warnings


# ---- the report ---------------------------------------------------------------------------------------------------

def progress(update, updates, loss, seconds):
    """A live line on a terminal: updates done and to do in all, the epoch's loss so far, time left at seconds each."""
    if sys.stderr.isatty():
        left = int(seconds * (updates - update))
        print(f'\rupdate {update}/{updates}  loss {loss:.3f}  {left // 60} min {left % 60:02d} s left',
              end=CLEAR, file=sys.stderr, flush=True)


def line(record):
    """A record of the log -> a line, the epoch's warnings beneath; the way is that from uniform to constant output."""
    valid = '  valid {valid_loss:.3f}  WER {wer:.1f} %  CER {cer:.1f} %' if 'wer' in record else ''
    text = ('epoch {epoch:3d}  {train_seconds:4.0f} s  loss {train_loss:.3f}, {train_way:.0%} of the way' + valid
            + '  gradient {grad_norm:.2f}  blank {blank:.0%}  dependence {dependence_share:.2f}').format(**record)
    return '\n    ! '.join([text, *record['warnings']])


def report(record, sentence):
    """The terminal's lines for one epoch; sentence: (index, said, heard, strip), or None without validation."""
    print(('\r' + CLEAR if sys.stderr.isatty() else '') + line(record))
    if sentence:
        print('     said {1}\n    heard {2}\n          {3}'.format(*sentence), flush=True)


def remarks(wave, rate):
    """What ails a recording (S,) that can be read, in words."""
    size = wave.abs()
    flat = size >= 0.9999 * size.max()
    if rate < 16000:
        yield f'sampled at {rate} Hz: of the band up to 8000 Hz, all above {rate // 2} Hz is missing'
    if size.max() < 0.003:
        yield 'near-silent, nowhere above -50 dB of full scale'
    elif (flat[2:] & flat[1:-1] & flat[:-2]).sum() >= 5:
        yield 'clipped, the peaks are flat'


def describe(train, valid, targets, alphabet, outputs):
    """Print what a corpus holds: utterances for training (at least one) and validation, the former's targets in
    symbols of the alphabet and their output frames."""
    lengths = torch.tensor([u.duration for u in train])
    counts = Counter(''.join(u.text for u in train))
    unseen = {w for u in valid for w in u.text.split()} - {w for u in train for w in u.text.split()}
    uniform, constant = plateau_lines(targets, outputs, len(alphabet))
    speakers = len({u.speaker for u in train} - {''}) or 'unknown'
    print(f'training    {len(train)} utterances, {lengths.sum() / 3600:.2f} hours, speakers: {speakers}')
    print('seconds    ', *(f'{q:.0%}: {lengths.quantile(q):.1f}' for q in (0, 0.1, 0.5, 0.9, 1)))
    print(f'alphabet    {len(alphabet) - 1} characters:', *map(repr, alphabet[1:]))
    print('rare        ', ', '.join(f'{c!r} {n} times' for c, n in sorted(counts.items()) if n < 10) or 'none')
    print(f'labels      {sum(map(len, targets)) / lengths.sum():.1f} a second')
    print(f'plateaus    in nats per label: uniform output {uniform:.2f}, constant output {constant:.2f}')
    print(f'validation  {len(valid)} utterances; {len(unseen)} of their words are not in training:', *sorted(unseen))


def advice(log):
    """The records of a log.jsonl -> where it ended and how to go on, in words."""
    last = log[-1]
    if 'wer' in last:
        best = min(reversed(log), key=lambda r: (r['wer'], r['cer']))
        yield f"best epoch {best['epoch']} of {len(log)}: WER {best['wer']:.2f} %, CER {best['cer']:.2f} %"
    if last['dependence_share'] < IGNORED:
        mend = 'the plateau was never left. Can it learn ten utterances (train.py --overfit 10)?'
    elif last['nonfinite'] or (last['clipped'] > 0.9 and last['train_way'] < 1.1):
        mend = 'updates are lost or cut; halve --learning_rate'
    elif not last.get('wer'):
        mend = 'without validation, or errors in it, nothing tells; take another --valid_data'
    elif last['valid_loss'] > 2 * last['train_loss']:
        mend = 'training is learnt better than validation; more data, a higher --dropout, more --epochs'
    else:
        mend = 'still learning; a new run with more --epochs (the learning rate of this one has ended)'
    yield 'how to go on: ' + mend


def main(argv=None):
    parser = argparse.ArgumentParser(description='Read runs: a table by epoch, warnings, the best epoch, how to go on.')
    parser.add_argument('run', nargs='+', help='run folder of train.py')
    failed = False
    for run in parser.parse_args(argv).run:
        try:
            log = [json.loads(line) for line in (Path(run) / 'log.jsonl').read_text().splitlines()]
            print(run, *map(line, log), *advice(log), sep='\n')
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            print(f'monitor.py: {run}: holds no whole log.jsonl of train.py ({error!r})', file=sys.stderr)
            failed = True
    sys.exit(failed)


if __name__ == '__main__':
    main()
