"""Train the recogniser on recordings and transcripts, and score it.

    python train.py                                           the built-in corpus
    python train.py --train_data my/train.tsv --epochs 40     your own recordings
    python train.py --train_data my/train.tsv --overfit 10    the first experiment with new data
    python train.py --undo dropout forget_bias                take fixes back, to see their worth
    python train.py --resume runs/...                         go on with a run that was ended
    python train.py --evaluate best.pt --test_data my/test.tsv

A run folder holds config.json (flags, plateau lines), log.jsonl (one JSON object an epoch), best.pt
(lowest validation WER), state.pt (all that an epoch hands on to the next), and at the end
results.json (error rates), what was said and heard (valid.tsv, test.tsv) and clip.wav, a recording
to transcribe. Losses are CTC in nats per label: each utterance's negative log-likelihood divided by
its number of labels, averaged over utterances.

References: Smith & Topin 2019 (OneCycle); Loshchilov & Hutter 2019 (AdamW); Lee & Watanabe 2021
(intermediate CTC).
"""
import itertools
import json
import math
import os
import random
import shlex
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import defaultdict
from collections.abc import Container, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import soundfile
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, parameters_to_vector

import data
import model
import monitor
from monitor import UserError, error_at

CHECK_UP_TO = 5000      # utterances; files of larger corpora are decoded first only with --skip_bad
OVERFIT_UPDATES = 50    # at least, in an epoch of --overfit
WATCH_EVERY = 100       # updates
RESUMED = ('--resume', '--device', '--workers', '--train_data', '--valid_data', '--test_data')
FINE_TUNING = 5e-5      # learning rate of --init_from: the usual one unlearns what is there


# ---- the fixes -----------------------------------------------------------------------------------
#
# "The original" is a MobileNetV3 + LSTM + CTC recogniser that stayed at 93 % word error rate for a
# month, until the first ten of these changes were made together. The others are ours.

class Fix(NamedTuple):
    """A change that helps to leave the plateau, and that --undo takes back.

    To add one: give the setting its new value as a default, FIXES an entry, and effect() in
    test_model.py a line that shows what it changes; if it is ours, put it among OURS too.
    """
    setting: str   # a flag, or a field of model.Config; its default is the value with the fix
    before: object
    why: str


FIXES = {
    'output_init': Fix('output_init', 'normal',
                       'Xavier: a head of deviation 0.01 passes little gradient down (Glorot & '
                       'Bengio 2010)'),
    'weight_init': Fix('weight_init', 0.01, 'the same for the projections below the LSTM'),
    'upsample': Fix('upsample', 'transpose',
                    'interpolation gives ceil(T / frames_per_output) outputs, each in its place; '
                    'ConvTranspose may give too many'),
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
                     'section 6.4; Touvron et al. 2021)'),
    'interctc': Fix('interctc_weight', 0.0,
                    'a CTC loss on the first LSTM layer too (Lee & Watanabe 2021)'),
    'output_rate': Fix('frames_per_output', 1, 'fewer outputs per label shorten the plateau'),
}
OURS = {'deep_path', 'interctc', 'output_rate'}


def undone_fixes(args: Namespace) -> list[str]:
    """The names of the fixes that --undo and --only take back."""
    undone = set(args.undo)
    if args.only or 'all' in undone:
        undone = FIXES.keys() - args.only
    if 'ours' in undone:
        undone |= OURS
    return [name for name in FIXES if name in undone]


# ---- flags ---------------------------------------------------------------------------------------

NETWORK = model.Config(vocab_size=1)  # its defaults
WHOLE, COUNT = monitor.number(int, 1), monitor.number(int, 0)
AMOUNT, SHARE = monitor.number(float, 0), monitor.number(float, 0, 1)

