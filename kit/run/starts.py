"""Where a launch of train.py starts from, nothing, a checkpoint, or OpenAI's weights, and where a run goes back to."""

import hashlib
import math
from dataclasses import fields
from pathlib import Path

from kit.base import files, overrides, peers, ranks
from kit.base.errors import reason
from kit.data import tokens
from kit.learn import averages, optimizers
from kit.run import earlier, presets, replay
from kit.run.run_state import KEPT, RunState
from kit.state import checkpoints, folders, provenance
from kit.watch import runlogs
from kit.watch.journal import check_wandb

OF_A_MACHINE = 'threads',  # settings in which the processes of a run may differ


def find(config, trains, GPTConfig, device):
    """
    What the settings name as the start, with the settings that it brings along taken over.

    trains: whether a run will be written. GPTConfig: the class, whose fields are those of model_args. Returns (config,
    saved, is_resume, past). saved: {} for nothing; with is_resume the state of a training; else a model alone ('model',
    'model_args', 'meta'); with `test` {path: checkpoint}. past: with inspect_step the History of the run, else None. In
    the new config init_from says how the run began, also where this launch goes on with it.
    """
    config['architecture'] = presets.text_of(presets.parse(config['architecture'], GPTConfig), GPTConfig)
    config['optimizer'] = optimizers.text_of(*optimizers.parse(config['optimizer']))
    if config['test']:
        config, saved, is_resume, past = find_tested(config, GPTConfig, device)
    else:
        config, saved, is_resume, past = find_start(config, trains, GPTConfig, device)
    if config['batch_size'] == 0:
        config |= recipe_rows(saved if is_resume else {})
    if config['objective'] == 'mlm' and not config['mask_prob']:
        config['mask_prob'] = 0.15  # as BERT's
    if config['find_lr'] or past and past.series.get('lr'):
        config['lr_by_norm'] = False  # these rates are used as they are
    return config, saved, is_resume, past


def recipe_rows(saved):
    """
    The settings by which a step has the rows that it has without batch_size = 0, until fitting.find divides them anew:
    those of the checkpoint that is resumed, else what the 0 has replaced.
    """
    names = 'batch_size', 'gradient_accumulation_steps'
    if all(name in saved.get('config', {}) for name in names):
        return {name: saved['config'][name] for name in names}
    if 'batch_size' not in overrides.replaced:
        overrides.fail('batch_size = 0: it keeps the rows of a step, and no other batch_size says how many those are; '
                       'leave a number in train.py, and give --batch_size=0 with the command')
    return {'batch_size': overrides.replaced['batch_size']}


def about(config, device):
    """What all processes of a run must have in common, see peers.meet: settings, the code and its versions."""
    settings = {name: value for name, value in config.items() if name not in OF_A_MACHINE} | {'device': device.type}
    return {'settings': settings,
            'code': {name: hashlib.sha256(code).hexdigest() for name, code in provenance.collect_source().items()},
            'versions': checkpoints.versions()}


def check(config, GPTConfig):
    """End the script where settings make no optimizer or no model; what weights bring along they know themselves."""
    optimizers.parse(config['optimizer'])
    if config['init_from'] == 'scratch':
        presets.model_config(config, GPTConfig, {})


def find_start(config, trains, GPTConfig, device):
    """find, where a run begins or goes on."""
    out_dir, init_from, weights, saved, past = config['out_dir'], config['init_from'], config['weights'], {}, None
    path, shape = init_from, shaping(config, GPTConfig)
    if config['find_lr']:  # it writes its curve there
        folders.check_place(Path(out_dir))
    if trains:  # what is read here must still be true when this run writes
        ranks.from_main(lambda: folders.claim(out_dir, is_new=False, may_write=False))
    if config['inspect_step'] >= 0:  # with the settings that it was made with, from the last state before it
        init_from, path, saved, made_with, past = replay.find_past(out_dir, config['inspect_step'])
        weights = made_with.get('weights', weights)
    if trains and began_here(out_dir) and checkpoints.exist(out_dir):
        print(f'init_from: resume (torchrun has started the processes again; {out_dir} holds what they did before)')
        init_from = 'resume'
    if init_from == 'auto':
        is_there = checkpoints.exist(out_dir)
        init_from = 'resume' if is_there else 'scratch'
        print(f'init_from: {init_from} (auto: {out_dir} holds {"a" if is_there else "no"} checkpoint)')
    is_resume = init_from == 'resume'
    if is_resume:
        if past is None:
            path, saved = checkpoints.newest(out_dir)
        print(f'checkpoint: {path}, after {saved["iter_num"]} steps')
        if 'config' not in saved:
            print(f'{path} names no settings: all are those of this command, but where it is said')
            if 'dataset' not in overrides.given:
                overrides.fail(f'{path} does not name its dataset; give it: --dataset=NAME')
        init_from = saved.get('config', {}).get('init_from', 'scratch')
    elif init_from.endswith('.pt'):
        found = checkpoints.load(init_from)
        print(f'weights: {init_from}, after {found["iter_num"]} steps')
        if 'meta' not in found:
            print(f'{init_from} names no tokenizer: its ids are taken to be those of the dataset')
        saved = {key: found[key] for key in ('model_args', 'meta') if key in found} | {
            'model': checkpoints.weights(found, weights)}
    elif init_from != 'scratch':
        from kit.state import pretrained
        saved = pretrained.load(init_from)
    if saved:
        checkpoints.config_of(saved, GPTConfig, path)
    if past is not None:
        config = adopt_from(made_with, saved.get('model_args'), config, GPTConfig, shape, device)
    elif saved:
        fixed = [name for name in shape if is_resume or name not in GPTConfig.RESIZABLE]
        made_with = saved.get('config', {} if is_resume else None)
        config = adopt_from(made_with, saved['model_args'], config, GPTConfig, fixed, device)
    if is_resume and config['max_minutes'] and saved.get('fitted_minutes') == config['max_minutes']:
        config['max_iters'] = saved.get('config', config)['max_iters']  # whatever is given here
    if trains and config['wandb_log']:
        check_wandb(config['wandb_project'])
    return config | {'init_from': init_from}, saved, is_resume, past


