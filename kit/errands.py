"""What train.py does before training, after it, or instead of it."""

import math
import shlex
import time
from pathlib import Path

import numpy as np
import torch

from kit import checkpoints, devices, diagnosis, evaluation, ranks, readers, signals, tokens
from kit.due import BAD_STEPS
from kit.journal import duration

SAMPLE_LENGTH = 100  # tokens of the texts that TensorBoard and W&B show
EMBEDDINGS = 2000  # as many token vectors as TensorBoard's projector moves about with ease
ATTENTION_TOKENS = 48  # of the row whose attention is shown
DECODED = 500  # pairs that a test answers, evenly spaced


def first_look(model, raw_model, x, y, documents, meta, device, dtype, from_scratch):
    """
    Show one micro-step, (B, T) each, before any training: shapes, a piece of the text, and whether a new model's first
    loss is that of a fair guess, ln(vocab_size). model is raw_model as it will be trained, wrapped and compiled: what
    is compiled here is what the training runs. Returns the seconds of one pass forward and backward.
    """
    c, n_params = raw_model.config, raw_model.count_params()
    memory = devices.estimate_memory(raw_model.count_params(non_embedding=False), x.numel(), c, dtype, device)
    print(f'model: {n_params / 1e6:.2f}M parameters in {c.n_layer} layers of {c.n_head} heads and {c.n_embd} channels; '
          f'training takes about {memory / 2**30:.2f} GiB of memory beside the program')
    n_targets = int((y >= 0).sum())
    print(f'one micro-step: x {tuple(x.shape)}, y {tuple(y.shape)}; y is '
          + ('x moved on by one token' if c.causal else 'what x hides, at its own place')
          + (f', and -1 where nothing is to be learned: {n_targets:,} targets' if n_targets < y.numel() else ''))
    if documents is not None:
        why = 'FlexAttention knows no dropout' if x.is_cuda else f'the choice on {device.type}'
        print('attention within documents: ' + (
            'FlexAttention, with a block mask' if x.is_cuda and not c.dropout else f'a dense mask ({why})'))
    try:
        text = tokens.tokenizer(meta['tokenizer'])
        for name, ids in ('x', x[0, :40].tolist()), ('y', y[0][y[0] >= 0][:40].tolist()):
            print(f'  {name}[0] = {ids[:6]}... = {tokens.decode(text, ids)!r}...')
    except OSError:
        print(f'  x[0] = {x[0, :16].tolist()}... (the files of the tokenizer could not be downloaded)')
    seconds, first_loss = [], None
    for _ in range(2):  # the first pass warms up
        start = time.perf_counter()
        with devices.autocast(device, dtype):
            _, loss = model(x, y, documents)
        loss.backward()
        devices.synchronize(device)
        seconds.append(time.perf_counter() - start)
        first_loss = first_loss or loss.item()
    model.zero_grad(set_to_none=True)
    guess = math.log(c.vocab_size)
    print(f'first loss: {first_loss:.4f}; a fair guess among {c.vocab_size:,} ids would have {guess:.4f}')
    if from_scratch and not abs(first_loss - guess) < diagnosis.FIRST_LOSS_OFF:
        print('WARNING: a new model should start near a fair guess; look at the initialisation and at the data')
    return min(seconds)


def show_plan(s, step, warmup, seconds, steps_per_epoch, data):
    """What a step and the run will be; s: the settings, seconds: of a step, data: the Rows of train."""
    rows, n, length = s['batch_size'] * s['gradient_accumulation_steps'], s['max_iters'], data.mean_length
    print(f'a step: {s["batch_size"]} rows x {s["gradient_accumulation_steps"]} micro-steps x '
          f'{f"{length:.1f} (on average)" if length % 1 else int(length)} tokens = {round(rows * length):,} tokens')
    if s['max_minutes']:
        print(f'the run: {s["max_minutes"]:g} minutes, counted from the start of the program')
        return
    print(f'the run: {n:,} steps = {n / steps_per_epoch:.2f} epochs of {data.n_tokens:,} tokens, about '
          f'{duration(seconds * max(0, n - step))} without evaluations')
    if warmup >= n:
        print(f'warmup_iters = {warmup} is not below max_iters = {n}: the rate climbs to the end')
    if step >= n:
        print(f'all {n:,} steps are made; a higher --max_iters goes on')