FLAGS = {  # by group: name, a type or the choices, default, help
    'data': [
        ('train_data', str, None,
         'corpus: .jsonl, .csv or .tsv manifest, LibriSpeech or CMU Sphinx folder; unset: the '
         'built-in corpus with its own validation and test, spoken into the folder corpus/'),
        ('valid_data', str, None,
         'validation corpus, which selects best.pt; unset: a tenth of the training data, other '
         'speakers if all are known, and ten or more; none: train on everything, keep the last'),
        ('test_data', str, None,
         "corpus scored once, at the end; unset: none, or the built-in corpus's; none: no test"),
        ('skip_bad', bool, False,
         'leave out utterances that cannot be used, which else end the run before it starts (of '
         f'more than {CHECK_UP_TO:,} utterances, files that do not decode when they are met)'),
        ('overfit', COUNT, 0,
         'learn N utterances by heart, without augmentation; 0: train as usual'),
        ('num_train_samples', COUNT, 0, 'train on N utterances, drawn by the seed; 0: all'),
        ('spec_augment', bool, False,
         'SpecAugment: mask frequency bands and time spans in training'),
        ('concat', SHARE, 0.0,
         'chance that an utterance of the same speaker (of anyone, where the corpus names none) '
         'follows in the training clip: more contexts for small corpora'),
        ('workers', COUNT, 0, 'processes that load audio; 0: the training process itself'),
    ],
    'optimisation': [
        ('epochs', WHOLE, 5, 'passes over the training data'),
        ('batch_size', WHOLE, 8, 'utterances per update'),
        ('learning_rate', AMOUNT, 3e-4, 'base learning rate; OneCycle peaks at ten times this'),
        ('schedule', ('onecycle', 'constant'), 'onecycle', 'of the learning rate'),
        ('weight_decay', AMOUNT, 1e-5, 'of AdamW; 0: none'),
        ('grad_clip', AMOUNT, 5.0, 'clip the total gradient norm to this; 0: no clipping'),
        ('interctc_weight', SHARE, 0.3,
         'weight of the intermediate CTC loss, of the first LSTM layer; 0: none'),
        ('seed', COUNT, 0,
         'random seed of hold-out, subset, initialisation, order, augmentation, dropout'),
    ],
    'model': [
        ('blocks', monitor.number(int, 2, 11), NETWORK.blocks,
         'number of MobileNetV3-Small blocks, 2 to 11'),
        ('frames_per_output', (1, 2, 4), NETWORK.frames_per_output, 'frames of 10 ms per output'),
        ('hidden', WHOLE, NETWORK.hidden, 'LSTM units in each direction'),
        ('dropout', SHARE, NETWORK.dropout, 'before each LSTM layer and the head; 0: none'),
    ],
    'run': [
        ('beam', WHOLE, model.BEAM, 'texts kept by beam search with the character model'),
        ('run_dir', str, time.strftime('runs/%Y%m%d-%H%M%S'), 'new folder for the results'),
        ('resume', str, None,
         'go on with the run of this folder, by its own flags; takes none but --device, --workers, '
         'and the data flags, where its data lies elsewhere now'),
        ('init_from', str, None,
         "start from a checkpoint's weights, those of new characters apart, with a learning rate "
         f'of {FINE_TUNING} unless another is given; best.pt is never worse'),
        ('evaluate', str, None, 'train nothing; score this checkpoint on --test_data'),
        ('device', str, 'cpu', 'cpu, cuda, cuda:1, ...'),
        ('benchmark', bool, False,
         'train nothing; print the speed of all parts, in seconds of audio a second'),
    ],
}


