"""Train the recogniser on recordings and transcripts, and score it.

    python train.py                                           the built-in corpus
    python train.py --train_data my/train.tsv --epochs 40     your own recordings
    python train.py --train_data my/train.tsv --overfit 10    the first experiment with new data
    python train.py --undo dropout forget_bias                take fixes back, to see their worth
    python train.py --resume runs/...                         go on with a run that was ended
    python train.py --evaluate best.pt --test_data my/test.tsv

A run folder holds config.json (flags, network, plateau lines), log.jsonl (one JSON object an
epoch), best.pt (lowest validation WER), last.pt, state.pt (all that --resume needs, deleted at the
end), and at the end results.json, references and transcripts (valid.tsv, test.tsv) and clip.wav, a
recording to transcribe. Losses are CTC in nats per label: each utterance's negative log-likelihood
divided by its number of labels, averaged over utterances.

References: Smith & Topin 2019 (OneCycle); Loshchilov & Hutter 2019 (AdamW); Lee & Watanabe 2021
(intermediate CTC).
"""
import argparse
import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import os
import random
import shlex
import signal
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import model
import monitor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

EVALUATION_BATCH = 16   # utterances
CHECK_UP_TO = 5000      # utterances; files of larger corpora are decoded first only with --skip_bad
OVERFIT_UPDATES = 50    # at least, in an epoch of --overfit
TRAIN_EVALUATED = 32    # training utterances that are scored after each epoch
EVALUATION_FLAGS = {'evaluate', 'test_data', 'skip_bad', 'run_dir', 'device', 'threads', 'workers',
                    'beam', 'lm_weight', 'label_bonus', 'lm_text'}
OVERFIT_IGNORES = {'valid_data', 'test_data', 'num_train_samples', 'spec_augment', 'concat'}
BY_TORCHRUN = 'TORCHELASTIC_RUN_ID' in os.environ  # which alone makes several processes
MOST_LOST = 10          # updates in a row without a finite gradient
PARTS = {               # of the network, by the names of their parameters
    'backbone': ('stem', 'blocks', 'last', 'early', 'deep', 'gate'),
    'recurrent': ('recurrent',),
    'head': ('head',),
}


# ---- the fixes -----------------------------------------------------------------------------------
#
# "The original" is a MobileNetV3 + LSTM + CTC recogniser that stayed at 93 % word error rate for a
# month, until the first ten of these changes were made together. The others are ours.

class Fix(NamedTuple):
    """A change that helps to leave the plateau, and that --undo takes back.

    To add one: give the setting its new value as a default, FIXES an entry, and effect() in
    test_model.py a line that shows what it changes.
    """
    setting: str   # a flag, or a field of model.Config; its default is the value with the fix
    before: object
    why: str
    ours: bool = False


FIXES = {
    'output_init': Fix('output_init', 'normal',
                       'Xavier: a head of deviation 0.01 passes little gradient down (Glorot & '
                       'Bengio 2010)'),
    'weight_init': Fix('weight_init', 0.01, 'the same for the projections below the LSTM'),
    'upsample': Fix('upsample', 'transpose',
                    'interpolation gives ceil(T / frames_per_output) outputs exactly, '
                    'ConvTranspose too many'),
    'dropout': Fix('dropout', 0.3,
                   'more dropout regularises later, and delays leaving the plateau'),
    'squeeze_excite': Fix('squeeze_excite', True,
                          'channel gates multiply small gradients by small numbers (Howard et al. '
                          '2019, section 5.3)'),
    'forget_bias': Fix('forget_bias', False,
                       'open forget gates, orthogonal weights (Jozefowicz et al. 2015; Saxe et al. '
                       '2014)'),
    'learning_rate': Fix('learning_rate', 1e-4, 'steps too small to leave the plateau'),
    'schedule': Fix('schedule', 'constant',
                    'OneCycle climbs to ten times the rate and back (Smith & Topin 2019)'),
    'grad_clip': Fix('grad_clip', 1.0, 'early CTC gradients are large: 1.0 cuts nearly all'),
    'weight_decay': Fix('weight_decay', 1e-4, 'less pull towards zero'),
    'deep_path': Fix('deep_path', 'alone',
                     'early + gate * deep: a short path for the gradient (Howard et al. 2019, '
                     'section 6.4; Touvron et al. 2021)', ours=True),
    'interctc': Fix('interctc_weight', 0.0,
                    'a CTC loss on the first LSTM layer too (Lee & Watanabe 2021)',
                    ours=True),
    'output_rate': Fix('frames_per_output', 1,
                       'fewer outputs per label shorten the plateau',
                       ours=True),
}


def undone_fixes(undo: Sequence[str] | None, only: Sequence[str] | None) -> list[str]:
    """The names of the fixes that --undo and --only take back."""
    if only is not None:
        return [name for name in FIXES if name not in only]
    undo = undo or []
    return [name for name, fix in FIXES.items()
            if name in undo or 'all' in undo or ('ours' in undo and fix.ours)]


def fixes_table(defaults: Mapping) -> str:
    """The fixes, for --help."""
    lines = ['fixes, with the value that --undo brings back and the one of today; * ours:']
    for name, fix in FIXES.items():
        today = defaults[fix.setting]
        lines.append(f'  {name}{"*" * fix.ours}: {fix.before} -> {today}; {fix.why}')
    lines.append("--undo all: the original before its fixes, but with this project's training "
                 'loop, features, padding masks and strides')
    return '\n'.join(lines)


# ---- flags ---------------------------------------------------------------------------------------

