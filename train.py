"""Train the recogniser on recordings and transcripts, and score it.

    python train.py                                           the built-in corpus
    python train.py --train_data my/train.tsv --epochs 40     your own recordings
    python train.py --train_data my/train.tsv --overfit 10    the first experiment with new data
 A run folder holds config.json (flags, network, plateau lines), log.jsonl (one JSON object an
epoch), best.pt (lowest validation WER), last.pt, and at the end results.json and clip.wav, a
recording to transcribe. Losses are CTC in nats per label: each utterance's negative log-likelihood
divided by its number of labels, averaged over utterances.

References: Smith & Topin 2019 (OneCycle); Loshchilov & Hutter 2019 (AdamW); Lee & Watanabe 2021
(intermediate CTC).
"""
import argparse
import contextlib
import json
import math
import os
import random
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import soundfile
import torch
import torch.nn.functional as F
from torch import nn

import data
import model
import monitor

EVALUATION_BATCH = 16   # utterances
CHECK_UP_TO = 5000      # utterances; of more, files are decoded beforehand only with --skip_bad
OVERFIT_UPDATES = 25    # at least, in an epoch of --overfit
PARTS = {               # of the network, by the names of their parameters
    'backbone': ('stem', 'blocks', 'last', 'early', 'projection', 'transposed_conv'),
    'recurrent': ('recurrent',),
    'head': ('head',),
}


# ---- flags ---------------------------------------------------------------------------------------

def number(kind: type, low: float, high: float = 2 ** 53) -> Callable[[str], float]:
    """An argparse type: int or float, from low to high (beyond 2^53 a float cannot count)."""
    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f'{text} is not between {low} and {high}')
        return kind(text)
    parse.__name__ = kind.__name__
    return parse


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each default; what an unset flag means, its help says."""

    def _get_help_string(self, action):
        if action.default is None:
            return action.help
        return super()._get_help_string(action)


def parse_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of train.py; settings of the network that were not given are left out."""
    parser = argparse.ArgumentParser(
        description='Train a MobileNetV3 + BiLSTM + CTC speech recogniser.',
        allow_abbrev=False, formatter_class=HelpFormatter)
    add_data_flags(parser.add_argument_group('data'))
    add_optimisation_flags(parser.add_argument_group('optimisation'))
    add_model_flags(parser.add_argument_group('model'))
    add_run_flags(parser.add_argument_group('run'))
    return parser.parse_args(argv)


def add_data_flags(group: argparse._ArgumentGroup) -> None:
    count = number(int, 0)
    add = group.add_argument
    add('--train_data',
        help='corpus: .jsonl, .csv or .tsv manifest, LibriSpeech or CMU Sphinx folder; unset: the '
             'built-in corpus with its own validation and test, spoken into the folder corpus/')
    add('--valid_data',
        help='corpus that chooses best.pt; unset: a tenth of the training data, other speakers if '
             'ten are known; none: train on everything, keep the last checkpoint')
    add('--test_data', help='corpus scored once, at the end; unset or none: no test')
    add('--skip_bad', action=argparse.BooleanOptionalAction, default=False,
        help='leave out utterances that cannot be used, which else end the run')
    add('--overfit', type=count, default=0,
        help='learn N utterances by heart, without augmentation; 0: train as usual')
    add('--num_train_samples', type=count, default=0,
        help='train on N utterances, drawn by the seed; 0: all')
    add('--spec_augment', action=argparse.BooleanOptionalAction, default=False,
        help='mask bands and stretches of time in training')
    add('--speed_perturb', action=argparse.BooleanOptionalAction, default=True,
        help='play at 0.9 to 1.1 times the speed in training')
    add('--workers', type=count, default=0,
        help='processes that load audio; 0: the training process itself')


