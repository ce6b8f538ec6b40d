"""
A script's settings are its module-level names. What one may be stands at the beginning of its comment, conditions
between several are given to apply. Config files and --name=value override them:

    dropout = 0.0   # 0 <= x < 1: share of activations dropped
    config = overrides.apply(globals(), rules=['not (dropout and n_embd > 64)  # dropout is for small models'])

$ python train.py config/train_gpt2.py --batch_size=8 --compile=False

Whatever is wrong with them ends the script with one line on stderr and status 2, before anything is written.
"""

import ast
import difflib
import importlib.util
import math
import os
import re
import sys
import tokenize
import types
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kit.base import errors, ranks
from kit.base.errors import ROOT, Failed, fail, reason, shown

TYPES = int, float, bool, str, type(None)  # of settings
BOUND, WORD = r'-?\d[\d_]*(\.\d+)?(e-?\d+)?(\*\*\d+)?', r'[\w.-]+'
NUMBER = re.compile(rf'[<>]=? ?{BOUND}|{BOUND} ?<=? ?x ?<=? ?{BOUND}')
TEXT = re.compile(rf'not empty|{WORD}(, {WORD})* or {WORD}')
LAUNCH = 'this launch alone'  # the heading of settings that a resume does not take over begins so; a blank line ends it


class Spec(NamedTuple):
    text: str     # what a setting may be, as its comment begins: '0 <= x < 1'
    meaning: str  # what the comment says behind the colon


@dataclass(frozen=True)
class Script:
    settings: dict  # name: default
    specs: dict     # name: Spec, of those whose comment begins with what they may be
    launch: set     # names of those that belong to one launch alone
    rules: list     # conditions between several of them, as apply takes them
    unclear: list   # names of numbers whose comment does not begin so, and which are not checked


given = set()  # names that this command line or one of its config files has set: a resumed run keeps those
replaced = {}  # name: the number that a 0 there has replaced, where 0 stands for what is found, see kit/run/fitting.py
running = Script({}, {}, set(), (), [])  # the script that has called apply


def apply(settings, rules=(), operands=None, more_help=''):
    """
    Read sys.argv into the settings of a script.

    settings: the script's globals(); its names of type int, float, bool, str or None are the settings. A setting
              that is None by default is True, False or, while it stays None, chosen by the script. Where __file__ has
              the source, what the comments say that they may be is checked, see read_spec.
    rules:    conditions between them in Python, e.g. 'test or not checkpoint'; a trailing # comment tells the remedy.
    operands: a list that takes the bare words; without it a bare word is an error.
    more_help: what --help says behind the settings.
    Returns the settings as a dict. Arguments count from left to right, the later ones win.
    """
    global running
    if 'backend' not in settings:  # a script of one process
        ranks.be_alone()
    if hasattr(sys.stdout, 'reconfigure'):  # no character may end a run on a console that lacks it; live through pipes
        sys.stdout.reconfigure(errors='replace', line_buffering=True)
    sys.excepthook = errors.tell
    defaults = {k: v for k, v in settings.items() if not k.startswith('_') and type(v) in TYPES}
    if {'--help', '-h'} & set(sys.argv[1:]):
        print_help(settings, list(defaults))
        if more_help:
            print(f'\n{more_help}')
        raise SystemExit(0)
    if not os.path.isfile(settings.get('__file__', '')):
        print('WARNING: the source of this script is no file, so what its comments say of the settings is not checked')
    running = read_script(settings.get('__file__', ''), defaults, rules)
    for name in running.unclear:
        print(f'WARNING: {name} is not checked: its comment does not begin with what it may be, as in ">= 0: ..."')
    given.update(read_words(sys.argv[1:], settings, defaults, operands))
    config = {k: settings[k] for k in defaults}
    check_settings(running, config)
    return config