class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows each default; what an unset flag means, its help says."""

    def _get_help_string(self, action):
        if action.default is None:
            return action.help
        return super()._get_help_string(action)


SWITCH = argparse.BooleanOptionalAction


def add_data_flags(add: Callable) -> None:
    count = model.in_range(int, 0)
    add('--train_data',
        help='corpus: .jsonl, .csv or .tsv manifest, LibriSpeech or CMU Sphinx folder; unset: the '
             'built-in corpus with its own validation and test, spoken into the folder corpus/')
    add('--valid_data',
        help='validation corpus, which selects best.pt; unset: a tenth of the training data, other '
             'speakers if all are known, and ten or more; none: train on everything, keep the last '
             'checkpoint')
    add('--test_data',
        help="corpus scored once, at the end; unset: none, or the built-in corpus's own; none: no "
             'test')
    add('--skip_bad', action=SWITCH, default=False,
        help='leave out utterances that cannot be used, which else end the run: before it starts, '
             f'or, of more than {CHECK_UP_TO:,} utterances, when they are met')
    add('--overfit', type=count, default=0,
        help='learn N utterances by heart, without augmentation; 0: train as usual')
    add('--num_train_samples', type=count, default=0,
        help='train on N utterances, drawn by the seed; 0: all')
    add('--spec_augment', action=SWITCH, default=False,
        help='SpecAugment: mask frequency bands and time spans in training')
    add('--speed_perturb', action=SWITCH, default=True,
        help='play at 0.9 to 1.1 times the speed in training')
    add('--concat', type=model.in_range(float, 0, 1), default=0.0,
        help='chance that an utterance drawn from the same speaker (from anyone, where the corpus '
             'names none) follows in the training clip, which is longer then: more '
             'contexts for small corpora')
    add('--max_seconds', type=model.in_range(float, 0), default=40.0,
        help='training utterances longer than this are left out and listed; 0: no limit')
    add('--workers', type=model.in_range(int, 0, 256), default=0,
        help='processes that load audio; 0: the training process itself')


def add_optimisation_flags(add: Callable) -> None:
    positive, amount = model.in_range(int, 1), model.in_range(float, 0)
    add('--epochs', type=positive, default=7, help='passes over the training data')
    add('--batch_size', type=model.in_range(int, 1, 4096), default=8, help='utterances per update')
    add('--learning_rate', type=amount, default=3e-4,
        help='base learning rate; OneCycle peaks at ten times this')
    add('--schedule', choices=('onecycle', 'constant'), default='onecycle',
        help='learning-rate schedule')
    add('--weight_decay', type=amount, default=1e-5, help='of AdamW; 0: none')
    add('--grad_clip', type=amount, default=5.0,
        help='clip the total gradient norm to this; 0: no clipping')
    add('--interctc_weight', type=model.in_range(float, 0, 1), default=0.3,
        help='weight of the intermediate CTC loss, of the first LSTM layer; 0: none')
    add('--seed', type=model.in_range(int, 0), default=0,
        help='random seed of hold-out, subset, initialisation, order, augmentation, dropout')


def add_model_flags(add: Callable) -> None:
    positive = model.in_range(int, 1)
    defaults = model.Config(vocab_size=1)
    add('--blocks', type=positive, default=defaults.blocks,
        help='number of MobileNetV3-Small blocks, 2 to 11')
    add('--frames_per_output', type=positive, default=defaults.frames_per_output,
        help='input frames of 10 ms per output: 1, 2 or 4')
    add('--hidden', type=model.in_range(int, 1, 4096), default=defaults.hidden,
        help='LSTM units in each direction')
    add('--dropout', type=model.in_range(float, 0), default=defaults.dropout,
        help='before each LSTM layer and the head; 0: none')
    add('--squeeze_excite', action=SWITCH, default=defaults.squeeze_excite,
        help="MobileNetV3's channel gates")
    add('--undo', nargs='+', choices=[*FIXES, 'all', 'ours'], metavar='FIX',
        help="undo fixes, by the names below; all: every one; ours: this project's own, which "
             'leaves the original system with its ten fixes; unset: none')
    add('--only', nargs='+', choices=FIXES, metavar='FIX',
        help='undo every fix but these; unset: see --undo')


def add_run_flags(add: Callable) -> None:
    add('--run_dir', help='folder for the results; unset: runs/ and the time')
    add('--resume', metavar='RUN_DIR',
        help='continue an interrupted run with its own settings; unset: a new run')
    add('--init_from', metavar='CHECKPOINT',
        help="start from a checkpoint's weights; the head is new where the alphabet differs; "
             'unset: from random weights')
    add('--evaluate', metavar='CHECKPOINT',
        help='train nothing; score a checkpoint on --test_data; unset: train')
    add('--device', default='cpu', help='cpu, cuda, cuda:1, ...')
    add('--threads', type=model.in_range(int, 0, 1024), default=0,
        help='of the CPU; 0: as many as it has cores, or one where other work keeps them busy')
    add('--benchmark', action=SWITCH, default=False,
        help='train nothing; measure the speed of all parts at these settings')
    add('--json', action=SWITCH, default=False,
        help='with --benchmark: print it as one JSON object, and all else to standard error')


def parse_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of train.py, fixes undone; of --resume those of the run. Raises DataError."""
    parser = argparse.ArgumentParser(
        description='Train a MobileNetV3 + BiLSTM + CTC speech recogniser.',
        allow_abbrev=False, formatter_class=HelpFormatter)
    add_data_flags(parser.add_argument_group('data').add_argument)
    add_optimisation_flags(parser.add_argument_group('optimisation').add_argument)
    add_model_flags(parser.add_argument_group('model').add_argument)
    model.add_decoding_flags(parser.add_argument_group('decoding').add_argument,
                             width=model.Decoding().width)
    add_run_flags(parser.add_argument_group('run').add_argument)
    defaults = vars(parser.parse_args([]))
    parser.epilog = fixes_table(asdict(model.Config(vocab_size=1)) | defaults)
    # argparse gives no default to what a namespace holds already: what is still unset was not
    # typed.
    unset = object()
    typed = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, unset))))
    given = {name: value for name, value in typed.items() if value is not unset}
    args = argparse.Namespace(**defaults | given)
    for name in 'resume', 'init_from', 'evaluate', 'run_dir', 'lm_text':
        if getattr(args, name) == '':
            raise data.DataError(f'flags: --{name} is given without a name; give one')
    if args.resume:
        return resumed_flags(args, given)
    refuse_useless(args, given)
    undo_fixes(args, given)
    if args.run_dir:
        refuse_used(Path(args.run_dir))  # before the data is read, which may take minutes
    return args


def refuse_useless(args: argparse.Namespace, given: Mapping) -> None:
    """Raise DataError where one of the flags that the user typed has no effect beside another."""
    asked = {name for name, value in given.items() if value and value != 'none'}
    for beside, names, reason in (
            (args.evaluate, given.keys() - EVALUATION_FLAGS, '--evaluate does not train'),
            (args.overfit, asked & OVERFIT_IGNORES, '--overfit learns and scores its few '
                                                    'utterances as they are'),
            (args.beam == 0, asked & {'lm_weight', 'label_bonus'}, '--beam 0 is greedy'),
            (not args.benchmark, asked & {'json'}, 'without --benchmark nothing is measured')):
        if beside and names:
            raise data.DataError(f'flags: {reason}, so --{min(names)} has no effect; remove it')


def undo_fixes(args: argparse.Namespace, given: Mapping) -> None:
    """Set what --undo and --only take back to its value before. Raises DataError.

    given: the flags that the user typed.
    """
    if args.undo and args.only:
        raise data.DataError('flags: --undo and --only exclude each other; give only one')
    for name in undone_fixes(args.undo, args.only):
        fix = FIXES[name]
        if fix.setting in given:
            raise data.DataError(f'flags: --{fix.setting} sets what undoing {name} sets too, to '
                                 f'{fix.before}; give only one of them')
        setattr(args, fix.setting, fix.before)


def resumed_flags(args: argparse.Namespace, given: Mapping) -> argparse.Namespace:
    """The flags that a run was started with. Raises DataError where another one is given now."""
    folder = Path(args.resume)
    try:
        config = json.loads((folder / 'config.json').read_text())
    except (OSError, ValueError):
        raise data.DataError(f'--resume {folder}: holds no config.json of a run; name the folder '
                             'of a run') from None
    needed = {*vars(args), 'data', 'ranks'}
    missing = needed.difference(config if isinstance(config, dict) else ())
    if missing:
        raise data.DataError(f'--resume {folder}: config.json is damaged, it lacks '
                             f'{", ".join(sorted(missing))}; start a new run')
    free = {'resume', 'device', 'workers'}  # these change nothing that is learnt
    for name in sorted(given.keys() - free):
        if name not in config or given[name] != config[name]:
            fix = 'remove this flag'
            if name == 'epochs':
                fix = (f'its learning-rate schedule ends there; --init_from {folder}/last.pt '
                       'starts a new run from its weights')
            raise data.DataError(f'flags: --{name} {given[name]} contradicts the run, '
                                 f'which has {config.get(name)}; {fix}')
    own = {name: given[name] for name in given.keys() & free}
    own |= {'resume': args.resume, 'run_dir': str(folder)}
    return argparse.Namespace(**vars(args) | config | own)


def make_config(args: argparse.Namespace) -> model.Config:
    """The network's settings, all but the size of its alphabet. Raises DataError."""
    given = {key: value for key, value in vars(args).items()
             if key in model.Config.__dataclass_fields__}
    try:
        return model.Config(**given | {'vocab_size': 1})
    except ValueError as error:
        raise data.DataError(f'flags: {error}') from None


# ---- training and evaluation ---------------------------------------------------------------------

Optimizer = torch.optim.Optimizer
Schedule = torch.optim.lr_scheduler.LRScheduler


