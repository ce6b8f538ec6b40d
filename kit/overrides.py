"""
A script's settings are its module-level names. Config files and --name=value override them:

    config = overrides.apply(globals(), rules=['0 <= dropout < 1'])

$ python train.py config/train_gpt2.py --batch_size=8 --compile=False

Whatever is wrong with them ends the script with one line on stderr and status 2, before anything is written.
"""

import ast
import difflib
import importlib.util
import math
import os
import sys
import time
import types
from contextlib import redirect_stdout
from pathlib import Path

HOUSE = Path(__file__).resolve().parent.parent  # the folder that holds train.py, config/ and data/

TYPES = int, float, bool, str, type(None)  # of settings

given = set()  # names that this command line or one of its config files has set: a resumed run keeps those


def fail(message):
    """
    End the script over a mistake of its user's: one line on stderr, status 2, no traceback. Under torchrun every rank
    finds the same mistakes and one of them tells: by the time the others would, torchrun has ended them.
    """
    if int(os.environ.get('RANK', 0)) > 0:
        time.sleep(5)
    print(f'{Path(sys.argv[0]).name}: {" ".join(str(message).split())}', file=sys.stderr, flush=True)
    raise SystemExit(2)


def tell(kind, error, trace):
    """Ctrl-C is no fault of the script's, nor is `| head`, which has read enough."""
    if issubclass(kind, KeyboardInterrupt):
        print(f'{Path(sys.argv[0]).name}: interrupted', file=sys.stderr)
    elif issubclass(kind, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    else:
        sys.__excepthook__(kind, error, trace)


def apply(settings, rules=(), operands=None):
    """
    Read sys.argv into the settings of a script.

    settings: the script's globals(); its names of type int, float, bool, str or None are the settings. A setting
              that is None by default is True, False or, while it stays None, chosen by the script.
    rules:    conditions in Python that must hold, e.g. 'batch_size >= 1'; a trailing # comment tells the mend.
    operands: a list that takes the bare words; without it a bare word is an error.
    Returns the settings as a dict. Arguments count from left to right, the later ones win.
    """
    if hasattr(sys.stdout, 'reconfigure'):  # no character may end a run on a console that lacks it; live through pipes
        sys.stdout.reconfigure(errors='replace', line_buffering=True)
    sys.excepthook = tell
    defaults = {k: v for k, v in settings.items() if not k.startswith('_') and type(v) in TYPES}
    if {'--help', '-h'} & set(sys.argv[1:]):
        print_help(settings, list(defaults))
        raise SystemExit(0)
    given.update(read_words(sys.argv[1:], settings, defaults, operands))
    config = {k: settings[k] for k in defaults}
    check(rules, config)
    return config


def read_script(path):
    """
    (settings, rules) of another script, {name: default} and the list it gives to apply, as its source has them:
    nothing of it is run.
    """
    names = {}
    for node in ast.parse(Path(path).read_text(encoding='utf-8')).body:
        calls = [n for n in ast.walk(node) if isinstance(n, ast.Call) and getattr(n.func, 'attr', '') == 'apply']
        if calls:  # what is assigned from here on is no setting
            rules = ast.unparse(calls[0].args[1]) if len(calls[0].args) > 1 else '[]'
            return ({name: value for name, value in names.items() if not name.startswith('_') and type(value) in TYPES},
                    names[rules] if rules in names else ast.literal_eval(rules))
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:  # 60 * 1000 is a default too; a call is none
                names[node.targets[0].id] = eval(ast.unparse(node.value), {'__builtins__': {}}, names)
            except Exception:
                continue
    return {}, []


def settings_of(path, words):
    """The settings that another script would have, started with these words: train.py with config/x.py --seed=3."""
    settings, rules = read_script(path)
    defaults = dict(settings)
    with redirect_stdout(None):  # nothing is overridden here
        read_words(words, settings, defaults)
    check(rules, settings)
    return settings


def read_words(words, settings, defaults, operands=None):
    """Put the words of a command line into settings, whose defaults tell the types. Returns the names they set."""
    words, names = list(words), set()
    while words:
        word = words.pop(0)
        if word.startswith('--'):
            name, is_joined, text = word[2:].partition('=')
            if name not in defaults:
                fail(f'--{name}: there is no such setting{nearest(name, defaults)}; --help lists them all')
            if not is_joined:
                text = next_value(name, words, defaults[name])
            override(settings, name, parse(name, text, defaults[name]))
            names.add(name)
        elif word.endswith('.py') and operands is None:
            names.update(run_config_file(word, settings, defaults))
        elif operands is not None and not word.startswith('-'):
            operands.append(word)
        else:
            fail(f'{word}: settings are given as --name=value, config files as a path that ends in .py')
    return names


def adopt(settings, saved, config, rules, fixed=(), launch=()):
    """
    Take over the settings of saved weights, but for those given on this command line. fixed: names that these
    weights cannot do without, where another value is a mistake. launch: names that belong to this launch alone and
    are not taken over. Returns the new config; every difference is printed.
    """
    for name, value in saved.items():
        if name not in config or name in launch or type(value) is type(config[name]) and value == config[name]:
            continue
        if name not in given or name in fixed and config[name] == 0:  # a size of 0 stands for what there is
            value = check_type(name, value, config[name], f'{name} of the checkpoint')
            print(f'From the checkpoint: {name} = {value}')
            settings[name] = value
        elif name in fixed:
            fail(f'{name} = {config[name]}: these weights have {name} = {value}; another architecture is another run')
        else:
            print(f'Not from the checkpoint: {name} = {config[name]} (it has {value})')
    config = config | {name: settings[name] for name in config if name not in launch}
    check([rule for rule in rules if given.intersection(names_in(rule))], config)  # the others held when it was saved
    return config


def require(package, setting):
    """An optional package must be there before any work begins."""
    if importlib.util.find_spec(package) is None:
        fail(f'{setting} needs the package {package}: pip install {package}')


def check(rules, config):
    """Each rule is a Python condition on the settings; the first that does not hold ends the script."""
    for rule in rules:
        condition, _, mend = (part.strip() for part in rule.partition('#'))
        if not eval(condition, {'__builtins__': {}}, config):
            values = ', '.join(f'{name} = {config[name]!r}' for name in names_in(condition))
            fail(f'{values}: {mend or f"it must hold that {condition}"}')


def names_in(condition):
    """The names in a Python expression, each once, in their order."""
    return dict.fromkeys(node.id for node in ast.walk(ast.parse(condition)) if isinstance(node, ast.Name))


def override(settings, name, value):
    settings[name] = value
    print(f'Overriding: {name} = {value}')


def next_value(name, words, default):
    """The value of '--name value'. A bare '--flag' is True, and takes the next word only if that says so."""
    if isinstance(default, bool) or default is None:
        return words.pop(0) if words and words[0].lower() in ('true', 'false', '1', '0') else 'true'
    if not words or words[0].startswith('--'):
        fail(f'--{name} needs a value: --{name}={default}')
    return words.pop(0)


def parse(name, text, default):
    """The text of a value as the type of the setting's default."""
    if isinstance(default, str):
        return text
    if isinstance(default, bool) or default is None:
        values = {'true': True, '1': True, 'false': False, '0': False} | ({'none': None} if default is None else {})
        if text.lower() not in values:
            fail(f'--{name}={text}: {text!r} is neither True nor False')
        return values[text.lower()]
    kind = type(default)
    try:
        return check_type(name, kind(text), default, f'--{name}={text}')
    except ValueError:
        fail(f'--{name}={text}: {text!r} is no {"whole " if kind is int else ""}number; one like {default} is needed')


def check_type(name, value, default, where):
    """The value if it fits the type of the default (an int is taken for a float), else the end."""
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    fits = isinstance(value, bool) or value is None if default is None else type(value) is type(default)
    if not fits:
        kind = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'a text'}.get(
            type(default), 'True, False or None')
        fail(f'{where}: {value!r} does not fit {name}, which takes {kind}, like {default!r}')
    if isinstance(value, float) and not math.isfinite(value):
        fail(f'{where}: {name} must be a finite number, like {default}')
    return value


