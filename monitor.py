"""What a run says about itself: CTC's two plateaus, gradients, outputs, and what is wrong by name.

    python monitor.py RUN               a run by epochs, its warnings, its phase, what to try first
    python monitor.py RUN RUN ...       what differs between runs, their scores and spread
    python monitor.py RUN ... --plot p.png   their losses, errors and gradients as a picture
    python monitor.py --lines 250 12 28 the plateau lines of 250 outputs, 12 labels, 28 symbols

A stuck CTC model sits on one of two lines, both known before training, in nats per label:

    uniform    every symbol equally likely in every output; an untrained network starts here
    constant   the best output that ignores its input: mostly blank, the rest by letter frequency
               (about 2.9 for English); a falling loss that ends here has learnt nothing

Nothing here needs the other modules: copy this file beside any training loop. check_ctc finds what
is wrong with a batch of any CTC model; plateau_lines, gradient_norms, output_figures and
error_rates watch its training.

All that is watched is kept as plain numbers: a history is {name: [a number for each update of the
run so far]}, of names such as 'train_loss', 'blank', 'gradient.head'. What is said of plateaus,
gradients and outputs is computed from it afterwards, so nothing has to be reset, and a resumed run
only gets its lists back.

References: Graves et al. 2006 (CTC); Levenshtein 1966 (edit distance); Bisani & Ney 2004
(bootstrap).
"""
import argparse
import contextlib
import itertools
import json
import math
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

UNIFORM_ENTROPY = 0.95   # of ln V, the outputs' mean entropy: above, they count as uniform
IGNORED = 0.05           # share of a healthy dependence on the sound: below, it is ignored
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

Lines = tuple[float, float]  # losses in nats per label: of a uniform and of a constant output


# ---- the two plateaus ----------------------------------------------------------------------------

def outputs_needed(symbols: Sequence) -> int:
    """The smallest number of outputs with which CTC can emit these symbols, or characters.

    One for each, and a blank between equal neighbours (Graves et al. 2006, section 3.1).
    """
    return len(symbols) + sum(a == b for a, b in zip(symbols, symbols[1:]))