def make_optimizer(network: nn.Module, args: argparse.Namespace,
                   updates: int) -> tuple[Optimizer, Schedule]:
    """AdamW, and OneCycleLR to ten times the learning rate, or a constant one.

    It rises from 0.4 to 10 times the given one in the first 10 % of the updates, then falls to
    almost zero, both along a cosine; beta1 moves the other way, 0.95 to 0.85 and back (PyTorch's
    defaults).
    """
    # fused: one kernel for all parameters, which saves 7 % of an update on a CPU.
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.learning_rate,
                                  weight_decay=args.weight_decay, fused=True)
    if args.schedule == 'constant':
        return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    # PyTorch divides by zero at exactly 10 updates: 10 % of them is one, the climb's start and end.
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=10 * args.learning_rate, total_steps=max(updates, 11), pct_start=0.1,
        anneal_strategy='cos')
    return optimizer, schedule


class Diverged(Exception):
    """Training cannot go on; indices: the utterances of the updates that failed."""

    def __init__(self, message: str, indices: Sequence[int]):
        super().__init__(message)
        self.indices = indices


def train_epoch(network: nn.Module, batches: Iterable[data.Batch], optimizer: Optimizer,
                schedule: Schedule, gradients: monitor.Gradients, outputs: monitor.Outputs,
                args: argparse.Namespace,
                watch: Callable = lambda update, mean, loss: None) -> float:
    """One pass over the batches -> the mean training loss in nats per label, of this process.

    watch(update, mean so far, loss) is called after each. Raises Diverged at a loss that is not
    finite, and where no update, or ten in a row, could be made.
    """
    network.train()
    gradients.reset()
    outputs.reset()
    total, count = 0.0, 0
    lost = []  # the utterances of the updates left out since the last good one
    for update, batch in enumerate(batches, 1):
        layers, lengths = network(batch.mels.to(args.device), batch.lengths.to(args.device),
                                  every_layer=True)
        targets = batch.targets.to(args.device)
        target_lengths = batch.target_lengths.to(args.device)
        if update == 1:  # of the epoch
            for finding in monitor.check_ctc(layers[-1].transpose(0, 1), targets, lengths,
                                             target_lengths, untrained=True):
                print('    !', finding)
        # Averaged over utterances, each one's loss divided by its number of labels: nats per label.
        first, loss = [F.ctc_loss(log_probs.transpose(0, 1), targets, lengths, target_lengths)
                       for log_probs in (layers[0], layers[-1])]
        if not torch.isfinite(loss):
            raise Diverged(f'the loss is {loss.item()}', batch.indices)
        optimizer.zero_grad()
        # Intermediate CTC: the first layer's own loss, a share of the whole.
        loss.lerp(first, args.interctc_weight).backward()
        if gradients.clip(args.grad_clip):  # False, and counted, where one is not finite
            optimizer.step()
            schedule.step()
            lost = []
        else:
            lost.append(batch.indices)
        if len(lost) == MOST_LOST:
            raise Diverged(f'{MOST_LOST} updates in a row had gradients that are not finite',
                           sum(lost, ()))
        batch_loss = loss.item()
        total += batch_loss * len(batch.mels)
        count += len(batch.mels)
        outputs.add(layers[-1], lengths, target_lengths)
        watch(update, total / count, batch_loss)
    if len(lost) == update:
        raise Diverged('no update of the epoch had finite gradients', sum(lost, ()))
    return total / count


class Sentence(NamedTuple):
    """One evaluated utterance."""
    index: int
    said: str
    heard: str
    path: str   # the best symbol of every output, by data.show_path
    beam: str   # heard by beam search, '' without


class Evaluation(NamedTuple):
    """What evaluate found."""
    loss: float                # mean, in nats per label
    rates: dict                # monitor.error_rates, greedy
    beam_rates: dict | None    # by beam search, where that was asked for
    outputs: dict              # monitor.Outputs.summary
    sentences: list[Sentence]  # in the utterances' order


@torch.no_grad()
def evaluate(network: nn.Module, speech: data.Speech, device: str = 'cpu', workers: int = 0,
             beam: Callable[[Tensor], str] | None = None) -> Evaluation:
    """Score every utterance once, greedily and by the beam search that is given.

    beam: outputs (T', V) -> text. Utterances that CTC cannot align are not part of the loss.
    """
    network.eval()
    losses, sentences = [], []
    targets = [data.encode(u.text, speech.alphabet) for u in speech.utterances]
    outputs = monitor.Outputs(len(speech.alphabet), monitor.letter_entropy(targets))
    batches = data.evaluation_batches(speech.utterances, EVALUATION_BATCH)
    for batch in data.progress(data.loader(speech, batches, workers), len(batches), 'scoring'):
        log_probs, lengths = network(batch.mels.to(device), batch.lengths.to(device))
        log_probs, lengths = log_probs.cpu(), lengths.cpu()
        loss = F.ctc_loss(log_probs.transpose(0, 1), batch.targets, lengths, batch.target_lengths,
                          reduction='none')
        outputs.add(log_probs, lengths, batch.target_lengths)
        aligned = (batch.target_lengths > 0) & ~loss.isinf()
        losses += (loss / batch.target_lengths)[aligned].tolist()
        paths = log_probs.argmax(2).tolist()
        decoded = model.greedy_decode(log_probs, lengths)
        for row, i in enumerate(batch.indices):
            length = int(lengths[row])
            sentences.append(Sentence(i, said=speech.utterances[i].text,
                                      heard=data.decode(decoded[row], speech.alphabet),
                                      path=data.show_path(paths[row][:length], speech.alphabet),
                                      beam=beam(log_probs[row, :length]) if beam else ''))
    return Evaluation(sum(losses) / max(1, len(losses)), error_rates(sentences, 'heard'),
                      error_rates(sentences, 'beam') if beam else None, outputs.summary(),
                      sorted(sentences))


def error_rates(sentences: Sequence[Sentence], heard: str) -> dict:
    """monitor.error_rates of what was 'heard', greedily, or by 'beam' search."""
    return monitor.error_rates([s.said for s in sentences], [getattr(s, heard) for s in sentences])


def beam_search(alphabet: Sequence[str], language_model: model.CharacterModel,
                args: argparse.Namespace) -> Callable[[Tensor], str] | None:
    """The beam search that the flags ask for, outputs (T', V) -> text; None: greedy alone."""
    decoding = model.read_decoding(args)
    if decoding.width == 0:
        return None
    return functools.partial(model.beam_decode, alphabet=alphabet, language_model=language_model,
                             decoding=decoding)


# ---- data and network of a run -------------------------------------------------------------------

def corpus_paths(args: argparse.Namespace) -> dict[str, str | None]:
    """The paths of {'train', 'valid', 'test'}: those given, or the built-in corpus. Raises
    DataError."""
    if args.train_data is None:
        try:
            paths = data.builtin_corpus()
        except (OSError, RuntimeError) as error:
            raise data.DataError(f'corpus/: cannot be written ({error}); correct that, or give '
                                 '--train_data') from None
    else:
        paths = {'train': args.train_data, 'valid': None, 'test': 'none'}
    if args.valid_data is not None:
        paths['valid'] = args.valid_data
    if args.test_data is not None:
        paths['test'] = args.test_data
    if args.overfit:
        paths |= {'valid': 'none', 'test': 'none'}
    return paths


def leave_out(faults: Mapping[str, str], skip_bad: bool) -> None:
    """Print what is wrong with the data, where that is skipped. Raises DataError else."""
    if faults and not skip_bad:
        count = f'utterances that cannot be used: {len(faults)}; --skip_bad leaves them out'
        raise data.DataError('\n'.join([*faults.values(), count]))
    if faults:
        print(*faults.values(), f'{len(faults)} broken utterances are left out', sep='\n')