def make_parser() -> ArgumentParser:
    """The parser of FLAGS, --undo and --only."""
    lines = ['fixes, and the value that --undo brings back:']
    lines += [f'  {name}: {fix.setting} {fix.before}; {fix.why}' for name, fix in FIXES.items()]
    parser = ArgumentParser(
        description='Train a MobileNetV3 + BiLSTM + CTC speech recogniser.', allow_abbrev=False,
        formatter_class=RawDescriptionHelpFormatter, epilog='\n'.join(lines))
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for name, kind, default, text in flags:
            options = {'type': kind}
            if kind is bool:
                options = {'action': 'store_true'}
            elif isinstance(kind, tuple):
                options = {'type': type(default), 'choices': kind}
            if default:
                text = f'{text} (default: {default})'
            group.add_argument(f'--{name}', default=default, help=text, **options)
    group = parser.add_argument_group('fixes').add_mutually_exclusive_group()
    group.add_argument('--undo', nargs='+', choices=[*FIXES, 'all', 'ours'], metavar='FIX',
                       default=[], help="take fixes back, by the names below; all: every one; "
                                        "ours: this project's own, which leaves the original "
                                        'system with its ten fixes')
    group.add_argument('--only', nargs='+', choices=FIXES, metavar='FIX', default=[],
                       help='take every fix back but these')
    # A number of threads adds in an order of its own, so it is part of a run. Beyond 8 little is
    # gained, and where one waits for a core that another program has, all do.
    parser.set_defaults(**asdict(NETWORK), threads=min(8, torch.get_num_threads()))
    return parser


def parse_flags(argv: Sequence[str] | None = None) -> Namespace:
    """The flags; what --undo takes back becomes the default, --resume brings a run's own. Raises
    UserError."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.evaluate and not args.test_data:
        parser.error('--evaluate needs --test_data, the corpus to score on')
    if args.overfit or args.evaluate:
        parser.set_defaults(valid_data='none', test_data='none')
    if args.init_from:
        parser.set_defaults(learning_rate=FINE_TUNING)
    for name in undone_fixes(args):
        parser.set_defaults(**{FIXES[name].setting: FIXES[name].before})
    if args.resume:
        typed = {word.partition('=')[0] for word in argv or sys.argv if word.startswith('--')}
        if not typed <= set(RESUMED):
            parser.error(f'--resume has the flags of its run; it takes {", ".join(RESUMED)}')
        with error_at(f'--resume {args.resume}'):
            config = json.loads((Path(args.resume) / 'config.json').read_text())
        parser.set_defaults(**config['flags'] | {'run_dir': args.resume})
    return parser.parse_args(argv)


# ---- training and evaluation ---------------------------------------------------------------------

def make_optimizer(network: nn.Module, args: Namespace, updates: int) -> tuple:
    """AdamW, and the schedule of its learning rate: OneCycleLR to ten times the given one, or none.

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
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=10 * args.learning_rate, total_steps=max(updates, 11), pct_start=0.1,
        anneal_strategy='cos')


def train_epoch(network: nn.Module, batches: Iterable[data.Batch], optimizer: torch.optim.AdamW,
                schedule: object, history: dict, watch: monitor.Watch, args: Namespace) -> None:
    """One pass over the batches; figures of each update go to the history, and the watch looks at
    one of WATCH_EVERY. Raises UserError at a gradient that is not finite.
    """
    network.train()
    for batch in batches:
        mels, lengths, targets, target_lengths = [x.to(args.device) for x in batch[:4]]
        layers, output_lengths = network(mels, lengths, every_layer=True)
        # Averaged over utterances, each one's loss divided by its number of labels: nats per label.
        first, loss = [F.ctc_loss(log_probs.transpose(0, 1), targets, output_lengths,
                                  target_lengths) for log_probs in (layers[0], layers[-1])]
        optimizer.zero_grad()
        # Intermediate CTC: (1 - weight) * loss + weight * first, the first layer's own.
        loss.lerp(first, args.interctc_weight).backward()
        if len(history['gradient']) % WATCH_EVERY == 0:
            watch(layers[-1], targets, output_lengths, target_lengths, mels, lengths)
        norms = monitor.gradient_norms(watch.network)
        norm = norms['gradient'].item()
        if not math.isfinite(norm):
            raise UserError(
                f'update {len(history["gradient"]) + 1}: the loss is {loss.item()}, its gradient '
                'not finite; start again with a lower --learning_rate, as from the last whole '
                f'epoch, --init_from {args.run_dir}/best.pt')
        clipped = 0 < args.grad_clip < norm
        if clipped:
            clip_grads_with_norm_(network.parameters(), args.grad_clip, norms['gradient'])
        optimizer.step()
        schedule.step()
        watched = {'train_loss': loss.item(), 'clipped': clipped} | norms
        watched |= monitor.output_figures(layers[-1], output_lengths)
        for name, value in watched.items():
            history[name].append(float(value))


