"""
Who chooses the set-ups of a sweep where it is not the file itself: Optuna, on this machine, or the server of Weights &
Biases. Both are optional packages.
"""

import json
import math
import os
import random
import shlex
import sys
from pathlib import Path

import numpy as np

from kit.base import errors, overrides
from kit.sweeps.trials import SEED, Range, at, new_run

STARTUP = 5  # set-ups that bayes begins with, spread evenly, before it concludes anything from them
PRUNE_FROM = 3  # set-ups that must have ended before it prunes: what is then above their median at some step

# ---------------------------------------------------------------------------------------------------------------------
# bayes: Optuna proposes the set-ups, and says which running ones are not worth their steps


def first_points(sweep):
    """What bayes begins with: as many as STARTUP, spread evenly over each setting (a Latin hypercube)."""
    rng, columns = random.Random(SEED), {}
    for name, values in sweep.axes().items():
        shares = [(i + 0.5) / STARTUP for i in range(STARTUP)]
        rng.shuffle(shares)
        columns[name] = [at(values, share) for share in shares]
    return [{name: column[i] for name, column in columns.items()} for i in range(STARTUP)]


class Study:
    """An Optuna study in the folder of a sweep. Its trial n is the set-up n + 1; all it knows is on the disk."""

    def __init__(self, sweep, folder, results):
        import optuna
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.optuna, self.sweep, self.folder = optuna, sweep, folder
        path = folder.resolve() / 'study.db'
        if results and not (os.path.isfile(path) and os.path.getsize(path)):  # else SQLite makes a new one there
            overrides.fail(f'{path} is gone or empty; --out_dir=FOLDER begins another search')
        try:
            self.study = optuna.create_study(storage=f'sqlite:///{path}', study_name='sweep', load_if_exists=True,
                                             direction='maximize' if sweep.maximise else 'minimize',
                                             pruner=optuna.pruners.MedianPruner(n_startup_trials=PRUNE_FROM))
            there, made = len(self.study.trials), max((number for number, _ in results), default=0)
        except Exception as error:  # of SQLite, SQLAlchemy or Optuna
            overrides.fail(f'{path} cannot be read ({errors.reason(error)}); --out_dir=FOLDER begins another search')
        if there < made:
            overrides.fail(f'{path} knows of {there} set-ups, and {made} have results; --out_dir=FOLDER begins another '
                           'search')
        d = optuna.distributions
        self.axes = {name: d.CategoricalDistribution(values) if isinstance(values, list) else
                     (d.IntDistribution if type(values.low) is int else d.FloatDistribution)(
                         values.low, values.high, log=values.is_log) for name, values in sweep.axes().items()}

    def undone(self, results):
        """The runs that earlier launches of the sweep have asked for and not made."""
        for trial in self.study.trials:
            if not trial.state.is_finished() and len(trial.params) < len(self.axes):  # they were killed while they did
                self.propose(trial.number)
        return [run for number in range(1, len(self.study.trials) + 1) for run in self.next_of(number, results)]

    def ask(self):
        """The first run of a new set-up, as a list; an empty one where max_runs, or all there are, were asked for."""
        sizes = [len(v) if isinstance(v, list) else v.high - v.low + 1 if type(v.low) is int else math.inf
                 for v in self.sweep.axes().values()]
        while (n := len(trials := self.study.trials)) < self.sweep.max_runs and len(
                {json.dumps(self.point(trial)) for trial in trials}) < math.prod(sizes):
            self.propose(n)
            if run := self.next_of(n + 1, {}):
                return run
        return []

    def propose(self, n):
        """Let Optuna choose the point of trial n, or the rest of it."""
        # a sampler for each, seeded by its number: a sweep that goes on asks for what it would have asked for
        self.study.sampler = self.optuna.samplers.TPESampler(seed=SEED + n, n_startup_trials=STARTUP)
        trials = self.study.trials
        if n == len(trials) and n < STARTUP:
            self.study.enqueue_trial(first_points(self.sweep)[n])
        if n == len(trials) or trials[n].state == self.optuna.trial.TrialState.WAITING:
            self.study.ask(self.axes)
        else:
            trial = self.optuna.trial.Trial(self.study, trials[n]._trial_id)
            for name, axis in self.axes.items():
                trial._suggest(name, axis)  # as ask() does

    def point(self, trial):
        return {name: axis.rounded(trial.params[name]) if isinstance(axis, Range) else trial.params[name]
                for name, axis in self.sweep.axes().items()}

    def next_of(self, number, results):
        """The next run of a set-up, as a list. Where it has had all that it gets, the study is told what came of it."""
        *others, trial = self.study.trials[:number]
        point, states = self.point(trial), self.optuna.trial.TrialState
        if twin := next((other for other in others if self.point(other) == point), None):  # with nothing new to learn
            if not trial.state.is_finished() and twin.state == states.COMPLETE:
                self.study.tell(number - 1, twin.value)
            elif not trial.state.is_finished():
                self.study.tell(number - 1, state=twin.state if twin.state.is_finished() else states.FAIL)
            return []
        mine = {seed: result for (n, seed), result in results.items() if n == number}
        kinds = {result['status'] for result in mine.values()}
        left = [seed for seed in self.sweep.seeds if seed not in mine]
        if kinds <= {'finished'} and left:
            return [new_run(self.folder, number, point, left[0])]
        if not trial.state.is_finished():
            best = [result['best'] for result in mine.values()]
            if kinds == {'finished'} and None not in best:
                self.study.tell(number - 1, float(np.mean(best)))
            else:  # that it diverged is worth knowing, that it crashed says nothing
                self.study.tell(number - 1, state=states.FAIL if 'crashed' in kinds else states.PRUNED)
        return []

    def is_hopeless(self, run):
        """Whether the running trial of a set-up, going by its first seed, is not worth its further steps."""
        evaluated = run.history.get('val/loss')[0]  # other runs have been judged at the same steps
        if run.seed != self.sweep.seeds[0] or not (evaluated > run.judged_at).any():
            return False
        trial, run.judged_at = self.study.trials[run.number - 1], int(evaluated[-1])
        if trial.state.is_finished():
            return False
        told = max(trial.intermediate_values, default=0)  # step 0 is a new model, and no sign of what becomes of it
        live = self.optuna.trial.Trial(self.study, trial._trial_id)
        steps, values = run.history.get(self.sweep.metric)
        for step in evaluated[evaluated > told].tolist():
            since = values[(steps > told) & (steps <= step)]  # of a figure that each update has, the best of them
            since = since[np.isfinite(since)] if np.isfinite(since).any() else since
            told = step
            if len(since):  # TPE and the pruners know what to think of a NaN
                live.report(float(since.max() if self.sweep.maximise else since.min()), step)
            if live.should_prune():
                return True
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Weights & Biases: the same sweep, run by its server