def load_splits(args: argparse.Namespace, frames_per_output: int) -> data.Splits:
    """The utterances for training, validation and test.

    Raises DataError that lists all that is broken.
    """
    paths = corpus_paths(args)
    splits = data.read_splits(paths['train'], paths['valid'], paths['test'], args.seed,
                              frames_per_output, math.inf if args.skip_bad else CHECK_UP_TO)
    leave_out(splits.faults, args.skip_bad)
    limit = args.max_seconds or math.inf
    long = [u for u in splits.train if u.duration > limit]
    if long:
        print(f'{len(long)} training utterances last longer than {args.max_seconds:g} s and are '
              'left out (--max_seconds):', ' '.join(u.path.name for u in long))
        splits = splits._replace(train=[u for u in splits.train if u.duration <= limit])
        if not splits.train:
            raise data.DataError(f'flags: --max_seconds {args.max_seconds:g} leaves no training '
                                 'utterance; raise it')
    for split, path in paths.items():
        if not getattr(splits, split) and path != 'none':
            raise data.DataError(f'--{split}_data: no utterance of {path or paths["train"]} is '
                                 'left for it; give a larger corpus')
    training_files = {os.path.realpath(u.path) for u in splits.train}
    shared = training_files & {os.path.realpath(u.path) for u in splits.valid + splits.test}
    if shared:
        print(f'{len(shared)} files of validation or test are in training too: their scores do not '
              'show how well new speech is recognised')
    if splits.choice:
        print(splits.choice)
    wanted = args.overfit or args.num_train_samples
    if wanted > len(splits.train):
        print(f'{wanted} training utterances were asked for, and there are {len(splits.train)}')
    train = list(splits.train)
    random.Random(args.seed).shuffle(train)
    train = train[:wanted or None]
    if args.overfit:
        return splits._replace(train=train, valid=train, test=[])
    return splits._replace(train=train)


def plateaus(utterances: Sequence[data.Utterance], alphabet: Sequence[str],
             network: model.Recogniser) -> tuple[float, float]:
    """The losses of uniform and of constant output for these utterances, in nats per label."""
    targets = [data.encode(u.text, alphabet) for u in utterances]
    outputs = network.output_lengths(torch.tensor([u.frames for u in utterances]))
    lines = monitor.plateau_lines(targets, outputs, len(alphabet))
    if math.isnan(lines[0]):
        raise data.DataError(f'{utterances[0].where}: no utterance of this manifest both is '
                             "spelled in the training transcripts' alphabet and lasts long enough "
                             'for its text; give other data')
    return lines


@dataclass
class Task:
    """What a run is to learn, and with what."""
    args: argparse.Namespace
    splits: data.Splits
    alphabet: list[str]
    network: model.Recogniser
    plateaus: tuple[float, float]               # losses, in nats per label
    valid_plateaus: tuple[float, float] | None  # of validation
    rank: int                                   # of several processes, the first is 0
    ranks: int
    length_correlation: float | None            # of training recordings and transcripts
    lm_texts: list[str]                         # that the character model is counted on

    @property
    def hours(self) -> float:
        return sum(u.duration for u in self.splits.train) / 3600

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.network.parameters())

    @property
    def batches_a_pass(self) -> int:
        """Batches of one pass over the training data."""
        return math.ceil(len(self.splits.train) / self.args.batch_size)

    @property
    def passes(self) -> int:
        """How often an epoch goes over the data: once, but more often over a few to overfit."""
        return math.ceil(OVERFIT_UPDATES / self.batches_a_pass) if self.args.overfit else 1

    @property
    def updates_an_epoch(self) -> int:
        """Batches of all its passes."""
        return self.passes * self.batches_a_pass

    def train_speech(self) -> data.Speech:
        args = self.args
        augmentation = {}
        if not args.overfit:
            augmentation = {'spec_augment': args.spec_augment, 'speed_perturb': args.speed_perturb,
                            'concat': args.concat}
        return data.Speech(self.splits.train, self.alphabet,
                           self.network.config.frames_per_output, args.seed, **augmentation)

    @functools.cached_property
    def language_model(self) -> model.CharacterModel:
        """Of the training transcripts, or of --lm_text."""
        return model.CharacterModel.of_texts(self.lm_texts).pruned()

    @functools.cached_property
    def language_model_text(self) -> str:
        """The same as a checkpoint holds it: one text for all of a run's, up to 20 MB."""
        return json.dumps(self.language_model.counts)

    def evaluate(self, utterances: Sequence[data.Utterance],
                 beam: Callable[[Tensor], str] | None = None) -> Evaluation:
        return evaluate(self.network, data.Speech(utterances, self.alphabet), self.args.device,
                        self.args.workers, beam)


def check_characters(utterances: Sequence[data.Utterance], alphabet: Sequence[str]) -> None:
    """Print which characters of utterances that are to be scored can never be said."""
    unseen = {character for u in utterances for character in u.text}.difference(alphabet)
    if unseen:
        print('characters of validation or test that training lacks, each counted as an error:',
              *map(repr, sorted(unseen)))


def check_device(args: argparse.Namespace) -> None:
    """Raise DataError where --device names none that can compute CTC."""
    try:
        outputs = torch.zeros(2, 1, 2, device=args.device).log_softmax(2)
        label = torch.ones(1, 1, dtype=torch.long, device=args.device)
        F.ctc_loss(outputs, label, torch.tensor([2]), torch.tensor([1])).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = ' '.join(str(error).split())[:data.SHORT]
        raise data.DataError(f'flags: --device {args.device}: there is no such device that can '
                             f'compute CTC ({reason}); cpu is always there') from None


def init_from(network: model.Recogniser, alphabet: Sequence[str], path: str) -> None:
    """Give the network the weights of a checkpoint. Raises DataError."""
    try:
        source = model.load_checkpoint(path)
    except model.CheckpointError as error:
        raise data.DataError(f'--init_from {error}') from None
    weights = source.network.state_dict()
    if list(source.alphabet) != list(alphabet):
        print('the head is new: the checkpoint was trained on other characters')
        weights |= {name: tensor for name, tensor in network.state_dict().items()
                    if name.startswith('head.')}
    try:
        network.load_state_dict(weights)
    except RuntimeError:
        settings = asdict(source.network.config).items()
        differ = [f'{name} {theirs}' for name, theirs in settings
                  if name != 'vocab_size' and theirs != getattr(network.config, name)]
        raise data.DataError(f'--init_from {path}: is another network than the flags make: it has '
                             f'{", ".join(differ)}; give it the same') from None


def check_resumed_paths(args: argparse.Namespace) -> None:
    """Raise DataError where a run's data is not found, as from another working directory."""
    for name in 'train_data', 'valid_data', 'test_data', 'lm_text':
        path = getattr(args, name)
        if path not in (None, 'none') and not os.path.exists(path):
            raise data.DataError(f'--resume {args.resume}: its --{name} {path} is not found from '
                                 'here; go to the folder that the run was started in, or bring it '
                                 'back')


def prepare(args: argparse.Namespace, rank: int, ranks: int) -> Task:
    """Read the data and make the network. Raises DataError."""
    config = make_config(args)
    check_device(args)
    if args.resume:
        check_resumed_paths(args)
    if rank:
        torch.distributed.barrier()  # the first process makes the built-in corpus
    splits = load_splits(args, config.frames_per_output)
    if ranks > 1 and rank == 0:
        torch.distributed.barrier()
    alphabet = data.make_alphabet(splits.train)
    network = model.Recogniser(replace(config, vocab_size=len(alphabet)))
    if args.init_from and not (args.resume and (Path(args.resume) / 'state.pt').exists()):
        init_from(network, alphabet, args.init_from)
    check_characters(splits.valid + splits.test, alphabet)
    network.to(args.device)
    lines = plateaus(splits.train, alphabet, network)
    valid_lines = plateaus(splits.valid, alphabet, network) if splits.valid else None
    lm_texts = [u.text for u in splits.train]
    if args.lm_text:
        lm_texts = data.read_text(args.lm_text, alphabet)
    return Task(args, splits, alphabet, network, lines, valid_lines, rank, ranks,
                data.length_correlation(splits.train), lm_texts)


# ---- the run folder ------------------------------------------------------------------------------

