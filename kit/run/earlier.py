"""
What the code did before a setting was there: runs whose checkpoints lack it go on as they were made, whatever its
default is now. Whoever adds a setting adds it here, with the value under which a run is as it was without; it stays as
it is when the default changes. The settings of the first version and those of a launch alone are not here.
"""

SETTINGS = {
    'save_errors': 'warn', 'batch_mode': 'windows', 'document_attention': True, 'too_long': 'cut', 'mask_prob': 0.0,
    'objective': 'causal', 'max_epochs': 0.0, 'grad_clip_quantile': 0.0, 'grad_clip_value': 0.0, 'max_bad_steps': 0,
    'ema_decay': 0.0, 'swa_start': 0, 'max_minutes': 0.0, 'early_stop': 0, 'min_delta': 1e-4, 'early_stop_norm': False,
    'lr_schedule': 'cosine', 'warmup_share': 0.0, 'warmup_start_lr': 0.0, 'lr_by_norm': False, 'scale_loss': True,
    'deterministic': False, 'wandb_checkpoints': 'all',
}