def read_script(path, settings=None, rules=None):
    """
    The Script in a file, as its source has it: nothing of it is run. Its rules are a list there, or that of a module it
    imports: rules.TRAIN. settings, rules: those of a script that is running.
    """
    nodes, comments, headings, blanks, rules_source, imported = read_source(path)
    if settings is None:
        names = {}
        for node in nodes:
            with suppress(Exception):  # 60 * 1000 is a default too; a call is none
                names[node.targets[0].id] = eval(ast.unparse(node.value), {'__builtins__': {}}, names)
        settings = {name: value for name, value in names.items() if not name.startswith('_') and type(value) in TYPES}
        modules = {name: importlib.import_module(imported[name]) for name in names_in(rules_source) if name in imported}
        rules = eval(rules_source, {'__builtins__': {}}, names | modules)
    first = {node.targets[0].id: node.end_lineno for node in reversed(nodes)}  # a script may assign to a name again
    lines = {name: first[name] for name in settings if name in first}
    specs = {name: read_spec(comments.get(line, ''), settings[name]) for name, line in lines.items()}
    unclear = [name for name, spec in specs.items() if not spec and type(settings[name]) in (int, float)]
    begin = min((line for line, text in headings.items() if text.startswith(LAUNCH)), default=math.inf)
    end = min((line for line in blanks if line > begin), default=math.inf)
    launch = {name for name, line in lines.items() if begin < line < end}
    return Script(settings, {name: spec for name, spec in specs.items() if spec}, launch, rules, unclear)


def read_source(path):
    """
    What a script's source has down to its call of apply: the nodes of its assignments, {line: comment behind code},
    {line: comment on a line of its own}, the blank lines, the rules that the call is given, and {name: dotted name} of
    what `from a import b` has made. Without file or call: nothing.
    """
    lines = Path(path).read_bytes().splitlines(keepends=True) if os.path.isfile(path) else []
    comments, headings, blanks, code = {}, {}, [], ''
    for token in tokenize.tokenize(iter(lines).__next__):
        if token.type == tokenize.COMMENT:
            (comments if token.start[1] else headings)[token.start[0]] = token.string.strip('# ')
        elif token.type == tokenize.NL and not token.line.strip():
            blanks.append(token.start[0])
        elif token.type in (tokenize.NAME, tokenize.OP):
            code += token.string
        elif token.type == tokenize.NEWLINE:
            if '.apply(' in code:  # what is assigned from here on is no setting
                break
            code = ''
    nodes = ast.parse(b''.join(lines[:token.start[0]])).body
    imported = {alias.asname or alias.name: f'{node.module}.{alias.name}'
                for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    calls = [n for node in nodes[-1:] for n in ast.walk(node)
             if isinstance(n, ast.Call) and getattr(n.func, 'attr', '') == 'apply']
    if not calls:
        return [], {}, {}, [], '()', {}
    rules = [*calls[0].args[1:2], *(word.value for word in calls[0].keywords if word.arg == 'rules')]
    nodes = [ast.copy_location(ast.Assign([node.target], node.value), node)  # seed: int = 1337
             if isinstance(node, ast.AnnAssign) and node.value else node for node in nodes[:-1]]
    nodes = [node for node in nodes if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)]
    return nodes, comments, headings, blanks, ast.unparse(rules[0]) if rules else '()', imported


def read_spec(comment, default):
    """
    The Spec of a setting: its comment, or what stands before the first colon of it, as '>= 0' or '0 <= x < 1' for a
    number and, for a text, 'not empty' or 'cut or drop', of which its default is one. None where the comment begins
    with nothing of the kind.
    """
    text, _, meaning = (part.strip() for part in comment.partition(':'))
    grammar = {int: NUMBER, float: NUMBER, str: TEXT}.get(type(default))
    if not grammar or not grammar.fullmatch(text):
        return None
    if isinstance(default, str) and text != 'not empty' and default not in choices_of(text):
        return None  # words of another kind
    return Spec(text, meaning)


def choices_of(text):
    """'cut or drop' -> ['cut', 'drop']."""
    return re.split(', | or ', text)


def settings_of(path, words):
    """The settings that another script would have, started with these words: train.py with config/x.py --seed=3."""
    script = read_script(path)
    settings = dict(script.settings)
    with redirect_stdout(None):  # nothing is overridden here
        read_words(words, settings, script.settings)
    check_settings(script, settings)
    return settings


