"""What train.py does before training, after it, or instead of it."""

import math
import shlex
import time
from pathlib import Path

import numpy as np
import torch

from kit import (
    averages,
    checkpoints,
    devices,
    evaluation,
    gradients,
    overrides,
    pictures,
    ranks,
    readers,
    runlogs,
    tokens,
)
from kit.diagnosis import FIRST_LOSS_OFF, History
from kit.journal import duration

SAMPLE_LENGTH = 100  # tokens of the texts that TensorBoard and W&B show
EMBEDDINGS = 2000  # as many token vectors as TensorBoard's projector moves about with ease
ATTENTION_TOKENS = 48  # of the row whose attention is shown
ROWS_SHOWN, EXCERPT = 8, 160  # of a replayed step: rows, and tokens of a long one
DECODED = 500  # pairs that a test answers, evenly spaced
AROUND, LINES_AROUND = 51, 11  # updates that a replayed one is compared with, and iter lines, itself among them


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
    if from_scratch and not abs(first_loss - guess) < FIRST_LOSS_OFF:
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


def go_back(out_dir, first_bad, model, optimizer, scaler, average):
    """
    Put a training back to its last checkpoint from before the step first_bad; bad steps left the weights as they were
    there, so that step's own would not do. Returns it; {}, and nothing changes, where there is no such one.
    """
    path, saved = checkpoints.before(out_dir, first_bad)
    if not saved:
        print(f'WARNING: every step since {first_bad} was bad, no checkpoint is from before: other text from here on')
        return {}
    step = saved['iter_num']
    print(f'WARNING: every step since {first_bad} was bad: back to {path}, after {step} steps, with other text')
    checkpoints.restore(saved, model, optimizer, scaler)
    averages.restore(average, saved)
    if ranks.is_main:
        checkpoints.move_later_aside(out_dir, step)
    return saved


def show_end(why_stop, step, max_iters, budget, out_dir, model):
    """Why a run ends before its last step. After an early stop the model gets the weights of best.pt again."""
    path = Path(out_dir) / 'best.pt'
    if why_stop:
        print(why_stop)
        try:
            if path.exists():
                checkpoints.fill(model, checkpoints.weights(checkpoints.read(path)))
                print(f'the weights are those of {path} again')
            else:
                print('no state was better than that of step 0, and none was kept as best.pt')
        except checkpoints.Damaged as error:
            print(f'WARNING: {error}; the weights stay those of the last step')
    elif not budget.is_fitted:
        print(f'max_minutes: the time is up after {step:,} steps, before the speed was measured')
    elif step < max_iters:
        print(f'max_minutes: the time is up after {step:,} of {max_iters:,} steps; --init_from=resume makes the others')


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
        if model.config.causal:
            journal.show('text', step, 'Samples', lambda: write(model, text, meta, SAMPLE_LENGTH, device, 'float32'))
    except (OSError, ValueError):  # the tokenizer had to be downloaded, or knows no line break
        label = str
    if is_last or start > journal.pictures_due:
        journal.show('image', step, 'Attention', lambda: pictures.attention(
            evaluation.attention(model, ids), [label(i) for i in ids.tolist()]))
        journal.show('image', step, 'Loss_curve', lambda: pictures.loss_curve(journal.history, f'step {step}'))
        vectors = model.transformer.wte.weight[:n_vectors].detach().float().cpu()
        journal.show('embedding', step, 'Tokens', vectors, [label(i) for i in range(n_vectors)])
        journal.pictures_due = time.time() + 100 * (time.time() - start)


def shown(text):
    """A token as a label: line breaks as they are written in code, blanks in quotes."""
    return repr(text)[1:-1] if text.strip(' ') else repr(text)


def find_past(out_dir, step):
    """
    Where a replay of a step of the run in out_dir begins: (init_from, path, checkpoint, settings, history), the newest
    checkpoint up to that step or, where none is whole, where the run began. The settings are those that the step was
    made with: a checkpoint from after it has them, else the last launch.
    """
    def look():
        kept = {checkpoints.peek(path).get('iter_num', -1): path for path in checkpoints.candidates(out_dir)}
        history = History()
        runlogs.read_records(out_dir, history)
        made = max([*kept, *(history.get('loss')[0] + 1)])
        after = [number for number in kept if number > step]
        settings = checkpoints.peek(kept[min(after)])['config'] if after else runlogs.read_config(out_dir)['settings']
        if made < 0 or not settings:
            overrides.fail(f'{out_dir} holds no run; --out_dir=FOLDER names one')
        if step >= made:
            overrides.fail(f'inspect_step = {step}: the run in {out_dir} has made the steps 0 to {made - 1}')
        return settings, history
    settings, history = ranks.from_main(look)
    path, saved = checkpoints.before(out_dir, step + 1)
    if saved:
        return 'resume', path, saved, settings, history
    print(f'no checkpoint from before step {step} is there: all is replayed, from the first')
    begin = settings.get('init_from')
    return 'scratch' if begin in (None, 'auto', 'resume') else begin, None, {}, settings, history


