"""What a run says about itself: CTC's two plateaus, gradients, outputs, and what is wrong by name.

    python monitor.py RUN               a run by epochs, its warnings, its phase, what to try first
    python monitor.py RUN RUN ...       what differs between runs, their scores and spread
    python monitor.py RUN ... --plot p.png   their losses, errors and gradients as a picture
    python monitor.py --lines 250 12 28 the plateau lines of 250 outputs, 12 labels, 28 symbols

A stuck CTC model sits on one of two lines, both known before training, in nats per label:

    uniform    every symbol equally likely in every output; an untrained network starts here
    constant   the best output that ignores its input: mostly blank, the rest by letter frequency
               (about 2.9 for English); a falling loss that ends here has learnt nothing

Nothing here needs the other modules: copy this file beside any training loop. check_ctc judges a
batch of any CTC model, Watch any training; plateau_lines and error_rates are of use too.

All that is watched is kept as plain numbers: a history is {name: [a number for each update of the
run so far]}, of names such as 'train_loss', 'blank', 'gradient.head'. What is said of plateaus,
gradients and outputs is computed from it afterwards, so nothing has to be reset, and a resumed run
only gets its lists back.

References: Graves et al. 2006 (CTC); Levenshtein 1966 (edit distance); Bisani & Ney 2004
(bootstrap).
"""
import argparse
import csv
import json
import math
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import correlation, fmean, stdev

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PLATEAUS = {  # and what helps where one stays
    'uniform': 'every network starts here; if it stays for hundreds of updates, see that no '
               'softmax comes before log_softmax, raise the learning rate, or initialise the head '
               'with larger weights',
    'constant': 'what the input tells is not used yet, as in every network for a while; if it '
                'stays, compare five inputs with their texts, see whether ten can be learnt by '
                'heart, and raise the learning rate',
}
LEFT = ('at which the uniform plateau was left: {left_uniform}, the constant one: {left_constant} '
        '(None: not yet)')


# ---- the two plateaus ----------------------------------------------------------------------------

def outputs_needed(symbols: Sequence) -> int:
    """The smallest number of outputs with which CTC can emit these symbols, or characters.

    One for each, and a blank between equal neighbours (Graves et al. 2006, section 3.1).
    """
    return len(symbols) + sum(a == b for a, b in zip(symbols, symbols[1:]))


