"""Where a run stands, beside its weights, moments and average: what train.py counts and remembers from step to step."""

import math
from dataclasses import dataclass, field, fields

import torch

from kit.base.errors import explained, shown
from kit.learn import gradients

NAMES = {'step': 'iter_num'}  # in a checkpoint, as nanoGPT has it; the others are called there as they are here
# what a run that goes back over bad steps does not take back: its best lies on the disk, and it must not go back again
KEPT = 'best_val_loss', 'bad_steps', 'rewinds', 'fitted_minutes', 'other_text_since'


def no_norms():
    return torch.full((gradients.RECENT,), math.inf)


def no_bad_steps():
    return torch.zeros(2, dtype=torch.int64)


@dataclass
class RunState:
    """
    Each field is a key of the checkpoint (a tensor is a list there). A new one is a line here, and a resume has it: the
    default tells its type, and is what a checkpoint from before it stands for.
    """
    step: int = 0                   # updates made so far
    best_val_loss: float = math.inf
    val_losses: list = field(default_factory=list)  # of all evaluations at intervals
    recent_norms: torch.Tensor = field(default_factory=no_norms)  # of the gradients, the newest last; inf: none yet
    bad_steps: torch.Tensor = field(default_factory=no_bad_steps)  # in a row up to now; since the last iter line
    rewinds: int = 0                # how often the run went back over bad steps; each time other text comes
    fitted_minutes: float = 0.0     # the max_minutes that max_iters was fitted to
    other_text_since: int = 0       # the step at which it went on with another text than before; 0: it never did

    loaded_at = -1                  # no key: the step of the checkpoint that was loaded, where all was done before

    def to(self, device):
        """The tensors onto a device; returns the state."""
        for f in fields(self):
            value = getattr(self, f.name)
            setattr(self, f.name, value.to(device) if isinstance(value, torch.Tensor) else value)
        return self

    def keys(self):
        """{key of a checkpoint: plain value}."""
        values = {NAMES.get(f.name, f.name): getattr(self, f.name) for f in fields(self)}
        return {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in values.items()}

    def take(self, saved, but=()):
        """Go on where a checkpoint stands, but for some fields."""
        for name in [f.name for f in fields(self)]:
            key, old = NAMES.get(name, name), getattr(self, name)
            if key not in saved or name in but:
                continue
            with explained(f'the checkpoint has {key} = {shown(saved[key])}, and no run goes on from that',
                           'take the weights alone: --init_from=FILE.pt'):
                setattr(self, name, like(old, saved[key]))
        self.loaded_at = self.step


def like(old, value):
    """A plain value as what old is. Raises whatever torch does, and TypeError, where it is something else."""
    if isinstance(old, torch.Tensor):
        return torch.tensor(value, dtype=old.dtype, device=old.device).reshape(old.shape)
    if not isinstance(value, type(old) | int if isinstance(old, float) else type(old)):
        raise TypeError(f'it is of type {type(value).__name__}, and must be of type {type(old).__name__}')
    return type(old)(value)
