"""
The setting `architecture`: a preset of the model's configuration and deviations from it, by the names of its fields:
'modern', 'modern,mlp=swiglu', 'gpt2,position=rope,qk_norm=True'. The model says what there is: GPTConfig.PRESETS is
{preset: {field: value}}, each with all the fields that make an architecture.
"""

from dataclasses import fields
from typing import get_args

from kit.base.errors import fail, shown
from kit.base.overrides import nearest

TAKES = {bool: 'True or False', int: 'a whole number', float: 'a number'}


def kinds_of(GPTConfig):
    """{field: its type, or its choices} of those that make an architecture."""
    named = next(iter(GPTConfig.PRESETS.values()))
    return {f.name: get_args(f.type) or f.type for f in fields(GPTConfig) if f.name in named}


def parse(text, GPTConfig):
    """{field: value} of a text; one line where it is no architecture."""
    presets, kinds = GPTConfig.PRESETS, kinds_of(GPTConfig)
    preset, *deviations = [word.strip() for word in text.split(',')]
    preset = next((name for name in presets if name.lower() == preset.lower()), preset)
    if preset not in presets:
        wrong(text, f'it begins with {" or ".join(presets)}, as in gpt2,{preset}' if '=' in preset else
              f'there is no {shown(preset)}{nearest(preset, presets)}; there are {", ".join(presets)}')
    given = {}
    for word in deviations:
        name, _, value = (part.strip() for part in word.partition('='))
        if name in presets:
            wrong(text, f'{preset} and {name} are two; take one, and deviations by name')
        if name not in kinds and name in [f.name for f in fields(GPTConfig)]:
            wrong(text, f'{name} is no part of it; the sizes of a model are settings of their own, as --n_layer')
        if name not in kinds:
            wrong(text, f'there is no {shown(name)}{nearest(name, kinds)}; there are {", ".join(kinds)}')
        value = typed(text, name, value, kinds[name])
        if given.setdefault(name, value) != value:
            wrong(text, f'{name} is both {given[name]} and {value}; give it once')
    return presets[preset] | given


def typed(text, name, value, kind):
    """The value of a deviation, as its field takes it."""
    values = {'True': True, 'False': False} if kind is bool else {}
    if isinstance(kind, tuple):
        values = dict(zip(kind, kind))
    value = next((word for word in values if word.lower() == value.lower()), value)
    if values and value not in values:
        wrong(text, f'{name} is {" or ".join(values)}, not {shown(value)}{nearest(value, values)}')
    try:
        return values[value] if values else kind(value)
    except ValueError:
        wrong(text, f'{name} takes a number, as in {name}={kind(512)}, not {shown(value)}')


def wrong(text, words):
    fail(f'architecture = {shown(text)}: {words}')


def model_config(settings, GPTConfig, args):
    """The GPTConfig of a run: fields that are settings as these are, others as in args; one line where it is none."""
    args = args | parse(settings['architecture'], GPTConfig)
    args = args | {f.name: settings[f.name] for f in fields(GPTConfig) if f.name in settings}
    try:
        return GPTConfig(**args | {'causal': settings['objective'] == 'causal'})
    except ValueError as error:
        fail(error)


def text_of(args, GPTConfig):
    """The shortest text for the fields in args {field: value}; those that it lacks have their defaults."""
    default = {f.name: f.default for f in fields(GPTConfig)}
    return ','.join(min(([preset, *(f'{name}={args.get(name, default[name])}' for name, value in named.items()
                                    if args.get(name, default[name]) != value)]
                         for preset, named in GPTConfig.PRESETS.items()), key=len))


def help_text(GPTConfig):
    """What --help says of it: a table."""
    presets, kinds = GPTConfig.PRESETS, kinds_of(GPTConfig)
    rows = [('', *presets, 'takes')]
    for name, kind in kinds.items():
        takes = ' or '.join(kind) if isinstance(kind, tuple) else TAKES[kind]
        rows.append((name, *(str(preset[name]) for preset in presets.values()), takes))
    name, kind = next((name, kind) for name, kind in kinds.items() if isinstance(kind, tuple))
    title = (f'architecture: a preset, and behind commas deviations by name, as in --architecture={[*presets][-1]},'
             f'{name}={kind[0]}\n')
    return title + '\n'.join('  ' + ''.join(f'{word:20}' for word in row).rstrip() for row in rows)