def wandb_config(sweep, name, folder, script):
    """
    What wandb.sweep takes. The agent runs the command with the values of a run in the place of ${args}, as
    --name=value. Its ${envvar:WANDB_RUN_ID} is filled in before that id is known, so a shell asks the environment.
    """
    parameters = {'seed': {'values': sweep.seeds}}
    for key, values in sweep.space.items():
        if isinstance(values, list):
            parameters[key] = {'values': values}
        else:
            kind = ('q_log_uniform_values' if values.is_log else 'int_uniform') if type(values.low) is int else (
                'log_uniform_values' if values.is_log else 'uniform')
            parameters[key] = {'distribution': kind, 'min': values.low, 'max': values.high} | (
                {'q': 1} if kind.startswith('q_') else {})
    words = [*sweep.words, *(f'--{key}={value}' for key, value in sweep.fixed.items()), '--wandb_log']
    shell = f'exec "$0" "$@" --out_dir={shlex.quote(str(Path(folder).resolve()))}/"$WANDB_RUN_ID"'
    return {'name': name, 'description': sweep.description, 'program': str(script), 'method': sweep.method,
            'metric': {'name': sweep.metric, 'goal': 'maximize' if sweep.maximise else 'minimize'},
            'parameters': parameters,
            'command': ['/bin/sh', '-c', shell, sys.executable, str(script), *words, '${args}']}


def run_on_wandb(sweep, name, folder, script):
    """Open the sweep at Weights & Biases and work for it, as one agent, until it has enough."""
    if sweep.variants:
        overrides.fail('wandb = True: Weights & Biases knows no variants; name the values of each setting as a list')
    if sweep.method == 'bayes' and len(sweep.seeds) > 1:
        overrides.fail('wandb = True: its bayes would search for the best seed too; --seeds=1')
    overrides.require('wandb', 'wandb = True')
    import wandb
    if (mode := wandb.setup().settings.mode) != 'online':
        overrides.fail(f'wandb = True: its sweeps need its server, and the mode is {mode}; without --wandb the sweep '
                       'runs here')
    try:
        if not wandb.login(prompt=False):
            overrides.fail('wandb = True: nobody is logged in to Weights & Biases; `wandb login` does that')
        project = sweep.base['wandb_project']
        sweep_id = wandb.sweep(wandb_config(sweep, name, folder, script), project=project)
        wandb.agent(sweep_id, project=project, count=sweep.max_runs * len(sweep.seeds) or None)
    except wandb.errors.Error as error:
        overrides.fail(f'wandb = True: Weights & Biases does not answer: {error}')
