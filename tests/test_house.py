"""The arrows of the house, read from its imports: who may know whom."""

import ast
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parent.parent
DOORS = sorted(path.stem for path in HOUSE.glob('*.py') if path.stem != 'model')
ROOMS = sorted(path.stem for path in (HOUSE / 'kit').glob('*.py') if path.stem != '__init__')


def imports(path):
    """The modules that a file imports, anywhere in it, as dotted names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f'{node.module}.{alias.name}' for alias in node.names} | {node.module}
    return names


def rooms(path):
    return {name.split('.')[1] for name in imports(path) if name.startswith('kit.')} & set(ROOMS)


def test_model_knows_torch_alone():
    assert {name.split('.')[0] for name in imports(HOUSE / 'model.py')} <= {'math', 'dataclasses', 'torch'}


@pytest.mark.parametrize('room', ROOMS)
def test_kit_knows_neither_the_model_nor_a_door(room):
    assert not {name.split('.')[0] for name in imports(HOUSE / f'kit/{room}.py')} & {'model', *DOORS}


@pytest.mark.parametrize('door', DOORS)
def test_no_door_opens_another(door):
    assert not {name.split('.')[0] for name in imports(HOUSE / f'{door}.py')} & set(DOORS)


def test_no_circles():
    below = {room: rooms(HOUSE / f'kit/{room}.py') for room in ROOMS}
    while below:
        ground = [room for room, knows in below.items() if not knows & below.keys()]
        assert ground, f'these rooms know each other in a circle: {sorted(below)}'
        for room in ground:
            del below[room]


def test_one_room_knows_torch_distributed():
    assert [room for room in ROOMS if any('torch.distributed' in name or 'torch.nn.parallel' in name
                                          for name in imports(HOUSE / f'kit/{room}.py'))] == ['ranks']


def test_the_loop_reads_as_the_algorithm():
    """Few lines and branches, comments among them; what else a run does belongs elsewhere."""
    source = (HOUSE / 'train.py').read_text(encoding='utf-8')
    tree = ast.parse(source)
    loop, = [node for node in tree.body if isinstance(node, ast.While)]
    branches = [node for node in ast.walk(loop) if isinstance(node, ast.If | ast.IfExp)]
    leaves = [node for node in ast.walk(loop) if isinstance(node, ast.Break | ast.Continue | ast.Return)]
    assert loop.end_lineno - loop.lineno + 1 <= 45 and len(branches) <= 10 and len(leaves) == 1
    assert len(source.splitlines()) <= 420
    given = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)
             and any(ast.unparse(arg) == 'globals()' for arg in node.args)]
    assert given == ['overrides.apply(globals(), rules.TRAIN)'], 'no other helper gets the settings to change them'


def test_the_readme_has_a_line_for_every_room():
    text = (HOUSE / 'README.md').read_text(encoding='utf-8')
    for name in [f'{door}.py' for door in DOORS] + ['model.py'] + [f'{room}.py' for room in ROOMS]:
        assert name in text, name
