"""
What the code did before a setting was there: runs whose checkpoints lack it go on as they were made, whatever its
default is now. Whoever adds a setting adds it here, with the value under which a run is as it was without; it stays as
it is when the default changes. The settings of the first version, but for one that nanoGPT lacks (sampling), and those
of a launch alone are not here.
"""

import torch

SETTINGS = {
    'save_errors': 'warn', 'batch_mode': 'windows', 'document_attention': True, 'too_long': 'cut', 'mask_prob': 0.0,
    'objective': 'causal', 'max_epochs': 0.0, 'grad_clip_quantile': 0.0, 'grad_clip_value': 0.0, 'max_bad_steps': 0,
    'ema_decay': 0.0, 'swa_start': 0, 'max_minutes': 0.0, 'early_stop': 0, 'min_delta': 1e-4, 'early_stop_norm': False,
    'lr_schedule': 'cosine', 'warmup_share': 0.0, 'warmup_start_lr': 0.0, 'lr_by_norm': False, 'scale_loss': True,
    'deterministic': False, 'wandb_checkpoints': 'all', 'compile_mode': 'auto', 'architecture': 'gpt2',
    'optimizer': 'adamw', 'sampling': 'random', 'activation_checkpointing': False,
}


def resolved(settings, device):
    """
    What the settings of a checkpoint stood for on a CPU before this was stored: auto was float32, nothing was compiled
    unless asked for, and all threads were used. nanoGPT, which has no save_interval, trains in float32 on a CPU,
    whatever its dtype says, and compiles unless told otherwise, so that its compile is nobody's wish.
    """
    is_foreign, found = 'save_interval' not in settings, {}
    if is_foreign and 'compile' in settings:
        found['compile'] = None if device.type == 'cuda' else False
    if device.type == 'cpu' and 'threads' not in settings:
        found['threads'] = torch.get_num_threads()
        found['compile'] = not is_foreign and bool(settings.get('compile'))
        if is_foreign or settings.get('dtype', 'auto') == 'auto':
            found['dtype'] = 'float32'
    return found
