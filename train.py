"""Train the recogniser on recordings and transcripts, and score it.

    python train.py                                           the built-in corpus
    python train.py --train_data my/train.tsv --epochs 40     your own recordings
    python train.py --train_data my/train.tsv --overfit 10    the first experiment with new data
    python train.py --undo dropout forget_bias                take fixes back, to see their worth
    python train.py --resume runs/...                         go on with a run that was ended
    python train.py --evaluate best.pt --test_data my/test.tsv

A run folder holds config.json (flags, plateau lines), log.jsonl (one JSON object an epoch), best.pt
(lowest validation WER), state.pt (the last checkpoint, with all that an epoch hands on to the
next), and at the end results.json (error rates), what was said and heard (valid.tsv, test.tsv) and
clip.wav, a recording to transcribe. Losses are CTC in nats per label: each utterance's negative
log-likelihood divided by its number of labels, averaged over utterances.

References: Smith & Topin 2019 (OneCycle); Loshchilov & Hutter 2019 (AdamW); Lee & Watanabe 2021
(intermediate CTC).
"""
import json
import os
import random
import shlex
import sys
import time
import timeit
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import defaultdict, namedtuple
from math import ceil, inf
from pathlib import Path
from statistics import mean

import soundfile
import torch
import torch.nn.functional as F
from numpy.random import default_rng
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, parameters_to_vector
from torch.optim.lr_scheduler import ConstantLR, OneCycleLR
from torch.utils.data import DataLoader

import data
import model
import monitor
from data import Speech, Splits
from model import Checkpoint
from monitor import UserError, error_at, number

CHECK_UP_TO = 5000  # utterances of a corpus; larger ones are decoded first only with --skip_bad
RESUMED = ('--resume', '--device', '--workers', '--train_data', '--valid_data', '--test_data')
# This process's number among torchrun's, and how many there are. RANK alone does not say so: some
# clusters set it for other programs.
RANK, RANKS = (
    [int(os.environ[name]) for name in ('RANK', 'WORLD_SIZE')]
    if torch.distributed.is_torchelastic_launched() else (0, 1)
)


# ---- the fixes -----------------------------------------------------------------------------------
#
# "The original" is a MobileNetV3 + LSTM + CTC recogniser that stayed at 93 % word error rate for a
# month, until the first ten of these changes were made together. The others are ours. --undo takes
# any of them back. To add one: give its setting (a flag, or a field of model.Config) the new value
# as a default, and FIXES a line (OURS its name, if it is ours). test_model.py then sees whether
# --undo changes the trained weights.

FIXES = {  # its setting, the value before, why it is a fix
    'output_init': ('output_init', 'normal',
                    'Xavier: a head of deviation 0.01 passes little gradient down (Glorot & '
                    'Bengio 2010)'),
    'weight_init': ('weight_init', 0.01, 'the same for the projections below the LSTM'),
    'upsample': ('upsample', 'transpose',
                 'interpolation gives ceil(T / frames_per_output) outputs, each in its place; '
                 'ConvTranspose may give too many'),
    'dropout': ('dropout', 0.3,
                'more dropout regularises later, and delays leaving the plateau'),
    'squeeze_excite': ('squeeze_excite', True,
                       'channel gates multiply small gradients by small numbers (Howard et al. '
                       '2019, section 5.3)'),
    'forget_bias': ('forget_bias', False,
                    'open forget gates, orthogonal weights (Jozefowicz et al. 2015; Saxe et al. '
                    '2014)'),
    'learning_rate': ('learning_rate', 1e-4, 'steps too small to leave the plateau'),
    'schedule': ('schedule', 'constant',
                 'OneCycle climbs to ten times the rate and back (Smith & Topin 2019)'),
    'grad_clip': ('grad_clip', 1.0, 'early CTC gradients are large: 1.0 cuts nearly all'),
    'weight_decay': ('weight_decay', 1e-4, 'less pull towards zero'),
    'deep_path': ('deep_path', 'alone',
                  'early + gate * deep: a short path for the gradient (Howard et al. 2019, '
                  'section 6.4; Touvron et al. 2021)'),
    'interctc': ('interctc_weight', 0.0,
                 'a CTC loss on the first LSTM layer too (Lee & Watanabe 2021)'),
    'output_rate': ('frames_per_output', 1, 'fewer outputs per label shorten the plateau'),
}
OURS = {'deep_path', 'interctc', 'output_rate'}