@torch.no_grad()
def evaluate(network: nn.Module, utterances: Sequence[data.Utterance], alphabet: Sequence[str],
             args: Namespace, language_model: model.CharacterModel | None = None,
             batch_size: int = 16) -> tuple[float, list]:
    """Score every utterance once, greedily and, with a language model, by beam search.

    -> the mean loss of the utterances that CTC can align; and in the order of the utterances rows:
    file, said, heard, beam (what beam search heard), path (the best symbol of every output).
    """
    network.eval()
    losses, rows = [], [{}] * len(utterances)
    batches = data.loader(data.Speech(utterances, alphabet),
                          data.evaluation_batches(utterances, batch_size), args.workers)
    for batch in data.progress(batches, 'scoring'):
        log_probs, lengths = network(batch.mels.to(args.device), batch.lengths.to(args.device))
        log_probs, lengths = log_probs.cpu(), lengths.cpu()
        loss = F.ctc_loss(log_probs.transpose(0, 1), batch.targets, lengths, batch.target_lengths,
                          reduction='none') / batch.target_lengths
        losses += loss[~loss.isinf()].tolist()
        for i, clip, length in zip(batch.indices, log_probs, lengths):
            u, clip, beam = utterances[i], clip[:length], ''
            if language_model:
                beam = model.beam_decode(clip, alphabet, language_model, args.beam)
            rows[i] = {'file': ' '.join(u.path.name.split()), 'said': u.text,
                       'heard': data.decode(model.greedy_decode(clip), alphabet), 'beam': beam,
                       'path': data.show_path(clip.argmax(1).tolist(), alphabet)}
    return mean(losses or [math.inf]), rows


def rates_of(rows: Sequence[dict], heard: str = 'heard') -> dict:
    """monitor.error_rates of rows of evaluate; heard: 'heard' greedily, or by beam search 'beam'.
    """
    return monitor.error_rates([row['said'] for row in rows], [row[heard] for row in rows])


# ---- data and network of a run -------------------------------------------------------------------

def read_data(args: Namespace) -> data.Splits:
    """The utterances for training, validation and test. Raises UserError that lists all
    that is broken."""
    paths = {'train': args.train_data, 'valid': args.valid_data, 'test': args.test_data}
    if args.train_data is None and not args.evaluate:
        builtin = data.builtin_corpus()
        paths = {split: path or builtin[split] for split, path in paths.items()}
    splits = data.read_splits(**paths, seed=args.seed, frames_per_output=args.frames_per_output,
                              check_up_to=math.inf if args.skip_bad else CHECK_UP_TO)
    if splits.faults:
        faults = '\n'.join(splits.faults.values())
        if not args.skip_bad:
            raise UserError(f'{faults}\n{len(splits.faults)} utterances cannot be used; --skip_bad '
                            'leaves them out')
        print(faults)
    if not (splits.test if args.evaluate else splits.train):
        raise UserError('no utterance is left that can be used; give more')
    random.Random(args.seed).shuffle(splits.train)
    train = splits.train[:args.overfit or args.num_train_samples or None]
    return splits._replace(train=train, valid=train if args.overfit else splits.valid)