def show_rows(model, data, rows, noise, meta, batch_size, device, dtype):
    """
    The rows of a step as text: the costliest first, their costliest targets in [[ ]]. data: the Rows of train; rows,
    noise: what they draw for the step.
    """
    x, y, documents = data.fetch(rows, noise)
    losses = evaluation.token_losses(model, x, y, documents, batch_size, device, dtype)  # (n, T), 0 where none counts
    means = losses.sum(axis=1) / (y >= 0).sum(axis=1)
    order = means.argsort()[::-1]
    shift = 0 if data.is_mlm else 1  # a target stands behind its input, or in its place
    ids = np.where(y >= 0, y, np.roll(x, -shift, axis=1))
    ids = np.concatenate([x[:, :shift], ids], axis=1)  # (n, T + shift): the text
    print(f'the {len(rows)} rows of this step, by their loss before the update (nats a token, without dropout)'
          + (f'; the first {ROWS_SHOWN}' if len(rows) > ROWS_SHOWN else ''))
    try:
        text = tokens.tokenizer(meta['tokenizer'])
        decode = lambda ids: tokens.decode(text, ids)
    except OSError:
        decode = lambda ids: ''.join(f' {i}' for i in ids)
    for place, i in enumerate(order[:ROWS_SHOWN], 1):
        own = losses[i, :data.lengths(rows[i:i + 1])[0]]
        worst = set(own.argsort()[::-1][:min(3, (y[i] >= 0).sum())] + shift)
        # of a long row the part with the highest loss
        length = min(EXCERPT, len(own))
        first = int(np.convolve(own, np.ones(length), 'valid').argmax())
        piece = ''.join(f'[[{word}]]' if t in worst else word for t in range(first, first + length + shift)
                        for word in [repr(decode([int(ids[i, t])]))[1:-1]])
        told = ', '.join(f'{decode([int(ids[i, t])])!r} {losses[i, t - shift]:.2f}' for t in sorted(worst))
        print(f'{place:3}. loss {means[i]:.4f}, {data.where(rows[i])} of train: {piece}\n     costliest: {told}')


def show_step(past, step, figures):
    """What a replayed step did: each figure beside what the log says, and the median of the steps around it."""
    print(f'step {step}, replayed:')
    print(f'  {"":22} {"here":>12} {"logged":>12} {"median around":>14}')
    for name, value in figures.items():
        steps, values = past.get(name)
        near = np.abs(steps - step).argsort(kind='stable')[:AROUND if '/' not in name else LINES_AROUND]
        others = values[near][steps[near] != step]
        others = others[np.isfinite(others)]
        logged = values[steps == step]
        print(f'  {name:22} {value:12.5g} ' + (f'{logged[0]:12.5g} ' if len(logged) else f'{"-":>12} ')
              + (f'{np.median(others):14.5g}' if len(others) else f'{"-":>14}'))
    steps, values = past.get('loss')
    logged = values[steps == step]
    if not len(logged):
        print('the log does not hold the loss of this step')
    elif logged[0] == figures['loss'] or math.isnan(logged[0]) and not math.isfinite(figures['loss']):
        print('the loss is the logged one, bit for bit: this is what happened')
    else:
        print(f'WARNING: the loss is not the logged one, it differs by {abs(logged[0] - figures["loss"]):.2g}: another '
              'device, --compile, number of processes or threads, or weights that have changed where the run began')


def check_ids(x, y, vocab_size, step, micro_step):
    """End the script where a batch holds ids that the model does not know. Waits for the device."""
    for name, ids, lowest in ('x', x, 0), ('y', y, -1):
        wrong = ((ids < lowest) | (ids >= vocab_size)).nonzero()
        if len(wrong):
            row, column = wrong[0].tolist()
            print(f'debug_nan: step {step}, micro-step {micro_step}: the data: {name}[{row}, {column}] is the id '
                  f'{ids[row, column]}, and the model knows 0 to {vocab_size - 1}; {len(wrong)} such in {name}')
            ranks.leave(1)


def hunt(model, batches_of_step, step, norms, seed, scaler, device, dtype):
    """
    Make a step again that met a bad number, and say where it came up first: forward, loss or backward. norms: of the
    parameters' gradients as they were, for a number that does not come up again.
    """
    at_fault = gradients.at_fault(model, norms)
    found = []
    for name, p in model.named_parameters():
        if bad := gradients.count_bad(p.detach()):
            found.append(f'the weights: parameter {name} held {bad} before the step')
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    for micro_step, (x, y, documents, parts) in enumerate(batches_of_step):
        if found:
            break
        watch = gradients.Hunt(model)
        with watch:
            with devices.autocast(device, dtype):
                _, loss = model.forward(x, y, documents)  # not what torch.compile made of it
            scaler.scale(loss / parts).backward()
        watch.close()
        if watch.found:
            found.append(f'micro-step {micro_step}: {watch.found}')
    for rank, words in enumerate(ranks.from_all(found)):
        print(f'debug_nan: step {step}{f", rank {rank}" if ranks.world_size > 1 else ""}: '
              + (words[0] if words else 'made again, its forward and backward pass give no bad number: what comes '
                                        f'behind them does, or what is compiled. {at_fault}'))


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
