"""What checkpoints are worth on the test split: train.py --test."""

import math

from kit.data import readers, tokens
from kit.state import checkpoints
from kit.watch import evaluation, samples

DECODED = 500  # pairs that are answered, evenly spaced


def measure(tested, GPT, GPTConfig, which, settings, data, meta, device, dtype):
    """
    Measure the whole test split; where a dataset has none, val, and say so. tested: {path: checkpoint}; several of
    them are followed by their ensemble. which: of a checkpoint's weights; data: what readers.open gives for the
    settings.
    """
    models = {}
    for path, saved in tested.items():
        checkpoints.check_fit(saved, meta)
        models[path] = GPT(checkpoints.config_of(saved, GPTConfig, path)).to(device)
        checkpoints.fill(models[path], checkpoints.weights(saved, which), path)
        print(f'checkpoint: {path}, after {saved["iter_num"]} steps')
        if saved.get('meta', {}).get('text', meta['text']) != meta['text']:
            print(f'dataset: {settings["dataset"]} is another text than that which {path} has read')
    split = 'test' if 'test' in data else 'val'
    if split == 'val':
        print('this dataset has no test.bin: val is taken')
    print(f'splits: {meta.get("split", "as they were found")}')
    if len(models) > 1:
        models['ensemble'] = evaluation.Ensemble(models.values())
    for name, model in models.items():
        if model.config.block_size != data[split].block_size:
            data, _ = readers.open(settings | {'block_size': model.config.block_size})
        for dataset, rows in data[split].parts.items():
            targets = rows.readers[0].targets()
            loss, accuracy = evaluation.measure(model, rows, 0, device, dtype)
            perplexity = math.exp(loss) if loss < 700 else math.inf
            bytes_per_token = None if rows.is_mlm else tokens.bytes_per_token(meta, targets)
            bits = f'{loss / math.log(2) / bytes_per_token:.4f}' if bytes_per_token else 'unknown'
            of = f' of {dataset}' if len(data[split].parts) > 1 else ''
            size = f'{len(targets):,} tokens' + (f', {rows.mask_prob:.0%} of them hidden' if rows.is_mlm else '')
            print(f'{split}{of} loss {loss:.4f}, perplexity {perplexity:.3f}, accuracy {accuracy:.2%}, bits per byte '
                  f'{bits} ({size}): {name}')
            if isinstance(rows.readers[0], readers.Padded):
                try:
                    measure_answers(name, model, rows.readers[0], meta, device, dtype)
                except FloatingPointError as error:  # of a run that has diverged
                    print(f'no answers: {error}: {name}')


def measure_answers(name, model, reader, meta, device, dtype):
    """Let a model, or an ensemble, answer prompts of a split, and compare with the responses: BLEU and exact match."""
    text = tokens.tokenizer(meta['tokenizer'])
    numbers, _ = reader.evenly(DECODED)
    at_once = evaluation.rows_at_once(model, device)
    answers, references = samples.answers(model, reader, numbers, text, at_once, device, dtype)
    exact = sum(a == b for a, b in zip(answers, references)) / len(numbers)
    found = evaluation.bleu(answers, references)
    score = f'BLEU {found[0]:.2f} ({found[1]})' if found else 'BLEU unknown (it takes sacrebleu: pip install sacrebleu)'
    print(f'{score}, exact match {exact:.2%} (greedy, {len(numbers):,} of {reader.n_numbers:,} pairs): {name}')
    for i in range(min(2, len(numbers))):
        print(f'  asked for {references[i]!r}, it wrote {answers[i]!r}')
