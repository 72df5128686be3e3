"""Train the recogniser on recordings and transcripts, and score it.

    python train.py --train_data train.jsonl --valid_data dev.jsonl --test_data test.jsonl --epochs 40

A run folder holds config.json (the flags), log.jsonl (one JSON object an epoch), best.pt (lowest validation WER),
last.pt, and results.json at the end. Losses are CTC in nats per label: each utterance's negative log-likelihood
divided by its number of labels, averaged over utterances.
"""
import argparse
import itertools
import json
import math
import random
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import model
import monitor

EVALUATION_BATCH = 16
CLEAR = '\x1b[K'  # ANSI escape: erase to the end of the line


def number(kind, low):
    """An argparse type: int or float, not below low, small enough for a float to count it."""
    def parse(text):
        value = kind(text)
        if not low <= value < 2 ** 53:
            raise argparse.ArgumentTypeError(f'{text} is not between {low} and 2^53')
        return value
    parse.__name__ = kind.__name__
    return parse


def parse_flags(argv=None):
    parser = argparse.ArgumentParser(description='Train a MobileNetV3 + BiLSTM + CTC speech recogniser.',
                                     allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    switch, absent = {'action': argparse.BooleanOptionalAction}, {'default': argparse.SUPPRESS}
    count, positive, amount = number(int, 0), number(int, 1), number(float, 0)
    add = parser.add_argument_group('data').add_argument
    add('--train_data', required=True, help='manifest: JSON lines with audio_filepath and text')
    add('--valid_data', required=True, help='manifest that chooses best.pt')
    add('--test_data', default=None, help='manifest scored once, at the end, with best.pt; None: no test')
    add('--num_train_samples', type=count, default=0,
        help='train on the first N utterances after a seeded shuffle; 0: all')
    add('--spec_augment', default=False, help='mask bands and stretches of time in training', **switch)
    add('--speed_perturb', default=True, help='play at 0.9 to 1.1 times the speed in training', **switch)
    add('--workers', type=count, default=0, help='processes that load audio; 0: the training process itself')
    add = parser.add_argument_group('optimisation').add_argument
    add('--epochs', type=positive, default=40, help='passes over the training data')
    add('--batch_size', type=positive, default=8, help='utterances an update')
    add('--learning_rate', type=amount, default=3e-4, help='OneCycleLR climbs to ten times this')
    add('--weight_decay', type=amount, default=1e-5, help="AdamW's; 0: none")
    add('--grad_clip', type=amount, default=5.0, help='largest norm of all gradients together; 0: no limit')
    add('--seed', type=count, default=0, help='of the subset, initialisation, order, augmentation, dropout')
    fixed = model.Config(1)
    add = parser.add_argument_group('model').add_argument
    add('--model', choices=model.PRESETS, default='fixed',
        help="fixed: ours; literal: the original's fixed network alone; before: its network before the fixes (the "
             'training loop is the same for all). The flags below change single settings of it; their values for '
             'fixed stand in brackets')
    add('--blocks', type=positive, help=f'of MobileNetV3-Small, 1 to 11 [{fixed.blocks}]', **absent)
    add('--frames_per_output', type=positive,
        help=f'mel frames of 10 ms for each output: 1, 2 or 4 [{fixed.frames_per_output}]', **absent)
    add('--dropout', type=amount, help=f'before each LSTM layer and the head; 0: none [{fixed.dropout}]', **absent)
    add('--zero_init_residual', help=f'residual blocks start as identities [{fixed.zero_init_residual}]',
        **switch, **absent)
    add('--early_path', help="with 4 blocks or more: add block 3's features to the deep ones "
        f'[{fixed.early_path}]', **switch, **absent)
    add('--squeeze_excite', help=f"MobileNetV3's channel gates [{fixed.squeeze_excite}]", **switch, **absent)
    add = parser.add_argument_group('run').add_argument
    add('--run_dir', default=None, help='folder for the results; None: runs/ and the time')
    add('--device', default='cpu', help='cpu, cuda, cuda:1, ...')
    return parser.parse_args(argv)


def make_optimizer(network, args, updates):
    """AdamW, and OneCycleLR to ten times the learning rate: 10 % of the updates up from 0.4 of it, the rest down to
    nothing, both by cosine; AdamW's first beta goes 0.95, 0.85, 0.95 the other way (PyTorch's defaults)."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    # PyTorch divides by zero at exactly 10 updates (10 % of them is one, the climb's start and end at once).
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=10 * args.learning_rate,
                                                   total_steps=max(updates, 11), pct_start=0.1, anneal_strategy='cos')
    return optimizer, schedule


def train_epoch(network, batches, optimizer, schedule, args, gradients, outputs, progress):
    """One pass over the batches -> the mean training loss, in nats per label."""
    network.train()
    total, count = 0.0, 0
    for mels, lengths, targets, target_lengths, _ in batches:
        log_probs, lengths = network(mels.to(args.device), lengths.to(args.device))
        # 'mean' divides each utterance's loss by its number of labels, then averages: nats per label.
        loss = F.ctc_loss(log_probs.transpose(0, 1), targets.to(args.device), lengths, target_lengths.to(args.device),
                          reduction='mean')
        if not torch.isfinite(loss):
            raise data.DataError(f'training diverged, the loss is {loss.item()}: lower --learning_rate')
        optimizer.zero_grad()
        loss.backward()
        if gradients.clip(args.grad_clip):  # False, and counted, where a gradient is not finite
            optimizer.step()
            schedule.step()
        total, count = total + loss.item() * len(mels), count + len(mels)
        outputs.add(log_probs, lengths, target_lengths)
        progress(total / count)
    return total / count


@torch.no_grad()
def evaluate(network, speech, args):
    """Every utterance once -> mean CTC loss in nats per label, error rates pooled over words, and the sentences
    [(index, said, heard, frame labels as a strip: '.' blank, '_' space)]."""
    network.eval()
    losses, sentences = [], []
    for mels, lengths, targets, target_lengths, indices in data.loader(
            speech, data.length_batches(speech.utterances, EVALUATION_BATCH), args.workers):
        log_probs, lengths = network(mels.to(args.device), lengths.to(args.device))
        log_probs, lengths = log_probs.cpu(), lengths.cpu()
        loss = F.ctc_loss(log_probs.transpose(0, 1), targets, lengths, target_lengths, reduction='none')
        losses += (loss / target_lengths)[(target_lengths > 0) & ~loss.isinf()].tolist()  # where there is an alignment
        paths, decoded = log_probs.argmax(2).tolist(), model.greedy_decode(log_probs, lengths)
        for i, n, path, symbols in zip(indices, lengths.tolist(), paths, decoded):
            strip = ''.join(speech.alphabet[s].replace(' ', '_') or '.' for s in path[:n])
            sentences.append((i, speech.utterances[i].text, data.decode(symbols, speech.alphabet), strip))
    rates = monitor.error_rates([said for _, said, _, _ in sentences], [heard for _, _, heard, _ in sentences])
    return sum(losses) / max(1, len(losses)), rates, sorted(sentences)


class Progress:
    """A live line on a terminal: epoch, update, loss, time left."""

    def __init__(self, epochs, updates):
        self.epochs, self.updates, self.done, self.start = epochs, updates, 0, time.time()

    def __call__(self, loss):
        if sys.stderr.isatty():
            epoch, update = divmod(self.done, self.updates)
            left = int((time.time() - self.start) / (self.done + 1) * (self.epochs * self.updates - self.done - 1))
            print(f'\repoch {epoch + 1}/{self.epochs}  update {update + 1}/{self.updates}  loss {loss:.3f}  '
                  f'{left // 60} min {left % 60:02d} s left', end=CLEAR, file=sys.stderr, flush=True)
        self.done += 1


def read_data(args):
    """The manifests -> training, validation and test utterances (None without --test_data)."""
    train = data.read_manifest(args.train_data)
    random.Random(args.seed).shuffle(train)
    return (train[:args.num_train_samples or None], data.read_manifest(args.valid_data),
            data.read_manifest(args.test_data) if args.test_data else None)


def check_learnable(train, alphabet, network):
    """Name what CTC cannot align, on the output grid (an error) and on the backbone's coarsest grid (a warning:
    interpolation makes the first check pass and brings nothing back). Raises DataError."""
    lost = data.unlearnable(train, alphabet, network.config.frames_per_output)
    if lost:
        raise data.DataError('\n'.join(f'{u.where}: {u.path} has fewer outputs than labels and repeats; mend or remove '
                                       f'it, or lower --frames_per_output' for u in lost))
    coarse = data.unlearnable(train, alphabet, network.stride)
    if coarse:
        print(f"{len(coarse)} of {len(train)} utterances have fewer frames on the backbone's coarsest grid "
              f'({10 * network.stride} ms) than CTC needs; upsampling hides that:',
              ', '.join(u.path.name for u in coarse))


def plateau(utterances, alphabet, network):
    """(uniform, constant) losses of these utterances, of the first 500 as far as CTC can align them."""
    some = [u for u in utterances[:500] if data.encode(u.text, alphabet)
            and not data.unlearnable([u], alphabet, network.config.frames_per_output)]
    if not some:
        raise data.DataError(f'{utterances[0].where}: no utterance of this manifest both is spelled in the training '
                             "transcripts' alphabet and lasts long enough for its text")
    return monitor.plateau_lines([data.encode(u.text, alphabet) for u in some],
                                 network.output_lengths(torch.tensor([u.frames for u in some])), len(alphabet))


def report(record, sentence):
    """The terminal's lines for one epoch."""
    print('epoch {epoch:3d}  {train_seconds:4.0f} s  loss {train_loss:.3f} ({train_way:.0%} of the way from uniform to '
          'constant output)  valid {valid_loss:.3f}  WER {wer:.1f} %  CER {cer:.1f} %'.format(**record))
    print(*(f'    ! {warning}\n' for warning in record['warnings']), sep='', end='')
    _, said, heard, strip = sentence
    print(f'     said {said}\n    heard {heard}\n          {strip}', flush=True)


