"""Train the recogniser on recordings and transcripts, and score it.

    python train.py                                                   the built-in corpus
    python train.py --train_data my/train.tsv --test_data my/test.tsv --epochs 40
    python train.py --train_data my/train.tsv --overfit 10            the first experiment with any new data

A run folder holds config.json (the flags), log.jsonl (one JSON object an epoch), best.pt (lowest validation WER),
last.pt, and at the end results.json and clip.wav, a recording to transcribe. Losses are CTC in nats per label: each
utterance's negative log-likelihood divided by its number of labels, averaged over utterances.
"""
import argparse
import contextlib
import itertools
import json
import math
import os
import random
import shlex
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F

import data
import model
import monitor

EVALUATION_BATCH, PAD_TO = 16, 16  # utterances; frames: few different shapes are faster than exact ones
LISTEN_TO = 5000  # utterances; of more, files are decoded before training only with --skip_bad
OVERFIT_UPDATES = 25  # at least, in an epoch of --overfit


# ---- batches ------------------------------------------------------------------------------------------------------

def collate(items):
    """-> mels (B, 1, T, 80), lengths (B,), targets (B, L), target lengths (B,), indices; padding is zero."""
    mels, targets, indices = zip(*items)
    longest = math.ceil(max(map(len, mels)) / PAD_TO) * PAD_TO
    batch = torch.stack([F.pad(m, (0, 0, 0, longest - len(m))) for m in mels])[:, None]
    lengths, target_lengths = (torch.tensor([len(x) for x in xs]) for xs in (mels, targets))
    return batch, lengths, torch.nn.utils.rnn.pad_sequence(targets, batch_first=True), target_lengths, indices


def training_batches(speech, batch_size, epochs, rank=0, ranks=1):
    """Batches of (epoch, index), every utterance once an epoch, of nearly equal lengths after speed perturbation, which
    has an utterance meet others every epoch; in random order. Of several processes, each takes its share of every
    batch, never an empty one."""
    for epoch in range(epochs):
        rng = np.random.default_rng([speech.seed, epoch])
        lengths = [u.duration / speech.speed(epoch, i) for i, u in enumerate(speech.utterances)]
        order = np.argsort(lengths * rng.uniform(0.98, 1.02, len(lengths)), kind='stable')
        batches = [[(epoch, int(i)) for i in order[k:k + batch_size]] for k in range(0, len(order), batch_size)]
        rng.shuffle(batches)
        yield from (batch[rank::ranks] or batch[:1] for batch in batches)


def length_batches(utterances, batch_size):
    """For evaluation: every utterance once, sorted by length."""
    order = sorted(range(len(utterances)), key=lambda i: utterances[i].duration)
    return [[(0, i) for i in order[k:k + batch_size]] for k in range(0, len(order), batch_size)]


def loader(speech, batches, workers=0):
    """The batches (lists of (epoch, index)), loaded in the order given, whatever the number of worker processes."""
    # A generator of its own: a DataLoader draws from PyTorch's, which dropout uses, more often with workers.
    return torch.utils.data.DataLoader(speech, batch_sampler=batches, collate_fn=collate, num_workers=workers,
                                       generator=torch.Generator())


# ---- flags --------------------------------------------------------------------------------------------------------

def number(kind, low, high=2 ** 53):
    """An argparse type: int or float, from low to high (beyond 2^53 a float cannot count)."""
    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f'{text} is not between {low} and {high}')
        return kind(text)
    parse.__name__ = kind.__name__
    return parse


