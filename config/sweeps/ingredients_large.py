"""
The best of ingredients.py at 6 layers of 384 channels, the size of nanoGPT's own recipe, with rates for that size, for
half as many steps: with its n-grams (17M parameters) and without (10.7M).
"""

dtype = 'bfloat16'  # as its table was made; where the CPU has no units for it, float32 is faster
eval_interval = 0
eval_iters = 0
save_interval = 0

n_layer = 6
n_embd = 384
max_iters = 650
optimizer = 'muon:0.01'
learning_rate = 1e-3
variants = {
    'all': {},
    'all, no n-grams': {'architecture': 'modern,ngram_embeddings=0'},
}