def read_words(words, settings, defaults, operands=None):
    """Put the words of a command line into settings, whose defaults tell the types. Returns the names they set."""
    words, names = list(words), set()
    while words:
        word = words.pop(0)
        if word.startswith('--'):
            name, is_joined, text = word[2:].partition('=')
            if name not in defaults:
                fail(f'--{name[:80]}: there is no such setting{nearest(name, defaults)}; --help lists them all')
            if not is_joined:
                text = next_value(name, words, defaults[name])
            override(settings, name, parse(name, text, defaults[name]))
            names.add(name)
        elif word.endswith('.py') and operands is None:
            names.update(run_config_file(word, settings, defaults))
        elif operands is not None and not word.startswith('-'):
            operands.append(word)
        else:
            fail(f'{shown(word)}: settings are given as --name=value, config files as a path that ends in .py')
    return names


def adopt(config, saved, fixed=()):
    """
    Take over the settings of saved weights, but for those given on this command line and those of this launch alone.
    config: what apply has returned; saved: {name: value}; fixed: names that these weights cannot do without, where
    another value is a mistake. Returns the new config; every difference is printed.
    """
    config = dict(config)
    if strange := [f'{name} = {shown(value)}' for name, value in saved.items() if name not in config]:
        print(f'Not taken over, since this script has no such settings: {", ".join(strange)}')
    for name, value in saved.items():
        if name not in config or name in running.launch or type(value) is type(config[name]) and value == config[name]:
            continue
        if name not in given or name in fixed and config[name] == 0:  # a size of 0 stands for what there is
            config[name] = check_type(name, value, config[name], f'{name} of the checkpoint')
            print(f'From the checkpoint: {name} = {config[name]}')
        elif name in fixed:
            fail(f'{name} = {config[name]}: these weights have {name} = {shown(value)}; another architecture is '
                 'another run')
        else:
            print(f'Not from the checkpoint: {name} = {config[name]} (it has {shown(value)})')
    check_settings(running, config, given)  # the other rules held when it was saved
    return config


def require(package, setting):
    """An optional package must be there before any work begins."""
    if importlib.util.find_spec(package) is None:
        fail(f'{setting} needs the package {package}: pip install {package}')


def check_settings(script, config, names=None):
    """What must hold of the settings of a Script: their comments first, then the rules, those with these names."""
    for name, spec in script.specs.items():
        check_spec(name, config[name], spec)
    check([rule for rule in script.rules if names is None or names.intersection(names_in(rule))], config)


def check_spec(name, value, spec):
    """The value is what the comment of the setting says, else the end."""
    meaning = f' ({spec.meaning})' if spec.meaning else ''
    if not isinstance(value, str):
        condition = spec.text.replace('x', name) if 'x' in spec.text else f'{name} {spec.text}'
        check([f'{condition}  # it must hold that {condition}{meaning}'], {name: value})
    elif spec.text == 'not empty':
        if not value:
            fail(f"{name} = '': it must not be empty{meaning}")
    elif value not in (choices := choices_of(spec.text)):
        fail(f'{name} = {shown(value)}: it is one of {", ".join(choices)}{nearest(value, choices)}')


def check(rules, config):
    """Each rule is a Python condition on the settings; the first that does not hold ends the script."""
    for rule in rules:
        condition, _, remedy = (part.strip() for part in rule.partition('#'))
        if strange := [name for name in names_in(condition) if name not in config]:
            fail(f'the rule {condition!r} names {strange[0]}, and the script has no such setting; remove it there')
        if not eval(condition, {'__builtins__': {}}, config):
            values = ', '.join(f'{name} = {shown(config[name])}' for name in names_in(condition))
            fail(f'{values}: {remedy or f"it must hold that {condition}"}')


def names_in(condition):
    """The names in a Python expression, each once, in their order."""
    return dict.fromkeys(node.id for node in ast.walk(ast.parse(condition)) if isinstance(node, ast.Name))


def override(settings, name, value):
    if type(value) is int and value == 0 and settings[name]:
        replaced[name] = settings[name]
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
        return check_type(name, text, default, f'--{name}')
    if isinstance(default, bool) or default is None:
        values = {'true': True, '1': True, 'false': False, '0': False} | ({'none': None} if default is None else {})
        if text.lower() not in values:
            fail(f'--{name}: {shown(text)} is neither True nor False')
        return values[text.lower()]
    kind = type(default)
    try:
        value = kind(text)
    except ValueError:  # whatever Python takes for a number is one: 1_000, +5, 1e-3
        fail(f'--{name}: {shown(text)} is no {"whole " if kind is int else ""}number; one like {default} is needed')
    return check_type(name, value, default, f'--{name}={text[:80]}')