def save(content: dict, path: Path) -> None:
    """torch.save a dict of plain data and tensors, all of it or nothing. Raises OSError."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with data.whole_file(path) as file:
        file.write(buffer.getbuffer())


def save_text(text: str, path: Path) -> None:
    """Write a text file, all of it or nothing. Raises OSError."""
    with data.whole_file(path) as file:
        file.write(text.encode())


def lock(folder: Path, held: contextlib.ExitStack) -> None:
    """Keep other processes off a run folder until `held` is closed, or this one ends by any cause.

    Raises DataError, OSError.
    """
    if fcntl is None:  # Windows
        return
    descriptor = os.open(folder, os.O_RDONLY)
    held.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise data.DataError(f'{folder}: another run is at work there; wait until it has ended, or '
                             'name another --run_dir') from None


def refuse_used(folder: Path) -> None:
    """Raise DataError where a new run's folder holds something, OSError where it cannot be read."""
    files = folder.iterdir() if folder.is_dir() else ()
    if any(not path.name.startswith('unfinished.') for path in files):
        advice = f', or --resume {folder}' if (folder / 'config.json').exists() else ''
        raise data.DataError(f'--run_dir {folder}: is not empty; name another folder{advice}')


def make_folder(run_dir: str | None, held: contextlib.ExitStack) -> Path:
    """A locked folder for a new run: by default, named by the time and a free number.

    Raises DataError, OSError.
    """
    if run_dir:
        folder = Path(run_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise data.DataError(f'--run_dir {run_dir}: cannot be made ({error.strerror}); name '
                                 'another folder') from None
        lock(folder, held)
        refuse_used(folder)
        return folder
    name = time.strftime('runs/%Y%m%d-%H%M%S')
    Path(name).parent.mkdir(exist_ok=True)
    for number in itertools.count(1):
        folder = Path(name if number == 1 else f'{name}-{number}')
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        lock(folder, held)
        return folder


def data_fingerprint(task: Task) -> dict[str, str]:
    """{split, or flag: digest of its data}, by which --resume detects that data has changed.

    Of more than CHECK_UP_TO utterances, by the sizes of their files, not their contents.
    """
    splits = task.splits
    sides = {'train': splits.train, 'valid': splits.valid, 'test': splits.test}
    few = sum(map(len, sides.values())) <= CHECK_UP_TO
    contents = {}  # of files, which may hold many utterances
    digests = {}
    for split, utterances in sides.items():
        digest = hashlib.sha256()
        for u in utterances:
            name = '/'.join(u.path.parts[-2:])
            if u.path not in contents:
                contents[u.path] = (zlib.crc32(u.path.read_bytes()) if few
                                    else os.path.getsize(u.path))
            content = contents[u.path]
            digest.update(f'{name} {u.offset} {u.duration} {content} {u.text}\n'.encode())
        digests[split] = digest.hexdigest()
    if task.args.lm_text:
        digests['--lm_text'] = hashlib.sha256('\n'.join(task.lm_texts).encode()).hexdigest()
    return digests


def open_run(task: Task, held: contextlib.ExitStack) -> Path:
    """The run folder, with config.json; with --resume, after checking that the data is the same.

    Raises DataError.
    """
    args = task.args
    fingerprint = data_fingerprint(task)
    if args.resume:
        folder = Path(args.resume)
        if args.ranks != task.ranks:
            raise data.DataError(f'--resume {folder}: the run has {args.ranks} processes, and not '
                                 f'{task.ranks}; start as many')
        for split, digest in fingerprint.items():
            if args.data.get(split) != digest:
                raise data.DataError(f'--resume {folder}: the texts or recordings of {split} are '
                                     'no longer those of the run; bring them back, or start a new '
                                     'run')
        if task.rank == 0:
            for part in folder.glob('unfinished.*'):
                part.unlink()
        return folder
    if task.rank:
        return Path()
    folder = make_folder(args.run_dir, held)
    args.run_dir = str(folder)
    config = vars(args) | asdict(task.network.config)
    config |= {'plateaus': task.plateaus, 'valid_plateaus': task.valid_plateaus,
               'data': fingerprint, 'ranks': task.ranks,
               'length_correlation': task.length_correlation}
    save_text(json.dumps(config, indent=1) + '\n', folder / 'config.json')
    return folder  # from here on it can be resumed


@dataclass
class RunState:
    """What an epoch hands on to the next, and to the end.

    state.pt is {'settings': config.json, 'learner': Learner.state(), 'run': this}; log.jsonl,
    last.pt and best.pt are copies of parts of it, which --resume writes again.
    """
    epoch: int = 0
    train_seconds: float = 0.0
    records: list[dict] = field(default_factory=list)    # of log.jsonl
    last: dict | None = None                             # a checkpoint
    best: dict | None = None                             # that of the lowest validation WER

    @property
    def kept(self) -> str:
        """The checkpoint to use: with validation the best one."""
        return 'best.pt' if self.best else 'last.pt'


def make_checkpoint(task: Task, epoch: int, rates: dict | None) -> dict:
    """What model.load_checkpoint reads; rates: of validation."""
    run = {'epoch': epoch, 'valid': rates, 'test': None, 'hours': task.hours,
           'utterances': len(task.splits.train),
           'train_data': task.args.train_data or 'the built-in corpus'}
    weights = {name: tensor.detach().cpu().clone()
               for name, tensor in task.network.state_dict().items()}
    return {'format': model.FORMAT, 'config': asdict(task.network.config),
            'alphabet': task.alphabet, 'model': weights, 'run': run,
            'language_model': task.language_model_text}


def save_plain_files(folder: Path, state: RunState, best_too: bool) -> None:
    """Write what follows from the state: the log and the checkpoints. Raises OSError."""
    lines = [json.dumps(record, allow_nan=False) + '\n' for record in state.records]
    save_text(''.join(lines), folder / 'log.jsonl')
    save(state.last, folder / 'last.pt')
    if state.best and best_too:
        save(state.best, folder / 'best.pt')


# ---- learning ------------------------------------------------------------------------------------

class Learner:
    """All that changes while a network learns, and what watches it."""

    def __init__(self, task: Task):
        self.task = task
        self.network = task.network
        self.trained = task.network  # what is called in training
        if task.ranks > 1:           # several processes average their gradients
            self.trained = nn.parallel.DistributedDataParallel(task.network,
                                                               forward_sync_buffers=False)
            torch.manual_seed(task.args.seed + task.rank)  # each has dropout of its own
        self.speech = task.train_speech()
        self.total_updates = task.updates_an_epoch * task.args.epochs
        self.optimizer, self.schedule = make_optimizer(task.network, task.args, self.total_updates)
        self.gradients = monitor.Gradients(task.network, PARTS)
        self.departures = monitor.Departures(task.plateaus)
        targets = [data.encode(u.text, task.alphabet) for u in task.splits.train]
        self.outputs = monitor.Outputs(len(task.alphabet), monitor.letter_entropy(targets))

    def batches(self, epoch: int) -> Iterable[data.Batch]:
        """Those of an epoch, counted from 1: they depend on the seed and the epoch alone."""
        task = self.task
        batches = []
        for number in range((epoch - 1) * task.passes, epoch * task.passes):
            batches += data.training_batches(self.speech, task.args.batch_size, number, task.rank,
                                             task.ranks)
        return data.loader(self.speech, batches, task.args.workers)

    def train(self, epoch: int) -> dict:
        """One epoch -> its record of the log. Raises DataError."""
        start = time.time()
        done = (epoch - 1) * self.task.updates_an_epoch
        learning_rate = self.schedule.get_last_lr()[0]
        before = [weight.detach().clone() for weight in self.network.parameters()]

        def watch(update, mean, loss):
            self.departures.add(loss)
            if stop.asked:  # and it came where Python cannot raise, as while a process is forked
                raise KeyboardInterrupt
            if self.task.rank == 0:
                to_do = self.total_updates - done - update
                minutes, seconds = divmod(int(to_do * (time.time() - start) / update), 60)
                data.show_status(f'update {done + update}/{self.total_updates}  loss {mean:.3f}  '
                                 f'{minutes} min {seconds:02d} s to go')

        try:
            loss = train_epoch(self.trained, self.batches(epoch), self.optimizer, self.schedule,
                               self.gradients, self.outputs, self.task.args, watch)
        except Diverged as error:
            names = ' '.join(self.speech.utterances[i].path.name for i in error.indices)
            raise data.DataError(f'training diverged in epoch {epoch}: {error}; lower '
                                 f'--learning_rate, or look at {names}') from None
        record = {'epoch': epoch, 'train_loss': loss,
                  'train_plateau_fraction': monitor.plateau_fraction(loss, self.task.plateaus),
                  'learning_rate': learning_rate, 'epoch_seconds': time.time() - start,
                  'updates': self.departures.updates, **self.departures.left,
                  'weight_change': relative_change(before, self.network.parameters())}
        record |= self.gradients.summary() | self.outputs.summary()
        if self.network.gate is not None:
            record['gate'] = self.network.gate.abs().mean().item()
        return record

    def state(self) -> dict:
        """All of it, for state.pt; the random numbers are those of every process."""
        own = [torch.get_rng_state()]
        device = self.task.args.device
        if device.startswith('cuda'):
            own.append(torch.cuda.get_rng_state(device))
        random_states = [own]
        if self.task.ranks > 1:
            random_states = [None] * self.task.ranks
            torch.distributed.all_gather_object(random_states, own)
        return {'model': self.network.state_dict(), 'optimizer': self.optimizer.state_dict(),
                'schedule': self.schedule.state_dict(), 'random': random_states,
                'gradients': self.gradients.state(), 'departures': self.departures.state()}

    def restore(self, state: dict) -> None:
        """Go on from what state() gave."""
        self.network.load_state_dict(state['model'])
        self.optimizer.load_state_dict(state['optimizer'])
        self.schedule.load_state_dict(state['schedule'])
        self.gradients.restore(state['gradients'])
        self.departures.restore(state['departures'])
        cpu, *cuda = state['random'][self.task.rank]
        torch.set_rng_state(cpu)
        device = self.task.args.device
        if cuda and device.startswith('cuda'):
            torch.cuda.set_rng_state(cuda[0], device)


def relative_change(before: Sequence[Tensor], after: Iterable[Tensor]) -> float:
    """The norm of the change of all weights together, as a share of their own."""
    change = sum((new.detach() - old).square().sum() for old, new in zip(before, after))
    size = sum(old.square().sum() for old in before)
    return (change / size).sqrt().item()


def load_state(folder: Path, learner: Learner) -> RunState:
    """Bring a run back to the end of its last whole epoch, or to its start. Raises DataError."""
    path = folder / 'state.pt'
    if not path.exists():
        if (folder / 'last.pt').exists():
            raise data.DataError(f'{path}: is missing, so the run cannot be resumed; start a new '
                                 f'run with --init_from {folder}/last.pt')
        return RunState()
    try:
        content = torch.load(path, weights_only=True, map_location='cpu')
        if content['settings'] != (folder / 'config.json').read_text():
            raise data.DataError(f'{folder}/config.json: is not what the run began with; bring it '
                                 'back')
        learner.restore(content['learner'])
        state = RunState(**content['run'])
    except data.DataError:
        raise
    except Exception as error:  # whatever a damaged file may raise
        raise data.DataError(f'{path}: cannot be resumed from ({type(error).__name__}); start a '
                             f'new run with --init_from {folder}/last.pt') from None
    if learner.task.rank == 0:
        save_plain_files(folder, state, best_too=True)
    return state


def validate(task: Task, record: dict, before: dict | None) -> Evaluation | None:
    """Score the validation data, if any, and add what it says to the record, with the phase.

    before: the record of the epoch before, if there was one. Raises DataError.
    """
    evaluation = None
    # The same network in eval mode: where it does worse, batch norm's statistics are not right.
    record['train_eval_loss'] = task.evaluate(task.splits.train[:TRAIN_EVALUATED]).loss
    if task.splits.valid:
        evaluation = task.evaluate(task.splits.valid)
        record |= {'valid_loss': evaluation.loss,
                   'valid_plateau_fraction': monitor.plateau_fraction(evaluation.loss,
                                                                      task.valid_plateaus),
                   'valid_entropy': evaluation.outputs['entropy'],
                   'valid_dependence_share': evaluation.outputs['dependence_share'],
                   'deletions': evaluation.rates['deletions'] / evaluation.rates['words'],
                   'wer': evaluation.rates['wer'], 'cer': evaluation.rates['cer']}
    for loss in 'train_eval_loss', 'valid_loss':
        if not math.isfinite(record.get(loss, 0)):
            raise data.DataError(f'training diverged in epoch {record["epoch"]}: the {loss} is '
                                 f'{record[loss]}; lower --learning_rate')
    _, constant = task.valid_plateaus or task.plateaus
    record['phase'] = monitor.name_phase(record, constant, before)
    record['warnings'] = monitor.diagnose(record)
    return evaluation


def finished(task: Task, state: RunState) -> bool:
    """Whether all epochs are done, or --overfit has nothing left to learn."""
    by_heart = task.args.overfit and state.last and state.last['run']['valid']['cer'] == 0
    return state.epoch >= task.args.epochs or bool(by_heart)


def fit(task: Task, folder: Path) -> RunState:
    """Train epoch by epoch, validate, record, save, report. Raises DataError, OSError."""
    learner = Learner(task)
    state = load_state(folder, learner) if task.args.resume else RunState()
    settings = '' if task.rank else (folder / 'config.json').read_text()
    while not finished(task, state):
        state.epoch += 1
        record = learner.train(state.epoch)
        learner_state = learner.state()
        state.train_seconds += record.pop('epoch_seconds')
        record['train_seconds'] = state.train_seconds
        if task.rank:
            continue  # the first process validates, prints and writes
        evaluation = validate(task, record, state.records[-1] if state.records else None)
        rates = evaluation.rates if evaluation else None
        state.records.append(record)
        state.last = make_checkpoint(task, state.epoch, rates)
        if evaluation and monitor.best_epoch(state.records) is record:
            state.best = state.last
        save({'settings': settings, 'learner': learner_state, 'run': vars(state)},
             folder / 'state.pt')
        save_plain_files(folder, state, best_too=state.best is state.last)
        sentence = None
        if evaluation:
            shown = evaluation.sentences[state.epoch % len(evaluation.sentences)]
            sentence = (shown.said, shown.heard, shown.path)
        monitor.print_epoch(record, sentence)
    return state


# ---- the end of a run ----------------------------------------------------------------------------

def save_sentences(path: Path, utterances: Sequence[data.Utterance],
                   sentences: Sequence[Sentence]) -> None:
    """Write what was said and heard, a tab-separated line for each utterance. Raises OSError."""
    lines = ['file\tsaid\theard\tbeam\n']
    for sentence in sentences:
        file = ' '.join(utterances[sentence.index].path.name.split())  # no tabs, no line feeds
        lines.append(f'{file}\t{sentence.said}\t{sentence.heard}\t{sentence.beam}\n')
    save_text(''.join(lines), path)


def print_scores(split: str, rates: dict) -> None:
    """Print the error rates of a split, with what they are made of."""
    low, high = rates['interval']
    edits = f'{rates["substitutions"]} S, {rates["insertions"]} I, {rates["deletions"]} D'
    print(f'{split}: WER {rates["wer"]:.2f} % ({edits} in {rates["words"]} words of '
          f'{rates["utterances"]} utterances; 95 %: {low:.1f} to {high:.1f}), '
          f'CER {rates["cer"]:.2f} %, sentences with errors {rates["ser"]:.1f} %')


def print_all_scores(results: Mapping) -> None:
    """Print the error rates of a results.json, greedy and by beam search."""
    names = {'valid': 'valid', 'test': 'test', 'test_new': 'test, sentences new to training'}
    for split, name in names.items():
        if results.get(split):
            print_scores(name, results[split])
        if results.get(f'{split}_beam'):
            print_scores(f'{name}, beam search', results[f'{split}_beam'])


def print_verdict(task: Task, folder: Path, state: RunState) -> None:
    """Print whether --overfit has learnt its utterances. Raises DataError where not."""
    cer = state.best['run']['valid']['cer']
    updates = task.updates_an_epoch * state.epoch
    utterances = len(task.splits.train)
    if cer:
        advice = (f'see what python monitor.py {folder} says, and check that each recording has '
                  'its own transcript')
        if state.records[-1]['phase'] in ('learning', 'learnt'):
            advice = f'it was still learning, so give it more, as by --epochs {2 * state.epoch}'
        raise data.DataError(f'NOT LEARNT: {utterances} utterances, {updates} updates, '
                             f'CER {cer:.1f} %; {advice}')
    print(f'learnt: all {utterances} utterances are right after {updates} updates; data, loss and '
          'network work together')


def save_example(path: Path, utterances: Sequence[data.Utterance],
                 sentences: Sequence[Sentence]) -> str:
    """Write the longest clip that comes out right, or any if none does -> its text.

    Raises OSError.
    """
    right = [utterances[s.index] for s in sentences if s.said == s.heard]
    u = max(right, key=lambda u: len(u.text), default=utterances[0])
    wave, rate = data.load_utterance(u)
    data.save_wave(data.resample(wave, rate, data.SAMPLE_RATE).numpy(), path)
    return u.text


def finish(task: Task, folder: Path, state: RunState) -> dict:
    """Score, write results.json, report -> its contents. Raises DataError, OSError."""
    splits = task.splits
    checkpoint = state.best or state.last
    task.network.load_state_dict(checkpoint['model'])
    results = {'valid': None, 'valid_beam': None, 'test': None, 'test_beam': None,
               'updates': task.updates_an_epoch * state.epoch, 'train_seconds': state.train_seconds,
               'parameters': task.parameters, 'seed': task.args.seed}
    beam = beam_search(task.alphabet, task.language_model, task.args)
    sentences = []
    for split in 'valid', 'test':
        utterances = getattr(splits, split)
        if utterances:
            evaluation = task.evaluate(utterances, beam)
            save_sentences(folder / f'{split}.tsv', utterances, evaluation.sentences)
            results |= {split: evaluation.rates, f'{split}_beam': evaluation.beam_rates}
            sentences = evaluation.sentences
    if splits.test:
        texts = {u.text for u in splits.train}
        new = [s for s in sentences if s.said not in texts]
        if 0 < len(new) < len(sentences):  # a language model knows the others by heart
            results['test_new'] = error_rates(new, 'heard')
            results['test_new_beam'] = error_rates(new, 'beam') if beam else None
    checkpoint['run']['test'] = results['test']
    save(checkpoint, folder / state.kept)
    clip = save_example(folder / 'clip.wav', splits.test or splits.valid or splits.train, sentences)
    # This file says that the run is finished, so it comes last.
    save_text(json.dumps(results, indent=1, allow_nan=False) + '\n', folder / 'results.json')
    (folder / 'state.pt').unlink(missing_ok=True)
    print_all_scores(results)
    if task.args.overfit:
        print_verdict(task, folder, state)
    command = [sys.orig_argv[0], os.path.relpath(model.__file__), folder / state.kept,
               folder / 'clip.wav', '--beam', model.Decoding().width]
    print(f'results in {folder}; to transcribe a clip ("{clip}"):\n   ',
          shlex.join(map(str, command)))
    return results


# ---- a run ---------------------------------------------------------------------------------------

@functools.cache  # of a process, whose runs need not measure it again
def fastest_threads() -> int:
    """As many threads as the CPU has cores, or one where that is faster, by trying both.

    Threads wait for each other in a busy loop: on an idle machine that is 1.5 times as fast as one
    thread, but where other work holds a core, each waits for one that does not run.
    OMP_NUM_THREADS, where it is set, decides instead.
    """
    most = torch.get_num_threads()
    if 'OMP_NUM_THREADS' in os.environ or most == 1:
        return most
    lstm = nn.LSTM(256, 256, batch_first=True)
    clips = torch.zeros(8, 100, 256)
    seconds = {}
    for threads in (most, 1):
        torch.set_num_threads(threads)
        lstm(clips)  # the first time is slower
        start = time.perf_counter()
        for _ in range(5):
            states, _ = lstm(clips)
            states.sum().backward()
        seconds[threads] = time.perf_counter() - start
    return min(seconds, key=seconds.get)


def run(args: argparse.Namespace, rank: int = 0, ranks: int = 1) -> dict | None:
    """Train and score as the flags say -> the contents of results.json. Raises DataError, OSError.

    Of several processes, each trains on its share of every batch; the first (rank 0) validates,
    prints and writes.
    """
    # Gradients that fade through time become numbers below 1e-38, with which a CPU works many times
    # slower: without this, an update takes 2.5 times as long once the outputs are sharp.
    torch.set_flush_denormal(True)
    args.threads = args.threads or fastest_threads()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    if ranks > 1 and (args.overfit or args.benchmark or args.evaluate):
        raise data.DataError('flags: --overfit, --benchmark and --evaluate are for one process; '
                             'run them without torchrun')
    if args.evaluate:
        return evaluate_checkpoint(args)
    with contextlib.ExitStack() as held:
        if args.resume:
            if rank == 0:
                lock(Path(args.resume), held)
            if (Path(args.resume) / 'results.json').exists():
                return report_finished(Path(args.resume))
        return train_task(args, rank, ranks, held)


def report_finished(folder: Path) -> dict:
    """Print that a run has nothing left to do, and its scores -> its results.json.

    Raises DataError.
    """
    try:
        results = json.loads((folder / 'results.json').read_text())
        print(f'{folder} is finished: nothing is left to do')
        print_all_scores(results)
        (folder / 'state.pt').unlink(missing_ok=True)
        return results
    except (ValueError, KeyError, TypeError, AttributeError):
        raise data.DataError(f'{folder}/results.json: is damaged; score the checkpoint again with '
                             '--evaluate') from None


def train_task(args: argparse.Namespace, rank: int, ranks: int,
               held: contextlib.ExitStack) -> dict | None:
    """A run from its data to its results. Raises DataError, OSError."""
    try:
        with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
            task = prepare(args, rank, ranks)
            print(f'{len(task.splits.train)} utterances, {task.hours:.2f} hours, '
                  f'{len(task.alphabet)} symbols, {task.parameters:,} parameters')
        if args.benchmark:
            return benchmark(task.network, task.train_speech(), args)
        describe_task(task)
        folder = open_run(task, held)
    except data.DataError:
        if rank:
            wait_for_first()  # which meets the same error, and prints it
        raise
    state = fit(task, folder)
    if ranks > 1:
        # A thread of gloo still drops what the last epoch gathered, and aborts where Python ends.
        torch.distributed.barrier()
    return None if rank else finish(task, folder, state)


def wait_for_first() -> None:
    """In another process than the first: wait until that one has ended, and end in silence."""
    with contextlib.suppress(RuntimeError):
        torch.distributed.barrier()
    sys.exit(1)


def describe_task(task: Task) -> None:
    """Print what is known before training: undone fixes, plateaus, outputs for each label."""
    undone = undone_fixes(task.args.undo, task.args.only)
    if undone:
        print('without', ', '.join(f'{name} ({FIXES[name].setting} {FIXES[name].before})'
                                   for name in undone))
    print(monitor.legend(task.plateaus))
    frames = sum(u.frames for u in task.splits.train)
    labels = sum(len(u.text) for u in task.splits.train)
    frames_per_output = task.args.frames_per_output
    outputs = frames / frames_per_output / labels
    advice = ''
    if outputs < 2 and frames_per_output > 1:
        advice = f'; that is fast speech, so try --frames_per_output {frames_per_output // 2}'
    print(f'{outputs:.1f} outputs a label{advice}')
    for note in (data.punctuation_note(task.alphabet),
                 monitor.unrelated_lengths(task.length_correlation)):
        if note:
            print(note)


def evaluate_checkpoint(args: argparse.Namespace) -> dict:
    """Score a checkpoint on --test_data -> the contents of results.json. Raises DataError,
    OSError."""
    if not args.test_data:
        raise data.DataError('flags: --evaluate needs --test_data, the corpus to score on')
    check_device(args)
    try:
        checkpoint = model.load_checkpoint(args.evaluate)
    except model.CheckpointError as error:
        raise data.DataError(f'--evaluate {error}') from None
    language_model = checkpoint.language_model
    if args.lm_text:
        language_model = model.read_character_model(args.lm_text, checkpoint.alphabet)
    utterances, faults = data.read_corpus(args.test_data, 'test')
    faults |= data.check_recordings(utterances, {})
    leave_out(faults, args.skip_bad)
    utterances = [u for u in utterances if u.where not in faults]
    if not utterances:
        raise data.DataError(f'--test_data {args.test_data}: no utterance of it can be used; give '
                             'another corpus')
    check_characters(utterances, checkpoint.alphabet)
    with contextlib.ExitStack() as held:
        folder = make_folder(args.run_dir, held)
        speech = data.Speech(utterances, checkpoint.alphabet)
        beam = beam_search(checkpoint.alphabet, language_model, args)
        evaluation = evaluate(checkpoint.network.to(args.device), speech, args.device,
                              args.workers, beam)
        results = {'valid': None, 'test': evaluation.rates, 'test_beam': evaluation.beam_rates,
                   'decoding': model.read_decoding(args)._asdict(), 'checkpoint': args.evaluate,
                   'test_data': args.test_data, 'train_data': checkpoint.run['train_data']}
        save_sentences(folder / 'test.tsv', utterances, evaluation.sentences)
        save_text(json.dumps(results, indent=1) + '\n', folder / 'results.json')
    print_all_scores(results)
    print(f'what was said and heard: {folder / "test.tsv"}')
    return results


# ---- speed ---------------------------------------------------------------------------------------

def peak_memory() -> int | None:
    """The largest memory this process has had, in MB; None on Windows."""
    try:
        from resource import RUSAGE_SELF, getrusage
    except ImportError:
        return None
    return getrusage(RUSAGE_SELF).ru_maxrss // (2 ** 20 if sys.platform == 'darwin' else 2 ** 10)


def benchmark(network: model.Recogniser, speech: data.Speech, args: argparse.Namespace) -> dict:
    """Print the seconds of audio that pass in a second, at the settings of args, on 40 batches."""
    batches = data.training_batches(speech, args.batch_size, epoch=0)[:40]
    items = [item for batch in batches for item in batch]
    utterances = [speech.utterances[i] for _, i in items]
    trained = [u for item in items for u in speech.parts(*item)]  # with --concat more
    optimizer, schedule = make_optimizer(network, args, 4 * len(batches))
    gradients = monitor.Gradients(network, PARTS)
    outputs = monitor.Outputs(len(speech.alphabet), letters=1)

    def load():
        return data.loader(speech, batches, args.workers)

    def train(batches):
        train_epoch(network, batches, optimizer, schedule, gradients, outputs, args)

    @torch.no_grad()
    def transcribe(batch_size):
        network.eval()
        own_speed = data.Speech(utterances, speech.alphabet)
        clips = data.evaluation_batches(utterances, batch_size)
        for batch in data.loader(own_speed, clips, args.workers):
            log_probs, lengths = network(batch.mels.to(args.device), batch.lengths.to(args.device))
            model.greedy_decode(log_probs, lengths)

    def rate(work, said):
        for _ in range(2):  # the first time is slower: new shapes, cold files
            start = time.perf_counter()
            work()
            seconds = time.perf_counter() - start
        return round(sum(u.duration for u in said) / seconds, 1)

    ready = list(load())
    padded = sum(batch.mels.shape[0] * batch.mels.shape[2] for batch in ready)
    frames = sum(int(batch.lengths.sum()) for batch in ready)
    result = {
        'features': rate(lambda: list(load()), trained),
        'features and update': rate(lambda: train(load()), trained),
        'update': rate(lambda: train(ready), trained),
        'inference, batch 1': rate(lambda: transcribe(1), utterances),
        f'inference, batch {EVALUATION_BATCH}': rate(lambda: transcribe(EVALUATION_BATCH),
                                                     utterances),
        'threads': torch.get_num_threads(),
        'padding in training, %': round(100 - 100 * frames / padded, 1),
        'peak memory, MB': peak_memory(),
    }
    if args.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f'{value!s:>10}  {key}')
    return result