def add_optimisation_flags(group: argparse._ArgumentGroup) -> None:
    positive, amount = number(int, 1), number(float, 0)
    add = group.add_argument
    add('--epochs', type=positive, default=8, help='passes over the training data')
    add('--batch_size', type=positive, default=8, help='utterances an update')
    add('--learning_rate', type=amount, default=3e-4, help='OneCycleLR climbs to ten times this')
    add('--weight_decay', type=amount, default=1e-5, help="AdamW's; 0: none")
    add('--grad_clip', type=amount, default=5.0,
        help='largest norm of all gradients together; 0: no limit')
    add('--interctc_weight', type=number(float, 0, 1), default=0.3,
        help="share of the first LSTM layer's own CTC loss; 0: none")
    add('--seed', type=number(int, 0), default=0,
        help='of hold-out, subset, initialisation, order, augmentation, dropout')


def add_model_flags(group: argparse._ArgumentGroup) -> None:
    positive = number(int, 1)
    fixed = model.Config(vocab_size=1)
    add = group.add_argument
    add('--model', choices=model.PRESETS, default='fixed',
        help="fixed: ours; literal: the original's fixed network; before: its network before the "
             'fixes. The flags below change single settings; in brackets those of fixed')
    unset = {'default': argparse.SUPPRESS}
    add('--blocks', type=positive, help=f'of MobileNetV3-Small, 2 to 11 [{fixed.blocks}]', **unset)
    add('--frames_per_output', type=positive,
        help=f'frames of 10 ms: 1, 2 or 4 [{fixed.frames_per_output}]', **unset)
    add('--hidden', type=positive, help=f'LSTM units in each direction [{fixed.hidden}]', **unset)
    add('--dropout', type=number(float, 0),
        help=f'before each LSTM layer and the head; 0: none [{fixed.dropout}]', **unset)
    switch = unset | {'action': argparse.BooleanOptionalAction}
    add('--zero_init_residual', **switch,
        help=f'residual blocks start as identities [{fixed.zero_init_residual}]')
    add('--early_path', **switch, help="with 4 blocks or more: add block 3's features to the deep "
                                       f'ones [{fixed.early_path}]')
    add('--squeeze_excite', **switch,
        help=f"MobileNetV3's channel gates [{fixed.squeeze_excite}]")


def add_run_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add('--run_dir', default=None, help='folder for the results; unset: runs/ and the time')
    add('--device', default='cpu', help='cpu, cuda, cuda:1, ...')
    add('--benchmark', action=argparse.BooleanOptionalAction, default=False,
        help='train nothing; measure the speed of all parts at these settings')
    add('--json', action=argparse.BooleanOptionalAction, default=False,
        help='with --benchmark: print it as one JSON object')


def make_config(args: argparse.Namespace) -> model.Config:
    """The network's settings, all but the size of its alphabet. Raises DataError."""
    given = {key: value for key, value in vars(args).items()
             if key in model.Config.__dataclass_fields__}
    try:
        return model.Config(vocab_size=1, **model.PRESETS[args.model] | given)
    except ValueError as error:
        raise data.DataError(f'flags: {error}') from None


# ---- training and evaluation ---------------------------------------------------------------------

Optimizer = torch.optim.Optimizer
Schedule = torch.optim.lr_scheduler.LRScheduler


def make_optimizer(network: nn.Module, args: argparse.Namespace,
                   updates: int) -> tuple[Optimizer, Schedule]:
    """AdamW, and OneCycleLR to ten times the learning rate.

    10 % of the updates climb from 0.4 of it, the rest fall to nothing, both by cosine; AdamW's
    first beta goes 0.95, 0.85, 0.95 the other way (PyTorch's defaults).
    """
    # fused: one kernel for all parameters, 7 % of an update on a CPU.
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.learning_rate,
                                  weight_decay=args.weight_decay, fused=True)
    # PyTorch divides by zero at exactly 10 updates: 10 % of them is one, the climb's start and end.
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=10 * args.learning_rate, total_steps=max(updates, 11), pct_start=0.1,
        anneal_strategy='cos')
    return optimizer, schedule