def test(tested, new_model, which, settings, data, meta, device, dtype):
    """
    Measure the whole test split; where a dataset has none, val, and say so. tested: {path: checkpoint}; several of
    them are followed by their ensemble. new_model: model_args -> model; which: of a checkpoint's weights; data: what
    readers.open gives for the settings.
    """
    models, batch_size = {}, settings['batch_size']
    for path, saved in tested.items():
        checkpoints.check_fit(saved, saved['model_args']['block_size'], meta)
        models[path] = new_model(saved['model_args']).to(device)
        checkpoints.fill(models[path], checkpoints.weights(saved, which))
        print(f'checkpoint: {path}, after {saved["iter_num"]} steps')
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
            loss, accuracy = evaluation.measure(model, rows, batch_size, 0, device, dtype)
            perplexity = math.exp(loss) if loss < 700 else math.inf
            bytes_per_token = None if rows.is_mlm else tokens.bytes_per_token(meta, targets)
            bits = f'{loss / math.log(2) / bytes_per_token:.4f}' if bytes_per_token else 'unknown'
            of = f' of {dataset}' if len(data[split].parts) > 1 else ''
            size = f'{len(targets):,} tokens' + (f', {rows.mask_prob:.0%} of them hidden' if rows.is_mlm else '')
            print(f'{split}{of} loss {loss:.4f}, perplexity {perplexity:.3f}, accuracy {accuracy:.2%}, bits per byte '
                  f'{bits} ({size}): {name}')
            if isinstance(rows.readers[0], readers.Padded):
                test_answers(name, model, rows.readers[0], meta, batch_size, device, dtype)


def test_answers(name, model, reader, meta, batch_size, device, dtype):
    """Let a model, or an ensemble, answer prompts of a split, and compare with the responses: BLEU and exact match."""
    text = tokens.tokenizer(meta['tokenizer'])
    numbers, _ = reader.evenly(DECODED)
    answers, references = answer(model, reader, numbers, text, batch_size, device, dtype)
    exact = sum(a == b for a, b in zip(answers, references)) / len(numbers)
    found = evaluation.bleu(answers, references)
    score = f'BLEU {found[0]:.2f} ({found[1]})' if found else 'BLEU unknown (it takes sacrebleu: pip install sacrebleu)'
    print(f'{score}, exact match {exact:.2%} (greedy, {len(numbers):,} of {reader.n_numbers:,} pairs): {name}')
    for i in range(min(2, len(numbers))):
        print(f'  asked for {references[i]!r}, it wrote {answers[i]!r}')