# ---- python train.py -----------------------------------------------------------------------------

def stop(signal_number: int, frame: object) -> None:
    """Ctrl-C or SIGTERM ends a run; an impatient second one, while it ends, changes nothing."""
    if stop.asked is None or time.monotonic() - stop.asked > 2:
        stop.asked = time.monotonic()
        raise KeyboardInterrupt


stop.asked = None  # at what time it was


def how_to_go_on(args: argparse.Namespace | None) -> str:
    """The next step after a run was ended."""
    folder = args and (args.resume or args.run_dir)
    if folder and (Path(folder) / 'config.json').exists():
        return f'to go on: python train.py --resume {shlex.quote(folder)}'
    return 'nothing was saved yet: run the same command again'


def main(argv: Sequence[str] | None = None) -> dict | None:
    args = None
    rank, ranks = 0, 1
    if BY_TORCHRUN:
        rank, ranks = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
    try:
        with monitor.one_line_ends('train.py', lambda: how_to_go_on(args)):
            args = parse_flags(argv)
            if ranks > 1:
                check_device(args)
                torch.distributed.init_process_group('gloo' if args.device == 'cpu' else 'nccl')
                if args.device != 'cpu':
                    args.device = f'cuda:{os.environ["LOCAL_RANK"]}'
                    torch.cuda.set_device(args.device)
            with contextlib.redirect_stdout(open(os.devnull, 'w') if rank else sys.stdout):
                return run(args, rank, ranks)
    except SystemExit as end:
        if rank and isinstance(end.code, str):
            sys.exit(1)  # the first process says it
        raise
    except data.DataError as error:
        if rank and not torch.distributed.is_initialized():
            sys.exit(1)  # the same flags, the same message
        # The frames hold the loader, whose processes end with it at once, but slowly at exit.
        traceback.clear_frames(error.__traceback__)
        # From one of them the error comes with that process's traceback before it.
        sys.exit('train.py: ' + str(error).rpartition('data.DataError: ')[2].strip())
    except RuntimeError as error:
        reason = str(error).partition('\n')[0].rstrip('. ')
        if 'DataLoader worker' in reason:
            traceback.clear_frames(error.__traceback__)
            sys.exit(f'train.py: a process that loads recordings has ended ({reason}); where that '
                     f'happens again, load without them, with --workers 0; {how_to_go_on(args)}')
        if ranks == 1 or isinstance(error, torch.OutOfMemoryError):
            raise
        sys.exit('train.py: another process of this run has ended, or cannot be reached '
                 f'({reason}); {how_to_go_on(args)}')


if __name__ == '__main__':
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    main()
    if BY_TORCHRUN:  # threads of gloo may abort where Python ends by itself
        sys.stdout.flush()
        os._exit(0)