def make_network(alphabet: list[str], start: model.Checkpoint | None,
                 args: Namespace) -> model.Recogniser:
    """The network of the flags, with the weights of a checkpoint to start from, whose alphabet
    comes first in the new one: a new character's row of the head is drawn, the others are taken
    over. Raises UserError."""
    settings = {name: getattr(args, name) for name in asdict(NETWORK)}
    network = model.Recogniser(model.Config(**settings | {'vocab_size': len(alphabet)}))
    if start:
        weights = start.network.state_dict()
        with error_at(f'--init_from {args.init_from}'):
            for name, drawn in network.head.state_dict(prefix='head.').items():
                weights[name] = torch.cat([weights[name], drawn[len(start.alphabet):]])
            network.load_state_dict(weights)
    with error_at(f'--device {args.device}'):
        return network.to(args.device)


def training_speech(splits: data.Splits, config: dict, args: Namespace) -> data.Speech:
    """The training data with its augmentation; of --overfit as it is."""
    augmentation = () if args.overfit else (args.spec_augment, True, args.concat)
    return data.Speech(splits.train, config['alphabet'], args.frames_per_output, args.seed,
                       *augmentation)


# ---- learning ------------------------------------------------------------------------------------

def save(content: dict | str, path: Path) -> None:
    """Write a text, or a dict of plain data and tensors, all of it or nothing. Raises
    UserError."""
    with error_at(path), data.whole_file(path) as part:
        if isinstance(content, str):
            part.write_text(content, encoding='utf-8')
        else:
            torch.save(content, part)


def save_checkpoint(network: model.Recogniser, language_model: str, run: dict,
                    folder: Path) -> None:
    """Save best.pt, a plain dict. Raises UserError."""
    save({'format': model.FORMAT, 'config': asdict(network.config), 'alphabet': run['alphabet'],
          'model': network.state_dict(), 'language_model': language_model, 'run': run},
         folder / 'best.pt')


def save_state(path: Path, learning: dict, **records: object) -> None:
    """Save all that an epoch hands on to the next. Raises UserError."""
    states = {name: part.state_dict() for name, part in learning.items()}
    save(states | records | {'random': torch.get_rng_state()}, path)


def load_state(path: Path, learning: dict) -> dict:
    """Bring what learns back to the end of a run's last whole epoch -> the run's records: log,
    history, watch (calls and findings). Raises UserError."""
    state = {'log': [], 'history': {}, 'watch': ([], [])}
    if path.exists():
        with error_at(path):
            state = torch.load(path, weights_only=True, map_location='cpu')
            for name, part in learning.items():
                part.load_state_dict(state[name])
            torch.set_rng_state(state['random'])
    return state


def epoch_batches(speech: data.Speech, epoch: int, args: Namespace) -> list:
    """The batches of an epoch, from 0, by seed and epoch alone: of one pass over the data, but of
    --overfit, of as many as make 50 updates."""
    passes = 1
    if args.overfit:
        passes = math.ceil(OVERFIT_UPDATES / math.ceil(len(speech.utterances) / args.batch_size))
    batches = []
    for number in range(epoch * passes, (epoch + 1) * passes):
        batches += data.training_batches(speech, args.batch_size, number, *process())
    return batches


def watch_network(network: model.Recogniser) -> monitor.Watch:
    """What looks at an update now and then."""
    return monitor.Watch(network, lambda *inputs: network(*inputs)[0], batch_first=True)


def validate(network: model.Recogniser, splits: data.Splits, config: dict, record: dict,
             args: Namespace) -> tuple[dict, list]:
    """Score after an epoch, and add what that says to its record of the log, with the phase
    -> scores, and rows of evaluate; both empty without validation data."""
    scores, rows, lines = {}, [], config['plateaus']
    if splits.valid:
        loss, rows = evaluate(network, splits.valid, config['alphabet'], args)
        lines = config['valid_plateaus']
        rates = rates_of(rows)
        scores = {'valid': rates}
        record |= {'valid_loss': loss, 'wer': rates['wer'], 'cer': rates['cer']}
    record['phase'] = monitor.name_phase(monitor.judged_by(record), lines)
    return scores, rows