def train_epoch(network: nn.Module, batches: Iterable[data.Batch], optimizer: Optimizer,
                schedule: Schedule, gradients: monitor.Gradients, outputs: monitor.Outputs,
                args: argparse.Namespace, progress: Callable = monitor.show_progress) -> float:
    """One pass over the batches -> the mean training loss in nats per label, of this process."""
    network.train()
    gradients.reset()
    outputs.reset()
    total, count = 0.0, 0
    start = time.time()
    for update, batch in enumerate(batches, 1):
        layers, lengths = network(batch.mels.to(args.device), batch.lengths.to(args.device),
                                  every_layer=True)
        targets = batch.targets.to(args.device)
        target_lengths = batch.target_lengths.to(args.device)
        # Averaged over utterances, each one's loss divided by its number of labels: nats per label.
        first, loss = [F.ctc_loss(log_probs.transpose(0, 1), targets, lengths, target_lengths)
                       for log_probs in (layers[0], layers[-1])]
        if not torch.isfinite(loss):
            raise data.DataError(f'training diverged, the loss is {loss.item()}; '
                                 'lower --learning_rate')
        optimizer.zero_grad()
        # Intermediate CTC: the first layer is told directly what the last one is to say.
        loss.lerp(first, args.interctc_weight).backward()
        if gradients.clip(args.grad_clip):  # False, and counted, where one is not finite
            optimizer.step()
            schedule.step()
        total += loss.item() * len(batch.mels)
        count += len(batch.mels)
        outputs.add(layers[-1], lengths, target_lengths)
        progress(schedule.last_epoch, schedule.total_steps, total / count,
                 (time.time() - start) / update)
    return total / count


class Sentence(NamedTuple):
    """One evaluated utterance."""
    index: int
    said: str
    heard: str
    strip: str  # the label of every output: '.' for the blank, '_' for a space


class Evaluation(NamedTuple):
    """What evaluate found."""
    loss: float                # mean, in nats per label
    rates: dict                # monitor.error_rates
    sentences: list[Sentence]  # in the utterances' order


@torch.no_grad()
def evaluate(network: nn.Module, speech: data.Speech, device: str = 'cpu',
             workers: int = 0) -> Evaluation:
    """Score every utterance once; the loss leaves those out that CTC cannot align."""
    network.eval()
    losses, sentences = [], []
    batches = data.evaluation_batches(speech.utterances, EVALUATION_BATCH)
    for batch in data.loader(speech, batches, workers):
        log_probs, lengths = network(batch.mels.to(device), batch.lengths.to(device))
        log_probs, lengths = log_probs.cpu(), lengths.cpu()
        loss = F.ctc_loss(log_probs.transpose(0, 1), batch.targets, lengths, batch.target_lengths,
                          reduction='none')
        aligned = (batch.target_lengths > 0) & ~loss.isinf()
        losses += (loss / batch.target_lengths)[aligned].tolist()
        paths = log_probs.argmax(2).tolist()
        decoded = model.greedy_decode(log_probs, lengths)
        for i, length, path, symbols in zip(batch.indices, lengths.tolist(), paths, decoded):
            labels = [speech.alphabet[symbol].replace(' ', '_') or '.' for symbol in path[:length]]
            sentences.append(Sentence(i, said=speech.utterances[i].text,
                                      heard=data.decode(symbols, speech.alphabet),
                                      strip=''.join(labels)))
    rates = monitor.error_rates([s.said for s in sentences], [s.heard for s in sentences])
    return Evaluation(sum(losses) / max(1, len(losses)), rates, sorted(sentences))


# ---- data and network of a run -------------------------------------------------------------------

