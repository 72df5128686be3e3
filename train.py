"""Train the recogniser on recordings and transcripts, and score it.

    python train.py --train_data train.jsonl --valid_data dev.jsonl --test_data test.jsonl --epochs 40

A run folder holds config.json (the flags), log.jsonl (one JSON object an epoch), best.pt (lowest validation WER),
last.pt, and results.json at the end. Losses are CTC in nats per label: each utterance's negative log-likelihood
divided by its number of labels, averaged over utterances.
"""
import argparse
import json
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


def parse_flags(argv=None):
    parser = argparse.ArgumentParser(description='Train a MobileNetV3 + BiLSTM + CTC speech recogniser.',
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    switch = dict(action=argparse.BooleanOptionalAction)
    group = parser.add_argument_group('data')
    group.add_argument('--train_data', required=True, help='manifest: JSON lines with audio_filepath and text')
    group.add_argument('--valid_data', required=True, help='manifest that chooses best.pt')
    group.add_argument('--test_data', default=None, help='manifest to score once, at the end, with best.pt; none: no test')
    group.add_argument('--num_train_samples', type=int, default=0,
                       help='train on the first N utterances after a seeded shuffle; 0: all')
    group.add_argument('--spec_augment', default=True, help='mask bands and stretches of time in training', **switch)
    group.add_argument('--speed_perturb', default=True, help='resample to 0.9 to 1.1 times the speed in training', **switch)
    group.add_argument('--workers', type=int, default=0, help='processes that load audio; 0: the training process')
    group = parser.add_argument_group('optimisation')
    group.add_argument('--epochs', type=int, default=40, help='passes over the training data')
    group.add_argument('--batch_size', type=int, default=8, help='utterances an update')
    group.add_argument('--learning_rate', type=float, default=3e-4, help='OneCycleLR climbs to ten times this')
    group.add_argument('--weight_decay', type=float, default=1e-5, help="AdamW's; 0: none")
    group.add_argument('--grad_clip', type=float, default=5.0, help='largest norm of all gradients together; 0: no limit')
    group.add_argument('--seed', type=int, default=0, help='of initialisation, order, augmentation and dropout')
    group = parser.add_argument_group('model (without the flag: as --model says)')
    group.add_argument('--model', choices=model.PRESETS, default='fixed',
                       help="fixed: ours; literal: the original's fixes alone; before: the original before its fixes")
    absent = dict(default=argparse.SUPPRESS)
    group.add_argument('--blocks', type=int, help='of MobileNetV3-Small, 1 to 11', **absent)
    group.add_argument('--frames_per_output', type=int, help='mel frames of 10 ms for each output: 1, 2 or 4', **absent)
    group.add_argument('--dropout', type=float, help='before each LSTM layer and the head; 0: none', **absent)
    group.add_argument('--zero_init_residual', help='residual blocks start as identities', **switch, **absent)
    group.add_argument('--early_path', help="add block 3's features to the deep ones", **switch, **absent)
    group.add_argument('--squeeze_excite', help="MobileNetV3's channel gates", **switch, **absent)
    group = parser.add_argument_group('run')
    group.add_argument('--run_dir', default=None, help='folder for the results; none: runs/ and the time')
    group.add_argument('--device', default='cpu', help='cpu, cuda, cuda:1, ...')
    return parser.parse_args(argv)


def main(argv=None):
    try:
        return run(parse_flags(argv))
    except (data.DataError, ValueError) as error:
        sys.exit(f'train.py: {error}')


def make_optimizer(network, args, updates):
    """AdamW, and OneCycleLR to ten times the learning rate: 10 % of the updates up, the rest down, both by cosine."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=10 * args.learning_rate, total_steps=updates,
                                                   pct_start=0.1, anneal_strategy='cos')
    return optimizer, schedule


def train_epoch(network, batches, optimizer, schedule, args, gradients, outputs, progress):
    """One pass over the batches -> the mean training loss, in nats per label."""
    network.train()
    total, count = 0.0, 0
    for mels, lengths, targets, target_lengths, _ in batches:
        log_probs, lengths = network(mels.to(args.device), lengths.to(args.device))
        loss = F.ctc_loss(log_probs.transpose(0, 1), targets.to(args.device), lengths, target_lengths.to(args.device))
        optimizer.zero_grad()
        loss.backward()
        if gradients.clip(args.grad_clip):
            optimizer.step()
        schedule.step()
        outputs.add(log_probs, lengths, target_lengths)
        total, count = total + loss.item() * len(mels), count + len(mels)
        progress(total / count)
    return total / count


@torch.no_grad()
def evaluate(network, speech, batch_size, workers, device):
    """-> mean CTC loss in nats per label, error rates, and a list of (index, said, heard, raw labels)."""
    network.eval()
    total, sentences = 0.0, []
    batches = data.length_batches(speech.utterances, batch_size)
    for mels, lengths, targets, target_lengths, indices in data.loader(speech, batches, workers):
        log_probs, lengths = network(mels.to(device), lengths.to(device))
        losses = F.ctc_loss(log_probs.transpose(0, 1), targets.to(device), lengths, target_lengths.to(device), reduction='none')
        total += (losses.cpu() / target_lengths).sum().item()
        for i, n, path, symbols in zip(indices, lengths.tolist(), log_probs.argmax(2).tolist(),
                                       model.greedy_decode(log_probs, lengths)):
            strip = ''.join(speech.alphabet[s].replace(' ', '_') or '.' for s in path[:n])
            sentences.append((i, speech.utterances[i].text, data.decode(symbols, speech.alphabet), strip))
    sentences.sort()
    return total / len(sentences), monitor.error_rates(*zip(*[s[1:3] for s in sentences])), sentences


class Progress:
    """A live line on a terminal: epoch, share done, loss, time left."""

    def __init__(self, epochs, updates_per_epoch):
        self.epochs, self.per_epoch, self.done, self.start = epochs, updates_per_epoch, 0, time.time()

    def __call__(self, loss):
        self.done += 1
        if sys.stderr.isatty():
            left = (time.time() - self.start) / self.done * (self.epochs * self.per_epoch - self.done)
            step = (self.done - 1) % self.per_epoch + 1
            epoch = (self.done - 1) // self.per_epoch + 1
            print(f'\repoch {epoch}/{self.epochs}  update {step}/{self.per_epoch}  loss {loss:.3f}  '
                  f'{left // 60:.0f} min {left % 60:02.0f} s left', end='\x1b[K', file=sys.stderr, flush=True)

    def clear(self):
        if sys.stderr.isatty():
            print('\r\x1b[K', end='', file=sys.stderr, flush=True)


def prepare(args):
    """Read the manifests, name what CTC cannot learn -> training, validation and test utterances, and the alphabet."""
    train = data.read_manifest(args.train_data)
    random.Random(args.seed).shuffle(train)
    train = train[:args.num_train_samples or None]
    valid = data.read_manifest(args.valid_data)
    test = data.read_manifest(args.test_data) if args.test_data else None
    return train, valid, test, data.make_alphabet(train)


def run(args):
    """Train and score as the flags say -> the contents of results.json."""
    torch.manual_seed(args.seed)
    train, valid, test, alphabet = prepare(args)
    config = model.Config(len(alphabet), **model.PRESETS[args.model] | {
        k: v for k, v in vars(args).items() if k in model.Config.__dataclass_fields__})
    network = model.Recogniser(config).to(args.device)
    run_dir = Path(args.run_dir or time.strftime('runs/%Y%m%d-%H%M%S'))
    if (run_dir / 'log.jsonl').exists():
        raise ValueError(f'--run_dir {run_dir}: holds a run already; name another folder, or remove it')
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / 'config.json').write_text(json.dumps(vars(args) | asdict(config), indent=1) + '\n')

    f = config.frames_per_output
    speech = data.Speech(train, alphabet, f, args.seed, args.spec_augment, args.speed_perturb)
    valid_speech = data.Speech(valid, alphabet, f)
    batches = [data.epoch_batches(train, args.batch_size, args.seed, epoch) for epoch in range(args.epochs)]
    loader = iter(data.loader(speech, [b for epoch in batches for b in epoch], args.workers))
    optimizer, schedule = make_optimizer(network, args, len(batches[0]) * args.epochs)
    some = train[:500]
    lines = monitor.plateau_lines([data.encode(u.text, alphabet) for u in some],
                                  [int(network.output_lengths(torch.tensor(u.frames))) for u in some], len(alphabet))
    print(f'{len(train)} utterances, {len(alphabet)} symbols, {sum(p.numel() for p in network.parameters()):,} parameters; '
          f'plateau lines (nats per label): uniform {lines[0]:.2f}, constant {lines[1]:.2f}')
    gradients, outputs = monitor.Gradients(network), monitor.Outputs(len(alphabet))
    progress, best, train_seconds = Progress(args.epochs, len(batches[0])), None, 0.0
    log = open(run_dir / 'log.jsonl', 'w')
    for epoch in range(args.epochs):
        start = time.time()
        gradients.reset(), outputs.reset()
        step = (next(loader) for _ in batches[epoch])
        train_loss = train_epoch(network, step, optimizer, schedule, args, gradients, outputs, progress)
        train_seconds += time.time() - start
        valid_loss, rates, sentences = evaluate(network, valid_speech, 16, args.workers, args.device)
        record = {'epoch': epoch + 1, 'train_loss': train_loss, 'valid_loss': valid_loss, 'wer': rates['wer'], 'cer': rates['cer'],
                  'train_seconds': train_seconds, **gradients.report(), **outputs.report()}
        record['warnings'] = monitor.diagnose(record, lines)
        print(json.dumps(record), file=log, flush=True)
        progress.clear()
        print(f"epoch {epoch + 1:3d}  loss {train_loss:.3f}  valid {valid_loss:.3f}  wer {rates['wer']:.1f} %  cer {rates['cer']:.1f} %  "
              f"blank {record['blank']:.2f}  I {record['input_dependence']:.2f}  grad {record['grad_norm']:.2f}  {train_seconds:.0f} s")
        for w in record['warnings']:
            print('   !', w)
        _, said, heard, strip = sentences[epoch % len(sentences)]
        print(f'    said {said}\n   heard {heard}\n         {strip}', flush=True)
        checkpoint = {'config': asdict(config), 'alphabet': alphabet, 'model': network.state_dict(), 'epoch': epoch + 1}
        torch.save(checkpoint, run_dir / 'last.pt')
        if best is None or rates['wer'] < best['wer']:
            best = rates
            shutil.copy(run_dir / 'last.pt', run_dir / 'best.pt')
    log.close()
    results = {'valid': best, 'test': None}
    if test:
        network.load_state_dict(torch.load(run_dir / 'best.pt', weights_only=True)['model'])
        results['test'] = evaluate(network, data.Speech(test, alphabet, f), 16, args.workers, args.device)[1]
    results |= dict(updates=len(batches[0]) * args.epochs, train_seconds=train_seconds,
                    parameters=sum(p.numel() for p in network.parameters()), seed=args.seed)
    (run_dir / 'results.json').write_text(json.dumps(results, indent=1) + '\n')
    print(json.dumps(results))
    return results


if __name__ == '__main__':
    main()