def fit(network: model.Recogniser, splits: data.Splits, config: dict,
        args: Namespace) -> None:
    """Train, validate, record, save and report, epoch by epoch, after the last whole one.

    state.pt is all that an epoch hands on to the next, so a killed run ends with the weights of an
    uninterrupted one (of one process, on a CPU). It is written last: killed before that, the epoch
    is made again, with the same result. Raises UserError, OSError."""
    rank, ranks = process()
    folder = Path(args.run_dir)
    speech = training_speech(splits, config, args)
    language_model = json.dumps(model.CharacterModel.of_texts(u.text for u in splits.train).counts)
    updates = len(epoch_batches(speech, 0, args))
    optimizer, schedule = make_optimizer(network, args, updates * args.epochs)
    learning = {'network': network, 'optimizer': optimizer, 'schedule': schedule}
    watch = watch_network(network)
    state = load_state(folder / 'state.pt', learning)
    log, history = state['log'], defaultdict(list, state['history'])
    watch.calls, watch.findings = state['watch']
    trained = network
    if ranks > 1:  # several processes average their gradients
        trained = nn.parallel.DistributedDataParallel(network, forward_sync_buffers=False,
                                                      find_unused_parameters=True)
    if config['start'] and not log and rank == 0:
        save_checkpoint(network, language_model, config | config['start'][0], folder)
    while len(log) < args.epochs and not (args.overfit and log and log[-1]['cer'] == 0):
        start = time.time()
        before = parameters_to_vector(network.parameters())
        batches = data.loader(speech, epoch_batches(speech, len(log), args), args.workers)
        train_epoch(trained, data.progress(batches, f'epoch {len(log) + 1}: update'), optimizer,
                    schedule, history, watch, args)
        change = (parameters_to_vector(network.parameters()) - before).norm() / before.norm()
        record = {'epoch': len(log) + 1, 'updates': len(history['train_loss']),
                  'seconds': time.time() - start + (log[-1]['seconds'] if log else 0),
                  'weight_change': change.item(), 'warnings': watch.findings,
                  **{name: mean(values[-updates:]) for name, values in history.items()},
                  **monitor.plateaus_left(history['train_loss'], config['plateaus'])}
        log.append(record)
        if rank:
            continue  # the first process validates, saves and prints
        scores, rows = validate(network, splits, config, record, args)
        if monitor.best_epoch(config['start'] + log) is record:
            save_checkpoint(network, language_model, config | {'epoch': len(log), 'scores': scores},
                            folder)
        save(''.join(json.dumps(record) + '\n' for record in log), folder / 'log.jsonl')
        save_state(folder / 'state.pt', learning, log=log, history=dict(history),
                   watch=(watch.calls, watch.findings))
        print(monitor.epoch_line(record), flush=True)
        if rows:
            row = rows[len(log) % len(rows)]
            print('     said {said}\n    heard {heard}\n          {path}'.format(**row), flush=True)


# ---- the end of a run ----------------------------------------------------------------------------

def score(checkpoint: model.Checkpoint, utterances: Sequence[data.Utterance], split: str,
          known: Container[str], args: Namespace) -> tuple[dict, list]:
    """Error rates of a checkpoint, greedy and by beam search, of all utterances and of those whose
    text is not among the known -> {what was scored: rates}, rows of evaluate.

    Writes what was said and heard into the run folder, and prints the rates, and what training
    lacked: characters, which can never be said, and speech from a telephone.
    """
    network, alphabet, run, language_model = checkpoint
    unseen = set().union(*(u.text for u in utterances)).difference(alphabet)
    if unseen:
        print('characters that training lacks, each counted as an error:', *sorted(unseen))
    narrow = sum(u.narrow for u in utterances)
    if narrow and not run['narrow']:
        print(f'{narrow} recordings: {model.NARROW}')
    _, rows = evaluate(network.to(args.device), utterances, alphabet, args, language_model)
    lines = ['\t'.join(cells) + '\n' for cells in (rows[0], *(row.values() for row in rows))]
    save(''.join(lines), Path(args.run_dir) / f'{split}.tsv')
    results = {split: rates_of(rows), f'{split}, beam search': rates_of(rows, 'beam')}
    new = [row for row in rows if row['said'] not in known]
    if 0 < len(new) < len(rows):  # a language model knows the others by heart
        name = f'{split}, sentences new to training'
        results |= {name: rates_of(new), f'{name}, beam search': rates_of(new, 'beam')}
    monitor.print_scores(results)
    return results, rows


