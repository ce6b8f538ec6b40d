"""Where a launch of train.py starts from: nothing, a checkpoint, or OpenAI's weights."""

import math

import torch

from kit import checkpoints, errands, gradients, overrides, pretrained, ranks, tokens


def find(settings, config, rules, shape, launch, is_errand):
    """
    What the settings name as the start, with the settings that it brings along taken over.

    settings: a script's globals(); shape: names that weights cannot do without; launch: those of this launch alone;
    is_errand: nothing will be written.
    Returns (config, saved, past). saved: {} for nothing; where init_from is resume, or a step is replayed from a
    checkpoint, the state of a training; else a model alone ('model', 'model_args', 'meta'). past: with inspect_step
    the History of the run, else None. What init_from and weights stand for is written into the settings.
    """
    out_dir, saved, past = settings['out_dir'], {}, None
    if not is_errand:  # what is read here must still be true when this run writes
        ranks.from_main(lambda: checkpoints.claim(out_dir, is_new=False, may_write=False))
    if settings['inspect_step'] >= 0:  # with the settings that it was made with, from the last state before it
        settings['init_from'], path, saved, made_with, past = errands.find_past(out_dir, settings['inspect_step'])
        config = overrides.adopt(settings, made_with, config, rules, shape, launch)
        settings['weights'] = made_with.get('weights', settings['weights'])
    if settings['init_from'] == 'auto':
        is_there = checkpoints.exist(out_dir)
        settings['init_from'] = config['init_from'] = 'resume' if is_there else 'scratch'
        print(f'init_from: {settings["init_from"]} (auto: {out_dir} holds {"a" if is_there else "no"} checkpoint)')
    init_from = settings['init_from']
    if init_from == 'resume':
        if past is None:
            path, saved = checkpoints.newest(out_dir)
        print(f'checkpoint: {path}, after {saved["iter_num"]} steps')
    elif init_from.endswith('.pt'):
        found = checkpoints.load(init_from)
        print(f'weights: {init_from}, after {found["iter_num"]} steps')
        saved = {key: found[key] for key in ('model_args', 'meta') if key in found} | {
            'model': checkpoints.weights(found, settings['weights'])}
    elif init_from != 'scratch':
        saved = pretrained.load(init_from)
    if saved and past is None:
        fixed = [name for name in shape if init_from == 'resume' or name != 'block_size']  # GPT-2's can be cut
        config = adopt_from(saved, settings, config, rules, shape, launch, fixed)
    if init_from == 'resume':
        config['init_from'] = saved.get('config', {}).get('init_from', 'scratch')  # how the run began
    return config, saved, past


def find_tested(settings, config, rules, shape, launch):
    """What --test measures: (config, {path: checkpoint}), the dataset and sizes of the first taken over."""
    paths = [path for path in settings['checkpoint'].split(',') if path] or [str(checkpoints.best(settings['out_dir']))]
    tested = {path: checkpoints.load(path) for path in paths}
    if len({saved.get('config', {}).get('objective', 'causal') for saved in tested.values()}) > 1:
        overrides.fail('checkpoint: some of these write and others fill masks (objective); test them one by one')
    return adopt_from(next(iter(tested.values())), settings, config, rules, shape, launch, shape), tested


def adopt_from(saved, settings, config, rules, shape, launch, fixed):
    """The settings of a checkpoint and the sizes of its model taken over, see overrides.adopt."""
    found = saved.get('config', {}) | {name: saved['model_args'][name] for name in shape}
    if {'max_iters', 'max_minutes'} & overrides.given:
        found.pop('max_epochs', None)  # it would outdo them
    return overrides.adopt(settings, found, config, rules, fixed, launch)


def model_args(saved, meta, has_mask, is_causal, **sizes):
    """
    What GPTConfig takes for a dataset and these sizes. The weights that a run begins with, if any, must fit both: they
    are cut to the positions that are used, and get an id that hides a token where they lack one that is needed.
    """
    checkpoints.check_fit(saved, sizes['block_size'], meta)
    if saved and has_mask:
        checkpoints.make_room(saved, meta['vocab_size'] + 1)
    if saved:
        positions = 'transformer.wpe.weight'
        saved['model'][positions] = saved['model'][positions][:sizes['block_size']]
    args = saved.get('model_args', {'vocab_size': tokens.padded_vocab_size(meta, has_mask)}) | sizes
    args.pop('causal', None)
    return args if is_causal else args | {'causal': False}


def position(state, device):
    """
    Where a training stands, by its checkpoint, {} for a new one: its step, and the two lists that it is steered by, the
    val losses of all evaluations at intervals, and the norms of the last gradients (RECENT,), inf where none was yet.
    """
    norms = state.get('recent_norms', [math.inf] * gradients.RECENT)
    return state.get('iter_num', 0), list(state.get('val_losses', [])), torch.tensor(norms, device=device)