def parse_flags(argv=None):
    parser = argparse.ArgumentParser(description='Train a MobileNetV3 + BiLSTM + CTC speech recogniser.',
                                     allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    switch, absent = {'action': argparse.BooleanOptionalAction}, {'default': argparse.SUPPRESS}
    count, positive, amount, share = number(int, 0), number(int, 1), number(float, 0), number(float, 0, 1)
    add = parser.add_argument_group('data').add_argument
    add('--train_data', help='corpus: .jsonl, .csv or .tsv manifest, LibriSpeech or CMU Sphinx folder; '
        'unset: the built-in corpus with its own validation and test, spoken into the folder corpus/')
    add('--valid_data', help='corpus that chooses best.pt; unset: a tenth of the training data, other speakers if ten '
        'are known; none: train on everything, keep the last checkpoint')
    add('--test_data', help='corpus scored once, at the end; unset or none: no test')
    add('--skip_bad', default=False, help='leave out utterances that cannot be used, which else end the run', **switch)
    add('--overfit', type=count, default=0, help='learn N utterances by heart, without augmentation; 0: train as usual')
    add('--num_train_samples', type=count, default=0, help='train on N utterances, drawn by the seed; 0: all')
    add('--spec_augment', default=False, help='mask bands and stretches of time in training', **switch)
    add('--speed_perturb', default=True, help='play at 0.9 to 1.1 times the speed in training', **switch)
    add('--workers', type=count, default=0, help='processes that load audio; 0: the training process itself')
    add = parser.add_argument_group('optimisation').add_argument
    add('--epochs', type=positive, default=8, help='passes over the training data')
    add('--batch_size', type=positive, default=8, help='utterances an update')
    add('--learning_rate', type=amount, default=3e-4, help='OneCycleLR climbs to ten times this')
    add('--weight_decay', type=amount, default=1e-5, help="AdamW's; 0: none")
    add('--grad_clip', type=amount, default=5.0, help='largest norm of all gradients together; 0: no limit')
    add('--interctc_weight', type=share, default=0.3, help="share of the first LSTM layer's own CTC loss; 0: none")
    add('--seed', type=count, default=0, help='of hold-out, subset, initialisation, order, augmentation, dropout')
    fixed = model.Config(1)
    add = parser.add_argument_group('model').add_argument
    add('--model', choices=model.PRESETS, default='fixed', help="fixed: ours; literal: the original's fixed network; "
        'before: its network before the fixes. The flags below change single settings; in brackets those of fixed')
    add('--blocks', type=positive, help=f'of MobileNetV3-Small, 2 to 11 [{fixed.blocks}]', **absent)
    add('--frames_per_output', type=positive, help=f'frames of 10 ms: 1, 2 or 4 [{fixed.frames_per_output}]', **absent)
    add('--hidden', type=positive, help=f'LSTM units in each direction [{fixed.hidden}]', **absent)
    add('--dropout', type=amount, help=f'before each LSTM layer and the head; 0: none [{fixed.dropout}]', **absent)
    for flag, what in (('zero_init_residual', 'residual blocks start as identities'),
                       ('early_path', "with 4 blocks or more: add block 3's features to the deep ones"),
                       ('squeeze_excite', "MobileNetV3's channel gates")):
        add(f'--{flag}', help=f'{what} [{getattr(fixed, flag)}]', **switch, **absent)
    add = parser.add_argument_group('run').add_argument
    add('--run_dir', default=None, help='folder for the results; None: runs/ and the time')
    add('--device', default='cpu', help='cpu, cuda, cuda:1, ...')
    add('--benchmark', default=False, help='train nothing; measure the speed of all parts at these settings', **switch)
    add('--json', default=False, help='with --benchmark: print it as one JSON object', **switch)
    return parser.parse_args(argv)


def make_optimizer(network, args, updates):
    """AdamW, and OneCycleLR to ten times the learning rate: 10 % of the updates up from 0.4 of it, the rest down to
    nothing, both by cosine; AdamW's first beta goes 0.95, 0.85, 0.95 the other way (PyTorch's defaults)."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay,
                                  fused=True)  # one kernel for all parameters: 7 % of an update on a CPU
    # PyTorch divides by zero at exactly 10 updates (10 % of them is one, the climb's start and end at once).
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=10 * args.learning_rate,
                                                   total_steps=max(updates, 11), pct_start=0.1, anneal_strategy='cos')
    return optimizer, schedule


def train_epoch(network, batches, optimizer, schedule, args, gradients, outputs, progress=monitor.progress):
    """One pass over the batches -> the mean training loss, in nats per label (of several processes: of this one's)."""
    network.train()
    total, count, start = 0.0, 0, time.time()
    for n, (mels, lengths, targets, target_lengths, _) in enumerate(batches, 1):
        layers, lengths = network(mels.to(args.device), lengths.to(args.device), every_layer=True)
        # Averaged over utterances, each one's loss divided by its number of labels: nats per label.
        first, loss = [F.ctc_loss(x.transpose(0, 1), targets.to(args.device), lengths,
                                  target_lengths.to(args.device)) for x in (layers[0], layers[-1])]
        if not torch.isfinite(loss):
            raise data.DataError(f'training diverged, the loss is {loss.item()}: lower --learning_rate')
        optimizer.zero_grad()
        # Intermediate CTC (Lee & Watanabe 2021): the first layer is told directly what the last one is to say.
        loss.lerp(first, args.interctc_weight).backward()
        if gradients.clip(args.grad_clip):  # False, and counted, where a gradient is not finite
            optimizer.step()
            schedule.step()
        total, count = total + loss.item() * len(mels), count + len(mels)
        outputs.add(layers[-1], lengths, target_lengths)
        progress(schedule.last_epoch, schedule.total_steps, total / count, (time.time() - start) / n)
    return total / count


@torch.no_grad()
def evaluate(network, speech, args):
    """Every utterance once -> mean CTC loss in nats per label, error rates pooled over words, and the sentences
    [(index, said, heard, frame labels as a strip: '.' blank, '_' space)]."""
    network.eval()
    losses, sentences = [], []
    for mels, lengths, targets, target_lengths, indices in loader(
            speech, length_batches(speech.utterances, EVALUATION_BATCH), args.workers):
        log_probs, lengths = (x.cpu() for x in network(mels.to(args.device), lengths.to(args.device)))
        loss = F.ctc_loss(log_probs.transpose(0, 1), targets, lengths, target_lengths, reduction='none')
        losses += (loss / target_lengths)[(target_lengths > 0) & ~loss.isinf()].tolist()  # where there is an alignment
        paths, decoded = log_probs.argmax(2).tolist(), model.greedy_decode(log_probs, lengths)
        for i, n, path, symbols in zip(indices, lengths.tolist(), paths, decoded):
            strip = ''.join(speech.alphabet[s].replace(' ', '_') or '.' for s in path[:n])
            sentences.append((i, speech.utterances[i].text, data.decode(symbols, speech.alphabet), strip))
    rates = monitor.error_rates([said for _, said, _, _ in sentences], [heard for _, _, heard, _ in sentences])
    return sum(losses) / max(1, len(losses)), rates, sorted(sentences)


def read_data(args, frames_per_output):
    """The corpora -> training, validation and test utterances. Raises DataError that lists all that is broken."""
    given = {'train': args.train_data, 'valid': args.valid_data, 'test': args.test_data}
    try:
        paths = {'valid': None, 'test': 'none'} | (data.builtin_corpus() if args.train_data is None else {})
    except OSError as error:
        raise data.DataError(f'corpus/: cannot be written ({error}); mend that, or give --train_data') from None
    paths |= {split: path for split, path in given.items() if path is not None}
    paths |= {'valid': 'none', 'test': 'none'} if args.overfit else {}
    sides, choice, faults, _ = data.gather(**paths, seed=args.seed, frames_per_output=frames_per_output,
                                        most=math.inf if args.skip_bad else LISTEN_TO)
    if faults and not args.skip_bad:
        raise data.DataError('\n'.join([*faults.values(), f'{len(faults)} broken; --skip_bad trains without them']))
    if faults:
        print(*faults.values(), f'{len(faults)} broken utterances are left out', sep='\n')
    for split in (split for split, side in zip(given, sides) if not side and paths[split] != 'none'):
        raise data.DataError(f'--{split}_data: no utterance of {paths[split] or paths["train"]} is left for it')
    shared = {os.path.abspath(u.path) for u in sides[0]} & {os.path.abspath(u.path) for u in sides[1] + sides[2]}
    if shared:
        print(f'{len(shared)} files of validation or test are in training too: their scores say nothing of new speech')
    if choice:
        print(choice)
    random.Random(args.seed).shuffle(sides[0])
    train = sides[0][:args.overfit or args.num_train_samples or None]
    return (train, train, []) if args.overfit else (train, *sides[1:])


def plateau(utterances, alphabet, network):
    """(uniform, constant) losses of these utterances in nats per label."""
    lines = monitor.plateau_lines([data.encode(u.text, alphabet) for u in utterances],
                                  network.output_lengths(torch.tensor([u.frames for u in utterances])), len(alphabet))
    if math.isnan(lines[0]):
        raise data.DataError(f'{utterances[0].where}: no utterance of this manifest both is spelled in the training '
                             "transcripts' alphabet and lasts long enough for its text")
    return lines


def benchmark(network, speech, args):
    """Print the seconds of audio that pass in a second, at the settings of args and on 40 batches of their data."""
    batches = list(itertools.islice(training_batches(speech, args.batch_size, 1), 40))
    some, fresh = [speech.utterances[i] for batch in batches for _, i in batch], loader(speech, batches, args.workers)
    tools = (*make_optimizer(network, args, 4 * len(batches)), args, monitor.Gradients(network),
             monitor.Outputs(len(speech.alphabet), 1), lambda *_: None)

    @torch.no_grad()
    def transcribe(size):
        network.eval()
        for mels, lengths, *_ in loader(data.Speech(some, speech.alphabet), length_batches(some, size), args.workers):
            model.greedy_decode(*network(mels.to(args.device), lengths.to(args.device)))

    def rate(work, *arguments):
        for _ in range(2):  # the first time is slower: new shapes, cold files
            start = time.perf_counter()
            work(*arguments)
        return round(sum(u.duration for u in some) / (time.perf_counter() - start), 1)

    result = {'features': rate(list, fresh), 'features and update': rate(train_epoch, network, fresh, *tools),
              **{f'inference, batch {size}': rate(transcribe, size) for size in (1, EVALUATION_BATCH)}}
    try:
        from resource import RUSAGE_SELF, getrusage
        peak = getrusage(RUSAGE_SELF).ru_maxrss // (2 ** 20 if sys.platform == 'darwin' else 2 ** 10)
    except ImportError:  # Windows
        peak = None
    ready = list(fresh)
    padded, frames = (sum(sizes) for sizes in zip(*((m[..., 0].numel(), int(n.sum())) for m, n, *_ in ready)))
    result |= {'update': rate(train_epoch, network, ready, *tools), 'threads': torch.get_num_threads(),
               'padding in training, %': round(100 - 100 * frames / padded, 1), 'peak memory, MB': peak}
    print(json.dumps(result) if args.json else '\n'.join(f'{value!s:>10}  {key}' for key, value in result.items()))
    return result


def run(args, rank=0, ranks=1):
    """Train and score as the flags say -> the contents of results.json. Raises DataError. Of several processes, each
    trains on its share of every batch; the first (rank 0) validates, prints and writes."""
    # Gradients that fade through time become numbers below 1e-38, with which a CPU works many times slower: without
    # this, an update takes 2.5 times as long once the outputs are sharp.
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    try:
        if ranks > 1 and (args.overfit or args.benchmark):
            raise ValueError('--overfit and --benchmark are for one process; leave torchrun away')
        config = model.Config(1, **model.PRESETS[args.model] | {
            key: value for key, value in vars(args).items() if key in model.Config.__dataclass_fields__})
        torch.empty(0, device=args.device)
    except (ValueError, RuntimeError, AssertionError) as error:  # a bad combination of flags; no such device
        raise data.DataError(f'flags: {error}') from None
    if rank:
        torch.distributed.barrier()  # the first process makes the built-in corpus
    train, valid, test = read_data(args, config.frames_per_output)
    if ranks > 1 and rank == 0:
        torch.distributed.barrier()
    alphabet = data.make_alphabet(train)
    config = replace(config, vocab_size=len(alphabet))
    network = model.Recogniser(config).to(args.device)
    unseen = {character for u in valid + test for character in u.text}.difference(alphabet)
    if unseen:
        print('validation or test has characters that training lacks, so each is an error:', *map(repr, sorted(unseen)))
    coarse = data.unlearnable(train, alphabet, network.stride)
    if coarse:
        print(f'{len(coarse)} utterances have fewer frames of {10 * network.stride} ms, the coarsest grid, than CTC '
              'needs; upsampling hides that:', *(u.path.name for u in coarse))
    flags = (not args.overfit and flag for flag in (args.spec_augment, args.speed_perturb))
    train_speech = data.Speech(train, alphabet, config.frames_per_output, args.seed, *flags)
    updates, hours = math.ceil(len(train) / args.batch_size), sum(u.duration for u in train) / 3600
    updates *= (passes := math.ceil(OVERFIT_UPDATES / updates) if args.overfit else 1)  # over the data, in an epoch
    trained = network
    if ranks > 1:  # all start from the first one's weights and average their gradients; each has dropout of its own
        trained = torch.nn.parallel.DistributedDataParallel(network, broadcast_buffers=False)
        torch.manual_seed(args.seed + rank)
    batches = training_batches(train_speech, args.batch_size, args.epochs * passes, rank, ranks)
    batches = iter(loader(train_speech, batches, args.workers))
    optimizer, schedule = make_optimizer(network, args, updates * args.epochs)
    lines = plateau(train, alphabet, network)
    valid_lines = plateau(valid, alphabet, network) if valid else None
    parameters = sum(p.numel() for p in network.parameters())
    print(f'{len(train)} utterances, {hours:.2f} hours, {len(alphabet)} symbols, {parameters:,} parameters; losses in '
          f'nats per label: uniform output {lines[0]:.2f}, constant output {lines[1]:.2f}')
    if args.benchmark:
        return benchmark(network, train_speech, args)

    run_dir = Path(args.run_dir or time.strftime('runs/%Y%m%d-%H%M%S'))
    try:
        if rank == 0:
            run_dir.mkdir(parents=True, exist_ok=True)
            if any(path.name != 'config.json' for path in run_dir.iterdir()):  # that of a run that failed
                raise data.DataError(f'--run_dir {run_dir}: is not empty; name another folder')
            (run_dir / 'config.json').write_text(json.dumps(vars(args) | asdict(config), indent=1) + '\n')
    except OSError as error:
        raise data.DataError(f'--run_dir {run_dir}: cannot be made ({error.strerror}); name another folder') from None
    gradients = monitor.Gradients(network)
    outputs = monitor.Outputs(len(alphabet), monitor.letter_entropy([data.encode(u.text, alphabet) for u in train]))
    kept, shown, best, train_seconds = run_dir / 'last.pt', [], None, 0.0
    for epoch in range(1, args.epochs + 1):
        start, learning_rate = time.time(), schedule.get_last_lr()[0]
        gradients.reset(), outputs.reset()
        train_loss = train_epoch(trained, itertools.islice(batches, updates), optimizer, schedule, args,
                                 gradients, outputs)
        train_seconds += time.time() - start
        if rank:
            continue
        record = {'epoch': epoch, 'train_loss': train_loss, 'train_way': monitor.way(train_loss, lines),
                  'learning_rate': learning_rate, 'train_seconds': train_seconds,
                  **gradients.report(), **outputs.report()}
        rates, sentences = None, [None]
        if valid:
            valid_loss, rates, sentences = evaluate(network, data.Speech(valid, alphabet), args)
            record |= {'valid_loss': valid_loss, 'valid_way': monitor.way(valid_loss, valid_lines),
                       'wer': rates['wer'], 'cer': rates['cer']}
        record['warnings'] = monitor.diagnose(record)
        with open(run_dir / 'log.jsonl', 'a') as log:
            print(json.dumps(record), file=log)
        torch.save({'config': asdict(config), 'alphabet': alphabet, 'model': network.state_dict(),
                    'run': {'epoch': epoch, 'valid': rates, 'test': None, 'hours': hours, 'utterances': len(train),
                            'train_data': args.train_data or 'the built-in corpus'}}, run_dir / 'last.pt')
        if valid and (best is None or (rates['wer'], rates['cer']) <= (best['wer'], best['cer'])):  # equal: later
            best, kept, shown = rates, run_dir / 'best.pt', sentences
            shutil.copy(run_dir / 'last.pt', kept)
        monitor.report(record, sentences[epoch % len(sentences)])
        if args.overfit and rates['cer'] == 0:
            break

    if rank:
        return None
    results = {'valid': best, 'test': None, 'updates': updates * epoch, 'train_seconds': train_seconds,
               'parameters': parameters, 'seed': args.seed}
    if test:
        checkpoint = torch.load(kept, weights_only=True)
        network.load_state_dict(checkpoint['model'])
        _, results['test'], shown = evaluate(network, data.Speech(test, alphabet), args)
        checkpoint['run']['test'] = results['test']
        torch.save(checkpoint, kept)
    (run_dir / 'results.json').write_text(json.dumps(results, indent=1) + '\n')
    for part in ('valid', 'test'):
        if results[part]:
            print('{}: WER {wer:.2f} % ({substitutions} S, {insertions} I, {deletions} D in {words} words of '
                  '{utterances} utterances; 95 %: {interval[0]:.1f} to {interval[1]:.1f}), '
                  'CER {cer:.2f} %'.format(part, **results[part]))
    if args.overfit and best['cer']:
        raise data.DataError(f'NOT LEARNT: {len(valid)} utterances, {updates * epoch} updates, CER {best["cer"]:.1f}; '
                             'read the warnings above. Are audio and text of the same utterance?')
    if args.overfit:
        print(f'learnt: {len(valid)} utterances by heart after {updates * epoch} updates; data, loss and network agree')
    clips = test or valid or train
    right = [clips[i] for i, said, heard, _ in shown if said == heard]  # the longest that it gets right, if any
    clip = max(right, key=lambda u: len(u.text), default=clips[0])
    wave = data.resample(*data.read_audio(clip.path), data.SAMPLE_RATE).numpy()
    soundfile.write(run_dir / 'clip.wav', wave, data.SAMPLE_RATE)
    command = shlex.join(map(str, [sys.orig_argv[0], os.path.relpath(model.__file__), kept, run_dir / 'clip.wav']))
    print(f'results in {run_dir}; to transcribe a clip ("{clip.text}"):\n   ', command)
    return results


def main(argv=None):
    args = parse_flags(argv)
    rank, ranks = (int(os.environ.get(name, n)) for name, n in (('RANK', 0), ('WORLD_SIZE', 1)))  # torchrun sets them
    try:
        if ranks > 1:
            torch.distributed.init_process_group('gloo' if args.device == 'cpu' else 'nccl')
            args.device = args.device if args.device == 'cpu' else f'cuda:{os.environ["LOCAL_RANK"]}'
        with contextlib.redirect_stdout(open(os.devnull, 'w') if rank else sys.stdout):
            return run(args, rank, ranks)
    except KeyboardInterrupt:
        sys.exit('train.py: stopped; epochs that were finished, if any, are in the run folder')
    except data.DataError as error:
        # From a loader process the error comes with that process's traceback before it.
        sys.exit('train.py: ' + str(error).rpartition('data.DataError: ')[2].strip())


if __name__ == '__main__':
    main()