def finish(checkpoint_path: str | Path, splits: data.Splits, args: Namespace) -> None:
    """Score a checkpoint, write the results and a clip, report. Raises UserError,
    OSError."""
    folder = Path(args.run_dir)
    checkpoint = model.load_checkpoint(checkpoint_path)
    known = {u.text for u in splits.train}
    results, examples = {}, splits.train[:1]
    for split, utterances in ('valid', splits.valid), ('test', splits.test):
        if utterances:
            found, rows = score(checkpoint, utterances, split, known, args)
            results |= found
            right = [u for u, row in zip(utterances, rows) if row['said'] == row['heard']]
            examples = right or utterances[:1]
    example = max(examples, key=lambda u: len(u.text))
    wave = data.resample(*data.load_utterance(example), data.SAMPLE_RATE)
    with data.whole_file(folder / 'clip.wav') as part:
        soundfile.write(part, wave.numpy(), data.SAMPLE_RATE)
    # results.json says that the run is finished, so it comes last.
    save(json.dumps(results, indent=1), folder / 'results.json')
    (folder / 'state.pt').unlink(missing_ok=True)
    command = [sys.orig_argv[0], os.path.relpath(model.__file__), checkpoint_path,
               folder / 'clip.wav', '--beam', model.BEAM]
    print(f'results in {folder}; to transcribe a clip ("{example.text}"):\n   ',
          shlex.join(map(str, command)))


def report_overfit(run: dict) -> None:
    """Print whether --overfit has learnt its utterances. Raises UserError where not."""
    last = run['log'][-1]
    if last['cer'] == 0:
        print(f'learnt: all utterances are right after {last["updates"]} updates; data, loss and '
              'network work together')
        return
    advice = (f'see what python monitor.py {run["name"]} says, and check that each recording has '
              'its own transcript')
    if last['phase'] in ('learning', 'learnt'):
        advice = f'it was still learning, so give it more, as by --epochs {2 * last["epoch"]}'
    raise UserError(f'NOT LEARNT after {last["updates"]} updates, CER {last["cer"]:.1f} %; '
                            f'{advice}')


def benchmark(network: model.Recogniser, speech: data.Speech,
              args: Namespace) -> None:
    """Print the seconds of audio that pass in a second, on 40 batches, as one JSON line."""
    batches = data.training_batches(speech, args.batch_size, epoch=0)[:40]
    clips = [speech.utterances[i] for _, i in itertools.chain(*batches)]
    optimizer, schedule = make_optimizer(network, args, 2 * len(batches))

    def load():
        return data.loader(speech, batches, args.workers)

    speeds = {}
    for name, work in (
            ('features', lambda: list(load())),
            ('features and update', lambda: train_epoch(
                network, load(), optimizer, schedule, defaultdict(list), watch_network(network),
                args)),
            ('inference, batch 1', lambda: evaluate(network, clips, speech.alphabet, args,
                                                    batch_size=1)),
            ('inference, batch 16', lambda: evaluate(network, clips, speech.alphabet, args))):
        work()  # the first time is slower: new shapes, cold files
        start = time.perf_counter()
        work()
        speeds[name] = round(sum(u.duration for u in clips) / (time.perf_counter() - start), 1)
    print(json.dumps(speeds))


# ---- python train.py -----------------------------------------------------------------------------