def answer(model, reader, numbers, text, batch_size, device, dtype):
    """(answers, responses) to the prompts of some pairs, as texts. A prompt leaves room for the longest response."""
    pairs = [reader.pair(i) for i in numbers]
    longest = min(max(len(response) for _, response in pairs) + 1, max(1, reader.block_size // 2))
    prompts = [prompt[-(reader.block_size - longest + 1):] for prompt, _ in pairs]
    models = list(getattr(model, 'models', [model]))
    ids = evaluation.answer(models, prompts, reader.end_of_text, text.size, longest, batch_size, device, dtype)
    return [tokens.decode(text, row) for row in ids], [tokens.decode(text, response) for _, response in pairs]


def show_inside(journal, step, model, data, meta, device, is_last):
    """
    A text of the model's own for TensorBoard and W&B, and now and then, with a hundredth of the time that the run
    takes, pictures: attention, loss curve, token embeddings. Draws from torch's generator.
    """
    if not journal.sinks:
        return
    start = time.time()
    ids = devices.send(data.fetch(np.array([0]))[0][0, :ATTENTION_TOKENS], device)
    n_vectors = min(EMBEDDINGS, meta['vocab_size'])
    try:
        text = tokens.tokenizer(meta['tokenizer'])
        label = lambda i: shown(tokens.decode(text, [int(i)]))
        if model.config.causal and step > 0:  # an untrained one has nothing to say
            journal.show('text', step, 'Samples', lambda: write(model, text, meta, SAMPLE_LENGTH, device, 'float32'))
    except (OSError, ValueError):  # the tokenizer had to be downloaded, or knows no line break
        label = str
    if is_last or start > journal.pictures_due:
        from kit import pictures
        journal.show('image', step, 'Attention', lambda: pictures.attention(
            evaluation.attention(model, ids), [label(i) for i in ids.tolist()]))
        journal.show('image', step, 'Loss_curve', lambda: pictures.loss_curve(journal.history, f'step {step}'))
        vectors = model.transformer.wte.weight[:n_vectors].detach().float().cpu()
        journal.show('embedding', step, 'Tokens', vectors, [label(i) for i in range(n_vectors)])
        journal.pictures_due = time.time() + 100 * (time.time() - start)


def shown(text):
    """A token as a label: line breaks as they are written in code, blanks in quotes."""
    return repr(text)[1:-1] if text.strip(' ') else repr(text)


# ---------------------------------------------------------------------------------------------------------------------
# the end


def finish(due, s, model, data, meta, history, device, dtype):
    """
    Say why a run ends and what came of it; returns the exit status. due: the Due of its last step; s: the settings;
    model: what is evaluated, the average where there is one; data: the Rows of val; history: the History of the run.
    """
    step, out_dir = due.state.step, s['out_dir']
    if due.end == BAD_STEPS:
        print(diagnosis.stopped_by_bad_numbers(step, int(due.state.bad_steps[0]), s['learning_rate'], dtype))
        return 1
    if due.end in signals.STOP:
        show_how_to_go_on(due.end, step, out_dir)
        return signals.status(due.end)
    signals.obey()
    show_why(due, out_dir, model)
    if ranks.is_main:
        show_sample(model, data, meta, device, dtype)
        print('\n'.join(diagnosis.verdict(history)))
        show_next_commands(out_dir, model.config.causal)
    return 0 if due.is_saved else 1  # 1: the last state could not be saved


def show_why(due, out_dir, model):
    """Why a run ends before its last step. After an early stop the model gets the weights of best.pt again."""
    path, step = Path(out_dir) / 'best.pt', due.state.step
    if due.why:
        print(due.why)
        try:
            if path.exists():
                checkpoints.fill(model, checkpoints.weights(checkpoints.read(path)))
                print(f'the weights are those of {path} again')
            else:
                print('no state was better than that of step 0, and none was kept as best.pt')
        except checkpoints.Damaged as error:
            print(f'WARNING: {error}; the weights stay those of the last step')
    elif not due.is_fitted:
        print(f'max_minutes: the time is up after {step:,} steps, before the speed was measured')
    elif step < due.max_iters:
        print(f'max_minutes: the time is up after {step:,} of {due.max_iters:,} steps; --init_from=resume makes the '
              'others')


def show_how_to_go_on(signal, step, out_dir):
    """What a run says that a signal has stopped."""
    where = '' if out_dir == 'checkpoints' else f' --out_dir={shlex.quote(out_dir)}'
    saved = checkpoints.peek(Path(out_dir) / 'ckpt.pt').get('iter_num', 0)
    if saved:
        print(f'{signal}: stopped after {step} steps; this goes on '
              f'{"as if it had not been" if saved == step else f"after step {saved}, the last that was saved"}:\n'
              f'  python train.py{where} --init_from=resume')
    else:
        print(f'{signal}: stopped after {step} steps; there is nothing to go on from yet')


def show_sample(model, data, meta, device, dtype):
    """
    Print what the model makes of its own: a text, as sample.py would begin it; for pairs, its answers to some prompts
    of data, the Rows of val; where it fills masks, how it does that.
    """
    try:
        text, reader = tokens.tokenizer(meta['tokenizer']), data.readers[0]
        if data.is_mlm:
            print('\nwhat it fills in:\n{}\n{}\n'.format(*fill_masks(model, data, text, device, dtype)))
        elif isinstance(reader, readers.Padded):
            numbers, _ = reader.evenly(3)
            answers, _ = answer(model, reader, numbers, text, len(numbers), device, dtype)
            for i, written in zip(numbers, answers):
                print(f'\nasked:\n{tokens.decode(text, reader.pair(i)[0][:-1])}\nits answer: {written}')
            print()
        else:
            print(f'\na sample of its own:\n{write(model, text, meta, 400, device, dtype)}\n')
    except (OSError, ValueError) as error:  # the tokenizer had to be downloaded, or knows no line break
        print(f'no sample: {error}')


def write(model, text, meta, length, device, dtype):
    """What the model writes of its own, so many tokens; text: a tokenizer. Draws from torch's generator."""
    begin = torch.tensor([tokens.beginning(text, meta)], device=device)
    with evaluation.evaluating(model), devices.autocast(device, dtype):
        ids = model.generate(begin, length, temperature=0.8, n_ids=text.size)
    return tokens.decode(text, ids[0].tolist())


@torch.no_grad()
def fill_masks(model, data, text, device, dtype):
    """The first row of data with its tokens hidden, and as the model fills it in: two texts."""
    x, y, documents = (devices.send(a, device) for a in data.fetch(np.array([0]), data.noise(1, 0)))
    with evaluation.evaluating(model), devices.autocast(device, dtype):
        logits, _ = model(x, y, documents)
    filled = torch.where(y >= 0, logits[..., :text.size].argmax(dim=-1), x)
    return [tokens.decode(text, ids[0].tolist()) for ids in (x, filled)]


def show_next_commands(out_dir, can_write):
    """What is worth typing after a run."""
    name = shlex.quote(out_dir)
    where, run, average = ('', '', '') if out_dir == 'checkpoints' else (
        f' --out_dir={name}', f' {name}', f' --checkpoint_dir={name}')
    print('next:')
    if can_write:
        print(f'  python sample.py{where} --num_samples=3      more of its writing, after a --start of yours')
    print(f'  python plot_loss.py{run}      the loss curve as a picture')
    print(f'  python train.py --test{where}      loss, perplexity and accuracy on the test split')
    print(f'  python checkpoint_averaging.py{average}      the last checkpoints as one, which may be better than any')
