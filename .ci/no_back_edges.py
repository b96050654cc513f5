"""Fail if a notebook depends on itself or on a later notebook, also by an arrow that is hidden:
an import inside a function, a module named in a string, a subprocess that starts a later room."""
import ast
import json
import re
import sys
from pathlib import Path

from notebooks import notebooks

ORDER = {path.stem.split('_', 1)[1]: k for k, path in enumerate(notebooks())}
# The console scripts: name of the command → module.
SCRIPTS = dict(re.findall(r'^\s+(\w+)=ribo_nb\.(\w+):', Path('settings.ini').read_text(), re.M))


def code(path):
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    source = '\n'.join(''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code')
    # Lines such as `%matplotlib inline` and `!ls` are no Python.
    return re.sub(r'^[%!].*$', '', source, flags=re.M)


def imported(node):
    """Modules of ours that an import statement names."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module == 'ribo_nb':
        names = [f'ribo_nb.{alias.name}' for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        names = [node.module or '']
    else:
        names = []
    return [name.split('.')[1] for name in names if name.startswith('ribo_nb.')]


def named(node):
    """Modules of ours that a string names in order to load or to start them."""
    # subprocess.run(['ribo_kaggle', …])
    if isinstance(node, (ast.List, ast.Tuple)) and node.elts:
        first = getattr(node.elts[0], 'value', '')
        return [SCRIPTS[first]] if first in SCRIPTS else []
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        return []
    # [..., '-m', 'ribo_nb.kaggle'] and import_module('ribo_nb.kaggle'); 'python -m ribo_nb.kaggle'
    return re.findall(r'(?:^|-m\s+)ribo_nb\.(\w+)(?:$|\s)', node.value)


def back_edges():
    for k, path in enumerate(notebooks()):
        nodes = list(ast.walk(ast.parse(code(path), str(path))))
        imports = sum(map(imported, nodes), [])
        for module in imports:
            if ORDER.get(module, k) >= k:
                yield f'{path.name} imports ribo_nb.{module}: a notebook may import from lower numbers only'
        starts = sum(map(named, nodes), [])
        for module in starts:
            # A room may start itself: torchrun does.
            if ORDER.get(module, k) > k:
                yield f'{path.name} starts ribo_nb.{module}, a later room: hand it a function or a path'


if __name__ == '__main__':
    sys.exit('\n'.join(dict.fromkeys(back_edges())) or 0)