def process() -> tuple[int, int]:
    """Which of how many processes this is: the first, 0, of 1, but for torchrun."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def join_processes(args: Namespace) -> None:
    """Where torchrun has started several processes, let them know of each other."""
    if dist.is_torchelastic_launched():
        dist.init_process_group()
        if args.device != 'cpu':
            args.device = f'cuda:{os.environ["LOCAL_RANK"]}'
            torch.cuda.set_device(args.device)
        if dist.get_rank():
            sys.stdout = open(os.devnull, 'w')  # noqa: SIM115 - until the process ends


def make_folder(config: dict, args: Namespace) -> None:
    """A run folder that was not there before, with config.json. Raises UserError."""
    with error_at('--run_dir'):
        Path(args.run_dir).mkdir(parents=True)
    save('', Path(args.run_dir) / 'log.jsonl')
    save(json.dumps(config, indent=1), Path(args.run_dir) / 'config.json')


def prepare(splits: data.Splits, args: Namespace) -> tuple[dict, model.Recogniser]:
    """What a run knows before it trains, which config.json keeps, and its network; what it starts
    from is scored as epoch 0. Raises UserError."""
    folder = Path(args.run_dir)
    saved, start = {'alphabet': [''], 'start': []}, None
    if args.resume:
        with error_at(f'--resume {folder}'):
            saved = json.loads((folder / 'config.json').read_text())
    if args.init_from and not (folder / 'state.pt').exists():
        start = model.load_checkpoint(args.init_from)
        saved['alphabet'] = start.alphabet
    config = {'flags': vars(args), 'start': saved['start']}
    config |= data.describe_corpus(splits, args.frames_per_output, saved['alphabet'])
    if saved.get('digest', config['digest']) != config['digest']:
        raise UserError(f'--resume {folder}: the texts or durations of its data have '
                                'changed')
    network = make_network(config['alphabet'], start, args)
    if start and splits.valid:
        _, rows = evaluate(network, splits.valid, config['alphabet'], args)
        rates = rates_of(rows)
        config['start'] = [{'epoch': 0, 'scores': {'valid': rates}, **rates}]
        monitor.print_scores({'epoch   0': rates})
    return config, network


def run(args: Namespace) -> None:
    """Train and score as the flags say. Raises UserError, OSError."""
    # Gradients that fade through time become numbers below 1e-38, with which a CPU works many times
    # slower: without this, an update takes 2.5 times as long once the outputs are sharp.
    torch.set_flush_denormal(True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    folder = Path(args.run_dir)
    if args.resume and (folder / 'results.json').exists():
        print(f'{folder} is finished: nothing is left to do')
        monitor.print_scores(monitor.read_run(folder)['results'])
        return
    join_processes(args)
    rank, ranks = process()
    if args.overfit and ranks > 1:
        raise UserError('--overfit is for one process')
    splits = read_data(args)
    if args.evaluate:
        make_folder({'flags': vars(args)}, args)
        finish(args.evaluate, splits, args)
        return
    config, network = prepare(splits, args)
    if args.benchmark:
        benchmark(network, training_speech(splits, config, args), args)
        return
    for name in undone_fixes(args):
        print(f'without {name}: {FIXES[name].setting} {getattr(args, FIXES[name].setting)}')
    print(f'{sum(map(torch.numel, network.parameters())):,} parameters')
    print(monitor.legend(config['plateaus']))
    if rank == 0 and not args.resume:
        make_folder(config, args)
    if ranks > 1:
        torch.manual_seed(args.seed + rank)  # each has dropout of its own
    fit(network, splits, config, args)
    if rank == 0:
        finish(folder / 'best.pt', splits, args)
        if args.overfit:
            report_overfit(monitor.read_run(folder))


def main(argv: Sequence[str] | None = None) -> None:
    with monitor.one_line_ends('train.py'):
        args = parse_flags(argv)
    go_on = f'; to go on: python train.py --resume {shlex.quote(args.run_dir)}'
    if args.evaluate or args.benchmark:
        go_on = ''
    with monitor.one_line_ends('train.py', go_on):
        run(args)


if __name__ == '__main__':
    main()