def plateau_lines(targets: Sequence, lengths: Sequence, vocab_size: int,
                  blank: int = 0) -> tuple:
    """The losses, in nats per label, of a uniform output and of the best constant one.

    targets: symbols by utterance; lengths: outputs by utterance. Both are F.ctc_loss's. In the
    constant output, each label has its frequency in the texts as its part of the labels' share,
    and the blank the rest. Utterances count that have labels and enough outputs for them, taken at
    equal steps where CTC's table would have over 40 million cells; nan where there are none.

    The labels' share q is known without a search. Of the n outputs of l labels, nearly all likely
    paths give one to each label; they have the probability q ** l * (1 - q) ** (n - l). Its
    logarithm per label, averaged over utterances, is largest where q = 1 / mean(n / l). With six
    symbols or more, the best of all distributions has a loss that is at most 2 % lower.
    """
    possible = [(target, int(length)) for target, length in zip(targets, lengths)
                if 0 < outputs_needed(target) <= length]
    if not possible:
        return math.nan, math.nan
    texts, outputs = zip(*possible)
    cells = len(texts) * max(outputs) * max(map(len, texts))  # half of those of CTC's table
    possible = possible[::cells // 20_000_000 + 1]
    texts, outputs = zip(*possible)
    labels = torch.cat([torch.as_tensor(text) for text in texts])
    share = 1 / fmean(length / len(text) for text, length in possible)
    frequent = share * torch.bincount(labels, minlength=vocab_size) / len(labels)
    frequent[blank] = 1 - share

    def loss_of(distribution):
        log_probs = distribution.log().expand(max(outputs), len(texts), vocab_size)
        return float(F.ctc_loss(log_probs, labels, outputs, tuple(map(len, texts)), blank))

    uniform = loss_of(torch.ones(vocab_size) / vocab_size)
    return uniform, min(uniform, loss_of(frequent))


def phase_limits(lines: tuple) -> dict:
    """The losses above which a network is in a phase, by both lines, in nats per label.

    uniform    nearer to the uniform line than to the constant one, or above both
    constant   not a tenth below the constant line, as in blank collapse: what the network hears is
               of no use yet
    learning   it is of use
    learnt     the loss is below a tenth of the constant line
    """
    _, constant = lines
    return {'uniform': sum(lines) / 2, 'constant': 0.9 * constant, 'learning': 0.1 * constant}


def name_phase(loss: float, lines: tuple) -> str:
    """Where a network stands by its loss, in nats per label, and the lines of the same utterances.
    """
    return next((phase for phase, limit in phase_limits(lines).items() if not loss <= limit),
                'learnt')


def plateaus_left(losses: Sequence, lines: tuple,
                  window: int = 20) -> dict:
    """The updates at which a run left each plateau, None where it has not yet.

    losses: of every update so far. A plateau is left when the mean of the last ones, a window of
    them, is in a later phase.
    """
    left = {'left_uniform': None, 'left_constant': None}
    for update in range(len(losses), window - 1, -1):  # backwards, so the earliest stays
        phase = name_phase(fmean(losses[update - window:update]), lines)
        if phase != 'uniform':
            left['left_uniform'] = update
        if phase not in PLATEAUS:
            left['left_constant'] = update
    return left


# ---- gradients and outputs -----------------------------------------------------------------------

def gradient_norms(network: nn.Module) -> dict:
    """The norm of the gradients of each of the network's children, and of them together:
    {'gradient.NAME': ..., 'gradient': ...}."""
    norms = {}
    for name, child in network.named_children():
        gradients = [p.grad for p in child.parameters() if p.grad is not None]
        if gradients:
            norms[f'gradient.{name}'] = nn.utils.get_total_norm(gradients)
    return norms | {'gradient': nn.utils.get_total_norm(norms.values())}


def valid_frames(frames: int, lengths: Tensor) -> Tensor:
    """The mask (B, frames) that is true within each clip's length (B,), false in its padding."""
    return torch.arange(frames, device=lengths.device) < lengths[:, None]


@torch.no_grad()
def output_figures(log_probs: Tensor, lengths: Tensor, blank: int = 0) -> dict:
    """What a batch's outputs (B, T', V) are like; log_probs of clips of lengths (B,).

    entropy    mean over outputs, as a share of ln V
    blank      share of outputs whose best symbol is the blank
    sound      how much of the outputs the sound decides: their mutual information with it, as a
               share of their entropy; 0 where it is ignored, 1 where every output is certain
    """
    probabilities = log_probs[valid_frames(log_probs.shape[1], lengths)].exp()     # (N, V)
    entropy = torch.special.entr(probabilities).sum(1).mean().item()
    # H(mean p) - mean H(p) is the mutual information of output and symbol.
    together = torch.special.entr(probabilities.mean(0)).sum().item()
    return {'entropy': entropy / math.log(log_probs.shape[2]),
            'blank': (probabilities.argmax(1) == blank).double().mean().item(),
            'sound': (together - entropy) / max(together, 1e-9)}


# ---- error rates ---------------------------------------------------------------------------------

def edit_counts(reference: Sequence, hypothesis: Sequence) -> tuple:
    """What turns a reference into a hypothesis: (errors, and how many of them are substitutions).

    Of the alignments with the fewest errors (Levenshtein 1966), one with the fewest substitutions.
    """
    error = 1 + len(reference)  # as one number, compared from the left: errors, substitutions
    row = [j * error for j in range(len(hypothesis) + 1)]  # of an empty reference
    for said in reference:
        before, row = row, [row[0] + error]
        for j, heard in enumerate(hypothesis):
            same = before[j] + (said != heard) * (error + 1)
            row.append(min(same, before[j + 1] + error, row[j] + error))
    return divmod(row[-1], error)


# The words of a text; in scripts that are written without spaces, each character is one: Thai, Lao,
# Burmese, Khmer, kana, Chinese characters.
UNSPACED = ('\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005\u3040-\u30ff\u3400-\u9fff'
            '\U00020000-\U0003ffff')
WORD = re.compile(rf'[{UNSPACED}]|[^\s{UNSPACED}]+')
words_of = WORD.findall


def bootstrap_interval(errors: Tensor, words: Tensor) -> list:
    """The middle 95 % of the word error rates of 1000 samples of as many utterances, in per cent.

    errors, words: (N,), by utterance (Bisani & Ney 2004).
    """
    draws = torch.randint(len(words), (1000, len(words)),
                          generator=torch.Generator().manual_seed(0))
    rates = 100 * errors[draws].sum(1) / words[draws].sum(1)
    return rates.quantile(torch.tensor([0.025, 0.975])).tolist()


def error_rates(references: Sequence, hypotheses: Sequence) -> dict:
    """Word, character and sentence error rates in per cent, with counts and the WER's interval.

    (S + I + D) / reference length; errors are pooled over all utterances. Words are those of
    words_of. A sentence is wrong if a word of it is. There must be a word to score.
    """
    said, heard = [list(map(words_of, texts)) for texts in (references, hypotheses)]
    edits = torch.tensor(list(map(edit_counts, said, heard)))                       # (N, 2)
    words = list(map(len, said))
    total = sum(words)
    errors, substitutions = edits.sum(0).tolist()
    longer = sum(map(len, heard)) - total  # insertions less deletions
    insertions = (errors - substitutions + longer) // 2
    character_errors = sum(edit_counts(*pair)[0] for pair in zip(references, hypotheses))
    return {'wer': 100 * errors / total,
            'interval': bootstrap_interval(edits[:, 0], torch.tensor(words)),
            'cer': 100 * character_errors / sum(map(len, references)),
            'ser': 100 * fmean(edits[:, 0] > 0),
            'substitutions': substitutions, 'insertions': insertions,
            'deletions': insertions - longer, 'words': total, 'utterances': len(references)}


# ---- a batch of anybody's network ----------------------------------------------------------------

def check_ctc(log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor,
              blank: int = 0, untrained: bool = False) -> list:
    """What is wrong with a batch as F.ctc_loss takes it, in words, each with a next step.

    log_probs (T, B, V); targets (B, S), or (sum of target_lengths,); both lengths (B,). A wrong
    shape hides the rest; symbols, normalisation and lengths are judged together, and where all
    these are right, what the outputs have learnt. [] means that the network has begun to learn;
    untrained: the last part is left out.
    """
    findings, batch = read_batch(blank, log_probs, targets, input_lengths, target_lengths)
    if not findings and not untrained:
        findings = list(judge([look(*batch, blank, batch[0])]))[:1]
    return findings


def read_batch(blank: int, *tensors: Tensor) -> tuple:
    """What F.ctc_loss takes -> what breaks its contract, in words; and the same again, as log_probs
    (T, B, V) in single precision, all labels in one line, and both lengths (B,)."""
    batch = [torch.as_tensor(x).detach().cpu().float() for x in tensors]
    batch[2:] = map(Tensor.flatten, batch[2:])  # also where they are (B, 1)
    fault = wrong_shape(*batch)
    if fault:
        return [fault], batch
    log_probs, *others = batch
    targets, lengths, sizes = [x.long() for x in others]
    if targets.dim() == 2:
        targets = targets[valid_frames(targets.shape[1], sizes)]
    return ([*wrong_labels(targets, sizes, log_probs.shape[2] - 1, blank),
             *wrong_outputs(log_probs, targets, lengths, sizes)],
            [log_probs, targets, lengths, sizes])


def sums_to_one(probabilities: Tensor) -> bool:
    """Whether most (B, V, ...) do, over V, as exactly as half precision has them."""
    return (probabilities.sum(1) - 1).abs().median() < 0.07


def wrong_shape(log_probs: Tensor, targets: Tensor, input_lengths: Tensor,
                target_lengths: Tensor) -> str | None:
    """What is wrong with the arguments' shapes and kinds of numbers."""
    if any((x != x.long().abs()).any() for x in (input_lengths, target_lengths)):
        return ('lengths are not whole numbers from 0; where they are shares of the longest, '
                'multiply them by its number of outputs, and round')
    batch, shape = len(target_lengths), tuple(log_probs.shape)
    if len(shape) != 3 or shape[1] != batch or 0 in shape:
        advice = ('see which dimension is the batch; where parts of it are joined along time, as '
                  'DataParallel does, let the network return (B, T, V), and transpose then')
        if len(shape) != 3:
            advice = 'of one clip, take log_probs.unsqueeze(1)'
        elif shape[0] == batch:
            advice = 'it looks like (B, T, V), so take log_probs.transpose(0, 1)'
            if sums_to_one(log_probs.exp()):
                advice = 'it looks like (B, V, T), so take log_probs.permute(2, 0, 1)'
        return f'log_probs has the shape {shape}, not (T, {batch}, V) as target_lengths; {advice}'
    longest = target_lengths.max()
    padded = targets.dim() == 2 and len(targets) == batch and targets.shape[1] >= longest
    if len(input_lengths) != batch or not padded and targets.shape != (target_lengths.sum(),):
        return (f'{len(input_lengths)} input lengths and {batch} target lengths of up to '
                f'{longest:g} labels come with targets of the shape {tuple(targets.shape)}; give '
                'one of each for every utterance, and targets as (B, S), or all labels in one line')
    return None


def wrong_labels(labels: Tensor, sizes: Tensor, last: int, blank: int) -> Iterator:
    """Targets that are not labels, or say nothing; sizes: of the texts (B,); last: the last symbol.
    """
    for wrong, fault in (
            (labels < 0,
             'labels are negative: padding is counted in target_lengths; give the lengths of the '
             'texts without it'),
            (labels > last,
             f'labels are not between 0 and {last}; make the head as large as the alphabet and the '
             'blank'),
            (labels == blank,
             f'labels are the blank, symbol {blank}; number the letters so that none has it, and '
             'leave padding out of target_lengths'),
            (sizes == 0,
             'texts have no label; see whether the loader drops letters that the alphabet lacks, '
             'or recordings have no transcript')):
        if wrong.any():
            yield f'{wrong.sum()} of {len(wrong)} {fault}'
    if not 0 <= blank <= last:
        yield (f'blank is {blank}, and the symbols are 0 to {last}; give the one that '
               'the head has for it')
    if len(labels) > 9 and len(labels.unique()) == 1:
        yield (f'all {len(labels)} labels are symbol {labels[0]}; see whether the loader drops, '
               'or takes for one, the letters that the alphabet lacks, as capitals')


def wrong_outputs(log_probs: Tensor, labels: Tensor, lengths: Tensor,
                  sizes: Tensor) -> Iterator:
    """Outputs that are not logarithms of probabilities, or as many as cannot be right."""
    frames = len(log_probs)
    outputs = log_probs.transpose(0, 1)[valid_frames(frames, lengths)]             # (N, V)
    if not (outputs < math.inf).all():
        yield 'log_probs holds NaN or infinity; look for the first layer whose output does'
    elif sums_to_one(outputs):
        yield 'log_probs holds probabilities, not their logarithms; use log_softmax for softmax'
    elif len(outputs) and not sums_to_one(outputs.exp()):
        yield ('log_probs is not normalised over the symbols, as where it holds raw logits, or '
               'where softmax is over time or the batch, and a loss of it may be negative; take '
               'log_softmax over the last dimension')
    shortest, longest = lengths.aminmax()
    texts = labels.split(sizes.tolist())
    missing = torch.tensor(list(map(outputs_needed, texts))) - lengths
    if shortest < 1 or longest > frames or 2 * longest <= frames - 8:  # one clip is not padded
        yield (f'input_lengths are {shortest} to {longest} of {frames} outputs; see whether they '
               "are divided by the network's stride, and not too often, or clips are padded too "
               'far')
    elif missing.max() > 0:
        yield (f'{(missing > 0).sum()} of {len(lengths)} utterances have fewer outputs than '
               f'labels and repeats, by up to {missing.max()}, so their loss is '
               'infinite; make more outputs a second, or leave them out')


def look(log_probs: Tensor, labels: Tensor, lengths: Tensor, sizes: Tensor, blank: int,
         in_eval: Tensor) -> dict:
    """What a batch's outputs (T, B, V) have learnt, in plain numbers: output_figures, the phase and
    what it was judged by, and

    far         the share of the utterances whose loss is above the constant line, where half of
                them are below a half of it; else nan
    lengths     of the utterances, in outputs and in labels

    and, of the outputs in eval mode (T, B, V), which drop-out does not disturb,

    apart       the largest difference of log-probabilities between the shortest text's clip, which
                has most padding, and another
    ends        how many clips end as that one does, where all are as long as the batch
    spread      the largest difference between two symbols
    """
    texts = labels.split(sizes.tolist())
    lines = plateau_lines(texts, lengths, log_probs.shape[2], blank)
    losses = F.ctc_loss(log_probs, labels, lengths, sizes, blank, reduction='none') / sizes
    loss = fmean(losses)
    shared = in_eval[:lengths.min()]
    apart = (shared - shared[:, [sizes.argmin()]]).abs().amax(2)                   # (T, B)
    ends = int((apart[-3:].amax(0) < 0.05 * apart.amax()).sum())
    return output_figures(log_probs.transpose(0, 1), lengths, blank) | {
        'loss': loss, 'lines': lines, 'phase': name_phase(loss, lines),
        'far': fmean(losses > lines[1]) if losses.median() < lines[1] / 2 else math.nan,
        'lengths': torch.stack([lengths, sizes], 1).tolist(),
        'apart': float(apart.amax()) if len(texts) > 1 else math.inf,
        'ends': ends if len(shared) == len(log_probs) else 0,
        'spread': float((shared.amax(2) - shared.amin(2)).max())}


def judge(calls: Sequence) -> Iterator:
    """What is wrong, with a next step, by what look, or Watch, has seen so far: causes come before
    what they cause, and last the phase, where it is a plateau's, or new. The first line is told."""
    last, later = calls[-1], calls[1:]
    loss, (uniform, constant), phase = last['loss'], last['lines'], last['phase']
    stuck = phase in PLATEAUS
    where = (f'the loss is {loss:.2f} nats a label, that of a uniform output {uniform:.2f}, of the '
             f'best constant one {constant:.2f}')
    if loss > (1.2 if later else 10) * uniform:
        yield f'diverged: {where}; lower the learning rate, clip gradients, and start again'
    yield from judge_parts(calls)
    if last.get('mixed', 0) > 0.01:
        yield (f'clips mix: {last["mixed"]:.0%} of the gradient of the first one\'s outputs lies '
               'in the inputs of others; look for a reshape or view in place of a transpose, and '
               'for layers that take the batch for time (batch_first)')
    if not stuck and last.get('eval_loss', 0) > 1.5 * loss + 0.1:
        yield ('training and eval mode differ: the loss of this batch is {loss:.3f} and '
               "{eval_loss:.3f}; batch norm's running statistics are not those of its batches, so "
               'give them a larger momentum, or make more updates').format(**last)
    if sum(0.98 < call['spread'] < 1.001 for call in later[-2:]) == 2:
        yield ('no output has log-probabilities that differ by more than 1, as where softmax comes '
               'before log_softmax; take log_softmax of the logits alone')
    if len(later) > 3:
        far = fmean(call['far'] for call in later)
        if far > 0.1:
            yield (f'{far:.0%} of the utterances are not learnt at all, the others are; see '
                   'whether those transcripts belong to other recordings')
        if all(call['phase'] in PLATEAUS for call in later):
            yield from unrelated_lengths(*zip(*sum((call['lengths'] for call in later), [])))
    if not stuck and 4 <= last['ends'] < len(last['lengths']):
        yield ('every input length is the padded one: the last outputs of {ends} clips are alike; '
               'give each clip its own length').format(**last)
    if stuck and last['apart'] < 2e-6:
        yield (f'every utterance gets the same outputs; {where}; see whether the input reaches the '
               'network: values that are all zero, a layer that is dead or cut off')
    if not later and loss > constant and last['sound'] > 0.5:
        yield (f'the output depends on the input, and yet {where}; check that each text belongs '
               "to its input, and that blank and alphabet are the network's own")
    if any(call['phase'] in PLATEAUS for call in calls[-2:]):
        yield f'phase {phase}: {where}; {PLATEAUS.get(phase, "the plateau is left")}'


def judge_parts(calls: Sequence) -> Iterator:
    """What is wrong with the network's parts, of what Watch has seen."""
    last = calls[-1]
    norms = last.get('gradients', {})
    faint = 1e-3 * math.hypot(*norms.values())
    # Gradients that a GradScaler has scaled may be infinite.
    unreached = [f'{part} ({norm:.0e})' for part, norm in norms.items()
                 if norm == 0 or last['phase'] in PLATEAUS and norm < faint < math.inf]
    unmoved = [part for part in norms if any(call['weights'].get(part) == last['weights'][part]
                                             for call in calls[-2:-1])]
    if unreached:
        yield (f'the gradient does not reach {", ".join(unreached)}; look above for detach(), '
               'no_grad(), a dead layer or very small weights; if it did at first, lower the '
               'learning rate, and start again; if no part has one, call Watch after backward() '
               'and before zero_grad()')
    if unmoved:
        yield (f'the weights of {", ".join(unmoved)} have not changed since the last call; give '
               'their parameters to the optimizer, and see that it steps')


def unrelated_lengths(recordings: Sequence, texts: Sequence) -> Iterator:
    """What is wrong where the lengths of recordings and of their transcripts hardly correlate;
    fewer than 64, or nearly equal ones, say nothing."""
    if len(texts) < 64 or any(stdev(own) < 0.1 * fmean(own) for own in (recordings, texts)):
        return
    related = correlation(recordings, texts)
    if related < 0.25:
        yield ('recordings and transcripts do not belong together: their lengths have a '
               f'correlation of {related:.2f}, in speech it is above 0.5; listen to five '
               'recordings and compare their texts')


# ---- any training, watched -----------------------------------------------------------------------

class Watch:
    """What a batch alone cannot show, for any training loop: call it every 100 updates or so, after
    loss.backward() and before the optimizer's step.

        watch = monitor.Watch(network)                                       # before training
        watch(log_probs, targets, input_lengths, target_lengths, sound)      # every 100 updates

    network: also one within DistributedDataParallel. forward: what leads from the inputs to
    log_probs, where that is more than network(sound), or the first of what it gives. blank: as
    F.ctc_loss takes it. batch_first: log_probs are (B, T, V).

    Weights, gradients, buffers, mode and PyTorch's random numbers stay as they are: training ends
    in the same bits with it and without.
    """

    def __init__(self, network: nn.Module, forward: Callable = None,
                 blank: int = 0, batch_first: bool = False):
        self.network = getattr(network, 'module', network)
        self.forward = forward or self.network
        self.blank = blank
        self.batch_dim = 0 if batch_first else 1
        self.calls = []     # of the last ten what was seen, in plain numbers
        self.findings = []  # of the last, but for the phase

    def __call__(self, log_probs: Tensor, targets: Tensor, input_lengths: Tensor,
                 target_lengths: Tensor, sound: Tensor, *others: object) -> list:
        """What check_ctc takes, and the network's inputs -> what is wrong, each with a next step,
        or the phase, on a plateau and where one has been left. Prints it."""
        findings, batch = read_batch(self.blank, log_probs.movedim(self.batch_dim, 1), targets,
                                     input_lengths, target_lengths)
        if not findings:
            norms = gradient_norms(self.network)
            in_eval, mixed = self.pass_in_eval_mode(sound, *others)
            call = look(*batch, self.blank, in_eval) | {
                'eval_loss': float(F.ctc_loss(in_eval, *batch[1:], self.blank)),
                'mixed': mixed, 'gradients': {}, 'weights': {}}
            for name, child in self.network.named_children():
                trained = [p for p in child.parameters() if p.requires_grad]
                if trained:
                    call['gradients'][name] = float(norms.get(f'gradient.{name}', 0))
                    call['weights'][name] = sum(p.double().norm().item() for p in trained)
            self.calls = [*self.calls, call][-10:]
            findings = list(judge(self.calls))[:1]
        show_status('')
        for finding in findings:
            print('    >', finding)
        self.findings = [finding for finding in findings if not finding.startswith('phase')]
        return findings

    def pass_in_eval_mode(self, sound: Tensor, *others: object) -> tuple:
        """log_probs (T, B, V) in eval mode, and which share of the gradient of the first clip's
        lies in the other clips' inputs: none, but where clips mix."""
        sound = sound.detach().float().requires_grad_()
        with in_eval_mode(self.network), torch.enable_grad():
            log_probs = self.forward(sound.clone(), *others)
            if isinstance(log_probs, tuple):
                log_probs, *_ = log_probs
            log_probs = log_probs.float().cpu().movedim(self.batch_dim, 1)         # (T, B, V)
            # The blank's, as all symbols together have no gradient where they are equally likely.
            heard = log_probs[:, 0, self.blank].sum() + 0 * sound.sum()
            gradient, = torch.autograd.grad(heard, sound)
        size = gradient.abs() / gradient.abs().sum()
        owns = [size.select(dim, 0).sum() for dim, n in enumerate(size.shape)
                if n == log_probs.shape[1]]
        return log_probs.detach(), 1 - float(max(owns, default=1))


@contextmanager
def in_eval_mode(network: nn.Module) -> Iterator:
    """A network in eval mode; then its mode, buffers and PyTorch's random numbers as they were."""
    modes = [(module, module.training) for module in network.modules()]
    buffers = [buffer.clone() for buffer in network.buffers()]
    try:
        # cuDNN's recurrent layers have no gradient in eval mode.
        with torch.random.fork_rng(), torch.backends.cudnn.flags(enabled=False):
            yield network.eval()
    finally:
        for module, mode in modes:
            module.training = mode
        for buffer, before in zip(network.buffers(), buffers):
            buffer.copy_(before)


# ---- lines on the terminal -----------------------------------------------------------------------

def legend(lines: tuple) -> str:
    """What the epochs' lines mean, for the first lines of a run."""
    uniform, constant = lines
    return (f'loss: CTC in nats per label; {uniform:.2f} if all symbols are equally likely, where '
            f'training starts;\n    {constant:.2f} for the best output that ignores the sound, '
            'where stuck models stay; below that it learns\n'
            'gradient: mean norm; blank: share of the outputs; sound: how much of the outputs it '
            'decides, from 0 to 100 %\n'
            'at the end of a line: uniform or constant output (a plateau), learning, or learnt\n'
            'beneath: what was said and heard, and the best symbol of every output; - is the '
            'blank, _ a space')


def epoch_line(record: dict) -> str:
    """An epoch's record of the log -> a line."""
    words = 'epoch {epoch:3d}  {seconds:4.0f} s  loss {train_loss:.3f}'
    if 'wer' in record:
        words += '  valid {valid_loss:.3f}  WER {wer:.1f} %  CER {cer:.1f} %'
    words += '  gradient {gradient:.2f}  blank {blank:.0%}  sound {sound:.0%}  {phase}'
    return words.format(**record)


def print_scores(results: dict) -> None:
    """Print {what was scored: error rates}, with what they are made of."""
    words = ('WER {wer:.2f} % ({substitutions} S, {insertions} I, {deletions} D in {words} words '
             'of {utterances} utterances; 95 %: {interval[0]:.1f} to {interval[1]:.1f}), '
             'CER {cer:.2f} %, sentences with errors {ser:.1f} %')
    for name, rates in results.items():
        print(name + ':', words.format(**rates))


# ---- reading and comparing runs ------------------------------------------------------------------

def read_run(folder: str | Path) -> dict:
    """What a run folder of train.py holds. Raises UserError.

    name, config (of config.json), log (the epochs' records; none of a checkpoint that was only
    scored), results ({what was scored: error rates}; none of a run at work), sentences (of the
    split scored last, each {'file', 'said', 'heard', 'beam' (by beam search), 'path'}).
    """
    def read(name):
        return Path(folder, name).read_text(encoding='utf-8')

    with error_at(folder):
        run = {'name': folder, 'config': json.loads(read('config.json')),
               'log': list(map(json.loads, read('log.jsonl').splitlines())),
               'results': {}, 'sentences': []}
        if Path(folder, 'results.json').exists():
            run['results'] = json.loads(read('results.json'))
        for split in 'valid', 'test':
            if split in run['results']:
                run['sentences'] = list(csv.DictReader(
                    read(f'{split}.tsv').split('\n'), delimiter='\t', quoting=csv.QUOTE_NONE))
    return run


def best_epoch(log: Sequence) -> dict:
    """The record of the lowest validation WER; of equal ones that of the lowest CER, of those the
    last; without validation the last. best.pt holds it."""
    return min(reversed(log), key=lambda record: (record.get('wer', 0), record.get('cer', 0)))


def print_run(run: dict) -> None:
    """Print a run by epochs, its phase, why, what to try, and its scores."""
    log = run['log']
    print(run['name'])
    if log:
        last = log[-1]
        print(legend(run['config']['plateaus']), *map(epoch_line, log), sep='\n')
        print(('phase: {phase}; the entropy of the outputs is {entropy:.0%} of the largest, the '
               'sound decides {sound:.0%} of them').format(**last))
        print('update', LEFT.format(**last))
        print('best epoch', best_epoch([*run['config']['start'], *log])['epoch'], 'of', len(log))
        print('how to go on:', next_step(log))
    print_scores(run['results'])


def next_step(log: Sequence) -> str:
    """What to try first after a run of these records of the log."""
    last = log[-1]
    updates = last['updates']
    moved = max(record['weight_change'] for record in log)
    if last['warnings']:
        return last['warnings'][0]
    if last['left_constant'] is None:
        if moved < 0.05:
            return (f'the weights hardly move: at most {moved:.1%} of their size in an epoch; '
                    'raise the learning rate tenfold')
        if moved > 2:
            return (f'the weights change too fast: by {moved:.0%} of their size in an epoch; lower '
                    'the learning rate to a tenth')
        if updates < 500:
            return (f'{updates} updates are few: a plateau may last 500 and more; give it more '
                    'epochs, or smaller batches')
        return (f'still on the plateau after {updates} updates, though gradients and steps are of '
                'a healthy size; can it learn ten utterances by heart? If so, give it fewer '
                'outputs a label')
    if last['phase'] in PLATEAUS:
        return ('the network fits the training utterances alone; get more of them, and check that '
                'each transcript belongs to its recording')
    if 'wer' not in last:
        return 'there is no validation data; give some'
    if last['wer'] > 80 and last['cer'] < 25:
        return ('the letters are right and the words are not; is the space a symbol of its own, '
                'and not the blank?')
    if last['wer'] == 0:
        return 'there are no errors left to learn from; take harder validation data'
    if last['valid_loss'] > 2 * last['train_loss']:
        return ('training is learnt better than validation; get more data, or more dropout and, '
                'with it, more epochs')
    return 'no warning applies; if the last epochs still improved, give a new run more'


def print_comparison(runs: Sequence) -> None:
    """Print a table of runs, those together that differ by their seed alone: the WER of each, their
    mean (that of all their words), standard deviation and 95 % interval over utterances, and that
    of the difference between these runs and the first ones, in the same samples of the utterances
    (paired bootstrap, Bisani & Ney 2004): where it excludes 0, they are better or worse.

    Raises UserError where runs are not finished, or have scored other sentences.
    """
    said = [row['said'] for row in runs[0]['sentences']]
    for run in runs:
        if not said or [row['said'] for row in run['sentences']] != said:
            raise UserError(f'{run["name"]}: not finished, or other sentences were scored')
    words = torch.tensor([len(words_of(text)) for text in said])
    flags = [run['config']['flags'] for run in runs]
    differ = [name for name in flags[0]
              if name not in ('run_dir', 'device', 'workers', 'threads', 'undo', 'only', 'seed')
              and len({own.get(name) for own in flags}) > 1]
    names = [', '.join(f'{name} {own.get(name)}' for name in differ) for own in flags]
    if len(runs) == 2:
        names = [run['name'] for run in runs]
    for decoding, heard in ('greedy', 'heard'), ('beam search', 'beam'):
        print(decoding, 'WER of each run in %, mean, deviation, 95 % interval, that of the '
              'difference from the first line')
        errors = torch.tensor([[edit_counts(words_of(row['said']), words_of(row[heard]))[0]
                                for row in run['sentences']] for run in runs]).float()  # (runs, N)
        groups = {name: errors[[name == other for other in names]] for name in names}
        first = groups[names[0]].mean(0)
        for name, group in groups.items():
            wers = (100 * group.sum(1) / words.sum()).tolist()
            spread = f'{stdev(wers):.2f}' if len(wers) > 1 else '    '
            mean = group.mean(0)
            print(*map('{:6.2f}'.format, wers),
                  '  {:6.2f}  {}  {:.1f} to {:.1f}  {:+.2f} to {:+.2f}  {}'.format(
                      fmean(wers), spread, *bootstrap_interval(mean, words),
                      *bootstrap_interval(mean - first, words), name))


# ---- pictures ------------------------------------------------------------------------------------

def load_pyplot() -> object:
    """matplotlib.pyplot, which draws into files only. Raises UserError where it is missing."""
    with error_at('matplotlib is needed (python -m pip install matplotlib)'):
        from matplotlib import pyplot
    pyplot.switch_backend('agg')
    pyplot.style.use('tableau-colorblind10')
    pyplot.rcParams['text.parse_math'] = False  # a $ in a text or a name is a $
    return pyplot


def plot_runs(runs: Sequence, path: str) -> None:
    """Draw runs on the same axes: losses, with both plateaus and where phases begin, WER, gradient
    norms by part, and what each heard of the last sentence. Raises OSError, ValueError."""
    figure, panels = load_pyplot().subplots(1, 3, figsize=(15, 5), layout='constrained')
    plateaus = runs[0]['config']['plateaus']
    for name, loss in zip(PLATEAUS, plateaus):
        panels[0].axhline(loss, color='0.5', label=f'{name} output: {loss:.2f}')
    for phase, limit in phase_limits(plateaus).items():
        panels[0].axhline(limit, color='0.7', linestyle=':',
                          label=f'phase: {phase} above {limit:.2f}')
    lines = []
    for i, run in enumerate(runs):
        log = run['log']
        for axes, word, label, scale in zip(
                panels, ['loss', 'wer', 'gradient.'],
                ['CTC loss, nats per label', 'validation WER, %', 'gradient norm, nats per label'],
                ['log', 'linear', 'log']):
            keys = [key for key in log[0] if word in key]
            for key, style in zip(keys, ['-', '--', ':']):
                axes.plot([record['epoch'] for record in log], [record[key] for record in log],
                          style, color=f'C{i}', label=f'{key}, {run["name"]}')
                axes.legend(fontsize=7)
            axes.set(xlabel='epoch', ylabel=label, yscale=scale)
            axes.yaxis.set_major_formatter('{x:g}')
            axes.yaxis.set_minor_formatter('')
        for row in run['sentences'][-1:]:
            lines.append('said: {said}   heard: {heard}   ({name})'.format(**row, **run))
    figure.suptitle('\n'.join(lines), x=0, ha='left')
    figure.savefig(path)


# ---- how programs fail, wait and write -----------------------------------------------------------

class UserError(Exception):
    """A user's input cannot be used; the message says where and why, in a line each."""


@contextmanager
def error_at(where: object) -> Iterator:
    """Readers raise what Python raises; this turns it into a UserError: 'where: what and why'."""
    try:
        yield
    except UserError as error:
        raise UserError(f'{where}: {str(error).removeprefix(f"{where}: ")}') from error
    except Exception as error:
        reason = ' '.join(str(error).split())[:200]
        if not isinstance(error, (ValueError, OSError)):
            reason = f'{type(error).__name__}: {reason}'
        raise UserError(f'{where}: cannot be used ({reason})') from error


@contextmanager
def listing(faults: list, where: str) -> Iterator:
    """Add what is wrong at a place to the faults, and go on."""
    try:
        with error_at(where):
            yield
    except UserError as error:
        faults.append(str(error))


@contextmanager
def one_line_ends(program: str) -> Iterator:
    """End a program in one line where its user's input cannot be used, or it is interrupted, by
    Ctrl-C or SIGTERM. Characters that the terminal lacks are shown as numbers.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if hasattr(sys.stdout, 'reconfigure'):  # stderr does it by itself
        sys.stdout.reconfigure(errors='backslashreplace')
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(f'{program}: stopped')
    except (UserError, OSError) as error:
        # From a process that loads recordings, the error comes behind that process's traceback.
        sys.exit(f'{program}: {str(error).rpartition("UserError: ")[2].strip()}')
    finally:
        show_status('')


def show_status(text: str) -> None:
    """Show on a terminal how far a program is, in place of what it showed before."""
    if sys.stderr.isatty():
        print(f'\r{text}\x1b[K', end='', file=sys.stderr)


def progress(items: Sequence, what: str) -> Iterator:
    """Pass the items on, and show on a terminal how many of them are done."""
    for done, item in enumerate(items, 1):
        yield item
        show_status(f'{what} {done}/{len(items)}')
    show_status('')


@contextmanager
def whole_file(path: str | Path) -> Iterator:
    """Where to write a file that takes its name once it is whole. Raises UserError."""
    with error_at(path):
        part = Path(path).with_name(f'unfinished.{Path(path).name}')
        yield part
        part.replace(path)


def number(kind: type, low: float, high: float = 1e9) -> Callable:
    """An argparse type: an int or a float from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise ValueError
        return value
    parse.__name__ = f'{kind.__name__} from {low:g} to {high:g}'
    return parse


# ---- python monitor.py ---------------------------------------------------------------------------

def typical_texts(labels: float, vocab_size: int, equal: bool) -> tuple:
    """50 texts of so many labels, in the mean, for plateau lines without a corpus.

    Each symbol is 0.87 times as frequent as the one before: 27 of them have an entropy of 2.86
    nats, English letters and the space 2.85 (Norvig 2013, "English letter frequency counts:
    Mayzner revisited"). equal: all are equally frequent, as on number plates.
    """
    frequency = (1.0 if equal else 0.87) ** torch.arange(vocab_size - 1)
    sizes = [int(labels + i / 50) for i in range(50)]
    draws = torch.multinomial(frequency, sum(sizes), replacement=True,
                              generator=torch.Generator().manual_seed(0))
    return (draws + 1).split(sizes)


def read_losses(path: str) -> list:
    """The losses of a log, one a line: the number behind "loss", as in JSON or in words, or in a
    table's column whose name has "loss" in it, or else the last one. Raises OSError, ValueError."""
    losses, column = [], -1
    for line in Path(path).read_text(encoding='utf-8-sig').lower().splitlines():
        cells = re.split('[,;\t]' if re.search('[,;\t]', line) else r'\s+', line.strip(' '))
        named = re.search(r'loss\W+?(-?(?:\d*\.?\d+(?:e[+-]?\d+)?|nan\b|inf\b))', line)
        if named:
            losses.append(float(named[1]))
        elif 'loss' in line:
            column = ['loss' in cell for cell in cells].index(True)
        elif line.strip():
            losses.append(float(cells[column]))
    if not losses:
        raise ValueError('it holds no losses')
    return losses


def print_lines(args: argparse.Namespace) -> None:
    """Print both plateau lines, and where the losses of a log lie. Raises OSError, ValueError."""
    outputs, labels, symbols = args.lines
    texts = typical_texts(labels, int(symbols), args.equal)
    scale = args.sum_over * labels or 1  # labels that a loss is the sum of
    lines = [scale * line for line in plateau_lines(texts, [outputs] * 50, int(symbols))]
    uniform, constant = lines
    if math.isnan(uniform):
        raise ValueError(f'{labels:g} labels with their repeats do not fit {outputs:g} outputs')
    unit = f'summed over {args.sum_over} texts' if args.sum_over else 'a label'
    print(f'{uniform:.2f} nats {unit}: every symbol equally likely, where training starts\n'
          f'{constant:.2f} nats {unit}: the best output that ignores the input; a loss that stays '
          'near it has learnt nothing')
    if args.losses:
        losses = read_losses(args.losses)
        window = min(20, len(losses) // 10 + 1)
        # Beyond the second line it learns; the lines may be equal where V is 2.
        fraction = (uniform - fmean(losses[-window:])) / max(uniform - constant, 1e-9)
        print(f'the last of {len(losses)} losses lies {fraction:.0%} of the way from the first '
              'line to the second')
        print('loss', LEFT.format(**plateaus_left(losses, lines, window)))


@one_line_ends('monitor.py')
def main(argv: Sequence = None) -> None:
    parser = argparse.ArgumentParser(
        description='Read a run: a table by epoch, its phase, how to go on. Or compare several: '
                    'settings that differ, scores, their spread, a paired bootstrap against the '
                    'first.')
    add = parser.add_argument
    add('run', nargs='*', help='run folder of train.py')
    add('--plot',
        help='draw the runs into a .png, .svg or .pdf file; needs matplotlib')
    add('--lines', nargs=3, type=number(float, 1, 10_000), metavar=('T', 'L', 'V'),
        help='the plateau lines of T outputs, L labels, V symbols with the blank')
    add('--equal', action='store_true',
        help='of symbols that are equally frequent, as in captchas and word pieces')
    add('--losses',
        help="anybody's log (numbers, a table or JSON lines): where its losses lie to --lines")
    add('--sum_over', type=number(int, 0), default=0,
        help='the losses are sums over so many texts; 0: nats per label, as F.ctc_loss gives them')
    args = parser.parse_args(argv)
    if not args.run and not args.lines:
        parser.error('name run folders of train.py, or give --lines T L V')
    if args.lines:
        with error_at('--lines, --losses'):
            print_lines(args)
    runs = list(map(read_run, args.run))
    if len(runs) > 1:
        print_comparison(runs)
    elif runs:
        print_run(*runs)
    if args.plot:
        with error_at('--plot, of runs that have an epoch'):
            plot_runs(runs, args.plot)


if __name__ == '__main__':
    main()