def undone_fixes(args: Namespace) -> dict:
    """{setting: the value before} of the fixes that --undo names, or --only does not."""
    undone = set(args.undo)
    if args.only or 'all' in undone:
        undone = FIXES.keys() - args.only
    if 'ours' in undone:
        undone |= OURS
    return {setting: before for name, (setting, before, _) in FIXES.items() if name in undone}


# ---- flags ---------------------------------------------------------------------------------------

NETWORK = model.Config()  # its defaults
WHOLE, COUNT = number(int, 1), number(int, 0)
AMOUNT, SHARE = number(float, 0), number(float, 0, 1)

FLAGS = {  # by group: name, a type or the choices, default, help
    'data': [
        ('train_data', str, None,
         'corpus: .jsonl, .csv or .tsv manifest, LibriSpeech or CMU Sphinx folder; unset: the '
         'built-in corpus with its own validation and test, spoken into the folder corpus/'),
        ('valid_data', str, None,
         'validation corpus, which selects best.pt; unset: a tenth of the training data, whole '
         'speakers if nine or more have at most a tenth; none: train on everything, keep the last'),
        ('test_data', str, None,
         "corpus scored once, at the end; unset: none, or the built-in corpus's; none: no test"),
        ('skip_bad', bool, False,
         'leave out utterances that cannot be used, which else end the run before it starts (in '
         'corpora above 5000 utterances, files that do not decode end it when they are met)'),
        ('overfit', COUNT, 0,
         'learn N utterances by heart, without augmentation that is not asked for; 0: train as '
         'usual'),
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
        ('blocks', number(int, 2, 11), NETWORK.blocks,
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
         'of 5e-5 unless another is given; with validation data best.pt is never worse'),
        ('evaluate', str, None, 'train nothing; score this checkpoint on --test_data'),
        ('device', str, 'cpu', 'cpu, cuda, cuda:1, ...'),
        ('benchmark', bool, False,
         'train nothing; print the speed of all parts, in seconds of audio a second'),
    ],
}


def make_parser() -> ArgumentParser:
    """The parser of FLAGS, --undo and --only."""
    lines = [f'  {name}: {setting} {before}; {why}'
             for name, (setting, before, why) in FIXES.items()]
    parser = ArgumentParser(
        description='Train a MobileNetV3 + BiLSTM + CTC speech recogniser.', allow_abbrev=False,
        formatter_class=RawDescriptionHelpFormatter,
        epilog='\n'.join(['fixes, and the value that --undo brings back:', *lines]))
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
    # The number of threads decides in which order numbers are added, and so the last bits: a run
    # keeps its own. More than 8 gain little, and all wait for the slowest.
    parser.set_defaults(**vars(NETWORK), threads=min(8, torch.get_num_threads()))
    return parser


