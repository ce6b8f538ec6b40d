"""Checkpoints on disk: written whole or not at all, found, loaded, pruned."""

import os
import pickle
import shutil
import zipfile
from pathlib import Path

import torch

from kit.overrides import fail
from kit.tokens import check_meta

MODEL_ARGS = 'n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size', 'bias', 'dropout', 'gelu_approximate'


def save(checkpoint, folder, names):
    """
    Write a checkpoint once and give it each of the names (e.g. step_0000500.pt, ckpt.pt). It is written beside,
    synced to the disk, its checksums are checked, then it is renamed: a name always holds a whole file, the old one
    or the new one, whenever the power goes.
    """
    folder = Path(folder)
    part, link = folder / f'.{names[0]}.part', folder / f'.{names[0]}.link'
    try:
        part.unlink(missing_ok=True)  # left by a kill it can be the same file as ckpt.pt: never write into it
        with open(part, 'wb') as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        with zipfile.ZipFile(part) as archive:
            if bad := archive.testzip():
                raise OSError(f'the disk gave back other bytes than were written ({bad})')
        for name in names:
            link.unlink(missing_ok=True)
            try:
                os.link(part, link)
            except OSError:  # a file system without hard links
                shutil.copyfile(part, link)
                sync(link)
            os.replace(link, folder / name)
        if os.name == 'posix':  # a rename is on the disk only when its folder is
            sync(folder)
    except (OSError, RuntimeError) as error:  # torch.save raises a RuntimeError on a full disk
        # the run is worth more than this one checkpoint: say so and go on, the older ones are untouched
        print(f'WARNING: no checkpoint was saved to {folder} ({str(error).splitlines()[0]}); the older ones are '
              'untouched and training goes on')
    finally:
        part.unlink(missing_ok=True)
        link.unlink(missing_ok=True)


def sync(path):
    """What was written to a file, or renamed in a folder, is on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY if Path(path).is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def prune(folder, keep_last):
    """Delete all but the newest keep_last interval checkpoints; 0 keeps them all."""
    for path in sorted(Path(folder).glob('step_*.pt'))[:-keep_last or None] if keep_last else []:
        path.unlink()


def newest(folder):
    """The checkpoint that a resume takes."""
    path = Path(folder) / 'ckpt.pt'
    if not path.is_file():
        fail(f'{path}: there is no checkpoint to go on from; train first, or give --out_dir=FOLDER of a run')
    return path


def best(folder):
    """The checkpoint to sample from or to test where none is named: best.pt, else ckpt.pt."""
    for name in ('best.pt', 'ckpt.pt'):
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    fail(f'{folder} holds no checkpoint; train first (python train.py), or give --checkpoint=FILE or --out_dir=FOLDER')


def load(path, resume=False):
    """
    A checkpoint of this project or of nanoGPT, on the CPU, its model's names without the prefix and the masks that
    torch.compile and old versions have left there. Nothing in the file is run. resume: it must hold the state of the
    training too.
    """
    if not Path(path).exists():
        fail(f'{path}: there is no such checkpoint')
    try:
        if not zipfile.is_zipfile(path):  # as everything that torch.save writes; other pickles are not even opened
            raise ValueError('it is no archive of torch.save')
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        state = {name.removeprefix('_orig_mod.'): value for name, value in checkpoint['model'].items()}
        checkpoint['model'] = {name: value for name, value in state.items() if not name.endswith('.attn.bias')}
        check_form(checkpoint, resume)
    except pickle.UnpicklingError:
        fail(f'{path} is damaged, or no checkpoint of flatGPT or nanoGPT (it asks for code, and that is never run)')
    except Exception as error:  # torch raises many kinds here, and each means that this file will not do
        fail(f'{path} is damaged, or no checkpoint of flatGPT or nanoGPT ({type(error).__name__}: {str(error)[:80]})')
    return checkpoint


def check_form(checkpoint, resume):
    """Raise KeyError, TypeError or ValueError where a checkpoint lacks what the scripts take from it."""
    args = checkpoint['model_args']
    for key in ('n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size'):
        if not isinstance(args[key], int) or args[key] < 1:
            raise ValueError(f'its model_args have {key} = {args[key]!r}')
    if strange := args.keys() - {*MODEL_ARGS}:
        raise ValueError(f'its model_args have {", ".join(sorted(strange))}, which is not GPT-2')
    for name, value in checkpoint['model'].items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f'{name} is no tensor')
    if 'transformer.wpe.weight' not in checkpoint['model']:
        raise KeyError('transformer.wpe.weight')
    int(checkpoint['iter_num'])
    if resume:
        float(checkpoint['best_val_loss'])
        checkpoint['optimizer']['param_groups']
    dict(checkpoint.get('config', {}))
    if 'meta' in checkpoint:
        check_meta(checkpoint['meta'])


def fill(model, state):
    """Load the weights of a checkpoint into a model."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = ' '.join(line.strip() for line in str(error).splitlines()[1:])
        fail(f'the weights do not fit their own model_args: {reason[:150]}')


def check_fit(saved, model_args, meta):
    """Saved weights must know the ids of the dataset and the positions of a row; of these they may have more."""
    known = saved.get('model_args', model_args)
    if meta['vocab_size'] > known['vocab_size']:
        fail(f'dataset: it has {meta["vocab_size"]:,} ids and these weights know {known["vocab_size"]:,}; '
             'prepare the text with their tokenizer')
    mine, theirs = meta['tokenizer'], saved.get('meta', meta)['tokenizer']
    if (mine['kind'], mine.get('chars')) != (theirs['kind'], theirs.get('chars')):
        fail('dataset: its ids mean other tokens than those of these weights; prepare the text with their tokenizer')
    if model_args['block_size'] > known['block_size']:
        fail(f'block_size = {model_args["block_size"]}: these weights know {known["block_size"]} positions, no more')


def move_aside(folder):
    """A new run never overwrites an old one: checkpoints becomes checkpoints.1, or the first number that is free."""
    folder = Path(folder)
    if (folder / 'training.log').exists() or any(folder.glob('*.pt')):
        number = 1
        while (aside := folder.with_name(f'{folder.name}.{number}')).exists():
            number += 1
        os.rename(folder, aside)
        print(f'{folder} holds an earlier run: moved to {aside}')
