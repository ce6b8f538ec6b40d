"""Who may import whom, read from the source: scripts, model.py and the subpackages of kit."""

import ast
import re
from pathlib import Path

import pytest

from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob('*.py') if path.stem not in ('model', 'attention'))
MODULES = {'.'.join(path.relative_to(ROOT).with_suffix('').parts): path
           for path in sorted((ROOT / 'kit').rglob('*.py')) if path.stem != '__init__'}
ORDER = 'base', 'data', 'watch', 'learn', 'state'  # what stands lower comes first; each may import those before it
UPPERMOST = 'run', 'sweeps'  # they import all of these, and not each other


def imports(path):
    """The modules that a file imports, anywhere in it, as dotted names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}: imports from the root on, so that this test sees them'
            names |= {f'{node.module}.{alias.name}' for alias in node.names} | {node.module}
    return names


def of_kit(name):
    """The modules of kit that one of them imports."""
    return imports(MODULES[name]) & MODULES.keys()


def test_there_is_something_to_look_at():
    assert {'train', 'sample', 'sweep'} <= set(SCRIPTS) and len(MODULES) > 30
    assert {name.split('.')[1] for name in MODULES} == {*ORDER, *UPPERMOST}


def test_model_and_its_attention_import_torch_alone():
    """So that the two files can be taken elsewhere."""
    foreign = {name.split('.')[0] for file in ('model.py', 'attention.py') for name in imports(ROOT / file)}
    assert foreign - {'attention'} <= {'math', 'contextlib', 'dataclasses', 'itertools', 'typing', 'torch'}


@pytest.mark.parametrize('name', MODULES)
def test_kit_imports_neither_the_model_nor_a_script_nor_what_stands_above(name):
    assert not {other.split('.')[0] for other in imports(MODULES[name])} & {'model', 'attention', *SCRIPTS}
    mine = name.split('.')[1]
    below = ORDER[:ORDER.index(mine)] if mine in ORDER else ORDER
    for other in of_kit(name):
        assert other.split('.')[1] in (mine, *below), f'{name} imports {other}, which stands above it'


@pytest.mark.parametrize('script', SCRIPTS)
def test_no_script_imports_another(script):
    assert not {name.split('.')[0] for name in imports(ROOT / f'{script}.py')} & set(SCRIPTS)


def test_no_circles():
    left = {name: of_kit(name) for name in MODULES}
    while left:
        ground = [name for name, others in left.items() if not others & left.keys()]
        assert ground, f'these modules import each other in a circle: {sorted(left)}'
        for name in ground:
            del left[name]


def test_one_module_knows_torch_distributed():
    """And a second its checkpoints alone: what a shard is, DCP knows, and it takes the group of the ranks as it is."""
    known = {name: {other for other in imports(path) if 'torch.distributed' in other or 'torch.nn.parallel' in other}
             for name, path in MODULES.items()}
    assert {name for name, found in known.items() if found} == {'kit.base.ranks', 'kit.state.dcp'}
    assert all(other == 'torch.distributed' or other.startswith('torch.distributed.checkpoint')
               for other in known['kit.state.dcp'])


@pytest.mark.parametrize('name', [name for name in MODULES if name != 'kit.state.pretrained'])
def test_kit_knows_no_parameter_by_its_name(name):
    """Nor a module of the model, in strings or attributes; the exchange with other formats apart."""
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=8))
    names = {part for parameter in model.state_dict() for part in parameter.split('.') if len(part) > 2}
    names -= {'weight', 'bias'}
    assert {'wte', 'wpe', 'ln_f', 'c_attn', 'lm_head'} <= names
    tree = ast.parse(MODULES[name].read_text(encoding='utf-8'))
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    used = {word for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
            and id(node) not in docs for word in re.findall(r'\w+', node.value)}
    used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not used & names


def test_the_loop_reads_as_the_algorithm():
    """Few lines and branches, comments among them; what else a run does belongs elsewhere."""
    source = (ROOT / 'train.py').read_text(encoding='utf-8')
    tree = ast.parse(source)
    loop, = [node for node in tree.body if isinstance(node, ast.While)]
    branches = [node for node in ast.walk(loop) if isinstance(node, ast.If | ast.IfExp)]
    leaves = [node for node in ast.walk(loop) if isinstance(node, ast.Break | ast.Continue | ast.Return)]
    assert loop.end_lineno - loop.lineno + 1 <= 45 and len(branches) <= 10 and len(leaves) == 1
    assert len(source.splitlines()) <= 420 and len((ROOT / 'model.py').read_text().splitlines()) <= 450
    given = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)
             and any(ast.unparse(arg) == 'globals()' for arg in node.args)]
    call = 'overrides.apply(globals(), rules.TRAIN, more_help=presets.help_text(GPTConfig))'
    assert given == [call], 'no other helper gets the settings to change them'


def test_no_module_is_long():
    long = {path.name: n for path in [*ROOT.glob('*.py'), *MODULES.values()]
            if (n := len(path.read_text(encoding='utf-8').splitlines())) > 560}
    assert not long


def test_the_readme_has_a_line_for_every_script_and_module():
    tree = (ROOT / 'README.md').read_text(encoding='utf-8').split('## The tree')[1]
    names = [f'{name}.py' for name in (*SCRIPTS, 'model', 'attention', *(path.stem for path in MODULES.values()))]
    lines = [line.split()[0] for line in tree.splitlines() if line.startswith('    ') and line.strip()]
    assert not set(names) - {line.rpartition('/')[2] for line in lines}


@pytest.mark.parametrize('path', sorted((ROOT / 'bench').glob('*.py')), ids=lambda path: path.stem)
def test_every_bench_starts(run, path):
    result = run(path, '--help')
    assert result.status == 0 and '--' in result.out, result.err