def began_here(out_dir):
    """
    Whether the run in out_dir was last begun by the torchrun that has started these processes. Then they are not the
    first that it has started, and go on with what those before them did.
    """
    def look():
        launches = runlogs.read_config(out_dir)['launches']
        return bool(launches) and peers.is_agent(launches[-1].get('torchrun'), agents)
    agents = ranks.from_all(peers.agent())  # rank 0 may have moved to another machine
    return any(agents) and ranks.from_main(look)


def shaping(config, GPTConfig):
    """Settings that weights cannot do without: the architecture, and fields of their model that are settings too."""
    return ['architecture', *(f.name for f in fields(GPTConfig) if f.name in config and f.name not in GPTConfig.FREE)]


def find_tested(config, GPTConfig, device):
    """find, where checkpoints are measured: the dataset and sizes of the first are taken over."""
    paths = files.paths(config['checkpoint']) or [str(checkpoints.best(config['out_dir']))]
    tested = {path: checkpoints.load(path) for path in paths}
    for path, saved in tested.items():
        checkpoints.config_of(saved, GPTConfig, path)
    shape = shaping(config, GPTConfig)
    if len({saved.get('config', {}).get('objective', 'causal') for saved in tested.values()}) > 1:
        overrides.fail('checkpoint: some of these write and others fill masks (objective); test them one by one')
    first = next(iter(tested.values()))
    config = adopt_from(first.get('config'), first['model_args'], config, GPTConfig, shape, device)
    return config, tested, False, None


def adopt_from(made_with, model_args, config, GPTConfig, fixed, device):
    """
    The settings that weights were made with, and those of their model taken over, see overrides.adopt. They go on as
    they were made: a setting that is younger than they are is what the code then did. made_with: None where weights
    begin a new run, which has no settings but its own.
    """
    is_new, made_with = made_with is None, made_with or {}
    args = model_args or {f.name: f.default for f in fields(GPTConfig) if f.name not in made_with}
    found = made_with | {name: args[name] for name in shaping(config, GPTConfig) if name in args}
    if model_args:
        found['architecture'] = presets.text_of(model_args, GPTConfig)  # whatever the preset of its name is by now
    if made_with:
        found |= earlier.resolved(made_with, device)
    if {'max_iters', 'max_minutes'} & overrides.given:
        found.pop('max_epochs', None)  # it would outdo them
    config = overrides.adopt(config, found, fixed)
    for name, value in ({} if is_new else earlier.SETTINGS).items():
        if name in config and name not in {*found, *overrides.given} and config[name] != value:
            config[name] = value
            print(f'{name} = {value}: the checkpoint is older than this setting, and this is what the code did then')
    return config


def model_config(saved, meta, config, GPTConfig):
    """
    The GPTConfig of a run: its fields that are settings as these are, the others as the weights that it begins with
    have them, if any. Those must fit the dataset; where tokens are hidden the vocabulary holds an id for that.
    """
    checkpoints.check_fit(saved, meta)
    has_mask = config['mask_prob'] > 0
    args = saved.get('model_args', {'vocab_size': tokens.padded_vocab_size(meta, has_mask)})
    if has_mask and args['vocab_size'] <= meta['vocab_size']:
        args = args | {'vocab_size': meta['vocab_size'] + 1}
        if 'optimizer' in saved:
            overrides.fail('mask_prob: these weights know no id that hides a token, and their optimizer neither; begin '
                           'a new run with them: --init_from=FILE.pt')
    return presets.model_config(config, GPTConfig, args)