def check_type(name, value, default, where):
    """The value if it fits the type of the default (an int is taken for a float), else the end."""
    if type(value) is int and not -2**63 <= value < 2**63:
        fail(f'{where}: {shown(value)} is beyond all bounds; whole numbers go up to 2**63 - 1')
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    fits = isinstance(value, bool) or value is None if default is None else type(value) is type(default)
    if not fits:
        kind = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'a text'}.get(
            type(default), 'True, False or None')
        fail(f'{where}: {shown(value)} does not fit {name}, which takes {kind}, like {default!r}')
    if isinstance(value, float) and not math.isfinite(value):
        fail(f'{where}: {value} does not fit {name}, which must be a finite number, like {default}')
    if isinstance(value, str) and not is_word(value):
        fail(f'{where}: {shown(value)} holds a character that no command line and no name of a file can hold')
    return value


def is_word(text):
    """Whether a command line could hold it. Bytes that are no UTF-8 are there as surrogates, as in names of files."""
    try:
        return b'\0' not in text.encode('utf-8', 'surrogateescape')
    except UnicodeEncodeError:
        return False


def run_config_file(word, settings, defaults):
    """Run a config file in a namespace of the settings so far, and take over what it has assigned: those names."""
    namespace, assigned = execute(word, {name: settings[name] for name in defaults})
    check_names(word, namespace, assigned, defaults)
    print(f'Overriding config with {word}')
    names = []
    for name, value in namespace.items():
        if name in defaults and (name in assigned or value is not settings[name]):
            override(settings, name, check_type(name, value, defaults[name], f'{word}: {name}'))
            names.append(name)
    return names


def check_names(word, namespace, assigned, known):
    """What a file of a user's own assigns to is a setting, or starts with an underscore; else it is a typing error."""
    for name in assigned:  # a name that is not in the namespace belongs to one of its functions, or was deleted
        if name in namespace and name not in known and not name.startswith('_') and not isinstance(
                namespace[name], types.ModuleType | types.FunctionType | type):
            fail(f'{word}: {name[:80]}: there is no such setting{nearest(name, known)}; '
                 'a name of your own starts with an underscore')


def execute(word, names, kind='config'):
    """Run a file of a user's own, from here or the repository, with these names: its namespace, what it assigns."""
    path = word if os.path.exists(word) else str(ROOT / word)
    if not os.path.exists(path):
        known = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / 'config').rglob('*.py'))
        fail(f'{shown(word)}: there is no such {kind} file{nearest(word, known)}')
    if not os.path.isfile(path):
        fail(f'{word}: it is no file')
    try:
        tree = ast.parse(Path(path).read_bytes())  # in the encoding that it names, UTF-8 where it names none
        namespace = names | {'__file__': path, '__name__': '__config__'}
        exec(compile(tree, path, 'exec'), namespace)
    except SyntaxError as error:
        fail(f'{word}, {f"line {error.lineno}" if error.lineno else "which is to be Python in UTF-8"}: {error.msg}')
    except (Failed, KeyboardInterrupt):
        raise
    except BaseException as error:  # whatever their own code does wrong is theirs to fix, a sys.exit(2) too
        fail(f'{word}: {reason(error)}')
    return namespace, dict.fromkeys(
        n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))


def nearest(name, names):
    close = difflib.get_close_matches(str(name)[:80].replace('-', '_'), names, n=1, cutoff=0.55)
    return f'; did you mean {close[0]}?' if close else ''


def print_help(settings, names):
    """The script's docstring, then its settings as the source has them: name, default, comment."""
    print(settings['__doc__'].strip())
    if names:
        print('\nsettings (--name=value, or in a config file):')
    nodes, comments, headings, *_ = read_source(settings['__file__'])
    first = {node.targets[0].id: node for node in reversed(nodes)}  # further down a script may assign to it again
    lines = {first[name].end_lineno: first[name] for name in names if name in first}
    for number in range(min(lines, default=1) - 1, max(lines, default=-1) + 1):
        if number in lines:
            setting = f'{lines[number].targets[0].id}={ast.unparse(lines[number].value)}'
            print(f'  --{setting:32} {comments.get(number, "")}')
        elif number in headings and not headings[number].startswith('--'):
            print(f'\n{headings[number]}')