def run_config_file(word, settings, defaults):
    """Run a config file in a namespace of the settings so far, and take over what it has assigned: those names."""
    namespace, assigned = execute(word, {name: settings[name] for name in defaults})
    check_names(word, namespace, assigned, defaults)
    print(f'Overriding config with {word}')
    names = []
    for name, value in namespace.items():
        if name in defaults and (name in assigned or value is not settings[name]):
            override(settings, name, check_type(name, value, defaults[name], f'{word}: {name} = {value!r}'))
            names.append(name)
    return names


def check_names(word, namespace, assigned, known):
    """What a file of a user's own assigns to is a setting, or starts with an underscore; else it is a typing error."""
    for name in assigned:  # a name that is not in the namespace belongs to one of its functions, or was deleted
        if name in namespace and name not in known and not name.startswith('_') and not isinstance(
                namespace[name], types.ModuleType | types.FunctionType | type):
            fail(f'{word}: {name}: there is no such setting{nearest(name, known)}; '
                 'a name of your own starts with an underscore')


def execute(word, names, kind='config'):
    """Run a file of a user's own, from here or from the house, with these names: its namespace, what it assigns."""
    path = Path(word)
    if not path.exists() and (HOUSE / path).exists():
        path = HOUSE / path
    try:
        source = path.read_text(encoding='utf-8')
        tree = ast.parse(source)
        namespace = names | {'__file__': str(path), '__name__': '__config__'}
        exec(compile(tree, str(path), 'exec'), namespace)
    except FileNotFoundError:
        known = sorted(p.relative_to(HOUSE).as_posix() for p in (HOUSE / 'config').rglob('*.py'))
        fail(f'{word}: there is no such {kind} file{nearest(word, known)}')
    except SyntaxError as error:
        fail(f'{word}, line {error.lineno}: {error.msg}')
    except (Exception, SystemExit) as error:  # whatever their own code does wrong is theirs to mend
        if isinstance(error, SystemExit) and error.code == 2:  # a fail() of ours, which has told it
            raise
        fail(f'{word}: {type(error).__name__}: {error}')
    return namespace, dict.fromkeys(
        n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))


def nearest(name, names):
    close = difflib.get_close_matches(name.replace('-', '_'), names, n=1)
    return f'; did you mean {close[0]}?' if close else ''


def print_help(settings, names):
    """The script's docstring, then its settings as the source has them: name, default, comment."""
    print(settings['__doc__'].strip())
    if names:
        print('\nsettings (--name=value, or in a config file):')
    source = Path(settings['__file__']).read_text(encoding='utf-8')
    lines = source.splitlines()
    assignments, missing = {}, set(names)
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', None) in missing:
            missing.remove(node.targets[0].id)  # further down a script may assign to it again
            assignments[node.lineno] = node
    for number in range(min(assignments, default=1) - 1, max(assignments, default=-1) + 1):
        line = lines[number - 1]
        if number in assignments:
            node = assignments[number]
            comment = line[node.end_col_offset:].strip(' #')
            print(f'  --{node.targets[0].id + "=" + ast.unparse(node.value):32} {comment}')
        elif line.startswith('# ') and not line.startswith('# --'):
            print(f'\n{line[2:]}')