def plateau_lines(targets: Sequence[Sequence[int]], lengths: Tensor,
                  vocab_size: int, blank: int = 0) -> Lines:
    """The losses, in nats per label, of a uniform output and of the best constant one.

    targets: symbols by utterance; lengths: outputs by utterance, (N,). Both lines come from
    F.ctc_loss itself. The second is the best over the labels' share, of which each label gets what
    its frequency in the texts is, and the blank the rest (shares that are free gain less than 2 %
    more). Up to 500 utterances count, fewer where they are long, of those that have labels and
    enough outputs for them; nan where none has.
    """
    possible = [(target, length) for target, length in zip(targets, lengths.tolist())
                if 0 < outputs_needed(target) <= length]
    if not possible:
        return math.nan, math.nan
    possible = possible[::math.ceil(max(len(possible) / 500, int(lengths.sum()) / 200_000))]
    symbols = torch.tensor(list(itertools.chain(*targets)))
    frequency = torch.bincount(symbols, minlength=vocab_size) / len(symbols)

    def loss(distribution, utterances):
        texts, outputs = zip(*utterances)
        log_probs = distribution.clamp_min(1e-30).log()
        return F.ctc_loss(log_probs.expand(max(outputs), len(texts), vocab_size),
                          torch.tensor(list(itertools.chain(*texts))), outputs,
                          tuple(map(len, texts)), blank).item()

    def constant(share, utterances):
        distribution = share * frequency
        distribution[blank] = 1 - share
        return loss(distribution, utterances)

    # On a log scale: with many outputs a label the best share is far below a hundredth. That of 16
    # utterances is nearly that of all.
    shares = torch.logspace(-5, 0, 61)
    best = min(shares, key=lambda share: constant(share, possible[::len(possible) // 16 + 1]))
    return loss(torch.full((vocab_size,), 1 / vocab_size), possible), constant(best, possible)


def plateau_fraction(loss: float, lines: Lines) -> float:
    """How far a loss has come from the uniform line, 0, to the constant one, 1.

    Reaching 1 is not learning; passing it is.
    """
    uniform, constant = lines
    return (uniform - loss) / max(uniform - constant, 1e-9)  # they may be equal where V is 2


def plateaus_left(losses: Sequence[float], lines: Lines) -> dict[str, int | None]:
    """The updates at which a run left each plateau, None where it has not yet.

    losses: of every update so far. The uniform plateau is left when the mean of the last 20 losses
    is closer to the constant line than to the uniform one, the constant one when that mean is below
    90 % of its line.
    """
    means = [sum(losses[i - WINDOW:i]) / WINDOW for i in range(WINDOW, len(losses) + 1)]

    def first_below(limit):
        return next((update for update, loss in enumerate(means, WINDOW) if loss < limit), None)

    return {'left_uniform': first_below(sum(lines) / 2),
            'left_constant': first_below(LEFT * lines[1])}


# ---- gradients and outputs -----------------------------------------------------------------------

def gradient_norms(network: nn.Module) -> dict[str, Tensor]:
    """The norm of the gradients of each of the network's children, and of them together:
    {'gradient.NAME': ..., 'gradient': ...}."""
    norms = {}
    for name, child in network.named_children():
        gradients = [p.grad for p in child.parameters() if p.grad is not None]
        if gradients:
            norms[f'gradient.{name}'] = nn.utils.get_total_norm(gradients)
    return norms | {'gradient': torch.stack(list(norms.values())).norm()}


def letter_entropy(targets: Iterable[Sequence[int]]) -> float:
    """Entropy of the targets' symbols in nats: 2.8 for English letters and the space."""
    symbols = torch.tensor(list(itertools.chain(*targets)))
    return torch.special.entr(torch.bincount(symbols) / len(symbols)).sum().item()


def valid_frames(frames: int, lengths: Tensor) -> Tensor:
    """The mask (B, frames) that is true within each clip's length (B,), false in its padding."""
    return torch.arange(frames, device=lengths.device) < lengths[:, None]


@torch.no_grad()
def output_figures(log_probs: Tensor, lengths: Tensor, target_lengths: Tensor, letters: float,
                   blank: int = 0) -> dict[str, float]:
    """What a batch's outputs (B, T', V) are like; log_probs of clips of lengths (B,).

    target_lengths: of the transcripts, in labels (B,); letters: their letter_entropy, in nats.

    entropy    mean over outputs, as a share of ln V
    blank      share of outputs whose best symbol is the blank
    sound      how much the outputs depend on the sound: their mutual information with it, as a
               share of h(r) + r * H(letters), which giving each label one output would show
               (r: labels an output, up to 0.5, where h, the binary entropy, has its top)
    """
    probabilities = log_probs[valid_frames(log_probs.shape[1], lengths)].exp()     # (N, V)
    entropy = torch.special.entr(probabilities).sum(1).mean().item()
    r = min(0.5, max(1, int(target_lengths.sum())) / len(probabilities))
    one_output_a_label = r * (letters - math.log(r)) - (1 - r) * math.log(1 - r)
    # H(mean p) - mean H(p) is the mutual information of output and symbol.
    marginal = torch.special.entr(probabilities.mean(0)).sum().item()
    return {'entropy': entropy / math.log(log_probs.shape[2]),
            'blank': (probabilities.argmax(1) == blank).double().mean().item(),
            'sound': (marginal - entropy) / one_output_a_label}


def epoch_summary(history: Mapping[str, Sequence[float]], updates: int) -> dict:
    """The means over a run's last updates, an epoch's, of all that was watched -> keys of the log.

    And which parts of the network have gradients that are wrong:

    vanished    norms stayed, for 20 updates, below a hundredth of their early median
    exploded    norms had, over 20 updates, a median above ten times that

    Norms are held against those of the run's own first 50 updates. Fixed limits would depend on the
    loss: summed over a batch and not averaged, it has gradients as many times larger as the batch
    has utterances and each of them labels.
    """
    summary = {name: mean(values[-updates:]) for name, values in history.items()}
    wrong = {'vanished': [], 'exploded': []}
    for name in gradient_parts(history):
        judged = history[name][EARLY:][-updates - WINDOW + 1:]
        if len(judged) < WINDOW:
            continue
        windows = np.lib.stride_tricks.sliding_window_view(judged, WINDOW)
        early = median(history[name][:EARLY])
        if (windows.max(1) < VANISHED * early).any():
            wrong['vanished'].append(name)
        if (np.median(windows, 1) > EXPLODED * early).any():
            wrong['exploded'].append(name)
    return summary | wrong


def gradient_parts(record: Iterable[str]) -> list[str]:
    """The keys of a history, or of a record of the log, that are gradients of parts."""
    return [name for name in record if name.startswith('gradient.')]


# ---- error rates ---------------------------------------------------------------------------------

def edit_counts(reference: Sequence, hypothesis: Sequence) -> tuple[int, int, int, int]:
    """What turns a reference into a hypothesis: (errors, substitutions, insertions, deletions).

    Of the alignments with the fewest errors (Levenshtein 1966), one with the fewest substitutions.
    """
    error = 1 + len(reference)  # as one number, compared from the left: errors, substitutions
    row = [j * error for j in range(len(hypothesis) + 1)]  # of an empty reference
    for said in reference:
        before, row = row, [row[0] + error]
        for j, heard in enumerate(hypothesis):
            same = before[j] if said == heard else before[j] + error + 1
            row.append(min(same, before[j + 1] + error, row[j] + error))
    errors, substitutions = divmod(row[-1], error)
    longer = len(hypothesis) - len(reference)  # insertions less deletions
    insertions = (errors - substitutions + longer) // 2
    return errors, substitutions, insertions, insertions - longer


def bootstrap_interval(errors: Tensor, words: Tensor, samples: int = 1000) -> list[float]:
    """The middle 95 % of the word error rates of samples of as many utterances, in per cent.

    errors, words: (N,), by utterance (Bisani & Ney 2004).
    """
    draws = torch.randint(len(words), (samples, len(words)),
                          generator=torch.Generator().manual_seed(0))
    rates = 100 * errors[draws].sum(1) / words[draws].sum(1)
    return rates.quantile(torch.tensor([0.025, 0.975])).tolist()


def error_rates(references: Sequence[str], hypotheses: Sequence[str]) -> dict:
    """Word, character and sentence error rates in per cent, with counts and the WER's interval.

    (S + I + D) / reference length; errors are pooled over all utterances. A sentence is wrong if a
    word of it is. There must be a word to score.
    """
    edits = torch.tensor([edit_counts(r.split(), h.split())
                          for r, h in zip(references, hypotheses)])    # (N, 4)
    words = torch.tensor([len(r.split()) for r in references])
    errors, substitutions, insertions, deletions = edits.sum(0).tolist()
    character_errors = sum(edit_counts(r, h)[0] for r, h in zip(references, hypotheses))
    return {'wer': 100 * errors / int(words.sum()),
            'interval': bootstrap_interval(edits[:, 0], words),
            'cer': 100 * character_errors / sum(map(len, references)),
            'ser': 100 * int((edits[:, 0] > 0).sum()) / len(references),
            'substitutions': substitutions, 'insertions': insertions, 'deletions': deletions,
            'words': int(words.sum()), 'utterances': len(references)}


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
    loss, entropy, sound = judged_by(record)
    if sound < IGNORED and entropy > UNIFORM_ENTROPY:
        return 'uniform'
    if sound < IGNORED or loss > LEFT * constant:
        return 'constant'
    if loss > LEARNT * constant or before is None:
        return 'learning'
    falls = loss < judged_by(before)[0] - FALLING * constant
    return 'learning' if falls and before.get('phase') != 'learnt' else 'learnt'


def judged_by(record: Mapping) -> tuple[float, float, float]:
    """Loss, entropy and dependence on the sound, by validation where there is some."""
    return (record.get('valid_loss', record['train_loss']),
            record.get('valid_entropy', record['entropy']),
            record.get('valid_sound', record['sound']))


# ---- what is wrong -------------------------------------------------------------------------------

def gradient_warnings(record: Mapping) -> Iterator[str]:
    """What is wrong with an epoch's gradients, by part."""
    for part in record['exploded']:
        yield (f'exploding {part}: norm {record[part]:.1e}, over {EXPLODED} times that of the '
               f'first {EARLY} updates; lower --learning_rate')
    if record['phase'] not in ('uniform', 'constant'):
        return  # what has been learnt needs no gradient any more
    parts = gradient_parts(record)
    strongest = max(parts, key=record.get)
    for part in parts:
        evidence = ''
        if record[part] < UNREACHED * record[strongest]:
            evidence = f'norm {record[part]:.1e}, {strongest} has {record[strongest]:.1e}'
        if part in record['vanished']:
            evidence = f'for {WINDOW} updates below {VANISHED:.0%} of that of the first {EARLY}'
        if evidence:
            yield (f'vanishing {part}: {evidence}; check the initialisation of the layers above '
                   'that part')


def diagnose(record: Mapping) -> list[str]:
    """One epoch's record of the log -> what is wrong in words, each with a next step; [] if
    healthy."""
    warnings = []
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
        warnings.append(f'constant output, {record["blank"]:.1%} of it blank in training; usual '
                        'early on. If it stays, see what python monitor.py says of the run')
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
    if any(warning.startswith('vanishing') for warning in last['warnings']):
        return ('the gradient does not reach every part of the network; see the warning, and '
                'what initialises the layers above that part')
    if updates < FEW_UPDATES:
        return (f'{updates} updates are few: a plateau may last {FEW_UPDATES} and more; raise '
                '--epochs, or lower --batch_size')
    return (f'still on the plateau after {updates} updates, though gradients and steps are of a '
            'healthy size; can it learn ten utterances (train.py --overfit 10)? If so, give it '
            'fewer outputs a label (--frames_per_output)')


def next_step(log: Sequence[Mapping], config: Mapping) -> str:
    """What to try first after a run of these records of the log."""
    last = log[-1]
    stuck = last['phase'] in ('uniform', 'constant')
    unrelated = unrelated_lengths(config['length_correlation'])
    batch_norm = batch_norm_warning(last)
    if batch_norm:
        return batch_norm
    if stuck and unrelated:
        return unrelated
    if stuck and last['left_constant'] is not None:
        return ('the network fits the training utterances alone; get more of them, and check that '
                'each transcript belongs to its recording')
    if stuck:
        return stuck_reason(log)
    if last['clipped'] > 0.9 and plateau_fraction(last['train_loss'], config['plateaus']) < 1.1:
        return 'nearly all updates are clipped; halve --learning_rate'
    if 'wer' not in last:
        return 'there is no validation data; give --valid_data'
    if last['wer'] > 80 and last['cer'] < 25:
        return ('the letters are right and the words are not; is the space a symbol of its own, '
                'and not the blank?')
    if last['wer'] == 0:
        return 'there are no errors left to learn from; take harder --valid_data'
    if last['valid_loss'] > 2 * last['train_loss']:
        return ('training is learnt better than validation; get more data, or give a higher '
                '--dropout and, with it, more --epochs')
    return ('no warning applies; if the last epochs still improved, start a new run with more '
            '--epochs')


def explain(log: Sequence[Mapping], config: Mapping) -> Iterator[str]:
    """The records of a log.jsonl, the contents of config.json -> the phase, why, what to try."""
    last = log[-1]
    lines = config['valid_plateaus' if 'valid_loss' in last else 'plateaus']
    loss, entropy, sound = judged_by(last)
    yield (f'phase: {last["phase"]}; the loss has come {plateau_fraction(loss, lines):.0%} of the '
           f'way from the uniform to the constant line, the entropy is {entropy:.0%} of the '
           f'largest, the output depends on the sound {sound:.0%} as much as if each label had '
           'exactly one output')
    if 'deletions' in last:
        yield f'words left out: {last["deletions"]:.0%}'
    for line in 'uniform', 'constant':
        update = last[f'left_{line}']
        yield f'left the {line} plateau: ' + (f'at update {update}' if update else 'never')
    if 'wer' in last:
        best = best_epoch(log)
        yield (f"best epoch {best['epoch']} of {len(log)}: WER {best['wer']:.2f} %, "
               f"CER {best['cer']:.2f} %")
    yield f'how to go on: {next_step(log, config)}'


def best_epoch(log: Sequence[Mapping]) -> Mapping:
    """The record of the lowest validation WER; of equal ones that of the lowest CER, of those the
    last; without validation the last. best.pt holds it."""
    return min(reversed(log), key=lambda record: (record.get('wer', 0), record.get('cer', 0)))


# ---- a batch of anybody's network ----------------------------------------------------------------

@torch.no_grad()
def check_ctc(log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor,
              blank: int = 0, untrained: bool = False) -> list[str]:
    """What is wrong with a batch as F.ctc_loss takes it, in words, each with a next step.

    log_probs (T, B, V); targets (B, S), or (sum of target_lengths,); both lengths (B,). Shapes come
    first, then symbols, normalisation and lengths. Where all these are right, it is judged what the
    outputs have learnt, and [] means that the network has begun to; untrained: that is left out.
    """
    whole = []
    for name, value in (('targets', targets), ('input_lengths', input_lengths),
                        ('target_lengths', target_lengths)):
        whole.append(torch.as_tensor(value).cpu())
        if whole[-1].is_floating_point():
            return [f'{name} are not whole numbers; where lengths are shares of the longest, '
                    'multiply them by its number of outputs, and round']
    targets, input_lengths, target_lengths = whole
    log_probs = torch.as_tensor(log_probs).float().cpu()
    shape_fault = wrong_shape(log_probs, targets, input_lengths, target_lengths)
    if shape_fault:
        return [shape_fault]
    if not 0 <= blank < log_probs.shape[2]:
        return [f'blank is {blank}, and the symbols are 0 to {log_probs.shape[2] - 1}; give the '
                'one that the head has for it']
    if targets.dim() == 1:
        targets = nn.utils.rnn.pad_sequence(targets.split(target_lengths.tolist()), True)
    texts = [row[:n].tolist() for row, n in zip(targets, target_lengths.tolist())]
    if not any(texts):
        return ['no utterance has a label; give the transcripts']
    findings = [*check_symbols(texts, log_probs.shape[2], blank),
                *check_normalisation(log_probs, input_lengths),
                *check_lengths(log_probs, texts, input_lengths)]
    if findings or untrained:
        return findings
    loss = F.ctc_loss(log_probs, targets, input_lengths, target_lengths, blank).item()
    return list(check_outputs(log_probs.transpose(0, 1), texts, input_lengths, loss, blank))


def wrong_shape(log_probs: Tensor, targets: Tensor, input_lengths: Tensor,
                target_lengths: Tensor) -> str | None:
    """What is wrong with the arguments' shapes."""
    batch = target_lengths.numel()
    shape = tuple(log_probs.shape)
    if log_probs.dim() != 3 or log_probs.numel() == 0:
        return (f'log_probs has the shape {shape}, not (T, B, V); of one clip, take '
                'log_probs.unsqueeze(1)')
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
    in_rows = len(targets) == batch and targets[0].numel() >= target_lengths.max()
    if len(targets) != target_lengths.sum() if targets.dim() == 1 else not in_rows:
        return (f'targets has the shape {tuple(targets.shape)} for {batch} utterances of up to '
                f'{int(target_lengths.max())} labels; give (B, S), or all labels in one line')
    return None


def check_symbols(texts: Sequence[Sequence[int]], vocab_size: int, blank: int) -> Iterator[str]:
    """Targets that are not labels."""
    symbols = list(itertools.chain(*texts))
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
    outputs = log_probs.transpose(0, 1)[valid_frames(len(log_probs), input_lengths)]  # (N, V)
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
    missing = torch.tensor(list(map(outputs_needed, texts))) - input_lengths
    if missing.max() > 0:
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


def check_outputs(log_probs: Tensor, texts: Sequence[Sequence[int]], lengths: Tensor, loss: float,
                  blank: int) -> Iterator[str]:
    """Outputs (B, T, V) that have learnt nothing, by the loss, its two lines and the phase."""
    uniform, constant = plateau_lines(texts, lengths, log_probs.shape[2], blank)
    summary = output_figures(log_probs, lengths, torch.tensor(list(map(len, texts))),
                             letter_entropy(texts), blank)
    phase = name_phase(summary | {'train_loss': loss}, constant)
    where = (f'the loss is {loss:.2f} nats a label, that of a uniform output {uniform:.2f}, of the '
             f'best constant one {constant:.2f}')
    shared = log_probs[:, :int(lengths.min())].exp()
    alike = len(texts) > 1 and bool((shared - shared[:1]).abs().max() < 1e-4)
    if alike and loss > LEFT * constant:
        yield (f'every utterance gets the same outputs; {where}; see whether the sound reaches the '
               'network: inputs that are all zero, a layer that is dead or cut off')
    elif summary['sound'] > IGNORED and loss > constant:
        yield (f'the output depends on the sound, and yet {where}; check that each transcript '
               "belongs to its recording, and that blank and alphabet are the network's own")
    elif phase == 'uniform':
        yield (f'phase uniform: {where}; every network starts here; if it stays for hundreds of '
               'updates, raise the learning rate, or initialise the head with larger weights')
    elif phase == 'constant':
        yield (f'phase constant: the output makes no use of the sound ({where}); if it stays, '
               'see whether gradients reach the first layer and ten utterances can be learnt')


# ---- lines on the terminal -----------------------------------------------------------------------

def legend(lines: Lines) -> str:
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
    words = 'epoch {epoch:3d}  {seconds:4.0f} s  loss {train_loss:.3f}'
    if 'wer' in record:
        words += '  valid {valid_loss:.3f}  WER {wer:.1f} %  CER {cer:.1f} %'
    words += '  gradient {gradient:.2f}  blank {blank:.0%}  sound {sound:.0%}  {phase}'
    return '\n    ! '.join([words.format(**record), *record['warnings']])


def print_scores(results: Mapping[str, Mapping]) -> None:
    """Print {what was scored: error rates}, with what they are made of."""
    words = ('WER {wer:.2f} % ({substitutions} S, {insertions} I, {deletions} D in {words} words '
             'of {utterances} utterances; 95 %: {interval[0]:.1f} to {interval[1]:.1f}), '
             'CER {cer:.2f} %, sentences with errors {ser:.1f} %')
    for name, rates in results.items():
        print(f'{name}: {words.format(**rates)}')


# ---- reading and comparing runs ------------------------------------------------------------------

NO_SETTINGS = ('run_dir', 'device', 'workers', 'threads', 'undo', 'only', 'seed')  # of the flags


def read_run(folder: str | Path) -> dict:
    """What a run folder of train.py holds. Raises UserError.

    name, config (of config.json), log (the epochs' records; none of a checkpoint that was only
    scored), results ({what was scored: error rates}; none of a run at work), sentences ([file,
    said, heard, heard by beam search] of the split scored last).
    """
    folder = Path(folder)
    with error_at(folder):
        run = {'name': str(folder), 'config': json.loads((folder / 'config.json').read_text()),
               'log': list(map(json.loads, (folder / 'log.jsonl').read_text().splitlines())),
               'results': {}, 'sentences': []}
        if (folder / 'results.json').exists():
            run['results'] = json.loads((folder / 'results.json').read_text())
        for split in 'valid', 'test':
            if split in run['results']:
                lines = (folder / f'{split}.tsv').read_text(encoding='utf-8').split('\n')[1:-1]
                run['sentences'] = [line.split('\t') for line in lines]
    return run


def print_run(run: Mapping) -> None:
    """Print a run by epochs, and how to go on."""
    print(run['name'], *map(epoch_line, run['log']), sep='\n')
    if run['log']:
        print(*explain(run['log'], run['config']), sep='\n')
    print_scores(run['results'])


def word_errors(runs: Sequence[Mapping], column: int) -> Tensor:
    """Word errors (runs, utterances) of runs that scored the same; column: of their sentences, what
    was heard."""
    errors = []
    for run in runs:
        errors.append([edit_counts(sentence[1].split(), sentence[column].split())[0]
                       for sentence in run['sentences']])
    return torch.tensor(errors).float()


def print_comparison(runs: Sequence[Mapping]) -> None:
    """Print a table of runs, those together that differ by their seed alone: the WER of each, their
    mean (that of all their words), standard deviation and 95 % interval over utterances; of two
    groups, or of two runs, whether one is better. Raises UserError.
    """
    said = [[sentence[:2] for sentence in run['sentences']] for run in runs]
    for run, own in zip(runs, said):
        if not own or own != said[0]:
            raise UserError(f'{run["name"]}: not finished, or other recordings were scored')
    words = torch.tensor([len(text.split()) for _, text in said[0]])
    flags = [run['config']['flags'] for run in runs]
    differ = [name for name in flags[0] if name not in NO_SETTINGS
              and len({str(own.get(name)) for own in flags}) > 1]
    groups = {}
    for run, own in zip(runs, flags):
        name = ', '.join(f'{setting} {own.get(setting)}' for setting in differ)
        groups.setdefault(name, []).append(run)
    if len(runs) == 2:
        groups = {run['name']: [run] for run in runs}
    for decoding, column in ('greedy', 2), ('beam search', 3):
        print(f'{decoding}: WER of each run in %, mean, deviation, 95 % interval')
        errors = {name: word_errors(group, column) for name, group in groups.items()}
        for name, counts in errors.items():
            wers = 100 * counts.sum(1) / words.sum()
            low, high = bootstrap_interval(counts.mean(0), words)
            spread = f'{stdev(wers.tolist()):.2f}' if len(wers) > 1 else '    '
            print(*(f'{wer:6.2f}' for wer in wers), f'  {wers.mean():6.2f}  {spread}  '
                  f'{low:.1f} to {high:.1f}  {name}')
        if len(groups) == 2:
            print_difference(words, errors)


def print_difference(words: Tensor, errors: Mapping[str, Tensor]) -> None:
    """Print how much higher the second group's WER is, and whether that is chance: by 10,000
    samples of the utterances, the same for both (paired bootstrap, Bisani & Ney 2004)."""
    one, two = errors
    more = errors[two].mean(0) - errors[one].mean(0)
    low, high = bootstrap_interval(more, words, 10_000)
    verdict = 'no significant difference'
    if low > 0 or high < 0:
        verdict = f'{one if low > 0 else two} is better'
    print(f'paired bootstrap: {two} has {100 * more.sum() / words.sum():+.2f} points of WER '
          f'(95 %: {low:+.2f} to {high:+.2f}): {verdict}')


# ---- pictures ------------------------------------------------------------------------------------

# Colours that colour-blind readers tell apart (Okabe & Ito 2008).
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
PHASE_COLOURS = {'uniform': '#999999', 'constant': '#E69F00', 'learning': '#56B4E9',
                 'learnt': '#009E73'}


def load_pyplot():
    """matplotlib.pyplot, which draws into files only. Raises UserError where it is missing."""
    with error_at('matplotlib is needed (python -m pip install matplotlib)'):
        import matplotlib
    matplotlib.use('agg')
    from matplotlib import pyplot
    pyplot.rcParams.update({'font.size': 9, 'axes.spines.top': False, 'axes.spines.right': False,
                            'legend.frameon': False,
                            'text.parse_math': False})  # a $ in a text or a name is a $
    return pyplot


def plot_runs(runs: Sequence[Mapping], path: str) -> None:
    """Draw runs on the same axes: losses, with phases as dots and both plateaus, WER, gradient
    norms by part, and what each heard of the longest sentence. Raises OSError, ValueError."""
    if not all(run['log'] for run in runs):
        raise ValueError('a run has no epochs to draw')
    pyplot = load_pyplot()
    figure, (losses, wers, gradients) = pyplot.subplots(1, 3, figsize=(15, 5), layout='constrained')
    for run, colour in zip(runs, itertools.cycle(COLOURS)):
        epochs = [record['epoch'] for record in run['log']]
        keys = [(losses, 'valid_loss', '-'), (losses, 'train_loss', '--'), (wers, 'wer', '-')]
        keys += zip(itertools.repeat(gradients), gradient_parts(run['log'][0]),
                    itertools.cycle(['-', '--', ':', '-.']))
        for axes, key, style in keys:
            values = [record.get(key, math.nan) for record in run['log']]
            axes.plot(epochs, values, style, color=colour, label=f'{key}, {run["name"]}')
        losses.scatter(epochs, [judged_by(record)[0] for record in run['log']], zorder=3,
                       color=[PHASE_COLOURS[record['phase']] for record in run['log']])
    for loss, name in zip(runs[0]['config']['plateaus'], ('uniform', 'constant')):
        losses.axhline(loss, color='0.5', linestyle=':')
        losses.text(1, loss, f'{name} output: {loss:.2f}', va='bottom')
    for phase, colour in PHASE_COLOURS.items():
        losses.scatter([], [], color=colour, label=f'phase: {phase}')
    for axes, label, scale in ((losses, 'CTC loss, nats per label', 'log'),
                               (wers, 'validation WER, %', 'linear'),
                               (gradients, 'gradient norm, nats per label', 'log')):
        axes.set(xlabel='epoch', ylabel=label, yscale=scale)
        axes.yaxis.set_major_formatter('{x:g}')
        axes.legend(fontsize=7)
    figure.suptitle('\n'.join(longest_sentence(runs)), family='monospace', x=0, ha='left')
    figure.savefig(path, dpi=120)


def longest_sentence(runs: Sequence[Mapping]) -> list[str]:
    """What was said and heard of the longest sentence that a run scored, as lines."""
    lines = []
    for run in runs:
        _, said, heard, _ = max(run['sentences'], default=['', '', '', ''],
                                key=lambda sentence: len(sentence[1]))
        lines += [f'said   {said}', f'heard  {heard}  ({run["name"]})']
    return list(dict.fromkeys(lines))  # what was said once


# ---- how programs end ----------------------------------------------------------------------------

class UserError(Exception):
    """A user's input cannot be used; the message says where and why, in a line each."""


@contextlib.contextmanager
def error_at(where: object) -> Iterator[None]:
    """Readers raise what Python raises; this turns it into a UserError: 'where: what and why'."""
    try:
        yield
    except UserError as error:
        raise UserError(f'{where}: {error}') from error
    except Exception as error:
        reason = ' '.join(str(error).split())[:200]
        if not isinstance(error, (ValueError, OSError)):
            reason = f'{type(error).__name__}: {reason}'
        raise UserError(f'{where}: cannot be used ({reason})') from error


@contextlib.contextmanager
def one_line_ends(program: str, go_on: str = '') -> Iterator[None]:
    """End a program in one line where its user's input cannot be used, or it is interrupted.

    go_on: what to do after an interrupt (Ctrl-C or SIGTERM), in words. Characters that the terminal
    lacks are shown as numbers.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(f'{program}: stopped{go_on}')
    except (UserError, OSError) as error:
        # From a process that loads recordings, the error comes behind that process's traceback.
        sys.exit(f'{program}: {str(error).rpartition("UserError: ")[2].strip()}')
    finally:
        clear_status()


def clear_status() -> None:
    """Clear what a program shows of its progress on a terminal."""
    if sys.stderr.isatty():
        print('\r\x1b[K', end='', file=sys.stderr)


def number(kind: type, low: float, high: float = 1e9) -> Callable[[str], float]:
    """An argparse type: an int or a float from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise ValueError
        return value
    parse.__name__ = f'{kind.__name__} from {low:g} to {high:g}'
    return parse


# ---- python monitor.py ---------------------------------------------------------------------------

def print_lines(outputs: int, labels: int, vocab_size: int) -> None:
    """Print both plateau lines without a corpus: of texts of so many labels in so many outputs.

    The symbols are as frequent as English letters and the space; where there are more symbols, the
    rest are as rare as the rarest. Raises ValueError where the labels do not fit the outputs.
    """
    # The space and the letters, most frequent first, per 100 letters (Norvig 2013, "English letter
    # frequency counts: Mayzner revisited").
    english = [20.9, 12.49, 9.28, 8.04, 7.64, 7.57, 7.23, 6.51, 6.28, 5.05, 4.07, 3.82, 3.34, 2.73,
               2.51, 2.40, 2.14, 1.87, 1.68, 1.66, 1.48, 1.05, 0.54, 0.23, 0.16, 0.12, 0.09]
    shares = torch.tensor((english + english[-1:] * vocab_size)[:vocab_size - 1])
    texts = max(1, min(50, 1_000_000 // (outputs * labels)))
    draws = torch.multinomial(shares, texts * labels, replacement=True,
                              generator=torch.Generator().manual_seed(0))
    targets = (draws + 1).view(texts, labels).tolist()
    uniform, constant = plateau_lines(targets, torch.tensor([outputs] * texts), vocab_size)
    if math.isnan(uniform):
        raise ValueError(f'{labels} labels with their repeats do not fit {outputs} outputs')
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
    parser.add_argument('--lines', nargs=3, type=number(int, 1, 100_000), metavar=('T', 'L', 'V'),
                        help='the plateau lines of T outputs, L labels, V symbols with the blank')
    parser.add_argument('--plot', metavar='FILE',
                        help='draw the runs into a .png, .svg or .pdf file; needs matplotlib')
    args = parser.parse_args(argv)
    if not args.run and not args.lines:
        parser.error('name run folders of train.py, or give --lines T L V')
    with one_line_ends('monitor.py'):
        if args.lines:
            with error_at('--lines'):
                print_lines(*args.lines)
        runs = list(map(read_run, args.run))
        if len(runs) > 1:
            print_comparison(runs)
        elif runs:
            print_run(runs[0])
        if args.plot:
            with error_at(f'--plot {args.plot}'):
                plot_runs(runs, args.plot)


if __name__ == '__main__':
    main()
