"""
What each ingredient of the default run brings: taken out of it, at the same number of steps, and put into what was the
default before, config/train_python_docs_gpt2.py. The last evaluation is over all of val.
"""

dtype = 'bfloat16'  # as its table was made; where the CPU has no units for it, float32 is faster
eval_interval = 0
eval_iters = 0
save_interval = 0
seeds = 3

_PLAIN = {'architecture': 'gpt2', 'optimizer': 'adamw', 'learning_rate': 4e-3, 'batch_size': 12, 'block_size': 64,
          'sampling': 'random', 'max_iters': 4000}
variants = {
    'all': {},
    'all, AdamW alone': {'optimizer': 'adamw'},
    'all, random rows': {'sampling': 'random'},
    'all, learned positions': {'architecture': 'modern,position=learned'},
    'all, embeddings as they are': {'architecture': 'modern,embed_norm=False'},
    'all, queries and keys as they are': {'architecture': 'modern,qk_norm=False'},
    'all, tied head': {'architecture': 'modern,tied=True'},
    'all, no n-grams': {'architecture': 'modern,ngram_embeddings=0'},
    'all, SwiGLU': {'architecture': 'modern,mlp=swiglu'},
    'plain': _PLAIN,
    'plain, Muon': _PLAIN | {'optimizer': 'muon:0.015'},
    'plain, each row once an epoch': _PLAIN | {'sampling': 'shuffle'},
    'plain, rows of 256': _PLAIN | {'batch_size': 6, 'block_size': 256, 'max_iters': 1300},
    'plain, rope': _PLAIN | {'architecture': 'gpt2,position=rope'},
    'plain, embeddings normalized': _PLAIN | {'architecture': 'gpt2,embed_norm=True'},
    'plain, queries and keys normalized': _PLAIN | {'architecture': 'gpt2,qk_norm=True'},
    'plain, a head of its own': _PLAIN | {'architecture': 'gpt2,tied=False'},
    'plain, n-grams': _PLAIN | {'architecture': 'gpt2,ngram_embeddings=8192'},
    'plain, SwiGLU': _PLAIN | {'architecture': 'gpt2,mlp=swiglu'},
}