def restore(saved, is_resume, config, meta, model, optimizer, scaler, average, device):
    """
    Put a training where saved has it, as find gives it: with is_resume all of it, else the weights alone, if any, which
    may have more positions or fewer ids. Returns its RunState. Where it goes on with another text, of another name or
    not, no loss so far is a mark.
    """
    optimizers.check(optimizer, device)
    state = RunState().to(device)
    if saved and not is_resume:
        checkpoints.fill(model, saved['model'])
    if is_resume:
        saved = checkpoints.fetched(saved, model)
        state.take(saved)
        checkpoints.restore(saved, model, optimizer, scaler)
        averages.restore(average, saved)
        if reads_another(saved, config, meta):
            state.other_text_since, state.best_val_loss, state.val_losses = state.step, math.inf, []
            print(f'dataset: {config["dataset"]} is another text than that of the steps up to {state.step:,}; the best '
                  'val loss begins anew')
    return state


def reads_another(saved, config, meta):
    """Whether a run that goes on reads another text than its checkpoint did: by content, or by name in older ones."""
    before = saved.get('meta', {})
    if 'text' in before:
        return before['text'] != meta['text']
    if 'files' in before and 'files' in meta:  # of a single dataset, or the first of a mixture
        train_and_val = [{stem: entry['sha256'] for stem, entry in some['files'].items() if not stem.startswith('test')}
                         for some in (before, meta)]
        if train_and_val[0] != train_and_val[1]:
            return True
    return saved.get('config', {}).get('dataset', config['dataset']) != config['dataset']


def begin(config, model, data, tokens_per_step, warmup_steps, state, is_resume, journal):
    """Make the folder of a run its own, and write into it from here on. data: the Rows of train."""
    out_dir = config['out_dir']
    others = [f'{name} = {config[name]}' for name, its in (
        ('architecture', 'gpt2'), ('optimizer', 'adamw'), ('sharded', False)) if config[name] != its]
    if others and not is_resume:
        print(f'nanoGPT cannot read the checkpoints of this run: {", ".join(others)}')
    facts = {'vocab_size': model.config.vocab_size, 'parameters': model.count_params(),
             'tokens_per_step': tokens_per_step, 'warmup_iters': warmup_steps,
             'unigram_entropy': data.unigram_entropy(), 'other_text_since': state.other_text_since}
    ranks.from_main(lambda: folders.claim(out_dir, is_new=not is_resume))
    journal.open(out_dir, config, facts, state.step if is_resume else None)
    if ranks.is_fsdp:
        print('fsdp: a model in parts is not shown from inside: no graph, attention, token vectors or texts of its own')
    else:
        journal.show('model', model)
    if ranks.is_main:
        provenance.record(out_dir, config, facts, state.step, journal.places())
        is_other_text = state.other_text_since == state.step > 0
        try:
            checkpoints.move_later_aside(out_dir, state.step, best_too=is_other_text)
        except OSError as error:
            overrides.fail(f'{out_dir}: what lies beyond step {state.step} cannot be moved ({reason(error)})')
    ranks.wait()  # however long that takes; a step has a time limit


def go_back(out_dir, state, model, optimizer, scaler, average, journal):
    """
    Where bad steps do not end: put a training back to its last checkpoint from before the first of them, with other
    text from there on. Bad steps left the weights as they were there, so that step's own would not do. Where there is
    no such checkpoint only the text changes.
    """
    first_bad = state.step - int(state.bad_steps[0])
    path, saved = checkpoints.before(out_dir, first_bad)
    if saved:
        print(f'WARNING: every step since {first_bad} was bad: back to {path}, after {saved["iter_num"]} steps, with '
              'other text')
        saved = checkpoints.fetched(saved, model)
        checkpoints.restore(saved, model, optimizer, scaler)
        averages.restore(average, saved)
        state.take(saved, but=KEPT)
        state.other_text_since = min(state.other_text_since, state.step)
        journal.history.facts['other_text_since'] = state.other_text_since
        if ranks.is_main:
            try:
                checkpoints.move_later_aside(out_dir, state.step)
            except OSError as error:
                print(f'WARNING: {out_dir}: what lies beyond step {state.step} cannot be moved ({reason(error)})')
    else:
        print(f'WARNING: every step since {first_bad} was bad, no checkpoint is from before: other text from here on')
    state.rewinds += 1
    state.bad_steps[0] = 0
    journal.go_back(state.step, state.rewinds)
