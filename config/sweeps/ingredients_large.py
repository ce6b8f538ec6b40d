"""The best few of ingredients.py at the size of nanoGPT's own recipe, 10.6M parameters, as long as there."""

dtype = 'bfloat16'  # as its table was made; where the CPU has no units for it, float32 is faster and as good
eval_interval = 0
eval_iters = 0
save_interval = 0
seeds = 3

n_layer = 6
n_embd = 384
variants = {
    'all': {},
    'all, no n-grams': {'architecture': 'modern,ngram_embeddings=0'},
    'all, AdamW alone': {'optimizer': 'adamw'},
    'plain, Muon': {'architecture': 'gpt2'},
    'plain': {'architecture': 'gpt2', 'optimizer': 'adamw', 'learning_rate': 2e-3},
}