def run(args):
    """Train and score as the flags say -> the contents of results.json. Raises DataError."""
    run_dir = Path(args.run_dir or time.strftime('runs/%Y%m%d-%H%M%S'))
    try:
        if run_dir.exists() and any(path.name != 'config.json' for path in run_dir.iterdir()):  # of a run that failed
            raise data.DataError(f'--run_dir {run_dir}: is not empty; name another folder')
    except OSError as error:
        raise data.DataError(f'--run_dir {run_dir}: cannot be used ({error.strerror}); name another folder') from None
    torch.manual_seed(args.seed)
    train, valid, test = read_data(args)
    alphabet = data.make_alphabet(train)
    try:
        config = model.Config(len(alphabet), **model.PRESETS[args.model] | {
            key: value for key, value in vars(args).items() if key in model.Config.__dataclass_fields__})
        network = model.Recogniser(config).to(args.device)
    except (ValueError, RuntimeError, AssertionError) as error:  # a bad combination of flags; no such device
        raise data.DataError(f'flags: {error}') from None
    for flag, utterances in ('--valid_data', valid), ('--test_data', test or []):
        unseen = {character for u in utterances for character in u.text}.difference(alphabet)
        if unseen:
            print(f'{flag} has characters that no training transcript has, so each is an error:',
                  *map(repr, sorted(unseen)))
    check_learnable(train, alphabet, network)
    frames_per_output, parameters = config.frames_per_output, sum(p.numel() for p in network.parameters())
    train_speech = data.Speech(train, alphabet, frames_per_output, args.seed, args.spec_augment, args.speed_perturb)
    valid_speech = data.Speech(valid, alphabet)
    updates = math.ceil(len(train) / args.batch_size)  # an epoch
    batches = iter(data.loader(train_speech, data.training_batches(train, args.batch_size, args.seed, args.epochs),
                               args.workers))
    optimizer, schedule = make_optimizer(network, args, updates * args.epochs)
    lines, valid_lines = plateau(train, alphabet, network), plateau(valid, alphabet, network)
    print(f'{len(train)} utterances, {len(alphabet)} symbols, {parameters:,} parameters; losses in nats per label: '
          f'uniform output {lines[0]:.2f}, constant output {lines[1]:.2f}')

    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / 'config.json').write_text(json.dumps(vars(args) | asdict(config), indent=1) + '\n')
    except OSError as error:
        raise data.DataError(f'--run_dir {run_dir}: cannot be made ({error.strerror}); name another folder') from None
    gradients = monitor.Gradients(network)
    outputs = monitor.Outputs(len(alphabet), monitor.letter_entropy([data.encode(u.text, alphabet) for u in train]))
    progress, train_seconds, best = Progress(args.epochs, updates), 0.0, None
    for epoch in range(1, args.epochs + 1):
        start = time.time()
        learning_rate = schedule.get_last_lr()[0]
        gradients.reset(), outputs.reset()
        train_loss = train_epoch(network, itertools.islice(batches, updates), optimizer, schedule, args,
                                 gradients, outputs, progress)
        train_seconds += time.time() - start
        valid_loss, rates, sentences = evaluate(network, valid_speech, args)
        record = {'epoch': epoch, 'train_loss': train_loss, 'valid_loss': valid_loss,
                  'train_way': monitor.way(train_loss, lines), 'valid_way': monitor.way(valid_loss, valid_lines),
                  'wer': rates['wer'], 'cer': rates['cer'], 'learning_rate': learning_rate,
                  'train_seconds': train_seconds, **gradients.report(), **outputs.report()}
        record['warnings'] = monitor.diagnose(record)
        with open(run_dir / 'log.jsonl', 'a') as log:
            print(json.dumps(record), file=log)
        torch.save({'config': asdict(config), 'alphabet': alphabet, 'model': network.state_dict(),
                    'run': {'epoch': epoch, 'valid': rates}}, run_dir / 'last.pt')
        if best is None or (rates['wer'], rates['cer']) < (best['wer'], best['cer']):
            best = rates
            shutil.copy(run_dir / 'last.pt', run_dir / 'best.pt')
        if sys.stderr.isatty():
            print(end='\r' + CLEAR, file=sys.stderr)
        report(record, sentences[epoch % len(sentences)])

    results = {'valid': best, 'test': None, 'updates': updates * args.epochs, 'train_seconds': train_seconds,
               'parameters': parameters, 'seed': args.seed}
    (run_dir / 'results.json').write_text(json.dumps(results, indent=1) + '\n')
    if test:
        network.load_state_dict(torch.load(run_dir / 'best.pt', weights_only=True)['model'])
        results['test'] = evaluate(network, data.Speech(test, alphabet), args)[1]
        (run_dir / 'results.json').write_text(json.dumps(results, indent=1) + '\n')
    for part in ('valid', 'test'):
        if results[part]:
            print('{}: WER {wer:.2f} % ({substitutions} S, {insertions} I, {deletions} D in {words} words of '
                  '{utterances} utterances), CER {cer:.2f} %'.format(part, **results[part]))
    print(f'results in {run_dir}')
    return results


def main(argv=None):
    args = parse_flags(argv)
    try:
        return run(args)
    except KeyboardInterrupt:
        sys.exit('train.py: stopped; epochs that were finished, if any, are in the run folder')
    except data.DataError as error:
        # From a loader process the error comes with that process's traceback before it.
        sys.exit('train.py: ' + str(error).rpartition('data.DataError: ')[2].strip())


if __name__ == '__main__':
    main()
