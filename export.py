"""
A checkpoint in another form: one file of shards, or shards of one file. Nothing is lost either way, bit for bit.

$ python export.py --checkpoint=exp1/ckpt.pt --output=whole.pt             of sharded = True one ckpt.pt, as nanoGPT's
$ python export.py --checkpoint=whole.pt --output=exp2/ckpt.pt --sharded   and back, into a new folder
"""

import math
import os
from pathlib import Path

from kit.base import errors, overrides
from kit.state import checkpoints, shards

# ---------------------------------------------------------------------------------------------------------------------
# settings

checkpoint = ''             # which one; '' = best.pt of checkpoints/, else ckpt.pt
output = 'exported.pt'      # not empty: where the new one is written, FILE.pt; what is there is never written over
sharded = False             # whether that is a small file and a folder of shards, or one file

overrides.apply(globals(), ['output[-3:] == ".pt"  # a name that ends in .pt, such as whole.pt'])

# ---------------------------------------------------------------------------------------------------------------------
# read all of it, verified; write it, verified

path, output = checkpoint or str(checkpoints.best('checkpoints')), Path(output)
folder = output.parent
if os.path.lexists(output):
    overrides.fail(f'output = {errors.shown(str(output))}: it is there, and nothing is written over; choose another '
                   'name')
saved = checkpoints.load(path, resume='optimizer' in checkpoints.peek(path))  # one of averaged weights has none
if output.name == 'best.pt' and not math.isfinite(saved.get('best_val_loss', math.inf)):
    overrides.fail(f'output = {errors.shown(str(output))}: {path} has no val loss, by which it could be the best; '
                   'choose another name')
parameters = saved.get('parameters')
with errors.explained(f'output = {errors.shown(str(output))}: {folder} cannot be made', 'choose another folder'):
    folder.mkdir(parents=True, exist_ok=True)
try:
    new = shards.write(saved, folder, parameters=parameters) if sharded else saved
except Exception as error:  # torch raises a RuntimeError on a full disk
    checkpoints.report(checkpoints.failure(error, folder), stop_on_error=True)
if failure := checkpoints.write(new, folder, [output.name], parameters):
    if sharded:
        shards.delete(folder / new['shards']['folder'])
    checkpoints.report(failure, stop_on_error=True)
print(f'wrote {output}: {path}, after {saved["iter_num"]} steps, in '
      f'{"shards, which are in " + new["shards"]["folder"] if sharded else "one file"}')