def parse_flags(argv: list = None) -> tuple:
    """The flags, and the Checkpoint that the run starts from, or None: that of --resume, which
    brings its run's own flags, or of --init_from or --evaluate, which bring their network's.

    What --undo takes back becomes the default. Raises UserError.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    if '' in vars(args).values():
        parser.error('a flag has an empty value')
    if args.overfit or args.evaluate:
        parser.set_defaults(valid_data='none', test_data='none')
    # Here already: load_checkpoint makes a network, which draws. Each process has dropout of its
    # own, until it is resumed; DistributedDataParallel gives all the same weights.
    torch.manual_seed(args.seed + RANK)
    start = None
    if args.resume:
        if any(word.startswith('--') and not word.startswith(RESUMED)
               for word in argv or sys.argv):
            parser.error(f'--resume has the flags of its run; it takes {", ".join(RESUMED)}')
        if Path(args.resume, 'results.json').exists():
            parser.exit(message=f'{args.resume} is finished: nothing is left to do\n')
        start = model.load_checkpoint(Path(args.resume, 'state.pt'))
        parser.set_defaults(**start.run['flags'] | {'run_dir': args.resume})
    elif args.init_from or args.evaluate:  # its network; the usual rate would unlearn it
        start = model.load_checkpoint(args.evaluate or args.init_from)
        parser.set_defaults(learning_rate=5e-5, **vars(start.network.config))
    parser.set_defaults(**undone_fixes(args))
    return parser.parse_args(argv), start


# ---- batches: which utterances, in which order ---------------------------------------------------

def training_batches(speech: Speech, batch_size: int, epoch: int) -> list:
    """One epoch's batches of (epoch, index), which Speech is asked for: every utterance once, the
    batches in random order.

    The items of a batch have nearly equal lengths, augmentation included; a jitter of 2 % varies
    which ones meet.
    """
    rng = default_rng([speech.seed, epoch])
    drawn = [speech.draw(epoch, u) for u in speech.utterances]
    frames = [sum(u.frames for u in parts) / speed for parts, speed, _ in drawn]  # in proportion
    jittered = frames * rng.uniform(0.98, 1.02, len(frames))
    items = [(epoch, index) for index in jittered.argsort().tolist()]
    batches = [items[start:start + batch_size] for start in range(0, len(items), batch_size)]
    rng.shuffle(batches)
    return batches


def evaluation_batches(utterances: list, batch_size: int) -> list:
    """Every utterance once, as (0, index), sorted by length; long ones in smaller batches or alone,
    for memory: 64,000 frames at once with the padding, sixteen clips of 40 s."""
    batches = []
    for frames, index in sorted((u.frames, index) for index, u in enumerate(utterances)):
        if not batches or len(batches[-1]) >= min(batch_size, 64_000 // frames):
            batches.append([])
        batches[-1].append((0, index))
    return batches


def load_batches(speech: Speech, batches: list, workers: int) -> DataLoader:
    """The batches in the order given, as data.collate makes them, whatever the number of worker
    processes."""
    # A generator of its own: a DataLoader draws from PyTorch's, which dropout uses, more often with
    # workers than without.
    return DataLoader(
        speech,
        batch_sampler=batches,
        collate_fn=data.collate,
        num_workers=workers,
        generator=torch.Generator(),
    )


def epoch_loader(speech: Speech, epoch: int, passes: int, args: Namespace) -> DataLoader:
    """The batches of an epoch, from 0, of so many passes over the data, by seed and epoch alone."""
    batches = [training_batches(speech, args.batch_size, epoch * passes + i)
               for i in range(passes)]
    # Of several processes, each takes its share of every batch; one without a share repeats the
    # batch's first utterance.
    shares = [batch[RANK::RANKS] or batch[:1] for batch in sum(batches, [])]
    return load_batches(speech, shares, args.workers)


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
        return optimizer, ConstantLR(optimizer, factor=1.0)
    # PyTorch divides by zero at exactly 10 updates: 10 % of them is one, the climb's start and end.
    return optimizer, OneCycleLR(optimizer, max_lr=10 * args.learning_rate,
                                 total_steps=max(updates, 11), pct_start=0.1)


def train_epoch(network: nn.Module, batches: DataLoader, optimizer: object, schedule: object,
                watch: monitor.Watch, args: Namespace) -> dict:
    """One pass over batches, as data.collate makes them -> {figure: its value in each update}.

    schedule: of the optimizer; its last_epoch counts the updates of the whole run. The watch looks
    at one update of 100. Raises UserError at a gradient that is not finite.
    """
    network.train()
    figures = defaultdict(list)
    for batch in monitor.progress(batches, 'update'):
        mels, lengths, targets, target_lengths = [x.to(args.device) for x in batch]
        layers, output_lengths = network(mels, lengths, every_layer=True)
        # Averaged over utterances, each one's loss divided by its number of labels: nats per label.
        first, *_, loss = [F.ctc_loss(log_probs.transpose(0, 1), targets, output_lengths,
                                      target_lengths) for log_probs in layers]
        optimizer.zero_grad()
        # Intermediate CTC: (1 - weight) * loss + weight * first, the first layer's own.
        loss.lerp(first, args.interctc_weight).backward()
        if schedule.last_epoch % 100 == 0:
            watch(layers[-1], targets, output_lengths, target_lengths, mels, lengths)
        norms = monitor.gradient_norms(watch.network)  # without DistributedDataParallel round it
        norm = norms['gradient']
        if not norm.isfinite():
            raise UserError(
                f'update {schedule.last_epoch + 1}: the loss is {loss}, its gradient not finite; '
                '--resume would end here again, so start with a lower --learning_rate, also from '
                "the run's best.pt, if it has one, by --init_from")
        clipped = 0 < args.grad_clip < norm
        if clipped:
            clip_grads_with_norm_(network.parameters(), args.grad_clip, norm)
        optimizer.step()
        schedule.step()
        watched = {'train_loss': loss.item(), 'clipped': clipped, **norms,
                   **monitor.output_figures(layers[-1], output_lengths)}
        for name, value in watched.items():
            figures[name].append(float(value))
    return figures


# An utterance that was scored: its file, what was said, what was heard greedily and by beam search,
# and the best symbol of every output.
Row = namedtuple('Row', 'file said heard beam path')


@torch.no_grad()
def evaluate(checkpoint: Checkpoint, utterances: list, args: Namespace, beam: int = 0,
             batch_size: int = 16) -> tuple:
    """Score every utterance once, greedily and, where beam is not 0, by beam search of that width.

    -> the mean loss of the utterances that CTC can align, and a Row of every one, in their order.
    """
    network, alphabet, _, language_model = checkpoint
    network.to(args.device).eval()
    losses, rows = [], [None] * len(utterances)
    batches = evaluation_batches(utterances, batch_size)
    loader = load_batches(Speech(utterances, alphabet), batches, args.workers)
    for batch, items in zip(monitor.progress(loader, 'scoring'), batches):
        mels, lengths, targets, target_lengths = [x.to(args.device) for x in batch]
        log_probs, lengths = network(mels, lengths)                         # (B, T', V), (B,)
        loss = F.ctc_loss(log_probs.transpose(0, 1), targets, lengths, target_lengths,
                          reduction='none') / target_lengths
        losses += loss[~loss.isinf()].tolist()
        for (_, i), clip, length in zip(items, log_probs, lengths):
            u, clip, spelled = utterances[i], clip[:length], ''
            if beam:
                spelled = model.beam_decode(clip, alphabet, language_model, beam)
            # A tab or a line's end in a file's name would end a cell of the table.
            rows[i] = Row(' '.join(u.path.name.split()), u.text,
                          model.greedy_decode(clip, alphabet), spelled,
                          model.show_path(clip, alphabet))
    return mean(losses or [inf]), rows


# ---- the data of a run ---------------------------------------------------------------------------

def read_data(args: Namespace) -> Splits:
    """The utterances for training, validation and test; of --overfit, training is validation too.
    Raises UserError that lists all that is broken."""
    paths = [args.train_data, args.valid_data, args.test_data]
    if not args.train_data and not args.evaluate:
        paths = [path or own for path, own in zip(paths, data.builtin_corpus())]
    splits = data.read_splits(paths, args.seed, args.frames_per_output,
                              inf if args.skip_bad else CHECK_UP_TO)
    if splits.faults:
        faults = '\n'.join(splits.faults)
        if not args.skip_bad:
            raise UserError(f'{faults}\n{len(splits.faults)} utterances cannot be used; --skip_bad '
                            'leaves them out')
        print(faults)
    if not (splits.test if args.evaluate else splits.train):
        raise UserError('no utterance is left that can be used; give more (to --evaluate, by '
                        '--test_data)')
    random.Random(args.seed).shuffle(splits.train)
    del splits.train[args.overfit or args.num_train_samples or len(splits.train):]
    if args.overfit:
        splits.valid[:] = splits.train
    return splits


# ---- learning ------------------------------------------------------------------------------------

def save(content: object, path: Path) -> None:
    """Write a text, or a dict of plain data and tensors, all of it or nothing; of several
    processes, only the first writes. Raises UserError."""
    if RANK:
        return
    with monitor.whole_file(path) as part:
        if isinstance(content, str):
            part.write_text(content, encoding='utf-8')
        else:
            torch.save(content, part)


def save_checkpoint(checkpoint: Checkpoint, known: dict, path: Path) -> None:
    """Save a plain dict that model.load_checkpoint reads. known: of the run, besides its config.
    Raises UserError."""
    network, alphabet, config, language_model = checkpoint
    save({'format': model.FORMAT, 'alphabet': alphabet, 'model': network.state_dict(),
          'language_model': json.dumps(language_model.counts), 'run': config | known}, path)


def save_log(log: list, config: dict, folder: Path) -> None:
    """Save what monitor.read_run reads of a run at work. Raises UserError."""
    save(''.join(json.dumps(record) + '\n' for record in log), folder / 'log.jsonl')
    save(json.dumps(config, indent=1), folder / 'config.json')


def fit(checkpoint: Checkpoint, speech: Speech, valid: list, args: Namespace) -> list:
    """Train on speech, validate, record, report and save, epoch by epoch, from the first that is
    not done -> the log, a record of each epoch.

    state.pt is all that an epoch hands on, so a killed run ends with the weights of an
    uninterrupted one (of one process, on a CPU). Raises UserError, OSError."""
    network, _, config, _ = checkpoint
    folder = Path(args.run_dir)
    updates = ceil(len(speech.utterances) / args.batch_size)  # in one pass over the data
    passes = ceil(50 / updates) if args.overfit else 1        # in an epoch
    optimizer, schedule = make_optimizer(network, args, args.epochs * passes * updates)
    watch = monitor.Watch(network, batch_first=True)
    state = config.pop('state', {'records': ([], [], [], [])})
    log, losses, watch.calls, watch.findings = state['records']
    if args.resume:
        optimizer.load_state_dict(state['optimizer'])
        schedule.load_state_dict(state['schedule'])
        torch.set_rng_state(state['random'])
    trained = network
    if RANKS > 1:  # several processes average their gradients
        trained = nn.parallel.DistributedDataParallel(network, forward_sync_buffers=False,
                                                      find_unused_parameters=True)
    while True:
        # Before the first epoch too: from here on, a run can be resumed.
        state = {'optimizer': optimizer.state_dict(), 'schedule': schedule.state_dict(),
                 'random': torch.get_rng_state(),
                 'records': (log, losses, watch.calls, watch.findings)}
        save_checkpoint(checkpoint, {'state': state, 'epoch': len(log), 'scores': {}},
                        folder / 'state.pt')
        save_log(log, config, folder)
        if args.init_from and valid and not config['start']:
            config['start'].append({'epoch': 0})
            validate(checkpoint, valid, config['start'], args)
            print('epoch   0: WER {wer:.2f} %, CER {cer:.2f} %'.format(**config['start'][0]))
            continue
        if len(log) == args.epochs or args.overfit and log and log[-1]['cer'] == 0:
            return log
        start = time.time()
        before = parameters_to_vector(network.parameters())
        batches = epoch_loader(speech, len(log), passes, args)
        figures = train_epoch(trained, batches, optimizer, schedule, watch, args)
        change = (parameters_to_vector(network.parameters()) - before).norm() / before.norm()
        losses += figures['train_loss']
        log.append({'epoch': len(log) + 1, 'updates': len(losses),
                    'seconds': time.time() - start + (log[-1]['seconds'] if log else 0),
                    'weight_change': change.item(), 'warnings': watch.findings,
                    **{name: mean(values) for name, values in figures.items()},
                    **monitor.plateaus_left(losses, config['plateaus'])})
        sample = validate(checkpoint, valid, log, args)
        print(monitor.epoch_line(log[-1]) + sample, flush=True)


def validate(checkpoint: Checkpoint, valid: list, log: list, args: Namespace) -> str:
    """Score after an epoch, or before the first, add what that says to its record, the last of the
    log, and keep the best as best.pt -> lines for the screen: an utterance, another one each time.
    """
    record, config = log[-1], checkpoint.run
    loss, lines = record.get('train_loss'), config['plateaus']
    scores, sample = {}, ''
    if valid:
        loss, rows = evaluate(checkpoint, valid, args)
        lines = config['valid_plateaus']
        _, said, heard, *_ = zip(*rows)
        rates = monitor.error_rates(said, heard)
        scores = {'valid': rates}
        record |= {'valid_loss': loss, 'wer': rates['wer'], 'cer': rates['cer']}
        row = rows[record['epoch'] % len(rows)]
        sample = f'\n     said {row.said}\n    heard {row.heard}\n          {row.path}'
    record['phase'] = monitor.name_phase(loss, lines)
    if monitor.best_epoch(config['start'] + log) is record:
        save_checkpoint(checkpoint, {'epoch': record['epoch'], 'scores': scores},
                        Path(args.run_dir, 'best.pt'))
    return sample


# ---- the end of a run ----------------------------------------------------------------------------

def finish(checkpoint: Checkpoint, splits: Splits, args: Namespace) -> None:
    """Score a checkpoint on validation and test, greedily and by beam search, all utterances and
    those whose text training lacks; write the results, what was said and heard, and a clip.

    Prints the rates, and what training lacked: characters, which can never be said, and speech from
    a telephone. Raises UserError, OSError.
    """
    folder = Path(args.run_dir)
    known = {u.text for u in splits.train}
    results, example = {}, (splits.train or splits.test)[0]
    for split, utterances in ('valid', splits.valid), ('test', splits.test):
        if not utterances:
            continue
        unseen = data.make_alphabet(utterances, checkpoint.alphabet)[len(checkpoint.alphabet):]
        if unseen:
            print('characters that training lacks, each counted as an error:', *unseen)
        narrow = sum(u.narrow for u in utterances)
        if narrow and not checkpoint.run['narrow']:
            print(f'{narrow} recordings: {model.NARROW}')
        _, rows = evaluate(checkpoint, utterances, args, args.beam)
        lines = map('\t'.join, [Row._fields, *rows])
        save('\n'.join(lines) + '\n', folder / f'{split}.tsv')
        scored = {split: rows}
        new = [row for row in rows if row.said not in known]
        if 0 < len(new) < len(rows):  # a language model knows the others by heart
            scored[f'{split}, sentences new to training'] = new
        for name, part in scored.items():
            _, said, heard, spelled, _ = zip(*part)
            rates = {name: monitor.error_rates(said, heard),
                     f'{name}, beam search': monitor.error_rates(said, spelled)}
            monitor.print_scores(rates)
            results |= rates
        # The longest of those that are right; else the first.
        longest = max(rows, key=lambda row: (row.said == row.heard) * len(row.said))
        example = utterances[rows.index(longest)]
    with monitor.whole_file(folder / 'clip.wav') as part:
        soundfile.write(part, data.resample(*data.load_utterance(example)).numpy(),
                        data.SAMPLE_RATE)
    # results.json says that the run is finished, so it comes last.
    save(json.dumps(results, indent=1), folder / 'results.json')
    (folder / 'state.pt').unlink(missing_ok=True)
    command = [sys.orig_argv[0], os.path.relpath(model.__file__),
               args.evaluate or folder / 'best.pt', folder / 'clip.wav', '--beam', model.BEAM]
    print(f'results in {folder}; to transcribe a clip ("{example.text}"):\n   ',
          shlex.join(map(str, command)))


def report_overfit(last: dict, args: Namespace) -> None:
    """Print whether --overfit has learnt its utterances, by the last epoch. Raises UserError where
    not."""
    if last['cer']:
        raise UserError(
            f'NOT LEARNT after {last["updates"]} updates, CER {last["cer"]:.1f} %; where the last '
            f'line says "learning", give it more --epochs; else see what python monitor.py '
            f'{args.run_dir} says, and check that each recording has its own transcript')
    print(f'learnt: all utterances are right after {last["updates"]} updates; data, loss and '
          'network work together')


def benchmark(checkpoint: Checkpoint, speech: Speech, args: Namespace) -> None:
    """Print the seconds of audio that pass in a second, on 40 batches, as one JSON line."""
    network, clips = checkpoint.network, speech.utterances
    del clips[40 * args.batch_size:]
    seconds = sum(u.duration for u in clips)
    batches = epoch_loader(speech, 0, 1, args)
    learning = (*make_optimizer(network, args, 2 * len(batches)),
                monitor.Watch(network, batch_first=True))
    works = {
        'features': lambda: list(batches),
        'features and update': lambda: train_epoch(network, batches, *learning, args),
        'inference, batch 1': lambda: evaluate(checkpoint, clips, args, batch_size=1),
        'inference, batch 16': lambda: evaluate(checkpoint, clips, args)}
    # The better of two: the first is slower, with new shapes and cold files.
    print(json.dumps({name: round(seconds / min(timeit.repeat(work, number=1, repeat=2)), 1)
                      for name, work in works.items()}))


# ---- python train.py -----------------------------------------------------------------------------

def join_processes(args: Namespace) -> None:
    """Where torchrun has started several processes, let them know of each other; the first alone
    prints."""
    if RANKS > 1:
        if args.device != 'cpu':  # --device cuda is then another one for each process
            torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
        torch.distributed.init_process_group()
    if RANK:
        sys.stdout = None


def make_folder(folder: Path) -> None:
    """A run folder that was not there before. Raises UserError."""
    with error_at('--run_dir'):
        folder.mkdir(parents=True)


def run(args: Namespace, start: Checkpoint) -> None:
    """Train and score as the flags say, from a checkpoint or, where it is None, from nothing.
    Raises UserError, OSError."""
    # Gradients that fade through time become numbers below 1e-38, with which a CPU works many times
    # slower: without this, an update takes 2.5 times as long once the outputs are sharp.
    torch.set_flush_denormal(True)
    torch.set_num_threads(args.threads)
    with error_at(f'--device {args.device}'):
        torch.empty(0, device=args.device)
    join_processes(args)
    for setting in undone_fixes(args):
        print(f'without a fix: {setting} {getattr(args, setting)}')
    splits = read_data(args)
    folder = Path(args.run_dir)
    if args.evaluate:
        make_folder(folder)
        save_log([], {'flags': vars(args)}, folder)
        finish(start, splits, args)
        return
    known = start.alphabet if start else ['']
    corpus = data.describe_corpus(splits, args.frames_per_output, known)
    print(monitor.legend(corpus['plateaus']))
    if args.resume:
        checkpoint = start
        if corpus['digest'] != start.run['digest']:
            raise UserError(f'--resume {folder}: the texts or durations of its data have changed')
    else:
        with error_at('--init_from, or the size of the network'):
            network = model.make_network(vars(args), corpus['alphabet'], start)
        checkpoint = Checkpoint(network, corpus['alphabet'],
                                {'flags': vars(args), 'start': []} | corpus,
                                model.CharacterModel.of_texts([u.text for u in splits.train]))
    checkpoint.network.to(args.device)
    speech = Speech(splits.train, checkpoint.alphabet, args.frames_per_output, args.seed,
                    args.spec_augment, speed_perturb=not args.overfit, concat=args.concat)
    if args.benchmark:
        benchmark(checkpoint, speech, args)
        return
    if not RANK and not args.resume:
        make_folder(folder)
    try:
        log = fit(checkpoint, speech, splits.valid, args)
        if not RANK:
            finish(model.load_checkpoint(folder / 'best.pt'), splits, args)
        if args.overfit:
            report_overfit(log[-1], args)
    except KeyboardInterrupt:
        raise UserError(f'stopped; to go on: {sys.orig_argv[0]} train.py --resume '
                        f'{shlex.quote(args.run_dir)}') from None


@monitor.one_line_ends('train.py')
def main(argv: list = None) -> None:
    run(*parse_flags(argv))


if __name__ == '__main__':
    main()