def corpus_paths(args: argparse.Namespace) -> dict[str, str | None]:
    """The paths of {'train', 'valid', 'test'}: those given, or the built-in corpus. Raises
    DataError."""
    if args.train_data is None:
        try:
            paths = data.builtin_corpus()
        except OSError as error:
            raise data.DataError(f'corpus/: cannot be written ({error}); mend that, or give '
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


def load_splits(args: argparse.Namespace, frames_per_output: int) -> data.Splits:
    """The utterances for training, validation and test.

    Raises DataError that lists all that is broken.
    """
    paths = corpus_paths(args)
    splits = data.read_splits(paths['train'], paths['valid'], paths['test'], args.seed,
                              frames_per_output, math.inf if args.skip_bad else CHECK_UP_TO)
    faults = list(splits.faults.values())
    if faults and not args.skip_bad:
        raise data.DataError('\n'.join([*faults, f'{len(faults)} broken; --skip_bad trains without '
                                                 'them']))
    if faults:
        print(*faults, f'{len(faults)} broken utterances are left out', sep='\n')
    for split, path in paths.items():
        if not getattr(splits, split) and path != 'none':
            raise data.DataError(f'--{split}_data: no utterance of {path or paths["train"]} is '
                                 'left for it; give a larger corpus')
    training_files = {os.path.abspath(u.path) for u in splits.train}
    shared = training_files & {os.path.abspath(u.path) for u in splits.valid + splits.test}
    if shared:
        print(f'{len(shared)} files of validation or test are in training too: their scores say '
              'nothing of new speech')
    if splits.choice:
        print(splits.choice)
    train = list(splits.train)
    random.Random(args.seed).shuffle(train)
    train = train[:args.overfit or args.num_train_samples or None]
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
    lines: tuple[float, float]               # of training, in nats per label
    valid_lines: tuple[float, float] | None  # of validation
    rank: int                                # of several processes, the first is 0
    ranks: int

    @property
    def hours(self) -> float:
        return sum(u.duration for u in self.splits.train) / 3600

    @property
    def passes(self) -> int:
        """How often an epoch goes over the data: once, but more often over a few to overfit."""
        if not self.args.overfit:
            return 1
        return math.ceil(OVERFIT_UPDATES / math.ceil(len(self.splits.train) / self.args.batch_size))

    @property
    def updates(self) -> int:
        """Of an epoch."""
        return self.passes * math.ceil(len(self.splits.train) / self.args.batch_size)

    def train_speech(self) -> data.Speech:
        augment = not self.args.overfit
        return data.Speech(self.splits.train, self.alphabet,
                           self.network.config.frames_per_output, self.args.seed,
                           augment and self.args.spec_augment, augment and self.args.speed_perturb)

    def evaluate(self, utterances: Sequence[data.Utterance]) -> Evaluation:
        return evaluate(self.network, data.Speech(utterances, self.alphabet), self.args.device,
                        self.args.workers)


def check_characters(splits: data.Splits, alphabet: Sequence[str]) -> None:
    """Print which characters of validation and test can never be said."""
    scored = {character for u in splits.valid + splits.test for character in u.text}
    unseen = sorted(scored.difference(alphabet))
    if unseen:
        print('validation or test has characters that training lacks, so each is an error:',
              *map(repr, unseen))


def check_grid(utterances: Sequence[data.Utterance], alphabet: Sequence[str], stride: int) -> None:
    """Print which utterances have too few frames on the network's coarsest grid."""
    coarse = data.unlearnable(utterances, alphabet, stride)
    if coarse:
        print(f'{len(coarse)} utterances have fewer frames of {10 * stride} ms, the coarsest grid, '
              'than CTC needs; upsampling hides that:', *(u.path.name for u in coarse))


def prepare(args: argparse.Namespace, rank: int, ranks: int) -> Task:
    """Read the data and make the network. Raises DataError."""
    if ranks > 1 and (args.overfit or args.benchmark):
        raise data.DataError('flags: --overfit and --benchmark are for one process; leave torchrun '
                             'away')
    config = make_config(args)
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise data.DataError(f'flags: --device {args.device}: there is no such device '
                             f'({error})') from None
    if rank:
        torch.distributed.barrier()  # the first process makes the built-in corpus
    splits = load_splits(args, config.frames_per_output)
    if ranks > 1 and rank == 0:
        torch.distributed.barrier()
    alphabet = data.make_alphabet(splits.train)
    network = model.Recogniser(replace(config, vocab_size=len(alphabet))).to(args.device)
    check_characters(splits, alphabet)
    check_grid(splits.train, alphabet, network.stride)
    lines = plateaus(splits.train, alphabet, network)
    valid_lines = plateaus(splits.valid, alphabet, network) if splits.valid else None
    return Task(args, splits, alphabet, network, lines, valid_lines, rank, ranks)


# ---- the run folder ------------------------------------------------------------------------------

def open_run(task: Task) -> Path:
    """Make the run folder, and write down what the run is. Raises DataError."""
    args = task.args
    folder = Path(args.run_dir or time.strftime('runs/%Y%m%d-%H%M%S'))
    if task.rank:
        return folder
    config = vars(args) | asdict(task.network.config)
    config |= {'plateaus': task.lines, 'valid_plateaus': task.valid_lines}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(path.name != 'config.json' for path in folder.iterdir()):  # of a run that failed
            raise data.DataError(f'--run_dir {folder}: is not empty; name another folder')
        (folder / 'config.json').write_text(json.dumps(config, indent=1) + '\n')
    except OSError as error:
        raise data.DataError(f'--run_dir {folder}: cannot be made ({error.strerror}); name another '
                             'folder') from None
    return folder


@dataclass
class RunState:
    """What an epoch hands on to the next, and to the end."""
    epoch: int = 0
    train_seconds: float = 0.0
    best: dict | None = None                            # error rates of the best epoch
    kept: str = 'last.pt'                               # the checkpoint to use
    shown: list[Sentence] = field(default_factory=list)  # of the best epoch


def save_epoch(folder: Path, task: Task, state: RunState, record: dict,
               evaluation: Evaluation | None) -> None:
    """Add an epoch to the log, and keep its weights: as last.pt, and as best.pt where it is."""
    with open(folder / 'log.jsonl', 'a') as log:
        print(json.dumps(record), file=log)
    rates = evaluation.rates if evaluation else None
    run = {'epoch': state.epoch, 'valid': rates, 'test': None, 'hours': task.hours,
           'utterances': len(task.splits.train),
           'train_data': task.args.train_data or 'the built-in corpus'}
    torch.save({'config': asdict(task.network.config), 'alphabet': task.alphabet,
                'model': task.network.state_dict(), 'run': run}, folder / 'last.pt')
    if evaluation is None:
        return
    if state.best is None or (rates['wer'], rates['cer']) <= (state.best['wer'], state.best['cer']):
        state.best, state.kept, state.shown = rates, 'best.pt', evaluation.sentences  # equal: later
        shutil.copy(folder / 'last.pt', folder / 'best.pt')


# ---- a run ---------------------------------------------------------------------------------------

def distribute(task: Task) -> nn.Module:
    """The network as it is trained: by several processes, they average their gradients."""
    if task.ranks == 1:
        return task.network
    trained = nn.parallel.DistributedDataParallel(task.network, broadcast_buffers=False)
    torch.manual_seed(task.args.seed + task.rank)  # each has dropout of its own
    return trained


def epoch_batches(task: Task, speech: data.Speech, epoch: int) -> Iterable[data.Batch]:
    """The batches of an epoch, counted from 1."""
    batches = []
    for number in range((epoch - 1) * task.passes, epoch * task.passes):
        batches += data.training_batches(speech, task.args.batch_size, number, task.rank,
                                         task.ranks)
    return data.loader(speech, batches, task.args.workers)


def fit(task: Task, folder: Path) -> RunState:
    """Train epoch by epoch, validate, record, save, report. Raises DataError."""
    args = task.args
    trained = distribute(task)
    speech = task.train_speech()
    optimizer, schedule = make_optimizer(task.network, args, task.updates * args.epochs)
    gradients = monitor.Gradients(task.network, PARTS)
    targets = [data.encode(u.text, task.alphabet) for u in task.splits.train]
    outputs = monitor.Outputs(len(task.alphabet), monitor.letter_entropy(targets))
    state = RunState()
    for state.epoch in range(1, args.epochs + 1):
        start = time.time()
        learning_rate = schedule.get_last_lr()[0]
        train_loss = train_epoch(trained, epoch_batches(task, speech, state.epoch), optimizer,
                                 schedule, gradients, outputs, args)
        state.train_seconds += time.time() - start
        if task.rank:
            continue  # the first process validates, prints and writes
        record = {'epoch': state.epoch, 'train_loss': train_loss,
                  'train_way': monitor.plateau_fraction(train_loss, task.lines),
                  'learning_rate': learning_rate, 'train_seconds': state.train_seconds,
                  **gradients.summary(), **outputs.summary()}
        evaluation = sentence = None
        if task.splits.valid:
            evaluation = task.evaluate(task.splits.valid)
            record |= {'valid_loss': evaluation.loss,
                       'valid_way': monitor.plateau_fraction(evaluation.loss, task.valid_lines),
                       'wer': evaluation.rates['wer'], 'cer': evaluation.rates['cer']}
            sentence = evaluation.sentences[state.epoch % len(evaluation.sentences)][1:]
        record['warnings'] = monitor.diagnose(record)
        save_epoch(folder, task, state, record, evaluation)
        monitor.print_epoch(record, sentence)
        if args.overfit and evaluation.rates['cer'] == 0:
            break
    return state


def score_test(task: Task, folder: Path, state: RunState) -> Evaluation:
    """Score the test data with the checkpoint that was kept, and note it there."""
    checkpoint = torch.load(folder / state.kept, weights_only=True)
    task.network.load_state_dict(checkpoint['model'])
    evaluation = task.evaluate(task.splits.test)
    checkpoint['run']['test'] = evaluation.rates
    torch.save(checkpoint, folder / state.kept)
    return evaluation


def print_scores(split: str, rates: dict) -> None:
    """Print the error rates of a split, with what they are made of."""
    low, high = rates['interval']
    edits = f'{rates["substitutions"]} S, {rates["insertions"]} I, {rates["deletions"]} D'
    print(f'{split}: WER {rates["wer"]:.2f} % ({edits} in {rates["words"]} words of '
          f'{rates["utterances"]} utterances; 95 %: {low:.1f} to {high:.1f}), '
          f'CER {rates["cer"]:.2f} %')


def print_verdict(task: Task, state: RunState) -> None:
    """Print whether --overfit has learnt its utterances. Raises DataError where not."""
    updates = task.updates * state.epoch
    utterances = len(task.splits.train)
    if state.best['cer']:
        raise data.DataError(f'NOT LEARNT: {utterances} utterances, {updates} updates, '
                             f'CER {state.best["cer"]:.1f}; read the warnings above. Are audio and '
                             'text of the same utterance?')
    print(f'learnt: {utterances} utterances by heart after {updates} updates; data, loss and '
          'network agree')


def leave_example(folder: Path, kept: str, utterances: Sequence[data.Utterance],
                  sentences: Sequence[Sentence]) -> None:
    """Write clip.wav, the longest clip that comes out right if any, and print how to transcribe
    it."""
    right = [utterances[s.index] for s in sentences if s.said == s.heard]
    u = max(right, key=lambda u: len(u.text), default=utterances[0])
    soundfile.write(folder / 'clip.wav', data.read_wave(u.path).numpy(), data.SAMPLE_RATE)
    command = [sys.orig_argv[0], os.path.relpath(model.__file__), folder / kept,
               folder / 'clip.wav']
    print(f'results in {folder}; to transcribe a clip ("{u.text}"):\n   ',
          shlex.join(map(str, command)))


def finish(task: Task, folder: Path, state: RunState) -> dict:
    """Score, write results.json, report -> its contents. Raises DataError."""
    splits = task.splits
    parameters = sum(parameter.numel() for parameter in task.network.parameters())
    results = {'valid': state.best, 'test': None, 'updates': task.updates * state.epoch,
               'train_seconds': state.train_seconds, 'parameters': parameters,
               'seed': task.args.seed}
    sentences = state.shown
    if splits.test:
        test = score_test(task, folder, state)
        results['test'], sentences = test.rates, test.sentences
    (folder / 'results.json').write_text(json.dumps(results, indent=1) + '\n')
    for split in 'valid', 'test':
        if results[split]:
            print_scores(split, results[split])
    if task.args.overfit:
        print_verdict(task, state)
    leave_example(folder, state.kept, splits.test or splits.valid or splits.train, sentences)
    return results


def run(args: argparse.Namespace, rank: int = 0, ranks: int = 1) -> dict | None:
    """Train and score as the flags say -> the contents of results.json. Raises DataError.

    Of several processes, each trains on its share of every batch; the first (rank 0) validates,
    prints and writes.
    """
    # Gradients that fade through time become numbers below 1e-38, with which a CPU works many times
    # slower: without this, an update takes 2.5 times as long once the outputs are sharp.
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    task = prepare(args, rank, ranks)
    parameters = sum(parameter.numel() for parameter in task.network.parameters())
    print(f'{len(task.splits.train)} utterances, {task.hours:.2f} hours, '
          f'{len(task.alphabet)} symbols, {parameters:,} parameters')
    if args.benchmark:
        return benchmark(task.network, task.train_speech(), args)
    print(monitor.legend(task.lines))
    folder = open_run(task)
    state = fit(task, folder)
    return None if rank else finish(task, folder, state)


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
    utterances = [speech.utterances[i] for batch in batches for _, i in batch]
    optimizer, schedule = make_optimizer(network, args, 4 * len(batches))
    gradients = monitor.Gradients(network, PARTS)
    outputs = monitor.Outputs(len(speech.alphabet), letters=1)

    def load():
        return data.loader(speech, batches, args.workers)

    def train(batches):
        train_epoch(network, batches, optimizer, schedule, gradients, outputs, args,
                    progress=lambda *_: None)

    @torch.no_grad()
    def transcribe(batch_size):
        network.eval()
        own_speed = data.Speech(utterances, speech.alphabet)
        clips = data.evaluation_batches(utterances, batch_size)
        for batch in data.loader(own_speed, clips, args.workers):
            log_probs, lengths = network(batch.mels.to(args.device), batch.lengths.to(args.device))
            model.greedy_decode(log_probs, lengths)

    def rate(work):
        for _ in range(2):  # the first time is slower: new shapes, cold files
            start = time.perf_counter()
            work()
            seconds = time.perf_counter() - start
        return round(sum(u.duration for u in utterances) / seconds, 1)

    ready = list(load())
    padded = sum(batch.mels.shape[0] * batch.mels.shape[2] for batch in ready)
    frames = sum(int(batch.lengths.sum()) for batch in ready)
    result = {
        'features': rate(lambda: list(load())),
        'features and update': rate(lambda: train(load())),
        'update': rate(lambda: train(ready)),
        'inference, batch 1': rate(lambda: transcribe(1)),
        f'inference, batch {EVALUATION_BATCH}': rate(lambda: transcribe(EVALUATION_BATCH)),
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

def main(argv: Sequence[str] | None = None) -> dict | None:
    args = parse_flags(argv)
    rank, ranks = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))  # torchrun
    try:
        if ranks > 1:
            torch.distributed.init_process_group('gloo' if args.device == 'cpu' else 'nccl')
            if args.device != 'cpu':
                args.device = f'cuda:{os.environ["LOCAL_RANK"]}'
        with contextlib.redirect_stdout(open(os.devnull, 'w') if rank else sys.stdout):
            return run(args, rank, ranks)
    except KeyboardInterrupt:
        sys.exit('train.py: stopped; epochs that were finished, if any, are in the run folder')
    except data.DataError as error:
        # From a loader process the error comes with that process's traceback before it.
        sys.exit('train.py: ' + str(error).rpartition('data.DataError: ')[2].strip())


if __name__ == '__main__':
    main()
