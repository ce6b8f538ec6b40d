"""
What a file that should be a checkpoint is: one of flatGPT's or nanoGPT's, of the right types in all that the scripts
take from it and finite in its numbers, or something else, which is named.
"""

import errno
import math
import re

import torch
from torch.utils._pytree import keystr, tree_leaves_with_path

from kit.base.errors import reason, shown
from kit.data.tokens import check_meta
from kit.learn.model_state import is_finite

WEIGHTS = 'model', 'ema', 'swa'
PREFIXES = '_orig_mod.', 'module.'  # what torch.compile and DistributedDataParallel leave before all names


class Unfit(Exception):
    """Why a whole file will not do, as what is said of it: '... holds weights alone'."""


class Damaged(Exception):
    """A file that will not do as a checkpoint, other bytes than were written, none of ours, or gone: which, and why."""


class Unreadable(Damaged):
    """A file that cannot be read now, for reasons that lie outside it: rights, memory."""


class Gone(Damaged):
    """A file that was there a moment ago: a run deletes what is past its keep_last."""


def foreign(words):
    return Unfit(f'is no checkpoint of flatGPT or nanoGPT ({words})')


def is_no_damage(error):
    """Whether a file could not be read for reasons that lie outside it: rights, memory, too many open files."""
    outside = errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE
    return (isinstance(error, MemoryError) or isinstance(error, OSError) and error.errno in outside
            or 'allocate memory' in str(error))


# ---------------------------------------------------------------------------------------------------------------------
# other files


def check_archive(archive):
    """
    A zip archive has what torch.save writes, and nothing else. Among that is what zipfile passes over and torch does
    not: an entry marked as a folder is read as zeros. Raises Unfit.
    """
    names = archive.namelist()
    if any(name.endswith('/constants.pkl') for name in names):
        raise foreign('it is TorchScript, code with its weights')
    if not any(name.endswith('/data.pkl') for name in names):
        raise foreign(f'it is a zip archive that torch.save has not written: it holds {shown(names[:1])[1:-1]}')
    for info in archive.infolist():
        if info.is_dir() or info.external_attr & 0x10 or info.file_size != info.compress_size:
            raise foreign(f'torch.save writes no entry like {info.filename}')


def check_bytes(path):
    """Name a file that is no archive by its first bytes, as Unfit, where they tell what it is."""
    with open(path, 'rb') as file:
        head = file.read(64)
    if head.startswith(b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19'):
        raise foreign('it is in the format that torch.save had before version 1.6, without checksums; torch.save what '
                      'torch.load makes of it')
    if head.startswith(b'\x80'):
        raise foreign('it is a pickle that torch.save has not written')
    if head[8:9] == b'{' and not any(head[5:8]):
        raise foreign('it is a safetensors file; of a Hugging Face model the folder is taken: --init_from=FOLDER')
    if head.startswith(b'GGUF'):
        raise foreign('it is a GGUF file')
    if head.startswith(b'version https://git-lfs'):
        raise foreign('it is what Git LFS puts in the place of a file; git lfs pull fetches that')


def asks_for_code(error):
    """The Unfit that torch's refusal of a pickle stands for."""
    name = re.search(r'GLOBAL (\S+)', str(error))
    return foreign(f'it asks for code{f", {name[1]}" if name else ""}, and that is never run; such are whole pickled '
                   'models and objects, where a dict of numbers and tensors is expected')


def check_keys(checkpoint, resume):
    """It is a dict that has what is needed, or is named. Raises Unfit."""
    if isinstance(checkpoint, torch.Tensor):
        raise foreign('it is a tensor alone')
    if not isinstance(checkpoint, dict):
        raise foreign(f'it is a {type(checkpoint).__name__}, and no dict')
    if 'pytorch-lightning_version' in checkpoint:
        raise foreign('it is one of PyTorch Lightning')
    if checkpoint and all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        raise foreign('it is a bare state_dict, weights without the model_args of their model; of a Hugging Face model '
                      'the folder is taken: --init_from=FOLDER')
    if checkpoint.keys() == {'state', 'param_groups'}:
        raise foreign('it is the state of an optimizer alone')
    if missing := [key for key in ('model', 'model_args', 'iter_num') if key not in checkpoint]:
        others = ', '.join(map(shown, [*checkpoint][:8])) or 'nothing'
        raise foreign(f'it has no {", no ".join(missing)}; it has {others}')
    if resume and 'optimizer' not in checkpoint:
        raise Unfit('holds weights alone, no optimizer: a new run begins with them, --init_from=FILE.pt')
    if resume and 'best_val_loss' not in checkpoint:
        raise foreign('it has no best_val_loss')


# ---------------------------------------------------------------------------------------------------------------------
# the types of what is taken


def is_dict(value):
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def is_count(value):
    return type(value) is int and 0 <= value < 2**63


def is_number(value):
    return type(value) in (int, float) and 0 <= value < math.inf


def is_list_of(kind):
    return lambda value: type(value) is list and all(map(kind, value))


# of a checkpoint's keys, and of the settings in its config that scripts look up there
KEYS = {
    'model_args': is_dict, 'config': is_dict, 'optimizer': is_dict,
    'scaler': lambda value: is_dict(value) and all(map(is_number, value.values())) and value.get('scale', 1) > 0,
    'iter_num': is_count, 'n_averaged': is_count, 'rewinds': is_count, 'other_text_since': is_count,
    'bad_steps': is_list_of(is_count),
    'fitted_minutes': is_number, 'best_val_loss': lambda value: type(value) in (int, float),
    'val_losses': is_list_of(lambda value: type(value) is float),
    'recent_norms': is_list_of(lambda value: type(value) is float and value >= 0),  # inf: there was no step yet
    'parameters': is_list_of(lambda value: isinstance(value, str)),
}
SETTINGS = {'mask_prob': is_number, 'document_attention': lambda value: type(value) is bool} | dict.fromkeys(
    ('dataset', 'init_from', 'objective', 'batch_mode', 'too_long'), lambda value: isinstance(value, str))


def checked(checkpoint, resume):
    """
    The same checkpoint, in which all that the scripts take has its type: numbers are no tensors (nanoGPT's best loss is
    one), a best loss that is not finite is none, names of weights are without what torch.compile and DDP leave before
    them. resume: the state of the training must be there. Raises Unfit.
    """
    check_keys(checkpoint, resume)
    for key in 'iter_num', 'best_val_loss':
        value = checkpoint.get(key)
        if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_meta:
            checkpoint[key] = value.item()
    for key, is_right in KEYS.items():
        if key in checkpoint and not is_right(checkpoint[key]):
            of = ' over bad steps' if key == 'rewinds' else ''
            raise foreign(f'its {key}{of} is {shown(checkpoint[key])}')
    for name, is_right in SETTINGS.items():
        if name in checkpoint.get('config', {}) and not is_right(checkpoint['config'][name]):
            raise foreign(f'in its config {name} is {shown(checkpoint["config"][name])}')
    if 'meta' in checkpoint:
        try:
            check_meta(checkpoint['meta'])
        except Exception as error:  # of many kinds
            raise foreign(f'its meta, which describes the text, will not do: {reason(error)}') from None
    if not math.isfinite(checkpoint.get('best_val_loss', math.inf)):
        checkpoint['best_val_loss'] = math.inf
    for key in WEIGHTS:
        if key in checkpoint:
            checkpoint[key] = plain_names(checked_weights(checkpoint[key], key, 'shards' in checkpoint))
            if resume and key != 'model' and not checkpoint.get('n_averaged'):
                raise foreign(f'it has {key} and no n_averaged, which says of how many updates')
    return checkpoint


def checked_weights(state, key, in_shards):
    """{name: tensor}, of which each has its numbers here, or in shards. Raises Unfit."""
    if not is_dict(state):
        raise foreign(f'its {key} is of type {type(state).__name__}, and no {{name: tensor}}')
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise foreign(f'in its {key} {name} is of type {type(value).__name__}, and no tensor')
        if value.layout != torch.strided or value.is_meta and not in_shards or value.is_quantized:
            raise foreign(f'in its {key} {name} is a sparse tensor, a quantized one, or one without numbers')
    return {name: value.detach() for name, value in state.items()}


def plain_names(state):
    """Weights without the prefixes that all of their names have."""
    while state and (prefix := next((prefix for prefix in PREFIXES
                                     if all(name.startswith(prefix) for name in state)), '')):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def bad_numbers(checkpoint, resume=True):
    """
    Which of its tensors holds a number that is not finite, in words; '' where none does. A buffer of the model, such as
    a mask, may be infinite: what is no buffer stands in 'parameters'; in a checkpoint without that list only NaN counts
    among the weights, and model_state.load sees the others. resume: in the state of the optimizer, too.
    """
    parameters = set(checkpoint.get('parameters', ()))
    for key in WEIGHTS:
        for name, tensor in checkpoint.get(key, {}).items():
            if not is_finite(tensor, or_infinite=name not in parameters):
                return name if key == 'model' else f'{key}: {name}'
    for path, leaf in tree_leaves_with_path(checkpoint.get('optimizer', {})) if resume else ():
        if isinstance(leaf, torch.Tensor) and not is_finite(leaf):
            return f'optimizer{keystr(path)}'
    return ''
